// Row tiles and column blocks of one call: sizes, packing, and the tile of logits with its mask.
#pragma once

#include "gemm.hpp"
#include "norms.hpp"

namespace nckernels {
// The most rows of a tile: 128 numbers of each fit the L2 cache.
constexpr int64_t TALLEST = 192;

// Bytes of entries that a group of tiles may have, so that they are still in a cache when columns are added.
constexpr int64_t IN_CACHE = int64_t(4) << 20;

// G: an engine, such as Gemm.
template <class G>
struct Tiles {
  using T = typename G::T;
  using Operand = typename G::Operand;
  static constexpr int NV = G::NV, W = G::W, NR = G::NR;
  static constexpr int64_t MR = G::MR, DEPTH = G::DEPTH;
  static constexpr int64_t STEP = G::BLOCK;  // panels of a tile that fit the L2 cache
  static_assert(TALLEST % MR == 0);

  const Problem& p;
  const Columns& columns;
  Rows<T> z, w;
  const T *sample_bias, *class_bias;
  T *z_rnorm, *w_rnorm, *kept;
  T beta;
  bool shift_free;
  int64_t d_pad, d_panels;
  int64_t tile_m, tiles;  // rows of a tile (a multiple of MR), number of tiles
  int64_t block_k;        // columns of a block (a multiple of NR)
  int64_t all_panels;     // of all columns
  // Tiles that are kept from forward to backward, the first ones: exp(t), or t if not shift_free.
  int64_t kept_tiles;
  // Whether all tiles are kept, and entries take their place. Then U and A V of all tiles are in memory too,
  // so that a block of columns neither packs features nor adds to dL/dU row by row.
  bool in_place;
  int64_t group;  // row tiles that the backward pass has in flight

  // `reads_kept`: for the backward pass.
  Tiles(const Problem& problem, const Columns& cols, bool reads_kept = false)
      : p(problem),
        columns(cols),
        z(p.z, p.z_stride, p.d, p.half),
        w(p.w, p.w_stride, p.d, p.half),
        sample_bias(static_cast<const T*>(p.sample_bias)),
        class_bias(static_cast<const T*>(p.class_bias)),
        z_rnorm(static_cast<T*>(p.z_rnorm)),
        w_rnorm(static_cast<T*>(p.w_rnorm)),
        kept(static_cast<T*>(p.kept)),
        beta(static_cast<T>(p.beta)) {
    d_pad = round_up(p.d, G::NR);
    d_panels = d_pad / NR;
    all_panels = (columns.count + NR - 1) / NR;
    shift_free = p.beta + largest_bias() <= 30.0;
    const int64_t threads = std::max(p.threads, 1);
    plan(threads, 2 * threads, std::numeric_limits<int64_t>::max());
    if (reads_kept) check_kept();
  }

  // Divides the workspace. A quarter is for row tiles: packed U and its gradient per thread, U by features
  // and entries per tile of a group. The rest is for kept tiles and for a block of at most `widest` columns.
  // Where entries are in place, a block has what the tiles leave.
  void plan(int64_t threads, int64_t tiles_in_flight, int64_t widest) {
    const int64_t quarter = quarter_of(p), columns_padded = std::max<int64_t>(all_panels * NR, NR);
    in_place = p.kept_once && kept && round_up(p.m, MR) * columns_padded < p.kept_size;
    const int64_t room = in_place ? columns_in_place() : columns_that_fit(p, kept_bytes());
    const int64_t fit = std::min(room, widest);
    const int64_t most = std::max<int64_t>(fit / NR * NR, NR);
    const int64_t blocks = (columns_padded + most - 1) / most;
    block_k = round_up((columns_padded + blocks - 1) / blocks, NR);
    group = tiles_in_flight;
    const int64_t per_thread = d_pad * (sizeof(Operand) + sizeof(T)) + (G::RESTS ? STEP * NR * sizeof(T) : 0);
    const int64_t per_tile_of_group = (d_pad + block_k * G::ENTRIES) * sizeof(Operand);
    const int64_t per_row = threads * per_thread + group * per_tile_of_group;
    // Four tiles per thread, and at least eight, so that threads finish at about the same time.
    const int64_t even = height(4 * std::max<int64_t>(threads, 2));
    tile_m = in_place ? height_in_place(std::max<int64_t>(threads, 2))
                      : std::clamp<int64_t>(std::min(quarter / per_row, even), MR, TALLEST) / MR * MR;
    tiles = (p.m + tile_m - 1) / tile_m;
    // One thread adds up columns after each tile, whose entries are then still in its L2 cache.
    if (p.threads <= 1) group = 1;
    if (in_place)
      group = std::max<int64_t>(group, IN_CACHE / (tile_m * block_k * static_cast<int64_t>(sizeof(T))));
    const int64_t per_tile = tile_m * all_panels * NR, all = round_up(p.m, MR) * all_panels * NR;
    if (p.kept_row)  // the padding of the last tile may exceed the gradient
      kept_tiles = rows(tiles - 1) == padded_rows(tiles - 1) ? tiles : tiles - 1;
    else
      kept_tiles = !kept || !per_tile ? 0 : all <= room_to_keep() ? tiles : room_to_keep() / per_tile;
  }

