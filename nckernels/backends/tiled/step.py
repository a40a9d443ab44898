"""Loss and gradient in one step, for rows too long for the kernels that accumulate gradients on the chip.

The gradient of a mean or a sum is known, up to a factor, when the loss is. The *anchors* P, classes in the class
direction and samples in the instance direction, are contrasted with the *others* Q. A panel has some anchors with all
others, so its sums are complete. The vendor's library computes its products once, and they become entries of the
gradient before the next panel begins:

    T = P Q^T          library, or a product whose epilogue includes the next line, see engines.py
    sums, entries H    two readings of T, see triton/panel.py
    dP = H Q           library; finished at once
    dQ += H^T P        library; finished after the last panel

That is 6 M K d operations. A forward and a backward pass take 8 M K d, half of them in our own kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import Needs, Reduced, Spec, Step
from .backward import dense, multiply
from .engines import Engine, EpilogueEngine, LibraryEngine
from .forward import prepare
from .kernels import StepKernels
from .plan import StepPanels, ceil_div, step_panels
from .sides import Result, Side, two_sides

SAMPLES_OF_A_BLOCK = 1024
"""Samples per block in the sums over the samples."""


def fits(features: Tensor, prototypes: Tensor, spec: Spec) -> bool:
    """Whether a step takes the problem and is expected to be faster than two passes, for rows too long for the chip."""
    if features.shape[0] == 0 or spec.square or spec.direction == "both":
        return False
    return _panels(features, prototypes, spec) is not None


def _panels(features: Tensor, prototypes: Tensor, spec: Spec, epilogue: bool = False) -> StepPanels | None:
    (m, d), k = features.shape, prototypes.shape[0]
    anchors, others = (min(m, k) if spec.present_only else k, m) if spec.by_class else (m, k)
    return step_panels(anchors, others, d, features.element_size(), spec.workspace, epilogue)


def step(kernels: StepKernels, reduced: Reduced, needs: Needs) -> Step:
    """See :meth:`nckernels.backends.base.Backend.step`; for problems that ``fits``.

    Gradients are in the inputs' dtype, except that those of float16 are float32: they fit the range of float16 only
    after they are multiplied by the upstream gradient, which contains a gradient scaler's factor.
    """
    inputs, spec = kernels.inputs, kernels.spec
    z, w = inputs.features, inputs.prototypes
    m, k, device = z.shape[0], w.shape[0], z.device
    dtype = torch.float32 if z.dtype == torch.float16 else z.dtype

    def new(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.float32, device=device)

    z_rnorm, pos, w_rnorm, present = prepare(kernels)
    blocks = ceil_div(m, SAMPLES_OF_A_BLOCK)
    share, pos_grad, part = new(m), new(m), new(2, blocks)
    of_class = torch.zeros(k, dtype=torch.float32, device=device) if spec.by_class else None
    kernels.shares(reduced.weight, share, pos_grad, of_class, part)
    divisor = None
    if reduced.mean:
        divisor = new(2)
        kernels.divisor(part, divisor, nothing_is_zero=reduced.of_nothing == 0.0)

    samples, classes = two_sides(inputs, spec, z_rnorm, w_rnorm, present)
    samples = samples._replace(pos=pos_grad)
    if spec.by_class:
        classes = classes._replace(lse=new(k), grad=of_class)
    else:
        samples = samples._replace(lse=new(m), grad=share)
    scale = None
    if z.dtype == torch.float16:
        three = new(3)
        kernels.half_scale(samples, classes, three)
        scale = three[2:]

    def result(side: Side, wanted: bool, with_beta: bool) -> Result:
        make = torch.zeros if side.gather else torch.empty  # kernels write only classes that occur
        out = make(side.x.shape, dtype=dtype, device=device) if wanted else None
        dot = torch.zeros(side.slots, dtype=torch.float32, device=device) if with_beta else None
        return Result(side, out, dot)

    # The gradient of beta is a sum over the rows of either side: take the side whose gradient is computed anyway.
    by_samples = needs.inv_temperature and needs.features
    for_samples = result(samples, needs.features, by_samples)
    for_classes = result(classes, needs.prototypes, needs.inv_temperature and not by_samples)
    p, q = (for_classes, for_samples) if spec.by_class else (for_samples, for_classes)
    _by_panels(kernels, p, q, pos, scale, divisor)

    loss, lse = new(1), p.side.lse
    assert lse is not None
    kernels.loss(share, lse, pos, part[0], divisor, loss)
    dot = for_samples.dot if for_samples.dot is not None else for_classes.dot
    return Step(loss[0], for_samples.out, for_classes.out, None if dot is None else dot.sum())


def _engine(kernels: StepKernels, p: Side, q: Side, pos: Tensor, scale: Tensor | None) -> tuple[Engine, StepPanels]:
    problem = kernels.inputs.features, kernels.inputs.prototypes, kernels.spec
    found = kernels.epilogue_product()
    panels = None if found is None else _panels(*problem, epilogue=True)
    if found is not None and panels is not None:
        return EpilogueEngine(kernels, *found, p, q, panels.rows, pos), panels
    panels = _panels(*problem)
    assert panels is not None
    return LibraryEngine(kernels, p, q, panels.rows, scale), panels


def _by_panels(
    kernels: StepKernels, p: Result, q: Result, pos: Tensor, scale: Tensor | None, divisor: Tensor | None
) -> None:
    """Compute the log-sum-exps of the anchors p, and both gradients."""
    x, y = p.side, q.side
    dtype, d, device = x.x.dtype, x.x.shape[1], x.x.device
    engine, panels = _engine(kernels, x, y, pos, scale)
    rows, block, once = panels.rows, panels.block, panels.rows >= x.slots
    # The divisor in ``finish``: the scale of the entries times the divisor of the mean.
    finished = scale if divisor is None else divisor[:1] if scale is None else scale * divisor[:1]

    def buffer(n: int, width: int, dtype: torch.dtype = torch.float32, wanted: bool = True) -> Tensor | None:
        return torch.empty(n, width, dtype=dtype, device=device) if wanted else None

    sums = torch.empty(min(block, max(rows, y.slots)), d, dtype=torch.float32, device=device)
    total = q.accumulator if q.accumulator is not None else buffer(y.slots, d, wanted=q.wanted and not once)
    # The library's products read whole matrices, in which 0 * NaN is NaN. A sum that one product completes is mended.
    # For a sum over several panels, the operand is a copy with zeros in left-out rows.
    x_copy = buffer(rows, d, dtype, x.gather or (q.wanted and x.partial and (x.copied or not once)))
    y_rows = dense(kernels, y, 0, y.slots, None)
    for start in range(0, x.slots, rows):
        stop = min(start + rows, x.slots)
        n, last = stop - start, stop == x.slots
        x_rows = dense(kernels, x, start, stop, x_copy)
        h = engine.entries(x_rows.matrix, start, stop)
        for begin in range(0, n if p.wanted else 0, block):
            end = min(begin + block, n)
            multiply(kernels, h[begin:end], y_rows, sums[: end - begin], accumulate=False)
            kernels.finish(p, sums, start + begin, start + end, 1, finished, norm_inside=True)
        if total is not None and not last:
            multiply(kernels, h.t(), x_rows, total, accumulate=start > 0)
            continue
        for begin in range(0, y.slots if q.wanted else 0, block):
            end = min(begin + block, y.slots)
            part = sums[: end - begin] if total is None else total[begin:end]
            multiply(kernels, h[:, begin:end].t(), x_rows, part, accumulate=start > 0)
            kernels.finish(q, part, begin, end, 1, finished, norm_inside=True)
