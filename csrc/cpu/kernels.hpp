// The passes for one type of number, behind functions that hold no templates.
#pragma once

#include "backward.hpp"
#include "few_classes.hpp"
#include "forward.hpp"
#include "step.hpp"
#include "symmetric_backward.hpp"
#include "symmetric_forward.hpp"
#include "symmetric_step.hpp"

namespace nckernels {

// Panels of two vectors, or of one where a single vector holds all classes.
template <template <int> class Engine, class F>
void with_engine(const Columns& columns, F&& run) {
  if (columns.count <= Engine<1>::NR)
    run(Engine<1>());
  else
    run(Engine<2>());
}

template <template <int> class Engine>
Status forward(const Problem& p) {
  using T = typename Engine<1>::T;
  Columns columns;
  if (!find_columns(p, columns)) return kBadTarget;
  auto run = [](auto pass) {
    pass.run();
    pass.clear_rest_of_kept();
  };
  if (!p.symmetric) begin_forward<T>(p, columns);
  with_engine<Engine>(columns, [&](auto engine) {
    using G = decltype(engine);
    if (p.symmetric)
      run(SymmetricForward<G>(p, columns));
    else
      run(ForwardPass<G>(p, columns));
  });
  return kOk;
}

template <template <int> class Engine>
Status backward(const Problem& p, const Gradients& g) {
  Columns columns;
  if (!find_columns(p, columns)) return kBadTarget;
  with_engine<Engine>(columns, [&](auto engine) {
    using G = decltype(engine);
    if (p.symmetric)
      SymmetricBackward<G>(p, columns, g).run();
    else
      BackwardPass<G>(p, columns, g).run();
  });
  return kOk;
}

template <template <int> class Engine>
Status step(const Problem& p, const Step& s) {
  Columns columns;
  if (p.symmetric)
    columns = samples_as_columns(p);
  else if (!find_columns(p, columns))
    return kBadTarget;
  with_engine<Engine>(columns, [&](auto engine) {
    using G = decltype(engine);
    using Few = FewClasses<typename G::T, G::NV>;
    if (p.symmetric)
      SymmetricStep<G>(p, columns, s).run();
    else if (Few::takes(p, columns))
      Few(p, columns, s).run();
    else
      StepPass<G>(p, columns, s).run();
  });
  return kOk;
}

}  // namespace nckernels