  // The height of tiles of which there are at most `count`.
  int64_t height(int64_t count) const { return round_up((p.m + count - 1) / count, MR); }

  // Two to four tiles for each thread, as many as give the slowest thread the fewest rows. A part of the
  // matrix has few rows, which four tiles per thread, in multiples of MR, would divide unevenly.
  int64_t height_in_place(int64_t threads) const {
    int64_t best = TALLEST, fewest = std::numeric_limits<int64_t>::max();
    for (int64_t each = 4; each >= 2; each--) {
      const int64_t rows = height(each * threads);
      if (rows <= TALLEST && each * rows < fewest) best = rows, fewest = each * rows;
    }
    return std::max(best, MR);
  }

  // Numbers in the kept tiles; one more holds the height of a tile.
  int64_t room_to_keep() const { return std::max<int64_t>(p.kept_size - 1, 0); }

  // The height of a tile depends on the number of threads, which can change between forward and backward, for
  // example in a child process. Tiles of another height cannot be read and are computed again.
  void sign_kept() const {
    if (kept && p.kept_size) kept[p.kept_size - 1] = static_cast<T>(tile_m);
  }
  void check_kept() {
    if (kept_tiles && p.kept_size && kept[p.kept_size - 1] != static_cast<T>(tile_m)) kept_tiles = 0;
  }

  int64_t kept_bytes() const { return kept ? p.kept_size * static_cast<int64_t>(sizeof(T)) : 0; }

  // Bytes per column of a block: V in two layouts, and its gradient.
  static int64_t bytes_of_column(int64_t d) {
    return round_up(d, NR) * static_cast<int64_t>(2 * sizeof(Operand) + sizeof(T));
  }

  static int64_t quarter_of(const Problem& p) { return std::max<int64_t>(p.workspace / 4, 1); }

  // Columns of a block that fit the workspace beside `kept` bytes of tiles.
  static int64_t columns_that_fit(const Problem& p, int64_t kept) {
    const int64_t quarter = quarter_of(p);
    return std::max(quarter, p.workspace - quarter - kept) / bytes_of_column(p.d);
  }

  // Where entries are in place, bytes per row beside them: U by features and A V, and an eighth for padding.
  static int64_t bytes_beside_row(int64_t d) {
    return round_up(d, NR) * static_cast<int64_t>(sizeof(Operand) + sizeof(T)) * 9 / 8;
  }

  // Columns of a block that fit the workspace there: V in one layout at a time, and its gradient. A part of
  // the workspace is for the threads' own scratch, the same part for any number of threads, as results depend
  // on it.
  int64_t columns_in_place() const {
    const int64_t of_rows = (p.m + G::GROUP) * bytes_beside_row(p.d), of_threads = p.workspace / 32;
    return (p.workspace - of_threads - kept_bytes() - of_rows) /
           (d_pad * static_cast<int64_t>(sizeof(Operand) + sizeof(T)));
  }

  double largest_bias() const {
    double best = 0;
    auto scan = [&](const T* b, int64_t n) {
      if (!b) return;
      for (int64_t i = 0; i < n; i++)
        if (b[i] != minus_infinity<T>) best = std::fabs(b[i]) <= best ? best : std::fabs(b[i]);
    };
    scan(sample_bias, p.m);
    scan(class_bias, p.k);
    return best;
  }

  int64_t first_row(int64_t tile) const { return tile * tile_m; }
  int64_t rows(int64_t tile) const { return std::min(tile_m, p.m - tile * tile_m); }
  int64_t padded_rows(int64_t tile) const { return round_up(rows(tile), MR); }
  bool square() const { return p.exclude == kSelf || p.exclude == kSameLabel; }
  bool valid(int64_t j) const { return columns.positive[j] >= 0; }

