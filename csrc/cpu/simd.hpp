// Vectors of the width that this file is compiled for, and the exponential.
//
// One source in GCC's and clang's vector extensions serves AVX-512, AVX2, SSE2 and NEON. The build makes one
// library per instruction set (nckernels/backends/build.py), and Python loads the best one for the CPU.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

// A test sets it to 64 where there is no AVX-512. The compiler then splits each vector into halves.
#if defined(NCK_VECTOR_BYTES)
#elif defined(__AVX512F__)
#define NCK_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define NCK_VECTOR_BYTES 32
#else
#define NCK_VECTOR_BYTES 16
#endif

#define NCK_INLINE inline __attribute__((always_inline))

namespace nckernels {
template <class T>
struct Simd;

template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(NCK_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t I __attribute__((vector_size(NCK_VECTOR_BYTES)));
  using Int = int32_t;
  static constexpr int mantissa = 23, bias = 127;
  static constexpr float round =
      12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  static constexpr float lowest = -87.3f, highest = 88.7f;
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
};

template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(NCK_VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t I __attribute__((vector_size(NCK_VECTOR_BYTES)));
  using Int = int64_t;
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr double round = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double lowest = -708.3, highest = 709.7;
  static constexpr double ln2_high = 6.93145751953125e-1, ln2_low = 1.42860682030941723212e-6;
};

template <class T>
using Vec = typename Simd<T>::V;

template <class T>
constexpr int lanes = NCK_VECTOR_BYTES / sizeof(T);

template <class T>
NCK_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const Vec<T>*>(p);
}

template <class T>
NCK_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<Vec<T>*>(p) = v;
}

template <class T>
NCK_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};
}

