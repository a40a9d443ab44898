"""The competitors. Each computes the same loss of (features, prototypes, target), temperature 0.1.

A variant is a callable that returns the scalar loss; the harness runs backward. ``applicable`` says why one
is left out of a problem, so that absent rivals are listed rather than forgotten.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import nckernels
from nckernels.backends import registry

from .problems import Problem

TEMPERATURE = 0.1
LossFunction = Callable[[Tensor, Tensor, Tensor], Tensor]

_OURS: dict[str, LossFunction] = {
    "nonl": lambda z, w, y: nckernels.nonl_loss(z, w, y, temperature=TEMPERATURE),
    "ntce": lambda z, w, y: nckernels.ntce_loss(z, w, y, temperature=TEMPERATURE),
    "normface": lambda z, w, y: nckernels.normface_loss(z, w, y, temperature=TEMPERATURE),
}


@dataclass(frozen=True)
class Variant:
    """A named way to compute a loss, with a note on what it does."""

    name: str
    note: str
    make: Callable[[Problem], LossFunction]
    why_not: Callable[[Problem, torch.device, torch.dtype], str | None] = lambda *_: None


def _ours(backend: str) -> Variant:
    def make(problem: Problem) -> LossFunction:
        function = _OURS[problem.loss]

        def loss(z: Tensor, w: Tensor, y: Tensor) -> Tensor:
            with nckernels.use_backend(backend):
                return function(z, w, y)

        return loss

    def why_not(problem: Problem, device: torch.device, dtype: torch.dtype) -> str | None:
        state = registry.explain(device, dtype)[backend]
        return None if state == "ready" else state

    return Variant(f"nckernels {backend}", "this package, one backend by name", make, why_not)


def naive(loss: str, z: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """The M x K form that a user would write: cosine logits, mask, logsumexp."""
    logits = F.normalize(z) @ F.normalize(w).T / TEMPERATURE
    if loss == "normface":
        return F.cross_entropy(logits.float(), y)
    pos = logits.gather(1, y[:, None]).squeeze(1)
    if loss == "nonl":
        logits = logits.scatter(1, y[:, None], -torch.inf)
    return (torch.logsumexp(logits.float(), 0)[y] - pos).mean()


def pairwise(loss: str, z: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """The M x M form of the paper's Eqs. 4-5: row i holds its class's prototype against every sample."""
    logits = F.normalize(w)[y] @ F.normalize(z).T / TEMPERATURE
    pos = logits.diagonal()
    if loss == "nonl":
        logits = logits.masked_fill(y[:, None] == y, -torch.inf)
    return (torch.logsumexp(logits.float(), 1) - pos).mean()


def _naive(problem: Problem) -> LossFunction:
    return lambda z, w, y: naive(problem.loss, z, w, y)


def _pairwise(problem: Problem) -> LossFunction:
    return lambda z, w, y: pairwise(problem.loss, z, w, y)


def _compiled(problem: Problem) -> LossFunction:
    torch._dynamo.reset()
    return torch.compile(_naive(problem), dynamic=False)


def _linear_cross_entropy(chunked: bool) -> Callable[[Problem], LossFunction]:
    def make(problem: Problem) -> LossFunction:
        options = torch.nn.LinearCrossEntropyOptions() if chunked else None

        def loss(z: Tensor, w: Tensor, y: Tensor) -> Tensor:
            unit = F.normalize(z) / TEMPERATURE
            return F.linear_cross_entropy(unit, F.normalize(w), y, options=options)

        return loss

    return make


def _only_normface(problem: Problem, device: torch.device, dtype: torch.dtype) -> str | None:
    if problem.loss != "normface":
        return "computes NormFace only"
    return None if hasattr(F, "linear_cross_entropy") else f"torch {torch.__version__} does not have it"


def _only_contrast(problem: Problem, device: torch.device, dtype: torch.dtype) -> str | None:
    if problem.loss == "normface":
        return "NormFace has no M x M form"
    return None if problem.m <= 8192 else "takes several GB at this size"


BASELINE = "naive eager"

VARIANTS = (
    _ours("triton"),
    _ours("cuda"),
    _ours("native"),
    _ours("chunked"),
    Variant(BASELINE, "M x K logits, masked logsumexp, autograd", _naive),
    Variant("naive torch.compile", "the same through inductor", _compiled),
    Variant("M x M eager", "Eqs. 4-5 as printed", _pairwise, _only_contrast),
    Variant(
        "F.linear_cross_entropy",
        "of normalised inputs, PyTorch's reference path",
        _linear_cross_entropy(False),
        _only_normface,
    ),
    Variant(
        "F.linear_cross_entropy chunked",
        "of normalised inputs, PyTorch's chunked path",
        _linear_cross_entropy(True),
        _only_normface,
    ),
)
