"""[ENC]: the unconstrained features model with squared errors, against the theorems and against a convex program.

With Z = W Hbar the model is convex: minimise over Z and b

    1/(2N) sum_k n_k |z_k + b - y_k|^2 + sqrt(lambda_W lambda_H) |Z D^(1/2)|_* + lambda_b/2 |b|^2,   D = diag(n_k),

because lambda_W/2 |W|^2 + lambda_H/2 |Hbar D^(1/2)|^2 is least at that nuclear norm when d >= K. :func:`program` solves
it for any encoding and any counts, and the factors of the singular value decomposition give the Gram matrix of Hbar.
Encodings here have one column for each class, as in the paper.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from .formulas import centring, orthogonal, randn, same


def program(
    y: Tensor, counts: list[int], lambda_w: float, lambda_h: float, lambda_b: float
) -> tuple[Tensor, Tensor, float]:
    """Hbar^T Hbar, b and the least value, by accelerated proximal steps in V = Z D^(1/2)."""
    n = torch.tensor(counts, dtype=torch.float64)
    root, total, price = n.sqrt(), float(n.sum()), math.sqrt(lambda_w * lambda_h)

    def bias(z: Tensor) -> Tensor:
        return ((y - z) * n).sum(1) / total / (1 + lambda_b)

    def shrink(v: Tensor, by: float) -> tuple[Tensor, Tensor, Tensor]:
        u, s, q = torch.linalg.svd(v)
        return u, (s - by).clamp(min=0), q

    v = previous = torch.zeros_like(y)
    for step in range(300):
        guess = v + step / (step + 3) * (v - previous)
        z = guess / root
        slope = (z + bias(z)[:, None] - y) * root / total
        previous = v
        u, s, q = shrink(guess - total * slope, total * price)
        v = u @ torch.diag(s) @ q
    z, b = v / root, bias(v / root)
    error = (((z + b[:, None] - y) ** 2).sum(0) * n).sum() / (2 * total)
    least = error + price * s.sum() + lambda_b / 2 * (b**2).sum()
    gram = math.sqrt(lambda_w / lambda_h) * (q.T @ torch.diag(s) @ q) / root[:, None] / root
    return gram, b, float(least)


def value(w: Tensor, h: Tensor, b: Tensor, y: Tensor, lambda_w: float, lambda_h: float, lambda_b: float) -> float:
    """[ENC] Eq. 2, one sample after the other; h has a row for each sample, y its label as a row."""
    error = sum(float(((w @ h[i] + b - y[i]) ** 2).sum()) for i in range(len(h))) / (2 * len(h))
    sizes = lambda_w * float((w**2).sum()) + lambda_h * float((h**2).sum()) + lambda_b * float((b**2).sum())
    return error + sizes / 2


K, N = 4, 5


def lambdas(c: float, ratio: float = 3.0) -> dict[str, float]:
    """lambda_W and lambda_H with K sqrt(n lambda_W lambda_H) = c."""
    product = (c / K) ** 2 / N
    return {"lambda_w": math.sqrt(product * ratio), "lambda_h": math.sqrt(product / ratio)}


def kappa(parameters: dict[str, float]) -> float:
    return math.sqrt(N * parameters["lambda_h"] / parameters["lambda_w"])


def smoothed(delta: float) -> Tensor:
    return (1 - delta) * torch.eye(K, dtype=torch.float64) + delta / K


def closed_form(c: float, lambda_b: float, delta: float, kappa: float) -> tuple[Tensor, Tensor]:
    """kappa Hbar^T Hbar = (1-delta-c)_+ (I - J/K) + z J/K; one-hot labels are delta = 0 (Theorem III.1).

    Along J/K labels are 1 whatever delta is: z solves that scalar problem, the bias takes 1/(1+lambda_b) of the rest.
    """
    z = 0.0 if c >= 1 or lambda_b <= c / (1 - c) else 1 - c - c / lambda_b
    gram = (max(1 - delta - c, 0.0) * centring(K) + z / K) / kappa
    return gram, torch.full((K,), (1 - z) / (1 + lambda_b) / K, dtype=torch.float64)


CASES = [
    (0.3, 0.0),
    (0.3, 0.1),
    (0.3, 0.3 / 0.7),
    (0.3, 1.0),
    (0.3, 50.0),
    (0.9, 4.0),
    (0.9, 20.0),
    (1.0, 2.0),
    (1.4, 0.5),
]


@pytest.mark.parametrize(("c", "lambda_b"), CASES)
def test_one_hot_and_smoothed_labels(c: float, lambda_b: float) -> None:
    """Theorem III.1 on both sides of lambda_b = c/(1-c) and of c = 1, and its extension to smoothed labels."""
    from nckernels.ufm import label_smoothing, mse_optimum, one_hot

    for delta in (0.0, 0.2, 0.5):
        p = lambdas(c)
        encoding = one_hot(K) if delta == 0 else label_smoothing(K, delta)
        same(encoding, smoothed(delta), 1e-15)
        gram, bias = closed_form(c, lambda_b, delta, kappa(p))
        if c < 1 and delta == 0:  # as printed
            beta, first = (
                (1.0, 1 / (1 + lambda_b)) if lambda_b <= c / (1 - c) else (c / (lambda_b * (1 - c)), c / lambda_b)
            )
            same(gram, (1 - c) / kappa(p) * (torch.eye(K, dtype=torch.float64) - beta / K))
            same(bias, torch.full((K,), first / K, dtype=torch.float64))
        got = mse_optimum(smoothed(delta), N, lambda_b=lambda_b, **p)
        same(got.gram, gram, 1e-9)
        same(got.bias, bias, 1e-9)
        assert float(got.kappa) == pytest.approx(kappa(p), rel=1e-12)
        # The value from factors: P^T P = Gram, W = kappa Hbar^T, since encodings are symmetric and positive here.
        values, vectors = torch.linalg.eigh(gram)
        hbar = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
        y = torch.arange(K).repeat(N)
        want = value(kappa(p) * hbar.T, hbar.T[y], bias, smoothed(delta).T[y], lambda_b=lambda_b, **p)
        assert float(got.loss) == pytest.approx(want, abs=1e-12)


def test_label_smoothing_is_a_shifted_simplex_of_negative_shift() -> None:
    """(1-delta) I + delta J/K = alpha (I - beta J/K) for alpha = 1-delta, beta = -delta/(1-delta), not as printed +."""
    from nckernels.geometry import shifted_simplex_etf
    from nckernels.ufm import label_smoothing

    delta = 0.3
    labels = label_smoothing(K, delta).double()
    for beta, equal in ((-delta / (1 - delta), True), (delta / (1 - delta), False)):
        frame = shifted_simplex_etf(K, K, 1 - delta, beta, dtype=torch.float64)
        assert torch.allclose(frame @ frame.T, labels.T @ labels, atol=1e-7) is equal


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("c", "lambda_b"), [(0.2, 0.0), (0.4, 0.3), (0.6, 5.0)])
def test_optimum_of_any_encoding(seed: int, c: float, lambda_b: float) -> None:
    """1 is no singular vector of these encodings: by the convex program; Prop. IV.3: Q Y has Q b and the same Gram."""
    from nckernels.ufm import mse_optimum

    p, y = lambdas(c), randn(K, K, seed=seed)
    gram, bias, least = program(y, [N] * K, lambda_b=lambda_b, **p)
    got = mse_optimum(y, N, lambda_b=lambda_b, **p)
    same(got.gram, gram, 1e-6)
    same(got.bias, bias, 1e-6)
    assert float(got.loss) == pytest.approx(least, abs=1e-9)
    q = orthogonal(K, seed + 10)
    turned = mse_optimum(q @ y, N, lambda_b=lambda_b, **p)
    same(turned.gram, got.gram, 1e-6)
    same(turned.bias, q @ got.bias.double(), 1e-6)


def encodings() -> dict[str, Tensor]:
    one_hot = torch.eye(K, dtype=torch.float64)
    return {
        "one-hot": one_hot,
        "smoothed": smoothed(0.2),
        "random": randn(K, K, seed=3),
        "turned": orthogonal(K, 4) @ one_hot,
        "centred": centring(K) @ one_hot,
    }


@pytest.mark.parametrize("name", encodings())
@pytest.mark.parametrize(("c", "lambda_b"), [(0.3, 0.0), (0.3, 0.2), (0.3, 2.0)])
def test_descent_ends_where_the_theorems_say(name: str, c: float, lambda_b: float) -> None:
    """Theorems III.1, III.4, IV.1 and IV.4 to 1e-6, by descent from a random start in d = K + 2."""
    from nckernels.metrics import rotated_self_duality
    from nckernels.ufm import mse_optimum, solve_mse

    p, y = lambdas(c), encodings()[name]
    found = solve_mse(y, N, K + 2, lambda_b=lambda_b, **p)
    h, w, b, target = found.features, found.weight, found.bias, found.target
    assert h.shape == (K * N, K + 2)
    assert w.shape == (K, K + 2)
    means = torch.stack([h[target == k].mean(0) for k in range(K)])
    # IV.1: variability collapse
    same(h, means[target], 1e-6)
    # IV.4: W^T W = kappa^2 Hbar Hbar^T, and the same as a distance
    same(w.T @ w, kappa(p) ** 2 * means.T @ means, 1e-6)
    assert float(rotated_self_duality(w, means)) == pytest.approx(0, abs=1e-6)
    # III.4
    if lambda_b == 0:
        same(b, y.mean(1), 1e-6)
    if name == "centred":
        same(b, torch.zeros(K), 1e-6)
    gram, bias, least = program(y, [N] * K, lambda_b=lambda_b, **p)
    same(means @ means.T, gram, 1e-6)
    same(b, bias, 1e-6)
    want = mse_optimum(y, N, lambda_b=lambda_b, **p)
    same(means @ means.T, want.gram, 1e-6)
    assert value(w, h, b, y.T[target], lambda_b=lambda_b, **p) == pytest.approx(least, abs=1e-9)
    if name in ("one-hot", "smoothed", "centred"):  # III.1: self-duality itself, W^T = kappa Hbar
        same(w, kappa(p) * means, 1e-6)
    if name == "turned":
        assert float((w - kappa(p) * means).norm()) > 0.1  # IV.3: not so for turned labels


def test_the_optimum_is_zero_for_c_above_1() -> None:
    """For c >= 1 weights and features vanish and the bias takes 1/(1+lambda_b) of the mean label."""
    from nckernels.ufm import solve_mse

    found = solve_mse(torch.eye(K, dtype=torch.float64), N, K + 1, lambda_b=0.25, **lambdas(1.3))
    same(found.features, torch.zeros(K * N, K + 1), 1e-6)
    same(found.weight, torch.zeros(K, K + 1), 1e-6)
    same(found.bias, torch.full((K,), 0.8 / K), 1e-6)


def test_unequal_classes() -> None:
    """NC1, lambda_W W^T W = lambda_H H H^T and Theorem III.4 hold without balance; the optimum is the program's."""
    from nckernels.ufm import mse_optimum, solve_mse

    counts = [1, 2, 7, 4]
    p = {"lambda_w": 0.02, "lambda_h": 0.004}
    for name, lambda_b in itertools.product(("one-hot", "random", "centred"), (0.0, 0.4)):
        y = encodings()[name]
        if name == "centred":  # over the samples, not over the classes
            y = y - (y * torch.tensor(counts)).sum(1, keepdim=True) / sum(counts)
        gram, bias, least = program(y, counts, lambda_b=lambda_b, **p)
        best = mse_optimum(y, counts, lambda_b=lambda_b, **p)
        same(best.gram, gram, 1e-7)
        same(best.bias, bias, 1e-7)
        assert best.loss == pytest.approx(least, abs=1e-10)
        assert math.isnan(best.kappa)
        found = solve_mse(y, counts, K + 1, lambda_b=lambda_b, **p)
        h, w, b, target = found.features, found.weight, found.bias, found.target
        assert torch.bincount(target).tolist() == counts
        means = torch.stack([h[target == k].mean(0) for k in range(K)])
        same(h, means[target], 1e-6)
        same(p["lambda_w"] * w.T @ w, p["lambda_h"] * h.T @ h, 1e-8)
        same(means @ means.T, gram, 1e-6)
        assert value(w, h, b, y.T[target], lambda_b=lambda_b, **p) == pytest.approx(least, abs=1e-9)
        # Lemma III.3, Eqs. 6 to 8, with a column for each sample
        labels, columns, total, gamma = y[:, target], h.T, sum(counts), 1 / (1 + lambda_b)
        m = torch.eye(total, dtype=torch.float64) - gamma / total
        same(labels @ m @ h, w @ columns @ m @ h + p["lambda_w"] * total * w, 1e-8)
        same(w.T @ labels @ m, w.T @ w @ columns @ m + p["lambda_h"] * total * columns, 1e-8)
        same(b, gamma / total * (labels - w @ columns).sum(1), 1e-8)
        if lambda_b == 0 or name == "centred":
            same(b, (y * torch.tensor(counts)).sum(1) / sum(counts), 1e-6)


def test_centred_encoding_has_mean_zero() -> None:
    from nckernels.ufm import centred

    y = randn(K, K, seed=0)
    same(centred(y), y - y.mean(1, keepdim=True), 1e-12)
