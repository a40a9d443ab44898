// The backward pass. With A = dL/dt for a tile and the packed operands U = beta u, V = unit prototypes:
//     dL/dU = A V,   dL/dV = A^T U,   and through the normalisation dL/dx = r (g - (g . u) u).
//
// Row tiles are processed in groups. First each thread takes a tile of the group and computes its entries A
// and the product A V for its rows. Then the threads divide features and columns among themselves and add A^T
// U of all tiles of the group, in order. All threads share one accumulator without atomics, and the result
// does not depend on the order in which threads finish.
#pragma once

#include "smoothing.hpp"
#include "tiles.hpp"

namespace nckernels {
// Where a pass writes one gradient. Several passes can add to it: the first one overwrites the sums, and the
// last one completes the rows.
template <class T>
struct Output {
  GradientRows<T> rows;
  // Accumulator for rows that are rounded after several passes: row by row, or for dL/dw and engines with
  // PANELS_APART in the layout of G::times_features for all columns.
  T* sums = nullptr;
  bool first = true, last = true;

  bool has_sums() const { return sums_of(0, 0); }
  T* sums_of(int64_t j, int64_t d) const { return rows.place(j, sums ? sums + j * d : nullptr); }
};

template <class G>
class BackwardPass {
  using Tl = Tiles<G>;
  using T = typename G::T;
  using Operand = typename G::Operand;
  static constexpr int NV = G::NV, NR = G::NR, W = G::W;

 public:
  BackwardPass(const Problem& p, const Columns& columns, const Gradients& g)
      : BackwardPass(p, columns, g, {{g.z, false, p.d}}, {{g.w, false, p.d}}, {}) {}

  // `z` and `w` replace those of `g`.
  BackwardPass(const Problem& p, const Columns& columns, const Gradients& g, Output<T> z, Output<T> w,
               RankOne<T> beside)
      : p_(p),
        columns_(columns),
        g_(g),
        z_(z),
        w_(w),
        beside_(beside),
        in_entries_(G::RESTS && beside),
        s_(p, columns, true),
        need_rows_(z.rows || (g.beta && !w.rows)),
        class_scale_(s_.all_panels * NR, T(0)),
        class_shift_(s_.all_panels * NR, T(0)),
        row_scale_(p.m),
        row_shift_(p.m) {
    prepare();
  }

  void run() {
    Room room(*this);
    for (int64_t j = 0; j < p_.m && !columns_.count; j++) z_.rows.clear(j);
    for (int64_t first = 0; first < columns_.count; first += s_.block_k) {
      const Block block(first, std::min(s_.block_k, columns_.count - first),
                        first + s_.block_k >= columns_.count);
      parallel(p_.threads, block.panels, [&](int64_t q) {
        s_.pack_prototypes(first, block.count, q, room.v,
                           need_rows_ ? static_cast<Operand*>(room.v_rows) : nullptr);
      });
      if (w_.rows && (w_.first || !sums_in_panels()))
        std::fill_n(columns_of(room, block), block.panels * NR * s_.d_pad, T(0));
      for (int64_t begin = 0; begin < s_.tiles; begin += room.group) {
        make_rows(room, block, begin);
        if (w_.rows) add_columns(room, block, begin);
      }
      if (w_.rows && (w_.last || !sums_in_panels()))
        parallel(p_.threads, block.panels, [&](int64_t q) { finish_columns(room, block, q); });
    }
    if (!g_.beta) return;
    double total = 0;
    for (double e : need_rows_ ? room.energy : room.class_energy) total += e;
    for (double e : room.lost) total += e;
    *g_.beta += total / p_.beta;
  }

 private:
  // Columns [first, first + count).
  struct Block {
    int64_t first, count, panels;
    bool is_last;

    Block(int64_t start, int64_t n, bool last)
        : first(start), count(n), panels((n + NR - 1) / NR), is_last(last) {}
  };

