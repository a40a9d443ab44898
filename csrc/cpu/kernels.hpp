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
template <class T, class F>
void with_panels(const Columns& columns, F&& run) {
  if (columns.count <= lanes<T>)
    run(std::integral_constant<int, 1>{});
  else
    run(std::integral_constant<int, 2>{});
}

template <class T>
Status forward(const Problem& p) {
  Columns columns;
  if (!find_columns(p, columns)) return kBadTarget;
  auto run = [](auto pass) {
    pass.run();
    pass.clear_rest_of_kept();
  };
  if (!p.symmetric) begin_forward<T>(p, columns);
  with_panels<T>(columns, [&](auto vectors) {
    if (p.symmetric)
      run(SymmetricForward<T, vectors>(p, columns));
    else
      run(ForwardPass<T, vectors>(p, columns));
  });
  return kOk;
}

template <class T>
Status backward(const Problem& p, const Gradients& g) {
  Columns columns;
  if (!find_columns(p, columns)) return kBadTarget;
  with_panels<T>(columns, [&](auto vectors) {
    if (p.symmetric)
      SymmetricBackward<T, vectors>(p, columns, g).run();
    else
      BackwardPass<T, vectors>(p, columns, g).run();
  });
  return kOk;
}

// Calls run(pass) for the pass that takes the step; `in_one` says whether it is loss and gradient in one
// call.
template <class T, class F>
Status with_step(const Problem& p, const Step& s, bool in_one, F&& run) {
  Columns columns;
  if (p.symmetric)
    columns = samples_as_columns(p);
  else if (!find_columns(p, columns))
    return kBadTarget;
  with_panels<T>(columns, [&](auto vectors) {
    if (p.symmetric)
      run(SymmetricStep<T, vectors>(p, columns, s));
    else if (in_one && FewClasses<T, vectors>::takes(p, columns))
      FewClasses<T, vectors>(p, columns, s).run();
    else
      run(StepPass<T, vectors>(p, columns, s));
  });
  return kOk;
}

template <class T>
Status step(const Problem& p, const Step& s) {
  if (p.pos) return with_step<T>(p, s, false, [](auto&& pass) { pass.resume(); });
  return with_step<T>(p, s, true, [](auto&& pass) { pass.run(); });
}

template <class T>
Status losses(const Problem& p, const Step& s) {
  return with_step<T>(p, s, false, [](auto&& pass) { pass.losses(); });
}

}  // namespace nckernels
