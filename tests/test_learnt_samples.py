"""Steps on a CPU where the positives have probabilities near 1, from which eager PyTorch subtracts 1."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

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
    *(("chunked", loss) for loss in TEMPERATURES),
]


def eager(loss: str, z: Tensor, w: Tensor, y: Tensor, tau: Tensor, rounding: float = 0.0) -> Tensor:
    """The sum of the losses as users write it, from logits with random relative errors of the size ``rounding``."""
    u, rows = F.normalize(z), torch.arange(len(z))
    v = u if loss in ("simclr", "supcon") else F.normalize(w)
    t = u @ v.T / tau
    if rounding:
        t = t + rounding * torch.randn(t.shape, generator=torch.Generator().manual_seed(0), dtype=t.dtype) * t.detach()
    if loss in ("simclr", "supcon"):
        itself = torch.eye(len(z), dtype=torch.bool)
        same = (y[:, None] == y) & ~itself
        log_p = t.masked_fill(itself, -torch.inf).log_softmax(1)
        return -(log_p.masked_fill(~same, 0.0).sum(1) / same.sum(1)).sum()
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
@pytest.mark.parametrize(("k", "spread"), [(20, 0.02), (60, 0.02), (20, 0.001)])
def test_errors_of_learnt_samples(k: int, spread: float, backend: str, loss: str) -> None:
    """An error is a few roundings of the logits: a few times the effect of rounding each of them once. Eager PyTorch's
    is up to 1000 times that. Features are the vertices of a simplex with noise; 20 classes fit the kernels for few
    classes."""
    tau = TEMPERATURES[loss]
    errors, rounded = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for seed in range(4):
        g = torch.Generator().manual_seed(seed)
        y = {"clip": torch.arange(k), "simclr": torch.arange(2 * k) // 2}.get(loss, torch.arange(3 * k) % k)
        w = torch.linalg.qr(torch.randn(96, k, generator=g))[0].T
        w = w - w.mean(0)
        z = w[y] + spread * torch.randn(len(y), 96, generator=g)
        exact = evaluate(eager, loss, z, w, y, tau, torch.float64)
        once = evaluate(partial(eager, rounding=2.0**-24), loss, z, w, y, tau, torch.float64)
        with nckernels.use_backend(backend):
            got = evaluate(ours, loss, z, w, y, tau, torch.float32)
        for total, found in ((errors, got), (rounded, once)):
            total += torch.stack(
                [(a - b).norm() / b.norm().clamp_min(1e-300) for a, b in zip(found, exact, strict=True)]
            )
    # The effect on a number varies more than that on the norm of a gradient.
    allowed = 4 * 16 * 2.0**-24 / tau + torch.tensor([8.0, 3.0, 3.0, 8.0]) * rounded
    assert (errors <= allowed).all(), (errors.tolist(), allowed.tolist())
