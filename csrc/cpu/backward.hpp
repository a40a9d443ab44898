// The backward pass. With A = dL/dt for a tile and the packed operands U = beta u, V = unit prototypes:
//     dL/dU = A V,   dL/dV = A^T U,   and through the normalisation dL/dx = r (g - (g . u) u).
//
// Row tiles go in groups. First each thread takes a tile of the group: entries A, and A V for its rows. Then
// the threads share out the features and columns and add A^T U of all tiles of the group, in order: one
// accumulator for all threads, no atomics, and a result that does not depend on who was quicker.
#pragma once

#include "tiles.hpp"

namespace nckernels {
template <class T, int NV>
class BackwardPass {
  using Tl = Tiles<T, NV>;
  using G = Gemm<T, NV>;
  static constexpr int NR = Tl::NR, W = Tl::W;

 public:
  BackwardPass(const Problem& p, const Columns& columns, const Gradients& g)
      : p_(p),
        columns_(columns),
        g_(g),
        s_(p, columns),
        longest_(T(0.999999) / T(p.eps)),
        need_rows_(g.z || (g.beta && !g.w)),
        class_scale_(s_.all_panels * NR),
        class_shift_(s_.all_panels * NR),
        row_scale_(p.m),
        row_shift_(p.m) {
    prepare();
  }

  void run() {
    const int64_t tiles = s_.tiles, d_pad = s_.d_pad;
    // dL/dU accumulates over column blocks in the gradient itself.
    Buffer<T> rows_storage(need_rows_ && !g_.z ? p_.m * p_.d : 0);
    T* grad_z = g_.z ? static_cast<T*>(g_.z) : static_cast<T*>(rows_storage);
    std::vector<double> energy(std::max<int64_t>(tiles, 1), 0.0);
    std::vector<double> class_energy(s_.all_panels, 0.0);
    const int64_t widest = std::min(s_.block_k, s_.all_panels * NR);
    Buffer<T> v(s_.kept_tiles < tiles ? widest * p_.d : 0), v_rows(need_rows_ ? widest * d_pad : 0),
        grad_v(g_.w ? widest * d_pad : 0);
    const int64_t group = std::min(s_.group, tiles);
    Buffer<T> entries(group * s_.tile_m * widest), u_rows(g_.w ? group * s_.tile_m * d_pad : 0);
    Buffer<T> bias_shares(g_.class_bias && g_.instance_lse ? group * widest : 0);
    T* const all_entries = entries;
    T* const bias = bias_shares;
    T* const all_u = u_rows;
    if (!columns_.count && need_rows_) std::fill(grad_z, grad_z + p_.m * p_.d, T(0));

    for (int64_t first = 0; first < columns_.count; first += s_.block_k) {
      const int64_t count = std::min(s_.block_k, columns_.count - first);
      const int64_t panels = (count + NR - 1) / NR;
      const bool last = first + count == columns_.count;
      parallel(p_.threads, panels, [&](int64_t q) {
        s_.pack_prototypes(first, count, q, v, need_rows_ ? static_cast<T*>(v_rows) : nullptr);
      });
      if (g_.w) std::fill(static_cast<T*>(grad_v), grad_v + panels * NR * d_pad, T(0));
      for (int64_t begin = 0; begin < tiles; begin += group) {
        const int64_t here = std::min(group, tiles - begin);
        parallel(p_.threads, here, [&](int64_t i) {
          const int64_t tile = begin + i;
          T* a = all_entries + i * s_.tile_m * widest;
          T* by_feature = g_.w ? all_u + i * s_.tile_m * d_pad : nullptr;
          const bool is_kept = tile < s_.kept_tiles;  // then there is no product to make again
          Buffer<T> u(is_kept ? 0 : s_.tile_m * p_.d);
          if (!is_kept || by_feature) s_.pack_features(tile, u, by_feature);
          fill_entries(tile, first, count, u, v, a, bias ? bias + i * widest : nullptr);
          if (need_rows_) add_rows(tile, first == 0, last, panels, a, v_rows, grad_z, energy[tile]);
        });
        for (int64_t i = 0; i < here && bias; i++)
          for (int64_t c = 0; c < count; c++)
            static_cast<T*>(g_.class_bias)[columns_.class_of(first + c)] += bias[i * widest + c];
        if (g_.w) add_columns(begin, here, panels, widest, all_entries, all_u, grad_v);
      }
      if (g_.w)
        parallel(p_.threads, panels,
                 [&](int64_t q) { finish_columns(first, count, q, grad_v, class_energy[first / NR + q]); });
    }
    if (g_.beta) {
      double total = 0;
      for (double e : need_rows_ ? energy : class_energy) total += e;
      *g_.beta = total / p_.beta;
    }
  }

