"""The prototype loss in closed form, where the matrix of samples and classes is small.

With unit rows :math:`a_i`, class means :math:`\\mu_c` of :math:`n_c` of them and logits :math:`t_{ic} = \\beta a_i \\cdot
\\mu_c`, sample i contributes :math:`\\log \\sum_c (n_c - [c = y_i]) e^{t_{ic}} - t_{i,y_i}`. The gradient to the logits is
that of a softmax, and each mean hands its own on to its samples.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _checks, operators
from ._class_sums import class_sums, some, visible_rows
from ._common import or_zero
from .backends import registry
from .backends.base import accumulation_dtype
from .backends.chunked.tiles import rnorm_of, through_normalisation
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


def losses(rows: Tensor, group: Tensor, ignored: Tensor, classes: int, beta: float | Tensor) -> Tensor:
    """(N,) losses, 0 where ignored; ``group`` is in [0, classes) where not."""
    left_out = some(ignored)
    group = group if left_out is None else group.masked_fill(left_out, 0)
    return _Losses.apply(rows, scalar(beta, rows), group, left_out, classes)


class _Losses(torch.autograd.Function):
    """One node of the graph; a dozen and a half of single steps take longer than what they do."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, beta: Tensor, group: Tensor, left_out: Tensor | None, classes: int) -> Tensor:
        with _checks.no_autocast(rows):
            visible = visible_rows(rows, left_out)
            rnorm = rnorm_of(visible, visible.dtype)
            unit = visible * rnorm[:, None]
            sums, counts = class_sums(unit, group, left_out, classes)
            means = sums.div_(counts.clamp_min(1.0)[:, None])
            share, own = (unit @ means.T).mul_(beta), group[:, None]
            pos = share.gather(1, own)
            others = (counts[group] - 1.0).clamp_min_(0.0)  # samples of the same class beside this one
            share.add_(counts.log()).scatter_(1, own, pos + others.log()[:, None])
            lse = or_zero(share.logsumexp(1, keepdim=True))
            loss = (lse - pos).squeeze(1)
            if any(ctx.needs_input_grad):
                share.sub_(lse).exp_()
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
            of_beta = (of_logits * (unit @ means.T)).sum()
        if wanted[0]:
            of_logits.mul_(beta)
            of_means = (of_logits.T @ unit).div_(counts.clamp_min(1.0)[:, None])
            grad = torch.addmm(of_means.index_select(0, group), of_logits, means)
            if left_out is not None:
                grad.masked_fill_(left_out[:, None], 0.0)
            through_normalisation(grad, unit, rnorm, rows)
            of_rows = grad.to(rows.dtype)
    return of_rows, of_beta
