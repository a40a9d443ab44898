// A training step for few classes, in one direction.
//
// All packed prototypes fit the caches, and features are read in place: each takes part in so few products
// that packing would take as long as the products. There are two sweeps over the samples:
//   1. norms, t = beta u . v, e = exp(t), which is kept whole, and the sums of e over columns or rows;
//   2. with them A = dL/dt, dL/dU = A V and dL/dV += A^T U, tile by tile.
#pragma once

#include "gemm.hpp"
#include "norms.hpp"
#include "smoothing.hpp"
#include "tiles.hpp"

namespace nckernels {
template <class T, int NV>
class FewClasses {
  using G = Gemm<T, NV>;
  static constexpr int W = G::W, NR = G::NR;
  // The most numbers and rows of features in a tile, which fit the L2 cache; and the rows whose share of
  // dL/dV accumulates in registers.
  static constexpr int64_t TILE = 24576, TALL = 96, SLICE = 32;
  static_assert(TALL % MR == 0);

 public:
  // Whether it takes the problem: exponentials need no shift, and half of the workspace holds all of them and
  // the prototypes in two layouts. The other half is for the gradients of the prototypes.
  static bool takes(const Problem& p, const Columns& columns) {
    const int64_t width = round_up(columns.count, NR);
    return p.by_class != p.by_instance && p.beta <= 30.0 && width > 0 &&
           (p.m + TALL + 2 * (p.d + NR)) * width <= half_of(p);
  }

  FewClasses(const Problem& p, const Columns& columns, const Step& step)
      : p_(without_positives(p, step)),
        columns_(columns),
        step_(step),
        reduction_(p, step),
        z_(p.z, p.z_stride, p.d, p.half),
        w_(p.w, p.w_stride, p.d, p.half),
        grad_z_(step.z, step.rounded, p.d),
        grad_w_(step.w, step.rounded, p.d),
        count_(columns.count),
        panels_((count_ + NR - 1) / NR),
        width_(panels_ * NR),
        d_panels_((p.d + NR - 1) / NR),
        d_pad_(d_panels_ * NR),
        tall_(std::clamp<int64_t>(TILE / p.d, MR, TALL) / MR * MR),
        tiles_((p.m + tall_ - 1) / tall_),
        chunks_(chunks()),
        v_(width_ * p.d),
        v_rows_(step.z ? width_ * d_pad_ : 0),
        e_(tiles_ * tall_ * width_),
        z_rnorm_(p.m),
        w_rnorm_(p.k),
        pos_(p.m),
        sums_(p.by_class ? chunks_ * width_ : p.m),
        grad_v_(step.w ? chunks_ * width_ * d_pad_ : 0),
        zeros_(p.d),
        smoothing_(p_, step, reduction_, chunks_),
        adds_positives_(adds_positives(p, step)),
        scale_(width_, T(0)),
        inside_(width_, T(0)) {
    p_.w_rnorm = w_rnorm_;
    std::fill_n(inside_.begin(), count_, T(1));
    std::fill_n(static_cast<T*>(zeros_), p.d, T(0));
  }

  void run() {
    pack_prototypes();
    parallel(p_.threads, chunks_, [&](int64_t chunk) {
      Room room(*this);
      T* const column_sums = p_.by_class ? sums_ + chunk * width_ : nullptr;
      if (column_sums) std::fill_n(column_sums, width_, T(0));
      for_tiles(chunk, [&](int64_t tile) { exponentials(tile, chunk, room, column_sums); });
    });
    share_out();
    std::vector<Totals> of_chunks(chunks_);
    parallel(p_.threads, chunks_, [&](int64_t chunk) {
      Room room(*this);
      T* const grad_v = step_.w ? grad_v_ + chunk * width_ * d_pad_ : nullptr;
      if (grad_v) std::fill_n(grad_v, width_ * d_pad_, T(0));
      for_tiles(chunk, [&](int64_t tile) {
        entries(tile, of_chunks[chunk]);
        const T* const* rows = find_rows(tile, room);
        if (step_.z) add_rows(tile, rows, room.product, of_chunks[chunk].energy);
        if (grad_v) add_columns(tile, rows, grad_v);
      });
    });
    double energy = 0, by_beta = 0;
    for (const Totals& t : of_chunks) {
      energy += t.energy;
      by_beta += t.by_beta;
      loss_ += t.loss;
    }
    if (step_.w) energy = finish_columns();
    if (step_.beta) *step_.beta = energy + by_beta;
    *static_cast<T*>(step_.loss) = static_cast<T>(reduction_.result(loss_));
  }

