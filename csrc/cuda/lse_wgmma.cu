// The forward pass with the units of compute capability 9.0: TMA copies, wgmma products, and
// barriers that count bytes. The results are those of lse.cu in one direction, for rows of 16-bit numbers.
//
// There are three differences to the loop in tile_loop.h.
//
// 1. Copies. One instruction fetches a box of 128 rows and 64 columns, and a barrier in shared memory counts
//    its bytes. Threads compute no addresses; rows and columns outside the matrix arrive as zeros.
// 2. Products. Four warps multiply 64 rows with 128 rows, read from shared memory, asynchronously.
// 3. Roles. A ninth warp, the producer, only fetches; the other eight multiply and reduce:
//
//        producer                          stage s in shared memory        consumers, 2 x 4 warps
//        wait until empty[s]        -->    box of P | box of Q      -->    wait until full[s]
//        expect bytes on full[s]                                           products
//        copy both boxes            <--                             <--    arrive at empty[s]
//
//    Each stage has two barriers: `full` completes when all bytes of its boxes have arrived, `empty` when all
//    eight warps have read them. While one tile is reduced, the boxes of the next are in flight. Two thread
//    blocks share a multiprocessor, so that one reduces while the other multiplies.
//
// Left-out rows are fetched with the others and may hold anything; the epilogue selects.

#include "hopper.h"
#include "pairs.h"

namespace nck {
namespace {

constexpr int kTile = 128;       // rows of a tile of either operand
constexpr int kBoxColumns = 64;  // 128 bytes of a row
constexpr int kBoxBytes = kTile * kBoxColumns * 2;
constexpr int kStageBytes = 2 * kBoxBytes;
constexpr int kStages = 3;
constexpr int kConsumers = 256;
constexpr int kThreads = kConsumers + 32;

struct WgmmaArgs {
  TensorMap p_boxes, q_boxes;
  LseArgs lse;
};

// All masks use tags of 64 bits, which labels need. (Tags of 32 bits would not be faster: the compiler then
// orders the epilogue so that it exceeds the 96 registers per thread of two blocks of nine warps.)
using Tag = int64_t;
using TileColumns = Columns<Tag, kTile>;

constexpr size_t kSharedBytes = kStages * kStageBytes + 2 * sizeof(TileColumns) + 2 * 128;
static_assert(kSharedBytes <= 113 << 10, "two blocks share the 228 KB of a multiprocessor");

// Iterates over the stages; `lap` is the parity of the barriers' phases.
struct Ring {
  int stage = 0, lap = 0;

  NCK_DEVICE void next() {
    if (++stage == kStages) {
      stage = 0;
      lap ^= 1;
    }
  }
};

// Thread block b has anchor tile b / split and the Q tiles b % split, + split, + 2 split, ..., as in lse.cu.
template <class T>
NCK_KERNEL(kThreads, 2)
lse_wgmma_kernel(const __grid_constant__ WgmmaArgs args) {
#if defined(NCK_HOPPER)
  const LseArgs& a = args.lse;
  SharedArena arena;
  auto* stages = arena.take<unsigned char>(kStages * kStageBytes);
  auto* columns = arena.take<TileColumns>(2);
  auto* full = arena.take<Mbarrier>(kStages);
  auto* empty = arena.take<Mbarrier>(kStages);
  const int lane = int(threadIdx.x) & 31, warp = int(threadIdx.x) >> 5;
  const int part = int(blockIdx.x) % a.split;
  const int p_first = (a.first_tile + int(blockIdx.x) / a.split) * kTile;
  const int slices = (a.d + kBoxColumns - 1) / kBoxColumns, tiles = (a.q.slots + kTile - 1) / kTile;

  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; s++) {
      mbarrier_init(full + s, 1);                 // the producer, and the bytes that it expects
      mbarrier_init(empty + s, kConsumers / 32);  // one lane of every warp
    }
    mbarrier_init_done();
  }
  block_sync();

  Ring at;
  if (warp == kConsumers / 32) {
    if (lane != 0) return;
    for (int tile = part; tile < tiles; tile += a.split) {
      for (int slice = 0; slice < slices; slice++) {
        // In the first lap the stage is free: the phase before the first counts as complete.
        mbarrier_wait(empty + at.stage, at.lap ^ 1);
        mbarrier_expect(full + at.stage, kStageBytes);
        unsigned char* box = stages + at.stage * kStageBytes;
        copy_box(box, &args.p_boxes, slice * kBoxColumns, p_first, full + at.stage);
        copy_box(box + kBoxBytes, &args.q_boxes, slice * kBoxColumns, tile * kTile, full + at.stage);
        at.next();
      }
    }
    return;
  }