 private:
  // Upstream gradients and lse in the order of the columns, made harmless where a sum is empty. Shift-free
  // they become one factor, g / exp(lse), since A = exp(t) g / exp(lse).
  void prepare() {
    const T* g_class = static_cast<const T*>(g_.class_lse);
    const T* g_instance = static_cast<const T*>(g_.instance_lse);
    auto put = [&](T& scale, T& shift, T g, T lse) {
      const bool empty = lse == minus_infinity<T>;
      shift = empty ? T(0) : lse;
      scale = empty ? T(0) : s_.shift_free ? g * std::exp(-lse) : g;
    };
    std::fill(class_scale_.begin(), class_scale_.end(), T(0));
    std::fill(class_shift_.begin(), class_shift_.end(), T(0));
    if (g_class)
      for (int64_t c = 0; c < columns_.count; c++) {
        const int64_t id = columns_.class_of(c);
        put(class_scale_[c], class_shift_[c], g_class[id], static_cast<const T*>(p_.class_lse)[id]);
      }
    for (int64_t j = 0; j < p_.m && g_instance; j++)
      put(row_scale_[j], row_shift_[j], g_instance[j], static_cast<const T*>(p_.instance_lse)[j]);
  }

  // A of one tile and block of columns, and its column sums for the classes' biases.
  void fill_entries(int64_t tile, int64_t first, int64_t count, const T* u, const T* v, T* a, T* bias_share) {
    const int64_t n = s_.rows(tile), padded = s_.padded_rows(tile), row0 = s_.first_row(tile);
    const bool is_kept = tile < s_.kept_tiles;
    const T* e = is_kept ? s_.kept_tile(tile, first / NR) : a;
    if (!is_kept) s_.logits(tile, first, count, u, v, a, nullptr);
    const bool by_class = g_.class_lse, by_row = g_.instance_lse;
    const int64_t panels = (count + NR - 1) / NR;
    for (int64_t q = 0; q < panels; q++) {
      T* to = a + q * padded * NR;
      if (s_.shift_free)
        scaled(q, first, count, n, row0, e + q * padded * NR, to, is_kept, by_class, by_row, bias_share);
      else
        shifted(q, first, count, n, row0, e + q * padded * NR, to, by_class, by_row, bias_share);
      for (int64_t r = n; r < padded; r++)
        for (int64_t x = 0; x < NR; x++) to[r * NR + x] = T(0);
    }
    if (const T* g_pos = static_cast<const T*>(g_.pos))
      for (int64_t r = 0; r < n; r++) {
        const int64_t c = columns_.positive[row0 + r] - first;
        if (columns_.positive[row0 + r] >= 0 && c >= 0 && c < count)
          a[(c / NR) * padded * NR + r * NR + c % NR] += g_pos[row0 + r];
      }
  }

