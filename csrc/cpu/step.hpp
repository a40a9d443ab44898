// A training step in one call: the loss and its gradient, forward and backward over the same tiles.
//
// What flows back to each log-sum-exp is known before it is: the sample's share of the sum or mean. So a part
// of the matrix whose sums are complete can go backward at once, while its exponentials still lie in the
// workspace, and nothing is made twice. Complete are, in the class direction, whole columns; in the instance
// direction, whole rows. The matrix is cut into as few such parts as fit; where both directions are wanted it
// stays whole.
#pragma once

#include "backward.hpp"
#include "forward.hpp"
#include "reduction.hpp"

namespace nckernels {
template <class G>
class StepPass {
  using T = typename G::T;
  static constexpr int64_t NR = G::NR, MR = G::MR;
  // Columns or rows of a part; with fewer, packing costs about as much as making tiles twice.
  static constexpr int64_t NARROWEST = 96;

 public:
  StepPass(const Problem& p, const Columns& columns, const Step& step)
      : p_(p),
        columns_(columns),
        step_(step),
        reduction_(step),
        class_lse_(p.by_class ? p.k : 0),
        instance_lse_(p.by_instance ? p.m : 0),
        pos_(p.m),
        z_rnorm_(p.m),
        w_rnorm_(p.k),
        per_class_(p.by_class ? p.k : 0),
        per_row_(p.by_instance ? p.m : 0),
        per_pos_(p.m),
        kept_(std::min<int64_t>(padded(p.m) * round_up(columns.count, NR),
                                may_keep(p, columns) / static_cast<int64_t>(sizeof(T)))) {
    p_.class_lse = class_lse_;
    p_.instance_lse = instance_lse_;
    p_.pos = pos_;
    p_.z_rnorm = z_rnorm_;
    p_.w_rnorm = w_rnorm_;
    p_.kept = kept_;
    p_.kept_size = kept_.size();
  }

  void run() {
    share_out();
    begin_forward<T>(p_, columns_);
    if (p_.by_class && p_.by_instance)
      both_ways(p_, columns_, 0, {}, {});
    else if (p_.by_class)
      by_columns();
    else
      by_rows();
    *static_cast<T*>(step_.loss) = static_cast<T>(reduction_.result(weighted_sum()));
  }

 private:
  // Bytes for exponentials: three quarters of the workspace, less a block of columns. All columns are one if
  // that takes half at most: features are then packed only once.
  static int64_t may_keep(const Problem& p, const Columns& columns) {
    const int64_t quarter = p.workspace / 4, of_column = Tiles<G>::bytes_of_column(p.d);
    const int64_t all = round_up(columns.count, NR) * of_column;
    if (p.by_class != p.by_instance && p.by_class) {  // parts of columns, each of which is a block
      const int64_t of_part = padded(p.m) * static_cast<int64_t>(sizeof(T));
      const int64_t width = 3 * quarter / (of_part + of_column) / NR * NR;
      return std::max(2 * quarter, width * of_part);
    }
    return 3 * quarter - (all <= 2 * quarter ? std::max(quarter, all) : quarter);
  }

  // Rows of all tiles of m: at most an eighth more, see Tiles::plan.
  static int64_t padded(int64_t m) { return m + std::min<int64_t>(m / 8 + 2 * MR, TALLEST); }

  bool valid(int64_t j) const { return columns_.positive[j] >= 0; }

  // dL/dlse and dL/dpos: each sample's share of the loss, which in the class direction adds up per class.
  void share_out() {
    for (int64_t j = 0; j < p_.m; j++)
      if (valid(j)) reduction_.count(j);
    const double scale = reduction_.scale();
    const double lse_scale = p_.by_class && p_.by_instance ? 0.5 * scale : scale;
    if (p_.by_class) std::fill_n(static_cast<T*>(per_class_), p_.k, T(0));
    for (int64_t j = 0; j < p_.m; j++) {
      const double w = valid(j) ? reduction_.weight(j) : 0;
      per_pos_[j] = valid(j) ? static_cast<T>(-w * scale) : T(0);
      const T share = valid(j) ? static_cast<T>(w * lse_scale) : T(0);
      if (p_.by_instance) per_row_[j] = share;
      if (p_.by_class && valid(j)) per_class_[p_.target[j]] += share;
    }
  }

  void by_columns() {
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
    ForwardPass<G>(p, columns).run();
    Gradients g{};
    if (p.by_class) g.class_lse = per_class_;
    if (p.by_instance) g.instance_lse = per_row_ + first_row;
    g.pos = per_pos_ + first_row;
    if (step_.z) g.z = static_cast<T*>(step_.z) + first_row * p.d;
    g.w = step_.w;
    g.beta = step_.beta;
    BackwardPass<G>(p, columns, g, of_z, of_w).run();
  }

  static double finite(T lse) { return lse == minus_infinity<T> ? 0 : lse; }

  double weighted_sum() {
    double sum = 0;
    for (int64_t j = 0; j < p_.m; j++) {
      if (!valid(j)) continue;
      double lse = 0;
      if (p_.by_class) lse += finite(class_lse_[p_.target[j]]);
      if (p_.by_instance) lse += finite(instance_lse_[j]);
      sum += reduction_.weight(j) * ((p_.by_class && p_.by_instance ? 0.5 : 1) * lse - double(pos_[j]));
    }
    return sum;
  }

  Problem p_;
  const Columns& columns_;
  const Step& step_;
  Reduction<T> reduction_;
  Buffer<T> class_lse_, instance_lse_, pos_, z_rnorm_, w_rnorm_, per_class_, per_row_, per_pos_, kept_;
};

}  // namespace nckernels
