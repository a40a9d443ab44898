// Vectorised access to rows: 16 bytes at a time, to shared memory or to registers.
#pragma once

#include "operands.h"

namespace nck {

template <class T>
inline constexpr int kPerVec = 16 / int(sizeof(T));

// Whether every row starts at a multiple of 16 bytes. If not, numbers are read one by one.
template <class T>
NCK_DEVICE bool rows_aligned(const void* x, int64_t stride) {
  return (reinterpret_cast<uintptr_t>(x) | uintptr_t(stride * int64_t(sizeof(T)))) % 16 == 0;
}

// Copies the first `count` numbers of 16 bytes to shared memory, followed by zeros: asynchronously if rows
// are aligned, synchronously if not.
template <class T>
NCK_DEVICE void copy_piece(unsigned char* to, const T* from, int count, bool aligned) {
  if (aligned) return cp_async16(to, from, count * int(sizeof(T)));
  union {
    T number[kPerVec<T>];
    Vec16 vec;
  } raw;
  raw.vec = Vec16{};
#pragma unroll
  for (int i = 0; i < kPerVec<T>; i++) {
    if (i < count) raw.number[i] = from[i];
  }
  *reinterpret_cast<Vec16*>(to) = raw.vec;
}

template <class T>
NCK_DEVICE T round_to(float x);
template <>
NCK_DEVICE float round_to<float>(float x) {
  return x;
}
template <>
NCK_DEVICE bf16 round_to<bf16>(float x) {
  return {uint16_t(pack(x, 0.0f, bf16{}))};
}
template <>
NCK_DEVICE f16 round_to<f16>(float x) {
  return {uint16_t(pack(x, 0.0f, f16{}))};
}

// Numbers [column, column + 8) of a row of length d; zeros past its end.
template <class T>
NCK_DEVICE void load8(float (&out)[8], const T* row, int column, int d, bool aligned) {
  constexpr int kVecs = 8 / kPerVec<T>;
  if (aligned && column + 8 <= d) {
    union {
      Vec16 vec[kVecs];
      T number[8];
    } raw;
#pragma unroll
    for (int i = 0; i < kVecs; i++) raw.vec[i] = reinterpret_cast<const Vec16*>(row + column)[i];
#pragma unroll
    for (int i = 0; i < 8; i++) out[i] = to_float(raw.number[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) out[i] = column + i < d ? to_float(row[column + i]) : 0.0f;
  }
}

template <class T>
NCK_DEVICE void store8(T* row, int column, int d, bool aligned, const float (&in)[8]) {
  constexpr int kVecs = 8 / kPerVec<T>;
  if (aligned && column + 8 <= d) {
    union {
      Vec16 vec[kVecs];
      T number[8];
    } raw;
#pragma unroll
    for (int i = 0; i < 8; i++) raw.number[i] = round_to<T>(in[i]);
#pragma unroll
    for (int i = 0; i < kVecs; i++) reinterpret_cast<Vec16*>(row + column)[i] = raw.vec[i];
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (column + i < d) row[column + i] = round_to<T>(in[i]);
    }
  }
}

// The largest x of a block's threads, returned to all of them. `scratch` has a place for each warp and may be
// reused at once.
template <int kThreads>
NCK_DEVICE float block_max(float x, float* scratch) {
  for (int mask = 1; mask < 32; mask *= 2) x = fmaxf(x, shfl_xor(x, mask));
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  block_sync();
  for (int i = 0; i < kThreads / 32; i++) x = fmaxf(x, scratch[i]);
  block_sync();  // before the next call writes to scratch
  return x;
}

// The sum over a block's threads, in a fixed order, returned to all of them.
template <int kThreads>
NCK_DEVICE float block_sum(float x, float* scratch) {
  for (int mask = 1; mask < 32; mask *= 2) x += shfl_xor(x, mask);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  block_sync();
  float total = 0.0f;
  for (int i = 0; i < kThreads / 32; i++) total += scratch[i];
  block_sync();  // before the next call writes to scratch
  return total;
}

// `lanes` neighbouring lanes share a row. Short rows have fewer lanes, so that none is idle.
struct RowTeam {
  int lanes;
  int column;  // the first column of this lane, which advances by `step`
  int step;
  int64_t row;

  NCK_DEVICE static RowTeam of(int d, int threads) { return of(d, threads, int64_t(blockIdx.x)); }

  // For the `block`-th of the blocks that share the rows of a matrix.
  NCK_DEVICE static RowTeam of(int d, int threads, int64_t block) {
    int lanes = 1;
    while (lanes < 32 && lanes * 8 < d) lanes *= 2;
    int thread = int(threadIdx.x);
    return {lanes, thread % lanes * 8, lanes * 8, block * (threads / lanes) + thread / lanes};
  }

  // The sum over the lanes that share the row, returned to all of them.
  NCK_DEVICE float sum(float x) const {
    for (int mask = 1; mask < lanes; mask *= 2) x += shfl_xor(x, mask);
    return x;
  }
};

// The number of rows per block of `threads` threads, by the same rule as RowTeam::of.
inline int rows_per_block(int d, int threads) {
  int lanes = 1;
  while (lanes < 32 && lanes * 8 < d) lanes *= 2;
  return threads / lanes;
}

// Calls f with a number of the row type of `kind`.
template <class F>
void with_row_type(Kind kind, F f) {
  switch (kind) {
    case Kind::kBf16:
      return f(bf16{});
    case Kind::kF16:
      return f(f16{});
    default:
      return f(0.0f);
  }
}

}  // namespace nck