  // A consumer. Its group of four warps has 64 rows of P; a lane has two of them, and 32 columns of each
  // tile.
  const int p_half = 64 * (warp >> 2);
  float scale[2];
  Tag tag[2];
  Pair sum[2];
  auto slot_of = [&](int h) { return p_first + 16 * warp + 8 * h + (lane >> 2); };
#pragma unroll
  for (int h = 0; h < 2; h++) {
    Slot s = slot_at(a.p, slot_of(h), a.p.slots);
    scale[h] = rnorm_of(a.p, s) * betas_of(a.p, *a.beta).p;
    tag[h] = mask_tag<Tag>(a.p, s, a.exclude);
    sum[h] = empty_pair();
  }

  int buffer = 0;
  for (int tile = part; tile < tiles; tile += a.split, buffer ^= 1) {
    if (threadIdx.x < kTile) {
      int c = int(threadIdx.x);
      columns[buffer].set(c, a.q, slot_at(a.q, tile * kTile + c, a.q.slots), betas_of(a.p, *a.beta).q,
                          a.exclude);
    }

    float acc[64] = {};
    int previous = 0;
    for (int slice = 0; slice < slices; slice++) {
      if (!planted(Fault::kMissingWait)) mbarrier_wait(full + at.stage, at.lap);
      const unsigned char* p_rows = stages + at.stage * kStageBytes + p_half * 128;
      const unsigned char* q_rows = stages + at.stage * kStageBytes + kBoxBytes;
      wgmma_begin();
#pragma unroll
      for (int k = 0; k < kBoxColumns / 16; k++) {
        int other = planted(Fault::kWrongFragment) ? k ^ 1 : k;
        wgmma(acc, box_operand(p_rows + 32 * k), box_operand(q_rows + 32 * other), T{});
      }
      wgmma_commit();
      // This slice's products are in flight; those of the previous one are done, and its stage is free.
      wgmma_wait<1>();
      if (slice > 0 && lane == 0) mbarrier_arrive(empty + previous);
      previous = at.stage;
      at.next();
    }
    wgmma_wait<0>(acc);
    if (lane == 0) mbarrier_arrive(empty + previous);

    // After the barrier the columns of this tile are complete. Those of the next tile go to the other buffer;
    // this one is written again only after the next tile's barrier.
    if (!planted(Fault::kMissingBarrier)) first_threads_sync(kConsumers);
    const TileColumns& column = columns[buffer];
#pragma unroll
    for (int j = 0; j < 16; j++) {
#pragma unroll
      for (int e = 0; e < 2; e++) {
        int c = 8 * j + 2 * (lane & 3) + e;
        float q_scale = column.scale[c], bias = column.bias[c];
        Tag other = column.tag[c];
#pragma unroll
        for (int h = 0; h < 2; h++) {
          float& x = acc[4 * j + 2 * h + e];
          bool out = tag[h] == other || bias == -infinity();
          x = out ? -infinity() : fmaf(x, scale[h] * q_scale, bias);
        }
      }
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float largest = sum[h].largest, total = 0.0f;
#pragma unroll
      for (int i = 0; i < 32; i++) largest = fmaxf(largest, acc[4 * (i / 2) + 2 * h + i % 2]);
      float shift = shift_of(largest);
#pragma unroll
      for (int i = 0; i < 32; i++) total += exp2_fast(acc[4 * (i / 2) + 2 * h + i % 2] - shift);
      sum[h] = {largest, fmaf(sum[h].total, exp2_fast(sum[h].largest - shift), total)};
    }
  }

  // Four neighbouring lanes share the columns of a row.
#pragma unroll
  for (int h = 0; h < 2; h++) {
    Pair pair = join_lanes(join_lanes(sum[h], 1), 2);
    if ((lane & 3) == 0 && slot_of(h) < a.p.slots) store_result(a, part, slot_of(h), a.p.slots, pair);
  }
#endif
}

}  // namespace

void log_sum_exp_wgmma(const LseArgs& args, Stream stream) {
  auto boxes = [&](const Side& side) {
    return tensor_map(side.x, args.kind, side.slots, args.d, side.stride, kTile);
  };
  WgmmaArgs all{boxes(args.p), boxes(args.q), args};
  auto* kernel = args.kind == Kind::kBf16 ? lse_wgmma_kernel<bf16> : lse_wgmma_kernel<f16>;
  launch(kernel, int64_t(args.tiles) * args.split, kThreads, kSharedBytes, stream, all);
}

}  // namespace nck
