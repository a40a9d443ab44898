"""Loss and gradient in one go: what flows back is known, up to a factor, as soon as the sums are.

In the class direction each class is contrasted with the samples, in the instance direction each sample with the
classes; below, *anchors* with *others*. A part of the anchors with all others, as many as half of the workspace
holds, is a block whose sums are complete: its exponentials go on to be weights before the next part is begun, and no
product is made twice.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..base import Inputs, Needs, Reduced, Spec, Step, accumulation_dtype, number
from .tiles import SHIFT_FREE_LIMIT, rnorm_of, through_normalisation

_NARROWEST = 64  # anchors of a part; with fewer, thin products cost more than making some of them twice


def fits(features: Tensor, prototypes: Tensor, spec: Spec) -> bool:
    """Whether a step takes the problem: one direction, samples with classes, a CPU, and parts that are wide enough."""
    anchors, others = (prototypes, features) if spec.by_class else (features, prototypes)
    wide = _anchors_of_a_part(others, spec) >= min(anchors.shape[0], _NARROWEST)
    return features.device.type == "cpu" and spec.direction != "both" and not spec.square and wide


def step(inputs: Inputs, reduced: Reduced, spec: Spec, needs: Needs) -> Step:
    """See :meth:`nckernels.backends.base.Backend.step`; for problems that ``fits``."""
    z, w, target = inputs[:3]
    acc, beta = accumulation_dtype(z.dtype), number(inputs.inv_temperature, z.dtype)
    takes_part = target != spec.ignore_index
    valid = None if bool(takes_part.all()) else takes_part
    label = target if valid is None else target.where(valid, 0)
    weight = torch.ones_like(label, dtype=acc) if reduced.weight is None else reduced.weight.to(acc)
    total = (weight if valid is None else weight.where(valid, 0.0)).sum()
    if reduced.of_nothing == 0.0:
        total = total.masked_fill(total == 0.0, 1.0)
    share = weight / total if reduced.mean else weight
    if valid is not None:
        share = share.where(valid, 0.0)

    by_z, by_w = (
        torch.zeros_like(x, dtype=acc, memory_format=torch.contiguous_format) if need else None
        for x, need in ((z, needs.features), (w, needs.prototypes))
    )
    sample = torch.arange(label.shape[0], device=z.device)
    if spec.by_class:
        present = None
        if 4 * w.shape[0] > z.shape[0]:  # with more samples hardly a class is missing
            present, label = label.unique(return_inverse=True)
        anchors, others = _Rows(w, acc, by_w, ids=present), _Rows(z, acc, by_z, valid)
        positive = label, sample
    else:
        anchors, others = _Rows(z, acc, by_z, valid), _Rows(w, acc, by_w)
        positive = sample, label
    loss, energy = _Contrast(anchors, others, positive, share, beta, spec).run()
    if reduced.mean:
        loss = loss.masked_fill(total == 0.0, reduced.of_nothing)
    return Step(loss, by_z, by_w, energy / beta if needs.inv_temperature else None)


class _Rows:
    """Vectors of one side, their norms, and where their gradient goes."""

    def __init__(
        self, x: Tensor, acc: torch.dtype, grad: Tensor | None, valid: Tensor | None = None, ids: Tensor | None = None
    ) -> None:
        self.x, self.grad = x, grad
        self.valid, self.ids = valid, ids  # which may be looked at, and which are meant; None for all
        self.rnorm = rnorm_of(x, acc, valid)
        if ids is not None:
            self.rnorm = self.rnorm[ids]
        self.size = self.rnorm.shape[0]
        self.as_they_are = x.dtype == acc and valid is None and ids is None

    def unit(self, some: slice) -> Tensor:
        """Unit vectors; zeros for those that nobody may look at."""
        unit = self.x[some if self.ids is None else self.ids[some]] * self.rnorm[some, None]
        return unit if self.valid is None else unit.masked_fill_(~self.valid[some, None], 0.0)

    def put(self, grad: Tensor, some: slice) -> None:
        """Store gradients of some of the vectors."""
        assert self.grad is not None
        self.grad[some if self.ids is None else self.ids[some]] = grad

    def parts(self, size: int) -> Iterator[slice]:
        """Equal parts of at most ``size``; an empty one if there is nothing."""
        count = max(-(-self.size // size), 1)
        return (slice(self.size * i // count, self.size * (i + 1) // count) for i in range(count))


class _Contrast:
    """The sum over the samples of their share of the loss, and its gradient."""

    def __init__(
        self, anchors: _Rows, others: _Rows, positive: tuple[Tensor, Tensor], share: Tensor, beta: float, spec: Spec
    ) -> None:
        self.anchors, self.others, self.positive, self.share = anchors, others, positive, share
        self.beta, self.spec = beta, spec
        self.of_anchor = share.new_zeros(anchors.size).index_add_(0, positive[0], share)
        d = others.x.shape[1]
        self.width = min(_anchors_of_a_part(others.x, spec), anchors.size) or 1
        # Others are multiplied as they are where scaling the block is less work than scaling them.
        self.raw = others.as_they_are and d >= self.width
        self.tile = max(_room(others.x, spec) // 16 // d, 16)

    def run(self) -> tuple[Tensor, Tensor]:
        """The loss, and the sum of dL/dt t, which is beta dL/dbeta."""
        anchors, others = self.anchors, self.others
        loss, by_anchors, by_others = self.share.new_zeros(3)
        memory = self.share.new_empty(self.width * others.size)
        for part in anchors.parts(self.width):
            a, n = anchors.unit(part), part.stop - part.start
            block = memory[: n * others.size].view(n, others.size)
            loss += self._forward(part, a, block)
            if others.grad is not None:
                others.grad.addmm_(block.T, a)
            if anchors.grad is not None:
                grad = self._times_others(block)
                by_anchors += through_normalisation(grad, a, anchors.rnorm[part], anchors.x).sum()
                anchors.put(grad, part)
        if others.grad is None:
            return loss, by_anchors
        for tile in others.parts(self.tile):
            by_others += through_normalisation(others.grad[tile], others.unit(tile), others.rnorm[tile], others.x).sum()
        return loss, by_others

    def _tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """The others: all of them as they are, or their unit vectors, tile by tile."""
        if self.raw:
            yield slice(0, self.others.size), self.others.x
        else:
            for tile in self.others.parts(self.tile):
                yield tile, self.others.unit(tile)

    def _forward(self, part: slice, a: Tensor, block: Tensor) -> Tensor:
        """A part's share of the loss; ``block`` becomes beta dL/dt, the gradient of the cosines."""
        scaled = a * self.beta
        for tile, o in self._tiles():
            torch.mm(scaled, o.T, out=block[:, tile])
        if self.raw:
            block.mul_(self.others.rnorm)
        at, share = self._positives(part)
        positive = block[at]
        if self.spec.exclude == "target":
            block[at] = -torch.inf
        if self.others.valid is not None:
            block.masked_fill_(~self.others.valid, -torch.inf)
        if self.anchors.valid is not None:
            block.masked_fill_(~self.anchors.valid[part, None], -torch.inf)
        top: Tensor | float = 0.0
        if self.beta > SHIFT_FREE_LIMIT:
            top = block.amax(1, keepdim=True)
            top = top.masked_fill_(top == -torch.inf, 0.0)
            block.sub_(top)
            top = top.squeeze(1)
        sums = block.exp_().sum(1)
        empty = sums == 0.0
        weight = self.of_anchor[part]
        loss = (weight * (sums.log() + top).masked_fill_(empty, 0.0)).sum() - (share * positive).sum()
        block.mul_((weight / sums).masked_fill_(empty, 0.0).mul_(self.beta)[:, None])
        block[at] -= share * self.beta
        return loss

    def _positives(self, part: slice) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Where the positives are in a part's block, and their samples' shares."""
        (anchor, other), share = self.positive, self.share
        if part.stop - part.start < self.anchors.size:
            here = ((anchor >= part.start) & (anchor < part.stop)).nonzero().squeeze(1)
            anchor, other, share = anchor[here] - part.start, other[here], share[here]
        return (anchor, other), share

    def _times_others(self, block: Tensor) -> Tensor:
        """The gradient of a part's unit vectors."""
        if self.raw:
            block.mul_(self.others.rnorm)
        grad = block.new_zeros(block.shape[0], self.others.x.shape[1])
        for tile, o in self._tiles():
            grad.addmm_(block[:, tile], o)
        return grad


def _room(others: Tensor, spec: Spec) -> int:
    """The workspace in numbers."""
    return spec.workspace // accumulation_dtype(others.dtype).itemsize


def _anchors_of_a_part(others: Tensor, spec: Spec) -> int:
    """Half of the workspace is for the block, a quarter for its anchors' unit vectors and gradients."""
    room, (n, d) = _room(others, spec), others.shape
    return min(room // 2 // max(n, 1), room // 4 // (4 * d))
