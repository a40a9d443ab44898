"""Some of the prototypes as a matrix of their own: those of the classes in a batch, perhaps with others at random.

A loss in the class direction needs no others than those of the batch, and a sampled softmax is content with a few more.
Nothing that follows is then as large as K, and the gradient of the prototypes can be sparse.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._class_sums import groups

LEFT_OUT = -1
"""In place of the slot of a sample that takes no part."""

_GREATEST = torch.iinfo(torch.int32).max


def present(target: Tensor, left_out: Tensor) -> tuple[Tensor, Tensor]:
    """(S,) classes that occur, in ascending order, and (M,) the slot among them of each sample's class.

    Samples that are ``left_out`` may have any target, and have some slot. A GPU's host does not know how many classes
    occur: there are M slots there. A slot without a class of its own repeats the greatest one, or class 0 where there
    is none, so that the rows of other classes are left alone.
    """
    target = target.long()
    if target.numel() == 0:
        return target.new_zeros(1), target
    slot, slots = groups(target, left_out)
    greatest = target.masked_fill(left_out, 0).amax()
    # who is left out shares a slot, behind those in use
    return greatest.repeat(slots).scatter_(0, slot, target.where(~left_out, greatest)), slot


def sampled(
    target: Tensor, left_out: Tensor, num_classes: int, fraction: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Like :func:`present`, but with other classes: max(ceil(fraction K), min(M, K)) in all.

    Every class gets a random key, or the greatest one if it occurs; those with the greatest keys are taken.
    """
    target = target.long().masked_fill(left_out, 0)
    count = max(math.ceil(fraction * num_classes), min(target.numel(), num_classes))
    keys = torch.randint(_GREATEST, (num_classes,), dtype=torch.int32, device=target.device, generator=generator)
    keys.scatter_reduce_(0, target, _GREATEST * (~left_out).int(), "amax")
    classes = keys.topk(count, sorted=False).indices.sort().values
    return classes, torch.searchsorted(classes, target)


class Part(NamedTuple):
    """Which of the prototypes a loss looks at."""

    fraction: float
    """0 for the classes of the batch and no others; else see :func:`sampled`."""
    generator: torch.Generator | None
    sparse: bool
    """Whether their gradient is a sparse tensor."""


BATCH_SPARSE = Part(0.0, None, True)


def choose(target: Tensor, left_out: Tensor, num_classes: int, part: Part) -> tuple[Tensor, Tensor]:
    """(S,) classes, and (M,) the slot of each sample's class among them."""
    if part.fraction:
        return sampled(target, left_out, num_classes, part.fraction, part.generator)
    return present(target, left_out)


def rows(prototypes: Tensor, classes: Tensor, sparse: bool) -> Tensor:
    """(S, d) prototypes of some classes, whose gradient reaches ``prototypes`` as a sparse or a dense matrix."""
    return F.embedding(classes, prototypes, sparse=sparse)
