"""Loss and gradient by two passes in one call, in the interpreter, against float64."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch
from learnt import check_against_eager
from torch import Tensor

import nckernels
from nckernels import operators
from nckernels.backends import tiled
from nckernels.backends.triton import config

SHORT, LONG = 24, 264
LOSSES = ("nonl", "ntce", "normface", "clip")
NAMES = ("loss", "features", "prototypes", "temperature")


@pytest.fixture(autouse=True)
def no_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two passes for long rows too, and gradients on the chip for short rows of float32, which the interpreter's rules
    treat as long ones."""
    monkeypatch.setattr(tiled, "fits", lambda *_: False)
    chosen = config.grad_tile

    def with_float32(shape: config.Shape) -> config.Tile | None:
        return config.Tile(16, 16, shape.whole, 4, 1) if shape.d <= SHORT else chosen(shape)

    monkeypatch.setattr(config, "grad_tile", with_float32)


def run(
    loss: str, z: Tensor, w: Tensor, y: Tensor | None, dtype: torch.dtype, temperature: float, **options: Any
) -> tuple[Tensor, ...]:
    tau = torch.tensor(temperature, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    leaves = [t.detach().to(dtype, copy=True).requires_grad_() for t in (z, w)] + [tau.requires_grad_()]
    function = getattr(nckernels, f"{loss}_loss")
    value = function(*leaves[:2], *([] if y is None else [y]), temperature=leaves[2], **options)
    return value.detach(), *torch.autograd.grad(value, leaves)


def check(
    loss: str, z: Tensor, w: Tensor, y: Tensor | None, dtype: torch.dtype, temperature: float = 0.2, **options: Any
) -> None:
    """Errors are a few roundings of the dtype, or at most twice eager PyTorch's. What takes no part holds NaN.

    The interpreter truncates to bfloat16 instead of rounding.
    """
    with nckernels.use_backend("reference"):
        expected = run(loss, z.to(dtype), w.to(dtype), y, torch.float64, temperature, **options)
        eager = run(loss, z, w, y, dtype, temperature, **options)
    if y is not None:
        z = z.masked_fill((y == -100)[:, None], torch.nan)
        if loss in ("nonl", "ntce") and options.get("direction", "class") == "class":
            absent = torch.ones(len(w), dtype=torch.bool).index_fill_(0, y[y >= 0], False)
            w = w.masked_fill(absent[:, None], torch.nan)
    found = run(loss, z, w, y, dtype, temperature, **options)
    bound = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 8e-4}[dtype]
    for name, a, b, c in zip(NAMES, found, eager, expected, strict=True):
        bound *= 1 + 2 * (name == "temperature")  # one number, whose terms may cancel
        error, allowed = (a.double() - c).norm(), 2 * (b.double() - c).norm() + bound * c.norm()
        assert error <= allowed, f"{name}: {error:.1e} of {c.norm():.1e}, allowed {allowed:.1e}; {options}"


@pytest.mark.parametrize("d", [SHORT, LONG])
@pytest.mark.parametrize("loss", LOSSES)
def test_random_problems(loss: str, d: int, launched: Counter[str]) -> None:
    """Every direction (both: CLIP), absent classes, ignored samples, weights, small workspaces."""
    for seed in range(6):
        r = random.Random(f"{loss} {d} {seed}")
        torch.manual_seed(seed)
        m = r.randint(2, 50)
        k = m if loss == "clip" else r.choice([r.randint(1, 20), r.randint(60, 90)])
        dtype = (torch.float32, torch.bfloat16, torch.float16)[seed % 3]
        options: dict[str, Any] = {"reduction": r.choice(["mean", "sum"])}
        w, y = torch.randn(k, d), None
        z = torch.randn(m, d) + 0.5 * w[torch.arange(m) % k]
        if loss == "clip":
            options |= {"decoupled": seed < 3, "sample_weight": r.choice([None, torch.rand(m)])}
        else:
            y = torch.randint(k, (m,))
            y[torch.rand(m) < r.choice([0.0, 0.3])] = -100
            y[0] = 0
            options["weight"] = r.choice([None, 0.1 + torch.rand(k)])
        if loss == "nonl":
            options["direction"] = r.choice(["class", "instance"])
        with nckernels.use_workspace(2 ** r.randint(13, 20)):
            check(loss, z, w, y, dtype, **options)
    assert launched["prepare_step_kernel"] == launched["loss_kernel"] == 6
    assert launched["grad_kernel" if d == SHORT else "entries_kernel"] >= 6


