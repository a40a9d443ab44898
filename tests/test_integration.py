"""With the rest of PyTorch: torch.compile, opcheck, meta and fake tensors, autocast, threads, training."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import ALL_PAIRS, Backend
from oracle import (
    DIRECTIONS,
    EXCLUDES,
    LOSSES,
    check,
    dense,
    loss,
    make_problem,
    package,
    package_loss,
    run,
    worst,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.flop_counter import FlopCounterMode

import nckernels
from nckernels.backends import native

losses = pytest.mark.parametrize("name", LOSSES)
# The backends behind the registered operator; the reference is plain PyTorch.
OPERATORS = [p for p in ALL_PAIRS if p.values[0].name != "reference"]
operators = pytest.mark.parametrize("backend", OPERATORS, indirect=True)
# One operator on each device stands for all where what is tested is the graph around it.
one_operator = pytest.mark.parametrize(
    "backend",
    [p for p in OPERATORS if p.values[0] in (Backend("native", "cpu"), Backend("triton", "cuda"))],
    indirect=True,
)


def batch(samples: int, classes: int, dim: int, device: str = "cpu", seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x, w = torch.randn(samples, dim, generator=g), torch.randn(classes, dim, generator=g)
    y = torch.randint(classes, (samples,), generator=g)
    y[::5] = -100
    return x.to(device).requires_grad_(), w.to(device).requires_grad_(), y.to(device)


# --------------------------------------------------------------------------------------------------
# torch.compile


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# One compilation each is fair where a backend treats fewer and more classes than samples differently.
FIRST_SHAPES = [(40, 11, 8), (21, 30, 8)]
LATER_SHAPES = [(33, 17, 8), (90, 12, 8), (16, 70, 8), (64, 5, 8)]


def compiled_equals_eager(
    function: Callable[..., Tensor], backend: str, device: str, numbers: Sequence[float] = ()
) -> None:
    """Forward and backward of the compiled function equal eager's, and later shapes and numbers compile nothing."""
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    for seed, size in enumerate(FIRST_SHAPES + LATER_SHAPES):
        x, w, y = batch(*size, device=device, seed=seed)
        changed = [number * (1 + 0.1 * seed) for number in numbers]
        expected = function(x, w, y, *changed)
        with torch.compiler.set_stance("default" if size in FIRST_SHAPES else "fail_on_recompile"):
            got = compiled(x, w, y, *changed)
        # The same operator inside; the few pointwise operations around it may be fused and round differently.
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
        grads = [torch.autograd.grad(value.sum(), (x, w)) for value in (got, expected)]
        for a, b in zip(*grads, strict=True):
            # Losses without a reduction add positives in float64 where nothing is compiled.
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * max(1.0, float(b.abs().max())))


COMPILED: dict[str, tuple[str, dict[str, Any]]] = {
    "nonl": ("nonl", {}),
    "nonl-both": ("nonl", {"direction": "both"}),
    "ntce-none": ("ntce", {"reduction": "none"}),
    "normface": ("normface", {"label_smoothing": 0.1}),
    "margins": ("normface", {"angular_margin": 0.2, "cosine_margin": 0.1}),
}


@pytest.mark.parametrize("case", COMPILED)
@one_operator
def test_compiled_losses(backend: Backend, case: str) -> None:
    name, options = COMPILED[case]

    def function(x: Tensor, w: Tensor, y: Tensor, temperature: float) -> Tensor:
        return package_loss(name)(x, w, y, temperature=temperature, **options)

    compiled_equals_eager(function, "aot_eager", backend.device, [0.1])


def test_compiled_reference() -> None:
    """No operator of its own: traced through to its PyTorch calls."""
    with nckernels.use_backend("reference"):
        compiled_equals_eager(lambda x, w, y: nckernels.nonl_loss(x, w, y), "aot_eager", "cpu")


