// The host form of csrc/cuda/primitives.h, where the functions are documented.
#pragma once

#include <cmath>

#include "emulator.h"

#define NCK_DEVICE inline __attribute__((unused))
#define NCK_KERNEL(THREADS, BLOCKS) void
#define __grid_constant__

namespace nck {

NCK_DEVICE bool planted(Fault fault) { return emu::settings.fault == int(fault); }

class SharedArena {
 public:
  template <class T>
  T* take(int count) {
    return static_cast<T*>(emu::take_shared(index_++, count * sizeof(T)));
  }

 private:
  size_t index_ = 0;
};

inline void block_sync() {
  char* clock = &emu::state.block->barrier_clock[emu::state.block->barriers & 1];
  emu::release(clock);
  emu::barrier();
  emu::acquire(clock);
}

template <class T>
void store_relaxed(T* to, T value) {
  __atomic_store(to, &value, __ATOMIC_RELAXED);
}

inline void add_relaxed(float* to, float value) {
  float old, sum;
  __atomic_load(to, &old, __ATOMIC_RELAXED);
  do {
    sum = old + value;
  } while (!__atomic_compare_exchange(to, &old, &sum, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
}

// --- numbers -----------------------------------------------------------------------------------------------

inline uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
inline float bits_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline float exp2_fast(float x) { return exp2f(x); }
inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bits_float(uint32_t(x.bits) << 16); }
inline float to_float(f16 x) {
  _Float16 y;
  memcpy(&y, &x.bits, 2);
  return float(y);
}
inline uint32_t to_tf32(float x) {
  uint32_t bits = float_bits(x);
  return std::isfinite(x) ? (bits + 0x1000u) & 0xffffe000u : bits;
}
inline uint32_t round_bits(float x, bf16) {
  uint32_t bits = float_bits(x);
  return std::isnan(x) ? 0x7fffu : (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
}
inline uint32_t round_bits(float x, f16) {
  _Float16 y = _Float16(x);
  uint16_t bits;
  memcpy(&bits, &y, 2);
  return bits;
}
template <class T>
uint32_t pack(float low, float high, T type) {
  return round_bits(low, type) | round_bits(high, type) << 16;
}

// --- asynchronous copies: undefined from issue to wait, delivered as late as allowed -----------------------

// A store that the sanitizers see.
inline void store16(void* to, const unsigned char (&bytes)[16]) {
  uint64_t words[2];
  memcpy(words, bytes, 16);
  static_cast<volatile uint64_t*>(to)[0] = words[0];
  static_cast<volatile uint64_t*>(to)[1] = words[1];
}

inline void cp_async16(void* shared, const void* global, int bytes) {
  if ((uintptr_t(shared) | uintptr_t(global)) & 15) emu::fail("cp.async: address not aligned to 16 bytes");
  if (bytes < 0 || bytes > 16) emu::fail("cp.async: size out of range");
  if (!emu::find_shared(shared, 16)) emu::fail("cp.async: destination outside shared memory");
  unsigned char nothing[16];
  memcpy(nothing, global, size_t(bytes));  // so that the sanitizers see the source being read
  asm volatile("" ::"r"(nothing) : "memory");
  emu::poison(nothing, 16);
  store16(shared, nothing);
  emu::Unwatched quiet;
  emu::state.thread->open.push_back({shared, global, bytes});
}

EMU_UNCHECKED inline void cp_commit() {
  emu::Unwatched quiet;
  auto& t = *emu::state.thread;
  t.groups.push_back(std::move(t.open));
  t.open.clear();
}

EMU_UNCHECKED inline bool oldest_group(size_t keep, std::vector<emu::Copy>& group) {
  emu::Unwatched quiet;
  auto& groups = emu::state.thread->groups;
  if (groups.size() <= keep) return false;
  group = std::move(groups.front());
  groups.erase(groups.begin());
  return true;
}

template <int N>
void cp_wait() {
  std::vector<emu::Copy> group;
  while (oldest_group(N, group)) {
    for (auto& copy : group) {
      unsigned char bytes[16] = {};
      memcpy(bytes, copy.from, size_t(copy.bytes));
      store16(copy.to, bytes);
    }
  }
}

// --- warp-wide instructions --------------------------------------------------------------------------------

#define EMU_LINE int line = __builtin_LINE()

EMU_UNCHECKED inline float shfl_xor(float value, int mask, EMU_LINE) {
  auto& t = *emu::state.thread;
  float out;
  t.slot[0] = &out;
  t.slot[1] = &mask;
  t.word = float_bits(value);
  emu::together("shfl", line, [](emu::Warp& warp) EMU_UNCHECKED_LAMBDA {
    for (auto* lane : warp.lanes) {
      auto* other = warp.lanes[lane->lane ^ *static_cast<int*>(lane->slot[1])];
      *static_cast<float*>(lane->slot[0]) = bits_float(other->word);
    }
  });
  return out;
}

EMU_UNCHECKED inline void exchange_rows(uint32_t (&reg)[4], bool transposed, int line) {
  emu::state.thread->slot[0] = reg;
  emu::together("ldmatrix", line, [=](emu::Warp& warp) EMU_UNCHECKED_LAMBDA {
    for (int l = 0; l < 32; l++) {
      for (int i = 0; i < 4; i++) {
        auto* out = reinterpret_cast<unsigned char*>(static_cast<uint32_t*>(warp.lanes[l]->slot[0]) + i);
        for (int half = 0; half < 2; half++) {
          int row = transposed ? 2 * (l % 4) + half : l / 4;
          int column = transposed ? l / 4 : 2 * (l % 4) + half;
          memcpy(out + 2 * half, warp.lanes[8 * i + row]->row + 2 * column, 2);
        }
      }
    }
  });
}

inline void load_row(const void* row) {
  if (uintptr_t(row) & 15) emu::fail("ldmatrix: row not aligned to 16 bytes");
  if (!emu::find_shared(row, 16)) emu::fail("ldmatrix: row outside shared memory");
  uint64_t words[2] = {static_cast<const volatile uint64_t*>(row)[0],
                       static_cast<const volatile uint64_t*>(row)[1]};
  memcpy(emu::state.thread->row, words, 16);
}

inline void ldmatrix(uint32_t (&reg)[4], const void* row, EMU_LINE) {
  load_row(row);
  exchange_rows(reg, false, line);
}

inline void ldmatrix_transposed(uint32_t (&reg)[4], const void* row, EMU_LINE) {
  load_row(row);
  exchange_rows(reg, true, line);
}

// One register of an operand: two 16-bit numbers, or one number of which the tensor core reads 19 bits.
template <class T>
struct Unpack {
  static constexpr int kNumbers = 2;
  static float number(uint32_t word, int i) { return to_float(T{uint16_t(word >> (16 * i))}); }
};
template <>
struct Unpack<float> {
  static constexpr int kNumbers = 1;
  static float number(uint32_t word, int) { return bits_float(word & 0xffffe000u); }
};

template <class T>
EMU_UNCHECKED void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, int line) {
  uint32_t b[2] = {b0, b1};
  auto& t = *emu::state.thread;
  t.slot[0] = c;
  t.slot[1] = const_cast<uint32_t*>(a);
  t.slot[2] = b;
  emu::together("mma", line, [](emu::Warp& warp) EMU_UNCHECKED_LAMBDA {
    constexpr int kNumbers = Unpack<T>::kNumbers, kInner = 8 * kNumbers;
    float left[16][kInner], right[kInner][8], sum[16][8];
    for (int l = 0; l < 32; l++) {
      int g = l / 4, q = l % 4;
      auto* x = static_cast<uint32_t*>(warp.lanes[l]->slot[1]);
      auto* y = static_cast<uint32_t*>(warp.lanes[l]->slot[2]);
      for (int h = 0; h < kNumbers; h++) {
        for (int i = 0; i < 4; i++) {
          left[g + 8 * (i & 1)][kNumbers * (q + 4 * (i >> 1)) + h] = Unpack<T>::number(x[i], h);
        }
        for (int i = 0; i < 2; i++) right[kNumbers * (q + 4 * i) + h][g] = Unpack<T>::number(y[i], h);
      }
      for (int i = 0; i < 4; i++) {
        sum[g + 8 * (i >> 1)][2 * q + (i & 1)] = static_cast<float*>(warp.lanes[l]->slot[0])[i];
      }
    }
    for (int m = 0; m < 16; m++) {
      for (int k = 0; k < kInner; k++) {
        for (int n = 0; n < 8; n++) sum[m][n] += left[m][k] * right[k][n];
      }
    }
    for (int l = 0; l < 32; l++) {
      for (int i = 0; i < 4; i++) {
        static_cast<float*>(warp.lanes[l]->slot[0])[i] = sum[l / 4 + 8 * (i >> 1)][2 * (l % 4) + (i & 1)];
      }
    }
  });
}

inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, EMU_LINE) {
  mma<bf16>(c, a, b0, b1, line);
}
inline void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, EMU_LINE) {
  mma<f16>(c, a, b0, b1, line);
}
inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, EMU_LINE) {
  mma<float>(c, a, b0, b1, line);
}

template <class Args>
void launch(void (*kernel)(Args), int64_t blocks, int threads, size_t shared, void*, const Args& args) {
  emu::launch(blocks, threads, shared, [&] { kernel(args); });
}

}  // namespace nck
