"""The three losses against their printed M x M forms and F.cross_entropy, and on degenerate batches."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Backend
from oracle import EPS, HALF, LOSSES, cosine, loss, normface_logits, package_loss, worst
from torch import Tensor

import nckernels

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "nonl": ("nonl", {}),
    "nonl-instance": ("nonl", {"direction": "instance"}),
    "nonl-both": ("nonl", {"direction": "both"}),
    "ntce": ("ntce", {}),
    "normface": ("normface", {}),
    "smoothing": ("normface", {"label_smoothing": 0.1}),
    "full-smoothing": ("normface", {"label_smoothing": 1.0}),
    "cosface": ("normface", {"cosine_margin": 0.35}),
    "arcface": ("normface", {"angular_margin": 0.5}),
    "all-margins": ("normface", {"angular_margin": 0.2, "cosine_margin": 0.1, "label_smoothing": 0.05}),
}
COLUMN_LOSSES = ("nonl", "ntce")  # present classes only
REDUCTIONS = ("none", "mean", "sum")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

variants = pytest.mark.parametrize("variant", VARIANTS)
reductions = pytest.mark.parametrize("reduction", REDUCTIONS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t).removeprefix("torch."))


@dataclasses.dataclass(frozen=True)
class Batch:
    input: Tensor
    prototypes: Tensor
    target: Tensor
    temperature: Tensor
    weight: Tensor | None = None

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Batch:
        """Inputs in dtype, temperature and weight in the dtype of the loss."""
        out = torch.float64 if dtype == torch.float64 else torch.float32
        weight = None if self.weight is None else self.weight.to(device, out)
        return Batch(
            self.input.to(device, dtype),
            self.prototypes.to(device, dtype),
            self.target.to(device),
            self.temperature.to(device, out),
            weight,
        )


def make_batch(
    samples: int = 50,
    classes: int = 13,
    dim: int = 16,
    *,
    weight: bool = False,
    ignored: float = 0.2,
    ignore_index: int = -100,
    temperature: float = 0.2,
    seed: int = 0,
) -> Batch:
    g = torch.Generator().manual_seed(seed)
    target = torch.randint(classes, (samples,), generator=g)
    target[torch.rand(samples, generator=g) < ignored] = ignore_index
    return Batch(
        torch.randn(samples, dim, generator=g, dtype=torch.float64),
        torch.randn(classes, dim, generator=g, dtype=torch.float64),
        target,
        torch.tensor(temperature, dtype=torch.float64),
        torch.rand(classes, generator=g, dtype=torch.float64) + 0.1 if weight else None,
    )


def upstream_of(out: Tensor) -> Tensor:
    g = torch.Generator().manual_seed(7)
    return torch.randn(out.shape, generator=g, dtype=torch.float64).to(out.device, out.dtype)


def anchors(b: Batch, out: Tensor, options: dict[str, Any]) -> float:
    """Sum over the anchors of the absolute values of their factors in the loss, times upstream."""
    ignore_index = options.get("ignore_index", -100)
    keep = b.target != ignore_index
    w = torch.ones(len(b.prototypes), dtype=torch.float64) if b.weight is None else b.weight
    factor = torch.where(keep, w[torch.where(keep, b.target, 0)], 0)
    if options.get("reduction", "mean") == "mean":
        factor = factor / factor.sum()
    return float((factor * upstream_of(out).abs()).sum())


def value_and_grads(name: str, batch: Batch, package: bool, **options: Any) -> dict[str, Tensor]:
    """Loss and its gradients, per-sample losses under random upstream gradients."""
    leaves = [t.detach().clone().requires_grad_() for t in (batch.input, batch.prototypes, batch.temperature)]
    function = package_loss(name) if package else lambda *args, **kw: loss(name, *args, **kw)
    if batch.weight is not None:
        options["weight"] = batch.weight
    out = function(leaves[0], leaves[1], batch.target, temperature=leaves[2], **options)
    grads = torch.autograd.grad(out, leaves, upstream_of(out))
    return dict(zip(("loss", "input", "prototypes", "temperature"), (out.detach(), *grads), strict=True))


def check_loss(
    name: str,
    batch: Batch,
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    cancelled: float = 0.0,
    **options: Any,
) -> None:
    """Package vs the float64 oracle: error <= that of the printed form in dtype + a few roundings.

    cancelled is the size of the terms of a gradient, for batches where they cancel to (nearly) nothing.
    """
    b = batch.to(dtype, device)
    truth = value_and_grads(name, b.to(torch.float64), False, eps=EPS[dtype], **options)
    eager = value_and_grads(name, b, False, eps=EPS[dtype], **options)
    got = value_and_grads(name, b, True, **options)
    out = torch.float64 if dtype == torch.float64 else torch.float32
    beta = float(1 / b.temperature)
    unit = torch.finfo(out).eps
    for key, reference in truth.items():
        assert got[key].shape == reference.shape, key
        assert got[key].dtype == (out if key in ("loss", "temperature") else dtype), key
        # A loss is made of logits of size beta, its gradients of weights of such logits; the gradient in the
        # temperature is a sum of similarities over the anchors, times beta^2, that may cancel.
        scale, tol = reference.abs().max() + cancelled, 8 * unit * (1 + beta)
        if key == "loss":
            scale, tol = reference.abs().max() + beta, 8 * unit
        elif key == "temperature":
            scale = torch.tensor(anchors(b.to(torch.float64), truth["loss"], options) * beta**2)
        elif dtype in HALF:  # these gradients and the tiles of weights behind them are rounded to the input dtype
            tol += 2 * torch.finfo(dtype).eps
        error = worst((got[key].cpu().double() - reference).abs() / scale)
        eager_error = min(worst((eager[key].cpu().double() - reference).abs() / scale), 0.1)
        assert error <= eager_error + tol, f"{key}: error {error:.3g}, eager {eager_error:.3g}, allowed +{tol:.3g}"


# --------------------------------------------------------------------------------------------------
# the oracle itself


def test_oracle_equals_equations_as_loops() -> None:
    """[NCD] Eqs. 3-5 in Python loops over floats guard the matrix forms every other test trusts."""
    b = make_batch(8, 4, 3, ignored=0.0)
    s, y, beta = cosine(b.input, b.prototypes).tolist(), b.target.tolist(), float(1 / b.temperature)
    samples, classes = range(8), range(4)

    def lse(terms: list[float]) -> float:
        return math.log(sum(math.exp(beta * t) for t in terms))

    pos = [beta * s[i][y[i]] for i in samples]
    row = [[s[i][c] for c in classes if c != y[i]] for i in samples]
    column = [[s[j][y[i]] for j in samples if y[j] != y[i]] for i in samples]
    expected = {
        "normface": [lse(s[i]) - pos[i] for i in samples],
        "ntce": [lse([s[j][y[i]] for j in samples]) - pos[i] for i in samples],
        "nonl": [lse(column[i]) - pos[i] for i in samples],
        "nonl-instance": [lse(row[i]) - pos[i] for i in samples],
        "nonl-both": [lse(row[i] + column[i]) - pos[i] for i in samples],
        "arcface": [
            lse(row[i] + [math.cos(math.acos(s[i][y[i]]) + 0.5)]) - beta * math.cos(math.acos(s[i][y[i]]) + 0.5)
            for i in samples
        ],
        "cosface": [lse(row[i] + [s[i][y[i]] - 0.35]) - beta * (s[i][y[i]] - 0.35) for i in samples],
    }
    for variant, values in expected.items():
        name, options = VARIANTS[variant]
        got = loss(name, b.input, b.prototypes, b.target, temperature=b.temperature, reduction="none", **options)
        assert got.tolist() == pytest.approx(values, rel=1e-12), variant


# --------------------------------------------------------------------------------------------------
# values and gradients


@pytest.mark.parametrize("weight", [False, True], ids=["plain", "weight"])
@reductions
@variants
@dtypes
def test_equals_the_printed_form(
    backend: Backend, dtype: torch.dtype, variant: str, reduction: str, weight: bool
) -> None:
    backend.require(dtype)
    name, options = VARIANTS[variant]
    check_loss(name, make_batch(weight=weight), dtype, backend.device, reduction=reduction, **options)


@variants
def test_many_tiles(backend: Backend, small_workspace: None, variant: str) -> None:
    name, options = VARIANTS[variant]
    check_loss(
        name,
        make_batch(301, 203, 12, weight=True),
        torch.float32,
        backend.device,
        reduction="none",
        **options,
    )


@variants
def test_more_classes_than_samples(backend: Backend, small_workspace: None, variant: str) -> None:
    name, options = VARIANTS[variant]
    check_loss(name, make_batch(20, 3000, 12, weight=True), torch.float32, backend.device, **options)


@pytest.mark.parametrize("temperature", [0.001, 0.01, 2.0])
@variants
def test_every_temperature(backend: Backend, variant: str, temperature: float) -> None:
    name, options = VARIANTS[variant]
    check_loss(name, make_batch(temperature=temperature), torch.float32, backend.device, **options)


@pytest.mark.parametrize("ignore_index", [0, 5, -1])
@reductions
@variants
def test_ignore_index_anywhere(backend: Backend, variant: str, reduction: str, ignore_index: int) -> None:
    name, options = VARIANTS[variant]
    batch = make_batch(weight=True, ignore_index=ignore_index)
    check_loss(name, batch, torch.float32, backend.device, reduction=reduction, ignore_index=ignore_index, **options)


@reductions
@variants
def test_ignored_samples_are_as_if_dropped(backend: Backend, variant: str, reduction: str) -> None:
    """Neither anchors nor negatives: the rest of the batch gives the same loss and gradients."""
    name, options = VARIANTS[variant]
    b = make_batch(weight=True).to(torch.float32, backend.device)
    keep = b.target != -100
    dropped = dataclasses.replace(b, input=b.input[keep], target=b.target[keep])
    whole = value_and_grads(name, b, True, reduction="sum" if reduction == "none" else reduction, **options)
    rest = value_and_grads(name, dropped, True, reduction="sum" if reduction == "none" else reduction, **options)
    assert not whole["input"][~keep].any()
    whole["input"] = whole["input"][keep]
    if reduction == "none":
        args = (b.prototypes, b.target)
        samples = package_loss(name)(b.input, *args, temperature=0.2, weight=b.weight, reduction="none", **options)
        assert not samples[~keep].any()
        alone = package_loss(name)(
            b.input[keep],
            b.prototypes,
            b.target[keep],
            temperature=0.2,
            weight=b.weight,
            reduction="none",
            **options,
        )
        whole["loss"], rest["loss"] = samples[keep], alone
    for key, value in rest.items():
        # Sums over other tiles: a few float32 roundings of the largest entry.
        torch.testing.assert_close(whole[key], value, rtol=0, atol=float(value.abs().max() + 1) * 4e-6)


@pytest.mark.parametrize("name", COLUMN_LOSSES)
@pytest.mark.parametrize("shape", [(50, 13), (20, 3000)], ids=str)
def test_absent_classes_get_exactly_no_gradient(backend: Backend, name: str, shape: tuple[int, int]) -> None:
    batch = make_batch(*shape)
    batch.target[batch.target == 3] = 4
    grads = value_and_grads(name, batch.to(torch.float32, backend.device), True)["prototypes"].cpu()
    present = torch.isin(torch.arange(shape[1]), batch.target)
    assert not present.all()
    assert not grads[~present].any()
    assert grads[present].any(1).all()


@pytest.mark.parametrize("fill", [1e6, math.nan], ids=["far", "nan"])
@pytest.mark.parametrize("name", COLUMN_LOSSES)
def test_absent_prototypes_do_not_matter(backend: Backend, name: str, fill: float) -> None:
    """Whatever the prototypes of absent classes hold, nothing changes, not even through 0 * NaN."""
    b = make_batch(20, 60).to(torch.float32, backend.device)
    absent = ~torch.isin(torch.arange(60), b.target.cpu()).to(backend.device)
    moved = torch.where(absent[:, None], fill, b.prototypes)
    expected = value_and_grads(name, b, True)
    got = value_and_grads(name, dataclasses.replace(b, prototypes=moved), True)
    for key, value in expected.items():
        assert torch.equal(got[key], value), key


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8], ids=str)
@variants
def test_integer_targets(backend: Backend, variant: str, dtype: torch.dtype) -> None:
    name, options = VARIANTS[variant]
    b = make_batch(ignored=0.0, weight=True).to(torch.float32, backend.device)
    narrow = dataclasses.replace(b, target=b.target.to(dtype))
    expected, got = value_and_grads(name, b, True, **options), value_and_grads(name, narrow, True, **options)
    for key, value in expected.items():
        assert torch.equal(got[key], value), key


@variants
def test_temperature_as_a_number(backend: Backend, variant: str) -> None:
    """A number, a float32 tensor and the default of 0.1 are the same temperature."""
    name, options = VARIANTS[variant]
    b = make_batch(weight=True, temperature=0.1).to(torch.float32, backend.device)
    function = package_loss(name)
    values = [
        function(b.input, b.prototypes, b.target, **kw, **options)
        for kw in ({}, {"temperature": 0.1}, {"temperature": b.temperature})
    ]
    assert torch.equal(values[0], values[1])
    torch.testing.assert_close(values[2], values[0], rtol=2**-21, atol=0)  # 0.1 differs by its float32 rounding


@variants
def test_per_sample_upstream_gradients_are_used_one_by_one(backend: Backend, variant: str) -> None:
    """The gradient of sample i's loss is what upstream e_i gives: nothing is averaged."""
    name, options = VARIANTS[variant]
    b = make_batch(9, 4, 3, ignored=0.0).to(torch.float32, backend.device)
    oracle = b.to(torch.float64)
    for i in range(9):
        grads = []
        for batch, function in ((b, package_loss(name)), (oracle, lambda *a, **k: loss(name, *a, **k))):
            x = batch.input.clone().requires_grad_()
            samples = function(x, batch.prototypes, batch.target, temperature=0.2, reduction="none", **options)
            grads.append(torch.autograd.grad(samples[i], x)[0].cpu().double())
        # Float32 weights of logits of size 5.
        torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=5e-6 * float(grads[1].abs().max() + 1))


