"""One side of the matrix: its vectors as operands of the products, and their gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..base import norm_eps

_LONGEST = 2.0**30  # below this norm, products of two vectors and weights over both norms are normal bfloat16 numbers


class Side:
    """Unit vectors ``u = scale * operand``. The operands are multiplied; ``scale`` is None for ones.

    In 16 bits the operands are the rows themselves, times powers of two if some rows are very long. Otherwise they are
    the rows themselves, where scaling the matrix is less work than scaling the rows, or else unit vectors.

    Args:
        x: (n, d) rows.
        rnorm: (n,) reciprocal norms, in the dtype of gradients.
        wanted: whether the gradient of the rows is wanted.
        valid: (n,) bool, the rows that may be read; None for all.
        ids: the rows of this side, without repetition; None for all.
        half: whether to multiply in the dtype of ``x``, which has 16 bits.
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
            power = self.rnorm.log2().ceil_().exp2_().to(x.dtype)  # 0, like a zero row, for rows of infinite norm
            self.power, self.scale = power, (self.rnorm / power).masked_fill_(power == 0.0, 1.0)
        self.mask = None if valid is None else torch.zeros_like(self.rnorm).masked_fill_(~valid, -torch.inf)
        """-inf for rows that must not be read, added to logits to leave them out of sums; None if there are none."""
        self.direct = valid is None and ids is None and (half or x.dtype == self.acc) and self.power is None
        """Whether the operands are the rows, without a copy."""
        self._last: tuple[slice, Tensor] | None = None

    def _has_extremes(self) -> bool:
        """Whether products of some rows would leave the range of the dtype. True in float16, and on devices where the
        host does not know the norms."""
        if self.x.device.type != "cpu" or self.x.dtype == torch.float16:
            return True
        return bool((self.rnorm < 1.0 / _LONGEST).any())

    def choose_operands(self, others: int) -> None:
        """Choose the operands, given the number of vectors of the other side that they are multiplied with at once."""
        if not self.half:
            self.direct = self.direct and self.dim >= others
            self.scale = self.rnorm if self.direct else None

    def operands(self, some: slice | Tensor) -> Tensor:
        """Operands of some of the vectors; zeros for rows that must not be read. The last copy is cached."""
        if self._last is not None and isinstance(some, slice):
            known, rows = self._last
            if known.start <= some.start and some.stop <= known.stop:
                return rows[some.start - known.start : some.stop - known.start]
        self._last = None  # free the old copy before the new one is made
        rows = self.x[some] if self.ids is None else self.x.index_select(0, self.ids[some])
        if self.direct:
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
        """Unit vectors of some rows."""
        if self.scale is None:
            return self.operands(some)
        return self.operands(some).to(self.acc) * self.scale[some, None]

    def finish(self, grad: Tensor, some: slice | Tensor) -> Tensor:
        """Turn ``scale * dL/du`` into dL/dx, in place, for x with u = x / |x|. Returns the sum of dL/du . u.

        Where |x| was clamped to eps, u is linear in x and nothing is projected out.
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

    def allocate_grad(self, at_once: bool) -> None:
        """Allocate the gradient, if wanted: in ``acc``, or in 16 bits for ``half`` if rows are written ``at_once``."""
        if not self.wanted:
            return
        make = torch.empty_like if at_once and self.ids is None else torch.zeros_like
        dtype = self.x.dtype if at_once and self.half else self.acc
        self.grad = make(self.x, dtype=dtype, memory_format=torch.contiguous_format)

    def finish_and_store(self, grad: Tensor, some: slice, at_once: int) -> Tensor:
        """:meth:`finish` the gradients of some vectors, ``at_once`` at a time, and store them. Returns their energy."""
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
        """Equal parts of all vectors, of at most ``size``; one empty part if there are none."""
        return parts(slice(0, self.size), size)


def parts(whole: slice, size: int) -> Iterator[slice]:
    """Equal parts of a range, of at most ``size``; one empty part of an empty range."""
    start, n = whole.start, whole.stop - whole.start
    count = max(-(-n // max(size, 1)), 1)
    return (slice(start + n * i // count, start + n * (i + 1) // count) for i in range(count))


def total(numbers: Sequence[Tensor]) -> Tensor:
    """The sum of 0-dimensional tensors; a single one, as in small problems, is returned without a call."""
    return numbers[0] if len(numbers) == 1 else torch.stack(tuple(numbers)).sum()
