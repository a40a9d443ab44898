// What the launchers take: plain structures of device pointers and sizes, and one function a kernel.
//
// Vocabulary, the same in all files. A kernel sees two operands, matrices with one vector a row:
//
// * P, the anchors: a block of threads owns a tile of them and produces something for each;
// * Q, the reduced operand: the block walks over tiles of its rows and sums them up.
//
// In the class direction the prototypes are the anchors and the samples are reduced; the instance direction
// is the same kernel with the operands swapped.
//
// An operand's tiles are made of slots. Slot and row are the same number, except for compacted prototypes
// (`gather`), where slot s stands for row label[s]. A slot whose label is `skip` is left out of all sums.
//
// Nothing here waits for the device or reads from it. Vectors are contiguous, rows of matrices too.
#pragma once

#include <cstdint>

namespace nck {

using Stream = void*;  // a cudaStream_t, so that callers need no CUDA header

// The type of the rows, and for float32 how products are computed: one rounding to tf32, or three products
// of the numbers' tf32 parts, which is as exact as float32.
enum class Kind : int { kBf16, kF16, kTf32, kTf32x3 };

// Which entries of the similarity matrix the sums leave out.
enum class Exclude : int { kNone, kTarget, kSelf, kSameLabel };

struct Side {
  const void* x;         // (rows, d)
  const float* rnorm;    // (rows,) 1 / max(norm, eps); negative: takes no part, not even as a positive
  const int64_t* label;  // (slots,) or null: samples have their targets, compacted prototypes their rows
  const int64_t* count;  // null, or how many of the slots are in use
  const float* bias;     // (rows,) or null: added to the logits of these rows where they are summed over
  const float* lse;      // (rows,) this side's log-sum-exp, with `grad`
  const float* grad;     // (rows,) or null: upstream gradient of `lse`
  const float* pos;      // (rows,) or null: upstream gradient of the positive logits, samples only
  int64_t stride;        // numbers between two rows
  int64_t skip;
  int slots;
  bool samples;
  bool gather;
  bool unsummed;  // left-out rows can still be someone's positive: prototypes under "self"
};

struct NormArgs {
  const void* x;
  const int64_t* label;  // null, or: rows with the label `skip` get left_out
  float* rnorm;
  int64_t stride, skip;
  int rows, d;
  float eps;
  Kind kind;
};

// One pass over the samples and their positive prototypes.
struct PrepareArgs {
  const void *z, *w;
  const int64_t* target;
  const float* beta;
  float* z_rnorm;  // left_out where ignored
  float* pos;      // beta cos(z, its prototype)
  float* w_rnorm;  // null, or: the inverse norms of positives, and with `itself` of all samples that count
  int64_t* mark;   // null, or: mark[c] = c for the classes that occur
  int64_t z_stride, w_stride, skip;
  int m, k, d;
  float eps;
  Kind kind;
  bool same_label;  // the positive of sample i is row i
  bool itself;      // samples and prototypes are one matrix
};

// list = the marked classes in ascending order, then -1 up to `slots`; list[slots] = how many there are.
struct CompactArgs {
  const int64_t* mark;
  const int64_t* rank;  // inclusive prefix sum of mark >= 0
  int64_t* list;
  int k, slots;
};

// scale[0..2]: powers of two that bring float16 tiles of the gradient to the top of their range; tiles that
// carry the prototypes' norms, the samples', both.
struct HalfScaleArgs {
  const float *class_grad, *class_lse, *instance_grad, *instance_lse, *pos_grad;
  const float *z_rnorm, *w_rnorm;
  float* scale;
  int m, k;
  float limit;
};

// Log-sum-exp of p's rows over q: into `out`, or as `split` partials (largest logit in base 2, sum relative
// to it). With q_max the same tiles give the contribution of every tile of p to the log-sum-exp of q's rows
// over p; row 0 of these partials belongs to the combination.
struct LseArgs {
  Side p, q;
  const float* beta;
  float *out, *p_max, *p_sum, *q_max, *q_sum;
  int first_tile, tiles, split, d;
  Kind kind;
  Exclude exclude;
};

// out[row of slot]: the log-sum-exp of the partials [first, parts); with `keep` they become part 0 instead.
struct CombineArgs {
  float *max, *sum;
  const int64_t *label, *count;
  float* out;
  int64_t skip;
  int first, parts, slots;
  bool gather, keep;
};

// part[s, p] = sum over q of g_q exp(t_pq + bias_p - lse_q): the gradient of p's bias.
struct BiasGradArgs {
  Side p, q;
  const float* beta;
  float* part;
  int split, d;
  Kind kind;
  Exclude exclude;
};

// A panel of H = A r_p r_q in the type of the rows, see gradient.h.
struct EntriesArgs {
  Side p, q;
  const float *beta, *scale;
  void* h;
  int64_t h_stride;
  int p_start, p_stop, q_start, q_stop, d;
  float norm_limit;
  Kind kind;
  Exclude exclude;
};

// Gradient of p's rows where they are short (16-bit types, d <= 256); with `part` float32 sums instead.
struct GradArgs {
  Side p, q;
  const float *beta, *scale;
  void* out;   // (rows, d) or null
  float* dot;  // (slots,) or null: each slot's share of the gradient of beta
  float* part;
  int split, d;
  float eps, norm_limit;
  Kind kind;
  Exclude exclude;
};

// Gradients of the slots [start, stop) from the sums of a matrix product: add the parts, project, scale.
struct FinishArgs {
  Side p;
  const float *acc, *beta, *scale;  // acc[part, slot - start, d]
  void* out;                        // may be acc itself: float32, one part
  float* dot;
  int64_t part_stride;
  int start, stop, parts, d;
  float eps, norm_limit;
  Kind kind;
  bool norm_inside;  // acc holds r_p a_p
};

// out[slot - start] = x[row of slot], zeros for slots that are not in use and rows that take no part.
struct GatherArgs {
  Side p;
  void* out;
  int start, stop, d;
  Kind kind;
};

// out = h q.x, if a row of q that takes no part holds NaN or infinities: the library has multiplied it by
// zeros.
struct MendArgs {
  Side q;
  const void* h;
  float* out;
  int64_t h_row, h_column;  // numbers between two rows of h, and between two columns
  int rows, d, blocks;
  Kind kind;
};

void row_rnorm(const NormArgs&, Stream);
void prepare_samples(const PrepareArgs&, Stream);
void compact(const CompactArgs&, Stream);
void half_scale(const HalfScaleArgs&, Stream);
void log_sum_exp(const LseArgs&, Stream);
// Compute capability 9.0, 16-bit types, one direction, no compacted rows; rows and stride multiples of 16
// bytes.
void log_sum_exp_wgmma(const LseArgs&, Stream);
void combine(const CombineArgs&, Stream);
void bias_grad(const BiasGradArgs&, Stream);
void entries(const EntriesArgs&, Stream);
void short_grad(const GradArgs&, Stream);
void finish(const FinishArgs&, Stream);
void gather(const GatherArgs&, Stream);
void mend(const MendArgs&, Stream);

}  // namespace nck
