"""Wrapped models on two ranks: the loss of each rank is that of its own batch, and gradients are averaged.

FSDP2 (``fully_shard``) of the head, its criterion and the network, DistributedDataParallel, mixed precision, activation
checkpointing, torch.compile. The expected numbers come from a copy of the network that nobody wraps, which sees the
batches of all ranks one after the other.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import Ranks
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

import nckernels

FEATURES, DIM, CLASSES = 6, 8, 5


class Net(nn.Module):
    """What a user would write: labels in, loss out."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(FEATURES, 16), nn.ReLU(), nn.Linear(16, DIM))
        self.head = nckernels.PrototypeClassifier(DIM, CLASSES, **options)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.head(self.body(x), y)


class CallsLoss(Net):
    """The same through ``head.loss``."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        z = self.body(x)
        return self.head(z) if y is None else self.head.loss(z, y)


class Shares(nn.Module):
    """A criterion that shares the weight of a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(FEATURES, DIM)
        self.last = nn.Linear(DIM, CLASSES, bias=False)
        self.criterion = nckernels.NTCELoss(prototypes=self.last.weight)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        z = self.body(x)
        return self.last(z) if y is None else self.criterion(z, y)


class Contrastive(nn.Module):
    """A loss without prototypes that learns its temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(FEATURES, DIM)
        self.criterion = nckernels.SupConLoss(temperature=learnable_temperature())

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        z = self.body(x)
        return z if y is None else self.criterion(z, y)


class Exp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.exp()

    def right_inverse(self, x: Tensor) -> Tensor:
        return x.log()


def batch(rank: int) -> tuple[Tensor, Tensor]:
    """A batch of its own for each rank, of a size of its own, with an ignored sample."""
    g = torch.Generator().manual_seed(rank)
    x, y = torch.randn(12 + rank, FEATURES, generator=g), torch.randint(CLASSES, (12 + rank,), generator=g)
    y[rank] = -100
    return x, y


# --------------------------------------------------------------------------------------------------
# networks and what wraps them, by name: what a rank is given is pickled


def learnable_temperature() -> nn.Parameter:
    return nn.Parameter(torch.tensor([0.3]))


def with_positive_temperature() -> Net:
    net = Net(temperature=learnable_temperature())
    parametrize.register_parametrization(net.head.criterion, "temperature", Exp())
    return net


def fixed_prototypes(loss: str) -> Net:
    fixed = torch.randn(CLASSES, DIM, generator=torch.Generator().manual_seed(0))
    return Net(loss=loss, prototypes=fixed)


NETS: dict[str, Callable[[], nn.Module]] = {
    "nonl": Net,
    "nonl.loss": CallsLoss,
    "ntce": lambda: Net(loss="ntce", reduction="sum"),
    "normface": lambda: Net(loss="normface", weight=torch.arange(1.0, 1.0 + CLASSES)),
    "temperature": lambda: Net(temperature=learnable_temperature()),
    "positive-temperature": with_positive_temperature,
    "fixed": lambda: fixed_prototypes("nonl"),
    "fixed-normface": lambda: fixed_prototypes("normface"),
    "shares": Shares,
    "contrastive": Contrastive,
}


def freeze_body(net: nn.Module) -> nn.Module:
    """Nobody averages the gradients of what is not wrapped."""
    net.get_submodule("body").requires_grad_(False)
    return net


def shard(*paths: str, **options: Any) -> Callable[[nn.Module], nn.Module]:
    """fully_shard of submodules, in this order; "" is the network."""

    def wrap(net: nn.Module) -> nn.Module:
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        for path in paths:
            fully_shard(net.get_submodule(path), mesh=mesh, **options)
        return net

    return wrap


def checkpoint(path: str, implementation: CheckpointImpl = CheckpointImpl.NO_REENTRANT) -> Callable[[nn.Module], Any]:
    def wrap(net: nn.Module) -> nn.Module:
        net.set_submodule(path, checkpoint_wrapper(net.get_submodule(path), checkpoint_impl=implementation))
        return net

    return wrap


def compile_in_place(path: str) -> Callable[[nn.Module], nn.Module]:
    def wrap(net: nn.Module) -> nn.Module:
        net.get_submodule(path).compile(fullgraph=True, backend="aot_eager")
        return net

    return wrap


def compiled(fullgraph: bool) -> Callable[[nn.Module], Any]:
    return lambda net: torch.compile(net, fullgraph=fullgraph, backend="aot_eager")


HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
REENTRANT = CheckpointImpl.REENTRANT
WRAPS: dict[str, list[Callable[[nn.Module], nn.Module]]] = {
    "head": [freeze_body, shard("head")],
    "criterion": [freeze_body, shard("head.criterion")],
    "network": [shard("")],
    "each": [shard("body", "head.criterion", "head", "")],
    "half": [shard("head", "", mp_policy=HALF)],
    "ddp": [DistributedDataParallel],
    "checkpoint, network": [checkpoint("head"), shard("")],
    "checkpoint, each": [checkpoint("head.criterion"), shard("head.criterion", "head", "")],
    "reentrant, each": [checkpoint("head", REENTRANT), shard("head", "")],
    "checkpoint, ddp": [checkpoint("head"), DistributedDataParallel],
    "reentrant, ddp": [checkpoint("head", REENTRANT), DistributedDataParallel],
    "compiled head, each": [compile_in_place("head"), shard("head", "")],
    "network, compiled": [shard(""), compiled(fullgraph=True)],
    "each, compiled": [shard("head.criterion", "head", ""), compiled(fullgraph=False)],
    "half, compiled": [shard("", mp_policy=HALF), compiled(fullgraph=True)],
    "compiled, ddp": [compile_in_place(""), DistributedDataParallel],
    "ddp, compiled": [DistributedDataParallel, compiled(fullgraph=False)],
}
ADDED = re.compile(r"_orig_mod\.|_checkpoint_wrapped_module\.|module\.")  # to the names of parameters


def whole(x: Any) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def train(rank: int, world_size: int, net: str, wrap: str) -> None:
    """Loss, prediction, gradients, and two optimiser steps of a wrapped network and its plain copy."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = NETS[net]()
    half = wrap.startswith("half")
    wrapped = copy.deepcopy(plain)
    for step in WRAPS[wrap]:
        wrapped = step(wrapped)
    trained = {ADDED.sub("", name): p for name, p in wrapped.named_parameters() if p.requires_grad}
    optimisers = [torch.optim.SGD(module.parameters(), lr=0.1) for module in (plain, wrapped)]
    x, y = batch(rank)

    # A compiled loss takes two passes, an eager one a step: kernels may round bfloat16 entries otherwise.
    tolerance = 2.0**-7 if half and "compiled" in wrap else 1e-6

    def equal(got: Tensor, expected: Tensor, what: str) -> None:
        largest = float(expected.detach().abs().max())
        torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * largest, msg=lambda m: f"{what}: {m}")

    for _ in range(2):
        losses, grads = [], []
        for r in range(world_size):
            replica = copy.deepcopy(plain).to(torch.bfloat16 if half else torch.float32)
            features, labels = batch(r)
            losses.append(replica(features.bfloat16() if half else features, labels))
            losses[r].sum().backward()
            grads.append({name: p.grad.float() for name, p in replica.named_parameters()})
        loss = wrapped(x, y)
        equal(loss, losses[rank], "loss")
        for optimiser in optimisers:
            optimiser.zero_grad()
        loss.backward()
        for name, p in trained.items():
            expected = torch.stack([g[name] for g in grads]).mean(0)
            equal(whole(p.grad), expected, f"gradient of {name}")
            plain.get_parameter(name).grad = expected
        for optimiser in optimisers:
            optimiser.step()
        for name, p in trained.items():
            equal(whole(p), plain.get_parameter(name), f"{name} after a step")
        with torch.no_grad():
            replica = copy.deepcopy(plain).to(torch.bfloat16 if half else torch.float32)
            equal(wrapped(x), replica(x.bfloat16() if half else x), "logits")


