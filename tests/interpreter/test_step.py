"""Loss and gradient in one step for long rows, in the interpreter, against float64 and against two passes."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from oracle import simplex
from steps import (  # noqa: F401
    LOSSES,
    D,
    assert_close,
    check_separated_samples,
    check_temperature_on_the_device,
    check_tiny_weights,
    exact,
    narrow_panels,
    problem,
    run,
)

import nckernels
from nckernels.backends.base import norm_eps
from nckernels.backends.triton import launch, prepare
from nckernels.backends.triton import step as one_step
from nckernels.backends.triton.step import TritonStep


class Panels(list[tuple[int, int]]):
    """The slots of every launched panel."""

    @property
    def steps(self) -> int:
        return sum(start == 0 for start, _ in self)


@pytest.fixture
def panels(monkeypatch: pytest.MonkeyPatch) -> Panels:
    """The panels of a test's steps."""
    taken = Panels()
    launched = TritonStep.panel_entries

    def remembered(self: TritonStep, *args: object) -> None:
        taken.append(args[5:7])  # type: ignore[arg-type]
        launched(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(TritonStep, "panel_entries", remembered)
    return taken


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("m", "k"), [(37, 21), (20, 60)], ids=["marked", "compacted"])
@pytest.mark.parametrize("loss", LOSSES)
def test_one_panel(loss: str, m: int, k: int, dtype: torch.dtype, panels: Panels) -> None:
    x, w, y = problem(m, k, 1)
    y[y == 2] = -100  # a class that does not occur
    options = {"weight": torch.rand(k), "reduction": "sum" if dtype == torch.bfloat16 else "mean"}
    expected = exact(loss, x, w, y, dtype, **options)
    assert_close(run(loss, x, w, y, dtype, **options), expected, dtype)
    if loss != "normface":
        w[2] = torch.nan  # the library's products read it, and are mended
        assert_close(run(loss, x, w, y, dtype, **options), expected, dtype)
        w[2] = torch.inf
    x[y < 0] = torch.nan  # the same
    assert_close(run(loss, x, w, y, dtype, **options), expected, dtype)
    assert panels.steps == (2 if loss == "normface" else 3)


def test_tiny_weights_of_long_rows(panels: Panels) -> None:
    check_tiny_weights(20, 30, D)
    assert panels.steps == 2


