// Features against themselves: the tiles of the upper triangle of a symmetric matrix, and their masks.
//
// Row tile i begins at the panel of its first diagonal entry. Entries on and below the diagonal are excluded,
// so that each pair of samples is computed once, for both its row and its column.
#pragma once

#include "tiles.hpp"

namespace nckernels {
template <class G>
struct Triangle : Tiles<G> {
  using Base = Tiles<G>;
  using T = typename G::T;
  using Operand = typename G::Operand;
  using Label = typename Simd<T>::Int;
  static constexpr int NV = G::NV, W = G::W, NR = G::NR;
  static constexpr int64_t MR = G::MR;
  using Base::columns, Base::p, Base::tile_m, Base::tiles, Base::block_k, Base::d_pad, Base::all_panels;
  using Base::first_row, Base::padded_rows, Base::rows, Base::valid;

  std::vector<T> bias, weight;  // b and, shift-free, exp(b) of every sample; -inf and 0 past the end
  std::vector<Label> label;     // same_label: the rank of every sample's label; -1 past the end
  std::vector<char> left_out;   // panels with ignored columns
  bool any_left_out = false;
  std::vector<int64_t> kept_at;                    // offset of each tile in the kept tiles
  std::vector<int64_t> positives, positives_from;  // samples by the row tile of their positive entry

  Triangle(const Problem& problem, const Columns& cols, bool reads_kept = false) : Base(problem, cols) {
    plan();
    if (reads_kept) this->check_kept();
    const int64_t padded = all_panels * NR;
    bias.assign(padded, minus_infinity<T>);
    weight.assign(padded, T(0));
    left_out.assign(all_panels, 0);
    const T* given = this->sample_bias ? this->sample_bias : this->class_bias;
    for (int64_t j = 0; j < p.m; j++) {
      bias[j] = given ? given[j] : T(0);
      weight[j] = this->shift_free ? std::exp(bias[j]) : T(1);
      if (!valid(j)) left_out[j / NR] = any_left_out = true;
    }
    if (p.exclude == kSameLabel) rank_labels();
    sort_positives();
  }

  // A group has one tile per thread. One thread plans for two, so that the result is the same. Wider blocks
  // gain nothing, and their entries would reduce the height of tiles.
  void plan() {
    const int64_t threads = std::max(p.threads, 2);
    Base::plan(threads, threads, 1536);
    kept_at.assign(tiles + 1, 0);
    for (int64_t i = 0; i < tiles; i++)
      kept_at[i + 1] = kept_at[i] + (all_panels - first_panel(i)) * padded_rows(i) * NR;
    this->kept_tiles = 0;
    while (this->kept && this->kept_tiles < tiles && kept_at[this->kept_tiles + 1] <= this->room_to_keep())
      this->kept_tiles++;
  }

  // Labels as numbers from 0 in an integer type as wide as T, so that vectors of them mask vectors of logits.
  void rank_labels() {
    std::vector<int64_t> sorted(p.target, p.target + p.m);
    std::sort(sorted.begin(), sorted.end());
    sorted.erase(std::unique(sorted.begin(), sorted.end()), sorted.end());
    label.assign(all_panels * NR, -1);
    for (int64_t j = 0; j < p.m; j++)
      label[j] =
          static_cast<Label>(std::lower_bound(sorted.begin(), sorted.end(), p.target[j]) - sorted.begin());
  }

  // The positive of sample j is the entry (j, c), which by symmetry is stored at (min, max).
  void sort_positives() {
    positives_from.assign(tiles + 1, 0);
    auto tile_of = [&](int64_t j) { return std::min(j, columns.positive[j]) / tile_m; };
    for (int64_t j = 0; j < p.m; j++)
      if (valid(j)) positives_from[tile_of(j) + 1]++;
    for (int64_t i = 0; i < tiles; i++) positives_from[i + 1] += positives_from[i];
    positives.resize(positives_from[tiles]);
    std::vector<int64_t> next(positives_from.begin(), positives_from.end() - 1);
    for (int64_t j = 0; j < p.m; j++)
      if (valid(j)) positives[next[tile_of(j)]++] = j;
  }