  // One panel, A = exp(t) (exp(b_j) class_scale_c + row_scale_j exp(b_c)).
  void scaled(int64_t q, int64_t first, int64_t count, int64_t n, int64_t row0, const T* e, T* a,
              bool is_kept, bool by_class, bool by_row, T* bias_share) {
    Vec<T> scale[NV], weight[NV], column[NV];  // `column`: what flows to the classes' biases
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
        if (!is_kept) x = exponential<T>(x);
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

  // dL/dU of a tile: A V, added up over column blocks in grad_z; after the last one through the
  // normalisation.
  void add_rows(int64_t tile, bool is_first, bool is_last, int64_t panels, const T* a, const T* v, T* grad_z,
                double& energy) {
    const int64_t n = s_.rows(tile), padded = s_.padded_rows(tile), d = p_.d, d_pad = s_.d_pad;
    Buffer<T> product(padded * d_pad), sum(d_pad), line(s_.z.line());
    T* const x = sum;
    G::times_prototypes(padded, panels, s_.d_panels, a, v, product);
    for (int64_t r = 0; r < n; r++) {
      const int64_t j = s_.first_row(tile) + r;
      T* out = grad_z + j * d;
      for (int64_t f = 0; f < s_.d_panels; f++) std::copy_n(product + (f * padded + r) * NR, NR, x + f * NR);
      if (!is_first)
        for (int64_t i = 0; i < d; i++) x[i] += out[i];
      if (!is_last || !s_.valid(j)) {
        for (int64_t i = 0; i < d; i++) out[i] = s_.valid(j) ? x[i] : T(0);
        continue;
      }
      // x = dL/d(beta u), unit = u: dL/dz = beta r (x - (x . u) u)
      const T* row = s_.z.get(j, line);
      const T rnorm = s_.z_rnorm[j];
      const T along = dot(x, row, d) * rnorm;
      const T radial = rnorm >= longest_ ? T(0) : along * rnorm, scale = s_.beta * rnorm;
      for (int64_t i = 0; i < d; i++) out[i] = scale * (x[i] - radial * row[i]);
      energy += static_cast<double>(along) * p_.beta;
    }
  }

  // dL/dV of a column block: A^T U of a group of tiles, in their order.
  void add_columns(int64_t begin, int64_t here, int64_t panels, int64_t widest, const T* entries, const T* u,
                   T* grad_v) {
    // One piece is a block of columns, whose entries stay in the L2 cache, by a few panels of features; there
    // are enough of them for the threads.
    const int64_t padded = panels * NR, blocks = (panels + G::BLOCK - 1) / G::BLOCK;
    const int64_t shares = std::min(s_.d_panels, (4 * p_.threads + blocks - 1) / blocks);
    parallel(p_.threads, blocks * shares, [&](int64_t i) {
      const int64_t c = i % blocks * G::BLOCK * NR, stop = std::min(padded, c + G::BLOCK * NR);
      const int64_t share = i / blocks;
      for (int64_t tile = 0; tile < here; tile++) {
        const int64_t rows = s_.padded_rows(begin + tile);
        const T* a = entries + tile * s_.tile_m * widest;
        const T* x = u + tile * s_.tile_m * s_.d_pad;
        for (int64_t f = share * s_.d_panels / shares; f < (share + 1) * s_.d_panels / shares; f++)
          G::times_features(rows, c, stop, a, x + f * rows * NR, grad_v + f * padded * NR);
      }
    });
  }

  void finish_columns(int64_t first, int64_t count, int64_t panel, const T* grad_v, double& energy) {
    const int64_t d = p_.d, padded = round_up(count, NR);
    Buffer<T> line(s_.d_pad), row_line(s_.w.line());
    T* x = line;
    for (int64_t c = panel * NR; c < std::min(count, (panel + 1) * NR); c++) {
      const int64_t id = columns_.class_of(first + c);
      T* out = static_cast<T*>(g_.w) + id * d;
      if (!columns_.reads(first + c)) {
        std::fill(out, out + d, T(0));
        continue;
      }
      for (int64_t f = 0; f < s_.d_panels; f++)
        for (int64_t i = 0; i < NR; i++) x[f * NR + i] = grad_v[(f * padded + c) * NR + i];
      const T* row = s_.w.get(id, row_line);
      const T rnorm = s_.w_rnorm[id];
      const T along = dot(x, row, d) * rnorm;
      const T radial = rnorm >= longest_ ? T(0) : along * rnorm;
      for (int64_t i = 0; i < d; i++) out[i] = rnorm * (x[i] - radial * row[i]);
      energy += along;
    }
  }

  static T dot(const T* a, const T* b, int64_t n) {
    Vec<T> total{};
    int64_t i = 0;
    for (; i + W <= n; i += W) total += load(a + i) * load(b + i);
    T result = sum<T>(total);
    for (; i < n; i++) result += a[i] * b[i];
    return result;
  }

  const Problem& p_;
  const Columns& columns_;
  const Gradients& g_;
  Tl s_;
  T longest_;  // inverse norms from here on were clamped
  bool need_rows_;
  std::vector<T> class_scale_, class_shift_, row_scale_, row_shift_;
};

}  // namespace nckernels
