// Rates of several engines for the product of one tile, t = U V^T, single-threaded. See tile_gemm.py.
#include <ATen/ATen.h>
#include <ATen/native/CPUBlas.h>

#include <chrono>
#include <cstdlib>
#include <vector>

#include "amx.hpp"
#include "gemm_bfloat16.hpp"

extern "C" void sgemm_(const char*, const char*, const int*, const int*, const int*, const float*,
                       const float*, const int*, const float*, const int*, const float*, float*, const int*);

using nckernels::Gemm;
using nckernels::MR;

template <class F>
static double seconds(F&& run) {
  using clock = std::chrono::steady_clock;
  run();
  double best = 1e30;
  for (int i = 0; i < 15; i++) {
    const auto start = clock::now();
    run();
    best = std::min(best, std::chrono::duration<double>(clock::now() - start).count());
  }
  return best;
}

// GFLOP/s of our micro-kernel with packed operands (0), of the same including the packing of the row tile, as
// in the kernels (1), of oneDNN's brgemm as exported by ATen (2), and of torch's BLAS (3).
extern "C" __attribute__((visibility("default"))) double tile_gemm_rate(int engine, int64_t m, int64_t n,
                                                                        int64_t d) {
  using G = Gemm<float, 2>;
  constexpr int64_t NR = G::NR;
  const int64_t panels = (n + NR - 1) / NR, padded = panels * NR;
  std::vector<float> u(m * d, 0.5f), packed(m * d, 0.5f), v(padded * d, 0.25f), t(m * padded);
  auto ours = [&] {
    G::logits(m, m, 0, panels, panels, d, packed.data(), v.data(), nullptr, nullptr, t.data());
  };
  auto pack = [&] {
    for (int64_t i = 0; i < m; i += MR)
      for (int64_t x = 0; x < d; x++)
        for (int64_t r = 0; r < MR; r++) packed[i * d + x * MR + r] = u[(i + r) * d + x];
  };
  auto brgemm = [&] {
    // V as (d, n), in blocks of 64 columns, which is fastest with oneDNN.
    for (int64_t c = 0; c < n; c += 64)
      at::native::cpublas::brgemm(m, std::min<int64_t>(64, n - c), d, d, n, n, false, u.data(), v.data() + c,
                                  t.data() + c);
  };
  auto blas = [&] {
    const int rows = m, columns = n, inner = d;  // Fortran's order: the transpose of everything
    const float one = 1.0f, zero = 0.0f;
    sgemm_("T", "N", &columns, &rows, &inner, &one, v.data(), &inner, u.data(), &inner, &zero, t.data(),
           &columns);
  };
  double time = 0;
  if (engine == 0) time = seconds(ours);
  if (engine == 1) time = seconds([&] { pack(), ours(); });
  if (engine == 2) time = seconds(brgemm);
  if (engine == 3) time = seconds(blas);
  return 2e-9 * double(m) * double(n) * double(d) / time;
}

// The same for bfloat16: our engine (0, 1), brgemm with packed pairs (2), and torch's product, whose result
// is bfloat16 (3). Returns 0 without the instructions, because models of them are not timed.
extern "C" __attribute__((visibility("default"))) double tile_gemm_rate_bfloat16(int engine, int64_t m,
                                                                                 int64_t n, int64_t d) {
#if defined(NCK_BFLOAT16)
#if defined(NCK_AMX)
  using G = nckernels::GemmBfloat16<2, nckernels::AmxPairs>;
#else
  using G = nckernels::GemmBfloat16<2, nckernels::VectorPairs>;
#endif
  constexpr int64_t NR = G::NR;
  const int64_t panels = (n + NR - 1) / NR, padded = panels * NR;
  std::vector<uint16_t> u(m * d, 0x3f00), packed(m * d, 0x3f00), v(padded * d, 0x3e80);
  std::vector<float> t(m * padded), ones(padded, 1.0f);
  auto ours = [&] {
    for (int64_t p = 0; p < panels; p += G::BLOCK)  // as the passes call it
      G::logits(m, m, p, std::min<int64_t>(panels, p + G::BLOCK), panels, d, packed.data(), v.data(),
                ones.data(), ones.data(), t.data() + p * m * NR);
  };
  auto pack = [&] {
    const uint16_t* rows[G::GROUP];
    float scale[G::GROUP];
    std::fill(scale, scale + G::GROUP, 1.0f);
    for (int64_t i = 0; i < m; i += G::GROUP)
      for (int64_t k = 0; k < d; k += G::DEPTH) {
        const int64_t depth = std::min<int64_t>(G::DEPTH, d - k);
        for (int64_t r = 0; r < G::GROUP; r++) rows[r] = u.data() + (i + r) * d + k;
        G::pack_rows(rows, scale, G::GROUP, depth, packed.data() + k * m + i * G::inner(depth));
      }
  };
  const auto* a = reinterpret_cast<const at::BFloat16*>(u.data());
  const auto* b = reinterpret_cast<const at::BFloat16*>(v.data());
  auto brgemm = [&] {
    for (int64_t c = 0; c < n; c += 64)  // pairs of rows, blocks of 64 columns
      at::native::cpublas::brgemm(m, std::min<int64_t>(64, n - c), d, d, 64, n, false, a, b + c * d,
                                  t.data() + c);
  };
  const auto x = at::from_blob(u.data(), {m, d}, at::kBFloat16),
             y = at::from_blob(v.data(), {n, d}, at::kBFloat16);
  auto torch = [&] { at::mm(x, y.t()); };
  double time = 0;
  if (engine == 0) time = seconds(ours);
  if (engine == 1) time = seconds([&] { pack(), ours(); });
  if (engine == 2) time = seconds(brgemm);
  if (engine == 3) time = seconds(torch);
  return 2e-9 * double(m) * double(n) * double(d) / time;
#else
  return 0.0 * double(engine * m * n * d);
#endif
}
