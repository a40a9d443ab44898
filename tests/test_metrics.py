"""Neural-collapse metrics: optima, invariances and literal reimplementations."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nckernels.geometry import simplex_etf
from nckernels.metrics import (
    NeuralCollapse,
    class_means,
    convergence_iteration,
    covariance_rank,
    effective_rank,
    entropy_difference_ratio,
    first_reach,
    instance_alignment,
    intra_class_rank,
    matrix_entropy,
    mutual_information_ratio,
    neural_collapse,
    optimum,
    ranges,
    simplex_deviation,
    variability_collapse,
    weight_alignment,
    within_class_scatter,
)

# Metrics that subtract the direction of the global mean, which is rounding noise at a centred simplex.
PUBLISHED_CENTRING = {"mir", "hdr"}


def close(got: NeuralCollapse, want: NeuralCollapse, atol: float = 1e-9, skip: Collection[str] = ()) -> None:
    for name, value in asdict(want).items():
        if name not in skip:
            assert getattr(got, name) == pytest.approx(value, abs=atol, rel=1e-9, nan_ok=True), name


def random_problem(
    seed: int, num_classes: int, dim: int, samples: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Clustered features, labels in which every class occurs, and prototypes near the clusters."""
    g = torch.Generator().manual_seed(seed)
    prototypes = torch.randn(num_classes, dim, generator=g, dtype=dtype)
    extra = torch.randint(num_classes, (samples - num_classes,), generator=g)
    target = torch.cat([torch.arange(num_classes), extra])
    features = prototypes[target] + 0.7 * torch.randn(samples, dim, generator=g, dtype=dtype)
    return features, target, prototypes


# The definitions of papers and code, written out as slowly as possible.


def slow_erank(matrix: Tensor) -> float:
    s = torch.linalg.svdvals(matrix).tolist()
    p = [x / sum(s) for x in s]
    return math.exp(-sum(x * math.log(x) for x in p if x > 0))


def slow_entropy(gram: Tensor) -> float:
    eigenvalues = torch.linalg.eigvalsh(gram / len(gram)).tolist()
    return -sum(x * math.log(x) for x in eigenvalues if x > 0)


def slow_metrics(features: Tensor, target: Tensor, prototypes: Tensor) -> NeuralCollapse:
    u = torch.stack([x / x.norm() for x in features.double()])
    w = torch.stack([x / x.norm() for x in prototypes.double()])
    k, n = len(w), len(u)
    classes = [u[target == c] for c in range(k)]
    means = torch.stack([rows.mean(0) for rows in classes])
    global_mean, centre = u.mean(0), means.mean(0)

    intra = [slow_erank(torch.cov(rows.T)) for rows in classes if len(rows) > 1]

    def gram(vectors: list[Tensor]) -> Tensor:
        unit = torch.stack([v / v.norm() for v in vectors])
        return unit @ unit.T

    g_w = w @ w.T
    published = gram([m / m.norm() - global_mean / global_mean.norm() for m in means])
    centred = gram([m - centre for m in means])

    def mir(g_m: Tensor) -> float:
        h_w, h_m = slow_entropy(g_w), slow_entropy(g_m)
        return (h_w + h_m - slow_entropy(g_w * g_m)) / min(h_w, h_m)

    def hdr(g_m: Tensor) -> float:
        h_w, h_m = slow_entropy(g_w), slow_entropy(g_m)
        return abs(h_w - h_m) / max(h_w, h_m)

    s_w = sum(torch.outer(x - means[y], x - means[y]) for x, y in zip(u, target.tolist(), strict=True)) / n
    s_b = sum(torch.outer(m - centre, m - centre) for m in means) / k
    norms = torch.stack([(m - centre).norm() for m in means])
    pairs = [(a, b) for a in range(k) for b in range(a)]
    errors = torch.stack([centred[a, b] + 1 / (k - 1) for a, b in pairs])
    spread = [sum((x - m).norm() ** 2 for x in rows) / len(rows) for rows, m in zip(classes, means, strict=True)]
    v, b = w / w.norm(), (means - centre) / (means - centre).norm()
    left, _, right = torch.linalg.svd(b @ v.T)  # Procrustes: the orthogonal Q with the largest tr(V B^T Q)
    nearest = [min(range(k), key=lambda c: (x - means[c]).norm().item()) for x in u]
    decided = [max(range(k), key=lambda c: (x @ w[c]).item()) for x in u]
    return NeuralCollapse(
        intra_erank=sum(intra) / len(intra),
        inter_erank=slow_erank(torch.cov((means - global_mean).T)),
        weights_erank=slow_erank(torch.cov(w.T)),
        weight_alignment=sum(
            ((w[c] - means[c] / means[c].norm()).norm() ** 2).item() for c in range(k)
        ) / k,
        instance_alignment=sum(
            ((u[i] - w[target[i]]).norm() ** 2).item() for i in range(n)
        ) / n,
        mir=mir(published),
        hdr=hdr(published),
        nc1=torch.trace(s_w @ torch.linalg.pinv(s_b, hermitian=True, rtol=1e-10)).item() / k,
        within_scatter=sum(((u[i] - means[target[i]]).norm() ** 2).item() for i in range(n)) / n,
        nc2_norms=(norms.std(correction=0) / norms.mean()).item(),
        nc2_cosines=(errors**2).mean().sqrt().item(),
        nc2_cosines_max=errors.abs().max().item(),
        offset=(centre.norm() / (means.norm(dim=1) ** 2).mean().sqrt()).item(),
        mir_centred=mir(centred),
        hdr_centred=hdr(centred),
        nc1_rank=min(k - 1, u.shape[1]),
        scatter_ratio=(torch.trace(s_w) / torch.trace(s_b)).item(),
        cdnv=sum(
            (spread[a] + spread[c]).item() / (2 * (means[a] - means[c]).norm().item() ** 2) for a, c in pairs
        ) / len(pairs),
        nc3_rotated=((v.T - b.T @ (left @ right)).norm() ** 2).item(),
        nc4=sum(a == c for a, c in zip(nearest, decided, strict=True)) / n,
        bias_spread=math.nan,
    )  # fmt: skip


