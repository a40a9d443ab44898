// Log-sum-exps and positives of features against themselves: a tile of the upper triangle adds to the sums of
// its rows and to those of its columns.
#pragma once

#include "forward.hpp"
#include "triangle.hpp"

namespace nckernels {
template <class G>
class SymmetricForward {
  using Tri = Triangle<G>;
  using T = typename G::T;
  using Operand = typename G::Operand;
  static constexpr int NV = G::NV, NR = G::NR, W = G::W;
  static constexpr int64_t STEP = Tri::STEP;

 public:
  SymmetricForward(const Problem& p, const Columns& columns) : p_(p), s_(p, columns) {}

  void run() {
    s_.sign_kept();
    inverse_norms(p_, s_.z, p_.m, s_.z_rnorm, [](int64_t j) { return j; });
    std::copy_n(s_.z_rnorm, p_.m, s_.w_rnorm);
    std::fill_n(static_cast<T*>(p_.pos), p_.m, T(0));
    Buffer<T> sums(2 * p_.m);
    Sums<T> total{sums, sums + p_.m};
    clear(total, p_.m);

    // Each chunk of row tiles has its own column sums, which are merged in order.
    const int64_t widest = std::min(s_.block_k, s_.all_panels * NR);
    const int64_t fit = p_.workspace / 8 / std::max<int64_t>(2 * widest * sizeof(T), 1);
    const int64_t most = std::clamp<int64_t>(fit, 1, 4 * std::max(p_.threads, 2));
    Buffer<Operand> v(widest * G::inner(p_.d));
    Buffer<T> column_sums(2 * most * widest);
    auto of_chunk = [&](int64_t i) {
      return Sums<T>{column_sums + 2 * i * widest, column_sums + (2 * i + 1) * widest};
    };
    for (int64_t first = 0; first < p_.m; first += s_.block_k) {
      const int64_t count = std::min(s_.block_k, p_.m - first), panels = (count + NR - 1) / NR;
      const int64_t tiles = s_.tiles_before(first + count), chunks = std::min(tiles, most);
      parallel(p_.threads, panels, [&](int64_t q) { s_.pack_prototypes(first, count, q, v, nullptr); });
      parallel(p_.threads, chunks, [&](int64_t i) {
        add_tiles(i * tiles / chunks, (i + 1) * tiles / chunks, first, count, v, of_chunk(i), total);
      });
      for (int64_t i = 0; i < chunks; i++)
        for (int64_t c = 0; c < count; c++)
          total.merge(first + c, of_chunk(i).largest[c], of_chunk(i).total[c]);
    }

    const auto out = p_.by_class ? LogSumExps<T>::of_classes(p_) : LogSumExps<T>::of_instances(p_);
    for (int64_t j = 0; j < p_.m; j++) out.put(j, s_.valid(j) ? total.lse(j) : minus_infinity<double>);
  }

  // The kept tiles are an output of the operator, so that all of them is initialised.
  void clear_rest_of_kept() const {
    if (s_.kept) std::fill(s_.kept + s_.kept_at[s_.kept_tiles], s_.kept + s_.room_to_keep(), T(0));
  }

 private:
  void clear(const Sums<T>& sums, int64_t n) const {
    std::fill_n(sums.largest, n, s_.shift_free ? T(0) : minus_infinity<T>);
    std::fill_n(sums.total, n, T(0));
  }

  // Sums over row tiles [tile, last_tile) and a block of columns, in steps that stay in the L2 cache.
  void add_tiles(int64_t tile, int64_t last_tile, int64_t first, int64_t count, const Operand* v,
                 Sums<T> by_column, Sums<T>& by_row) const {
    const int64_t panels = (count + NR - 1) / NR, first_panel = first / NR, last = first_panel + panels;
    Buffer<Operand> u(s_.tile_m * G::inner(p_.d));
    Buffer<T> own(s_.tile_m * std::min(STEP, panels) * NR), rows(s_.tile_m * W);
    clear(by_column, panels * NR);
    for (; tile < last_tile; tile++) {
      s_.pack_features(tile, u, nullptr);
      for (int64_t q = std::max(first_panel, s_.first_panel(tile)); q < last; q += STEP) {
        const int64_t end = std::min(q + STEP, last), column = (q - first_panel) * NR;
        const bool keep = tile < s_.kept_tiles;
        T* t = keep ? s_.kept_panel(tile, q) : own;
        if (keep)
          std::fill_n(t, (end - q) * s_.padded_rows(tile) * NR, T(0));  // also where nothing is computed
        s_.logits(tile, q, end, first, count, u, v, t, static_cast<T*>(p_.pos));
        Sums<T> here{by_column.largest + column, by_column.total + column};
        if (s_.shift_free)
          exponentials(tile, q, end, t, rows, here, by_row, keep);
        else
          streaming(tile, q, end, t, here, by_row);
      }
    }
  }

