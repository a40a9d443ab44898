// The term of label smoothing. The mean logit of a sample, weighted by class, is an inner product:
//     sum_c w_c t_jc / K = beta u_j . P,   P = sum_c w_c v_c / K.
// Its factor in the loss does not depend on the logits, so the term adds a matrix of rank one to dL/dt, which
// need not be formed. With s_j = -eps weight_j and Q = beta sum_j s_j u_j the term adds
//     P . Q to the weighted sum,   s_j P to dL/dU_j,   and w_c / K Q to dL/dV_c.
#pragma once

#include <optional>

#include "norms.hpp"
#include "reduction.hpp"

namespace nckernels {

// A rank-one gradient: dL/dU_j gets of_rows[j] times `row`, dL/dV_c gets of_columns[c] times `column`. Null
// pointers stand for no gradient.
template <class T>
struct RankOne {
  const T *of_rows, *row, *of_columns, *column;
  T of_entries;  // dL/dt_jc gets of_entries of_rows[j] of_columns[c]

  explicit operator bool() const { return row; }

  void add_to_row(int64_t j, int64_t d, T* x) const { add(of_rows, row, j, d, x); }
  void add_to_column(int64_t c, int64_t d, T* x) const { add(of_columns, column, c, d, x); }

 private:
  static void add(const T* factors, const T* vector, int64_t i, int64_t d, T* x) {
    if (!vector) return;
    const T factor = factors[i];
    for (int64_t f = 0; f < d; f++) x[f] += factor * vector[f];
  }
};

template <class T>
class Smoothing {
 public:
  // Rows are added in chunks, which may run in parallel.
  Smoothing(const Problem& p, const Step& step, const Reduction<T>& reduction, int64_t chunks)
      : p_(p),
        reduction_(reduction),
        eps_(step.smoothing),
        chunks_(eps_ == 0 ? 0 : chunks),
        of_rows_(eps_ == 0 ? 0 : p.m),
        of_columns_(eps_ == 0 ? 0 : p.k),
        mean_(eps_ == 0 ? 0 : p.d),
        total_(eps_ == 0 ? 0 : p.d) {
    if (eps_ != 0) zeros(sums_);
  }

  explicit operator bool() const { return eps_ != 0; }

  // Computes P; the norms of prototypes are known.
  void average_prototypes() {
    const Rows<T> w(p_.w, p_.w_stride, p_.d, p_.half);
    const T* rnorm = static_cast<const T*>(p_.w_rnorm);
    std::optional<Buffer<double>> sums;
    zeros(sums);
    in_chunks(p_.k, [&](int64_t chunk, int64_t c, T* line) {
      of_columns_[c] = static_cast<T>(reduction_.class_weight(c) / static_cast<double>(p_.k));
      add(w.get(c, line), of_columns_[c] * double(rnorm[c]), *sums + chunk * p_.d);
    });
    add_up(*sums, 1, mean_);
  }

  // Adds all samples that take part to Q; their norms are known.
  void add_rows(const Columns& columns) {
    const Rows<T> z(p_.z, p_.z_stride, p_.d, p_.half);
    const T* rnorm = static_cast<const T*>(p_.z_rnorm);
    in_chunks(p_.m, [&](int64_t chunk, int64_t j, T* line) {
      if (columns.positive[j] >= 0) add_row(chunk, j, z.get(j, line), rnorm[j]);
    });
  }

  void add_row(int64_t chunk, int64_t j, const T* z, T rnorm) {
    add(z, -eps_ * reduction_.sample_weight(j) * rnorm, *sums_ + chunk * p_.d);
  }

  // The term in the weighted loss of one sample.
  double of_row(int64_t j, const T* z, T rnorm) const {
    return -eps_ * reduction_.sample_weight(j) * p_.beta * double(dot<T>(z, mean_.data(), p_.d) * rnorm);
  }

  // The term in the weighted sum of losses, once all rows are added. `scale` is the factor of that sum.
  double finish(const Columns& columns, double scale) {
    add_up(*sums_, p_.beta, total_);
    sums_.reset();  // frees the memory for the backward pass
    double loss = 0;
    for (int64_t i = 0; i < p_.d; i++) loss += double(mean_[i]) * double(total_[i]);
    bool any = false;
    for (int64_t j = 0; j < p_.m; j++) {
      const bool valid = columns.positive[j] >= 0;
      of_rows_[j] = valid ? static_cast<T>(-eps_ * reduction_.sample_weight(j) * scale) : T(0);
      any = any || valid;
    }
    of_entries_ = any ? static_cast<T>(1 / scale) : T(0);
    // Without samples Q is 0 and the scale of a mean is infinite.
    for (int64_t c = 0; c < p_.k; c++) of_columns_[c] = any ? static_cast<T>(of_columns_[c] * scale) : T(0);
    return loss;
  }

  // For rows from number `first` on.
  RankOne<T> gradient(int64_t first = 0) const {
    if (eps_ == 0) return {};
    return {of_rows_.data() + first, mean_.data(), of_columns_.data(), total_.data(), of_entries_};
  }

 private:
  template <class F>
  void in_chunks(int64_t n, F&& body) {
    parallel(p_.threads, chunks_, [&](int64_t chunk) {
      Buffer<T> line(p_.half ? p_.d : 0);
      for (int64_t i = chunk * n / chunks_; i < (chunk + 1) * n / chunks_; i++) body(chunk, i, line);
    });
  }

  void zeros(std::optional<Buffer<double>>& sums) const {
    sums.emplace(chunks_ * p_.d);
    std::fill_n(sums->data(), sums->size(), 0.0);
  }

  void add(const T* row, double factor, double* sum) const {
    for (int64_t i = 0; i < p_.d; i++) sum[i] += factor * row[i];
  }

  void add_up(const Buffer<double>& sums, double factor, T* out) const {
    for (int64_t i = 0; i < p_.d; i++) {
      double total = 0;
      for (int64_t chunk = 0; chunk < chunks_; chunk++) total += sums.data()[chunk * p_.d + i];
      out[i] = static_cast<T>(factor * total);
    }
  }

  const Problem& p_;
  const Reduction<T>& reduction_;
  double eps_;
  int64_t chunks_;
  Buffer<T> of_rows_, of_columns_, mean_, total_;
  T of_entries_ = 0;
  std::optional<Buffer<double>> sums_;  // per chunk of rows, until they are added up
};

}  // namespace nckernels
