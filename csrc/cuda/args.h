// The arguments of the launchers: plain structures of device pointers and sizes, and one function per kernel.
//
// Vocabulary, the same in all files. A kernel has two operands, matrices with one vector per row:
//
// * P, the anchors: a thread block owns a tile of them and computes a result for each;
// * Q, the reduced operand: the thread block loops over tiles of its rows and sums over them.
//
// In the class direction the prototypes are the anchors and the samples are reduced; the instance direction
// is the same kernel with the operands swapped.
//
// An operand consists of slots. Slot s is row s, except for compacted prototypes (`gather`), where slot s is
// row label[s]. A slot whose label is `skip` is left out of all sums.
//
// The launchers do not wait for the device or read from it. Vectors and the rows of matrices are contiguous.
#pragma once

#include <cstdint>

namespace nck {

using Stream = void*;  // a cudaStream_t, so that callers need no CUDA header

// The type of the rows and, for float32, the precision of products: operands rounded to tf32, or three
// products of the numbers' tf32 parts, which is as exact as float32.
enum class Kind : int { kBf16, kF16, kTf32, kTf32x3 };

// The entries of the similarity matrix that are excluded from the sums.
enum class Exclude : int { kNone, kTarget, kSelf, kSameLabel };

struct Side {
  const void* x;         // (rows, d)
  const float* rnorm;    // (rows,) 1 / max(norm, eps); negative for left-out rows that are no positives
  const int64_t* label;  // (slots,) or null: targets of samples, rows of compacted prototypes
  const int64_t* count;  // null, or the number of slots in use
  const float* bias;     // (rows,) or null: added to the logits of these rows where they are summed over
  const float* lse;      // (rows,) this side's log-sum-exp, with `grad`
  const float* ratio;    // (rows,) or null: exp(lse) over the sum of which `lse` is the rounded logarithm
  const float* grad;     // (rows,) or null: upstream gradient of `lse`
  const float* pos;      // (rows,) or null: upstream gradient of the positive logits, samples only
  int64_t stride;        // of rows, in numbers
  int64_t skip;
  int slots;
  bool samples;
  bool gather;
  bool unsummed;  // left-out rows can still be positives: prototypes under "self"
};

struct NormArgs {
  const void* x;
  const int64_t* label;  // null, or labels: rows with the label `skip` get left_out
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
  float* w_rnorm;  // null, or output: norms of positives, with `itself` also of all samples not ignored
  int64_t* mark;   // null, or output: mark[c] = c for the classes that occur
  int64_t z_stride, w_stride, skip;
  int m, k, d;
  float eps;
  Kind kind;
  bool same_label;  // the positive of sample i is row i
  bool itself;      // samples and prototypes are one matrix
};

// The same for loss and gradient in one step, and everything else that comes before its products. The outputs
// are zeros at first; those that are null are not wanted.
struct PrepareStepArgs {
  const void *z, *w;
  const int64_t* target;
  const float* weight;  // (m,) or null: weights of the samples
  const float* beta;    // null if the host knows it
  float host_beta;
  float* z_rnorm;              // (m,) left_out where ignored
  float* pos;                  // (m,) beta cos(z, its prototype)
  float *share, *pos_grad;     // (m,) the weight, and its negative; 0 where ignored
  float* half_share;           // (m,) half of the weight
  float *z_broken, *w_broken;  // 1 if an ignored sample, or any prototype, holds NaN or infinities
  float* w_rnorm;              // (k,) of all prototypes, with `mark` of those that occur
  int64_t* mark;               // (k,) 1 for the classes that occur
  float* of_class;             // (k,) sums of the weights by class, of `half_share` if that is wanted
  float* divisor;              // (3,) of a mean's gradients, of its sum, and a factor of its entries
  float* own_beta;             // (1,) the inverse temperature
  int64_t z_stride, w_stride, skip;
  int m, k, d;
  float eps;
  Kind kind;
  bool nothing_is_zero;  // a mean over no samples is 0 and not NaN
};

// list = the marked classes in ascending order, then -1 up to `slots`; list[slots] = their number.
struct CompactArgs {
  const int64_t* rank;  // the number of marked classes up to each class
  int64_t* list;
  int k, slots;
};

// scale[0..2]: powers of two that scale float16 tiles of the gradient to the top of their range, for tiles
// multiplied by the prototypes' inverse norms, by the samples', and by both.
struct HalfScaleArgs {
  const float *class_grad, *class_lse, *instance_grad, *instance_lse, *pos_grad;
  const float* divisor;  // null, or that of a step
  const float *z_rnorm, *w_rnorm;
  float* scale;
  int m, k;
  float limit;
};

// Log-sum-exps of p's rows over q: into `out` and, if not null, `ratio`, or as `split` partials (largest
// logit in base 2, sum relative to it). With q_max, also the contribution of every tile of p to the
// log-sum-exps of q's rows over p, from part 1 on; part 0 is for `combine`.
struct LseArgs {
  Side p, q;
  const float* beta;
  float *out, *ratio, *p_max, *p_sum, *q_max, *q_sum;
  int first_tile, tiles, split, d;
  Kind kind;
  Exclude exclude;
};

// out[row of slot], if not null: the log-sum-exp of the partials [first, parts), and its `ratio`. With `keep`
// part 0 becomes their combination.
struct CombineArgs {
  float *max, *sum;
  const int64_t *label, *count;
  float *out, *ratio;
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

// A panel of H = A r_p r_q in the type of the rows, see gradient.h. Entries are multiplied by the scale and
// by divisor[2], if these are not null.
struct EntriesArgs {
  Side p, q;
  const float *beta, *scale, *divisor;
  void* h;
  int64_t h_stride;
  int p_start, p_stop, q_start, q_stop, d;
  float norm_limit;
  Kind kind;
  Exclude exclude;
};

// Gradient of p's rows if they are short (16-bit types, d <= 256); with `part`, float32 partial sums instead.
struct GradArgs {
  Side p, q;
  const float *beta, *scale,
      *divisor;  // divisor: null, or [0] divides the finished gradient, [2] is as in EntriesArgs
  void* out;     // (rows, d) or null
  float* dot;    // (slots,) or null: each slot's share of the gradient of beta
  float* part;
  int split, d;
  float eps, norm_limit;
  Kind kind;
  Exclude exclude;
  bool wide;  // `out` is float32 for 16-bit rows: gradients of float16 before they are scaled
};

// Gradients of the slots [start, stop) from float32 partial sums: add, project, scale.
struct FinishArgs {
  Side p;
  const float *acc, *beta, *scale, *divisor;  // acc[part, slot - start, d]
  void* out;                                  // may be acc itself: float32, one part
  float* dot;
  int64_t part_stride;
  int start, stop, parts, d;
  float eps, norm_limit;
  Kind kind;
  bool norm_inside;  // acc holds r_p a_p
  bool wide;         // see GradArgs
};

// out[slot - start] = x[row of slot], with zeros for unused slots and left-out rows.
struct GatherArgs {
  Side p;
  void* out;
  int start, stop, d;
  Kind kind;
};

// Recomputes out = h q.x without left-out rows, if one of these holds NaN or infinities, which the library
// has multiplied by zeros.
struct MendArgs {
  Side q;
  const float* broken;  // 1 or 0: whether there is such a row; null: the inverse norms tell
  const void* h;
  float* out;
  int64_t h_row, h_column;  // strides of h
  int rows, d, blocks;
  Kind kind;
};

// A panel of one step: the slots [start, stop) of p, with all of q. `products` are p . q without norms; those
// of left-out rows may be NaN. Rows of products and of h start at multiples of 16 numbers. Only p has
// log-sum-exps, and q has no list of slots in use.
// `split`, at most 32, thread blocks share the sums of their anchors.
struct PanelArgs {
  Side p, q;
  const float *beta, *scale, *divisor, *products;
  float* partial;  // (2, split, stop - start): largest logits in base 2, and sums relative to them
  float* lse;      // (rows,) output of the entries: p's log-sum-exps
  void* h;         // the entries, see EntriesArgs; may be `products`
  int64_t products_stride, h_stride;
  int start, stop, split;
  float norm_limit;
  Kind kind;
  Exclude exclude;
};

// loss = sum of share (lse - pos) over the divisor; log-sum-exps of empty sets count as 0.
struct LossArgs {
  const int64_t* target;
  const float *share, *pos;
  const float* class_lse;     // (k,) or null
  const float* instance_lse;  // (m,) or null; with both, the mean of the two
  const float* divisor;       // null, or divisor[1] of a mean
  float* loss;
  int64_t skip;
  int m, k;
};

// out = x factor, where out may be x.
struct ScaleArgs {
  const float* factor;
  const void* x;
  void* out;
  int64_t size;
  Kind from, to;
};

void row_rnorm(const NormArgs&, Stream);
void prepare_samples(const PrepareArgs&, Stream);
void prepare_step(const PrepareStepArgs&, Stream);
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
void panel_log_sum_exp(const PanelArgs&, Stream);
void panel_entries(const PanelArgs&, Stream);
void write_loss(const LossArgs&, Stream);
void scale(const ScaleArgs&, Stream);

}  // namespace nck