  // Scratch: a block of columns packed in two layouts, its gradient, and the operands that a group of row
  // tiles hands to the threads that add up columns.
  struct Room {
    int64_t widest, group;                     // columns, tiles
    std::vector<double> energy, class_energy;  // shares of dL/dbeta per row tile, per panel
    std::vector<double> lost;                  // their rounding errors, per row tile
    Buffer<T> sums;      // accumulator of dL/dU over column blocks, if there is no other
    Buffer<T> products;  // A V of all tiles, if entries are in place
    Buffer<T> grad_v, bias_shares;
    Buffer<Operand> v, v_rows, entries, u_rows;

    explicit Room(const BackwardPass& pass) : Room(pass, pass.s_, pass.g_) {}
    Room(const BackwardPass& pass, const Tl& s, const Gradients& g)
        : widest(std::min(s.block_k, s.all_panels * NR)),
          group(std::min(s.group, s.tiles)),
          energy(std::max<int64_t>(s.tiles, 1), 0.0),
          class_energy(s.all_panels, 0.0),
          lost(energy.size(), 0.0),
          sums(pass.z_.rows && !pass.z_.has_sums() && s.block_k < pass.columns_.count && !s.in_place
                   ? s.p.m * s.p.d
                   : 0),
          products(pass.need_rows_ && s.in_place ? round_up(s.p.m, G::MR) * s.d_pad : 0),
          grad_v(pass.w_.rows && !pass.sums_in_panels() ? widest * s.d_pad : 0),
          bias_shares(g.class_bias && g.instance_lse ? group * widest : 0),
          v(s.kept_tiles < s.tiles ? widest * G::inner(s.p.d) : 0),
          v_rows(pass.need_rows_ ? widest * s.d_pad : 0),
          entries(s.in_place ? 0 : group * s.entries_of_tile(widest)),
          u_rows(pass.w_.rows ? (s.in_place ? s.tiles : group) * G::by_feature(s.tile_m, s.d_pad) : 0) {}

    // Of tile `i` of a group that begins with tile `begin`.
    Operand* entries_of(int64_t i, int64_t begin, const Block& block, const Tl& s) {
      if (!s.in_place) return entries + i * s.entries_of_tile(widest);
      return reinterpret_cast<Operand*>(s.kept_tile(begin + i, block.first / NR));
    }
    Operand* u_rows_of(int64_t i, int64_t begin, const Tl& s) {
      return u_rows + (s.in_place ? begin + i : i) * G::by_feature(s.tile_m, s.d_pad);
    }
    T* bias_of(int64_t i) { return bias_shares ? bias_shares + i * widest : nullptr; }
  };

  // Entries and A V of the tiles of a group, one thread per tile.
  void make_rows(Room& room, const Block& block, int64_t begin) {
    const int64_t here = std::min(room.group, s_.tiles - begin);
    parallel(p_.threads, here, [&](int64_t i) {
      const int64_t tile = begin + i;
      const bool is_kept = tile < s_.kept_tiles;  // then the product need not be recomputed
      Buffer<Operand> u(is_kept ? 0 : s_.tile_m * G::inner(p_.d));
      Operand* by_feature = w_.rows ? room.u_rows_of(i, begin, s_) : nullptr;
      const bool has_features = block.first > 0 && s_.in_place;
      if (!is_kept || (by_feature && !has_features)) s_.pack_features(tile, u, by_feature);
      Operand* a = room.entries_of(i, begin, block, s_);
      fill_entries(room, block, tile, u, a, room.bias_of(i));
      if (need_rows_) add_rows(room, block, tile, a);
    });
    if (!room.bias_shares) return;
    for (int64_t i = 0; i < here; i++)
      for (int64_t c = 0; c < block.count; c++)
        static_cast<T*>(g_.class_bias)[columns_.class_of(block.first + c)] += room.bias_of(i)[c];
  }

  // Upstream gradients and log-sum-exps; those of classes in the order of the columns.
  void prepare() {
    const T *g_class = static_cast<const T*>(g_.class_lse), *g_row = static_cast<const T*>(g_.instance_lse);
    const auto of_classes = LogSumExps<T>::of_classes(p_), of_rows = LogSumExps<T>::of_instances(p_);
    for (int64_t c = 0; c < columns_.count && g_class; c++) {
      const int64_t id = columns_.class_of(c);
      s_.upstream(g_class[id], of_classes.get(id), class_scale_[c], class_shift_[c]);
    }
    for (int64_t j = 0; j < p_.m && g_row; j++)
      s_.upstream(g_row[j], of_rows.get(j), row_scale_[j], row_shift_[j]);
  }

