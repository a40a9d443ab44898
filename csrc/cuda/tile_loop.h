// The main loop of the tile kernels: the products of a tile of 128 rows of P with tiles of Q in turn.
//
// Rows go through shared memory in slices of 64 bytes, with four stages. The pipeline continues from one Q
// tile to the next, so that the next tile's rows are in flight while the epilogue of the last one computes
// exponentials. Left-out rows and columns past d arrive as zeros.
//
// Each of eight warps has 32 rows of P and 64 of Q. With g = lane / 4 and t = lane % 4, a lane holds
//   acc[i][j][2 h + e] = product of  P row 32 (warp % 4) + 16 i + 8 h + g
//                              with  Q row 64 (warp / 4) +  8 j + 2 t + e
// for i, h, e < 2 and j < 8: four rows and sixteen columns.
#pragma once

#include "formats.h"
#include "vectors.h"

namespace nck {

inline constexpr int kTile = 128;
inline constexpr int kThreads = 256;
inline constexpr int kSlice = 64;  // bytes per row in a stage
inline constexpr int kStages = 4;
inline constexpr int kOperandBytes = kTile * kSlice;
inline constexpr int kStageBytes = 2 * kOperandBytes;
inline constexpr int kLoopBytes = kStages * kStageBytes;

inline int tiles_of(int slots) { return (slots + kTile - 1) / kTile; }

// The offset of 16-byte piece `piece` of row `row` in an operand's slice. Two rows share 128 bytes, which are
// all banks; the exclusive or spreads the same piece of eight rows over all of them.
NCK_DEVICE int slice_offset(int row, int piece) { return row * kSlice + ((piece ^ ((row >> 1) & 3)) << 4); }

struct Lane {
  int lane = int(threadIdx.x) & 31, warp = int(threadIdx.x) >> 5;
  int g = lane >> 2, t = lane & 3;
  int p = 32 * (warp & 3), q = 64 * (warp >> 2);

  NCK_DEVICE int row(int i, int h) const { return p + 16 * i + 8 * h + g; }
  NCK_DEVICE int column(int j, int e) const { return q + 8 * j + 2 * t + e; }
};

// Copies this thread's share of one operand: a fixed 16-byte piece of two rows.
template <class T>
class RowCopier {
 public:
  NCK_DEVICE void point(const Side& side, int first, int used) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      Slot s = slot_at(side, first + local_row(i), used);
      here_[i] = s.here;
      row_[i] = static_cast<const T*>(side.x) + (s.here ? int64_t(s.row) * side.stride : 0);
    }
  }

  NCK_DEVICE void copy(unsigned char* stage, int slice, int d, bool aligned) const {
    int column = slice * (kSlice / int(sizeof(T))) + piece() * kPerVec<T>;
    int left = d - column;
    int numbers = left < 0 ? 0 : left < kPerVec<T> ? left : kPerVec<T>;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      int count = here_[i] ? numbers : 0;
      // The copy needs a valid address even if it reads nothing.
      const T* from = row_[i] + (count ? column : 0);
      copy_piece(stage + slice_offset(local_row(i), piece()), from, count, aligned);
    }
  }

 private:
  NCK_DEVICE static int piece() { return int(threadIdx.x) & 3; }
  NCK_DEVICE static int local_row(int i) { return (int(threadIdx.x) >> 2) + 64 * i; }

  const T* row_[2];
  bool here_[2];
};

// acc += the products over one slice.
template <Kind K>
NCK_DEVICE void multiply_slice(float (&acc)[2][8][4], const unsigned char* stage, const Lane& me) {
  const unsigned char* p_slice = stage;
  const unsigned char* q_slice = stage + kOperandBytes;
#pragma unroll
  for (int k = 0; k < kSlice / 32; k++) {
    Part<K, 4> a[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      // Lanes 0-15 address rows 0-15 of the first 16 bytes, lanes 16-31 those of the second.
      uint32_t raw[4];
      ldmatrix(raw, p_slice + slice_offset(me.p + 16 * i + (me.lane & 15), 2 * k + (me.lane >> 4)));
      a[i] = prepare<K>(raw);
    }
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      // Two column tiles at once: lanes 0-7 and 8-15 address both halves of the first, the others the second.
      int row = me.q + 8 * j + (me.lane & 7) + 8 * (me.lane >> 4);
      uint32_t raw[4];
      ldmatrix(raw, q_slice + slice_offset(row, 2 * k + ((me.lane >> 3) & 1)));
      Part<K, 4> b = prepare<K>(raw);
#pragma unroll
      for (int i = 0; i < 2; i++) {
        bool swapped = planted(Fault::kWrongFragment);
        multiply<K>(acc[i][j], a[i], b, swapped ? 2 : 0);
        multiply<K>(acc[i][j + 1], a[i], b, swapped ? 0 : 2);
      }
    }
  }
}

// Loops over the Q tiles first_tile, first_tile + step, ... of the slots [q_begin, q_used). For each it calls
// prologue(tile) before a barrier and epilogue(tile, acc) after the products. The prologue must write to
// alternating places in shared memory for consecutive tiles.
template <Kind K, class Prologue, class Epilogue>
NCK_DEVICE void tile_loop(const Side& p, int p_first, int p_used, const Side& q, int q_begin, int q_used,
                          int first_tile, int step, int d, unsigned char* stages, const Lane& me,
                          Prologue prologue, Epilogue epilogue) {
  using T = Number<K>;
  constexpr int kPerSlice = kSlice / int(sizeof(T));
  const int slices = (d + kPerSlice - 1) / kPerSlice;
  const int tiles = (q_used - q_begin + kTile - 1) / kTile;
  const bool p_aligned = rows_aligned<T>(p.x, p.stride), q_aligned = rows_aligned<T>(q.x, q.stride);
  RowCopier<T> p_rows, q_rows;
  p_rows.point(p, p_first, p_used);

  int issue_tile = first_tile, issue_slice = 0, issue_stage = 0;
  auto issue = [&] {
    if (issue_tile < tiles) {
      if (issue_slice == 0) q_rows.point(q, q_begin + issue_tile * kTile, q_used);
      unsigned char* stage = stages + issue_stage * kStageBytes;
      p_rows.copy(stage, issue_slice, d, p_aligned);
      q_rows.copy(stage + kOperandBytes, issue_slice, d, q_aligned);
      if (++issue_slice == slices) {
        issue_slice = 0;
        issue_tile += step;
      }
      issue_stage = (issue_stage + 1) % kStages;
    }
    cp_commit();  // also an empty group, because waits count groups
  };
  for (int i = 0; i < kStages - 1; i++) issue();

  int stage = 0;
  for (int tile = first_tile; tile < tiles; tile += step) {
    prologue(tile);
    float acc[2][8][4] = {};
    for (int slice = 0; slice < slices; slice++) {
      if (planted(Fault::kMissingWait)) {
        cp_wait<kStages - 1>();
      } else {
        cp_wait<kStages - 2>();  // this thread's share of the slice has arrived
      }
      // After the barrier the whole slice has arrived, and all warps are done with the stage that is filled
      // next.
      if (!planted(Fault::kMissingBarrier)) block_sync();
      issue();
      multiply_slice<K>(acc, stages + stage * kStageBytes, me);
      stage = (stage + 1) % kStages;
    }
    epilogue(tile, acc);
  }
  cp_wait<0>();
}

}  // namespace nck
