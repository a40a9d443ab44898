// How a sample's sums and its positive logit become its loss, the samples' losses one number, and what flows
// back.
#pragma once

#include "problem.hpp"

namespace nckernels {

// log(e^a + e^b), and the shares of the two in it.
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

  // Sample j counts.
  void count(int64_t j) { total_ += weight(j); }

  // d result / d (weighted sum), once all are counted.
  double scale() const { return !step_.mean ? 1 : nothing() ? 0 : 1 / total_; }
  double result(double sum) const {
    // With label smoothing the sum need not be 0 where all weights are.
    return !step_.mean ? sum : total_ == 0 ? step_.empty : sum / total_;
  }

  // A sample's weighted loss and its derivatives; that by beta is what stands beside those by the logits.
  struct Sample {
    double loss, by_lse, by_pos, by_beta;
  };

  // Of sample j with this log-sum-exp and positive logit; that of nothing, -inf, leaves the positive. With
  // margins it is that of the others, and the positive, moved, joins it here. Label smoothing's mean logit,
  // times -eps, is not in it, see smoothing.hpp.
  Sample sample(int64_t j, double lse, double pos) const {
    const double all = weight(j), eps = step_.smoothing, of_pos = (1 - eps) * all;
    const double of_lse = eps == 0 ? all : of_pos + eps * sample_weight(j) * mean_class_weight_;
    if (!margins_) return {of_lse * finite(lse) - of_pos * pos, of_lse, -of_pos, 0};
    double slope;
    const double cosine = pos / p_.beta, moved_cosine = moved(cosine, slope),
                 moved_pos = p_.beta * moved_cosine;
    const Joined with(lse, moved_pos);
    // Smoothing takes the moved logit, not `pos`, for its mean.
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
    // The sine's derivative is infinite at +-1, where rounding can push the cosine.
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
