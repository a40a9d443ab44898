// The matrix products of one tile, all three from one micro-kernel and without repacking the tile.
//
// A tile of m rows and n columns is stored in panels of NR columns: [n / NR][m][NR]. In this layout it is
//   written by   t  = U V^T      (U packed in blocks of MR rows, V in panels of classes),
//   read by rows in    dU = A V  (V in panels of features), and
//   read by columns in dV = A^T U (U in panels of features).
#pragma once

#include "simd.hpp"

namespace nckernels {
namespace NCK_ISA {

// Rows of the accumulator that fit the registers: MR x 2 vectors, two of B and a broadcast.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int MR = 12;
#else
constexpr int MR = 6;
#endif

// C[R x NV vectors] (+)= sum over blocks p < count and k < depth of
//     A[p * a_block + r * RS + k * CS] * B[(p * depth + k) * NR + .]
template <class T, int R, int NV, int RS, int CS, bool ACCUMULATE>
NCK_INLINE void micro(long count, long depth, const T* a, long a_block, const T* b, T* c, long c_stride) {
    constexpr int W = lanes<T>;
    Vec<T> acc[R][NV];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
        for (int v = 0; v < NV; v++) acc[r][v] = ACCUMULATE ? load(c + r * c_stride + v * W) : Vec<T>{};
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
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
        for (int v = 0; v < NV; v++) store(c + r * c_stride + v * W, acc[r][v]);
}

template <class T, int NV>
struct Gemm {
    static constexpr int W = lanes<T>;
    static constexpr int NR = NV * W;
    static constexpr int PR = NR < 8 ? NR : 8;  // rows of dV at a time; divides NR

    // t[panels][m][NR] = U V^T; m a multiple of MR. u: [m / MR][d][MR], v: [panels][d][NR].
    static void logits(long m, long panels, long d, const T* u, const T* v, T* t) {
        constexpr long depth = 512;  // of a B block that stays in the L2 cache
        for (long p = 0; p < panels; p++)
            for (long k = 0; k < d; k += depth) {
                const long n = d - k < depth ? d - k : depth;
                const T* b = v + (p * d + k) * NR;
                T* c = t + p * m * NR;
                for (long i = 0; i < m; i += MR) {
                    const T* a = u + i * d + k * MR;
                    if (k == 0)
                        micro<T, MR, NV, 1, MR, false>(1, n, a, 0, b, c + i * NR, NR);
                    else
                        micro<T, MR, NV, 1, MR, true>(1, n, a, 0, b, c + i * NR, NR);
                }
            }
    }

    // out[m][d_panels * NR] = A V. a: [panels][m][NR], v: [d_panels][panels * NR][NR].
    static void times_prototypes(long m, long panels, long d_panels, const T* a, const T* v, T* out) {
        constexpr long block = 256 / NR;  // panels whose part of V stays in the L1 cache
        for (long n = 0; n < d_panels; n++)
            for (long p = 0; p < panels; p += block) {
                const long count = panels - p < block ? panels - p : block;
                const T* b = v + (n * panels + p) * NR * NR;
                for (long i = 0; i < m; i += MR) {
                    const T* x = a + p * m * NR + i * NR;
                    T* c = out + i * d_panels * NR + n * NR;
                    if (p == 0)
                        micro<T, MR, NV, NR, 1, false>(count, NR, x, m * NR, b, c, d_panels * NR);
                    else
                        micro<T, MR, NV, NR, 1, true>(count, NR, x, m * NR, b, c, d_panels * NR);
                }
            }
    }

    // Panel `n` of the features, classes [first, last): out[c][NR] += A^T U. u: one panel, [m][NR].
    static void times_features(long m, long first, long last, const T* a, const T* u, T* out) {
        for (long c = first; c < last; c += PR)
            micro<T, PR, NV, 1, NR, true>(1, m, a + (c / NR) * m * NR + c % NR, 0, u, out + c * NR, NR);
    }
};

}  // namespace NCK_ISA
}  // namespace nckernels