@pytest.mark.parametrize(("num_classes", "dim"), [(3, 4), (5, 20), (7, 3)])
@pytest.mark.parametrize("seed", [0, 1])
def test_against_literal_definitions(seed: int, num_classes: int, dim: int) -> None:
    features, target, prototypes = random_problem(seed, num_classes, dim, 60)
    close(neural_collapse(features, target, prototypes), slow_metrics(features, target, prototypes))


@pytest.mark.parametrize(("num_classes", "dim"), [(3, 2), (10, 9), (10, 64), (50, 60)])
@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_exact_simplex_is_the_optimum(num_classes: int, dim: int, scale: float) -> None:
    w = simplex_etf(num_classes, dim, dtype=torch.float64)
    target = torch.arange(num_classes).repeat(6)
    result = neural_collapse(scale * w[target], target, w, bias=torch.full((num_classes,), 2.0))
    close(result, optimum(num_classes), atol=1e-10, skip=PUBLISHED_CENTRING)
    # In float64 the noise in the global mean is below the eps of the normalisation and mostly vanishes.
    assert result.mir == pytest.approx(optimum(num_classes).mir, abs=1e-5)
    assert result.hdr == pytest.approx(0, abs=1e-5)


def test_published_centring_is_noise_at_a_float32_simplex() -> None:
    w = simplex_etf(10, 64, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
    target = torch.arange(10).repeat(20)
    result = neural_collapse(w[target], target, w)
    assert result.hdr > 0.05
    assert result.hdr_centred < 1e-6
    assert result.mir_centred == pytest.approx(optimum(10).mir, abs=1e-6)


def test_mir_of_a_simplex() -> None:
    # 1/(K-1) + ((K-2)/(K-1)) ln(K-2)/ln(K-1): far from 1 for few classes, towards 1 for many.
    assert optimum(3).mir == pytest.approx(0.5)
    assert optimum(10).mir == pytest.approx(1 / 9 + 8 / 9 * math.log(8) / math.log(9))
    assert optimum(1000).mir > 0.999
    w = simplex_etf(10, 12, dtype=torch.float64)
    assert mutual_information_ratio(w @ w.T, w @ w.T) == pytest.approx(optimum(10).mir, abs=1e-12)
    assert entropy_difference_ratio(w @ w.T, w @ w.T) == 0


def test_orthogonal_frame_looks_collapsed_to_the_ranks() -> None:
    # The optimum of non-negative features: only offset and the alignment see that the simplex is off-centre.
    k = 10
    frame = torch.eye(k, 16, dtype=torch.float64)
    target = torch.arange(k).repeat(4)
    w = frame - frame.mean(0)
    result = neural_collapse(frame[target], target, w)
    assert result.inter_erank == pytest.approx(k - 1, abs=1e-10)
    assert result.nc2_cosines_max == pytest.approx(0, abs=1e-12)
    assert result.offset == pytest.approx(1 / math.sqrt(k))
    assert result.weight_alignment == pytest.approx(2 - 2 * math.sqrt((k - 1) / k))
    assert result.hdr == pytest.approx(0.05, abs=0.005)  # [NCD] Table 3, CIFAR-10


def test_rank_is_flat_where_the_deviations_are_not() -> None:
    g = torch.Generator().manual_seed(0)
    w = simplex_etf(10, 64, dtype=torch.float64, generator=g)
    means = w + 0.2 / 8 * torch.randn(10, 64, dtype=torch.float64, generator=g)
    assert covariance_rank(means) > 0.99 * 9
    assert simplex_deviation(means).cosines_max > 0.05


def test_intra_class_rank_ignores_the_size_of_the_scatter() -> None:
    features, target, _ = random_problem(0, 4, 8, 200)
    means = class_means(features, target, 4)[0][target]
    shrunk = means + 1e-4 * (features - means)
    assert intra_class_rank(shrunk, target) == pytest.approx(intra_class_rank(features, target))
    for size in (within_class_scatter, variability_collapse):
        assert size(shrunk, target) == pytest.approx(1e-8 * size(features, target))


problems = st.builds(random_problem, st.integers(0, 2**16), st.integers(3, 6), st.integers(2, 12), st.integers(20, 60))


@settings(max_examples=25, deadline=None)
@given(problems, st.integers(0, 2**16))
def test_invariances(problem: tuple[Tensor, Tensor, Tensor], seed: int) -> None:
    features, target, prototypes = problem
    g = torch.Generator().manual_seed(seed)
    k, d = prototypes.shape
    base = neural_collapse(features, target, prototypes)

    rotation = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64))[0]
    close(neural_collapse(features @ rotation, target, prototypes @ rotation), base, atol=1e-8)

    order = torch.randperm(len(target), generator=g)
    close(neural_collapse(features[order], target[order], prototypes), base, atol=1e-8)

    relabel = torch.randperm(k, generator=g)
    moved = torch.empty_like(prototypes)
    moved[relabel] = prototypes
    close(neural_collapse(features, relabel[target], moved), base, atol=1e-8)

    scale = 10 ** (4 * torch.rand(len(target), 1, generator=g, dtype=torch.float64) - 2)
    class_scale = 10 ** (4 * torch.rand(k, 1, generator=g, dtype=torch.float64) - 2)
    close(neural_collapse(scale * features, target, class_scale * prototypes), base, atol=1e-8)


