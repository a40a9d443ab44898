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

from .. import _checks, _common, _unit_rows, primitive
from .._common import Reduction
from .._compact import LEFT_OUT, Part, choose, present, rows
from ..backends.base import Direction
from . import class_parallel, collectives
from .collectives import Sizes
from .groups import Ranks

COMPACT_ABOVE = 16_384
"""With more classes than this, and than samples on all ranks, the ranks exchange which of them occur, and compute and
exchange sums of those alone. Fewer classes are cheaper to exchange whole, and with so few that they always are nothing
has to be known about the other batches."""


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
    part: Part | None = None,
    of_nothing: float = math.nan,
) -> Tensor:
    """:func:`nckernels.primitive.contrast` of the batches of all ``ranks``; None: of this process's.

    The prototypes are the same on all ranks, or spread over them. ``target`` and ``weight`` belong to this rank's
    features. With a ``part`` of the prototypes there is one direction.
    """
    if ranks is not None and _checks.is_dtensor(prototypes):
        lse, pos = class_parallel.lse_of_samples(
            features, prototypes, target, inv_temperature, direction=direction, exclude=exclude,
            ignore_index=ignore_index, reduction=reduction, part=part, ranks=ranks,
        )  # fmt: skip
        return reduced_contrast(
            None, lse, pos, target, ignore_index=ignore_index, weight=weight, reduction=reduction, ranks=ranks,
            of_nothing=of_nothing,
        )  # fmt: skip
    if part is not None and (ranks is None or direction == "instance"):
        prototypes, target = part_of(prototypes, target, ignore_index, part)
        ignore_index = LEFT_OUT
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

    if direction == "class" and (part is not None or len(prototypes) > COMPACT_ABOVE):
        counts = collectives.sizes(target, ranks)
        if part is not None or counts.total < len(prototypes):
            sparse = part is not None and part.sparse
            prototypes, target = present_classes(prototypes, target, ignore_index, counts, ranks, sparse)
            ignore_index = LEFT_OUT
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
    classes = target.masked_fill(ignored, 0)
    if reduction == "none":
        uniformity = _common.or_zero(collectives.logsumexp(class_lse, ranks).index_select(0, classes))
        return own * ((uniformity if own_lse is None else 0.5 * (uniformity + own_lse)) - pos)
    by_class = own.new_zeros(len(class_lse)).index_add(0, classes, own)
    # Products and sums, no inner products: autocast would take those in 16 bits.
    share, total = collectives.shared_logsumexp(class_lse, by_class, ranks)
    if own_lse is not None:
        share = 0.5 * (share + (own * own_lse).sum())
    return _mean_or_sum(share - (own * pos).sum(), total, reduction, ranks, of_nothing)


def reduce(
    loss: Tensor,
    counted: Tensor | None,
    weight: Tensor | None,
    reduction: Reduction,
    ranks: Ranks | None,
    of_nothing: float = math.nan,
) -> Tensor:
    """:func:`nckernels._common.reduce` of this rank's per-sample losses over the batches of all."""
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
    if reduction == "sum":
        return weighted.sum()
    total = weight.sum()  # with label smoothing the losses need not be 0 where it is
    return (weighted.sum() / total).masked_fill(total == 0, of_nothing)


def lse_of_samples(
    features: Tensor,
    prototypes: Tensor,
    target: Tensor,
    inv_temperature: float | Tensor,
    *,
    direction: Literal["instance", "both"],
    exclude: Literal["none", "target"],
    ignore_index: int,
    reduction: Reduction,
    part: Part | None,
    ranks: Ranks | None,
) -> tuple[Tensor, Tensor]:
    """(M,) log-sum-exp over the classes for each of this rank's samples, and (M,) its positive logit.

    With ``direction="both"`` the sum over all ranks' samples for the sample's class is added to that over the classes.
    ``reduction`` is what will be done with the results by :func:`reduce`.
    """
    if ranks is not None and _checks.is_dtensor(prototypes):
        return class_parallel.lse_of_samples(
            features, prototypes, target, inv_temperature, direction=direction, exclude=exclude,
            ignore_index=ignore_index, reduction=reduction, part=part, ranks=ranks,
        )  # fmt: skip
    if part is not None:
        prototypes, target = part_of(prototypes, target, ignore_index, part)
        ignore_index = LEFT_OUT
    lses, pos = primitive.cosine_lse(
        features, prototypes, target, inv_temperature, direction=direction, exclude=exclude, ignore_index=ignore_index
    )
    if not isinstance(lses, tuple):
        return lses, pos
    class_lse, instance_lse = lses
    if ranks is not None:
        class_lse = collectives.logsumexp(class_lse, ranks)
    own_class = target.masked_fill(target == ignore_index, 0)
    return _common.logaddexp(class_lse.index_select(0, own_class), instance_lse), pos


def sum_of_unit_rows(
    prototypes: Tensor, weight: Tensor, reduction: Reduction, ranks: Ranks | None
) -> tuple[Tensor, Tensor]:
    """The prototypes, for what else is done with them, and the (d,) weighted sum of their unit rows, in the dtype of
    the (K,) weights."""
    if ranks is not None and _checks.is_dtensor(prototypes):
        return prototypes, class_parallel.sum_of_unit_rows(prototypes, weight, reduction, ranks)
    return _unit_rows.sum_of_unit_rows(prototypes, weight)


def part_of(prototypes: Tensor, target: Tensor, ignore_index: int, part: Part) -> tuple[Tensor, Tensor]:
    """The prototypes of some classes, and the targets as their indices, ``LEFT_OUT`` where ignored."""
    _checks.in_classes(target, len(prototypes), ignore_index)
    ignored = target == ignore_index
    classes, slot = choose(target, ignored, len(prototypes), part)
    return rows(prototypes, classes, part.sparse), slot.masked_fill(ignored, LEFT_OUT)


def present_classes(
    prototypes: Tensor, target: Tensor, ignore_index: int, counts: Sizes, ranks: Ranks, sparse: bool
) -> tuple[Tensor, Tensor]:
    """The prototypes of the classes that occur on any rank, the same everywhere, and the targets as their indices.

    Ignored samples have target -1. Where the host does not know how many classes occur, on a GPU, there is a row for
    every sample of all ranks.
    """
    _checks.in_classes(target, len(prototypes), ignore_index)
    everybody = collectives.gather(target, counts, ranks)
    ignored = everybody == ignore_index
    classes, slot = present(everybody, ignored)
    return rows(prototypes, classes, sparse), slot.masked_fill(ignored, LEFT_OUT)[counts.own]


def _counted_weights(counted: Tensor | None, weight: Tensor | None, like: Tensor) -> Tensor:
    """(M,) weights of the samples, 0 where not counted."""
    if counted is None:
        return torch.ones_like(like) if weight is None else weight.to(like.dtype)
    return counted.to(like.dtype) if weight is None else weight.to(like.dtype).where(counted, 0.0)


def _of_all(loss: Tensor, weight: Tensor, reduction: Reduction, ranks: Ranks, of_nothing: float) -> Tensor:
    """This rank's share of the whole, from its own sum of weighted losses and of weights."""
    total = collectives.all_reduce(weight, ranks) if reduction == "mean" else weight
    return _mean_or_sum(loss, total, reduction, ranks, of_nothing)


def _mean_or_sum(share: Tensor, total: Tensor, reduction: Reduction, ranks: Ranks, of_nothing: float) -> Tensor:
    if reduction == "sum":
        return ranks.size * share
    nothing = total == 0
    mean = ranks.size * (share / total.masked_fill(nothing, 1))
    return mean.masked_fill(nothing, of_nothing)
