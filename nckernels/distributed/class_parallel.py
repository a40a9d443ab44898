"""Prototypes sharded over ranks: every rank holds the rows of some classes.

The prototypes are a :class:`torch.distributed.tensor.DTensor` with placement ``Shard(0)`` on a mesh of one dimension,
the ranks of the loss. Features and labels are gathered, prototypes never: a rank computes the columns of its own
classes for the samples of all ranks. A sum over the samples is complete on the rank that holds the class. A sum over
the classes is combined from the ranks' parts, one number per sample. Every rank then takes the results of its own
samples.

The gradient of a rank's prototypes is that of the whole loss, and must not be averaged. The other gradients follow
:mod:`nckernels.distributed.contrast`: their average over the ranks is that of the whole batch. A rank's loss is R times
its share of the whole, so the gradient that flows back to the prototypes is multiplied by 1 / R.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _checks, _unit_rows
from .._common import Reduction, logaddexp
from .._compact import LEFT_OUT, Part, choose, present, rows
from ..backends.base import Direction
from ..primitive import autocast, cosine_lse
from . import collectives
from .collectives import Sizes
from .groups import Ranks


class Shard(NamedTuple):
    """A rank's prototypes."""

    rows: Tensor
    """(k, d); k may be 0."""
    first: int
    """The class of the first row."""


class Batch(NamedTuple):
    """The samples of all ranks."""

    features: Tensor
    target: Tensor
    """Labels minus the first class of this rank."""
    ignored: Tensor
    own: Tensor
    """Whether this rank holds the sample's class."""
    counts: Sizes


def prepared(prototypes: Tensor, ranks: Ranks | None, sparse: bool) -> Tensor:
    """Check the prototypes: a plain tensor is returned unchanged, a DTensor must be sharded over exactly these ranks.

    Raises:
        ValueError: if a DTensor has another placement or other ranks, or ``sparse`` is asked for.
    """
    if not _checks.is_dtensor(prototypes):
        return prototypes
    from torch.distributed import tensor as dtensor

    assert isinstance(prototypes, dtensor.DTensor)
    mesh, placements = prototypes.device_mesh, prototypes.placements
    if mesh.ndim != 1 or not placements[0].is_shard(0):
        raise ValueError(
            "prototypes that are a DTensor must have the placement Shard(0) on a mesh of one dimension, "
            f"got {placements} on a mesh of shape {tuple(mesh.shape)}"
        )
    theirs = mesh.mesh.tolist()
    ours = [dist.get_rank()] if ranks is None else dist.get_process_group_ranks(ranks.group)
    if theirs != ours:
        raise ValueError(
            f"prototypes are a DTensor on the ranks {theirs}, and process_group must have the same ones, got {ours}"
        )
    if sparse:
        raise ValueError("sparse=True needs prototypes that are a plain tensor: a DTensor has no sparse gradient")
    return prototypes.to_local() if ranks is None else prototypes


def lse_of_samples(
    features: Tensor,
    prototypes: Tensor,
    target: Tensor,
    inv_temperature: float | Tensor,
    *,
    direction: Direction,
    exclude: Literal["none", "target"],
    ignore_index: int,
    reduction: Reduction,
    part: Part | None,
    ranks: Ranks,
) -> tuple[Tensor, Tensor]:
    """:func:`nckernels.distributed.contrast.lse_of_samples` for prototypes that are sharded over the ranks."""
    scale = _scale(reduction, ranks)
    beta = _scaled_grad(inv_temperature, scale) if isinstance(inv_temperature, Tensor) else inv_temperature
    shard = _shard(prototypes, ranks)
    batch = _everybody(_scaled_grad(features, scale), target, shard, len(prototypes), ignore_index, ranks)
    whole: list[Tensor] = []
    if direction != "instance":
        lse, pos = _over_samples(batch, shard, beta, exclude)
        lse, pos = collectives.all_reduce(torch.stack([lse, pos]), ranks)
        whole.append(lse)
    if direction != "class":
        lse, found = _over_classes(batch, shard, beta, exclude, part)
        whole.append(collectives.logsumexp(lse, ranks))
        if direction == "instance":
            pos = collectives.all_reduce(found, ranks)
    lse = whole[0] if len(whole) == 1 else logaddexp(*whole)
    own = batch.counts.own
    return _scaled_grad(lse[own], 1 / scale), _scaled_grad(pos[own], 1 / scale)


