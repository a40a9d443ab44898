"""Theory of the losses without prototypes as tests: minima ([NCD] section 4), bounds, invariances, relations."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import Backend
from contrastive_cases import LABELS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import balanced, cosine, rotation, simplex
from oracle_contrastive import NAIVE, dots, package
from torch import Tensor

import nckernels

# The backend fixture is the same for every example of a property.
prop = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
seeds = st.integers(0, 2**31)
# Float64: a dozen roundings of logits up to 100.
EXACT = {"rtol": 1e-11, "atol": 1e-11}
labelled = pytest.mark.parametrize("name", ["supcon", "prototype"])


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def minimum(classes: int, per_class: int, temperature: float) -> float:
    """log(n - 1 + n (K - 1) e^-a) with a = K / ((K - 1) tau): SCL and the prototype loss at the collapsed simplex."""
    a = classes / ((classes - 1) * temperature)
    return math.log(per_class - 1 + per_class * (classes - 1) * math.exp(-a))


# --------------------------------------------------------------------------------------------------
# minima


@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("per_class", [2, 7])
@pytest.mark.parametrize(("classes", "dim"), [(2, 1), (4, 3), (10, 32)])
@labelled
def test_minimum_and_stationary_at_the_collapsed_simplex(
    cpu_backend: Backend, name: str, classes: int, dim: int, per_class: int, temperature: float
) -> None:
    """[NCD] Theorem 4.2: SCL and the prototype loss have the value of the bound there, and no gradient."""
    generator = torch.Generator().manual_seed(classes)
    means = nckernels.geometry.simplex_etf(classes, dim, dtype=torch.float64, generator=generator)
    y = balanced(classes, per_class)
    x = means[y].requires_grad_()
    value = package(name)(x, y, temperature=temperature)
    assert value.item() == pytest.approx(minimum(classes, per_class, temperature), rel=0, abs=1e-9)
    (grad,) = torch.autograd.grad(value, x)
    assert float(grad.abs().max()) < 1e-12 / temperature  # stationary, to float64 roundings


@pytest.mark.parametrize("name", ["supcon", "prototype"])
def test_a_collapsed_orthogonal_frame_is_no_minimum(cpu_backend: Backend, name: str) -> None:
    """Collapsed within classes, but the means no simplex: above the bound by what cosines of 0 cost."""
    y = balanced(4, 5)
    value = package(name)(torch.eye(4, dtype=torch.float64)[y], y, temperature=0.5).item()
    assert value == pytest.approx(math.log(4 + 15 * math.exp(-2.0)), abs=1e-12)
    assert value > minimum(4, 5, 0.5) + 0.1


@labelled
@given(seed=seeds, classes=st.integers(2, 6), per_class=st.integers(2, 4), extra=st.integers(-2, 3))
@prop
def test_nothing_is_below_the_minimum(
    cpu_backend: Backend, name: str, seed: int, classes: int, per_class: int, extra: int
) -> None:
    """Random balanced points, clustered points and points near the minimiser, in any dimension."""
    dim = max(1, classes + extra)
    y, temperature = balanced(classes, per_class), 0.05 + (seed % 97) / 100
    means, noise = randn(classes, dim, seed=seed), randn(len(y), dim, seed=seed + 1)
    batches = [noise, means[y] + 0.1 * noise, means[y]]
    if dim >= classes - 1:
        batches.append(simplex(classes, dim)[y] + 1e-3 * noise)
    for x in batches:
        value = package(name)(x, y, temperature=temperature).item()
        assert value >= minimum(classes, per_class, temperature) - 1e-12 / temperature


@given(seed=seeds, classes=st.integers(2, 6))
@prop
def test_prototype_loss_of_single_samples_is_bounded_too(cpu_backend: Backend, seed: int, classes: int) -> None:
    """n = 1: every mean is its sample, and the bound is log(K - 1) - a; SCL has no positives there."""
    y, x = torch.arange(classes), randn(classes, 5, seed=seed)
    bound = math.log(classes - 1) - classes / (classes - 1) / 0.3
    assert package("prototype")(x, y, temperature=0.3).item() >= bound - 1e-11
    value = package("prototype")(simplex(classes, 5), y, temperature=0.3).item()
    assert value == pytest.approx(bound, abs=1e-10)
    assert package("supcon")(x, y, temperature=0.3).item() == 0.0


@given(seed=seeds, temperature=st.floats(0.02, 2.0))
@prop
def test_scl_is_at_least_the_prototype_loss(cpu_backend: Backend, seed: int, temperature: float) -> None:
    """Sample by sample, balanced or not: by Jensen, sums over samples exceed those over class means."""
    y = torch.cat([torch.arange(4).repeat(2), torch.randint(4, (12,), generator=torch.Generator().manual_seed(seed))])
    x = randn(20, 3, seed=seed)
    scl = package("supcon")(x, y, temperature=temperature, reduction="none")
    means = package("prototype")(x, y, temperature=temperature, reduction="none")
    assert bool((scl >= means - 1e-12 / temperature).all())
    collapsed = randn(4, 3, seed=seed)[y]  # equality, whatever the means are
    torch.testing.assert_close(
        package("supcon")(collapsed, y, temperature=temperature, reduction="none"),
        package("prototype")(collapsed, y, temperature=temperature, reduction="none"),
        rtol=0,
        atol=1e-12 / temperature + 1e-12,
    )


@labelled
def test_optimisation_collapses_to_the_simplex(cpu_backend: Backend, name: str) -> None:
    """[NCD] Theorem 4.2 from a random start: L-BFGS ends at the bound, with the cosines of a collapsed simplex."""
    y, temperature = balanced(4, 3), 0.5
    x = randn(12, 3, seed=0).requires_grad_()
    optimiser = torch.optim.LBFGS(
        [x], max_iter=300, tolerance_grad=1e-11, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = package(name)(x, y, temperature=temperature)
        value.backward()
        return value

    optimiser.step(closure)
    assert abs(package(name)(x, y, temperature=temperature).item() - minimum(4, 3, temperature)) < 1e-8
    # A gap of 1e-8 in a quadratic well is 1e-4 in position.
    ideal = (4 * (y[:, None] == y).double() - 1) / 3
    torch.testing.assert_close(cosine(x, x).detach(), ideal, rtol=0, atol=2e-3)


# --------------------------------------------------------------------------------------------------
# closed forms


@pytest.mark.parametrize("t", [0.5, 2.0, 7.0])
@pytest.mark.parametrize("per_class", [1, 3])
@pytest.mark.parametrize("classes", [2, 5, 9])
def test_uniformity_of_the_simplex(cpu_backend: Backend, classes: int, per_class: int, t: float) -> None:
    """All squared distances between classes are 2 K / (K - 1), within a class 0."""
    y = balanced(classes, per_class)
    between = per_class * (classes - 1) * math.exp(-t * 2 * classes / (classes - 1))
    expected = math.log((per_class - 1 + between) / (len(y) - 1))
    assert package("uniformity")(simplex(classes, 10)[y], t=t).item() == pytest.approx(expected, abs=1e-12)


@given(seed=seeds, n=st.integers(2, 12), t=st.floats(0.1, 10.0))
@prop
def test_uniformity_bounds(cpu_backend: Backend, seed: int, n: int, t: float) -> None:
    """Between the simplex (the least for n <= d + 1 points, Jensen) and a single point, which has 0."""
    x = randn(n, 4, seed=seed)
    value = package("uniformity")(x, t=t).item()
    assert -2 * t * n / (n - 1) - 1e-12 * (1 + t) <= value <= 1e-12 * (1 + t)
    assert package("uniformity")(x[:1].expand(n, 4), t=t).item() == pytest.approx(0.0, abs=1e-12 * (1 + t))


@given(seed=seeds, t=st.floats(0.1, 10.0))
@prop
def test_uniformity_is_wang_and_isola_s_code(cpu_backend: Backend, seed: int, t: float) -> None:
    """torch.pdist(x).pow(2).mul(-t).exp().mean().log() on unit rows, as their repository has it."""
    x = randn(15, 4, seed=seed)
    expected = torch.pdist(F.normalize(x)).pow(2).mul(-t).exp().mean().log()
    torch.testing.assert_close(package("uniformity")(x, t=t), expected, **EXACT)


@given(seed=seeds, alpha=st.floats(0.5, 4.0))
@prop
def test_alignment_is_wang_and_isola_s_code(cpu_backend: Backend, seed: int, alpha: float) -> None:
    x, z = randn(15, 4, seed=seed), randn(15, 4, seed=seed + 1)
    expected = (F.normalize(x) - F.normalize(z)).norm(dim=1).pow(alpha)
    got = package("alignment")(x, z, alpha=alpha, reduction="none")
    torch.testing.assert_close(got, expected, **EXACT)
    cosines = F.cosine_similarity(x, z)
    torch.testing.assert_close(package("alignment")(x, z, reduction="none"), 2 - 2 * cosines, **EXACT)
    assert package("alignment")(x, -x, alpha=alpha).item() == pytest.approx(2**alpha, rel=1e-12)


@given(seed=seeds, t=st.floats(0.1, 5.0))
@prop
def test_uniformity_is_a_log_sum_exp_at_half_the_inverse_temperature(cpu_backend: Backend, seed: int, t: float) -> None:
    """exp(-t |a - b|^2) = exp(2t s - 2t): mean over i of decoupled NT-Xent's sums of other samples."""
    x = randn(9, 4, seed=seed)
    logits = 2 * t * (cosine(x, x) - 1)
    logits.fill_diagonal_(-math.inf)
    expected = logits.flatten().logsumexp(0) - math.log(9 * 8)
    torch.testing.assert_close(package("uniformity")(x, t=t), expected, **EXACT)


