"""Two engines for the first product of a panel in ``step.py``, from the rows to the entries of the gradient.

The library's product writes float32. Two kernels read it, one for the sums and one for the entries. With 16-bit inputs
this moves 14 bytes an entry.

The product with an epilogue (``backends/quack``) takes the exponentials of its products while these are in registers.
It writes the exponentials, in 16 bits, and their sums. When the sums are complete, one kernel multiplies the
exponentials by the weights of their anchors and another one sets the positives. This moves 6 bytes an entry.

Multiplying the anchors' rows and the finished sums by the weights would avoid the elementwise kernel. But a weighted
row is rounded in every direction, whereas a rounded entry errs along its row, and the projection on the tangent space
removes most of that. For features close to their prototypes the gradient's error would be twice as large.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..quack import Operand, Product
from .plan import ceil_div, pad16
from .sides import Side

if TYPE_CHECKING:
    from .kernels import StepKernels


class Engine(ABC):
    """The first product of all panels of one step."""

    @abstractmethod
    def entries(self, x_rows: Tensor, start: int, stop: int) -> Tensor:
        """(stop - start, q.slots): the entries of p's slots [start, stop), whose rows are ``x_rows``, times the inverse
        norms of both sides. Also writes the slots' log-sum-exps to ``p.lse``."""


class LibraryEngine(Engine):
    """The vendor's GEMM, on any device."""

    def __init__(self, kernels: StepKernels, p: Side, q: Side, rows: int, scale: Tensor | None) -> None:
        self.kernels, self.p, self.q, self.scale = kernels, p, q, scale
        self.products = torch.empty(rows, pad16(q.slots), dtype=torch.float32, device=p.x.device)
        self.h = self.products if p.x.dtype == torch.float32 else torch.empty_like(self.products, dtype=p.x.dtype)

    def entries(self, x_rows: Tensor, start: int, stop: int) -> Tensor:
        kernels, p, q, n = self.kernels, self.p, self.q, stop - start
        kernels.matmul(x_rows, q.x.t(), self.products[:n, : q.slots], accumulate=False)
        split = kernels.panel_split(n, q.slots)
        largest, total = torch.empty(2, split, n, dtype=torch.float32, device=p.x.device)
        kernels.panel_log_sum_exp(p, q, self.products, (largest, total), start, stop)
        kernels.panel_entries(p, q, self.products, (largest, total), self.h, start, stop, self.scale)
        return self.h[:n, : q.slots]


class EpilogueEngine(Engine):
    """A product with an epilogue, for bfloat16 and a temperature that the host knows."""

    def __init__(
        self, kernels: StepKernels, product: Product, beta: float, p: Side, q: Side, rows: int, pos: Tensor
    ) -> None:  # fmt: skip
        self.kernels, self.product, self.p, self.q, self.pos = kernels, product, p, q, pos
        self.shift = beta * math.log2(math.e)

        def new(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(size, dtype=dtype, device=p.x.device)

        parts = ceil_div(q.slots, product.columns)
        self.e, self.sums = new(rows, pad16(q.slots), dtype=p.x.dtype), new(rows, parts)
        self.weight = new(rows)
        # The slot of each class, for compacted prototypes.
        self.slot = new(p.x.shape[0], dtype=torch.int32) if p.gather else None

        def operand(side: Side, length: int, slot: Tensor | None) -> tuple[Tensor, Tensor | None]:
            scale = new(length)
            tag = new(length) if kernels.spec.exclude == "target" else None
            kernels.epilogue_operand(side, scale, tag, slot, anchors=side is p)
            return scale, tag

        self.p_scale, self.p_tag = operand(p, p.slots, self.slot)
        self.others = Operand(q.x, *operand(q, parts * product.columns, None))

    def entries(self, x_rows: Tensor, start: int, stop: int) -> Tensor:
        kernels, p, q, n = self.kernels, self.p, self.q, stop - start
        tag = None if self.p_tag is None else self.p_tag[start:stop]
        e, sums = self.e[:n, : q.slots], self.sums[:n]
        self.product(Operand(x_rows, self.p_scale[start:stop], tag), self.others, self.shift, e, sums)
        kernels.epilogue_weights(p, sums, self.weight, start, stop)
        kernels.weighted_entries(p, self.weight, self.e, start, stop)
        kernels.positives(p, q, self.pos, self.weight, self.slot, self.e, start, stop)
        return e
