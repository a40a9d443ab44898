// Norms of rows, and what the normalisation does to a gradient.
#pragma once

#include "parallel.hpp"
#include "problem.hpp"
#include "simd.hpp"

namespace nckernels {
template <class T>
T dot(const T* a, const T* b, int64_t n) {
  constexpr int W = lanes<T>;
  // Four independent sums hide the latency of additions.
  Vec<T> total[4] = {};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W)
#pragma GCC unroll 4
    for (int x = 0; x < 4; x++) total[x] += load(a + i + x * W) * load(b + i + x * W);
  for (; i + W <= n; i += W) total[0] += load(a + i) * load(b + i);
  T result = sum<T>((total[0] + total[1]) + (total[2] + total[3]));
  for (; i < n; i++) result += a[i] * b[i];
  return result;
}

template <class T>
T inverse_norm(const Problem& p, const T* x) {
  const T norm = std::sqrt(dot(x, x, p.d));
  return T(1) / (norm < T(p.eps) ? T(p.eps) : norm);  // NaN stays NaN
}

// dL/dx for u = x / |x| and g = dL/du / factor:  factor / |x| (g - (g . u) u).  Returns g . u.
template <class T>
T through_norm(const Problem& p, const T* g, const T* x, T rnorm, T factor, T* out) {
  const T along = dot(g, x, p.d) * rnorm;
  // A clamped norm is a constant.
  const T radial = rnorm >= T(0.999999) / T(p.eps) ? T(0) : along * rnorm, scale = factor * rnorm;
  for (int64_t i = 0; i < p.d; i++) out[i] = scale * (g[i] - radial * x[i]);
  return along;
}

// The rows of a gradient: numbers of T, or bfloat16 numbers to which complete rows are rounded.
template <class T>
class GradientRows {
 public:
  GradientRows(void* data, bool rounded, int64_t d)
      : data_(static_cast<char*>(data)), rounded_(rounded), d_(d) {}

  explicit operator bool() const { return data_; }
  GradientRows from_row(int64_t j) const { return {data_ ? at(j) : nullptr, rounded_, d_}; }

  int64_t bytes_of_row() const { return d_ * size(); }

  // Row j if it has numbers of T, which can be sums until it is complete; else `line`.
  T* place(int64_t j, T* line) const { return data_ && !rounded_ ? reinterpret_cast<T*>(at(j)) : line; }

  // Stores row j, which is complete, unless it was computed in place.
  void put(int64_t j, const T* x) const {
    if (!data_ || !rounded_) return;
    char* const to = at(j);  // may hold numbers of T until now
    int64_t i = 0;
    if constexpr (sizeof(T) == sizeof(float))
      for (; i + lanes<T> <= d_; i += lanes<T>) {
        const Halves some = halves_of(nckernels::rounded(load(x + i)));
        std::memcpy(to + i * sizeof(uint16_t), &some, sizeof some);
      }
    for (; i < d_; i++) {
      const uint16_t one = to_bfloat16(static_cast<float>(x[i]));
      std::memcpy(to + i * sizeof one, &one, sizeof one);
    }
  }
  void clear(int64_t j) const {
    if (data_) std::memset(at(j), 0, d_ * size());
  }

 private:
  int64_t size() const { return rounded_ ? sizeof(uint16_t) : sizeof(T); }
  char* at(int64_t j) const { return data_ + j * d_ * size(); }

  char* data_;
  bool rounded_;
  int64_t d_;
};

// The inverse norms of `count` rows, of which number i is row `at(i)` of `x` and goes to `out[at(i)]`.
template <class T, class F>
void inverse_norms(const Problem& p, const Rows<T>& x, int64_t count, T* out, F&& at) {
  constexpr int64_t step = 64;
  parallel(p.threads, (count + step - 1) / step, [&](int64_t b) {
    NCK_STAGE(norms);
    Buffer<T> line(x.line());
    for (int64_t i = b * step; i < std::min(count, (b + 1) * step); i++)
      out[at(i)] = inverse_norm(p, x.get(at(i), line));
  });
}

}  // namespace nckernels
