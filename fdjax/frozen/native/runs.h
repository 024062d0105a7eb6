// Writers, chains and readers, panel by panel of the channels that a product makes, so that these stay in the cache.
// What a layer is, is data: `Writer`, `Chain` and `Means` stand in the source of the network as constants.

namespace {

constexpr Range ALL = {-INFINITY, INFINITY};
constexpr std::ptrdiff_t in_lines(std::ptrdiff_t n) { return (n + LINE - 1) / LINE * LINE; }

// The largest of the counts of the lanes from channel j on; `counts` has the largest of every 8 channels.
template <int L>
FDJAX_INLINE int count_at(const std::uint8_t* counts, int j) {
  int most = counts[j / 8];
  for (int i = 8; i < L; i += 8) most = std::max<int>(most, counts[(j + i) / 8]);
  return most;
}

// How many coefficients all lanes from channel j on have, and how many any has; width[n] channels have coefficient n.
template <int L, int N>
FDJAX_INLINE void counts_of(const int* width, int j, int* full, int* any) {
  *full = *any = 0;
  for (int n = 0; n < N; n++) *full += width[n] - j >= L, *any += width[n] - j > 0;
}

// Coefficients of blocks of a map [height, width]: block b of coefficient n at y + n * band + b * ldy.
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
      // Beyond the map its edge is repeated.
      const auto at = [&](int i, int k) {
        return load<L>(first + std::min(i, height - 1 - row) * x.row + std::min(k, width - 1 - column) * x.pixel + j);
      };
      forward_block<K, L>(count, at, put);
    });
  }
}

// And back, for channels `first_channel` on, of which width[n] in all have coefficient n: with a bias, within a range.
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

// Adds coefficients to a map, channel by channel where `place` says (-1: nowhere; null: as they are).
template <int K>
void compose(const float* y, std::ptrdiff_t band, int channels, const int* widths, const int* place, To x, int height,
             int width) {
  const int across = ceil_div(width, K), blocks = ceil_div(height, K) * across;
  for (int b = 0; b < blocks; b++, y += channels) {
    const int row = b / across * K, column = b % across * K;
    float* first = x.first + row * x.row + column * x.pixel;
    each_vector(channels, [&](auto lanes, int j) {
      constexpr int L = decltype(lanes)::value;
      int full, any;
      counts_of<L, K * K>(widths, j, &full, &any);
      if (!any) return;
      const auto get = [&](int n) {
        const Vec<L> v = load<L>(y + n * band + j);
        return n < full ? v : first_lanes<L>(v, widths[n] - j);
      };
      inverse_block<K, L>(any, get, [&](int i, int k, Vec<L> v) {
        if (row + i >= height || column + k >= width) return;
        float* to = first + i * x.row + k * x.pixel;
        if (!place) return store<L>(to + j, load<L>(to + j) + v);
        for (int l = 0; l < L; l++)
          if (place[j + l] >= 0) to[place[j + l]] += v[l];
      });
    });
  }
}

using ToBands = decltype(&to_bands<1>);
using ToPixels = decltype(&to_pixels<1>);

enum Source { PIXELS, BANDS, COPY };

// A product alone, or the first of a chain: makes a map [height, width, outputs], a panel of channels at a time.
struct Writer {
  Source source;
  int height, width, outputs, panel;
  Range range;
  std::size_t weights, bias;
  // Reads x[image, row, pixel][index[0..inputs-1]] ...
  int inputs;
  const std::int32_t* index;
  std::ptrdiff_t image, row, pixel;
  // ... or, by bands, coefficients [n][blocks][pixel], of which in[n] channels make out[n].
  int block;
  std::ptrdiff_t band;
  const int *in, *out;
  ToPixels to_pixels;

  int columns(int at) const { return std::min(panel, outputs - at * panel); }
  int panels() const { return ceil_div(outputs, panel); }
};

// Bands of few blocks are multiplied together, as far as they read the same channels: a tile has more rows, and weights
// are read less often.
constexpr int bands_at_once(int blocks) { return std::max(1, TILE_ROWS / blocks); }

