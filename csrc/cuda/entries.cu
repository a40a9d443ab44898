// The gradient for long rows: tiles of H = A r_p r_q (times `scale`), one per thread block, in a panel in
// memory. Because H contains both norms, it serves both products: H Q is r_p a_p and H^T P is r_q a_q.

#include "gradient.h"
#include "tile_loop.h"

namespace nck {
namespace {

// Tiles are ordered in groups of this many rows of tiles, column by column, so that neighbours share rows in
// the L2 cache.
constexpr int kGroup = 8;
constexpr int kWholePanel = 1 << 30;

static_assert(kLoopBytes + kTile * sizeof(Terms<int64_t, Sums::kShared>) <= 99 << 10,
              "shared memory of the smallest devices");

// Stores two neighbouring numbers of a row of H. Rows are padded to 16 numbers, so the second always exists.
NCK_DEVICE void store_pair(bf16* to, float a, float b) {
  *reinterpret_cast<uint32_t*>(to) = pack(a, b, bf16{});
}
NCK_DEVICE void store_pair(f16* to, float a, float b) {
  *reinterpret_cast<uint32_t*>(to) = pack(a, b, f16{});
}
NCK_DEVICE void store_pair(float* to, float a, float b) {
  union {
    float number[2];
    uint64_t both;
  } pair{{a, b}};
  *reinterpret_cast<uint64_t*>(to) = pair.both;
}

template <Kind K, class Tag, Sums kSums>
NCK_KERNEL(kThreads, 1)
entries_kernel(const __grid_constant__ EntriesArgs a) {
  SharedArena arena;
  auto* stages = arena.take<unsigned char>(kLoopBytes);
  auto* columns = arena.take<Terms<Tag, kSums>>(kTile);
  const Lane me;
  const int p_tiles = (a.p_stop - a.p_start + kTile - 1) / kTile;
  const int q_tiles = (a.q_stop - a.q_start + kTile - 1) / kTile;
  const int group = int(blockIdx.x) / (kGroup * q_tiles), inner = int(blockIdx.x) % (kGroup * q_tiles);
  const int height = min_of(p_tiles - group * kGroup, kGroup);
  // The tile relative to the panel's corner, and in slots.
  const int p_local = (group * kGroup + inner % height) * kTile, q_local = inner / height * kTile;
  const int p_first = a.p_start + p_local, q_first = a.q_start + q_local;
  const int p_used = min_of(used_slots(a.p), a.p_stop), q_used = min_of(used_slots(a.q), a.q_stop);
  const int height_left = a.p_stop - p_first, width_left = a.q_stop - q_first;
  auto* h = static_cast<Number<K>*>(a.h) + int64_t(p_local) * a.h_stride + q_local;

  // Calls f(j, r, address in H) for every two neighbouring entries that are in the panel.
  auto each_pair = [&](auto f) {
#pragma unroll
    for (int j = 0; j < 8; j++) {
#pragma unroll
      for (int r = 0; r < 4; r++) {
        int row = me.row(r / 2, r % 2), column = me.column(j, 0);
        if (row < height_left && column < width_left) f(j, r, h + row * a.h_stride + column);
      }
    }
  };
  if (p_first >= p_used || q_first >= q_used) {
    // Unused slots have no rows, but the matrix products read their entries.
    each_pair([&](int, int, Number<K>* to) { store_pair(to, 0.0f, 0.0f); });
    return;
  }

  const Betas betas = betas_of(a.p, *a.beta);
  const float scale = a.scale ? *a.scale : 1.0f, of_gradients = a.divisor ? a.divisor[2] : 1.0f;
  Terms<Tag, kSums> row[4];
#pragma unroll
  for (int r = 0; r < 4; r++) {
    Slot s = slot_at(a.p, p_first + me.row(r / 2, r % 2), p_used);
    row[r] = terms_of<Tag, kSums>(a.p, s, betas.p, a.q.grad, false, a.exclude, a.norm_limit, of_gradients);
    row[r].factor *= scale;
  }
  auto prologue = [&](int) {
    if (threadIdx.x >= kTile) return;
    Slot s = slot_at(a.q, q_first + int(threadIdx.x), q_used);
    columns[threadIdx.x] =
        terms_of<Tag, kSums>(a.q, s, betas.q, a.p.grad, false, a.exclude, a.norm_limit, of_gradients);
  };
  auto make_entries = [&](float (&acc)[2][8][4], auto of_q) {
#pragma unroll
    for (int j = 0; j < 8; j++) {
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const Terms<Tag, kSums> column = columns[me.column(j, e)];
#pragma unroll
        for (int r = 0; r < 4; r++) {
          float& x = acc[r / 2][j][2 * (r % 2) + e];
          float h = entry<false, of_q.value>(x, row[r], column);
          x = in_range(h * row[r].factor * column.factor, a.norm_limit);
        }
      }
    }
  };
  auto epilogue = [&](int, float (&acc)[2][8][4]) {
    if constexpr (kSums == Sums::kOne && !kHalf<K>) {
      a.q.grad ? make_entries(acc, std::true_type{}) : make_entries(acc, std::false_type{});
    } else {
      make_entries(acc, std::false_type{});
    }
    each_pair([&](int j, int r, Number<K>* to) {
      store_pair(to, acc[r / 2][j][2 * (r % 2)], acc[r / 2][j][2 * (r % 2) + 1]);
    });
  };
  tile_loop<K>(a.p, p_first, p_used, a.q, q_first, q_used, 0, kWholePanel, a.d, stages, me, prologue,
               epilogue);
}

}  // namespace

void entries(const EntriesArgs& args, Stream stream) {
  int64_t blocks = int64_t(tiles_of(args.p_stop - args.p_start)) * tiles_of(args.q_stop - args.q_start);
  with_kind(args.kind, [&](auto kind) {
    with_tag(args.exclude, [&](auto tag) {
      using Tag = decltype(tag);
      with_sums(args.p, args.q, [&](auto sums) {
        size_t shared = kLoopBytes + kTile * sizeof(Terms<Tag, sums.value>);
        launch(entries_kernel<kind.value, Tag, sums.value>, blocks, kThreads, shared, stream, args);
      });
    });
  });
}

}  // namespace nck
