// Samples of the same label: the positives of the supervised contrastive loss.
//
// With unit rows u, n samples of a label and their sum m, the mean cosine of sample j with the n - 1 others
// is
//     pos_j = u_j . (m - u_j) / (n - 1),
// O(M d) for all pairs; and with shares s of the samples and a_j = s_j / (n - 1), the gradient of
// sum_j s_j pos_j by u_j is  a_j (m - u_j) + sum_{others l} a_l u_l.
#pragma once

#include <optional>

#include "norms.hpp"

namespace nckernels {
template <class T>
class SameLabel {
 public:
  SameLabel(const Problem& p, const Columns& columns)
      : p_(p), z_(p.z, p.z_stride, p.d, p.half), rnorm_(static_cast<const T*>(p.z_rnorm)), group_(p.m, -1) {
    std::vector<int64_t> order;
    for (int64_t j = 0; j < p.m; j++)
      if (columns.positive[j] >= 0) order.push_back(j);
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return p.target[a] < p.target[b]; });
    for (size_t i = 0, end = 0; i < order.size(); i = end) {
      while (end < order.size() && p.target[order[end]] == p.target[order[i]]) end++;
      if (end - i < 2) continue;
      for (size_t x = i; x < end; x++) group_[order[x]] = static_cast<int64_t>(others_.size());
      others_.push_back(static_cast<T>(end - i - 1));
    }
  }

  bool any(int64_t j) const { return group_[j] >= 0; }

  // The other sample of each sample's label, or the sample itself without one; empty if a label has more than
  // two samples.
  std::vector<int64_t> partners() const {
    for (T others : others_)
      if (others != 1) return {};
    std::vector<int64_t> first(others_.size(), -1), partner(p_.m);
    for (int64_t j = 0; j < p_.m; j++) {
      partner[j] = j;
      if (!any(j)) continue;
      int64_t& other = first[group_[j]];
      if (other >= 0) partner[j] = other, partner[other] = j;
      other = j;
    }
    return partner;
  }

  // The group of a sample, -1 if it has no other samples, and the derivative of the weighted sum by the
  // cosine of the sample with another one, from the sample's own term.
  int64_t group(int64_t j) const { return group_[j]; }
  T weight(int64_t j) const { return share_[j] / others_[group_[j]]; }

  // Computes the sums of the groups; the norms are known. `share` is per sample, `even` if it is the same for
  // all samples of a group.
  void add_up(const T* share, bool even) {
    share_ = share;
    add_up(sums_, [&](int64_t j) { return double(rnorm_[j]); });
    if (!even) add_up(weighted_, [&](int64_t j) { return double(rnorm_[j]) * weight(j); });
  }

  // The mean cosine of a sample with the others of its group, which has some.
  T mean(int64_t j, T* line, T* rest) {
    const T *z = z_.get(j, line), *sum = *sums_ + group_[j] * p_.d;
    for (int64_t i = 0; i < p_.d; i++) rest[i] = sum[i] - rnorm_[j] * z[i];
    return dot(z, rest, p_.d) * rnorm_[j] / others_[group_[j]];
  }

  void subtract_gradient(int64_t j, const T* z, T* x) {
    if (!any(j)) return;
    const int64_t at = group_[j] * p_.d;
    const T a = weight(j), r = rnorm_[j];
    const T *sum = *sums_ + at, *weighted = weighted_ ? *weighted_ + at : nullptr;
    for (int64_t i = 0; i < p_.d; i++) {
      const T own = a * (sum[i] - r * z[i]);
      x[i] -= own + (weighted ? weighted[i] - a * r * z[i] : own);
    }
  }

 private:
  // The sum of factor(j) z_j in each group, a cache line of features at a time, in double.
  template <class F>
  void add_up(std::optional<Buffer<T>>& out, F&& factor) {
    constexpr int64_t step = 64 / sizeof(T);
    const int64_t groups = static_cast<int64_t>(others_.size());
    T* sums = out.emplace(groups * p_.d);
    parallel(p_.threads, (p_.d + step - 1) / step, [&](int64_t s) {
      const int64_t first = s * step, n = std::min(step, p_.d - first);
      Buffer<double> total(groups * n);
      std::fill_n(static_cast<double*>(total), groups * n, 0.0);
      T line[step];
      for (int64_t j = 0; j < p_.m; j++) {
        if (!any(j)) continue;
        const T* z = z_.get(j, first, n, line);
        double *to = total + group_[j] * n, f = factor(j);
        for (int64_t i = 0; i < n; i++) to[i] += f * z[i];
      }
      for (int64_t g = 0; g < groups; g++) std::copy_n(total + g * n, n, sums + g * p_.d + first);
    });
  }

  const Problem& p_;
  Rows<T> z_;
  const T *rnorm_, *share_ = nullptr;
  std::vector<int64_t> group_;                // per sample; -1: no others
  std::vector<T> others_;                     // per group: its size less one
  std::optional<Buffer<T>> sums_, weighted_;  // (groups, d); the latter only where shares are not even
};

}  // namespace nckernels