@pytest.mark.parametrize("decoupled", [False, True])
@given(seed=seeds, keys=st.integers(2, 9), temperature=st.floats(0.05, 2.0))
@prop
def test_info_nce_bounds(cpu_backend: Backend, decoupled: bool, seed: int, keys: int, temperature: float) -> None:
    """Cosines lie in [-1, 1]: log(1 + (K-1) e^(-2/tau)) <= loss <= log(1 + (K-1) e^(2/tau)); decoupled without 1."""
    target = torch.randint(keys, (6,), generator=torch.Generator().manual_seed(seed))
    samples = package("info_nce")(
        randn(6, 2, seed=seed),
        randn(keys, 2, seed=seed + 1),
        target,
        temperature=temperature,
        decoupled=decoupled,
        reduction="none",
    )
    one = 0 if decoupled else 1
    least, most = (math.log(one + (keys - 1) * math.exp(s * 2 / temperature)) for s in (-1, 1))
    assert bool((samples >= least - 1e-11 / temperature).all())
    assert bool((samples <= most + 1e-11 / temperature).all())
    x = randn(1, 2, seed=seed)
    extreme = package("info_nce")(x, torch.cat([x, -x]), torch.tensor([0]), temperature=temperature)
    assert extreme.item() == pytest.approx(math.log1p(math.exp(-2 / temperature)), rel=1e-9)


