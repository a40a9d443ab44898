"""Samples that have been learnt: their positives have probabilities near 1, from which eager PyTorch subtracts 1."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import nckernels

TEMPERATURES = {"normface": 0.05, "ntce": 0.02, "clip": 0.05, "simclr": 0.05, "supcon": 0.07}


def problem(loss: str, k: int, d: int, spread: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features, prototypes and labels: the vertices of a simplex, with noise."""
    g = torch.Generator().manual_seed(seed)
    y = {"clip": torch.arange(k), "simclr": torch.arange(2 * k) // 2}.get(loss, torch.arange(3 * k) % k)
    w = torch.linalg.qr(torch.randn(d, k, generator=g))[0].T
    w = w - w.mean(0)
    return w[y] + spread * torch.randn(len(y), d, generator=g), w, y


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


def ours(loss: str, z: Tensor, w: Tensor, y: Tensor, tau: Tensor, reduction: str = "sum") -> Tensor:
    if loss in ("simclr", "supcon"):
        return nckernels.supcon_loss(z, y, temperature=tau, reduction=reduction).sum()
    if loss == "clip":
        return nckernels.clip_loss(z, w, temperature=tau, reduction=reduction).sum()
    name = {"normface": nckernels.normface_loss, "ntce": nckernels.ntce_loss}[loss]
    return name(z, w, y, temperature=tau, reduction=reduction).sum()


def evaluate(
    form: Callable[..., Tensor], loss: str, z: Tensor, w: Tensor, y: Tensor, tau: float, dtype: torch.dtype
) -> list[Tensor]:
    """The loss and its gradients, in float64."""
    leaves = [x.to(dtype).requires_grad_() for x in (z, w, torch.tensor(tau))]
    value = form(loss, *leaves[:2], y, leaves[2])
    grads = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
    return [x.detach().double() for x in (value, *grads)]


def relative(found: list[Tensor], exact: list[Tensor]) -> Tensor:
    """The relative errors of the loss and its gradients."""
    return torch.stack([(a - b).norm() / b.norm().clamp_min(1e-300) for a, b in zip(found, exact, strict=True)])


def check_against_eager(loss: str, d: int, reduction: str = "sum") -> None:
    """Errors of a float32 gradient are at most eager PyTorch's, or a few roundings of the logits.

    This requires that products of rows are the same numbers in both passes, but for those few roundings. The loss, a
    difference of two numbers of the size of a logit, has their rounding.
    """
    tau = TEMPERATURES[loss]
    ours_, eager_ = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for seed in range(2):
        z, w, y = problem(loss, min(20, d - 4), d, 0.02, seed)
        exact = evaluate(eager, loss, z, w, y, tau, torch.float64)
        ours_ += relative(evaluate(partial(ours, reduction=reduction), loss, z, w, y, tau, torch.float32), exact)
        eager_ += relative(evaluate(eager, loss, z, w, y, tau, torch.float32), exact)
    allowed = 1.2 * eager_ + 3 * torch.tensor([0.0, 32.0, 32.0, 128.0]) * 2.0**-24 / tau
    assert (ours_ <= allowed)[1:].all(), (ours_.tolist(), allowed.tolist())
