"""Sizes of scatter, self-duality up to rotation, agreement with the nearest mean, and optima for ReLU features."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nckernels.geometry import simplex_etf
from nckernels.metrics import (
    between_class_rank,
    class_distance_variance,
    class_means,
    covariance_rank,
    effective_rank,
    entropy_difference_ratio,
    instance_alignment,
    intra_class_rank,
    matrix_entropy,
    measures,
    mutual_information_ratio,
    nearest_mean_agreement,
    neural_collapse,
    optimum,
    ranges,
    rotated_self_duality,
    scatter_ratio,
    shares,
    simplex_deviation,
    variability_collapse,
    weight_alignment,
    within_class_scatter,
)

OF_LABELS = (
    variability_collapse,
    between_class_rank,
    scatter_ratio,
    class_distance_variance,
    within_class_scatter,
    intra_class_rank,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def isotropic(means: Tensor, size: float) -> tuple[Tensor, Tensor]:
    """2 d samples of each class, ``size`` away from the mean along each axis: scatter (size^2 / d) I exactly."""
    steps = size * torch.eye(means.shape[1], dtype=means.dtype)
    offsets = torch.cat([steps, -steps])
    return (means.unsqueeze(1) + offsets).flatten(0, 1), torch.arange(len(means)).repeat_interleave(len(offsets))


# Within-class scatter


def test_one_weak_direction_makes_only_nc1_large() -> None:
    """The case of the module's docstring: perfectly separated classes, means that hardly span one direction."""
    k = 10
    simplex = math.sqrt(k / (k - 1)) * (torch.eye(k, dtype=torch.float64) - 1 / k)
    weak = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(k // 2) / math.sqrt(k)
    flat = simplex - torch.outer(weak, weak @ simplex)
    means = flat + 0.008 * torch.outer(weak, weak)  # spread 0.008 along one of nine directions, else 1.05
    x, y = isotropic(means, 0.5)
    assert bool((torch.cdist(x, means).argmin(1) == y).all())
    assert variability_collapse(x, y) > 350
    assert between_class_rank(x, y) == k - 1
    assert scatter_ratio(x, y) < 0.3
    assert class_distance_variance(x, y) < 0.15

    x, y = isotropic(flat, 0.5)  # without that direction nothing is wrong, and the rank says that it is gone
    assert variability_collapse(x, y) < 0.3
    assert between_class_rank(x, y) == k - 2


def test_chance_alone_makes_nc1_grow_with_the_samples() -> None:
    """The true means agree in 14 of 19 directions: each adds n/K or more to nc1, and the other two metrics stay."""
    k, d, rank = 20, 30, 5
    true = torch.cat([normal(k, rank), torch.zeros(k, d - rank, dtype=torch.float64)], 1)
    values = {}
    for n in (100, 400):
        y = torch.arange(k).repeat_interleave(n)
        x = true[y] + 0.05 * normal(k * n, d, seed=n)
        values[n] = variability_collapse(x, y), scatter_ratio(x, y), class_distance_variance(x, y)
        assert values[n][0] > (k - 1 - rank) * n / k
        assert between_class_rank(x, y) == k - 1
    assert values[400][0] > 3 * values[100][0]
    assert values[400][1:] == pytest.approx(values[100][1:], rel=0.1)


@pytest.mark.parametrize(("k", "d"), [(3, 2), (4, 7), (10, 9), (10, 30)])
def test_the_three_sizes_agree_at_a_simplex(k: int, d: int) -> None:
    x, y = isotropic(7 + 3 * simplex_etf(k, d, dtype=torch.float64), 0.1)
    ratio = 0.1**2 / 9
    assert scatter_ratio(x, y) == pytest.approx(ratio, rel=1e-10)
    assert variability_collapse(x, y) == pytest.approx(ratio * (k - 1) ** 2 / (k * d), rel=1e-10)
    assert class_distance_variance(x, y) == pytest.approx(ratio * (k - 1) / (2 * k), rel=1e-10)


def test_sizes_of_classes_of_several_sizes() -> None:
    """S_W weights samples equally, S_B and the pairs weight classes equally; compared with a manual computation."""
    x = torch.tensor([[0.0], [2.0], [11.0], [20.0], [20.0], [26.0]])
    y = torch.tensor([4, 4, 0, 7, 7, 7])  # absent classes are no classes; means 1, 11, 22; variances 1, 0, 8
    between = (1 + 121 + 484) / 3 - (34 / 3) ** 2
    assert scatter_ratio(x, y) == pytest.approx((2 * 1 + 0 + 3 * 8) / 6 / between)
    pairs = (1 + 0) / (2 * 100), (1 + 8) / (2 * 441), (0 + 8) / (2 * 121)
    assert class_distance_variance(x, y) == pytest.approx(sum(pairs) / 3)
    assert variability_collapse(x, y) == pytest.approx((2 * 1 + 0 + 3 * 8) / 6 / between / 3)
    assert between_class_rank(x, y) == 1


def test_distances_of_close_means_are_exact() -> None:
    """Two means 2^-20 apart, all of them 10^4 from the origin: distances by a Gram matrix would lose all digits."""
    steps = torch.tensor([-(2.0**-10), 2.0**-10], dtype=torch.float64)
    x = 2.0**13 + torch.cat([steps, 2.0**-20 + steps, 64 + steps]).unsqueeze(1).repeat(1, 4)
    y = torch.arange(3).repeat_interleave(2)
    distances = 4 * 2.0**-40, 4 * 64.0**2, 4 * (64 - 2.0**-20) ** 2
    assert class_distance_variance(x, y) == pytest.approx(4 * 2.0**-20 * sum(1 / s for s in distances) / 3, rel=1e-12)


def test_means_that_coincide() -> None:
    x = normal(20, 5)
    y = torch.arange(2).repeat_interleave(20)
    same = torch.cat([x, x.flip(0)])
    zero = torch.cat([x[:10], -x[:10].flip(0), x[10:], -x[10:].roll(3, 0)])  # means of rounding errors, not 0
    for features in (same, same.float(), zero, 1e-30 * zero, torch.zeros(40, 5), torch.full((40, 5), 0.3)):
        for size in (variability_collapse, scatter_ratio, class_distance_variance):
            assert math.isnan(size(features, y)), size
        assert between_class_rank(features, y) == 0
        result = neural_collapse(features, y, torch.eye(2, 5), bias=torch.zeros(2))
        assert all(math.isnan(value) for value in (result.nc1, result.cdnv, result.nc3_rotated, result.nc4))

    # Two of three means suffice for the mean over the pairs, and only for that.
    three, labels = torch.cat([same, x + 3]), torch.arange(3).repeat_interleave(20)
    assert math.isnan(class_distance_variance(three, labels))
    assert scatter_ratio(three, labels) < 10
    assert between_class_rank(three, labels) == 1


def test_one_class_and_classes_of_one_sample() -> None:
    x = normal(6, 4)
    for size in (variability_collapse, scatter_ratio, class_distance_variance):
        assert math.isnan(size(x, torch.full((6,), 3)))
        assert size(x, torch.arange(6)) == 0
    assert between_class_rank(x, torch.arange(6)) == 4


def test_rank_counts_what_is_above_rounding() -> None:
    """Five means, each off their plane by less and by more than the rounding error of a mean in float32."""
    means = torch.tensor([[1.0, 1, 0, 0], [1, 1, 0, 0], [-1, 1, 0, 0], [-1, 1, 0, 0], [0, -4, 0, 0]]).double()
    rounding = measures.rounding_noise(torch.float32) * means.square().sum(1).mean().sqrt()
    for off, rank in ((0.9, 2), (1.3, 3)):
        means[:, 2] = off * rounding * torch.tensor([1.0, -1, 1, -1, 0])
        x, y = isotropic(means, 0.0)
        assert between_class_rank(x.float(), y) == rank
        assert between_class_rank(x, y) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_neighbouring_numbers_differ(dtype: torch.dtype) -> None:
    """By twice what counts as rounding."""
    assert covariance_rank(torch.tensor([[1.0], [1.0 + torch.finfo(dtype).eps]], dtype=dtype)) == 1


class Largest(TorchDispatchMode):
    """The number of entries of the largest tensor that is made inside."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.entries = max(self.entries, tensor.numel())
        return result


def test_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    k, d, n = 60, 40, 600
    x, y, w = normal(n, d), torch.arange(n) % k, normal(k, d, seed=1)
    with Largest() as largest:
        class_distance_variance(x, y)
    assert largest.entries <= max(n * d, k * k)
    once = nearest_mean_agreement(x, w, w + 1)
    monkeypatch.setattr(measures, "_CHUNK", 100 * k)
    with Largest() as largest:
        assert nearest_mean_agreement(x, w, w + 1) == once
    assert 0 < once < 1
    assert largest.entries <= n * d < n * k


# Self-duality up to rotation


@pytest.mark.parametrize(("k", "d"), [(3, 3), (4, 10), (10, 4)])
def test_rotated_self_duality(k: int, d: int) -> None:
    """[ENC] Eq. 12, W^T = kappa H Q^T, holds for raw weights and means, and for no other weights."""
    means, turn = 3 + normal(k, d), torch.linalg.qr(normal(k, k, seed=1)).Q
    assert rotated_self_duality(0.37 * turn @ means, means) == pytest.approx(0, abs=1e-12)
    other = normal(k, d, seed=2)
    value = rotated_self_duality(other, means)
    assert value == pytest.approx(rotated_self_duality(means, 5 * turn @ other), abs=1e-12)
    assert 0.05 < value < 2
    # No Q is better than the best one, which attains the value.
    v, b = other / other.norm(), means / means.norm()
    left, _, right = torch.linalg.svd(v @ b.T)
    assert (v - left @ right @ b).square().sum().item() == pytest.approx(value, abs=1e-12)
    for seed in range(20):
        assert (v - torch.linalg.qr(normal(k, k, seed=seed)).Q @ b).square().sum().item() >= value


def test_rotated_self_duality_at_its_ends() -> None:
    frame = torch.eye(6, dtype=torch.float64)
    assert rotated_self_duality(frame[:3], frame[3:]) == 2
    assert rotated_self_duality(frame[:3], frame[[2, 0, 1]]) == pytest.approx(0, abs=1e-15)
    assert min(rotated_self_duality(w, w) for w in (normal(3, 3, seed=seed) for seed in range(9))) == 0  # not below
    assert math.isnan(rotated_self_duality(torch.zeros(3, 6), frame[:3]))
    assert math.isnan(rotated_self_duality(frame[:3], torch.zeros(3, 6)))
    # Prototypes that are attached to the wrong means: NC3 fails, NC3' holds.
    w = simplex_etf(5, 6, dtype=torch.float64)
    y = torch.arange(5).repeat(2)
    result = neural_collapse(w[y], y, w.roll(1, 0))
    assert result.weight_alignment == pytest.approx(2.5)
    assert result.nc3_rotated == pytest.approx(0, abs=1e-12)
    assert result.nc4 == 0


# Nearest mean


def test_agreement_with_the_nearest_mean() -> None:
    means = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 9.0]])
    x = torch.tensor([[1.0, 0], [3, 0], [0, 5], [1, 4], [5, 8]])  # nearest: 0, 1, 2, 0, 2
    # |x - m|^2 = |x|^2 - 2 (x.m - |m|^2 / 2): this linear classifier is the nearest mean.
    bias = -means.square().sum(1) / 2
    assert nearest_mean_agreement(x, means, means, bias) == 1
    assert nearest_mean_agreement(x, means, means) == pytest.approx(3 / 5)  # 1, 1, 2, 2, 2: long means win
    assert nearest_mean_agreement(x, torch.zeros(3, 2), means) == pytest.approx(2 / 5)  # always the first class
    x, means, bias, far = x.double(), means.double(), bias.double(), 1e8
    assert nearest_mean_agreement(x + far, means, means + far, bias - far * means.sum(1)) == 1
    tied = torch.tensor(list(itertools.permutations((0.1, 0.2, 0.3, 0.7))), dtype=torch.float64)
    x = torch.ones(5, 4)  # as far from every mean, up to rounding: the first class, in both decisions
    assert nearest_mean_agreement(x, tied, tied) == 1
    w, bias = torch.tensor([[0.0, 0.05], [1e6 + 0.1, 1e6 + 0.05]], dtype=torch.float64)  # sums that round apart
    assert nearest_mean_agreement(torch.ones(1, 1), w[:, None], torch.tensor([[1.0], [2.0]]), bias) == 1


def test_bias_makes_the_classifier_linear() -> None:
    """Two classes on one ray: the cosine cannot tell them apart, the linear classifier can."""
    y = torch.tensor([0, 0, 1, 1])
    x = torch.tensor([[0.9, 0.01], [1.1, -0.01], [2.9, 0.01], [3.1, -0.01]])
    w, b = torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([2.0, 0.0])  # 2 z > z + 2 for z > 2
    result = neural_collapse(x, y, w, bias=b)
    assert result.nc4 == 1
    assert result.bias_spread == 1
    assert neural_collapse(x, y, w, bias=-b).nc4 == 0.5
    without = neural_collapse(x, y, w)
    assert math.isnan(without.bias_spread)
    differ = {name for name, value in asdict(result).items() if not same(value, asdict(without)[name])}
    assert differ == {"nc4", "bias_spread"}


def test_absent_classes_and_bias() -> None:
    """Prototype and bias of a class without samples change no decision, but its bias counts in the spread."""
    w = simplex_etf(4, 5)
    x, y = w[:3].repeat(2, 1), torch.arange(3).repeat(2)
    b = torch.tensor([0.0, 0.0, 0.0, 100.0])
    result = neural_collapse(x, y, w, bias=b)
    assert result.nc4 == 1
    assert result.bias_spread == pytest.approx(b.double().std(correction=0).item())
    assert neural_collapse(x, y, bias=b).bias_spread == result.bias_spread
    assert math.isnan(neural_collapse(x, y, bias=b).nc4)


# Optima and shares


def same(a: float, b: float, tolerance: float = 0.0) -> bool:
    return (math.isnan(a) and math.isnan(b)) or abs(a - b) <= tolerance


@pytest.mark.parametrize("k", [2, 3, 4, 10, 100])
def test_optimum_of_relu_features(k: int) -> None:
    frame = 3 * torch.linalg.qr(normal(k + 2, k)).Q.T
    y = torch.arange(k).repeat(3)
    found = asdict(neural_collapse(frame[y], y, 0.1 * (frame - frame.mean(0)), bias=torch.ones(k)))
    best = asdict(optimum(k, features="relu"))
    for name, value in found.items():
        assert same(value, best[name], 1e-10), (name, value, best[name])
    assert best["weight_alignment"] == best["instance_alignment"] == 2 - 2 * math.sqrt((k - 1) / k)
    assert best["offset"] == 1 / math.sqrt(k)
    signed = asdict(optimum(k))
    differ = {name for name in best if not same(best[name], signed[name], 1e-12)}
    assert differ - {"mir", "hdr"} == {"weight_alignment", "instance_alignment", "offset"}


def test_relu_optimum_is_where_the_paper_arrives() -> None:
    """[NCD] Table 3, NONL: HDR and MIR on CIFAR-10 and on CIFAR-100."""
    ten, hundred = optimum(10, features="relu"), optimum(100, features="relu")
    assert (round(ten.hdr, 2), round(ten.mir, 2), round(ten.weight_alignment, 2)) == (0.05, 0.95, 0.10)
    assert (round(hundred.hdr, 2), round(hundred.mir, 2), round(hundred.weight_alignment, 2)) == (0.30, 1.00, 0.01)
    two = optimum(2, features="relu")
    assert two.hdr == 1
    assert math.isnan(two.mir)
    with pytest.raises(ValueError, match="features: expected 'signed' or 'relu', got 'gelu'"):
        optimum(10, features="gelu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_classes: expected an integer >= 2, got 1"):
        optimum(1, features="relu")


def test_shares_of_the_way_to_the_optimum() -> None:
    best = optimum(10)
    assert set(shares(best, 10, 64).values()) == {1.0}
    result = replace(best, inter_erank=7.2, intra_erank=16.0, weight_alignment=3.0, mir=math.nan, mir_centred=1.0)
    got = shares(result, 10, 64)
    assert got["inter_erank"] == pytest.approx(0.8)
    assert got["intra_erank"] == pytest.approx(0.75)
    assert got["weight_alignment"] == 0  # beyond the range
    assert math.isnan(got["mir"])
    assert got["mir_centred"] == pytest.approx(best.mir)
    assert "nc1" not in got
    relu = optimum(10, features="relu")
    assert set(shares(relu, 10, 64, features="relu").values()) == {1.0}
    assert shares(relu, 10, 64)["offset"] == pytest.approx(1 - 1 / math.sqrt(10))


# Bad input


@pytest.mark.parametrize("measure", OF_LABELS)
def test_errors_name_the_argument(measure: Callable[[Tensor, Tensor], float]) -> None:
    x, y = normal(6, 4), torch.arange(6) % 2
    with pytest.raises(ValueError, match=r"target: expected 6 integer labels, got torch.float32"):
        measure(x, y.float())
    with pytest.raises(ValueError, match=r"target: expected 6 integer labels, got torch.int64 of shape \(5,\)"):
        measure(x, y[:5])
    with pytest.raises(ValueError, match="features must be finite"):
        measure(x / 0, y)
    with pytest.raises(ValueError, match="features: expected a floating-point tensor"):
        measure(x[:0], y[:0])


def test_matrices_of_the_wrong_shape_are_errors() -> None:
    x, y, w = normal(6, 4), torch.arange(6) % 3, normal(3, 4)
    with pytest.raises(ValueError, match=r"means: expected shape \(3, 4\), got \(2, 4\)"):
        rotated_self_duality(w, w[:2])
    with pytest.raises(ValueError, match=r"means: expected shape \(3, 4\), got \(3, 3\)"):
        weight_alignment(w, w[:, :3])
    with pytest.raises(ValueError, match=r"means: expected shape \(3, 4\), got \(3, 3\)"):
        nearest_mean_agreement(x, w, w[:, :3])
    with pytest.raises(ValueError, match=r"prototypes: expected shape \(3, 4\), got \(3, 3\)"):
        nearest_mean_agreement(x, w[:, :3], w)
    with pytest.raises(ValueError, match=r"bias: expected shape \(3,\), got \(1,\)"):
        nearest_mean_agreement(x, w, w, torch.zeros(1))
    with pytest.raises(ValueError, match=r"target: expected labels in \[0, 2\), got 0 to 2"):
        instance_alignment(x, w[:2], y)


def test_bias_is_checked() -> None:
    x, y, w = normal(6, 4), torch.arange(6) % 3, normal(3, 4)
    for bad in (torch.zeros(2), torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"bias: expected a floating-point tensor \(3,\), got"):
            neural_collapse(x, y, w, bias=bad)
    with pytest.raises(ValueError, match="bias must be finite"):
        neural_collapse(x, y, w, bias=torch.tensor([0, 0, math.inf]))
    with pytest.raises(ValueError, match=r"target: expected labels in \[0, 2\)"):
        neural_collapse(x, y, bias=torch.zeros(2))


def test_zero_prototypes() -> None:
    x, y = normal(9, 4), torch.arange(9) % 3
    result = neural_collapse(x, y, torch.zeros(3, 4))
    assert (result.weights_erank, result.hdr, result.hdr_centred) == (0, 1, 1)
    assert (result.weight_alignment, result.instance_alignment) == pytest.approx((1, 1))
    assert all(math.isnan(value) for value in (result.mir, result.mir_centred, result.nc3_rotated))
    assert 0 <= result.nc4 <= 1


# What comes in


def test_labels_of_every_integer_dtype() -> None:
    """As an index PyTorch treats uint8 as a mask, and rejects int16."""
    x, y, w = normal(12, 4), torch.arange(12) % 3, normal(3, 4, seed=1)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        assert instance_alignment(x, w, y.to(dtype)) == instance_alignment(x, w, y)
        assert torch.equal(class_means(x, y.to(dtype), 3)[0], class_means(x, y, 3)[0])


@pytest.mark.parametrize("scale", [1e-300, 1e-165, 1e200])
def test_very_long_and_very_short_rows(scale: float) -> None:
    """The squares of such rows overflow or underflow float64; they once gave unit vectors of length 1e108 or 0."""
    x, y, w = normal(12, 4), torch.arange(12) % 3, normal(3, 4, seed=1)
    result, expected = asdict(neural_collapse(scale * x, y, scale * w)), asdict(neural_collapse(x, y, w))
    assert result == pytest.approx(expected, rel=1e-9, nan_ok=True)
    short = 1e-13 * simplex_etf(10, 20, dtype=torch.float64)
    assert simplex_deviation(short).cosines_max < 1e-12


def test_coinciding_means_are_not_a_simplex() -> None:
    """Cosines of 0 are only 1 / (K - 1) away from those of a simplex."""
    for means in (torch.ones(1000, 5), torch.zeros(3, 2), 0.3 + 1e-9 * normal(50, 4).float()):
        deviation = simplex_deviation(means)
        assert all(map(math.isnan, deviation[:3]))


def test_rounding_errors_of_means_do_not_grow_with_the_samples() -> None:
    """Two classes of the same 200,000 float64 rows in opposite order: means of plain sums differ by 50 eps and more."""
    rows = F.normalize(normal(200_000, 2) + 3)
    features = torch.cat([rows, rows.flip(0)])
    means, _ = class_means(features, torch.arange(2).repeat_interleave(len(rows)), 2)
    assert (means[0] - means[1]).abs().max() <= torch.finfo(torch.float64).eps


def test_distances_in_blocks_of_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """No matrix of all pairs of classes without prototypes, and the same values."""
    k, d = 60, 5
    x, y = normal(3 * k, d), torch.arange(3 * k) % k
    once = asdict(neural_collapse(x, y))
    monkeypatch.setattr(measures, "_CHUNK", 7 * k)
    with Largest() as largest:
        assert asdict(neural_collapse(x, y)) == pytest.approx(once, rel=1e-12, nan_ok=True)
    assert largest.entries <= 3 * k * d < k * k


def test_bad_input_is_named() -> None:
    x, y, w = normal(12, 4), torch.arange(12) % 3, normal(3, 4)
    nan, gram = torch.full_like(w, math.nan), w @ w.T
    bad: list[tuple[str, Callable[[], object]]] = [
        ("matrix must be finite", lambda: effective_rank(nan)),
        ("points: expected a floating-point matrix", lambda: covariance_rank(y.view(3, 4))),
        ("points must be finite", lambda: covariance_rank(nan)),
        (r"gram: expected shape \(3, 3\)", lambda: matrix_entropy(w)),
        (r"gram_m: expected shape \(3, 3\)", lambda: mutual_information_ratio(gram, gram[:2, :2])),
        (r"gram_m: expected shape \(3, 3\)", lambda: entropy_difference_ratio(gram, gram[:2, :2])),
        ("means must be finite", lambda: rotated_self_duality(w, nan)),
        ("means must be finite", lambda: nearest_mean_agreement(x, w, nan)),
        ("prototypes: .* at least one row", lambda: nearest_mean_agreement(x, w[:0], w[:0])),
        ("means: expected a floating-point matrix", lambda: simplex_deviation(w[0])),
        ("means must be finite", lambda: weight_alignment(w, nan)),
        (r"prototypes: expected shape \(3, 4\)", lambda: instance_alignment(x, w[:, :1], y)),
        (r"target: expected labels in \[0, 2\)", lambda: class_means(x, y, 2)),
        ("num_classes: expected an integer >= 1, got 3.0", lambda: neural_collapse(x, y, num_classes=3.0)),  # type: ignore[arg-type]
        ("prototypes: .* got torch.int64", lambda: neural_collapse(x, y, w.long())),
        ("features: .* d >= 1", lambda: neural_collapse(x[:, :0], y)),
        ("target: .* got a list of 12", lambda: neural_collapse(x, y.tolist())),  # type: ignore[arg-type]
        ("dim: expected an integer >= 1, got 0", lambda: ranges(3, 0)),
    ]
    for message, call in bad:
        with pytest.raises(ValueError, match=message):
            call()
