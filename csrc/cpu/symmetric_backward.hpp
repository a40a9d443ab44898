// The gradient of features against themselves. With E = exp(t) where not excluded, g the upstream gradients
// and D = exp(lse), the two derivatives by the logit of a pair i, j add up to
//     T_ij = E_ij (g_j e^{b_i} / D_j + g_i e^{b_j} / D_i),   symmetric as E is,
// and the gradient of the unit features is beta T U. A tile of the upper triangle gives T U to its rows and
// T^T U to its columns, in groups of row tiles as in backward.hpp.
#pragma once

#include "same_label.hpp"
#include "triangle.hpp"

namespace nckernels {
template <class G>
class SymmetricBackward {
  using Tri = Triangle<G>;
  using T = typename G::T;
  using Operand = typename G::Operand;
  static constexpr int NV = G::NV, NR = G::NR, W = G::W;

 public:
  // `positives`, or null: pairs of one label, whose gradient is added, and a typical cosine of such a pair.
  SymmetricBackward(const Problem& p, const Columns& columns, const Gradients& g,
                    SameLabel<T>* positives = nullptr, double typical = 0)
      : p_(p),
        columns_(columns),
        g_(g),
        positives_(positives),
        in_entries_(positives && p.exclude == kSelf),
        typical_(typical),
        s_(p, columns, true),
        grad_z_(static_cast<T*>(g.z)),
        grad_bias_(static_cast<T*>(g.sample_bias ? g.sample_bias : g.class_bias)),
        scale_(s_.all_panels * NR, T(0)),
        shift_(s_.all_panels * NR, T(0)),
        energy_(std::max(s_.tiles, s_.all_panels), 0.0),
        lost_(s_.tiles, 0.0),
        widest_(std::min(s_.block_k, s_.all_panels * NR)),
        group_(std::min(s_.group, s_.tiles)),
        v_(s_.kept_tiles < s_.tiles ? widest_ * G::inner(p.d) : 0),
        v_rows_(g.z || g.beta ? widest_ * s_.d_pad : 0),
        entries_(group_ * s_.entries_of_tile(widest_)),
        u_rows_(g.z ? group_ * G::by_feature(s_.tile_m, s_.d_pad) : 0),
        grad_v_(g.z ? widest_ * s_.d_pad : 0),
        bias_shares_(grad_bias_ ? group_ * widest_ : 0) {}

  // Runs blocks of columns from the last to the first. After a block, its samples have their sums as rows
  // from this and later blocks, and their sums as columns from all row tiles.
  void run() {
    prepare();
    const int64_t blocks = (p_.m + s_.block_k - 1) / s_.block_k;
    for (int64_t b = blocks - 1; b >= 0; b--) {
      const Block block(b * s_.block_k, std::min(p_.m, (b + 1) * s_.block_k));
      parallel(p_.threads, block.panels,
               [&](int64_t q) { s_.pack_prototypes(block.first, block.end - block.first, q, v_, v_rows_); });
      if (grad_z_) std::fill_n(static_cast<T*>(grad_v_), block.panels * NR * s_.d_pad, T(0));
      const int64_t tiles = s_.tiles_before(block.end);
      for (int64_t begin = 0; begin < tiles; begin += group_) {
        const int64_t here = std::min(group_, tiles - begin);
        parallel(p_.threads, here, [&](int64_t i) { make_rows(block, begin + i, i); });
        for (int64_t i = 0; i < here && grad_bias_; i++)
          for (int64_t c = std::max(block.first, s_.first_panel(begin + i) * NR); c < block.end; c++)
            grad_bias_[c] += weight_of(c) * bias_shares_[i * widest_ + c - block.first];
        if (grad_z_) add_columns(block, begin, here);
      }
      if (grad_z_) parallel(p_.threads, block.panels, [&](int64_t q) { finish(block, q); });
    }
    if (!g_.beta) return;
    double total = 0;
    for (double e : energy_) total += e;
    for (double e : lost_) total += e;
    *g_.beta = total;
  }

 private:
  // Columns [first, end), the panels that hold them, and the number of their first one.
  struct Block {
    int64_t first, end, panels, first_panel;

    Block(int64_t begin, int64_t stop)
        : first(begin), end(stop), panels((stop - begin + NR - 1) / NR), first_panel(begin / NR) {}
  };

