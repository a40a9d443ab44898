// Row tiles and column blocks of one call: sizes, packing, and the tile of logits with its mask.
#pragma once

#include "gemm.hpp"
#include "problem.hpp"

namespace nckernels {
namespace NCK_ISA {

template <class T>
constexpr T minus_infinity = -std::numeric_limits<T>::infinity();

template <class T, int NV>
struct Tiles {
    using G = Gemm<T, NV>;
    static constexpr int W = G::W, NR = G::NR;

    const Problem& p;
    const Columns& columns;
    const T *z, *w, *sample_bias, *class_bias;
    T *z_rnorm, *w_rnorm, *kept;
    T beta;
    bool shift_free;
    int64_t d_pad, d_panels;
    int64_t tile_m, tiles;   // rows of a tile (a multiple of MR), number of tiles
    int64_t block_k;         // columns of a block (a multiple of NR)
    int64_t all_panels;      // of all columns
    int64_t kept_tiles;      // the first tiles whose exp(t) is kept from forward to backward
    int64_t group;           // row tiles that the backward pass has in flight

    Tiles(const Problem& problem, const Columns& cols)
        : p(problem), columns(cols),
          z(static_cast<const T*>(p.z)), w(static_cast<const T*>(p.w)),
          sample_bias(static_cast<const T*>(p.sample_bias)), class_bias(static_cast<const T*>(p.class_bias)),
          z_rnorm(static_cast<T*>(p.z_rnorm)), w_rnorm(static_cast<T*>(p.w_rnorm)), kept(static_cast<T*>(p.kept)),
          beta(static_cast<T>(p.beta)) {
        d_pad = round_up(p.d, NR);
        d_panels = d_pad / NR;
        all_panels = (columns.count + NR - 1) / NR;
        shift_free = p.beta + largest_bias() <= 30.0;
        plan();
    }

    // The workspace, in numbers of T: a quarter for a block of columns (V in two layouts and its gradient), a
    // quarter for row tiles (U packed and its gradient per thread, U in panels and the entries per tile of a group);
    // the other half is what may be kept. Tiles do not depend on the number of threads unless that is very large,
    // so results do not either.
    void plan() {
        const int64_t quarter = std::max<int64_t>(p.workspace / static_cast<int64_t>(sizeof(T)) / 4, 1);
        const int64_t columns_padded = std::max<int64_t>(all_panels * NR, NR);
        int64_t most = std::max<int64_t>(quarter / (3 * d_pad) / NR * NR, NR);
        const int64_t blocks = (columns_padded + most - 1) / most;
        block_k = round_up((columns_padded + blocks - 1) / blocks, NR);
        const int64_t threads = std::max(p.threads, 1);
        group = 2 * threads;
        const int64_t per_row = threads * 2 * d_pad + group * (d_pad + block_k);
        tile_m = std::clamp<int64_t>(quarter / per_row, MR, 192) / MR * MR;
        // At least four tiles a thread of two, so that none waits long for the last one.
        const int64_t even = round_up((p.m + 7) / 8, MR);
        tile_m = std::max<int64_t>(std::min(tile_m, even), MR);
        tiles = (p.m + tile_m - 1) / tile_m;
        const int64_t per_tile = tile_m * all_panels * NR;
        kept_tiles = shift_free && kept && per_tile ? std::min(tiles, p.kept_size / per_tile) : 0;
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
        return kept + (tile * all_panels + first_panel) * tile_m * NR;
    }

    static T inverse_norm(const T* x, int64_t d) {
        Vec<T> total{};
        int64_t i = 0;
        for (; i + W <= d; i += W) {
            const Vec<T> v = load(x + i);
            total += v * v;
        }
        T s = sum<T>(total);
        for (; i < d; i++) s += x[i] * x[i];
        const T norm = std::sqrt(s);
        return T(1) / (norm < T(1e-12) ? T(1e-12) : norm);  // NaN stays NaN
    }

    // Unit prototypes of the columns [first, first + count) as [panel][d][NR], and, if `by_feature` is given, as
    // [d panel][column][NR] too. Padding is zero.
    void pack_prototypes(int64_t first, int64_t count, int64_t panel, T* by_class, T* by_feature) const {
        const int64_t padded = round_up(count, NR);
        T* out = by_class + panel * p.d * NR;
        for (int64_t q = 0; q < NR; q++) {
            const int64_t c = panel * NR + q;
            const bool real = c < count;
            const int64_t id = real ? columns.class_of(first + c) : 0;
            const T* row = w + id * p.w_stride;
            const T scale = real ? w_rnorm[id] : T(0);
            for (int64_t i = 0; i < p.d; i++) out[i * NR + q] = real ? row[i] * scale : T(0);
            if (!by_feature) continue;
            for (int64_t n = 0; n < d_panels; n++) {
                T* to = by_feature + (n * padded + c) * NR;
                for (int64_t i = 0; i < NR; i++)
                    to[i] = real && n * NR + i < p.d ? row[n * NR + i] * scale : T(0);
            }
        }
    }

    // beta times the unit features of a tile in blocks [MR rows][d][MR]; in `by_feature`, unless null, as
    // [d panel][padded rows][NR]. Rows past the end are zero.
    void pack_features(int64_t tile, T* packed, T* by_feature) const {
        const int64_t n = rows(tile), padded = padded_rows(tile), row0 = first_row(tile);
        for (int64_t i = 0; i < padded; i += MR) {
            T* out = packed + i * p.d;
            for (int64_t r = 0; r < MR; r++) {
                if (i + r >= n) {
                    for (int64_t x = 0; x < p.d; x++) out[x * MR + r] = T(0);
                    continue;
                }
                const T* row = z + (row0 + i + r) * p.z_stride;
                const T scale = z_rnorm[row0 + i + r] * beta;
                for (int64_t x = 0; x < p.d; x++) out[x * MR + r] = row[x] * scale;
            }
        }
        if (!by_feature) return;
        for (int64_t f = 0; f < d_panels; f++) {
            const int64_t width = std::min<int64_t>(NR, p.d - f * NR);
            for (int64_t r = 0; r < padded; r++) {
                T* out = by_feature + (f * padded + r) * NR;
                const T scale = r < n ? z_rnorm[row0 + r] * beta : T(0);
                const T* row = z + (row0 + std::min(r, n - 1)) * p.z_stride + f * NR;
                for (int64_t x = 0; x < width; x++) out[x] = r < n ? row[x] * scale : T(0);
                for (int64_t x = width; x < NR; x++) out[x] = T(0);
            }
        }
    }

    // The tile of t for the columns [first, first + count), -inf where excluded; positives are picked up in `pos`
    // unless null.
    void logits(int64_t tile, int64_t first, int64_t count, const T* u, const T* v, T* t, T* pos) const {
        const int64_t padded = padded_rows(tile), n = rows(tile), row0 = first_row(tile);
        const int64_t panels = (count + NR - 1) / NR;
        G::logits(padded, panels, p.d, u, v, t);
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

// A parallel loop over [0, n), dynamically scheduled; serial where threads would cost more than they save.
template <class F>
void parallel(int threads, int64_t n, F&& body) {
    if (threads <= 1 || n <= 1) {
        for (int64_t i = 0; i < n; i++) body(i);
        return;
    }
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t i = 0; i < n; i++) body(i);
}

}  // namespace NCK_ISA
}  // namespace nckernels
