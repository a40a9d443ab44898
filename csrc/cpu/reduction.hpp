// From log-sum-exps and positive logits to losses of samples, from these to one number, and the derivatives.
#pragma once

#include "problem.hpp"

namespace nckernels {

// log(e^a + e^b) and its derivatives by a and b. `above_b` is the logarithm less b, exact if it is small.
struct Joined {
  double lse, of_a, of_b, above_b;

  Joined(double a, double b) {
    const double infinity = std::numeric_limits<double>::infinity();
    const bool empty = a == -infinity && b == -infinity;
    const double less = empty ? 0 : std::exp(-std::fabs(a - b)), more = 1 / (1 + less);
    const double beyond = std::log1p(less);
    lse = empty ? a : std::max(a, b) + beyond;
    of_a = a > b ? more : less * more;
    of_b = a > b ? less * more : more;
    above_b = (a > b ? a - b : 0) + beyond;
  }
};

// The log-sum-exps of classes over the batch, from the sums over the other samples and the logits of the
// class's own ones. W is the sum of the own samples' weights, P that of their exponentials, O that of the
// other samples. The derivative by a positive of weight w and exponential e is
//     W e / (P + O) - w  =  ((W e - w P) - w O) / (P + O),
// where the second form is exact if O is small: the first bracket is 0 for a single sample.
template <class T>
class ClassSums {
 public:
  // `others(c)`: the log-sum-exp of column c over the other samples; `weight(j)`: of a sample.
  template <class Lse, class Weight>
  ClassSums(const Columns& columns, const T* pos, Lse&& others, Weight&& weight)
      : columns_(columns), pos_(pos), exponential_(columns.positive.size()), of_(columns.count) {
    for (int64_t c = 0; c < columns.count; c++) of_[c].top = of_[c].others = others(c);
    each([&](int64_t j, Sums& s) { s.top = std::max(s.top, double(pos_[j])); });
    each([&](int64_t j, Sums& s) {
      s.own += exponential_[j] = std::exp(pos_[j] - s.top);
      s.weight += weight(j);
    });
    for (Sums& s : of_) {
      s.others = s.top == minus_infinity<double> ? 0 : std::exp(s.others - s.top);
      s.lse = s.top + std::log(s.own + s.others);
    }
  }

  double lse(int64_t c) const { return of_[c].lse; }

  // The log-sum-exp of a sample's class less the sample's logit, and the derivative by that logit.
  double above(int64_t j) const {
    const Sums& s = of_[columns_.positive[j]];
    const double e = exponential_[j], rest = (s.own - e) + s.others;
    return rest < e ? std::log1p(rest / e) : s.lse - pos_[j];
  }
  double by_positive(int64_t j, double weight) const {
    const Sums& s = of_[columns_.positive[j]];
    return ((s.weight * exponential_[j] - weight * s.own) - weight * s.others) / (s.own + s.others);
  }

 private:
  struct Sums {
    double top, others, lse, own = 0, weight = 0;
  };

  template <class F>
  void each(F&& visit) {
    for (size_t j = 0; j < columns_.positive.size(); j++) {
      const int64_t c = columns_.positive[j];
      if (c >= 0 && c < columns_.count) visit(j, of_[c]);
    }
  }

  const Columns& columns_;
  const T* pos_;
  std::vector<double> exponential_;  // of each sample, relative to the top of its class
  std::vector<Sums> of_;
};

// Whether a step leaves the positives out of the sums of the matrix and adds them afterwards: where the
// positive has a probability near 1, its derivative is the sum of the other probabilities, of which a
// rounded probability less 1 retains nothing.
inline bool adds_positives(const Problem& p, const Step& step) {
  return p.exclude == kNone || step.angular_margin != 0 || step.cosine_margin != 0;
}

// The problem whose passes leave them out.
inline Problem without_positives(Problem p, const Step& step) {
  if (adds_positives(p, step)) p.exclude = kTarget;
  return p;
}

template <class T>
class Reduction {
 public:
  Reduction(const Problem& p, const Step& step)
      : p_(p), step_(step), adds_positives_(nckernels::adds_positives(p, step)) {
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
  // positive remains. If the step adds positives, the log-sum-exp is over the other classes, and the
  // positive, with its margins, is added here. The term of label smoothing is not included, see
  // smoothing.hpp.
  Sample sample(int64_t j, double lse, double pos) const {
    const double all = weight(j), eps = step_.smoothing, of_pos = (1 - eps) * all;
    const double of_lse = eps == 0 ? all : of_pos + eps * sample_weight(j) * mean_class_weight_;
    if (!adds_positives_) return {of_lse * finite(lse) - of_pos * pos, of_lse, -of_pos, 0};
    double slope;
    const double cosine = pos / p_.beta, moved_cosine = moved(cosine, slope),
                 moved_pos = p_.beta * moved_cosine;
    const Joined with(lse, moved_pos);
    // The mean of label smoothing contains the shifted logit, not `pos`.
    const double unmoved = eps == 0 ? 0 : eps * all / static_cast<double>(p_.k);
    const double both = of_lse - of_pos - unmoved, by_moved = both - of_lse * with.of_a;
    return {of_lse * with.above_b + both * moved_pos + unmoved * pos, of_lse * with.of_a,
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
  bool adds_positives_;
  double total_ = 0, mean_class_weight_ = 1;
};

}  // namespace nckernels
