"""[NCD] Theorems A.1 and 4.2: the least values of the losses, signed and non-negative, and Eq. 13 of its appendix."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import nckernels

from .formulas import centring, dot, log_sum_exp, mean, orthogonal, randn, rows, simplex_rows, unit

prop = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 2**31)
WITH_PROTOTYPES = ("normface", "ntce", "nonl")
LOSSES = (*WITH_PROTOTYPES, "supcon", "prototype")


def value(name: str, x: Tensor, w: Tensor, y: Tensor, temperature: float) -> Tensor:
    if name in WITH_PROTOTYPES:
        return getattr(nckernels, f"{name}_loss")(x, w, y, temperature=temperature)
    return getattr(nckernels, f"{name}_loss")(x, y, temperature=temperature)


def least(name: str, k: int, n: int, temperature: float, features: str) -> float:
    """With a the gap of the cosines over the temperature, between a sample's own class and another one.

    A simplex on both sides: 1 + 1/(K-1). An orthonormal frame of features against a simplex of prototypes:
    sqrt((K-1)/K) + 1/sqrt(K(K-1)) = sqrt(K/(K-1)); against itself: 1.
    """
    gap = k / (k - 1)
    if features == "relu":
        gap = math.sqrt(k / (k - 1)) if name in WITH_PROTOTYPES else 1.0
    e = math.exp(-gap / temperature)
    return {
        "normface": math.log(1 + (k - 1) * e),
        "ntce": math.log(n + n * (k - 1) * e),
        "nonl": math.log(n * (k - 1)) - gap / temperature,
        "supcon": math.log(n - 1 + n * (k - 1) * e),
        "prototype": math.log(n - 1 + n * (k - 1) * e),
    }[name]


def collapsed(k: int, dim: int, features: str) -> tuple[Tensor, Tensor]:
    """Class directions and prototypes of the least value: a simplex, or a frame in the positive orthant."""
    if features == "signed":
        return simplex_rows(k, dim, seed=k), simplex_rows(k, dim, seed=k)
    frame = torch.eye(k, dim, dtype=torch.float64)
    return frame, F.pad(centring(k), (0, dim - k))


SIZES = [(k, dim) for k in (3, 4, 10) for dim in (k - 1, k, k + 2)]


@pytest.mark.parametrize("features", ["signed", "relu"])
@pytest.mark.parametrize("name", LOSSES)
def test_minimum_at_the_optimum(name: str, features: str) -> None:
    """The simplex, and in the positive orthant the frame, which needs K dimensions, have the least value."""
    for (k, dim), (n, temperature) in itertools.product(SIZES, [(2, 0.05), (5, 1.0)]):
        if features == "signed" or dim >= k:
            means, w = collapsed(k, dim, features)
            y = torch.arange(k).repeat(n)
            want = least(name, k, n, temperature, features)
            assert value(name, means[y], w, y, temperature).item() == pytest.approx(want, abs=1e-12 / temperature)


@pytest.mark.parametrize("features", ["signed", "relu"])
@pytest.mark.parametrize("name", LOSSES)
def test_minimum_equals_the_literal_form(name: str, features: str) -> None:
    from nckernels.ufm import minimum

    for k, n, temperature in itertools.product((2, 3, 4, 10, 1000), (2, 5), (0.002, 0.05, 1.0)):
        want = least(name, k, n, temperature, features)
        assert minimum(name, k, n, temperature, features=features) == pytest.approx(want, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("name", LOSSES)
@given(seed=seeds, k=st.integers(2, 6), n=st.integers(2, 4), extra=st.integers(-1, 3), size=st.floats(0, 3))
@prop
def test_nothing_non_negative_is_below_the_relu_minimum(
    name: str, seed: int, k: int, n: int, extra: int, size: float
) -> None:
    """Random features in the positive orthant, and features near its optimum, with optimised prototypes.

    The best prototype of NONL at a small temperature points along m_c minus the other means.
    """
    dim, temperature, y = k + extra, 0.05 + (seed % 97) / 50, torch.arange(k).repeat(n)
    x = randn(len(y), dim, seed=seed).relu() + 1e-3
    if dim >= k:
        x = torch.eye(k, dim, dtype=torch.float64)[y] + size * x
    u = F.normalize(x)
    means = torch.stack([u[y == c].mean(0) for c in range(k)])
    for w in (randn(k, dim, seed=seed + 1), means - means.mean(0) + 1e-9):
        assert value(name, x, w, y, temperature).item() >= least(name, k, n, temperature, "relu") - 1e-11 / temperature


@pytest.mark.parametrize("name", LOSSES)
def test_descent_in_the_positive_orthant_ends_at_the_relu_minimum(name: str) -> None:
    """The minimum is attained: squares of free numbers as features, L-BFGS from a random start."""
    k, n, temperature = 4, 2, 0.5
    y = torch.arange(k).repeat(n)
    roots, w = randn(k * n, k, seed=5).requires_grad_(), randn(k, k, seed=7).requires_grad_()
    optimiser = torch.optim.LBFGS([roots, w], max_iter=250, tolerance_change=0, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = value(name, roots.square(), w, y, temperature) + (0 * w).sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    assert closure().item() == pytest.approx(least(name, k, n, temperature, "relu"), abs=1e-7)


@pytest.mark.parametrize("name", ["supcon", "prototype"])
@given(seed=seeds, k=st.integers(2, 4), temperature=st.floats(0.2, 2.0), spread=st.floats(0, 2))
@prop
def test_lower_bound_of_scl_and_of_the_prototype_loss(
    name: str, seed: int, k: int, temperature: float, spread: float
) -> None:
    """[NCD] Eq. 13, sample by sample and for unequal classes: both are at least l*_i, with equality at collapse.

    l*_i subtracts e^{1/tau} from sum_c n_c e^{a_i . mu_c / tau}, which may leave nothing: the bound then says nothing,
    which the paper does not mention.
    """
    y = torch.cat([torch.arange(k).repeat(2), torch.randint(k, (4,), generator=torch.Generator().manual_seed(seed))])
    x = randn(k, 3, seed=seed)[y] + spread * randn(len(y), 3, seed=seed + 1)
    a = [unit(row) for row in rows(x)]
    means = [mean([v for v, label in zip(a, y.tolist(), strict=True) if label == c]) for c in range(k)]
    counts = torch.bincount(y).tolist()
    got = getattr(nckernels, f"{name}_loss")(x, y, temperature=temperature, reduction="none").tolist()
    for sample, (v, label) in enumerate(zip(a, y.tolist(), strict=True)):
        logits = [dot(v, m) / temperature for m in means]
        rest = math.fsum(n * math.exp(t) for n, t in zip(counts, logits, strict=True)) - math.exp(1 / temperature)
        if rest > 0:
            bound = math.log(rest) - logits[label]
            room = 1e-12 * (1 + math.exp(1 / temperature) / rest)
            assert got[sample] >= bound - room
            if spread == 0:
                assert got[sample] == pytest.approx(bound, abs=room)


@pytest.mark.parametrize("name", ["ntce", "nonl"])
def test_lemmas_are_tight_with_constant_logits_only(name: str) -> None:
    """Lemmas A.3 and A.4, "if and only if": scatter orthogonal to the prototypes is free, scatter along them is not.

    Features m_c + s_i e with s_i = +-1 and e orthogonal to all prototypes, and then e along the first prototype.
    """
    k, temperature, y = 3, 0.5, torch.arange(3).repeat(4)
    w = F.pad(simplex_rows(k, 2), (0, 1))
    sign = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64).repeat_interleave(3)[:, None]
    turned = orthogonal(3, seed=0)

    def gap(angle: float, axis: Tensor) -> float:
        across = axis - (w @ axis)[:, None] * w  # tangent at each class's direction
        across = F.normalize(across)[y]
        x = math.cos(angle) * w[y] + math.sin(angle) * sign * across
        u, v = rows(x @ turned), rows(w @ turned)
        means = [mean([r for r, label in zip(u, y.tolist(), strict=True) if label == c]) for c in range(k)]
        bound = 0.0
        for c in range(k):
            others = [dot(v[c], m) / temperature + math.log(4) for b, m in enumerate(means) if name == "ntce" or b != c]
            bound += (log_sum_exp(others) - dot(v[c], means[c]) / temperature) / k
        return value(name, x @ turned, w @ turned, y, temperature).item() - bound

    assert gap(0.4, torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)) == pytest.approx(0, abs=1e-12)
    assert gap(0.4, torch.tensor([0.6, 0.8, 0.0], dtype=torch.float64)) > 1e-2
