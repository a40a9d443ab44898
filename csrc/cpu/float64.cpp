#include "kernels.hpp"

namespace nckernels {
Status forward_float64(const Problem& p) { return forward<double>(p); }
Status backward_float64(const Problem& p, const Gradients& g) { return backward<double>(p, g); }
Status step_float64(const Problem& p, const Step& s) { return step<double>(p, s); }
Status losses_float64(const Problem& p, const Step& s) { return losses<double>(p, s); }
}  // namespace nckernels