  void prepare() {
    const T* g = static_cast<const T*>(p_.by_class ? g_.class_lse : g_.instance_lse);
    const auto lse = p_.by_class ? LogSumExps<T>::of_classes(p_) : LogSumExps<T>::of_instances(p_);
    for (int64_t j = 0; g && j < p_.m; j++) s_.upstream(g[j], lse.get(j), scale_[j], shift_[j]);
    if (!in_entries_) return;
    label_.assign(s_.all_panels * NR, -1);
    weight_.assign(s_.all_panels * NR, T(0));
    for (int64_t j = 0; j < p_.m; j++)
      if (positives_->any(j)) {
        label_[j] = static_cast<typename Simd<T>::Int>(positives_->group(j));
        weight_[j] = positives_->weight(j);
      }
  }

  T weight_of(int64_t j) const { return s_.shift_free ? s_.weight[j] : T(1); }
  Operand* entries_of(int64_t i) { return entries_ + i * s_.entries_of_tile(widest_); }
  Operand* u_rows_of(int64_t i) { return u_rows_ + i * G::by_feature(s_.tile_m, s_.d_pad); }

  // Tile number `i` of a group: its entries of T, and T U for its rows, in steps that fit the L2 cache.
  void make_rows(const Block& block, int64_t tile, int64_t i) {
    const bool is_kept = tile < s_.kept_tiles, products = g_.z || g_.beta;
    const int64_t padded = s_.padded_rows(tile);
    Buffer<Operand> u(is_kept ? 0 : s_.tile_m * G::inner(p_.d));
    Buffer<T> product(products ? padded * s_.d_pad : 0);
    if (!is_kept || grad_z_) s_.pack_features(tile, u, grad_z_ ? u_rows_of(i) : nullptr);
    if (products) std::fill_n(static_cast<T*>(product), padded * s_.d_pad, T(0));
    EntriesOf<G> entries(s_, tile, entries_of(i));
    Buffer<T> own(is_kept ? 0 : entries.room());
    // From here on panels are counted from the first one of the block.
    const int64_t begin = std::max<int64_t>(0, s_.first_panel(tile) - block.first_panel);
    for (int64_t q = begin; q < block.panels; q += Tri::STEP) {
      const int64_t end = std::min<int64_t>(q + Tri::STEP, block.panels), first = block.first_panel;
      T* const t = is_kept ? s_.kept_panel(tile, first + q) : entries.logits(q, q - begin, own);
      if (!is_kept)
        s_.logits(tile, first + q, first + end, block.first, block.end - block.first, u, v_, t, nullptr);
      for (int64_t x = q; x < end; x++) {
        T* shares = grad_bias_ ? bias_shares_ + i * widest_ + x * NR : nullptr;
        const T* e = t + (x - q) * padded * NR;
        fill_entries(tile, first + x, e, entries.panel(x, block.first, block.end - block.first), shares);
        if (G::RESTS && g_.beta) lost_[tile] += lost(entries, tile, first + x, e);
        entries.put(x);
      }
      if (products)
        G::times_prototypes(padded, s_.rows_above(tile, first + end - 1), q, end, block.panels,
                            block.panels * NR, s_.d_panels, entries_of(i) + q * G::ENTRIES * padded * NR,
                            v_rows_, product, true);
    }
    if (grad_z_)
      add_rows(block, tile, product);
    else if (products)
      add_energy(tile, product);
  }

  // The rounding error of a panel's share of dL/dbeta: of the entries for rows, or half of that and half of
  // the error of the entries for columns, as `finish` adds them.
  double lost(const EntriesOf<G>& entries, int64_t tile, int64_t panel, const T* e) const {
    const bool exponentials = tile < s_.kept_tiles && s_.shift_free;
    const Rounding rounding = grad_z_ ? Rounding::kMean : Rounding::kByRows;
    double total = entries.lost(s_.rows_above(tile, panel), rounding, e, exponentials);
    if (g_.pos)
      s_.each_positive(tile, panel, panel + 1, e, [&](int64_t j, const T& entry) {
        const int64_t at = &entry - e, c = columns_.positive[j];
        if (c < j && columns_.positive[c] == j) return;  // the entry of both
        if (entry == (exponentials ? T(0) : minus_infinity<T>))
          total += entries.lost(at / NR, at % NR, rounding, static_cast<const T*>(p_.pos)[j]);
      });
    return total / p_.beta;
  }

  // If only dL/dbeta is wanted: the sum of T_ij u_i . u_j over all pairs.
  void add_energy(int64_t tile, const T* product) {
    Buffer<T> sum(s_.d_pad), line(s_.z.line());
    for (int64_t r = 0; r < s_.rows(tile); r++) {
      const int64_t j = s_.first_row(tile) + r;
      if (!columns_.reads(j)) continue;
      G::gather_row(product, s_.padded_rows(tile), r, s_.d_pad, sum);
      energy_[tile] += dot<T>(sum, s_.z.get(j, line), p_.d) * s_.z_rnorm[j];
    }
  }

