"""Autograd: gradcheck, repeated and double backward, purity, partial gradients, torch.func."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import SINGLE_BACKWARD, Backend
from oracle import DIRECTIONS, EXCLUDES, LOSSES, dense, loss, make_problem, package, package_loss, run
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import nckernels

TINY_WORKSPACE = 4096  # bytes: several tiles even for problems that gradcheck can afford

directions = pytest.mark.parametrize("direction", DIRECTIONS)
excludes = pytest.mark.parametrize("exclude", EXCLUDES)
losses = pytest.mark.parametrize("name", LOSSES)


def scalar_inputs(
    direction: str, exclude: str, size: tuple[int, int, int] = (6, 4, 3)
) -> tuple[Callable[..., Any], list[Tensor]]:
    """The primitive as a function of its differentiable inputs, finite outputs only, and those inputs."""
    p = make_problem(*size, direction=direction, exclude=exclude, bias=True, beta=3.0, ignored=0.2, seed=3)
    names = list(p.inputs())

    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        outputs = package(p, dict(zip(names, leaves, strict=True)))
        # -inf of an empty set has no numerical derivative.
        return tuple(out[out.detach() > -torch.inf] for out in outputs.values())

    return function, [t.clone().requires_grad_() for t in p.inputs().values()]


@excludes
@directions
def test_gradcheck_of_the_primitive(cpu_backend: Backend, direction: str, exclude: str) -> None:
    with nckernels.use_workspace(TINY_WORKSPACE):
        assert gradcheck(*scalar_inputs(direction, exclude))


@pytest.mark.parametrize("exclude", ["none", "target"])
def test_gradcheck_over_many_tiles(cpu_backend: Backend, exclude: str) -> None:
    with nckernels.use_workspace(TINY_WORKSPACE):
        assert gradcheck(*scalar_inputs("both", exclude, (61, 37, 2)), fast_mode=True)


def loss_inputs(name: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(7, 5, generator=g, dtype=torch.float64, requires_grad=True)
    w = torch.randn(4, 5, generator=g, dtype=torch.float64, requires_grad=True)
    return (
        x,
        w,
        torch.tensor([0, 1, 2, -100, 2, 0, 1]),
        torch.tensor(0.4, dtype=torch.float64, requires_grad=True),
    )


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("nonl", {}),
        ("nonl", {"direction": "instance"}),
        ("nonl", {"direction": "both"}),
        ("ntce", {}),
        ("normface", {"label_smoothing": 0.2}),
        ("normface", {"angular_margin": 0.3, "cosine_margin": 0.1}),
    ],
    ids=str,
)
def test_gradcheck_of_the_losses(cpu_backend: Backend, name: str, options: dict[str, Any], reduction: str) -> None:
    x, w, y, temperature = loss_inputs(name)
    weight = torch.tensor([0.5, 2.0, 1.0, 0.3], dtype=torch.float64)

    def function(x: Tensor, w: Tensor, temperature: Tensor) -> Tensor:
        return package_loss(name)(x, w, y, temperature=temperature, weight=weight, reduction=reduction, **options)

    assert gradcheck(function, (x, w, temperature))


# --------------------------------------------------------------------------------------------------
# more than one backward


@directions
def test_backward_twice_over_a_retained_graph(backend: Backend, small_workspace: None, direction: str) -> None:
    p = make_problem(150, 90, 9, direction=direction, exclude="target", bias=True).to(torch.float32, backend.device)
    leaves = {name: t.clone().requires_grad_() for name, t in p.inputs().items()}
    outputs = package(p, leaves)
    upstream = [p.upstream[name] for name in outputs]

    def grads(factor: float) -> tuple[Tensor, ...]:
        scaled = [factor * g for g in upstream]
        return torch.autograd.grad(list(outputs.values()), list(leaves.values()), scaled, retain_graph=True)

    first, doubled, again = grads(1.0), grads(2.0), grads(1.0)
    for name, a, b, c in zip(leaves, first, doubled, again, strict=True):
        assert torch.equal(a, c), f"{name}: the second backward differs"
        # Doubling is exact but for sums in another order.
        torch.testing.assert_close(2 * a, b, rtol=1e-6, atol=1e-6 * float(b.abs().max()))


@losses
def test_backward_frees_the_graph(backend: Backend, name: str) -> None:
    """Without retain_graph a second backward is PyTorch's usual error, not a wrong gradient."""
    x = torch.randn(6, 4, device=backend.device, requires_grad=True)
    w = torch.randn(3, 4, device=backend.device, requires_grad=True)
    value = package_loss(name)(x, w, torch.arange(6, device=backend.device) % 3)
    value.backward()
    with pytest.raises(RuntimeError, match=r"backward through the graph a second time|already been freed"):
        value.backward()


