// From log-sum-exps and positive logits to losses of samples, from these to one number, and the derivatives.
#pragma once

#include "problem.hpp"

namespace nckernels {

// log(e^a + e^b) and its derivatives by a and b.
struct Joined {
  double lse, of_a, of_b;

  Joined(double a, double b) {
    const double infinity = std::numeric_limits<double>::infinity();
    const bool empty = a == -infinity && b == -infinity;
    const double less = empty ? 0 : std::exp(-std::fabs(a - b)), more = 1 / (1 + less);
    lse = empty ? a : std::max(a, b) + std::log1p(less);
    of_a = a > b ? more : less * more;
    of_b = a > b ? less * more : more;
  }
};

template <class T>
class Reduction {
 public:
  Reduction(const Problem& p, const Step& step)
      : p_(p), step_(step), margins_(step.angular_margin != 0 || step.cosine_margin != 0) {
    if (step.smoothing == 0 || !step.class_weight) return;
    double sum = 0;
    for (int64_t c = 0; c < p.k; c++) sum += class_weight(c);
    mean_class_weight_ = sum / static_cast<double>(p.k);
  }

  double sample_weight(int64_t j) const { return number(step_.weight, j); }
  double class_weight(int64_t c) const { return number(step_.class_weight, c); }
  double weight(int64_t j) const {
    return step_.class_weight ? sample_weight(j) * class_weight(p_.target[j]) : sample_weight(j);
  }

  // Counts sample j.
  void count(int64_t j) { total_ += weight(j); }

  // d result / d (weighted sum), once all samples are counted.
  double scale() const { return !step_.mean ? 1 : nothing() ? 0 : 1 / total_; }
  double result(double sum) const {
    // With label smoothing the sum need not be 0 where all weights are.
    return !step_.mean ? sum : total_ == 0 ? step_.empty : sum / total_;
  }

  // A sample's weighted loss and its derivatives. The derivative by beta leaves out the path through the
  // logits.
  struct Sample {
    double loss, by_lse, by_pos, by_beta;
  };

  // The loss of sample j with this log-sum-exp and positive logit. Of an empty log-sum-exp, -inf, only the
  // positive remains. With a margin the log-sum-exp is over the other classes, and the shifted positive is
  // added here. The term of label smoothing is not included, see smoothing.hpp.
  Sample sample(int64_t j, double lse, double pos) const {
    const double all = weight(j), eps = step_.smoothing, of_pos = (1 - eps) * all;
    const double of_lse = eps == 0 ? all : of_pos + eps * sample_weight(j) * mean_class_weight_;
    if (!margins_) return {of_lse * finite(lse) - of_pos * pos, of_lse, -of_pos, 0};
    double slope;
    const double cosine = pos / p_.beta, moved_cosine = moved(cosine, slope),
                 moved_pos = p_.beta * moved_cosine;
    const Joined with(lse, moved_pos);
    // The mean of label smoothing contains the shifted logit, not `pos`.
    const double unmoved = eps == 0 ? 0 : eps * all / static_cast<double>(p_.k);
    const double both = of_lse - of_pos - unmoved, by_moved = both - of_lse * with.of_a;
    return {of_lse * (with.lse - moved_pos) + both * moved_pos + unmoved * pos, of_lse * with.of_a,
            by_moved * slope + unmoved, by_moved * (moved_cosine - slope * cosine)};
  }

  static double finite(double lse) { return lse == -std::numeric_limits<double>::infinity() ? 0 : lse; }

 private:
  static double number(const void* values, int64_t i) {
    return values ? static_cast<double>(static_cast<const T*>(values)[i]) : 1.0;
  }

  bool nothing() const { return total_ == 0 && step_.empty == 0; }

  // cos(theta + angular) - additive, continued linearly beyond theta + angular = pi, and its derivative.
  double moved(double cosine, double& slope) const {
    const double m = step_.angular_margin;
    slope = 1;
    if (m == 0) return cosine - step_.cosine_margin;
    if (!(cosine > -std::cos(m))) return cosine - m * std::sin(m) - step_.cosine_margin;
    // Rounding can push the cosine to +-1, where the derivative of the sine is infinite.
    const double square = 1 - cosine * cosine, least = std::numeric_limits<T>::epsilon();
    const double sine = std::sqrt(std::max(square, least));
    slope = std::cos(m) + (square < least ? 0 : cosine / sine * std::sin(m));
    return cosine * std::cos(m) - sine * std::sin(m) - step_.cosine_margin;
  }

  const Problem& p_;
  const Step& step_;
  bool margins_;
  double total_ = 0, mean_class_weight_ = 1;
};

}  // namespace nckernels
