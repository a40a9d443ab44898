"""The assignment is optimal, the head follows the paper's recursion, and its state survives copies, casts and files."""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import nckernels
from nckernels.assignment import assign

K, D = 6, 4


def points(classes: int = K, dim: int = D, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(classes, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def head(**options: Any) -> nckernels.FixedPrototypeHead:
    return nckernels.FixedPrototypeHead(points(), **options)


def batch(seed: int = 0, size: int = 20) -> tuple[Tensor, Tensor]:
    """Every class occurs."""
    g = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(size, D, generator=g), torch.randperm(size, generator=g) % K


# --- assign ------------------------------------------------------------------------------------------------


@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 2**31), st.sets(st.integers(0, 5)), st.booleans())
@settings(max_examples=60, deadline=None)
def test_assignment_has_the_largest_sum_of_cosines(
    classes: int, dim: int, seed: int, unseen: set[int], ties: bool
) -> None:
    """No permutation has a larger sum, with classes that have not been seen and with ties."""
    z, p = points(classes, dim, seed), points(classes, dim, seed + 1)
    if ties:
        z, p = z.round(), p.round()
    z[[c for c in unseen if c < classes]] = 0.0
    found = assign(z, p)
    assert found.dtype == torch.int64
    assert found.sort().values.tolist() == list(range(classes))
    s = (z.double() @ p.double().T).tolist()
    best = max(sum(s[c][a] for c, a in enumerate(order)) for order in itertools.permutations(range(classes)))
    assert sum(s[c][a] for c, a in enumerate(found.tolist())) == pytest.approx(best, abs=1e-6)
    assert torch.equal(found, assign(z, p))


