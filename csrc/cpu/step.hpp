// A training step in one call: the loss and its gradient, forward and backward over the same tiles.
//
// The upstream gradient of a log-sum-exp is known as soon as the log-sum-exp is: the sample's share of the
// sum or mean, times the derivative of a margin. So a part of the matrix can run its backward pass as soon as
// its sums are complete, while its exponentials are still in the workspace, and no tile is computed twice.
// Sums are complete for whole columns in the class direction and for whole rows in the instance direction.
// The matrix is cut into as few such parts as the workspace allows. With both directions it stays whole.
// With many classes, a part of rows has most of the workspace: its entries take the place of its
// exponentials.
//
// The memory of the features' gradient is unused until its rows are complete. If a row of it is as long as a
// row of exponentials (1000 classes, 2048 features), it holds them, and the matrix stays whole too.
#pragma once

#include "backward.hpp"
#include "forward.hpp"
#include "smoothing.hpp"

namespace nckernels {
template <class G>
class StepPass {
  using T = typename G::T;
  static constexpr int64_t NR = G::NR, MR = G::MR;
  // The fewest columns or rows of a part. Narrower parts spend as much on packing as two passes on tiles.
  static constexpr int64_t NARROWEST = 96;
  // Chunks of rows that label smoothing sums separately. The number does not depend on the number of threads,
  // and neither does the result.
  static constexpr int64_t CHUNKS = 16;

 public:
  StepPass(const Problem& p, const Columns& columns, const Step& step)
      : p_(without_positives(p, step)),
        columns_(columns),
        step_(step),
        reduction_(p, step),
        smoothing_(p_, step, reduction_, CHUNKS),
        adds_positives_(adds_positives(p, step)),
        sums_((p.by_class ? p.k : 0) + (p.by_instance ? p.m : 0)),
        pos_(p.pos ? 0 : p.m),
        rnorm_(p.pos ? 0 : p.m + p.k),
        per_class_(p.by_class ? p.k : 0),
        per_row_(p.by_instance ? p.m : 0),
        per_pos_(p.m),
        height_(p.by_class || p.pos || fits_gradient() ? 0 : height_of_part()),
        kept_(numbers_to_keep()) {
    p_.exact_class_lse = p.by_class ? sums_.data() : nullptr;
    p_.exact_instance_lse = p.by_instance ? sums_ + (p.by_class ? p.k : 0) : nullptr;
    if (p.pos) return;
    p_.kept_once = height_ > 0;
    p_.pos = pos_;
    p_.z_rnorm = rnorm_;
    p_.w_rnorm = rnorm_ + p.m;
    p_.kept = kept_;
    p_.kept_size = kept_.size();
    if (!fits_gradient()) return;
    p_.kept = step.z;
    p_.kept_row = rows(step.z).bytes_of_row();
  }

  void run() {
    begin_forward<T>(p_, columns_);
    begin();
    if (p_.by_class && p_.by_instance)
      both_ways(p_, columns_, 0, output(step_.z), output(step_.w));
    else if (p_.by_class)
      by_columns();
    else
      by_rows();
    *static_cast<T*>(step_.loss) = static_cast<T>(reduction_.result(sum_));
    if (step_.beta) *step_.beta += by_beta_;
  }

  // Writes the loss of each sample, and the results of the forward pass into the problem.
  void losses() {
    begin_forward<T>(p_, columns_);
    ForwardPass<G>(p_, columns_).run();
    if (smoothing_) smoothing_.average_prototypes();
    const Rows<T> z(p_.z, p_.z_stride, p_.d, p_.half);
    Buffer<T> line(z.line());
    const auto classes = sums_of_classes(columns_);
    for (int64_t j = 0; j < p_.m; j++) {
      double loss = 0;
      if (valid(j)) loss = sample(j, classes).loss;
      if (valid(j) && smoothing_) loss += smoothing_.of_row(j, z.get(j, line), z_rnorm(j));
      static_cast<T*>(step_.loss)[j] = static_cast<T>(loss);
    }
  }

  // The gradient, from the results of `losses`. The upstream gradients are factors of the weights.
  void resume() {
    const auto restore = [](const void* saved, int64_t n, double* exact) {
      if (exact) std::copy_n(static_cast<const T*>(saved), n, exact);
    };
    restore(p_.class_lse, p_.k, p_.exact_class_lse);
    restore(p_.instance_lse, p_.m, p_.exact_instance_lse);
    begin();
    flow_back(columns_, 0, p_.m);
    backward(p_, columns_, 0, output(step_.z), output(step_.w));
    if (step_.beta) *step_.beta += by_beta_;
  }

 private:
  // Whether the gradient of the features has space for the exponentials: in its rows, with all columns in one
  // block. The gradient's rows are written after all exponentials of their tile have been read.
  bool fits_gradient() const {
    const int64_t width = round_up(columns_.count, NR);
    return step_.z && p_.m && width && width * int64_t(sizeof(T)) <= rows(step_.z).bytes_of_row() &&
           width <= Tiles<G>::columns_that_fit(p_, 0);
  }

