"""Samples of all ranks contrasted with each other: a rank's own rows are the anchors, the rows of all ranks the keys.

The ranks exchange the keys, (N, d) numbers in all. Each rank computes its rows of the similarity matrix tile by tile.
The gradients of the keys are summed and sent back to the ranks that own the keys.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from .. import _checks, primitive
from .._class_sums import add_unit_rows, grad_of_unit_rows, groups, mean_positive, without_ignored
from .._common import Reduction, logaddexp, unit
from .._compact import LEFT_OUT
from ..backends import registry
from ..backends.base import Reduced, accumulation_dtype
from ..backends.reference import masked_logsumexp
from ..primitive import autocast, cosine_lse
from . import collectives, ring
from .collectives import Sizes
from .contrast import contrast, reduced_contrast
from .groups import Ranks


def groups_of_all(labels: Tensor, ignore_index: int, ranks: Ranks) -> tuple[Tensor, int]:
    """:func:`nckernels._class_sums.groups` of the labels of all ranks: this rank's, and the number of classes."""
    counts = collectives.sizes(labels, ranks)
    if counts.total == 0:
        return labels, 1
    everybody = collectives.gather(labels, counts, ranks)
    group, classes = groups(everybody, everybody == ignore_index)
    return group[counts.own], classes


def contrast_keys(
    query: Tensor,
    key: Tensor,
    target: Tensor,
    inv_temperature: float | Tensor,
    *,
    direction: Literal["instance", "both"],
    exclude: Literal["none", "target"],
    ignore_index: int,
    weight: Tensor | None,
    reduction: Reduction,
    ranks: Ranks | None,
) -> Tensor:
    """:func:`nckernels.primitive.contrast` of this rank's queries with the keys of all ranks; a mean of nothing is 0.

    Args:
        query: (M, d), the queries of this rank.
        key: (K, d), the keys of this rank.
        target: (M,) index of each query's positive among this rank's keys.
    """
    if ranks is None:
        return primitive.contrast(
            query, key, target, inv_temperature, direction=direction, exclude=exclude, ignore_index=ignore_index,
            weight=weight, reduction=reduction, of_nothing=0.0,
        )  # fmt: skip
    _checks.in_classes(target, len(key), ignore_index)
    query, key = autocast(query), autocast(key)
    counts = collectives.sizes(key, ranks)
    ignored = target == ignore_index
    among_all = (target + counts.own.start).masked_fill(ignored, LEFT_OUT)
    if counts.total == 0:
        # No query can have a positive. The result is zero, and all inputs get gradients of zero.
        nothing = (unit(query).sum(1) + unit(key).sum()) * inv_temperature
        nothing = nothing.masked_fill(torch.ones_like(ignored), 0.0)
        return nothing if reduction == "none" else nothing.sum()
    if not _travel(key, counts):
        keys = collectives.gather(key, counts, ranks)
        return contrast(
            query, keys, among_all, inv_temperature, direction=direction, exclude=exclude, ignore_index=LEFT_OUT,
            weight=weight, reduction=reduction, ranks=ranks, of_nothing=0.0,
        )  # fmt: skip
    class_lse, instance_lse, pos, _ = ring.lse(
        query, key, target.masked_fill(ignored, LEFT_OUT), inv_temperature, counts, ranks,
        direction=direction, exclude=exclude, ignore_index=LEFT_OUT,
    )  # fmt: skip
    return reduced_contrast(
        class_lse if direction == "both" else None, instance_lse, pos, among_all, ignore_index=LEFT_OUT,
        weight=weight, reduction=reduction, ranks=ranks, of_nothing=0.0,
    )  # fmt: skip


