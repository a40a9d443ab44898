"""The positives of a step: one entry of the matrix per sample, or all other samples of its label."""

from __future__ import annotations

from bisect import bisect_left, bisect_right

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .sides import Side


class Pairs:
    """The entries (row, col) of the matrix that are positives, and their shares in the loss."""

    def __init__(self, row: Tensor, col: Tensor, share: Tensor, rows: Side, cols: Side) -> None:
        self.row, self.col, self.share, self.rows, self.cols = row, col, share, rows, cols
        self.in_order = False
        """Whether the i-th pair is in row i."""
        self.place: Tensor | None = None
        self.logit = torch.empty_like(share)
        """The logit of each pair, from ``compute_logits`` or gathered from the tiles."""
        self.exact = False
        """Whether ``compute_logits`` has computed the logits."""
        self.added = False
        """Whether the positives are added to the sums of the matrix, which leaves them out."""
        self.by_logit = share
        """The derivative of the loss by each logit, from ``begin``; the matrix completes it."""

    def sort(self) -> None:
        """Sort the pairs by row, as ``within`` requires for a range of rows."""
        self.in_order = _is_range(self.row, self.rows.size)
        if not self.in_order:
            self.row, order = self.row.sort(stable=True)
            self.col, self.share = self.col[order], self.share[order]

    def begin(self, added: bool) -> None:
        """Initialise the derivatives, once the pairs are in order."""
        self.added = added
        self.by_logit = torch.zeros_like(self.share) if added else -self.share
        self.in_order = self.in_order or _is_range(self.row, self.rows.size)

    def anchors(self, rows: slice) -> Tensor | None:
        """The place of each pair's row among some rows; None if they are the rows themselves in order."""
        return None if self.in_order else self.row[self.within(rows)[0]] - rows.start

    def anchor_columns(self) -> Tensor | None:
        """The column of each pair; None if they are all columns in order."""
        return None if _is_range(self.col, self.cols.size) else self.col

    def compute_logits(self, factor: float, at_once: int) -> None:
        """Compute the logits in the dtype of the shares, ``at_once`` pairs at a time."""
        self.exact = True
        for start in range(0, self.row.shape[0], at_once):
            some = slice(start, start + at_once)
            row: slice | Tensor = some if self.in_order else self.row[some]
            col = self.col[some]
            dot = torch.linalg.vecdot(
                self.rows.operands(row).to(self.share.dtype), self.cols.operands(col).to(self.share.dtype)
            )
            for side, which in ((self.rows, row), (self.cols, col)):
                if side.scale is not None:
                    dot.mul_(side.scale[which])
            torch.mul(dot, factor, out=self.logit[some])

    def both_ways(self) -> None:
        """Of pairs that occur in both orders, one after the other: give both entries the sum of their derivatives."""
        pairs = self.by_logit.view(-1, 2)
        self.by_logit = (pairs + pairs.flip(1)).flatten()

    def within(self, rows: slice) -> tuple[slice, Tensor]:
        """The range of the pairs in some rows, and their positions in the flattened entries of these rows."""
        if self.in_order:
            here = rows
        elif rows.stop - rows.start == self.rows.size:
            here = slice(0, self.row.shape[0])
        else:
            here = slice(*torch.searchsorted(self.row, torch.tensor([rows.start, rows.stop])).tolist())
        if self.place is None:
            self.place = self.row * self.cols.size + self.col
        place = self.place[here]
        return here, place if rows.start == 0 else place - rows.start * self.cols.size


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


class SameLabel:
    """The positives of the supervised contrastive loss: the other samples of each sample's label.

    The samples are sorted by label, so that the positives of some rows are in few columns.

    Args:
        target: (M,) labels.
        valid: (M,) bool, the samples that are not ignored; None for all.
        acc: the dtype of the matrix.
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
        self.in_pairs = not bool((count > 2).any())
        """Whether a sample has at most one positive."""
        self.others = others.clamp_min_(1).to(acc)

    def set_shares(self, share: Tensor, even: bool) -> None:
        """Set the samples' shares in the loss; ``even``: those of samples with positives are equal."""
        self.share, self.even, self.weight = share, even, share / self.others
        self.logit = torch.zeros_like(share)
        """The sum of the logits of each sample's positives, which the matrix computes."""
        self.excess: Tensor | None = None
        """The sum of the matrix of weights, which but for rounding is 0, if it is wanted."""

    def columns(self, rows: slice) -> slice:
        """The columns of the labels of some rows."""
        first, last = bisect_right(self._ends, rows.start), bisect_left(self._ends, rows.stop)
        return slice(self._ends[first - 1] if first else 0, self._ends[last])

    def loss(self) -> Tensor:
        """The sum of the mean logits of the samples' positives, times the shares."""
        return (self.share.double() / self.others).dot(self.logit.double())

    def typical(self) -> Tensor:
        """The mean logit of a positive, weighted by the shares of the samples."""
        total = self.share.sum()
        return (self.weight.dot(self.logit) / total).masked_fill_(total == 0.0, 0.0)

    def pairs(self, rows: Side) -> Pairs:
        """The positives as entries of the matrix, if the samples are ``in_pairs``."""
        row = self.any.nonzero().squeeze(1)
        partner = row.view(-1, 2).flip(1).flatten()
        return Pairs(row, partner, self.share[row], rows, rows)


def _is_range(index: Tensor, size: int) -> bool:
    return index.shape[0] == size and torch.equal(index, torch.arange(size, device=index.device))