@losses
def test_gradients_accumulate(backend: Backend, name: str) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(6, 4, generator=g).to(backend.device).requires_grad_()
    w = torch.randn(3, 4, generator=g).to(backend.device).requires_grad_()
    y = torch.arange(6, device=backend.device) % 3
    package_loss(name)(x, w, y).backward()
    assert x.grad is not None
    assert w.grad is not None
    once = x.grad.clone(), w.grad.clone()
    package_loss(name)(x, w, y).backward()
    for leaf, first in zip((x, w), once, strict=True):
        torch.testing.assert_close(leaf.grad, 2 * first, rtol=1e-6, atol=1e-7)


@excludes
@directions
def test_double_backward_on_the_reference(direction: str, exclude: str) -> None:
    with nckernels.use_backend("reference"):
        assert gradgradcheck(*scalar_inputs(direction, exclude, (4, 3, 3)))


@losses
def test_double_backward_of_the_losses_on_the_reference(name: str) -> None:
    x, w, y, temperature = loss_inputs(name)
    with nckernels.use_backend("reference"):
        assert gradgradcheck(
            lambda x, w, temperature: package_loss(name)(x, w, y, temperature=temperature),
            (x, w, temperature),
        )


def penalise(value: Tensor, x: Tensor) -> None:
    """A gradient penalty."""
    (grad,) = torch.autograd.grad(value, x, create_graph=True)
    grad.pow(2).sum().backward()


@pytest.mark.parametrize("name", ["cosine_lse", *LOSSES])
def test_double_backward_elsewhere_is_a_clear_error(backend: Backend, name: str) -> None:
    """A gradient penalty must not silently get zeros: the message says what does support it."""
    if backend.name not in SINGLE_BACKWARD:
        pytest.skip("this backend supports double backward")
    x = torch.randn(6, 4, device=backend.device, requires_grad=True)
    w = torch.randn(3, 4, device=backend.device, requires_grad=True)
    y = torch.arange(6, device=backend.device) % 3
    value = nckernels.cosine_lse(x, w, y, 3.0)[0].sum() if name == "cosine_lse" else package_loss(name)(x, w, y)
    with pytest.raises(NotImplementedError, match="reference"):
        penalise(value, x)


# --------------------------------------------------------------------------------------------------
# purity


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@excludes
@directions
def test_inputs_are_not_written_to(
    backend: Backend, small_workspace: None, direction: str, exclude: str, dtype: torch.dtype
) -> None:
    p = make_problem(150, 90, 9, direction=direction, exclude=exclude, bias=True).to(dtype, backend.device)
    leaves = {name: t.clone().requires_grad_() for name, t in p.inputs().items()}
    upstream = {name: g.clone() for name, g in p.upstream.items()}
    tensors = {**leaves, "target": p.target, **{f"upstream {name}": g for name, g in upstream.items()}}
    before = {name: (t.detach().clone(), t._version) for name, t in tensors.items()}
    outputs = package(p, leaves)
    values = {name: out.detach().clone() for name, out in outputs.items()}
    torch.autograd.grad(list(outputs.values()), list(leaves.values()), [upstream[n] for n in outputs])
    for name, t in tensors.items():
        assert torch.equal(t, before[name][0]), f"{name} was written to"
        assert t._version == before[name][1], f"{name} was written to"
    for name, out in outputs.items():
        assert torch.equal(out, values[name]), f"backward wrote to its own output {name}"


