// The three matrix products of a tile, by one micro-kernel and without repacking the tile.
//
// A tile of m rows and n columns is stored in panels of NR columns: [n / NR][m][NR]. In this layout it is
//   written by   t  = U V^T      (U packed in blocks of MR rows, V in panels of classes),
//   read by rows in    dU = A V  (V in panels of features), and
//   read by columns in dV = A^T U (U in panels of features).
//
// `Gemm` is the engine of the passes for operands of type T. gemm_bfloat16.hpp has another engine with the
// same members, whose operands are bfloat16.
#pragma once

#include "problem.hpp"
#include "simd.hpp"

namespace nckernels {
// Rows of the register tile: MR x 2 accumulators, two vectors of B and a broadcast fit the registers.
#if NCK_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int MR = 12;
#else
constexpr int MR = 6;
#endif

// Writes the accumulators to C[R x NV vectors], or adds them to it.
template <class T, int R, int NV, bool ACCUMULATE>
NCK_INLINE void put(const Vec<T> (&acc)[R][NV], T* c, long c_stride) {
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 2
    for (int v = 0; v < NV; v++) {
      T* to = c + r * c_stride + v * lanes<T>;
      store(to, ACCUMULATE ? load(to) + acc[r][v] : acc[r][v]);
    }
}

// Asks for C[R x NV vectors] in the L1 cache, while the products that will be added to it are computed.
template <class T, int R, int NV>
NCK_INLINE void prefetch(const T* c, long c_stride) {
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 2
    for (int v = 0; v < NV; v++) __builtin_prefetch(c + r * c_stride + v * lanes<T>, 1);
}

// C[R x NV vectors] (+)= sum over blocks p < count and k < depth of
//     A[p * a_block + r * RS + k * CS] * B[(p * depth + k) * NR + .]
// Accumulators start from zero and are added to C as a whole, so that the rounding error of a long sum grows
// with the length of its parts only.
template <class T, int R, int NV, int RS, int CS, bool ACCUMULATE>
NCK_INLINE void micro(long count, long depth, const T* a, long a_block, const T* b, T* c, long c_stride) {
  constexpr int W = lanes<T>;
  if (ACCUMULATE) prefetch<T, R, NV>(c, c_stride);
  Vec<T> acc[R][NV];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 2
    for (int v = 0; v < NV; v++) acc[r][v] = Vec<T>{};
  for (long p = 0; p < count; p++) {
    const T* x = a + p * a_block;
    for (long k = 0; k < depth; k++) {
      Vec<T> y[NV];
#pragma GCC unroll 2
      for (int v = 0; v < NV; v++) y[v] = load(b + v * W);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++)
#pragma GCC unroll 2
        for (int v = 0; v < NV; v++) acc[r][v] += x[r * RS] * y[v];
      x += CS;
      b += NV * W;
    }
  }
  put<T, R, NV, ACCUMULATE>(acc, c, c_stride);
}

// C[R x NV vectors] (+)= sum over k < depth of rows[r][at + k] * B[k][NR], with the rows of A in place.
template <class T, int R, int NV, bool ACCUMULATE>
NCK_INLINE void rows_times_panel(const T* const* rows, long at, long depth, const T* b, T* c) {
  constexpr int W = lanes<T>;
  Vec<T> acc[R][NV];
  const T* a[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
    a[r] = rows[r] + at;
#pragma GCC unroll 2
    for (int v = 0; v < NV; v++) acc[r][v] = Vec<T>{};
  }
  for (long k = 0; k < depth; k++) {
    Vec<T> y[NV];
#pragma GCC unroll 2
    for (int v = 0; v < NV; v++) y[v] = load(b + (k * NV + v) * W);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
      for (int v = 0; v < NV; v++) acc[r][v] += a[r][k] * y[v];
  }
  put<T, R, NV, ACCUMULATE>(acc, c, NV * W);
}

// C[R x NV vectors] += sum over k < depth of A[k][NR]^T * rows[k][at + .], with the rows of B in place.
template <class T, int R, int NV>
NCK_INLINE void panel_times_rows(long depth, const T* a, const T* const* rows, long at, T* c) {
  constexpr int W = lanes<T>;
  Vec<T> acc[R][NV];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 2
    for (int v = 0; v < NV; v++) acc[r][v] = Vec<T>{};
  for (long k = 0; k < depth; k++, a += NV * W) {
    const T* b = rows[k] + at;
    Vec<T> y[NV];
#pragma GCC unroll 2
    for (int v = 0; v < NV; v++) y[v] = load(b + v * W);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
      for (int v = 0; v < NV; v++) acc[r][v] += a[r] * y[v];
  }
  put<T, R, NV, true>(acc, c, NV * W);
}

