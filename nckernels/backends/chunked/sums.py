"""Log-sum-exps that are accumulated tile by tile."""

from __future__ import annotations

import torch
from torch import Tensor


class PlainLSE:
    """log sum exp(b) E, from tiles of E = exp(t)."""

    def __init__(self, size: int, bias: Tensor | None, like: Tensor, acc: torch.dtype) -> None:
        self.total = like.new_zeros(size, dtype=acc)
        self.factor = None if bias is None else bias.exp()

    def update(self, e: Tensor, dim: int, kept: slice, reduced: slice) -> None:
        if self.factor is None:
            self.total[kept] += e.sum(dim)
        else:
            self.total[kept] += torch.mv(e.T if dim == 0 else e, self.factor[reduced])

    def result(self, dtype: torch.dtype) -> Tensor:
        return self.total.to(dtype).log_()


class StreamingLSE:
    """log sum exp(t + b), from tiles of t, with a running maximum."""

    def __init__(self, size: int, bias: Tensor | None, like: Tensor, acc: torch.dtype) -> None:
        self.maximum = like.new_full((size,), -torch.inf, dtype=acc)
        self.total = like.new_zeros(size, dtype=acc)
        self.bias = bias

    def update(self, t: Tensor, dim: int, kept: slice, reduced: slice) -> None:
        if self.bias is not None:
            t = t + self.bias[reduced].unsqueeze(1 - dim)
        maximum = torch.maximum(self.maximum[kept], t.amax(dim))
        shift = maximum.masked_fill(maximum == -torch.inf, 0.0)
        total = self.total[kept] * (self.maximum[kept] - shift).exp_()
        self.total[kept] = total + (t - shift.unsqueeze(dim)).exp_().sum(dim)
        self.maximum[kept] = maximum

    def result(self, dtype: torch.dtype) -> Tensor:
        return self.total.to(dtype).log_().add_(self.maximum)