def sum_of_unit_rows(prototypes: Tensor, weight: Tensor, reduction: Reduction, ranks: Ranks) -> Tensor:
    """(d,) weighted sum of all unit prototypes; ``weight`` (K,) is the same on all ranks."""
    scale, shard = _scale(reduction, ranks), _shard(prototypes, ranks)
    weight = _scaled_grad(weight[shard.first :][: len(shard.rows)], scale)
    total = collectives.all_reduce(_unit_rows.sum_of_unit_rows(shard.rows, weight)[1], ranks)
    return _scaled_grad(total, 1 / scale)


# --- steps -------------------------------------------------------------------------------------------------


def _shard(prototypes: Any, ranks: Ranks) -> Shard:
    """This rank's shard. DTensor splits rows as :func:`torch.chunk` does; the last ranks may have none."""
    local, classes = prototypes.to_local(), len(prototypes)
    size = -(-classes // ranks.size)
    first = min(ranks.rank * size, classes)
    if len(local) != min(size, classes - first):
        raise ValueError(
            f"prototypes: rank {ranks.rank} of {ranks.size} must have {min(size, classes - first)} of {classes} rows, "
            f"as distribute_tensor gives them, got {len(local)}"
        )
    return Shard(local, first)


def _everybody(features: Tensor, target: Tensor, shard: Shard, classes: int, ignore_index: int, ranks: Ranks) -> Batch:
    counts = collectives.sizes(features, ranks)
    everybody = collectives.gather(autocast(features), counts, ranks)
    labels = collectives.gather(target, counts, ranks)
    _checks.in_classes(labels, classes, ignore_index)  # on every rank, so that all of them raise
    ignored = labels == ignore_index
    if labels.device.type == "cuda":
        good = ignored | ((labels >= 0) & (labels < classes))
        torch._assert_async(good.all(), "target must lie in [0, K) or equal ignore_index")
    labels = labels - shard.first
    own = ~ignored & (labels >= 0) & (labels < len(shard.rows))
    return Batch(everybody, labels, ignored, own, counts)


def _over_samples(
    batch: Batch, shard: Shard, beta: float | Tensor, exclude: Literal["none", "target"]
) -> tuple[Tensor, Tensor]:
    """(M,) log-sum-exp over the samples for the class of each, and its positive logit; 0 for classes of other ranks.

    Samples whose class another rank holds are only negatives here. They are assigned to one extra prototype, whose
    results are not used.
    """
    k = len(shard.rows)
    if k <= len(batch.target):
        some, slot = F.pad(shard.rows, (0, 0, 0, 1)), batch.target.where(batch.own, k)
    else:
        classes, slot = present(batch.target, ~batch.own)
        some = rows(shard.rows, classes, sparse=False)
    lse, pos = cosine_lse(
        batch.features, some, slot.masked_fill(batch.ignored, LEFT_OUT), beta, direction="class", exclude=exclude,
        present_only=True, ignore_index=LEFT_OUT,
    )  # fmt: skip
    return lse.index_select(0, slot).where(batch.own, 0.0), pos.where(batch.own, 0.0)


def _over_classes(
    batch: Batch, shard: Shard, beta: float | Tensor, exclude: Literal["none", "target"], part: Part | None
) -> tuple[Tensor, Tensor]:
    """(M,) log-sum-exp over this rank's classes, and positive logits, 0 for classes of other ranks."""
    k = len(shard.rows)
    if k == 0:  # a dummy prototype, so that this rank takes part in the collectives that follow
        some, slot = F.pad(shard.rows, (0, 0, 0, 1)), torch.zeros_like(batch.target)
    elif part is None:
        some, slot = shard.rows, batch.target.where(batch.own, batch.target % k)
    else:
        classes, slot = choose(batch.target, ~batch.own, k, part)
        some, slot = rows(shard.rows, classes, sparse=False), slot.where(batch.own, batch.target % len(classes))
    lse, pos = cosine_lse(
        batch.features, some, slot.masked_fill(batch.ignored, LEFT_OUT), beta, direction="instance", exclude=exclude,
        ignore_index=LEFT_OUT,
    )  # fmt: skip
    if exclude == "target":
        # A sample of another rank's class had an arbitrary class of this rank excluded; add that term back.
        lse = lse.where(batch.own, logaddexp(lse, pos))
    if k == 0:
        lse = lse.masked_fill(torch.ones_like(batch.own), -torch.inf)
    return lse, pos.where(batch.own, 0.0)


def _scale(reduction: Reduction, ranks: Ranks) -> int:
    """The factor between a rank's loss and its share of the whole."""
    return 1 if reduction == "none" else ranks.size


def _scaled_grad(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else _ScaledGrad.apply(x, factor)  # type: ignore[no-any-return, no-untyped-call]


class _ScaledGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad * ctx.factor, None