@pytest.mark.usefixtures("narrow_panels")
def test_short_rows(panels: Panels, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a program finishes up to 128 of them, and mends as many."""
    monkeypatch.setattr(one_step, "row_blocks", lambda _: {"BR": 64, "BD": 32, "warps": 8})
    for name in ("_prepare_options", "_finish_options"):  # neither made before nor kept
        monkeypatch.setattr(one_step, name, getattr(one_step, name).__wrapped__)
    x, w, y = (t[..., :24] if t.ndim == 2 else t for t in problem(90, 21, 2))
    expected = exact("nonl", x, w, y, torch.float32)
    x[y < 0] = torch.nan
    assert_close(run("nonl", x, w, y, torch.float32), expected, torch.float32)
    assert panels.steps == 1


@pytest.mark.usefixtures("narrow_panels")
@pytest.mark.parametrize("part", range(3))
def test_random_problems(part: int, panels: Panels) -> None:
    """Several panels, blocks of columns, ragged sizes; rows of ignored samples hold NaN."""
    several = 0
    for seed in range(part, 12, 3):
        r = random.Random(seed)
        m, k = r.randint(1, 70), r.randint(1, 70)
        x, w, y = problem(m, k, seed, r.choice([0.0, 0.3]))
        dtype = r.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16])
        loss, temperature = r.choice(list(LOSSES)), r.choice([0.005, 0.03, 0.1, 1.0])
        options = {"reduction": r.choice(["mean", "sum"]), "weight": r.choice([None, torch.rand(k)])}
        if loss == "nonl" and r.random() < 0.3:
            options["direction"] = "instance"
        expected = exact(loss, x, w, y, dtype, temperature, **options)
        x[y == -100] = torch.nan
        panels.clear()
        with nckernels.use_workspace(round(2 ** r.uniform(14.5, 18))):
            found = run(loss, x, w, y, dtype, temperature, **options)
        note = f"{seed=} {loss} {m=} {k=} {dtype} {temperature=} {options} {panels}"
        if dtype == torch.float32 or temperature >= 0.1:  # otherwise a gradient that nearly vanishes, in 16 bits
            assert_close(found, expected, dtype, temperature, note)
        several += len(panels) > 1
    assert several > 0


@pytest.mark.parametrize("loss", LOSSES)
def test_errors_are_at_most_those_of_two_passes(loss: str, panels: Panels) -> None:
    x, w, y = problem(60, 12, 3)
    expected = exact(loss, x, w, y, torch.float16)
    one = run(loss, x, w, y, torch.float16)
    assert panels.steps == 1
    leaves = [t.half().requires_grad_() for t in (x, w)]
    value = LOSSES[loss](*leaves, y, reduction="none").sum() / (y != -100).sum()
    two = torch.autograd.grad(value, leaves)
    assert panels.steps == 1
    for a, b, c in zip(one[1:3], two, expected[1:3], strict=True):
        assert (a.double() - c).norm() <= 1.1 * (b.double() - c).norm()


@pytest.mark.parametrize("wanted", [(True, False), (False, True)], ids=["features", "prototypes"])
@pytest.mark.parametrize("loss", ["nonl", "normface"])
def test_one_gradient_only(loss: str, wanted: tuple[bool, bool], panels: Panels) -> None:
    x, w, y = problem(37, 21, 4)
    _, *expected, by_temperature = exact(loss, x, w, y, torch.float32)
    tau = torch.tensor(0.1, requires_grad=True)
    leaves = [t.clone().requires_grad_(need) for t, need in zip((x, w), wanted, strict=True)]
    found = torch.autograd.grad(
        LOSSES[loss](*leaves, y, temperature=tau), [t for t in (*leaves, tau) if t.requires_grad]
    )
    reference = expected[0] if wanted[0] else expected[1]
    assert (found[0] - reference).norm() <= 1e-6 * reference.norm()
    assert abs(found[1] - by_temperature) <= 1e-6 * abs(by_temperature)
    assert panels.steps == 1


@pytest.mark.parametrize("loss", LOSSES)
def test_batches_without_gradient(loss: str, panels: Panels) -> None:
    """All samples ignored, or one class, which has no negatives."""
    x, w, _ = problem(20, 5, 5)
    for reduction in ("mean", "sum"):
        value, by_x, by_w, by_tau = run(loss, x, w, torch.full((20,), -100), torch.float32, reduction=reduction)
        assert value.isnan() if reduction == "mean" else value == 0.0
        assert (by_x == 0).all()
        assert (by_w == 0).all()
        assert by_tau == 0
    y = torch.zeros(20, dtype=torch.int64)
    assert_close(run(loss, x, w, y, torch.float32), exact(loss, x, w, y, torch.float32), torch.float32)
    assert panels.steps == 3


def test_nan_and_zero_rows(panels: Panels) -> None:
    x, w, y = problem(20, 5, 6, ignored=0.0)
    x[3] = 0
    assert all(t.isfinite().all() for t in run("nonl", x, w, y, torch.float16))
    x[4] *= 0.5 * norm_eps(torch.float32) / x[4].norm()  # divided by the least norm, and not projected
    assert_close(run("nonl", x, w, y, torch.float32), exact("nonl", x, w, y, torch.float32), torch.float32)
    x[3] = torch.nan
    assert run("nonl", x, w, y, torch.float32)[0].isnan()
    assert panels.steps == 3


def test_collapsed_features_at_low_temperature(panels: Panels) -> None:
    w = simplex(6, D).float()
    y = torch.arange(6).repeat(5)
    for loss in LOSSES:
        found, expected = run(loss, w[y], w, y, torch.float32, 0.01), exact(loss, w[y], w, y, torch.float32, 0.01)
        assert abs(found[0] - expected[0]) < 1e-4  # logits of 120 have float32 roundings of 4e-6 each
    assert panels.steps == 3


def test_separated_samples_at_low_temperature(panels: Panels) -> None:
    check_separated_samples(60, 20)
    assert panels.steps == 1


def test_upstream_gradient_scales_the_gradients(panels: Panels) -> None:
    """In place without retain_graph; with it a copy of the same numbers."""
    x, w, y = (t.requires_grad_() if t.is_floating_point() else t for t in problem(20, 5, 7))
    tau = torch.tensor(0.1, requires_grad=True)
    once = torch.autograd.grad(nckernels.nonl_loss(x, w, y, temperature=tau), (x, w, tau))
    value = nckernels.nonl_loss(x, w, y, temperature=tau)
    factors = (torch.tensor(4.0), torch.tensor(0.5), torch.tensor(1.0))
    for i, factor in enumerate(factors):
        found = torch.autograd.grad(value, (x, w, tau), factor, retain_graph=i < len(factors) - 1)
        for a, b in zip(found, once, strict=True):
            assert torch.equal(a, b * factor)
    by_x = torch.autograd.grad(nckernels.nonl_loss(x, w, y), x, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="double backward"):
        by_x.sum().backward()
    assert panels.steps == 3


def test_deterministic_and_inputs_are_unchanged(panels: Panels) -> None:
    x, w, y = problem(37, 21, 8)
    before = x.clone(), w.clone()
    weight = torch.rand(21)
    first, second = (run("nonl", x, w, y, torch.float32, weight=weight) for _ in range(2))
    for a, b in zip((*first, *before), (*second, x, w), strict=True):
        assert torch.equal(a, b)
    assert panels.steps == 2


def test_weights_of_a_class_are_added_in_order_on_request(panels: Panels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under deterministic algorithms the kernel is given no place for its atomics."""
    x, w, y = problem(37, 21, 11)
    sample_weight, places = torch.rand(37), []
    launched = launch.launch

    def remembered(kernel: object, grid: object, *args: object, **options: object) -> None:
        if kernel is prepare.prepare_step_kernel:
            places.append(args[14] is None)
        launched(kernel, grid, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(launch, "launch", remembered)
    usual = run("nonl", x, w, y, torch.float32, sample_weight=sample_weight)
    torch.use_deterministic_algorithms(True)
    try:
        found = run("nonl", x, w, y, torch.float32, sample_weight=sample_weight)
        run("nonl", x, w, y, torch.float32)
    finally:
        torch.use_deterministic_algorithms(False)
    assert places == [False, True, False]
    for a, b in zip(found, usual, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert panels.steps == 3


def test_temperature_on_the_device(panels: Panels) -> None:
    check_temperature_on_the_device(TritonStep)
    assert panels.steps == 2


def test_which_problems_are_not_computed_by_panels(panels: Panels) -> None:
    """No gradient wanted, reduction="none", both directions, short rows."""
    x, w, y = problem(20, 5, 9)
    with torch.no_grad():
        nckernels.nonl_loss(x, w, y)
    x.requires_grad_()
    nckernels.nonl_loss(x, w, y, reduction="none").sum().backward()
    nckernels.nonl_loss(x, w, y, direction="both").backward()
    nckernels.nonl_loss(x[:, :32].bfloat16(), w[:, :32].bfloat16(), y).backward()
    assert not panels
    nckernels.nonl_loss(x, w, y).backward()
    assert panels.steps == 1


def test_strided_rows_and_autocast(panels: Panels) -> None:
    x, w, y = problem(20, 5, 10)
    wide = torch.randn(20, D + 8)
    wide[:, :D] = x
    assert_close(run("nonl", wide[:, :D], w, y, torch.float32), exact("nonl", x, w, y, torch.float32), torch.float32)
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = nckernels.nonl_loss(x, F.normalize(w), y)
    loss.backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert panels.steps == 2
