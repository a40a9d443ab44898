"""Prototypes of the classes that occur in a batch, as a matrix of their own.

A loss in the class direction needs no others. With K classes and M samples everything that follows is then as large as
M, and the gradient of the prototypes can be sparse.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ._class_sums import groups

LEFT_OUT = -1
"""The slot of samples that take no part."""


def present(target: Tensor, left_out: Tensor) -> tuple[Tensor, Tensor]:
    """(S,) classes that occur, in ascending order, and (M,) the slot among them of each sample's class.

    Samples that are ``left_out`` have any slot, and their targets may be anything. A GPU's host does not know how many
    classes occur: there are M slots there. A slot without a class of its own repeats the greatest class, or class 0
    where there is none, so that the rows of absent classes are left alone.
    """
    target = target.long()
    if target.numel() == 0:
        return target.new_zeros(1), target
    slot, slots = groups(target, left_out)
    classes = target.masked_fill(left_out, 0).amax().repeat(slots)
    # left out samples share a slot, the last one in use: nobody else writes there
    return classes.scatter_(0, slot, target.where(~left_out, classes[0])), slot


def sparse_rows(prototypes: Tensor, target: Tensor, ignored: Tensor) -> tuple[Tensor, Tensor]:
    """(S, d) prototypes of the classes of a batch, whose gradient reaches ``prototypes`` as a sparse tensor, and the
    targets as their rows, ``LEFT_OUT`` where ignored."""
    classes, slot = present(target, ignored)
    return F.embedding(classes, prototypes, sparse=True), slot.masked_fill(ignored, LEFT_OUT)