  // The first panel of a tile, and the row tiles that have entries in columns before `end`.
  int64_t first_panel(int64_t tile) const { return first_row(tile) / NR; }
  int64_t tiles_before(int64_t end) const { return std::min(tiles, (end + tile_m - 1) / tile_m); }

  // Rows of a tile with entries in a panel: those up to the diagonal. Rows below are not computed.
  int64_t rows_above(int64_t tile, int64_t panel) const {
    return std::min(rows(tile), (panel + 1) * NR - first_row(tile));
  }

  T* kept_panel(int64_t tile, int64_t panel) const {
    return this->kept + kept_at[tile] + (panel - first_panel(tile)) * padded_rows(tile) * NR;
  }

  // Calls `visit(j, entry)` for the samples whose positive is in the panels [begin, end) of a tile, stored at
  // `t`.
  template <class Number, class F>
  void each_positive(int64_t tile, int64_t begin, int64_t end, Number* t, F&& visit) const {
    const int64_t padded = padded_rows(tile);
    for (int64_t i = positives_from[tile]; i < positives_from[tile + 1]; i++) {
      const int64_t j = positives[i], c = std::max(j, columns.positive[j]);
      if (c < begin * NR || c >= end * NR) continue;
      const int64_t r = std::min(j, columns.positive[j]) - first_row(tile);
      visit(j, t[((c / NR - begin) * padded + r) * NR + c % NR]);
    }
  }

  // Logits of the panels [begin, end) of a tile, -inf where excluded, from the block of columns
  // [first, first + count) that is packed in `v`. Those of positives are copied to `pos` unless it is null.
  void logits(int64_t tile, int64_t begin, int64_t end, int64_t first, int64_t count, const Operand* u,
              const Operand* v, T* t, T* pos) const {
    const int64_t padded = padded_rows(tile), first_panel = first / NR;
    auto make = [&](int64_t from, int64_t to, int64_t above) {
      this->products(tile, above, first, count, from - first_panel, to - first_panel, u, v,
                     t + (from - begin) * padded * NR);
    };
    int64_t q = begin;
    for (; q < end && rows_above(tile, q) < rows(tile); q++)  // panels that the diagonal crosses
      make(q, q + 1, rows_above(tile, q));
    make(q, end, padded);
    if (pos) each_positive(tile, begin, end, t, [&](int64_t j, T value) { pos[j] = value; });
    if (p.exclude == kTarget)
      each_positive(tile, begin, end, t, [&](int64_t, T& value) { value = minus_infinity<T>; });
    for (q = begin; q < end; q++) mask(tile, q, t + (q - begin) * padded * NR);
  }

  void mask(int64_t tile, int64_t panel, T* t) const {
    const int64_t n = rows_above(tile, panel), row0 = first_row(tile), c0 = panel * NR;
    if (p.exclude == kSameLabel) mask_labels(n, row0, c0, t);
    for (int64_t r = std::max<int64_t>(c0 - row0, 0); r < n; r++)  // on and below the diagonal
      std::fill_n(t + r * NR, std::min<int64_t>(row0 + r - c0 + 1, NR), minus_infinity<T>);
    if (!any_left_out) return;
    for (int64_t r = 0; r < n; r++)
      if (!valid(row0 + r)) std::fill_n(t + r * NR, NR, minus_infinity<T>);
    for (int64_t x = 0; left_out[panel] && x < NR && c0 + x < p.m; x++)
      if (!valid(c0 + x))
        for (int64_t r = 0; r < n; r++) t[r * NR + x] = minus_infinity<T>;
  }

  void mask_labels(int64_t n, int64_t row0, int64_t c0, T* t) const {
    typename Simd<T>::I of_column[NV];
    std::memcpy(of_column, label.data() + c0, sizeof of_column);
    for (int64_t r = 0; r < n; r++)
      for (int v = 0; v < NV; v++) {
        T* to = t + r * NR + v * W;
        store(to, of_column[v] == label[row0 + r] ? splat(minus_infinity<T>) : load(to));
      }
  }
};

}  // namespace nckernels
