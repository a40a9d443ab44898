"""The gradients of a step: products of blocks of weights, see directions.py, with the vectors of the other side.

A function that ends a gradient returns the sum of dL/dt t over the entries that the gradient is made of.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .matrix import Block, Matrix
from .products import add_product
from .sides import parts, total

_TERMS = 160  # of a sum, few for a small rounding error, and enough for the full speed of products


def finish_rows(matrix: Matrix, block: Block) -> Tensor:
    """Compute the gradient of a block's rows."""
    rows, cols = matrix.rows, matrix.cols
    assert rows.grad is not None
    if cols.direct:
        n = block.entries.shape[0]
        out = rows.grad[block.rows] if rows.ids is None else block.entries.new_empty(n, rows.dim)
        grad = torch.mm(block.entries, cols.x, out=out)
    else:
        grad = _sum_of_columns(matrix, block)
    return rows.finish_and_store(grad, block.rows, matrix.vectors)


def add_to_columns(matrix: Matrix, block: Block) -> None:
    """Add a block's share of the gradient of the columns, times their scale, to that gradient."""
    cols, a = matrix.cols, matrix.rows.operands(block.rows)
    assert cols.grad is not None
    for some in cols.parts(matrix.tile_of_columns if matrix.half else cols.size):
        add_product(cols.grad[some], block.entries[:, some].T, a)


def finish_columns(matrix: Matrix, block: Block | None) -> Tensor:
    """Compute the gradient of the columns from the only block, or from the sums of ``add_to_columns`` if None."""
    cols, energies = matrix.cols, []
    assert cols.grad is not None
    for some in cols.parts(matrix.tile_of_columns):
        grad = cols.grad[some]
        if block is not None:
            torch.mm(block.entries[:, some].T, matrix.rows.operands(block.rows), out=grad)
        energies.append(cols.finish_and_store(grad, some, matrix.vectors))
    return total(energies)


def add_to_itself(matrix: Matrix, block: Block) -> None:
    """Add a block's share of the gradients of rows and columns, which are the same, times their scale."""
    rows = matrix.rows
    assert rows.grad is not None
    assert rows.ids is not None
    a = rows.operands(block.rows)
    for some in rows.parts(matrix.tile_of_columns):
        rows.grad.index_add_(0, rows.ids[some], torch.mm(block.entries[:, some].T, a).to(rows.acc))
    rows.grad.index_add_(0, rows.ids[block.rows], _sum_of_columns(matrix, block))


def finish_itself(matrix: Matrix) -> Tensor:
    """Finish the sums of ``add_to_itself``. In the returned sum an entry counts as one of its row and of its column."""
    rows = matrix.rows
    assert rows.grad is not None
    assert rows.ids is not None
    tiles = rows.parts(matrix.tile_of_columns)
    return total([rows.finish_and_store(rows.grad[rows.ids[some]], some, matrix.vectors) for some in tiles])


def _sum_of_columns(matrix: Matrix, block: Block) -> Tensor:
    """The gradient of a block's rows, times their scale."""
    rows, cols = matrix.rows, matrix.cols
    # Where columns are rows, a sum has the terms of both directions. Short sums keep its rounding error as small as
    # that of two sums.
    several = rows is cols and matrix.one_part and not matrix.half
    most = min(_TERMS, -(-cols.size // 2)) if several else cols.size
    grad = rows.rnorm.new_zeros(block.entries.shape[0], rows.dim)
    for columns in matrix.columns():
        for some in parts(columns, most):
            add_product(grad, block.entries[:, some], cols.operands(some))
    return grad
