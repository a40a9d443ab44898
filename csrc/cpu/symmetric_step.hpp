// The supervised contrastive loss and its gradient, in one call or in two, see problem.hpp.
#pragma once

#include "reduction.hpp"
#include "symmetric_backward.hpp"
#include "symmetric_forward.hpp"

namespace nckernels {
template <class G>
class SymmetricStep {
  using T = typename G::T;

 public:
  SymmetricStep(const Problem& p, const Columns& columns, const Step& step)
      : p_(p),
        columns_(columns),
        step_(step),
        lse_(p.pos ? 0 : p.m),
        pos_(p.pos ? 0 : p.m),
        rnorm_(p.pos ? 0 : 2 * p.m),
        share_(p.m),
        kept_(p.pos ? 0
                    : std::min<int64_t>((p.m + TALLEST) * (p.m / 2 + TALLEST + 2 * G::NR),
                                        p.workspace / 2 / static_cast<int64_t>(sizeof(T)))) {
    if (p.pos) return;
    p_.class_lse = p_.instance_lse = lse_;
    p_.pos = pos_;
    p_.z_rnorm = rnorm_;
    p_.w_rnorm = rnorm_ + p.m;
    p_.kept = kept_;
    p_.kept_size = kept_.size();
  }

  void run() {
    SymmetricForward<G>(p_, columns_).run();
    if (step_.joined)
      all_in_one();
    else
      with_positives();
  }

  void losses() {
    SymmetricForward<G>(p_, columns_).run();
    SameLabel<T> positives(p_, columns_);
    const Reduction<T> reduction(p_, step_);
    positives.add_up(nullptr, true);
    find_positives(positives);
    for (int64_t j = 0; j < p_.m; j++)
      static_cast<T*>(step_.loss)[j] = static_cast<T>(weighted(positives, reduction, j));
  }

  void resume() { with_positives(); }

 private:
  // The loss is the logarithm of the sum over all pairs; each sample's share of the sum is its upstream
  // gradient.
  void all_in_one() {
    double top = minus_infinity<double>, total = 0;
    for (int64_t j = 0; j < p_.m; j++) top = std::max(top, double(lse(j)));
    for (int64_t j = 0; j < p_.m; j++) total += std::exp(double(lse(j)) - top);
    const double whole = top + std::log(total);
    for (int64_t j = 0; j < p_.m; j++) share_[j] = static_cast<T>(std::exp(double(lse(j)) - whole));
    *static_cast<T*>(step_.loss) = static_cast<T>(whole);
    go_back(nullptr);
  }

  // The gradient, and the loss unless `losses` has computed it.
  void with_positives() {
    SameLabel<T> positives(p_, columns_);
    Reduction<T> reduction(p_, step_);
    for (int64_t j = 0; j < p_.m; j++)
      if (positives.any(j)) reduction.count(j);
    const double scale = reduction.scale();
    for (int64_t j = 0; j < p_.m; j++)
      share_[j] = positives.any(j) ? static_cast<T>(reduction.weight(j) * scale) : T(0);
    positives.add_up(share_, !step_.weight);
    if (step_.loss) {
      find_positives(positives);
      double sum = 0;
      for (int64_t j = 0; j < p_.m; j++) sum += weighted(positives, reduction, j);
      *static_cast<T*>(step_.loss) = static_cast<T>(reduction.result(sum));
    }
    go_back(&positives);
    if (step_.z || !step_.beta) return;
    // Without a gradient of the features, positives have not been added to dL/dbeta yet.
    for (int64_t j = 0; j < p_.m; j++) *step_.beta -= double(share_[j]) * static_cast<const T*>(p_.pos)[j];
  }

  T lse(int64_t j) const { return static_cast<const T*>(p_.by_class ? p_.class_lse : p_.instance_lse)[j]; }

  // The mean cosine of each sample with the others of its label.
  void find_positives(SameLabel<T>& positives) {
    constexpr int64_t block = 64;
    parallel(p_.threads, (p_.m + block - 1) / block, [&](int64_t b) {
      Buffer<T> line(p_.d), rest(p_.d);
      for (int64_t j = b * block; j < std::min(p_.m, (b + 1) * block); j++)
        static_cast<T*>(p_.pos)[j] = positives.any(j) ? positives.mean(j, line, rest) : T(0);
    });
  }

  double weighted(const SameLabel<T>& positives, const Reduction<T>& reduction, int64_t j) const {
    if (!positives.any(j)) return 0;
    return reduction.weight(j) * (reduction.finite(lse(j)) - p_.beta * static_cast<const T*>(p_.pos)[j]);
  }

  void go_back(SameLabel<T>* positives) {
    Gradients g{};
    (p_.by_class ? g.class_lse : g.instance_lse) = share_;
    g.z = step_.z;
    g.beta = step_.beta;
    SymmetricBackward<G>(p_, columns_, g, positives).run();
  }

  Problem p_;
  const Columns& columns_;
  const Step& step_;
  Buffer<T> lse_, pos_, rnorm_, share_, kept_;
};

}  // namespace nckernels