 private:
  // Scratch of a thread.
  struct Room {
    const T* rows[TALL];
    Buffer<T> lines, product;
    explicit Room(const FewClasses& s) : lines(s.tall_ * s.z_.line()), product(MR * s.d_pad_) {}
  };

  // A chunk's share of sums over all samples: dL/dbeta through the logits, dL/dbeta otherwise, and the loss.
  struct Totals {
    double energy = 0, by_beta = 0, loss = 0;
  };

  static int64_t half_of(const Problem& p) { return p.workspace / 2 / static_cast<int64_t>(sizeof(T)); }

  // Each chunk of tiles has its own sums, which are added up in order. A chunk has a million products or
  // more, and the number of chunks is the same for one and two threads.
  int64_t chunks() const {
    const int64_t most = std::min(tiles_, half_of(p_) / (width_ * d_pad_));
    const int64_t some = std::min<int64_t>(p_.m * width_ * p_.d >> 20, 4 * std::max(p_.threads, 2));
    return std::clamp<int64_t>(some, 1, std::max<int64_t>(most, 1));
  }

  template <class F>
  void for_tiles(int64_t chunk, F&& body) const {
    for (int64_t tile = chunk * tiles_ / chunks_; tile < (chunk + 1) * tiles_ / chunks_; tile++) body(tile);
  }

  int64_t rows_of(int64_t tile) const { return std::min(tall_, p_.m - tile * tall_); }
  bool valid(int64_t j) const { return columns_.positive[j] >= 0; }

  // e of a tile, later A: [panel][row][NR].
  T* tile_of(int64_t tile) { return e_ + tile * tall_ * width_; }
  T& at(T* tile, int64_t r, int64_t c) const { return tile[(c / NR * tall_ + r) * NR + c % NR]; }

  // Packs unit prototypes for the logits and, if it is wanted, for dL/dU.
  void pack_prototypes() {
    inverse_norms<T>(p_, w_, count_, w_rnorm_, [&](int64_t c) { return columns_.class_of(c); });
    if (smoothing_) smoothing_.average_prototypes();
    const Tiles<G> tiles(p_, columns_);
    T* by_feature = step_.z ? v_rows_.data() : nullptr;
    for (int64_t q = 0; q < panels_; q++) tiles.pack_prototypes(0, count_, q, v_, by_feature);
  }

  // Pointers to the features of a tile. Ignored samples and rows past the end point to zeros.
  const T* const* find_rows(int64_t tile, Room& room) const {
    const int64_t n = rows_of(tile), row0 = tile * tall_;
    for (int64_t r = 0; r < round_up(n, MR); r++)
      room.rows[r] = r < n && valid(row0 + r) ? z_.get(row0 + r, room.lines + r * z_.line()) : zeros_.data();
    return room.rows;
  }

  void exponentials(int64_t tile, int64_t chunk, Room& room, T* column_sums) {
    const int64_t n = rows_of(tile), row0 = tile * tall_;
    T *e = tile_of(tile), factor[TALL];
    const T* const* rows = find_rows(tile, room);
    for (int64_t r = 0; r < n; r++) {
      z_rnorm_[row0 + r] = inverse_norm(p_, rows[r]);
      factor[r] = T(p_.beta) * z_rnorm_[row0 + r];
      if (smoothing_ && valid(row0 + r)) smoothing_.add_row(chunk, row0 + r, rows[r], z_rnorm_[row0 + r]);
    }
    for (int64_t q = 0; q < panels_; q++)
      for (int64_t i = 0; i < n; i += MR)
        for (int64_t k = 0; k < p_.d; k += DEPTH) {
          const int64_t depth = std::min<int64_t>(DEPTH, p_.d - k);
          const T* v = v_ + k * width_ + q * NR * depth;
          T* t = e + (q * tall_ + i) * NR;
          if (k == 0)
            rows_times_panel<T, MR, NV, false>(rows + i, k, depth, v, t);
          else
            rows_times_panel<T, MR, NV, true>(rows + i, k, depth, v, t);
        }
    for (int64_t r = 0; r < n; r++) {
      const int64_t c = columns_.positive[row0 + r];
      if (c < 0) continue;
      pos_[row0 + r] = at(e, r, c) * factor[r];
      if (p_.exclude == kTarget) at(e, r, c) = minus_infinity<T>;
    }
    for (int64_t q = 0; q < panels_; q++) {
      Vec<T> inside[NV], column[NV];
      for (int v = 0; v < NV; v++) {
        inside[v] = load(inside_.data() + q * NR + v * W);
        column[v] = Vec<T>{};
      }
      for (int64_t r = 0; r < n; r++) {
        Vec<T> row{};
        for (int v = 0; v < NV; v++) {
          T* to = e + (q * tall_ + r) * NR + v * W;
          Vec<T> x = exponential<T, true>(load(to) * factor[r]) * inside[v];
          if (!valid(row0 + r)) x = Vec<T>{};
          store(to, x);
          column[v] += x;
          row += x;
        }
        if (p_.by_instance) sums_[row0 + r] = (q ? sums_[row0 + r] : T(0)) + sum<T>(row);
      }
      for (int v = 0; v < NV && column_sums; v++) {
        T* to = column_sums + q * NR + v * W;
        store(to, load(to) + column[v]);
      }
    }
  }