@pytest.mark.parametrize(
    ("net", "wrap"),
    [
        # checkpoint_wrapper has the loss of the module in it, which knows nothing of the wrapper
        *(("nonl" if re.search("checkpoint|reentrant", wrap) else "nonl.loss", wrap) for wrap in WRAPS),
        *(("nonl", wrap) for wrap in ("each", "ddp")),
        *((net, wrap) for net in NETS if not net.startswith("nonl") for wrap in ("network", "ddp")),
        *(
            (net, wrap)
            for net in ("temperature", "positive-temperature", "fixed", "normface")
            for wrap in ("each", "half")
        ),
    ],
)
def test_wrapped_modules_equal_the_plain_ones(ranks2: Ranks, net: str, wrap: str) -> None:
    ranks2.run(train, net, wrap)


# --------------------------------------------------------------------------------------------------
# parameters out of reach of the hooks


def out_of_reach(rank: int, world_size: int) -> dict[str, str]:
    """What the errors say."""
    messages = {}

    def attempt(name: str, function: Callable[[], object]) -> None:
        try:
            function()
        except (TypeError, ValueError) as error:
            messages[name] = f"{type(error).__name__}: {error}"

    x, y = torch.randn(4, DIM), torch.arange(4)
    net = shard("")(Net(temperature=learnable_temperature()))
    attempt("function", lambda: nckernels.nonl_loss(x, net.head.prototypes, y))
    attempt("part", lambda: net.head(x, y))
    attempt("part's logits", lambda: net.head(x))
    attempt("late", lambda: nckernels.NONLLoss(prototypes=net.head.prototypes))
    attempt("late temperature", lambda: nckernels.SupConLoss(temperature=net.head.criterion.temperature))
    wrapper = shard("")(checkpoint_wrapper(Net().head))
    attempt("wrapper's loss", lambda: wrapper.loss(x, y))
    attempt("0-dimensional", lambda: shard("")(Net(temperature=nn.Parameter(torch.tensor(0.3)))))
    return messages


