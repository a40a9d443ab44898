// Device functions for the rows of an operand: row numbers, left-out rows, mask tags, vectors.
#pragma once

#include "args.h"
#include "primitives.h"

namespace nck {

inline constexpr float kLog2e = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;

NCK_DEVICE float infinity() { return bits_float(0x7f800000u); }

// The comparison propagates NaN, which fmaxf would not: rows with NaN must give NaN. In float16 (a large eps)
// summand_rnorm tells zero rows by an inverse norm that is larger than any other's.
NCK_DEVICE float inverse_norm(float square_sum, float eps) {
  if (eps > 1e-6f && square_sum == 0) return 1.000002f / eps;
  float norm = sqrtf(square_sum);
  return 1.0f / (norm < eps ? eps : norm);
}

// log2(0) = -inf; empty sums rely on it.
NCK_DEVICE float log2_of(float x) { return log2f(x); }

// The maximum to subtract: 0 for an empty set, where -inf - -inf would be NaN.
NCK_DEVICE float shift_of(float largest) { return largest == -infinity() ? 0.0f : largest; }

// Stored instead of the inverse norm of a left-out row.
inline constexpr float kNotFinite = -2.0f;
NCK_DEVICE float left_out(float square_sum) { return square_sum < infinity() ? -1.0f : kNotFinite; }

NCK_DEVICE int min_of(int a, int b) { return a < b ? a : b; }

NCK_DEVICE int used_slots(const Side& side) {
  return side.count ? min_of(int(*side.count), side.slots) : side.slots;
}

struct Slot {
  int64_t label;
  int row;
  bool summed;  // whether sums include the row
  bool here;    // whether the row is used at all: summed, or possibly a positive
};

NCK_DEVICE Slot slot_at(const Side& side, int slot, int used) {
  bool inside = slot < used;
  if (planted(Fault::kMissingTailMask)) inside = true;
  Slot s;
  // The tail reads as `skip`, so one comparison covers the tail and left-out rows.
  s.label = !inside ? side.skip : side.label ? side.label[slot] : slot;
  s.summed = inside && (!side.label || s.label != side.skip);
  // Not ">= 0": a row with NaN has an inverse norm of NaN, and is not left out.
  s.here = s.summed || (inside && side.unsummed && !(side.rnorm[slot] < 0.0f));
  s.row = side.gather ? (s.summed ? int(s.label) : 0) : slot;
  return s;
}

// Entries whose two sides have equal tags are excluded from the sums. Tags are labels for "same_label", any
// 64-bit integers, and row numbers for all other masks.
template <class Tag>
NCK_DEVICE Tag mask_tag(const Side& side, const Slot& s, Exclude exclude) {
  switch (exclude) {
    case Exclude::kNone:
      return side.samples ? Tag(-1) : Tag(-2);
    case Exclude::kTarget:
      return side.samples ? Tag(int(s.label)) : Tag(s.row);
    case Exclude::kSelf:
      return Tag(s.row);
    default:
      return Tag(s.label);
  }
}

// A tag that is equal for a sample and its positive prototype, and for no other pair.
NCK_DEVICE int partner_tag(const Side& side, const Slot& s, Exclude exclude) {
  return side.samples && exclude != Exclude::kSameLabel ? int(s.label) : s.row;
}

// The bias of the logits of a reduced row, in base 2; -inf for left-out rows.
NCK_DEVICE float summand_bias(const Side& side, const Slot& s) {
  if (!s.summed) return -infinity();
  return side.bias ? side.bias[s.row] * kLog2e : 0.0f;
}

NCK_DEVICE float rnorm_of(const Side& side, const Slot& s) { return s.here ? side.rnorm[s.row] : 0.0f; }

// The factors of P's and of Q's inverse norms in a logit in base 2, t = (p . q) (p_scale q_scale). The
// samples have beta, whether they are P or Q, so that a logit is the same number in both passes. Where a
// probability is near 1, and 1 is subtracted, one rounding would be an error. (Of features against
// themselves, P are the samples.)
struct Betas {
  float p, q;
};
NCK_DEVICE Betas betas_of(const Side& p, float beta) {
  beta *= kLog2e;
  return p.samples ? Betas{beta, 1.0f} : Betas{1.0f, beta};
}

struct Upstream {
  float lse;  // in base 2
  float grad;
};

// A natural log-sum-exp in base 2. An empty set has -inf, and its result is +inf, so that every exp(t - lse)
// is zero (-inf would give inf or NaN).
NCK_DEVICE float in_base_2(float lse) { return lse == -infinity() ? infinity() : lse * kLog2e; }

// A row's log-sum-exp and its gradient, times the ratio of `store_log_sum`, without a contribution from empty
// sets.
NCK_DEVICE Upstream upstream_of(const Side& side, const Slot& s) {
  Upstream u{infinity(), 0.0f};
  if (side.grad && s.summed) {
    float lse = in_base_2(side.lse[s.row]);
    if (lse != infinity()) u = {lse, side.grad[s.row] * (side.ratio ? side.ratio[s.row] : 1.0f)};
  }
  return u;
}

// The factor of a row that is summed up: its inverse norm, except 1 for float16 rows of zeros. Their
// 1 / eps = 16384 would push the other entries out of float16's range, and adds nothing to a sum.
// `finish` applies the true factor to the row's own gradient.
NCK_DEVICE float summand_rnorm(float rnorm, float norm_limit) {
  return norm_limit > 0 && rnorm >= norm_limit ? 1.0f : rnorm;
}

// Float16: entries of two rows shorter than eps can exceed the range. Room for them would leave none for
// others.
NCK_DEVICE float in_range(float h, float norm_limit) {
  if (norm_limit > 0 && h > 65504.0f) return 65504.0f;
  return norm_limit > 0 && h < -65504.0f ? -65504.0f : h;
}

// The multiple of a row x to subtract from its sum, (u . acc) r, given along = x . acc. It is 0 for rows
// shorter than eps, which are divided by a constant; the comparison tolerates the rounding of two
// reciprocals.
NCK_DEVICE float radial(float rnorm, float along, float eps) {
  return rnorm >= 0.999999f / eps ? 0.0f : rnorm * rnorm * along;
}

}  // namespace nck
