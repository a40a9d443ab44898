r"""The losses with prototypes, for a batch whose features come in parts and are not kept.

In NTCE and NONL (direction "class") the parts of a batch depend on each other only through one number per class. With
weights :math:`w_i` of the samples, their sums :math:`a_c` over the samples of class c and :math:`W` over all samples
(1 for ``"sum"``), and parts m of the batch:

.. math::
    L = \frac{1}{W} \Big( \sum_c a_c \mathrm{LSE}_c - \sum_i w_i \mathrm{pos}_i \Big), \qquad
    e^{\mathrm{LSE}_c} = \sum_m e^{\mathrm{lse}_c^m}

The first run computes LSE. In the second run, part m contributes the gradient of its :math:`\mathrm{lse}_c^m`, weighted
by the constant :math:`a_c e^{\mathrm{lse}_c^m - \mathrm{LSE}_c}`, and of its own positives. Losses that are sums over
the rows, such as NormFace, need only W and no first run. With a process group a, W and LSE span its ranks.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from .._checks import is_dtensor
from .._common import as_rows, inverse, logaddexp, or_zero
from ..backends.base import Exclude, accumulation_dtype
from ..nn import NONLLoss, NormFaceLoss, NTCELoss, PrototypeClassifier
from ..primitive import cosine_lse
from . import groups
from .collectives import all_reduce, logsumexp

Criterion = NONLLoss | NTCELoss | NormFaceLoss


def streamed_loss(criterion: nn.Module, target: Tensor) -> ByClass | ByRow:
    """``criterion`` for features (M, ..., d) that come in parts, in the order of ``target`` (M, ...)."""
    if isinstance(criterion, PrototypeClassifier):
        criterion = criterion.criterion
    if not isinstance(criterion, Criterion):
        raise TypeError(
            "criterion must be an NONLLoss, NTCELoss, NormFaceLoss or PrototypeClassifier, got "
            f"{type(criterion).__name__}; other losses need the features of the whole batch: micro(x), then the loss"
        )
    if criterion.reduction == "none":
        raise ValueError("criterion must have reduction 'mean' or 'sum', got 'none'")
    if criterion.sparse or getattr(criterion, "class_fraction", 1.0) != 1.0 or is_dtensor(criterion.prototypes):
        raise ValueError(
            "sparse=True, class_fraction and prototypes spread over ranks need the features of the whole batch: "
            "micro(x), then the loss"
        )
    direction = "instance" if isinstance(criterion, NormFaceLoss) else getattr(criterion, "direction", "class")
    if direction == "both":
        raise ValueError(
            "direction='both' couples the batch by more than a number per class; it needs the features of the whole "
            "batch: micro(x), then the loss"
        )
    return ByRow(criterion, target) if direction == "instance" else ByClass(criterion, target)


class _Streamed:
    """The part of the loss that is known before the features: weights and their sums."""

    def __init__(self, criterion: Criterion, target: Tensor) -> None:
        self.criterion, self.target = criterion, target
        self.ranks = groups.resolve(criterion.process_group)
        k, d = criterion.prototypes.shape
        dtype = accumulation_dtype(criterion.prototypes.dtype)
        index = target.clamp(0, k - 1)  # the kernels check the range
        weight = torch.ones(k, device=target.device) if criterion.weight is None else criterion.weight
        self.weight = weight.to(dtype)[index].masked_fill(target == criterion.ignore_index, 0.0)
        self.class_weight = self.weight.new_zeros(k).index_add(0, index.reshape(-1), self.weight.reshape(-1))
        self.of_all_ranks, size = self.class_weight, 1
        if self.ranks is not None:
            groups.agree(
                self.ranks, f"MicroBatches.stream of {type(criterion).__name__}", criterion.prototypes,
                {"temperature": criterion.temperature}, num_classes=k, d=d, reduction=criterion.reduction,
            )  # fmt: skip
            self.of_all_ranks, size = all_reduce(self.class_weight, self.ranks), self.ranks.size
        # As for all losses with a process group, the average over its ranks is the whole loss.
        self.scale: Tensor | int = size / self.of_all_ranks.sum() if criterion.reduction == "mean" else size


class ByClass(_Streamed):
    """NTCE and NONL: :meth:`collect` for all parts, :meth:`collected`, then :meth:`part` for all of them."""

    def __init__(self, criterion: Criterion, target: Tensor) -> None:
        super().__init__(criterion, target)
        self.exclude: Exclude = "target" if isinstance(criterion, NONLLoss) else "none"
        self.lse = self.weight.new_full(self.class_weight.shape, -torch.inf)
        self.positives = self.weight.new_zeros(())

    @torch.no_grad()
    def collect(self, features: Tensor, rows: slice) -> None:
        """Add the features of a part to the log-sum-exps."""
        lse, pos = self._lse(features, rows)
        self.lse = logaddexp(self.lse, lse)
        self.positives += (self._weights(rows) * pos).sum()  # not @, which autocast would compute in 16 bits

    def collected(self) -> None:
        """Finish the first run: combine the log-sum-exps of all ranks."""
        if self.ranks is not None:
            self.lse = logsumexp(self.lse, self.ranks)

    def part(self, features: Tensor, rows: slice) -> Tensor:
        """A number whose gradient, summed over all parts, is that of the loss."""
        lse, pos = self._lse(features, rows)
        empty = lse == -torch.inf
        share = self.of_all_ranks * (lse.detach() - self.lse).exp().masked_fill(empty, 0.0)
        return self.scale * ((share * lse.masked_fill(empty, 0.0)).sum() - (self._weights(rows) * pos).sum())

    def value(self) -> Tensor:
        """The loss of the whole batch."""
        return self.scale * ((self.class_weight * or_zero(self.lse)).sum() - self.positives)

    def _weights(self, rows: slice) -> Tensor:
        return self.weight[rows].reshape(-1)

    def _lse(self, features: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        c = self.criterion
        features, target, _ = as_rows(features, self.target[rows], None, c.prototypes)
        return cosine_lse(
            features, c.prototypes, target, inverse(c.temperature), direction="class",
            exclude=self.exclude, ignore_index=c.ignore_index,
        )  # fmt: skip


class ByRow(_Streamed):
    """NormFace, and NONL with direction "instance": :meth:`part` for all parts."""

    def __init__(self, criterion: Criterion, target: Tensor) -> None:
        super().__init__(criterion, target)
        self.of_part = copy.copy(criterion)  # shares the parameters
        self.of_part.reduction, self.of_part.process_group = "sum", None
        self.sum = self.weight.new_zeros(())

    def part(self, features: Tensor, rows: slice) -> Tensor:
        """A number whose gradient, summed over all parts, is that of the loss."""
        part = self.scale * self.of_part(features, self.target[rows])
        self.sum += part.detach()
        return part

    def value(self) -> Tensor:
        """The loss of the whole batch, after its last part."""
        return self.sum
