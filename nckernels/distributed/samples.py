"""Samples of all ranks contrasted with one another: each rank has its own rows as anchors, and everybody's as keys.

Keys travel, (N, d) numbers of all ranks; the matrix of similarities never does, and a rank makes its own part of it
tile by tile. The gradients of the keys go back, summed, to the ranks that own them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .._class_sums import groups, mean_positive
from .._common import logaddexp, unit
from ..backends import registry
from ..backends.reference import masked_logsumexp
from ..primitive import cosine_lse
from . import collectives
from .collectives import Sizes
from .groups import Ranks

_LEFT_OUT = -1


class Keys(NamedTuple):
    """The rows of all ranks, in the order of the ranks."""

    rows: Tensor
    """(N, d)."""
    counts: Sizes

    def own(self) -> Tensor:
        """(n,) indices of this rank's own rows."""
        own = self.counts.own
        return torch.arange(own.start, own.stop, device=self.rows.device)


def gather_keys(rows: Tensor, ranks: Ranks) -> Keys:
    """(n_r, d) of every rank -> (N, d); the gradient of a key returns to its rank, summed over all."""
    counts = collectives.sizes(rows, ranks)
    return Keys(collectives.gather(rows, counts, ranks), counts)


def keys_of(rows: Tensor, ranks: Ranks | None) -> tuple[Tensor, Tensor]:
    """Everybody's rows (N, d), and which of them are this rank's (n,). Without ranks: these rows, all of them."""
    if ranks is None:
        return rows, torch.arange(len(rows), device=rows.device)
    keys = gather_keys(rows, ranks)
    return keys.rows, keys.own()


def distinct_labels(labels: Tensor, ranks: Ranks) -> Tensor:
    """Labels that count this rank's samples from 0, as numbers that no other rank has."""
    return labels + collectives.sizes(labels, ranks).own.start


def groups_of_all(labels: Tensor, ignored: Tensor, ranks: Ranks) -> tuple[Tensor, int]:
    """:func:`nckernels._class_sums.groups` of the labels of all ranks: this rank's, and the number of classes."""
    counts = collectives.sizes(labels, ranks)
    if counts.total == 0:
        return labels, 1
    everybody, all_ignored = (collectives.gather(x, counts, ranks) for x in (labels, ignored))
    group, classes = groups(everybody, all_ignored)
    return group[counts.own], classes


def supcon_terms(
    rows: Tensor, labels: Tensor, ignore_index: int, inv_temperature: float | Tensor, ranks: Ranks, *, decoupled: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What SupCon needs of this rank's samples among those of all ranks.

    Args:
        rows: (n, d) of this rank, any number of them.
        labels: (n,) labels that mean the same on all ranks.

    Returns:
        (n,) log-sum-exp over the other samples, or the samples of other labels (``decoupled``); (n,) mean cosine with
        the other samples of the label; (n,) whether there are any.
    """
    ignored = labels == ignore_index
    keys = gather_keys(rows.masked_fill(ignored[:, None], 0.0), ranks)  # ignored rows may hold anything
    key_labels = collectives.gather(labels, keys.counts, ranks)
    key_ignored = key_labels == ignore_index
    if keys.counts.total == 0:
        lse = rows.new_zeros(0)
        return lse, lse, ignored
    group, classes = groups(key_labels, key_ignored)
    cosine, has_positive = mean_positive(
        rows, group[keys.counts.own], classes, ignored, everybody=(keys.rows, group, key_ignored)
    )
    if decoupled:
        lse = _lse_of_other_labels(rows, labels, keys.rows, key_labels, ignore_index, inv_temperature)
    else:
        lse, _ = cosine_lse(
            rows, keys.rows, keys.own().masked_fill(ignored, _LEFT_OUT), inv_temperature, direction="instance",
            exclude="target", logit_bias=_left_out(key_ignored, cosine), ignore_index=_LEFT_OUT,
        )  # fmt: skip
    return lse, cosine, has_positive


def _left_out(ignored: Tensor, like: Tensor) -> Tensor | None:
    """A bias that takes ignored keys out of the sums; None where the host knows that there are none."""
    known = ignored.device.type == "cpu" and not torch.compiler.is_compiling()
    if known and not bool(ignored.any()):
        return None
    return like.new_zeros(len(ignored)).masked_fill(ignored, -torch.inf)


def _lse_of_other_labels(
    rows: Tensor,
    labels: Tensor,
    keys: Tensor,
    key_labels: Tensor,
    ignore_index: int,
    inv_temperature: float | Tensor,
) -> Tensor:
    """Log-sum-exp over the keys of other labels, by tiles of keys that the backward pass makes again.

    The primitive has this mask for samples against themselves only: its rows and columns share their labels.
    """
    u = unit(rows)
    counted = (labels != ignore_index)[:, None]

    def tile(u: Tensor, keys: Tensor, key_labels: Tensor, beta: float | Tensor) -> Tensor:
        allowed = counted & (labels[:, None] != key_labels) & (key_labels != ignore_index)
        return masked_logsumexp(beta * (u @ unit(keys).T), allowed, dim=1)

    width = max(1, registry.get_workspace(rows.device) // (4 * u.element_size() * max(1, len(rows))))
    lse = u.new_full((len(rows),), -torch.inf)
    for block, block_labels in zip(keys.split(width), key_labels.split(width), strict=True):
        lse = logaddexp(lse, checkpoint(tile, u, block, block_labels, inv_temperature, use_reentrant=False))
    return lse
