// Writers and readers. They compute a panel of channels at a time, so that it stays in the cache. Layers are data: the
// source of the network has constants of `Writer` and `Reader`, and of `Chain` and `Means` in chains.h.

namespace {

constexpr std::ptrdiff_t in_lines(std::ptrdiff_t n) { return (n + LINE - 1) / LINE * LINE; }

// Returns the largest count of the lanes from channel j on; `counts` has the largest of every 8 channels.
template <int L>
FDJAX_INLINE int count_at(const std::uint8_t* counts, int j) {
  int most = counts[j / 8];
  for (int i = 8; i < L; i += 8) most = std::max<int>(most, counts[(j + i) / 8]);
  return most;
}

// Returns how many coefficients all lanes from channel j on have, and how many any lane has; width[n] channels have
// coefficient n.
template <int L, int N>
FDJAX_INLINE void counts_of(const int* width, int j, int* full, int* any) {
  *full = *any = 0;
  for (int n = 0; n < N; n++) *full += width[n] - j >= L, *any += width[n] - j > 0;
}

// Transforms the blocks of a map [height, width]; coefficient n of block b is stored at y + n * band + b * ldy.
template <int K>
void to_bands(From x, int height, int width, int channels, const std::uint8_t* counts, float* y, std::ptrdiff_t band,
              int ldy) {
  const int across = ceil_div(width, K), blocks = ceil_div(height, K) * across;
  for (int b = 0; b < blocks; b++, y += ldy) {
    const int row = b / across * K, column = b % across * K;
    const float* first = x.first + row * x.row + column * x.pixel;
    const bool inside = row + K <= height && column + K <= width;
    each_vector(channels, [&](auto lanes, int j) {
      constexpr int L = decltype(lanes)::value;
      const int count = count_at<L>(counts, j);
      const auto put = [&](int n, Vec<L> v) { store<L>(y + n * band + j, v); };
      if (!count) return;
      if (inside) {
        forward_block<K, L>(count, [&](int i, int k) { return load<L>(first + i * x.row + k * x.pixel + j); }, put);
        return;
      }
      // The edge of the map is repeated.
      const auto at = [&](int i, int k) {
        return load<L>(first + std::min(i, height - 1 - row) * x.row + std::min(k, width - 1 - column) * x.pixel + j);
      };
      forward_block<K, L>(count, at, put);
    });
  }
}

// Transforms back, from channel `first_channel` on, and applies bias and range; width[n] channels have coefficient n.
template <int K>
void to_pixels(const float* y, std::ptrdiff_t band, int ldy, const int* widths, int first_channel, int channels,
               const float* bias, Range range, To x, int height, int width) {
  const int across = ceil_div(width, K), blocks = ceil_div(height, K) * across;
  each_vector(channels, [&](auto lanes, int j) {
    constexpr int L = decltype(lanes)::value;
    int full, any;
    counts_of<L, K * K>(widths, first_channel + j, &full, &any);
    const Vec<L> added = load<L>(bias + j);
    for (int b = 0; b < blocks; b++) {
      const int row = b / across * K, column = b % across * K;
      float* first = x.first + row * x.row + column * x.pixel + j;
      const float* from = y + b * ldy + j;
      const auto get = [&](int n) {
        const Vec<L> v = load<L>(from + n * band);
        return n < full ? v : first_lanes<L>(v, widths[n] - first_channel - j);
      };
      const bool inside = row + K <= height && column + K <= width;
      inverse_block<K, L>(any, get, [&](int i, int k, Vec<L> v) {
        if (inside || (row + i < height && column + k < width))
          store<L>(first + i * x.row + k * x.pixel, clamped(v + added, range));
      });
    }
  });
}

// Transforms coefficients and adds them to a map of `outputs` channels. Channel c has counts[c] coefficients; if counts
// is null, the first widths[n] channels have coefficient n. `place` is the coefficients' channel of each channel of the
// map, or `channels` for none; null: they are the same. `pixels` is memory for a block, [K * K][channels + 1].
template <int K>
void compose(const float* y, std::ptrdiff_t band, int channels, const int* widths, const std::int32_t* counts,
             const int* place, int outputs, float* pixels, To x, int height, int width) {
  const int across = ceil_div(width, K), blocks = ceil_div(height, K) * across;
  for (int b = 0; b < blocks; b++, y += channels) {
    const int row = b / across * K, column = b % across * K;
    float* first = x.first + row * x.row + column * x.pixel;
    each_vector(channels, [&](auto lanes, int j) {
      constexpr int L = decltype(lanes)::value;
      const auto get = [&](int n) {
        const Vec<L> v = load<L>(y + n * band + j);
        if (!counts) return widths[n] - j >= L ? v : first_lanes<L>(v, widths[n] - j);
        typename Lanes<L>::Mask kept;
        std::memcpy(&kept, counts + j, sizeof kept);
        return kept > n ? v : Vec<L>{};
      };
      int any = 0;
      while (any < K * K && widths[any] > j) any++;
      inverse_block<K, L>(any, get, [&](int i, int k, Vec<L> v) {
        if (place) return store<L>(pixels + (i * K + k) * (channels + 1) + j, v);
        if (row + i >= height || column + k >= width) return;
        float* to = first + i * x.row + k * x.pixel + j;
        store<L>(to, load<L>(to) + v);
      });
    });
    if (!place) continue;
    for (int i = 0; i < std::min(K, height - row); i++)
      for (int k = 0; k < std::min(K, width - column); k++) {
        float *to = first + i * x.row + k * x.pixel, *from = pixels + (i * K + k) * (channels + 1);
        from[channels] = 0.0f;
        for (int c = 0; c < outputs; c++) to[c] += from[place[c]];
      }
  }
}

using ToBands = decltype(&to_bands<1>);
using ToPixels = decltype(&to_pixels<1>);

// Describes the copy of a map, with pixels `from` floats apart, into one padded with zeros, with pixels `pitch` apart.
struct Border {
  int height, width, channels, from, top, bottom, left, right, pitch;
};
// Writes rows `first` to `first` + `rows` of the padded map.
template <class T>
void bordered(const Border& s, int first, int rows, const T* x, float* y) {
  const std::ptrdiff_t row = static_cast<std::ptrdiff_t>(s.left + s.width + s.right) * s.pitch;
  for (int r = first - s.top; r < first - s.top + rows; r++, y += row) {
    if (r < 0 || r >= s.height) {
      std::memset(y, 0, sizeof(float) * row);
      continue;
    }
    std::memset(y, 0, sizeof(float) * s.left * s.pitch);
    std::memset(y + row - s.right * s.pitch, 0, sizeof(float) * s.right * s.pitch);
    float* to = y + s.left * s.pitch;
    const T* of = x + static_cast<std::ptrdiff_t>(r) * s.width * s.from;
    if (s.from == s.channels && s.pitch == s.channels) {
      for (int i = 0; i < s.width * s.channels; i++) to[i] = static_cast<float>(of[i]);
      continue;
    }
    std::memset(to, 0, sizeof(float) * s.width * s.pitch);
    if (s.channels == 3 && s.from == 3) {
      for (int p = 0; p < s.width; p++)
        for (int c = 0; c < 3; c++) to[p * s.pitch + c] = static_cast<float>(of[p * 3 + c]);
      continue;
    }
    for (int p = 0; p < s.width; p++)
      for (int c = 0; c < s.channels; c++) to[p * s.pitch + c] = static_cast<float>(of[p * s.from + c]);
  }
}

enum Source { PIXELS, BANDS, COPY };

// A product alone, or the first of a chain. It makes a map [height, width, outputs], a panel of channels at a time.
struct Writer {
  Source source;
  int height, width, outputs, panel;
  Range range;
  // For each panel: [inputs][columns], a bias [columns], and the weights that follow; `unit` floats for each channel.
  std::size_t weights;
  std::ptrdiff_t unit;
  // On pixels it reads x[image, row, pixel][index[0..inputs-1]].
  int inputs;
  const std::int32_t* index;
  std::ptrdiff_t image, row, pixel;
  // By bands it reads coefficients [n][blocks][pixel]; in band n, in[n] channels make out[n].
  int block;
  std::ptrdiff_t band;
  const int *in, *out;
  ToPixels to_pixels;
  // A convolution of images reads them padded: `window` rows of them for each row, `stride` apart.
  const Border* border;
  int window, stride;

