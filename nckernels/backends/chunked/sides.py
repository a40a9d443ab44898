"""One side of the matrix: its vectors as they are multiplied, and the way back to their gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..base import norm_eps

_LONGEST = 2.0**30  # products of two such vectors, and weights over both norms, are normal bfloat16 numbers


class Side:
    """Vectors ``u = scale * operand``, of which operands are what is multiplied; ``scale`` is None for ones.

    In 16 bits operands are the rows as they are, or times powers of two where some are very long. Otherwise they are
    the rows as they are too, where scaling the matrix is less work than scaling them, or else unit vectors.

    Args:
        x: (n, d) rows.
        rnorm: their reciprocal norms, in the dtype of gradients.
        wanted: whether their gradient is.
        valid: (n,), which rows may be looked at; None for all.
        ids: which rows are meant, each once; None for all.
        half: multiply in the dtype of ``x``, a 16-bit one.
    """

    def __init__(
        self, x: Tensor, rnorm: Tensor, wanted: bool, valid: Tensor | None, ids: Tensor | None, half: bool
    ) -> None:
        self.x, self.acc, self.wanted, self.valid, self.ids, self.half = x, rnorm.dtype, wanted, valid, ids, half
        self.grad: Tensor | None = None
        self.rnorm = rnorm if ids is None else rnorm.index_select(0, ids)
        self.size, self.dim = self.rnorm.shape[0], x.shape[1]
        self.power: Tensor | None = None
        self.scale: Tensor | None = self.rnorm if half else None
        if half and self._has_extremes():
            power = self.rnorm.log2().ceil_().exp2_().to(x.dtype)  # 0 for rows of infinite norm, which count as zeros
            self.power, self.scale = power, (self.rnorm / power).masked_fill_(power == 0.0, 1.0)
        self.mask = None if valid is None else torch.zeros_like(self.rnorm).masked_fill_(~valid, -torch.inf)
        """What takes those rows out of a sum of exponentials that may not be looked at."""
        self.at_hand = valid is None and ids is None and (half or x.dtype == self.acc) and self.power is None
        """Whether rows are operands without a copy."""
        self._last: tuple[slice, Tensor] | None = None

    def _has_extremes(self) -> bool:
        """Whether there are rows whose products with others would leave the range of the dtype. True where the host
        cannot know, and in float16."""
        if self.x.device.type != "cpu" or self.x.dtype == torch.float16:
            return True
        return bool((self.rnorm < 1.0 / _LONGEST).any())

    def meet(self, others: int) -> None:
        """Decide what operands are, given with how many vectors of the other side they are multiplied at once."""
        if not self.half:
            self.at_hand = self.at_hand and self.dim >= others
            self.scale = self.rnorm if self.at_hand else None

    def operands(self, some: slice | Tensor) -> Tensor:
        """Operands of some of the vectors; zeros for rows that nobody may look at. The last copy is remembered."""
        if self._last is not None and isinstance(some, slice):
            known, rows = self._last
            if known.start <= some.start and some.stop <= known.stop:
                return rows[some.start - known.start : some.stop - known.start]
        self._last = None  # free the old copy before the new one is made
        rows = self.x[some] if self.ids is None else self.x.index_select(0, self.ids[some])
        if self.at_hand:
            return rows
        factor = self.power if self.half else self.rnorm
        if factor is not None:
            rows = rows * factor[some, None]
        if self.valid is not None:
            rows = rows.masked_fill(~self.valid[some, None], 0.0)
        if isinstance(some, slice):
            self._last = some, rows
        return rows

    def unit(self, some: slice | Tensor) -> Tensor:
        """Unit vectors of some of the rows."""
        if self.scale is None:
            return self.operands(some)
        return self.operands(some).to(self.acc) * self.scale[some, None]

    def finish(self, grad: Tensor, some: slice | Tensor) -> Tensor:
        """Turn ``scale * dL/du`` into dL/dx, in place, for x with u = x / |x|. Returns the sum of dL/du . u.

        Where |x| was clamped, u is linear in x and nothing is projected out.
        """
        x, rnorm = self.operands(some).to(self.acc), self.rnorm[some]
        dot = torch.linalg.vecdot(grad, x)
        radial = dot.masked_fill(rnorm >= 1.0 / norm_eps(self.x.dtype), 0.0)
        if self.scale is not None:
            radial.mul_(self.scale[some]).mul_(self.scale[some])
        grad.addcmul_(x, radial[:, None], value=-1.0)
        if self.scale is None:
            grad.mul_(rnorm[:, None])
        elif self.power is not None:
            grad.mul_(self.power[some, None])
        return dot.sum()

    def make_room(self, at_once: bool) -> None:
        """For the gradient, if wanted: zeros in ``acc`` to add to, or in 16 bits what is written ``at_once``."""
        if not self.wanted:
            return
        make = torch.empty_like if at_once and self.ids is None else torch.zeros_like
        dtype = self.x.dtype if at_once and self.half else self.acc
        self.grad = make(self.x, dtype=dtype, memory_format=torch.contiguous_format)

    def finish_and_store(self, grad: Tensor, some: slice, at_once: int) -> Tensor:
        """:meth:`finish` gradients of some of the vectors, ``at_once`` of them, and put them where they belong."""
        assert self.grad is not None
        energies = []
        for tile in parts(some, at_once):
            part = grad[tile.start - some.start : tile.stop - some.start].to(self.acc)
            energies.append(self.finish(part, tile))
            if self.ids is not None:
                self.grad[self.ids[tile]] = part.to(self.grad.dtype)
            elif part.data_ptr() != self.grad[tile].data_ptr():
                self.grad[tile].copy_(part)
        return total(energies)

    def parts(self, size: int) -> Iterator[slice]:
        """Equal parts of at most ``size``; an empty one if there is nothing."""
        return parts(slice(0, self.size), size)


def parts(whole: slice, size: int) -> Iterator[slice]:
    """Equal parts of at most ``size``; an empty one if there is nothing."""
    start, n = whole.start, whole.stop - whole.start
    count = max(-(-n // max(size, 1)), 1)
    return (slice(start + n * i // count, start + n * (i + 1) // count) for i in range(count))


def total(numbers: Sequence[Tensor]) -> Tensor:
    """The sum of 0-dimensional tensors, of which there is one in small problems, where each call counts."""
    return numbers[0] if len(numbers) == 1 else torch.stack(tuple(numbers)).sum()
