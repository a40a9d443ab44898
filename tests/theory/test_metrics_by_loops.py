"""Metrics of neural collapse against loops over samples, classes and pairs in plain Python."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nckernels.metrics import neural_collapse, optimum, ranges

from .formulas import by_class, centring, difference, dot, mean, orthogonal, pairs, randn, rows, simplex_rows, unit

NEW = ("nc1_rank", "scatter_ratio", "cdnv", "nc3_rotated", "nc4", "bias_spread")
prop = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 2**31)


def problem(
    seed: int, k: int = 5, dim: int = 6, samples: int = 40, absent: tuple[int, ...] = (), single: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features around prototypes, labels without the absent classes and with one sample of ``single``, and a bias."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(k, dim, generator=g, dtype=torch.float64)
    there = torch.tensor([c for c in range(k) if c not in absent])
    y = torch.cat([there, there[torch.randint(len(there), (samples - len(there),), generator=g)]])
    if single is not None:
        y[len(there) :][y[len(there) :] == single] = there[0] if there[0] != single else there[1]
    x = w[y] + 0.9 * torch.randn(samples, dim, generator=g, dtype=torch.float64)
    return x, y, w, 0.3 * torch.randn(k, generator=g, dtype=torch.float64)


# --------------------------------------------------------------------------------------------------
# the definitions


def scatter(vectors: list[list[float]], y: Tensor) -> dict[int, float]:
    """v_c = mean over the class of |x_i - m_c|^2."""
    out = {}
    for label, members in by_class(vectors, y).items():
        m = mean(members)
        out[label] = math.fsum(math.dist(v, m) ** 2 for v in members) / len(members)
    return out


def scatter_ratio(vectors: list[list[float]], y: Tensor) -> float:
    """tr(S_W) / tr(S_B), S_W over the samples, S_B over the classes."""
    classes = by_class(vectors, y)
    means = {label: mean(members) for label, members in classes.items()}
    centre = mean(list(means.values()))
    within = math.fsum(math.dist(v, means[c]) ** 2 for v, c in zip(vectors, y.tolist(), strict=True)) / len(vectors)
    return within / (math.fsum(math.dist(m, centre) ** 2 for m in means.values()) / len(means))


def cdnv(vectors: list[list[float]], y: Tensor) -> float:
    """Galanti et al. 2022: mean over the pairs of classes of (v_c + v_c') / (2 |m_c - m_c'|^2)."""
    means = [mean(members) for members in by_class(vectors, y).values()]
    spread = list(scatter(vectors, y).values())
    values = [(spread[a] + spread[b]) / (2 * math.dist(means[a], means[b]) ** 2) for a, b in pairs(len(means))]
    return math.fsum(values) / len(values)


def nc3_rotated(v: Tensor, b: Tensor) -> float:
    """min over orthogonal Q of |V^T/|V| - B^T Q/|B||^2, at the polar factor of B V^T."""
    v, b = v / v.norm(), b / b.norm()
    left, _, right = torch.linalg.svd(b @ v.T)
    return float((v.T - b.T @ (left @ right)).square().sum())


def literal(x: Tensor, y: Tensor, w: Tensor, bias: Tensor | None) -> dict[str, float]:
    u = [unit(row) for row in rows(x)]
    classes = by_class(u, y)
    labels = list(classes)
    means = {c: mean(members) for c, members in classes.items()}
    centre = mean(list(means.values()))
    v = {c: unit(rows(w)[c]) for c in labels}
    raw_means = {c: mean(members) for c, members in by_class(rows(x), y).items()}
    agree = 0
    for direction, row in zip(u, rows(x), strict=True):
        if bias is None:
            decision = max(labels, key=lambda c: dot(direction, v[c]))
            nearest = min(labels, key=lambda c: math.dist(direction, means[c]))
        else:
            decision = max(labels, key=lambda c: dot(row, rows(w)[c]) + bias[c].item())
            nearest = min(labels, key=lambda c: math.dist(row, raw_means[c]))
        agree += decision == nearest
    spread = math.nan
    if bias is not None:
        values = bias.tolist()
        middle = math.fsum(values) / len(values)
        spread = math.sqrt(math.fsum((b - middle) ** 2 for b in values) / len(values))
    return {
        "scatter_ratio": scatter_ratio(u, y),
        "cdnv": cdnv(u, y),
        "nc3_rotated": nc3_rotated(
            torch.tensor([v[c] for c in labels], dtype=torch.float64),
            torch.tensor([difference(means[c], centre) for c in labels], dtype=torch.float64),
        ),
        "nc4": agree / len(u),
        "bias_spread": spread,
        "nc1_rank": float(min(len(labels) - 1, x.shape[1])),
    }


def compare(got: Any, want: dict[str, float], rel: float = 1e-10) -> None:
    for name, value in want.items():
        assert getattr(got, name) == pytest.approx(value, rel=rel, abs=1e-12, nan_ok=True), name


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("k", "dim"), [(2, 3), (5, 6), (7, 3)])
@pytest.mark.parametrize("seed", [0, 1])
def test_fields_equal_their_definitions(seed: int, k: int, dim: int, with_bias: bool) -> None:
    x, y, w, bias = problem(seed, k, dim)
    b = bias if with_bias else None
    compare(neural_collapse(x, y, w, bias=b), literal(x, y, w, b))


@pytest.mark.parametrize("with_bias", [False, True])
def test_absent_classes_and_single_samples(with_bias: bool) -> None:
    """Absent classes are left out, also as predictions; a class of one sample has no scatter but counts as a class."""
    x, y, w, bias = problem(3, k=6, absent=(1, 4), single=2)
    assert (y == 2).sum() == 1
    b = torch.full_like(bias, 0.25) if with_bias else None  # its spread is 0 over whatever classes
    compare(neural_collapse(x, y, w, bias=b), literal(x, y, w, b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_measured_in_float64(dtype: torch.dtype) -> None:
    x, y, w, bias = problem(4)
    x, w, bias = (t.to(dtype) for t in (x, w, bias))
    compare(neural_collapse(x, y, w, bias=bias), literal(x, y, w, bias))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_measures_under_a_large_offset(dtype: torch.dtype) -> None:
    """Features a unit apart, 10^4 from the origin: the precision is that of the features, not of their squares.

    The definitions here are taken after subtracting the offset, which is exact for these numbers.
    """
    from nckernels.metrics import class_distance_variance
    from nckernels.metrics import scatter_ratio as package_ratio

    x, y, _, _ = problem(5)
    x = (x * 512).round() / 512  # float32 holds 10^4 + x exactly
    far = (x + 1e4).to(dtype)
    assert package_ratio(far, y) == pytest.approx(scatter_ratio(rows(x), y), rel=1e-10)
    assert class_distance_variance(far, y) == pytest.approx(cdnv(rows(x), y), rel=1e-10)


def test_rotated_self_duality_of_matrices_as_given() -> None:
    """No centring and no unit rows: W^T = kappa Hbar Q^T of [ENC] Eq. 12 is 0 for raw weights and uncentred means."""
    from nckernels.metrics import rotated_self_duality

    means = randn(5, 7, seed=0) + 3
    q = orthogonal(5, seed=1)
    assert float(rotated_self_duality(2.5 * q @ means, means)) == pytest.approx(0, abs=1e-12)
    # Columns are the classes of W: mixing features instead is no self-duality.
    assert float(rotated_self_duality(means @ orthogonal(7, seed=2), means)) > 1e-3
    for seed in range(3):
        v, b = randn(4, 6, seed=seed), randn(4, 6, seed=seed + 9)
        assert float(rotated_self_duality(v, b)) == pytest.approx(nc3_rotated(v, b), rel=1e-12)
    # Rows in orthogonal spaces share nothing: the largest value.
    v, b = torch.eye(6)[:3], torch.eye(6)[3:]
    assert float(rotated_self_duality(v, b)) == pytest.approx(2, abs=1e-12)


@given(seed=seeds)
@prop
def test_invariances_of_the_new_fields(seed: int) -> None:
    """A rotation of the space, a factor for every row and a permutation of the classes change nothing.

    With a bias the classifier is linear: a common factor of the features, and one of weights and bias, then.
    """
    x, y, w, bias = problem(seed)
    g = torch.Generator().manual_seed(seed)
    q, order = orthogonal(x.shape[1], seed), torch.randperm(len(w), generator=g)
    factors = 10 ** randn(len(x) + len(w), 1, seed=seed).clamp(-2, 2)
    base = {name: getattr(neural_collapse(x, y, w), name) for name in NEW}
    for moved in (
        neural_collapse(x @ q, y, w @ q),
        neural_collapse(x * factors[: len(x)], y, w * factors[len(x) :]),
        neural_collapse(x, order.argsort()[y], w[order]),
    ):
        compare(moved, base, rel=1e-8)
    base = {name: getattr(neural_collapse(x, y, w, bias=bias), name) for name in NEW}
    for moved in (
        neural_collapse(x @ q, y, w @ q, bias=bias),
        neural_collapse(8 * x, y, w / 8, bias=bias),
        neural_collapse(x, order.argsort()[y], w[order], bias=bias[order]),
    ):
        compare(moved, base, rel=1e-8)


@given(seed=seeds)
@prop
def test_rotated_encoding_of_a_collapsed_model(seed: int) -> None:
    """[ENC] Prop. IV.3: prototypes Q V of a rotated encoding differ from the means, but only by a rotation."""
    k, dim = 5, 8
    means = simplex_rows(k, dim, seed)
    turn = orthogonal(k, seed)
    w, y = F.normalize(turn @ means), torch.arange(k).repeat(3)
    # Turned rows have other lengths; only with equal lengths is it the metric of unit prototypes that vanishes.
    signs = torch.diag(torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0], dtype=torch.float64))
    permuted = (signs @ means)[torch.randperm(k, generator=torch.Generator().manual_seed(seed))]
    result = neural_collapse(means[y], y, permuted)
    assert result.nc3_rotated == pytest.approx(0, abs=1e-10)
    assert result.weight_alignment > 0.5
    assert neural_collapse(means[y], y, w).nc3_rotated == pytest.approx(nc3_rotated(w, means), rel=1e-8, abs=1e-10)


# --------------------------------------------------------------------------------------------------
# optima


def collapsed(k: int, dim: int, features: str) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.arange(k).repeat(3)
    if features == "signed":
        w = simplex_rows(k, dim)
        return w[y], y, w
    frame = torch.eye(k, dim, dtype=torch.float64) @ orthogonal(dim, seed=1)
    return frame[y], y, centring(k) @ frame


@pytest.mark.parametrize("features", ["signed", "relu"])
@pytest.mark.parametrize(("k", "dim"), [(3, 3), (4, 6), (10, 12), (50, 50)])
def test_optimum_field_by_field(k: int, dim: int, features: str) -> None:
    """The collapsed configuration with equal biases, measured."""
    x, y, w = collapsed(k, dim, features)
    best = optimum(k, features=features)
    result = neural_collapse(x, y, w, bias=torch.full((k,), 0.2, dtype=torch.float64))
    for name, value in dataclasses.asdict(best).items():
        loose = features == "signed" and name in ("mir", "hdr")  # the direction of a global mean of zero
        assert getattr(result, name) == pytest.approx(value, abs=1e-5 if loose else 1e-9), name
    assert best.nc4 == 1.0
    assert best.nc3_rotated == pytest.approx(0, abs=1e-12)
    if features == "relu":
        assert best.weight_alignment == pytest.approx(2 - 2 * math.sqrt((k - 1) / k), rel=1e-12)
        assert best.offset == pytest.approx(1 / math.sqrt(k), rel=1e-12)
        assert best.hdr > 0
    else:
        assert best.mir == pytest.approx(1 / (k - 1) + (k - 2) / (k - 1) * math.log(k - 2) / math.log(k - 1), rel=1e-12)


def test_relu_optimum_agrees_with_table_3() -> None:
    """[NCD] Table 3 prints the non-negative optimum: alignment 0.11 and 0.01, MIR 0.95 and 1.00, HDR 0.05 and 0.30."""
    for k, alignment, mir, hdr in ((10, 0.11, 0.95, 0.05), (100, 0.01, 1.00, 0.30)):
        best = optimum(k, features="relu")
        assert best.weight_alignment == pytest.approx(alignment, abs=0.0075)
        assert best.mir == pytest.approx(mir, abs=0.0075)
        assert best.hdr == pytest.approx(hdr, abs=0.0075)


def test_table_3_contradicts_itself_for_scl_with_probing() -> None:
    """[NCD] Table 3, CIFAR-10: |u - w| >= |m - w| - |m - u| in the mean square, m the directions of the class means.

    Weight alignment, 0.99, is |m - w|^2, and the row without probing has |m - u|^2 = 0.10 for the same features.
    """
    assert (math.sqrt(0.99) - math.sqrt(0.10)) ** 2 == pytest.approx(0.46, abs=0.005)  # the table: 0.10
    y = torch.arange(4).repeat(25)
    u = F.normalize(randn(4, 6, seed=0)[y] + 0.2 * randn(100, 6, seed=1))
    means = torch.stack([u[y == c].mean(0) for c in range(4)])
    for w in (randn(4, 6, seed=2), -means, means):
        with_w, with_means = neural_collapse(u, y, w), neural_collapse(u, y, means)
        bound = math.sqrt(with_w.weight_alignment) - math.sqrt(with_means.instance_alignment)
        assert math.sqrt(with_w.instance_alignment) >= bound - 1e-12


@pytest.mark.parametrize("features", ["signed", "relu"])
def test_shares_are_distances_to_the_optimum_in_ranges(features: str) -> None:
    from nckernels.metrics import shares

    x, y, w, bias = problem(6, k=4)
    result = neural_collapse(x, y, -w, bias=bias)  # opposite ones are further from the optimum than a range
    best, size = optimum(4, features=features), ranges(4, x.shape[1])
    got = shares(result, 4, x.shape[1], features=features)
    assert got.keys() == size.keys()
    for name, share in got.items():
        value = 1 - abs(getattr(result, name) - getattr(best, name)) / size[name]
        assert share == pytest.approx(min(max(value, 0.0), 1.0), abs=1e-12), name
    perfect = shares(neural_collapse(*collapsed(4, 6, features)), 4, 6, features=features)
    assert all(math.isnan(value) or value == pytest.approx(1, abs=1e-4) for value in perfect.values())


# --------------------------------------------------------------------------------------------------
# when the pseudo-inverse form misleads, and bad input


def test_robust_metrics_stay_small_where_nc1_is_large() -> None:
    """Means that hardly differ in one direction: nc1 grows like 1/e^2, scatter_ratio and cdnv do not."""
    from nckernels.metrics import class_distance_variance, variability_collapse
    from nckernels.metrics import scatter_ratio as package_ratio

    y = torch.arange(3).repeat_interleave(50)
    noise = randn(150, 2, seed=0)
    noise -= torch.stack([noise[y == c].mean(0) for c in range(3)])[y]
    flat, round_ = (torch.tensor([[1.0, 0], [-1, 0], [0, e]], dtype=torch.float64)[y] + 0.1 * noise for e in (1e-3, 1))
    assert variability_collapse(flat, y) > 1e5 * variability_collapse(round_, y)
    for measure in (package_ratio, class_distance_variance):
        assert measure(flat, y) < 2 * measure(round_, y)


def test_degenerate_but_valid_input() -> None:
    x, y, w, _ = problem(7)
    single = neural_collapse(x[:4], torch.zeros(4, dtype=torch.long), w[:1])
    for name in ("scatter_ratio", "cdnv", "nc1_rank", "nc3_rotated"):
        value = getattr(single, name)
        assert math.isnan(value) or (name == "nc1_rank" and value == 0), name
    zero = neural_collapse(torch.zeros(8, 3), torch.arange(4).repeat(2), torch.zeros(4, 3))
    for name in ("scatter_ratio", "cdnv", "nc3_rotated"):
        assert math.isnan(getattr(zero, name)), name
    alone = neural_collapse(x[:5], torch.arange(5), w)
    assert alone.scatter_ratio == pytest.approx(0, abs=1e-20)
    assert alone.cdnv == pytest.approx(0, abs=1e-20)
    without = neural_collapse(x, y)
    for name in ("nc3_rotated", "nc4", "bias_spread"):
        assert math.isnan(getattr(without, name)), name
    assert not math.isnan(without.scatter_ratio + without.cdnv + without.nc1_rank)
    assert math.isnan(neural_collapse(x, y, w).bias_spread)
    # Two classes with one mean, of scatter > 0: infinitely bad or undefined, never a number.
    twice = neural_collapse(torch.cat([x, x]), torch.arange(2).repeat_interleave(len(x)))
    assert not math.isfinite(twice.cdnv)
    assert not math.isfinite(twice.scatter_ratio)


@pytest.mark.parametrize("seed", range(3))
def test_mir_of_coinciding_means_is_bounded(seed: int) -> None:
    """The same feature for all classes, as after dead units: MIR is at most 1, H(A * B) >= max(H(A), H(B))."""
    x, w = randn(1, 5, seed=seed).expand(30, 5), randn(6, 5, seed=seed + 1)
    result = neural_collapse(x, torch.arange(30) % 6, w)
    for name in ("mir", "mir_centred"):
        assert not getattr(result, name) > 1 + 1e-9, name


def test_nc4_where_every_class_is_its_own_mean() -> None:
    """Samples at their means agree with simplex prototypes, and none with the opposite ones."""
    w, y = simplex_rows(4, 5), torch.arange(4).repeat(2)
    assert neural_collapse(w[y], y, w).nc4 == 1.0
    assert neural_collapse(w[y], y, -w).nc4 == 0.0
    # A linear classifier with a bias that lets class 0 win everywhere agrees on class 0 only.
    assert neural_collapse(w[y], y, w, bias=torch.tensor([9.0, 0, 0, 0]).double()).nc4 == 0.25


BAD: dict[str, tuple[str, Callable[[Tensor, Tensor, Tensor, Tensor], object]]] = {
    "NaN features": ("features", lambda x, y, w, b: neural_collapse(x * math.nan, y, w)),
    "float labels": ("target", lambda x, y, w, b: neural_collapse(x, y.double(), w)),
    "bool labels": ("target", lambda x, y, w, b: neural_collapse(x, y > 1, w)),
    "label K": ("target", lambda x, y, w, b: neural_collapse(x, y, w[:-1])),
    "NaN prototypes": ("prototypes", lambda x, y, w, b: neural_collapse(x, y, w * math.nan)),
    "prototypes of another d": ("prototypes", lambda x, y, w, b: neural_collapse(x, y, w[:, 1:])),
    "prototypes of another K": ("num_classes", lambda x, y, w, b: neural_collapse(x, y, w, num_classes=9)),
    "bias of another K": ("bias", lambda x, y, w, b: neural_collapse(x, y, w, bias=b[1:])),
    "bias as a column": ("bias", lambda x, y, w, b: neural_collapse(x, y, w, bias=b[:, None])),
    "NaN bias": ("bias", lambda x, y, w, b: neural_collapse(x, y, w, bias=b * math.nan)),
    "optimum of one class": ("num_classes", lambda x, y, w, b: optimum(1)),
    "optimum of what": ("features", lambda x, y, w, b: optimum(4, features="positive")),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    argument, call = BAD[name]
    with pytest.raises(ValueError, match=rf"\b{argument}\b"):
        call(*problem(8))


def test_matrices_of_the_wrong_shape_are_named() -> None:
    from nckernels.metrics import rotated_self_duality

    with pytest.raises(ValueError, match=r"prototypes|means"):
        rotated_self_duality(randn(4, 3, seed=0), randn(5, 3, seed=0))
