"""The positives of the supervised contrastive loss: the other samples of each sample's label."""

from __future__ import annotations

from bisect import bisect_left, bisect_right

import torch
from torch import Tensor

from .matrix import Matrix, Tile
from .positives import Pairs, Positives, without_empty


class Labels:
    """The samples sorted by label, so that the positives of some rows are in few columns.

    Args:
        target: (M,) labels.
        valid: (M,) bool, the samples that are not ignored; None for all.
        acc: the dtype of gradients.
    """

    def __init__(self, target: Tensor, valid: Tensor | None, acc: torch.dtype) -> None:
        sample = None if valid is None else valid.nonzero().squeeze(1)
        label, order = (target if sample is None else target[sample]).sort(stable=True)
        self.ids = order if sample is None else sample[order]
        """(N,) the samples that are not ignored, sorted by label. All other attributes are in this order."""
        _, group, count = label.unique_consecutive(return_inverse=True, return_counts=True)
        self.group = group.to(acc)
        """(N,) the number of each sample's label. Floats are compared fastest."""
        self._ends: list[int] = count.cumsum(0).tolist()
        others = (count - 1)[group]
        self.any = others > 0
        """(N,) bool: whether the label of a sample has other samples."""
        self.others = others.clamp_min_(1).to(acc)
        """(N,) the number of these, at least 1."""
        self.in_pairs = not bool((count > 2).any())
        """Whether a sample has at most one positive."""

    def columns(self, rows: slice) -> slice:
        """The columns of the labels of some rows."""
        first, last = bisect_right(self._ends, rows.start), bisect_left(self._ends, rows.stop)
        return slice(self._ends[first - 1] if first else 0, self._ends[last])

    def positives(self, share: Tensor, even: bool, matrix: Matrix, excluded: bool, by_beta: bool) -> Positives:
        """The positives in the form for their number, given the arguments of :class:`SameLabel`."""
        if not self.in_pairs:
            return SameLabel(self, share, even, matrix, excluded, by_beta)
        row = self.any.nonzero().squeeze(1)
        partner = row.view(-1, 2).flip(1).flatten()
        return Pairs(row, partner, share[row], matrix, excluded)


class SameLabel(Positives):
    """Any number of positives for each sample.

    The sums over the matrix contain them. They are subtracted from the weights before these are rounded: the weights of
    a sample that has been learnt are differences of nearly equal numbers.

    Args:
        share: (N,) the shares of the samples in the loss.
        even: whether the shares of samples with positives are equal.
        excluded: whether the loss has sums without positives, so that the sums do not contain them.
        by_beta: whether the derivative by beta is wanted.
    """

    def __init__(
        self, labels: Labels, share: Tensor, even: bool, matrix: Matrix, excluded: bool, by_beta: bool
    ) -> None:
        self.labels, self.share, self.even, self.matrix, self.excluded = labels, share, even, matrix, excluded
        self.mirrored = False
        self.weight = share / labels.others
        """(N,) the share of each of a sample's positives."""
        scale = matrix.rows.scale
        self.by_row = (self.weight if scale is None else self.weight * scale)[:, None]
        """(N, 1) the same, times the scales of the rows."""
        self.logit = torch.zeros_like(share)
        """(N,) the sum of the logits of each sample's positives."""
        self.excess = share.new_zeros(()) if by_beta and not excluded else None
        """The sum of all weights, which but for rounding is 0; None if it is not wanted."""

    def leave_out(self, tile: Tile) -> None:
        same, columns = self._same(tile)
        positives = tile.entries[:, columns]
        excluded = same != 0.0 if self.excluded else None
        torch.sum(same.mul_(positives), 1, out=self.logit[tile.rows])
        if excluded is not None:
            positives.masked_fill_(excluded, -torch.inf)

    def complete(self, lse: Tensor, rows: slice, by_column: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        lse, weight = without_empty(lse, self.share[rows].double())
        return lse, weight, weight.dot(lse)

    def mirror(self) -> None:
        self.mirrored = True

    def add_derivatives(self, tile: Tile) -> None:
        (same, columns), beta, scale = self._same(tile), self.matrix.beta, self.matrix.rows.scale
        positives, twice = tile.entries[:, columns], self.mirrored and self.even
        positives.addcmul_(same, self.by_row[tile.rows], value=-2.0 * beta if twice else -beta)
        if self.mirrored and not self.even:
            if scale is not None:
                same.mul_(scale[tile.rows, None])
            positives.addcmul_(same, self.weight[columns], value=-beta)
        if self.excess is not None:
            sums = tile.entries.sum() if scale is None else tile.entries.sum(1).dot(scale[tile.rows].reciprocal())
            self.excess += sums

    def finish(self, loss: Tensor, energy: Tensor) -> tuple[Tensor, Tensor]:
        unit = self.matrix.unit
        loss = loss - (self.share.double() / self.labels.others).dot(self.logit.double()) / unit
        if self.excess is not None:
            # The weights add up to 0, but for the rounding of log-sum-exps. Their products with cosines near 1 keep
            # this error, those with the difference of a cosine and a typical one do not.
            excess = self.excess / 2.0 if self.mirrored else self.excess
            energy = energy - excess * self._typical() / (self.matrix.beta * unit)
        return loss, energy

    def _typical(self) -> Tensor:
        """The mean logit of a positive, weighted by the shares of the samples."""
        total = self.share.sum()
        return (self.weight.dot(self.logit) / total).masked_fill_(total == 0.0, 0.0)

    def _same(self, tile: Tile) -> tuple[Tensor, slice]:
        """1 where row and column are different samples of one label, else 0; and the columns with ones."""
        columns, group = self.labels.columns(tile.rows), self.labels.group
        same = tile.second(columns.stop - columns.start)
        torch.eq(group[tile.rows, None], group[columns], out=same).diagonal(tile.rows.start - columns.start).zero_()
        return same, columns
