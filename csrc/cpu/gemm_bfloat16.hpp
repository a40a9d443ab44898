// The engine for bfloat16 operands: products of pairs, accumulated in float.
//
// Apart from the rounding of entries, the error is that of float sums:
//   - Features and prototypes are multiplied by a power of two only, which is exact. The remaining factors of
//     1 / |z| and 1 / |w|, between 1 and 2, and beta (`rest`) multiply t, and the entries before rounding.
//   - t, exponentials and all sums are floats.
//   - An entry is rounded once, when it is complete, including its positive.
//
// The instruction multiplies pairs of numbers that are adjacent along the inner dimension:
//     C[r][x] += A[r][2k] B[2k][x] + A[r][2k + 1] B[2k + 1][x].
// In all three products A is stored by rows, and B in panels of pairs, [inner / 2][NR][2]:
//   t    = U V^T      U as it is, V in panels of classes with pairs of features;
//   dU   = A V        the entries by rows, V in panels of features with pairs of classes;
//   dV^T = U^T A      U^T by features, the entries in panels of classes with pairs of samples.
// So entries are written twice, with different factors: A_jc rest_c for dU, A_jc rest_j for dV.
#pragma once

#include "pairs.hpp"

namespace nckernels {
template <int VECTORS, class Unit>
struct GemmBfloat16 {
  using T = float;
  using Operand = uint16_t;
  static constexpr int NV = VECTORS, W = lanes<T>, NR = NV * W;
  static constexpr int MR = Unit::MR, GROUP = 2 * W;
  static constexpr long DEPTH = 2 * nckernels::DEPTH;
  static constexpr long BLOCK = DEPTH / NR;
  static constexpr int PR = Unit::PR < NR ? Unit::PR : NR;  // features of dV^T in a register tile
  static constexpr int64_t FEW = Unit::FEW;  // the most classes that are multiplied as floats instead
  static_assert(MR % 2 == 0 && NR % PR == 0 && DEPTH % NR == 0 && DEPTH % Unit::INNER == 0 &&
                (2 * W) % Unit::INNER == 0);

  // --- sizes ---
  static int64_t inner(int64_t n) { return round_up(n, Unit::INNER); }
  static int64_t by_feature(int64_t rows, int64_t d_pad) { return round_up(rows, GROUP) * d_pad; }
  static constexpr int ENTRIES = 2;

  // --- packing ---
  static constexpr bool RESTS = true;
  static T unit(T rnorm, T) { return from_bits(to_bits(rnorm) & 0x7f800000u); }
  static T rest(T rnorm, T beta) { return from_bits((to_bits(rnorm) & 0x007fffffu) | 0x3f800000u) * beta; }

  using Line = char;
  static const Operand* row(const Rows<T>& rows, int64_t j, int64_t first, int64_t, Line&) {
    return rows.raw(j, first);
  }
  static const Operand* no_row() { return nullptr; }

  // [inner(n) / 2][NR][2], a panel of V.
  static void pack_panel(const Operand* const* rows, const T* scale, int64_t n, Operand* out) {
    for (int64_t x = 0; x < inner(n); x += 2 * W)
      for (int g = 0; g < NR; g += W) {
        Vec<T> block[W];
#pragma GCC unroll 16
        for (int r = 0; r < W; r++) block[r] = pairs_of_row(rows[g + r], x, n, scale[g + r]);
        transpose<T>(block);
        const int64_t count = std::min<int64_t>(W, (inner(n) - x) / 2);
        for (int64_t r = 0; r < count; r++) store(as_floats(out) + (x / 2 + r) * NR + g, block[r]);
      }
  }

  // [NR / 2][NR][2], a panel of V by features with pairs of its rows.
  static void pack_panel_by_feature(const Operand* const* rows, const T* scale, int64_t width, Operand* out) {
    for (int64_t r = 0; r < NR; r += 2)
      for (int64_t x = 0; x < NR; x += W)
        store(as_floats(out) + r / 2 * NR + x, pair_of_rows(rows + r, scale + r, x, width));
  }

