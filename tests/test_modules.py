"""The modules: the same numbers as the functions, ordinary nn.Module citizens otherwise."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Backend
from oracle import LOSSES, cosine, package_loss
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import nckernels

MODULES = {"nonl": nckernels.NONLLoss, "ntce": nckernels.NTCELoss, "normface": nckernels.NormFaceLoss}
CONTRASTIVE = [nckernels.SupConLoss, nckernels.PrototypeLoss, nckernels.InfoNCELoss, nckernels.CLIPLoss]
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "nonl": ("nonl", {}),
    "nonl-both": ("nonl", {"direction": "both", "temperature": 0.3}),
    "ntce": ("ntce", {"reduction": "none"}),
    "ntce-ignore": ("ntce", {"ignore_index": 2, "reduction": "sum"}),
    "normface": ("normface", {"temperature": 0.05}),
    "normface-all": (
        "normface",
        {"label_smoothing": 0.1, "angular_margin": 0.2, "cosine_margin": 0.1, "reduction": "none"},
    ),
}
names = pytest.mark.parametrize("name", LOSSES)


def batch(samples: int = 20, dim: int = 6, classes: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(samples, dim, generator=g), torch.randint(classes, (samples,), generator=g)


@pytest.mark.parametrize("weight", [False, True], ids=["plain", "weight"])
@pytest.mark.parametrize("case", OPTIONS)
def test_equals_the_function(backend: Backend, case: str, weight: bool) -> None:
    name, options = OPTIONS[case]
    if weight:
        options = {
            **options,
            "weight": torch.rand(5, generator=torch.Generator().manual_seed(1)).to(backend.device),
        }
    module = MODULES[name](6, 5, **options, device=backend.device)
    x, y = (t.to(backend.device) for t in batch())
    x.requires_grad_()
    got = module(x, y)
    expected = package_loss(name)(x, module.prototypes, y, **options)
    assert torch.equal(got, expected)
    for a, b in zip(
        torch.autograd.grad(got.sum(), (x, module.prototypes)),
        torch.autograd.grad(expected.sum(), (x, module.prototypes)),
        strict=True,
    ):
        assert torch.equal(a, b)


@names
def test_default_temperature_is_a_tenth(name: str) -> None:
    module = MODULES[name](6, 5)
    x, y = batch()
    assert torch.equal(module(x, y), package_loss(name)(x, module.prototypes, y, temperature=0.1))


@names
def test_owns_its_prototypes(name: str) -> None:
    module = MODULES[name](6, 5, dtype=torch.float64)
    assert isinstance(module.prototypes, nn.Parameter)
    assert module.prototypes.requires_grad
    assert module.prototypes.shape == (5, 6)
    assert module.prototypes.dtype == torch.float64
    assert [n for n, _ in module.named_parameters()] == ["prototypes"]
    assert bool((module.prototypes.norm(dim=1) > 0).all())
    meta = MODULES[name](6, 5, device="meta")
    assert meta.prototypes.is_meta
    assert nckernels.PrototypeClassifier(6, 5, loss=name, device="meta").prototypes.is_meta
    torch.manual_seed(3)
    first = MODULES[name](6, 5).prototypes
    torch.manual_seed(3)
    assert torch.equal(first, MODULES[name](6, 5).prototypes)
    assert not torch.equal(first, MODULES[name](6, 5).prototypes)
    torch.manual_seed(3)
    meta.to_empty(device="cpu").reset_parameters()
    assert torch.equal(first, meta.prototypes)
    fixed = MODULES[name](prototypes=torch.eye(5, 6))
    fixed.reset_parameters()
    assert torch.equal(fixed.prototypes, torch.eye(5, 6))


@names
def test_shares_a_parameter(name: str) -> None:
    head = nn.Linear(6, 5, bias=False)
    module = MODULES[name](prototypes=head.weight)
    assert module.prototypes is head.weight
    x, y = batch()
    module(x, y).backward()
    assert head.weight.grad is not None
    assert bool(head.weight.grad.any())


@names
def test_a_plain_tensor_is_a_fixed_buffer(name: str) -> None:
    fixed = nckernels.geometry.simplex_etf(5, 6)
    module = MODULES[name](prototypes=fixed)
    assert not list(module.parameters())
    assert "prototypes" in dict(module.named_buffers())
    assert torch.equal(module.state_dict()["prototypes"], fixed)
    x, y = batch()
    x.requires_grad_()
    module(x, y).backward()
    assert x.grad is not None
    assert module.prototypes.grad is None
    assert module.to(torch.float64).prototypes.dtype == torch.float64  # follows .to() as a buffer does


@names
def test_learnable_temperature(name: str) -> None:
    temperature = nn.Parameter(torch.tensor(0.2))
    module = MODULES[name](6, 5, temperature=temperature)
    assert any(p is temperature for p in module.parameters())
    module(*batch()).backward()
    assert temperature.grad is not None
    assert bool(temperature.grad.isfinite())
    assert bool(temperature.grad)


@names
def test_state_dict_round_trip(name: str) -> None:
    """Everything the loss depends on that is a tensor travels, so a checkpoint gives the same loss."""
    options = {"weight": torch.rand(5) + 0.5, "temperature": nn.Parameter(torch.tensor(0.3))}
    module, x_y = MODULES[name](6, 5, **options), batch()
    other = MODULES[name](6, 5, weight=torch.ones(5), temperature=nn.Parameter(torch.tensor(0.7)))
    assert not torch.equal(other(*x_y), module(*x_y))
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer))
    assert torch.equal(other(*x_y), module(*x_y))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("case", OPTIONS)
def test_copies(case: str, how: str) -> None:
    name, options = OPTIONS[case]
    module = MODULES[name](6, 5, **options)
    other = copy.deepcopy(module) if how == "deepcopy" else pickle.loads(pickle.dumps(module))
    x, y = batch()
    assert torch.equal(other(x, y), module(x, y))
    with torch.no_grad():
        other.prototypes.add_(1)
    assert not torch.equal(other.prototypes, module.prototypes)


@names
def test_moves_with_to(name: str) -> None:
    """Weights and prototypes follow the module's dtype; the temperature stays what it was."""
    module = MODULES[name](6, 5, weight=torch.ones(5), temperature=torch.tensor(0.2)).to(torch.float64)
    x, y = batch()
    value = module(x.double(), y)
    assert value.dtype == torch.float64
    expected = package_loss(name)(x.double(), module.prototypes, y, temperature=0.2)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)  # 0.2 was rounded to float32


