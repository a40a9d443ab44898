"""Queues and running denominators on several ranks: each has its own; with a process group the loss uses all."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from ranks import Ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import nckernels
from nckernels import FeatureQueue, QueueLoss, RunningDenominatorLoss

DIM, CLASSES, SIZE, STEPS = 6, 5, 7, 4
CRITERIA: dict[str, Any] = {
    "nonl": lambda **options: nckernels.NONLLoss(DIM, CLASSES, dtype=torch.float64, **options),
    "nonl-both": lambda **options: nckernels.NONLLoss(DIM, CLASSES, direction="both", dtype=torch.float64, **options),
    "ntce": lambda **options: nckernels.NTCELoss(DIM, CLASSES, dtype=torch.float64, **options),
    "supcon": lambda **options: nckernels.SupConLoss(**options),
}


@dataclasses.dataclass
class Step:
    """What one rank has of one training step."""

    loss: Tensor
    by_features: Tensor
    by_prototypes: Tensor | None


def make(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return CRITERIA[name](temperature=0.3, **options)


def batch(rank: int, step: int) -> tuple[Tensor, Tensor]:
    """Of another size on every rank and in every step, with classes that some ranks lack."""
    g = torch.Generator().manual_seed(100 * step + rank)
    count = [3, 0, 5, 2, 9][(rank + 2 * step) % 5]
    y = (torch.randint(3, (count,), generator=g) + rank) % CLASSES
    x = torch.randn(count, DIM, generator=g, dtype=torch.float64).requires_grad_()
    return x, y.where(torch.rand(count, generator=g) > 0.2, -100)


def trained(criterion: nn.Module, rank: int) -> list[Step]:
    """The losses and gradients of some steps."""
    own, steps = [p for n, p in criterion.named_parameters() if n.endswith("prototypes")], []
    for step in range(STEPS):
        x, y = batch(rank, step)
        loss = criterion(x, y)
        gradients = torch.autograd.grad(loss, [x, *own])
        steps.append(Step(loss.detach(), gradients[0], gradients[1] if own else None))
    return steps


def queues(rank: int, world_size: int, name: str, reduction: str) -> list[Step]:
    """Each rank's queue has its own past, of which ranks with large batches keep less."""
    return trained(QueueLoss(make(name, reduction=reduction, process_group="world"), full(rank)), rank)


def full(rank: int) -> FeatureQueue:
    queue = FeatureQueue(SIZE, DIM, dtype=torch.float64)
    queue.enqueue(*batch(rank, 50))
    return queue


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", CRITERIA)
def test_negatives_are_the_batches_and_queues_of_all_ranks(ranks: Ranks, name: str, reduction: str) -> None:
    got = ranks.run(queues, name, reduction)
    criterion = make(name, reduction=reduction)
    past = [full(rank) for rank in range(ranks.world_size)]
    for step in range(STEPS):
        batches = [batch(rank, step) for rank in range(ranks.world_size)]
        rows = [torch.cat([x, queue.features]) for (x, _), queue in zip(batches, past, strict=True)]
        labels = [torch.cat([y, queue.labels]) for (_, y), queue in zip(batches, past, strict=True)]
        anchors = [torch.cat([torch.ones(len(y)), torch.zeros(SIZE)]).double() for _, y in batches]
        whole = criterion(torch.cat(rows), torch.cat(labels), torch.cat(anchors))
        compare([steps[step] for steps in got], whole, [x for x, _ in batches], list(criterion.parameters()))
        for queue, (x, y) in zip(past, batches, strict=True):
            queue.enqueue(x, y)


def compare(got: list[Step], whole: Tensor, inputs: list[Tensor], prototypes: list[Tensor]) -> None:
    """Averages over the ranks are the whole's; a rank's own features have ``world_size`` times their gradient."""
    size = len(got)
    by_features = torch.autograd.grad(whole, [*inputs, *prototypes])
    torch.testing.assert_close(sum(step.loss for step in got) / size, whole.detach(), rtol=1e-11, atol=1e-12)
    for step, expected in zip(got, by_features, strict=False):
        torch.testing.assert_close(step.by_features, size * expected, rtol=1e-10, atol=1e-12)
    if prototypes:
        mean = sum(step.by_prototypes for step in got) / size
        torch.testing.assert_close(mean, by_features[-1], rtol=1e-10, atol=1e-12)


