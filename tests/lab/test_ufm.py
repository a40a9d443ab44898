"""Unconstrained features models: minimisers found from random numbers against closed forms."""

import itertools
import math

import pytest
import torch

from nckernels.geometry import orthogonal_frame, simplex_etf
from nckernels.metrics import optimum, rotated_self_duality
from nckernels.ufm import LOSSES, centred, label_smoothing, minimum, mse_optimum, one_hot, solve, solve_mse
from nckernels.ufm.cosine import WITH_PROTOTYPES, WITHOUT_PROTOTYPES

LAMBDAS = {"lambda_w": 2e-2, "lambda_h": 5e-3}


# Losses on unit vectors.


@pytest.mark.parametrize(
    ("k", "d", "temperature"), [(3, 2, 0.5), (3, 3, 0.05), (4, 3, 0.2), (4, 6, 0.1), (10, 9, 0.3), (10, 12, 0.1)]
)
@pytest.mark.parametrize("loss", LOSSES)
def test_signed_features_collapse_to_the_closed_form(loss, k, d, temperature):
    found = solve(loss, k, d, 3, temperature, seed=k)
    assert found.value == pytest.approx(found.minimum, rel=1e-12, abs=1e-13)
    assert found.start_value > found.minimum + 0.05
    collapse, best = found.collapse, optimum(k)
    for metric in ("within_scatter", "nc2_norms", "nc2_cosines_max", "offset", "weight_alignment"):
        assert abs(getattr(collapse, metric) - getattr(best, metric)) < 1e-5, metric
    assert torch.equal(found.target, torch.arange(k).repeat_interleave(3))
    assert torch.allclose(found.features.norm(dim=1), torch.ones(3 * k, dtype=torch.float64))


@pytest.mark.parametrize(("loss", "k"), [("normface", 4), ("ntce", 3), ("nonl", 5), ("supcon", 3), ("prototype", 3)])
def test_features_without_negative_entries_end_in_an_orthonormal_frame(loss, k):
    found = solve(loss, k, k, 3, 0.4, features="relu", steps=300)
    assert found.features.min() >= 0
    assert found.gap == pytest.approx(0, abs=1e-8)
    means = found.features[::3]
    assert torch.allclose(means @ means.T, torch.eye(k, dtype=torch.float64), atol=1e-4)
    if loss in WITH_PROTOTYPES:
        assert found.collapse.weight_alignment == pytest.approx(2 - 2 * math.sqrt((k - 1) / k), abs=1e-5)


@pytest.mark.parametrize("features", ["signed", "relu"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("k", "n"), [(2, 2), (3, 4), (10, 2)])
def test_no_features_are_below_the_minimum(loss, features, k, n):
    """At the exact configuration the loss is the closed form; around it and at random points it is larger."""
    generator = torch.Generator().manual_seed(0)
    make = simplex_etf if features == "signed" else orthogonal_frame
    frame = make(k, k, generator=generator, dtype=torch.float64)
    if features == "relu":
        frame = torch.eye(k, dtype=torch.float64)
    target, best = torch.arange(k).repeat_interleave(n), minimum(loss, k, n, 0.3, features=features)

    def value(rows, prototypes):
        if loss in WITH_PROTOTYPES:
            return float(WITH_PROTOTYPES[loss](rows, prototypes, target, temperature=0.3))
        return float(WITHOUT_PROTOTYPES[loss](rows, target, temperature=0.3))

    assert value(frame[target], frame - frame.mean(0)) == pytest.approx(best, abs=1e-12)
    for scale in (0.01, 0.1, 10.0):
        rows = frame[target] + scale * torch.randn(n * k, k, generator=generator, dtype=torch.float64)
        if features == "relu":
            rows = rows.relu() + 1e-9
        prototypes = frame - frame.mean(0) + scale * torch.randn(k, k, generator=generator, dtype=torch.float64)
        assert value(rows, prototypes) > best


def test_one_sample_per_class():
    assert minimum("prototype", 4, 1, 0.5) == pytest.approx(math.log(3) - 4 / 3 / 0.5)
    assert solve("prototype", 4, 3, 1, 0.5).gap == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "ce"}, "loss must be one of"),
        ({"num_classes": 1}, "num_classes must be at least 2, got 1"),
        ({"samples_per_class": 0}, "samples_per_class must be at least 1"),
        ({"loss": "supcon", "samples_per_class": 1}, "samples_per_class must be at least 2"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": math.nan}, "temperature must be positive"),
        ({"features": "abs"}, "features must be one of"),
        ({"dim": 2}, "dim must be at least 3 for 4 classes of signed features, got 2"),
        ({"dim": 3, "features": "relu"}, "dim must be at least 4"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"starts": 0}, "starts must be at least 1"),
        ({"tolerance": -1.0}, "tolerance must be positive"),
    ],
)
def test_bad_arguments_of_solve(change, message):
    good = {"loss": "nonl", "num_classes": 4, "dim": 4, "samples_per_class": 2, "temperature": 0.1}
    with pytest.raises(ValueError, match=message):
        solve(**{**good, **change})


