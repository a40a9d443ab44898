"""From products to weights: the log-sum-exps of rows, or of rows and columns, and the derivatives by the logits.

The weights are beta times the derivatives of the loss by the logits, times the scales of rows and columns. The scale of
a row is applied before the positives are added, which have this scale too. The scale of a column is applied afterwards.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .matrix import Block, Matrix, Tile
from .positives import Positives
from .sides import total
from .sums import PlainLSE, StreamingLSE


def one_way(matrix: Matrix, positives: Positives, block: Block) -> Tensor:
    """Turn a part's products into weights, in place, from the sums over its rows. Returns the loss in float64."""
    losses = []
    for tile in matrix.tiles(block):
        rows, t = tile.rows, tile.entries
        _to_logits(matrix, positives, tile)
        top: Tensor | float = 0.0
        if matrix.shifted:
            top = t.amax(1)
            top.masked_fill_(top == -torch.inf, 0.0)
            t.sub_(top[:, None])
        lse = matrix.exp_(t).sum(1).double().log_().add_(top)
        lse, weight, loss = positives.complete(lse, rows)
        losses.append(loss)
        factor = (weight * matrix.beta * (top - lse).exp_()).to(matrix.acc)
        if matrix.rows.scale is not None:
            factor *= matrix.rows.scale[rows]
        t.mul_(factor[:, None])
        positives.add_derivatives(tile)
        matrix.store(tile)
    return total(losses) if losses else block.entries.new_zeros((), dtype=torch.float64)


def both_ways(matrix: Matrix, positives: Positives, block: Block) -> Tensor:
    """Turn the products of the whole matrix into weights, in place. Returns the loss in float64.

    An entry gets the weights of its row and of its column. Where columns are the rows, the sums over columns are those
    over rows, and count once in the loss.
    """
    rows, cols = matrix.rows, matrix.cols
    lse = StreamingLSE if matrix.shifted else PlainLSE
    of_rows = lse(rows.size, None, rows.rnorm, matrix.acc)
    of_cols = None if rows is cols else lse(cols.size, None, cols.rnorm, matrix.acc)
    for tile in matrix.tiles(block):
        _to_logits(matrix, positives, tile)
        if not matrix.shifted:
            matrix.exp_(tile.entries)
        of_rows.update(tile.entries, 1, tile.rows, slice(0, cols.size))
        if of_cols is not None:
            of_cols.update(tile.entries, 0, slice(0, cols.size), tile.rows)
        tile.store()
    row_lse, row_weight, loss = positives.complete(of_rows.result(torch.float64), block.rows)
    of_row = of_col = _shift_and_factor(matrix, row_lse, row_weight)
    if of_cols is None:
        positives.mirror()
    else:
        col_lse, col_weight, by_cols = positives.complete(of_cols.result(torch.float64), block.rows, by_column=True)
        of_col = _shift_and_factor(matrix, col_lse, col_weight)
        loss = loss + by_cols
    (row_shift, r), (col_shift, c) = of_row, of_col
    for tile in matrix.tiles(block):
        t = tile.entries
        if matrix.shifted:
            back = (t - col_shift).exp_().mul_(c)
            t.sub_(row_shift[tile.rows, None]).exp_().mul_(r[tile.rows, None]).add_(back)
        else:
            t.mul_(torch.add(r[tile.rows, None], c, out=tile.second(cols.size)))
        if rows.scale is not None:
            t.mul_(rows.scale[tile.rows, None])
        positives.add_derivatives(tile)
        matrix.store(tile)
    return loss


def _to_logits(matrix: Matrix, positives: Positives, tile: Tile) -> None:
    """Turn products into logits, in place; -inf where the sums leave them out."""
    matrix.to_logits(tile)
    positives.leave_out(tile)
    matrix.mask(tile)


def _shift_and_factor(matrix: Matrix, lse: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Shift and factor of the exponentials in beta times the weights of an anchor's entries. What the shift loses by
    rounding is in the factor."""
    shift = lse.to(matrix.acc) if matrix.shifted else torch.zeros_like(lse, dtype=matrix.acc)
    return shift, (weight * matrix.beta * (shift - lse).exp_()).to(matrix.acc)
