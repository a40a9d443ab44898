"""Losses over the batches of all ranks, for the price of a few numbers per class.

In the direction of the classes each prototype is contrasted with all samples of all ranks. Their exponentials add up:
a rank sums those of its own samples, the ranks exchange the sums, K numbers, and the rest is local again, features
and their gradients included. In the direction of the samples each row is local and only the mean spans the ranks.

With a group of R ranks every rank returns R times its own samples' share of the whole loss. The average over ranks,
of losses and of gradients, is then the whole batch's, whatever the sizes of the local batches; it is what
DistributedDataParallel and FSDP2 make of gradients.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from .. import _checks, _common, primitive
from .._class_sums import groups
from .._common import Reduction
from ..backends.base import Direction
from . import collectives
from .groups import Ranks

COMPACT_ABOVE = 16_384
"""With more classes than this the ranks exchange which of them occur, and compute and exchange sums of those alone.
Fewer classes are cheaper to exchange whole, and with them nothing has to be known about the other batches."""

_LEFT_OUT = -1


def contrast(
    features: Tensor,
    prototypes: Tensor,
    target: Tensor,
    inv_temperature: float | Tensor,
    *,
    direction: Direction,
    exclude: Literal["none", "target"],
    ignore_index: int,
    weight: Tensor | None,
    reduction: Reduction,
    ranks: Ranks | None,
    of_nothing: float = math.nan,
) -> Tensor:
    """:func:`nckernels.primitive.contrast` of the batches of all ``ranks``; None: of this process's.

    The prototypes are the same on all ranks. ``target`` and ``weight`` belong to this rank's features.
    """
    if ranks is None or direction == "instance":
        loss = primitive.contrast(
            features, prototypes, target, inv_temperature, direction=direction, exclude=exclude,
            ignore_index=ignore_index, weight=weight, of_nothing=of_nothing,
            reduction=reduction if ranks is None or reduction == "none" else "sum",
        )  # fmt: skip
        if ranks is None or reduction == "none":
            return loss
        own = _counted_weights(target != ignore_index, weight, loss)
        return _of_all(loss, own.sum(), reduction, ranks, of_nothing)

    if direction == "class" and len(prototypes) > COMPACT_ABOVE:
        prototypes, target = present_classes(prototypes, target, ignore_index, ranks)
        ignore_index = _LEFT_OUT
    lses, pos = primitive.cosine_lse(
        features, prototypes, target, inv_temperature, direction=direction, exclude=exclude, ignore_index=ignore_index
    )
    class_lse, instance_lse = lses if isinstance(lses, tuple) else (lses, None)
    return reduced_contrast(
        class_lse, instance_lse, pos, target, ignore_index=ignore_index, weight=weight, reduction=reduction,
        ranks=ranks, of_nothing=of_nothing,
    )  # fmt: skip


def reduced_contrast(
    class_lse: Tensor | None,
    instance_lse: Tensor | None,
    pos: Tensor,
    target: Tensor,
    *,
    ignore_index: int,
    weight: Tensor | None,
    reduction: Reduction,
    ranks: Ranks,
    of_nothing: float,
) -> Tensor:
    """The lse of each sample's class, its own, or their mean, minus ``pos``, reduced over the batches of all ranks.

    Args:
        class_lse: (K,), of this rank's samples; the others' are added here.
        instance_lse, pos, target: (M,), of this rank's samples.
    """
    ignored = target == ignore_index
    own = _counted_weights(~ignored, weight, pos)
    own_lse = None if instance_lse is None else instance_lse.masked_fill(ignored | (instance_lse == -torch.inf), 0.0)
    if class_lse is None:
        assert own_lse is not None
        return reduce_weighted(own * (own_lse - pos), own, reduction, ranks, of_nothing)
    classes = target.long().masked_fill(ignored, 0)
    if reduction == "none":
        uniformity = collectives.logsumexp(class_lse, ranks).index_select(0, classes)
        uniformity = uniformity.masked_fill(uniformity == -torch.inf, 0.0)
        return own * ((uniformity if own_lse is None else 0.5 * (uniformity + own_lse)) - pos)
    by_class = own.new_zeros(len(class_lse)).index_add(0, classes, own)
    share, total = collectives.shared_logsumexp(class_lse, by_class, ranks)
    if own_lse is not None:
        share = 0.5 * (share + own @ own_lse)
    return _mean_or_sum(share - own @ pos, total, reduction, ranks, of_nothing)


def reduce(
    loss: Tensor,
    counted: Tensor,
    weight: Tensor | None,
    reduction: Reduction,
    ranks: Ranks | None,
    of_nothing: float = math.nan,
) -> Tensor:
    """Weight and reduce this rank's per-sample losses, which are 0 where not ``counted``, over the batches of all."""
    if ranks is None:
        return _common.reduce(loss, counted, weight, reduction, of_nothing)
    own = _counted_weights(counted, weight, loss)
    return reduce_weighted(loss * own, own, reduction, ranks, of_nothing)


def reduce_weighted(
    weighted: Tensor, weight: Tensor, reduction: Reduction, ranks: Ranks | None, of_nothing: float = math.nan
) -> Tensor:
    """The same for losses that have their weights, 0 where not counted, already."""
    if reduction == "none":
        return weighted
    if ranks is not None:
        return _of_all(weighted.sum(), weight.sum(), reduction, ranks, of_nothing)
    return weighted.sum() if reduction == "sum" else _common.mean(weighted, weight, of_nothing)


def class_logsumexp(lse: Tensor, ranks: Ranks | None) -> Tensor:
    """(K,) log-sum-exp of each class over the samples of all ranks."""
    return lse if ranks is None else collectives.logsumexp(lse, ranks)


def present_classes(prototypes: Tensor, target: Tensor, ignore_index: int, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """The prototypes of the classes that occur on any rank, the same everywhere, and the targets as their indices.

    Ignored samples have target -1. Where the host does not know how many classes occur, on a GPU, there is a row for
    every sample of all ranks.
    """
    _checks.in_classes(target, len(prototypes), ignore_index)
    counts = collectives.sizes(target, ranks)
    if counts.total == 0:
        return prototypes[:1], target.long()
    everybody = collectives.gather(target.long(), counts, ranks)
    ignored = everybody == ignore_index
    slot, occurring = groups(everybody, ignored)
    classes = slot.new_zeros(occurring).scatter_(0, slot, everybody.masked_fill(ignored, 0))
    return prototypes.index_select(0, classes), slot.masked_fill(ignored, _LEFT_OUT)[counts.own]


def _counted_weights(counted: Tensor, weight: Tensor | None, like: Tensor) -> Tensor:
    """(M,) weights of the samples, 0 where not counted."""
    return counted.to(like.dtype) if weight is None else weight.to(like.dtype).where(counted, 0.0)


def _of_all(loss: Tensor, weight: Tensor, reduction: Reduction, ranks: Ranks, of_nothing: float) -> Tensor:
    """This rank's share of the whole, from its own sum of weighted losses and of weights."""
    total = collectives.all_reduce(weight, ranks) if reduction == "mean" else weight
    return _mean_or_sum(loss, total, reduction, ranks, of_nothing)


def _mean_or_sum(share: Tensor, total: Tensor, reduction: Reduction, ranks: Ranks, of_nothing: float) -> Tensor:
    if reduction == "sum":
        return ranks.size * share
    if of_nothing == 0.0:
        total = total.masked_fill(total == 0, 1)
    return ranks.size * (share / total)
