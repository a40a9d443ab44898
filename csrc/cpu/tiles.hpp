// Row tiles and column blocks of one call: sizes, packing, and the tile of logits with its mask.
#pragma once

#include "gemm.hpp"
#include "norms.hpp"

namespace nckernels {
template <class T>
constexpr T minus_infinity = -std::numeric_limits<T>::infinity();

// The most rows of a tile: with 128 numbers of each they stay in the L2 cache.
constexpr int64_t TALLEST = 192;

template <class T, int NV>
struct Tiles {
  using G = Gemm<T, NV>;
  static constexpr int W = G::W, NR = G::NR;
  static_assert(DEPTH % NR == 0);
  static constexpr T zeros[DEPTH] = {};  // a row that is not there

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
  int64_t
      kept_tiles;  // the first tiles, which are kept from forward to backward: exp(t) or, not shift_free, t
  int64_t group;   // row tiles that the backward pass has in flight

  Tiles(const Problem& problem, const Columns& cols)
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
    d_pad = round_up(p.d, NR);
    d_panels = d_pad / NR;
    all_panels = (columns.count + NR - 1) / NR;
    shift_free = p.beta + largest_bias() <= 30.0;
    plan();
  }

  // The workspace, in numbers of T: a quarter for a block of columns (V in two layouts and its gradient), a
  // quarter for row tiles (U packed and its gradient per thread, U in panels and the entries per tile of a
  // group); the other half is what may be kept.
  void plan() {
    const int64_t quarter = std::max<int64_t>(p.workspace / static_cast<int64_t>(sizeof(T)) / 4, 1);
    const int64_t columns_padded = std::max<int64_t>(all_panels * NR, NR);
    const int64_t most = std::max<int64_t>(quarter / (3 * d_pad) / NR * NR, NR);
    const int64_t blocks = (columns_padded + most - 1) / most;
    block_k = round_up((columns_padded + blocks - 1) / blocks, NR);
    const int64_t threads = std::max(p.threads, 1);
    group = 2 * threads;
    const int64_t per_row = threads * 2 * d_pad + group * (d_pad + block_k);
    // Four tiles a thread, so that none waits long for the last one; eight at least.
    const int64_t even =
        round_up((p.m + 4 * std::max<int64_t>(threads, 2) - 1) / (4 * std::max<int64_t>(threads, 2)), MR);
    tile_m = std::clamp<int64_t>(std::min(quarter / per_row, even), MR, TALLEST) / MR * MR;
    tiles = (p.m + tile_m - 1) / tile_m;
    const int64_t per_tile = tile_m * all_panels * NR;
    kept_tiles = kept && per_tile ? std::min(tiles, p.kept_size / per_tile) : 0;
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
    return kept + (tile * all_panels * tile_m + first_panel * padded_rows(tile)) * NR;
  }

  // Unit prototypes of the columns [first, first + count) as V for `Gemm::logits`, in blocks of DEPTH along
  // d, and as [d panel][column][NR], each unless null. Padding and columns that nobody may read are zero.
  void pack_prototypes(int64_t first, int64_t count, int64_t panel, T* by_class, T* by_feature) const {
    const int64_t padded = round_up(count, NR);
    for (int64_t k = 0; k < p.d && by_class; k += DEPTH) {
      const int64_t n = std::min<int64_t>(DEPTH, p.d - k);
      pack_by_class(first, count, panel, k, n, by_class + k * padded + panel * NR * n);
    }
    for (int64_t f = 0; f < d_panels && by_feature; f++)
      pack_by_feature(first, count, f, panel, by_feature + (f * padded + panel * NR) * NR);
  }

  // [n][NR]: one panel of the columns [first, first + count), numbers k to k + n of their rows.
  void pack_by_class(int64_t first, int64_t count, int64_t panel, int64_t k, int64_t n, T* out) const {
    T lines[NR][DEPTH];  // of 16-bit numbers
    const T* rows[NR];
    T scale[NR];
    for (int64_t q = 0; q < NR; q++) {
      const int64_t c = panel * NR + q;
      const bool here = c < count && columns.reads(first + c);
      const int64_t id = here ? columns.class_of(first + c) : 0;
      rows[q] = here ? w.get(id, k, n, lines[q]) : zeros;
      scale[q] = here ? w_rnorm[id] : T(0);
    }
    interleave<NR>(rows, scale, n, out);
  }

  // [NR][NR]: the columns of one panel, panel f of the features.
  void pack_by_feature(int64_t first, int64_t count, int64_t f, int64_t panel, T* out) const {
    T line[NR];
    const int64_t width = std::min<int64_t>(NR, p.d - f * NR);
    for (int64_t c = panel * NR; c < (panel + 1) * NR; c++, out += NR) {
      const bool here = c < count && columns.reads(first + c);
      const int64_t id = here ? columns.class_of(first + c) : 0;
      scaled(here ? w.get(id, f * NR, width, line) : zeros, here ? w_rnorm[id] : T(0), width, out);
    }
  }

