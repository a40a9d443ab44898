"""Loss and gradient in one step by the emulated CUDA kernels, against float64."""

from __future__ import annotations

import random

import host_build
import pytest
import torch
from emulation import LARGE, NAN, ROUND_ROBIN, RUN_AHEAD, UNIFORM, Emulator
from learnt import check_against_eager
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
from nckernels.backends.cuda import CudaStep

pytest_plugins = ("emulation",)  # its fixtures
pytestmark = pytest.mark.skipif(host_build.missing() is not None, reason=str(host_build.missing()))

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The panels and the passes that a test's steps have launched."""
    taken: list[str] = []

    def remember(name: str) -> None:
        launched = getattr(CudaStep, name)

        def remembered(self: CudaStep, *args: object, **named: object) -> None:
            taken.append(name)
            launched(self, *args, **named)

        monkeypatch.setattr(CudaStep, name, remembered)

    for name in ("panel_entries", "write_loss", "entries"):
        remember(name)
    return taken


@pytest.mark.usefixtures("narrow_panels")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "k"), [(150, 70), (70, 150)], ids=["marked", "compacted"])
@pytest.mark.parametrize("loss", LOSSES)
def test_one_panel(emulator: Emulator, loss: str, m: int, k: int, dtype: torch.dtype, steps: list[str]) -> None:
    """Ragged sizes; rows that hold NaN or infinities and take no part."""
    emulator.configure(RUN_AHEAD, poison=LARGE if dtype == torch.float16 else NAN)
    x, w, y = problem(m, k, 1)
    y[y == 2] = -100  # a class that does not occur
    options = {"weight": torch.rand(k), "reduction": "sum" if dtype == torch.bfloat16 else "mean"}
    expected = exact(loss, x, w, y, dtype, **options)
    assert_close(run(loss, x, w, y, dtype, **options), expected, dtype)
    if loss != "normface":
        w[2] = torch.nan  # the library's products read it, and are mended
    x[y < 0] = torch.inf
    assert_close(run(loss, x, w, y, dtype, **options), expected, dtype)
    assert "panel_entries" in steps
    assert "entries" not in steps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("direction", ["class", "instance"])
def test_both_passes_in_one_call(emulator: Emulator, direction: str, dtype: torch.dtype, steps: list[str]) -> None:
    """Rows that fit the chip, or panels that would be too thin."""
    for (m, k, d), weight in (((150, 70, 40), None), ((40, 300, 40), torch.rand(300))):
        x, w, y = problem(m, k, d + k, d=d)
        options = {"weight": weight, "direction": direction}
        expected = exact("nonl", x, w, y, dtype, **options)
        x[y < 0] = torch.nan
        assert_close(run("nonl", x, w, y, dtype, **options), expected, dtype, note=f"{m} {k} {d}")
    assert steps.count("write_loss") == 2
    assert "panel_entries" not in steps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_directions(emulator: Emulator, dtype: torch.dtype, steps: list[str]) -> None:
    """They always take both passes."""
    for m, d in ((150, 40), (140, D)):
        torch.manual_seed(m)
        leaves = [torch.randn(m, d).to(dtype), torch.randn(m, d).to(dtype), torch.tensor(0.1)]
        results = []
        for backend, number in (("cuda", torch.clone), ("reference", torch.Tensor.double)):
            inputs = [number(t).requires_grad_() for t in leaves]
            with nckernels.use_backend(backend):
                value = nckernels.clip_loss(*inputs[:2], temperature=inputs[2])
            results.append((value.detach(), *torch.autograd.grad(value, inputs)))
        assert_close(*results, dtype)
    assert steps.count("write_loss") == 2


@pytest.mark.parametrize("loss", ["normface", "ntce", "clip"])
def test_learnt_samples_in_two_passes(emulator: Emulator, loss: str) -> None:
    check_against_eager(loss, 40)
    check_against_eager(loss, 40, "none")


@pytest.mark.usefixtures("narrow_panels")
def test_random_problems(emulator: Emulator, steps: list[str]) -> None:
    """Several panels and blocks; one or several thread blocks for an anchor's sum."""
    several = 0
    for seed in range(12):
        r = random.Random(seed)
        m, k = r.randint(1, 300), r.randint(1, 300)
        emulator.configure(r.choice([ROUND_ROBIN, UNIFORM, RUN_AHEAD]), seed=seed)
        x, w, y = problem(m, k, seed, r.choice([0.0, 0.3]))
        dtype, loss = r.choice(DTYPES), r.choice(list(LOSSES))
        temperature = r.choice([0.03, 0.1, 1.0]) if dtype == torch.float32 and loss == "nonl" else r.choice([0.1, 1.0])
        options = {"reduction": r.choice(["mean", "sum"]), "weight": r.choice([None, torch.rand(k)])}
        if loss == "nonl" and r.random() < 0.5:
            options["direction"] = "instance"
        expected = exact(loss, x, w, y, dtype, temperature, **options)
        x[y == -100] = torch.nan
        steps.clear()
        with nckernels.use_workspace(round(2 ** r.uniform(16.5, 20))):
            found = run(loss, x, w, y, dtype, temperature, **options)
        note = f"{seed=} {loss} {m=} {k=} {dtype} {temperature=} {options} {len(steps)}"
        assert_close(found, expected, dtype, temperature, note, terms=m)
        several += steps.count("panel_entries") > 1
    assert several > 2


