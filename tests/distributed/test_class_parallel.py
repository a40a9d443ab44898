"""Prototypes sharded over ranks: losses and gradients equal those of one process with all classes and samples.

Problems and what is compared are those of global negatives. What differs is that the gradient of a rank's prototypes is
complete on its rank.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
import torch.distributed.tensor as dtensor
from ranks import Ranks
from test_memory import replay
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import nckernels
from nckernels import _compact
from nckernels.distributed import collectives

from .global_cases import (
    CLASSES,
    IGNORED,
    PROTOTYPE_VARIANTS,
    REDUCTIONS,
    Batch,
    Problem,
    assert_none,
    batches,
    faults,
    make,
    package,
    value_and_grads,
)


def rows_of(rank: int, world_size: int, classes: int) -> slice:
    """The shards of a DTensor: those of torch.chunk; ranks after the last chunk have none."""
    size = -(-classes // world_size)
    return slice(min(rank * size, classes), min((rank + 1) * size, classes))


def spread(function: Callable[..., Tensor], rank: int, world_size: int) -> Callable[..., Tensor]:
    """The loss with this rank's rows of the prototypes; the gradient of the others is 0 here."""
    mesh = init_device_mesh("cpu", (world_size,))

    def spread_function(x: Tensor, prototypes: Tensor, *args: Any, **options: Any) -> Tensor:
        own = prototypes[rows_of(rank, world_size, len(prototypes))]
        shape, stride = prototypes.shape, prototypes.stride()
        whole = DTensor.from_local(own, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
        return function(x, whole, *args, **options)

    return spread_function


def on_ranks(rank: int, world_size: int, problems: dict[str, Problem]) -> dict[str, Any]:
    results = {}
    for name, p in problems.items():
        try:
            loss = spread(package(p.loss), rank, world_size)
            results[name] = value_and_grads(p.part(rank), loss, process_group="world")
        except Exception as error:
            raise RuntimeError(f"{name}: {type(error).__name__}: {error}") from error
        if p.reduction != "none":  # complete here, where a replicated one is to be averaged
            results[name]["prototypes"] *= world_size
    return results


def check(ranks: Ranks, problems: dict[str, Problem], dtype: torch.dtype) -> None:
    problems = {name: p.to(dtype) for name, p in problems.items()}
    results = ranks.run(on_ranks, problems)
    assert_none(f"{n}: {f}" for n, p in problems.items() for f in faults(p, [r[n] for r in results]))


def problems(
    dealt: dict[str, Batch],
    variants: Iterable[str] = PROTOTYPE_VARIANTS,
    reductions: Iterable[str] = REDUCTIONS,
    **more: Any,
) -> dict[str, Problem]:
    """Variants on batches, class weights for every other one."""
    found = {}
    for number, (name, variant, reduction) in enumerate(itertools.product(dealt, variants, reductions)):
        loss, options = PROTOTYPE_VARIANTS[variant]
        case = make(loss, dealt[name], options, reduction=reduction, weight=number % 2 == 0, **more)
        found[f"{variant}-{name}-{reduction}"] = case
    return found


def test_equals_one_process_in_float64(ranks: Ranks) -> None:
    """11 classes: 6 and 5 rows, or 3, 3, 3 and 2."""
    dealt = batches(ranks.world_size)
    check(ranks, problems({name: dealt[name] for name in ("unequal", "ignored-rank")}), torch.float64)
    few = ("nonl", "nonl-both", "normface-all")
    check(ranks, problems(dealt, few, ("mean",)), torch.float64)


def test_equals_one_process_in_float32(ranks: Ranks) -> None:
    """One of the classes, which rank 0 holds, is what is ignored."""
    cases = problems({"unequal": batches(ranks.world_size)["unequal"]}, reductions=("mean",))
    for name, p in cases.items():
        assert p.target is not None
        target = p.target.masked_fill(p.target == IGNORED, 2)
        cases[name] = dataclasses.replace(p, target=target, options={**p.options, "ignore_index": 2})
    check(ranks, cases, torch.float32)


def test_a_rank_without_classes(ranks4: Ranks) -> None:
    """5 classes: 2, 2, 1 and 0 rows; two: 1, 1, 0 and 0."""
    unequal = batches(4)["unequal"]
    for classes in (5, 2):
        dealt = {"unequal": Batch(unequal.sizes, unequal.classes.clamp_max(classes - 1))}
        check(ranks4, problems(dealt, classes=classes), torch.float64)


def test_more_classes_than_samples(ranks: Ranks) -> None:
    """Only classes that occur take part; the last rank has none of them."""
    unequal = batches(ranks.world_size)["unequal"]
    dealt = {"unequal": Batch(unequal.sizes, (unequal.classes * 17).clamp_min(-1))}
    check(ranks, problems(dealt, ("nonl", "nonl-both", "ntce"), classes=260), torch.float64)


# --- training ------------------------------------------------------------------------------------

SIZES = {2: (9, 5), 4: (5, 0, 7, 2)}
SAMPLES, INPUTS, DIM = 14, 6, 5
CRITERIA: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "nonl": (nckernels.NONLLoss, {}),
    "ntce": (nckernels.NTCELoss, {"reduction": "sum"}),
    "normface": (nckernels.NormFaceLoss, {"label_smoothing": 0.1, "angular_margin": 0.2}),
}


