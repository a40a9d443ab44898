"""[DLP]: the dot-regression loss and its correct gradient, the assignment of Eq. 9, and Algorithm 1 as a recursion."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import nckernels

from .formulas import dot, randn, rows, same, unit

prop = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 2**31)


def batch(seed: int, m: int = 12, k: int = 5, dim: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    x = randn(m, dim, seed=seed) * 10 ** randn(m, 1, seed=seed + 1).clamp(-1, 1)
    return x, 3 * randn(k, dim, seed=seed + 2), torch.arange(m) * (seed % 3 + 1) % k


def samples(x: Tensor, w: Tensor, y: Tensor) -> list[float]:
    return [(dot(unit(z), unit(rows(w)[label])) - 1) ** 2 / 2 for z, label in zip(rows(x), y.tolist(), strict=True)]


# --------------------------------------------------------------------------------------------------
# the loss


@given(seed=seeds)
@prop
def test_value_and_reductions(seed: int) -> None:
    x, w, y = batch(seed)
    want = samples(x, w, y)
    assert nckernels.dot_regression_loss(x, w, y, reduction="none").tolist() == pytest.approx(want, abs=1e-12)
    assert nckernels.dot_regression_loss(x, w, y, reduction="sum").item() == pytest.approx(math.fsum(want), abs=1e-12)
    assert nckernels.dot_regression_loss(x, w, y).item() == pytest.approx(math.fsum(want) / len(want), abs=1e-12)
    assert nckernels.DotRegressionLoss(prototypes=w)(x, y).item() == pytest.approx(math.fsum(want) / 12, abs=1e-12)


@given(seed=seeds)
@prop
def test_gradient_is_a_vector(seed: int) -> None:
    """-(1 - s) (w - s u) / |x| for the features, -(1 - s) (u - s w) / |w| for the prototypes, summed over a class.

    [DLP] Eq. 7 prints -(1 - s) s, a number.
    """
    x, w, y = batch(seed)
    x.requires_grad_()
    w.requires_grad_()
    got_x, got_w = torch.autograd.grad(nckernels.dot_regression_loss(x, w, y, reduction="sum"), (x, w))
    want_w = torch.zeros_like(w)
    for i, label in enumerate(y.tolist()):
        u, v = x[i].detach() / x[i].norm().detach(), w[label].detach() / w[label].norm().detach()
        s = u @ v
        torch.testing.assert_close(got_x[i], -(1 - s) * (v - s * u) / x[i].norm().detach(), rtol=1e-9, atol=1e-12)
        want_w[label] -= (1 - s) * (u - s * v) / w[label].norm().detach()
    torch.testing.assert_close(got_w, want_w, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_gradcheck(reduction: str) -> None:
    x, w, y = batch(0, m=6)
    y[2] = -100
    weight, sample_weight = torch.rand(5).double(), torch.rand(6).double()

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return nckernels.dot_regression_loss(x, w, y, weight=weight, sample_weight=sample_weight, reduction=reduction)

    assert torch.autograd.gradcheck(loss, (x.requires_grad_(), w.requires_grad_()))


@given(seed=seeds)
@prop
def test_weights_and_ignored_samples(seed: int) -> None:
    """The mean uses both weights and leaves ignored samples out, even if they are NaN."""
    x, w, y = batch(seed)
    g = torch.Generator().manual_seed(seed)
    weight, each = torch.rand(5, generator=g).double(), torch.rand(12, generator=g).double()
    want = samples(x, w, y)
    y[3] = y[7] = 4 if seed % 2 else -100
    index = 4 if seed % 2 else -100
    kept = [i for i in range(12) if y[i] != index]
    factor = {i: (weight[y[i]] * each[i]).item() for i in kept}
    x[3] = math.nan
    call = {"weight": weight, "sample_weight": each, "ignore_index": index}
    total = math.fsum(factor[i] * want[i] for i in kept)
    got = nckernels.dot_regression_loss(x, w, y, reduction="none", **call)
    assert got.tolist() == pytest.approx([factor[i] * want[i] if i in factor else 0 for i in range(12)], abs=1e-12)
    assert nckernels.dot_regression_loss(x, w, y, reduction="sum", **call).item() == pytest.approx(total, abs=1e-12)
    mean = total / math.fsum(factor.values())
    assert nckernels.dot_regression_loss(x, w, y, **call).item() == pytest.approx(mean, abs=1e-12)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(nckernels.dot_regression_loss(x, w, y, **call), x)
    assert not grad[3].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    x, w, y = batch(3)
    x, w = x.to(dtype).requires_grad_(), w.to(dtype)
    loss = nckernels.dot_regression_loss(x, w, y, reduction="none")
    assert loss.dtype == torch.float32
    assert loss.tolist() == pytest.approx(samples(x, w, y), abs=4 * torch.finfo(dtype).eps)
    loss.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype


def test_float32_near_the_optimum() -> None:
    """At an angle t the loss is t^4/8. In float32 1 - s loses it; half of the squared chord does not."""
    w = torch.eye(8)
    for angle in (1e-1, 1e-2, 1e-3):
        x = torch.cos(torch.tensor(angle)) * w + torch.sin(torch.tensor(angle)) * w.roll(1, 0)
        got = nckernels.dot_regression_loss(x, w, torch.arange(8)).item()
        chords = [math.dist(unit(u), unit(v)) for u, v in zip(rows(x), rows(w), strict=True)]
        want = math.fsum(c**4 / 8 for c in chords) / 8
        assert got == pytest.approx(want, rel=1e-6 / angle, abs=0)
    assert nckernels.dot_regression_loss(7 * w, w, torch.arange(8)).item() <= 1e-14


def test_degenerate_batches() -> None:
    x, w, y = batch(1)
    nothing = torch.full_like(y, -100)
    for a, b in ((x[:0], y[:0]), (x, nothing)):
        assert nckernels.dot_regression_loss(a, w, b, reduction="sum").item() == 0
        assert math.isnan(nckernels.dot_regression_loss(a, w, b).item())
        assert not nckernels.dot_regression_loss(a, w, b, reduction="none").any()
    x[0] = 0  # no direction: cosine 0
    assert nckernels.dot_regression_loss(x, w, y, reduction="none")[0].item() == pytest.approx(0.5)
    assert nckernels.dot_regression_loss(-w, w, torch.arange(5)).item() == pytest.approx(2)


def test_bad_input_is_named() -> None:
    x, w, y = batch(2)
    for call, argument in (
        (lambda: nckernels.dot_regression_loss(x, w[:, 1:], y), "prototypes"),
        (lambda: nckernels.dot_regression_loss(x, w, y[1:]), "target"),
        (lambda: nckernels.dot_regression_loss(x, w, y.double()), "target"),
        (lambda: nckernels.dot_regression_loss(x, w[:2], y), "target"),
        (lambda: nckernels.dot_regression_loss(x, w, y, weight=torch.ones(3).double()), "weight"),
        (lambda: nckernels.dot_regression_loss(x, w, y, sample_weight=torch.ones(3).double()), "sample_weight"),
        (lambda: nckernels.dot_regression_loss(x, w, y, reduction="avg"), "reduction"),
    ):
        with pytest.raises((ValueError, TypeError, IndexError), match=rf"\b{argument}\b"):
            call()


# --------------------------------------------------------------------------------------------------
# the assignment


def best(representatives: Tensor, points: Tensor) -> float:
    """[DLP] Eq. 9 by trying all bijections: the largest sum of inner products."""
    s = [[dot(z, p) for p in rows(points)] for z in rows(representatives)]
    return max(math.fsum(s[c][p] for c, p in enumerate(order)) for order in itertools.permutations(range(len(s))))


def reached(representatives: Tensor, points: Tensor, assignment: Tensor) -> float:
    return float((representatives.double() * points.double()[assignment]).sum())


@given(seed=seeds, k=st.integers(1, 6), dim=st.integers(1, 4))
@prop
def test_assignment_is_the_best_bijection(seed: int, k: int, dim: int) -> None:
    """Inner products, as in Eq. 9: a longer representative has more weight."""
    from nckernels.assignment import assign

    z = randn(k, dim, seed=seed) * 10 ** randn(k, 1, seed=seed + 2).clamp(-1, 1)
    points = F.normalize(randn(k, dim, seed=seed + 1))
    a = assign(z, points)
    assert a.dtype == torch.int64
    assert a.sort().values.tolist() == list(range(k))
    assert reached(z, points, a) == pytest.approx(best(z, points), abs=1e-12)


def test_assignment_undoes_a_permutation() -> None:
    """Label c has the point in row assignment[c], not the inverse."""
    from nckernels.assignment import assign

    points = F.normalize(randn(40, 10, seed=0))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(assign(2 * points[order] + 0.01 * randn(40, 10, seed=1), points), order)


def test_non_square_problems_are_errors() -> None:
    from nckernels.assignment import assign

    for z, p, argument in (
        (randn(3, 4, seed=0), randn(5, 4, seed=0), "representatives|points"),
        (randn(3, 4, seed=0), randn(3, 5, seed=0), "representatives|points"),
        (randn(3, 4, seed=0) * math.nan, randn(3, 4, seed=0), "representatives"),
        (randn(3, 4, seed=0), randn(3, 4, seed=0) * math.inf, "points"),
    ):
        with pytest.raises(ValueError, match=argument):
            assign(z, p)


# --------------------------------------------------------------------------------------------------
# the head


def head(k: int = 5, dim: int = 4, **options: Any) -> nckernels.FixedPrototypeHead:
    return nckernels.FixedPrototypeHead(F.normalize(randn(k, dim, seed=9)), **options)


def direction(x: Tensor) -> Tensor:
    return F.normalize(x.double(), dim=-1)


def test_cosines_and_loss_follow_the_order_of_the_labels() -> None:
    h = head(refresh_every=10**6)
    x, _, y = batch(0)
    with torch.no_grad():
        h.assignment.copy_(torch.tensor([3, 0, 4, 1, 2]))
    same(h.prototypes, h.points[torch.tensor([3, 0, 4, 1, 2])], 0)
    same(h(x), direction(x) @ direction(h.points[h.assignment]).T)
    want = sum(samples(x, h.points[h.assignment], y)) / len(y)
    assert h(x, y).item() == pytest.approx(want, abs=1e-12)
    assert h.loss(x, y).item() == pytest.approx(want, abs=1e-12)
    assert not [p for p in h.parameters() if p.requires_grad]


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_representatives_follow_algorithm_1(momentum: float) -> None:
    """zbar_y <- alpha zbar_y + (1 - alpha) z on unit features; classes that are not in the batch stay.

    One sample of a class in each batch, and directions only: how Q starts and whether it is made unit again is open.
    """
    h = head(momentum=momentum, refresh_every=10**6)
    h.assignment.copy_(torch.tensor([3, 0, 4, 1, 2]))  # representatives are of labels, not of points
    h(randn(5, 4, seed=20), torch.arange(5))
    for step in range(4):
        before = h.representatives.detach().clone().double()
        x, y = 4 * randn(3, 4, seed=step), torch.randperm(5, generator=torch.Generator().manual_seed(step))[:3]
        h(x, y)
        want = before.clone()
        for z, label in zip(x, y.tolist(), strict=True):
            want[label] = momentum * before[label] + (1 - momentum) * direction(z)
        same(direction(h.representatives), direction(want), 1e-9)
        others = [c for c in range(5) if c not in y.tolist()]
        assert torch.equal(h.representatives[others].double(), before[others])


@pytest.mark.parametrize("momentum", [0.0, 0.7, 1.0])
def test_several_samples_of_a_class_give_the_mean_over_their_orders(momentum: float) -> None:
    """Algorithm 1 takes single samples. For a batch the head uses the mean over all orders, as its docstring says."""
    h = head(momentum=momentum, refresh_every=10**6)
    h(randn(5, 4, seed=20), torch.arange(5))
    before, x = h.representatives.clone(), randn(5, 4, seed=1)
    h(x, torch.tensor([2, 0, 2, 2, 0]))
    for label, members in ((0, [1, 4]), (2, [0, 2, 3])):
        ends = []
        for order in itertools.permutations(members):
            end = before[label]
            for i in order:
                end = momentum * end + (1 - momentum) * direction(x[i])
            ends.append(end)
        same(h.representatives[label], torch.stack(ends).mean(0), 1e-12)


def test_ignored_samples_and_evaluation_leave_representatives_alone() -> None:
    h = head(refresh_every=1).double()
    h(randn(5, 4, seed=20), torch.arange(5))
    before = {name: value.clone() for name, value in h.state_dict().items()}
    h.eval()
    h(randn(5, 4, seed=21), torch.arange(5))
    assert all(torch.equal(value, before[name]) for name, value in h.state_dict().items())
    h.train()
    h(randn(5, 4, seed=22))  # without labels nothing is learnt
    assert torch.equal(h.representatives, before["representatives"])
    h(torch.full((3, 4), math.nan).double(), torch.full((3,), -100))
    assert torch.equal(h.representatives, before["representatives"])


@given(seed=seeds, k=st.integers(2, 6))
@prop
def test_refresh_is_optimal_for_the_representatives(seed: int, k: int) -> None:
    h = nckernels.FixedPrototypeHead(F.normalize(randn(k, 3, seed=seed)), refresh_every=10**6).double()
    for step in range(3):
        h(randn(8, 3, seed=seed + step), torch.arange(8) * (step + 1) % k)
    h.refresh()
    got = reached(h.representatives, h.points, h.assignment)
    assert got == pytest.approx(best(h.representatives, h.points), abs=1e-12)
    assert h.assignment.sort().values.tolist() == list(range(k))
    same(h.prototypes, h.points[h.assignment], 0)


def test_refresh_every_n_calls_and_never_when_static() -> None:
    """Features at permuted points: the assignment changes at call n, after the loss of that call."""
    order = torch.tensor([1, 2, 3, 4, 0])
    h = head(refresh_every=3)
    start = h.assignment.clone()
    y = torch.arange(5)
    x = h.points[order]
    losses = []
    for call in range(4):
        losses.append(h(x, y).item())
        moved = not torch.equal(h.assignment, start)
        assert moved is (call >= 2), call
        assert h.reassigned == (5 if call >= 2 else 0)  # of the last refresh: all five moved
    assert torch.equal(h.assignment, order)
    assert losses[3] == pytest.approx(0, abs=1e-12)
    assert losses[0] == pytest.approx(losses[2]) != pytest.approx(0)
    static = head(assignment="static", refresh_every=1)
    start = static.assignment.clone()
    for _ in range(3):
        static(x, y)
    assert torch.equal(static.assignment, start)


def test_state_dict_round_trip() -> None:
    """A restored head continues like the original one: the same losses and the same refresh."""
    first = head(refresh_every=4).double()
    data = [(randn(10, 4, seed=s), torch.arange(10) * (s % 2 + 1) % 5) for s in range(14)]
    for x, y in data[:6]:
        first(x, y)
    second = nckernels.FixedPrototypeHead(F.normalize(randn(5, 4, seed=77)), refresh_every=4).double()
    second.load_state_dict(first.state_dict())
    for x, y in data[6:]:
        assert first(x, y).item() == second(x, y).item()
        assert torch.equal(first.assignment, second.assignment)
        assert torch.equal(first.representatives, second.representatives)
    same(first.prototypes, second.prototypes, 0)
    assert (second.calls, second.reassigned) == (first.calls, first.reassigned)
    second.load_state_dict({**first.state_dict(), "_extra_state": torch.tensor(3)})  # that of 0.2.0
    assert (second.calls, second.reassigned) == (3, 0)


def test_another_number_of_classes_is_an_error() -> None:
    with pytest.raises((ValueError, RuntimeError), match=r"size mismatch|assignment|points|classes"):
        head(k=6).load_state_dict(head(k=5).state_dict())
    h, broken = head(), head().state_dict()
    broken["assignment"] = torch.tensor([0, 1, 2, 3, 3])
    with pytest.raises((ValueError, RuntimeError), match="assignment"):
        h.load_state_dict(broken)


def test_bad_head_arguments_are_named() -> None:
    for options, argument in (
        ({"assignment": "random"}, "assignment"),
        ({"momentum": 1.5}, "momentum"),
        ({"refresh_every": 0}, "refresh_every"),
    ):
        with pytest.raises(ValueError, match=argument):
            head(**options)
    with pytest.raises(ValueError, match="prototypes"):
        nckernels.FixedPrototypeHead(torch.randn(5))
    with pytest.raises(ValueError, match="prototypes"):
        nckernels.FixedPrototypeHead(torch.full((5, 4), math.nan))


def test_gradient_reaches_features_only() -> None:
    h = head(refresh_every=1).double()
    x = randn(10, 4, seed=0).requires_grad_()
    h(x, torch.arange(10) % 5).backward()
    assert x.grad is not None
    want = torch.autograd.grad(nckernels.dot_regression_loss(x, head().double().prototypes, torch.arange(10) % 5), x)[0]
    same(x.grad, want, 1e-12)
    assert not h.representatives.requires_grad