@settings(max_examples=25, deadline=None)
@given(problems)
def test_ranges_hold(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    features, target, prototypes = problem
    k, d = prototypes.shape
    result = neural_collapse(features, target, prototypes)
    assert 0 <= result.intra_erank <= d
    assert 1 <= result.inter_erank <= k - 1 + 1e-9
    assert 0 <= result.weight_alignment <= 4
    assert 0 <= result.within_scatter <= 1
    assert 0 <= result.hdr <= 1
    assert 0 <= result.offset <= 1 + 1e-9
    assert result.nc1 >= 0
    assert 0 <= result.nc3_rotated <= 2
    assert 0 <= result.nc4 <= 1
    assert set(ranges(k, d)) == set(asdict(result)) - {"nc1", "scatter_ratio", "cdnv", "bias_spread"}


def test_absent_classes_are_left_out() -> None:
    features, target, prototypes = random_problem(0, 4, 8, 50)
    present = torch.tensor([0, 2, 3, 6])
    many = torch.randn(7, 8, dtype=torch.float64)
    many[present] = prototypes
    close(
        neural_collapse(features, present[target], many),
        neural_collapse(features, target, prototypes),
        skip={"weights_erank"},
    )


def test_classes_of_one_sample() -> None:
    features, target, _ = random_problem(0, 3, 8, 50)
    extra = neural_collapse(
        torch.cat([features, torch.randn(1, 8, dtype=torch.float64)]), torch.cat([target, torch.tensor([3])])
    )
    assert extra.intra_erank == pytest.approx(neural_collapse(features, target).intra_erank)
    alone = neural_collapse(torch.randn(4, 8), torch.arange(4))
    assert math.isnan(alone.intra_erank)
    assert alone.nc1 == pytest.approx(0, abs=1e-20)
    assert alone.within_scatter == pytest.approx(0, abs=1e-20)


def test_one_class() -> None:
    result = neural_collapse(torch.randn(6, 8), torch.zeros(6, dtype=torch.long), torch.randn(1, 8))
    undefined = {name for name, value in asdict(result).items() if math.isnan(value)}
    defined = {"intra_erank", "weight_alignment", "instance_alignment", "within_scatter", "nc1_rank"}
    assert result.nc1_rank == 0
    assert undefined == set(asdict(result)) - defined


def test_two_classes() -> None:
    w = simplex_etf(2, 4, dtype=torch.float64)
    target = torch.arange(2).repeat(3)
    close(neural_collapse(w[target], target, w, bias=torch.zeros(2)), optimum(2), atol=1e-10)


def test_means_that_coincide_are_no_collapse() -> None:
    features = torch.randn(50, 8)
    mirrored = neural_collapse(torch.cat([features, features]), torch.arange(2).repeat_interleave(50))
    assert math.isnan(mirrored.nc1)
    assert mirrored.inter_erank == 0
    constant = neural_collapse(torch.ones(8, 5), torch.arange(2).repeat(4))
    assert math.isnan(constant.nc1)
    assert constant.within_scatter == pytest.approx(0, abs=1e-20)


def test_zero_features_and_prototypes_stay_finite() -> None:
    result = neural_collapse(torch.zeros(8, 5), torch.arange(4).repeat(2), torch.zeros(4, 5))
    assert (result.intra_erank, result.inter_erank, result.weights_erank) == (0, 0, 0)
    assert (result.weight_alignment, result.instance_alignment) == (0, 0)
    assert effective_rank(torch.zeros(3, 4)) == 0


def test_rank_deficient_scatter_of_means() -> None:
    # Five means in a plane of eight dimensions: the scatter off the plane does not count, that in it does.
    g = torch.Generator().manual_seed(0)
    plane = torch.randn(5, 2, generator=g, dtype=torch.float64)
    target = torch.arange(5).repeat_interleave(40)
    noise = torch.randn(200, 8, generator=g, dtype=torch.float64)
    noise -= class_means(noise, target, 5)[0][target]
    in_plane = noise.clone()
    in_plane[:, 2:] = 0
    means = torch.cat([plane, torch.zeros(5, 6, dtype=torch.float64)], 1)
    nc1 = variability_collapse(means[target] + noise, target)
    assert nc1 == pytest.approx(variability_collapse(means[target] + in_plane, target), rel=1e-9)
    assert nc1 > 0.1


def test_effective_rank() -> None:
    assert effective_rank(torch.eye(5)) == pytest.approx(5)
    assert effective_rank(torch.outer(torch.arange(4.0), torch.ones(3))) == pytest.approx(1, abs=1e-5)
    matrix = torch.randn(7, 4, dtype=torch.float64)
    assert effective_rank(matrix) == pytest.approx(slow_erank(matrix))


@pytest.mark.parametrize(("n", "d"), [(5, 30), (30, 5), (12, 12)])
def test_covariance_rank_on_either_side(n: int, d: int) -> None:
    points = 3 + torch.randn(n, d, dtype=torch.float64)
    assert covariance_rank(points) == pytest.approx(slow_erank(torch.cov(points.T)), rel=1e-9)


def test_small_functions_normalise_what_they_say() -> None:
    features, target, prototypes = random_problem(0, 4, 8, 50)
    means, counts = class_means(features, target, 5)
    assert counts.tolist() == [*torch.bincount(target).tolist(), 0]
    assert means[4].abs().max() == 0
    assert weight_alignment(prototypes, 3 * prototypes) == pytest.approx(0, abs=1e-20)
    assert weight_alignment(prototypes, -prototypes) == pytest.approx(4)
    assert instance_alignment(2 * prototypes[target], prototypes, target) == pytest.approx(0, abs=1e-20)
    assert matrix_entropy(torch.eye(6)) == pytest.approx(math.log(6))
    assert matrix_entropy(torch.ones(6, 6)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_measured_in_float64(dtype: torch.dtype) -> None:
    features, target, prototypes = random_problem(0, 4, 8, 50)
    low = neural_collapse(features.to(dtype), target.to(torch.int32), prototypes.to(dtype))
    exact = neural_collapse(features.to(dtype).double(), target, prototypes.to(dtype).double())
    close(low, exact)
    collapsed = neural_collapse(prototypes.to(dtype)[target], target)
    assert collapsed.intra_erank == 0


def test_gradients_are_not_tracked() -> None:
    features, target, prototypes = random_problem(0, 4, 8, 50)
    close(
        neural_collapse(features.requires_grad_(), target, prototypes.requires_grad_()),
        neural_collapse(features.detach(), target, prototypes.detach()),
        atol=0,
    )


def test_errors_name_the_argument() -> None:
    features, target, prototypes = random_problem(0, 4, 8, 50)
    with pytest.raises(ValueError, match=r"features: .*\(50, 2, 4\)"):
        neural_collapse(features.view(50, 2, 4), target)
    with pytest.raises(ValueError, match="features: expected a floating-point"):
        neural_collapse(features.long(), target)
    with pytest.raises(ValueError, match=r"features: .*N >= 1"):
        neural_collapse(features[:0], target[:0])
    with pytest.raises(ValueError, match="features must be finite"):
        neural_collapse(features * float("inf"), target)
    with pytest.raises(ValueError, match="target: expected 50 integer"):
        neural_collapse(features, target[:-1])
    with pytest.raises(ValueError, match="target: expected 50 integer"):
        neural_collapse(features, target > 1)
    with pytest.raises(ValueError, match=r"target: expected labels in \[0, 3\), got 0 to 3"):
        neural_collapse(features, target, prototypes[:3])
    with pytest.raises(ValueError, match=r"target: .*got -1"):
        neural_collapse(features, target - 1)
    with pytest.raises(ValueError, match=r"prototypes: expected shape \(num_classes, 8\)"):
        neural_collapse(features, target, prototypes[:, :7])
    with pytest.raises(ValueError, match="prototypes must be finite"):
        neural_collapse(features, target, prototypes / 0)
    with pytest.raises(ValueError, match="num_classes: expected 4"):
        neural_collapse(features, target, prototypes, num_classes=5)
    with pytest.raises(ValueError, match="num_classes"):
        optimum(1)


def test_convergence_iteration() -> None:
    steps = [0, 10, 20, 30, 40]
    assert convergence_iteration(steps, [9, 5, 1, 0.5, 0.2], 0, 1, smoothing=0) == 20
    assert convergence_iteration(steps, [0, 5, 1, 3, 0.2], 0, 1, smoothing=0) == 40  # left it once
    assert convergence_iteration(steps, [9, 5, 1, 0.5, 2], 0, 1, smoothing=0) is None
    assert convergence_iteration(steps, [8, 8.6, 8.8, 9.1, 9], 9, 0.3, smoothing=0) == 20
    # Smoothed by half: 9, 7, 4, 2.25, 1.225
    assert convergence_iteration(steps, [9, 5, 1, 0.5, 0.2], 0, 2.5) == 30
    nan = float("nan")
    assert convergence_iteration(steps, [nan, 0, nan, 0, 0], 0, 1, smoothing=0) == 30
    assert convergence_iteration(steps, [nan, 5, 1, 1, 1], 0, 3) == 20
    assert convergence_iteration([], [], 0, 1) is None


def test_first_reach() -> None:
    steps = [0, 10, 20, 30]
    assert first_reach(steps, [0.9, 0.5, 0.2, 0.1], 0.5, 0, smoothing=0) == 10
    assert first_reach(steps, [3, 5, 8.2, 8.9], 8, 9, smoothing=0) == 20
    assert first_reach(steps, [3, 5, 8.2, 8.9], 8.95, 9, smoothing=0) is None
    assert first_reach(steps, [0.1, 0.1, 0.1, 0.1], 0.5, 0) == 0


def test_convergence_errors() -> None:
    with pytest.raises(ValueError, match=r"values: expected one per step \(2\), got 1"):
        convergence_iteration([0, 1], [1.0], 0, 1)
    with pytest.raises(ValueError, match="smoothing"):
        convergence_iteration([0], [1.0], 0, 1, smoothing=1)
    with pytest.raises(ValueError, match="tolerance"):
        convergence_iteration([0], [1.0], 0, -1)


def test_metrics_do_not_depend_on_lengths() -> None:
    """However short: directions are all that counts."""
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(40, 6, generator=g).double(), torch.randn(4, 6, generator=g).double()
    y = torch.arange(40) % 4
    expected = asdict(neural_collapse(x, y, w))
    for scale in (1e-14, 1e-150, 1e100):
        for name, value in asdict(neural_collapse(x * scale, y, w * scale)).items():
            assert value == pytest.approx(expected[name], rel=1e-9, nan_ok=True), (name, scale)


def test_parallel_float32_prototypes_have_no_rank() -> None:
    g = torch.Generator().manual_seed(0)
    w = (torch.rand(5, 1, generator=g) + 0.5) * torch.randn(16, generator=g)
    x, y = torch.randn(40, 16, generator=g), torch.arange(40) % 5
    for features in (x, x.double()):  # whose dtype says nothing about the prototypes
        assert neural_collapse(features, y, w).weights_erank == 0.0
