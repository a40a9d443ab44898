"""What the losses with and without prototypes share."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Reduction = Literal["none", "mean", "sum"]
REDUCTIONS = ("none", "mean", "sum")


def inverse(temperature: float | Tensor) -> float | Tensor:
    """beta = 1 / temperature."""
    return temperature.reciprocal() if isinstance(temperature, Tensor) else 1.0 / temperature


def logaddexp(a: Tensor, b: Tensor) -> Tensor:
    """log(e^a + e^b), whose gradient is finite where both are -inf (PyTorch's is NaN)."""
    empty = (a == -torch.inf) & (b == -torch.inf)
    return torch.logaddexp(a, b.masked_fill(empty, 0.0)).masked_fill(empty, -torch.inf)
