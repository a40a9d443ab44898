#include "problem.hpp"

#if defined(NCK_BFLOAT16)
#include "amx.hpp"
#include "gemm_bfloat16.hpp"
#include "kernels.hpp"

namespace nckernels {
#if defined(NCK_AMX)
template <int /*NV*/>
using Bfloat16 = GemmBfloat16<2, AmxPairs>;  // tiles want whole panels
#else
template <int NV>
using Bfloat16 = GemmBfloat16<NV, VectorPairs>;
#endif

Status forward_bfloat16(const Problem& p) { return forward<Bfloat16>(p); }
Status backward_bfloat16(const Problem& p, const Gradients& g) { return backward<Bfloat16>(p, g); }
Status step_bfloat16(const Problem& p, const Step& s) { return step<Bfloat16>(p, s); }
Status losses_bfloat16(const Problem& p, const Step& s) { return losses<Bfloat16>(p, s); }
}  // namespace nckernels
#endif
