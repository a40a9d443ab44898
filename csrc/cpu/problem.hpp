// The arguments from Python, which native.py packs into these structures, and the columns derived from them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "stages.hpp"

// NCK_BFLOAT16: bfloat16 features are multiplied without conversion (bfloat16.cpp). NCK_AMX: by the tiles of
// AMX. Both are set where the compiler has the instructions, or by tests that run models of the instructions.
#if defined(__AMX_BF16__)
#define NCK_AMX
#endif
#if !defined(NCK_BFLOAT16) && (defined(__AVX512BF16__) || defined(NCK_AMX))
#define NCK_BFLOAT16
#endif

namespace nckernels {

enum Half : int32_t { kFull = 0, kBfloat16 = 1, kFloat16 = 2 };
enum Exclude : int32_t { kNone = 0, kTarget = 1, kSelf = 2, kSameLabel = 3 };

// A plain C structure. Pointers may be null where a comment says so. Matrices have rows of d contiguous
// numbers at a distance of `*_stride`. Numbers have one type T, float or double, with two exceptions: targets
// are int64, and if `half` is not kFull, features and prototypes have 16 bits and T is float.
struct Problem {
  int64_t m, k, d, z_stride, w_stride;
  const void *z, *w;
  const int64_t* target;
  const void *sample_bias, *class_bias;  // (m), (k) or null
  int64_t ignore_index, workspace;       // bytes
  double beta;
  int32_t by_class, by_instance, exclude, present_only;
  int32_t symmetric;  // features and prototypes are one matrix, and there is one direction
  int32_t threads, is_double;
  int32_t half;  // enum Half
  double eps;    // of the norms
  // Results of the forward pass, inputs of the backward pass.
  void *class_lse, *instance_lse;  // (k), (m) or null
  void *pos, *z_rnorm, *w_rnorm;   // (m), (m), (k)
  void* kept;  // exp(t) of the first row tiles and then the height of a tile: `kept_size` numbers, or null
  int64_t kept_size;
  // Bytes from a row of a kept tile to the next one. 0: tiles are adjacent. Otherwise they are in the memory
  // of the features' gradient, which takes their place tile by tile, and kept_size is 0.
  int64_t kept_row;
  // Whether the backward pass may write its entries over the kept tiles, if all tiles are kept.
  int64_t kept_once;
  // In a step: the log-sum-exps of classes and instances in double, or null. The backward pass then reads
  // them instead of those of type T, whose rounding would be a relative error of all entries.
  double *exact_class_lse, *exact_instance_lse;
};

struct Gradients {
  const void *class_lse, *instance_lse, *pos;  // upstream, (k), (m), (m) or null
  void *z, *w;                     // (m, d), (k, d) contiguous, or null. w is initialised to zeros if classes
                                   // can be absent, and null if the problem is symmetric
  void *sample_bias, *class_bias;  // (m), (k), zeros, or null
  double* beta;                    // 0, or null
};

// A training step: the loss is the sum or the mean of weight_j (lse_j - pos_j), where lse_j is the
// log-sum-exp of sample j, of its class, or the mean of both.
// - In the instance direction the loss can have label smoothing, with class weights as in F.cross_entropy,
// and
//   margins that shift the positive. With a margin `exclude` is kTarget, and the shifted positive is added to
//   the sum over the other classes.
// - In a symmetric problem the targets are labels, pos_j is the mean logit of j with the other samples of its
//   label, and samples without others do not count.
//
// For losses that are not reduced, `losses` writes the loss of each sample, and the results of the forward
// pass into the problem. A step on these results computes the gradient; the upstream gradients are then
// factors of the weights.
struct Step {
  const void* weight;        // (m) or null for ones
  const void* class_weight;  // (k) or null for ones: factors of the weights of a class's samples
  void* loss;                // 1 number; (m) for `losses`; null in a step that follows `losses`
  void *z, *w;               // gradients as in Gradients; bfloat16 numbers if `rounded`
  double* beta;              // 0, or null
  double empty;              // the mean over no samples
  double smoothing, angular_margin, cosine_margin;
  int64_t mean;  // or sum
  // The sums of both directions are added inside the logarithm; otherwise the loss has the mean of two
  // logarithms. In a symmetric problem: the sums of all samples are added, without positives and weights.
  int64_t joined;
  int64_t rounded;
};

enum Status : int32_t { kOk = 0, kBadTarget = 1, kNoMemory = 2 };

namespace scratch {
// Large buffers are pooled: the page faults of fresh memory would take as long as the arithmetic on it.
void* acquire(size_t bytes);
void release(void* p, size_t bytes);

// Asks the system for huge pages in memory that has not been touched. A page fault for each small page would
// take as long as the arithmetic on its numbers.
void want_huge_pages(void* p, size_t bytes);
}  // namespace scratch

template <class T>
class Buffer {
 public:
  explicit Buffer(size_t n)
      : bytes_(n * sizeof(T)), p_(n ? static_cast<T*>(scratch::acquire(bytes_)) : nullptr) {}
  ~Buffer() {
    if (p_) scratch::release(p_, bytes_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator T*() { return p_; }
  T* data() const { return p_; }
  int64_t size() const { return static_cast<int64_t>(bytes_ / sizeof(T)); }

 private:
  size_t bytes_;
  T* p_;
};

inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

// bfloat16 is the upper half of a float. Rounding is to nearest, ties to even; NaN stays NaN.
inline float from_bfloat16(uint16_t h) { return from_bits(uint32_t(h) << 16); }
inline uint16_t to_bfloat16(float x) {
  const uint32_t bits = to_bits(x);
  return x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0;
}

// float16 has a smaller exponent, whose bias is 15 instead of 127. The product corrects it, for subnormals
// too.
inline float from_float16(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, magnitude = uint32_t(h & 0x7fff) << 13;
  const bool finite = (h & 0x7c00) != 0x7c00;
  const float x = finite ? from_bits(magnitude) * 0x1p112f : from_bits(magnitude | 0x7f800000);
  return sign ? -x : x;
}

// The rows of a matrix of T or of 16-bit numbers.
template <class T>
class Rows {
 public:
  Rows(const void* data, int64_t stride, int64_t d, int32_t half)
      : data_(data), stride_(stride), d_(d), half_(half) {}

  // The size of the buffer that `get` needs for each row in use.
  int64_t line() const { return half_ ? d_ : 0; }

  // Row j in place, or converted into `line`.
  const T* get(int64_t j, T* line) const { return get(j, 0, d_, line); }

  // `n` numbers of row j, starting at number `first`.
  const T* get(int64_t j, int64_t first, int64_t n, T* line) const {
    const int64_t at = j * stride_ + first;
    if (!half_) return static_cast<const T*>(data_) + at;
    const uint16_t* row = static_cast<const uint16_t*>(data_) + at;
    if (half_ == kBfloat16)
      for (int64_t i = 0; i < n; i++) line[i] = from_bfloat16(row[i]);
    else
      for (int64_t i = 0; i < n; i++) line[i] = from_float16(row[i]);
    return line;
  }

  // Asks for row j in the L2 cache.
  void prefetch(int64_t j) const {
    const int64_t size = half_ ? 2 : sizeof(T);
    const char* row = static_cast<const char*>(data_) + j * stride_ * size;
    for (int64_t x = 0; x < d_ * size; x += 64) __builtin_prefetch(row + x, 0, 2);
  }

  // The 16-bit numbers of row j, starting at number `first`.
  const uint16_t* raw(int64_t j, int64_t first) const {
    return static_cast<const uint16_t*>(data_) + j * stride_ + first;
  }

 private:
  const void* data_;
  int64_t stride_, d_;
  int32_t half_;
};

template <class T>
constexpr T minus_infinity = -std::numeric_limits<T>::infinity();

// The log-sum-exps of one direction, as a forward pass writes them: as numbers of T, in double, or both.
template <class T>
struct LogSumExps {
  T* rounded;
  double* exact;

  static LogSumExps of_classes(const Problem& p) { return {static_cast<T*>(p.class_lse), p.exact_class_lse}; }
  static LogSumExps of_instances(const Problem& p) {
    return {static_cast<T*>(p.instance_lse), p.exact_instance_lse};
  }
  double get(int64_t i) const { return exact ? exact[i] : double(rounded[i]); }
  void put(int64_t i, double lse) const {
    if (rounded) rounded[i] = static_cast<T>(lse);
    if (exact) exact[i] = lse;
  }
};

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// The columns and samples that take part, and the column of each sample's positive.
struct Columns {
  int64_t count;  // columns
  bool compact;   // whether they are the classes `ids` instead of all classes in order
  std::vector<int64_t> ids;
  std::vector<int64_t> positive;  // per sample, -1 if the sample is ignored
  std::vector<char> unread;       // columns whose prototype must not be read; empty if there are none

  int64_t class_of(int64_t c) const { return compact ? ids[c] : c; }
  bool reads(int64_t c) const { return unread.empty() || !unread[c]; }
};

// Fills `columns`; false if a target is out of range. Callers report the error.
inline bool find_columns(const Problem& p, Columns& columns) {
  columns.positive.resize(p.m);
  columns.count = p.k;
  columns.compact = p.present_only;
  for (int64_t j = 0; j < p.m; j++) {
    const int64_t y = p.target[j];
    if (y == p.ignore_index)
      columns.positive[j] = -1;
    else if (p.exclude == kSameLabel)
      columns.positive[j] = j;
    else if (y < 0 || y >= p.k)
      return false;
    else
      columns.positive[j] = y;
  }
  if (p.exclude == kSelf || p.exclude == kSameLabel) {
    // Column i is sample i. An ignored sample is no negative, and read only if it is a positive.
    columns.unread.assign(p.k, 1);
    for (int64_t j = 0; j < p.m; j++)
      if (columns.positive[j] >= 0) columns.unread[j] = columns.unread[columns.positive[j]] = 0;
  }
  if (!p.present_only) return true;
  std::vector<int64_t> column(p.k, -1);
  for (int64_t c : columns.positive)
    if (c >= 0) column[c] = 0;
  for (int64_t c = 0; c < p.k; c++)
    if (column[c] == 0) {
      column[c] = static_cast<int64_t>(columns.ids.size());
      columns.ids.push_back(c);
    }
  for (int64_t& c : columns.positive)
    if (c >= 0) c = column[c];
  columns.count = static_cast<int64_t>(columns.ids.size());
  return true;
}

// The columns of a symmetric step: the samples.
inline Columns samples_as_columns(const Problem& p) {
  Columns columns{p.m, false, {}, std::vector<int64_t>(p.m), std::vector<char>(p.m)};
  for (int64_t j = 0; j < p.m; j++) {
    columns.unread[j] = p.target[j] == p.ignore_index;
    columns.positive[j] = columns.unread[j] ? -1 : j;
  }
  return columns;
}

}  // namespace nckernels
