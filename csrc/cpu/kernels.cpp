// Compiled once per instruction set, with -DNCK_ISA=<name> and its flags; library.cpp picks one at run time.
#include "backward.hpp"
#include "forward.hpp"

namespace nckernels {
namespace NCK_ISA {

// Panels of two vectors, or of one where a single vector holds all classes.
template <class T, class F>
void with_panels(const Columns& columns, F&& run) {
    if (columns.count <= lanes<T>)
        run(std::integral_constant<int, 1>{});
    else
        run(std::integral_constant<int, 2>{});
}

template <class T>
int32_t forward(const Problem& p, int64_t* bad) {
    Columns columns;
    *bad = find_columns(p, columns);
    if (*bad >= 0) return kBadTarget;
    with_panels<T>(columns, [&](auto nv) { ForwardPass<T, nv>(p, columns).run(); });
    return kOk;
}

template <class T>
int32_t backward(const Problem& p, const Gradients& g) {
    Columns columns;
    if (find_columns(p, columns) >= 0) return kBadTarget;
    with_panels<T>(columns, [&](auto nv) { BackwardPass<T, nv>(p, columns, g).run(); });
    return kOk;
}

int32_t run_forward(const Problem& p, int64_t* bad) {
    if (!(p.beta > 0) || std::isinf(p.beta)) return kBadBeta;
    return p.is_double ? forward<double>(p, bad) : forward<float>(p, bad);
}

int32_t run_backward(const Problem& p, const Gradients& g) {
    return p.is_double ? backward<double>(p, g) : backward<float>(p, g);
}

}  // namespace NCK_ISA
}  // namespace nckernels
