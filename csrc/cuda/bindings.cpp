// The kernels as PyTorch operators nckernels_cuda::*. PyTorch's stable ABI lets one binary serve many
// versions of torch. Every operator writes to tensors that its caller has allocated, launches on the current
// stream of their device and returns at once. The caller ensures the shapes (nckernels/backends/cuda.py).
//
// With NCK_HOST this file binds the emulated kernels of the tests, for tensors on the CPU.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "args.h"

namespace {

using namespace nck;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using torch::headeronly::ScalarType;

#if defined(NCK_HOST)
#define NCK_DISPATCH_KEY CPU
class OnDevice {
 public:
  explicit OnDevice(const Tensor&) {}
  Stream stream() const { return nullptr; }
};
#else
#define NCK_DISPATCH_KEY CUDA
// Makes a tensor's device current, and returns its current stream.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& x) : index_(x.get_device_index()), guard_(index_) {}
  Stream stream() const {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return stream;
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};
#endif

template <class T>
T* pointer(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}
template <class T>
T* pointer(const MaybeTensor& x) {
  return x ? static_cast<T*>(x->data_ptr()) : nullptr;
}

Kind kind_of(const Tensor& x, bool exact = false) {
  switch (x.scalar_type()) {
    case ScalarType::BFloat16:
      return Kind::kBf16;
    case ScalarType::Half:
      return Kind::kF16;
    case ScalarType::Float:
      return exact ? Kind::kTf32x3 : Kind::kTf32;
    default:
      STD_TORCH_CHECK(false, "nckernels_cuda: expected float32, bfloat16 or float16 rows");
  }
}

// Whether a result is float32 and the rows are not.
bool wider(const MaybeTensor& out, const Tensor& rows) {
  return out && out->scalar_type() != rows.scalar_type();
}

int rows_of(const Tensor& x) { return int(x.size(0)); }
int width_of(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 2 && (x.stride(1) == 1 || x.size(1) == 1),
                  "nckernels_cuda: rows must be contiguous");
  return int(x.size(1));
}

// The arguments of an operand, in C++ and in the schemas.
#define NCK_SIDE(P)                                                                                     \
  const Tensor &P, const Tensor &P##_rnorm, const MaybeTensor &P##_label, const MaybeTensor &P##_count, \
      const MaybeTensor &P##_bias, const MaybeTensor &P##_lse, const MaybeTensor &P##_ratio,            \
      const MaybeTensor &P##_grad, const MaybeTensor &P##_pos, int64_t P##_slots, int64_t P##_skip,     \
      bool P##_samples, bool P##_gather, bool P##_unsummed
#define NCK_SIDE_SCHEMA(P)                                                                       \
  "Tensor " P ", Tensor " P "_rnorm, Tensor? " P "_label, Tensor? " P "_count, Tensor? " P       \
  "_bias, Tensor? " P "_lse, Tensor? " P "_ratio, Tensor? " P "_grad, Tensor? " P "_pos, int " P \
  "_slots, int " P "_skip, bool " P "_samples, bool " P "_gather, bool " P "_unsummed, "
