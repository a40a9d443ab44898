"""The losses without prototypes inside PyTorch: upstream gradients, double backward, autocast, torch.compile."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import ALL_PAIRS, SINGLE_BACKWARD, Backend
from contrastive_cases import CASES, REDUCED, SHORT, TEMPERED, build, make_case
from oracle import worst
from oracle_contrastive import NAIVE, Case, package, upstream_of, value_and_grads
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import nckernels

# --------------------------------------------------------------------------------------------------
# gradients


@pytest.mark.parametrize("case", SHORT)
def test_per_sample_upstream_gradients_are_used_one_by_one(backend: Backend, case: str) -> None:
    """The gradient of sample i's loss is what upstream e_i gives: nothing is averaged."""
    if case == "uniformity":
        pytest.skip("a scalar")
    c = build(case, 9, 4, keys=6, reduction="none").to(torch.float32, backend.device)
    c64 = c.to(torch.float64)
    for i in range(9):
        grads = []
        for one, function in ((c, package(c.name)), (c64, NAIVE[c.name])):
            x = one.inputs[0].clone().requires_grad_()
            leaves = (x, *one.inputs[1:], *(() if one.temperature is None else (one.temperature,)))
            sample = one.call(function, *leaves)[i].sum()
            grads.append(torch.autograd.grad(sample, x)[0].cpu().double() * c64.inputs[0].norm(dim=-1)[..., None].cpu())
        # Float32 weights of logits of size 5.
        torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("case", ["info_nce", "clip", "alignment"])
def test_one_frozen_operand(backend: Backend, small_workspace: None, case: str, which: int) -> None:
    """The gradient of one input does not depend on whether the other asks for its own."""
    c = build(case, 150).to(torch.float32, backend.device)
    expected = value_and_grads(c, package(c.name))[f"input {which}"]
    inputs = [x.clone().requires_grad_(i == which) for i, x in enumerate(c.inputs)]
    out = c.call(package(c.name), *inputs, *(() if c.temperature is None else (c.temperature,)))
    (got,) = torch.autograd.grad(out, inputs[which], upstream_of(out))
    torch.testing.assert_close(got, expected, rtol=0, atol=4e-6 * float(expected.abs().max()))
    assert not c.call(package(c.name)).requires_grad  # and with all frozen there is no graph


@pytest.mark.parametrize("case", ["info_nce-no-target", "clip", "clip-decoupled", "alignment-3"])
def test_the_same_tensor_as_both_operands(backend: Backend, case: str) -> None:
    """Its gradient is the sum of those in the two places."""
    c = build(case, reduction="none").to(torch.float32, backend.device)
    x = c.inputs[0]
    pair = dataclasses.replace(c, inputs=(x, x.clone()))
    both = value_and_grads(pair, package(c.name))
    leaf = x.clone().requires_grad_()
    out = c.call(package(c.name), leaf, leaf, *(() if c.temperature is None else (c.temperature,)))
    (grad,) = torch.autograd.grad(out, leaf, upstream_of(out))
    torch.testing.assert_close(out.detach(), both["loss"], rtol=1e-5, atol=1e-5)
    total = both["input 0"] + both["input 1"]
    torch.testing.assert_close(grad, total, rtol=0, atol=1e-5 * float(total.abs().max() + 1))


@pytest.mark.parametrize("case", SHORT)
def test_inputs_are_not_written_to(backend: Backend, case: str) -> None:
    c = build(case, weight=case in TEMPERED).to(torch.float32, backend.device)
    tensors = [t for t in (*c.inputs, c.target, c.weight, c.temperature) if t is not None]
    before = [(t.clone(), t._version) for t in tensors]
    value_and_grads(c, package(c.name))
    for t, (value, version) in zip(tensors, before, strict=True):
        assert torch.equal(t, value)
        assert t._version == version