  int columns(int at) const { return std::min(panel, outputs - at * panel); }
  int panels() const { return ceil_div(outputs, panel); }
  const float* weights_of(int at, const float* w) const { return w + weights + at * panel * unit; }
};

// Bands of few blocks that read the same channels are multiplied together: tiles then have more rows, and weights are
// read less often.
constexpr int bands_at_once(int blocks) { return std::max(1, TILE_ROWS / blocks); }

// Writes rows of one panel from `row0` on, with its weights; `x` are the pixels or the coefficients of an image.
[[maybe_unused]] void write(const Writer& s, int panel, int row0, int rows, const float* x, const float* weights,
                            float* coefs, To out, Ahead& ahead) {
  const int columns = s.columns(panel), at = panel * s.panel;
  const float* bias = weights + static_cast<std::ptrdiff_t>(columns) * s.inputs;
  if (s.source == PIXELS) {
    const From from = {x + row0 * s.row, s.width, s.row, s.pixel};
    return product(rows * s.width, from, s.index, s.inputs, weights, columns, columns, bias, out, s.range, ahead);
  }
  if (s.source == COPY) {
    for (int r = 0; r < rows; r++)
      for (int p = 0; p < s.width; p++)
        std::memcpy(out.first + r * out.row + p * out.pixel, x + ((row0 + r) * s.width + p) * s.pixel + at,
                    sizeof(float) * columns);
    return;
  }
  const int across = ceil_div(s.width, s.block), blocks = ceil_div(rows, s.block) * across;
  const float* first = x + row0 / s.block * across * s.pixel;
  for (int n = 0, stop; n < s.block * s.block && s.out[n] > at; n = stop) {
    for (stop = n + 1; stop < s.block * s.block && stop < n + bands_at_once(blocks) && s.out[stop] > at;) stop++;
    const int common = s.in[stop - 1], wide = std::min(round8(s.out[n] - at), columns);
    product((stop - n) * blocks, {first + n * s.band, blocks, s.band, s.pixel}, s.index, common, weights, columns, wide,
            ZEROS, every(coefs + n * blocks * PANEL, PANEL), ALL, ahead);
    for (int m = n; s.in[m] > common; m++)
      product(blocks, every(first + m * s.band, s.pixel), s.index + common, s.in[m] - common,
              weights + static_cast<std::ptrdiff_t>(common) * columns, columns, wide, ONTO,
              every(coefs + m * blocks * PANEL, PANEL), ALL, ahead);
  }
  s.to_pixels(coefs, blocks * PANEL, PANEL, s.out, at, columns, bias, s.range, out, rows, s.width);
}

// Returns the floats of scratch memory that `write` needs for a number of rows.
constexpr std::ptrdiff_t coefs_of(int block, int rows, int width) {
  return static_cast<std::ptrdiff_t>(block) * block * ceil_div(rows, block) * ceil_div(width, block) * PANEL;
}

// Returns the writer of a layer on vectors for a number of them at once.
[[maybe_unused]] Writer across(Writer s, int vectors) {
  s.width *= vectors;
  return s;
}

// Computes a layer alone, `rows` at a time, into y [images][height][width][outputs], or its means [images][outputs].
[[maybe_unused]] void layer(const Writer& s, int rows, bool means, const float* x, const float* w, float* scratch,
                            float* y, int images, Ahead& ahead) {
  float* pixels = scratch + (s.source == BANDS ? in_lines(coefs_of(s.block, rows, s.width)) : 0);
  for (int panel = 0; panel < s.panels(); panel++)
    for (int image = 0; image < images; image++) {
      const int columns = s.columns(panel);
      const float* weights = s.weights_of(panel, w);
      float* to = y + image * static_cast<std::ptrdiff_t>(s.outputs) * (means ? 1 : s.height * s.width) + panel * s.panel;
      for (int row = 0; row < s.height; row += rows) {
        const int count = std::min(rows, s.height - row);
        if (!means) {
          float* first = to + static_cast<std::ptrdiff_t>(row) * s.width * s.outputs;
          write(s, panel, row, count, x + image * s.image, weights, scratch,
                {first, s.width, static_cast<std::ptrdiff_t>(s.width) * s.outputs, s.outputs}, ahead);
          continue;
        }
        write(s, panel, row, count, x + image * s.image, weights, scratch,
              {pixels, s.width, s.width * PANEL, PANEL}, ahead);
        each_vector(columns, [&](auto lanes, int j) {
          constexpr int L = decltype(lanes)::value;
          Vec<L> sum = row ? load<L>(to + j) : Vec<L>{};
          for (int p = 0; p < count * s.width; p++) sum += load<L>(pixels + p * PANEL + j);
          store<L>(to + j, row + count < s.height ? sum : sum * (1.0f / (s.height * s.width)));
        });
      }
    }
}

enum Target { TO_MAP, TO_BANDS, AS_IS };

// The last product of a chain, if there is one. It adds to y [image][pixels][outputs], or to coefficients
// [image][n][blocks][outputs].
struct Reader {
  Target target;
  int outputs, panel;
  // Applied to the output after the last panel has been added.
  Range range;
  std::ptrdiff_t image;
  // The channels of a panel of the chain that are read, in order; by bands the first k[panel * N + n] of them make
  // out[n] outputs. `counts` is the largest number of coefficients of every 8 channels.
  const std::int32_t* index;
  int block;
  std::ptrdiff_t band;
  const int *k, *out;
  const std::uint8_t* counts;
  ToBands to_bands;
  // The bias to which the first panel is added; NOTHING: it is added to the old values of the output.
  std::size_t bias;
};
constexpr std::size_t NOTHING = ~std::size_t{0};

// Multiplies channels index[start..stop-1] of a panel, [row][PANEL], and adds the results to rows of y, `wide` outputs.
[[maybe_unused]] void add_product(const Reader& s, int rows, const float* x, const std::int32_t* index, int start,
                                  int stop, const float* weights, int columns, int wide, const float* bias, To y,
                                  Range range, Ahead& ahead) {
  for (int q = 0; q < wide; q += s.panel) {
    const int ldw = std::min(s.panel, s.outputs - q);
    const float* from = weights + static_cast<std::ptrdiff_t>(q) * columns + start * ldw;
    product(rows, every(x, PANEL), index + start, stop - start, from, ldw, std::min(ldw, round8(wide - q)),
            bias ? bias + q : ONTO, {y.first + q, y.width, y.row, y.pixel}, range, ahead);
  }
}

// Reads pixels [rows * width][PANEL] of `columns` channels of a chain, from row `row0` on; `bias` is what the first
// panel is added to, or ONTO.
[[maybe_unused]] void read(const Reader& s, const float* pixels, int at, int panel, int columns, bool last, int row0,
                           int rows, int width, const float* weights, const float* bias, float* coefs, float* y,
                           Ahead& ahead) {
  if (s.target == AS_IS) {
    float* to = y + static_cast<std::ptrdiff_t>(row0) * width * s.outputs + at;
    for (int p = 0; p < rows * width; p++) std::memcpy(to + p * s.outputs, pixels + p * PANEL, sizeof(float) * columns);
    return;
  }
  const std::int32_t* index = s.index + at;
  if (s.target == TO_MAP) {
    const To to = every(y + static_cast<std::ptrdiff_t>(row0) * width * s.outputs, s.outputs);
    return add_product(s, rows * width, pixels, index, 0, columns, weights, columns, s.outputs,
                       panel == 0 ? bias : ONTO, to, last ? s.range : ALL, ahead);
  }
  const int across = ceil_div(width, s.block), blocks = ceil_div(rows, s.block) * across;
  s.to_bands({pixels, width, static_cast<std::ptrdiff_t>(width) * PANEL, PANEL}, rows, width, columns,
             s.counts + at / 8, coefs, blocks * PANEL, PANEL);
  float* first = y + static_cast<std::ptrdiff_t>(row0) / s.block * across * s.outputs;
  const int* k = s.k + panel * s.block * s.block;
  for (int n = 0, stop; n < s.block * s.block && k[n]; n = stop) {
    for (stop = n + 1; stop < s.block * s.block && stop < n + bands_at_once(blocks) && k[stop];) stop++;
    const int common = k[stop - 1];
    add_product(s, (stop - n) * blocks, coefs + n * blocks * PANEL, index, 0, common, weights, columns, s.out[n], ONTO,
                {first + n * s.band, blocks, s.band, s.outputs}, ALL, ahead);
    for (int m = n; k[m] > common; m++)
      add_product(s, blocks, coefs + m * blocks * PANEL, index, common, k[m], weights, columns, s.out[m], ONTO,
                  every(first + m * s.band, s.outputs), ALL, ahead);
  }
}

}  // namespace