  // Without a shift: e = exp(t), in place if the tile is kept, summed with the exponentials of the biases as
  // weights.
  void exponentials(int64_t tile, int64_t begin, int64_t end, T* t, T* row_vectors, Sums<T>& by_column,
                    Sums<T>& by_row, bool keep) const {
    NCK_STAGE(exponentials);
    const int64_t padded = s_.padded_rows(tile), row0 = s_.first_row(tile);
    std::fill_n(row_vectors, s_.rows(tile) * W, T(0));
    for (int64_t q = begin; q < end; q++) {
      const int64_t n = s_.rows_above(tile, q);
      T* e = t + (q - begin) * padded * NR;
      Vec<T> weight[NV], column[NV];
      for (int v = 0; v < NV; v++) {
        weight[v] = load(s_.weight.data() + q * NR + v * W);
        column[v] = Vec<T>{};
      }
      for (int64_t r = 0; r < n; r++) {
        Vec<T> row{};
        for (int v = 0; v < NV; v++) {
          const Vec<T> x = exponential<T, true>(load(e + r * NR + v * W));
          if (keep) store(e + r * NR + v * W, x);
          column[v] += x * s_.weight[row0 + r];
          row += x * weight[v];
        }
        store(row_vectors + r * W, load(row_vectors + r * W) + row);
      }
      for (int v = 0; v < NV; v++) {
        T* to = by_column.total + (q - begin) * NR + v * W;
        store(to, load(to) + column[v]);
      }
    }
    for (int64_t r = 0; r < s_.rows(tile); r++) by_row.total[row0 + r] += sum<T>(load(row_vectors + r * W));
  }

  // With a running maximum, for temperatures and biases whose exponentials could leave the range of T.
  void streaming(int64_t tile, int64_t begin, int64_t end, const T* t, Sums<T>& by_column,
                 Sums<T>& by_row) const {
    NCK_STAGE(exponentials);
    const int64_t padded = s_.padded_rows(tile), row0 = s_.first_row(tile);
    // The largest of `count` vectors and the sum of exponentials relative to it, in each lane.
    auto lanes_of = [](int64_t count, auto&& at, Vec<T>& top, Vec<T>& total) {
      top = splat(minus_infinity<T>);
      total = Vec<T>{};
      for (int64_t i = 0; i < count; i++) top = maximum<T>(at(i), top);
      const Vec<T> shift = top == splat(minus_infinity<T>) ? Vec<T>{} : top;
      for (int64_t i = 0; i < count; i++) total += exponential<T>(at(i) - shift);
    };
    Vec<T> top, total;
    for (int64_t x = 0; x < (end - begin) * NR; x += W) {
      const T* column = t + x / NR * padded * NR + x % NR;
      const int64_t n = s_.rows_above(tile, begin + x / NR);
      lanes_of(n, [&](int64_t r) { return load(column + r * NR) + s_.bias[row0 + r]; }, top, total);
      for (int i = 0; i < W; i++) by_column.merge(x + i, top[i], total[i]);
    }
    for (int64_t r = 0; r < s_.rows(tile); r++) {
      const int64_t from = std::max(begin, (row0 + r) / NR);  // the panel of the diagonal
      auto at = [&](int64_t i) {
        const int64_t q = from + i / NV, x = i % NV * W;
        return load(t + (q - begin) * padded * NR + r * NR + x) + load(s_.bias.data() + q * NR + x);
      };
      lanes_of((end - from) * NV, at, top, total);
      const T best = largest<T>(top);
      if (best == minus_infinity<T>) continue;
      by_row.merge(row0 + r, best, sum<T>(total * exponential<T>(top - best)));
    }
  }

  const Problem& p_;
  Tri s_;
};

}  // namespace nckernels
