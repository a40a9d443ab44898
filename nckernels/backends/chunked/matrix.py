"""The matrix of a step, see step.py: products become logits, exponentials and weights in place."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..base import Exclude, Spec
from .positives import Pairs, SameLabel, with_positives
from .sides import Side, parts, total
from .sums import PlainLSE, StreamingLSE
from .tiles import SHIFT_FREE_LIMIT

_TILE = 2**18  # entries of a tile
_TERMS = 160  # of a sum, few for a small rounding error, and enough for the full speed of products
_LOG2_E = 1.0 / math.log(2.0)


def rows_of_a_part(rows: int, columns: int, d: int, itemsize: int, spec: Spec) -> int:
    """The number of rows in a part. Its entries, of ``itemsize`` bytes, take half of the workspace; the vectors and
    gradients of its rows, 16 bytes a number, take a quarter."""
    return min(rows, spec.workspace // 2 // (itemsize * max(columns, 1)), spec.workspace // 4 // (16 * d))


class Matrix:
    """The matrix of the logits of rows and columns.

    Without a shift logits are in base 2, because PyTorch's exp2 takes a third of the time of its exp.

    Args:
        pairs: the positives, at most one for each sample. They are left out of the sums of the matrix, and added
            afterwards unless ``spec`` excludes them.
        others: the positives of rows that are also the columns, if they are too many for ``pairs``. They are subtracted
            from the weights before these are rounded: the weights of a sample that has been learnt are differences of
            nearly equal numbers.
    """

    def __init__(
        self, rows: Side, cols: Side, beta: float, spec: Spec, pairs: Pairs | None, others: SameLabel | None
    ) -> None:
        self.rows, self.cols, self.beta, self.pairs, self.others = rows, cols, beta, pairs, others
        self.exclude: Exclude = spec.exclude
        self.directions = 2 if spec.direction == "both" else 1
        self.acc, self.half = rows.acc, rows.half
        self.dtype = rows.x.dtype if self.half else self.acc
        self.width = rows_of_a_part(rows.size, cols.size, rows.dim, self.dtype.itemsize, spec) or 1
        room = spec.workspace // self.acc.itemsize
        self.tile_of_columns = max(room // 16 // rows.dim, 16)
        self.vectors = max(min(_TILE, room // 16) // rows.dim, 16)
        """Number of vectors of either side that fit the cache."""
        self.tile_of_rows = max(min(min(_TILE, room // 16) // max(cols.size, 1), rows.size), 1)
        rows.choose_operands(cols.size)
        if cols is not rows:
            cols.choose_operands(self.width)
        self.one_part = self.width >= rows.size
        self.scratch = rows.rnorm
        """Memory for a second tile, from ``blocks``."""
        rows.allocate_grad(at_once=cols is not rows or self.one_part)
        if cols is not rows:
            cols.allocate_grad(at_once=self.one_part)
        self.shifted = beta > SHIFT_FREE_LIMIT
        self.nat = 1.0 if self.shifted else _LOG2_E
        """Unit of the logits: log2(e) in base 2, else 1."""
        if pairs is not None and min(self.width, self.tile_of_rows) < rows.size:
            pairs.sort()
        if pairs is not None:
            pairs.begin(added=spec.exclude in ("none", "self"))
        if pairs is not None and self.half:
            pairs.compute_logits(self.nat * beta, self.vectors)

    def exp_(self, logits: Tensor) -> Tensor:
        return logits.exp_() if self.shifted else logits.exp2_()

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Parts of the rows, each with the block of their products with all columns."""
        entries = self.width * self.cols.size
        second = self.tile_of_rows * self.cols.size if self.rows is self.cols or self.directions == 2 else 0
        memory = self.rows.x.new_empty(entries if self.half else entries + second, dtype=self.dtype)
        self.scratch = memory.new_empty(second, dtype=self.acc) if self.half else memory[entries:]
        alpha = self.beta * self.nat if self.rows.scale is None else 1.0
        for part in self.rows.parts(self.width):
            n = part.stop - part.start
            block, a = memory[: n * self.cols.size].view(n, self.cols.size), self.rows.operands(part)
            for some in self._columns():
                out = block[:, some]
                torch.addmm(out, a, self.cols.operands(some).T, beta=0, alpha=alpha, out=out)
            yield part, block

    def _columns(self) -> Iterator[slice]:
        """Ranges of columns to multiply at once: all of them, or as many as the workspace has room to copy."""
        return self.cols.parts(self.cols.size if self.cols.direct else self.tile_of_columns)

    def tiles(self, part: slice, block: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Tiles of rows of a block: the rows, the view of the block, and the tensor to compute in (float32)."""
        buffer = block.new_empty(self.tile_of_rows, self.cols.size, dtype=self.acc) if self.half else None
        for start in range(0, block.shape[0], self.tile_of_rows):
            stored = block[start : start + self.tile_of_rows]
            n = stored.shape[0]
            tile = slice(part.start + start, part.start + start + n)
            yield tile, stored, stored if buffer is None else buffer[:n].copy_(stored)

    def to_logits(self, tile: slice, t: Tensor) -> None:
        """Turn products into logits, in place; -inf where excluded."""
        if self.rows.scale is not None:
            t.mul_((self.rows.scale[tile] * (self.beta * self.nat))[:, None])
        if self.cols.scale is not None:
            t.mul_(self.cols.scale)
        if self.pairs is not None:
            here, at = self.pairs.within(tile)
            entries = t.view(-1)
            if not self.pairs.exact:
                torch.gather(entries, 0, at, out=self.pairs.logit[here])
            entries.index_fill_(0, at, -torch.inf)
        if self.others is not None:
            same, columns = self._same_label(tile)
            positives = t[:, columns]
            excluded = same != 0.0 if self.exclude == "same_label" else None
            torch.sum(same.mul_(positives), 1, out=self.others.logit[tile])
            if excluded is not None:
                positives.masked_fill_(excluded, -torch.inf)
        if self.rows is self.cols:
            t.diagonal(tile.start).fill_(-torch.inf)
        if self.cols.mask is not None:
            t.add_(self.cols.mask)
        if self.rows.mask is not None:
            t.add_(self.rows.mask[tile, None])

    def _same_label(self, tile: slice) -> tuple[Tensor, slice]:
        """1 where row and column are different samples of one label, else 0; and the columns with ones."""
        assert self.others is not None
        columns, group = self.others.columns(tile), self.others.group
        same = self.scratch.narrow(0, 0, (tile.stop - tile.start) * (columns.stop - columns.start))
        same = same.view(tile.stop - tile.start, -1)
        torch.eq(group[tile, None], group[columns], out=same).diagonal(tile.start - columns.start).zero_()
        return same, columns

    def subtract_positives(self, tile: slice, weights: Tensor, both_ways: bool) -> None:
        """Subtract the shares of the positives of ``others``, of rows or also of columns, from beta times the weights,
        before the scales of rows and columns are applied."""
        if self.others is None:
            return
        (same, columns), weight = self._same_label(tile), self.others.weight
        positives = weights[:, columns]
        if both_ways and self.others.even:
            positives.addcmul_(same, weight[columns], value=-2.0 * self.beta)
        else:
            positives.addcmul_(same, weight[tile, None], value=-self.beta)
            if both_ways:
                positives.addcmul_(same, weight[columns], value=-self.beta)
        if self.others.excess is not None:
            self.others.excess += weights.sum()

    def store(self, tile: slice, weights: Tensor, stored: Tensor) -> None:
        """Add the positives' derivatives to beta times the weights, multiply by the columns' scales, and store."""
        if self.pairs is not None:
            here, at = self.pairs.within(tile)
            by_pair = self.pairs.by_logit[here] * self.beta
            if self.rows.scale is not None:
                by_pair *= self.rows.scale.index_select(0, self.pairs.row[here])
            weights.view(-1).index_add_(0, at, by_pair)
        if self.cols.scale is not None:
            weights.mul_(self.cols.scale)
        if self.half:
            stored.copy_(weights)

    def losses(
        self, lse: Tensor, weight: Tensor, tile: slice, by_column: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, from the log-sum-exps of some rows, or of all columns, over the entries of the matrix in float64.

        Returns:
            The log-sum-exps, with the positives if ``pairs`` adds them, and their weights; zeros for empty sums. The
            loss, which contains the logits of ``pairs`` but not those of ``others``.
        """
        weight = weight.double()
        if self.pairs is not None:
            here, _ = self.pairs.within(tile)
            logit, share = self.pairs.logit[here].double(), self.pairs.share[here].double()
            if self.nat != 1.0:
                logit = logit / self.nat
            if self.directions == 2:
                share = share / 2.0
            if self.pairs.added:
                anchor = self.pairs.anchor_columns() if by_column else self.pairs.anchors(tile)
                lse, loss, by_logit = with_positives(lse, weight, anchor, logit, share)
                self.pairs.by_logit[here] += by_logit
                if anchor is None:  # no sum is empty
                    return lse, weight, loss
        empty = lse == -torch.inf
        lse, weight = lse.masked_fill_(empty, 0.0), weight.masked_fill(empty, 0.0)
        if self.pairs is None:
            loss = weight.dot(lse)
        elif not self.pairs.added:
            loss = weight.dot(lse) - share.dot(logit)
        return lse, weight, loss

    def shift_and_scale(self, lse: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and scale of the exponentials in beta times the weights of an anchor's entries. What the shift loses by
        rounding is in the scale."""
        shift = lse.to(self.acc) if self.shifted else torch.zeros_like(lse, dtype=self.acc)
        return shift, (weight * self.beta * (shift - lse).exp_()).to(self.acc)

    def add_to_rows(self, grad: Tensor, block: Tensor) -> None:
        """Add the gradient of a block's rows, times their scale, to ``grad``."""
        # Where columns are rows, a sum has the terms of both directions. Short sums keep its rounding error as small as
        # that of two sums.
        several = self.rows is self.cols and self.one_part and not self.half
        most = min(_TERMS, -(-self.cols.size // 2)) if several else self.cols.size
        for columns in self._columns():
            for some in parts(columns, most):
                self._add_product(grad, block[:, some], self.cols.operands(some))

    def add_to_columns(self, part: slice, block: Tensor) -> None:
        """Add a block's share of the gradient of the columns, times their scale, to that gradient."""
        assert self.cols.grad is not None
        a = self.rows.operands(part)
        for some in self.cols.parts(self.tile_of_columns if self.half else self.cols.size):
            self._add_product(self.cols.grad[some], block[:, some].T, a)

    def add_to_itself(self, part: slice, block: Tensor) -> None:
        """Add a block's share of the gradients of rows and columns, which are the same, times their scale."""
        rows = self.rows
        assert rows.grad is not None
        assert rows.ids is not None
        a = rows.operands(part)
        for some in rows.parts(self.tile_of_columns):
            rows.grad.index_add_(0, rows.ids[some], torch.mm(block[:, some].T, a).to(rows.acc))
        grad = rows.rnorm.new_zeros(block.shape[0], rows.dim)
        self.add_to_rows(grad, block)
        rows.grad.index_add_(0, rows.ids[part], grad)

    def _add_product(self, grad: Tensor, a: Tensor, b: Tensor) -> None:
        if self.half:
            grad.add_(torch.mm(a, b))
        else:
            grad.addmm_(a, b)

    def finish_rows(self, part: slice, block: Tensor) -> Tensor:
        """Compute the gradient of a block's rows. Returns the sum of dL/dt t over the block."""
        rows = self.rows
        assert rows.grad is not None
        if self.cols.direct:
            out = rows.grad[part] if rows.ids is None else block.new_empty(block.shape[0], rows.dim)
            grad = torch.mm(block, self.cols.x, out=out)
        else:
            grad = rows.rnorm.new_zeros(block.shape[0], rows.dim)
            self.add_to_rows(grad, block)
        return rows.finish_and_store(grad, part, self.vectors)

    def finish_itself(self) -> Tensor:
        """Finish the gradients to which ``add_to_itself`` has added. Returns the sum of dL/dt t over the matrix, with
        each entry counted as one of its row and as one of its column."""
        rows = self.rows
        assert rows.grad is not None
        assert rows.ids is not None
        tiles = rows.parts(self.tile_of_columns)
        return total([rows.finish_and_store(rows.grad[rows.ids[some]], some, self.vectors) for some in tiles])

    def finish_columns(self, block: Tensor | None) -> Tensor:
        """Compute the gradient of the columns from the only block, or finish their sums over all blocks if None.
        Returns the sum of dL/dt t over the matrix."""
        energies = []
        assert self.cols.grad is not None
        for some in self.cols.parts(self.tile_of_columns):
            grad = self.cols.grad[some]
            if block is not None:
                torch.mm(block[:, some].T, self.rows.operands(slice(0, self.rows.size)), out=grad)
            energies.append(self.cols.finish_and_store(grad, some, self.vectors))
        return total(energies)


def one_way(matrix: Matrix, part: slice, block: Tensor, weight: Tensor) -> Tensor:
    """Turn a part's products into weights, in place, given each row's share. Returns its :meth:`Matrix.losses`."""
    losses = []
    for tile, stored, t in matrix.tiles(part, block):
        matrix.to_logits(tile, t)
        top: Tensor | float = 0.0
        if matrix.shifted:
            top = t.amax(1)
            top.masked_fill_(top == -torch.inf, 0.0)
            t.sub_(top[:, None])
        lse = matrix.exp_(t).sum(1).double().log_().add_(top)
        lse, of_row, loss = matrix.losses(lse, weight[tile], tile)
        losses.append(loss)
        by_sum = (of_row * matrix.beta * (top - lse).exp_()).to(matrix.acc)
        if matrix.rows.scale is not None and matrix.others is None:
            by_sum *= matrix.rows.scale[tile]
        t.mul_(by_sum[:, None])
        if matrix.others is not None:
            matrix.subtract_positives(tile, t, both_ways=False)
            if matrix.rows.scale is not None:
                t.mul_(matrix.rows.scale[tile, None])
        matrix.store(tile, t, stored)
    return total(losses) if losses else weight.new_zeros((), dtype=torch.float64)


def both_ways(matrix: Matrix, block: Tensor, by_row: Tensor, by_col: Tensor | None) -> Tensor:
    """Turn the products of the whole matrix into weights, in place. Returns its :meth:`Matrix.losses`.

    Args:
        by_row: shares of the rows' log-sum-exps in the loss.
        by_col: shares of the columns'. None if columns are the rows: then an entry gets the weights of its row and of
            its column, and the loss only the rows' log-sum-exps.
    """
    everything = slice(0, matrix.rows.size)
    lse = StreamingLSE if matrix.shifted else PlainLSE
    of_rows = lse(matrix.rows.size, None, by_row, matrix.acc)
    of_cols = None if by_col is None else lse(matrix.cols.size, None, by_row, matrix.acc)
    for tile, stored, t in matrix.tiles(everything, block):
        matrix.to_logits(tile, t)
        if not matrix.shifted:
            matrix.exp_(t)
        of_rows.update(t, 1, tile, everything)
        if of_cols is not None:
            of_cols.update(t, 0, slice(0, matrix.cols.size), tile)
        if matrix.half:
            stored.copy_(t)
    row_lse, row_weight, loss = matrix.losses(of_rows.result(torch.float64), by_row, everything)
    if of_cols is None and matrix.pairs is not None:
        matrix.pairs.both_ways()
    of_row = of_col = matrix.shift_and_scale(row_lse, row_weight)
    if of_cols is not None and by_col is not None:
        col_lse, col_weight, by_cols = matrix.losses(of_cols.result(torch.float64), by_col, everything, by_column=True)
        of_col = matrix.shift_and_scale(col_lse, col_weight)
        loss = loss + by_cols
    (row_shift, r), (col_shift, c) = of_row, of_col
    for tile, stored, t in matrix.tiles(everything, block):
        if matrix.shifted:
            back = (t - col_shift).exp_().mul_(c)
            t.sub_(row_shift[tile, None]).exp_().mul_(r[tile, None]).add_(back)
        else:
            t.mul_(torch.add(r[tile, None], c, out=matrix.scratch.narrow(0, 0, t.numel()).view(t.shape)))
        matrix.subtract_positives(tile, t, both_ways=True)
        if matrix.rows.scale is not None:
            t.mul_(matrix.rows.scale[tile, None])
        matrix.store(tile, t, stored)
    return loss
