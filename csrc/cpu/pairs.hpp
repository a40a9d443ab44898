// Pairs of bfloat16 numbers in the lanes of a float vector: how they are made, rounded and multiplied.
#pragma once

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "gemm.hpp"

namespace nckernels {
NCK_INLINE float* as_floats(uint16_t* p) { return reinterpret_cast<float*>(p); }

// The lower and the upper number of each pair.
NCK_INLINE Vec<float> lower(Bits pairs) { return floats_of(pairs << 16); }
NCK_INLINE Vec<float> upper(Bits pairs) { return floats_of(pairs & 0xffff0000u); }

// Pairs of numbers that bfloat16 holds.
NCK_INLINE Vec<float> paired(Vec<float> low, Vec<float> high) {
  return floats_of((bits_of(low) >> 16) | (bits_of(high) & 0xffff0000u));
}

// A vector of a row of n numbers, starting at number x. Numbers past the end, and those of a null row, are
// zero.
template <class V>
NCK_INLINE V part_of_row(const uint16_t* row, int64_t x, int64_t n) {
  V some{};
  const int64_t size = sizeof some / sizeof *row;
  if (!row || x >= n) return some;
  if (n - x >= size)
    std::memcpy(&some, row + x, sizeof some);
  else
    std::memcpy(&some, row + x, (n - x) * sizeof *row);
  return some;
}

// Numbers [x, x + 2 W) of a row as pairs, times a power of two.
NCK_INLINE Vec<float> pairs_of_row(const uint16_t* row, int64_t x, int64_t n, float scale) {
  const Bits some = part_of_row<Bits>(row, x, n);
  return paired(lower(some) * scale, upper(some) * scale);
}

// Numbers [x, x + W) of a row, times a power of two.
NCK_INLINE Vec<float> numbers_of_row(const uint16_t* row, int64_t x, int64_t n, float scale) {
  return lower(__builtin_convertvector(part_of_row<Halves>(row, x, n), Bits)) * scale;
}

// The same of two rows, interleaved as pairs.
NCK_INLINE Vec<float> pair_of_rows(const uint16_t* const* rows, const float* scale, int64_t x, int64_t n) {
  return paired(numbers_of_row(rows[0], x, n, scale[0]), numbers_of_row(rows[1], x, n, scale[1]));
}

// The units' own conversions take subnormal numbers for zeros, as their products do.
#if defined(__AVX512BF16__)
NCK_INLINE void store_rounded(Vec<float> x, uint16_t* to) {
  const __m256bh y = _mm512_cvtneps_pbh(x);
  std::memcpy(to, &y, sizeof y);
}

NCK_INLINE Vec<float> rounded_pairs(Vec<float> low, Vec<float> high) {
  const __m512i in_turns = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23,
                                            7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (__m512)_mm512_permutexvar_epi16(in_turns, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}
#else
NCK_INLINE void store_rounded(Vec<float> x, uint16_t* to) {
  const Halves y = halves_of(rounded(x));
  std::memcpy(to, &y, sizeof y);
}

NCK_INLINE Vec<float> rounded_pairs(Vec<float> low, Vec<float> high) {
  return paired(floats_of(rounded(low)), floats_of(rounded(high)));
}
#endif

// Factors of the rows and columns of a complete product. Null `of_rows` stand for none of both.
struct Factors {
  const float *of_rows = nullptr, *of_columns = nullptr;
};

// Writes the accumulators to C[R][NV vectors], or adds them to it.
template <int R, int NV, bool ACCUMULATE>
NCK_INLINE void put_scaled(const Vec<float> (&acc)[R][NV], float* c, long c_stride, const Factors& factors) {
  if (!factors.of_rows) return put<float, R, NV, ACCUMULATE>(acc, c, c_stride);
#pragma GCC unroll 2
  for (int v = 0; v < NV; v++) {
    const Vec<float> of_column = load(factors.of_columns + v * lanes<float>);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      float* to = c + r * c_stride + v * lanes<float>;
      store(to, (ACCUMULATE ? load(to) + acc[r][v] : acc[r][v]) * (of_column * factors.of_rows[r]));
    }
  }
}

// The vector unit: vdpbf16ps (AVX512-BF16), or a model of it that differs only in the order of additions.
struct VectorPairs {
  static constexpr int MR = 12, PR = 8, INNER = 2, FEW = 4 * lanes<float>;
  struct Session {};  // set-up of a thread for some products: none

  static NCK_INLINE Vec<float> add(Vec<float> c, uint32_t a, Vec<float> b) {
#if defined(__AVX512BF16__)
    return _mm512_dpbf16_ps(c, (__m512bh)_mm512_set1_epi32(int(a)), (__m512bh)b);
#else
    const Bits pairs = bits_of(b);
    return c + from_bits(a << 16) * lower(pairs) + from_bits(a & 0xffff0000u) * upper(pairs);
#endif
  }

  // C[R][NV vectors] (+)= sum over blocks p < count and pairs k < depth of
  //     A[p * a_block + r * a_stride + 2k, + 1] * B[(p * depth + k)][NR][2],
  // and then times the factors.
  template <int R, int NV, bool ACCUMULATE>
  static NCK_INLINE void multiply(long count, long depth, const uint16_t* a, long a_stride, long a_block,
                                  const uint16_t* b, float* c, long c_stride, const Factors& factors = {}) {
    constexpr int W = lanes<float>;
    if (ACCUMULATE) prefetch<float, R, NV>(c, c_stride);
    Vec<float> acc[R][NV];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
      for (int v = 0; v < NV; v++) acc[r][v] = Vec<float>{};
    const float* pairs = reinterpret_cast<const float*>(b);
    for (long p = 0; p < count; p++, a += a_block)
      for (long k = 0; k < depth; k++, pairs += NV * W) {
        Vec<float> y[NV];
#pragma GCC unroll 2
        for (int v = 0; v < NV; v++) y[v] = load(pairs + v * W);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
          uint32_t x;
          std::memcpy(&x, a + r * a_stride + 2 * k, sizeof x);
#pragma GCC unroll 2
          for (int v = 0; v < NV; v++) acc[r][v] = add(acc[r][v], x, y[v]);
        }
      }
    put_scaled<R, NV, ACCUMULATE>(acc, c, c_stride, factors);
  }
};

}  // namespace nckernels
