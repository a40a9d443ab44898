// A training step in one call: the loss and its gradient, forward and backward over the same tiles.
//
// What flows back to a log-sum-exp is known as soon as it is: the sample's share of the sum or mean, times
// what margins make of it. So a part of the matrix whose sums are complete can go backward at once, while its
// exponentials still lie in the workspace, and nothing is made twice. Complete are, in the class direction,
// whole columns; in the instance direction, whole rows. The matrix is cut into as few such parts as fit;
// where both directions are wanted it stays whole.
#pragma once

#include "backward.hpp"
#include "forward.hpp"
#include "smoothing.hpp"

namespace nckernels {
template <class T, int NV>
class StepPass {
  static constexpr int64_t NR = Tiles<T, NV>::NR;
  // Columns or rows of a part; with fewer, packing costs about as much as making tiles twice.
  static constexpr int64_t NARROWEST = 96;
  // Of rows, each of which smoothing adds up apart; whatever the number of threads, for the same bits.
  static constexpr int64_t CHUNKS = 16;

 public:
  StepPass(const Problem& p, const Columns& columns, const Step& step)
      : p_(p),
        columns_(columns),
        step_(step),
        reduction_(p, step),
        smoothing_(p_, step, reduction_, CHUNKS),
        class_lse_(p.by_class ? p.k : 0),
        instance_lse_(p.by_instance ? p.m : 0),
        pos_(p.m),
        z_rnorm_(p.m),
        w_rnorm_(p.k),
        per_class_(p.by_class ? p.k : 0),
        per_row_(p.by_instance ? p.m : 0),
        per_pos_(p.m),
        kept_(std::min<int64_t>(padded(p.m) * round_up(columns.count, NR),
                                p.workspace / 2 / static_cast<int64_t>(sizeof(T)))) {
    p_.class_lse = class_lse_;
    p_.instance_lse = instance_lse_;
    p_.pos = pos_;
    p_.z_rnorm = z_rnorm_;
    p_.w_rnorm = w_rnorm_;
    p_.kept = kept_;
    p_.kept_size = kept_.size();
  }

  void run() {
    begin_forward<T>(p_, columns_);
    for (int64_t j = 0; j < p_.m; j++)
      if (valid(j)) reduction_.count(j);
    if (p_.by_class) std::fill_n(static_cast<T*>(per_class_), p_.k, T(0));
    if (smoothing_) {
      smoothing_.average_prototypes();
      smoothing_.add_rows(columns_);
      sum_ += smoothing_.finish(columns_, reduction_.scale());
    }
    if (p_.by_class && p_.by_instance)
      both_ways(p_, columns_, 0, {}, {});
    else if (p_.by_class)
      by_columns();
    else
      by_rows();
    *static_cast<T*>(step_.loss) = static_cast<T>(reduction_.result(sum_));
    if (step_.beta) *step_.beta += by_beta_ * reduction_.scale();
  }

 private:
  // Rows of all tiles of m: at most an eighth more, see Tiles::plan.
  static int64_t padded(int64_t m) { return m + std::min<int64_t>(m / 8 + 2 * MR, TALLEST); }

  bool valid(int64_t j) const { return columns_.positive[j] >= 0; }

  void by_columns() {
    share_out();
    const int64_t n = columns_.count, width = part(n, kept_.size() / padded(p_.m), NR);
    for (int64_t first = 0; first == 0 || first < n; first += width) {
      const int64_t count = std::min(width, n - first);
      Columns some{count, true, {}, columns_.positive, {}};
      for (int64_t c = first; c < first + count; c++) some.ids.push_back(columns_.class_of(c));
      // A positive in another part is beyond the columns of this one.
      for (int64_t& c : some.positive)
        if (c >= 0) c = c < first ? n : c - first;
      both_ways(p_, some, 0, {first == 0, first + count >= n}, {});
    }
    for (int64_t j = 0; j < p_.m; j++)
      if (valid(j)) sum_ += reduction_.sample(j, class_lse_[p_.target[j]], pos_[j]).loss;
  }

