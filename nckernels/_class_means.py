"""The prototype loss in closed form, where the matrix of samples and classes is small.

With unit rows :math:`a_i`, means :math:`\\mu_c` of the :math:`n_c` of a class and :math:`t_{ic} = \\beta a_i \\cdot
\\mu_c`, sample i contributes :math:`\\log \\sum_c (n_c - [c = y_i]) e^{t_{ic}} - t_{i,y_i}`. The gradient to the logits
is that of a softmax, and each mean hands its own on to its samples.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _checks, operators
from .backends import registry
from .backends.base import accumulation_dtype, norm_eps, number
from .backends.chunked.norms import through_normalisation

_SHARE = 4
"""The matrix takes at most the workspace divided by this; there are up to three of its size at a time."""

_GREATEST = 38.0
"""Inverse temperature up to which exponentials of differences of logits, and their sums, are normal float32 numbers."""


def takes(rows: Tensor, left_out: Tensor | None, classes: int, beta: float | Tensor) -> bool:
    """Whether :func:`losses` is for a problem of this kind, of two samples at least."""
    return (
        rows.device.type == "cpu"
        and registry.chosen() != registry.REFERENCE
        and operators.plain(rows, beta)
        and _SHARE * len(rows) * classes * accumulation_dtype(rows.dtype).itemsize
        <= registry.get_workspace(rows.device)
        and 0.0 < number(beta, rows.dtype) <= _GREATEST
        and len(rows) - (0 if left_out is None else int(left_out.sum())) > 1
    )


def losses(rows: Tensor, group: Tensor, left_out: Tensor | None, classes: int, beta: float | Tensor) -> Tensor:
    """(N,) losses, 0 where ``left_out``; ``group`` is in [0, classes) where not."""
    group = group if left_out is None else group.masked_fill(left_out, 0)
    return _Losses.apply(rows, beta, group, left_out, classes)


class _Losses(torch.autograd.Function):
    """One node of the graph; two dozen single steps take longer than what they do."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, beta: float | Tensor, group: Tensor, left_out: Tensor | None, classes: int
    ) -> Tensor:
        ctx.beta = number(beta, rows.dtype)
        with _checks.no_autocast(rows):
            wide, own = rows.to(accumulation_dtype(rows.dtype)), group[:, None]
            if left_out is not None:
                wide = wide.masked_fill(left_out[:, None], 0.0)  # they may hold anything
            rnorm = torch.linalg.vector_norm(wide, dim=1).clamp_min_(norm_eps(rows.dtype)).reciprocal_()
            unit = wide * rnorm[:, None]
            itself = unit.new_zeros(len(unit), classes).scatter_(1, own, 1.0)
            if left_out is not None:
                itself.masked_fill_(left_out[:, None], 0.0)
            counts = itself.sum(0)
            sizes = counts[:, None].clamp_min(1.0)
            means = unit.new_zeros(classes, unit.shape[1]).index_add_(0, group, unit).div_(sizes)
            cosines = torch.mm(unit, means.t())
            share = cosines.sub_(cosines.gather(1, own)).mul_(ctx.beta).exp_().mul_(counts - itself)
            total = share.sum(1)
            of_logits = share.div_(total[:, None]).sub_(itself)
            loss = total.log_()
        ctx.save_for_backward(
            rows, beta if ctx.needs_input_grad[1] else None, group, left_out, unit, rnorm, means, sizes, of_logits
        )
        return loss if left_out is None else loss.masked_fill_(left_out, 0.0)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        operators.no_batches(upstream)
        grads = operators.once(_backward, ctx.needs_input_grad[0], ctx.beta, upstream, *ctx.saved_tensors)
        return *grads, None, None, None


def _backward(by_rows: bool, number: float, upstream: Tensor, *saved: Tensor) -> tuple[Tensor | None, Tensor | None]:
    rows, beta, group, left_out, unit, rnorm, means, sizes, of_logits = saved
    of_rows = of_beta = None
    with _checks.no_autocast(unit):
        factor = upstream[:, None] if left_out is None else upstream.masked_fill(left_out, 0.0)[:, None]
        if beta is not None:
            of_beta = torch.mm(unit, means.t()).mul_(of_logits).mul_(factor).sum().to(beta.dtype)
        if by_rows:
            of_cosines = of_logits * (factor * number)
            of_means = torch.mm(of_cosines.t(), unit).div_(sizes)
            grad = torch.addmm(of_means.index_select(0, group), of_cosines, means)
            if left_out is not None:
                grad.masked_fill_(left_out[:, None], 0.0)
            through_normalisation(grad, unit, rnorm, rows)
            of_rows = grad.to(rows.dtype)
    return of_rows, of_beta