// Rows `row0` on of one panel; `x` are the pixels, or the coefficients, of an image.
[[maybe_unused]] void write(const Writer& s, int panel, int row0, int rows, const float* x, const float* w, float* coefs, To out) {
  const int columns = s.columns(panel), at = panel * s.panel;
  const float* weights = w + s.weights + static_cast<std::ptrdiff_t>(at) * s.inputs;
  const float* bias = w + s.bias + at;
  if (s.source == PIXELS) {
    const From from = {x + row0 * s.row, s.width, s.row, s.pixel};
    return product(rows * s.width, from, s.index, s.inputs, weights, columns, columns, every(bias, 0), out, s.range);
  }
  if (s.source == COPY) {
    for (int p = 0; p < rows * s.width; p++)
      std::memcpy(out.at(p), x + (row0 * s.width + p) * s.pixel + at, sizeof(float) * columns);
    return;
  }
  const int across = ceil_div(s.width, s.block), blocks = ceil_div(rows, s.block) * across;
  const float* first = x + row0 / s.block * across * s.pixel;
  for (int n = 0, stop; n < s.block * s.block && s.out[n] > at; n = stop) {
    for (stop = n + 1; stop < s.block * s.block && stop < n + bands_at_once(blocks) && s.out[stop] > at;) stop++;
    const int common = s.in[stop - 1], wide = std::min(round8(s.out[n] - at), columns);
    product((stop - n) * blocks, {first + n * s.band, blocks, s.band, s.pixel}, s.index, common, weights, columns, wide,
            every(ZEROS, 0), every(coefs + n * blocks * PANEL, PANEL), ALL);
    for (int m = n; s.in[m] > common; m++) {
      const To to = every(coefs + m * blocks * PANEL, PANEL);
      product(blocks, every(first + m * s.band, s.pixel), s.index + common, s.in[m] - common,
              weights + static_cast<std::ptrdiff_t>(common) * columns, columns, wide, as_given(to), to, ALL);
    }
  }
  s.to_pixels(coefs, blocks * PANEL, PANEL, s.out, at, columns, bias, s.range, out, rows, s.width);
}

// Floats that `write` needs for so many rows.
constexpr std::ptrdiff_t coefs_of(int block, int rows, int width) {
  return static_cast<std::ptrdiff_t>(block) * block * ceil_div(rows, block) * ceil_div(width, block) * PANEL;
}

// The writer of a layer on vectors, for so many of them at once.
[[maybe_unused]] Writer across(Writer s, int vectors) {
  s.width *= vectors;
  return s;
}

