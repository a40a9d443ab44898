// Gradients from accumulated sums, for rows of any length; copies of compacted rows; products recomputed
// without rows that hold NaN.

#include <type_traits>

#include "vectors.h"

namespace nck {
namespace {

constexpr int kThreads = 256;

// The row's numbers [column, column + 8) of the sum over the parts.
NCK_DEVICE void load_sum(float (&sum)[8], const FinishArgs& a, int64_t row, int column, bool aligned) {
  load8(sum, a.acc + row * a.d, column, a.d, aligned);
  for (int part = 1; part < a.parts; part++) {
    float more[8];
    load8(more, a.acc + part * a.part_stride + row * a.d, column, a.d, aligned);
#pragma unroll
    for (int i = 0; i < 8; i++) sum[i] += more[i];
  }
}

// Reads each row twice, for the dot product x . acc and for the result. The second time it is in the cache.
template <class T>
NCK_KERNEL(kThreads, 3)
finish_kernel(const __grid_constant__ FinishArgs a) {
  RowTeam team = RowTeam::of(a.d, kThreads);
  int used = min_of(used_slots(a.p), a.stop);
  int64_t slot = a.start + team.row;
  bool inside = slot < a.stop;
  Slot s = slot_at(a.p, inside ? int(slot) : used, used);
  const T* x_row = static_cast<const T*>(a.p.x) + int64_t(s.row) * a.p.stride;
  bool x_aligned = rows_aligned<T>(a.p.x, a.p.stride);
  bool acc_aligned = rows_aligned<float>(a.acc, a.d) && a.part_stride % 4 == 0;

  float along = 0.0f;
  if (s.here) {
    for (int c = team.column; c < a.d; c += team.step) {
      float x[8], acc[8];
      load8(x, x_row, c, a.d, x_aligned);
      load_sum(acc, a, team.row, c, acc_aligned);
#pragma unroll
      for (int i = 0; i < 8; i++) along = fmaf(x[i], acc[i], along);
    }
  }
  along = team.sum(along);
  if (!inside) return;

  float rnorm = rnorm_of(a.p, s), weight = rnorm;
  if (a.norm_inside) {
    // Already in the sums, except for the rows whose factor was 1.
    weight = rnorm == summand_rnorm(rnorm, a.norm_limit) ? 1.0f : rnorm;
  }
  if (a.scale) weight /= *a.scale;
  if (a.divisor) weight /= *a.divisor;
  if (a.dot && team.column == 0) a.dot[slot] = s.here ? weight * along : 0.0f;
  if (!a.out || (a.p.gather && !s.here)) return;
  float factor = radial(rnorm, along, a.eps), scale = weight * *a.beta;
  auto write = [&](auto* out) {
    bool aligned = rows_aligned<std::remove_pointer_t<decltype(out)>>(out, a.d);
    out += (a.p.gather ? s.row : slot) * int64_t(a.d);
    for (int c = team.column; c < a.d; c += team.step) {
      float x[8], grad[8] = {};
      if (s.here) {
        load8(x, x_row, c, a.d, x_aligned);
        load_sum(grad, a, team.row, c, acc_aligned);
#pragma unroll
        for (int i = 0; i < 8; i++) grad[i] = scale * fmaf(-factor, x[i], grad[i]);
      }
      store8(out, c, a.d, aligned, grad);
    }
  };
  a.wide ? write(static_cast<float*>(a.out)) : write(static_cast<T*>(a.out));
}

template <class T>
NCK_KERNEL(kThreads, 4)
gather_kernel(const __grid_constant__ GatherArgs a) {
  RowTeam team = RowTeam::of(a.d, kThreads);
  int64_t slot = a.start + team.row;
  if (slot >= a.stop) return;
  Slot s = slot_at(a.p, int(slot), min_of(used_slots(a.p), a.stop));
  const T* row = static_cast<const T*>(a.p.x) + int64_t(s.row) * a.p.stride;
  T* out = static_cast<T*>(a.out) + team.row * a.d;
  for (int c = team.column; c < a.d; c += team.step) {
    float x[8] = {};
    if (s.here) load8(x, row, c, a.d, rows_aligned<T>(a.p.x, a.p.stride));
    store8(out, c, a.d, rows_aligned<T>(a.out, a.d), x);
  }
}

constexpr int kMendRows = 8;    // rows of a thread block's tile, which has one column per thread
constexpr int kMendChunk = 64;  // terms that are summed before they are added to the rest, for accuracy

// Every thread block finds out whether there is anything to do. The rest is rarely needed, and simple rather
// than fast.
template <class T>
NCK_KERNEL(kThreads, 2)
mend_kernel(const __grid_constant__ MendArgs a) {
  SharedArena arena;
  float* scratch = arena.take<float>(32);
  float found = a.broken ? *a.broken : 0.0f;
  for (int q = int(threadIdx.x); !a.broken && q < a.q.slots; q += kThreads) {
    if (a.q.rnorm[q] == kNotFinite) found = 1.0f;
  }
  if (block_max<kThreads>(found, scratch) == 0.0f) return;

  const T *h = static_cast<const T*>(a.h), *x = static_cast<const T*>(a.q.x);
  int column_tiles = (a.d + kThreads - 1) / kThreads;
  int tiles = (a.rows + kMendRows - 1) / kMendRows * column_tiles;
  for (int tile = int(blockIdx.x); tile < tiles; tile += a.blocks) {
    int first = tile / column_tiles * kMendRows, column = tile % column_tiles * kThreads + int(threadIdx.x);
    if (column >= a.d) continue;
    float sum[kMendRows] = {};
    for (int chunk = 0; chunk < a.q.slots; chunk += kMendChunk) {
      float part[kMendRows] = {};
      for (int q = chunk; q < min_of(chunk + kMendChunk, a.q.slots); q++) {
        if (!slot_at(a.q, q, a.q.slots).here) continue;
        float value = to_float(x[q * a.q.stride + column]);
#pragma unroll
        for (int i = 0; i < kMendRows; i++) {
          if (first + i >= a.rows) break;
          part[i] = fmaf(to_float(h[(first + i) * a.h_row + q * a.h_column]), value, part[i]);
        }
      }
#pragma unroll
      for (int i = 0; i < kMendRows; i++) sum[i] += part[i];
    }
#pragma unroll
    for (int i = 0; i < kMendRows; i++) {
      if (first + i < a.rows) a.out[int64_t(first + i) * a.d + column] = sum[i];
    }
  }
}

}  // namespace

void finish(const FinishArgs& args, Stream stream) {
  int rows = rows_per_block(args.d, kThreads);
  with_row_type(args.kind, [&](auto number) {
    auto* kernel = finish_kernel<decltype(number)>;
    launch(kernel, (args.stop - args.start + rows - 1) / rows, kThreads, 0, stream, args);
  });
}

void gather(const GatherArgs& args, Stream stream) {
  int rows = rows_per_block(args.d, kThreads);
  with_row_type(args.kind, [&](auto number) {
    auto* kernel = gather_kernel<decltype(number)>;
    launch(kernel, (args.stop - args.start + rows - 1) / rows, kThreads, 0, stream, args);
  });
}

void mend(const MendArgs& args, Stream stream) {
  with_row_type(args.kind, [&](auto number) {
    launch(mend_kernel<decltype(number)>, args.blocks, kThreads, 32 * sizeof(float), stream, args);
  });
}

}  // namespace nck