  // A of one tile and block of columns, and its column sums, the gradients of class biases.
  void fill_entries(Room& room, const Block& block, int64_t tile, const Operand* u, Operand* a,
                    T* bias_share) {
    NCK_STAGE(entries);
    const int64_t n = s_.rows(tile), padded = s_.padded_rows(tile), row0 = s_.first_row(tile);
    const bool is_kept = tile < s_.kept_tiles, by_class = g_.class_lse, by_row = g_.instance_lse;
    PositivesOf<G> positives(s_, tile, block.first, block.count, static_cast<const T*>(g_.pos));
    EntriesOf<G> entries(s_, tile, a);
    Buffer<T> own(is_kept ? 0 : entries.room());
    for (int64_t q = 0; q < block.panels; q++) {
      if (!is_kept && q % Tl::STEP == 0)
        s_.logits(tile, block.first, block.count, q, std::min(q + Tl::STEP, block.panels), u, room.v,
                  entries.logits(q, q, own), nullptr);
      const T* e = is_kept ? s_.kept_tile(tile, block.first / NR + q) : entries.logits(q, q, own);
      T* to = entries.panel(q, block.first, block.count);
      if (s_.shift_free)
        scaled(q, block.first, block.count, n, row0, e, to, is_kept, by_class, by_row, bias_share);
      else
        shifted(q, block.first, block.count, n, row0, e, to, by_class, by_row, bias_share);
      std::fill(to + n * NR, to + padded * NR, T(0));
      if (in_entries_) add_beside(q, block, row0, n, to);
      positives.add(q, to);
      if (G::RESTS && g_.beta)
        room.lost[tile] += lost(entries, positives, tile, n, e, is_kept && s_.shift_free);
      entries.put(q);
    }
  }

  // Adds the rank-one gradient to one panel.
  void add_beside(int64_t q, const Block& block, int64_t row0, int64_t n, T* a) const {
    T factor[NR];
    for (int64_t x = 0; x < NR; x++) {
      const int64_t c = q * NR + x;
      factor[x] = c < block.count
                      ? beside_.of_columns[columns_.class_of(block.first + c)] * beside_.of_entries
                      : T(0);
    }
    for (int64_t r = 0; r < n; r++)
      for (int v = 0; v < NV; v++) {
        T* to = a + r * NR + v * W;
        store(to, load(to) + load(factor + v * W) * beside_.of_rows[row0 + r]);
      }
  }

  // The rounding error of the last panel's share of dL/dbeta. `e` is t or exp(t).
  double lost(const EntriesOf<G>& entries, const PositivesOf<G>& positives, int64_t tile, int64_t n,
              const T* e, bool exponentials) const {
    const Rounding rounding = need_rows_ ? Rounding::kByRows : Rounding::kInPairs;
    double total = entries.lost(n, rounding, e, exponentials);
    positives.of_last_panel([&](int64_t r, int64_t x) {
      const T* pos = static_cast<const T*>(p_.pos) + s_.first_row(tile);
      if (e[r * NR + x] == (exponentials ? T(0) : minus_infinity<T>))
        total += entries.lost(r, x, rounding, pos[r]);
    });
    return total;
  }

