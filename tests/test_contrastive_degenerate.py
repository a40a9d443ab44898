"""The losses without prototypes at the edge: nothing to learn from, zero rows, extreme sizes, collapsed features."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Backend
from contrastive_cases import CASES, SOME, TEMPERED, build, reductions
from oracle import worst
from oracle_contrastive import NAIVE, Case, check, package, value_and_grads

import nckernels

# --------------------------------------------------------------------------------------------------
# empty sums, empty means


@dataclasses.dataclass(frozen=True)
class Degenerate:
    """Labels of a degenerate batch and, by supcon's rule, which of its samples have a positive."""

    labels: list[int]
    counted: list[bool]


NOTHING = -100
DEGENERATE = {
    "all singletons": Degenerate([3, 1, 4, 15], [False] * 4),
    "one pair among singletons": Degenerate([3, 1, 3, 15], [True, False, True, False]),
    "all equal": Degenerate([8] * 4, [True] * 4),
    "all ignored": Degenerate([NOTHING] * 3, [False] * 3),
    "one sample": Degenerate([2], [False]),
    "one left, a singleton": Degenerate([NOTHING, 5, NOTHING], [False] * 3),
    "a positive that is ignored": Degenerate([NOTHING, NOTHING, 5, 6], [False] * 4),
    "a pair and nothing else": Degenerate([5, 5], [True] * 2),
    "a pair, the rest ignored": Degenerate([5, NOTHING, 5, NOTHING], [True, False, True, False]),
    "empty": Degenerate([], []),
}
degenerate = pytest.mark.parametrize("batch", DEGENERATE)


def degenerate_case(case: str, batch: str, **options: Any) -> Case:
    labels = torch.tensor(DEGENERATE[batch].labels, dtype=torch.int64)
    return dataclasses.replace(build(case, len(labels), 5, **options), target=labels)


@pytest.mark.parametrize(("reduction", "weight"), [*SOME, ("mean", True)], ids=["none", "mean", "weighted-mean"])
@degenerate
@pytest.mark.parametrize("case", ["supcon", "supcon-decoupled", "prototype"])
def test_degenerate_batches(backend: Backend, case: str, batch: str, reduction: str, weight: bool) -> None:
    """By the contract and finite throughout: no NaN from an empty set, ever."""
    c = degenerate_case(case, batch, reduction=reduction, weight=weight)
    check(c, torch.float32, backend.device, cancelled=5.0)  # gradients of a pair alone cancel; beta = 5


@degenerate
@pytest.mark.parametrize("case", ["supcon", "supcon-decoupled"])
def test_singletons_are_left_out_of_the_mean(backend: Backend, case: str, batch: str) -> None:
    c = degenerate_case(case, batch).to(torch.float32, backend.device)
    counted = torch.tensor(DEGENERATE[batch].counted, dtype=torch.bool)
    none = c.call(package(c.name), reduction="none").cpu()
    assert not none[~counted].any()
    if batch == "a pair and nothing else" or batch == "a pair, the rest ignored":
        # log e^{beta s} - beta s; decoupled there is no negative and -beta s is left.
        s = F.cosine_similarity(c.inputs[0][0].double(), c.inputs[0][-1 if len(counted) == 2 else 2].double(), dim=0)
        expected = -5 * float(s) if c.options.get("decoupled") else 0.0
        torch.testing.assert_close(none[counted].double(), torch.full((2,), expected).double(), rtol=0, atol=4e-6)
    elif counted.any():
        assert bool(none[counted].all())
    for reduction in ("sum", "mean"):
        value = c.call(package(c.name), reduction=reduction).cpu()
        total = none.sum() / (max(int(counted.sum()), 1) if reduction == "mean" else 1)
        torch.testing.assert_close(value, total, rtol=1e-6, atol=1e-6)


def test_a_singleton_is_a_negative_of_the_others(backend: Backend) -> None:
    """So the pair's loss is not that of the pair alone, and the singleton gets a gradient."""
    c = degenerate_case("supcon", "one pair among singletons").to(torch.float32, backend.device)
    assert c.target is not None
    got = value_and_grads(c, package("supcon"))
    pair = dataclasses.replace(c, inputs=(c.inputs[0][::2],), target=c.target[::2])
    assert got["loss"] > value_and_grads(pair, package("supcon"))["loss"] + 0.01
    assert got["input 0"].any(1).all()


