// How the samples' losses become one number, and the share of it that each has.
#pragma once

#include "problem.hpp"

namespace nckernels {
template <class T>
class Reduction {
 public:
  explicit Reduction(const Step& step) : step_(step) {}

  double weight(int64_t j) const { return step_.weight ? static_cast<const T*>(step_.weight)[j] : 1.0; }

  // Sample j counts.
  void count(int64_t j) { total_ += weight(j); }

  // d result / d (weighted sum), once all are counted.
  double scale() const { return !step_.mean ? 1 : nothing() ? 0 : 1 / total_; }
  double result(double sum) const { return !step_.mean ? sum : nothing() ? 0 : sum / total_; }

 private:
  bool nothing() const { return total_ == 0 && step_.empty == 0; }

  const Step& step_;
  double total_ = 0;
};

}  // namespace nckernels