def attempt(call: Callable[[], Any]) -> tuple[Any, str]:
    """What call returns, or None and why it refused."""
    try:
        return call(), ""
    except RuntimeError as error:  # NotImplementedError is one
        return None, str(error)


def right_or_inplace_error(
    outputs: dict[str, Tensor], leaf: Tensor, upstream: dict[str, Tensor], truth: Tensor
) -> None:
    """Autograd objects to the write, or the gradient is that of the values before it."""
    got, message = attempt(
        lambda: torch.autograd.grad(list(outputs.values()), leaf, [upstream[name] for name in outputs])
    )
    if got is None:
        assert "modified by an inplace operation" in message
    else:
        assert torch.equal(got[0], truth)


@pytest.mark.parametrize("written", ["features", "prototypes", "target", "class"])
@pytest.mark.parametrize("leaf", ["features", "prototypes"])
def test_writing_between_forward_and_backward(backend: Backend, leaf: str, written: str) -> None:
    """What backward needs must not be the user's to change unnoticed, be it an input or an output."""
    p = make_problem(20, 6, 5, ignored=0.0).to(torch.float32, backend.device)
    truth = run(package, p, (leaf,))[1][leaf]
    leaves = {name: t.clone().requires_grad_(name == leaf) for name, t in p.inputs().items()}
    outputs = package(p, leaves)
    with torch.no_grad():
        if written == "target":
            p.target.copy_((p.target + 1) % 6)
        else:
            (outputs | leaves)[written].add_(1.0)
    assert truth is not None
    right_or_inplace_error(outputs, leaves[leaf], p.upstream, truth)


# --------------------------------------------------------------------------------------------------
# part of the gradients


@pytest.mark.parametrize("frozen", ["features", "prototypes"])
@losses
def test_frozen_inputs_leave_the_other_gradient(
    backend: Backend, small_workspace: None, name: str, frozen: str
) -> None:
    g = torch.Generator().manual_seed(0)
    x, w = (
        torch.randn(90, 8, generator=g).to(backend.device),
        torch.randn(70, 8, generator=g).to(backend.device),
    )
    y = torch.randint(70, (90,), generator=g).to(backend.device)
    both = torch.autograd.grad(package_loss(name)(x.requires_grad_(), w.requires_grad_(), y), (x, w))
    x, w = x.detach(), w.detach()
    leaf, expected = (w, both[1]) if frozen == "features" else (x, both[0])
    leaf.requires_grad_()
    (got,) = torch.autograd.grad(package_loss(name)(x, w, y), leaf)
    # The same sums; a backend may order them differently when it has less to do.
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


@losses
def test_only_the_temperature_learns(backend: Backend, name: str) -> None:
    g = torch.Generator().manual_seed(0)
    x, w = (
        torch.randn(30, 8, generator=g).to(backend.device),
        torch.randn(7, 8, generator=g).to(backend.device),
    )
    y = torch.randint(7, (30,), generator=g).to(backend.device)
    temperature = torch.tensor(0.3, device=backend.device, requires_grad=True)
    (got,) = torch.autograd.grad(package_loss(name)(x, w, y, temperature=temperature), temperature)
    exact = torch.tensor(0.3, requires_grad=True)
    truth = loss(name, x.cpu().double(), w.cpu().double(), y.cpu(), temperature=exact.double())
    (expected,) = torch.autograd.grad(truth, exact)
    # Float32 means of similarities, times beta^2 = 11.
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-5, atol=1e-5)


@losses
def test_no_graph_without_gradients(backend: Backend, name: str) -> None:
    x, w = torch.randn(6, 4, device=backend.device), torch.randn(3, 4, device=backend.device)
    y = torch.arange(6, device=backend.device) % 3
    assert package_loss(name)(x, w, y).grad_fn is None
    with torch.no_grad():
        assert not package_loss(name)(x.requires_grad_(), w, y).requires_grad
    with torch.inference_mode():
        assert not package_loss(name)(x, w.requires_grad_(), y).requires_grad