  // A panel of a tile of T, from t or the kept exponentials.
  void fill_entries(int64_t tile, int64_t panel, const T* from, T* a, T* share) {
    NCK_STAGE(entries);
    const int64_t padded = s_.padded_rows(tile), row0 = s_.first_row(tile), n = s_.rows_above(tile, panel);
    if (!s_.shift_free)
      shifted(panel, n, row0, from, a, share);
    else if (tile < s_.kept_tiles)
      scaled<true>(panel, n, row0, from, a, share);
    else
      scaled<false>(panel, n, row0, from, a, share);
    if (in_entries_) subtract_positives(panel, n, row0, a);
    if (in_entries_ && g_.beta) lost_[tile] -= typical_ * sum_of(n, a);
    std::fill_n(a + n * NR, (padded - n) * NR, T(0));
    if (const T* g_pos = static_cast<const T*>(g_.pos))
      s_.each_positive(tile, panel, panel + 1, a, [&](int64_t j, T& entry) { entry += g_pos[j]; });
  }

  // Subtracts positives from the entries right of the diagonal whose row and column have one label.
  void subtract_positives(int64_t panel, int64_t n, int64_t row0, T* a) const {
    using Int = typename Simd<T>::Int;
    for (int v = 0; v < NV; v++) {
      const int64_t first = panel * NR + v * W;
      typename Simd<T>::I group, column;
      std::memcpy(&group, label_.data() + first, sizeof group);
      for (int x = 0; x < W; x++) column[x] = static_cast<Int>(first + x);
      const Vec<T> weight = load(weight_.data() + first);
      auto subtract = [&](int64_t r, auto positive) {
        T* to = a + r * NR + v * W;
        store(to, positive ? load(to) - (weight + weight_[row0 + r]) : load(to));
      };
      const int64_t left =
          std::clamp<int64_t>(first - row0, 0, n);  // rows whose diagonal is left of the vector
      for (int64_t r = 0; r < left; r++)
        if (label_[row0 + r] >= 0) subtract(r, group == label_[row0 + r]);
      for (int64_t r = left; r < n; r++)
        if (const auto label = label_[row0 + r]; label >= 0)
          subtract(r, (group == label) & (column > static_cast<Int>(row0 + r)));
    }
  }

  // With positives subtracted the entries of all pairs add up to 0, but for the rounding of the log-sum-exps.
  // Their products with cosines near 1 would keep this error, those with 1 - cosine do not.
  static double sum_of(int64_t n, const T* a) {
    Vec<T> total[NV] = {};
    for (int64_t r = 0; r < n; r++)
      for (int v = 0; v < NV; v++) total[v] += load(a + r * NR + v * W);
    double whole = 0;
    for (int v = 0; v < NV; v++) whole += sum<T>(total[v]);
    return whole;
  }

  // One panel, T = E (e^{b_i} scale_j + scale_i e^{b_j}).
  template <bool KEPT>
  void scaled(int64_t panel, int64_t n, int64_t row0, const T* e, T* a, T* share) {
    Vec<T> scale[NV], weight[NV], column[NV];
    for (int v = 0; v < NV; v++) {
      scale[v] = load(scale_.data() + panel * NR + v * W);
      weight[v] = load(s_.weight.data() + panel * NR + v * W);
      column[v] = Vec<T>{};
    }
    for (int64_t r = 0; r < n; r++) {
      const T row_scale = scale_[row0 + r], row_weight = s_.weight[row0 + r];
      Vec<T> row{};
      for (int v = 0; v < NV; v++) {
        Vec<T> x = load(e + r * NR + v * W);
        if (!KEPT) x = exponential<T, true>(x);
        store(a + r * NR + v * W, x * (scale[v] * row_weight + weight[v] * row_scale));
        if (!share) continue;
        column[v] += x * row_scale;
        row += x * scale[v];
      }
      if (share) grad_bias_[row0 + r] += row_weight * sum<T>(row);
    }
    for (int v = 0; v < NV && share; v++) store(share + v * W, column[v]);
  }

  // One panel, T = g_j exp(t + b_i - lse_j) + g_i exp(t + b_j - lse_i).
  void shifted(int64_t panel, int64_t n, int64_t row0, const T* logits, T* a, T* share) {
    Vec<T> scale[NV], shift[NV], bias[NV], column[NV];
    for (int v = 0; v < NV; v++) {
      scale[v] = load(scale_.data() + panel * NR + v * W);
      shift[v] = load(shift_.data() + panel * NR + v * W);
      bias[v] = load(s_.bias.data() + panel * NR + v * W);
      column[v] = Vec<T>{};
    }
    for (int64_t r = 0; r < n; r++) {
      const int64_t i = row0 + r;
      Vec<T> row{};
      for (int v = 0; v < NV; v++) {
        const Vec<T> t = load(logits + r * NR + v * W);
        const Vec<T> of_column = scale[v] * exponential<T>(t + s_.bias[i] - shift[v]);
        const Vec<T> of_row = exponential<T>(t + bias[v] - shift_[i]) * scale_[i];
        store(a + r * NR + v * W, of_column + of_row);
        column[v] += of_row;
        row += of_column;
      }
      if (share) grad_bias_[i] += sum<T>(row);
    }
    for (int v = 0; v < NV && share; v++) store(share + v * W, column[v]);
  }

