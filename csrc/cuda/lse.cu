// The forward pass: log-sum-exps of similarity tiles that are never stored.
//
// A matrix product whose epilogue maintains, for each anchor, the largest logit so far and the sum of
// exponentials relative to it. Sums are added in a fixed order, without atomics, so the same inputs always
// give the same bits.
//
// Logits are in base 2 inside the kernels (t log2 e), because the hardware computes exp2.

#include "pairs.h"
#include "tile_loop.h"

namespace nck {
namespace {

template <class Tag>
using TileColumns = Columns<Tag, kTile>;

constexpr int kPairBytes = 4 * kTile * int(sizeof(Pair));

template <class Tag>
constexpr size_t lse_shared() {
  return kLoopBytes + 2 * sizeof(TileColumns<Tag>) + kPairBytes;
}
static_assert(lse_shared<int64_t>() <= 99 << 10, "shared memory of the smallest devices");

// Thread block b has anchor tile b / split and the Q tiles b % split, + split, + 2 split, ...: thread blocks
// that run at the same time read neighbouring tiles of both operands, which stay in the L2 cache.
template <Kind K, class Tag, bool kBoth>
NCK_KERNEL(kThreads, kHalf<K> && !kBoth ? 2 : 1)
lse_kernel(const __grid_constant__ LseArgs a) {
  SharedArena arena;
  auto* stages = arena.take<unsigned char>(kLoopBytes);
  auto* columns = arena.take<TileColumns<Tag>>(2);
  auto* pairs = arena.take<Pair>(4 * kTile);
  const Lane me;
  const int tile_p = int(blockIdx.x) / a.split, part = int(blockIdx.x) % a.split;
  const int p_first = (a.first_tile + tile_p) * kTile;
  const int p_used = used_slots(a.p), q_used = used_slots(a.q);
  if (p_first >= p_used) return;  // with compacted classes, only the device knows p_used

  float scale[4], p_bias[4];
  Tag tag[4];
  Pair sum[4];
#pragma unroll
  for (int r = 0; r < 4; r++) {
    Slot s = slot_at(a.p, p_first + me.row(r / 2, r % 2), p_used);
    scale[r] = rnorm_of(a.p, s) * betas_of(a.p, *a.beta).p;
    tag[r] = mask_tag<Tag>(a.p, s, a.exclude);
    if constexpr (kBoth) p_bias[r] = summand_bias(a.p, s);
    sum[r] = empty_pair();
  }

  auto prologue = [&](int tile) {
    if (threadIdx.x >= kTile) return;
    int c = int(threadIdx.x);
    columns[tile / a.split & 1].set(c, a.q, slot_at(a.q, tile * kTile + c, q_used), betas_of(a.p, *a.beta).q,
                                    a.exclude);
  };

  auto epilogue = [&](int tile, float (&acc)[2][8][4]) {
    const TileColumns<Tag>& column = columns[tile / a.split & 1];
    // Turn products into logits in place; the bias is added later if both directions have one.
#pragma unroll
    for (int j = 0; j < 8; j++) {
#pragma unroll
      for (int e = 0; e < 2; e++) {
        int c = me.column(j, e);
        float q_scale = column.scale[c], bias = column.bias[c];
        Tag other = column.tag[c];
#pragma unroll
        for (int r = 0; r < 4; r++) {
          float& x = acc[r / 2][j][2 * (r % 2) + e];
          float both = scale[r] * q_scale, t = kBoth ? x * both : fmaf(x, both, bias);
          x = tag[r] == other ? -infinity() : t;
        }
      }
    }
    // Every lane has sums over its own columns; lanes are combined once, at the end.
#pragma unroll
    for (int r = 0; r < 4; r++) {
      float largest = sum[r].largest;
#pragma unroll
      for (int j = 0; j < 8; j++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
          float t = acc[r / 2][j][2 * (r % 2) + e];
          largest = fmaxf(largest, kBoth ? t + column.bias[me.column(j, e)] : t);
        }
      }
      float shift = shift_of(largest), total = 0.0f;
#pragma unroll
      for (int j = 0; j < 8; j++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
          float t = acc[r / 2][j][2 * (r % 2) + e];
          total += exp2_fast((kBoth ? t + column.bias[me.column(j, e)] : t) - shift);
        }
      }
      sum[r] = {largest, fmaf(sum[r].total, exp2_fast(sum[r].largest - shift), total)};
    }
    if constexpr (kBoth) {
#pragma unroll
      for (int j = 0; j < 8; j++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
          Pair over = empty_pair();
#pragma unroll
          for (int r = 0; r < 4; r++) {
            over.largest = fmaxf(over.largest, acc[r / 2][j][2 * (r % 2) + e] + p_bias[r]);
          }
          float shift = shift_of(over.largest);
#pragma unroll
          for (int r = 0; r < 4; r++) {
            over.total += exp2_fast(acc[r / 2][j][2 * (r % 2) + e] + p_bias[r] - shift);
          }
#pragma unroll
          for (int mask = 4; mask < 32; mask *= 2) over = join_lanes(over, mask);
          if (me.g == 0) pairs[(me.warp & 3) * kTile + me.column(j, e)] = over;
        }
      }
      block_sync();
      int slot = tile * kTile + int(threadIdx.x);
      if (threadIdx.x < kTile && slot < a.q.slots) {
        Pair over = pairs[threadIdx.x];
        for (int w = 1; w < 4; w++) over = join(over, pairs[w * kTile + threadIdx.x]);
        // Left-out rows of Q have products of zero with the anchors, and their sums are discarded.
        bool counts = column.bias[threadIdx.x] > -infinity() || slot_at(a.q, slot, q_used).summed;
        int64_t at = int64_t(1 + tile_p) * a.q.slots + slot;
        a.q_max[at] = counts ? over.largest : -infinity();
        a.q_sum[at] = counts ? over.total : 0.0f;
      }
      // No barrier is needed: the main loop of the next tile has one before `pairs` is written again.
    }
  };

  tile_loop<K>(a.p, p_first, p_used, a.q, 0, q_used, part, a.split, a.d, stages, me, prologue, epilogue);

  block_sync();  // wait for the last tile's readers of `pairs`
