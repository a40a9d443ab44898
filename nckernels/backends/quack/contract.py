"""What the product with an epilogue computes, said in PyTorch; the tests run this in its place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

MOST_BETA = 40.0
"""Up to this inverse temperature all exponents can be shifted by beta, the largest logit that there can be: entries of
opposite vectors are then exp(-2 beta) > 2^-126, where float32 and bfloat16 end. Beyond it whole sums could vanish.
Float16 ends at 2^-24 and is not offered: an entry of e^-17 is nothing out of the ordinary from beta = 10 on."""

MOST_TAGS = 1 << 24
"""Tags are float32, which hold all integers below."""


@dataclass(frozen=True)
class Operand:
    """Rows of a matrix, and what the epilogue knows of each. All begin at multiples of 16 bytes, rows of ``x`` too."""

    x: Tensor
    """(n, d) bfloat16. Rows that are left out may hold anything, NaN too."""
    scale: Tensor
    """(n,) float32, positive (or NaN where the row has NaN). Anchors: the inverse norm times beta log2 e, 0 where left
    out. Others: the inverse norm, -1 where left out, and -1 behind the last up to a multiple of ``Product.columns``."""
    tag: Tensor | None
    """As long as ``scale``: entries whose two tags agree are left out. None on both sides: no such mask."""


class Product(ABC):
    """``exp(beta cos - beta)`` of anchors with others, for a panel."""

    columns: int
    """Of a tile, whose part of an anchor's sum is one number."""

    @abstractmethod
    def __call__(self, p: Operand, q: Operand, shift: float, e: Tensor, sums: Tensor) -> None:
        """For ``k`` columns, as many as ``q.x`` has rows:

        Args:
            p, q: the anchors and the others.
            shift: beta log2 e.
            e: (n, k) bfloat16, rows at multiples of 16 bytes: each exponential times its column's inverse norm.
            sums: (n, k / columns) float32: the exponentials' sums, a number for each tile of columns.
        """


class PlainProduct(Product):
    """The contract itself: on any device, in a few passes over float32 matrices."""

    columns = 32

    def __call__(self, p: Operand, q: Operand, shift: float, e: Tensor, sums: Tensor) -> None:
        (n, k), q_scale = e.shape, q.scale[: e.shape[1]]
        scale = p.scale[:, None] * q_scale
        exponentials = torch.exp2((p.x.float() @ q.x.float().t()) * scale - shift)
        left_out = scale <= 0  # false where the scale is NaN
        if p.tag is not None and q.tag is not None:
            left_out |= p.tag[:, None] == q.tag[:k]
        exponentials.masked_fill_(left_out, 0.0)
        e.copy_(exponentials * q_scale)
        tiles = exponentials.new_zeros(n, sums.shape[1] * self.columns)
        tiles[:, :k] = exponentials
        sums.copy_(tiles.view(n, -1, self.columns).sum(2))
