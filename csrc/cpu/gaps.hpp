// Dot regression: g^2 / 2 with the gap g = 1 - cos of each sample and the prototype of its class, and
// gradients for given factors of the losses. With unit rows a and b and s = a . b, the gradient by the
// features is -g (b - s a) / |z|; the gradient by the prototype has a and b exchanged.
#pragma once

#include "norms.hpp"

namespace nckernels {

template <class T>
class Gaps {
 public:
  Gaps(const Problem& p, const Step& s) : p_(p), s_(s), ids_(p.k + 1), order_(p.m) {}

  Status run() {
    const int64_t* y = p_.target;
    const auto ignored = [&](int64_t j) { return y[j] == p_.ignore_index; };
    for (int64_t j = 0; j < p_.m; j++) {
      if (ignored(j)) continue;
      if (y[j] < 0 || y[j] >= p_.k) return kBadTarget;
      ids_[y[j] + 1]++;
    }
    for (int64_t c = 0; c < p_.k; c++) ids_[c + 1] += ids_[c];
    std::vector<int64_t> next(ids_.begin(), ids_.end() - 1);
    for (int64_t j = 0; j < p_.m; j++) {
      if (!ignored(j))
        order_[next[y[j]]++] = j;
      else if (T* loss = static_cast<T*>(s_.loss))
        loss[j] = 0;
      if (ignored(j) && s_.z) std::fill_n(static_cast<T*>(s_.z) + j * p_.d, p_.d, T(0));
    }
    // Small batches finish before other threads would wake.
    parallel(double(p_.m) * double(p_.d) < 3e5 ? 1 : p_.threads, p_.k, [&](int64_t c) { class_of(c); });
    return kOk;
  }

 private:
  // Writes the unit row of x to `out` and its norm, at least eps, to `norm`. Returns whether it was clamped.
  bool normalise(const T* x, T* out, T& norm) const {
    norm = std::sqrt(dot(x, x, p_.d));
    const bool clamped = norm < T(p_.eps);
    if (clamped) norm = T(p_.eps);
    for (int64_t i = 0; i < p_.d; i++) out[i] = x[i] / norm;
    return clamped;
  }

  // Writes factor dg/da / norm, where g is the gap of a and b, to `out`, or adds it.
  void gradient(const T* a, const T* b, T gap, bool near, bool clamped, T factor, bool add, T* out) const {
    const T whole = near ? T(1) : T(0), along = clamped ? T(0) : near ? -gap : T(1) - gap;
    for (int64_t i = 0; i < p_.d; i++) {
      // Near s = 1 the subtraction is exact, and the second term is small.
      const T x = (whole * a[i] - b[i]) + along * a[i];
      out[i] = add ? out[i] + factor * x : factor * x;
    }
  }

  void class_of(int64_t c) const {
    const int64_t d = p_.d;
    T* of_w = s_.w ? static_cast<T*>(s_.w) + c * d : nullptr;
    if (of_w) std::fill_n(of_w, d, T(0));
    if (ids_[c] == ids_[c + 1]) return;
    const Rows<T> z(p_.z, p_.z_stride, d, p_.half), w(p_.w, p_.w_stride, d, p_.half);
    Buffer<T> lines(3 * d);
    T *line = lines, *a = line + d, *b = a + d;
    T a_norm, b_norm;
    const bool b_clamped = normalise(w.get(c, line), b, b_norm);
    for (int64_t i = ids_[c]; i < ids_[c + 1]; i++) {
      const int64_t j = order_[i];
      const bool a_clamped = normalise(z.get(j, line), a, a_norm);
      // Near s = 1 the gap is half of the squared chord, without cancellation. Further away the chord would
      // have the rounding errors of both norms. Rows with a clamped norm have no such chord.
      const T cosine = dot(a, b, d);
      const bool near = cosine > T(0.5) && !a_clamped && !b_clamped;
      T gap = T(1) - cosine;
      if (near) {
        for (int64_t x = 0; x < d; x++) line[x] = a[x] - b[x];
        gap = T(0.5) * dot(line, line, d);
      }
      if (s_.loss) static_cast<T*>(s_.loss)[j] = T(0.5) * gap * gap;
      const T factor = s_.weight ? static_cast<const T*>(s_.weight)[j] * gap : gap;
      if (s_.z) gradient(a, b, gap, near, a_clamped, factor / a_norm, false, static_cast<T*>(s_.z) + j * d);
      if (of_w) gradient(b, a, gap, near, b_clamped, factor / b_norm, true, of_w);
    }
  }

  const Problem& p_;
  const Step& s_;
  std::vector<int64_t> ids_;    // offset of each class in `order_`
  std::vector<int64_t> order_;  // the samples that take part, by class
};

}  // namespace nckernels
