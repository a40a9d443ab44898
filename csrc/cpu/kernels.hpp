// The passes for one type of number, instantiated behind plain functions.
#pragma once

#include "backward.hpp"
#include "few_classes.hpp"
#include "forward.hpp"
#include "gaps.hpp"
#include "step.hpp"
#include "symmetric_backward.hpp"
#include "symmetric_forward.hpp"
#include "symmetric_step.hpp"

namespace nckernels {

// Calls run(engine) with panels of two vectors, or of one if that holds all columns.
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

// Takes the step if there are few classes, and returns whether it has.
template <class T, int NV>
bool few_classes(const Problem& p, const Columns& columns, const Step& s) {
  if (!FewClasses<T, NV>::takes(p, columns)) return false;
  FewClasses<T, NV>(p, columns, s).run();
  return true;
}

// Calls run(pass) with the pass that takes the step. `in_one`: loss and gradient in one call.
template <template <int> class Engine, class F>
Status with_step(const Problem& p, const Step& s, bool in_one, F&& run) {
  Columns columns;
  if (p.symmetric)
    columns = samples_as_columns(p);
  else if (!find_columns(p, columns))
    return kBadTarget;
  using T = typename Engine<2>::T;
  const bool few = in_one && !p.symmetric && columns.count <= Engine<2>::FEW;
  if (few && (columns.count <= lanes<T> ? few_classes<T, 1> : few_classes<T, 2>)(p, columns, s)) return kOk;
  with_engine<Engine>(columns, [&](auto engine) {
    using G = decltype(engine);
    if (p.symmetric)
      run(SymmetricStep<G>(p, columns, s));
    else
      run(StepPass<G>(p, columns, s));
  });
  return kOk;
}

template <template <int> class Engine>
Status step(const Problem& p, const Step& s) {
  if (p.pos) return with_step<Engine>(p, s, false, [](auto&& pass) { pass.resume(); });
  return with_step<Engine>(p, s, true, [](auto&& pass) { pass.run(); });
}

template <template <int> class Engine>
Status losses(const Problem& p, const Step& s) {
  return with_step<Engine>(p, s, false, [](auto&& pass) { pass.losses(); });
}

}  // namespace nckernels
