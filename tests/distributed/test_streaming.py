"""Streaming metrics across ranks: unequal and empty shares give the result of all samples at once."""

from __future__ import annotations

import math
import re
from dataclasses import asdict

import pytest
import torch
from ranks import Ranks
from torch import Tensor

from nckernels.metrics import neural_collapse
from nckernels.metrics.measures import rounding_noise

pytest.importorskip("torchmetrics")

from nckernels.metrics.streaming import CollapseMetric, measure

K, D, N = 6, 10, 200
MEMORY = {"one block": 2**20, "rows": 24 * D * 8, "matrices": 12 * D * D}


def problem(offset: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    prototypes = torch.randn(K, D, generator=g, dtype=torch.float64)
    target = torch.cat([torch.tensor([K - 1]), torch.randint(K - 2, (N - 1,), generator=g)])  # a singleton, an absence
    features = prototypes[target] + 0.7 * torch.randn(N, D, generator=g, dtype=torch.float64) + offset
    return features, target, prototypes, torch.randn(K, generator=g)


def share(rank: int, at: int, features: Tensor, target: Tensor) -> list[tuple[Tensor, Tensor]]:
    mine = slice(0, at) if rank == 0 else slice(at, N)
    return list(zip(features[mine].split(32), target[mine].split(32), strict=True)) if at or rank else []


def across(rank: int, world_size: int, at: int, offset: float, memory: int) -> list[dict[str, float]]:
    """One pass, a second compute after more samples (which must go on from this rank's own), and all passes."""
    features, target, prototypes, bias = problem(offset)
    batches = share(rank, at, features, target)
    metric = CollapseMetric(K, D, prototypes=prototypes, bias=bias)
    results = []
    for part in (batches[:1], batches[1:]):
        for x, y in part:
            metric.update(x, y)
        results.append(asdict(metric.report()))
    results += [asdict(measure(batches, prototypes=prototypes, bias=b, memory=memory)) for b in (None, bias)]
    return results


def assert_equal(got: dict[str, float], want: dict[str, float], skip: tuple[str, ...] = ()) -> None:
    for name in want.keys() - set(skip):
        assert got[name] == pytest.approx(want[name], rel=1e-10, abs=1e-14, nan_ok=True), name


@pytest.mark.filterwarnings("ignore:The ``compute``")
@pytest.mark.parametrize("memory", MEMORY.values(), ids=MEMORY)
@pytest.mark.parametrize(("at", "offset"), [(0, 0.0), (N, 0.0), (50, 0.0), (50, 1e4)])
def test_ranks_measure_the_same_as_one_process(ranks2: Ranks, at: int, offset: float, memory: int) -> None:
    features, target, prototypes, bias = problem(offset)
    shares = [share(rank, at, features, target) for rank in range(2)]
    start = [torch.cat(parts) for parts in zip(*(batches[0] for batches in shares if batches), strict=True)]
    want = [
        asdict(neural_collapse(*start, prototypes, bias=bias)),
        asdict(neural_collapse(features, target, prototypes, bias=bias)),
        asdict(neural_collapse(features, target, prototypes)),
        asdict(neural_collapse(features, target, prototypes, bias=bias)),
    ]
    of_ranks = ranks2.run(across, at, offset, memory)
    for results in of_ranks:
        for number, (got, expected) in enumerate(zip(results, want, strict=True)):
            assert_equal(got, expected, skip=("intra_erank", "nc4") if number < 2 else ())
    assert [repr(result) for result in of_ranks[0]] == [repr(result) for result in of_ranks[1]]  # to the last bit


def unlike(rank: int, world_size: int) -> tuple[float, float]:
    """The noise of ranks whose features have different dtypes; NC4 where the second rank has no samples."""
    metric = CollapseMetric(K, D)
    metric.update(torch.randn(8, D, dtype=(torch.bfloat16, torch.float32)[rank]), torch.arange(8) % K)
    metric.sync()
    x, y = torch.ones(8, D, dtype=torch.float64), torch.arange(8) % 2
    x[1::2] += torch.finfo(torch.float64).eps
    of_one = [(x, y)] if rank == 0 else []
    return metric.noise.item(), measure(of_one, prototypes=torch.eye(K, D), bias=torch.zeros(K)).nc4


def test_all_ranks_go_by_the_same_rounding_errors(ranks2: Ranks) -> None:
    """The largest; means that differ by no more than those coincide on a rank without samples too."""
    for noise, nc4 in ranks2.run(unlike):
        assert noise == rounding_noise(torch.bfloat16)
        assert math.isnan(nc4)


def disagree(rank: int, world_size: int, what: str) -> float:
    x, y = torch.randn(8, D + (what == "dim") * rank), torch.arange(8) % K
    batches = [(x, y)] if what != "empty" else []
    return measure(batches, K, memory=2**20 + (what == "memory") * rank).nc1


@pytest.mark.parametrize(
    ("what", "match"),
    [
        ("dim", r"columns d on all ranks, got \[10, 11\]"),
        ("memory", "the same memory"),
        ("empty", "at least one sample"),
    ],
)
def test_ranks_that_disagree_are_errors(ranks2: Ranks, what: str, match: str) -> None:
    """A ValueError on all ranks, instead of one that waits for the other."""
    for error in ranks2.errors(disagree, what):
        assert isinstance(error, ValueError)
        assert re.search(match, str(error)), error
