"""The definition of the product with an epilogue, in PyTorch; the tests run it in place of the product."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

MOST_BETA = 40.0
"""The largest inverse temperature. All exponents are shifted by beta, the largest possible logit, so entries of
opposite vectors are exp(-2 beta). Up to this beta they exceed 2^-126, the smallest normal number of float32 and
bfloat16; beyond it whole sums could underflow. Float16, with a least number of 2^-24, is not supported: from beta = 10
on, entries of e^-17 are common."""

MOST_TAGS = 1 << 24
"""Tags are float32, which represents all integers below this number."""


@dataclass(frozen=True)
class Operand:
    """Rows of a matrix, with their vectors for the epilogue. All tensors and rows begin at multiples of 16 bytes."""

    x: Tensor
    """(n, d) bfloat16. Left-out rows may hold anything, NaN too."""
    scale: Tensor
    """(n,) float32, positive (NaN for a row with NaN or infinities). Anchors: the inverse norm times beta log2 e, 0 if
    left out. Others: the inverse norm, -1 if left out, padded with -1 to a multiple of ``Product.columns``."""
    tag: Tensor | None
    """Of the length of ``scale``: entries whose two tags are equal are excluded. None on both sides for no mask."""


class Product(ABC):
    """``exp(beta cos - beta)`` of the anchors of a panel with all others."""

    columns: int
    """Columns of a tile; each tile writes one partial sum per anchor."""

    @abstractmethod
    def __call__(self, p: Operand, q: Operand, shift: float, e: Tensor, sums: Tensor) -> None:
        """Write the exponentials and their sums.

        Args:
            p, q: the n anchors and the k others.
            shift: beta log2 e.
            e: (n, k) bfloat16, rows at multiples of 16 bytes: output, each exponential times its column's inverse norm.
            sums: (n, ceil(k / columns)) float32: output, the sums of the exponentials in each tile of columns.
        """


class PlainProduct(Product):
    """The definition: on any device, in a few passes over float32 matrices."""

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
