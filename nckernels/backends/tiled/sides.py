"""The two operands of the similarity matrix.

A kernel calls them ``P``, the *anchors*, and ``Q``, the *reduced* operand. A thread block owns some anchors, loops over
the rows of Q and computes a sum over them for each anchor. In the class direction the prototypes are the anchors and
the samples are reduced; the instance direction is the same kernel with the operands swapped.

An operand consists of *slots*. Slot ``s`` is row ``s``, except for compacted prototypes (``gather``), which are only
the classes that occur in the batch: there slot ``s`` is row ``label[s]``.

A row is *left out* if its label is ``skip``: an ignored sample, or a class that does not occur.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..base import Inputs, Spec

NOT_FINITE = -2.0
"""Stored instead of the inverse norm of a left-out row that holds NaN or infinities."""


class Side(NamedTuple):
    """One operand, with the vectors of its rows."""

    x: Tensor
    """(rows, d), contiguous rows."""
    rnorm: Tensor
    """(rows,): 1 / max(norm, eps). For left-out rows ``NOT_FINITE`` if they hold NaN or infinities, else -1; with
    ``unread`` -1, or 0 for absent classes. With ``unsummed``, left-out rows that are positives have their norms."""
    samples: bool
    """Whether these are the features; True also if they are both operands."""
    slots: int
    label: Tensor | None = None
    """(slots,): the targets, for samples and for prototypes that are samples too; the class numbers, for prototypes
    with ``present_only``; None if no slot is left out."""
    skip: int = 0
    """The label of slots that are left out of all sums."""
    gather: bool = False
    """Whether slots are rows ``label[s]``: compacted prototypes."""
    unsummed: bool = False
    """Whether left-out slots can still be positives: prototypes under the mask "self"."""
    unread: bool = False
    """Whether the norms of left-out rows were not computed, so that these rows may hold NaN unnoticed."""
    used: Tensor | None = None
    """0-dimensional or (1,): the number of slots in use; None for all."""
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
        """Whether rows may be left out. These may hold anything, NaN too, and must not reach any sum."""
        return self.label is not None

    @property
    def copied(self) -> bool:
        """Whether the library multiplies a copy with zeros in left-out rows, because ``Kernels.mend`` cannot be
        used."""
        return self.gather or (self.partial and self.unread)


class Result(NamedTuple):
    """The outputs of the backward pass for one side; if both tensors are None, there are none."""

    side: Side
    out: Tensor | None
    """(rows, d): the gradient, in the dtype of the rows."""
    dot: Tensor | None
    """(slots,): each slot's share of the gradient of beta."""

    @property
    def wanted(self) -> bool:
        return self.out is not None or self.dot is not None

    @property
    def accumulator(self) -> Tensor | None:
        """The gradient, if it can hold its own sums: in float32, with one row per slot."""
        if self.out is not None and self.out.dtype == torch.float32 and not self.side.gather:
            return self.out
        return None


def plain(inputs: Inputs, spec: Spec) -> Inputs:
    """The same tensors in the layout that kernels expect: matrices of contiguous rows, contiguous vectors."""
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
    """The same matrix with contiguous rows, at any stride."""
    return x if x.stride(1) == 1 or x.is_contiguous() else x.contiguous()


def vector(x: Tensor | None) -> Tensor | None:
    """A contiguous vector; biases and upstream gradients may be expanded or strided."""
    return None if x is None else x.contiguous()


def two_sides(inputs: Inputs, spec: Spec, z_rnorm: Tensor, w_rnorm: Tensor, present: Tensor) -> tuple[Side, Side]:
    """Samples and prototypes; ``present`` has the labels of the prototypes with ``present_only``.

    If both are one tensor, S is symmetric, and one side is returned twice. Its bias, log-sum-exps and their gradients
    are those of the wanted direction.
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