# Squared error with encodings.


def gaussian(k, seed=0):
    return torch.randn(k, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def theorem_iii_1(k, n, lambda_w, lambda_h, lambda_b, delta=0.0):
    """[ENC] Theorem III.1 with its scale; label smoothing by delta."""
    c = k * math.sqrt(n * lambda_w * lambda_h)
    ones = torch.full((k, k), 1 / k, dtype=torch.float64)
    before = lambda_b <= c / (1 - c)
    along = 0.0 if before else 1 - c - c / lambda_b
    gram = math.sqrt(lambda_w / (n * lambda_h)) * (
        (1 - delta - c) * (torch.eye(k, dtype=torch.float64) - ones) + along * ones
    )
    return gram, torch.full((k,), (1 / (1 + lambda_b) if before else c / lambda_b) / k, dtype=torch.float64)


@pytest.mark.parametrize("delta", [0.0, 0.3])
@pytest.mark.parametrize("lambda_b", [0.0, 1e-3, 0.02, 0.03, 0.5, 100.0])
@pytest.mark.parametrize("k", [2, 3, 10])
def test_theorem_iii_1(k, lambda_b, delta):
    n = 4
    found = mse_optimum(label_smoothing(k, delta), n, lambda_b=lambda_b, **LAMBDAS)
    gram, bias = theorem_iii_1(k, n, lambda_b=lambda_b, delta=delta, **LAMBDAS)
    assert found.closed_form
    assert torch.allclose(found.gram, gram, atol=1e-14)
    assert torch.allclose(found.bias, bias, atol=1e-15)
    assert torch.allclose(found.weight_gram, found.kappa**2 * found.gram, atol=1e-14)  # NC3


@pytest.mark.parametrize("lambda_b", [0.0, 0.02, 1.0])
@pytest.mark.parametrize("name", ["one-hot", "centred", "random", "rank one"])
@pytest.mark.parametrize("counts", [4, [6, 1, 3, 2]])
def test_free_weights_features_and_bias_find_the_convex_optimum(name, lambda_b, counts):
    """Theorems III.1, III.4, IV.1 and IV.4; and the parts of them that hold for classes of different sizes."""
    k = 4
    encoding = {
        "one-hot": one_hot(k),
        "centred": centred(gaussian(k)),
        "random": gaussian(k),
        "rank one": torch.outer(gaussian(k)[0], gaussian(k)[1]),
    }[name]
    found = solve_mse(encoding, counts, k, lambda_b=lambda_b, seed=1, **LAMBDAS)
    best, means = found.optimum, found.means
    assert found.loss == pytest.approx(best.loss, abs=1e-12)
    assert torch.allclose(found.bias, best.bias, atol=1e-7)
    assert torch.allclose(means @ means.T, best.gram, atol=1e-6)
    assert torch.allclose(found.weight @ found.weight.T, best.weight_gram, atol=1e-6)
    assert torch.allclose(found.weight @ means.T, best.logits, atol=1e-6)
    assert (found.features - means[found.target]).abs().max() < 1e-6  # NC1
    balance = LAMBDAS["lambda_w"] * found.weight.T @ found.weight - LAMBDAS["lambda_h"] * (
        found.features.T @ found.features
    )
    assert balance.abs().max() < 1e-8
    if lambda_b == 0:
        mean_label = encoding[:, found.target].mean(1)
        assert torch.allclose(best.bias, mean_label, atol=1e-12)
    if counts == 4:
        assert rotated_self_duality(found.weight, means) < 1e-9  # NC3'
        assert float(found.weight.norm() / means.norm()) == pytest.approx(best.kappa, rel=1e-6)
        if name == "centred":
            assert best.closed_form
            assert best.bias.abs().max() < 1e-15
    else:
        assert math.isnan(best.kappa)


@pytest.mark.parametrize("counts", [3, [7, 1, 2, 2, 1]])
@pytest.mark.parametrize("lambda_b", [1e-7, 1e-3, 0.3])
def test_iteration_and_formula_agree(monkeypatch, counts, lambda_b):
    """The iteration reaches the closed form if there is one, and a stationary bias otherwise."""
    import nckernels.ufm.mse as mse

    for encoding in (label_smoothing(5, 0.3), gaussian(5)):
        formula = mse_optimum(encoding, counts, lambda_b=lambda_b, **LAMBDAS)
        with monkeypatch.context() as patch:
            patch.setattr(mse, "_bias_in_closed_form", lambda *_: None)
            iterated = mse_optimum(encoding, counts, lambda_b=lambda_b, **LAMBDAS)
        assert not iterated.closed_form
        assert iterated.loss == pytest.approx(formula.loss, abs=1e-14)
        assert torch.allclose(iterated.gram, formula.gram, atol=1e-10)
        sizes = torch.full((5,), 3.0) if counts == 3 else torch.tensor(counts, dtype=torch.float64)
        left = (
            ((encoding - iterated.logits) @ sizes.double() / sizes.sum() - (1 + lambda_b) * iterated.bias).abs().max()
        )
        assert left < 1e-13  # [ENC] Eq. 8


@pytest.mark.parametrize("counts", [3, [7, 1, 2, 2, 1]])
@pytest.mark.parametrize("lambda_b", [1e-6, 0.3])
def test_newtons_method_takes_few_steps(monkeypatch, counts, lambda_b):
    """With a wrong Hessian the optimum would still be reached, but in hundreds of short steps."""
    import nckernels.ufm.mse as mse

    steps, step = [], mse._newton_step
    monkeypatch.setattr(mse, "_newton_step", lambda *args: steps.append(0) or step(*args))
    mse_optimum(gaussian(5), counts, lambda_b=lambda_b, **LAMBDAS)
    assert 1 <= len(steps) <= 8


def test_orthogonal_labels_rotate_weights_and_bias_and_nothing_else():
    """[ENC] Proposition IV.3."""
    rotation = torch.linalg.qr(gaussian(4, 1)).Q
    plain, turned = (mse_optimum(y, 5, lambda_b=0.3, **LAMBDAS) for y in (one_hot(4), rotation))
    assert torch.allclose(turned.gram, plain.gram, atol=1e-14)
    assert torch.allclose(turned.bias, rotation @ plain.bias, atol=1e-14)
    assert torch.allclose(turned.weight_gram, rotation @ plain.weight_gram @ rotation.T, atol=1e-14)


@pytest.mark.parametrize("lambda_b", [0.0, 0.7])
def test_strong_weight_decay_gives_zero(lambda_b):
    k, n = 4, 9
    strength = 1.001 / (k * 3)  # c = K sqrt(n) lambda
    found = solve_mse(one_hot(k), n, k, lambda_w=strength, lambda_h=strength, lambda_b=lambda_b)
    assert found.optimum.gram.abs().max() == 0
    assert found.weight.abs().max() < 1e-5
    assert found.features.abs().max() < 1e-5
    expected = torch.full((k,), 1 / k / (1 + lambda_b), dtype=torch.float64)
    for bias in (found.optimum.bias, found.bias):
        assert torch.allclose(bias, expected, atol=1e-8)


def test_zero_labels_give_zero_features():
    found = mse_optimum(torch.zeros(3, 3), 2, lambda_b=0.1, **LAMBDAS)
    assert found.loss == 0
    assert found.gram.abs().max() == found.bias.abs().max() == 0


def test_encodings():
    assert torch.equal(one_hot(3), torch.eye(3, dtype=torch.float64))
    assert torch.allclose(label_smoothing(4, 0.2).diagonal(), torch.full((4,), 0.85, dtype=torch.float64))
    columns = centred(gaussian(5))
    assert columns.sum(1).abs().max() < 1e-14
    assert torch.allclose(columns[:, :1] - columns, gaussian(5)[:, :1] - gaussian(5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoding": torch.zeros(3, 2)}, r"encoding must have shape \(K, K\)"),
        ({"encoding": torch.zeros(0, 0)}, "encoding must have shape"),
        ({"encoding": torch.full((2, 2), math.nan)}, "encoding must be finite"),
        ({"samples_per_class": [1, 2]}, "samples_per_class must have 3 counts, one per class, got 2"),
        ({"samples_per_class": [1, 0, 2]}, "samples_per_class must be at least 1, got 0"),
        ({"lambda_w": 0.0}, "lambda_w must be positive"),
        ({"lambda_h": -1.0}, "lambda_h must be positive"),
        ({"lambda_b": -0.1}, "lambda_b must be between"),
        ({"lambda_b": math.inf}, "lambda_b must be finite"),
        ({"lambda_b": math.nan}, "lambda_b must be between"),
        ({"dim": 2}, "dim must be at least 3"),
    ],
)
def test_bad_arguments_of_solve_mse(change, message):
    good = {"encoding": one_hot(3), "samples_per_class": 2, "dim": 3, "lambda_b": 0.1, **LAMBDAS}
    with pytest.raises(ValueError, match=message):
        solve_mse(**{**good, **change})


def test_wrong_types_are_errors():
    with pytest.raises(TypeError, match="encoding"):
        mse_optimum(torch.eye(3, dtype=torch.int64), 2, lambda_b=0.1, **LAMBDAS)
    for bad, good in itertools.permutations(("3", 3)):
        with pytest.raises(TypeError):
            minimum("nonl", bad, good, 0.1)
