// The hardware primitives of the kernels: barriers, asynchronous copies, tensor-core products,
// shuffles, conversions. Everything that is not plain C++ is in this file, so that a second implementation of
// it (tests/cuda_host/primitives_host.h, included if the compiler is not nvcc) runs the kernels on a CPU.
#pragma once

#include <cstddef>
#include <cstdint>

namespace nck {

struct bf16 {
  uint16_t bits;
};

struct f16 {
  uint16_t bits;
};

struct alignas(16) Vec16 {
  uint32_t word[4];
};

// Mistakes that the tests enable in the host build, to show that each is caught. On a device `planted` is
// constant false, so the compiled kernels contain none of them.
enum class Fault { kNone, kMissingBarrier, kMissingWait, kWrongFragment, kMissingTailMask };

}  // namespace nck

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#define NCK_DEVICE __device__ __forceinline__
// THREADS per block, BLOCKS per multiprocessor: the compiler derives the register limit from them.
#define NCK_KERNEL(THREADS, BLOCKS) __global__ void __launch_bounds__(THREADS, BLOCKS)

namespace nck {

NCK_DEVICE constexpr bool planted(Fault) { return false; }

// Allocates the block's dynamic shared memory in order. Every thread must allocate the same arrays.
class SharedArena {
 public:
  template <class T>
  NCK_DEVICE T* take(int count) {
    extern __shared__ __align__(1024) unsigned char nck_shared[];
    T* array = reinterpret_cast<T*>(nck_shared + offset_);
    offset_ += (count * unsigned(sizeof(T)) + 127u) & ~127u;
    return array;
  }

 private:
  unsigned offset_ = 0;
};

NCK_DEVICE void block_sync() { __syncthreads(); }

NCK_DEVICE float shfl_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

NCK_DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// Starts a copy of 16 bytes to shared memory; only the first `bytes` are read, the rest become zero.
NCK_DEVICE void cp_async16(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(bytes)
               : "memory");
}

// Copies issued since the last commit form a group; cp_wait<N> waits for all groups but the youngest N.
NCK_DEVICE void cp_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int N>
NCK_DEVICE void cp_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Loads four matrices of 8 rows of 16 bytes; lane 8 i + r passes the address of row r of matrix i. Lane l
// gets in reg[i] the 4 bytes at column l % 4 of row l / 4.
NCK_DEVICE void ldmatrix(uint32_t (&reg)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(reg[0]), "=r"(reg[1]), "=r"(reg[2]), "=r"(reg[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same with each matrix of 8 x 8 16-bit numbers transposed.
NCK_DEVICE void ldmatrix_transposed(uint32_t (&reg)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(reg[0]), "=r"(reg[1]), "=r"(reg[2]), "=r"(reg[3])
               : "r"(shared_address(row))
               : "memory");
}

// c += a b for a 16 x 16 (tf32: 16 x 8) a and a 16 x 8 (8 x 8) b. With g = lane / 4 and t = lane % 4, in
// units of 4 bytes along the inner dimension: a[0..3] = (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4);
// b = (t, g), (t + 4, g); and c[0..3] = (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
#define NCK_MMA(NAME, SHAPE_AND_TYPES)                                                    \
  NCK_DEVICE void NAME(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { \
    asm volatile("mma.sync.aligned." SHAPE_AND_TYPES                                      \
                 " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"       \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));         \
  }
NCK_MMA(mma_bf16, "m16n8k16.row.col.f32.bf16.bf16.f32")
NCK_MMA(mma_f16, "m16n8k16.row.col.f32.f16.f16.f32")
NCK_MMA(mma_tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef NCK_MMA

// For several threads that write the same value to one place, in any order.
NCK_DEVICE void store_relaxed(float* to, float value) {
  asm volatile("st.relaxed.gpu.global.f32 [%0], %1;" ::"l"(to), "f"(value) : "memory");
}
NCK_DEVICE void store_relaxed(int64_t* to, int64_t value) {
  asm volatile("st.relaxed.gpu.global.s64 [%0], %1;" ::"l"(to), "l"(value) : "memory");
}

NCK_DEVICE void add_relaxed(float* to, float value) {
  asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(to), "f"(value) : "memory");
}

NCK_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

NCK_DEVICE uint32_t float_bits(float x) { return __float_as_uint(x); }
NCK_DEVICE float bits_float(uint32_t x) { return __uint_as_float(x); }

// Rounds to tf32's 10 bits of mantissa; the tensor cores would truncate.
NCK_DEVICE uint32_t to_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

NCK_DEVICE float to_float(float x) { return x; }
NCK_DEVICE float to_float(bf16 x) { return bits_float(uint32_t(x.bits) << 16); }
NCK_DEVICE float to_float(f16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

// Two numbers rounded to 16 bits in one register, `low` in the lower half.
NCK_DEVICE uint32_t pack(float low, float high, bf16) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
NCK_DEVICE uint32_t pack(float low, float high, f16) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

// Launches a kernel. Setting the shared-memory limit is not a stream operation, so graphs can be captured.
template <class Args>
void launch(void (*kernel)(Args), int64_t blocks, int threads, size_t shared, void* stream,
            const Args& args) {
  if (blocks == 0) return;
  cudaError_t error = cudaSuccess;
  if (shared > (48u << 10)) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
  }
  if (error == cudaSuccess) {
    kernel<<<unsigned(blocks), unsigned(threads), shared, cudaStream_t(stream)>>>(args);
    error = cudaGetLastError();
  }
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("nckernels: a CUDA kernel launch failed: ") +
                             cudaGetErrorString(error));
  }
}

}  // namespace nck

#else

#include "primitives_host.h"

#endif
