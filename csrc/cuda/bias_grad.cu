// The gradient of the biases: part[s, p] = sum over q of g_q exp(t_pq + bias_p - lse_q).
//
// A separate kernel, with the loop of the forward pass, because few callers learn a bias and the gradient
// kernels have no registers left.

#include "tile_loop.h"

namespace nck {
namespace {

template <class Tag>
struct BiasColumns {
  float rnorm[kTile], lse[kTile], grad[kTile];
  Tag tag[kTile];
};

template <Kind K, class Tag>
NCK_KERNEL(kThreads, 1)
bias_grad_kernel(const __grid_constant__ BiasGradArgs a) {
  SharedArena arena;
  auto* stages = arena.take<unsigned char>(kLoopBytes);
  auto* columns = arena.take<BiasColumns<Tag>>(2);
  auto* sums = arena.take<float>(2 * kTile);
  const Lane me;
  const int part = int(blockIdx.x) % a.split, p_first = int(blockIdx.x) / a.split * kTile;
  const int p_used = used_slots(a.p), q_used = used_slots(a.q);

  float scale[4], bias[4], total[4] = {};
  Tag tag[4];
#pragma unroll
  for (int r = 0; r < 4; r++) {
    Slot s = slot_at(a.p, p_first + me.row(r / 2, r % 2), p_used);
    scale[r] = rnorm_of(a.p, s) * (*a.beta * kLog2e);
    bias[r] = summand_bias(a.p, s);
    tag[r] = mask_tag<Tag>(a.p, s, a.exclude);
  }
  auto prologue = [&](int tile) {
    if (threadIdx.x >= kTile) return;
    int c = int(threadIdx.x);
    BiasColumns<Tag>& column = columns[tile / a.split & 1];
    Slot s = slot_at(a.q, tile * kTile + c, q_used);
    Upstream up = upstream_of(a.q, s);
    column.rnorm[c] = rnorm_of(a.q, s);
    column.lse[c] = up.lse;
    column.grad[c] = up.grad;
    column.tag[c] = mask_tag<Tag>(a.q, s, a.exclude);
  };
  auto epilogue = [&](int tile, float (&acc)[2][8][4]) {
    const BiasColumns<Tag>& column = columns[tile / a.split & 1];
#pragma unroll
    for (int j = 0; j < 8; j++) {
#pragma unroll
      for (int e = 0; e < 2; e++) {
        int c = me.column(j, e);
#pragma unroll
        for (int r = 0; r < 4; r++) {
          float t = fmaf(acc[r / 2][j][2 * (r % 2) + e] * scale[r], column.rnorm[c], bias[r]);
          if (tag[r] != column.tag[c])
            total[r] = fmaf(column.grad[c], exp2_fast(t - column.lse[c]), total[r]);
        }
      }
    }
  };
  tile_loop<K>(a.p, p_first, p_used, a.q, 0, q_used, part, a.split, a.d, stages, me, prologue, epilogue);

#pragma unroll
  for (int r = 0; r < 4; r++) {
    total[r] += shfl_xor(total[r], 1);
    total[r] += shfl_xor(total[r], 2);
    if (me.t == 0) sums[(me.warp >> 2) * kTile + me.row(r / 2, r % 2)] = total[r];
  }
  block_sync();
  int slot = p_first + int(threadIdx.x);
  if (threadIdx.x >= kTile || slot >= a.p.slots) return;
  // Selected, not multiplied by 0: NaN in Q reaches the sums of left-out rows.
  bool summed = slot_at(a.p, slot, p_used).summed;
  a.part[int64_t(part) * a.p.slots + slot] = summed ? sums[threadIdx.x] + sums[kTile + threadIdx.x] : 0.0f;
}

}  // namespace

void bias_grad(const BiasGradArgs& args, Stream stream) {
  with_kind(args.kind, [&](auto kind) {
    with_tag(args.exclude, [&](auto tag) {
      using Tag = decltype(tag);
      size_t shared = kLoopBytes + 2 * sizeof(BiasColumns<Tag>) + 2 * kTile * sizeof(float);
      int64_t blocks = int64_t(tiles_of(args.p.slots)) * args.split;
      launch(bias_grad_kernel<kind.value, Tag>, blocks, kThreads, shared, stream, args);
    });
  });
}

}  // namespace nck