def test_zero_representatives_and_autocast() -> None:
    assert assign(torch.zeros(K, D), points()).sort().values.tolist() == list(range(K))
    p = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 1e-3]]), dim=1)  # one point in bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert assign(p.flip(0), p).tolist() == [1, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matrices_of_any_finite_numbers_are_assigned(dtype: torch.dtype) -> None:
    """Also where products of the largest numbers would overflow."""
    huge = torch.finfo(dtype).max * torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=dtype)
    assert assign(huge.flip(0), huge).tolist() == [1, 0]
    assert assign(torch.finfo(dtype).tiny * huge.sign().flip(0), huge).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("z", "p", "error", "message"),
    [
        (torch.zeros(3, 2), torch.zeros(4, 2), ValueError, r"same shape .*\(3, 2\) and \(4, 2\)"),
        (torch.zeros(3), torch.zeros(3, 2), ValueError, "representatives must have shape"),
        (torch.zeros(3, 2).long(), torch.zeros(3, 2), TypeError, "representatives must be of a floating dtype"),
        (torch.full((3, 2), math.nan), torch.zeros(3, 2), ValueError, "representatives must be finite"),
        (torch.zeros(3, 2), torch.full((3, 2), math.inf), ValueError, "points must be finite"),
    ],
)
def test_bad_matrices(z: Tensor, p: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        assign(z, p)


def test_scipy_is_not_imported_before_it_is_needed() -> None:
    code = (
        "import sys, torch, nckernels; assert 'scipy' not in sys.modules\n"
        "sys.modules['scipy.optimize'] = None\n"
        "nckernels.FixedPrototypeHead(torch.eye(2), assignment='static')\n"
        "nckernels.FixedPrototypeHead(torch.eye(2))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert 'ImportError: the assignment needs scipy: pip install "nckernels[lab]"' in done.stderr


# --- what the head computes --------------------------------------------------------------------------------


def test_a_static_head_is_dot_regression_and_never_reassigns() -> None:
    """ETF+DR."""
    w = nckernels.geometry.simplex_etf(K, K, generator=torch.Generator().manual_seed(0))
    static = nckernels.FixedPrototypeHead(5 * w, assignment="static", refresh_every=1)
    x, y = torch.randn(9, K, requires_grad=True), torch.arange(9) % K
    before = {n: v.clone() for n, v in static.state_dict().items()}
    loss = static(x, y)
    torch.testing.assert_close(loss, nckernels.dot_regression_loss(x, w, y))
    torch.testing.assert_close(torch.autograd.grad(loss, x), torch.autograd.grad(static.loss(x, y), x))
    assert all(torch.equal(v, before[n]) for n, v in static.state_dict().items())
    assert list(static.parameters()) == []
    torch.testing.assert_close(static.points, w)
    with pytest.raises(RuntimeError, match="static"):
        static.refresh()


def test_one_refresh_finds_the_permutation_of_clusters() -> None:
    """Features at permuted points: the third call already has the least loss, 0, and correct predictions."""
    dynamic, order = head(refresh_every=2, momentum=0.5), torch.tensor([3, 0, 5, 1, 2, 4])
    y = torch.arange(K).repeat(3)
    x = 7 * points()[order][y]
    losses = [float(dynamic(x, y)) for _ in range(3)]
    assert losses[0] == losses[1] > 0.1  # that of the identity, also in the call that ends with the refresh
    assert losses[2] < 1e-12
    assert torch.equal(dynamic.assignment, order)
    torch.testing.assert_close(dynamic.prototypes, points()[order])
    cosines = dynamic(x.reshape(3, K, D))
    torch.testing.assert_close(cosines, F.normalize(x, dim=1).reshape(3, K, D) @ points()[order].T)
    assert torch.equal(cosines.argmax(-1).flatten(), y)


@pytest.mark.parametrize("momentum", [0.0, 0.7, 1.0])
def test_the_mean_of_the_recursion_over_all_orders(momentum: float) -> None:
    """Two batches with one to four samples of a class, against the paper's update, sample by sample."""
    dynamic = head(momentum=momentum, refresh_every=10)
    expected = torch.zeros(K, D, dtype=torch.float64)
    for seed, labels in enumerate(([0, 0, 0, 0, 1, 2, 2, 5], [0, 0, 2, 5, 5, 5])):
        x = batch(seed, len(labels))[0]
        y = torch.tensor(labels)
        dynamic(x, y)
        u = F.normalize(x.double(), dim=1)
        for c in set(labels):
            ends = []
            for order in itertools.permutations(u[y == c]):
                z = expected[c]
                for row in order:
                    z = momentum * z + (1 - momentum) * row
                ends.append(z)
            expected[c] = torch.stack(ends).mean(0)
        torch.testing.assert_close(dynamic.representatives.double(), expected, rtol=1e-5, atol=1e-7)


def test_refreshes_every_n_calls_in_training_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only training calls count, not evaluation, prediction or a manual refresh."""
    dynamic = head(refresh_every=3)
    refreshed: list[int] = []
    monkeypatch.setattr(dynamic, "refresh", lambda: refreshed.append(dynamic.calls))
    x, y = batch()
    for _ in range(7):
        dynamic.train()(x, y)
        before = {n: v.clone() for n, v in dynamic.state_dict().items()}
        dynamic(x)
        dynamic.eval()(x, y)
        assert all(torch.equal(v, before[n]) for n, v in dynamic.state_dict().items())
    assert refreshed == [3, 6]
    assert dynamic.calls == 7


def test_ignored_and_non_finite_samples_move_no_representative() -> None:
    """Ignored samples, whatever they hold, and samples whose features are zero, NaN or infinite; empty batches."""
    x, y = batch()
    dynamic, clean = (head(ignore_index=1) for _ in range(2))
    bad = torch.zeros(4, D)
    bad[1], bad[2, 0], bad[3] = math.nan, math.inf, math.nan
    clean(x[y != 1], y[y != 1])
    loss = dynamic(torch.cat([x, bad]), torch.cat([y, torch.tensor([0, 2, 3, 1])]))
    assert loss.isnan()  # the loss says so
    torch.testing.assert_close(dynamic.representatives, clean.representatives)
    assert torch.equal(dynamic.representatives[1], torch.zeros(D))
    before = dynamic.representatives.clone()
    assert dynamic(x[:0], y[:0]).isnan()
    assert torch.equal(dynamic.representatives, before)


def test_reductions_and_ignored_class_zero() -> None:
    """The assignment may give a point whose row is ignore_index: only the label is compared with it."""
    x, y = batch()
    each = head(reduction="none", ignore_index=0, assignment="static")
    each.assignment.copy_(torch.tensor([1, 0, 2, 3, 4, 5]))
    found = each(x, y)
    assert torch.equal(found == 0, y == 0)
    torch.testing.assert_close(
        found, nckernels.dot_regression_loss(x, each.prototypes, y, ignore_index=0, reduction="none")
    )


# --- what models go through --------------------------------------------------------------------------------


def trained(calls: int = 3, **options: Any) -> nckernels.FixedPrototypeHead:
    dynamic = head(refresh_every=2, **options)
    for seed in range(calls):
        dynamic(*batch(seed))
    return dynamic


def same(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(v, theirs[n]) for n, v in ours.items())


def test_training_resumes_from_a_state_dict() -> None:
    """After the third of refreshes every two calls; through a file."""
    first = nn.ModuleDict({"head": trained()})
    assert not torch.equal(first["head"].assignment, torch.arange(K))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = nn.ModuleDict({"head": nckernels.FixedPrototypeHead(points(seed=9), refresh_every=2)})
    second.load_state_dict(torch.load(file))
    for seed in (3, 4, 5):
        assert torch.equal(first["head"](*batch(seed)), second["head"](*batch(seed)))
        assert same(first, second)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("assignment", torch.tensor([0, 1, 2, 3, 4, 4]), r"head.assignment must be a permutation of 0 to 5"),
        ("assignment", torch.tensor([1, 2, 3, 4, 5, 6]), "permutation"),
        ("assignment", torch.arange(6.0), "permutation"),
        ("assignment", torch.arange(7), "size mismatch for head.assignment"),
        ("points", torch.zeros(6, 5), "size mismatch for head.points"),
        ("representatives", torch.zeros(5, 4), "size mismatch for head.representatives"),
    ],
)
def test_state_dicts_that_do_not_fit_are_errors(name: str, value: Tensor, message: str) -> None:
    model = nn.ModuleDict({"head": head()})
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict({**nn.ModuleDict({"head": trained()}).state_dict(), f"head.{name}": value})
    assert model["head"].assignment.tolist() == list(range(K)) or name != "assignment"


def test_copies_are_independent_and_alike() -> None:
    dynamic = trained(process_group=None)
    for copied in (copy.deepcopy(dynamic), pickle.loads(pickle.dumps(dynamic))):
        assert same(copied, dynamic)
        assert repr(copied) == repr(dynamic)
        copied(*batch(8))
        assert not same(copied, dynamic)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_casts_keep_points_and_averages_in_float32_or_wider(dtype: torch.dtype) -> None:
    dynamic = trained().to(dtype).eval()
    wide = torch.promote_types(dtype, torch.float32)
    assert dynamic.points.dtype == dynamic.representatives.dtype == wide
    assert torch.equal(dynamic.points.float(), head().points)
    x, y = batch()
    x = x.to(dtype).requires_grad_()
    cosines, loss = dynamic(x), dynamic(x, y)
    assert (cosines.dtype, loss.dtype) == (dtype, wide)
    loss.backward()
    exact = nckernels.dot_regression_loss(x.double(), dynamic.prototypes.double(), y)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
    zero = torch.zeros(1, D, dtype=dtype, requires_grad=True)
    dynamic(zero, y[:1]).backward()
    assert zero.grad is not None
    assert zero.grad.isfinite().all()


def test_points_of_any_scale_become_unit_rows() -> None:
    scales = torch.tensor([1e-30, 1e-14, 1.0, 1e10, 1e30, 1e38]) / points().abs().amax(1)
    torch.testing.assert_close(nckernels.FixedPrototypeHead(points() * scales[:, None]).points, points())
    assert nckernels.FixedPrototypeHead(points().half()).points.dtype == torch.float32
    learnt = nn.Parameter(points())
    assert not nckernels.FixedPrototypeHead(learnt).points.requires_grad


def test_compiled_head_equals_eager() -> None:
    """One graph for cosines, in eval mode and for a static head; in training the same state, refreshes included."""
    torch._dynamo.reset()
    x, y = batch()
    for module, args in ((trained(), (x,)), (trained().eval(), (x, y)), (head(assignment="static"), (x, y))):
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*args), module(*args))
    eager, other = head(refresh_every=2), head(refresh_every=2)
    compiled = torch.compile(other, backend="aot_eager")
    frames = []
    for seed in range(9):
        torch.testing.assert_close(compiled(*batch(seed)), eager(*batch(seed)))
        frames.append(torch._dynamo.utils.counters["frames"]["ok"])
    assert frames[-1] == frames[0]  # counting does not compile anew
    torch.testing.assert_close(other.state_dict(), eager.state_dict())


def test_two_calls_before_one_backward() -> None:
    """The second call, which refreshes, does not change tensors that the first one saved for its backward pass."""
    dynamic, (x, y) = head(refresh_every=1), batch()
    x.requires_grad_()
    (dynamic(x, y) + dynamic(x).sum() + dynamic(x, y)).backward()
    assert x.grad is not None


# --- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prototypes", "options", "error", "message"),
    [
        (torch.ones(3), {}, ValueError, r"prototypes must have shape \(K, d\)"),
        (torch.ones(0, 3), {}, ValueError, "K >= 1"),
        (torch.ones(3, 0), {}, ValueError, "d >= 1"),
        (torch.tensor([[1.0], [0.0]]), {}, ValueError, r"not zero, got \[0.0\] in row 1"),
        (torch.tensor([[math.nan], [1.0]]), {}, ValueError, r"finite .* in row 0"),
        (torch.ones(2, 2).long(), {}, TypeError, "floating dtype"),
        ([[1.0]], {}, TypeError, "prototypes must be a torch.Tensor"),
        (torch.eye(2), {"assignment": "hungarian"}, ValueError, "'dynamic', 'static'"),
        (torch.eye(2), {"momentum": 1.1}, ValueError, "momentum must be between 0 and 1"),
        (torch.eye(2), {"momentum": -0.1}, ValueError, "momentum"),
        (torch.eye(2), {"momentum": math.nan}, ValueError, "momentum"),
        (torch.eye(2), {"refresh_every": 0}, ValueError, "refresh_every must be at least 1, got 0"),
        (torch.eye(2), {"refresh_every": 1.5}, TypeError, "refresh_every"),
        (torch.eye(2), {"ignore_index": None}, TypeError, "ignore_index"),
        (torch.eye(2), {"reduction": "max"}, ValueError, "reduction"),
        (torch.eye(2), {"process_group": "word"}, TypeError, "process_group"),
    ],
)
def test_bad_options(prototypes: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        nckernels.FixedPrototypeHead(prototypes, **options)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((torch.ones(2, D + 1), torch.zeros(2, dtype=torch.int64)), ValueError, r"d=4 columns.*\(2, 5\)"),
        ((torch.ones(2, D + 1),), ValueError, r"d=4 columns"),
        ((torch.ones(2, 1, D), torch.zeros(2, dtype=torch.int64)), ValueError, r"target must have shape \(2, 1\)"),
        ((torch.ones(2, D), torch.tensor([0, K])), (ValueError, IndexError), "target"),
        ((torch.ones(2, D), torch.tensor([0, -1])), (ValueError, IndexError), "target"),
        ((torch.ones(2, D), torch.zeros(2)), TypeError, "integer dtype"),
        ((torch.ones(2, D), torch.zeros(3, dtype=torch.int64)), ValueError, r"shape \(2,\)"),
        ((torch.ones(2, D).long(), torch.zeros(2, dtype=torch.int64)), TypeError, "floating dtype"),
        ((torch.ones(2, D, device="meta"), torch.zeros(2, dtype=torch.int64, device="meta")), ValueError, "device"),
        (([[1.0] * D],), TypeError, "input must be a torch.Tensor"),
    ],
)
def test_bad_batches_change_nothing(args: Any, error: type[Exception], message: str) -> None:
    dynamic = trained()
    before = copy.deepcopy(dynamic)
    with pytest.raises(error, match=message):
        dynamic(*args)
    with pytest.raises(TypeError, match="target"):
        dynamic.loss(torch.ones(2, D), None)  # type: ignore[arg-type]
    assert same(dynamic, before)