@pytest.mark.parametrize("case", [c for c in CASES if c != "alignment-1"])
def test_gradcheck(cpu_backend: Backend, case: str) -> None:
    """Finite differences, the temperature included."""
    c = build(case, 6, 3, keys=4, weight=case in TEMPERED, temperature=0.5)
    if case in REDUCED:
        c = c.with_options(reduction="none")
    # Rows of norm one: finite differences of rows of norm 0.1 are too coarse.
    leaves = [F.normalize(x, dim=-1).requires_grad_() for x in c.inputs]
    if c.temperature is not None:
        leaves.append(c.temperature.clone().requires_grad_())

    def function(*leaves: Tensor) -> Tensor:
        return c.call(package(c.name), *leaves)

    with nckernels.use_workspace(4096):
        assert gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("case", [c for c in CASES if c != "alignment-1"])
def test_double_backward_under_the_reference(case: str) -> None:
    """Second derivatives equal those of the dense form, and finite differences."""
    c = build(case, 6, 3, keys=4, weight=case in TEMPERED, temperature=0.5)
    penalties = []
    with nckernels.use_backend("reference"):
        for function in (package(c.name), NAIVE[c.name]):
            leaves = [x.clone().requires_grad_() for x in c.inputs]
            if c.temperature is not None:
                leaves.append(c.temperature.clone().requires_grad_())
            first = torch.autograd.grad(c.call(function, *leaves), leaves, create_graph=True)
            penalties.append(torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves))
        for got, expected in zip(*penalties, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
        unit_rows = [F.normalize(x, dim=-1).requires_grad_() for x in c.inputs]
        rest = () if c.temperature is None else (c.temperature,)
        assert gradgradcheck(lambda *x: c.call(package(c.name), *x, *rest), unit_rows, fast_mode=True)


@pytest.mark.parametrize("case", ["supcon", "prototype", "info_nce", "clip", "uniformity"])
def test_double_backward_elsewhere_is_right_or_a_clear_error(backend: Backend, case: str) -> None:
    """A gradient penalty must not silently get zeros."""
    if backend.name not in SINGLE_BACKWARD:
        pytest.skip("this backend supports double backward")
    c = build(case, 6, 3, keys=4).to(torch.float32, backend.device)
    x = c.inputs[0].clone().requires_grad_()
    leaves = (x, *c.inputs[1:], *(() if c.temperature is None else (c.temperature,)))
    (grad,) = torch.autograd.grad(c.call(package(c.name), *leaves), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="reference"):
        grad.pow(2).sum().backward()


# --------------------------------------------------------------------------------------------------
# autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", SHORT)
def test_autocast(backend: Backend, case: str, dtype: torch.dtype) -> None:
    """Half features from a layer under autocast: a float32 loss and float32 parameter gradients.

    The error against float64 is at most that of the dense form under the same autocast, plus 2 roundings.
    """
    c = build(case, 40, 12).to(torch.float32, backend.device)
    layer = nn.Linear(12, 8)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(8, 12, generator=torch.Generator().manual_seed(1)))
    layer.to(backend.device)
    rest = () if c.temperature is None else (c.temperature,)

    def run(function: Callable[..., Tensor], enabled: bool, c: Case = c) -> tuple[Tensor, Tensor]:
        with torch.autocast(backend.device, dtype, enabled=enabled):
            z = [layer(F.normalize(x, dim=-1)) for x in c.inputs]
            assert not enabled or z[0].dtype == dtype
            value = c.call(function, *z, *rest)
        return value.detach(), *torch.autograd.grad(value, layer.weight)

    got, eager = run(package(c.name), True), run(NAIVE[c.name], True)
    layer.double()
    rest = tuple(t.double() for t in rest)
    truth = run(NAIVE[c.name], False, c.to(torch.float64))
    for what, value, rival, reference in zip(("loss", "weight"), got, eager, truth, strict=True):
        assert value.dtype == torch.float32, what
        scale = reference.abs().max()
        error = worst((value.double() - reference).abs() / scale)
        eager_error = worst((rival.double() - reference).abs() / scale)
        assert error <= eager_error + 2 * torch.finfo(dtype).eps, f"{what}: {error:.3g}, eager {eager_error:.3g}"