  // Adds T U of a tile's rows to the gradient. In a tile that crosses the end of the block, samples of the
  // later block have their gradient already.
  void add_rows(const Block& block, int64_t tile, const T* product) {
    const int64_t padded = s_.padded_rows(tile), row0 = s_.first_row(tile);
    for (int64_t r = 0; r < std::min(s_.rows(tile), block.end - row0); r++)
      for (int64_t f = 0; f < s_.d_panels; f++) {
        const T* x = product + (f * padded + r) * NR;
        T* out = grad_z_ + (row0 + r) * p_.d + f * NR;
        const int64_t width = std::min<int64_t>(NR, p_.d - f * NR);
        for (int64_t i = 0; i < width; i++) out[i] = block.end == p_.m ? x[i] : out[i] + x[i];
      }
  }

  // Adds T^T U of a group of tiles, in order, for the columns of a block.
  void add_columns(const Block& block, int64_t begin, int64_t here) {
    const int64_t padded = block.panels * NR;
    s_.share_out(block.panels, [&](int64_t first, int64_t last, int64_t f_first, int64_t f_last) {
      for (int64_t i = 0; i < here; i++) {
        const int64_t tile = begin + i, padded_rows = s_.padded_rows(tile), rows = s_.rows(tile);
        // First the panels that the diagonal crosses, one by one with the rows above it, then the others.
        int64_t q = std::max(first, s_.first_panel(tile) - block.first_panel);
        const Operand* a = G::by_columns(entries_of(i), padded_rows);
        auto add = [&](int64_t end, int64_t above) {
          G::times_features(padded_rows, above, q * NR, end * NR, f_first, f_last, a, u_rows_of(i), s_.d_pad,
                            padded, grad_v_);
        };
        for (; q < last && s_.rows_above(tile, block.first_panel + q) < rows; q++)
          add(q + 1, s_.rows_above(tile, block.first_panel + q));
        add(last, rows);
      }
    });
  }

  // Completes one panel of a block: adds the sums of its samples as rows and as columns, and takes them
  // through the normalisation.
  void finish(const Block& block, int64_t panel) {
    const int64_t d = p_.d, padded = block.panels * NR;
    Buffer<T> lines(G::COLUMNS * s_.d_pad), line(s_.z.line());
    for (int64_t c = panel * NR; c < std::min(block.end - block.first, (panel + 1) * NR); c++) {
      if (c % G::COLUMNS == 0) G::gather_columns(grad_v_, padded, c, s_.d_pad, lines);
      T* x = lines + c % G::COLUMNS * s_.d_pad;
      const int64_t j = block.first + c;
      T* out = grad_z_ + j * d;
      if (!columns_.reads(j)) {
        std::fill_n(out, d, T(0));
        continue;
      }
      for (int64_t i = 0; i < d; i++) x[i] += out[i];
      if (positives_ && !in_entries_) positives_->subtract_gradient(j, s_.z.get(j, line), x);
      // Each pair is counted twice, in the gradients of both samples.
      energy_[block.first_panel + panel] +=
          0.5 * through_norm(p_, x, s_.z.get(j, line), s_.z_rnorm[j], s_.beta, out);
    }
  }

  const Problem& p_;
  const Columns& columns_;
  const Gradients& g_;
  SameLabel<T>* positives_;
  // Whether positives are subtracted from entries before rounding: the entries of a sample that has been
  // learnt are differences of nearly equal numbers. In decoupled losses positives are not among the entries.
  bool in_entries_;
  double typical_;
  Tri s_;
  std::vector<typename Simd<T>::Int>
      label_;  // and the weights of positives, if they are in the entries; by column
  std::vector<T> weight_;
  T *grad_z_, *grad_bias_;
  std::vector<T> scale_, shift_;
  std::vector<double> energy_, lost_;  // shares of dL/dbeta, and their rounding errors
  int64_t widest_, group_;
  Buffer<Operand> v_, v_rows_, entries_,
      u_rows_;  // a block of columns in two layouts; of a group of row tiles
  Buffer<T> grad_v_, bias_shares_;
};

}  // namespace nckernels
