"""Losses with prototypes over the batches of all ranks; the ranks exchange a few numbers per class.

In the class direction each prototype is contrasted with all samples of all ranks. A rank sums the exponentials of its
own samples, and the ranks exchange the sums, K numbers. Everything else is local, the features and their gradients
included. In the instance direction each row is local, and only the mean spans the ranks.

With a group of R ranks every rank returns R times its own samples' share of the whole loss. The average over the ranks,
of losses and of gradients, is then that of the whole batch, whatever the sizes of the local batches.
DistributedDataParallel and FSDP2 average gradients in this way.
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
"""With more classes than this, and more classes than samples on all ranks, the ranks gather their labels, and compute
and exchange sums only for the classes that occur. With fewer classes it is cheaper to exchange all sums, for which the
ranks need not know each other's numbers of samples."""


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
    """:func:`nckernels.primitive.contrast` over the batches of all ``ranks``; None: over the batch of this process.

    The prototypes are replicated on all ranks or sharded over them. ``target`` and ``weight`` belong to this rank's
    features. A ``part`` of the prototypes allows one direction only.
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
    """A log-sum-exp of each sample minus ``pos``, reduced over the batches of all ranks.

    The log-sum-exp is that of the sample's class (``class_lse``), that of its row (``instance_lse``), or the mean of
    both.

    Args:
        class_lse: (K,), over this rank's samples; the other ranks' are added here.
        instance_lse, pos, target: (M,), of this rank's samples.
    """
    ignored = target == ignore_index
    own = _counted_weights(~ignored, weight, pos)
    own_lse = None if instance_lse is None else _common.or_zero(instance_lse)  # ignored samples sum nothing
    if class_lse is None:
        assert own_lse is not None
        return reduce_weighted(own * (own_lse - pos), own, reduction, ranks, of_nothing)
    classes = target.masked_fill(ignored, 0)
    if reduction == "none":
        uniformity = _common.or_zero(collectives.logsumexp(class_lse, ranks).index_select(0, classes))
        return own * ((uniformity if own_lse is None else 0.5 * (uniformity + own_lse)) - pos)
    by_class = own.new_zeros(len(class_lse)).index_add(0, classes, own)
    # Products and sums instead of inner products, which autocast would compute in 16 bits.
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
    """:func:`nckernels._common.reduce` of this rank's per-sample losses, over the batches of all ranks."""
    if ranks is None:
        return _common.reduce(loss, counted, weight, reduction, of_nothing)
    own = _counted_weights(counted, weight, loss)
    return reduce_weighted(loss * own, own, reduction, ranks, of_nothing)


def reduce_weighted(
    weighted: Tensor, weight: Tensor, reduction: Reduction, ranks: Ranks | None, of_nothing: float = math.nan
) -> Tensor:
    """:func:`reduce` for losses that are already multiplied by their weights, which are 0 for ignored samples."""
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

    With ``direction="both"`` the sum over all ranks' samples for the sample's class is added to the sum over the
    classes. ``reduction`` is the one that :func:`reduce` will apply to the results.
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
    """The prototypes, for further use, and the (d,) weighted sum of their unit rows, in the dtype of ``weight``."""
    if ranks is not None and _checks.is_dtensor(prototypes):
        return prototypes, class_parallel.sum_of_unit_rows(prototypes, weight, reduction, ranks)
    return _unit_rows.sum_of_unit_rows(prototypes, weight)


def part_of(prototypes: Tensor, target: Tensor, ignore_index: int, part: Part) -> tuple[Tensor, Tensor]:
    """The prototypes of a part of the classes, and the targets as indices into them, ``LEFT_OUT`` where ignored."""
    _checks.in_classes(target, len(prototypes), ignore_index)
    ignored = target == ignore_index
    classes, slot = choose(target, ignored, len(prototypes), part)
    return rows(prototypes, classes, part.sparse), slot.masked_fill(ignored, LEFT_OUT)


def present_classes(
    prototypes: Tensor, target: Tensor, ignore_index: int, counts: Sizes, ranks: Ranks, sparse: bool
) -> tuple[Tensor, Tensor]:
    """The prototypes of the classes that occur on any rank, and the targets as indices into them.

    The prototypes are the same on all ranks. Ignored samples have the target ``LEFT_OUT``. On a GPU the host does not
    know how many classes occur, and there is a row for every sample of all ranks.
    """
    _checks.in_classes(target, len(prototypes), ignore_index)
    everybody = collectives.gather(target, counts, ranks)
    ignored = everybody == ignore_index
    classes, slot = present(everybody, ignored)
    return rows(prototypes, classes, sparse), slot.masked_fill(ignored, LEFT_OUT)[counts.own]


def _counted_weights(counted: Tensor | None, weight: Tensor | None, like: Tensor) -> Tensor:
    """(M,) weights of the samples, 0 for ignored ones."""
    if counted is None:
        return torch.ones_like(like) if weight is None else weight.to(like.dtype)
    return counted.to(like.dtype) if weight is None else weight.to(like.dtype).where(counted, 0.0)


def _of_all(loss: Tensor, weight: Tensor, reduction: Reduction, ranks: Ranks, of_nothing: float) -> Tensor:
    """This rank's loss, from its own sum of weighted losses and its own sum of weights."""
    total = collectives.all_reduce(weight, ranks) if reduction == "mean" else weight
    return _mean_or_sum(loss, total, reduction, ranks, of_nothing)


def _mean_or_sum(share: Tensor, total: Tensor, reduction: Reduction, ranks: Ranks, of_nothing: float) -> Tensor:
    if reduction == "sum":
        return ranks.size * share
    nothing = total == 0
    mean = ranks.size * (share / total.masked_fill(nothing, 1))
    return mean.masked_fill(nothing, of_nothing)
