#include "kernels.hpp"

namespace nckernels {
template <int NV>
using Float32 = Gemm<float, NV>;

Status forward_float32(const Problem& p) { return forward<Float32>(p); }
Status backward_float32(const Problem& p, const Gradients& g) { return backward<Float32>(p, g); }
Status step_float32(const Problem& p, const Step& s) { return step<Float32>(p, s); }
Status losses_float32(const Problem& p, const Step& s) { return losses<Float32>(p, s); }
}  // namespace nckernels
