"""Dot regression against its printed form, its gradient in closed form, and on degenerate batches."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from conftest import Backend
from oracle import EPS, HALF, worst
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import nckernels
from nckernels import dot_regression_loss

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
M, K, D = 60, 7, 16


def problem(dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Rows with norms over two decades, prototypes, labels of which a fifth is ignored; NaN in ignored rows."""
    g = torch.Generator().manual_seed(seed)
    x, w = (torch.randn(n, D, generator=g) * 10 ** torch.rand(n, 1, generator=g) for n in (M, K))
    y = torch.randint(K, (M,), generator=g)
    y[torch.rand(M, generator=g) < 0.2] = -100
    return x.masked_fill((y == -100)[:, None], math.nan).to(dtype), w.to(dtype), y


def value_and_grads(
    function: Callable[..., Tensor], x: Tensor, w: Tensor, y: Tensor, **options: Any
) -> dict[str, Tensor]:
    x, w = (t.detach().clone().requires_grad_() for t in (x, w))
    out = function(x, w, y, **options)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out)
    grads = torch.autograd.grad(out, (x, w), upstream)
    return {"loss": out.detach(), "input": grads[0], "prototypes": grads[1]}


def printed(*args: Tensor, **options: Any) -> Tensor:
    return oracle.loss("dot_regression", *args, **options)


