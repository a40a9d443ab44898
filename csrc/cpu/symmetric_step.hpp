// The supervised contrastive loss and its gradient, in one call or in two, see problem.hpp.
//
// Where each label has two samples, as in SimCLR, a positive is one entry of the matrix, and is treated as in
// step.hpp: left out of the sums, and added in double. Otherwise positives are sums over the samples of a
// label.
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
        lse_(p.m),
        pos_(p.pos ? 0 : p.m),
        rnorm_(p.pos ? 0 : 2 * p.m),
        share_(p.m),
        kept_(p.pos ? 0
                    : std::min<int64_t>((p.m + TALLEST) * (p.m / 2 + TALLEST + 2 * G::NR),
                                        p.workspace / 2 / static_cast<int64_t>(sizeof(T)))) {
    (p.by_class ? p_.exact_class_lse : p_.exact_instance_lse) = lse_;
    if (!p.pos) use_own_buffers();
    if (step.joined) return;
    positives_.emplace(p_, columns_);
    if (p.exclude == kSelf) find_partners();
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
    const Reduction<T> reduction(p_, step_);
    if (!in_pairs_) {
      positives_->add_up(nullptr, true);
      find_positives();
    }
    for (int64_t j = 0; j < p_.m; j++)
      static_cast<T*>(step_.loss)[j] = static_cast<T>(weighted(reduction, j));
  }

  void resume() {
    const T* saved = static_cast<const T*>(p_.by_class ? p_.class_lse : p_.instance_lse);
    std::copy_n(saved, p_.m, lse_.data());
    with_positives();
  }

 private:
  void use_own_buffers() {
    p_.pos = pos_;
    p_.z_rnorm = rnorm_;
    p_.w_rnorm = rnorm_ + p_.m;
    p_.kept = kept_;
    p_.kept_size = kept_.size();
  }

  // The loss is the logarithm of the sum over all pairs; each sample's share of the sum is its upstream
  // gradient.
  void all_in_one() {
    double top = minus_infinity<double>, total = 0;
    for (int64_t j = 0; j < p_.m; j++) top = std::max(top, lse(j));
    for (int64_t j = 0; j < p_.m; j++) total += std::exp(lse(j) - top);
    const double whole = top + std::log(total);
    for (int64_t j = 0; j < p_.m; j++) share_[j] = static_cast<T>(std::exp(lse(j) - whole));
    *static_cast<T*>(step_.loss) = static_cast<T>(whole);
    go_back(nullptr);
  }

  // The gradient, and the loss unless `losses` has computed it.
  void with_positives() {
    Reduction<T> reduction(p_, step_);
    for (int64_t j = 0; j < p_.m; j++)
      if (positives_->any(j)) reduction.count(j);
    const double scale = reduction.scale();
    for (int64_t j = 0; j < p_.m; j++)
      share_[j] = positives_->any(j) ? static_cast<T>(reduction.weight(j) * scale) : T(0);
    if (!in_pairs_) {
      positives_->add_up(share_, !step_.weight);
      if (step_.loss || step_.beta) find_positives();
    }
    if (step_.loss) {
      double sum = 0;
      for (int64_t j = 0; j < p_.m; j++) sum += weighted(reduction, j);
      *static_cast<T*>(step_.loss) = static_cast<T>(reduction.result(sum));
    }
    if (in_pairs_) {
      Buffer<T> of_positives(p_.m);
      for (int64_t j = 0; j < p_.m; j++) {
        share_[j] = positives_->any(j) ? static_cast<T>(share_[j] * Joined(lse(j), pos(j)).of_a) : T(0);
        of_positives[j] = -share_[j];
      }
      go_back(nullptr, of_positives);
      return;
    }
    go_back(&*positives_, nullptr, typical());
    if (step_.z || !step_.beta || p_.exclude == kSelf) return;
    // Neither the entries nor a gradient of the features have added positives to dL/dbeta.
    for (int64_t j = 0; j < p_.m; j++) *step_.beta -= double(share_[j]) * pos(j);
  }

  double lse(int64_t j) const { return lse_.data()[j]; }

  // The mean cosine of a sample with the others of its label, or the logit of its partner.
  T pos(int64_t j) const { return static_cast<const T*>(p_.pos)[j]; }

  void find_partners() {
    const std::vector<int64_t> partner = positives_->partners();
    in_pairs_ = !partner.empty();
    if (!in_pairs_) return;
    p_.exclude = kTarget;
    for (int64_t j = 0; j < p_.m; j++)
      if (columns_.positive[j] >= 0) columns_.positive[j] = partner[j];
  }

  // The mean cosine of each sample with the others of its label.
  void find_positives() {
    constexpr int64_t block = 64;
    parallel(p_.threads, (p_.m + block - 1) / block, [&](int64_t b) {
      Buffer<T> line(p_.d), rest(p_.d);
      for (int64_t j = b * block; j < std::min(p_.m, (b + 1) * block); j++)
        static_cast<T*>(p_.pos)[j] = positives_->any(j) ? positives_->mean(j, line, rest) : T(0);
    });
  }

  double weighted(const Reduction<T>& reduction, int64_t j) const {
    if (!positives_->any(j)) return 0;
    if (in_pairs_) return reduction.weight(j) * Joined(lse(j), pos(j)).above_b;
    return reduction.weight(j) * (reduction.finite(lse(j)) - p_.beta * pos(j));
  }

  // The mean of `pos`, weighted by the samples' shares.
  double typical() {
    double sum = 0, shares = 0;
    for (int64_t j = 0; step_.beta && j < p_.m; j++) {
      sum += double(share_[j]) * pos(j);
      shares += double(share_[j]);
    }
    return shares == 0 ? 0 : sum / shares;
  }

  void go_back(SameLabel<T>* positives, const T* of_pairs = nullptr, double typical = 0) {
    Gradients g{};
    g.pos = of_pairs;
    (p_.by_class ? g.class_lse : g.instance_lse) = share_;
    g.z = step_.z;
    g.beta = step_.beta;
    SymmetricBackward<G>(p_, columns_, g, positives, typical).run();
  }

  Problem p_;
  Columns columns_;
  const Step& step_;
  std::optional<SameLabel<T>> positives_;
  bool in_pairs_ = false;  // whether each label has at most two samples
  Buffer<double> lse_;
  Buffer<T> pos_, rnorm_, share_, kept_;
};

}  // namespace nckernels
