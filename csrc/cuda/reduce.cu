// The samples' losses as one number, by one thread block, and the factor of the backward pass. Sums are taken
// in a fixed order.

#include "vectors.h"

namespace nck {
namespace {

constexpr int kLossThreads = 1024;
constexpr int kThreads = 256;
constexpr int kPerThread = 8;

// log-sum-exps of empty sets count as 0.
NCK_DEVICE float lse_or_zero(float lse) { return lse == -infinity() ? 0.0f : lse; }

NCK_KERNEL(kLossThreads, 1) loss_kernel(const __grid_constant__ LossArgs a) {
  SharedArena arena;
  float* scratch = arena.take<float>(kLossThreads / 32);
  float sum = 0.0f;
#pragma unroll 2
  for (int i = int(threadIdx.x); i < a.m; i += kLossThreads) {
    int64_t target = a.target[i];
    if (target == a.skip || target < 0 || target >= a.k) continue;
    float lse = lse_or_zero(a.class_lse ? a.class_lse[target] : a.instance_lse[i]);
    if (a.class_lse && a.instance_lse) lse = 0.5f * (lse + lse_or_zero(a.instance_lse[i]));
    sum = fmaf(a.share[i], lse - a.pos[i], sum);
  }
  sum = block_sum<kLossThreads>(sum, scratch);
  if (threadIdx.x == 0) *a.loss = a.divisor ? sum / a.divisor[1] : sum;
}

template <class From, class To>
NCK_KERNEL(kThreads, 4)
scale_kernel(const __grid_constant__ ScaleArgs a) {
  const float factor = *a.factor;
  if (a.x == a.out && factor == 1.0f) return;  // as in loss.backward()
  const int64_t first = (int64_t(blockIdx.x) * kThreads + int64_t(threadIdx.x)) * kPerThread;
  if (first >= a.size) return;
  const int count = a.size - first < kPerThread ? int(a.size - first) : kPerThread;
  float x[kPerThread];
  load8(x, static_cast<const From*>(a.x) + first, 0, count, rows_aligned<From>(a.x, 0));
#pragma unroll
  for (int i = 0; i < kPerThread; i++) x[i] *= factor;
  store8(static_cast<To*>(a.out) + first, 0, count, rows_aligned<To>(a.out, 0), x);
}

}  // namespace

void write_loss(const LossArgs& args, Stream stream) {
  launch(loss_kernel, 1, kLossThreads, kLossThreads / 32 * sizeof(float), stream, args);
}

void scale(const ScaleArgs& args, Stream stream) {
  const int64_t per_block = kThreads * kPerThread;
  with_row_type(args.from, [&](auto from) {
    with_row_type(args.to, [&](auto to) {
      auto* kernel = scale_kernel<decltype(from), decltype(to)>;
      launch(kernel, (args.size + per_block - 1) / per_block, kThreads, 0, stream, args);
    });
  });
}

}  // namespace nck
