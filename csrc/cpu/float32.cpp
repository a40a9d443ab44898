#include "kernels.hpp"

namespace nckernels {
Status forward_float32(const Problem& p) { return forward<float>(p); }
Status backward_float32(const Problem& p, const Gradients& g) { return backward<float>(p, g); }
Status step_float32(const Problem& p, const Step& s) { return step<float>(p, s); }
Status losses_float32(const Problem& p, const Step& s) { return losses<float>(p, s); }
}  // namespace nckernels