#define NCK_MAKE_SIDE(P)                                                                               \
  Side {                                                                                               \
    P.data_ptr(), pointer<float>(P##_rnorm), pointer<int64_t>(P##_label), pointer<int64_t>(P##_count), \
        pointer<float>(P##_bias), pointer<float>(P##_lse), pointer<float>(P##_ratio),                  \
        pointer<float>(P##_grad), pointer<float>(P##_pos), P.stride(0), P##_skip, int(P##_slots),      \
        P##_samples, P##_gather, P##_unsummed                                                          \
  }

void op_row_rnorm(const Tensor& x, const MaybeTensor& label, const Tensor& rnorm, int64_t skip, double eps) {
  OnDevice device(x);
  row_rnorm({x.data_ptr(), pointer<int64_t>(label), pointer<float>(rnorm), x.stride(0), skip, rows_of(x),
             width_of(x), float(eps), kind_of(x)},
            device.stream());
}

void op_prepare_samples(const Tensor& z, const Tensor& w, const Tensor& target, const Tensor& beta,
                        const Tensor& z_rnorm, const Tensor& pos, const MaybeTensor& w_rnorm,
                        const MaybeTensor& mark, int64_t skip, bool same_label, bool itself, double eps) {
  OnDevice device(z);
  width_of(w);
  prepare_samples(
      {z.data_ptr(), w.data_ptr(), pointer<int64_t>(target), pointer<float>(beta), pointer<float>(z_rnorm),
       pointer<float>(pos), pointer<float>(w_rnorm), pointer<int64_t>(mark), z.stride(0), w.stride(0), skip,
       rows_of(z), rows_of(w), width_of(z), float(eps), kind_of(z), same_label, itself},
      device.stream());
}

void op_prepare_step(const Tensor& z, const Tensor& w, const Tensor& target, const MaybeTensor& weight,
                     const MaybeTensor& beta, double host_beta, const Tensor& z_rnorm, const Tensor& pos,
                     const Tensor& share, const Tensor& pos_grad, const MaybeTensor& half_share,
                     const Tensor& z_broken, const MaybeTensor& w_broken, const Tensor& w_rnorm,
                     const MaybeTensor& mark, const MaybeTensor& of_class, const MaybeTensor& divisor,
                     const Tensor& own_beta, int64_t skip, double eps, bool nothing_is_zero) {
  OnDevice device(z);
  width_of(w);
  prepare_step({z.data_ptr(),
                w.data_ptr(),
                pointer<int64_t>(target),
                pointer<float>(weight),
                pointer<float>(beta),
                float(host_beta),
                pointer<float>(z_rnorm),
                pointer<float>(pos),
                pointer<float>(share),
                pointer<float>(pos_grad),
                pointer<float>(half_share),
                pointer<float>(z_broken),
                pointer<float>(w_broken),
                pointer<float>(w_rnorm),
                pointer<int64_t>(mark),
                pointer<float>(of_class),
                pointer<float>(divisor),
                pointer<float>(own_beta),
                z.stride(0),
                w.stride(0),
                skip,
                rows_of(z),
                rows_of(w),
                width_of(z),
                float(eps),
                kind_of(z),
                nothing_is_zero},
               device.stream());
}

void op_compact(const Tensor& rank, const Tensor& list, int64_t k, int64_t slots) {
  OnDevice device(rank);
  compact({pointer<int64_t>(rank), pointer<int64_t>(list), int(k), int(slots)}, device.stream());
}

void op_half_scale(const MaybeTensor& class_grad, const MaybeTensor& class_lse,
                   const MaybeTensor& instance_grad, const MaybeTensor& instance_lse,
                   const MaybeTensor& pos_grad, const MaybeTensor& divisor, const Tensor& z_rnorm,
                   const Tensor& w_rnorm, const Tensor& scale, double limit) {
  OnDevice device(scale);
  half_scale({pointer<float>(class_grad), pointer<float>(class_lse), pointer<float>(instance_grad),
              pointer<float>(instance_lse), pointer<float>(pos_grad), pointer<float>(divisor),
              pointer<float>(z_rnorm), pointer<float>(w_rnorm), pointer<float>(scale), rows_of(z_rnorm),
              rows_of(w_rnorm), float(limit)},
             device.stream());
}

void op_log_sum_exp(NCK_SIDE(p), NCK_SIDE(q), const Tensor& beta, const MaybeTensor& out,
                    const MaybeTensor& ratio, const MaybeTensor& p_max, const MaybeTensor& p_sum,
                    const MaybeTensor& q_max, const MaybeTensor& q_sum, int64_t first_tile, int64_t tiles,
                    int64_t split, int64_t exclude, bool exact) {
  OnDevice device(p);
  log_sum_exp(
      {NCK_MAKE_SIDE(p), NCK_MAKE_SIDE(q), pointer<float>(beta), pointer<float>(out), pointer<float>(ratio),
       pointer<float>(p_max), pointer<float>(p_sum), pointer<float>(q_max), pointer<float>(q_sum),
       int(first_tile), int(tiles), int(split), width_of(p), kind_of(p, exact), Exclude(exclude)},
      device.stream());
}

void op_log_sum_exp_wgmma(NCK_SIDE(p), NCK_SIDE(q), const Tensor& beta, const MaybeTensor& out,
                          const MaybeTensor& ratio, const MaybeTensor& p_max, const MaybeTensor& p_sum,
                          int64_t first_tile, int64_t tiles, int64_t split, int64_t exclude) {
  OnDevice device(p);
  STD_TORCH_CHECK(kind_of(p) == Kind::kBf16 || kind_of(p) == Kind::kF16,
                  "nckernels_cuda: expected 16-bit rows");
  log_sum_exp_wgmma({NCK_MAKE_SIDE(p), NCK_MAKE_SIDE(q), pointer<float>(beta), pointer<float>(out),
                     pointer<float>(ratio), pointer<float>(p_max), pointer<float>(p_sum), nullptr, nullptr,
                     int(first_tile), int(tiles), int(split), width_of(p), kind_of(p), Exclude(exclude)},
                    device.stream());
}

void op_combine(const Tensor& max, const Tensor& sum, const MaybeTensor& label, const MaybeTensor& count,
                const MaybeTensor& out, const MaybeTensor& ratio, int64_t skip, int64_t first, int64_t parts,
                int64_t slots, bool gather, bool keep) {
  OnDevice device(max);
  combine(
      {pointer<float>(max), pointer<float>(sum), pointer<int64_t>(label), pointer<int64_t>(count),
       pointer<float>(out), pointer<float>(ratio), skip, int(first), int(parts), int(slots), gather, keep},
      device.stream());
}

void op_bias_grad(NCK_SIDE(p), NCK_SIDE(q), const Tensor& beta, const Tensor& part, int64_t split,
                  int64_t exclude, bool exact) {
  OnDevice device(p);
  bias_grad({NCK_MAKE_SIDE(p), NCK_MAKE_SIDE(q), pointer<float>(beta), pointer<float>(part), int(split),
             width_of(p), kind_of(p, exact), Exclude(exclude)},
            device.stream());
}

void op_entries(NCK_SIDE(p), NCK_SIDE(q), const Tensor& beta, const MaybeTensor& scale,
                const MaybeTensor& divisor, const Tensor& h, int64_t p_start, int64_t p_stop, int64_t q_start,
                int64_t q_stop, int64_t exclude, double norm_limit, bool exact) {
  OnDevice device(p);
  entries({NCK_MAKE_SIDE(p), NCK_MAKE_SIDE(q), pointer<float>(beta), pointer<float>(scale),
           pointer<float>(divisor), h.data_ptr(), h.stride(0), int(p_start), int(p_stop), int(q_start),
           int(q_stop), width_of(p), float(norm_limit), kind_of(p, exact), Exclude(exclude)},
          device.stream());
}

void op_short_grad(NCK_SIDE(p), NCK_SIDE(q), const Tensor& beta, const MaybeTensor& scale,
                   const MaybeTensor& divisor, const MaybeTensor& out, const MaybeTensor& dot,
                   const MaybeTensor& part, int64_t split, int64_t exclude, double eps, double norm_limit) {
  OnDevice device(p);
  STD_TORCH_CHECK(width_of(p) <= 256 && kind_of(p) != Kind::kTf32, "nckernels_cuda: rows are too long");
  short_grad(
      {NCK_MAKE_SIDE(p), NCK_MAKE_SIDE(q), pointer<float>(beta), pointer<float>(scale),
       pointer<float>(divisor), pointer<void>(out), pointer<float>(dot), pointer<float>(part), int(split),
       width_of(p), float(eps), float(norm_limit), kind_of(p), Exclude(exclude), wider(out, p)},
      device.stream());
}

void op_finish(NCK_SIDE(p), const Tensor& acc, const Tensor& beta, const MaybeTensor& scale,
               const MaybeTensor& divisor, const MaybeTensor& out, const MaybeTensor& dot, int64_t start,
               int64_t stop, int64_t parts, int64_t part_stride, double eps, double norm_limit,
               bool norm_inside) {
  OnDevice device(p);
  finish(
      {NCK_MAKE_SIDE(p), pointer<float>(acc), pointer<float>(beta), pointer<float>(scale),
       pointer<float>(divisor), pointer<void>(out), pointer<float>(dot), part_stride, int(start), int(stop),
       int(parts), width_of(p), float(eps), float(norm_limit), kind_of(p), norm_inside, wider(out, p)},
      device.stream());
}

void op_gather(NCK_SIDE(p), const Tensor& out, int64_t start, int64_t stop) {
  OnDevice device(p);
  gather({NCK_MAKE_SIDE(p), out.data_ptr(), int(start), int(stop), width_of(p), kind_of(p)}, device.stream());
}

void op_mend(NCK_SIDE(q), const MaybeTensor& broken, const Tensor& h, const Tensor& out, int64_t blocks) {
  OnDevice device(q);
  mend({NCK_MAKE_SIDE(q), pointer<float>(broken), h.data_ptr(), pointer<float>(out), h.stride(0), h.stride(1),
        rows_of(h), width_of(q), int(blocks), kind_of(q)},
       device.stream());
}

void op_panel_log_sum_exp(NCK_SIDE(p), NCK_SIDE(q), const Tensor& beta, const Tensor& products,
                          const Tensor& partial, int64_t start, int64_t stop, int64_t exclude) {
  OnDevice device(p);
  panel_log_sum_exp({NCK_MAKE_SIDE(p), NCK_MAKE_SIDE(q), pointer<float>(beta), nullptr, nullptr,
                     pointer<float>(products), pointer<float>(partial), nullptr, nullptr, products.stride(0),
                     0, int(start), int(stop), int(partial.size(1)), 0.0f, kind_of(p), Exclude(exclude)},
                    device.stream());
}

void op_panel_entries(NCK_SIDE(p), NCK_SIDE(q), const Tensor& beta, const MaybeTensor& scale,
                      const MaybeTensor& divisor, const Tensor& products, const Tensor& partial,
                      const Tensor& lse, const Tensor& h, int64_t start, int64_t stop, int64_t exclude,
                      double norm_limit) {
  OnDevice device(p);
  panel_entries({NCK_MAKE_SIDE(p), NCK_MAKE_SIDE(q), pointer<float>(beta), pointer<float>(scale),
                 pointer<float>(divisor), pointer<float>(products), pointer<float>(partial),
                 pointer<float>(lse), h.data_ptr(), products.stride(0), h.stride(0), int(start), int(stop),
                 int(partial.size(1)), float(norm_limit), kind_of(p), Exclude(exclude)},
                device.stream());
}

void op_write_loss(const Tensor& target, const Tensor& share, const Tensor& pos, const MaybeTensor& class_lse,
                   const MaybeTensor& instance_lse, const MaybeTensor& divisor, const Tensor& loss,
                   int64_t skip, int64_t k) {
  OnDevice device(target);
  write_loss({pointer<int64_t>(target), pointer<float>(share), pointer<float>(pos), pointer<float>(class_lse),
              pointer<float>(instance_lse), pointer<float>(divisor), pointer<float>(loss), skip,
              rows_of(target), int(k)},
             device.stream());
}

void op_scale(const Tensor& x, const Tensor& factor, const Tensor& out) {
  OnDevice device(x);
  scale({pointer<float>(factor), x.data_ptr(), out.data_ptr(), x.numel(), kind_of(x), kind_of(out)},
        device.stream());
}

}  // namespace

STABLE_TORCH_LIBRARY(nckernels_cuda, m) {
  m.def("row_rnorm(Tensor x, Tensor? label, Tensor(a!) rnorm, int skip, float eps) -> ()");
  m.def(
      "prepare_samples(Tensor z, Tensor w, Tensor target, Tensor beta, Tensor(a!) z_rnorm, Tensor(b!) pos, "
      "Tensor(c!)? w_rnorm, Tensor(d!)? mark, int skip, bool same_label, bool itself, float eps) -> ()");
  m.def(
      "prepare_step(Tensor z, Tensor w, Tensor target, Tensor? weight, Tensor? beta, float host_beta, "
      "Tensor(a!) z_rnorm, Tensor(b!) pos, Tensor(c!) share, Tensor(d!) pos_grad, Tensor(e!)? half_share, "
      "Tensor(f!) z_broken, Tensor(g!)? w_broken, Tensor(h!) w_rnorm, Tensor(i!)? mark, Tensor(j!)? "
      "of_class, "
      "Tensor(k!)? divisor, Tensor(l!) own_beta, int skip, float eps, bool nothing_is_zero) -> ()");
  m.def("compact(Tensor rank, Tensor(a!) list, int k, int slots) -> ()");
  m.def(
      "half_scale(Tensor? class_grad, Tensor? class_lse, Tensor? instance_grad, Tensor? instance_lse, "
      "Tensor? pos_grad, Tensor? divisor, Tensor z_rnorm, Tensor w_rnorm, Tensor(a!) scale, float limit) -> "
      "()");
  m.def("log_sum_exp(" NCK_SIDE_SCHEMA("p") NCK_SIDE_SCHEMA(
      "q") "Tensor beta, Tensor(a!)? out, Tensor(f!)? ratio, Tensor(b!)? p_max, Tensor(c!)? p_sum, "
           "Tensor(d!)? q_max, "
           "Tensor(e!)? q_sum, int first_tile, int tiles, int split, int exclude, bool exact) -> ()");
  m.def("log_sum_exp_wgmma(" NCK_SIDE_SCHEMA("p") NCK_SIDE_SCHEMA(
      "q") "Tensor beta, Tensor(a!)? out, Tensor(d!)? ratio, Tensor(b!)? p_max, Tensor(c!)? p_sum, int "
           "first_tile, int tiles, "
           "int split, int exclude) -> ()");
  m.def(
      "combine(Tensor(a!) max, Tensor(b!) sum, Tensor? label, Tensor? count, Tensor(c!)? out, Tensor(d!)? "
      "ratio, int skip, "
      "int first, int parts, int slots, bool gather, bool keep) -> ()");
  m.def("bias_grad(" NCK_SIDE_SCHEMA("p")
            NCK_SIDE_SCHEMA("q") "Tensor beta, Tensor(a!) part, int split, int exclude, bool exact) -> ()");
  m.def("entries(" NCK_SIDE_SCHEMA("p") NCK_SIDE_SCHEMA(
      "q") "Tensor beta, Tensor? scale, Tensor? divisor, Tensor(a!) h, int p_start, int p_stop, int q_start, "
           "int q_stop, "
           "int exclude, float norm_limit, bool exact) -> ()");
  m.def("short_grad(" NCK_SIDE_SCHEMA("p") NCK_SIDE_SCHEMA(
      "q") "Tensor beta, Tensor? scale, Tensor? divisor, Tensor(a!)? out, Tensor(b!)? dot, Tensor(c!)? part, "
           "int split, int exclude, float eps, float norm_limit) -> ()");
  // `acc` may be `out`.
  m.def("finish(" NCK_SIDE_SCHEMA(
      "p") "Tensor(a!) acc, Tensor beta, Tensor? scale, Tensor? divisor, Tensor(a!)? out, Tensor(b!)? dot, "
           "int start, int stop, int parts, int part_stride, float eps, float norm_limit, bool norm_inside) "
           "-> ()");
  m.def("gather(" NCK_SIDE_SCHEMA("p") "Tensor(a!) out, int start, int stop) -> ()");
  m.def("mend(" NCK_SIDE_SCHEMA("q") "Tensor? broken, Tensor h, Tensor(a!) out, int blocks) -> ()");
  m.def("panel_log_sum_exp(" NCK_SIDE_SCHEMA("p") NCK_SIDE_SCHEMA(
      "q") "Tensor beta, Tensor products, Tensor(a!) partial, int start, int stop, int exclude) -> ()");
  // `h` may be `products`.
  m.def("panel_entries(" NCK_SIDE_SCHEMA("p") NCK_SIDE_SCHEMA(
      "q") "Tensor beta, Tensor? scale, Tensor? divisor, Tensor(a!) products, Tensor partial, Tensor(b!) "
           "lse, Tensor(a!) h, "
           "int start, int stop, int exclude, float norm_limit) -> ()");
  m.def(
      "write_loss(Tensor target, Tensor share, Tensor pos, Tensor? class_lse, Tensor? instance_lse, "
      "Tensor? divisor, Tensor(a!) loss, int skip, int k) -> ()");
  // `out` may be `x`.
  m.def("scale(Tensor(a!) x, Tensor factor, Tensor(a!) out) -> ()");
}

#define NCK_IMPL_FOR(KEY)                                          \
  STABLE_TORCH_LIBRARY_IMPL(nckernels_cuda, KEY, m) {              \
    m.impl("row_rnorm", TORCH_BOX(&op_row_rnorm));                 \
    m.impl("prepare_samples", TORCH_BOX(&op_prepare_samples));     \
    m.impl("prepare_step", TORCH_BOX(&op_prepare_step));           \
    m.impl("compact", TORCH_BOX(&op_compact));                     \
    m.impl("half_scale", TORCH_BOX(&op_half_scale));               \
    m.impl("log_sum_exp", TORCH_BOX(&op_log_sum_exp));             \
    m.impl("log_sum_exp_wgmma", TORCH_BOX(&op_log_sum_exp_wgmma)); \
    m.impl("combine", TORCH_BOX(&op_combine));                     \
    m.impl("bias_grad", TORCH_BOX(&op_bias_grad));                 \
    m.impl("entries", TORCH_BOX(&op_entries));                     \
    m.impl("short_grad", TORCH_BOX(&op_short_grad));               \
    m.impl("finish", TORCH_BOX(&op_finish));                       \
    m.impl("gather", TORCH_BOX(&op_gather));                       \
    m.impl("mend", TORCH_BOX(&op_mend));                           \
    m.impl("panel_log_sum_exp", TORCH_BOX(&op_panel_log_sum_exp)); \
    m.impl("panel_entries", TORCH_BOX(&op_panel_entries));         \
    m.impl("write_loss", TORCH_BOX(&op_write_loss));               \
    m.impl("scale", TORCH_BOX(&op_scale));                         \
  }
NCK_IMPL_FOR(NCK_DISPATCH_KEY)
