// The log-sum-exp of a set of logits as a pair: the largest logit, and the sum of exponentials relative to
// it.
//
// The pair works for any temperature. In a sum relative to the constant beta >= t every term could underflow,
// for example with beta = 1000.
#pragma once

#include "operands.h"

namespace nck {

// Logits in base 2: the sum is of 2^(logit - largest).
struct Pair {
  float largest, total;
};

NCK_DEVICE Pair empty_pair() { return {-infinity(), 0.0f}; }

NCK_DEVICE Pair join(Pair a, Pair b) {
  float largest = fmaxf(a.largest, b.largest), shift = shift_of(largest);
  return {largest, a.total * exp2_fast(a.largest - shift) + b.total * exp2_fast(b.largest - shift)};
}

NCK_DEVICE Pair join_lanes(Pair pair, int mask) {
  return join(pair, {shfl_xor(pair.largest, mask), shfl_xor(pair.total, mask)});
}

// out[at], the natural log-sum-exp, and ratio[at] = exp(out[at]) / sum of the exponentials, if not null. The
// ratio is 1 but for the rounding of `out`, which is an error of every probability exp(t - lse). It would
// matter where a probability is near 1, and 1 is subtracted. The backward pass multiplies by the ratio.
NCK_DEVICE void store_log_sum(float* out, float* ratio, int64_t at, Pair pair) {
  float lse = (pair.largest + log2_of(pair.total)) * kLn2;  // empty: -inf + log2(0) = -inf
  out[at] = lse;
  if (ratio) ratio[at] = 1.0f / (pair.total * exp2_fast(pair.largest - in_base_2(lse)));
}

// The vectors of the rows of a Q tile.
template <class Tag, int kRows>
struct Columns {
  float scale[kRows];  // see Betas
  float bias[kRows];
  Tag tag[kRows];

  NCK_DEVICE void set(int c, const Side& side, const Slot& s, float beta, Exclude exclude) {
    scale[c] = rnorm_of(side, s) * beta;
    bias[c] = summand_bias(side, s);
    tag[c] = mask_tag<Tag>(side, s, exclude);
  }
};

// Stores an anchor's result into `out`, or as one of `split` partials.
NCK_DEVICE void store_result(const LseArgs& a, int part, int slot, int used, Pair pair) {
  Slot s = slot_at(a.p, slot, used);
  // The sums of left-out rows are discarded.
  if (!s.summed) pair = empty_pair();
  if (a.out) {
    if (s.summed || !a.p.gather) store_log_sum(a.out, a.ratio, s.row, pair);
  } else {
    int64_t at = int64_t(part) * a.p.slots + slot;
    a.p_max[at] = pair.largest;
    a.p_sum[at] = pair.total;
  }
}

}  // namespace nck