// Inner dimensions are divided into blocks of DEPTH. DEPTH x NR numbers of B stay in the L1 cache for all
// rows of the tile, and the tile's part of A, 192 x DEPTH numbers, stays in the L2 cache for all panels of B.
constexpr long DEPTH = 128;

// How the entries of a sum have been rounded where an engine rounds them: by rows, in pairs of samples, or
// the mean of both sums.
enum class Rounding { kByRows, kInPairs, kMean };

template <class Number, int VECTORS>
struct Gemm {
  using T = Number;        // of t, sums and results
  using Operand = Number;  // of packed matrices and entries
  static constexpr int NV = VECTORS, W = lanes<T>, NR = NV * W;
  static constexpr int MR = nckernels::MR, GROUP = MR;  // rows that are multiplied, and packed, at a time
  static constexpr long DEPTH = nckernels::DEPTH;
  static_assert(DEPTH % NR == 0);
  // Rows of dV in a register tile: as many as fit, and a divisor of NR, so that no tile crosses panels.
  static constexpr int FIT = MR == 6 ? 4 : 8, PR = NR < FIT ? NR : FIT;
  static_assert(NR % PR == 0);
  static constexpr long BLOCK = DEPTH < NR ? 1 : DEPTH / NR;  // panels of columns that make up DEPTH
  // The most classes for which packing features takes longer than it saves, see few_classes.hpp.
  static constexpr int64_t FEW = 2 * NR;

  // --- sizes in operands: an inner dimension of n, a tile's U by features, an entry ---
  static int64_t inner(int64_t n) { return n; }
  static int64_t by_feature(int64_t rows, int64_t d_pad) { return rows * d_pad; }
  static constexpr int ENTRIES = 1;

  // --- packing: rows are multiplied by `unit`, logits later by `rest` of their row and column ---
  static constexpr bool RESTS = false;
  static T unit(T rnorm, T beta) { return rnorm * beta; }
  static T rest(T, T) { return T(1); }

  // A row from number `first` on, converted into `line` if it has 16-bit numbers; and a row of zeros.
  using Line = T[DEPTH];
  static const T* row(const Rows<T>& rows, int64_t j, int64_t first, int64_t n, T* line) {
    return rows.get(j, first, n, line);
  }
  static const T* no_row() {
    static constexpr T zeros[DEPTH] = {};
    return zeros;
  }

  // [n][NR], a panel of V.
  static void pack_panel(const T* const* rows, const T* scale, int64_t n, T* out) {
    interleave<NR>(rows, scale, n, out);
  }

  // [NR][NR], a panel of V by features: NR rows and `width` numbers of each.
  static void pack_panel_by_feature(const T* const* rows, const T* scale, int64_t width, T* out) {
    for (int64_t r = 0; r < NR; r++) scaled(rows[r], scale[r], width, out + r * NR);
  }

  // [n][MR], MR rows of U.
  static void pack_rows(const T* const* rows, const T* scale, int64_t /*count*/, int64_t n, T* out) {
    interleave<MR>(rows, scale, n, out);
  }

  // Rows [first, first + MR) and features [k, k + n) of [d panel][padded rows][NR].
  static void pack_rows_by_feature(const T* const* rows, const T* scale, int64_t first, int64_t padded,
                                   int64_t k, int64_t n, T* out) {
    for (int64_t r = 0; r < MR; r++)
      for (int64_t x = 0; x < n; x += NR)
        scaled(rows[r] + x, scale[r], n - x, out + ((k + x) * padded / NR + first + r) * NR);
  }

  // --- entries: a panel of A is computed where the products read it ---
  static T* panel_of_entries(T* panel, T* /*scratch*/) { return panel; }
  static void put_entries(const T*, int64_t, const T*, const T*, T*, T*) {}
  static T* by_columns(T* panel, int64_t /*rows*/) { return panel; }

  // --- products ---

  // t[last - first][m][NR] = U V^T for panels [first, last) of the `panels` in V, and at least the first
  // `rows` of m, a multiple of MR. u: [m / MR][d][MR], v: [panels][d][NR]. Both are stored block by block of
  // DEPTH along d, so that numbers that are used together are adjacent for any d.
  static void logits(long m, long rows, long first, long last, long panels, long d, const T* u, const T* v,
                     const T* /*of_rows*/, const T* /*of_columns*/, T* t) {
    for (long k = 0; k < d; k += DEPTH)
      for (long p = first; p < last; p++) {
        const long n = d - k < DEPTH ? d - k : DEPTH;
        const T* b = v + (k * panels + p * n) * NR;
        T* c = t + (p - first) * m * NR;
        for (long i = 0; i < rows; i += MR) {
          const T* a = u + k * m + i * n;
          if (k == 0)
            micro<T, MR, NV, 1, MR, false>(1, n, a, 0, b, c + i * NR, NR);
          else
            micro<T, MR, NV, 1, MR, true>(1, n, a, 0, b, c + i * NR, NR);
        }
      }
  }

