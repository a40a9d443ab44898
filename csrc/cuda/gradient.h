// The entries of the gradient with respect to the logits, shared by the two methods below.
//
// With A = dL/dt for the logits t = beta S and u = r p a normalised row,
//
//   A_pq  = g_p exp(t_pq + bias_q - lse_p)      the anchors' own log-sum-exp runs over q
//         + g_q exp(t_pq + bias_p - lse_q)      the other direction: q's log-sum-exp runs over p
//         + g_pos where (p, q) is a positive pair, which is never masked
//   a_p   = sum_q A_pq r_q q                    a matrix product with the unnormalised rows
//   dL/dp = beta r_p (a_p - (u_p . a_p) u_p)    the second term is the derivative of the norm
//   dL/dbeta = sum_p u_p . a_p                  the same dot products
//
// Where features are compared with themselves, S is symmetric. Their gradient, as rows and as columns, comes
// from A + A^T, whose entries have the wanted log-sum-exp on either side:
//
//   T_ij  = g_i exp(t_ij + bias_j - lse_i) + g_j exp(t_ij + bias_i - lse_j)  + both sides' g_pos
//
// One pass over these entries replaces two. It counts every pair twice, so it gives twice dL/dbeta.
//
// * short_grad.cu, for short rows: recompute a tile, multiply it with the Q rows that are on the chip anyway.
// * entries.cu, for long rows, whose gradient does not fit on the chip: write H = A r_p r_q for a panel, let
//   the library's matrix product do H Q and H^T P, then finish.cu.
#pragma once

#include <type_traits>

#include "formats.h"

namespace nck {

// The log-sum-exps in the entries: that of one side; one of each side; or one that both sides share, because
// they are the same rows.
enum class Sums { kOne, kEach, kShared };

// Calls f with an integral_constant of the sums.
template <class F>
void with_sums(const Side& p, const Side& q, F f) {
  if (p.samples && q.samples) return f(std::integral_constant<Sums, Sums::kShared>{});
  if (p.grad && q.grad) return f(std::integral_constant<Sums, Sums::kEach>{});
  return f(std::integral_constant<Sums, Sums::kOne>{});
}

// The terms of a row in its entries, in base 2; `entry` combines them.
template <class Tag, Sums kSums>
struct Terms {
  float scale;   // see Betas
  float factor;  // of its entries in the matrix products
  float add, times;
  float bias;
  float pos;
  int partner;
  Tag tag;
};

template <class Tag>
struct Terms<Tag, Sums::kOne> {
  float scale, factor;
  float add, times;
  float pos;
  int partner;
  Tag tag;
};

// `other_has_grad`: whether the opposite side's log-sum-exp has an upstream gradient. `once`: for
// entry<true>. `of_gradients`: a factor of upstream gradients, which comes before all others: an inverse norm
// can be 1e12.
template <class Tag, Sums kSums>
NCK_DEVICE Terms<Tag, kSums> terms_of(const Side& side, const Slot& s, float beta, bool other_has_grad,
                                      bool once, Exclude exclude, float norm_limit, float of_gradients) {
  Terms<Tag, kSums> terms;
  float rnorm = rnorm_of(side, s);
  terms.scale = rnorm * beta;
  terms.factor = summand_rnorm(rnorm, norm_limit);
  Upstream up = upstream_of(side, s);
  up.grad *= of_gradients;
  if constexpr (kSums != Sums::kOne) {
    terms.add = -up.lse;
    terms.times = up.grad;
    terms.bias = summand_bias(side, s);
    if (once) {
      terms.times = up.grad * exp2_fast(-up.lse);
      terms.bias = s.summed ? 1.0f : 0.0f;
    }
  } else if (side.grad) {
    terms.add = -up.lse;
    terms.times = up.grad;
  } else {
    // The log-sum-exps of the other side, if they have a gradient, sum over this row. If they have none, -inf
    // removes all rows, as it removes left-out rows: 0 times an exponential of any size could be NaN.
    terms.add = other_has_grad ? summand_bias(side, s) : -infinity();
    terms.times = other_has_grad ? 1.0f : 0.0f;
  }
  terms.pos = side.pos && s.summed ? side.pos[s.row] * of_gradients : 0.0f;
  terms.partner = partner_tag(side, s, exclude);
  terms.tag = mask_tag<Tag>(side, s, exclude);
  return terms;
}

// The row number: the tag under the mask "self", `partner` under "same_label".
template <class Tag>
NCK_DEVICE int row_of(const Terms<Tag, Sums::kShared>& terms) {
  if constexpr (sizeof(Tag) == sizeof(int)) {
    return terms.tag;
  } else {
    return terms.partner;
  }
}

// A_pq from the product of the two rows. With kOne one side has a log-sum-exp; the other side's `add` is a
// bias and its `times` is 1. kOnce (with kShared) computes g_p exp(t - lse_p) + g_q exp(t - lse_q) with one
// exponential, as exp(t) (g_p exp(-lse_p) + g_q exp(-lse_q)); then `times` is g exp(-lse), and `bias` is 1
// for rows that are summed over, else 0.
// kOfQ (with kOne): Q is the side with the log-sum-exp, which is subtracted from a logit that has been
// rounded, as in the forward pass; see Betas.
template <bool kOnce, bool kOfQ = false, class Tag, Sums kSums>
NCK_DEVICE float entry(float product, const Terms<Tag, kSums>& p, const Terms<Tag, kSums>& q) {
  float scale = p.scale * q.scale, a;
  if constexpr (kOnce) {
    a = exp2_fast(product * scale) * fmaf(p.times, q.bias, p.bias * q.times);
  } else if constexpr (kSums != Sums::kOne) {
    a = p.times * exp2_fast(fmaf(product, scale, q.bias) + p.add);
    a = fmaf(q.times, exp2_fast(fmaf(product, scale, p.bias) + q.add), a);
  } else {
    a = p.times * q.times * exp2_fast(fmaf(product, scale, kOfQ ? p.add : q.add) + (kOfQ ? q.add : p.add));
  }
  // Selected, not multiplied by 0: a masked entry can have any value, inf included.
  if (p.tag == q.tag) a = 0.0f;
  if constexpr (kSums == Sums::kShared) {
    // Each row can be the positive of the other.
    if (p.partner == row_of(q)) a += p.pos;
    if (row_of(p) == q.partner) a += q.pos;
  } else {
    if (p.partner == q.partner) a += p.pos + q.pos;
  }
  return a;
}

}  // namespace nck
