// Log-sum-exps and entries of a panel whose products the vendor's library has computed.
//
// For rows too long for short_grad.cu products run at the library's rate. These kernels read its float32
// products twice, once for the sums and once for the gradient's entries. A panel has some anchors with all
// rows of the other operand, so the sums are complete before the second reading, and forward and backward
// share the products (nckernels/backends/tiled/step.py).
//
// A warp has four anchors, and each of its lanes four neighbouring columns of 128: 16 bytes of each anchor's
// products, for one reading of what belongs to the columns.

#include "gradient.h"
#include "vectors.h"

namespace nck {
namespace {

constexpr int kThreads = 256;
constexpr int kAnchors = 4;                      // of a warp
constexpr int kRows = kThreads / 32 * kAnchors;  // anchors of a thread block
constexpr int kLaneColumns = 4;
constexpr int kColumns = 32 * kLaneColumns;  // of a warp at a time
constexpr int kBlockColumns = 4 * kColumns;  // of a thread block that writes entries

// The masks of one step compare row numbers, never labels.
using Tag = int;

NCK_DEVICE float max_of_warp(float x) {
  for (int mask = 1; mask < 32; mask *= 2) x = fmaxf(x, shfl_xor(x, mask));
  return x;
}

NCK_DEVICE float sum_of_warp(float x) {
  for (int mask = 1; mask < 32; mask *= 2) x += shfl_xor(x, mask);
  return x;
}

// A largest logit in base 2 and the sum of exponentials relative to it, over all lanes.
struct Sum {
  float largest = -infinity();
  float total = 0.0f;

