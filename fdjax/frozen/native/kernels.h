// Kernels of a frozen network: vectors, products over packed panels, depthwise rows, blockwise transforms.
//
// They use the vector extensions of GCC and Clang, so that one source serves AVX-512, AVX2 and NEON. Maps are NHWC, and
// the channels of a pixel are rounded up to a multiple of 8; products never read the lanes beyond a map's channels.
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
// Keeps the vector in a register; otherwise GCC reads it from memory again for every product.
#if defined(__x86_64__)
#define FDJAX_KEEP(v) asm("" : "+v"(v))
#elif defined(__aarch64__)
#define FDJAX_KEEP(v) asm("" : "+w"(v))
#else
#define FDJAX_KEEP(v) (void)(v)
#endif

namespace {

// VL is the number of lanes of a vector. TILE_ROWS x TILE_VECTORS sums fit into the registers.
#if defined(__AVX512F__)
constexpr int VL = 16, TILE_ROWS = 8;
#elif defined(__AVX__)
constexpr int VL = 8, TILE_ROWS = 4;
#else
constexpr int VL = 4, TILE_ROWS = 8;
#endif
constexpr int TILE_VECTORS = 3;
// The lanes of the last vector of a row of channels, for which half a vector of AVX-512 can be enough.
constexpr int HALF = VL < 8 ? VL : 8;
// The most channels of a panel, which is also the pitch of its pixels.
constexpr int PANEL = 48;
// Floats of a cache line.
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

// The range of an activation, from `low` to `high`, as the bits of floats. Floats below 0 are below 0 as integers, too,
// and comparisons of integers leave the units that multiply free.
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

// Calls f(lanes, offset) for every vector of `channels`, a multiple of 8; `lanes` is a compile-time constant.
template <class F>
FDJAX_INLINE void each_vector(int channels, F f) {
  int j = 0;
  for (; j + VL <= channels; j += VL) f(std::integral_constant<int, VL>(), j);
  if (VL > HALF && j < channels) f(std::integral_constant<int, HALF>(), j);
}

// Returns v with zeros after its first `lanes` lanes.
template <int L>
FDJAX_INLINE Vec<L> first_lanes(Vec<L> v, int lanes) {
  typename Lanes<L>::Mask at;
  FDJAX_UNROLL for (int i = 0; i < L; i++) at[i] = i;
  return at < lanes ? v : Vec<L>{};
}

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
constexpr int round8(int n) { return ceil_div(n, 8) * 8; }

// Addresses of pixels, in rows of `width`.
template <class T>
struct Pixels {
  T* first;
  int width;
  std::ptrdiff_t row, pixel;
};
// Steps through these pixels in order.
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
// Addresses at a fixed distance in floats.
FDJAX_INLINE From every(const float* first, std::ptrdiff_t pixel) { return {first, INT32_MAX, 0, pixel}; }
FDJAX_INLINE To every(float* first, std::ptrdiff_t pixel) { return {first, INT32_MAX, 0, pixel}; }

alignas(64) const float ZEROS[PANEL] = {};
[[maybe_unused]] constexpr const float* ONTO = nullptr;

// The next cache line of weights to prefetch. Weights are stored in the order in which they are read. Every step of a
// product prefetches a line, at most `reach` floats ahead, so that products do not wait for memory.
struct Ahead {
  const float *next, *end;
  std::ptrdiff_t reach;
};
// While maps are large, weights are prefetched into the second-level cache only; later into the third level, too.
constexpr std::ptrdiff_t NEAR = 96 << 10, FAR = 512 << 10;

// Products

// Weights [k][ldw] of `columns` columns from `column` on; row k is multiplied with the input at index[k].
struct Product {
  const std::int32_t* index;
  int k;
  const float* w;
  int ldw;
  const float* bias;
  int column;
  Range range;
};

// Multiplies `count` times M rows a[r][index[0..k-1]] with w, and adds the bias or, without one, the old values of the
// output; in FULL vectors of columns and, if needed, half a vector.
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
    // Every step prefetches a line; if none is left, one that is cached already. Narrow tiles read too much for it.
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
// The functions by rows - 1, and by the number of HALF vectors of columns, up to TILE_VECTORS whole vectors.
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

// out [rows, columns] = bias + a [rows, index[0..k-1]] w [k, columns]; without a bias the product is added to `out`.
// The number of columns is a multiple of 8, and rows of w are `ldw` floats apart.
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

// Computes pixels 0 to N - 1 of a row, for L channels; taps [KH * KW] are `ldt` floats apart.
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

// Computes a row of a depthwise layer on a panel; pixels are PANEL floats apart, rows of x are `row` floats apart.
using DepthwiseRow = void (*)(const float* x, std::ptrdiff_t row, const float* taps, int ldt, const float* bias,
                              int width, int channels, Range range, float* out);
template <int KH, int KW, int STRIDE>
void depthwise_row(const float* x, std::ptrdiff_t row, const float* taps, int ldt, const float* bias, int width,
                   int channels, Range range, float* out) {
  constexpr int N = VL == 16 && KW <= 5 ? 6 : 4, TAPS = KH * KW;
  // Few taps stay in registers.
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

// Transforms. The source of the network defines Dct<K>: forward[u][i], inverse[u][i] and zigzag[n] = (u, v).
template <int K>
struct Dct;

// Transforms K numbers; their even and odd parts are transformed separately.
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

// Computes the first `count` coefficients of a block of vectors: at(i, j) reads pixel (i, j), put(n, v) stores one.
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

// Transforms back to pixels: get(n) reads one of `count` coefficients, put(i, j, v) stores a pixel.
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