def running(rank: int, world_size: int, name: str) -> tuple[list[Step], dict[str, Tensor]]:
    criterion = RunningDenominatorLoss(make(name, process_group="world"), 0.7)
    return trained(criterion, rank), {key: value.clone() for key, value in criterion.named_buffers()}


@pytest.mark.parametrize("name", ["nonl", "ntce"])
def test_running_denominators_of_all_ranks(ranks: Ranks, name: str) -> None:
    """They are those of one process with the whole batches, the same on every rank."""
    got = ranks.run(running, name)
    criterion = RunningDenominatorLoss(make(name), 0.7)
    for step in range(STEPS):
        batches = [batch(rank, step) for rank in range(ranks.world_size)]
        whole = criterion(torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]))
        compare([steps[step] for steps, _ in got], whole, [x for x, _ in batches], list(criterion.parameters()))
    for _, state in got:
        for key, value in criterion.named_buffers():
            torch.testing.assert_close(state[key], value, rtol=1e-12, atol=1e-12)
            assert torch.equal(state[key], got[0][1][key])


def without_reduction(rank: int, world_size: int) -> list[Tensor]:
    criterion = QueueLoss(make("nonl", reduction="none", process_group="world"), full(rank))
    with torch.no_grad():
        return [criterion(*batch(rank, step)) for step in range(STEPS)]


def test_unreduced_losses_are_those_of_the_own_samples(ranks2: Ranks) -> None:
    """Every rank returns the losses of its own samples."""
    got = ranks2.run(without_reduction)
    plain, past = make("nonl", reduction="none"), [full(rank) for rank in range(2)]
    for step in range(STEPS):
        (x, y), (other_x, other_y) = batch(0, step), batch(1, step)
        features, labels = [torch.cat([getattr(queue, name) for queue in past]) for name in ("features", "labels")]
        whole = plain(torch.cat([x, other_x, features]), torch.cat([y, other_y, labels]))[: len(x) + len(other_x)]
        torch.testing.assert_close(torch.cat([losses[step] for losses in got]), whole.detach())
        past[0].enqueue(x, y)
        past[1].enqueue(other_x, other_y)


class Net(nn.Module):
    """A module for DistributedDataParallel with the loss inside."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(DIM, DIM, dtype=torch.float64)
        self.criterion = QueueLoss(make("nonl", process_group="world"), FeatureQueue(SIZE, DIM, dtype=torch.float64))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.criterion(self.body(x), y)


def data_parallel(rank: int, world_size: int) -> tuple[list[int], list[Tensor]]:
    net = Net()
    wrapped = DistributedDataParallel(net, broadcast_buffers=False)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(3):
        x, _ = batch(0, 2)
        optimiser.zero_grad()
        wrapped(x.detach() + rank + step, torch.full((len(x),), rank)).backward()
        optimiser.step()
    return net.criterion.queue.labels.tolist(), [p.detach() for p in net.parameters()]


def test_ddp_keeps_the_queue_of_each_rank(ranks2: Ranks) -> None:
    """Without broadcast buffers; the parameters are the same everywhere."""
    (labels, parameters), (other_labels, other_parameters) = ranks2.run(data_parallel)
    assert (set(labels), set(other_labels)) == ({0}, {1})
    assert all(torch.equal(p, q) for p, q in zip(parameters, other_parameters, strict=True))


def other_decay(rank: int, world_size: int) -> None:
    RunningDenominatorLoss(make("ntce", process_group="world"), 0.5 + 0.1 * rank)(*batch(0, 0))


def test_ranks_that_disagree_are_errors(ranks2: Ranks) -> None:
    for error in ranks2.errors(other_decay):
        assert isinstance(error, ValueError)
        assert "agree on decay, got 0.5 on rank 0 and 0.6 on rank 1" in str(error)
