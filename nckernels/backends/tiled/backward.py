"""The backward pass: gradients of both operands, of the inverse temperature and of the biases."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..base import Forward, Gradients, Needs, OutputGrads, Spec
from .kernels import Kernels
from .plan import Blocks, pad16, panel_shape
from .sides import Kept, Result, Side, two_sides, vector


def backward(kernels: Kernels, saved: Forward, grads: OutputGrads, needs: Needs) -> Gradients:
    """The wanted gradients."""
    inputs, spec = kernels.inputs, kernels.spec
    z, device = inputs.features, inputs.features.device
    if z.shape[0] == 0 or all(g is None for g in grads):
        return _no_gradients(kernels, needs)
    kept = Kept.of(saved.kept, inputs, kernels.index_dtype, spec)
    samples, classes = two_sides(inputs, spec, saved.feature_rnorm, saved.prototype_rnorm, kept)
    if spec.symmetric:
        # The gradient A U + A^T U is (A + A^T) U: one pass over entries with two terms each.
        direction = "class_lse" if spec.by_class else "instance_lse"
        lse, grad = getattr(saved, direction), vector(getattr(grads, direction))
        samples = classes = samples._replace(lse=lse, grad=grad, pos=vector(grads.pos))
    else:
        samples = samples._replace(lse=saved.instance_lse, grad=vector(grads.instance_lse), pos=vector(grads.pos))
        classes = classes._replace(lse=saved.class_lse, grad=vector(grads.class_lse))

    def matrix(wanted: bool, side: Side) -> Tensor | None:
        # Compacted prototypes: the kernels write only the rows of classes that occur.
        make = torch.zeros if side.gather else torch.empty
        return make(side.x.shape, dtype=side.x.dtype, device=device) if wanted else None

    def sums(wanted: bool, side: Side) -> Tensor | None:
        make = torch.empty if side.used is None else torch.zeros  # unused slots are not written
        return make(side.slots, dtype=torch.float32, device=device) if wanted else None

    # The gradient of beta is a sum over the rows of either side: take the side whose gradient is computed anyway.
    by_samples = needs.features or not needs.prototypes
    for_samples = Result(samples, matrix(needs.features, samples), sums(needs.inv_temperature and by_samples, samples))
    for_classes = Result(
        classes, matrix(needs.prototypes, classes), sums(needs.inv_temperature and not by_samples, classes)
    )
    both_sides(kernels, for_samples, for_classes)
    dot = for_samples.dot if for_samples.dot is not None else for_classes.dot
    return Gradients(
        for_samples.out,
        for_classes.out,
        _beta_grad(dot, spec).to(inputs.inv_temperature.dtype) if dot is not None else None,
        _bias_grad(kernels, samples, classes) if needs.sample_bias else None,
        _bias_grad(kernels, classes, samples) if needs.class_bias else None,
    )


def _no_gradients(kernels: Kernels, needs: Needs) -> Gradients:
    z, w, _, beta, sample_bias, class_bias = kernels.inputs
    zeros = (
        torch.zeros_like(x, memory_format=torch.contiguous_format) if need and x is not None else None
        for x, need in zip((z, w, beta, sample_bias, class_bias), needs, strict=True)
    )
    return Gradients(*zeros)


def both_sides(kernels: Kernels, for_samples: Result, for_classes: Result) -> None:
    """The gradients of both sides, whose log-sum-exps are known, divided by the divisor of a step."""
    samples, classes = for_samples.side, for_classes.side
    scales: tuple[Tensor | None, ...] = (None, None, None)
    if samples.x.dtype == torch.float16:
        three = torch.empty(3, dtype=torch.float32, device=samples.x.device)
        kernels.half_scale(samples, classes, three)
        scales = three[0:], three[1:], three[2:]
    blocks = kernels.short_blocks(samples, classes)
    if blocks is not None:
        _short_rows(kernels, for_samples, classes, scales[0], blocks)
        _short_rows(kernels, for_classes, samples, scales[1], blocks)
    elif samples.slots >= classes.slots:
        _long_rows(kernels, for_samples, for_classes, scales[2])
    else:
        _long_rows(kernels, for_classes, for_samples, scales[2])


def _short_rows(kernels: Kernels, result: Result, q: Side, scale: Tensor | None, blocks: Blocks) -> None:
    """One side's gradient, accumulated on the chip."""
    if not result.wanted:
        return
    p, d = result.side, result.side.x.shape[1]
    split = blocks.split(p.slots, q.slots, kernels.spec.workspace, 4 * p.slots * d)
    if split == 1:
        kernels.short_grad(result, q, None, scale, split, blocks)
    else:
        part = torch.empty(split, p.slots, d, dtype=torch.float32, device=p.x.device)
        kernels.short_grad(result, q, part, scale, split, blocks)
        kernels.finish(result, part, 0, p.slots, split, scale, norm_inside=False)