@variants
def test_reductions_agree(backend: Backend, variant: str) -> None:
    name, options = VARIANTS[variant]
    b = make_batch(weight=True).to(torch.float32, backend.device)
    assert b.weight is not None
    none, mean, total = (
        package_loss(name)(b.input, b.prototypes, b.target, weight=b.weight, reduction=r, **options) for r in REDUCTIONS
    )
    keep = b.target != -100
    assert none.shape == b.target.shape
    assert mean.shape == total.shape == ()
    torch.testing.assert_close(total, none.sum(), rtol=1e-5, atol=0)
    torch.testing.assert_close(mean, none.sum() / b.weight[b.target[keep]].sum(), rtol=1e-5, atol=0)


# --------------------------------------------------------------------------------------------------
# F.cross_entropy


@pytest.mark.parametrize("weight", [False, True], ids=["plain", "weight"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7, 1.0])
@pytest.mark.parametrize("margins", [(0.0, 0.0), (0.3, 0.2)], ids=["plain", "margins"])
@reductions
def test_normface_is_cross_entropy_of_the_dense_logits(
    cpu_backend: Backend, reduction: str, margins: tuple[float, float], smoothing: float, weight: bool
) -> None:
    """With ignore_index, class weights and label smoothing as F.cross_entropy has them."""
    b = make_batch(weight=weight)
    keep = b.target != -100
    logits = cosine(b.input, b.prototypes) / b.temperature
    logits[keep] = normface_logits(logits[keep] * b.temperature, b.target[keep], 1 / b.temperature, *margins)
    expected = F.cross_entropy(logits, b.target, b.weight, reduction=reduction, label_smoothing=smoothing)
    got = nckernels.normface_loss(
        b.input,
        b.prototypes,
        b.target,
        temperature=b.temperature,
        weight=b.weight,
        reduction=reduction,
        label_smoothing=smoothing,
        angular_margin=margins[0],
        cosine_margin=margins[1],
    )
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)  # float64 roundings