  T* kept_tile(int64_t tile, int64_t first_panel) const {
    T* const at = p.kept_row
                      ? reinterpret_cast<T*>(reinterpret_cast<char*>(kept) + first_row(tile) * p.kept_row)
                      : kept + tile * all_panels * tile_m * NR;
    return at + first_panel * padded_rows(tile) * NR;
  }

  // Packs unit prototypes of the columns [first, first + count): as V for `G::logits`, in blocks of DEPTH
  // along d, and by feature as V for `G::times_prototypes`, each unless null. Padding and columns that must
  // not be read are zero.
  void pack_prototypes(int64_t first, int64_t count, int64_t panel, Operand* by_class,
                       Operand* by_feature) const {
    NCK_STAGE(pack_prototypes);
    const int64_t padded = round_up(count, NR);
    // Packing reads NR rows at a time, more streams than the processor follows.
    for (int64_t q = 0; q < NR && panel * NR + q < count; q++)
      w.prefetch(columns.class_of(first + panel * NR + q));
    for (int64_t k = 0; k < p.d; k += DEPTH) {
      const int64_t n = std::min<int64_t>(DEPTH, p.d - k);
      with_prototypes(first, count, panel, k, n, [&](auto rows, const T* scale) {
        if (by_class) G::pack_panel(rows, scale, n, by_class + k * padded + panel * NR * G::inner(n));
        for (int64_t x = 0; x < n && by_feature; x += NR) {
          const Operand* from[NR];
          for (int64_t q = 0; q < NR; q++) from[q] = rows[q] ? rows[q] + x : nullptr;
          G::pack_panel_by_feature(from, scale, std::min<int64_t>(NR, n - x),
                                   by_feature + (k + x) * padded + panel * NR * NR);
        }
      });
    }
  }

  // Calls `use(rows, scale)` with numbers [k, k + n) of the prototypes of a panel.
  template <class F>
  void with_prototypes(int64_t first, int64_t count, int64_t panel, int64_t k, int64_t n, F&& use) const {
    typename G::Line lines[NR];
    const Operand* rows[NR];
    T scale[NR];
    for (int64_t q = 0; q < NR; q++) {
      const int64_t c = first + panel * NR + q;
      const bool here = c < first + count && columns.reads(c);
      const int64_t id = here ? columns.class_of(c) : 0;
      rows[q] = here ? G::row(w, id, k, n, lines[q]) : G::no_row();
      scale[q] = here ? G::unit(w_rnorm[id], T(1)) : T(0);
    }
    use(static_cast<const Operand* const*>(rows), scale);
  }

  // Packs beta times the unit features of a tile: as U for `G::logits` and by feature as U for
  // `G::times_features`, each unless null. Rows past the end and ignored samples are zero. In a symmetric
  // problem rows and columns add to one gradient, so that U by feature has the same values as V, without
  // beta.
  void pack_features(int64_t tile, Operand* packed, Operand* by_feature) const {
    NCK_STAGE(pack_features);
    constexpr int64_t GROUP = G::GROUP;
    typename G::Line lines[GROUP];
    const int64_t n = rows(tile), padded = padded_rows(tile), row0 = first_row(tile);
    for (int64_t i = 0; i < padded; i += GROUP)
      for (int64_t k = 0; k < p.d; k += DEPTH) {
        const int64_t depth = std::min<int64_t>(DEPTH, p.d - k);
        const Operand* group[GROUP];
        T scale[GROUP], of_gradient[GROUP];
        for (int64_t r = 0; r < GROUP; r++) {
          const int64_t j = row0 + i + r;
          const bool here = i + r < n && (p.symmetric ? columns.reads(j) : valid(j));
          group[r] = here ? G::row(z, j, k, depth, lines[r]) : G::no_row();
          scale[r] = here ? G::unit(z_rnorm[j], beta) : T(0);
          of_gradient[r] = here && p.symmetric ? G::unit(z_rnorm[j], T(1)) : scale[r];
        }
        if (packed)
          G::pack_rows(group, scale, std::min(GROUP, padded - i), depth,
                       packed + k * padded + i * G::inner(depth));
        if (by_feature) G::pack_rows_by_feature(group, of_gradient, i, padded, k, depth, by_feature);
      }
  }

  // The number of operands for the entries of a tile with `columns` columns.
  int64_t entries_of_tile(int64_t columns) const { return tile_m * columns * G::ENTRIES; }