  // The scale of the loss and, in the class direction, the factors of A = scale_c e.
  void share_out() {
    std::vector<double> of_class(count_, 0.0);
    for (int64_t j = 0; j < p_.m; j++) {
      if (!valid(j)) continue;
      reduction_.count(j);
      of_class[columns_.positive[j]] += reduction_.weight(j);
    }
    per_weight_ = reduction_.scale();
    if (smoothing_) loss_ += smoothing_.finish(columns_, per_weight_);
    beside_ = smoothing_.gradient();
    if (!p_.by_class) return;
    for (int64_t c = 0; c < count_; c++)
      for (int64_t chunk = 1; chunk < chunks_; chunk++) sums_[c] += sums_[chunk * width_ + c];
    const auto lse = [&](int64_t c) { return std::log(double(sums_[c])); };
    if (adds_positives_)
      classes_.emplace(columns_, pos_.data(), lse, [&](int64_t j) { return reduction_.weight(j); });
    for (int64_t c = 0; c < count_; c++) {
      const double total = classes_ ? std::exp(classes_->lse(c)) : sums_[c];
      if (total != 0) scale_[c] = static_cast<T>(of_class[c] * per_weight_ / total);
    }
  }

  // The weighted loss of sample j, and the factors of A = scale_j e and of its positive.
  void flow_back(int64_t j, T& row, T& positive, Totals& totals) {
    row = positive = T(0);
    if (!valid(j)) return;
    if (classes_) {
      totals.loss += reduction_.weight(j) * classes_->above(j);
      positive = static_cast<T>(classes_->by_positive(j, reduction_.weight(j)) * per_weight_);
      return;
    }
    const double sum = sums_[p_.by_instance ? j : columns_.positive[j]];
    const auto sample = reduction_.sample(j, std::log(sum), pos_[j]);
    if (sum != 0 && p_.by_instance) row = static_cast<T>(sample.by_lse * per_weight_ / sum);
    positive = static_cast<T>(sample.by_pos * per_weight_);
    totals.loss += sample.loss;
    totals.by_beta += sample.by_beta * per_weight_;
  }

  void entries(int64_t tile, Totals& totals) {
    const int64_t n = rows_of(tile), row0 = tile * tall_;
    T *a = tile_of(tile), row[TALL], positive[TALL];
    for (int64_t r = 0; r < n; r++) flow_back(row0 + r, row[r], positive[r], totals);
    for (int64_t q = 0; q < panels_; q++)
      for (int64_t r = 0; r < round_up(n, MR); r++) {
        const T scale = r < n ? row[r] : T(0);
        for (int v = 0; v < NV; v++) {
          T* to = a + (q * tall_ + r) * NR + v * W;
          const Vec<T> e = r < n ? load(to) : Vec<T>{};
          store(to, p_.by_class ? e * load(scale_.data() + q * NR + v * W) : e * scale);
        }
      }
    for (int64_t r = 0; r < n; r++)
      if (valid(row0 + r)) at(a, r, columns_.positive[row0 + r]) += positive[r];
  }

  // dL/dU = A V of a tile, taken through the normalisation.
  void add_rows(int64_t tile, const T* const* rows, T* product, double& energy) {
    const int64_t n = rows_of(tile), row0 = tile * tall_;
    // A single panel skips the columns past the end.
    const int64_t depth = panels_ == 1 ? count_ : NR;
    for (int64_t i = 0; i < n; i += MR) {
      for (int64_t f = 0; f < d_panels_; f++)
        micro<T, MR, NV, NR, 1, false>(panels_, depth, tile_of(tile) + i * NR, tall_ * NR,
                                       v_rows_ + f * width_ * NR, product + f * NR, d_pad_);
      for (int64_t r = i; r < std::min<int64_t>(n, i + MR); r++) {
        const int64_t j = row0 + r;
        if (!valid(j)) {
          grad_z_.clear(j);
          continue;
        }
        T *x = product + (r - i) * d_pad_, *out = grad_z_.place(j, x);
        beside_.add_to_row(j, p_.d, x);
        energy += through_norm(p_, x, rows[r], z_rnorm_[j], T(p_.beta), out);
        grad_z_.put(j, out);
      }
    }
  }

