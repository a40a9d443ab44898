"""The positives of a step: one entry of the matrix per sample, or all other samples of its label."""

from __future__ import annotations

from collections.abc import Iterable

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
        return torch.logaddexp(lse, logit), -share.dot(logsigmoid(below)), -share * below.neg_().sigmoid_()
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
    """The mean cosine of each sample with the others of its label, and its gradient.

    With unit rows u, n samples of a label and their sum m, the mean is ``u_j . (m - u_j) / (n - 1)``, which costs O(M
    d) for all pairs. With shares s and ``a_j = s_j / (n - 1)`` the gradient of ``sum_j s_j pos_j`` by u_j is ``a_j (m -
    u_j) + sum_others a_l u_l``.
    """

    def __init__(self, rows: Side, label: Tensor) -> None:
        self.rows = rows
        sample = None if rows.valid is None else rows.valid.nonzero().squeeze(1)
        _, group, count = (label if sample is None else label[sample]).unique(return_inverse=True, return_counts=True)
        several = count > 1
        self.groups = int(several.sum())
        place = (several.cumsum(0) - 1).masked_fill_(~several, self.groups)  # the last one: samples without others
        self.group, others = place[group], (count - 1)[group]
        if sample is not None:
            self.group = self.group.new_full(label.shape, self.groups).index_copy_(0, sample, self.group)
            others = others.new_zeros(label.shape).index_copy_(0, sample, others)
        self.any = others > 0
        """(M,) bool: whether the label of a sample has other samples."""
        self.others = others.clamp_min_(1).to(rows.acc)

    def compute_sums(self, share: Tensor, even: bool, tiles: Iterable[slice]) -> None:
        """Compute the sums of the labels from the samples' shares; ``even``: all non-zero shares are equal."""
        self.weight = share / self.others
        self.sums = share.new_zeros(self.groups + 1, self.rows.dim)
        self.weighted = None if even else torch.zeros_like(self.sums)
        for tile in tiles:
            unit = self.rows.unit(tile)
            self.sums.index_add_(0, self.group[tile], unit)
            if self.weighted is not None:
                self.weighted.index_add_(0, self.group[tile], unit * self.weight[tile, None])

    def subtract(self, grad: Tensor, some: slice, beta: float) -> Tensor:
        """Subtract beta times the gradient of ``sum_j s_j pos_j`` by some unit rows, times their scale, from ``grad``.
        Returns the part of the sum that belongs to these samples."""
        group, weight = self.group[some], self.weight[some, None]
        unit = self.rows.unit(some)
        rest = self.sums.index_select(0, group).sub_(unit)
        total = torch.linalg.vecdot(unit, rest).double().dot(self.weight[some].double())
        rest.mul_(weight)
        if self.weighted is None:
            rest.mul_(2.0)
        else:
            rest.add_(self.weighted.index_select(0, group)).sub_(unit * weight)
        if self.rows.scale is not None:
            rest.mul_(self.rows.scale[some, None])
        grad.sub_(rest, alpha=beta)
        return total


def _is_range(index: Tensor, size: int) -> bool:
    return index.shape[0] == size and torch.equal(index, torch.arange(size, device=index.device))