  // beta times the unit features of a tile as U for `Gemm::logits` and as [d panel][padded rows][NR], each
  // unless null. Rows past the end and samples that are left out are zero. Of a symmetric problem, where rows
  // and columns add to one gradient, the panels are without beta as the prototypes' are, and hold what they
  // hold.
  void pack_features(int64_t tile, T* packed, T* by_feature) const {
    T lines[MR][DEPTH];  // of 16-bit numbers
    const int64_t n = this->rows(tile), padded = padded_rows(tile), row0 = first_row(tile);
    for (int64_t i = 0; i < padded; i += MR)
      for (int64_t k = 0; k < p.d; k += DEPTH) {
        const int64_t depth = std::min<int64_t>(DEPTH, p.d - k);
        const T* rows[MR];
        T scale[MR];
        for (int64_t r = 0; r < MR; r++) {
          const int64_t j = row0 + i + r;
          const bool here = i + r < n && (p.symmetric ? columns.reads(j) : valid(j));
          rows[r] = here ? z.get(j, k, depth, lines[r]) : zeros;
          scale[r] = here ? z_rnorm[j] * beta : T(0);
        }
        if (packed) interleave<MR>(rows, scale, depth, packed + k * padded + i * depth);
        if (!by_feature) continue;
        for (int64_t r = 0; r < MR; r++) {
          const T factor = p.symmetric && scale[r] != T(0) ? z_rnorm[row0 + i + r] : scale[r];
          for (int64_t x = 0; x < depth; x += NR)
            scaled(rows[r] + x, factor, depth - x, by_feature + ((k + x) * padded / NR + i + r) * NR);
        }
      }
  }

  // out[x][N] = scale_r row_r[x] for N rows of n numbers, in square blocks.
  template <int N>
  static void interleave(const T* const* rows, const T* scale, int64_t n, T* out) {
    int64_t x = 0;
    for (; x + W <= n; x += W, out += W * N)
#pragma GCC unroll 32
      for (int g = 0; g < N; g += W) {
        constexpr int last = N % W ? N % W : W;
        Vec<T> block[W];
#pragma GCC unroll 16
        for (int r = 0; r < W; r++) block[r] = g + r < N ? load(rows[g + r] + x) * scale[g + r] : Vec<T>{};
        transpose<T>(block);
#pragma GCC unroll 16
        for (int r = 0; r < W; r++)
          if (g + W <= N)
            store(out + r * N + g, block[r]);
          else
            store_first<T, last>(out + r * N + g, block[r]);
      }
    for (; x < n; x++, out += N)
      for (int r = 0; r < N; r++) out[r] = rows[r][x] * scale[r];
  }

  // out[NR] = scale row; 0 past `width` if that is less.
  static void scaled(const T* row, T scale, int64_t width, T* out) {
    if (width >= NR) {
      for (int v = 0; v < NV; v++) store(out + v * W, load(row + v * W) * scale);
      return;
    }
    for (int64_t x = 0; x < NR; x++) out[x] = x < width ? row[x] * scale : T(0);
  }

  // Row `r` of a matrix stored as [d panel][padded][NR].
  void gather_row(const T* from, int64_t padded, int64_t r, T* x) const {
    for (int64_t f = 0; f < d_panels; f++) std::copy_n(from + (f * padded + r) * NR, NR, x + f * NR);
  }

  // Shares the product A^T U for `panels` columns out among the threads: body(first, stop, f, f_stop) for
  // panels [first, stop) of columns, whose entries stay in the L2 cache, and [f, f_stop) of features.
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

  // A log-sum-exp and its upstream gradient as entries take them, A = scale exp(t - shift), harmless where
  // the sum is empty. Shift-free they are one factor, A = scale exp(t).
  void upstream(T g, T lse, T& scale, T& shift) const {
    const bool empty = lse == minus_infinity<T>;
    shift = empty ? T(0) : lse;
    scale = empty ? T(0) : shift_free ? g * std::exp(-lse) : g;
  }

  // The tile of t for the columns [first, first + count), -inf where excluded; positives are picked up in
  // `pos` unless null.
  void logits(int64_t tile, int64_t first, int64_t count, const T* u, const T* v, T* t, T* pos) const {
    const int64_t padded = padded_rows(tile), n = rows(tile), row0 = first_row(tile);
    const int64_t panels = (count + NR - 1) / NR;
    G::logits(padded, padded, 0, panels, panels, p.d, u, v, t);
    auto at = [&](int64_t r, int64_t c) -> T& { return t[(c / NR) * padded * NR + r * NR + c % NR]; };
    for (int64_t r = 0; r < n; r++) {
      const int64_t j = row0 + r, c = columns.positive[j] - first;
      const bool here = columns.positive[j] >= 0 && c >= 0 && c < count;
      if (pos && here) pos[j] = at(r, c);
      if (p.exclude == kTarget && here) at(r, c) = minus_infinity<T>;
      if (p.exclude == kSelf && j >= first && j < first + count) at(r, j - first) = minus_infinity<T>;
      if (p.exclude == kSameLabel)
        for (int64_t q = 0; q < count; q++)
          if (p.target[first + q] == p.target[j]) at(r, q) = minus_infinity<T>;
      if (!valid(j))
        for (int64_t q = 0; q < panels; q++)
          for (int64_t x = 0; x < NR; x++) t[q * padded * NR + r * NR + x] = minus_infinity<T>;
    }
    if (square())
      for (int64_t q = 0; q < count; q++)
        if (!valid(first + q))
          for (int64_t r = 0; r < n; r++) at(r, q) = minus_infinity<T>;
  }
};

}  // namespace nckernels