@names
def test_repr_tells_the_options(name: str) -> None:
    text = repr(MODULES[name](6, 5, temperature=0.25, reduction="sum"))
    assert type(MODULES[name](6, 5)).__name__ in text
    for part in ("0.25", "sum", "6", "5"):
        assert part in text


# --------------------------------------------------------------------------------------------------
# PrototypeClassifier


@names
def test_classifier_logits_and_loss(backend: Backend, name: str) -> None:
    head = nckernels.PrototypeClassifier(6, 5, loss=name, temperature=0.2, device=backend.device)
    x, y = (t.to(backend.device) for t in batch())
    logits = head(x)
    assert logits.shape == (20, 5)
    torch.testing.assert_close(logits, cosine(x, head.prototypes) / 0.2, rtol=1e-6, atol=1e-5)
    assert torch.equal(head.loss(x, y), package_loss(name)(x, head.prototypes, y, temperature=0.2))


def test_classifier_loss_of_normface_is_cross_entropy_of_its_logits() -> None:
    """Training and inference see the same numbers."""
    head = nckernels.PrototypeClassifier(6, 5, loss="normface", temperature=0.2, dtype=torch.float64)
    x, y = batch()
    expected = nn.functional.cross_entropy(head(x.double()), y)
    torch.testing.assert_close(head.loss(x.double(), y), expected, rtol=1e-12, atol=1e-12)