def test_errors_for_dtensor_parameters_say_what_to_call(ranks2: Ranks) -> None:
    """The errors say what to call instead. The last one is PyTorch's: shape (1,) is what it asks for."""
    for messages in ranks2.run(out_of_reach):
        scalar = messages.pop("0-dimensional")
        assert re.search("ValueError.*doesn't support scalar parameters.*temperature to a 1D tensor", scalar)
        assert list(messages) == ["function", "part", "part's logits", "late", "late temperature", "wrapper's loss"]
        for name, message in messages.items():
            what = "temperature" if "temperature" in name else "prototypes"
            assert re.match(
                rf"TypeError: {what} is a DTensor.*fully_shard.*call that module.*before fully_shard", message
            )


def by_hand(rank: int, world_size: int) -> None:
    """``full_tensor(grad_placements=[Partial("avg")])``, which the error recommends."""
    mesh = init_device_mesh("cpu", (world_size,))
    w = torch.randn(CLASSES, DIM, generator=torch.Generator().manual_seed(0))
    body = torch.randn(FEATURES, DIM, generator=torch.Generator().manual_seed(1))
    grads = []
    for r in range(world_size):
        plain, (x, y) = w.clone().requires_grad_(), batch(r)
        nckernels.nonl_loss(x @ body, plain, y).backward()
        grads.append(plain.grad)
    x, y = batch(rank)
    for placement in (Shard(0), Shard(1), Replicate()):
        spread = nn.Parameter(distribute_tensor(w, mesh, [placement]))
        nckernels.nonl_loss(x @ body, spread.full_tensor(grad_placements=[Partial("avg")]), y).backward()
        torch.testing.assert_close(whole(spread.grad), torch.stack(grads).mean(0), rtol=0, atol=1e-6)


def test_full_tensor_with_averaged_gradients(ranks2: Ranks) -> None:
    ranks2.run(by_hand)