@losses
def test_features_used_twice(backend: Backend, name: str) -> None:
    """The same tensor as features and prototypes gets the sum of both gradients."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(8, 5, generator=g)
    y = torch.arange(8)
    shared, left, right = (x.clone().to(backend.device).requires_grad_() for _ in range(3))
    (got,) = torch.autograd.grad(package_loss(name)(shared, shared, y.to(backend.device)), shared)
    a, b = torch.autograd.grad(package_loss(name)(left, right, y.to(backend.device)), (left, right))
    torch.testing.assert_close(got, a + b, rtol=0, atol=1e-6)


# --------------------------------------------------------------------------------------------------
# torch.func


@losses
def test_func_grad(cpu_backend: Backend, name: str) -> None:
    """Works, or says clearly that it does not; never a silently wrong value."""
    x, w, y, _temperature = loss_inputs(name)
    x, w = x.detach(), w.detach()

    def function(x: Tensor, w: Tensor) -> Tensor:
        return package_loss(name)(x, w, y, temperature=0.4)

    leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
    expected = torch.autograd.grad(function(*leaves), leaves)
    got, message = attempt(lambda: torch.func.grad(function, argnums=(0, 1))(x, w))
    if got is None:
        assert any(word in message for word in ("functorch", "torch.func", "vmap", "not support")), message
    else:
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_vmap_is_right_or_refused(cpu_backend: Backend) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 6, 4, generator=g, dtype=torch.float64)
    w = torch.randn(5, 4, generator=g, dtype=torch.float64)
    y = torch.randint(5, (6,), generator=g)
    expected = torch.stack([nckernels.nonl_loss(batch, w, y) for batch in x])
    got, message = attempt(lambda: torch.vmap(lambda batch: nckernels.nonl_loss(batch, w, y))(x))
    if got is None:
        assert any(word in message for word in ("torch.func", "vmap")), message
    else:
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_forward_mode_is_right_or_refused(cpu_backend: Backend, reduction: str) -> None:
    """Tangents are never dropped."""
    x, w, y, _temperature = loss_inputs("nonl")
    direction = torch.randn_like(x)

    def value(x: Tensor) -> Tensor:
        return nckernels.nonl_loss(x, w.detach(), y, reduction=reduction).sum()

    def tangent() -> Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(value(forward_ad.make_dual(x.detach(), direction))).tangent

    (grad,) = torch.autograd.grad(value(x), x)
    got, message = attempt(tangent)
    if got is None:
        assert "forward-mode" in message
        assert "use_backend('reference')" in message
    else:
        torch.testing.assert_close(got, (grad * direction).sum(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_batched_gradients_are_right_or_refused(cpu_backend: Backend, reduction: str) -> None:
    x, w, y, _temperature = loss_inputs("nonl")
    value = nckernels.nonl_loss(x, w, y, reduction=reduction)
    upstream = torch.randn(3, *value.shape, dtype=value.dtype)
    expected = [torch.autograd.grad(value, (x, w), one, retain_graph=True) for one in upstream]
    got, message = attempt(lambda: torch.autograd.grad(value, (x, w), upstream, is_grads_batched=True))
    if got is None:
        assert "batch of gradients" in message
        assert "use_backend('reference')" in message
    else:
        for a, *b in zip(got, *expected, strict=True):
            torch.testing.assert_close(a, torch.stack(b), rtol=1e-12, atol=1e-14)


def test_dense_oracle_passes_gradcheck_itself() -> None:
    """Guards the oracle the other files trust for gradients."""
    p = make_problem(5, 4, 3, direction="both", exclude="target", bias=True, beta=3.0)
    names = list(p.inputs())
    leaves = [t.clone().requires_grad_() for t in p.inputs().values()]
    assert gradcheck(lambda *ts: tuple(dense(p, dict(zip(names, ts, strict=True)), 1e-12).values()), leaves)