def test_separated_samples_at_low_temperature(emulator: Emulator, steps: list[str]) -> None:
    check_separated_samples(166, 78)
    assert "panel_entries" in steps


@pytest.mark.parametrize("wanted", [(True, False), (False, True)], ids=["features", "prototypes"])
def test_one_gradient_only(emulator: Emulator, wanted: tuple[bool, bool]) -> None:
    for d, dtype in ((40, torch.bfloat16), (D, torch.float32)):
        x, w, y = problem(150, 70, 4, d=d)
        _, *expected, by_temperature = exact("nonl", x, w, y, dtype)
        tau = torch.tensor(0.1, requires_grad=True)
        leaves = [t.to(dtype).requires_grad_(need) for t, need in zip((x, w), wanted, strict=True)]
        value = nckernels.nonl_loss(*leaves, y, temperature=tau)
        found = torch.autograd.grad(value, [t for t in (*leaves, tau) if t.requires_grad])
        reference, bound = expected[0] if wanted[0] else expected[1], 1e-2 if dtype == torch.bfloat16 else 1e-6
        assert (found[0].double() - reference).norm() <= bound * reference.norm()
        assert abs(found[1] - by_temperature) <= bound * abs(by_temperature)


@pytest.mark.parametrize("d", [40, D])
def test_batches_without_gradient(emulator: Emulator, d: int) -> None:
    """All samples ignored, or one class, which has no negatives."""
    for dtype in (torch.bfloat16, torch.float16):
        x, w, _ = problem(20, 5, 5, d=d)
        for reduction in ("mean", "sum"):
            value, *grads = run("nonl", x, w, torch.full((20,), -100), dtype, reduction=reduction)
            assert value.isnan() if reduction == "mean" else value == 0.0
            assert not any(grad.any() for grad in grads)
        y = torch.zeros(20, dtype=torch.int64)
        assert_close(run("nonl", x, w, y, dtype), exact("nonl", x, w, y, dtype), dtype)


@pytest.mark.parametrize("d", [40, D])
def test_order_of_threads_does_not_matter(emulator: Emulator, d: int) -> None:
    """Every schedule gives the same bits, with weights only under deterministic algorithms, which the emulator sets."""
    x, w, y = problem(150, 70, 8, d=d)
    results = []
    for schedule, seed in ((UNIFORM, 1), (UNIFORM, 2), (ROUND_ROBIN, 1), (RUN_AHEAD, 1)):
        emulator.configure(schedule, seed)
        results.append(run("nonl", x, w, y, torch.bfloat16, sample_weight=torch.linspace(0.1, 1, 150)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_weights_are_added_by_class_in_any_order(emulator: Emulator) -> None:
    """Atomics, where deterministic algorithms are not asked for."""
    x, w, y = problem(150, 70, 11)
    weight = torch.rand(150)
    ordered = run("nonl", x, w, y, torch.float32, sample_weight=weight)
    torch.use_deterministic_algorithms(False)  # the fixture restores it
    found = run("nonl", x, w, y, torch.float32, sample_weight=weight)
    for a, b in zip(found, ordered, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("d", [40, D])
def test_tiny_weights_of_long_rows(emulator: Emulator, d: int) -> None:
    check_tiny_weights(140, 130, d)


def test_temperature_on_the_device(emulator: Emulator) -> None:
    check_temperature_on_the_device(CudaStep)


def test_upstream_gradient_scales_the_gradients(emulator: Emulator) -> None:
    """In place without retain_graph; with it a copy. Float16 gradients are float32 until then."""
    for dtype in DTYPES:
        x, w, y = (t.to(dtype).requires_grad_() if t.is_floating_point() else t for t in problem(21, 5, 7))
        value = nckernels.nonl_loss(x, w, y)
        once = torch.autograd.grad(value, (x, w), retain_graph=True)
        for factor, keep in ((3.0, True), (0.5, False)):
            found = torch.autograd.grad(value, (x, w), torch.tensor(factor), retain_graph=keep)
            for a, b in zip(found, once, strict=True):
                assert a.dtype == dtype
                rounding = {torch.float32: (0, 0), torch.bfloat16: (2**-7, 0), torch.float16: (2**-10, 2**-24)}[dtype]
                torch.testing.assert_close(a, b * factor, rtol=rounding[0], atol=rounding[1])


def test_strided_and_unaligned_rows(emulator: Emulator) -> None:
    for d in (D + 1, 37):
        x, w, y = problem(40, 30, 10, d=d)
        wide = torch.randn(40, d + 8)
        wide[:, :d] = x
        for dtype in (torch.float32, torch.float16):
            assert_close(run("nonl", wide[:, :d], w, y, dtype), exact("nonl", x, w, y, dtype), dtype)