@pytest.mark.parametrize("margin", [0.0, 0.2])
@pytest.mark.parametrize("grad", [True, False], ids=["one-step", "two-passes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_label_smoothing_over_a_total_weight_of_zero(
    cpu_backend: Backend, dtype: torch.dtype, grad: bool, margin: float
) -> None:
    """Other classes than the batch's have weight, so that the sum is not 0. Its mean is NaN, as F.cross_entropy's."""
    x, w = torch.randn(4, 6, dtype=dtype), torch.randn(3, 6, dtype=dtype).requires_grad_(grad)
    y, weight = torch.tensor([0, 1, 0, 1]), torch.tensor([0.0, 0.0, 1.0], dtype=dtype)
    options: dict[str, Any] = {"weight": weight, "label_smoothing": 0.1}
    for reduction in ("sum", "mean"):
        expected = F.cross_entropy(cosine(x, w) / 0.1, y, reduction=reduction, **options)
        got = nckernels.normface_loss(x, w, y, reduction=reduction, cosine_margin=margin, **options)
        assert bool(expected.isnan()) == bool(got.isnan()) == (reduction == "mean")


@pytest.mark.parametrize("weight", [False, True], ids=["plain", "weight"])
@variants
def test_sample_weights(cpu_backend: Backend, variant: str, weight: bool) -> None:
    """They multiply the losses and, for the mean, count as the class weights do; negatives of weight 0 stay."""
    name, options = VARIANTS[variant]
    b = make_batch(weight=weight)
    share = torch.rand(len(b.target), dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    share[::3] = 0.0
    w = torch.ones(len(b.prototypes)).double() if b.weight is None else b.weight
    total = (w[b.target.clamp_min(0)] * share)[b.target >= 0].sum()
    single = value_and_grads(name, b, True, reduction="none", **options)["loss"]
    leaves = [t.detach().clone().requires_grad_() for t in (b.input, b.prototypes, b.temperature)]

    def weighted(reduction: str, sample_weight: Tensor | None) -> Tensor:
        return package_loss(name)(
            leaves[0], leaves[1], b.target, temperature=leaves[2], weight=b.weight, sample_weight=sample_weight,
            reduction=reduction, **options,
        )  # fmt: skip

    expected = {"none": share * single, "sum": (share * single).sum(), "mean": (share * single).sum() / total}
    for reduction, value in expected.items():
        torch.testing.assert_close(weighted(reduction, share), value, rtol=1e-12, atol=1e-12)
    got = torch.autograd.grad(weighted("sum", share), leaves)
    truth = torch.autograd.grad((weighted("none", None) * share).sum(), leaves)
    torch.testing.assert_close(got, truth, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_weights_as_in_cross_entropy(cpu_backend: Backend, name: str) -> None:
    """A weight of zero drops the sample as an anchor, from the mean's denominator too; all zero gives NaN."""
    b = make_batch(ignored=0.0)
    weight = torch.ones(13, dtype=torch.float64)
    weight[2] = 0
    assert (b.target == 2).any()
    function, args = package_loss(name), (b.input, b.prototypes, b.target)
    samples = function(*args, reduction="none")
    torch.testing.assert_close(function(*args, weight=weight), samples[b.target != 2].mean(), rtol=1e-12, atol=0)
    assert function(*args, weight=torch.zeros_like(weight)).isnan()


# --------------------------------------------------------------------------------------------------
# margins


def sphere(*cosines: float) -> tuple[Tensor, Tensor, Tensor]:
    """Features at the given cosines to prototype 0, prototypes e_0 and e_1, targets 0 (float64)."""
    x = torch.tensor([[c, 0.0, math.sqrt(1 - c * c)] for c in cosines], dtype=torch.float64)
    return x, torch.eye(3, dtype=torch.float64)[:2], torch.zeros(len(cosines), dtype=torch.int64)


@pytest.mark.parametrize("angular", [0.0, 0.5])
@pytest.mark.parametrize("pole", [1.0, -1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_margins_at_the_poles(backend: Backend, dtype: torch.dtype, pole: float, angular: float) -> None:
    """cos(theta + m) has no finite slope in S at a pole: gradients stay finite all the same."""
    backend.require(dtype)
    x, prototypes, target = (t.to(backend.device) for t in sphere(pole, pole))
    x, prototypes = x.to(dtype).requires_grad_(), prototypes.to(dtype)
    samples = nckernels.normface_loss(
        x, prototypes, target, reduction="none", angular_margin=angular, cosine_margin=0.1
    )
    if pole == 1.0:
        logit = 10 * (math.cos(angular) - 0.1)
        expected = torch.full((2,), math.log1p(math.exp(-logit)), dtype=dtype)
        # Roundings of S near a pole are square roots of roundings in theta: sqrt(8 eps), times beta sin(m).
        atol = 10 * math.sin(angular) * math.sqrt(8 * torch.finfo(dtype).eps) + 8 * torch.finfo(dtype).eps * 10
        torch.testing.assert_close(samples.detach().cpu(), expected, rtol=0, atol=atol)
    assert torch.autograd.grad(samples.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("margin", [0.3, 1.0])
def test_angular_margin_is_cos_of_theta_plus_margin(cpu_backend: Backend, margin: float) -> None:
    x, prototypes, target = sphere(0.99, 0.5, 0.0, -0.4)
    got = nckernels.normface_loss(x, prototypes, target, temperature=0.5, reduction="none", angular_margin=margin)
    logits = [2 * math.cos(math.acos(c) + margin) for c in (0.99, 0.5, 0.0, -0.4)]
    assert got.tolist() == pytest.approx([math.log1p(math.exp(-t)) for t in logits], rel=1e-12)


def test_angular_margin_beyond_pi(cpu_backend: Backend) -> None:
    """theta + m > pi: ArcFace's continuation cos(theta) - m sin(m), which keeps falling with theta."""
    x, prototypes, target = sphere(-0.95)
    got = nckernels.normface_loss(x, prototypes, target, temperature=0.5, reduction="none", angular_margin=0.5)
    assert got.item() == pytest.approx(math.log1p(math.exp(-2 * (-0.95 - 0.5 * math.sin(0.5)))), rel=1e-12)


def test_margins_only_touch_the_target(cpu_backend: Backend) -> None:
    """A margin makes every loss larger where theta + m <= pi, and the ignored stay zero."""
    b = make_batch()
    args = (b.input, b.prototypes, b.target)
    plain = nckernels.normface_loss(*args, reduction="none")
    for options in ({"cosine_margin": 0.2}, {"angular_margin": 0.05}):
        harder = nckernels.normface_loss(*args, reduction="none", **options)
        keep = b.target != -100
        assert (harder[keep] > plain[keep]).all()
        assert not harder[~keep].any()


# --------------------------------------------------------------------------------------------------
# degenerate batches


def degenerate() -> dict[str, Batch]:
    single = make_batch(6, 4, 3, ignored=0.0)
    single.target[:] = 2
    return {
        "single class": single,
        "one class in all": make_batch(6, 1, 3, ignored=0.0),
        "one sample": make_batch(1, 4, 3, ignored=0.0),
        "one of everything": make_batch(1, 1, 1, ignored=0.0),
        "one sample left": make_batch(6, 4, 3, ignored=0.8),
    }


@pytest.mark.parametrize(
    ("variant", "case"),
    [
        (variant, case)
        for variant, case in itertools.product(VARIANTS, degenerate())
        # d = 1 puts theta at a pole, where the oracle has no gradient.
        if variant not in ("arcface", "all-margins") or case != "one of everything"
    ],
)
@reductions
def test_degenerate_batches(backend: Backend, variant: str, reduction: str, case: str) -> None:
    name, options = VARIANTS[variant]
    batch = degenerate()[case]
    norms = torch.cat([batch.input.norm(dim=1), batch.prototypes.norm(dim=1)])
    cancelled = float(1 / batch.temperature / norms.min())
    check_loss(name, batch, torch.float32, backend.device, reduction=reduction, cancelled=cancelled, **options)


@pytest.mark.parametrize("direction", ["class", "instance", "both"])
def test_nonl_without_negatives_is_its_alignment(backend: Backend, direction: str) -> None:
    """One class in all: no negatives in the row, none in the column."""
    b = make_batch(6, 1, 3, ignored=0.0).to(torch.float32, backend.device)
    got = nckernels.nonl_loss(b.input, b.prototypes, b.target, reduction="none", direction=direction)
    expected = -10 * cosine(b.input, b.prototypes).squeeze(1)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)  # float32 roundings of logits of size 10


@pytest.mark.parametrize("empty", [True, False], ids=["empty", "all-ignored"])
@pytest.mark.parametrize("weight", [False, True], ids=["plain", "weight"])
@variants
def test_nothing_to_learn_from(backend: Backend, variant: str, weight: bool, empty: bool) -> None:
    """As F.cross_entropy: NaN for the mean, 0 with zero gradients for the sum, one zero per sample."""
    name, options = VARIANTS[variant]
    batch = make_batch(0 if empty else 5, 4, 3, weight=weight, ignored=1.1).to(torch.float32, backend.device)
    logits = cosine(batch.input, batch.prototypes)
    for reduction in REDUCTIONS:
        got = value_and_grads(name, batch, True, reduction=reduction, **options)
        expected = F.cross_entropy(logits, batch.target, batch.weight, reduction=reduction)
        torch.testing.assert_close(got["loss"], expected, equal_nan=True, rtol=0, atol=0)
        if reduction != "mean":
            assert not any(got[key].any() for key in ("input", "prototypes", "temperature"))


@pytest.mark.parametrize("variant", [v for v in VARIANTS if "margins" not in v and v != "arcface"])
def test_zero_features_and_prototypes(backend: Backend, variant: str) -> None:
    name, options = VARIANTS[variant]
    batch = make_batch(weight=True)
    batch.input[::4] = 0
    batch.prototypes[1] = 0
    b = batch.to(torch.float32, backend.device)
    got = value_and_grads(name, b, True, **options)
    truth = value_and_grads(name, b.to(torch.float64), False, **options)
    for key, reference in truth.items():
        value = got[key].cpu().double()
        assert value.isfinite().all(), key
        # Row by row, as zero rows have gradients 1e12 times the others': float32 weights of logits of size 5.
        size = reference.abs().amax(-1, keepdim=True) if reference.dim() == 2 else reference.abs()
        typical = size[size > 0].min() if reference.dim() == 2 else size
        assert bool(((value - reference).abs() <= 2e-5 * size + 1e-6 * typical).all()), key


@pytest.mark.parametrize("beta", [100.0, 1000.0])
@variants
def test_collapsed_features_at_small_temperature(backend: Backend, variant: str, beta: float) -> None:
    """The authors' raw exp gives -inf below a temperature of 0.0112; here every value is exact."""
    name, options = VARIANTS[variant]
    if "arcface" in variant or "margins" in variant:
        pytest.skip("collapsed features are at the pole of theta: see test_margins_at_the_poles")
    g = torch.Generator().manual_seed(3)
    prototypes = torch.linalg.qr(torch.randn(6, 6, generator=g, dtype=torch.float64))[0]
    target = torch.arange(6).repeat(4)
    features = prototypes[target] + 1e-3 * torch.randn(24, 6, generator=g, dtype=torch.float64)
    batch = Batch(features, prototypes, target, torch.tensor(1 / beta, dtype=torch.float64))
    b = batch.to(torch.float32, backend.device)
    got = value_and_grads(name, b, True, **options)
    truth = value_and_grads(name, b.to(torch.float64), False, **options)
    # Float32 logits of size beta carry errors of a few 2^-24 beta.
    torch.testing.assert_close(got["loss"].cpu().double(), truth["loss"], rtol=0, atol=8 * 2**-24 * beta)
    for key in ("input", "prototypes"):
        atol = 16 * 2**-24 * beta * beta  # a weight's error is its logit's, times beta in the gradient
        torch.testing.assert_close(got[key].cpu().double(), truth[key], rtol=0, atol=atol)
