"""Neural-collapse theory as tests: minima, bounds, lemmas and invariances of the losses ([NCD] 4 and A)."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import Backend
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import LOSSES, balanced, cosine, package_loss, rotation, simplex
from torch import Tensor

import nckernels

# The backend fixture is the same for every example of a property.
prop = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
seeds = st.integers(0, 2**31)
losses = pytest.mark.parametrize("name", LOSSES)
# Float64: a dozen roundings of logits up to 100.
EXACT = {"rtol": 1e-11, "atol": 1e-11}


def minimum(name: str, classes: int, per_class: int, temperature: float) -> float:
    """Value at the collapsed simplex, the least any balanced batch can reach (theorem A.1)."""
    a = classes / ((classes - 1) * temperature)
    spread = math.log1p((classes - 1) * math.exp(-a))
    return {
        "normface": spread,
        "ntce": spread + math.log(per_class),
        "nonl": math.log(per_class * (classes - 1)) - a,
    }[name]


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw(seed: int, samples: int = 24, classes: int = 5, dim: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    target = torch.randint(classes, (samples,), generator=torch.Generator().manual_seed(seed + 1))
    target[:2] = torch.tensor([0, 1])  # never a single class
    return randn(samples, dim, seed=seed), randn(classes, dim, seed=seed + 2), target


# --------------------------------------------------------------------------------------------------
# minima


@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("per_class", [1, 7])
@pytest.mark.parametrize(("classes", "dim"), [(2, 1), (2, 5), (4, 3), (10, 9), (10, 32)])
@losses
def test_minimum_at_the_collapsed_simplex(
    cpu_backend: Backend, name: str, classes: int, dim: int, per_class: int, temperature: float
) -> None:
    prototypes, target = simplex(classes, dim), balanced(classes, per_class)
    x, w = prototypes[target].requires_grad_(), prototypes.clone().requires_grad_()
    value = package_loss(name)(x, w, target, temperature=temperature)
    assert value.item() == pytest.approx(minimum(name, classes, per_class, temperature), rel=0, abs=1e-9)
    for grad in torch.autograd.grad(value, (x, w)):
        assert float(grad.abs().max()) < 1e-12 / temperature  # stationary, to float64 roundings


@pytest.mark.parametrize("name", LOSSES)
def test_package_simplex_is_one(cpu_backend: Backend, name: str) -> None:
    """The package's own simplex_etf reaches the minimum too."""
    prototypes = nckernels.geometry.simplex_etf(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    target = balanced(6, 3)
    value = package_loss(name)(prototypes[target], prototypes, target, temperature=0.2)
    assert value.item() == pytest.approx(minimum(name, 6, 3, 0.2), abs=1e-9)
    cosines = prototypes @ prototypes.T
    torch.testing.assert_close(cosines, (6 * torch.eye(6, dtype=torch.float64) - 1) / 5, rtol=0, atol=1e-12)


@losses
@given(seed=seeds, classes=st.integers(2, 6), per_class=st.integers(1, 4), extra=st.integers(-2, 3))
@prop
def test_nothing_is_below_the_minimum(
    cpu_backend: Backend, name: str, seed: int, classes: int, per_class: int, extra: int
) -> None:
    """Random points and points near the minimiser, in any dimension."""
    dim = max(1, classes + extra)
    target = balanced(classes, per_class)
    temperature = 0.05 + (seed % 97) / 100
    prototypes, noise = randn(classes, dim, seed=seed), randn(len(target), dim, seed=seed + 1)
    for x, w in (
        (noise, prototypes),
        (prototypes[target], prototypes),
        (prototypes[target] + 0.1 * noise, prototypes),
    ):
        value = package_loss(name)(x, w, target, temperature=temperature).item()
        assert value >= minimum(name, classes, per_class, temperature) - 1e-12 / temperature
    if dim >= classes - 1:
        near = simplex(classes, dim)
        value = package_loss(name)(near[target] + 1e-3 * noise, near, target, temperature=temperature).item()
        assert value >= minimum(name, classes, per_class, temperature) - 1e-12 / temperature


@pytest.mark.parametrize(("classes", "dim"), [(4, 3), (4, 6), (3, 2)])
@losses
def test_optimisation_reaches_the_minimum(cpu_backend: Backend, name: str, classes: int, dim: int) -> None:
    """From random starts L-BFGS ends at a neural-collapse configuration: d >= K - 1 is enough."""
    target, temperature = balanced(classes, 3), 0.5
    for seed in range(2):
        x = randn(len(target), dim, seed=seed).requires_grad_()
        w = randn(classes, dim, seed=seed + 100).requires_grad_()
        optimiser = torch.optim.LBFGS(
            [x, w], max_iter=600, tolerance_grad=1e-11, tolerance_change=0, line_search_fn="strong_wolfe"
        )

        def closure(x: Tensor = x, w: Tensor = w, optimiser: torch.optim.Optimizer = optimiser) -> Tensor:
            optimiser.zero_grad()
            value = package_loss(name)(x, w, target, temperature=temperature)
            value.backward()
            return value

        optimiser.step(closure)
        value = package_loss(name)(x, w, target, temperature=temperature).item()
        assert abs(value - minimum(name, classes, 3, temperature)) < 1e-8
        # A gap of 1e-8 in a quadratic well is 1e-4 in position: NC1 and NC3, then NC2.
        s = cosine(x, w).detach()
        ideal = (classes * F.one_hot(target, classes).double() - 1) / (classes - 1)
        torch.testing.assert_close(s, ideal, rtol=0, atol=2e-3)


# --------------------------------------------------------------------------------------------------
# relations between the losses


@given(seed=seeds)
@prop
def test_ntce_denominator_is_nonl_plus_positives(cpu_backend: Backend, seed: int) -> None:
    x, w, y = draw(seed)
    beta = 1 + seed % 30
    everything, pos = nckernels.cosine_lse(x, w, y, float(beta))
    negatives, _ = nckernels.cosine_lse(x, w, y, float(beta), exclude="target")
    positives = torch.zeros(5, dtype=torch.float64).index_add(0, y, pos.exp())
    torch.testing.assert_close(everything.exp(), negatives.exp() + positives, **EXACT)


@given(seed=seeds)
@prop
def test_normface_denominator_is_instance_nonl_plus_positive(cpu_backend: Backend, seed: int) -> None:
    x, w, y = draw(seed)
    everything, pos = nckernels.cosine_lse(x, w, y, 9.0, direction="instance")
    negatives, _ = nckernels.cosine_lse(x, w, y, 9.0, direction="instance", exclude="target")
    torch.testing.assert_close(everything, torch.logaddexp(negatives, pos), **EXACT)
    samples = nckernels.nonl_loss(x, w, y, temperature=1 / 9, direction="instance", reduction="none")
    torch.testing.assert_close(samples, negatives - pos, **EXACT)


@given(seed=seeds)
@prop
def test_bidirectional_nonl_adds_the_two_denominators(cpu_backend: Backend, seed: int) -> None:
    x, w, y = draw(seed)
    each = {
        direction: nckernels.nonl_loss(x, w, y, direction=direction, reduction="none")
        for direction in ("class", "instance", "both")
    }
    torch.testing.assert_close(each["both"], torch.logaddexp(each["class"], each["instance"]), **EXACT)


def lemma_bound(x: Tensor, w: Tensor, y: Tensor, temperature: float, others_only: bool) -> float:
    """[NCD] lemmas A.3 (NTCE) and A.4 (NONL): the losses' bound by the class means of the unit features."""
    classes, beta = len(w), 1 / temperature
    means = torch.stack([F.normalize(x)[y == c].mean(0) for c in range(classes)])
    similarity = F.normalize(w) @ means.T
    terms = beta * similarity + math.log(len(y) / classes)
    if others_only:
        terms = terms.masked_fill(torch.eye(classes, dtype=torch.bool), -math.inf)
    return float(terms.logsumexp(1).mean() - beta * similarity.diagonal().mean())


@pytest.mark.parametrize("name", ["ntce", "nonl"])
@given(seed=seeds, classes=st.integers(2, 6), per_class=st.integers(1, 5))
@prop
def test_lemmas_on_class_means(cpu_backend: Backend, name: str, seed: int, classes: int, per_class: int) -> None:
    y, temperature = balanced(classes, per_class), 0.1 + (seed % 50) / 50
    x, w = randn(len(y), 4, seed=seed), randn(classes, 4, seed=seed + 1)
    value = package_loss(name)(x, w, y, temperature=temperature).item()
    assert value >= lemma_bound(x, w, y, temperature, name == "nonl") - 1e-12 / temperature
    same = w.roll(1, 0)[y] + w[y]  # collapsed onto any direction: equality
    value = package_loss(name)(same, w, y, temperature=temperature).item()
    assert value == pytest.approx(lemma_bound(same, w, y, temperature, name == "nonl"), abs=1e-11)


@pytest.mark.parametrize("per_class", [1, 5])
def test_nonl_still_pulls_where_ntce_and_normface_have_stopped(cpu_backend: Backend, per_class: int) -> None:
    """Separated but not collapsed, small temperature: only the negatives-only loss keeps a gradient.

    Every feature is its prototype turned by phi out of the prototypes' span. The weights of the negatives are
    then uniform in NONL and its gradient is beta / M * K / (K - 1) * sin(phi) towards the prototype.
    """
    classes, temperature, phi = 4, 0.02, 0.3
    w = simplex(classes, 3)
    y = balanced(classes, per_class)
    w = F.pad(w, (0, len(y)))
    x = math.cos(phi) * w[y] + math.sin(phi) * F.pad(torch.eye(len(y), dtype=torch.float64), (3, 0))
    norms = {}
    for name in LOSSES:
        leaf = x.clone().requires_grad_()
        norms[name] = torch.autograd.grad(package_loss(name)(leaf, w, y, temperature=temperature), leaf)[0].norm(dim=1)
    for name in ("ntce", "normface"):
        assert float(norms[name].max()) < 1e-13  # e^-63 is left, and the float64 roundings of logits of 50
    expected = torch.full_like(norms["nonl"], math.sin(phi) / temperature / len(y) * classes / (classes - 1))
    torch.testing.assert_close(norms["nonl"], expected, **EXACT)


# --------------------------------------------------------------------------------------------------
# invariances


Transform = Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]