  // out[d_panels][m][NR] = A V for panels [first, last) of the `panels` in V, or `added` to it; at least the
  // first `rows` of m. Columns from number `columns` on are zeros, which a single panel skips.
  // a: [last - first][m][NR], v: [d_panels][panels * NR][NR].
  static void times_prototypes(long m, long rows, long first, long last, long panels, long columns,
                               long d_panels, const T* a, const T* v, T* out, bool added) {
    for (long p = first; p < last; p += BLOCK)
      for (long n = 0; n < d_panels; n++) {
        const long count = last - p < BLOCK ? last - p : BLOCK, rest = columns - p * NR;
        const long depth = count == 1 && rest < NR ? rest : NR;
        const T* b = v + (n * panels + p) * NR * NR;
        for (long i = 0; i < rows; i += MR) {
          const T* x = a + ((p - first) * m + i) * NR;
          T* c = out + (n * m + i) * NR;
          if (p == first && !added)
            micro<T, MR, NV, NR, 1, false>(count, depth, x, m * NR, b, c, NR);
          else
            micro<T, MR, NV, NR, 1, true>(count, depth, x, m * NR, b, c, NR);
        }
      }
  }

  // Whether the result for a panel of columns has a place that does not depend on the other columns.
  static constexpr bool PANELS_APART = false;

  // Classes [first, last) and panels [f_first, f_last) of features: out[d panel][columns][NR] += A^T U over
  // the first `rows` of m. u: [d panel][m][NR].
  static void times_features(long m, long rows, long first, long last, long f_first, long f_last, const T* a,
                             const T* u, long /*d_pad*/, long columns, T* out) {
    for (long f = f_first; f < f_last; f++)
      for (long c = first; c < last; c += PR) {
        const T* x = a + (c / NR) * m * NR + c % NR;
        for (long r = 0; r < rows; r += DEPTH) {
          const long n = rows - r < DEPTH ? rows - r : DEPTH;
          micro<T, PR, NV, 1, NR, true>(1, n, x + r * NR, 0, u + (f * m + r) * NR,
                                        out + (f * columns + c) * NR, NR);
        }
      }
  }

  // Copies COLUMNS columns of the result of `times_features`, from number `c` on, a multiple of COLUMNS, to
  // rows of d_pad.
  static constexpr int64_t COLUMNS = 1;
  static void gather_columns(const T* from, int64_t columns, int64_t c, int64_t d_pad, T* x) {
    gather_row(from, columns, c, d_pad, x);
  }

  // Row `r` of a matrix stored as [d panel][padded][NR].
  static void gather_row(const T* from, int64_t padded, int64_t r, int64_t d_pad, T* x) {
    for (int64_t f = 0; f < d_pad / NR; f++) std::copy_n(from + (f * padded + r) * NR, NR, x + f * NR);
  }

 private:
  // out[x][N] = scale_r row_r[x] for N rows of n numbers, in square blocks.
  template <int N>
  static void interleave(const T* const* rows, const T* scale, int64_t n, T* out) {
    int64_t x = 0;
    for (; x + W <= n; x += W, out += W * N)
#pragma GCC unroll 32
      for (int g = 0; g < N; g += W) {
        constexpr int last = N % W ? N % W : W;
        Vec<T> block[W];
#pragma GCC unroll 16
        for (int r = 0; r < W; r++) block[r] = g + r < N ? load(rows[g + r] + x) * scale[g + r] : Vec<T>{};
        transpose<T>(block);
#pragma GCC unroll 16
        for (int r = 0; r < W; r++)
          if (g + W <= N)
            store(out + r * N + g, block[r]);
          else
            store_first<T, last>(out + r * N + g, block[r]);
      }
    for (; x < n; x++, out += N)
      for (int r = 0; r < N; r++) out[r] = rows[r][x] * scale[r];
  }

  // out[NR] = scale row; 0 past `width` if that is less.
  static void scaled(const T* row, T scale, int64_t width, T* out) {
    if (width >= NR) {
      for (int v = 0; v < NV; v++) store(out + v * W, load(row + v * W) * scale);
      return;
    }
    for (int64_t x = 0; x < NR; x++) out[x] = x < width ? row[x] * scale : T(0);
  }
};

}  // namespace nckernels