@given(seed=seeds)
@prop
def test_info_nce_at_high_temperature_is_the_logarithm_of_the_number_of_keys(cpu_backend: Backend, seed: int) -> None:
    loss = package("info_nce")(randn(7, 3, seed=seed), randn(11, 3, seed=seed + 1), torch.arange(7), temperature=1e6)
    assert loss.item() == pytest.approx(math.log(11), abs=4e-6)


# --------------------------------------------------------------------------------------------------
# relations between the losses


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@given(seed=seeds, temperature=st.floats(0.02, 2.0))
@prop
def test_info_nce_is_cross_entropy_of_cosine_logits(
    cpu_backend: Backend, reduction: str, ignored: bool, seed: int, temperature: float
) -> None:
    q, k = randn(9, 4, seed=seed), randn(6, 4, seed=seed + 1)
    target = torch.randint(6, (9,), generator=torch.Generator().manual_seed(seed))
    if ignored:
        target[1:4] = -100
    got = package("info_nce")(q, k, target, temperature=temperature, reduction=reduction)
    expected = F.cross_entropy(cosine(q, k) / temperature, target, reduction=reduction)
    torch.testing.assert_close(got, expected, **EXACT)
    # and NormFace, whose prototypes are then the keys
    normface = nckernels.normface_loss(q, k, target, temperature=temperature, reduction=reduction)
    torch.testing.assert_close(got, normface, **EXACT)


