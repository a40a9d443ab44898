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

// Empty: -inf + log2(0) = -inf.
NCK_DEVICE float log_sum(Pair pair) { return (pair.largest + log2_of(pair.total)) * kLn2; }

// The vectors of the rows of a Q tile.
template <class Tag, int kRows>
struct Columns {
  float rnorm[kRows];
  float bias[kRows];
  Tag tag[kRows];

  NCK_DEVICE void set(int c, const Side& side, const Slot& s, Exclude exclude) {
    rnorm[c] = rnorm_of(side, s);
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
    if (s.summed || !a.p.gather) a.out[s.row] = log_sum(pair);
  } else {
    int64_t at = int64_t(part) * a.p.slots + slot;
    a.p_max[at] = pair.largest;
    a.p_sum[at] = pair.total;
  }
}

}  // namespace nck