@names
def test_hooks_run_for_logits_and_losses(name: str) -> None:
    """On the classifier and on its criterion."""
    head, (x, y), calls = nckernels.PrototypeClassifier(6, 5, loss=name), batch(), []
    logits, loss = head(-x), head(-x, y)

    def negate(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        calls.append(module)
        return -inputs[0], *inputs[1:]

    def increment(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        calls.append(module)
        return output + 1

    head.criterion.register_forward_pre_hook(negate)
    head.register_forward_hook(increment)
    for got, expected in ((head(x), logits), (head(x, y), loss), (head.loss(x, y), loss)):
        assert torch.equal(got, expected + 1)
    assert calls == [head.criterion, head] * 3
    assert torch.equal(head.criterion(x), logits)
    with pytest.raises(TypeError, match=r"target must be a torch\.Tensor, got NoneType"):
        head.loss(x, None)  # is not a prediction


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x

    def right_inverse(self, x: Tensor) -> Tensor:
        return x.sqrt()


class Exp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.exp()

    def right_inverse(self, x: Tensor) -> Tensor:
        return x.log()


@names
def test_parametrizations(name: str) -> None:
    """Prototypes with non-negative entries, a positive temperature."""
    start, temperature = torch.rand(5, 6), nn.Parameter(torch.tensor(0.2))
    head = nckernels.PrototypeClassifier(prototypes=nn.Parameter(start.clone()), temperature=temperature, loss=name)
    parametrize.register_parametrization(head.criterion, "prototypes", Square())
    parametrize.register_parametrization(head.criterion, "temperature", Exp())
    torch.testing.assert_close(head.prototypes, start)
    roots, log = head.parameters()
    (x, y), logits = batch(), cosine(batch()[0], roots * roots) / log.exp()
    torch.testing.assert_close(head(x), logits, rtol=1e-6, atol=1e-5)
    got, expected = head(x, y), package_loss(name)(x, roots * roots, y, temperature=log.exp())
    assert torch.equal(got, expected)
    for a, b in zip(torch.autograd.grad(got, (roots, log)), torch.autograd.grad(expected, (roots, log)), strict=True):
        assert torch.equal(a, b)


CHECKPOINTS: dict[str, Callable[[nn.Module], Callable[..., Tensor]]] = {
    "reentrant": lambda module: functools.partial(checkpoint, module, use_reentrant=True),
    "not-reentrant": lambda module: functools.partial(checkpoint, module, use_reentrant=False),
    "wrapper": checkpoint_wrapper,
}


@pytest.mark.parametrize("how", CHECKPOINTS)
@names
def test_activation_checkpointing(backend: Backend, name: str, how: str) -> None:
    """Computed twice, with the same loss and gradients."""
    head = nckernels.PrototypeClassifier(6, 5, loss=name, device=backend.device)
    x, y = (t.to(backend.device) for t in batch())
    x.requires_grad_()
    calls: list[nn.Module] = []
    head.criterion.register_forward_pre_hook(lambda module, inputs: calls.append(module))
    checkpointed = CHECKPOINTS[how](head)
    for targets in ((y,), ()):
        results = []
        for call in (head, checkpointed):
            calls.clear()
            head.zero_grad()
            x.grad = None
            value = call(x, *targets)
            value.square().sum().backward()
            results.append((value, x.grad, head.prototypes.grad))
            assert len(calls) == (1 if call is head else 2)
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6 * float(b.detach().abs().max()))


@names
def test_fixed_prototypes_take_the_dtype_of_the_input(name: str) -> None:
    fixed, (x, y) = nckernels.geometry.simplex_etf(5, 6), batch()
    head = nckernels.PrototypeClassifier(prototypes=fixed, loss=name)
    learnt = nckernels.PrototypeClassifier(prototypes=nn.Parameter(fixed), loss=name)
    for dtype in (torch.bfloat16, torch.float64):
        same = nckernels.PrototypeClassifier(prototypes=fixed.to(dtype), loss=name)
        assert torch.equal(head(x.to(dtype), y), same(x.to(dtype), y))
        assert torch.equal(head(x.to(dtype)), same(x.to(dtype)))
        with pytest.raises(TypeError, match="same dtype"):
            learnt(x.to(dtype), y)


@pytest.mark.parametrize("module", [*MODULES.values(), *CONTRASTIVE], ids=lambda m: m.__name__)
def test_temperature_of_one_element(module: type[nn.Module]) -> None:
    """Of shape (1,), for fully_shard, or ()."""
    x, y = batch()
    arguments = (x, x.roll(1)) if module in (nckernels.InfoNCELoss, nckernels.CLIPLoss) else (x, y)
    sizes = (6, 5) if module in MODULES.values() else ()
    results = []
    for shape in ((), (1,)):
        torch.manual_seed(0)
        criterion = module(*sizes, temperature=nn.Parameter(torch.full(shape, 0.2)))
        value = criterion(*arguments)
        (grad,) = torch.autograd.grad(value, criterion.temperature)
        assert grad.shape == shape
        results.append((value, grad.reshape(()), *([criterion(x)] if sizes else [])))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    with pytest.raises(ValueError, match=r"temperature.*\(2,\)"):
        module(*sizes, temperature=torch.ones(2))


def test_classifier_learns() -> None:
    torch.manual_seed(0)
    for name in LOSSES:
        x, y = batch(200)
        x = x + 3 * torch.randn(5, 6)[y]
        head = nckernels.PrototypeClassifier(6, 5, loss=name)
        before = head.loss(x, y).item()
        optimiser = torch.optim.SGD(head.parameters(), lr=0.5)
        for _ in range(50):
            optimiser.zero_grad()
            head.loss(x, y).backward()
            optimiser.step()
        assert head.loss(x, y).item() < before
        assert (head(x).argmax(1) == y).float().mean() > 0.8


def test_classifier_forward_is_differentiable() -> None:
    head = nckernels.PrototypeClassifier(6, 5, dtype=torch.float64)
    x = batch(4)[0].double().requires_grad_()
    assert torch.autograd.gradcheck(head, (x,))
    grads = torch.autograd.grad(head(x).pow(2).sum(), (x, head.prototypes))
    assert all(bool(g.any()) for g in grads)


def test_classifier_state_dict_and_copy() -> None:
    head = nckernels.PrototypeClassifier(6, 5)
    x, y = batch()
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head)), nckernels.PrototypeClassifier(6, 5)):
        other.load_state_dict(head.state_dict())
        assert torch.equal(other(x), head(x))
        assert torch.equal(other.loss(x, y), head.loss(x, y))