class Encoder(nn.Module):
    """Features and temperature, which DistributedDataParallel keeps the same on all ranks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(nn.Linear(INPUTS, DIM), nn.Tanh(), nn.Linear(DIM, DIM))
        self.log_temperature = nn.Parameter(torch.tensor(-1.0))
        self.double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layers(x), self.log_temperature.exp()


def data() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, d, generator=g, dtype=torch.float64) for n, d in ((SAMPLES, INPUTS), (CLASSES, DIM)))
    return x, w, torch.randint(CLASSES, (SAMPLES,), generator=g)


def train(encoder: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor, steps: int = 3) -> Tensor:
    """Losses of some steps of SGD."""
    groups = [{"params": list(m.parameters())} for m in (encoder, criterion)]  # DTensors in a group of their own
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9, foreach=True)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        features, criterion.temperature = encoder(x)
        loss = criterion(features, y)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def train_on_rank(rank: int, world_size: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (world_size,))
    x, w, y = data()
    x, y = (t.split(SIZES[world_size])[rank] for t in (x, y))
    results = {}
    for name, (make_criterion, options) in CRITERIA.items():
        encoder = DistributedDataParallel(Encoder())
        prototypes = nn.Parameter(distribute_tensor(w, mesh, [Shard(0)]))
        criterion = make_criterion(prototypes=prototypes, process_group="world", **options)
        losses = train(encoder, criterion, x, y)
        assert isinstance(criterion.prototypes.grad, DTensor)
        state = {n: p.detach() for n, p in encoder.module.named_parameters()}
        results[name] = {"losses": losses, "prototypes": criterion.prototypes.to_local().detach(), **state}
    return results


def test_steps_of_sgd_equal_one_process(ranks: Ranks) -> None:
    """An encoder under DistributedDataParallel and sharded prototypes train as in one process."""
    results = ranks.run(train_on_rank)
    x, w, y = data()
    for name, (make_criterion, options) in CRITERIA.items():
        encoder, criterion = Encoder(), make_criterion(prototypes=nn.Parameter(w.clone()), **options)
        losses = train(encoder, criterion, x, y)
        parts = [r[name] for r in results]
        assert_close(torch.stack([p["losses"] for p in parts]).mean(0), losses)
        assert_close(torch.cat([p["prototypes"] for p in parts]), criterion.prototypes.detach())
        for n, p in encoder.named_parameters():
            for part in parts:
                assert_close(part[n], p.detach())


def assert_close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def logits_on_rank(rank: int, world_size: int) -> tuple[Tensor, Tensor]:
    """The same samples on every rank."""
    mesh = init_device_mesh("cpu", (world_size,))
    x, w, _ = data()
    head = nckernels.PrototypeClassifier(prototypes=distribute_tensor(w, mesh, [Shard(0)]), process_group="world")
    logits = head(DTensor.from_local(x[:, :DIM].contiguous(), mesh, [Replicate()]))
    assert logits.to_local().shape == (SAMPLES, len(head.prototypes.to_local()))
    return logits.full_tensor(), logits.argmax(1).full_tensor()


def test_prediction(ranks2: Ranks) -> None:
    """Each rank has the logits of its classes."""
    x, w, _ = data()
    expected = nckernels.PrototypeClassifier(prototypes=w)(x[:, :DIM])
    for logits, classes in ranks2.run(logits_on_rank):
        assert_close(logits, expected)
        assert torch.equal(classes, expected.argmax(1))


def autocast_on_rank(rank: int, world_size: int) -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (world_size,))
    x, w, y = data()
    x, y = (t.split(SIZES[world_size])[rank] for t in (x[:, :DIM].float(), y))
    x, spread = x.clone().requires_grad_(), distribute_tensor(w.float(), mesh, [Shard(0)]).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = nckernels.nonl_loss(x, spread, y, direction="both", process_group="world")
    loss.backward()
    return {"loss": loss.detach(), "x": x.grad, "w": spread.grad.to_local()}


def test_autocast(ranks2: Ranks) -> None:
    parts = ranks2.run(autocast_on_rank)
    x, w, y = data()
    x, w = x[:, :DIM].float().requires_grad_(), w.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = nckernels.nonl_loss(x, w, y, direction="both")
    loss.backward()
    torch.testing.assert_close(torch.stack([p["loss"] for p in parts]).mean(), loss.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.cat([p["x"] for p in parts]) / 2, x.grad, rtol=2**-7, atol=2**-9)
    torch.testing.assert_close(torch.cat([p["w"] for p in parts]), w.grad, rtol=2**-7, atol=2**-9)


# --- modules and checkpoints ---------------------------------------------------------------------


def without_the_whole_matrix(mesh: DeviceMesh, classes: int) -> nn.Parameter:
    """As docs/scaling.md has it."""
    prototypes = nn.Parameter(dtensor.empty(classes, DIM, device_mesh=mesh, placements=[Shard(0)]))
    nn.init.normal_(prototypes.to_local(), generator=torch.Generator().manual_seed(mesh.get_local_rank()))
    return prototypes


def module_on_rank(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """Saves a classifier, its twin of one process, and the state of its optimizer."""
    mesh = init_device_mesh("cpu", (world_size,))
    prototypes = without_the_whole_matrix(mesh, CLASSES)
    head = nckernels.PrototypeClassifier(prototypes=prototypes, loss="normface", process_group="world")
    twin = copy.deepcopy(head)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
    x, _, y = data()
    x, y = (t.split(SIZES[world_size])[rank] for t in (x.float(), y))
    losses = []
    for module in (head, twin):
        loss = module.loss(x[:, :DIM], y)
        loss.backward()
        losses.append(loss.detach())
    assert torch.equal(*losses)
    assert_close(head.prototypes.grad.to_local(), twin.prototypes.grad.to_local())
    optimizer.step()
    model_state, optimizer_state = get_state_dict(head, optimizer)
    checkpoint.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    shown = repr(head)
    return {"prototypes": head.prototypes.full_tensor().detach(), "shown": shown, "shape": tuple(prototypes.shape)}


def load_on_rank(rank: int, world_size: int, folder: str) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    mesh = init_device_mesh("cpu", (world_size,))
    prototypes = without_the_whole_matrix(mesh, CLASSES)
    head = nckernels.PrototypeClassifier(prototypes=prototypes, loss="normface", process_group="world")
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
    model_state, optimizer_state = get_state_dict(head, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    checkpoint.load(state, checkpoint_id=folder)
    set_state_dict(head, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    momentum = optimizer.state[head.prototypes]["momentum_buffer"].full_tensor()
    return head.prototypes.full_tensor().detach(), momentum, tuple(head.prototypes.to_local().shape)


def test_checkpoints_load_on_another_number_of_ranks(ranks2: Ranks, ranks4: Ranks, tmp_path: Path) -> None:
    """Written by two ranks; read by one process, two ranks and four."""
    folder = str(tmp_path / "checkpoint")
    saved = ranks2.run(module_on_rank, folder)
    assert torch.equal(saved[0]["prototypes"], saved[1]["prototypes"])
    assert "num_classes=11" in saved[0]["shown"]
    assert saved[0]["shape"] == (CLASSES, DIM)
    head = nckernels.PrototypeClassifier(DIM, CLASSES, loss="normface")
    alone = head.state_dict()
    checkpoint.load({"model": alone}, checkpoint_id=folder, no_dist=True)
    assert torch.equal(head.prototypes, saved[0]["prototypes"])
    shapes = []
    momenta = []
    for ranks in (ranks2, ranks4):
        for prototypes, momentum, shape in ranks.run(load_on_rank, folder):
            assert torch.equal(prototypes, saved[0]["prototypes"])
            shapes.append(shape)
            momenta.append(momentum)
    assert shapes == [(n, DIM) for n in (6, 5, 3, 3, 3, 2)]
    assert momenta[0].abs().min() > 0
    assert all(torch.equal(m, momenta[0]) for m in momenta)


def grad_of_class_weights(rank: int, world_size: int) -> Tensor:
    x, w, y = data()
    mine = slice(0, 5) if rank == 0 else slice(5, None)
    weight = torch.linspace(0.5, 2.0, CLASSES, dtype=torch.float64, requires_grad=True)
    spread = distribute_tensor(w, init_device_mesh("cpu", (world_size,)), [Shard(0)])
    loss = nckernels.normface_loss(
        x[mine, :DIM], spread, y[mine], weight=weight, label_smoothing=0.1, process_group="world"
    )
    loss.backward()
    assert weight.grad is not None
    return weight.grad


def test_gradient_of_class_weights(ranks2: Ranks) -> None:
    """Its average over the ranks, as that of all that is the same on them."""
    x, w, y = data()
    weight = torch.linspace(0.5, 2.0, CLASSES, dtype=torch.float64, requires_grad=True)
    nckernels.normface_loss(x[:, :DIM], w, y, weight=weight, label_smoothing=0.1).backward()
    assert_close(sum(ranks2.run(grad_of_class_weights)) / 2, weight.grad)


def groups_of_two(rank: int, world_size: int) -> tuple[Tensor, Tensor]:
    """Two groups with their own prototypes, in a mesh of two dimensions; then each rank alone in a third group."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "classes"))
    x, w, y = data()
    group = mesh["classes"]
    w = w + mesh["data"].get_local_rank()
    spread = distribute_tensor(w, group, [Shard(0)])
    loss = nckernels.normface_loss(x[:, :DIM], spread, y, process_group=group.get_group())
    alone = init_device_mesh("cpu", (4, 1), mesh_dim_names=("other", "one"))["one"]
    whole = distribute_tensor(w, alone, [Shard(0)]).requires_grad_()
    single = nckernels.normface_loss(x[:, :DIM], whole, y, process_group=alone.get_group())
    single.backward()
    assert whole.grad is not None
    return loss, single.detach()


