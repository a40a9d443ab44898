"""SupCon's loss and gradient in one step, on the chip and by panels, in the interpreter: against float64 and against
two passes."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from learnt import check_against_eager
from steps import after, narrow_panels  # noqa: F401
from test_memory import BYTES_PER_ROW, replay
from torch import Tensor

import nckernels
from nckernels.backends.base import Spec, norm_eps
from nckernels.backends.tiled import plan
from nckernels.backends.triton import config, launch, pairs_step

LABELS = torch.tensor([0, 3, -7, 10**9, 2**40, 2**40 + 2**33, -(2**40)])
"""Any integers. Some differ in their upper 32 bits only: 0 and 2**40, for example."""


@pytest.fixture(autouse=True, params=["on the chip", "by panels"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """For all dtypes; the rules leave float32 to panels, and short rows of 16 bits to the chip."""
    request.getfixturevalue("narrow_panels")
    if request.param == "on the chip":
        monkeypatch.setattr(config, "pairs_grad_tile", lambda shape: config.Tile(16, 16, shape.whole, 4, 1))
        monkeypatch.setattr(pairs_step, "pair_panels", lambda *_: None)
    else:
        monkeypatch.setattr(config, "pairs_grad_tile", lambda _: None)
    return request.param


STEP = "pairs_reduce_kernel"
"""Launched once a step."""


def problem(n: int, d: int, seed: int, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    which = torch.randint(len(LABELS), (n,))
    return torch.randn(len(LABELS), d)[which] + spread * torch.randn(n, d), LABELS[which]


def run(
    x: Tensor, y: Tensor | None, dtype: torch.dtype, temperature: float = 0.1, **options: Any
) -> tuple[Tensor, ...]:
    tau = torch.tensor(temperature, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    leaves = x.to(dtype).clone().requires_grad_(), tau.requires_grad_()
    value = nckernels.supcon_loss(leaves[0], y, temperature=leaves[1], **options)
    return value.detach(), *torch.autograd.grad(value, leaves)


def eager(x: Tensor, y: Tensor | None, dtype: torch.dtype, *args: float, **options: Any) -> tuple[Tensor, ...]:
    with nckernels.use_backend("reference"):
        return run(x, y, dtype, *args, **options)


def exact(x: Tensor, y: Tensor | None, dtype: torch.dtype, *args: float, **options: Any) -> tuple[Tensor, ...]:
    """The reference in float64, from the rounded inputs."""
    return eager(x.to(dtype), y, torch.float64, *args, **options)


def check(x: Tensor, y: Tensor | None, dtype: torch.dtype, temperature: float = 0.1, **options: Any) -> None:
    """Errors are a few roundings of the dtype, or at most twice eager PyTorch's: where features are close to their
    class, the gradient is the difference of large numbers. Rows of ignored samples are replaced by NaN.

    The interpreter truncates to bfloat16 instead of rounding.
    """
    expected, other = (way(x, y, dtype, temperature, **options) for way in (exact, eager))
    if y is not None:
        x = x.masked_fill((y == options.get("ignore_index", -100))[:, None], torch.nan)
    found = run(x, y, dtype, temperature, **options)
    bound = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 6e-4}[dtype]
    for name, a, b, c in zip(("loss", "features", "temperature"), found, other, expected, strict=True):
        error, allowed = (a.double() - c).norm(), 2 * (b.double() - c).norm() + bound * c.norm()
        assert error <= allowed, f"{name}: {error:.1e} of {c.norm():.1e}, allowed {allowed:.1e}"


@pytest.mark.parametrize("part", range(3))
def test_random_problems(part: int, way: str, launched: Counter[str]) -> None:
    """Small workspaces allow fewer programs to share a block, and thinner panels."""
    for seed in range(part, 18, 3):
        r = random.Random(seed)
        n, d = r.randint(2, 70), r.choice([5, 16, 40])
        dtype = r.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16])
        x, y = problem(n, d, seed, spread=r.choice([0.1, 1.0]))
        temperature = r.choice([0.005, 0.02, 0.1, 1.0]) if dtype == torch.float32 else 0.2
        options: dict[str, Any] = {"decoupled": r.random() < 0.5, "reduction": r.choice(["mean", "sum"])}
        options["sample_weight"] = r.choice([None, torch.rand(n)])
        options["ignore_index"] = r.choice([-100, 2**40])
        y[torch.rand(n) < r.choice([0.0, 0.3])] = options["ignore_index"]
        with nckernels.use_workspace(2 ** r.randint(10 if way == "on the chip" else 12, 20)):
            check(x, y, dtype, temperature, **options)
    assert launched[STEP] == 6
    assert way == "on the chip" or part == 0 or launched["pairs_panel_entries_kernel"] > 6


@pytest.mark.parametrize("decoupled", [False, True])
def test_views_without_labels(decoupled: bool, launched: Counter[str]) -> None:
    torch.manual_seed(0)
    x = torch.randn(12, 2, 20)
    check(x, None, torch.float32, decoupled=decoupled)
    assert launched[STEP] == 1


def test_few_launches(way: str, launched: Counter[str]) -> None:
    x, y = problem(20, 16, 0)  # two programs share a block of rows
    x.requires_grad_()
    loss = nckernels.supcon_loss(x, y)
    loss /= 4  # as with accumulated gradients; PyTorch forbids it if the loss is a view
    loss.backward()
    names = {
        "on the chip": ("pairs_prepare", "pairs_lse", "pairs_reduce", "pairs_grad", "finish", "scale"),
        "by panels": (
            "pairs_prepare", "pairs_panel_lse", "pairs_reduce", "pairs_scale", "pairs_panel_entries", "mend", "finish",
            "scale",
        ),
    }  # fmt: skip
    assert launched == dict.fromkeys([f"{name}_kernel" for name in names[way]], 1)


def test_batches_without_positives_or_negatives(launched: Counter[str]) -> None:
    """All ignored; every label once; one label, which has no negatives."""
    x, _ = problem(20, 16, 1)
    for y in (torch.full((20,), -100), torch.arange(20)):
        for reduction in ("mean", "sum"):
            assert all((part == 0).all() for part in run(x, y, torch.float32, reduction=reduction))
    y = torch.zeros(20, dtype=torch.int64)
    for decoupled in (False, True):
        check(x, y, torch.float32, decoupled=decoupled)
    weight = torch.zeros(20)
    assert all((part == 0).all() for part in run(x, y, torch.float32, sample_weight=weight))
    assert launched[STEP] == 7


def test_opposite_classes_at_low_temperature(launched: Counter[str]) -> None:
    """Where all negatives are far, exp(-lse) is beyond float32; rows that are left out must not be multiplied by it."""
    torch.manual_seed(8)
    y = torch.arange(20) % 2
    x = torch.randn(16) * (1 - 2 * y)[:, None] + 0.05 * torch.randn(20, 16)
    y[3] = -100
    check(x, y, torch.float32, 0.005, decoupled=True)
    assert launched[STEP] == 1


def test_nan_and_zero_rows(launched: Counter[str]) -> None:
    x, y = problem(20, 16, 2)
    x[3] = 0  # in float16 the gradient of this row is much larger than the others
    found, expected = (way(x, y, torch.float16)[1].double() for way in (run, eager))
    assert ((found - expected).norm(dim=1) <= 1e-2 * expected.norm(dim=1)).all()
    x[4] *= 0.5 * norm_eps(torch.float32) / x[4].norm()  # divided by the least norm, and not projected
    check(x, y, torch.float32)
    x[3] = torch.nan
    value, by_x, _ = run(x, y, torch.float32)
    assert value.isnan()
    assert by_x.isnan().all()
    assert launched[STEP] == 3


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_a_mean_does_not_depend_on_the_size_of_the_weights(size: float) -> None:
    """Not even with long rows, whose inverse norms the entries are multiplied by."""
    x, y = problem(30, 16, 7)
    x *= 3e7
    weight = 0.5 + torch.rand(30)
    check(x, y, torch.bfloat16, sample_weight=weight * size)
    x[0] = 0  # its inverse norm is 1e12, and its gradient is not compared
    usual = run(x, y, torch.float32, 0.03, sample_weight=weight)  # exp(-lse) times the smaller weights is 0
    found = run(x, y, torch.float32, 0.03, sample_weight=weight * size)
    for a, b in zip(after(1, found), after(1, usual), strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()  # exponents of 150 are rounded


@pytest.mark.parametrize("size", [1e-3, 1e3])
def test_float16_in_its_range(size: float) -> None:
    """Rows far from unit length, and weights whose gradients would underflow."""
    x, y = problem(30, 16, 3)
    weight = torch.rand(30) * 1e-7
    options: dict[str, Any] = {"sample_weight": weight, "reduction": "sum"}
    expected = exact(x * size, y, torch.float16, **options)
    leaf = (x * size).half().requires_grad_()
    value = 2.0**20 * nckernels.supcon_loss(leaf, y, **options)  # as a gradient scaler does
    (by_x,) = torch.autograd.grad(value, leaf)
    scaled = expected[1] * 2.0**20
    assert (by_x.double() - scaled).norm() <= 1e-3 * scaled.norm()


def test_errors_are_at_most_those_of_two_passes(launched: Counter[str]) -> None:
    """Collapsed features: the gradient is the difference of positives and exponentials, which T takes before rounding.
    Two passes round the exponentials, and subtract the exact positives."""
    x, y = problem(64, 32, 4, spread=0.02)
    expected = exact(x, y, torch.float16)[1]
    (one,) = run(x, y, torch.float16)[1:2]
    leaf = x.half().requires_grad_()
    losses = nckernels.supcon_loss(leaf, y, temperature=0.1, reduction="none")
    (two,) = torch.autograd.grad(losses.mean(), leaf)
    assert launched[STEP] == 1
    assert (one.double() - expected).norm() < 0.5 * (two.double() - expected).norm()


def test_repeats_bit_by_bit_and_leaves_inputs_alone() -> None:
    x, y = problem(50, 24, 5)
    before = x.clone(), y.clone()
    weight = torch.rand(50)
    first, second = (run(x, y, torch.float32, sample_weight=weight) for _ in range(2))
    for a, b in zip((*first, *before), (*second, x, y), strict=True):
        assert torch.equal(a, b)


def test_which_problems_take_two_passes(launched: Counter[str]) -> None:
    """No gradient wanted, reduction="none", the uniformity loss."""
    x, y = problem(20, 16, 6)
    with torch.no_grad():
        nckernels.supcon_loss(x, y)
    x.requires_grad_()
    nckernels.supcon_loss(x, y, reduction="none").sum().backward()
    nckernels.uniformity_loss(F.normalize(x)).backward()
    assert launched[STEP] == 0
    nckernels.supcon_loss(x, y).backward()
    assert launched[STEP] == 1


@pytest.mark.parametrize("way", ["by panels"], indirect=True)
@pytest.mark.parametrize("loss", ["supcon", "simclr"])
def test_learnt_samples(loss: str) -> None:
    check_against_eager(loss, 60)


@pytest.mark.parametrize("decoupled", [False, True])
def test_gradient_of_the_temperature(decoupled: bool, way: str) -> None:
    """Where the features of each class have collapsed, and where all have, most cosines are nearly the same, and the
    gradient is the small rest of a sum of large terms. Two passes have errors of 1e-2 to 1e3 there with bfloat16."""
    torch.manual_seed(9)
    y, dtype = torch.arange(40) % 4, torch.bfloat16 if way == "on the chip" else torch.float32
    for centers, bound in ((torch.eye(4, 24)[y], 5e-3), (torch.ones(24), 3e-2)):
        x = centers + 0.01 * torch.randn(40, 24)
        expected = exact(x, y, dtype, decoupled=decoupled)[2]
        found = run(x, y, dtype, decoupled=decoupled)[2]
        assert (found - expected).abs() <= bound * expected.abs(), (float(found), float(expected))


@pytest.mark.parametrize("way", ["by panels"], indirect=True)
def test_which_problems_have_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 of full precision; long rows; not what is faster on the chip, nor thin panels."""
    monkeypatch.undo()
    plan.pair_panels.cache_clear()

    def panels(n: int, d: int, dtype: torch.dtype, workspace: int = 32 << 20) -> int | None:
        spec = Spec("instance", "self", False, -100, workspace, symmetric=True)
        features = torch.empty(n, d, dtype=dtype, device="meta")
        found = pairs_step._panels(features, pairs_step._shape(features), spec)
        return None if found is None else found.rows

    monkeypatch.setattr(config, "arch_of", lambda _: config.Arch(90, 132, 227 << 10))
    assert panels(2048, 128, torch.float32) == 2048
    assert panels(16384, 128, torch.float32) == 384
    assert panels(2**20, 128, torch.float32) is None
    assert panels(2048, 128, torch.bfloat16) is None
    assert panels(2048, 1024, torch.bfloat16) == 2048
    assert panels(65536, 2048, torch.bfloat16) is None
    assert panels(16384, 2048, torch.bfloat16, 320 << 20) == 2752


