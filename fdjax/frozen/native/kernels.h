// Kernels of a frozen network: vectors, products over packed panels, depthwise rows, blockwise transforms.
//
// Vector extensions of GCC and Clang: one source for AVX-512, AVX2 and NEON. Maps are NHWC with the channels of a pixel
// rounded up to 8; what lies in the lanes beyond a map's channels is never read by a product.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>

#if defined(__clang__)
#define FDJAX_UNROLL _Pragma("unroll")
#else
#define FDJAX_UNROLL _Pragma("GCC unroll 64")
#endif
#define FDJAX_INLINE inline __attribute__((always_inline))
// The vector is in a register from here on: else GCC reads it again from memory for every product that it takes part in.
#if defined(__x86_64__)
#define FDJAX_KEEP(v) asm("" : "+v"(v))
#elif defined(__aarch64__)
#define FDJAX_KEEP(v) asm("" : "+w"(v))
#else
#define FDJAX_KEEP(v) (void)(v)
#endif

namespace {

// VL: lanes of a vector. TILE_ROWS x TILE_VECTORS sums fit into the registers.
#if defined(__AVX512F__)
constexpr int VL = 16, TILE_ROWS = 8;
#elif defined(__AVX__)
constexpr int VL = 8, TILE_ROWS = 4;
#else
constexpr int VL = 4, TILE_ROWS = 8;
#endif
constexpr int TILE_VECTORS = 3;
// Lanes of the vector at the end of a row of channels, where half of one of AVX-512 does.
constexpr int HALF = VL < 8 ? VL : 8;
// Channels of a panel, at most, and the pitch of the pixels of one.
constexpr int PANEL = 48;
// Floats of a line of the cache.
constexpr int LINE = 16;

template <int L>
struct Lanes {
  typedef float V __attribute__((vector_size(L * 4)));
  typedef float Unaligned __attribute__((vector_size(L * 4), aligned(4), may_alias));
  typedef std::int32_t Mask __attribute__((vector_size(L * 4)));
};
template <int L>
using Vec = typename Lanes<L>::V;

template <int L>
FDJAX_INLINE Vec<L> load(const float* p) {
  return *reinterpret_cast<const typename Lanes<L>::Unaligned*>(p);
}
template <int L>
FDJAX_INLINE void store(float* p, Vec<L> v) {
  *reinterpret_cast<typename Lanes<L>::Unaligned*>(p) = v;
}

// What an activation leaves, from `low` to `high`, as the bits of numbers: what is below 0 is so as an integer, too, and
// comparisons of integers leave the units that multiply free.
struct Range {
  std::int32_t low, high;
};
constexpr Range ALL = {INT32_MIN, INT32_MAX}, RELU = {0, INT32_MAX}, RELU6 = {0, 0x40c00000};
template <class T>
FDJAX_INLINE T clamped(T x, Range range) {
  typedef std::int32_t Bits __attribute__((vector_size(sizeof(T))));
  Bits bits;
  std::memcpy(&bits, &x, sizeof x);
  const Bits low = Bits{} + range.low, high = Bits{} + range.high;
  bits = bits > low ? bits : low;
  bits = bits < high ? bits : high;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Calls f(lanes, offset) for every vector of `channels`, a multiple of 8; lanes is a compile-time number.
template <class F>
FDJAX_INLINE void each_vector(int channels, F f) {
  int j = 0;
  for (; j + VL <= channels; j += VL) f(std::integral_constant<int, VL>(), j);
  if (VL > HALF && j < channels) f(std::integral_constant<int, HALF>(), j);
}

// v in its first `lanes` lanes, else zero.
template <int L>
FDJAX_INLINE Vec<L> first_lanes(Vec<L> v, int lanes) {
  typename Lanes<L>::Mask at;
  FDJAX_UNROLL for (int i = 0; i < L; i++) at[i] = i;
  return at < lanes ? v : Vec<L>{};
}

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
constexpr int round8(int n) { return ceil_div(n, 8) * 8; }

// Where pixels lie: row after row of `width`.
template <class T>
struct Pixels {
  T* first;
  int width;
  std::ptrdiff_t row, pixel;
};
// They in turn.
template <class T>
struct Walk {
  Pixels<T> pixels;
  T *line = pixels.first, *next = line;
  int left = pixels.width;
  explicit Walk(Pixels<T> of) : pixels(of) {}
  FDJAX_INLINE void take(int count, T** found) {
    if (left > count) {
      for (int i = 0; i < count; i++, next += pixels.pixel) found[i] = next;
      left -= count;
      return;
    }
    for (int i = 0; i < count; i++, next += pixels.pixel) {
      found[i] = next;
      if (--left == 0) left = pixels.width, line += pixels.row, next = line - pixels.pixel;
    }
  }
};
using From = Pixels<const float>;
using To = Pixels<float>;
// So many floats apart.
FDJAX_INLINE From every(const float* first, std::ptrdiff_t pixel) { return {first, INT32_MAX, 0, pixel}; }
FDJAX_INLINE To every(float* first, std::ptrdiff_t pixel) { return {first, INT32_MAX, 0, pixel}; }

alignas(64) const float ZEROS[PANEL] = {};
[[maybe_unused]] constexpr const float* ONTO = nullptr;

// The next line of weights to fetch. They lie in the order in which they are read; with every step of a product a line is
// fetched, up to so many floats ahead of what is read, so that products do not wait for memory.
struct Ahead {
  const float *next, *end;
  std::ptrdiff_t reach;
};
// While maps are large, weights wait in the second-level cache, later in the third as well.
constexpr std::ptrdiff_t NEAR = 96 << 10, FAR = 512 << 10;

// Products

// Weights for `columns` columns from `column` on: [k][ldw], of which `index` tells what they are multiplied with.
struct Product {
  const std::int32_t* index;
  int k;
  const float* w;
  int ldw;
  const float* bias;
  int column;
  Range range;
};

// `count` times M rows a[r][index[0..k-1]] times w, added to the bias, or, without one, to what is there, in FULL vectors of
// columns and perhaps a half.
template <int M, int FULL, bool AND_HALF>
void tiles(const Product& s, int count, Walk<const float>& inputs, Walk<float>& outs, Ahead& ahead,
           const float* fetched) {
  constexpr int F = FULL ? FULL : 1;
  const bool clamps = s.range.low > ALL.low;
  for (; count > 0; count--) {
    const float* a[M];
    float* out[M];
    inputs.take(M, a), outs.take(M, out);
    Vec<VL> c[M][F];
    Vec<HALF> h[M];
    FDJAX_UNROLL for (int r = 0; r < M; r++) {
      out[r] += s.column;
      const float* start = s.bias ? s.bias + s.column : out[r];
      FDJAX_UNROLL for (int j = 0; j < FULL; j++) c[r][j] = load<VL>(start + VL * j);
      if (AND_HALF) h[r] = load<HALF>(start + VL * FULL);
    }
    // With every step a line is fetched; when there is none to fetch, one that is there. Narrow tiles read too much already.
    const bool fetch = FULL > 1 && fetched - ahead.next >= s.k * LINE;
    const float *lines = fetch ? ahead.next : s.w, *w = s.w;
    if (fetch) ahead.next += s.k * LINE;
    for (const std::int32_t *i = s.index, *end = i + s.k; i < end; i++, w += s.ldw, lines += LINE) {
      const std::ptrdiff_t at = *i;
      if (FULL > 1) __builtin_prefetch(lines, 0, 2);
      Vec<VL> wv[F];
      Vec<HALF> wh;
      FDJAX_UNROLL for (int j = 0; j < FULL; j++) wv[j] = load<VL>(w + VL * j);
      if (AND_HALF) wh = load<HALF>(w + VL * FULL);
      FDJAX_UNROLL for (int r = 0; r < M; r++) {
        const float x = a[r][at];
        FDJAX_UNROLL for (int j = 0; j < FULL; j++) c[r][j] += wv[j] * x;
        if (AND_HALF) h[r] += wh * x;
      }
    }
    FDJAX_UNROLL for (int r = 0; r < M; r++) {
      FDJAX_UNROLL for (int j = 0; j < FULL; j++)
        store<VL>(out[r] + VL * j, clamps ? clamped(c[r][j], s.range) : c[r][j]);
      if (AND_HALF) store<HALF>(out[r] + VL * FULL, clamps ? clamped(h[r], s.range) : h[r]);
    }
  }
}

using Tiles = void (*)(const Product&, int, Walk<const float>&, Walk<float>&, Ahead&, const float*);
// By rows - 1, and by groups of HALF lanes of columns: 1 to TILE_VECTORS whole vectors.
constexpr int PER_VECTOR = VL / HALF, KINDS = TILE_VECTORS * PER_VECTOR;
template <int M, int G>
constexpr Tiles tiles_of = tiles<M, G / PER_VECTOR, G % PER_VECTOR != 0>;
#define FDJAX_TILES(M)                                                                                         \
  {                                                                                                            \
    tiles_of<M, 1>, tiles_of<M, 2>, tiles_of<M, 3>, tiles_of<M, KINDS < 4 ? 3 : 4>, tiles_of<M, KINDS < 5 ? 3 : 5>, \
        tiles_of<M, KINDS < 6 ? 3 : 6>                                                                         \
  }
const Tiles TILES[TILE_ROWS][6] = {
    FDJAX_TILES(1), FDJAX_TILES(2), FDJAX_TILES(3), FDJAX_TILES(4),
#if !defined(__AVX__) || defined(__AVX512F__)
    FDJAX_TILES(5), FDJAX_TILES(6), FDJAX_TILES(7), FDJAX_TILES(8),
#endif
};

// out [rows, columns] = bias + a [rows, index[0..k-1]] w [k, columns], or without a bias what is added to `out`; columns:
// a multiple of 8, of rows `ldw` apart.
[[maybe_unused]] void product(int rows, From a, const std::int32_t* index, int k, const float* w, int ldw, int columns,
                              const float* bias, To out, Range range, Ahead& ahead) {
  if (rows <= 0) return;
  const int count = ceil_div(rows, TILE_ROWS), m = rows / count, larger = rows % count;
  const float* fetched = ahead.end - w > ahead.reach ? w + ahead.reach : ahead.end;
  if (ahead.next < w) ahead.next = w;
  for (int j = 0; j < columns; j += VL * TILE_VECTORS) {
    const int groups = std::min(columns - j, VL * TILE_VECTORS) / HALF;
    const Product part = {index, k, w + j, ldw, bias, j, range};
    Walk<const float> inputs(a);
    Walk<float> outs(out);
    if (larger) TILES[m][groups - 1](part, larger, inputs, outs, ahead, fetched);
    TILES[m - 1][groups - 1](part, count - larger, inputs, outs, ahead, fetched);
  }
}

// Depthwise rows

// Pixels 0 .. N - 1 of a row, of L channels; taps [KH * KW] of `ldt` floats.
template <int L, int N, int KH, int KW, int STRIDE, class Tap>
FDJAX_INLINE void depthwise_pixels(const float* x, std::ptrdiff_t row, Tap tap, Vec<L> bias, float* out, Range range) {
  Vec<L> sum[N];
  FDJAX_UNROLL for (int t = 0; t < N; t++) sum[t] = bias;
  FDJAX_UNROLL for (int i = 0; i < KH; i++) {
    FDJAX_UNROLL for (int c = 0; c < (N - 1) * STRIDE + KW; c++) {
      Vec<L> v = load<L>(x + i * row + c * PANEL);
      FDJAX_KEEP(v);
      FDJAX_UNROLL for (int t = 0; t < N; t++) {
        const int q = c - t * STRIDE;
        if (q >= 0 && q < KW) sum[t] += v * tap(i * KW + q);
      }
    }
  }
  FDJAX_UNROLL for (int t = 0; t < N; t++) store<L>(out + t * PANEL, clamped(sum[t], range));
}

template <int L, int N, int KH, int KW, int STRIDE, class Tap>
FDJAX_INLINE void depthwise_rest(int left, const float* x, std::ptrdiff_t row, Tap tap, Vec<L> bias, float* out,
                                 Range range) {
  if (left == N) depthwise_pixels<L, N, KH, KW, STRIDE>(x, row, tap, bias, out, range);
  if constexpr (N > 1) {
    if (left < N) depthwise_rest<L, N - 1, KH, KW, STRIDE>(left, x, row, tap, bias, out, range);
  }
}

// One row of a depthwise layer on a panel: pixels are PANEL apart, rows of x `row`.
using DepthwiseRow = void (*)(const float* x, std::ptrdiff_t row, const float* taps, int ldt, const float* bias,
                              int width, int channels, Range range, float* out);
template <int KH, int KW, int STRIDE>
void depthwise_row(const float* x, std::ptrdiff_t row, const float* taps, int ldt, const float* bias, int width,
                   int channels, Range range, float* out) {
  constexpr int N = VL == 16 && KW <= 5 ? 6 : 4, TAPS = KH * KW;
  // So few taps stay in registers.
  constexpr int HELD = TAPS <= 9 ? TAPS : 0;
  each_vector(channels, [&](auto lanes, int j) {
    constexpr int L = decltype(lanes)::value;
    const Vec<L> b = load<L>(bias + j);
    Vec<L> held[HELD + 1];
    FDJAX_UNROLL for (int t = 0; t < HELD; t++) held[t] = load<L>(taps + t * ldt + j);
    const auto tap = [&](int t) { return HELD ? held[t] : load<L>(taps + t * ldt + j); };
    int p = 0;
    for (; p + N <= width; p += N)
      depthwise_pixels<L, N, KH, KW, STRIDE>(x + p * STRIDE * PANEL + j, row, tap, b, out + p * PANEL + j, range);
    if (p < width)
      depthwise_rest<L, N - 1, KH, KW, STRIDE>(width - p, x + p * STRIDE * PANEL + j, row, tap, b, out + p * PANEL + j,
                                               range);
  });
}

// Transforms. Dct<K>: forward[u][i], inverse[u][i] and zigzag[n] = (u, v) stand in the source of the network.
template <int K>
struct Dct;

// Coefficients of K numbers: what is even in them and what is odd, apart.
template <int K, int L>
FDJAX_INLINE void forward_line(const Vec<L>* x, Vec<L>* y) {
  Vec<L> half[2][(K + 1) / 2];
  FDJAX_UNROLL for (int j = 0; j < K / 2; j++) half[0][j] = x[j] + x[K - 1 - j], half[1][j] = x[j] - x[K - 1 - j];
  if (K % 2) half[0][K / 2] = x[K / 2];
  FDJAX_UNROLL for (int u = 0; u < K; u++) {
    Vec<L> sum = half[u % 2][0] * Dct<K>::forward[u][0];
    FDJAX_UNROLL for (int j = 1; j < (K + 1) / 2; j++)
      if (Dct<K>::forward[u][j] != 0.0f && (u % 2 == 0 || j < K / 2)) sum += half[u % 2][j] * Dct<K>::forward[u][j];
    y[u] = sum;
  }
}
template <int K, int L>
FDJAX_INLINE void inverse_line(const Vec<L>* y, Vec<L>* x) {
  FDJAX_UNROLL for (int j = 0; j < (K + 1) / 2; j++) {
    Vec<L> even = y[0] * Dct<K>::inverse[0][j], odd = {};
    FDJAX_UNROLL for (int u = 1; u < K; u++) {
      if (Dct<K>::inverse[u][j] == 0.0f) continue;
      if (u % 2) odd += y[u] * Dct<K>::inverse[u][j];
      else even += y[u] * Dct<K>::inverse[u][j];
    }
    x[j] = even + odd, x[K - 1 - j] = even - odd;
  }
}

// The first `count` coefficients of a block of vectors: at(i, j) reads a pixel, put(n, v) takes a coefficient.
template <int K, int L, class At, class Put>
FDJAX_INLINE void forward_block(int count, At at, Put put) {
  if (count == 1) {
    Vec<L> sum = {};
    FDJAX_UNROLL for (int i = 0; i < K; i++)
      FDJAX_UNROLL for (int j = 0; j < K; j++) sum += at(i, j);
    return put(0, sum * (1.0f / (K * K)));
  }
  Vec<L> lines[K][K], columns[K][K];
  FDJAX_UNROLL for (int i = 0; i < K; i++) {
    Vec<L> x[K];
    FDJAX_UNROLL for (int j = 0; j < K; j++) x[j] = at(i, j);
    forward_line<K, L>(x, lines[i]);
  }
  FDJAX_UNROLL for (int v = 0; v < K; v++) {
    Vec<L> x[K];
    FDJAX_UNROLL for (int i = 0; i < K; i++) x[i] = lines[i][v];
    forward_line<K, L>(x, columns[v]);
  }
  FDJAX_UNROLL for (int n = 0; n < K * K; n++) {
    if (n >= count) return;
    put(n, columns[Dct<K>::zigzag[n][1]][Dct<K>::zigzag[n][0]]);
  }
}

// Back to pixels: get(n) reads one of `count` coefficients, put(i, j, v) takes a pixel.
template <int K, int L, class Get, class Put>
FDJAX_INLINE void inverse_block(int count, Get get, Put put) {
  if (count <= 1) {
    const Vec<L> mean = count ? get(0) : Vec<L>{};
    FDJAX_UNROLL for (int i = 0; i < K; i++)
      FDJAX_UNROLL for (int j = 0; j < K; j++) put(i, j, mean);
    return;
  }
  Vec<L> columns[K][K] = {}, lines[K][K];
  FDJAX_UNROLL for (int n = 0; n < K * K; n++)
    if (n < count) columns[Dct<K>::zigzag[n][1]][Dct<K>::zigzag[n][0]] = get(n);
  FDJAX_UNROLL for (int v = 0; v < K; v++) {
    Vec<L> x[K];
    inverse_line<K, L>(columns[v], x);
    FDJAX_UNROLL for (int i = 0; i < K; i++) lines[i][v] = x[i];
  }
  FDJAX_UNROLL for (int i = 0; i < K; i++) {
    Vec<L> x[K];
    inverse_line<K, L>(lines[i], x);
    FDJAX_UNROLL for (int j = 0; j < K; j++) put(i, j, x[j]);
  }
}

}  // namespace
