"""One step whose first product has an epilogue, in the interpreter with its PyTorch form; against float64 and the
library's product."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import triton.language as tl
from steps import LOSSES, D, assert_close, exact, narrow_panels, problem, run  # noqa: F401
from torch import Tensor
from triton.runtime import interpreter

import nckernels
from nckernels.backends import quack
from nckernels.backends.base import Inputs, Spec
from nckernels.backends.quack import Operand, PlainProduct
from nckernels.backends.triton.step import TritonStep

BF16 = torch.bfloat16


class Counted(PlainProduct):
    """The PyTorch form of the product, which records the anchors of each panel."""

    def __init__(self) -> None:
        self.panels: list[int] = []

    def __call__(self, p: Operand, q: Operand, shift: float, e: Tensor, sums: Tensor) -> None:
        assert q.scale.shape[0] == sums.shape[1] * self.columns
        assert e.stride(0) % 8 == 0
        e.fill_(torch.nan)
        sums.fill_(torch.nan)
        super().__call__(p, q, shift, e, sums)
        self.panels.append(p.x.shape[0])


def agree(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], temperature: float = 0.1, note: str = "") -> None:
    """Shifting all exponents by beta adds a few roundings of its size."""
    assert_close(found, expected, BF16, temperature / 4, note)


@pytest.fixture(autouse=True)
def rounded_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter truncates to bfloat16; devices, and the PyTorch form, round."""
    cut_off = interpreter._convert_float

    def convert(x: np.ndarray, source: tl.dtype, target: tl.dtype, mode: object) -> np.ndarray:
        if (source, target) != (tl.float32, tl.bfloat16):
            return cut_off(x, source, target, mode)
        return torch.tensor(x).to(BF16).view(torch.int16).numpy().view(np.uint16)

    monkeypatch.setattr(interpreter, "_convert_float", convert)


@pytest.fixture
def product(monkeypatch: pytest.MonkeyPatch) -> Counted:
    counted = Counted()
    monkeypatch.setattr(quack, "why_not", lambda _: None)
    monkeypatch.setattr(quack, "product", lambda *_: counted)
    return counted