  // One panel, A = exp(t) (exp(b_j) class_scale_c + row_scale_j exp(b_c)).
  void scaled(int64_t q, int64_t first, int64_t count, int64_t n, int64_t row0, const T* e, T* a,
              bool is_kept, bool by_class, bool by_row, T* bias_share) {
    Vec<T> scale[NV], weight[NV], column[NV];  // `column`: gradients of class biases
    for (int v = 0; v < NV; v++) {
      scale[v] = load(class_scale_.data() + first + q * NR + v * W);
      T factor[W];
      for (int x = 0; x < W; x++) {
        const int64_t c = q * NR + v * W + x;
        const bool biased = s_.class_bias && c < count;
        factor[x] = c >= count ? T(0) : biased ? std::exp(s_.class_bias[columns_.class_of(first + c)]) : T(1);
      }
      weight[v] = load(factor);
      column[v] = Vec<T>{};
    }
    for (int64_t r = 0; r < n; r++) {
      const T by_bias = s_.sample_bias ? std::exp(s_.sample_bias[row0 + r]) : T(1);
      const T row_scale = by_row ? row_scale_[row0 + r] : T(0);
      Vec<T> class_part{};
      for (int v = 0; v < NV; v++) {
        Vec<T> x = load(e + r * NR + v * W);
        if (!is_kept) x = exponential<T, true>(x);
        const Vec<T> of_class = x * scale[v] * by_bias;
        Vec<T> out = of_class;
        if (by_row) {
          const Vec<T> of_row = x * weight[v] * row_scale;
          out = by_class ? of_class + of_row : of_row;
          column[v] += of_row;
        }
        class_part += of_class;
        store(a + r * NR + v * W, out);
      }
      if (g_.sample_bias && by_class) static_cast<T*>(g_.sample_bias)[row0 + r] += sum<T>(class_part);
    }
    for (int v = 0; v < NV && bias_share; v++) store(bias_share + q * NR + v * W, column[v]);
  }

  // One panel, A = g_c exp(t + b_j - lse_c) + g_j exp(t + b_c - lse_j).
  void shifted(int64_t q, int64_t first, int64_t count, int64_t n, int64_t row0, const T* kept, T* a,
               bool by_class, bool by_row, T* bias_share) {
    Vec<T> scale[NV], shift[NV], bias[NV], inside[NV], column[NV];
    for (int v = 0; v < NV; v++) {
      scale[v] = load(class_scale_.data() + first + q * NR + v * W);
      shift[v] = load(class_shift_.data() + first + q * NR + v * W);
      T b[W], lane[W];
      for (int x = 0; x < W; x++) {
        const int64_t c = q * NR + v * W + x;
        b[x] = s_.class_bias && c < count ? s_.class_bias[columns_.class_of(first + c)] : T(0);
        lane[x] = c < count ? T(1) : T(0);
      }
      bias[v] = load(b);
      inside[v] = load(lane);
      column[v] = Vec<T>{};
    }
    for (int64_t r = 0; r < n; r++) {
      const T sample_bias = s_.sample_bias ? s_.sample_bias[row0 + r] : T(0);
      Vec<T> class_part{};
      for (int v = 0; v < NV; v++) {
        const Vec<T> t = load(kept + r * NR + v * W);
        Vec<T> out{};
        if (by_class) {
          out = scale[v] * exponential<T>(t + sample_bias - shift[v]);
          class_part += out;
        }
        if (by_row) {
          const Vec<T> x = t + bias[v] - row_shift_[row0 + r];
          const Vec<T> of_row = exponential<T>(x) * inside[v] * row_scale_[row0 + r];
          column[v] += of_row;
          out += of_row;
        }
        store(a + r * NR + v * W, out);
      }
      if (g_.sample_bias && by_class) static_cast<T*>(g_.sample_bias)[row0 + r] += sum<T>(class_part);
    }
    for (int v = 0; v < NV && bias_share; v++) store(bias_share + q * NR + v * W, column[v]);
  }

  // Whether dL/dV accumulates over passes in the layout of the products; otherwise row by row.
  bool sums_in_panels() const { return G::PANELS_APART && w_.sums; }

  // The accumulator of dL/dV of a block.
  T* columns_of(Room& room, const Block& block) const {
    return sums_in_panels() ? w_.sums + block.first * s_.d_pad : room.grad_v.data();
  }

