"""Loss and gradient in one step: the gradient of a sum or mean is known, up to a factor, once the sums are.

The rows of the matrix are the *anchors*, classes or samples, and its columns the vectors that they are contrasted with.
In one direction the matrix is processed in parts of rows, as many as half of the workspace holds. The sums of a part
are complete, so its exponentials become weights before the next part begins, and no product is computed twice. In both
directions, and for samples with themselves where that saves a product, the whole matrix is one part.

A part's block of entries is processed in tiles of rows that stay in cache. Where bfloat16 multiplies fast, the block is
bfloat16 and a tile float32: logits are rounded once and weights are rounded once. The logits of single positives are
exact, because the gradient of a sample that has been learnt is the difference of two nearly equal numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import Inputs, Needs, Reduced, Spec, Step, accumulation_dtype, number
from . import products
from .matrix import Matrix, both_ways, one_way, rows_of_a_part
from .positives import Pairs, SameLabel
from .sides import Side
from .tiles import SHIFT_FREE_LIMIT, rnorm_of

_NARROWEST = 64  # rows of a part; with fewer, thin products cost more than computing some of them twice


def fits(features: Tensor, prototypes: Tensor, spec: Spec) -> bool:
    """Whether a step takes the problem: on a CPU, if the matrix is one part or its parts have enough rows."""
    if features.device.type != "cpu" or (spec.square and not spec.symmetric):
        return False
    rows, cols = (prototypes, features) if spec.direction == "class" else (features, prototypes)
    itemsize = accumulation_dtype(features.dtype).itemsize
    n, (columns, d) = rows.shape[0], cols.shape
    enough = n if spec.direction == "both" else min(n, _NARROWEST)
    return rows_of_a_part(n, columns, d, itemsize, spec) >= enough


def step(inputs: Inputs, reduced: Reduced, spec: Spec, needs: Needs) -> Step:
    """See :meth:`nckernels.backends.base.Backend.step`; for problems that ``fits``."""
    z, w, target = inputs[:3]
    acc, beta = accumulation_dtype(z.dtype), number(inputs.inv_temperature, z.dtype)
    small = beta <= SHIFT_FREE_LIMIT
    half = small and z.dtype == torch.bfloat16 and products.use_half(z, w, small)  # small weights underflow in float16
    counted = target != spec.ignore_index
    valid = None if bool(counted.all()) else counted
    rnorm = rnorm_of(z, acc, valid)
    if spec.symmetric:
        others = SameLabel(target, valid, acc)
        samples = Side(z, rnorm, needs.features, None, others.ids, half)
        weight = None if reduced.weight is None else reduced.weight[others.ids]
        share, total = _shares(reduced._replace(weight=weight), others.any, acc)
        others.set_shares(share, even=weight is None)
        if needs.inv_temperature and spec.exclude == "self":
            others.excess = share.new_zeros(())
        by_w = None
        loss, energy = _with_itself(samples, others, beta, spec)
    else:
        samples = Side(z, rnorm, needs.features, valid, None, half)
        share, total = _shares(reduced, counted, acc)
        loss, energy, by_w = _with_classes(samples, w, needs.prototypes, target, share, beta, spec)
    if reduced.mean:
        loss = loss.masked_fill(total == 0.0, reduced.of_nothing)
    return Step(loss.to(acc), samples.grad, by_w, energy / beta if needs.inv_temperature else None)


def _shares(reduced: Reduced, counted: Tensor, acc: torch.dtype) -> tuple[Tensor, Tensor]:
    """The samples' shares in the loss, and the sum of their weights."""
    weight = counted.to(acc) if reduced.weight is None else reduced.weight.to(acc).where(counted, 0.0)
    total = weight.sum()
    if reduced.of_nothing == 0.0:
        total = total.masked_fill(total == 0.0, 1.0)
    return weight / total if reduced.mean else weight, total