@pytest.mark.parametrize(
    ("dtype", "workspace"), [(torch.float32, 4 << 20), (torch.float16, 4 << 20), (torch.bfloat16, 128 << 20)]
)
def test_memory(workspace: int, dtype: torch.dtype, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The workspace and O(N) vectors beyond features and gradients; float16 gradients wait in float32."""
    n, d = 4096, 256
    counts: Counter[str] = Counter()
    monkeypatch.setattr(launch, "launch", lambda kernel, *_, **__: counts.update([kernel.__name__]))
    monkeypatch.setattr(launch.TritonKernels, "matmul", lambda *_, **__: None)
    tau = torch.tensor(0.1, requires_grad=True)

    def call() -> None:
        x = torch.empty(n, d, dtype=dtype, requires_grad=True)
        torch.autograd.grad(nckernels.supcon_loss(x, torch.zeros(n, dtype=torch.int64), temperature=tau), (x, tau))

    with nckernels.use_workspace(workspace):
        peak, _ = replay(call)
    tensors = n * d * (2 * dtype.itemsize + (4 if dtype == torch.float16 else 0))
    assert tensors / 2 < peak <= tensors + workspace + BYTES_PER_ROW * n
    if way == "by panels":
        assert (counts["pairs_panel_lse_kernel"] == 1) == (workspace > 100 << 20)