  // dL/dU of a tile: A V, summed over column blocks and passes, and after the last one taken through the
  // normalisation. dL/dbeta is linear in A V, so that for it alone nothing needs to be summed.
  void add_rows(Room& room, const Block& block, int64_t tile, const Operand* a) {
    NCK_STAGE(rows);
    const int64_t n = s_.rows(tile), padded = s_.padded_rows(tile), d = p_.d, d_pad = s_.d_pad;
    Buffer<T> own(s_.in_place ? 0 : padded * d_pad), sum(d_pad), line(s_.z.line());
    T *const x = sum, *const product = s_.in_place ? room.products + s_.first_row(tile) * d_pad : own;
    G::times_prototypes(padded, padded, 0, block.panels, block.panels, block.count, s_.d_panels, a,
                        room.v_rows, product, s_.in_place && block.first > 0);
    if (s_.in_place && !block.is_last) return;
    NCK_STAGE(finish);
    const bool first = (s_.in_place || block.first == 0) && z_.first, last = block.is_last && z_.last;
    for (int64_t r = 0; r < n; r++) {
      const int64_t j = s_.first_row(tile) + r;
      if (!s_.valid(j)) {
        if (last) z_.rows.clear(j);
        continue;
      }
      G::gather_row(product, padded, r, d_pad, x);
      if (last && !in_entries_) beside_.add_to_row(j, d, x);
      T* const sums = room.sums ? room.sums + j * d : z_.sums_of(j, d);
      if (z_.rows && !first)
        for (int64_t i = 0; i < d; i++) x[i] += sums[i];
      if (z_.rows && !last) {
        std::copy_n(x, d, sums);
        continue;
      }
      T* const out = z_.rows.place(j, x);
      room.energy[tile] += p_.beta * through_norm(p_, x, s_.z.get(j, line), s_.z_rnorm[j], s_.beta, out);
      z_.rows.put(j, out);
    }
  }

  // Adds A^T U of a group of tiles, in order, to dL/dV of a block of columns.
  void add_columns(Room& room, const Block& block, int64_t begin) {
    const int64_t here = std::min(room.group, s_.tiles - begin), padded = block.panels * NR;
    s_.share_out(block.panels, [&](int64_t first, int64_t last, int64_t f_first, int64_t f_last) {
      NCK_STAGE(columns);
      for (int64_t tile = 0; tile < here; tile++) {
        const int64_t rows = s_.padded_rows(begin + tile);
        const Operand* a = G::by_columns(room.entries_of(tile, begin, block, s_), rows);
        G::times_features(rows, rows, first * NR, std::min(block.count, last * NR), f_first, f_last, a,
                          room.u_rows_of(tile, begin, s_), s_.d_pad, padded, columns_of(room, block));
      }
    });
  }

  void finish_columns(Room& room, const Block& block, int64_t panel) {
    NCK_STAGE(finish);
    const int64_t d = p_.d, padded = block.panels * NR;
    Buffer<T> lines(G::COLUMNS * s_.d_pad), row_line(s_.w.line());
    for (int64_t c = panel * NR; c < std::min(block.count, (panel + 1) * NR); c++) {
      if (c % G::COLUMNS == 0) G::gather_columns(columns_of(room, block), padded, c, s_.d_pad, lines);
      T* x = lines + c % G::COLUMNS * s_.d_pad;
      const int64_t id = columns_.class_of(block.first + c);
      if (!columns_.reads(block.first + c)) {
        if (w_.last) w_.rows.clear(id);
        continue;
      }
      T* const sums = sums_in_panels() ? nullptr : w_.sums_of(id, d);
      if (sums && !w_.first)
        for (int64_t i = 0; i < d; i++) x[i] += sums[i];
      if (!w_.last) {
        std::copy_n(x, d, sums);
        continue;
      }
      if (!in_entries_) beside_.add_to_column(id, d, x);
      T* const out = w_.rows.place(id, x);
      room.class_energy[block.first / NR + panel] +=
          through_norm(p_, x, s_.w.get(id, row_line), s_.w_rnorm[id], T(1), out);
      w_.rows.put(id, out);
    }
  }

  const Problem& p_;
  const Columns& columns_;
  const Gradients& g_;
  Output<T> z_, w_;
  RankOne<T> beside_;
  // Whether the rank-one gradient is added to the entries: before rounding, because it may nearly cancel
  // them.
  bool in_entries_;
  Tl s_;
  bool need_rows_;
  std::vector<T> class_scale_, class_shift_, row_scale_, row_shift_;
};

}  // namespace nckernels
