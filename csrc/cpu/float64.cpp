#include "kernels.hpp"

namespace nckernels {
template <int NV>
using Float64 = Gemm<double, NV>;

Status forward_float64(const Problem& p) { return forward<Float64>(p); }
Status backward_float64(const Problem& p, const Gradients& g) { return backward<Float64>(p, g); }
Status step_float64(const Problem& p, const Step& s) { return step<Float64>(p, s); }
Status losses_float64(const Problem& p, const Step& s) { return losses<Float64>(p, s); }
}  // namespace nckernels
