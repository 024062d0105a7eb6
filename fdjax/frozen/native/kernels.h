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

// What an activation leaves: `low` to `high`.
struct Range {
  float low, high;
};
template <class T>
FDJAX_INLINE T clamped(T x, Range range) {
  const T low = T{} + range.low, high = T{} + range.high;
  x = x > low ? x : low;
  return x < high ? x : high;
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
  FDJAX_INLINE T* at(int p) const { return first + p / width * row + p % width * pixel; }
};
using From = Pixels<const float>;
using To = Pixels<float>;
// So many pixels apart, or all the same one.
FDJAX_INLINE From every(const float* first, std::ptrdiff_t pixel) { return {first, 1, pixel, 0}; }
FDJAX_INLINE To every(float* first, std::ptrdiff_t pixel) { return {first, 1, pixel, 0}; }
FDJAX_INLINE From as_given(To to) { return {to.first, to.width, to.row, to.pixel}; }

alignas(64) const float ZEROS[PANEL] = {};

// Products

// M rows a[r][index[0..k-1]] times w [k][ldw], onto what `start` has, in FULL vectors of columns and perhaps a half.
template <int M, int FULL, bool AND_HALF>
void tile(const float* const* a, const std::int32_t* index, int k, const float* w, int ldw, const float* const* start,
          float* const* out, int column, Range range) {
  constexpr int F = FULL ? FULL : 1;
  Vec<VL> c[M][F];
  Vec<HALF> h[M];
  FDJAX_UNROLL for (int r = 0; r < M; r++) {
    FDJAX_UNROLL for (int j = 0; j < FULL; j++) c[r][j] = load<VL>(start[r] + column + VL * j);
    if (AND_HALF) h[r] = load<HALF>(start[r] + column + VL * FULL);
  }
  const float* rows[M];
  FDJAX_UNROLL for (int r = 0; r < M; r++) rows[r] = a[r];
  for (int i = 0; i < k; i++, w += ldw) {
    const std::ptrdiff_t at = index[i];
    Vec<VL> wv[F];
    Vec<HALF> wh;
    FDJAX_UNROLL for (int j = 0; j < FULL; j++) wv[j] = load<VL>(w + VL * j);
    if (AND_HALF) wh = load<HALF>(w + VL * FULL);
    FDJAX_UNROLL for (int r = 0; r < M; r++) {
      const float s = rows[r][at];
      FDJAX_UNROLL for (int j = 0; j < FULL; j++) c[r][j] += wv[j] * s;
      if (AND_HALF) h[r] += wh * s;
    }
  }
  FDJAX_UNROLL for (int r = 0; r < M; r++) {
    FDJAX_UNROLL for (int j = 0; j < FULL; j++) store<VL>(out[r] + column + VL * j, clamped(c[r][j], range));
    if (AND_HALF) store<HALF>(out[r] + column + VL * FULL, clamped(h[r], range));
  }
}

using Tile = void (*)(const float* const*, const std::int32_t*, int, const float*, int, const float* const*,
                      float* const*, int, Range);
// By rows - 1, and by groups of HALF lanes of columns: 1 to TILE_VECTORS whole vectors.
constexpr int PER_VECTOR = VL / HALF, KINDS = TILE_VECTORS * PER_VECTOR;
template <int M, int G>
constexpr Tile tile_of = tile<M, G / PER_VECTOR, G % PER_VECTOR != 0>;
#define FDJAX_TILES(M)                                                                                     \
  {                                                                                                        \
    tile_of<M, 1>, tile_of<M, 2>, tile_of<M, 3>, tile_of<M, KINDS < 4 ? 3 : 4>, tile_of<M, KINDS < 5 ? 3 : 5>, \
        tile_of<M, KINDS < 6 ? 3 : 6>                                                                      \
  }
const Tile TILES[TILE_ROWS][6] = {
    FDJAX_TILES(1), FDJAX_TILES(2), FDJAX_TILES(3), FDJAX_TILES(4),
#if !defined(__AVX__) || defined(__AVX512F__)
    FDJAX_TILES(5), FDJAX_TILES(6), FDJAX_TILES(7), FDJAX_TILES(8),
#endif
};

