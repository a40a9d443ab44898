"""The two operands of the similarity matrix.

A kernel sees them as ``P``, the *anchors* (a thread block owns some of them and produces something for
each), and ``Q``, the *reduced* operand (the block walks over its rows and sums them up). The class direction
has the prototypes as anchors and the samples reduced; the instance direction is the same kernel with the
operands swapped.

An operand is made of *slots*. Slot and row are the same number, except for compacted prototypes
(``gather``), where slot ``s`` stands for row ``label[s]``: only the classes that occur in the batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..base import Inputs, Spec

NOT_FINITE = -2.0
"""In place of the inverse norm."""


class Side(NamedTuple):
    """One operand, with all that belongs to its rows."""

    x: Tensor
    """(rows, d), contiguous rows."""
    rnorm: Tensor
    """(rows,): 1 / max(norm, eps). Negative for rows that take no part, with ``unsummed`` not even as a positive:
    ``NOT_FINITE`` for those that hold NaN or infinities, -1 for others and with ``unread``."""
    samples: bool
    """Whether these are the features, perhaps as both operands."""
    slots: int
    label: Tensor | None = None
    """(slots,): the targets of samples, and of prototypes that are samples too; the rows of compacted
    prototypes; None: nothing is left out."""
    skip: int = 0
    """The label of slots that are left out of all sums."""
    gather: bool = False
    unsummed: bool = False
    """Whether slots that are left out can still be someone's positive: prototypes under the mask "self"."""
    unread: bool = False
    """Whether nobody has looked at the rows that take no part: classes that do not occur, above all."""
    used: Tensor | None = None
    """0-dimensional or (1,): how many of the slots are in use; None: all."""
    bias: Tensor | None = None
    """(rows,): added to the logits of these rows where they are summed over."""
    lse: Tensor | None = None
    """(rows,): this side's log-sum-exp, with ``grad``."""
    grad: Tensor | None = None
    """(rows,): upstream gradient of ``lse``."""
    pos: Tensor | None = None
    """(rows,): upstream gradient of the positive logits, samples only."""

    @property
    def partial(self) -> bool:
        """Whether some rows may take no part. These may hold anything, NaN too, and must not reach any sum."""
        return self.label is not None

    @property
    def copied(self) -> bool:
        """Whether the library multiplies a copy, with zeros in rows that take no part; see ``Kernels.mend``."""
        return self.gather or (self.partial and self.unread)


class Result(NamedTuple):
    """What the backward pass is to produce for one side; nothing if both tensors are None."""

    side: Side
    out: Tensor | None
    """(rows, d): the gradient, in the type of the rows."""
    dot: Tensor | None
    """(slots,): each slot's share of the gradient of beta."""

    @property
    def wanted(self) -> bool:
        return self.out is not None or self.dot is not None

    @property
    def accumulator(self) -> Tensor | None:
        """The gradient itself, where it can hold the sums on the way to it: float32, one row a slot."""
        if self.out is not None and self.out.dtype == torch.float32 and not self.side.gather:
            return self.out
        return None


def plain(inputs: Inputs, spec: Spec) -> Inputs:
    """The same tensors as kernels index them: matrices of contiguous rows, contiguous vectors."""
    z = _rows(inputs.features)
    return Inputs(
        z,
        z if spec.symmetric else _rows(inputs.prototypes),
        inputs.target.contiguous(),
        inputs.inv_temperature,
        vector(inputs.sample_bias),
        vector(inputs.class_bias),
    )


def _rows(x: Tensor) -> Tensor:
    """A matrix whose rows are contiguous, at any distance from each other."""
    return x if x.stride(1) == 1 or x.is_contiguous() else x.contiguous()


def vector(x: Tensor | None) -> Tensor | None:
    """Biases and upstream gradients may be expanded or strided."""
    return None if x is None else x.contiguous()


def two_sides(inputs: Inputs, spec: Spec, z_rnorm: Tensor, w_rnorm: Tensor, present: Tensor) -> tuple[Side, Side]:
    """Samples and prototypes; ``present`` holds the prototypes' labels if only classes that occur count.

    Where they are one tensor, S is symmetric and so is all that belongs to its rows and columns: one side, given
    twice. Its bias, log-sum-exps and their gradients are those of the direction that was asked for.
    """
    z, w, target, _, sample_bias, class_bias = inputs
    m, k, positives = z.shape[0], w.shape[0], spec.exclude == "self"
    if spec.symmetric:
        bias = sample_bias if spec.by_class else class_bias
        both = Side(z, w_rnorm, True, m, target, spec.ignore_index, unsummed=positives, unread=positives, bias=bias)
        return both, both
    samples = Side(z, z_rnorm, True, m, target, spec.ignore_index, bias=sample_bias)
    if spec.square:
        return samples, Side(w, w_rnorm, False, k, target, spec.ignore_index, unsummed=positives, bias=class_bias)
    if present.numel():
        slots, compacted = min(m, k), k > m
        used = present[slots:] if compacted else None
        return samples, Side(w, w_rnorm, False, slots, present, -1, compacted, unread=True, used=used, bias=class_bias)
    return samples, Side(w, w_rnorm, False, k, bias=class_bias)
