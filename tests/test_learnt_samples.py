"""Steps on a CPU where the positives have probabilities near 1, from which eager PyTorch subtracts 1."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import nckernels
from nckernels.backends import native

TEMPERATURES = {"normface": 0.05, "ntce": 0.02, "clip": 0.05, "simclr": 0.05, "supcon": 0.07}
NATIVE = pytest.mark.skipif(native.BACKEND.missing() is not None, reason=str(native.BACKEND.missing()))
CASES = [
    *(pytest.param("native", loss, marks=NATIVE) for loss in TEMPERATURES),
    *(("chunked", loss) for loss in ("normface", "ntce", "clip")),  # of the others it subtracts sums of positives
]


def eager(loss: str, z: Tensor, w: Tensor, y: Tensor, tau: Tensor) -> Tensor:
    """The sum of the losses as users write it."""
    u, rows = F.normalize(z), torch.arange(len(z))
    if loss in ("simclr", "supcon"):
        itself = torch.eye(len(z), dtype=torch.bool)
        same = (y[:, None] == y) & ~itself
        log_p = (u @ u.T / tau).masked_fill(itself, -torch.inf).log_softmax(1)
        return -(log_p.masked_fill(~same, 0.0).sum(1) / same.sum(1)).sum()
    t = u @ F.normalize(w).T / tau
    if loss == "clip":
        return (F.cross_entropy(t, rows, reduction="sum") + F.cross_entropy(t.T, rows, reduction="sum")) / 2
    return -t.log_softmax(1 if loss == "normface" else 0)[rows, y].sum()


def ours(loss: str, z: Tensor, w: Tensor, y: Tensor, tau: Tensor) -> Tensor:
    if loss in ("simclr", "supcon"):
        return nckernels.supcon_loss(z, y, temperature=tau, reduction="sum")
    if loss == "clip":
        return nckernels.clip_loss(z, w, temperature=tau, reduction="sum")
    name = {"normface": nckernels.normface_loss, "ntce": nckernels.ntce_loss}[loss]
    return name(z, w, y, temperature=tau, reduction="sum")


def evaluate(
    form: Callable[..., Tensor], loss: str, z: Tensor, w: Tensor, y: Tensor, tau: float, dtype: torch.dtype
) -> list[Tensor]:
    """The loss and its gradients, in float64."""
    leaves = [x.to(dtype).requires_grad_() for x in (z, w, torch.tensor(tau))]
    value = form(loss, *leaves[:2], y, leaves[2])
    grads = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
    return [x.detach().double() for x in (value, *grads)]


@pytest.mark.parametrize(("backend", "loss"), CASES)
@pytest.mark.parametrize("k", [20, 60])
def test_errors_of_learnt_samples(k: int, backend: str, loss: str) -> None:
    """With one positive an error is a few roundings of the logits, and eager PyTorch's is up to 1000 times that. With
    several the roundings of their logits do not cancel in the gradients of features and prototypes, and these errors
    are close to eager PyTorch's. Features are the vertices of a simplex with a little noise; 20 classes fit the kernels
    for few classes."""
    tau = TEMPERATURES[loss]
    errors, eagers = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for seed in range(4):
        g = torch.Generator().manual_seed(seed)
        y = {"clip": torch.arange(k), "simclr": torch.arange(2 * k) // 2}.get(loss, torch.arange(3 * k) % k)
        w = torch.linalg.qr(torch.randn(96, k, generator=g))[0].T
        w = w - w.mean(0)
        z = w[y] + 0.02 * torch.randn(len(y), 96, generator=g)
        exact, of_eager = (evaluate(eager, loss, z, w, y, tau, dtype) for dtype in (torch.float64, torch.float32))
        with nckernels.use_backend(backend):
            got = evaluate(ours, loss, z, w, y, tau, torch.float32)
        for total, found in ((errors, got), (eagers, of_eager)):
            total += torch.stack(
                [(a - b).norm() / b.norm().clamp_min(1e-300) for a, b in zip(found, exact, strict=True)]
            )
    allowed = torch.full_like(errors, 4 * 16 * 2.0**-24 / tau)
    if loss in ("ntce", "supcon"):
        allowed[1:3] += 1.1 * eagers[1:3]
    assert (errors <= allowed).all(), (errors.tolist(), eagers.tolist())