@pytest.mark.parametrize("direction", DIRECTIONS)
@operators
def test_compiled_primitive(backend: Backend, direction: str) -> None:
    def function(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        lse, pos = nckernels.cosine_lse(x, w, y, 7.0, direction=direction, exclude="target")
        parts = [*(lse if direction == "both" else (lse,)), pos]
        return torch.cat([part.masked_fill(part == -torch.inf, 0.0) for part in parts])

    compiled_equals_eager(function, "aot_eager", backend.device)


@pytest.mark.parametrize("exclude", ["self", "same_label"])
@operators
def test_compiled_features_against_themselves(backend: Backend, exclude: str) -> None:
    def function(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        u = x @ w.T  # also one tensor in the graph
        lse, pos = nckernels.cosine_lse(u, u, y.clamp_min(0) % 2, 7.0, direction="instance", exclude=exclude)
        return lse.masked_fill(lse == -torch.inf, 0.0) - pos

    compiled_equals_eager(function, "aot_eager", backend.device)


@one_operator
def test_compiled_by_inductor(backend: Backend) -> None:
    compiled_equals_eager(lambda x, w, y: nckernels.nonl_loss(x, w, y), "inductor", backend.device)


def test_compiled_with_everything_a_tensor(backend: Backend) -> None:
    """Class weights and a learnable temperature in the graph."""
    weight = (torch.rand(11, generator=torch.Generator().manual_seed(0)) + 0.5).to(backend.device)
    temperature = torch.tensor(0.3, device=backend.device, requires_grad=True)

    def function(x: Tensor, w: Tensor, y: Tensor, temperature: Tensor) -> Tensor:
        return nckernels.ntce_loss(x, w, y, temperature=temperature, weight=weight, reduction="sum")

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    x, w, y = batch(40, 11, 8, backend.device)
    expected, got = (f(x, w, y, temperature) for f in (function, compiled))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    for a, b in zip(
        torch.autograd.grad(got, (x, w, temperature)),
        torch.autograd.grad(expected, (x, w, temperature)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_compiled_training_step(backend: Backend) -> None:
    """A whole module: linear layer, classifier head and its loss in one graph."""
    torch.manual_seed(0)
    body, head = nn.Linear(6, 8), nckernels.PrototypeClassifier(8, 5, loss="nonl")
    body.to(backend.device)
    head.to(backend.device)
    x = torch.randn(20, 6, device=backend.device)
    y = torch.arange(20, device=backend.device) % 5

    def step(x: Tensor, y: Tensor) -> Tensor:
        return head.loss(body(x), y)

    parameters = [*body.parameters(), *head.parameters()]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(step(x, y), parameters)
    for a, b in zip(torch.autograd.grad(compiled(x, y), parameters), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


class Net(nn.Module):
    """A layer and a classifier: labels in, loss out."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nckernels.PrototypeClassifier(8, 5)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.head(self.body(x), y)


class CallsLoss(Net):
    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        z = self.body(x)
        return self.head(z) if y is None else self.head.loss(z, y)


def compiled_network(way: str, compiler: str) -> Net:
    """Compiled in whole or in part, always in one graph."""
    net = CallsLoss() if way.endswith("loss") else Net()
    options: dict[str, Any] = {"fullgraph": True, "backend": compiler}
    if way == "head in place, loss":
        net.head.compile(**options)
    elif way == "head":
        net.head = torch.compile(net.head, **options)
    elif way == "criterion":
        net.head.criterion = torch.compile(net.head.criterion, **options)
    else:
        if way == "checkpointed head":
            net.head = checkpoint_wrapper(net.head)
        net.compile(**options)
    return net


WAYS = ["network", "network, loss", "head", "head in place, loss", "criterion", "checkpointed head"]


@pytest.mark.parametrize(
    ("way", "compiler"),
    [*((way, "aot_eager") for way in WAYS), pytest.param("network", "inductor", marks=pytest.mark.slow)],
)
def test_compiled_networks(way: str, compiler: str) -> None:
    """Loss, gradients and logits of a network, compiled with its loss or around it."""
    torch.manual_seed(0)
    net, plain = compiled_network(way, compiler), Net()
    plain.load_state_dict(
        {re.sub(r"_orig_mod\.|_checkpoint_wrapped_module\.", "", k): v for k, v in net.state_dict().items()}
    )
    x, y = torch.randn(20, 6), torch.arange(20) % 5
    loss, expected = net(x, y), plain(x, y)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    loss.backward()
    expected.backward()
    for a, b in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-6 * float(b.grad.abs().max()))
    torch.testing.assert_close(net(x), plain(x), rtol=0, atol=1e-5)


# --------------------------------------------------------------------------------------------------
# the operator's registration


def operator_arguments(
    backend: str,
    device: str,
    dtype: torch.dtype,
    direction: str,
    exclude: str,
    bias: bool,
    present_only: bool,
    itself: bool = False,
) -> tuple[Any, ...]:
    """Arguments by the schema's names, so that the order is the schema's business."""
    p = make_problem(
        12, 7, 5, direction=direction, exclude=exclude, bias=bias, present_only=present_only, itself=itself
    ).to(dtype, device)
    leaves = {name: t.clone().requires_grad_() for name, t in p.inputs().items()}
    values = {
        "features": None,
        "prototypes": None,
        "sample_bias": None,
        "class_bias": None,
        **leaves,
        **({"prototypes": leaves["features"]} if itself else {}),
        **p.options,
        "symmetric": itself,
        "target": p.target,
        "workspace": 2**20,
        "backend": backend,
        "keep": True,
        "version": nckernels.__version__,
    }
    schema = torch.ops.nckernels.cosine_lse.default._schema
    unknown = {argument.name for argument in schema.arguments} - values.keys()
    assert not unknown, f"the schema has arguments this test does not know: {unknown}"
    return tuple(values[argument.name] for argument in schema.arguments)


@pytest.mark.parametrize(
    ("direction", "exclude", "bias", "present_only"),
    [
        ("class", "target", False, False),
        ("class", "none", True, True),
        ("instance", "none", True, False),
        ("both", "same_label", False, False),
        ("both", "self", True, False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@operators
def test_opcheck(
    backend: Backend, dtype: torch.dtype, direction: str, exclude: str, bias: bool, present_only: bool
) -> None:
    """Schema, autograd registration, fake implementation and dynamic shapes agree with the kernel."""
    arguments = operator_arguments(backend.name, backend.device, dtype, direction, exclude, bias, present_only)
    torch.library.opcheck(torch.ops.nckernels.cosine_lse.default, arguments)


@pytest.mark.parametrize("direction", ["class", "instance"])
@operators
def test_opcheck_of_features_against_themselves(backend: Backend, direction: str) -> None:
    arguments = operator_arguments(backend.name, backend.device, torch.float32, direction, "self", True, False, True)
    torch.library.opcheck(torch.ops.nckernels.cosine_lse.default, arguments)


@operators
def test_fake_gradients(backend: Backend) -> None:
    """Gradients have the layout of PyTorch, whatever that of the inputs; one that is not wanted has no numbers."""
    arguments = operator_arguments(backend.name, backend.device, torch.float32, "both", "none", True, False)
    inputs = [x.detach().mT.contiguous().mT if x.dim() == 2 else x.detach() for x in arguments[:6]]
    saved = torch.ops.nckernels.cosine_lse(*inputs, *arguments[6:])
    for wanted in itertools.product([False, True], repeat=2):
        call = (*inputs, *saved, *saved[:3], *arguments[6:13], [*wanted, False, False, True])
        torch.library.opcheck(torch.ops.nckernels.cosine_lse_backward.default, call, test_utils="test_faketensor")


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("name", ["chunked", "native"])
def test_flops(name: str, keeps: bool) -> None:
    """FlopCounterMode counts the products of the naive form, and one more for similarities that are not kept."""
    m, k, d = 40, 13, 24
    z, w, y = torch.randn(m, d, requires_grad=True), torch.randn(k, d, requires_grad=True), torch.arange(m) % k

    def count(loss: Callable[[], Tensor]) -> int:
        with FlopCounterMode(display=False) as counter:
            loss().backward()
        return counter.get_total_flops()

    one, square = 2 * m * k * d, 2 * m * m * d
    assert count(lambda: F.cross_entropy(F.normalize(z) @ F.normalize(w).T, y)) == 3 * one
    with nckernels.use_backend(name), nckernels.use_workspace(2**20 if keeps else 1):
        once_more = 0 if keeps else one
        assert count(lambda: nckernels.normface_loss(z, w, y)) == 3 * one + once_more
        assert count(lambda: nckernels.normface_loss(z, w.detach(), y)) == 2 * one + once_more
        few = torch.arange(5)  # of whose classes a loss needs no more than five
        assert count(lambda: nckernels.ntce_loss(z[:5], w, few)) == (3 if keeps else 4) * 2 * 5 * 5 * d
        products = 2 if keeps and name == "native" else 3  # one gradient; the chunked backend keeps no symmetric matrix
        assert count(lambda: nckernels.uniformity_loss(z)) == products * square


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Deterministic mode fills every torch.empty with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("present_only", [False, True], ids=["all", "present"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@operators
def test_operator_outputs_are_initialised(
    backend: Backend, poisoned: None, dtype: torch.dtype, present_only: bool
) -> None:
    """What an operator returns may be saved, compared and hashed: no garbage in it."""
    arguments = operator_arguments(backend.name, backend.device, dtype, "class", "target", True, present_only)
    schema = torch.ops.nckernels.cosine_lse.default._schema
    outputs = torch.ops.nckernels.cosine_lse(*arguments)
    dirty = [
        r.name for r, out in zip(schema.returns, outputs, strict=True) if out.is_floating_point() and out.isnan().any()
    ]
    assert not dirty, f"uninitialised memory in {dirty}"


@pytest.mark.parametrize(
    ("direction", "exclude", "present_only"),
    [
        *((direction, exclude, False) for direction, exclude in itertools.product(DIRECTIONS, EXCLUDES)),
        ("class", "none", True),
        ("class", "target", True),
    ],
)
def test_nothing_depends_on_uninitialised_memory(
    backend: Backend, poisoned: None, small_workspace: None, direction: str, exclude: str, present_only: bool
) -> None:
    for size in ((70, 90, 9), (9, 5, 3)):
        p = make_problem(*size, direction=direction, exclude=exclude, bias=True, present_only=present_only)
        check(p, torch.float32, backend.device)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("exclude", EXCLUDES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_meta_tensors(direction: str, exclude: str, dtype: torch.dtype) -> None:
    """Shapes and dtypes without data, forward and backward."""
    p = make_problem(12, 7, 5, direction=direction, exclude=exclude, bias=True)
    expected, grads = run(package, p.to(dtype))
    got, meta_grads = run(package, p.to(dtype, "meta"))
    for values, metas in ((expected, got), (grads, meta_grads)):
        for name, value in values.items():
            meta = metas[name]
            assert value is not None
            assert meta is not None
            assert meta.is_meta, name
            assert (meta.shape, meta.dtype, meta.stride()) == (value.shape, value.dtype, value.stride()), name


@losses
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_fake_tensors(name: str, reduction: str) -> None:
    with FakeTensorMode():
        x = torch.empty(9, 4, requires_grad=True)
        w = torch.empty(6, 4, requires_grad=True)
        value = package_loss(name)(x, w, torch.empty(9, dtype=torch.int64), reduction=reduction)
        assert value.shape == ((9,) if reduction == "none" else ())
        assert value.dtype == torch.float32
        grads = torch.autograd.grad(value.sum(), (x, w))
    assert [g.shape for g in grads] == [(9, 4), (6, 4)]


SHAPES_ONLY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "supcon": nckernels.supcon_loss,
    "prototype": nckernels.prototype_loss,
    "smoothing": lambda x, y: nckernels.normface_loss(x, x[:6], y, label_smoothing=0.1, angular_margin=0.2),
}


@pytest.mark.parametrize("kind", ["fake", "meta"])
@pytest.mark.parametrize("name", SHAPES_ONLY)
def test_losses_of_several_steps_without_data(name: str, kind: str) -> None:
    """None of them looks at values."""
    with FakeTensorMode() if kind == "fake" else torch.device("meta"):
        x = torch.empty(9, 4, requires_grad=True)
        value = SHAPES_ONLY[name](x, torch.empty(9, dtype=torch.int64))
        (grad,) = torch.autograd.grad(value, x)
    assert (value.shape, grad.shape) == ((), (9, 4))


# --------------------------------------------------------------------------------------------------
# autocast


@pytest.mark.parametrize("wide", ["features", "prototypes"])
def test_autocast_does_not_bring_float64_together_with_less(cpu_backend: Backend, wide: str) -> None:
    """As in PyTorch's own products: float64 stays, and the other operand is lowered."""
    x, w, y = torch.randn(8, 6), torch.randn(4, 6), torch.randint(4, (8,))
    x, w = (x.double(), w) if wide == "features" else (x, w.double())
    with torch.autocast("cpu", torch.bfloat16):
        for call in (
            lambda: nckernels.nonl_loss(x, w, y),
            lambda: nckernels.cosine_lse(x, w, y, 10.0),
            lambda: nckernels.info_nce_loss(x, w[torch.zeros(8, dtype=torch.long)]),
        ):
            with pytest.raises(TypeError, match="same dtype"):
                call()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@losses
def test_autocast(backend: Backend, name: str, dtype: torch.dtype) -> None:
    """Half features from an autocast layer, float32 prototypes: float32 loss, float32 parameter gradients.

    The error against float64 is at most that of eager PyTorch under the same autocast, plus 2 roundings.
    """
    g = torch.Generator().manual_seed(0)
    layer = nn.Linear(12, 8)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(8, 12, generator=g))
    layer.to(backend.device)
    data = torch.randn(40, 12, generator=g).to(backend.device)
    w = torch.randn(9, 8, generator=g).to(backend.device).requires_grad_()
    y = torch.randint(9, (40,), generator=g).to(backend.device)

    def grads(function: Callable[..., Tensor], enabled: bool = True) -> tuple[Tensor, ...]:
        with torch.autocast(backend.device, dtype, enabled=enabled):
            z = layer(data)
            assert not enabled or z.dtype == dtype
            value = function(z, w, y)
        return value.detach(), *torch.autograd.grad(value, (layer.weight, w))

    got = grads(package_loss(name))
    eager = grads(lambda z, w, y: loss(name, z, w, y))
    layer.double()
    data, w = data.double(), w.detach().double().requires_grad_()
    truth = grads(lambda z, w, y: loss(name, z, w, y), enabled=False)
    for what, value, reference, rival in zip(("loss", "layer", "prototypes"), got, truth, eager, strict=True):
        assert value.dtype == torch.float32, f"{what} is {value.dtype}"
        scale = reference.abs().max()
        error, allowed = (worst((v.double() - reference).abs() / scale) for v in (value, rival))
        assert error <= allowed + 2 * torch.finfo(dtype).eps, f"{what}: error {error:.3g}, eager {allowed:.3g}"


@operators
def test_autocast_lowers_the_inputs_and_nothing_inside(backend: Backend) -> None:
    """Losses are those of inputs that were cast before, and a backward pass under autocast is that outside of it."""
    x, w, y = (value.to(backend.device) for value in batch(12, 5, 4))
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    calls: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "primitive": lambda x, w: nckernels.cosine_lse(x, w, y, 10.0, logit_bias=torch.ones_like(x[:, 0]))[0].sum(),
        "samples": lambda x, w: nckernels.normface_loss(x, w, y, reduction="none").sum(),
        "mean": lambda x, w: nckernels.nonl_loss(x, w, y),
        "supcon": lambda x, w: nckernels.supcon_loss(x, y) + 0 * w.sum(),
    }
    for name, call in calls.items():
        with torch.autocast(backend.device, torch.bfloat16):
            value = call(x, w)
            inside = torch.autograd.grad(value, (x, w), retain_graph=True)
        assert value.equal(call(x.bfloat16(), w.bfloat16())), name
        assert all(map(torch.equal, inside, torch.autograd.grad(value, (x, w)))), name


def test_autocast_off_inside_keeps_the_inputs_dtype(cpu_backend: Backend) -> None:
    """Mixed dtypes are an error again where autocast is disabled."""
    x, w, y = batch(12, 5, 4)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        with pytest.raises((ValueError, TypeError), match="prototypes"):
            nckernels.ntce_loss(x.bfloat16(), w, y)
        assert torch.equal(nckernels.ntce_loss(x, w, y), nckernels.ntce_loss(x.detach(), w, y))


@losses
def test_autocast_leaves_float64_alone(cpu_backend: Backend, name: str) -> None:
    """As PyTorch's own autocast does: float64 is never lowered."""
    x, w, y = batch(12, 5, 4)
    x, w = x.detach().double(), w.detach().double()
    expected = package_loss(name)(x, w, y)
    with torch.autocast("cpu", torch.bfloat16):
        got = package_loss(name)(x, w, y)
    assert got.dtype == torch.float64
    assert torch.equal(got, expected)


# --------------------------------------------------------------------------------------------------
# threads and determinism


def result(name: str, backend: Backend, size: tuple[int, int, int] = (700, 300, 16)) -> tuple[Tensor, ...]:
    x, w, y = batch(*size, device=backend.device)
    value = package_loss(name)(x, w, y)
    return value.detach(), *torch.autograd.grad(value, (x, w))


@losses
def test_bitwise_repeatable(backend: Backend, small_workspace: None, name: str) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        first = result(name, backend)
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(first, result(name, backend), strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


@losses
def test_results_from_several_threads(backend: Backend, small_workspace: None, name: str) -> None:
    """No scratch memory is shared between calls in flight."""
    sizes = [(700, 300, 16), (333, 200, 16), (500, 40, 16), (90, 700, 16)]
    expected = [result(name, backend, size) for size in sizes]
    found: list[list[tuple[Tensor, ...]]] = [[] for _ in sizes]
    errors: list[BaseException] = []
    barrier = threading.Barrier(len(sizes))

    def work(i: int) -> None:
        try:
            barrier.wait(60)
            found[i].extend(result(name, backend, sizes[i]) for _ in range(5))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(sizes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    for wanted, results in zip(expected, found, strict=True):
        assert len(results) == 5
        for got in results:
            for a, b in zip(got, wanted, strict=True):
                # A new thread may use another number of intra-op threads, so sums in another order.
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * float(b.abs().max()))


@pytest.fixture
def restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["nonl", "normface"])
def test_number_of_threads(cpu_backend: Backend, restore_threads: None, name: str) -> None:
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with nckernels.use_workspace(2**18):
            results.append(result(name, cpu_backend, (500, 200, 32)))
    for one, two in zip(*results, strict=True):
        # The same sums in another order.
        torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-6 * float(one.abs().max()))


def test_settings_in_force_are_those_of_the_forward(cpu_backend: Backend) -> None:
    """A backward that runs after the context managers have ended is the forward's own."""
    p = make_problem(200, 90, 8, direction="both", exclude="target")
    _, expected = run(package, p)
    leaves = {name: t.clone().requires_grad_() for name, t in p.inputs().items()}
    with nckernels.use_backend(cpu_backend.name), nckernels.use_workspace(2**14):
        outputs = package(p, leaves)
    with nckernels.use_backend("reference"), nckernels.use_workspace(2**22):
        grads = torch.autograd.grad(list(outputs.values()), list(leaves.values()), [p.upstream[n] for n in outputs])
    for name, grad in zip(leaves, grads, strict=True):
        truth = expected[name]
        assert truth is not None
        torch.testing.assert_close(grad, truth, rtol=1e-11, atol=1e-12)


# --------------------------------------------------------------------------------------------------
# in use


@losses
def test_data_parallel_halves_with_normface_equal_the_whole(cpu_backend: Backend, name: str) -> None:
    """Row losses split over a batch; column losses do not: they need the whole batch's denominators."""
    x, w, y = batch(40, 6, 5)
    y = torch.arange(40) % 6
    whole = package_loss(name)(x, w, y, reduction="sum")
    halves = sum(package_loss(name)(x[i : i + 20], w, y[i : i + 20], reduction="sum") for i in (0, 20))
    assert torch.allclose(whole, halves, rtol=1e-5) == (name == "normface")


@losses
def test_checkpointing(cpu_backend: Backend, name: str) -> None:
    """Recomputation by torch.utils.checkpoint gives the same gradients."""
    from torch.utils.checkpoint import checkpoint

    x, w, y = batch(30, 6, 5)
    expected = torch.autograd.grad(package_loss(name)(x, w, y), (x, w))
    got = torch.autograd.grad(checkpoint(package_loss(name), x, w, y, use_reentrant=False), (x, w))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@losses
def test_training_reaches_what_eager_training_reaches(cpu_backend: Backend, name: str) -> None:
    """Thirty SGD steps follow the dense form's path in float64, to its roundings."""
    x, w, y = batch(60, 5, 4)
    y = torch.arange(60) % 5
    paths = []
    for function in (package_loss(name), lambda *a: loss(name, *a)):
        z, v = (t.detach().double().requires_grad_() for t in (x, w))
        optimiser = torch.optim.SGD([z, v], lr=0.5, momentum=0.9)
        for _ in range(30):
            optimiser.zero_grad()
            function(z, v, y).backward()
            optimiser.step()
        paths.append((z.detach(), v.detach()))
    for a, b in itertools.chain(zip(*paths, strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.cuda
@losses
def test_no_host_synchronisation(name: str) -> None:
    x, w, y = batch(64, 10, 8, "cuda")
    package_loss(name)(x, w, y).backward()  # compilation and allocation
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        package_loss(name)(x, w, y).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", [p for p in ALL_PAIRS if p.id in ("cuda-triton", "cuda-cuda")], indirect=True)
@pytest.mark.parametrize(("dim", "dtype"), [(64, torch.bfloat16), (512, torch.bfloat16), (512, torch.float32)])
@losses
def test_cuda_graph(backend: Backend, name: str, dim: int, dtype: torch.dtype) -> None:
    """Forward and backward in a graph; its replays see what has been copied into the inputs."""
    batches = [batch(300, 20, dim, "cuda", seed) for seed in range(3)]
    x, w = (t.detach().to(dtype).requires_grad_() for t in batches[0][:2])
    y = batches[0][2].clone()

    def step() -> tuple[Tensor, ...]:
        value = package_loss(name)(x, w, y)
        return value.detach(), *torch.autograd.grad(value, (x, w))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for new in batches:
        with torch.no_grad():
            for ours, theirs in zip((x, w, y), new, strict=True):
                ours.copy_(theirs)
        graph.replay()
        got = [t.clone() for t in captured]
        for a, b in zip(got, step(), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.cuda
@losses
def test_compiled_into_cuda_graphs(name: str) -> None:
    """torch.compile(mode="reduce-overhead")."""
    function = torch.compile(package_loss(name), mode="reduce-overhead")
    for seed in range(4):
        x, w, y = batch(300, 20, 64, "cuda", seed)
        torch.compiler.cudagraph_mark_step_begin()
        results = [(value.detach().clone(), *torch.autograd.grad(value, (x, w)))
                   for value in (function(x, w, y), package_loss(name)(x, w, y))]  # fmt: skip
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_dense_form_is_what_users_would_write() -> None:
    """Guards the oracle's half of the comparisons above: its NormFace is F.cross_entropy on cosine logits."""
    x, w, y = batch(30, 6, 5)
    expected = F.cross_entropy(F.normalize(x) @ F.normalize(w).T / 0.1, y)
    torch.testing.assert_close(loss("normface", x, w, y), expected)
    p = make_problem(30, 6, 5, direction="instance", ignored=0.0)
    outputs, _ = run(dense, p, ())
    logits = 10 * F.normalize(p.features) @ F.normalize(p.prototypes).T
    torch.testing.assert_close(outputs["instance"], logits.logsumexp(1), rtol=1e-12, atol=0)


# --------------------------------------------------------------------------------------------------
# torch.jit.trace


@losses
def test_traced_losses_compute(cpu_backend: Backend, name: str) -> None:
    """Foreign code is invisible to the tracer: it has to see an operator."""
    x, w, y = batch(12, 5, 4)
    x, w = x.detach(), w.detach()
    function = package_loss(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of checks that become constants
        traced = torch.jit.trace(lambda a, b: function(a, b, y), (x, w))
    torch.testing.assert_close(traced(x + 1, w), function(x + 1, w, y))


CACHED = """
import sys, torch, nckernels
from nckernels import operators
from nckernels.backends import native
version, kept = sys.argv[1:]
operators.__version__ = version
kept_numel = native.NativeBackend.kept_numel
native.NativeBackend.kept_numel = lambda *arguments: kept_numel(*arguments) // int(kept)
x = torch.randn(64, 16, requires_grad=True)
loss = torch.compile(nckernels.nonl_loss, fullgraph=True)(x, torch.randn(10, 16), torch.arange(64) % 10)
loss.backward()
print(torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"])
"""


@pytest.mark.slow
@pytest.mark.skipif(native.BACKEND.missing() is not None, reason="needs the native backend")
def test_compile_caches_of_another_version_are_not_used(tmp_path: Path) -> None:
    """Graphs on disk hold the sizes of the results: those of a release with other sizes must not be found."""
    caches = {"TORCHINDUCTOR_FX_GRAPH_CACHE": "1", "TORCHINDUCTOR_AUTOGRAD_CACHE": "1"}
    environment = os.environ | caches | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "NCKERNELS_BACKEND": "native"}
    hits = []
    for version, kept in (("0.1.0", "1"), ("0.1.0", "1"), ("0.2.0", "2")):
        command = [sys.executable, "-c", CACHED, version, kept]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
        hits.append(int(result.stdout))
    assert hits == [0, 1, 0]