@pytest.mark.parametrize(("m", "k"), [(37, 21), (20, 60)], ids=["marked", "compacted"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", [*LOSSES, "nonl-instance"])
def test_one_panel(loss: str, reduction: str, m: int, k: int, product: Counted) -> None:
    x, w, y = problem(m, k, 1)
    options: dict[str, object] = {"weight": torch.rand(k), "reduction": reduction}
    if loss == "nonl-instance":
        loss, options["direction"] = "nonl", "instance"
    y[y == 2] = -100  # a class that does not occur
    expected = exact(loss, x, w, y, BF16, **options)
    x[y == -100] = torch.nan
    if loss != "normface" and "direction" not in options:
        w[2] = torch.nan
    agree(run(loss, x, w, y, BF16, **options), expected)
    assert len(product.panels) == 1


@pytest.mark.usefixtures("narrow_panels")
@pytest.mark.parametrize("part", range(3))
def test_random_problems(part: int, product: Counted) -> None:
    """Several panels, blocks of columns, ragged sizes; rows of ignored samples hold NaN."""
    several = 0
    for seed in range(part, 12, 3):
        r = random.Random(seed)
        m, k = r.randint(1, 70), r.randint(1, 70)
        x, w, y = problem(m, k, seed, r.choice([0.0, 0.3]))
        loss, temperature = r.choice(list(LOSSES)), r.choice([0.1, 1.0])
        options = {"reduction": r.choice(["mean", "sum"]), "weight": r.choice([None, torch.rand(k)])}
        if loss == "nonl" and r.random() < 0.5:
            options["direction"] = "instance"
        expected = exact(loss, x, w, y, BF16, temperature, **options)
        x[y == -100] = torch.nan
        product.panels.clear()
        with nckernels.use_workspace(round(2 ** r.uniform(13, 15.5))):
            found = run(loss, x, w, y, BF16, temperature, **options)
        agree(found, expected, temperature, f"{seed=} {loss} {m=} {k=} {temperature=} {options}")
        several += len(product.panels) > 1
    assert several > 0


@pytest.mark.parametrize("spread", [0.0, 2.0], ids=["gaussian", "clustered"])
@pytest.mark.parametrize("loss", LOSSES)
def test_errors_are_at_most_those_of_the_library_product(
    loss: str, spread: float, product: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, w, y = problem(150, 30, 3, ignored=0.0)
    x += spread * w[y]
    expected = exact(loss, x, w, y, BF16)
    ours = run(loss, x, w, y, BF16)
    assert product.panels
    monkeypatch.setattr(quack, "why_not", lambda _: "not now")
    library = run(loss, x, w, y, BF16)
    for a, b, c in zip(ours[1:3], library[1:3], expected[1:3], strict=True):
        assert (a.double() - c).norm() <= 1.1 * (b.double() - c).norm()
    assert abs(ours[3] - expected[3]) <= 2**-9 * abs(expected[3])


def test_one_gradient_only(product: Counted) -> None:
    x, w, y = problem(37, 21, 4)
    _, *expected, by_temperature = exact("normface", x, w, y, BF16)
    for i in range(2):
        tau = torch.tensor(0.1, requires_grad=True)
        leaves = [t.to(BF16).requires_grad_(j == i) for j, t in enumerate((x, w))]
        found = torch.autograd.grad(nckernels.normface_loss(*leaves, y, temperature=tau), [leaves[i], tau])
        assert (found[0].double() - expected[i]).norm() <= 1e-2 * expected[i].norm()
        assert abs(found[1] - by_temperature) <= 1e-2 * abs(by_temperature)
    assert len(product.panels) == 2


@pytest.mark.parametrize("loss", LOSSES)
def test_batches_without_gradient(loss: str, product: Counted) -> None:
    """All samples ignored; one class, which has no negatives; a class whose samples have weight 0."""
    x, w, _ = problem(20, 5, 5)
    value, by_x, by_w, by_tau = run(loss, x, w, torch.full((20,), -100), BF16, reduction="sum")
    assert value == 0
    assert not any(t.any() for t in (by_x, by_w, by_tau))
    y = torch.zeros(20, dtype=torch.int64)
    if loss != "nonl":
        agree(run(loss, x, w, y, BF16), exact(loss, x, w, y, BF16))
    else:
        found, expected = run(loss, x, w, y, BF16), exact(loss, x, w, y, BF16)
        assert all((a.double() - b).norm() <= 1e-2 * b.norm() for a, b in zip(found, expected, strict=True))
    weight = torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0])
    y = torch.arange(20) % 5
    agree(run(loss, x, w, y, BF16, weight=weight), exact(loss, x, w, y, BF16, weight=weight))
    assert product.panels


def test_collapsed_features_at_the_lowest_temperature(product: Counted) -> None:
    """A class's own samples have e^40 times the exponentials of others: subtracting them would cancel all digits."""
    torch.manual_seed(0)
    w = torch.eye(6, D)
    y = torch.arange(6).repeat(5)
    x = w[y]
    found, expected = run("nonl", x, w, y, BF16, 0.025), exact("nonl", x, w, y, BF16, 0.025)
    assert abs(found[0] - expected[0]) < 1e-4
    for a, b in zip(found[1:3], expected[1:3], strict=True):
        assert (a.double() - b).norm() <= 1e-2 * b.norm()
    assert len(product.panels) == 1


def test_nan_propagates_and_zero_vectors_stay_finite(product: Counted) -> None:
    x, w, y = problem(20, 5, 6, ignored=0.0)
    x[3] = 0
    assert all(t.isfinite().all() for t in run("nonl", x, w, y, BF16))
    x[3] = torch.nan
    assert run("nonl", x, w, y, BF16)[0].isnan()
    x[3], w[4], y[y == 4] = 0, torch.inf, 0  # no sample's positive: only the sums see it
    assert run("normface", x, w, y, BF16)[0].isnan()
    assert len(product.panels) == 3


def test_which_problems_use_the_library_product(product: Counted) -> None:
    """Other dtypes than bfloat16, low temperatures, temperatures on the device, rows that TMA cannot read."""
    x, w, y = problem(20, 5, 9)
    run("nonl", x, w, y, torch.float32)
    run("nonl", x, w, y, torch.float16)
    run("nonl", x, w, y, BF16, 0.02)
    odd = torch.randn(20, D + 1).to(BF16)[:, :D].requires_grad_()
    nckernels.nonl_loss(odd, w.to(BF16), y).backward()
    assert not product.panels
    run("nonl", x, w, y, BF16)
    assert product.panels
    inputs = Inputs(x.to(BF16), w.to(BF16), y, torch.tensor(10.0), None, None)
    kernels = TritonStep(inputs, Spec("class", "target", True, -100, 1 << 20), host_beta=None)
    assert kernels.epilogue_product() is None  # a temperature on the device
