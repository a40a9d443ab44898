// The primitives of compute capability 9.0: barriers in shared memory that count bytes, copies of
// whole boxes of a matrix (TMA), and products of four warps at once (wgmma).
//
// Boxes are 128 bytes wide: 64 numbers of 16 bits. In shared memory a row of a box takes 128 bytes, and the
// 16-byte piece i of row r is stored at position i ^ (r % 8), the "128-byte swizzle" of both units.
// Boxes start at multiples of 1024 bytes.
#pragma once

#include "args.h"
#include "primitives.h"

#if defined(__CUDACC__)

#include <cuda.h>

// The same source is compiled for other devices, where the kernels that use these primitives are empty.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDA_ARCH__)
#define NCK_HOPPER 1
#endif

namespace nck {

using TensorMap = CUtensorMap;

// Describes a matrix to the copy unit, which fetches boxes of `box_rows` rows with zeros outside of the
// matrix. The address and the row stride must be multiples of 16 bytes.
inline TensorMap tensor_map(const void* x, Kind kind, int rows, int d, int64_t stride, int box_rows) {
  // The driver's function is looked up at run time, so that the library loads on machines without a driver.
  static auto* const encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                         cudaEnableDefault, &found);
    if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) {
      throw std::runtime_error("nckernels: the CUDA driver has no cuTensorMapEncodeTiled");
    }
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  TensorMap map;
  auto type = kind == Kind::kBf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  cuuint64_t size[2] = {cuuint64_t(d), cuuint64_t(rows)}, row_bytes[1] = {cuuint64_t(stride) * 2};
  cuuint32_t box[2] = {64, cuuint32_t(box_rows)}, step[2] = {1, 1};
  CUresult result = encode(&map, type, 2, const_cast<void*>(x), size, row_bytes, box, step,
                           CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                           CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) throw std::runtime_error("nckernels: the driver refuses a tensor map");
  return map;
}

// A barrier whose phase completes when `count` threads have arrived and all expected bytes have been copied.
struct alignas(8) Mbarrier {
  uint64_t state;
};

NCK_DEVICE void mbarrier_init(Mbarrier* b, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(count) : "memory");
}

// Makes the barriers visible to the copy unit; called after the last mbarrier_init and before a block_sync.
NCK_DEVICE void mbarrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

NCK_DEVICE void mbarrier_arrive(Mbarrier* b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(b)) : "memory");
}

// Arrives, and adds bytes that the phase waits for.
NCK_DEVICE void mbarrier_expect(Mbarrier* b, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes)
               : "memory");
}

// Waits until the phase of this parity is complete. Parities alternate, from 0 on; the phase before the
// first, of parity 1, counts as complete.
NCK_DEVICE void mbarrier_wait(Mbarrier* b, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(shared_address(b)),
      "r"(parity)
      : "memory");
}

// Starts the copy of the box at (row, column); `b` counts its bytes.
NCK_DEVICE void copy_box(void* shared, const TensorMap* map, int column, int row, Mbarrier* b) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(b)), "r"(column), "r"(row)
      : "memory");
}

// A barrier for the first `threads` threads of a block.
NCK_DEVICE void first_threads_sync(int threads) { asm volatile("bar.sync 1, %0;" ::"r"(threads) : "memory"); }

// The wgmma descriptor of the rows of a box: the address in units of 16 bytes, a stride of 1024 bytes between
// groups of eight rows, the 128-byte swizzle.
using BoxOperand = uint64_t;
NCK_DEVICE BoxOperand box_operand(const void* rows) {
  return uint64_t((shared_address(rows) & 0x3ffffu) >> 4) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 |
         uint64_t(1) << 62;
}

// Called before the first product of a group: orders accesses to the accumulators.
NCK_DEVICE void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Products issued since the last commit form a group; wgmma_wait<N> waits for all groups but the youngest N.
NCK_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int N>
NCK_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Waits for all groups; `c` may be read afterwards.
template <int N>
NCK_DEVICE void wgmma_wait(float (&c)[64]) {
  static_assert(N == 0, "accumulators cannot be read while products are in flight");
  wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < 64; i++) asm volatile("" : "+f"(c[i])::"memory");
}

// c += a b' for the 64 rows of a and the 128 rows of b, over 16 columns. Warp w of the four holds the rows
// 16 w + (0 .. 15): c[4 j + 2 h + e] is row 8 h + lane / 4 of them, column 8 j + 2 (lane % 4) + e.
#define NCK_C8(I)                                                                             \
  "+f"(c[I]), "+f"(c[I + 1]), "+f"(c[I + 2]), "+f"(c[I + 3]), "+f"(c[I + 4]), "+f"(c[I + 5]), \
      "+f"(c[I + 6]), "+f"(c[I + 7])
#define NCK_WGMMA(TYPE, NAME)                                                                             \
  NCK_DEVICE void wgmma(float (&c)[64], BoxOperand a, BoxOperand b, TYPE) {                               \
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." NAME                                      \
                 " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18," \
                 " %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35,"  \
                 " %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52,"  \
                 " %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, 1, 1, 1, 0, 0;"      \
                 : NCK_C8(0), NCK_C8(8), NCK_C8(16), NCK_C8(24), NCK_C8(32), NCK_C8(40), NCK_C8(48),      \
                   NCK_C8(56)                                                                             \
                 : "l"(a), "l"(b));                                                                       \
  }
NCK_WGMMA(bf16, "bf16.bf16")
NCK_WGMMA(f16, "f16.f16")
#undef NCK_WGMMA
#undef NCK_C8

}  // namespace nck

#else

#define NCK_HOPPER 1
#include "hopper_host.h"

#endif