  // dL/dV += A^T U of a tile. A takes the factors of U = beta z / |z|.
  void add_columns(int64_t tile, const T* const* rows, T* grad_v) {
    const int64_t n = rows_of(tile), row0 = tile * tall_;
    T* a = tile_of(tile);
    for (int64_t q = 0; q < panels_; q++)
      for (int64_t r = 0; r < n; r++)
        for (int v = 0; v < NV; v++) {
          T* to = a + (q * tall_ + r) * NR + v * W;
          store(to, load(to) * (T(p_.beta) * z_rnorm_[row0 + r]));
        }
    for (int64_t first = 0; first < n; first += SLICE) {
      const int64_t depth = std::min(SLICE, n - first);
      T rest[SLICE][NR];  // of rows that end within a panel
      const T* rest_rows[SLICE];
      for (int64_t f = 0; f < d_panels_; f++) {
        const bool whole = (f + 1) * NR <= p_.d;
        for (int64_t r = 0; r < depth && !whole; r++) {
          for (int64_t x = 0; x < NR; x++)
            rest[r][x] = f * NR + x < p_.d ? rows[first + r][f * NR + x] : T(0);
          rest_rows[r] = rest[r];
        }
        for (int64_t q = 0; q < panels_; q++)
          add_panel(std::min<int64_t>(NR, count_ - q * NR), depth, a + (q * tall_ + first) * NR,
                    whole ? rows + first : rest_rows, whole ? f * NR : 0,
                    grad_v + (f * width_ + q * NR) * NR);
      }
    }
  }

  // The first n columns of one panel, in register tiles of the height that wastes the fewest rows.
  static void add_panel(int64_t n, int64_t depth, const T* a, const T* const* rows, int64_t at, T* out) {
    constexpr int R = G::PR;
    auto groups_of = [&](auto r) {
      for (int64_t c = 0; c < n; c += r) panel_times_rows<T, r, NV>(depth, a + c, rows, at, out + c * NR);
    };
    auto padded = [&](int64_t r) { return round_up(n, r) <= NR ? round_up(n, r) : 2 * NR; };
    if (padded(R + 2) <= std::min(padded(R + 1), padded(R)))
      groups_of(std::integral_constant<int, R + 2>{});
    else if (padded(R + 1) <= padded(R))
      groups_of(std::integral_constant<int, R + 1>{});
    else
      groups_of(std::integral_constant<int, R>{});
  }

  // dL/dw. Returns dL/dbeta.
  double finish_columns() {
    Buffer<T> sum(d_pad_), line(w_.line());
    double energy = 0;
    for (int64_t c = 0; c < count_; c++) {
      const int64_t id = columns_.class_of(c);
      for (int64_t f = 0; f < d_panels_; f++)
        for (int64_t x = 0; x < NR; x++) {
          T total = 0;
          for (int64_t chunk = 0; chunk < chunks_; chunk++)
            total += grad_v_[((chunk * d_panels_ + f) * width_ + c) * NR + x];
          sum[f * NR + x] = total;
        }
      beside_.add_to_column(id, p_.d, sum);
      T* const out = grad_w_.place(id, sum);
      energy += through_norm<T>(p_, sum, w_.get(id, line), w_rnorm_[id], T(1), out);
      grad_w_.put(id, out);
    }
    return energy / p_.beta;
  }

  Problem p_;
  const Columns& columns_;
  const Step& step_;
  Reduction<T> reduction_;
  Rows<T> z_, w_;
  GradientRows<T> grad_z_, grad_w_;
  int64_t count_, panels_, width_, d_panels_, d_pad_, tall_, tiles_, chunks_;
  Buffer<T> v_, v_rows_, e_, z_rnorm_, w_rnorm_, pos_, sums_, grad_v_, zeros_;
  Smoothing<T> smoothing_;
  bool adds_positives_;
  std::optional<ClassSums<T>> classes_;  // in the class direction, if the step adds positives
  RankOne<T> beside_ = {};
  std::vector<T> scale_, inside_;
  double per_weight_ = 0, loss_ = 0;  // dL / d (weighted sum), and that sum
};

}  // namespace nckernels