#pragma unroll
  for (int r = 0; r < 4; r++) {
    Pair pair = join_lanes(join_lanes(sum[r], 1), 2);
    if (me.t == 0) pairs[(me.warp >> 2) * kTile + me.row(r / 2, r % 2)] = pair;
  }
  block_sync();
  int slot = p_first + int(threadIdx.x);
  if (threadIdx.x >= kTile || slot >= p_used) return;
  store_result(a, part, slot, p_used, join(pairs[threadIdx.x], pairs[kTile + threadIdx.x]));
}

NCK_KERNEL(kThreads, 4) combine_kernel(const __grid_constant__ CombineArgs a) {
  int slot = int(blockIdx.x) * kThreads + int(threadIdx.x);
  int used = a.count ? min_of(int(*a.count), a.slots) : a.slots;
  if (slot >= used) return;
  Pair pair = empty_pair();
  for (int part = a.first; part < a.parts; part++) {
    int64_t at = int64_t(part) * a.slots + slot;
    pair = join(pair, {a.max[at], a.sum[at]});
  }
  if (a.keep) {
    a.max[slot] = pair.largest;
    a.sum[slot] = pair.total;
  }
  if (!a.out) return;
  bool summed = !a.label || a.label[slot] != a.skip;
  if (a.gather && !summed) return;
  store_log_sum(a.out, a.ratio, a.gather ? a.label[slot] : slot, pair);
}

}  // namespace

void log_sum_exp(const LseArgs& args, Stream stream) {
  with_kind(args.kind, [&](auto kind) {
    with_tag(args.exclude, [&](auto tag) {
      using Tag = decltype(tag);
      auto* kernel = args.q_max ? lse_kernel<kind.value, Tag, true> : lse_kernel<kind.value, Tag, false>;
      launch(kernel, int64_t(args.tiles) * args.split, kThreads, lse_shared<Tag>(), stream, args);
    });
  });
}

void combine(const CombineArgs& args, Stream stream) {
  launch(combine_kernel, (args.slots + kThreads - 1) / kThreads, kThreads, 0, stream, args);
}

}  // namespace nck