  // [count][inner(n)], rows of U.
  static void pack_rows(const Operand* const* rows, const T* scale, int64_t count, int64_t n, Operand* out) {
    for (int64_t r = 0; r < count; r++)
      for (int64_t x = 0; x < inner(n); x += 2 * W) {
        const Vec<T> some = pairs_of_row(rows[r], x, n, scale[r]);
        if (x + 2 * W <= inner(n))
          store(as_floats(out + r * inner(n) + x), some);
        else
          std::memcpy(out + r * inner(n) + x, &some, (inner(n) - x) * sizeof(Operand));
      }
  }

  // Samples [first, first + GROUP) and features [k, k + n) of U^T, [d_pad][padded rows, up to a multiple of
  // GROUP].
  static void pack_rows_by_feature(const Operand* const* rows, const T* scale, int64_t first, int64_t padded,
                                   int64_t k, int64_t n, Operand* out) {
    const int64_t stride = round_up(padded, GROUP);
    for (int64_t x = 0; x < round_up(n, NR); x += W) {
      Vec<T> block[W];
#pragma GCC unroll 16
      for (int r = 0; r < W; r++) block[r] = pair_of_rows(rows + 2 * r, scale + 2 * r, x, n);
      transpose<T>(block);
      for (int r = 0; r < W; r++) store(as_floats(out + (k + x + r) * stride + first), block[r]);
    }
  }

  // --- entries: a panel by rows, followed by the same panel in pairs of samples ---
  static T* panel_of_entries(Operand*, T* scratch) { return scratch; }
  static Operand* by_columns(Operand* panel, int64_t rows) { return panel + rows * NR; }

  static void put_entries(const T* panel, int64_t rows, const T* of_rows, const T* of_columns,
                          Operand* by_rows, Operand* in_pairs) {
    for (int v = 0; v < NV; v++) {
      const Vec<T> factor = load(of_columns + v * W);
      for (int64_t r = 0; r < rows; r += 2) {
        const Vec<T> a = load(panel + r * NR + v * W), b = load(panel + (r + 1) * NR + v * W);
        store_rounded(a * factor, by_rows + r * NR + v * W);
        store_rounded(b * factor, by_rows + (r + 1) * NR + v * W);
        store(as_floats(in_pairs + r * NR) + v * W, rounded_pairs(a * of_rows[r], b * of_rows[r + 1]));
      }
    }
  }

  // The rounding error of the sum of A t over a panel: the sum of (A - rounded A) t, where A is rounded as
  // told. `e`: t or exp(t). Excluded entries have no t and add 0.
  static double lost(const T* panel, int64_t rows, const T* of_rows, const T* of_columns, Rounding rounding,
                     const T* e, bool exponentials) {
    Vec<T> column[NV], column_inverse[NV], total{};
    for (int v = 0; v < NV; v++) {
      column[v] = load(of_columns + v * W);
      column_inverse[v] = 1.0f / column[v];
    }
    for (int64_t r = 0; r < rows; r++) {
      const Vec<T> row = splat(of_rows[r]), row_inverse = splat(1.0f / of_rows[r]);
      for (int v = 0; v < NV; v++) {
        const Vec<T> a = load(panel + r * NR + v * W), x = load(e + r * NR + v * W);
        Vec<T> loss{};
        if (rounding != Rounding::kInPairs) loss += lost_by(a, column[v], column_inverse[v]);
        if (rounding != Rounding::kByRows) loss += lost_by(a, row, row_inverse);
        const Vec<T> t = exponentials ? rough_logarithm(x) : x;
        total += (exponentials ? x > 0.0f : x > minus_infinity<T>) ? loss * t : Vec<T>{};
      }
    }
    return sum<T>(total) * (rounding == Rounding::kMean ? 0.5 : 1.0);
  }

  // The same for a single entry.
  static double lost(T a, T of_row, T of_column, Rounding rounding, T t) {
    auto by = [&](T factor) { return double(lost_by(splat(a), splat(factor), splat(1 / factor))[0]); };
    const double loss = rounding == Rounding::kByRows    ? by(of_column)
                        : rounding == Rounding::kInPairs ? by(of_row)
                                                         : 0.5 * (by(of_row) + by(of_column));
    return loss * t;
  }