def supcon_terms(
    rows: Tensor,
    labels: Tensor,
    ignore_index: int,
    inv_temperature: float | Tensor,
    ranks: Ranks,
    *,
    distinct: bool,
    decoupled: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The terms of SupCon for this rank's samples among those of all ranks.

    Args:
        rows: (n, d), the rows of this rank.
        labels: (n,) labels that mean the same on all ranks, or, if ``distinct``, number its samples from 0.

    Returns:
        (n,) log-sum-exp over the other samples, or with ``decoupled`` over the samples of other labels; (n,) mean
        cosine with the other samples of the label; (n,) whether there are any, without which the others do not count.
    """
    counts = collectives.sizes(rows, ranks)
    if distinct:
        labels = labels + counts.own.start
    ignored = labels == ignore_index
    visible = without_ignored(rows, ignored)
    everybody = collectives.gather(labels, counts, ranks)
    all_ignored = everybody == ignore_index
    if counts.total == 0:
        nothing = unit(visible).sum(1)
        return nothing, nothing, ignored
    group, classes, key_group = _groups_here(labels, ignored, everybody)
    of_class = visible.new_zeros(classes, dtype=accumulation_dtype(visible.dtype))
    of_class.index_add_(0, key_group.clamp_min(0), (key_group >= 0).to(of_class.dtype))
    if decoupled:
        keys = collectives.gather(visible, counts, ranks)
        sums = _UnitSums.apply(keys, key_group, classes, counts)  # type: ignore[no-untyped-call]
        positives = mean_positive(visible, group, ignored, classes, among=(sums, of_class))
        lse = _lse_of_other_labels(visible, labels, keys, everybody, ignore_index, inv_temperature)
        return lse, *positives
    bias = _left_out(all_ignored, visible)
    lse, sums = _over_others(visible, ignored, inv_temperature, counts, ranks, bias, key_group, classes)
    return lse, *mean_positive(visible, group, ignored, classes, among=(sums, of_class))


def lse_of_pairs(rows: Tensor, inv_temperature: float, ranks: Ranks | None) -> tuple[Tensor, int]:
    """Log-sum-exp over all pairs of samples of all ranks, -inf without pairs, and the number of samples."""
    alone = Sizes((len(rows),), 0, registry.get_workspace(rows.device))
    counts = alone if ranks is None else collectives.sizes(rows, ranks)
    if counts.total < 2:
        return rows.new_full((), -torch.inf), counts.total
    if ranks is not None:
        lse = _over_others(autocast(rows), None, inv_temperature, counts, ranks)[0]
        return collectives.logsumexp(torch.logsumexp(lse, 0), ranks), counts.total
    own = torch.arange(len(rows), device=rows.device)
    whole = primitive.step(
        rows, rows, own, inv_temperature, Reduced(None, mean=False, of_nothing=0.0, joined=True), direction="instance",
        exclude="self", ignore_index=LEFT_OUT,
    )  # fmt: skip
    if whole is None:
        lse, _ = cosine_lse(rows, rows, own, inv_temperature, direction="instance", exclude="self")
        whole = torch.logsumexp(lse, 0)
    return whole, counts.total


def _over_others(
    rows: Tensor,
    ignored: Tensor | None,
    inv_temperature: float | Tensor,
    counts: Sizes,
    ranks: Ranks,
    bias: Tensor | None = None,
    key_group: Tensor | None = None,
    classes: int = 0,
) -> tuple[Tensor, Tensor]:
    """(n,) log-sum-exp of this rank's rows over all others, and (classes, d) sums of the unit rows of each group.

    The rows of all ranks are gathered, or circulate in the ring.
    """
    travel = _travel(rows, counts)
    first = 0 if travel else counts.own.start  # index of this rank's first row among the keys
    own = torch.arange(first, first + len(rows), device=rows.device)
    if ignored is not None:
        own = own.masked_fill(ignored, LEFT_OUT)
    if travel:
        _, lse, _, sums = ring.lse(
            rows, rows, own, inv_temperature, counts, ranks, direction="instance", exclude="target",
            ignore_index=LEFT_OUT, key_bias=bias, key_group=key_group, groups=classes,
        )  # fmt: skip
        return lse, sums
    keys = collectives.gather(rows, counts, ranks)
    # Before the log-sum-exp, so that its backward pass runs after the log-sum-exp's, which frees memory first.
    sums = rows.new_zeros(0) if key_group is None else _UnitSums.apply(keys, key_group, classes, counts)  # type: ignore[no-untyped-call]
    lse, _ = cosine_lse(
        rows, keys, own, inv_temperature, direction="instance", exclude="target", logit_bias=bias,
        ignore_index=LEFT_OUT,
    )  # fmt: skip
    return lse, sums


def _travel(keys: Tensor, counts: Sizes) -> bool:
    """Whether keys circulate in a ring instead of being gathered: if all of them exceed the smallest workspace.

    The reference backend and compilers always gather, because they trace every operation.
    """
    if torch.compiler.is_compiling() or registry.resolve(keys.device, keys.dtype) == registry.REFERENCE:
        return False
    return counts.total * keys.shape[1] * keys.element_size() > counts.workspace


def _groups_here(labels: Tensor, ignored: Tensor, everybody: Tensor) -> tuple[Tensor, int, Tensor]:
    """Groups of this rank's labels, their number, and the group of each label of all ranks, -1 if it is not here.

    Ignored labels have no group: those of this rank are not among the labels that are looked through.
    """
    nothing = torch.iinfo(torch.int64).max
    if len(labels) == 0:
        return labels, 1, torch.full_like(everybody, -1)
    group, classes = groups(labels, ignored)
    in_order = labels.new_full((classes,), nothing).scatter_(0, group, labels.masked_fill(ignored, nothing))
    found = torch.searchsorted(in_order, everybody).clamp_max(classes - 1)
    return group, classes, found.masked_fill(in_order[found] != everybody, -1)


class _UnitSums(torch.autograd.Function):
    """(groups, d) sums of each group's unit keys, block by block; only the gradient is as large as the keys."""

    @staticmethod
    def forward(ctx: Any, keys: Tensor, key_group: Tensor, groups: int, counts: Sizes) -> Tensor:
        sums = keys.new_zeros(groups, keys.shape[1], dtype=accumulation_dtype(keys.dtype))
        for block, group in zip(keys.split(counts.counts), key_group.split(counts.counts), strict=True):
            add_unit_rows(sums, block, group)
        ctx.counts = counts
        ctx.save_for_backward(keys, key_group)
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        keys, key_group = ctx.saved_tensors
        found = torch.empty_like(keys)
        for block, group, part in zip(*(x.split(ctx.counts.counts) for x in (keys, key_group, found)), strict=True):
            part.copy_(grad_of_unit_rows(grad, block, group))
        return found, None, None, None


def _left_out(ignored: Tensor, like: Tensor) -> Tensor | None:
    """A bias that removes ignored keys from the sums; None if the host knows that there are none."""
    if _checks.host_knows(ignored) and not bool(ignored.any()):
        return None
    return like.new_zeros(len(ignored), dtype=accumulation_dtype(like.dtype)).masked_fill(ignored, -torch.inf)


def _lse_of_other_labels(
    rows: Tensor,
    labels: Tensor,
    keys: Tensor,
    key_labels: Tensor,
    ignore_index: int,
    inv_temperature: float | Tensor,
) -> Tensor:
    """Log-sum-exp over the keys of other labels, in tiles that the backward pass recomputes; any number for an ignored
    row.

    The primitive has this mask only for samples against themselves, where rows and columns share their labels.
    """
    u = unit(rows)

    def tile(u: Tensor, keys: Tensor, key_labels: Tensor, beta: float | Tensor) -> Tensor:
        allowed = (labels[:, None] != key_labels) & (key_labels != ignore_index)
        return masked_logsumexp(beta * (u @ unit(keys).T), allowed, dim=1)

    width = max(1, registry.get_workspace(rows.device) // (4 * u.element_size() * max(1, len(rows))))
    lse = u.new_full((len(rows),), -torch.inf)
    for block, block_labels in zip(keys.split(width), key_labels.split(width), strict=True):
        again = checkpoint(
            tile, u, block, block_labels, inv_temperature, use_reentrant=False, preserve_rng_state=False
        )  # fmt: skip
        lse = logaddexp(lse, again)
    return lse
