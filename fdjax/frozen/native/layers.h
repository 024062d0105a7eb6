// Operations between products: biases, sums, pools, elementwise operations, copies.

namespace {

// Writes the initial values of a map: a bias, `step` floats from pixel to pixel, plus a map (or null).
[[maybe_unused]] void start_map(int pixels, int channels, const float* bias, int step, const float* added, float* y) {
  for (int p = 0; p < pixels; p++, bias += step, y += channels, added += added ? channels : 0)
    each_vector(channels, [&](auto lanes, int j) {
      constexpr int L = decltype(lanes)::value;
      store<L>(y + j, added ? load<L>(bias + j) + load<L>(added + j) : load<L>(bias + j));
    });
}

[[maybe_unused]] void clamp_map(int numbers, Range range, float* y) {
  each_vector(numbers, [&](auto lanes, int j) {
    constexpr int L = decltype(lanes)::value;
    store<L>(y + j, clamped(load<L>(y + j), range));
  });
}

// Brings channels to their places (-1: zero), and applies a bias, `step` floats from pixel to pixel, and a range.
[[maybe_unused]] void placed(int pixels, int from, int channels, const int* place, const float* bias, int step, Range range,
            const float* x, float* y) {
  for (int p = 0; p < pixels; p++, x += from, bias += step, y += channels)
    for (int c = 0; c < channels; c++) {
      const Vec<4> v = {(place[c] < 0 ? 0.0f : x[place[c]]) + bias[c]};
      y[c] = clamped(v, range)[0];
    }
}

// Computes the sum over pixels, times a factor.
[[maybe_unused]] void sum_pixels(int pixels, int channels, float factor, const float* x, float* y) {
  each_vector(channels, [&](auto lanes, int j) {
    constexpr int L = decltype(lanes)::value;
    Vec<L> sum = {};
    for (int p = 0; p < pixels; p++) sum += load<L>(x + static_cast<std::ptrdiff_t>(p) * channels + j);
    store<L>(y + j, sum * factor);
  });
}

// Computes the maximum or the sum of each window over a map; pixels outside the map do not count.
struct Pool {
  int height, width, channels, out_height, out_width, rows, columns, row_stride, column_stride, top, left;
  bool largest;
};
[[maybe_unused]] void pool(const Pool& s, const float* x, float* y) {
  for (int row = 0; row < s.out_height; row++)
    for (int column = 0; column < s.out_width; column++, y += s.channels) {
      const int r = row * s.row_stride - s.top, c = column * s.column_stride - s.left;
      const int first = std::max(0, r), last = std::min(s.height, r + s.rows);
      each_vector(s.channels, [&](auto lanes, int j) {
        constexpr int L = decltype(lanes)::value;
        Vec<L> found = Vec<L>{} + (s.largest ? -INFINITY : 0.0f);
        for (int i = first; i < last; i++)
          for (int k = std::max(0, c); k < std::min(s.width, c + s.columns); k++) {
            const Vec<L> v = load<L>(x + static_cast<std::ptrdiff_t>(i * s.width + k) * s.channels + j);
            if (s.largest) found = v > found ? v : found;
            else found += v;
          }
        store<L>(y + j, found);
      });
    }
}

// Computes y = f(a, b) elementwise; `step` is 0 if all pixels of an operand are the same.
template <class F>
void elementwise(int pixels, int channels, const float* a, int step_a, const float* b, int step_b, float* y, F f) {
  for (int p = 0; p < pixels; p++, a += step_a, b += step_b, y += channels)
    each_vector(channels, [&](auto lanes, int j) {
      constexpr int L = decltype(lanes)::value;
      store<L>(y + j, f(load<L>(a + j), load<L>(b + j)));
    });
}
// Computes y = b where `which` is not 0, else a; a step is 0 if all pixels of an operand are the same.
[[maybe_unused]] void selected(int pixels, int channels, const float* which, int step, const float* a, int step_a,
                               const float* b, int step_b, float* y) {
  for (int p = 0; p < pixels; p++, which += step, a += step_a, b += step_b, y += channels)
    each_vector(channels, [&](auto lanes, int j) {
      constexpr int L = decltype(lanes)::value;
      store<L>(y + j, load<L>(which + j) != 0.0f ? load<L>(b + j) : load<L>(a + j));
    });
}
template <class T, class F>
FDJAX_INLINE T each_lane(T x, F f) {
  for (std::size_t l = 0; l < sizeof(T) / sizeof(float); l++) x[l] = f(x[l]);
  return x;
}

// Copies numbers [size] from one strided array to another.
struct Strided {
  int size[6];
  std::ptrdiff_t from[6], to[6];
};
[[maybe_unused]] void copy_strided(const Strided& s, const float* x, float* y, int axis = 0) {
  if (axis < 5) {
    for (int i = 0; i < s.size[axis]; i++) copy_strided(s, x + i * s.from[axis], y + i * s.to[axis], axis + 1);
  } else if (s.from[5] == 1 && s.to[5] == 1) {
    std::memcpy(y, x, sizeof(float) * s.size[5]);
  } else {
    for (int i = 0; i < s.size[5]; i++) y[i * s.to[5]] = x[i * s.from[5]];
  }
}

}  // namespace
