// The forward pass: log-sum-exps over columns (classes) and rows (instances), and the positives.
#pragma once

#include "tiles.hpp"

namespace nckernels {
// The largest logit and the sum of exponentials relative to it. Without a shift, the largest stays 0.
template <class T>
struct Sums {
  T *largest, *total;

  void merge(int64_t i, T other_largest, T other_total) {
    const T top = std::max(largest[i], other_largest);
    const T shift = top == minus_infinity<T> ? T(0) : top;
    total[i] = total[i] * std::exp(largest[i] - shift) + other_total * std::exp(other_largest - shift);
    largest[i] = top;
  }
  double lse(int64_t i) const { return largest[i] + std::log(double(total[i])); }
};

// Computes the norms, and initialises results that no tile writes.
template <class T>
void begin_forward(const Problem& p, const Columns& columns) {
  const Rows<T> z(p.z, p.z_stride, p.d, p.half), w(p.w, p.w_stride, p.d, p.half);
  T *z_rnorm = static_cast<T*>(p.z_rnorm), *w_rnorm = static_cast<T*>(p.w_rnorm);
  inverse_norms(p, z, p.m, z_rnorm, [](int64_t j) { return j; });
  if (columns.compact) std::fill_n(w_rnorm, p.k, T(1));
  inverse_norms(p, w, columns.count, w_rnorm, [&](int64_t c) { return columns.class_of(c); });
  std::fill_n(static_cast<T*>(p.pos), p.m, T(0));
  for (int64_t c = 0; c < p.k && columns.compact && p.by_class; c++)
    LogSumExps<T>::of_classes(p).put(c, minus_infinity<double>);
}

template <class G>
class ForwardPass {
  using Tl = Tiles<G>;
  using T = typename G::T;
  using Operand = typename G::Operand;
  static constexpr int NV = G::NV, NR = G::NR, W = G::W;

 public:
  ForwardPass(const Problem& p, const Columns& columns) : p_(p), tiles_(p, columns), columns_(columns) {}

  void run() {
    const Tl& s = tiles_;
    s.sign_kept();
    T* pos = static_cast<T*>(p_.pos);
    // Each chunk of row tiles has its own sums. They are merged in order, so that the result does not depend
    // on the order in which threads finish.
    const int64_t n = s.all_panels * NR, fit = p_.workspace / 8 / std::max<int64_t>(2 * n * sizeof(T), 1);
    const int64_t chunks = std::min(s.tiles, std::clamp<int64_t>(fit, 1, 4 * std::max(p_.threads, 2)));
    const bool sums_rows = p_.by_instance;
    Buffer<T> column_sums(p_.by_class ? 2 * chunks * n : 0), row_sums(sums_rows ? 2 * p_.m : 0);
    Sums<T> by_row{row_sums, row_sums + p_.m};
    const T start = s.shift_free ? T(0) : minus_infinity<T>;
    if (sums_rows) {
      std::fill(by_row.largest, by_row.largest + p_.m, start);
      std::fill(by_row.total, by_row.total + p_.m, T(0));
    }
    if (p_.by_class) {
      std::fill(static_cast<T*>(column_sums), column_sums + chunks * n, start);
      std::fill(column_sums + chunks * n, column_sums + 2 * chunks * n, T(0));
    }
    Buffer<Operand> v(std::min(s.block_k, n) * G::inner(p_.d));
    // U of all tiles, if there is room for it. Otherwise each block of columns packs it again.
    Buffer<Operand> all_u(s.in_place ? s.tiles * s.tile_m * G::inner(p_.d) : 0);
    for (int64_t first = 0; first < columns_.count; first += s.block_k) {
      const int64_t count = std::min(s.block_k, columns_.count - first);
      const int64_t panels = (count + NR - 1) / NR;
      parallel(p_.threads, panels, [&](int64_t q) { s.pack_prototypes(first, count, q, v, nullptr); });
      parallel(p_.threads, chunks, [&](int64_t chunk) {
        Buffer<Operand> own_u(s.in_place ? 0 : s.tile_m * G::inner(p_.d));
        Buffer<T> own(s.kept_tiles < s.tiles ? s.tile_m * std::min(Tl::STEP, panels) * NR : 0);
        Buffer<T> rows(s.tile_m * W);
        for (int64_t tile = chunk * s.tiles / chunks; tile < (chunk + 1) * s.tiles / chunks; tile++) {
          const bool keep = tile < s.kept_tiles;
          Operand* const u = s.in_place ? all_u + tile * s.tile_m * G::inner(p_.d) : own_u;
          if (!s.in_place || first == 0) s.pack_features(tile, u, nullptr);
          for (int64_t q = 0; q < panels; q += Tl::STEP) {
            const int64_t end = std::min(q + Tl::STEP, panels), c = first + q * NR;
            T* t = keep ? s.kept_tile(tile, first / NR + q) : own;
            s.logits(tile, first, count, q, end, u, v, t, pos);
            Sums<T> by_column{column_sums + chunk * n + c, column_sums + (chunks + chunk) * n + c};
            const int64_t columns = std::min(first + count, first + end * NR) - c;
            if (s.shift_free)
              exponentials(tile, c, columns, t, rows, by_column, by_row, keep);
            else
              streaming(tile, c, columns, t, by_column, by_row);
          }
        }
      });
    }
    if (p_.by_class) finish_classes(chunks, n, column_sums);
    if (sums_rows) {
      const auto out = LogSumExps<T>::of_instances(p_);
      for (int64_t j = 0; j < p_.m; j++) out.put(j, s.valid(j) ? by_row.lse(j) : minus_infinity<double>);
    }
  }

