"""[ENC] Definitions II.1, II.2, III.1 and Proposition III.2; [DLP] Table 7; qualities by a K x K matrix."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from .formulas import centring, randn, same

F64 = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("k", "dim"), [(1, 1), (2, 2), (5, 5), (5, 9), (40, 64)])
def test_orthogonal_frame(k: int, dim: int) -> None:
    from nckernels.geometry import orthogonal_frame

    w = orthogonal_frame(k, dim, generator=generator(), dtype=F64)
    assert w.shape == (k, dim)
    same(w @ w.T, torch.eye(k), 1e-12)


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (1.0, 1.0), (2.5, 0.3), (0.7, -0.8), (1.2, 2.0), (3.0, 1.7)])
@pytest.mark.parametrize(("k", "dim"), [(2, 2), (5, 5), (6, 11)])
def test_shifted_simplex_and_its_centring(k: int, dim: int, alpha: float, beta: float) -> None:
    """M = alpha P (I - beta J/K): M^T M = alpha^2 (I + (beta^2 - 2 beta) J/K); centred, alpha^2 (I - J/K)."""
    from nckernels.geometry import shifted_simplex_etf

    w = shifted_simplex_etf(k, dim, alpha, beta, generator=generator(), dtype=F64)
    assert w.shape == (k, dim)
    same(w @ w.T, alpha**2 * (torch.eye(k, dtype=F64) + (beta**2 - 2 * beta) / k), 1e-12)
    centred = w - w.mean(0)
    same(centred @ centred.T, alpha**2 * centring(k), 1e-12)
    directions = centred / centred.norm(dim=1, keepdim=True)
    same(directions @ directions.T, k / (k - 1) * centring(k), 1e-12)
    # The mean is alpha (1 - beta) P 1/K: it vanishes at beta = 1 alone.
    assert w.mean(0).norm().item() == pytest.approx(alpha * abs(1 - beta) / math.sqrt(k), abs=1e-12)


def test_defaults_are_a_simplex_of_rows_shorter_than_one() -> None:
    from nckernels.geometry import shifted_simplex_etf, simplex_etf

    w = shifted_simplex_etf(5, 7, generator=generator(), dtype=F64)
    v = simplex_etf(5, 7, generator=generator(), dtype=F64)
    same(w @ w.T, 0.8 * (v @ v.T), 1e-12)


@pytest.mark.parametrize(("k", "dim"), [(2, 1), (6, 3), (100, 50)])
def test_cross_polytope(k: int, dim: int) -> None:
    """An orthonormal basis and its negative: each row has one opposite and is orthogonal to all others."""
    from nckernels.geometry import cross_polytope

    w = cross_polytope(k, dim, generator=generator(), dtype=F64)
    gram = w @ w.T
    same(gram.abs().sum(1), torch.full((k,), 2.0))
    same(gram.sum(1), torch.zeros(k))
    same(gram.diagonal(), torch.ones(k))


def test_seeds_and_dtypes() -> None:
    from nckernels.geometry import orthogonal_frame, shifted_simplex_etf, uniform_prototypes

    for make in (orthogonal_frame, shifted_simplex_etf):
        assert torch.equal(make(3, 4, generator=generator(1)), make(3, 4, generator=generator(1)))
        assert not torch.allclose(make(3, 4, generator=generator(1)), make(3, 4, generator=generator(2)))
        assert make(3, 4, dtype=F64).dtype == F64
        exact = make(3, 4, generator=generator(1), dtype=F64)
        assert torch.equal(make(3, 4, generator=generator(1), dtype=torch.bfloat16), exact.to(torch.bfloat16))
    torch.manual_seed(0)
    first = uniform_prototypes(9, 3, seed=4)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(uniform_prototypes(9, 3, seed=4), first)
    assert torch.equal(torch.get_rng_state(), state)  # a seed of its own
    assert not torch.allclose(uniform_prototypes(9, 3, seed=5), first)


# --------------------------------------------------------------------------------------------------
# uniform prototypes


def cosines(w: Tensor) -> Tensor:
    """Off-diagonal cosines, (K, K-1)."""
    u = w.double() / w.double().norm(dim=1, keepdim=True)
    k = len(w)
    return (u @ u.T)[~torch.eye(k, dtype=torch.bool)].view(k, k - 1)


def uniformity(w: Tensor, t: float) -> Tensor:
    """log of the mean over pairs of exp(-t |w_i - w_j|^2), unit rows."""
    return (torch.exp(-t * (2 - 2 * cosines(w)))).mean().log()


@pytest.mark.parametrize(
    ("dim", "most", "least"), [(100, -0.0100, -1.0), (99, -0.0100, -1.0), (50, 0.005, -1.0), (10, 0.45, -1.0)]
)
def test_table_7_with_100_prototypes(dim: int, most: float, least: float) -> None:
    from nckernels.geometry import uniform_prototypes

    w = uniform_prototypes(100, dim, dtype=F64)
    assert w.shape == (100, dim)
    same(w.norm(dim=1), torch.ones(100))
    s = cosines(w)
    assert float(s.max()) <= most
    assert float(s.min()) >= least - 1e-9
    if dim == 50:
        assert float(s.min()) <= -0.99
    if dim >= 99:
        same(s, torch.full_like(s, -1 / 99), 1e-12)
    if dim == 10:  # in no closed form: nothing is gained by a step along the sphere
        (grad,) = torch.autograd.grad(uniformity(w.requires_grad_(), 2.0), w)
        assert float(grad.norm()) < 1e-4


def test_heptagon() -> None:
    from nckernels.geometry import uniform_prototypes

    w = uniform_prototypes(7, 2, dtype=F64)
    angles = torch.atan2(w[:, 1], w[:, 0]).sort().values
    gaps = torch.cat([angles[1:] - angles[:-1], angles[:1] + 2 * math.pi - angles[-1:]])
    same(gaps, torch.full((7,), 2 * math.pi / 7), 1e-4)


@pytest.mark.parametrize(("k", "dim", "t"), [(4, 3, 2.0), (9, 3, 2.0), (9, 3, 6.0), (12, 3, 2.0)])
def test_uniform_prototypes_are_a_minimum(k: int, dim: int, t: float) -> None:
    """No step along the sphere lowers the loss, and random points are far above; twelve points form an icosahedron."""
    from nckernels.geometry import uniform_prototypes

    w = uniform_prototypes(k, dim, t, dtype=F64).requires_grad_()
    loss = uniformity(w, t)
    (grad,) = torch.autograd.grad(loss, w)  # tangent: the loss knows directions only
    assert float(grad.norm()) < 1e-4 * t
    assert loss.item() < min(uniformity(randn(k, dim, seed=s), t).item() for s in range(20))
    if k == 12:
        s = cosines(w.detach()).sort(1).values
        want = torch.tensor([-1.0] + 5 * [-1 / math.sqrt(5)] + 5 * [1 / math.sqrt(5)], dtype=F64)
        same(s, want.expand(12, 11), 1e-3)


# --------------------------------------------------------------------------------------------------
# quality


@pytest.mark.parametrize("t", [2.0, 0.5])
@pytest.mark.parametrize(("k", "dim"), [(2, 2), (7, 3), (1300, 12)])
def test_quality_by_the_whole_matrix(k: int, dim: int, t: float) -> None:
    from nckernels.geometry import prototype_quality

    w = randn(k, dim, seed=k)
    s = cosines(w)
    got = prototype_quality(w, t)
    assert got.max_cosine == pytest.approx(float(s.max()), abs=1e-12)
    assert got.min_cosine == pytest.approx(float(s.min()), abs=1e-12)
    assert got.mean_cosine == pytest.approx(float(s.mean()), abs=1e-12)
    assert got.uniformity == pytest.approx(uniformity(w, t).item(), abs=1e-10)
    assert got.separation == pytest.approx(math.degrees(math.acos(float(s.max()))), rel=1e-6)


def test_quality_of_known_sets() -> None:
    from nckernels.geometry import cross_polytope, prototype_quality, simplex_etf

    simplex = prototype_quality(simplex_etf(4, 3, dtype=F64))
    assert (simplex.max_cosine, simplex.min_cosine, simplex.mean_cosine) == pytest.approx((-1 / 3,) * 3)
    assert simplex.separation == pytest.approx(109.4712206)
    assert simplex.uniformity == pytest.approx(-2 * 8 / 3)
    cross = prototype_quality(cross_polytope(8, 4, dtype=F64))
    assert (cross.max_cosine, cross.min_cosine) == pytest.approx((0, -1), abs=1e-12)
    assert cross.mean_cosine == pytest.approx(-1 / 7)
    assert cross.separation == pytest.approx(90)
    assert math.isnan(prototype_quality(torch.randn(1, 4)).max_cosine)
    # Two prototypes in one place have no separation, however short the rows.
    twin = torch.tensor([[1e-20, 2e-20], [3.0, 6.0], [1.0, 0.0]], dtype=F64)
    assert prototype_quality(twin).max_cosine == pytest.approx(1)
    assert prototype_quality(twin).separation == pytest.approx(0, abs=1e-5)


def test_bad_input_is_named() -> None:
    from nckernels.geometry import (
        cross_polytope,
        orthogonal_frame,
        prototype_quality,
        shifted_simplex_etf,
        uniform_prototypes,
    )

    for call, argument in (
        (lambda: orthogonal_frame(5, 4), "dim"),
        (lambda: orthogonal_frame(0, 4), "num_classes"),
        (lambda: cross_polytope(7, 4), "dim"),
        (lambda: shifted_simplex_etf(5, 4, 1.0, 0.5), "dim"),
        (lambda: shifted_simplex_etf(5, 8, math.nan, 0.5), "alpha"),
        (lambda: shifted_simplex_etf(5, 8, 1.0, math.inf), "beta"),
        (lambda: uniform_prototypes(0, 4), "num_classes"),
        (lambda: uniform_prototypes(4, 0), "dim"),
        (lambda: uniform_prototypes(4, 2, t=-1.0), "t"),
        (lambda: prototype_quality(torch.randn(4)), "prototypes"),
        (lambda: prototype_quality(torch.randn(4, 3) * math.nan), "prototypes"),
    ):
        with pytest.raises(ValueError, match=rf"\b{argument}\b"):
            call()
