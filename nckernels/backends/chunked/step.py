"""Loss and gradient in one step: the gradient of a sum or mean is known, up to a factor, once the sums are.

The rows of the matrix are the *anchors*, classes or samples, and its columns the vectors that they are contrasted with.
In one direction the matrix is processed in parts of rows, as many as half of the workspace holds. The sums of a part
are complete, so its exponentials become weights before the next part begins, and no product is computed twice. In both
directions, and for samples with themselves where that saves a product, the whole matrix is one part.

A part's block of entries is processed in tiles of rows that stay in cache. Where bfloat16 multiplies fast, the block is
bfloat16 and a tile float32: logits are rounded once and weights are rounded once. The logits of single positives are
exact, because the gradient of a sample that has been learnt is the difference of two nearly equal numbers.

The files in the order of their imports: sides.py has the vectors of rows and columns, matrix.py the products,
positives.py and same_label.py what is known of positives, directions.py the way from products to weights, gradients.py
the way from weights to gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import Inputs, Needs, Reduced, Spec, Step, accumulation_dtype, number
from . import products
from .directions import both_ways, one_way
from .gradients import add_to_columns, add_to_itself, finish_columns, finish_itself, finish_rows
from .matrix import Matrix, rows_of_a_part
from .norms import rnorm_of
from .positives import Pairs, Positives
from .same_label import Labels
from .sides import Side
from .tiles import SHIFT_FREE_LIMIT

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
        labels = Labels(target, valid, acc)
        samples, by_w = Side(z, rnorm, needs.features, None, labels.ids, half), None
        weight = None if reduced.weight is None else reduced.weight[labels.ids]
        share, total = _shares(reduced._replace(weight=weight), labels.any, acc)
        matrix = Matrix(samples, samples, beta, spec)
        excluded = spec.exclude == "same_label"
        positives = labels.positives(share, weight is None, matrix, excluded, needs.inv_temperature)
        loss, energy = _with_itself(matrix, positives)
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
    matrix = Matrix(rows, cols, beta, spec)
    positives = Pairs(row, col, share, matrix, excluded=spec.exclude == "target")
    by_rows, by_cols = share.new_zeros(2)
    loss = share.new_zeros((), dtype=torch.float64)
    for block in matrix.blocks():
        if spec.direction == "both":
            loss = both_ways(matrix, positives, block)
        else:
            loss += one_way(matrix, positives, block)
        if cols.wanted and matrix.one_part:
            by_cols = finish_columns(matrix, block)
        elif cols.wanted:
            add_to_columns(matrix, block)
        if rows.wanted:
            by_rows += finish_rows(matrix, block)
    if cols.wanted and not matrix.one_part:
        by_cols = finish_columns(matrix, None)
    loss, energy = positives.finish(loss, by_cols if cols.wanted else by_rows)
    return loss, energy, classes.grad


def _present(label: Tensor, classes: int) -> tuple[Tensor | None, Tensor]:
    """The classes that occur (None for all), and each label's position among them."""
    there = torch.zeros(classes, dtype=torch.bool, device=label.device).index_fill_(0, label, True)
    if bool(there.all()):
        return None, label
    return there.nonzero().squeeze(1), (there.cumsum(0) - 1).index_select(0, label)


def _with_itself(matrix: Matrix, positives: Positives) -> tuple[Tensor, Tensor]:
    """The loss and the sum of dL/dt t.

    If the whole matrix is one part, an entry gets the weights of its row and of its column, and one product is saved.
    Otherwise a part's weights are those of its rows, and the gradient of the columns is added up part by part.
    """
    loss, energy = matrix.rows.rnorm.new_zeros((), dtype=torch.float64), matrix.rows.rnorm.new_zeros(())
    for block in matrix.blocks():
        if matrix.one_part:
            loss, energy = both_ways(matrix, positives, block), finish_rows(matrix, block)
        else:
            loss += one_way(matrix, positives, block)
            add_to_itself(matrix, block)
    if not matrix.one_part:
        energy = finish_itself(matrix)
    return positives.finish(loss, energy / 2.0)  # every pair is counted twice
