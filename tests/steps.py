"""Loss and gradient in one step: problems, and the losses in float64 to compare with. For the GPU backends' tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import nckernels
from nckernels.backends import tiled
from nckernels.backends.base import Inputs, Needs, Reduced, Spec
from nckernels.backends.tiled import plan

LOSSES = {"nonl": nckernels.nonl_loss, "ntce": nckernels.ntce_loss, "normface": nckernels.normface_loss}
NAMES = ("loss", "features", "prototypes", "temperature")
D = 264
"""Columns that are too many for the kernels that accumulate gradients on the chip."""


@pytest.fixture
def narrow_panels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Panels and blocks of a few rows, for small problems, which the interpreter runs quickly."""
    monkeypatch.setattr(plan, "MIN_PANEL", 4)
    for cost in ("two_passes_cost", "two_pair_passes_cost"):
        monkeypatch.setattr(plan, cost, lambda *_: float("inf"))
    for panels in (plan.step_panels, plan.pair_panels):
        panels.cache_clear()
    yield
    for panels in (plan.step_panels, plan.pair_panels):
        panels.cache_clear()


def problem(m: int, k: int, seed: int, ignored: float = 0.2, d: int = D) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    y = torch.randint(k, (m,))
    y[torch.rand(m) < ignored] = -100
    w = torch.randn(k, d)
    return torch.randn(m, d) + 0.5 * w[y.clamp_min(0)], w, y


def run(
    loss: str, x: Tensor, w: Tensor, y: Tensor, dtype: torch.dtype, temperature: float = 0.1, **options: object
) -> tuple[Tensor, ...]:
    tau = torch.tensor(temperature, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    leaves = [t.detach().clone().requires_grad_() for t in (x.to(dtype), w.to(dtype), tau)]
    value = LOSSES[loss](*leaves[:2], y, temperature=leaves[2], **options)
    return value.detach(), *torch.autograd.grad(value, leaves)


def exact(loss: str, x: Tensor, w: Tensor, y: Tensor, dtype: torch.dtype, *args: float, **options: object) -> tuple:
    with nckernels.use_backend("reference"):
        return run(loss, x.to(dtype).double(), w.to(dtype).double(), y, torch.float64, *args, **options)


def assert_close(
    found: tuple[Tensor, ...],
    expected: tuple[Tensor, ...],
    dtype: torch.dtype,
    temperature: float = 0.1,
    note: str = "",
    terms: int = 1,
) -> None:
    """Tolerances are a few roundings of the gradients' dtype and of float32 logits of size 1 / temperature.

    ``terms``: how many of these a loss is the sum of.

    For separated samples 1 is subtracted from a probability near 1: eager float32 has errors of 1e-6 there as well.

    The interpreter truncates to bfloat16 instead of rounding.
    """
    bounds = {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 8e-4}
    logit = 2**-24 / temperature
    for name, a, b in zip(NAMES, found, expected, strict=True):
        bound = max(logit, 2**-23) if name == "loss" else bounds[dtype] + logit
        error, norm = (a.double() - b).norm(), b.norm()
        allowed = bound * norm + (logit * terms if name == "loss" else 0.0)
        assert error <= allowed, f"{name}: {error:.1e} of {norm:.1e} {note}"


def after(n: int, results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The same without the first n rows of the gradients."""
    return tuple(x[n:] if x.dim() else x for x in results)


def check_separated_samples(m: int, k: int) -> None:
    """Probabilities near 1, from which 1 is subtracted: the gradient's error is eager PyTorch's, give or take chance.

    With the rounding of a log-sum-exp it would be four times that.
    """
    x, w, y = problem(m, k, 7, ignored=0.0)
    expected = exact("normface", x, w, y, torch.float32, 0.03)
    found = run("normface", x, w, y, torch.float32, 0.03)
    leaves = [t.clone().requires_grad_() for t in (x, w)]
    logits = F.normalize(leaves[0]) @ F.normalize(leaves[1]).T / 0.03
    eager = torch.autograd.grad(F.cross_entropy(logits, y), leaves)
    for a, b, c in zip(found[1:], eager, expected[1:], strict=False):
        assert (a - c).norm() <= 1.5 * (b - c).norm()


def check_tiny_weights(m: int, k: int, d: int) -> None:
    """A mean does not depend on the size of its weights, and its entries, of tiny weights times the tiny inverse norms
    of long rows, do not underflow."""
    x, w, y = problem(m, k, 13, d=d)
    x[3], w[4] = 0, 0  # their inverse norms are 1e12
    weight = 1e-30 * (0.5 + torch.rand(m))
    for dtype in (torch.float32, torch.bfloat16):
        args = "nonl", 3e7 * x, 3e7 * w, y, dtype
        found, expected = run(*args, sample_weight=weight), exact(*args, sample_weight=weight)
        assert_close(after(5, found), after(5, expected), dtype)


def check_temperature_on_the_device(kernels: Callable[[Inputs, Spec, float | None], tiled.StepKernels]) -> None:
    """The host does not know it: a kernel copies it to where it would write the host's number."""
    x, w, y = problem(20, 5, 12)
    inputs = Inputs(x, w, y, torch.tensor(7.3), None, None)
    spec = Spec("class", "target", True, -100, 1 << 20)
    rest = Reduced(None, True, torch.nan), Needs(True, True, True, False, False)
    known, unknown = (tiled.step(kernels(inputs, spec, beta), *rest) for beta in (float(inputs[3]), None))
    for a, b in zip(known, unknown, strict=True):
        assert torch.equal(a, b)
