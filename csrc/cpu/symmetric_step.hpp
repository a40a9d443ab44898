// The supervised contrastive loss and its gradient in one call, see problem.hpp.
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
        pos_(p.m),
        rnorm_(2 * p.m),
        share_(p.m),
        kept_(std::min<int64_t>((p.m + TALLEST) * (p.m / 2 + TALLEST + 2 * G::NR),
                                p.workspace / 2 / static_cast<int64_t>(sizeof(T)))) {
    p_.class_lse = p_.instance_lse = lse_;
    p_.pos = pos_;
    p_.z_rnorm = rnorm_;
    p_.w_rnorm = rnorm_ + p.m;
    p_.kept = kept_;
    p_.kept_size = kept_.size();
  }

  void run() {
    SameLabel<T> positives(p_, columns_);
    Reduction<T> reduction(step_);
    for (int64_t j = 0; j < p_.m; j++)
      if (positives.any(j)) reduction.count(j);
    const double scale = reduction.scale();
    for (int64_t j = 0; j < p_.m; j++)
      share_[j] = positives.any(j) ? static_cast<T>(reduction.weight(j) * scale) : T(0);

    SymmetricForward<G>(p_, columns_).run();
    positives.add_up(share_, !step_.weight);
    constexpr int64_t block = 64;
    parallel(p_.threads, (p_.m + block - 1) / block, [&](int64_t b) {
      Buffer<T> line(p_.d), rest(p_.d);
      for (int64_t j = b * block; j < std::min(p_.m, (b + 1) * block); j++)
        pos_[j] = positives.any(j) ? positives.mean(j, line, rest) : T(0);
    });
    double sum = 0;
    for (int64_t j = 0; j < p_.m; j++) {
      if (!positives.any(j)) continue;
      const T lse = lse_[j] == minus_infinity<T> ? T(0) : lse_[j];
      sum += reduction.weight(j) * (double(lse) - p_.beta * pos_[j]);
    }
    *static_cast<T*>(step_.loss) = static_cast<T>(reduction.result(sum));

    Gradients g{};
    (p_.by_class ? g.class_lse : g.instance_lse) = share_;
    g.z = step_.z;
    g.beta = step_.beta;
    SymmetricBackward<G>(p_, columns_, g, &positives).run();
  }

 private:
  Problem p_;
  const Columns& columns_;
  const Step& step_;
  Buffer<T> lse_, pos_, rnorm_, share_, kept_;
};

}  // namespace nckernels