  NCK_DEVICE void over_warp() {
    float top = max_of_warp(largest);
    total = sum_of_warp(total * exp2_fast(largest - shift_of(top)));
    largest = top;
  }
};

// The lane's four products of an anchor, the panel's row `row`. The panel ends at a multiple of 16 columns.
NCK_DEVICE void load_products(float (&to)[kLaneColumns], const PanelArgs& a, int row, int column) {
  union {
    Vec16 vec;
    float number[kLaneColumns];
  } raw;
  raw.vec = *reinterpret_cast<const Vec16*>(a.products + row * a.products_stride + column);
#pragma unroll
  for (int c = 0; c < kLaneColumns; c++) to[c] = raw.number[c];
}

// Several thread blocks share the columns of their anchors; each leaves partial sums.
NCK_KERNEL(kThreads, 3) panel_lse_kernel(const __grid_constant__ PanelArgs a) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int part = int(blockIdx.x) % a.split, n = a.stop - a.start;
  const int first = int(blockIdx.x) / a.split * kRows + warp * kAnchors;
  const int used = min_of(used_slots(a.p), a.stop);
  const Betas betas = betas_of(a.p, *a.beta);
  Tag tag[kAnchors];
  float scale[kAnchors];
  bool summed[kAnchors];
  Sum sum[kAnchors];
#pragma unroll
  for (int r = 0; r < kAnchors; r++) {
    Slot s = slot_at(a.p, a.start + first + r, used);
    tag[r] = mask_tag<Tag>(a.p, s, a.exclude);
    summed[r] = s.summed && first + r < n;
    scale[r] = rnorm_of(a.p, s) * betas.p;
  }
  for (int column = part * kColumns + lane * kLaneColumns; column < a.q.slots; column += a.split * kColumns) {
    Tag q_tag[kLaneColumns];
    float q_scale[kLaneColumns], bias[kLaneColumns];
#pragma unroll
    for (int c = 0; c < kLaneColumns; c++) {
      Slot s = slot_at(a.q, column + c, a.q.slots);
      q_tag[c] = mask_tag<Tag>(a.q, s, a.exclude);
      q_scale[c] = rnorm_of(a.q, s) * betas.q;
      bias[c] = summand_bias(a.q, s);
    }
#pragma unroll
    for (int r = 0; r < kAnchors; r++) {
      if (!summed[r]) continue;
      float t[kLaneColumns];
      load_products(t, a, first + r, column);
      float top = sum[r].largest;
#pragma unroll
      for (int c = 0; c < kLaneColumns; c++) {
        // Selected: the products of left-out rows may be NaN.
        bool out = bias[c] == -infinity() || tag[r] == q_tag[c];
        t[c] = out ? -infinity() : fmaf(t[c], scale[r] * q_scale[c], bias[c]);
        top = fmaxf(top, t[c]);
      }
      float shift = shift_of(top), total = sum[r].total * exp2_fast(sum[r].largest - shift);
#pragma unroll
      for (int c = 0; c < kLaneColumns; c++) total += exp2_fast(t[c] - shift);
      sum[r] = {top, total};
    }
  }
#pragma unroll
  for (int r = 0; r < kAnchors; r++) {
    sum[r].over_warp();
    if (lane == 0 && first + r < n) {
      int64_t at = int64_t(part) * n + first + r;
      a.partial[at] = sum[r].largest;
      a.partial[int64_t(a.split) * n + at] = sum[r].total;
    }
  }
}

// The sum over all columns of the panel's row `row`.
NCK_DEVICE Sum combined(const PanelArgs& a, int row, int lane) {
  Sum sum;
  const int n = a.stop - a.start;
  if (row < n && lane < a.split) {
    int64_t at = int64_t(lane) * n + row;
    sum = {a.partial[at], a.partial[int64_t(a.split) * n + at]};
  }
  sum.over_warp();
  return sum;
}

NCK_DEVICE void store_entries(float* to, const float (&x)[kLaneColumns]) {
  union {
    float number[kLaneColumns];
    Vec16 vec;
  } raw{{x[0], x[1], x[2], x[3]}};
  *reinterpret_cast<Vec16*>(to) = raw.vec;
}
template <class T>
NCK_DEVICE void store_entries(T* to, const float (&x)[kLaneColumns]) {
  union {
    uint32_t pair[2];
    uint64_t both;
  } raw{{pack(x[0], x[1], T{}), pack(x[2], x[3], T{})}};
  *reinterpret_cast<uint64_t*>(to) = raw.both;
}

// H = A r_p r_q (times `scale`), see gradient.h. An entry replaces the product that the same lane has read.
template <class T>
NCK_KERNEL(kThreads, 2)
panel_entries_kernel(const __grid_constant__ PanelArgs a) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, n = a.stop - a.start;
  const int blocks = (a.q.slots + kBlockColumns - 1) / kBlockColumns;
  const int first = int(blockIdx.x) / blocks * kRows + warp * kAnchors;
  const int begin = int(blockIdx.x) % blocks * kBlockColumns;
  const int used = min_of(used_slots(a.p), a.stop);
  const Betas betas = betas_of(a.p, *a.beta);
  const float scale = a.scale ? *a.scale : 1.0f, of_gradients = a.divisor ? a.divisor[2] : 1.0f;
  Terms<Tag, Sums::kOne> row[kAnchors];
  bool here[kAnchors];
#pragma unroll
  for (int r = 0; r < kAnchors; r++) {
    Slot s = slot_at(a.p, a.start + first + r, used);
    Sum sum = combined(a, first + r, lane);
    float rnorm = rnorm_of(a.p, s);
    here[r] = s.here;
    if (begin == 0 && lane == 0 && first + r < n && (s.summed || !a.p.gather)) {
      a.lse[a.p.gather ? s.row : a.start + first + r] = (sum.largest + log2_of(sum.total)) * kLn2;
    }
    // An empty set has no gradient, see upstream_of. The exponentials are exp(t - largest) / total: the
    // log-sum-exp has a rounding, which would matter where a probability is near 1, and 1 is subtracted.
    bool empty = !s.summed || sum.largest == -infinity();
    row[r].scale = rnorm * betas.p;
    row[r].factor = summand_rnorm(rnorm, a.norm_limit) * scale;
    row[r].add = empty ? -infinity() : -sum.largest;
    row[r].times = empty ? 0.0f : a.p.grad[s.row] * of_gradients / sum.total;
    row[r].pos = a.p.pos && s.summed ? a.p.pos[s.row] * of_gradients : 0.0f;
    row[r].partner = partner_tag(a.p, s, a.exclude);
    row[r].tag = mask_tag<Tag>(a.p, s, a.exclude);
  }
  const int end = min_of(begin + kBlockColumns, a.q.slots);
  for (int column = begin + lane * kLaneColumns; column < end; column += kColumns) {
    Terms<Tag, Sums::kOne> other[kLaneColumns];
    bool q_here[kLaneColumns];
#pragma unroll
    for (int c = 0; c < kLaneColumns; c++) {
      Slot s = slot_at(a.q, column + c, a.q.slots);
      q_here[c] = s.here;
      other[c] =
          terms_of<Tag, Sums::kOne>(a.q, s, betas.q, true, false, a.exclude, a.norm_limit, of_gradients);
    }
#pragma unroll
    for (int r = 0; r < kAnchors; r++) {
      if (first + r >= n) continue;
      float x[kLaneColumns];
      load_products(x, a, first + r, column);
#pragma unroll
      for (int c = 0; c < kLaneColumns; c++) {
        // Selected: the products of left-out rows may be NaN.
        float product = here[r] && q_here[c] ? x[c] : 0.0f;
        x[c] =
            in_range(entry<false>(product, row[r], other[c]) * row[r].factor * other[c].factor, a.norm_limit);
      }
      store_entries(static_cast<T*>(a.h) + (first + r) * a.h_stride + column, x);
    }
  }
}

int blocks_of(int count, int size) { return (count + size - 1) / size; }

}  // namespace

void panel_log_sum_exp(const PanelArgs& args, Stream stream) {
  int64_t blocks = int64_t(blocks_of(args.stop - args.start, kRows)) * args.split;
  launch(panel_lse_kernel, blocks, kThreads, 0, stream, args);
}

void panel_entries(const PanelArgs& args, Stream stream) {
  int64_t blocks = int64_t(blocks_of(args.stop - args.start, kRows)) * blocks_of(args.q.slots, kBlockColumns);
  with_row_type(args.kind, [&](auto number) {
    launch(panel_entries_kernel<decltype(number)>, blocks, kThreads, 0, stream, args);
  });
}

}  // namespace nck