def _with_classes(
    samples: Side, w: Tensor, wanted: bool, target: Tensor, share: Tensor, beta: float, spec: Spec
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The loss, beta dL/dbeta (the sum of dL/dt t), and the prototypes' gradient if wanted."""
    sample = torch.arange(target.shape[0], device=target.device)
    if samples.valid is not None:
        sample = samples.valid.nonzero().squeeze(1)
        target, share = target.index_select(0, sample), share.index_select(0, sample)
    present = None
    if spec.direction == "class":
        present, target = _present(target, w.shape[0])
    classes = Side(w, rnorm_of(w, samples.acc), wanted, None, present, samples.half)
    if spec.direction == "class":
        rows, cols, row, col = classes, samples, target, sample
    else:
        rows, cols, row, col = samples, classes, sample, target
    pairs = Pairs(row, col, share, rows, cols)
    matrix = Matrix(rows, cols, beta, spec, pairs, None)
    weight = share.double() if row is sample and pairs.in_order else _sums(share, row, rows.size)
    by_rows, by_cols = share.new_zeros(2)
    loss = share.new_zeros((), dtype=torch.float64)
    for part, block in matrix.blocks():
        if spec.direction == "both":
            loss = both_ways(matrix, block, 0.5 * weight, 0.5 * _sums(share, col, cols.size))
        else:
            loss += one_way(matrix, part, block, weight)
        if cols.wanted and matrix.one_part:
            by_cols = matrix.finish_columns(block)
        elif cols.wanted:
            matrix.add_to_columns(part, block)
        if rows.wanted:
            by_rows += matrix.finish_rows(part, block)
    if cols.wanted and not matrix.one_part:
        by_cols = matrix.finish_columns(None)
    return loss, by_cols if cols.wanted else by_rows, classes.grad


def _sums(share: Tensor, group: Tensor, groups: int) -> Tensor:
    """The sum of the shares of each group. In float64, because the rounding errors of equal terms do not cancel."""
    return share.new_zeros(groups, dtype=torch.float64).index_add_(0, group, share.double())


def _present(label: Tensor, classes: int) -> tuple[Tensor | None, Tensor]:
    """The classes that occur (None for all), and each label's position among them."""
    there = torch.zeros(classes, dtype=torch.bool, device=label.device).index_fill_(0, label, True)
    if bool(there.all()):
        return None, label
    return there.nonzero().squeeze(1), (there.cumsum(0) - 1).index_select(0, label)


def _with_itself(rows: Side, others: SameLabel, beta: float, spec: Spec) -> tuple[Tensor, Tensor]:
    """The loss and the sum of dL/dt t.

    If the whole matrix is one part, an entry gets the weights of its row and of its column, and one product is saved.
    Otherwise a part's weights are those of its rows, and the gradient of the columns is added up part by part.
    """
    share, pairs = others.share, others.pairs(rows) if others.in_pairs else None
    matrix = Matrix(rows, rows, beta, spec, pairs, None if others.in_pairs else others)
    loss, energy = share.new_zeros((), dtype=torch.float64), share.new_zeros(())
    for part, block in matrix.blocks():
        if matrix.one_part:
            loss, energy = both_ways(matrix, block, share, None), matrix.finish_rows(part, block)
        else:
            loss += one_way(matrix, part, block, share)
            matrix.add_to_itself(part, block)
    if not matrix.one_part:
        energy = matrix.finish_itself()
    energy = energy / 2.0  # every pair is counted twice
    if matrix.others is not None:
        loss = loss - others.loss() / matrix.nat
        if others.excess is not None:
            # The weights add up to 0, but for the rounding of log-sum-exps. Their products with cosines near 1 would
            # keep this error, those with the difference of a cosine and a typical one do not.
            excess = others.excess / 2.0 if matrix.one_part else others.excess
            energy -= excess * others.typical() / (beta * matrix.nat)
    return loss, energy