@pytest.mark.parametrize("name", ["info_nce", "clip"])
def test_autocast_takes_mixed_dtypes(backend: Backend, name: str) -> None:
    """Half queries against float32 keys, as nonl_loss takes half features and float32 prototypes."""
    c = make_case(name, 20, 6, target=False)
    a, b = (x.to(backend.device, torch.float32) for x in c.inputs)
    with pytest.raises((TypeError, ValueError), match=r"bfloat16.*float32|float32.*bfloat16"):
        package(name)(a.bfloat16(), b)
    leaf = b.requires_grad_()
    with torch.autocast(backend.device, torch.bfloat16):
        value = package(name)(a.bfloat16(), leaf, temperature=0.2)
    assert value.dtype == torch.float32
    (grad,) = torch.autograd.grad(value, leaf)
    assert grad.dtype == torch.float32
    truth = NAIVE[name](a.bfloat16().double(), b.detach().double(), temperature=0.2)
    assert abs(float(value.double() - truth)) <= 8 * 2**-8 * 5  # bfloat16 logits of size 5


@pytest.mark.parametrize("case", SHORT)
def test_autocast_leaves_float64_alone(cpu_backend: Backend, case: str) -> None:
    c = build(case)
    expected = c.call(package(c.name))
    with torch.autocast("cpu", torch.bfloat16):
        got = c.call(package(c.name))
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)


# --------------------------------------------------------------------------------------------------
# torch.compile


# The backends behind the registered operator; the reference is plain PyTorch.
OPERATORS = [p for p in ALL_PAIRS if p.values[0].name != "reference"]
operators = pytest.mark.parametrize("backend", OPERATORS, indirect=True)
# One operator on each device stands for all where what is tested is the graph around it.
one_operator = pytest.mark.parametrize(
    "backend",
    [p for p in OPERATORS if p.values[0] in (Backend("chunked", "cpu"), Backend("triton", "cuda"))],
    indirect=True,
)

COMPILED = ["supcon", "supcon-no-target", "supcon-decoupled-views", "prototype", "info_nce", "clip", "uniformity"]


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("case", [*COMPILED, "alignment"])
@one_operator
def test_compiled(backend: Backend, fresh_dynamo: None, case: str) -> None:
    """One graph, forward and backward, equal to eager, at two sizes."""
    options = build(case).options
    name = CASES[case][0]

    def call(inputs: tuple[Tensor, ...], target: Tensor | None, temperature: Tensor | None) -> Tensor:
        more: dict[str, Any] = {} if temperature is None else {"temperature": temperature}
        return package(name)(*inputs, *(() if target is None else (target,)), **more, **options)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for samples in (20, 33):
        c = build(case, samples, 6, seed=samples).to(torch.float32, backend.device)
        results = []
        for function in (call, compiled):
            leaves = tuple(x.clone().requires_grad_() for x in c.inputs)
            tau = None if c.temperature is None else c.temperature.clone().requires_grad_()
            value = function(leaves, c.target, tau)
            grads = torch.autograd.grad(value, [*leaves, *(() if tau is None else (tau,))])
            results.append((value.detach(), *grads))
        for expected, got in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@operators
def test_compiled_with_weights_and_reduction_none(backend: Backend, fresh_dynamo: None) -> None:
    c = build("supcon-views", 12, 6, weight=True).to(torch.float32, backend.device)

    def call(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        return nckernels.supcon_loss(x, target, sample_weight=weight, reduction="none")

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert c.target is not None
    assert c.weight is not None
    got, expected = (f(c.inputs[0], c.target, c.weight) for f in (compiled, call))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
