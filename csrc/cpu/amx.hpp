// Pairs of bfloat16 numbers multiplied by the tiles of AMX: registers of 16 rows of 64 bytes.
//
// Where the compiler has no AMX, a model of the three instructions takes their place, so that packing and the
// order of tiles can be tested on any CPU (NCK_AMX).
#pragma once

#include "pairs.hpp"

namespace nckernels {
namespace amx {
// The operand of ldtilecfg: palette 1, and for each of eight registers the bytes of a row and the rows.
struct alignas(64) Configuration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(Configuration) == 64);

#if defined(__AMX_BF16__)

// Configures the registers of this thread for the duration of one product: other libraries configure them
// too.
struct Session {
  Session() {
    static constexpr Configuration configuration;
    asm volatile("ldtilecfg %0" ::"m"(configuration));
  }
  ~Session() { asm volatile("tilerelease"); }
};

// GCC's intrinsics need register numbers as literals, which template parameters are not.
template <int REGISTER>
NCK_INLINE void zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(REGISTER));
}
template <int REGISTER>
NCK_INLINE void load(const void* p, long stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(REGISTER) : "memory");
}
template <int REGISTER>
NCK_INLINE void store(void* p, long stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(REGISTER) : "memory");
}
template <int C, int A, int B>
NCK_INLINE void multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#else

struct Session {};

union Register {
  uint16_t pairs[16][32];
  float sums[16][16];
};
inline thread_local Register registers[8];

template <int REGISTER>
void zero() {
  std::memset(&registers[REGISTER], 0, sizeof(Register));
}
template <int REGISTER>
void load(const void* p, long stride) {
  for (int r = 0; r < 16; r++)
    std::memcpy(registers[REGISTER].pairs[r], static_cast<const char*>(p) + r * stride, 64);
}
template <int REGISTER>
void store(void* p, long stride) {
  for (int r = 0; r < 16; r++)
    std::memcpy(static_cast<char*>(p) + r * stride, registers[REGISTER].pairs[r], 64);
}
// Row k of B has pairs of 16 columns: C[r][x] += A[r][2k] B[k][2x] + A[r][2k + 1] B[k][2x + 1].
template <int C, int A, int B>
void multiply() {
  for (int r = 0; r < 16; r++)
    for (int k = 0; k < 16; k++)
      for (int x = 0; x < 16; x++)
        for (int i = 0; i < 2; i++)
          registers[C].sums[r][x] += from_bfloat16(registers[A].pairs[r][2 * k + i]) *
                                     from_bfloat16(registers[B].pairs[k][2 * x + i]);
}

#endif
}  // namespace amx

// The unit of GemmBfloat16: two by two tiles of C, in registers 0 to 3; two of A in 4 and 5, two of B in 6
// and 7.
struct AmxPairs {
  static constexpr int MR = 32, PR = 32, INNER = 32, FEW = 16;
  using Session = amx::Session;

  // As VectorPairs::multiply, for a depth that is a multiple of 16 pairs.
  template <int R, int NV, bool ACCUMULATE>
  static void multiply(long count, long depth, const uint16_t* a, long a_stride, long a_block,
                       const uint16_t* b, float* c, long c_stride, const Factors& factors = {}) {
    static_assert(R == 32 && NV == 2 && lanes<float> == 16);
    constexpr long TILE = 32, NR = 32;  // numbers in a row of a tile of A, columns of C
    const long c_row = c_stride * sizeof(float), a_row = a_stride * sizeof *a, b_row = NR * sizeof(uint32_t);
    float* const lower_half = c + 16 * c_stride;
    if (ACCUMULATE) {
      amx::load<0>(c, c_row);
      amx::load<1>(c + 16, c_row);
      amx::load<2>(lower_half, c_row);
      amx::load<3>(lower_half + 16, c_row);
    } else {
      amx::zero<0>();
      amx::zero<1>();
      amx::zero<2>();
      amx::zero<3>();
    }
    for (long p = 0; p < count; p++, a += a_block)
      for (long k = 0; k < depth; k += 16, b += 16 * NR * 2) {
        const uint16_t* x = a + k / 16 * TILE;
        amx::load<4>(x, a_row);
        amx::load<5>(x + 16 * a_stride, a_row);
        amx::load<6>(b, b_row);
        amx::load<7>(b + TILE, b_row);
        amx::multiply<0, 4, 6>();
        amx::multiply<1, 4, 7>();
        amx::multiply<2, 5, 6>();
        amx::multiply<3, 5, 7>();
      }
    amx::store<0>(c, c_row);
    amx::store<1>(c + 16, c_row);
    amx::store<2>(lower_half, c_row);
    amx::store<3>(lower_half + 16, c_row);
    if (!factors.of_rows) return;
    const Vec<float> left = nckernels::load(factors.of_columns),
                     right = nckernels::load(factors.of_columns + 16);
    for (int r = 0; r < R; r++, c += c_stride) {
      nckernels::store(c, nckernels::load(c) * (left * factors.of_rows[r]));
      nckernels::store(c + 16, nckernels::load(c + 16) * (right * factors.of_rows[r]));
    }
  }
};

}  // namespace nckernels