// A layer alone: `rows` at a time, into y [images][height][width][outputs], or into its means [images][outputs].
[[maybe_unused]] void layer(const Writer& s, int rows, bool means, const float* x, const float* w, float* scratch, float* y,
           int images) {
  float* pixels = scratch + (s.source == BANDS ? in_lines(coefs_of(s.block, rows, s.width)) : 0);
  for (int panel = 0; panel < s.panels(); panel++)
    for (int image = 0; image < images; image++) {
      const int columns = s.columns(panel);
      float* to = y + image * static_cast<std::ptrdiff_t>(s.outputs) * (means ? 1 : s.height * s.width) + panel * s.panel;
      for (int row = 0; row < s.height; row += rows) {
        const int count = std::min(rows, s.height - row);
        if (!means) {
          float* first = to + static_cast<std::ptrdiff_t>(row) * s.width * s.outputs;
          write(s, panel, row, count, x + image * s.image, w, scratch,
                {first, s.width, static_cast<std::ptrdiff_t>(s.width) * s.outputs, s.outputs});
          continue;
        }
        write(s, panel, row, count, x + image * s.image, w, scratch, {pixels, s.width, s.width * PANEL, PANEL});
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

// The last product of a chain: adds to y [image][pixels][outputs], or to coefficients [image][n][blocks][outputs]; or
// there is none.
struct Reader {
  Target target;
  int outputs, panel;
  // Of what is there when the last panel has been added.
  Range range;
  std::size_t weights;
  std::ptrdiff_t image;
  // The channels of a panel of the chain that are read, in order; by bands the first k[panel * N + n] of them make
  // out[n] outputs. counts: how many coefficients they have, of every 8.
  const std::int32_t* index;
  int block;
  std::ptrdiff_t band;
  const int *k, *out;
  const std::uint8_t* counts;
  ToBands to_bands;
};

// Adds channels index[start..stop-1] of a panel, [row][PANEL], to rows of y, of which `wide` outputs are made.
[[maybe_unused]] void add_product(const Reader& s, int rows, const float* x, const std::int32_t* index, int start,
                                  int stop, const float* weights, int columns, int wide, To y, Range range) {
  for (int q = 0; q < wide; q += s.panel) {
    const int ldw = std::min(s.panel, s.outputs - q);
    const To to = {y.first + q, y.width, y.row, y.pixel};
    product(rows, every(x, PANEL), index + start, stop - start,
            weights + static_cast<std::ptrdiff_t>(q) * columns + start * ldw, ldw, std::min(ldw, round8(wide - q)),
            as_given(to), to, range);
  }
}

// Pixels [rows * width][PANEL] of `columns` channels of a chain, from row `row0` on.
[[maybe_unused]] void read(const Reader& s, const float* pixels, int at, int panel, int columns, bool last, int row0, int rows,
          int width, const float* w, float* coefs, float* y) {
  if (s.target == AS_IS) {
    float* to = y + static_cast<std::ptrdiff_t>(row0) * width * s.outputs + at;
    for (int p = 0; p < rows * width; p++) std::memcpy(to + p * s.outputs, pixels + p * PANEL, sizeof(float) * columns);
    return;
  }
  const float* weights = w + s.weights + static_cast<std::ptrdiff_t>(at) * s.outputs;
  const std::int32_t* index = s.index + at;
  if (s.target == TO_MAP)
    return add_product(s, rows * width, pixels, index, 0, columns, weights, columns, s.outputs,
                       every(y + static_cast<std::ptrdiff_t>(row0) * width * s.outputs, s.outputs),
                       last ? s.range : ALL);
  const int across = ceil_div(width, s.block), blocks = ceil_div(rows, s.block) * across;
  s.to_bands({pixels, width, static_cast<std::ptrdiff_t>(width) * PANEL, PANEL}, rows, width, columns,
             s.counts + at / 8, coefs, blocks * PANEL, PANEL);
  float* first = y + static_cast<std::ptrdiff_t>(row0) / s.block * across * s.outputs;
  const int* k = s.k + panel * s.block * s.block;
  for (int n = 0, stop; n < s.block * s.block && k[n]; n = stop) {
    for (stop = n + 1; stop < s.block * s.block && stop < n + bands_at_once(blocks) && k[stop];) stop++;
    const int common = k[stop - 1];
    add_product(s, (stop - n) * blocks, coefs + n * blocks * PANEL, index, 0, common, weights, columns, s.out[n],
                {first + n * s.band, blocks, s.band, s.outputs}, ALL);
    for (int m = n; k[m] > common; m++)
      add_product(s, blocks, coefs + m * blocks * PANEL, index, common, k[m], weights, columns, s.out[m],
                  every(first + m * s.band, s.outputs), ALL);
  }
}

// A writer, a depthwise step and a reader; `rows` of the output at a time.
struct Chain {
  Writer writer;
  Reader reader;
  int height, width, window, stride, top, left, pitch;
  Range range;
  std::size_t taps, bias;
  DepthwiseRow depthwise;
  int rows;

  int buffer_rows() const { return stride * (rows - 1) + window + writer.block; }
};

// Adds to the map y of each image, or to its coefficients; `x` are pixels or coefficients, as the writer reads.
[[maybe_unused]] void chain(const Chain& s, const float* x, const float* w, float* scratch, float* y, int images) {
  const Writer& writer = s.writer;
  const std::ptrdiff_t pitch = s.pitch * PANEL, buffer_rows = s.buffer_rows();
  float *buffer = scratch, *pixels = buffer + in_lines(buffer_rows * pitch);
  float* coefs = pixels + in_lines(static_cast<std::ptrdiff_t>(s.rows) * s.width * PANEL);
  const bool stripes = s.rows < s.height;
  std::memset(buffer, 0, sizeof(float) * buffer_rows * pitch);
  for (int panel = 0; panel < writer.panels(); panel++) {
    const int at = panel * writer.panel, columns = writer.columns(panel);
    const float* taps = w + s.taps + at;
    for (int image = 0; image < images; image++) {
      // Rows of the writer's map that are made, and which one the buffer begins with; beyond the map there are zeros.
      int made = 0, base = -s.top;
      if (stripes) std::memset(buffer, 0, sizeof(float) * s.top * pitch);
      for (int row = 0; row < s.height; row += s.rows) {
        const int rows = std::min(s.rows, s.height - row), first = s.stride * row - s.top;
        const int last = first + s.stride * (rows - 1) + s.window;
        if (made > first && first > base)
          std::memmove(buffer, buffer + (first - base) * pitch, sizeof(float) * (made - first) * pitch);
        base = first;
        if (made < std::min(last, writer.height)) {
          const int wanted = ceil_div(last - made, writer.block) * writer.block;
          const int count = std::min(wanted, writer.height - made);
          const To to = {buffer + (made - base) * pitch + s.left * PANEL, writer.width, pitch, PANEL};
          write(writer, panel, made, count, x + image * writer.image, w, coefs, to);
          made += count;
        }
        const int below = std::max(made, first);
        if (stripes && last > below)
          std::memset(buffer + (below - base) * pitch, 0, sizeof(float) * (last - below) * pitch);
        for (int r = 0; r < rows; r++)
          s.depthwise(buffer + r * s.stride * pitch, pitch, taps, writer.outputs, w + s.bias + at, s.width, columns,
                      s.range, pixels + static_cast<std::ptrdiff_t>(r) * s.width * PANEL);
        read(s.reader, pixels, at, panel, columns, panel + 1 == writer.panels(), row, rows, s.width, w, coefs,
             y + image * s.reader.image);
      }
    }
  }
}

// A chain of means, at block resolution: [height, width] blocks of the input, of the output [out_height, out_width].
struct Means {
  Writer writer;
  Reader reader;
  int out_height, out_width, rows, pitch, top, left, stride_rows, stride_columns, phases;
  Range range;
  std::size_t taps, bias;
  // Of every phase where its taps end and its share of the pixels; of every tap where it falls.
  const int *ends, *tap_rows, *tap_columns;
  const float* shares;
};

// Adds to coefficient 0 of each image what the coefficients 0 of the input give.
[[maybe_unused]] void chain_of_means(const Means& s, const float* x, const float* w, float* scratch, float* y, int images) {
  const Writer& writer = s.writer;
  const std::ptrdiff_t pitch = s.pitch * PANEL;
  float *buffer = scratch, *means = buffer + in_lines(s.rows * pitch);
  std::memset(buffer, 0, sizeof(float) * s.rows * pitch);
  const To inner = {buffer + s.top * pitch + s.left * PANEL, writer.width, pitch, PANEL};
  for (int panel = 0; panel < writer.panels(); panel++) {
    const int at = panel * writer.panel, columns = writer.columns(panel);
    for (int image = 0; image < images; image++) {
      write(writer, panel, 0, writer.height, x + image * writer.image, w, nullptr, inner);
      each_vector(columns, [&](auto lanes, int j) {
        constexpr int L = decltype(lanes)::value;
        const float* taps = w + s.taps + at + j;
        const Vec<L> bias = load<L>(w + s.bias + at + j);
        for (int b = 0; b < s.out_height * s.out_width; b++) {
          const float* from = inner.first + b / s.out_width * s.stride_rows * pitch +
                              b % s.out_width * s.stride_columns * PANEL + j;
          Vec<L> mean = {};
          for (int phase = 0, t = 0; phase < s.phases; phase++) {
            Vec<L> sum = bias;
            for (; t < s.ends[phase]; t++)
              sum += load<L>(from + s.tap_rows[t] * pitch + s.tap_columns[t] * PANEL) *
                     load<L>(taps + static_cast<std::ptrdiff_t>(t) * writer.outputs);
            mean += clamped(sum, s.range) * s.shares[phase];
          }
          store<L>(means + b * PANEL + j, mean);
        }
      });
      read(s.reader, means, at, panel, columns, false, 0, s.out_height, s.out_width, w, nullptr,
           y + image * s.reader.image);
    }
  }
}

}  // namespace
