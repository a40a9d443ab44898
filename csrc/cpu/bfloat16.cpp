#include "problem.hpp"

#if defined(NCK_BFLOAT16)
#include "gemm_bfloat16.hpp"
#include "kernels.hpp"

namespace nckernels {
template <int NV>
using Bfloat16 = GemmBfloat16<NV, VectorPairs>;

Status forward_bfloat16(const Problem& p) { return forward<Bfloat16>(p); }
Status backward_bfloat16(const Problem& p, const Gradients& g) { return backward<Bfloat16>(p, g); }
Status step_bfloat16(const Problem& p, const Step& s) { return step<Bfloat16>(p, s); }
}  // namespace nckernels
#endif