  // Bytes for exponentials beside entries: three quarters of the workspace, less a block of columns. The
  // block has all columns if half of the workspace holds them, so that features are packed once.
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

  // Rows of all tiles, with padding: at most an eighth more than m, see Tiles::plan.
  static int64_t padded(int64_t m) { return m + std::min<int64_t>(m / 8 + 2 * MR, TALLEST); }

  bool valid(int64_t j) const { return columns_.positive[j] >= 0; }
  T pos(int64_t j) const { return static_cast<const T*>(p_.pos)[j]; }
  T z_rnorm(int64_t j) const { return static_cast<const T*>(p_.z_rnorm)[j]; }

  void begin() {
    for (int64_t j = 0; j < p_.m; j++)
      if (valid(j)) reduction_.count(j);
    if (p_.by_class) std::fill_n(static_cast<T*>(per_class_), p_.k, T(0));
    if (!smoothing_) return;
    smoothing_.average_prototypes();
    smoothing_.add_rows(columns_);
    sum_ += smoothing_.finish(columns_, reduction_.scale());
  }

  void by_columns() {
    const int64_t n = columns_.count;
    const int64_t width = p_.kept_row ? n : part(n, kept_.size() / padded(p_.m), NR);
    const Buffer<T> sums(step_.z && step_.rounded && width < n ? p_.m * p_.d : 0);
    for (int64_t first = 0; first == 0 || first < n; first += width) {
      const int64_t count = std::min(width, n - first);
      Columns some{count, true, {}, columns_.positive, {}};
      for (int64_t c = first; c < first + count; c++) some.ids.push_back(columns_.class_of(c));
      // The column of a positive in another part is out of range here.
      for (int64_t& c : some.positive)
        if (c >= 0) c = c < first ? n : c - first;
      both_ways(p_, some, 0, {rows(step_.z), sums.data(), first == 0, first + count >= n}, output(step_.w));
    }
  }

  void by_rows() {
    const int64_t m = p_.m, fit = kept_.size() / std::max<int64_t>(round_up(columns_.count, NR), 1);
    const int64_t all_kept = std::max(fit - TALLEST, (fit - 2 * MR) * 8 / 9);
    const int64_t height = height_ ? height_ : p_.kept_row ? m : part(m, all_kept, MR);
    const int64_t columns = G::PANELS_APART ? round_up(columns_.count, NR) * round_up(p_.d, NR) : p_.k * p_.d;
    const Buffer<T> sums(step_.w && step_.rounded && height < m ? columns : 0);
    for (int64_t first = 0; first == 0 || first < m; first += height) {
      const int64_t count = std::min(height, m - first);
      Columns some = columns_;
      some.positive.assign(columns_.positive.begin() + first, columns_.positive.begin() + first + count);
      Problem p = p_;
      p.m = count;
      p.z = static_cast<const char*>(p_.z) + first * p_.z_stride * (p_.half ? 2 : sizeof(T));
      p.target = p_.target + first;
      p.exact_instance_lse = p_.exact_instance_lse + first;
      p.pos = static_cast<T*>(p_.pos) + first;
      p.z_rnorm = static_cast<T*>(p_.z_rnorm) + first;
      both_ways(p, some, first, {rows(step_.z).from_row(first)},
                {rows(step_.w), sums.data(), first == 0, first + count >= m});
    }
  }

  // Rows of a part whose columns take several blocks, with entries in the place of exponentials; 0 for one
  // block, or if too few rows fit. Such a part packs its features once and adds up dL/dU in place, so that
  // narrow blocks, in a sixteenth of the workspace, cost little.
  int64_t height_of_part() const {
    const int64_t width = round_up(columns_.count, NR), beside = Tiles<G>::bytes_beside_row(p_.d);
    if (width * Tiles<G>::bytes_of_column(p_.d) <= p_.workspace / 2) return 0;
    const int64_t room = p_.workspace - p_.workspace / 16 - G::GROUP * beside;
    const int64_t fit = room / (width * int64_t(sizeof(T)) + beside) / MR * MR;
    return fit < std::max<int64_t>(std::min(p_.m, NARROWEST), 1) ? 0 : part(p_.m, fit, MR);
  }

  // Numbers in the kept tiles, and the one that signs them.
  int64_t numbers_to_keep() const {
    if (p_.pos || fits_gradient()) return 0;
    const int64_t width = round_up(columns_.count, NR);
    if (height_) return round_up(height_, MR) * width + 1;
    return std::min<int64_t>(padded(p_.m) * width, may_keep(p_, columns_) / int64_t(sizeof(T)));
  }

  // The size of a part of `n` columns or rows, of which `fit` can be kept: even parts, or one part where they
  // would be too narrow.
  static int64_t part(int64_t n, int64_t fit, int64_t step) {
    fit = fit / step * step;
    if (fit >= n || fit < NARROWEST) return std::max<int64_t>(n, 1);
    const int64_t parts = (n + fit - 1) / fit;
    return round_up((n + parts - 1) / parts, step);
  }

