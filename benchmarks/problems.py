"""What is timed: a loss, its sizes, and the tensors of one step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LOSSES = ("nonl", "ntce", "normface")


@dataclass(frozen=True)
class Problem:
    """One loss on M samples, K classes, d features, labels uniform at random."""

    loss: str
    m: int
    k: int
    d: int

    @property
    def gemm_flops(self) -> int:
        """6MKd: the similarities and the two gradients, without any recomputation."""
        return 6 * self.m * self.k * self.d

    def tensors(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Features and prototypes that require grad, and targets."""
        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(self.m, self.d, generator=generator)
        w = torch.randn(self.k, self.d, generator=generator)
        y = torch.randint(self.k, (self.m,), generator=generator)
        return (
            z.to(device, dtype).requires_grad_(),
            w.to(device, dtype).requires_grad_(),
            y.to(device),
        )

    def __str__(self) -> str:
        return f"{self.loss} M={self.m} K={self.k} d={self.d}"


_QUICK = ((512, 10, 128), (4096, 1000, 512), (2048, 10000, 512))
_FULL = (*_QUICK, (8192, 1000, 128), (8192, 1000, 2048), (16384, 4000, 64))


def suite(name: str, losses: tuple[str, ...] = LOSSES) -> list[Problem]:
    """The problems of a suite, by increasing work within each loss."""
    sizes = {"quick": _QUICK, "full": _FULL}[name]
    problems = [Problem(loss, *size) for loss in losses for size in sizes]
    return sorted(problems, key=lambda p: (LOSSES.index(p.loss), p.gemm_flops))