  // The kept tiles are an output of the operator, so that their padding is initialised too.
  void clear_rest_of_kept() const {
    const Tl& s = tiles_;
    if (!s.kept) return;
    const int64_t per_tile = s.tile_m * s.all_panels * NR;
    int64_t used = s.kept_tiles * per_tile;
    if (used && s.kept_tiles == s.tiles) used -= (s.tile_m - s.padded_rows(s.tiles - 1)) * s.all_panels * NR;
    std::fill(s.kept + used, s.kept + s.room_to_keep(), T(0));
  }

 private:
  // Without a shift: e = exp(t), in place if the tile is kept, summed with the exponentials of the biases as
  // weights.
  void exponentials(int64_t tile, int64_t first, int64_t count, T* t, T* row_vectors, Sums<T>& by_column,
                    Sums<T>& by_row, bool keep) const {
    NCK_STAGE(exponentials);
    const Tl& s = tiles_;
    const int64_t n = s.rows(tile), padded = s.padded_rows(tile), row0 = s.first_row(tile);
    if (p_.by_instance) std::fill(row_vectors, row_vectors + n * W, T(0));
    for (int64_t q = 0; q * NR < count; q++) {
      T* e = t + q * padded * NR;
      // Columns past the end have t = 0 and must not be counted.
      Vec<T> lane[NV], weight[NV], column[NV];
      for (int v = 0; v < NV; v++) {
        T inside[W], factor[W];
        for (int x = 0; x < W; x++) {
          const int64_t c = q * NR + v * W + x;
          inside[x] = c < count ? T(1) : T(0);
          factor[x] =
              s.class_bias && c < count ? std::exp(s.class_bias[columns_.class_of(first + c)]) : inside[x];
        }
        lane[v] = load(inside);
        weight[v] = load(factor);
        column[v] = Vec<T>{};
      }
      for (int64_t r = 0; r < n; r++) {
        const T row_weight = s.sample_bias ? std::exp(s.sample_bias[row0 + r]) : T(1);
        Vec<T> row{};
        for (int v = 0; v < NV; v++) {
          const Vec<T> x = exponential<T, true>(load(e + r * NR + v * W)) * lane[v];
          if (keep) store(e + r * NR + v * W, x);
          column[v] += x * row_weight;
          row += x * weight[v];
        }
        if (p_.by_instance) store(row_vectors + r * W, load(row_vectors + r * W) + row);
      }
      if (p_.by_class)
        for (int v = 0; v < NV; v++) {
          T* to = by_column.total + q * NR + v * W;
          store(to, load(to) + column[v]);
        }
    }
    if (p_.by_instance)
      for (int64_t r = 0; r < n; r++) by_row.total[row0 + r] += sum<T>(load(row_vectors + r * W));
  }

  // With a running maximum, for temperatures and biases whose exponentials could leave the range of T.
  void streaming(int64_t tile, int64_t first, int64_t count, const T* t, Sums<T>& by_column,
                 Sums<T>& by_row) const {
    NCK_STAGE(exponentials);
    const Tl& s = tiles_;
    const int64_t n = s.rows(tile), padded = s.padded_rows(tile), row0 = s.first_row(tile);
    for (int64_t q = 0; q * NR < count && p_.by_class; q++)
      for (int v = 0; v < NV; v++) {
        const T* x = t + q * padded * NR + v * W;
        Vec<T> top = splat(minus_infinity<T>), total{};
        auto biased = [&](int64_t r) {
          return s.sample_bias ? load(x + r * NR) + s.sample_bias[row0 + r] : load(x + r * NR);
        };
        for (int64_t r = 0; r < n; r++) top = maximum<T>(biased(r), top);
        const Vec<T> shift = top == splat(minus_infinity<T>) ? Vec<T>{} : top;
        for (int64_t r = 0; r < n; r++) total += exponential<T>(biased(r) - shift);
        for (int i = 0; i < W && q * NR + v * W + i < count; i++)
          by_column.merge(q * NR + v * W + i, top[i], total[i]);
      }
    for (int64_t r = 0; r < n && p_.by_instance; r++) {
      auto biased = [&](int64_t c) {
        const T x = t[(c / NR) * padded * NR + r * NR + c % NR];
        return s.class_bias ? x + s.class_bias[columns_.class_of(first + c)] : x;
      };
      T top = minus_infinity<T>, total = 0;
      for (int64_t c = 0; c < count; c++) top = std::max(top, biased(c));
      const T shift = top == minus_infinity<T> ? T(0) : top;
      for (int64_t c = 0; c < count; c++) total += std::exp(biased(c) - shift);
      by_row.merge(row0 + r, top, total);
    }
  }

  void finish_classes(int64_t chunks, int64_t n, T* sums) const {
    const auto out = LogSumExps<T>::of_classes(p_);
    for (int64_t c = 0; c < columns_.count; c++) {
      T largest = tiles_.shift_free ? T(0) : minus_infinity<T>, total = 0;
      Sums<T> merged{&largest, &total};
      for (int64_t i = 0; i < chunks; i++)
        if (tiles_.shift_free)
          total += sums[(chunks + i) * n + c];
        else
          merged.merge(0, sums[i * n + c], sums[(chunks + i) * n + c]);
      const bool left_out = tiles_.square() && !tiles_.valid(c);
      out.put(columns_.class_of(c), left_out ? minus_infinity<double> : merged.lse(0));
    }
  }

  const Problem& p_;
  Tl tiles_;
  const Columns& columns_;
};

}  // namespace nckernels
