// Chains: writer, depthwise step and reader in one pass, panel by panel, a few rows at a time.

namespace {

// A writer, a depthwise step and a reader. `rows` rows of the output are made between two moves of the buffer, `step`
// rows at a time, so that these stay in the first-level cache.
struct Chain {
  Writer writer;
  Reader reader;
  int height, width, window, stride, top, left, pitch;
  Range range;
  // In the weights, taps and bias follow the writer's, and the reader's follow those.
  int taps;
  DepthwiseRow depthwise;
  int rows, step;

  int buffer_rows() const { return stride * (rows - 1) + window + writer.block; }
};

// Computes a chain and adds to the map y of each image, or to its coefficients; `make` makes rows of the writer's map.
template <class Make>
void chain_with(const Chain& s, const float* w, float* scratch, float* y, int images, Ahead& ahead, Make make) {
  const Writer& writer = s.writer;
  const std::ptrdiff_t pitch = s.pitch * PANEL, buffer_rows = s.buffer_rows();
  float *buffer = scratch, *pixels = buffer + in_lines(buffer_rows * pitch);
  float* coefs = pixels + in_lines(static_cast<std::ptrdiff_t>(s.step) * s.width * PANEL);
  const bool stripes = s.rows < s.height;
  std::memset(buffer, 0, sizeof(float) * buffer_rows * pitch);
  for (int panel = 0; panel < writer.panels(); panel++) {
    const int at = panel * writer.panel, columns = writer.columns(panel);
    const float* weights = writer.weights_of(panel, w);
    const float* taps = weights + static_cast<std::ptrdiff_t>(columns) * (writer.inputs + 1);
    const float *bias = taps + columns * s.taps, *reads = bias + columns;
    const float* begins = s.reader.bias == NOTHING ? ONTO : w + s.reader.bias;
    for (int image = 0; image < images; image++) {
      // The rows of the writer's map that are made, and the first row of the buffer; rows outside the map are zeros.
      int made = 0, base = -s.top;
      if (stripes) std::memset(buffer, 0, sizeof(float) * s.top * pitch);
      for (int row = 0, count; row < s.height; row += count) {
        const int first = s.stride * row - s.top;
        if (row % s.rows == 0) {
          if (made > first && first > base)
            std::memmove(buffer, buffer + (first - base) * pitch, sizeof(float) * (made - first) * pitch);
          base = first;
        }
        count = std::min({s.step, s.height - row, s.rows - row % s.rows});
        const int last = first + s.stride * (count - 1) + s.window;
        if (made < std::min(last, writer.height)) {
          const int wanted = ceil_div(last - made, writer.block) * writer.block;
          const int more = std::min(wanted, writer.height - made);
          make(image, panel, made, more, weights, coefs,
               To{buffer + (made - base) * pitch + s.left * PANEL, writer.width, pitch, PANEL});
          made += more;
        }
        const int below = std::max(made, first);
        if (stripes && last > below)
          std::memset(buffer + (below - base) * pitch, 0, sizeof(float) * (last - below) * pitch);
        for (int r = 0; r < count; r++)
          s.depthwise(buffer + (first - base + r * s.stride) * pitch, pitch, taps, columns, bias, s.width, columns,
                      s.range, pixels + static_cast<std::ptrdiff_t>(r) * s.width * PANEL);
        read(s.reader, pixels, at, panel, columns, panel + 1 == writer.panels(), row, count, s.width, reads,
             begins, coefs, y + image * s.reader.image, ahead);
      }
    }
  }
}

// Computes a chain; `x` are pixels or coefficients, as the writer reads them.
[[maybe_unused]] void chain(const Chain& s, const float* x, const float* w, float* scratch, float* y, int images,
                            Ahead& ahead) {
  chain_with(s, w, scratch, y, images, ahead, [&](int image, int panel, int row, int rows, const float* weights,
                                                      float* coefs, To to) {
    write(s.writer, panel, row, rows, x + image * s.writer.image, weights, coefs, to, ahead);
  });
}

// Computes a chain that begins with a convolution of images, of which a few rows are padded at a time.
template <class T>
void chain_of_images(const Chain& s, const T* x, const float* w, float* scratch, float* y, int images, Ahead& ahead) {
  const Border& border = *s.writer.border;
  const std::ptrdiff_t image_size = static_cast<std::ptrdiff_t>(border.height) * border.width * border.from;
  chain_with(s, w, scratch, y, images, ahead, [&](int image, int panel, int row, int rows, const float* weights,
                                                      float* strip, To to) {
    bordered(border, row * s.writer.stride, (rows - 1) * s.writer.stride + s.writer.window, x + image * image_size,
             strip);
    write(s.writer, panel, 0, rows, strip, weights, nullptr, to, ahead);
  });
}

// Computes the means of a panel's output blocks. Each is the weighted mean of its phases, which are sums of taps. P, in
// the source of the network, has the number of input blocks that are read and, for every tap, which of these blocks it
// reads, whether it is the first of a phase, and, for the last of a phase, the phase's share of the pixels. `where` has
// the places of the blocks that every output block reads, in floats.
using MeansOfBlocks = void (*)(const int* where, std::ptrdiff_t each, int out_blocks, int images, int channels,
                               const float* wide, const float* taps, const float* bias, Range range, float* means);
template <class P>
void means_of_blocks(const int* where, std::ptrdiff_t each, int out_blocks, int images, int channels, const float* wide,
                     const float* taps, const float* bias, Range range, float* means) {
  for (int image = 0; image < images; image++, wide += each)
    for (int block = 0; block < out_blocks; block++, means += PANEL)
      each_vector(channels, [&](auto lanes, int j) {
        constexpr int L = decltype(lanes)::value;
        const Vec<L> start = load<L>(bias + j);
        Vec<L> x[P::reads], sum = {}, mean = {};
        FDJAX_UNROLL for (int i = 0; i < P::reads; i++) x[i] = load<L>(wide + where[block * P::reads + i] + j);
        FDJAX_UNROLL for (int t = 0; t < P::taps; t++) {
          if (P::begins[t]) sum = start;
          sum += x[P::at[t]] * load<L>(taps + t * channels + j);
          if (P::share[t] > 0.0f) mean += clamped(sum, range) * P::share[t];
        }
        store<L>(means + j, mean);
      });
}

// A chain of means at block resolution, with the numbers of input and output blocks, and of images at a time. A panel's
// blocks of an image, [blocks + 1][PANEL], end with a block of zeros.
struct Means {
  Writer writer;
  Reader reader;
  int blocks, out_blocks, at_once, taps;
  Range range;
  const int* where;
  MeansOfBlocks make;
};

// Computes a chain of means from coefficients 0 of the input, and adds to coefficients 0 of each image.
[[maybe_unused]] void chain_of_means(const Means& s, const float* x, const float* w, float* scratch, float* y,
                                     int images, Ahead& ahead) {
  const Writer& writer = s.writer;
  const std::ptrdiff_t each = (s.blocks + 1) * PANEL;
  float *wide = scratch, *means = wide + in_lines(s.at_once * each);
  for (int i = 1; i <= s.at_once; i++) std::memset(wide + i * each - PANEL, 0, sizeof(float) * PANEL);
  for (int n; images > 0; images -= n, x += n * writer.image, y += n * s.reader.image) {
    n = std::min(images, s.at_once);
    for (int panel = 0; panel < writer.panels(); panel++) {
      const int at = panel * writer.panel, columns = writer.columns(panel);
      const float *weights = writer.weights_of(panel, w), *bias = weights + columns * writer.inputs;
      const float *taps = bias + columns, *after = taps + columns * s.taps;
      product(n * s.blocks, {x, s.blocks, writer.image, writer.pixel}, writer.index, writer.inputs,
              weights, columns, columns, bias, {wide, s.blocks, each, PANEL}, writer.range, ahead);
      s.make(s.where, each, s.out_blocks, n, columns, wide, taps, after, s.range, means);
      add_product(s.reader, n * s.out_blocks, means, s.reader.index + at, 0, columns, after + columns, columns,
                  s.reader.outputs, ONTO, {y, s.out_blocks, s.reader.image, s.reader.outputs}, ALL, ahead);
    }
  }
}

}  // namespace