@pytest.mark.parametrize(("reduction", "weight"), [("mean", False), ("mean", True), ("sum", True)])
@pytest.mark.parametrize(
    ("case", "batch"),
    [
        ("supcon", "all singletons"),
        ("supcon-decoupled", "all singletons"),
        *((c, b) for c in ("supcon", "supcon-decoupled", "prototype") for b in ("all ignored", "empty")),
        ("supcon", "one sample"),
    ],
)
def test_nothing_to_learn_from(backend: Backend, case: str, batch: str, reduction: str, weight: bool) -> None:
    """0 with zero gradients, not the NaN of a mean over nothing; the graph is there all the same."""
    c = degenerate_case(case, batch, reduction=reduction, weight=weight).to(torch.float32, backend.device)
    got = value_and_grads(c, package(c.name))
    for key, value in got.items():
        assert torch.equal(value, torch.zeros_like(value)), key


@pytest.mark.parametrize("case", TEMPERED)
def test_all_weights_zero(backend: Backend, case: str) -> None:
    """A weighted mean over a total weight of zero is 0 with zero gradients."""
    c = build(case, weight=True).to(torch.float32, backend.device)
    assert c.weight is not None
    got = value_and_grads(dataclasses.replace(c, weight=torch.zeros_like(c.weight)), package(c.name))
    for key, value in got.items():
        assert torch.equal(value, torch.zeros_like(value)), key


@reductions
@pytest.mark.parametrize("case", ["info_nce-no-target", "info_nce", "clip", "clip-decoupled", "alignment"])
def test_no_rows_at_all(backend: Backend, case: str, reduction: str) -> None:
    c = build(case, 0, 5, reduction=reduction)
    got = value_and_grads(c.to(torch.float32, backend.device), package(c.name))
    assert got["loss"].shape == ((0,) if reduction == "none" else ())
    for key, value in got.items():
        assert torch.equal(value, torch.zeros_like(value)), key


@reductions
def test_all_queries_ignored(backend: Backend, reduction: str) -> None:
    c = build("info_nce", ignored=1.1, reduction=reduction).to(torch.float32, backend.device)
    assert c.target is not None
    c.target[:] = -100
    for key, value in value_and_grads(c, package("info_nce")).items():
        assert torch.equal(value, torch.zeros_like(value)), key


def test_views_without_a_sample(backend: Backend) -> None:
    """(0, V, d), with and without labels."""
    x = torch.randn(0, 2, 5, device=backend.device, requires_grad=True)
    empty = torch.empty(0, dtype=torch.int64, device=backend.device)
    for target in (None, empty):
        assert nckernels.supcon_loss(x, target, reduction="none").shape == (0, 2)
        value = nckernels.supcon_loss(x, target)
        value.backward()
        assert value.item() == 0.0
    assert nckernels.prototype_loss(x, empty, reduction="none").shape == (0, 2)
    assert nckernels.prototype_loss(x, empty).item() == 0.0


def test_alone_without_negatives_the_alignment_is_left(backend: Backend) -> None:
    """One key, one pair, one class: what the contract keeps of each loss when its sum is empty."""
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).to(backend.device)
    s = F.normalize(x.double()) @ F.normalize(x.double()).T
    close: dict[str, Any] = {"rtol": 0, "atol": 4e-6}  # float32 roundings of logits of size 10

    one = torch.zeros(1, dtype=torch.int64, device=backend.device)
    got = nckernels.prototype_loss(x[:1], one)
    torch.testing.assert_close(got.double(), torch.full_like(got, -10).double(), **close)

    zeros = torch.zeros(4, dtype=torch.int64, device=backend.device)
    got = nckernels.info_nce_loss(x, x[:1], zeros, decoupled=True, reduction="none")
    torch.testing.assert_close(got.double(), -10 * s[:, 0], **close)
    got = nckernels.info_nce_loss(x, x[:1], zeros, reduction="none")
    torch.testing.assert_close(got, torch.zeros_like(got), **close)

    got = nckernels.clip_loss(x[:1], x[1:2], temperature=0.1, decoupled=True)
    torch.testing.assert_close(got.double(), -10 * s[0, 1], **close)
    got = nckernels.clip_loss(x[:1], x[1:2])
    torch.testing.assert_close(got, torch.zeros_like(got), **close)

    got = nckernels.supcon_loss(x, zeros, decoupled=True, reduction="none")
    torch.testing.assert_close(got.double(), -10 * (s.sum(1) - 1) / 3, **close)


# --------------------------------------------------------------------------------------------------
# zero rows, rows of extreme size, rows that are all alike


