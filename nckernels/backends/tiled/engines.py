"""Two engines for the first product of a panel in ``step.py``, from the rows to the entries of the gradient.

The library's product writes float32. Two kernels read it, one for the sums and one for the entries. With 16-bit inputs
this moves 14 bytes an entry.

The product with an epilogue (``backends/quack``) takes the exponentials of its products while these are in registers.
It writes the exponentials, in 16 bits, and their sums. When the sums are complete, one kernel multiplies the
exponentials by the weights of their anchors, and another one sets the positives. This moves 6 bytes an entry.

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
    from .kernels import EpilogueKernels, StepKernels


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
        size, device, dtype = (rows, pad16(q.slots)), p.x.device, p.x.dtype
        products = torch.empty(size, dtype=torch.float32, device=device)
        h = products if dtype == torch.float32 else torch.empty(size, dtype=dtype, device=device)
        self.products, self.h = (products, h) if size[1] == q.slots else (products[:, : q.slots], h[:, : q.slots])
        split = kernels.panel_split(rows, q.slots)
        self.partial = torch.empty(2, split, rows, dtype=torch.float32, device=device)

    def entries(self, x_rows: Tensor, start: int, stop: int) -> Tensor:
        kernels, p, q, products, h = self.kernels, self.p, self.q, self.products, self.h
        n = stop - start
        if n < h.shape[0]:
            products, h = products[:n], h[:n]
        kernels.matmul(x_rows, q.x.t(), products, accumulate=False)
        kernels.panel_log_sum_exp(p, q, products, self.partial, start, stop)
        kernels.panel_entries(p, q, products, self.partial, h, start, stop, self.scale)
        return h


class EpilogueEngine(Engine):
    """A product with an epilogue, for bfloat16 and a temperature that the host knows."""

    def __init__(
        self, kernels: EpilogueKernels, product: Product, beta: float, p: Side, q: Side, rows: int, pos: Tensor
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

        tagged = kernels.spec.exclude == "target"
        padded = parts * product.columns
        p_scale, p_tag = new(p.slots), new(p.slots) if tagged else None
        q_scale, q_tag = new(padded), new(padded) if tagged else None
        kernels.epilogue_operands(p, p_scale, p_tag, self.slot, q, q_scale, q_tag)
        self.p_scale, self.p_tag = p_scale, p_tag
        self.others = Operand(q.x, q_scale, q_tag)

    def entries(self, x_rows: Tensor, start: int, stop: int) -> Tensor:
        kernels, p, q, n = self.kernels, self.p, self.q, stop - start
        tag = None if self.p_tag is None else self.p_tag[start:stop]
        e, sums = self.e[:n, : q.slots], self.sums[:n]
        self.product(Operand(x_rows, self.p_scale[start:stop], tag), self.others, self.shift, e, sums)
        kernels.weighted_entries(p, sums, self.weight, self.e, start, stop)
        kernels.positives(p, q, self.pos, self.weight, self.slot, self.e, start, stop)
        return e