  // Divides the product A^T U for `panels` of columns among the threads: calls body(first, stop, f, f_stop)
  // for panels [first, stop) of columns, whose entries fit the L2 cache, and [f, f_stop) of features.
  template <class F>
  void share_out(int64_t panels, F&& body) const {
    const int64_t pieces = (panels + G::BLOCK - 1) / G::BLOCK;
    const int64_t shares = std::min(d_panels, (4 * p.threads + pieces - 1) / pieces);
    parallel(p.threads, pieces * shares, [&](int64_t i) {
      const int64_t first = i % pieces * G::BLOCK, share = i / pieces;
      body(first, std::min<int64_t>(panels, first + G::BLOCK), share * d_panels / shares,
           (share + 1) * d_panels / shares);
    });
  }

  // Turns a log-sum-exp and its upstream gradient into the scale and shift of entries A = scale exp(t -
  // shift). The scale is 0 where the sum is empty. Without a shift, A = scale exp(t). What the shift loses by
  // rounding is in the scale.
  void upstream(T g, double lse, T& scale, T& shift) const {
    const bool empty = lse == minus_infinity<double>;
    shift = empty ? T(0) : static_cast<T>(lse);
    scale = empty ? T(0) : static_cast<T>(g * std::exp(shift_free ? -lse : double(shift) - lse));
  }

  // Logits t of panels [begin, end) of a block of columns, whose prototypes are packed in `v`, for at least
  // the first `above` rows. There are at most STEP panels, so that the next operation finds them in the L2
  // cache.
  void products(int64_t tile, int64_t above, int64_t first, int64_t count, int64_t begin, int64_t end,
                const Operand* u, const Operand* v, T* t) const {
    NCK_STAGE(logits);
    const int64_t padded = padded_rows(tile), panels = (count + NR - 1) / NR;
    if constexpr (G::RESTS) {
      T of_rows[TALLEST], of_columns[STEP * NR];
      rests_of_rows(tile, beta, of_rows);
      rests_of_columns(first, count, begin, end, of_columns);
      G::logits(padded, above, begin, end, panels, p.d, u, v, of_rows, of_columns, t);
    } else {
      G::logits(padded, above, begin, end, panels, p.d, u, v, nullptr, nullptr, t);
    }
  }

  // The factors that packing has not applied (G::rest), of a tile's rows, times `factor`, and of the columns
  // in panels [begin, end) of a block.
  void rests_of_rows(int64_t tile, T factor, T* out) const {
    for (int64_t r = 0; r < padded_rows(tile); r++)
      out[r] = r < rows(tile) ? G::rest(z_rnorm[first_row(tile) + r], factor) : T(0);
  }
  void rests_of_columns(int64_t first, int64_t count, int64_t begin, int64_t end, T* out) const {
    for (int64_t c = begin * NR; c < end * NR; c++)
      out[c - begin * NR] = c < count ? G::rest(w_rnorm[columns.class_of(first + c)], T(1)) : T(0);
  }

  // Logits with -inf where excluded. Those of positives are copied to `pos` unless it is null.
  void logits(int64_t tile, int64_t first, int64_t count, int64_t begin, int64_t end, const Operand* u,
              const Operand* v, T* t, T* pos) const {
    products(tile, padded_rows(tile), first, count, begin, end, u, v, t);
    const int64_t padded = padded_rows(tile), n = rows(tile), row0 = first_row(tile);
    const int64_t c0 = first + begin * NR, here = std::min(count, end * NR) - begin * NR;
    auto at = [&](int64_t r, int64_t c) -> T& { return t[(c / NR) * padded * NR + r * NR + c % NR]; };
    for (int64_t r = 0; r < n; r++) {
      const int64_t j = row0 + r, c = columns.positive[j] - c0;
      const bool inside = columns.positive[j] >= 0 && c >= 0 && c < here;
      if (pos && inside) pos[j] = at(r, c);
      if (p.exclude == kTarget && inside) at(r, c) = minus_infinity<T>;
      if (p.exclude == kSelf && j >= c0 && j < c0 + here) at(r, j - c0) = minus_infinity<T>;
      if (p.exclude == kSameLabel)
        for (int64_t q = 0; q < here; q++)
          if (p.target[c0 + q] == p.target[j]) at(r, q) = minus_infinity<T>;
      if (!valid(j))
        for (int64_t q = 0; q < end - begin; q++)
          for (int64_t x = 0; x < NR; x++) t[q * padded * NR + r * NR + x] = minus_infinity<T>;
    }
    if (square())
      for (int64_t q = 0; q < here; q++)
        if (!valid(c0 + q))
          for (int64_t r = 0; r < n; r++) at(r, q) = minus_infinity<T>;
  }
};

// The entries A of a tile, written panel by panel in the layouts that the products read.
template <class G>
class EntriesOf {
  using T = typename G::T;
  using Operand = typename G::Operand;
  static constexpr int64_t NR = G::NR, STEP = Tiles<G>::STEP;