@pytest.mark.parametrize("decoupled", [False, True])
@given(seed=seeds)
@prop
def test_clip_is_the_mean_of_two_info_nce(cpu_backend: Backend, decoupled: bool, seed: int) -> None:
    """Symmetric in its arguments, gradients included; the sum over a row of logits and over a column."""
    a, b = randn(9, 4, seed=seed).requires_grad_(), randn(9, 4, seed=seed + 1).requires_grad_()
    got = package("clip")(a, b, decoupled=decoupled, reduction="none")
    swapped = package("clip")(b, a, decoupled=decoupled, reduction="none")
    halves = [
        package("info_nce")(*pair, temperature=0.07, decoupled=decoupled, reduction="none") for pair in ((a, b), (b, a))
    ]
    torch.testing.assert_close(got, swapped, **EXACT)
    torch.testing.assert_close(got, (halves[0] + halves[1]) / 2, **EXACT)
    for first, second in zip(
        torch.autograd.grad(got.sum(), (a, b)), torch.autograd.grad(swapped.sum(), (a, b)), strict=True
    ):
        torch.testing.assert_close(first, second, rtol=1e-10, atol=1e-10)
    assert float((halves[0] - halves[1]).detach().abs().max()) > 1e-3  # the two directions do differ


@given(seed=seeds, temperature=st.floats(0.05, 2.0))
@prop
def test_two_views_without_labels_are_nt_xent(cpu_backend: Backend, seed: int, temperature: float) -> None:
    """SimCLR Eq. 1: l(i, j) = -log e^{s_ij / tau} / sum_{k != i} e^{s_ik / tau}, over both views of all samples."""
    views = randn(6, 2, 4, seed=seed)
    s = dots(views.flatten(0, 1), views.flatten(0, 1))
    expected = [
        -math.log(
            math.exp(s[i][i ^ 1] / temperature)
            / math.fsum(math.exp(s[i][k] / temperature) for k in range(12) if k != i)
        )
        for i in range(12)  # rows 2b and 2b + 1 are the views of sample b
    ]
    got = package("supcon")(views, temperature=temperature, reduction="none")
    assert got.flatten().tolist() == pytest.approx(expected, rel=1e-10)
    assert package("supcon")(views, temperature=temperature).item() == pytest.approx(sum(expected) / 12, rel=1e-10)


@given(seed=seeds)
@prop
def test_one_positive_without_self_is_info_nce(cpu_backend: Backend, seed: int) -> None:
    """Two samples of one label and the rest single: the anchor's loss is InfoNCE with the others as keys."""
    x, y = randn(8, 4, seed=seed), torch.tensor([0, 5, 1, 0, 2, 3, 4, 6])
    got = package("supcon")(x, y, temperature=0.3, reduction="none")
    expected = package("info_nce")(x[:1], x[1:], torch.tensor([2]), temperature=0.3)
    torch.testing.assert_close(got[0], expected, **EXACT)


@pytest.mark.parametrize("name", ["supcon", "info_nce", "clip"])
@given(seed=seeds)
@prop
def test_decoupling_takes_the_positives_out_of_the_sum(cpu_backend: Backend, name: str, seed: int) -> None:
    """e^(loss + pos) differs by the positives' own terms, so the decoupled loss is the smaller one."""
    x, z, y = randn(10, 4, seed=seed), randn(10, 4, seed=seed + 1), torch.arange(10) // 2
    args = {"supcon": (x, y), "info_nce": (x, z), "clip": (x, z)}[name]
    plain, decoupled = (
        package(name)(*args, temperature=0.4, decoupled=flag, reduction="none") for flag in (False, True)
    )
    assert bool((decoupled < plain).all())
    if name != "clip":  # one positive each: log(e^plain - 1) = decoupled
        torch.testing.assert_close(torch.expm1(plain).log(), decoupled, rtol=1e-9, atol=1e-9)


# --------------------------------------------------------------------------------------------------
# invariances

CALLS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "supcon": lambda x, z, y: package("supcon")(x, y, reduction="none"),
    "supcon-decoupled": lambda x, z, y: package("supcon")(x, y, reduction="none", decoupled=True),
    "prototype": lambda x, z, y: package("prototype")(x, y, reduction="none"),
    "info_nce": lambda x, z, y: package("info_nce")(x, z, reduction="none"),
    "clip": lambda x, z, y: package("clip")(x, z, reduction="none"),
    "alignment": lambda x, z, y: package("alignment")(x, z, reduction="none"),
    "uniformity": lambda x, z, y: package("uniformity")(x).expand(len(x)),
}
calls = pytest.mark.parametrize("name", CALLS)