@dtypes
def test_errors_are_at_most_those_of_the_printed_form(cpu_backend: Backend, dtype: torch.dtype) -> None:
    """Loss and gradients; every reduction, with and without weights; also features that nearly agree with w."""
    x, w, y = problem(dtype)
    near = w[y.clamp_min(0)] * (1 + 0.01 * torch.randn(M, D, generator=torch.Generator().manual_seed(2)).to(dtype))
    class_weight = torch.rand(K, generator=torch.Generator().manual_seed(3))
    class_weight = class_weight.to(torch.float64 if dtype == torch.float64 else torch.float32)
    # In float64 the printed form is its own truth, and loses digits near the minimum.
    rounding = 1e-10 if dtype == torch.float64 else 4 * torch.finfo(torch.float32).eps
    for z, reduction, weight in itertools.product((x, near), ("none", "mean", "sum"), (None, class_weight)):
        options: dict[str, Any] = {"reduction": reduction, "weight": weight}
        got = value_and_grads(dot_regression_loss, z, w, y, **options)
        eager = value_and_grads(printed, z, w, y, eps=EPS[dtype], **options)
        wide = {**options, "weight": None if weight is None else weight.double()}
        truth = value_and_grads(printed, z.double(), w.double(), y, **wide)
        assert got["loss"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        for name, exact in truth.items():
            scale = exact.abs().amax()
            ours, theirs = (worst((v[name].double() - exact).abs() / scale) for v in (got, eager))
            stored = 0.0
            if name != "loss" and dtype in HALF:  # what the dtype can hold of a gradient, small ones included
                stored = torch.finfo(dtype).eps * (1 + torch.finfo(dtype).smallest_normal / float(scale))
            assert ours <= min(theirs, 0.1) + rounding + stored, (name, reduction, ours, theirs)


def test_gradient_in_closed_form(cpu_backend: Backend) -> None:
    """-(1 - s)(w - s u)/|x|, not the scalar that is printed as Eq. 7; and the same with both sides exchanged."""
    x, w, y = problem()
    keep = y >= 0
    got = value_and_grads(lambda *a: dot_regression_loss(*a, reduction="sum"), x[keep], w, y[keep])
    upstream = torch.randn((), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u, v = F.normalize(x[keep], dim=1), F.normalize(w, dim=1)[y[keep]]
    s = (u * v).sum(1, keepdim=True)
    torch.testing.assert_close(got["input"], -upstream * (1 - s) * (v - s * u) / x[keep].norm(dim=1, keepdim=True))
    of_own = -upstream * (1 - s) * (u - s * v) / w[y[keep]].norm(dim=1, keepdim=True)
    torch.testing.assert_close(got["prototypes"], torch.zeros_like(w).index_add(0, y[keep], of_own))


def test_first_and_second_derivatives() -> None:
    x, w, y = problem()
    x, w = x[:12].nan_to_num(1.0).requires_grad_(), w.requires_grad_()
    arguments = (x, w, torch.rand(12, dtype=torch.float64).requires_grad_())

    def function(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return dot_regression_loss(a, b, y[:12], sample_weight=c, reduction="mean")

    assert torch.autograd.gradcheck(function, arguments)
    assert torch.autograd.gradgradcheck(function, arguments)


@pytest.mark.parametrize("nearness", [-3.0, -0.3, 0.0, 0.3, 1.0, 3.0, 1000.0])
def test_accuracy_at_every_angle(nearness: float) -> None:
    """The root mean square error in float32 is at most the printed form's, from opposite features to those that agree.

    At the last, an angle of 1e-3, the printed form has no digit left, and 1 - s as half of the squared chord most.
    """
    g = torch.Generator().manual_seed(0)
    w, y = torch.randn(500, D, generator=g), torch.arange(2000) % 500
    x = torch.randn(2000, D, generator=g) + nearness * w[y]
    exact = value_and_grads(printed, x.double(), w.double(), y, reduction="none")
    got, eager = (value_and_grads(f, x, w, y, reduction="none") for f in (dot_regression_loss, printed))
    for name, value in exact.items():
        ours, theirs = (float((v[name].double() - value).norm() / value.norm()) for v in (got, eager))
        assert ours <= min(1.1 * theirs, 1e-3), (name, ours, theirs)


CUDA = pytest.param(
    "cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_gradient_of_a_large_class_adds_up_in_float32(dtype: torch.dtype, device: str) -> None:
    """4096 samples of one class: sums in 16 bits would stop growing."""
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(4096, D, generator=g).add(1.0).to(dtype), torch.randn(2, D, generator=g).to(dtype)
    y = torch.zeros(4096, dtype=torch.int64)
    got = value_and_grads(dot_regression_loss, x.to(device), w.to(device), y.to(device))["prototypes"].cpu().double()
    exact = value_and_grads(printed, x.double(), w.double(), y)["prototypes"]
    assert (got - exact).norm() <= torch.finfo(dtype).eps * exact.norm()


@dtypes
def test_rows_without_a_direction(cpu_backend: Backend, dtype: torch.dtype) -> None:
    """A zero row has cosine 0 with everything; gradients are finite. Below eps the norm counts as eps."""
    x, w = torch.zeros(3, D, dtype=dtype), torch.eye(K, D).to(dtype)
    x[1, 0] = 0.5 * EPS[dtype]
    x[2], w[1] = 1.0, 0.0
    y = torch.tensor([0, 0, 1])
    got = value_and_grads(dot_regression_loss, x, w, y, reduction="none")
    short = float(x[1, 0]) / EPS[dtype]
    assert got["loss"].tolist() == pytest.approx([0.5, 0.5 * (1 - short) ** 2, 0.5], rel=1e-6)
    assert all(g.isfinite().all() for g in got.values())


def test_degenerate_batches() -> None:
    x, w, y = problem()
    for rows in (slice(0), y == -100):
        z, labels = x[rows].requires_grad_(), y[rows]
        assert dot_regression_loss(z, w, labels).isnan()
        total = dot_regression_loss(z, w, labels, reduction="sum")
        total.backward()
        assert total == 0
        assert torch.equal(z.grad, torch.zeros_like(z))  # type: ignore[arg-type]
        assert torch.equal(dot_regression_loss(z, w, labels, reduction="none"), torch.zeros(len(z)).double())


def test_ignored_index_may_be_a_class_and_weights_divide_the_mean() -> None:
    x, w, _ = problem()
    x, y = x.nan_to_num(1.0), torch.arange(M) % K
    weight, sample_weight = torch.rand(K, dtype=torch.float64), torch.rand(M, dtype=torch.float64)
    each = dot_regression_loss(x, w, y, reduction="none")
    of = (weight[y] * sample_weight).masked_fill(y == 2, 0.0)
    got = dot_regression_loss(x, w, y, weight=weight, sample_weight=sample_weight, ignore_index=2)
    torch.testing.assert_close(got, (of * each).sum() / of.sum())
    torch.testing.assert_close(dot_regression_loss(x, w, y.to(torch.uint8)), each.mean())


class Largest(TorchDispatchMode):
    """Number of elements of the largest tensor that is created."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            self.numel = max(self.numel, t.numel() if isinstance(t, Tensor) else 0)
        return out


def test_no_matrix_of_samples_and_classes() -> None:
    x, w, y = torch.randn(512, 4, requires_grad=True), torch.randn(2048, 4), torch.randint(2048, (512,))
    with Largest() as fixed:
        dot_regression_loss(x, w, y).backward()
    assert fixed.numel <= 512 * 4
    with Largest() as learnt:
        dot_regression_loss(x, w.requires_grad_(), y).backward()
    assert learnt.numel <= 2048 * 4


def test_compiles_to_one_graph() -> None:
    x, w, y = problem(torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(dot_regression_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(value_and_grads(compiled, x, w, y), value_and_grads(dot_regression_loss, x, w, y))


def test_function_transforms_and_forward_mode() -> None:
    """torch.func, forward mode and batched gradients, as for PyTorch's own losses; also for a transposed matrix."""
    x, w, y = problem()
    x, v = x.nan_to_num(1.0).T.contiguous().T, torch.randn(M, D, dtype=torch.float64)

    def function(a: Tensor, b: Tensor) -> Tensor:
        return dot_regression_loss(a, b, y.int(), reduction="none")

    jacobian = torch.autograd.functional.jacobian(function, (x, w))[0]
    torch.testing.assert_close(torch.func.jacrev(function)(x, w), jacobian)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(function(forward_ad.make_dual(x, v), w)).tangent
    torch.testing.assert_close(tangent, (jacobian * v).sum((1, 2)))
    leaf = x.clone().requires_grad_()
    batched = torch.autograd.grad(function(leaf, w), leaf, torch.eye(M, dtype=torch.float64), is_grads_batched=True)
    torch.testing.assert_close(batched[0], jacobian)


def test_autocast_and_mixed_dtypes() -> None:
    x, w, y = problem(torch.float32)
    half = x.bfloat16()
    expected = dot_regression_loss(x, w, y), dot_regression_loss(half.float(), w, y)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(dot_regression_loss(x, w, y), expected[0])
        assert torch.equal(dot_regression_loss(half, w, y), expected[1])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"prototypes": torch.zeros(K, D + 1)}, ValueError, "same number of columns"),
        ({"prototypes": torch.zeros(0, D)}, ValueError, "K >= 1"),
        ({"prototypes": torch.zeros(K, D).double()}, TypeError, "same dtype"),
        ({"input": torch.zeros(3, 4, D)}, ValueError, "target"),
        ({"target": torch.full((3,), K)}, (ValueError, IndexError), "target"),
        ({"target": torch.tensor([0, -1, 0])}, (ValueError, IndexError), "target"),
        ({"target": torch.zeros(3)}, TypeError, "integer dtype"),
        ({"target": torch.zeros(4, dtype=torch.int64)}, ValueError, r"shape \(3,\)"),
        ({"weight": torch.ones(K + 1)}, ValueError, "weight"),
        ({"sample_weight": -torch.ones(3)}, ValueError, "negative"),
        ({"reduction": "max"}, ValueError, "reduction"),
        ({"ignore_index": 0.5}, TypeError, "ignore_index"),
        ({"process_group": "word"}, TypeError, "process_group"),
        ({"process_group": "everybody"}, TypeError, "process_group"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {"input": torch.ones(3, D), "prototypes": torch.ones(K, D), "target": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(error, match=message):
        dot_regression_loss(**{**good, **change})  # type: ignore[arg-type]


def test_module() -> None:
    """The function's numbers; fixed prototypes are a buffer in the input's dtype; without labels cosines."""
    x, w, y = problem(torch.float32)
    weight = torch.rand(K)
    options: dict[str, Any] = {"weight": weight, "reduction": "sum"}
    fixed = nckernels.DotRegressionLoss(prototypes=w, **options)
    sample_weight = torch.rand(M)
    expected = dot_regression_loss(x, w, y, sample_weight=sample_weight, **options)
    assert torch.equal(fixed(x, y, sample_weight), expected)
    assert fixed(x.bfloat16(), y).dtype == torch.float32
    assert list(fixed.parameters()) == []
    assert set(fixed.state_dict()) == {"prototypes", "weight"}
    torch.testing.assert_close(fixed(x[y >= 0]), oracle.cosine(x[y >= 0], w))
    assert repr(fixed) == "DotRegressionLoss(in_features=16, num_classes=7, reduction='sum')"
    learnt = nckernels.DotRegressionLoss(D, K)
    learnt(x, y).backward()
    assert learnt.prototypes.grad is not None
    with pytest.raises(TypeError, match="temperature"):
        nckernels.DotRegressionLoss(D, K, temperature=0.1)  # type: ignore[call-arg]
