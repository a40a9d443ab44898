"""Dot regression and the head of fixed points on several ranks: one loss, the same representatives, one assignment."""

from __future__ import annotations

import copy
import itertools
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import Ranks, RanksError
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import nckernels
from nckernels import assignment

from .global_cases import DTYPES, MOST, Problem, batches, check, check_some_gradients, make, otherwise
from .test_scaling import Calls, recorded

K, D, CALLS = 7, 5, 6
SIZES = ((9, 4), (0, 6), (5, 5), (3, 8), (6, 0), (7, 7))  # of the ranks' batches, call by call


def problems(ranks: Ranks, *names: str) -> dict[str, Problem]:
    dealt = batches(ranks.world_size)
    return {
        f"{name}-{reduction}-{weight}": make("dot_regression", dealt[name], {}, reduction=reduction, weight=weight)
        for name, (reduction, weight) in itertools.product(names or dealt, MOST)
    }


def test_loss_adds_up_to_that_of_the_whole_batch(ranks2: Ranks) -> None:
    check(ranks2, problems(ranks2))


def test_loss_in_other_dtypes_layouts_and_under_autocast(ranks2: Ranks) -> None:
    some = problems(ranks2, "unequal", "empty-shard")
    for dtype in DTYPES:
        check(ranks2, some, dtype)
    check(ranks2, some, torch.float32, autocast=True)
    check(ranks2, {name: otherwise(p) for name, p in some.items()})
    check_some_gradients(ranks2, problems(ranks2, "unequal"))


# --- the head ----------------------------------------------------------------------------------------------


def head(**options: Any) -> nckernels.FixedPrototypeHead:
    points = F.normalize(torch.randn(K, D, generator=torch.Generator().manual_seed(0)), dim=1)
    return nckernels.FixedPrototypeHead(points, refresh_every=2, **options)


def batch(call: int) -> tuple[Tensor, Tensor]:
    """Of all ranks; some samples ignored, some classes on one rank only."""
    g = torch.Generator().manual_seed(call)
    n = sum(SIZES[call])
    y = torch.randint(K, (n,), generator=g).sort().values
    return torch.randn(n, D, generator=g), y.masked_fill(torch.rand(n, generator=g) < 0.1, -100)


def part(call: int, rank: int) -> tuple[Tensor, Tensor]:
    x, y = (t.split(SIZES[call])[rank] for t in batch(call))
    return x, y


def state(dynamic: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in dynamic.state_dict().items()}


def of_rank(rank: int, world_size: int) -> list[tuple[Tensor, dict[str, Tensor]]]:
    dynamic, found = head(process_group="world"), []
    for call in range(CALLS):
        found.append((dynamic(*part(call, rank)), state(dynamic)))
    return found


def test_ranks_learn_what_one_process_learns_from_all_samples(ranks2: Ranks) -> None:
    """After every call; both ranks have the same bits."""
    one = head()
    for call, both in enumerate(zip(*ranks2.run(of_rank), strict=True)):
        loss = one(*batch(call))
        torch.testing.assert_close(torch.stack([loss_of for loss_of, _ in both]).mean(), loss)
        for _, got in both:
            torch.testing.assert_close(got, state(one), rtol=1e-5, atol=1e-6)
            assert all(torch.equal(got[name], value) for name, value in both[0][1].items())
    assert not torch.equal(one.assignment, torch.arange(K))


def exchanged(rank: int, world_size: int) -> list[Calls]:
    found = []
    for options in ({}, {"assignment": "static"}):
        dynamic = head(process_group="world", **options)
        dynamic.eval()(*part(0, rank))  # the first calls compare options
        dynamic.train()(*part(0, rank))
        calls: Calls = Calls()
        with recorded(calls, backward=False), mock.patch.object(dynamic, "refresh"):
            dynamic(*part(0, rank))
        found.append(calls)
    return found


def test_numbers_exchanged_per_call(ranks2: Ranks) -> None:
    """The sums and counts of the classes and the weight of the mean; a static head exchanges the weight only."""
    mean = ("all-reduce", torch.float32, 1, False)
    for dynamic, static in ranks2.run(exchanged):
        assert dynamic == Calls([mean, ("all-reduce", torch.float32, K * D + K, False)])
        assert static == Calls([mean])


def rounding_differently(rank: int, world_size: int) -> list[int]:
    dynamic = head(process_group="world")
    with mock.patch.object(assignment, "assign", return_value=torch.arange(K).roll(rank + 1)):
        dynamic.refresh()
    return dynamic.assignment.tolist()


def test_the_assignment_is_that_of_rank_0(ranks2: Ranks) -> None:
    assert ranks2.run(rounding_differently) == [torch.arange(K).roll(1).tolist()] * 2


def failing(rank: int, world_size: int) -> str:
    dynamic = head(process_group="world")
    dynamic.representatives.fill_(torch.nan)
    with pytest.raises((ValueError, RuntimeError)) as error:
        dynamic.refresh()
    assert dynamic.assignment.tolist() == list(range(K))
    return str(error.value)


def test_a_failed_assignment_on_rank_0_raises_on_all_ranks(ranks2: Ranks) -> None:
    first, second = ranks2.run(failing)
    assert "representatives must be finite" in first
    assert "rank 0 of process_group could not assign" in second


def disagreeing(rank: int, world_size: int) -> None:
    head(process_group="world", momentum=0.5 + rank / 4)(*part(0, rank))


def test_ranks_must_agree(ranks2: Ranks) -> None:
    with pytest.raises((ValueError, RanksError), match=r"must agree on momentum, got 0\.5 on rank 0"):
        ranks2.run(disagreeing)


class Network(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.head = nn.Linear(D, D), head(**options)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(self.encoder(x), y)


def in_ddp(rank: int, world_size: int, group: str | None) -> list[dict[str, Tensor]]:
    network = Network(process_group=group)
    parallel = DistributedDataParallel(network)
    optimiser, found = torch.optim.SGD(parallel.parameters(), lr=0.5), []
    for call in range(CALLS):
        optimiser.zero_grad()
        parallel(*part(call, rank)).nan_to_num().backward()
        optimiser.step()
        found.append(state(network))
    return found


def test_training_under_ddp_equals_one_process(ranks2: Ranks) -> None:
    """Equal to one process that trains with all samples."""
    network = Network()
    optimiser, truth = torch.optim.SGD(network.parameters(), lr=0.5), []
    for call in range(CALLS):
        optimiser.zero_grad()
        network(*batch(call)).backward()
        optimiser.step()
        truth.append(state(network))
    for found in ranks2.run(in_ddp, "world"):
        torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-5)


def test_ddp_without_a_group_follows_rank_0(ranks2: Ranks) -> None:
    """Representatives are those of rank 0's own samples, and reach the other ranks with the next call."""
    first, second = ranks2.run(in_ddp, None)
    torch.testing.assert_close([s["encoder.weight"] for s in first], [s["encoder.weight"] for s in second])
    u = Network()
    assert not torch.equal(first[-1]["head.assignment"], u.head.assignment)


def copied(rank: int, world_size: int) -> bool:
    dynamic = head(process_group=dist.group.WORLD)
    other = copy.deepcopy(dynamic)
    return other.process_group is dist.group.WORLD and bool(torch.equal(other(*part(0, rank)), dynamic(*part(0, rank))))


def test_a_copy_spans_the_same_ranks(ranks2: Ranks) -> None:
    assert ranks2.run(copied) == [True, True]