def test_a_zero_row_is_orthogonal_to_all(backend: Backend) -> None:
    """For the uniformity, which knows cosines only: its squared distance to the others is 2."""
    x = F.normalize(torch.tensor([[0.0, 0.0], [3.0, 4.0], [4.0, -3.0]], device=backend.device))
    got = nckernels.uniformity_loss(x.requires_grad_(), t=0.5)
    got.backward()
    assert got.item() == pytest.approx(-1.0, abs=1e-6)  # all three pairs are at distance sqrt(2)
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("case", [c for c in CASES if c != "alignment-1" and "uniformity" not in c])
def test_zero_rows(backend: Backend, case: str) -> None:
    """A zero row is the zero vector, as in F.normalize, not a unit vector: values and gradients stay finite."""
    c = build(case)
    for x in c.inputs:
        x[::4] = 0
    c = c.to(torch.float32, backend.device)
    got, truth = value_and_grads(c, package(c.name)), value_and_grads(c.to(torch.float64), NAIVE[c.name])
    for key, reference in truth.items():
        value, expected = got[key].cpu().double(), reference.cpu()
        assert value.isfinite().all(), key
        # In units of unit rows, as zero rows have gradients 1e12 times the others': float32 weights of logits of 5.
        if key.startswith("input"):
            norms = c.inputs[int(key[-1])].cpu().double().norm(dim=-1, keepdim=True).clamp_min(1e-12)
            value, expected = value * norms, expected * norms
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-5 * float(expected.abs().max() + 1))


@pytest.mark.parametrize("case", CASES)
def test_half_inputs_of_extreme_size(backend: Backend, case: str) -> None:
    """float16 rows near its largest and near its smallest numbers: squares must not overflow or vanish."""
    c = build(case, 20, 8, keys=10)
    scale = torch.tensor([2.0**-10, 2.0**12], dtype=torch.float64).repeat(10)
    inputs = []
    for x in c.inputs:
        rows = F.normalize(x, dim=-1) * 4
        inputs.append((rows * scale[: len(rows)].reshape(-1, *[1] * (rows.dim() - 1))).half())
    half = dataclasses.replace(c.to(torch.float16, backend.device), inputs=tuple(x.to(backend.device) for x in inputs))
    truth = value_and_grads(half.to(torch.float64), NAIVE[c.name])
    got = value_and_grads(half, package(c.name))
    beta = 5.0 if case in TEMPERED else 8.0
    size = float(truth["loss"].abs().max()) + beta
    assert abs(float(got["loss"].double() - truth["loss"])) <= 16 * 2**-11 * size
    for i, x in enumerate(half.inputs):
        value = got[f"input {i}"].double()
        norms = x.double().norm(dim=-1, keepdim=True)
        assert value.isfinite().all()
        error = (value - truth[f"input {i}"]) * norms
        # Half-precision weights; below 2^-24 a float16 gradient is rounded to a multiple of it.
        assert bool((error.abs() <= 16 * 2**-11 * beta + 2**-24 * norms).all())


COLLAPSED = ["supcon", "supcon-decoupled", "prototype", "info_nce-no-target", "clip"]


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "nearly"])
@pytest.mark.parametrize("case", COLLAPSED)
def test_collapsed_features_at_small_temperature(backend: Backend, case: str, exact: bool) -> None:
    """Temperature 0.01: e^100 overflows float32 and e^-100 vanishes, the losses do neither."""
    g, beta = torch.Generator().manual_seed(3), 100.0
    means = torch.linalg.qr(torch.randn(6, 6, generator=g, dtype=torch.float64))[0]
    target = torch.arange(6).repeat(4)
    noise = 0.0 if exact else 1e-3
    x, z = (means[target] + noise * torch.randn(24, 6, generator=g, dtype=torch.float64) for _ in range(2))
    name, options = CASES[case]
    c = Case(
        name,
        (x,) if name in ("supcon", "prototype") else (x, z),
        target if name in ("supcon", "prototype") else None,
        torch.tensor(1 / beta, dtype=torch.float64),
        options={k: v for k, v in options.items() if k == "decoupled"},
    ).to(torch.float32, backend.device)
    got, truth = value_and_grads(c, package(name)), value_and_grads(c.to(torch.float64), NAIVE[name])
    # Float32 logits of size beta carry errors of a few 2^-24 beta; a weight's error is its logit's, times beta.
    torch.testing.assert_close(got["loss"].double(), truth["loss"], rtol=0, atol=16 * 2**-24 * beta)
    for key in ("input 0", "input 1"):
        if key in truth:
            torch.testing.assert_close(got[key].double(), truth[key], rtol=0, atol=16 * 2**-24 * beta**2)