 public:
  EntriesOf(const Tiles<G>& s, int64_t tile, Operand* a) : s_(s), rows_(s.padded_rows(tile)), a_(a) {
    if constexpr (G::RESTS) s.rests_of_rows(tile, s.p.symmetric ? T(1) : s.beta, rests_);
  }

  // The size of the buffer that `logits` needs.
  int64_t room() const { return G::RESTS ? STEP * rows_ * NR : 0; }

  // Where to compute t of panel q, which is number `i` modulo STEP of its step; and where to write its
  // entries.
  T* logits(int64_t q, int64_t i, T* room) const {
    return G::panel_of_entries(stored(q), room + i % STEP * rows_ * NR);
  }

  // Where to write panel q of the columns [first, first + count).
  T* panel(int64_t q, int64_t first, int64_t count) {
    if constexpr (G::RESTS) s_.rests_of_columns(first, count, q, q + 1, of_columns_);
    return G::panel_of_entries(stored(q), panel_);
  }

  // Stores that panel, which is complete.
  void put(int64_t q) {
    if constexpr (G::RESTS)
      G::put_entries(panel_, rows_, rests_, of_columns_, stored(q), G::by_columns(stored(q), rows_));
  }

  // The rounding error of the sum of A t over that panel, see `lost` of an engine. `e` is t or exp(t), -inf
  // or 0 where excluded.
  double lost(int64_t n, Rounding rounding, const T* e, bool exponentials) const {
    if constexpr (G::RESTS) return G::lost(panel_, n, rests_, of_columns_, rounding, e, exponentials);
    return 0;
  }

  // The same for one entry, whose logit is t.
  double lost(int64_t r, int64_t x, Rounding rounding, T t) const {
    if constexpr (G::RESTS) return G::lost(panel_[r * NR + x], rests_[r], of_columns_[x], rounding, t);
    return 0;
  }

 private:
  Operand* stored(int64_t q) const { return a_ + q * G::ENTRIES * rows_ * NR; }

  const Tiles<G>& s_;
  int64_t rows_;
  Operand* a_;
  alignas(64) T panel_[G::RESTS ? TALLEST * NR : 1];
  T rests_[G::RESTS ? TALLEST : 1], of_columns_[G::RESTS ? NR : 1];
};

// The gradients of the positive logits of a tile's rows, in the order of their columns.
template <class G>
class PositivesOf {
  using T = typename G::T;
  static constexpr int64_t NR = G::NR;

 public:
  // Positives in the columns [first, first + count); `gradient` per sample, or null.
  PositivesOf(const Tiles<G>& s, int64_t tile, int64_t first, int64_t count, const T* gradient)
      : gradient_(gradient ? gradient + s.first_row(tile) : nullptr) {
    for (int64_t r = 0; r < s.rows(tile) && gradient; r++) {
      const int64_t c = s.columns.positive[s.first_row(tile) + r] - first;  // negative if ignored
      if (c >= 0 && c < count) found_[size_++] = {c, r};
    }
    if (count > NR) std::sort(found_, found_ + size_);
  }

  // Adds the gradients in panel q. Panels come in ascending order.
  void add(int64_t q, T* a) {
    of_panel_ = next_;
    for (; next_ < size_ && found_[next_].first < (q + 1) * NR; next_++) {
      const auto [c, r] = found_[next_];
      a[r * NR + c - q * NR] += gradient_[r];
    }
  }

  // Calls visit(row, column of the panel) for the positives that were added last.
  template <class F>
  void of_last_panel(F&& visit) const {
    for (int64_t i = of_panel_; i < next_; i++) visit(found_[i].second, found_[i].first % NR);
  }

 private:
  const T* gradient_;
  std::pair<int64_t, int64_t> found_[TALLEST];  // column and row
  int64_t size_ = 0, next_ = 0, of_panel_ = 0;
};

}  // namespace nckernels