template <class T>
NCK_INLINE Vec<T> maximum(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

// One step of a transposition, which swaps lanes S apart: the vector whose number has bit S clear (HIGH:
// set).
template <class T, int S, bool HIGH, size_t... I>
NCK_INLINE Vec<T> swapped(Vec<T> a, Vec<T> b, std::index_sequence<I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(
      a, b, int(HIGH ? (I & S ? lanes<T> + I : I + S) : (I & S ? lanes<T> + I - S : I))...);
#else  // GCC before version 12
  using Index = decltype(a > b);
  return __builtin_shuffle(
      a, b, Index{(HIGH ? (I & S ? lanes<T> + I : I + S) : (I & S ? lanes<T> + I - S : I))...});
#endif
}

// The first N lanes, in pieces that are powers of two.
template <class T, int N, int FIRST = 0>
NCK_INLINE void store_first(T* p, Vec<T> v) {
  constexpr int rest = N - FIRST, size = rest & 8 ? 8 : rest & 4 ? 4 : rest & 2 ? 2 : 1;
  if constexpr (rest == lanes<T>) {
    store(p, v);
  } else if constexpr (size > 1) {
    std::memcpy(p + FIRST, reinterpret_cast<const char*>(&v) + FIRST * sizeof(T), size * sizeof(T));
  } else {
    p[FIRST] = v[FIRST];
  }
  if constexpr (rest > size && rest < lanes<T>) store_first<T, N, FIRST + size>(p, v);
}

template <class T, int HALF = lanes<T> / 2>
NCK_INLINE T sum(Vec<T> v) {
  if constexpr (HALF > 1) {
    const auto halves = swapped<T, HALF, true>(v, v, std::make_index_sequence<lanes<T>>{});
    return sum<T, HALF / 2>(v + halves);
  }
  return v[0] + v[1];
}

template <class T>
NCK_INLINE T largest(Vec<T> v) {
  T best = v[0];
  for (int i = 1; i < lanes<T>; i++) best = v[i] > best ? v[i] : best;
  return best;
}

// A square block: lane j of vector i becomes lane i of vector j.
template <class T, int S = 1>
NCK_INLINE void transpose(Vec<T>* x) {
  constexpr int W = lanes<T>;
  using All = std::make_index_sequence<W>;
#pragma GCC unroll 16
  for (int i = 0; i < W; i++)
    if (!(i & S)) {
      const Vec<T> low = swapped<T, S, false>(x[i], x[i + S], All{});
      x[i + S] = swapped<T, S, true>(x[i], x[i + S], All{});
      x[i] = low;
    }
  if constexpr (2 * S < W) transpose<T, 2 * S>(x);
}

// e^x to about one unit in the last place; 0 below the smallest normal number, NaN for NaN.
// BOUNDED: for x up to 88 in float, where one factor 2^n is enough. x = n ln 2 + r with |r| <= ln 2 / 2, and
// e^r is a Taylor polynomial with a remainder below the rounding error.
template <class T, bool BOUNDED = false>
NCK_INLINE Vec<T> exponential(Vec<T> x) {
  using S = Simd<T>;
  const auto underflow = x < splat(S::lowest);
  Vec<T> y = underflow ? splat(S::lowest) : x;
  if (!BOUNDED) y = y > splat(S::highest) ? splat(S::highest) : y;
  const Vec<T> shifted = y * T(1.44269504088896340736) + S::round;
  const Vec<T> n = shifted - S::round;
  Vec<T> r = y - n * S::ln2_high;
  r = r - n * S::ln2_low;
  Vec<T> p;
  if constexpr (sizeof(T) == 4) {
    p = splat(T(1.0 / 5040));
  } else {
    p = splat(T(1.0 / 6227020800.0));  // 1 / 13!
    p = p * r + T(1.0 / 479001600.0);
    p = p * r + T(1.0 / 39916800.0);
    p = p * r + T(1.0 / 3628800.0);
    p = p * r + T(1.0 / 362880.0);
    p = p * r + T(1.0 / 40320.0);
    p = p * r + T(1.0 / 5040.0);
  }
  p = p * r + T(1.0 / 720);
  p = p * r + T(1.0 / 120);
  p = p * r + T(1.0 / 24);
  p = p * r + T(1.0 / 6);
  p = p * r + T(0.5);
  p = p * r + T(1.0);
  p = p * r + T(1.0);
  // 2^n: n is in the low bits of `shifted`; shift it into the exponent. n = 128 (1024) needs two factors.
  typename S::I bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  typename S::Int base;
  const T round = S::round;
  std::memcpy(&base, &round, sizeof base);
  const typename S::I power = bits - base;
  if (BOUNDED) {
    const typename S::I exponent = (power + S::bias) << S::mantissa;
    Vec<T> scale;
    std::memcpy(&scale, &exponent, sizeof scale);
    return underflow ? Vec<T>{} : p * scale;
  }
  const typename S::I half = power >> 1;
  const typename S::I first = (half + S::bias) << S::mantissa, second = (power - half + S::bias)
                                                                        << S::mantissa;
  Vec<T> a, b;
  std::memcpy(&a, &first, sizeof a);
  std::memcpy(&b, &second, sizeof b);
  p = p * a * b;
  return underflow ? Vec<T>{} : p;
}

// ln x for normal numbers, to 1e-5: with x = 2^n m, ln m is the Chebyshev interpolation of degree 5 on [1,
// 2].
NCK_INLINE Vec<float> rough_logarithm(Vec<float> x) {
  using S = Simd<float>;
  S::I bits;
  std::memcpy(&bits, &x, sizeof bits);
  const S::I mantissa = (bits & 0x007fffff) | 0x3f800000;
  Vec<float> m;
  std::memcpy(&m, &mantissa, sizeof m);
  const Vec<float> n = __builtin_convertvector((bits >> S::mantissa) - S::bias, Vec<float>);
  const Vec<float> y = m - 1.0f;
  const Vec<float> most = -0.49023072f + y * (0.28527268f + y * (-0.13158183f + y * 0.030449f));
  return n * 0.69314718f + (9.9750326e-6f + y * (0.99923548f + y * most));
}

// Floats as bits, and bfloat16 numbers, which are the upper halves of floats.
typedef uint32_t Bits __attribute__((vector_size(NCK_VECTOR_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(NCK_VECTOR_BYTES / 2)));

NCK_INLINE Bits bits_of(Vec<float> x) {
  Bits bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

NCK_INLINE Vec<float> floats_of(Bits bits) {
  Vec<float> x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

NCK_INLINE Halves halves_of(Bits bits) { return __builtin_convertvector(bits >> 16, Halves); }

// To the nearest bfloat16, ties to even, in the upper half of each lane. NaN stays NaN.
NCK_INLINE Bits rounded(Vec<float> x) {
  const Bits bits = bits_of(x), up = bits + 0x7fffu + ((bits >> 16) & 1u);
  return x == x ? up : bits | 0x00400000u;
}

}  // namespace nckernels