@pytest.mark.parametrize("case", ["supcon", "prototype", "info_nce-no-target", "clip", "uniformity"])
def test_all_rows_equal(backend: Backend, case: str) -> None:
    """Everything collapsed to one point, at temperature 0.01: the logarithm of a count, and no gradient."""
    n = 40
    c = build(case, n, 6, ignored=0.0).to(torch.float32, backend.device)
    row = torch.tensor([3.0, -1.0, 2.0, 0.5, 0.0, 1.0], device=backend.device)
    target = None if c.target is None else torch.arange(n, device=backend.device) % 5
    temperature = None if c.temperature is None else torch.full_like(c.temperature, 0.01)
    c = dataclasses.replace(
        c, inputs=tuple(row.expand(n, 6).clone() for _ in c.inputs), target=target, temperature=temperature
    )
    got = value_and_grads(c, package(c.name))
    expected = {"supcon": math.log(n - 1), "prototype": math.log(n - 1), "uniformity": 0.0}.get(c.name, math.log(n))
    # Float32 roundings of logits of size 100.
    assert float(got["loss"]) == pytest.approx(expected, abs=2e-5)
    for key in ("input 0", "input 1"):
        if key in got:
            assert worst(got[key].abs()) <= 16 * 2**-24 * 100**2 / n


@pytest.mark.parametrize("alpha", [1.0, 1.5, 2.0, 3.0])
def test_alignment_gradient_where_the_pairs_meet(backend: Backend, alpha: float) -> None:
    """Finite at a distance of zero, and zero for alpha > 1; the other pairs are not disturbed."""
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).to(backend.device)
    z = x.flip(1)
    z[::2] = 3 * x[::2]
    x, z = x.requires_grad_(), z.requires_grad_()
    samples = nckernels.alignment_loss(x, z, alpha=alpha, reduction="none")
    assert worst(samples[::2].detach()) <= (4 * 2**-23) ** min(alpha / 2, 1.0) * 2
    grads = torch.autograd.grad(samples.sum(), (x, z))
    assert all(bool(g.isfinite().all()) for g in grads)
    if alpha > 1:
        # The distance of unit rows that should be equal is a few roundings r: alpha r^(alpha - 1) / |row|.
        norm = float(min(x.detach()[::2].norm(dim=1).min(), z.detach()[::2].norm(dim=1).min()))
        assert worst(torch.stack([g[::2] for g in grads]).abs()) <= alpha * (4 * 2**-23) ** (alpha - 1) / norm
    x64, z64 = (t.detach()[1::2].double().requires_grad_() for t in (x, z))
    expected = torch.autograd.grad(NAIVE["alignment"](x64, z64, alpha=alpha, reduction="sum"), (x64, z64))
    for got, truth in zip(grads, expected, strict=True):
        torch.testing.assert_close(got[1::2].double(), truth, rtol=0, atol=2e-6 * float(truth.abs().max()))


@pytest.mark.parametrize("alpha", [1.0, 1.5, 2.0, 3.0])
def test_alignment_gradient_of_identical_inputs(backend: Backend, alpha: float) -> None:
    """Bit for bit the same rows: exactly zero distance, finite gradients (zero for alpha > 1)."""
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).to(backend.device).requires_grad_()
    z = x.detach().clone().requires_grad_()
    value = nckernels.alignment_loss(x, z, alpha=alpha)
    assert value.item() == 0.0
    for grad in torch.autograd.grad(value, (x, z)):
        assert bool(grad.isfinite().all())
        assert alpha == 1.0 or not grad.any()


def test_alignment_of_nan_is_nan() -> None:
    """Not 0, the loss of a perfect pair."""
    x, z = torch.randn(2, 4), torch.randn(2, 4)
    x[0, 1] = torch.nan
    loss = nckernels.alignment_loss(x, z, reduction="none")
    assert loss.isnan().tolist() == [True, False]


@pytest.mark.parametrize("name", ["supcon_loss", "info_nce_loss", "clip_loss"])
def test_nothing_stays_on_its_device(name: str) -> None:
    x = torch.empty(0, 4)
    others = (torch.empty(0, dtype=torch.long),) if name == "supcon_loss" else (x,)
    with torch.device("meta"):
        assert getattr(nckernels, name)(x, *others).device == x.device
