"""The variants of a benchmark: their interface, and those of this package, one per backend or in a CUDA graph."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import nckernels
from nckernels.backends import registry

from .problems import Problem

LossFunction = Callable[..., Tensor]
"""(features, prototypes or keys, target), or (features, target), to the scalar loss."""

_COPIES = 6
"""Approximate number of float32 matrices that autograd and the masks of a naive form hold at once."""


@dataclass(frozen=True)
class Variant:
    """A named way to compute a loss, with a note on what it computes."""

    name: str
    note: str
    make: Callable[[Problem], LossFunction]
    why_not: Callable[[Problem, torch.device, torch.dtype], str | None] = lambda *_: None
    """Why it does not support a problem; absent rivals are listed with the reason."""
    stored: Callable[[Problem], int] = lambda _: 0
    """Number of entries of the largest matrix that it stores."""
    graph: bool = False
    """Whether it is captured once in a CUDA graph and replayed."""
    compiles: bool = False
    """Whether the first step compiles."""
    tf32: bool = False
    """Whether it multiplies float32 in tf32 regardless of torch's setting, which gives it a larger tolerance."""

    def absent(self, problem: Problem, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why this variant cannot run here, or None."""
        if self.graph and device.type != "cuda":
            return "needs CUDA"
        reason = self.why_not(problem, device, dtype)
        need, room = 4 * _COPIES * self.stored(problem), memory_room(device)
        if reason is None and need > room:
            reason = f"would take about {need / 1e9:.0f} GB, and {room / 1e9:.0f} GB may be used here"
        return reason


def memory_room(device: torch.device) -> int:
    """Bytes of memory that a variant may use."""
    if device.type == "cuda":
        return int(0.8 * torch.cuda.get_device_properties(device).total_memory)
    if "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return 8 << 30
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def matrix(problem: Problem) -> int:
    """Number of entries of the similarity matrix."""
    return problem.m * problem.columns


def our_loss(problem: Problem) -> LossFunction:
    """This package's function of the problem's tensors."""
    # SimCLR is SupCon with labels that identify the two views of every image.
    function: LossFunction = getattr(nckernels, f"{problem.loss.replace('simclr', 'supcon')}_loss")
    if problem.loss in ("clip", "uniformity"):  # no targets
        return problem.bound(lambda *args, **options: function(*args[:-1], **options))
    return problem.bound(function)


def ours(backend: str) -> Variant:
    """This package with one backend by name."""

    def make(problem: Problem) -> LossFunction:
        function = our_loss(problem)

        def loss(*args: Tensor) -> Tensor:
            with nckernels.use_backend(backend):
                return function(*args)

        return loss

    def why_not(problem: Problem, device: torch.device, dtype: torch.dtype) -> str | None:
        state = registry.explain(device, dtype)[backend]
        return None if state == "ready" else state

    return Variant(f"nckernels {backend}", "this package, one backend by name", make, why_not)


def as_graph(variant: Variant) -> Variant:
    """The same variant, replayed from a CUDA graph."""
    note = f"{variant.note}; forward and backward in one CUDA graph"
    return replace(variant, name=f"{variant.name}, CUDA graph", note=note, graph=True)


OURS = tuple(ours(backend) for backend in ("triton", "cuda", "native", "chunked"))
