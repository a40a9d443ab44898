"""The prototype loss in closed form, where the matrix of samples and classes is small.

With unit rows :math:`a_i`, means :math:`\\mu_c` of the :math:`n_c` of a class and logits :math:`t_{ic} = \\beta a_i \\cdot
\\mu_c`, sample i contributes :math:`\\log \\sum_c (n_c - [c = y_i]) e^{t_{ic}} - t_{i,y_i}`. The gradient to the logits
is that of a softmax, and each mean hands its own on to its samples.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import _checks, operators
from .backends import registry
from .backends.base import accumulation_dtype, norm_eps
from .backends.chunked.tiles import through_normalisation
from .primitive import scalar

_SHARE = 4
"""The matrix takes at most the workspace divided by this; autograd and its steps hold up to three of them."""


def takes(rows: Tensor, classes: int, beta: float | Tensor) -> bool:
    """Whether :func:`losses` is for a problem of this kind."""
    size = len(rows) * classes * accumulation_dtype(rows.dtype).itemsize
    return (
        rows.device.type == "cpu"
        and size <= registry.get_workspace(rows.device) // _SHARE
        and registry.chosen() != registry.REFERENCE
        and operators.plain(rows, beta)
    )


def losses(rows: Tensor, group: Tensor, ignored: Tensor | None, classes: int, beta: float | Tensor) -> Tensor:
    """(N,) losses, 0 where ``ignored``; ``group`` is in [0, classes) where not."""
    group = group if ignored is None else group.masked_fill(ignored, 0)
    return _Losses.apply(rows, scalar(beta, rows), group, ignored, classes)


class _Losses(torch.autograd.Function):
    """One node of the graph; a dozen and a half of single steps take longer than what they do."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, beta: Tensor, group: Tensor, left_out: Tensor | None, classes: int) -> Tensor:
        with _checks.no_autocast(rows):
            visible = rows.to(beta.dtype)
            if left_out is not None:
                visible = visible.masked_fill(left_out[:, None], 0.0)  # they may hold anything
            rnorm = torch.linalg.vector_norm(visible, dim=1).clamp_min_(norm_eps(rows.dtype)).reciprocal_()
            unit = visible * rnorm[:, None]
            taking_part = unit.new_ones(len(unit)) if left_out is None else (~left_out).to(unit.dtype)
            counts = unit.new_zeros(classes).index_add_(0, group, taking_part)
            means = unit.new_zeros(classes, unit.shape[1]).index_add_(0, group, unit)
            means.div_(counts.clamp_min(1.0)[:, None])
            share, own = torch.mm(unit, means.t()).mul_(beta), group[:, None]
            pos = share.gather(1, own)
            # For a sample's own class there are as many as the others of it.
            others = (counts - 1.0).clamp_min_(0.0).log_().index_select(0, group)
            share.add_(counts.log()).scatter_(1, own, pos + others[:, None])
            # A softmax and its log-sum-exp, both of which are 0 where there is nothing to add up.
            top = share.amax(1, keepdim=True).nan_to_num_(math.nan, math.inf, 0.0)
            total = share.sub_(top).exp_().sum(1, keepdim=True).clamp_min_(1.0)
            share.div_(total)
            loss = total.log_().add_(top).sub_(pos).squeeze(1)
            ctx.save_for_backward(rows, beta, group, left_out, unit, rnorm, means, counts, share)
        return loss if left_out is None else loss.masked_fill_(left_out, 0.0)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        operators.no_batches(upstream)
        of_rows, of_beta = operators.once(_backward, ctx.needs_input_grad[:2], upstream, *ctx.saved_tensors)
        return of_rows, of_beta, None, None, None


def _backward(wanted: tuple[bool, bool], upstream: Tensor, *saved: Tensor) -> tuple[Tensor | None, Tensor | None]:
    rows, beta, group, left_out, unit, rnorm, means, counts, share = saved
    of_rows = of_beta = None
    with _checks.no_autocast(rows):
        factor = (upstream if left_out is None else upstream.masked_fill(left_out, 0.0))[:, None]
        of_logits = (share * factor).scatter_add_(1, group[:, None], -factor)
        if wanted[1]:
            of_beta = (of_logits * torch.mm(unit, means.t())).sum()
        if wanted[0]:
            of_logits.mul_(beta)
            of_means = torch.mm(of_logits.t(), unit).div_(counts.clamp_min(1.0)[:, None])
            grad = torch.addmm(of_means.index_select(0, group), of_logits, means)
            if left_out is not None:
                grad.masked_fill_(left_out[:, None], 0.0)
            through_normalisation(grad, unit, rnorm, rows)
            of_rows = grad.to(rows.dtype)
    return of_rows, of_beta