  GradientRows<T> rows(void* gradient) const { return {gradient, step_.rounded != 0, p_.d}; }
  Output<T> output(void* gradient) const { return {rows(gradient)}; }

  void both_ways(const Problem& p, const Columns& columns, int64_t first_row, Output<T> z, Output<T> w) {
    ForwardPass<G>(p, columns).run();
    flow_back(columns, first_row, p.m);
    backward(p, columns, first_row, z, w);
  }

  void backward(const Problem& p, const Columns& columns, int64_t first_row, Output<T> z, Output<T> w) {
    Gradients g{};
    if (p.by_class) g.class_lse = per_class_;
    if (p.by_instance) g.instance_lse = per_row_ + first_row;
    g.pos = per_pos_ + first_row;
    g.beta = step_.beta;
    BackwardPass<G>(p, columns, g, z, w, smoothing_.gradient(first_row)).run();
  }

  // The weighted loss of a sample and its derivatives by the log-sum-exps of its row and its class, by its
  // positive, and by beta other than through the logits. If the step adds positives, the log-sum-exp of the
  // row is that of its other entries.
  struct Sample {
    double loss, by_row, by_class, by_pos, by_beta;
  };

  // `classes`: the sums of classes, if the step adds their positives.
  Sample sample(int64_t j, const std::optional<ClassSums<T>>& classes) const {
    const double of_class = p_.by_class ? p_.exact_class_lse[p_.target[j]] : 0;
    const double of_row = p_.by_instance ? p_.exact_instance_lse[j] : 0;
    if (classes) {
      const double weight = reduction_.weight(j), part = p_.by_instance ? 0.5 : 1;
      double loss = classes->above(j), by_row = 0, by_pos = classes->by_positive(j, weight);
      if (p_.by_instance) {
        const Joined row(of_row, pos(j));
        loss += row.above_b;
        by_row = weight * row.of_a;
        by_pos -= by_row;
      }
      return {part * weight * loss, part * by_row, part * weight, part * by_pos, 0};
    }
    double lse = p_.by_class ? of_class : of_row, row = p_.by_class ? 0 : 1, column = 1 - row;
    if (p_.by_class && p_.by_instance && step_.joined) {
      const Joined both(of_row, of_class);
      lse = both.lse, row = both.of_a, column = both.of_b;
    } else if (p_.by_class && p_.by_instance) {
      lse = 0.5 * (reduction_.finite(of_row) + reduction_.finite(of_class)), row = column = 0.5;
    }
    const auto s = reduction_.sample(j, lse, pos(j));
    return {s.loss, s.by_lse * row, s.by_lse * column, s.by_pos, s.by_beta};
  }

  std::optional<ClassSums<T>> sums_of_classes(const Columns& columns) const {
    if (!p_.by_class || !adds_positives_) return std::nullopt;
    return std::optional<ClassSums<T>>(
        std::in_place, columns, static_cast<const T*>(p_.pos),
        [&](int64_t c) { return p_.exact_class_lse[columns.class_of(c)]; },
        [&](int64_t j) { return reduction_.weight(j); });
  }

  // Losses and upstream gradients of the samples [first, first + count) whose positives are among the
  // columns. Their sums are complete. The backward pass handles empty sums.
  void flow_back(const Columns& columns, int64_t first, int64_t count) {
    const double scale = reduction_.scale();
    const auto classes = sums_of_classes(columns);
    std::vector<double> by_class(p_.by_class ? columns.count : 0, 0.0);
    for (int64_t j = first; j < first + count; j++) {
      const int64_t c = columns.positive[j - first];
      per_pos_[j] = T(0);
      if (p_.by_instance) per_row_[j] = T(0);
      if (c < 0 || c >= columns.count) continue;
      const Sample s = sample(j, classes);
      sum_ += s.loss;
      by_beta_ += s.by_beta * scale;
      per_pos_[j] = static_cast<T>(s.by_pos * scale);
      if (p_.by_instance) per_row_[j] = static_cast<T>(s.by_row * scale);
      if (p_.by_class) by_class[c] += s.by_class * scale;
    }
    for (int64_t c = 0; c < columns.count && p_.by_class; c++) {
      const int64_t id = columns.class_of(c);
      per_class_[id] = static_cast<T>(by_class[c]);
      if (classes) p_.exact_class_lse[id] = classes->lse(c);
    }
  }

  Problem p_;
  const Columns& columns_;
  const Step& step_;
  Reduction<T> reduction_;
  Smoothing<T> smoothing_;
  bool adds_positives_;
  double sum_ = 0, by_beta_ = 0;  // weighted losses; dL/dbeta other than through the logits
  Buffer<double> sums_;           // log-sum-exps
  Buffer<T> pos_, rnorm_;         // unless the problem has them
  Buffer<T> per_class_, per_row_, per_pos_;
  int64_t height_;  // see height_of_part
  Buffer<T> kept_;
};

}  // namespace nckernels
