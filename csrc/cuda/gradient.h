// The entries of the gradient with respect to the logits, shared by the two ways to use them.
//
// With A = dL/dt for the logits t = beta S and u = r p a normalised row,
//
//   A_pq  = g_p exp(t_pq + bias_q - lse_p)      the anchors' own log-sum-exp runs over q
//         + g_q exp(t_pq + bias_p - lse_q)      the other direction: q's log-sum-exp runs over p
//         + g_pos where (p, q) is a positive pair, which is never masked
//   a_p   = sum_q A_pq r_q q                    a matrix product on the raw rows
//   dL/dp = beta r_p (a_p - (u_p . a_p) u_p)    the second term is the derivative of the norm
//   dL/dbeta = sum_p u_p . a_p                  the same dot products
//
// * short_grad.cu, for short rows: recompute a tile, multiply it with the Q rows that are on the chip anyway.
// * entries.cu, for long rows, whose gradient does not fit on the chip: write H = A r_p r_q for a panel, let
//   the library's matrix product do H Q and H^T P, then finish.cu.
#pragma once

#include "formats.h"

namespace nck {

// What a row brings to its entries. In units of base-2 logits; see Entry for how they are combined.
template <class Tag, bool kBoth>
struct Terms;

template <class Tag>
struct Terms<Tag, false> {
  float rnorm;   // for P times beta log2 e
  float factor;  // what its entries are multiplied with for the matrix products
  float add, times;
  float pos;
  int partner;
  Tag tag;
};

template <class Tag>
struct Terms<Tag, true> {
  float rnorm, factor;
  float add, times;
  float bias;
  float pos;
  int partner;
  Tag tag;
};

// `other_has_grad`: whether the opposite side's log-sum-exp has an upstream gradient.
template <class Tag, bool kBoth>
NCK_DEVICE Terms<Tag, kBoth> terms_of(const Side& side, const Slot& s, bool other_has_grad, Exclude exclude,
                                      float norm_limit) {
  Terms<Tag, kBoth> terms;
  terms.rnorm = rnorm_of(side, s);
  terms.factor = summand_rnorm(terms.rnorm, norm_limit);
  Upstream up = upstream_of(side, s);
  if constexpr (kBoth) {
    terms.add = -up.lse;
    terms.times = up.grad;
    terms.bias = summand_bias(side, s);
  } else if (side.grad) {
    terms.add = -up.lse;
    terms.times = up.grad;
  } else {
    // Summed over by the other side, if that has a gradient. 2^-inf removes rows that are left out.
    terms.add = summand_bias(side, s);
    terms.times = other_has_grad ? 1.0f : 0.0f;
  }
  terms.pos = side.pos && s.summed ? side.pos[s.row] : 0.0f;
  terms.partner = partner_tag(side, s, exclude);
  terms.tag = mask_tag<Tag>(side, s, exclude);
  return terms;
}

// A_pq from the product of the two rows. With kBoth each side has a log-sum-exp; else one has, and the other
// side's `add` is a bias and its `times` is 1.
template <class Tag, bool kBoth>
NCK_DEVICE float entry(float product, const Terms<Tag, kBoth>& p, const Terms<Tag, kBoth>& q) {
  float s = product * p.rnorm, a;
  if constexpr (kBoth) {
    a = p.times * exp2_fast(fmaf(s, q.rnorm, q.bias) + p.add);
    a = fmaf(q.times, exp2_fast(fmaf(s, q.rnorm, p.bias) + q.add), a);
  } else {
    a = p.times * q.times * exp2_fast(fmaf(s, q.rnorm, q.add) + p.add);
  }
  // Selected, not multiplied by 0: a masked entry can be any size, inf included.
  if (p.tag == q.tag) a = 0.0f;
  if (p.partner == q.partner) a += p.pos + q.pos;
  return a;
}

}  // namespace nck
