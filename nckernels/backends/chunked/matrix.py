"""The matrix of a step: its parts and tiles, and how its products become logits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..base import Spec
from .sides import Side
from .tiles import SHIFT_FREE_LIMIT

_TILE = 2**18  # entries of a tile
_LOG2_E = 1.0 / math.log(2.0)


def rows_of_a_part(rows: int, columns: int, d: int, itemsize: int, spec: Spec) -> int:
    """The number of rows in a part. Its entries, of ``itemsize`` bytes, take half of the workspace; the vectors and
    gradients of its rows, 16 bytes a number, take a quarter."""
    return min(rows, spec.workspace // 2 // (itemsize * max(columns, 1)), spec.workspace // 4 // (16 * d))


class Block(NamedTuple):
    """The entries of a part of the rows: products, which become weights in place."""

    rows: slice
    entries: Tensor
    """(n, columns) in the dtype of the products."""
    spare: Tensor
    """Memory for a second tile; empty if none is needed."""


class Tile(NamedTuple):
    """Some rows of a block."""

    rows: slice
    entries: Tensor
    """(n, columns) to compute in, in the dtype of gradients."""
    stored: Tensor
    """The same rows of the block: ``entries``, or the 16-bit numbers that these are a copy of."""
    spare: Tensor
    """See :class:`Block`."""

    def second(self, columns: int) -> Tensor:
        """Memory for as many rows of some columns."""
        n = self.entries.shape[0]
        return self.spare.narrow(0, 0, n * columns).view(n, columns)

    def store(self) -> None:
        """Write the entries to the block."""
        if self.stored is not self.entries:
            self.stored.copy_(self.entries)


class Matrix:
    """The matrix of the logits of rows and columns.

    Without a shift logits are in base 2, because PyTorch's exp2 takes a third of the time of its exp.
    """

    def __init__(self, rows: Side, cols: Side, beta: float, spec: Spec) -> None:
        self.rows, self.cols, self.beta = rows, cols, beta
        self.directions = 2 if spec.direction == "both" else 1
        """2 if the columns have log-sum-exps of their own."""
        self.acc, self.half = rows.acc, rows.half
        self.dtype = rows.x.dtype if self.half else self.acc
        self.shifted = beta > SHIFT_FREE_LIMIT
        self.unit = 1.0 if self.shifted else _LOG2_E
        """Unit of the logits: log2(e) in base 2, else 1."""
        self.width = rows_of_a_part(rows.size, cols.size, rows.dim, self.dtype.itemsize, spec) or 1
        room = spec.workspace // self.acc.itemsize
        self.tile_of_columns = max(room // 16 // rows.dim, 16)
        self.tile_of_rows = max(min(min(_TILE, room // 16) // max(cols.size, 1), rows.size), 1)
        self.vectors = max(min(_TILE, room // 16) // rows.dim, 16)
        """Number of vectors of either side that fit the cache."""
        self.one_part = self.width >= rows.size
        self.one_tile = self.one_part and self.tile_of_rows >= rows.size
        rows.choose_operands(cols.size)
        rows.allocate_grad(at_once=cols is not rows or self.one_part)
        if cols is not rows:
            cols.choose_operands(self.width)
            cols.allocate_grad(at_once=self.one_part)

    def blocks(self) -> Iterator[Block]:
        """Parts of the rows, each with its products with all columns."""
        columns = self.cols.size
        needs_second = self.rows is self.cols or self.directions == 2
        entries, second = self.width * columns, self.tile_of_rows * columns if needs_second else 0
        memory = self.rows.x.new_empty(entries if self.half else entries + second, dtype=self.dtype)
        spare = memory.new_empty(second, dtype=self.acc) if self.half else memory[entries:]
        alpha = self.beta * self.unit if self.rows.scale is None else 1.0
        for part in self.rows.parts(self.width):
            n = part.stop - part.start
            block, a = memory[: n * columns].view(n, columns), self.rows.operands(part)
            for some in self.columns():
                out = block[:, some]
                torch.addmm(out, a, self.cols.operands(some).T, beta=0, alpha=alpha, out=out)
            yield Block(part, block, spare)

    def columns(self) -> Iterator[slice]:
        """Ranges of columns to multiply at once: all of them, or as many as the workspace has room to copy."""
        return self.cols.parts(self.cols.size if self.cols.direct else self.tile_of_columns)

    def tiles(self, block: Block) -> Iterator[Tile]:
        """The tiles of a block."""
        part, entries, spare = block
        buffer = entries.new_empty(self.tile_of_rows, self.cols.size, dtype=self.acc) if self.half else None
        for start in range(0, entries.shape[0], self.tile_of_rows):
            stored = entries[start : start + self.tile_of_rows]
            n = stored.shape[0]
            rows = slice(part.start + start, part.start + start + n)
            yield Tile(rows, stored if buffer is None else buffer[:n].copy_(stored), stored, spare)

    def to_logits(self, tile: Tile) -> None:
        """Turn products into logits, in place."""
        if self.rows.scale is not None:
            tile.entries.mul_((self.rows.scale[tile.rows] * (self.beta * self.unit))[:, None])
        if self.cols.scale is not None:
            tile.entries.mul_(self.cols.scale)

    def mask(self, tile: Tile) -> None:
        """Write -inf where an ignored sample, or a sample with itself, must not count."""
        if self.rows is self.cols:
            tile.entries.diagonal(tile.rows.start).fill_(-torch.inf)
        if self.cols.mask is not None:
            tile.entries.add_(self.cols.mask)
        if self.rows.mask is not None:
            tile.entries.add_(self.rows.mask[tile.rows, None])

    def exp_(self, logits: Tensor) -> Tensor:
        """The exponentials of logits, in place."""
        return logits.exp_() if self.shifted else logits.exp2_()

    def store(self, tile: Tile) -> None:
        """Multiply weights by the columns' scales, and write them to the block."""
        if self.cols.scale is not None:
            tile.entries.mul_(self.cols.scale)
        tile.store()
