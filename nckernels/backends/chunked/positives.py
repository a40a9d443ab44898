"""The positives of a step: what the other files know of them, and single positives. For more see same_label.py."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .matrix import Matrix, Tile


class Positives(ABC):
    """The positives of the samples, and the samples' shares in the loss.

    The methods are called in the order in which they stand here. For an entry of the matrix ``add_derivatives`` is
    called once, after ``complete`` has been called for its row, and for its column where that has a loss too.
    """

    @abstractmethod
    def leave_out(self, tile: Tile) -> None:
        """Read the positives' logits in a tile, and write -inf where the sums over the matrix leave them out."""

    @abstractmethod
    def complete(self, lse: Tensor, rows: slice, by_column: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Add the positives that the matrix leaves out to the log-sum-exps of some rows, or of all columns, in float64.

        Returns:
            The log-sum-exps, and their weights in the loss; zeros for empty sums. The loss, but for what ``finish``
            adds.
        """

    @abstractmethod
    def mirror(self) -> None:
        """Where columns are the rows: let each entry have the derivatives of its mirror image too."""

    @abstractmethod
    def add_derivatives(self, tile: Tile) -> None:
        """Add beta times the derivatives by the positives' logits to a tile of weights, before it is rounded.

        The weights contain the scales of the rows already, those of the columns not yet.
        """

    def finish(self, loss: Tensor, energy: Tensor) -> tuple[Tensor, Tensor]:
        """Complete the loss, and the sum of dL/dt t over the matrix."""
        return loss, energy


class Pairs(Positives):
    """At most one positive for each sample: entries (row, col) of the matrix.

    The sums over the matrix leave them out, and ``complete`` adds them.

    Args:
        row: (p,) the rows of the positives, and their columns.
        share: (p,) their shares in the loss.
        excluded: whether the loss has sums without positives, so that they are not added.
    """

    def __init__(self, row: Tensor, col: Tensor, share: Tensor, matrix: Matrix, excluded: bool) -> None:
        self.row, self.col, self.share, self.matrix, self.excluded = row, col, share, matrix, excluded
        rows, cols = matrix.rows, matrix.cols
        self.in_order = _is_range(row, rows.size)
        """Whether the i-th pair is in row i."""
        if not self.in_order and not matrix.one_tile:
            self._sort()
        self.place = self.row * cols.size + self.col
        """(p,) positions in the flattened matrix."""
        self.by_logit = -self.share if excluded else torch.zeros_like(share)
        """(p,) the derivatives of the loss by the logits; ``complete`` adds those of the sums."""
        if matrix.directions == 2:
            self.share = self.share / 2.0  # in one direction
        self.weight = self.share.double() if self.in_order else _sums(self.share, self.row, rows.size)
        """(rows,) the sums of the shares of each row's pairs."""
        self.logit = torch.empty_like(share)
        """(p,) the logits from the tiles, or from the vectors where those in the tiles are rounded to 16 bits."""
        if matrix.half:
            self._compute_logits()

    def leave_out(self, tile: Tile) -> None:
        here, at = self._within(tile.rows)
        entries = tile.entries.view(-1)
        if not self.matrix.half:
            torch.gather(entries, 0, at, out=self.logit[here])
        entries.index_fill_(0, at, -torch.inf)

    def complete(self, lse: Tensor, rows: slice, by_column: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        here, _ = self._within(rows)
        logit, share = self.logit[here].double(), self.share[here].double()
        if self.matrix.unit != 1.0:
            logit = logit / self.matrix.unit
        weight = _sums(self.share, self.col, self.matrix.cols.size) if by_column else self.weight[rows]
        if self.excluded:
            lse, weight = without_empty(lse, weight)
            return lse, weight, weight.dot(lse) - share.dot(logit)
        anchor = self._columns() if by_column else self._rows(rows)
        lse, loss, by_logit = with_positives(lse, weight, anchor, logit, share)
        self.by_logit[here].add_(by_logit)
        if anchor is not None:
            lse, weight = without_empty(lse, weight)
        return lse, weight, loss

    def mirror(self) -> None:
        """See the base class. Each pair stands next to its mirror image."""
        pairs = self.by_logit.view(-1, 2)
        self.by_logit = (pairs + pairs.flip(1)).flatten()

    def add_derivatives(self, tile: Tile) -> None:
        here, at = self._within(tile.rows)
        by_logit = self.by_logit[here] * self.matrix.beta
        if self.matrix.rows.scale is not None:
            by_logit *= self.matrix.rows.scale.index_select(0, self.row[here])
        tile.entries.view(-1).index_add_(0, at, by_logit)

    def _sort(self) -> None:
        """Sort the pairs by row, as ``_within`` requires for a range of rows."""
        self.row, order = self.row.sort(stable=True)
        self.col, self.share = self.col[order], self.share[order]
        self.in_order = _is_range(self.row, self.matrix.rows.size)

    def _compute_logits(self) -> None:
        rows, cols, at_once = self.matrix.rows, self.matrix.cols, self.matrix.vectors
        for start in range(0, self.row.shape[0], at_once):
            some = slice(start, start + at_once)
            row: slice | Tensor = some if self.in_order else self.row[some]
            col = self.col[some]
            dot = torch.linalg.vecdot(rows.operands(row).to(self.share.dtype), cols.operands(col).to(self.share.dtype))
            for side, which in ((rows, row), (cols, col)):
                if side.scale is not None:
                    dot.mul_(side.scale[which])
            torch.mul(dot, self.matrix.unit * self.matrix.beta, out=self.logit[some])

    def _within(self, rows: slice) -> tuple[slice, Tensor]:
        """The range of the pairs in some rows, and their positions in the flattened entries of these rows."""
        if self.in_order:
            here = rows
        elif rows.stop - rows.start == self.matrix.rows.size:
            here = slice(0, self.row.shape[0])
        else:
            here = slice(*torch.searchsorted(self.row, torch.tensor([rows.start, rows.stop])).tolist())
        place = self.place[here]
        return here, place if rows.start == 0 else place - rows.start * self.matrix.cols.size

    def _rows(self, rows: slice) -> Tensor | None:
        """The place of each pair's row among some rows; None if they are the rows themselves in order."""
        return None if self.in_order else self.row[self._within(rows)[0]] - rows.start

    def _columns(self) -> Tensor | None:
        """The column of each pair; None if they are all columns in order."""
        return None if _is_range(self.col, self.matrix.cols.size) else self.col


def with_positives(
    lse: Tensor, weight: Tensor, anchor: Tensor | None, logit: Tensor, share: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Add positives to the log-sum-exps of other entries, in float64.

    Where a positive has a probability near 1, its derivative is the sum of the other probabilities, of which a rounded
    probability less 1 retains nothing.

    Args:
        lse: (n,) log-sum-exps of the anchors over the other entries.
        weight: (n,) sums of the shares of each anchor's positives.
        anchor: (p,) the anchor of each positive; None if the i-th one is the only one of anchor i.
        logit: (p,) logits, and the shares of the samples in the loss.

    Returns:
        The log-sum-exps with the positives, the loss, and its derivatives by the logits, which are
        ``weight * e / total - share`` with the positive's exponential ``e``, without cancellation.
    """
    if anchor is None:
        below = logit - lse
        above = logsigmoid(below)
        return logit - above, -share.dot(above), below.neg_().sigmoid_().mul_(share).neg_()
    top = lse.scatter_reduce(0, anchor, logit, "amax")
    top.masked_fill_(top == -torch.inf, 0.0)
    e = (logit - top.index_select(0, anchor)).exp_()
    own = torch.zeros_like(top).index_add_(0, anchor, e)
    others = (lse - top).exp_()
    whole = (own + others).log_().add_(top)
    own, others, of_anchor, weight = torch.stack((own, others, whole, weight)).index_select(1, anchor)
    rest = (own - e).add_(others)
    above = torch.where(rest < e, (rest / e).log1p_(), of_anchor - logit)
    by_logit = (weight * e).addcmul_(share, own, value=-1.0).addcmul_(share, others, value=-1.0).div_(own + others)
    return whole, share.dot(above), by_logit


def without_empty(lse: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exps, changed in place, and their weights, with zeros for empty sums."""
    empty = lse == -torch.inf
    return lse.masked_fill_(empty, 0.0), weight.masked_fill(empty, 0.0)


def _sums(share: Tensor, group: Tensor, groups: int) -> Tensor:
    """The sum of the shares of each group. In float64, because the rounding errors of equal terms do not cancel."""
    return share.new_zeros(groups, dtype=torch.float64).index_add_(0, group, share.double())


def _is_range(index: Tensor, size: int) -> bool:
    return index.shape[0] == size and torch.equal(index, torch.arange(size, device=index.device))
