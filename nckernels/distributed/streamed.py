"""The losses with prototypes for a batch whose features come in parts and are not kept.

NTCE and NONL (direction "class") are coupled over the batch by one number a class. With sample weights
:math:`w_i`, their sums :math:`a_c` over the classes and :math:`W` over all (1 for ``"sum"``):

.. math::
    L = \\frac{1}{W} \\Big( \\sum_c a_c \\mathrm{LSE}_c - \\sum_i w_i \\mathrm{pos}_i \\Big), \\qquad
    e^{\\mathrm{LSE}_c} = \\sum_m e^{\\mathrm{lse}_c^m}

for parts m. A first run collects LSE. Then part m, with its :math:`\\mathrm{lse}_c^m` weighted by the constant
:math:`a_c e^{\\mathrm{lse}_c^m - \\mathrm{LSE}_c}`, has its share of the gradient. Losses that are sums over the rows,
such as NormFace, need W only.
"""

from __future__ import annotations

import copy
from typing import Protocol

import torch
from torch import Tensor, nn

from .._common import inverse, logaddexp
from ..backends.base import accumulation_dtype
from ..nn import NONLLoss, NormFaceLoss, NTCELoss, PrototypeClassifier
from ..primitive import cosine_lse


class StreamedLoss(Protocol):
    """A loss of parts ``rows`` of the batch, with their features in the order of the batch."""

    twice: bool  # whether all parts are for `collect` before any is for `part`

    def collect(self, features: Tensor, rows: slice) -> None:
        """Take in what the others need to know of this part."""

    def part(self, features: Tensor, rows: slice) -> Tensor:
        """A number whose gradient, summed over the parts, is that of the loss."""

    def value(self) -> Tensor:
        """The loss of the whole batch, after the last part."""


def streamed_loss(criterion: nn.Module, target: Tensor) -> StreamedLoss:
    """``criterion`` for features that come in parts, with the labels of all of them."""
    if isinstance(criterion, PrototypeClassifier):
        criterion = criterion.criterion
    if not isinstance(criterion, NONLLoss | NTCELoss | NormFaceLoss):
        raise TypeError(
            f"criterion must be an NONLLoss, NTCELoss, NormFaceLoss or PrototypeClassifier, got "
            f"{type(criterion).__name__}; other losses need the features of the whole batch: micro(x), then the loss"
        )
    if criterion.reduction == "none":
        raise ValueError("criterion must have reduction 'mean' or 'sum', got 'none'")
    if isinstance(criterion, NONLLoss) and criterion.direction == "both":
        raise ValueError(
            "direction='both' couples the batch by more than a number a class; it needs the features of the whole "
            "batch: micro(x), then the loss"
        )
    if isinstance(criterion, NTCELoss) or (isinstance(criterion, NONLLoss) and criterion.direction == "class"):
        return _ByClass(criterion, target)
    return _ByRow(criterion, target)


class _ByClass:
    """NTCE and NONL."""

    twice = True

    def __init__(self, criterion: NONLLoss | NTCELoss, target: Tensor) -> None:
        self.criterion, self.target = criterion, target
        self.weight, self.total = _weights(criterion, target)
        k, like = len(criterion.prototypes), self.weight
        index = target.long().clamp(0, k - 1)
        self.class_weight = like.new_zeros(k).index_add(0, index, self.weight)
        self.lse = like.new_full((k,), -torch.inf)
        self.positive = like.new_zeros(())

    def collect(self, features: Tensor, rows: slice) -> None:
        with torch.no_grad():
            lse, pos = self._lse(features, rows)
            self.lse = logaddexp(self.lse, lse)
            self.positive += self.weight[rows] @ pos

    def part(self, features: Tensor, rows: slice) -> Tensor:
        lse, pos = self._lse(features, rows)
        empty = lse == -torch.inf
        share = (lse.detach() - self.lse).exp().masked_fill(empty, 0.0)
        return ((self.class_weight * share) @ lse.masked_fill(empty, 0.0) - self.weight[rows] @ pos) / self.total

    def value(self) -> Tensor:
        lse = self.lse.masked_fill(self.lse == -torch.inf, 0.0)  # a class without negatives: alignment only
        return (self.class_weight @ lse - self.positive) / self.total

    def _lse(self, features: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        c = self.criterion
        return cosine_lse(
            features, c.prototypes, self.target[rows], inverse(c.temperature), direction="class",
            exclude="target" if isinstance(c, NONLLoss) else "none", ignore_index=c.ignore_index,
        )  # fmt: skip


class _ByRow:
    """NormFace, and NONL with direction "instance"."""

    twice = False

    def __init__(self, criterion: NONLLoss | NormFaceLoss, target: Tensor) -> None:
        self.criterion, self.target = copy.copy(criterion), target  # the copy has the same parameters
        weight, self.total = _weights(criterion, target)
        self.criterion.reduction = "sum"
        self.sum = weight.new_zeros(())

    def collect(self, features: Tensor, rows: slice) -> None:
        """Nothing: rows are on their own."""

    def part(self, features: Tensor, rows: slice) -> Tensor:
        part: Tensor = self.criterion(features, self.target[rows]) / self.total
        self.sum += part.detach()
        return part

    def value(self) -> Tensor:
        return self.sum


def _weights(criterion: NONLLoss | NTCELoss | NormFaceLoss, target: Tensor) -> tuple[Tensor, Tensor]:
    """(M,) weights of the samples, 0 where ignored, and what divides the sum of their losses."""
    dtype = accumulation_dtype(criterion.prototypes.dtype)
    if criterion.weight is None:
        weight = torch.ones(target.shape, dtype=dtype, device=target.device)
    else:
        index = target.long().clamp(0, len(criterion.weight) - 1)
        weight = criterion.weight.to(dtype).index_select(0, index)
    weight = weight.masked_fill(target == criterion.ignore_index, 0.0)
    return weight, weight.sum() if criterion.reduction == "mean" else weight.new_ones(())