def test_classifier_shares_or_fixes_prototypes() -> None:
    linear = nn.Linear(6, 5, bias=False)
    assert nckernels.PrototypeClassifier(prototypes=linear.weight).prototypes is linear.weight
    fixed = nckernels.PrototypeClassifier(prototypes=nckernels.geometry.simplex_etf(5, 6))
    assert not list(fixed.parameters())


@pytest.mark.parametrize("module", [nckernels.SupConLoss, nckernels.InfoNCELoss, nckernels.CLIPLoss])
def test_temperature_of_a_contrastive_module_may_be_on_any_device(module: type[nn.Module]) -> None:
    temperature = nn.Parameter(torch.tensor(0.1, device="meta"))
    assert module(temperature=temperature).temperature is temperature


@pytest.mark.parametrize("module", [nckernels.NONLLoss, nckernels.NTCELoss, nckernels.NormFaceLoss])
def test_a_module_with_a_fixed_tensor_as_temperature_can_be_printed(module: type[nn.Module]) -> None:
    loss = module(6, 5, temperature=torch.tensor(0.25))
    assert "temperature=0.25" in repr(loss)
    assert "temperature=a tensor" in repr(loss.to("meta"))


def test_classifier_of_long_float16_features() -> None:
    """Norms beyond what float16 holds."""
    head = nckernels.PrototypeClassifier(2048, 5).half()
    x = (torch.randn(4, 2048) * 2000).half()
    wide = nckernels.PrototypeClassifier(prototypes=head.prototypes.detach().float())
    torch.testing.assert_close(head(x).float(), wide(x.float()), rtol=0, atol=2e-2)


def test_number_of_classes_is_checked_at_once() -> None:
    with pytest.raises(ValueError, match="num_classes"):
        nckernels.PrototypeLoss(num_classes=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_temperature_of_16_bits_is_inverted_in_float32(dtype: torch.dtype) -> None:
    x, y = batch()
    w, temperature = torch.randn(5, 6), torch.tensor(0.07, dtype=dtype)
    got = nckernels.nonl_loss(x, w, y, temperature=temperature)
    torch.testing.assert_close(got, nckernels.nonl_loss(x, w, y, temperature=temperature.item()), rtol=1e-6, atol=0)