def rotate(x: Tensor, w: Tensor, y: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    q = rotation(x.shape[1], seed)
    return x @ q, w @ q, y


def rescale(x: Tensor, w: Tensor, y: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    factors = 10 ** randn(len(x) + len(w), 1, seed=seed).clamp(-3, 3)
    return x * factors[: len(x)], w * factors[len(x) :], y


def relabel(x: Tensor, w: Tensor, y: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    order = torch.randperm(len(w), generator=torch.Generator().manual_seed(seed))
    return x, w[order], order.argsort()[y]


@pytest.mark.parametrize("direction", ["class", "instance", "both", None])
@pytest.mark.parametrize("transform", [rotate, rescale, relabel], ids=["rotation", "scale", "relabelling"])
@given(seed=seeds)
@prop
def test_invariances(cpu_backend: Backend, transform: Transform, direction: str | None, seed: int) -> None:
    """Every sample's loss stays what it is; direction None stands for NTCE and NormFace."""
    x, w, y = draw(seed)
    names = ["nonl"] if direction else ["ntce", "normface"]
    options = {"direction": direction} if direction else {}
    for name in names:
        before = package_loss(name)(x, w, y, reduction="none", **options)
        after = package_loss(name)(*transform(x, w, y, seed), reduction="none", **options)
        torch.testing.assert_close(after, before, **EXACT)


@losses
@given(seed=seeds)
@prop
def test_permuting_the_batch_permutes_the_losses(cpu_backend: Backend, name: str, seed: int) -> None:
    x, w, y = draw(seed)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    before = package_loss(name)(x, w, y, reduction="none")
    torch.testing.assert_close(package_loss(name)(x[order], w, y[order], reduction="none"), before[order], **EXACT)


@losses
@given(seed=seeds, copies=st.integers(2, 4))
@prop
def test_copies_of_the_batch(cpu_backend: Backend, name: str, seed: int, copies: int) -> None:
    """Row denominators do not see copies; column denominators are multiplied by their number."""
    x, w, y = draw(seed)
    before = package_loss(name)(x, w, y)
    after = package_loss(name)(x.repeat(copies, 1), w, y.repeat(copies))
    shift = 0.0 if name == "normface" else math.log(copies)
    torch.testing.assert_close(after, before + shift, **EXACT)


@given(seed=seeds)
@prop
def test_copies_in_the_other_nonl_directions(cpu_backend: Backend, seed: int) -> None:
    x, w, y = draw(seed)
    twice = (x.repeat(2, 1), w, y.repeat(2))
    row, column, both, both_twice = (
        nckernels.nonl_loss(*batch, direction=direction, reduction="none")
        for batch, direction in (
            ((x, w, y), "instance"),
            ((x, w, y), "class"),
            ((x, w, y), "both"),
            (twice, "both"),
        )
    )
    torch.testing.assert_close(nckernels.nonl_loss(*twice, direction="instance"), row.mean(), **EXACT)
    torch.testing.assert_close(both, torch.logaddexp(row, column), **EXACT)
    torch.testing.assert_close(both_twice[:24], torch.logaddexp(row, column + math.log(2)), **EXACT)


@losses
@given(seed=seeds)
@prop
def test_gradients_are_tangent(cpu_backend: Backend, name: str, seed: int) -> None:
    """Scale invariance in differential form: every row's gradient is orthogonal to the row."""
    x, w, y = draw(seed)
    x.requires_grad_()
    w.requires_grad_()
    for leaf, grad in zip((x, w), torch.autograd.grad(package_loss(name)(x, w, y), (x, w)), strict=True):
        radial = (leaf * grad).sum(1)
        torch.testing.assert_close(radial, torch.zeros_like(radial), rtol=0, atol=1e-12)


@given(seed=seeds)
@prop
def test_temperature_gradient_of_the_primitive_is_a_mean_similarity(cpu_backend: Backend, seed: int) -> None:
    """d lse / d beta is the softmax mean of S, so beta -> infinity makes lse / beta its largest entry."""
    x, w, y = draw(seed)
    s = cosine(x, w)
    beta = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
    lse, _ = nckernels.cosine_lse(x, w, y, beta)
    (grad,) = torch.autograd.grad(lse.sum(), beta)
    torch.testing.assert_close(grad, ((4 * s).softmax(0) * s).sum(), **EXACT)
    lse, _ = nckernels.cosine_lse(x, w, y, 1000.0)
    assert bool((lse / 1000 >= s.amax(0) - 1e-12).all())
    assert bool((lse / 1000 <= s.amax(0) + math.log(24) / 1000 + 1e-12).all())