  // What an entry loses if it is rounded after multiplication by a factor, whose inverse is given. Without a
  // factor it is not used, and t may be undefined.
  static NCK_INLINE Vec<T> lost_by(Vec<T> a, Vec<T> factor, Vec<T> inverse) {
    return factor == 0.0f ? Vec<T>{} : a - upper(rounded(a * factor)) * inverse;
  }

  // --- products, see Gemm ---
  static void logits(long m, long rows, long first, long last, long panels, long d, const Operand* u,
                     const Operand* v, const T* of_rows, const T* of_columns, T* t) {
    [[maybe_unused]] const typename Unit::Session session;
    for (long k = 0; k < d; k += DEPTH)
      for (long p = first; p < last; p++) {
        const long n = inner(d - k < DEPTH ? d - k : DEPTH);
        const Operand* b = v + (k * panels + p * n) * NR;
        T* c = t + (p - first) * m * NR;
        for (long i = 0; i < rows; i += MR) {
          const Operand* a = u + k * m + i * n;
          const Factors factors{k + DEPTH < d ? nullptr : of_rows + i, of_columns + (p - first) * NR};
          if (k)
            Unit::template multiply<MR, NV, true>(1, n / 2, a, n, 0, b, c + i * NR, NR, factors);
          else
            Unit::template multiply<MR, NV, false>(1, n / 2, a, n, 0, b, c + i * NR, NR, factors);
        }
      }
  }

  // a: the entries by rows.
  static void times_prototypes(long m, long rows, long first, long last, long panels, long /*columns*/,
                               long d_panels, const Operand* a, const Operand* v, T* out, bool added) {
    [[maybe_unused]] const typename Unit::Session session;
    for (long p = first; p < last; p += BLOCK)
      for (long n = 0; n < d_panels; n++) {
        const long count = last - p < BLOCK ? last - p : BLOCK;
        const Operand* b = v + (n * panels + p) * NR * NR;
        for (long i = 0; i < rows; i += MR) {
          const Operand* x = a + ((p - first) * ENTRIES * m + i) * NR;
          T* c = out + (n * m + i) * NR;
          if (p == first && !added)
            Unit::template multiply<MR, NV, false>(count, NR / 2, x, NR, ENTRIES * m * NR, b, c, NR);
          else
            Unit::template multiply<MR, NV, true>(count, NR / 2, x, NR, ENTRIES * m * NR, b, c, NR);
        }
      }
  }

  static constexpr bool PANELS_APART = true;

  // out[panel of columns][d_pad][NR]; a: the entries in pairs of samples, u: U^T.
  static void times_features(long m, long rows, long first, long last, long f_first, long f_last,
                             const Operand* a, const Operand* u, long d_pad, long /*columns*/, T* out) {
    [[maybe_unused]] const typename Unit::Session session;
    const long stride = round_up(m, GROUP), n = inner(rows);
    for (long p = first / NR; p * NR < last; p++)
      for (long f = f_first * NR; f < f_last * NR; f += PR)
        Unit::template multiply<PR, NV, true>(1, n / 2, u + f * stride, stride, 0, a + p * ENTRIES * m * NR,
                                              out + (p * d_pad + f) * NR, NR);
  }

  static constexpr int64_t COLUMNS = W;
  static void gather_columns(const T* from, int64_t /*columns*/, int64_t c, int64_t d_pad, T* x) {
    const T* panel = from + c / NR * d_pad * NR + c % NR;
    for (int64_t f = 0; f < d_pad; f += W) {
      Vec<T> block[W];
#pragma GCC unroll 16
      for (int r = 0; r < W; r++) block[r] = load(panel + (f + r) * NR);
      transpose<T>(block);
#pragma GCC unroll 16
      for (int r = 0; r < W; r++) store(x + r * d_pad + f, block[r]);
    }
  }

  static void gather_row(const T* from, int64_t padded, int64_t r, int64_t d_pad, T* x) {
    Gemm<T, NV>::gather_row(from, padded, r, d_pad, x);
  }
};

}  // namespace nckernels