def test_subgroups_are_independent(ranks4: Ranks) -> None:
    x, w, y = data()
    for rank, (loss, single) in enumerate(ranks4.run(groups_of_two)):
        expected = nckernels.normface_loss(x[:, :DIM], w + rank // 2, y)
        assert_close(single, expected)
        assert_close(loss, expected)  # everybody has the same samples


# --- a part of the classes -----------------------------------------------------------------------


def sampled(rank: int, world_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mesh = init_device_mesh("cpu", (world_size,))
    x, w, y = data()
    sizes = SIZES[world_size]
    y = torch.where(y == 3, -100, y * 40)
    w = torch.randn(CLASSES * 40, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    own = rows_of(rank, world_size, len(w))
    mine = ~((y >= own.start) & (y < own.stop))
    generator = torch.Generator()
    classes, _ = _compact.sampled(y - own.start, mine, own.stop - own.start, 0.3, generator.manual_seed(rank))
    spread = distribute_tensor(w, mesh, [Shard(0)]).requires_grad_()
    x, y = (t.split(sizes)[rank] for t in (x[:, :DIM], y))
    x = x.clone().requires_grad_()
    loss = nckernels.normface_loss(
        x,
        spread,
        y,
        class_fraction=0.3,
        generator=generator.manual_seed(rank),
        cosine_margin=0.1,
        process_group="world",
    )
    loss.backward()
    return loss.detach(), x.grad, spread.grad.to_local(), classes + own.start


def test_sampled_classes(ranks: Ranks) -> None:
    """Every rank draws from its own classes; the sum runs over all drawn classes."""
    losses, x_grads, w_grads, classes = zip(*ranks.run(sampled), strict=True)
    x, _, y = data()
    y = torch.where(y == 3, -100, y * 40)
    w = torch.randn(CLASSES * 40, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x, w, drawn = x[:, :DIM].clone().requires_grad_(), w.requires_grad_(), torch.cat(classes)
    assert len(drawn) == sum(-(-3 * len(g) // 10) for g in w_grads) < len(w)
    slot = torch.searchsorted(drawn, y).masked_fill(y < 0, -100)
    assert torch.equal(drawn[slot[y >= 0]], y[y >= 0])
    expected = nckernels.normface_loss(x, w[drawn], slot, cosine_margin=0.1)
    expected.backward()
    assert_close(torch.stack(losses).mean(), expected.detach())
    assert_close(torch.cat(x_grads) / len(losses), x.grad)
    assert_close(torch.cat(w_grads), w.grad)
    assert ((torch.cat(w_grads) != 0).any(1).nonzero()[:, 0] == drawn).all()


# --- sparse gradients of prototypes that are the same everywhere ---------------------------------


def sparse_on_rank(rank: int, world_size: int, problems: dict[str, Problem]) -> dict[str, Any]:
    results = {}
    for name, p in problems.items():
        found = value_and_grads(p.part(rank), package(p.loss), process_group="world", sparse=True)
        grad = found["prototypes"].coalesce()
        classes = p.target[p.target >= 0].unique()
        assert torch.equal(grad.indices()[0], classes if len(classes) else torch.zeros(1, dtype=torch.int64))
        results[name] = {**found, "prototypes": grad.to_dense()}
    return results


def test_sparse_gradients(ranks: Ranks) -> None:
    """The gradient of every rank has the rows of the classes of all ranks."""
    cases = problems(batches(ranks.world_size), ("nonl", "ntce"), ("mean", "none"))
    results = ranks.run(sparse_on_rank, cases)
    assert_none(f"{n}: {f}" for n, p in cases.items() for f in faults(p, [r[n] for r in results]))


class SparseNet(nn.Module):
    """As docs/scaling.md has it."""

    def __init__(self, process_group: str | None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Linear(INPUTS, DIM)
        self.classes = nn.Embedding(50, DIM, sparse=True)
        self.criterion = nckernels.NONLLoss(prototypes=self.classes.weight, sparse=True, process_group=process_group)
        self.double()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.criterion(self.body(x), y)


def sparse_under_ddp(rank: int, world_size: int) -> tuple[Tensor, Tensor]:
    x, _, y = data()
    x, y = (t.split(SIZES[world_size])[rank] for t in (x, y * 4))
    net = DistributedDataParallel(SparseNet("world"))
    net(x, y).backward()
    grad = net.module.classes.weight.grad
    assert grad.is_sparse
    return grad.to_dense(), net.module.body.weight.grad


def test_sparse_gradients_under_ddp(ranks2: Ranks) -> None:
    """DistributedDataParallel averages sparse gradients of an nn.Embedding."""
    x, _, y = data()
    net = SparseNet(None)
    net(x, y * 4).backward()
    for prototypes, body in ranks2.run(sparse_under_ddp):
        assert_close(prototypes, net.classes.weight.grad.to_dense())
        assert_close(body, net.body.weight.grad)


# --- what travels, and errors --------------------------------------------------------------------


def traffic(rank: int, world_size: int) -> tuple[int, int]:
    """Bytes that a rank passes to collectives in a step, and the peak of the allocated memory."""
    mesh, sent = init_device_mesh("cpu", (world_size,)), 0
    classes, dim, samples = 20_000, 32, 64
    prototypes = nn.Parameter(dtensor.empty(classes, dim, device_mesh=mesh, placements=[Shard(0)]))
    nn.init.normal_(prototypes.to_local())
    x, y = torch.randn(samples, dim, requires_grad=True), torch.randint(classes, (samples,))

    def counted(collective: Callable[..., Any], argument: int) -> Callable[..., Any]:
        def call(*tensors: Tensor, **options: Any) -> Any:
            nonlocal sent
            sent += tensors[argument].nbytes
            return collective(*tensors, **options)

        return call

    def step() -> None:
        for loss in (nckernels.nonl_loss, nckernels.normface_loss):
            prototypes.grad = None
            loss(x, prototypes, y, process_group="world").backward()

    step()
    with (
        mock.patch.object(collectives, "_gather_into", counted(collectives._gather_into, 1)),
        mock.patch.object(collectives, "_reduce_scatter", counted(collectives._reduce_scatter, 1)),
        mock.patch.object(dist, "all_reduce", counted(dist.all_reduce, 0)),
    ):
        step()
    prototypes.grad = None
    with nckernels.use_workspace(2**20):
        peak, _ = replay(step)
    return sent, peak - prototypes.to_local().nbytes


def test_exchanges_features_and_no_prototypes(ranks4: Ranks) -> None:
    """For each loss features to all and gradients back, and a few numbers per sample. Beyond a rank's prototypes and
    their gradient the workspace, and copies of the features and of as many prototypes: not of a rank's prototypes."""
    rows, prototypes = 64 * 4, 20_000 // 4 * 32 * 4
    for sent, extra in ranks4.run(traffic):
        features = (64 + rows) * 32 * 4
        assert 2 * features <= sent <= 2 * features + 2 * 8 * 8 * rows
        assert extra <= 2**20 + 8 * rows * 32 * 4 + 64 * (rows + 20_000 // 4) < prototypes + 2**20 + 8 * rows * 32 * 4


def bad_calls(rank: int, world_size: int) -> list[str]:
    mesh = init_device_mesh("cpu", (world_size,))
    x, w, y = data()
    x = x[:, :DIM]
    spread = distribute_tensor(w, mesh, [Shard(0)])
    pairs = init_device_mesh("cpu", (world_size // 2, 2), mesh_dim_names=("a", "b"))
    short = DTensor.from_local(w[:1], mesh, [Shard(0)], run_check=False, shape=w.shape, stride=w.stride())

    def message(error: type[Exception], loss: Callable[..., Tensor], *args: Any, **options: Any) -> str:
        with pytest.raises(error) as caught:
            loss(*args, **{"process_group": "world", **options})
        return str(caught.value)

    nonl = nckernels.nonl_loss
    return [
        message(TypeError, nonl, x, spread, y, process_group=None),
        message(TypeError, nckernels.NONLLoss, prototypes=nn.Parameter(spread), process_group=None),
        message(ValueError, nonl, x, distribute_tensor(w, mesh, [Replicate()]), y),
        message(ValueError, nonl, x, distribute_tensor(w, mesh, [Shard(1)]), y),
        message(ValueError, nonl, x, distribute_tensor(w, pairs, [Shard(0), Shard(0)]), y),
        message(ValueError, nonl, x, spread, y, process_group=pairs["b"].get_group()),
        message(ValueError, nonl, x, spread, y, sparse=True),
        message(ValueError, nonl, x, short, y),
        # one rank's mistake is everybody's error
        message(ValueError, nonl, x, spread, y.index_fill(0, torch.tensor([2]), CLASSES if rank == 1 else 0)),
        message(ValueError, nckernels.ntce_loss, x, spread if rank else w, y),
    ]


def test_bad_shards_and_options_are_errors(ranks4: Ranks) -> None:
    expected = (
        "DTensor",
        "DTensor",
        "must have the placement Shard",
        "must have the placement Shard",
        "on a mesh of one dimension",
        "must have the same ones",
        "sparse=True needs prototypes that are a plain tensor",
        "as distribute_tensor gives them",
        f"target must lie in .*got {CLASSES}",
        "must agree on prototypes",
    )
    for messages in ranks4.run(bad_calls):
        for found, pattern in zip(messages, expected, strict=True):
            assert re.search(pattern, found), found