  void by_rows() {
    const int64_t m = p_.m, rows = kept_.size() / std::max<int64_t>(round_up(columns_.count, NR), 1);
    const int64_t height = part(m, std::max(rows - TALLEST, (rows - 2 * MR) * 8 / 9), MR);
    for (int64_t first = 0; first == 0 || first < m; first += height) {
      const int64_t count = std::min(height, m - first);
      Columns some = columns_;
      some.positive.assign(columns_.positive.begin() + first, columns_.positive.begin() + first + count);
      Problem p = p_;
      p.m = count;
      p.z = static_cast<const char*>(p_.z) + first * p_.z_stride * (p_.half ? 2 : sizeof(T));
      p.target = p_.target + first;
      p.instance_lse = instance_lse_ + first;
      p.pos = pos_ + first;
      p.z_rnorm = z_rnorm_ + first;
      both_ways(p, some, first, {}, {first == 0, first + count >= m});
    }
  }

  // The size of parts of `n` columns or rows of which `fit` can be kept; all of them where even parts would
  // be too narrow.
  static int64_t part(int64_t n, int64_t fit, int64_t step) {
    fit = fit / step * step;
    if (fit >= n || fit < NARROWEST) return std::max<int64_t>(n, 1);
    const int64_t parts = (n + fit - 1) / fit;
    return round_up((n + parts - 1) / parts, step);
  }

  void both_ways(const Problem& p, const Columns& columns, int64_t first_row, Turn of_z, Turn of_w) {
    ForwardPass<T, NV>(p, columns).run();
    if (p.by_instance) flow_back(first_row, p.m);
    Gradients g{};
    if (p.by_class) g.class_lse = per_class_;
    if (p.by_instance) g.instance_lse = per_row_ + first_row;
    g.pos = per_pos_ + first_row;
    if (step_.z) g.z = static_cast<T*>(step_.z) + first_row * p.d;
    g.w = step_.w;
    g.beta = step_.beta;
    BackwardPass<T, NV>(p, columns, g, of_z, of_w, smoothing_.gradient(first_row)).run();
  }

  // dL/dlse and dL/dpos in the class direction: each sample's share of the loss, which adds up per class.
  void share_out() {
    const double scale = reduction_.scale();
    for (int64_t j = 0; j < p_.m; j++) {
      const T share = valid(j) ? static_cast<T>(reduction_.weight(j) * scale) : T(0);
      per_pos_[j] = -share;
      if (valid(j)) per_class_[p_.target[j]] += share;
    }
  }

  // The losses of samples whose sums over their row are complete, those over its column too if there are any,
  // and what flows back. That empty sums pass nothing on is the backward pass's business.
  void flow_back(int64_t first, int64_t count) {
    const double scale = reduction_.scale();
    for (int64_t j = first; j < first + count; j++) {
      per_row_[j] = per_pos_[j] = T(0);
      if (!valid(j)) continue;
      double lse = instance_lse_[j], of_row = 1, of_class = 0;
      if (p_.by_class && step_.joined) {
        const Joined both(class_lse_[p_.target[j]], lse);
        lse = both.lse;
        of_class = both.of_a;
        of_row = both.of_b;
      } else if (p_.by_class) {
        lse = 0.5 * (reduction_.finite(class_lse_[p_.target[j]]) + reduction_.finite(lse));
        of_class = of_row = 0.5;
      }
      const auto sample = reduction_.sample(j, lse, pos_[j]);
      sum_ += sample.loss;
      by_beta_ += sample.by_beta;
      per_pos_[j] = static_cast<T>(sample.by_pos * scale);
      per_row_[j] = static_cast<T>(sample.by_lse * of_row * scale);
      if (p_.by_class) per_class_[p_.target[j]] += static_cast<T>(sample.by_lse * of_class * scale);
    }
  }

  Problem p_;
  const Columns& columns_;
  const Step& step_;
  Reduction<T> reduction_;
  Smoothing<T> smoothing_;
  double sum_ = 0, by_beta_ = 0;  // of weighted losses; its derivative by beta beside that by the logits
  Buffer<T> class_lse_, instance_lse_, pos_, z_rnorm_, w_rnorm_, per_class_, per_row_, per_pos_, kept_;
};

}  // namespace nckernels