// out [rows, columns] = start + a [rows, index[0..k-1]] w [k, columns]; columns: a multiple of 8, of rows `ldw` apart.
[[maybe_unused]] void product(int rows, From a, const std::int32_t* index, int k, const float* w, int ldw, int columns, From start,
             To out, Range range) {
  const int tiles = ceil_div(rows, TILE_ROWS), low = rows / tiles, higher = rows % tiles;
  for (int t = 0, r = 0; t < tiles; t++) {
    const int m = low + (t < higher);
    const float *from[TILE_ROWS], *begin[TILE_ROWS];
    float* to[TILE_ROWS];
    for (int i = 0; i < m; i++, r++) from[i] = a.at(r), begin[i] = start.at(r), to[i] = out.at(r);
    for (int j = 0; j < columns; j += VL * TILE_VECTORS) {
      const int groups = std::min(columns - j, VL * TILE_VECTORS) / HALF;
      TILES[m - 1][groups - 1](from, index, k, w + j, ldw, begin, to, j, range);
    }
  }
}

// Depthwise rows

// Pixels 0 .. N - 1 of a row, of L channels: taps [KH * KW] of `ldt` channels.
template <int L, int N, int KH, int KW, int STRIDE>
FDJAX_INLINE void depthwise_pixels(const float* x, std::ptrdiff_t row, const float* taps, int ldt, Vec<L> bias,
                                   float* out, Range range) {
  Vec<L> sum[N];
  FDJAX_UNROLL for (int t = 0; t < N; t++) sum[t] = bias;
  FDJAX_UNROLL for (int i = 0; i < KH; i++) {
    FDJAX_UNROLL for (int c = 0; c < (N - 1) * STRIDE + KW; c++) {
      const Vec<L> v = load<L>(x + i * row + c * PANEL);
      FDJAX_UNROLL for (int t = 0; t < N; t++) {
        const int q = c - t * STRIDE;
        if (q >= 0 && q < KW) sum[t] += v * load<L>(taps + (i * KW + q) * ldt);
      }
    }
  }
  FDJAX_UNROLL for (int t = 0; t < N; t++) store<L>(out + t * PANEL, clamped(sum[t], range));
}

template <int L, int N, int KH, int KW, int STRIDE>
FDJAX_INLINE void depthwise_rest(int left, const float* x, std::ptrdiff_t row, const float* taps, int ldt,
                                 Vec<L> bias, float* out, Range range) {
  if (left == N) depthwise_pixels<L, N, KH, KW, STRIDE>(x, row, taps, ldt, bias, out, range);
  if constexpr (N > 1) {
    if (left < N) depthwise_rest<L, N - 1, KH, KW, STRIDE>(left, x, row, taps, ldt, bias, out, range);
  }
}

// One row of a depthwise layer on a panel: pixels are PANEL apart, rows of x `row`.
using DepthwiseRow = void (*)(const float* x, std::ptrdiff_t row, const float* taps, int ldt, const float* bias,
                              int width, int channels, Range range, float* out);
template <int KH, int KW, int STRIDE>
void depthwise_row(const float* x, std::ptrdiff_t row, const float* taps, int ldt, const float* bias, int width,
                   int channels, Range range, float* out) {
  constexpr int N = VL == 16 && KW <= 5 ? 6 : 4;
  each_vector(channels, [&](auto lanes, int j) {
    constexpr int L = decltype(lanes)::value;
    const Vec<L> b = load<L>(bias + j);
    int p = 0;
    for (; p + N <= width; p += N)
      depthwise_pixels<L, N, KH, KW, STRIDE>(x + p * STRIDE * PANEL + j, row, taps + j, ldt, b, out + p * PANEL + j,
                                             range);
    if (p < width)
      depthwise_rest<L, N - 1, KH, KW, STRIDE>(width - p, x + p * STRIDE * PANEL + j, row, taps + j, ldt, b,
                                               out + p * PANEL + j, range);
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