def draw(seed: int, samples: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.randint(5, (samples,), generator=torch.Generator().manual_seed(seed + 2))
    return randn(samples, 4, seed=seed), randn(samples, 4, seed=seed + 1), y


@calls
@given(seed=seeds)
@prop
def test_rotation_and_scale(cpu_backend: Backend, name: str, seed: int) -> None:
    """Every sample's loss stays what it is under a rotation of all rows and a positive factor for each."""
    x, z, y = draw(seed)
    q = rotation(4, seed)
    factors = 10 ** randn(2, len(x), 1, seed=seed).clamp(-3, 3)
    before = CALLS[name](x, z, y)
    torch.testing.assert_close(CALLS[name](x @ q, z @ q, y), before, **EXACT)
    torch.testing.assert_close(CALLS[name](x * factors[0], z * factors[1], y), before, **EXACT)


@calls
@given(seed=seeds)
@prop
def test_permuting_the_batch_permutes_the_losses(cpu_backend: Backend, name: str, seed: int) -> None:
    x, z, y = draw(seed)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(CALLS[name](x[order], z[order], y[order]), CALLS[name](x, z, y)[order], **EXACT)


@labelled
@given(seed=seeds)
@prop
def test_relabelling(cpu_backend: Backend, name: str, seed: int) -> None:
    """Only which labels are equal matters: any one-to-one map of labels, negative and huge ones included."""
    x, z, y = draw(seed)
    order = LABELS[torch.randperm(5, generator=torch.Generator().manual_seed(seed))]
    torch.testing.assert_close(CALLS[name](x, z, order[y]), CALLS[name](x, z, y), **EXACT)


@given(seed=seeds)
@prop
def test_views_are_exchangeable(cpu_backend: Backend, seed: int) -> None:
    """Swapping the views of some samples swaps their losses."""
    x = randn(8, 3, 4, seed=seed)
    order = torch.randperm(3, generator=torch.Generator().manual_seed(seed))
    before = package("supcon")(x, reduction="none")
    torch.testing.assert_close(package("supcon")(x[:, order], reduction="none"), before[:, order], **EXACT)


@calls
@given(seed=seeds)
@prop
def test_gradients_are_tangent(cpu_backend: Backend, name: str, seed: int) -> None:
    """Scale invariance in differential form: every row's gradient is orthogonal to the row."""
    x, z, y = draw(seed)
    leaves = (x.requires_grad_(), z.requires_grad_())
    grads = torch.autograd.grad(
        CALLS[name](x, z, y).sum(),
        leaves,
        allow_unused=name in ("supcon", "supcon-decoupled", "prototype", "uniformity"),
    )
    assert grads[0] is not None
    for leaf, grad in zip(leaves, grads, strict=True):
        if grad is not None:
            assert grad.any()
            radial = (leaf * grad).sum(1) / (1 + grad.norm(dim=1) * leaf.norm(dim=1))
            torch.testing.assert_close(radial, torch.zeros_like(radial), rtol=0, atol=1e-12)


@calls
@given(seed=seeds)
@prop
def test_gradients_of_a_rotation_sum_to_nothing(cpu_backend: Backend, name: str, seed: int) -> None:
    """Rotation invariance in differential form: x^T g summed over all rows is a symmetric matrix."""
    x, z, y = draw(seed)
    leaves = (x.requires_grad_(), z.requires_grad_())
    both = name in ("info_nce", "clip", "alignment")
    total = CALLS[name](x, z, y).sum()
    grads = torch.autograd.grad(total, leaves if both else leaves[:1])
    moment = sum((leaf.T @ grad for leaf, grad in zip(leaves, grads, strict=False)), torch.zeros(4, 4).double())
    size = float(moment.abs().max()) + sum(float(g.abs().max()) for g in grads)
    torch.testing.assert_close(moment, moment.T.clone(), rtol=0, atol=1e-11 * (1 + size))


def test_the_oracle_has_the_minimum_too() -> None:
    """The closed form against the dense forms, so that a common error of package and bound would show."""
    y = balanced(5, 3)
    for name in ("supcon", "prototype"):
        value = NAIVE[name](simplex(5, 4)[y], y, temperature=0.2).item()
        assert value == pytest.approx(minimum(5, 3, 0.2), abs=1e-12)
