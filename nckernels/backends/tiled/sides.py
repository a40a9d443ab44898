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
from .plan import pad16

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
    ratio: Tensor | None = None
    """(rows,): exp(lse) over the sum whose logarithm, rounded, is ``lse``; None for 1, in 16-bit types."""
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


class Kept(NamedTuple):
    """The parts of ``Forward.kept``; without a backward pass, or if the log-sum-exps are replaced, without ratios."""

    present: Tensor
    """The labels of the prototypes' slots, and the number of slots in use; empty without ``present_only``."""
    class_ratio: Tensor | None
    instance_ratio: Tensor | None

    @staticmethod
    def sizes(m: int, k: int, dtype: torch.dtype, index: torch.dtype, spec: Spec, ratios: bool = True) -> list[int]:
        """Numbers of float32 of each part; ``index``: the dtype of the labels."""
        listed = min(m, k) + 1 if spec.present_only and m else 0
        of_ratios = ratios and dtype == torch.float32
        parts = (listed * index.itemsize // 4, k * (of_ratios and spec.by_class), m * (of_ratios and spec.by_instance))
        return [pad16(part) for part in parts]

    @classmethod
    def of(cls, memory: Tensor, inputs: Inputs, index: torch.dtype, spec: Spec) -> Kept:
        m, k = inputs.features.shape[0], inputs.prototypes.shape[0]
        sizes = cls.sizes(m, k, inputs.features.dtype, index, spec)
        if sum(sizes) > memory.numel():
            sizes[1:] = 0, 0
        present, class_ratio, instance_ratio = memory.split(sizes)
        listed = min(m, k) + 1 if sizes[0] else 0
        return cls(
            present.view(index)[:listed],
            class_ratio[:k] if sizes[1] else None,
            instance_ratio[:m] if sizes[2] else None,
        )


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


def two_sides(inputs: Inputs, spec: Spec, z_rnorm: Tensor, w_rnorm: Tensor, kept: Kept) -> tuple[Side, Side]:
    """Samples and prototypes, without log-sum-exps.

    If both are one tensor, S is symmetric, and one side is returned twice. Its bias, log-sum-exps and their gradients
    are those of the wanted direction.
    """
    present, class_ratio, instance_ratio = kept
    z, w, target, _, sample_bias, class_bias = inputs
    m, k, positives = z.shape[0], w.shape[0], spec.exclude == "self"
    if spec.symmetric:
        bias, ratio = (sample_bias, class_ratio) if spec.by_class else (class_bias, instance_ratio)
        both = Side(
            z, w_rnorm, True, m, target, spec.ignore_index, unsummed=positives, unread=positives, bias=bias, ratio=ratio
        )  # fmt: skip
        return both, both
    samples = Side(z, z_rnorm, True, m, target, spec.ignore_index, bias=sample_bias, ratio=instance_ratio)
    classes = Side(w, w_rnorm, False, k, bias=class_bias, ratio=class_ratio)
    if spec.square:
        return samples, classes._replace(label=target, skip=spec.ignore_index, unsummed=positives)
    if present.numel():
        classes = classes._replace(slots=min(m, k), label=present, skip=-1, gather=k > m, unread=True)
        return samples, classes._replace(used=present[m:]) if classes.gather else classes
    return samples, classes