def _long_rows(kernels: Kernels, p: Result, q: Result, scale: Tensor | None) -> None:
    """Both gradients by panels of entries and the library's matrix products; p is the longer side.

    The gradient of p's rows in a panel is complete before the next panel of p. The gradient of q is accumulated over
    all panels, in float32 for all of its rows: this is why q is the shorter side. Float32 gradients are their own
    accumulator.
    """
    if not (p.wanted or q.wanted):
        return
    x, y = p.side, q.side
    d, itemsize, device = x.x.shape[1], x.x.element_size(), x.x.device
    p_sums, q_sums = p.accumulator, q.accumulator
    # The library's products read whole matrices, in which 0 * NaN is NaN. A sum that one product completes is mended.
    # For a sum over several products, the operand is a copy with zeros in left-out rows.
    copy_x, copy_y = x.partial and q.wanted, y.partial and p.wanted
    p_bytes = (4 * d if p.wanted and p_sums is None else 0) + (itemsize * d if copy_x else 0)
    q_bytes = itemsize * d if copy_y else 0
    rows, columns = panel_shape(x.slots, y.slots, p_bytes, q_bytes, itemsize, kernels.spec.workspace)
    copy_x = copy_x and (x.copied or rows < x.slots)
    copy_y = copy_y and (y.copied or columns < y.slots)

    def buffer(n: int, width: int, dtype: torch.dtype, wanted: bool = True) -> Tensor | None:
        return torch.empty(n, width, dtype=dtype, device=device) if wanted else None

    h = torch.empty(rows, pad16(columns), dtype=x.x.dtype, device=device)
    p_panel_sums = buffer(rows, d, torch.float32, p.wanted and p_sums is None)
    if q_sums is None:
        q_sums = buffer(y.slots, d, torch.float32, q.wanted)
    x_copy, y_copy = buffer(rows, d, x.x.dtype, copy_x), buffer(columns, d, x.x.dtype, copy_y)
    whole = dense(kernels, y, 0, y.slots, y_copy) if columns >= y.slots else None
    for start in range(0, x.slots, rows):
        stop = min(start + rows, x.slots)
        x_rows = dense(kernels, x, start, stop, x_copy)
        p_panel = p_sums[start:stop] if p_sums is not None else p_panel_sums
        for begin in range(0, y.slots, columns):
            end = min(begin + columns, y.slots)
            kernels.entries(x, y, h, start, stop, begin, end, scale)
            panel = h[: stop - start, : end - begin]
            if p_panel is not None:
                y_rows = dense(kernels, y, begin, end, y_copy) if whole is None else whole
                multiply(kernels, panel, y_rows, p_panel[: stop - start], accumulate=begin > 0)
            if q_sums is not None:
                multiply(kernels, panel.t(), x_rows, q_sums[begin:end], accumulate=start > 0)
        if p_panel is not None:
            kernels.finish(p, p_panel, start, stop, 1, scale, norm_inside=True)
    if q_sums is not None:
        kernels.finish(q, q_sums, 0, y.slots, 1, scale, norm_inside=True)


class Dense(NamedTuple):
    """The rows of some slots, as an operand of the library's products."""

    side: Side
    matrix: Tensor
    mended: bool
    """Whether the matrix still has left-out rows, so that products must be mended; it then has all rows of the side."""


def dense(kernels: Kernels, side: Side, start: int, stop: int, copy: Tensor | None) -> Dense:
    """A view of the rows, or their ``copy`` with zeros in left-out rows."""
    if copy is None:
        return Dense(side, side.x if stop - start == side.x.shape[0] else side.x[start:stop], side.partial)
    kernels.gather(side, copy, start, stop)
    return Dense(side, copy[: stop - start], False)


def multiply(kernels: Kernels, h: Tensor, rows: Dense, out: Tensor, accumulate: bool) -> None:
    """``out = h @ rows`` (+ out)."""
    kernels.matmul(h, rows.matrix, out, accumulate)
    if rows.mended:
        kernels.mend(h, rows.side, out)


def _beta_grad(dot: Tensor, spec: Spec) -> Tensor:
    """The sum over A * S; the symmetric A + A^T counts every entry twice."""
    return dot.sum() / 2 if spec.symmetric else dot.sum()


def _bias_grad(kernels: Kernels, p: Side, q: Side) -> Tensor:
    """Gradient of p's bias, which enters the log-sum-exps of q's rows."""
    n = p.x.shape[0]
    if q.grad is None:
        return torch.zeros(n, dtype=torch.float32, device=p.x.device)
    blocks = kernels.bias_blocks(p, q)
    split = blocks.split(n, q.slots, kernels.spec.workspace, 4 * n)
    part = torch.empty(split, n, dtype=torch.float32, device=p.x.device)
    kernels.bias_grad(p, q, part, split, blocks)
    return part[0] if split == 1 else part.sum(0)