@pytest.mark.parametrize(("loss", "d"), [("nonl", SHORT), ("clip", LONG)])
def test_tiny_weights_of_long_rows(loss: str, d: int, launched: Counter[str]) -> None:
    """A mean does not depend on the size of its weights, and its entries, of tiny weights times tiny inverse norms, do
    not underflow. Small workspaces allow fewer programs to share a block."""
    torch.manual_seed(4)
    z, w, y = 3e7 * torch.randn(20, d), 3e7 * torch.randn(20, d), torch.randint(20, (20,))
    weight = 1e-30 * (0.5 + torch.rand(20))
    for dtype, workspace in ((torch.float32, 10), (torch.float32, 20), (torch.bfloat16, 20), (torch.float16, 20)):
        size = 1e-4 if dtype == torch.float16 else 1.0  # its range ends at 65504
        with nckernels.use_workspace(2**workspace):
            check(loss, size * z, size * w, None if loss == "clip" else y, dtype, sample_weight=weight)
    assert launched["prepare_step_kernel"] == 4


@pytest.mark.parametrize("loss", ["normface", "ntce", "clip"])
def test_learnt_samples(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one call, in two, and by the operators, as compilers call them; on the chip and by panels of entries."""
    check_against_eager(loss, 16)  # NumPy adds up the products of longer rows in another order on the chip
    check_against_eager(loss, 60, "none")
    monkeypatch.setattr(operators, "plain", lambda *_, **__: False)
    check_against_eager(loss, 60)


def test_few_launches(launched: Counter[str]) -> None:
    torch.manual_seed(0)
    w, y = torch.randn(7, SHORT, requires_grad=True), torch.randint(7, (40,))
    z = torch.randn(40, SHORT, requires_grad=True)
    nckernels.nonl_loss(z, w, y).backward()
    names = {"prepare_step": 1, "lse": 1, "combine": 1, "grad": 2, "finish": 1, "loss": 1, "scale": 1}
    assert launched == {f"{name}_kernel": count for name, count in names.items()}


def test_batches_without_gradient(launched: Counter[str]) -> None:
    """All samples ignored, or one class, which has no negatives."""
    torch.manual_seed(1)
    z, w = torch.randn(20, SHORT), torch.randn(5, SHORT)
    for reduction in ("mean", "sum"):
        value, *grads = run("nonl", z, w, torch.full((20,), -100), torch.float32, 0.1, reduction=reduction)
        assert value.isnan() if reduction == "mean" else value == 0.0
        assert all((grad == 0).all() for grad in grads)
    check("nonl", z, w, torch.zeros(20, dtype=torch.int64), torch.float32)
    check("clip", z[:1], w[:1], None, torch.float32, decoupled=True)
    assert launched["prepare_step_kernel"] == 4


@pytest.mark.parametrize("wanted", [(True, False), (False, True)], ids=["features", "prototypes"])
def test_one_gradient_only(wanted: tuple[bool, bool], launched: Counter[str]) -> None:
    torch.manual_seed(2)
    z, w, y = torch.randn(20, SHORT), torch.randn(5, SHORT), torch.randint(5, (20,))
    with nckernels.use_backend("reference"):
        _, *expected, by_temperature = run("nonl", z, w, y, torch.float64, 0.1)
    tau = torch.tensor(0.1, requires_grad=True)
    leaves = [t.requires_grad_(need) for t, need in zip((z, w), wanted, strict=True)]
    value = nckernels.nonl_loss(*leaves, y, temperature=tau)
    found = torch.autograd.grad(value, [t for t in (*leaves, tau) if t.requires_grad])
    reference = expected[0] if wanted[0] else expected[1]
    assert (found[0] - reference).norm() <= 1e-6 * reference.norm()
    assert abs(found[1] - by_temperature) <= 1e-6 * abs(by_temperature)
    assert launched["grad_kernel"] == 1


def test_repeats_bit_by_bit(launched: Counter[str]) -> None:
    torch.manual_seed(3)
    z, w = torch.randn(2, 40, SHORT)
    for loss, y in (("nonl", torch.randint(40, (40,))), ("clip", None)):
        first, second = (run(loss, z, w, y, torch.float32, 0.1) for _ in range(2))
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a, b)
    assert launched["prepare_step_kernel"] == 4
