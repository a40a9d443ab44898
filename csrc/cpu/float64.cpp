#include "kernels.hpp"

namespace nckernels {
Status forward_float64(const Problem& p) { return forward<double>(p); }
Status backward_float64(const Problem& p, const Gradients& g) { return backward<double>(p, g); }
}  // namespace nckernels
