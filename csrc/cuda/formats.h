// One interface for the number formats of tensor-core products.
//
// All formats are processed in pieces of 32 bytes along the rows (16 numbers of 16 bits, or 8 of 32). The
// fragments of mma.sync then have the same shape in bytes, so that all formats share the loading code.
#pragma once

#include "operands.h"

namespace nck {

template <Kind K>
struct Format {
  using Number = float;
};
template <>
struct Format<Kind::kBf16> {
  using Number = bf16;
};
template <>
struct Format<Kind::kF16> {
  using Number = f16;
};
template <Kind K>
using Number = typename Format<K>::Number;

template <Kind K>
inline constexpr bool kHalf = sizeof(Number<K>) == 2;

// N registers of an operand in the format of the tensor cores. For kTf32x3 a number is the sum of two tf32
// numbers, `main + rest`, exact to about 2^-24.
template <Kind K, int N>
struct Part {
  uint32_t main[N];
  uint32_t rest[K == Kind::kTf32x3 ? N : 1];
};

template <Kind K, int N>
NCK_DEVICE Part<K, N> prepare(const uint32_t (&raw)[N]) {
  Part<K, N> part;
#pragma unroll
  for (int i = 0; i < N; i++) {
    if constexpr (kHalf<K>) {
      part.main[i] = raw[i];
    } else {
      part.main[i] = to_tf32(bits_float(raw[i]));
      if constexpr (K == Kind::kTf32x3) {
        part.rest[i] = to_tf32(bits_float(raw[i]) - bits_float(part.main[i]));
      }
    }
  }
  return part;
}

// acc += a b, with b the registers [at, at + 2) of a part.
template <Kind K, int N>
NCK_DEVICE void multiply(float (&acc)[4], const Part<K, 4>& a, const Part<K, N>& b, int at) {
  if constexpr (K == Kind::kBf16) {
    mma_bf16(acc, a.main, b.main[at], b.main[at + 1]);
  } else if constexpr (K == Kind::kF16) {
    mma_f16(acc, a.main, b.main[at], b.main[at + 1]);
  } else {
    if constexpr (K == Kind::kTf32x3) {
      // Small terms first; rest times rest is below the rounding of float32.
      mma_tf32(acc, a.rest, b.main[at], b.main[at + 1]);
      mma_tf32(acc, a.main, b.rest[at], b.rest[at + 1]);
    }
    mma_tf32(acc, a.main, b.main[at], b.main[at + 1]);
  }
}

// Calls f with an integral_constant of the kind.
template <Kind K>
struct KindConstant {
  static constexpr Kind value = K;
};

template <class F>
void with_kind(Kind kind, F f) {
  switch (kind) {
    case Kind::kBf16:
      return f(KindConstant<Kind::kBf16>{});
    case Kind::kF16:
      return f(KindConstant<Kind::kF16>{});
    case Kind::kTf32:
      return f(KindConstant<Kind::kTf32>{});
    default:
      return f(KindConstant<Kind::kTf32x3>{});
  }
}

// Calls f with a number of the type of mask tags.
template <class F>
void with_tag(Exclude exclude, F f) {
  if (exclude == Exclude::kSameLabel) return f(int64_t{});
  return f(int32_t{});
}

}  // namespace nck
