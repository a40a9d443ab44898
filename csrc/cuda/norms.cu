// Row norms, positives, and the list of classes that occur: everything that is O(M d) or O(K).
//
// The similarity of two rows is (z . w) r_z r_w with r = 1 / max(|row|, eps). Storing the two vectors r
// instead of normalised copies of the matrices saves a write and a read of both, and the tensor cores
// multiply the caller's numbers without rounding.

#include "vectors.h"

namespace nck {
namespace {

constexpr int kThreads = 256;

// The sum of squares of the team's row of x, by all lanes, idle ones too: a shuffle needs the whole warp.
template <class T>
NCK_DEVICE float square_sum(const RowTeam& team, const void* x, int64_t stride, int rows, int d) {
  const T* row = static_cast<const T*>(x) + team.row * stride;
  bool aligned = rows_aligned<T>(x, stride);
  float total = 0.0f;
  if (team.row < rows) {
    for (int c = team.column; c < d; c += team.step) {
      float x8[8];
      load8(x8, row, c, d, aligned);
#pragma unroll
      for (int i = 0; i < 8; i++) total = fmaf(x8[i], x8[i], total);
    }
  }
  return team.sum(total);
}

template <class T>
NCK_KERNEL(kThreads, 4)
row_rnorm_kernel(const __grid_constant__ NormArgs a) {
  RowTeam team = RowTeam::of(a.d, kThreads);
  float square = square_sum<T>(team, a.x, a.stride, a.rows, a.d);
  if (team.row >= a.rows || team.column != 0) return;
  bool valid = !a.label || a.label[team.row] != a.skip;
  a.rnorm[team.row] = valid ? inverse_norm(square, a.eps) : left_out(square);
}

// What a sample and its positive prototype, row `partner`, have in common. The partner's norm comes from the
// same loads, so that no pass over the prototypes is needed first.
struct Pair {
  float z_square, z_rnorm, w_rnorm, logit;
};

// Args: PrepareArgs or PrepareStepArgs. Without a partner (`valid`) only the sample's square is of use.
template <class T, class Args>
NCK_DEVICE Pair with_partner(const RowTeam& team, const Args& a, int64_t partner, bool valid, float beta) {
  const T* z_row = static_cast<const T*>(a.z) + team.row * a.z_stride;
  const T* w_row = static_cast<const T*>(a.w) + partner * a.w_stride;
  bool z_aligned = rows_aligned<T>(a.z, a.z_stride), w_aligned = rows_aligned<T>(a.w, a.w_stride);
  float zz = 0.0f, ww = 0.0f, zw = 0.0f;
  if (team.row < a.m) {
    for (int c = team.column; c < a.d; c += team.step) {
      float z[8], w[8] = {};
      load8(z, z_row, c, a.d, z_aligned);
      if (valid) load8(w, w_row, c, a.d, w_aligned);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        zz = fmaf(z[i], z[i], zz);
        ww = fmaf(w[i], w[i], ww);
        zw = fmaf(z[i], w[i], zw);
      }
    }
  }
  zz = team.sum(zz);
  ww = team.sum(ww);
  zw = team.sum(zw);
  float z_rnorm = inverse_norm(zz, a.eps), w_rnorm = inverse_norm(ww, a.eps);
  return {zz, z_rnorm, w_rnorm, zw * (z_rnorm * (beta * kLog2e) * w_rnorm) * kLn2};
}

// All threads that write to one place write the same mark or norm, so their order does not matter.
template <class T>
NCK_KERNEL(kThreads, 3)
prepare_samples_kernel(const __grid_constant__ PrepareArgs a) {
  RowTeam team = RowTeam::of(a.d, kThreads);
  bool inside = team.row < a.m;
  int64_t target = inside ? a.target[team.row] : a.skip;
  // Targets out of range are reported elsewhere; here they must only not be used as an index.
  bool valid = target != a.skip && (a.same_label || (target >= 0 && target < a.k));
  int64_t partner = !valid ? 0 : a.same_label ? team.row : target;
  Pair pair = with_partner<T>(team, a, partner, valid, *a.beta);
  if (inside && team.column == 0) {
    a.z_rnorm[team.row] = valid ? pair.z_rnorm : left_out(pair.z_square);
    a.pos[team.row] = valid ? pair.logit : 0.0f;
    if (a.mark && valid) store_relaxed(a.mark + partner, partner);
    if (a.w_rnorm && valid) {
      store_relaxed(a.w_rnorm + partner, pair.w_rnorm);
      if (a.itself) store_relaxed(a.w_rnorm + team.row, pair.z_rnorm);
    }
  }
}

// A power of two that brings a positive number to between 1 and 2; 1 for others.
NCK_DEVICE float power_of(float size) {
  if (!(size > 0 && size < infinity())) size = 1.0f;
  return exp2f(-floorf(fminf(fmaxf(log2f(size), -126.0f), 126.0f)));
}

// The divisors of a mean: [0] of its gradients and [1] of its sum. The gradients' entries are multiplied by
// [2], a power of two, and [0] is what remains: between 1 and 2. Without it the entries of tiny weights would
// underflow, multiplied by the inverse norms of long rows. If all samples are ignored, the gradients are 0,
// and the mean is NaN, or 0 with `nothing_is_zero`.
NCK_DEVICE void write_divisors(const PrepareStepArgs& a, float* scratch) {
  float sum = 0.0f, found = 0.0f;
#pragma unroll 4
  for (int i = int(threadIdx.x); i < a.m; i += kThreads) {
    int64_t target = a.target[i];
    bool valid = target != a.skip && target >= 0 && target < a.k;
    sum += !valid ? 0.0f : a.weight ? a.weight[i] : 1.0f;
    if (valid) found = 1.0f;
  }
  sum = block_sum<kThreads>(sum, scratch);
  found = block_max<kThreads>(found, scratch);
  if (a.nothing_is_zero && sum == 0.0f) sum = 1.0f;
  if (threadIdx.x == 0) {
    float of_gradients = found == 0.0f ? 1.0f : sum, factor = power_of(of_gradients);
    a.divisor[0] = of_gradients * factor;
    a.divisor[1] = sum;
    a.divisor[2] = factor;
  }
}

template <class T>
NCK_DEVICE void prepare_sample(const PrepareStepArgs& a, const RowTeam& team, float beta) {
  bool inside = team.row < a.m;
  int64_t target = inside ? a.target[team.row] : a.skip;
  bool valid = target != a.skip && target >= 0 && target < a.k;
  int64_t partner = valid ? target : 0;
  Pair pair = with_partner<T>(team, a, partner, valid, beta);
  if (!inside || team.column != 0) return;
  float share = !valid ? 0.0f : a.weight ? a.weight[team.row] : 1.0f;
  a.z_rnorm[team.row] = valid ? pair.z_rnorm : left_out(pair.z_square);
  a.pos[team.row] = valid ? pair.logit : 0.0f;
  a.share[team.row] = share;
  a.pos_grad[team.row] = -share;
  if (a.half_share) a.half_share[team.row] = share *= 0.5f;
  if (!valid) {
    if (!(pair.z_square < infinity())) store_relaxed(a.z_broken, 1.0f);
    return;
  }
  if (a.mark) {
    store_relaxed(a.mark + partner, int64_t(1));
    store_relaxed(a.w_rnorm + partner, pair.w_rnorm);
  }
  if (a.of_class) add_relaxed(a.of_class + partner, share);
}

template <class T>
NCK_DEVICE void prepare_class(const PrepareStepArgs& a, const RowTeam& team) {
  float square = square_sum<T>(team, a.w, a.w_stride, a.k, a.d);
  if (team.row >= a.k || team.column != 0) return;
  if (!a.mark) a.w_rnorm[team.row] = inverse_norm(square, a.eps);
  if (a.w_broken && !(square < infinity())) store_relaxed(a.w_broken, 1.0f);
}

// Block 0 writes what is one number. The next blocks take the samples. Further blocks, if any, read the
// prototypes: for `w_broken`, or without `mark` for the norms of all classes.
template <class T>
NCK_KERNEL(kThreads, 3)
prepare_step_kernel(const __grid_constant__ PrepareStepArgs a) {
  SharedArena arena;
  float* scratch = arena.take<float>(32);
  const float beta = a.beta ? *a.beta : a.host_beta;
  const int block = int(blockIdx.x) - 1;
  RowTeam team = RowTeam::of(a.d, kThreads, block);
  const int rows = kThreads / team.lanes, sample_blocks = (a.m + rows - 1) / rows;
  if (block < 0) {
    if (threadIdx.x == 0) *a.own_beta = beta;
    if (a.divisor) write_divisors(a, scratch);
  } else if (block < sample_blocks) {
    prepare_sample<T>(a, team, beta);
  } else {
    team.row -= int64_t(sample_blocks) * rows;
    prepare_class<T>(a, team);
  }
}

NCK_KERNEL(kThreads, 4) compact_kernel(const __grid_constant__ CompactArgs a) {
  int c = int(blockIdx.x) * kThreads + int(threadIdx.x);
  int64_t count = a.rank[a.k - 1];
  // The two stores do not overlap: marked classes go to slots before `count`, the padding to those after.
  if (c < a.k && a.rank[c] != (c > 0 ? a.rank[c - 1] : 0)) a.list[a.rank[c] - 1] = c;
  if (c >= count && c < a.slots) a.list[c] = -1;
  if (c == 0) a.list[a.slots] = count;
}

constexpr int kScaleThreads = 1024;

// max |x|, without empty sets (lse = -inf), infinities and NaN.
NCK_DEVICE float largest(const float* x, const float* lse, int n) {
  float best = 0.0f;
  for (int i = int(threadIdx.x); x && i < n; i += kScaleThreads) {
    float value = fabsf(x[i]);
    if (value < infinity() && (!lse || lse[i] > -infinity())) best = fmaxf(best, value);
  }
  return best;
}

// The largest factor of a row's entries, see summand_rnorm, without left-out rows (negative norms).
NCK_DEVICE float largest_rnorm(const float* x, int n, float limit) {
  float best = 0.0f;
  for (int i = int(threadIdx.x); i < n; i += kScaleThreads) {
    float factor = x[i] < limit ? x[i] : x[i] >= limit ? 1.0f : 0.0f;
    best = fmaxf(best, factor);
  }
  return best;
}

// The entries A r of the gradient's tiles are of the size of the upstream gradients, usually 1 / M, times a
// softmax probability, and would underflow in float16. No entry of A exceeds the sum of the largest upstream
// gradients. With the largest inverse norms, these scales therefore bring every A r to at most 2^14, a
// quarter of float16's range (2^15 where two samples are each other's positives). Zero rows (r >= limit)
// count as 1. [2] leaves out the entries of two rows shorter than eps, see in_range. Runs as one thread
// block.
NCK_KERNEL(kScaleThreads, 1) half_scale_kernel(const __grid_constant__ HalfScaleArgs a) {
  SharedArena arena;
  float* scratch = arena.take<float>(kScaleThreads / 32);
  float bound = block_max<kScaleThreads>(largest(a.class_grad, a.class_lse, a.k), scratch);
  bound += block_max<kScaleThreads>(largest(a.instance_grad, a.instance_lse, a.m), scratch);
  bound += block_max<kScaleThreads>(largest(a.pos_grad, nullptr, a.m), scratch);
  float z = block_max<kScaleThreads>(largest_rnorm(a.z_rnorm, a.m, a.limit), scratch);
  float w = block_max<kScaleThreads>(largest_rnorm(a.w_rnorm, a.k, a.limit), scratch);
  float short_rows = 0.999998f * a.limit;
  float rest_z = block_max<kScaleThreads>(largest_rnorm(a.z_rnorm, a.m, short_rows), scratch);
  float rest_w = block_max<kScaleThreads>(largest_rnorm(a.w_rnorm, a.k, short_rows), scratch);
  if (threadIdx.x == 0) {
    if (a.divisor) bound *= a.divisor[2];
    // For upstream gradients of zero any finite scale is correct. The clamp keeps the scale finite.
    float top = 14.0f - log2f(bound > 0 ? bound : 1.0f);
    float z_bits = log2f(z > 0 ? z : 1.0f), w_bits = log2f(w > 0 ? w : 1.0f);
    float both =
        fmaxf(z_bits + log2f(rest_w > 0 ? rest_w : 1.0f), log2f(rest_z > 0 ? rest_z : 1.0f) + w_bits);
    float exponent[3] = {top - w_bits, top - z_bits, top - both};
    for (int i = 0; i < 3; i++) a.scale[i] = exp2f(fminf(fmaxf(floorf(exponent[i]), -100.0f), 100.0f));
  }
}

}  // namespace

void row_rnorm(const NormArgs& args, Stream stream) {
  int rows = rows_per_block(args.d, kThreads);
  with_row_type(args.kind, [&](auto number) {
    launch(row_rnorm_kernel<decltype(number)>, (args.rows + rows - 1) / rows, kThreads, 0, stream, args);
  });
}

void prepare_samples(const PrepareArgs& args, Stream stream) {
  int rows = rows_per_block(args.d, kThreads);
  with_row_type(args.kind, [&](auto number) {
    launch(prepare_samples_kernel<decltype(number)>, (args.m + rows - 1) / rows, kThreads, 0, stream, args);
  });
}

void prepare_step(const PrepareStepArgs& args, Stream stream) {
  int rows = rows_per_block(args.d, kThreads);
  int of_samples = (args.m + rows - 1) / rows, of_classes = (args.k + rows - 1) / rows;
  if (args.mark && !args.w_broken) of_classes = 0;
  with_row_type(args.kind, [&](auto number) {
    launch(prepare_step_kernel<decltype(number)>, 1 + of_samples + of_classes, kThreads, 32 * sizeof(float),
           stream, args);
  });
}

void compact(const CompactArgs& args, Stream stream) {
  launch(compact_kernel, (args.k + kThreads - 1) / kThreads, kThreads, 0, stream, args);
}

void half_scale(const HalfScaleArgs& args, Stream stream) {
  launch(half_scale_kernel, 1, kScaleThreads, kScaleThreads / 32 * sizeof(float), stream, args);
}

}  // namespace nck
