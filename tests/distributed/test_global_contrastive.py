"""The losses without prototypes with the samples of all ranks: losses and gradients add up to the whole batch's."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks

import nckernels

from .global_cases import (
    CONTRASTIVE_VARIANTS,
    REDUCTIONS,
    Batch,
    Problem,
    assert_none,
    batches,
    check,
    faults,
    make,
    package,
    value_and_grads,
)

NAMES = ("supcon", "prototype", "info_nce", "clip", "alignment", "uniformity")
UNLABELLED = ("unequal", "empty-shard", "all-empty", "one-sample", "one-class")  # the others are of labels

losses = pytest.mark.parametrize("loss", NAMES)


def problems(ranks: Ranks, loss: str, *names: str) -> dict[str, Problem]:
    """The variants of a loss on the named batches, all reductions, without and with sample weights."""
    found = {}
    dealt = batches(ranks.world_size)
    for variant, (of, options, differently) in CONTRASTIVE_VARIANTS.items():
        if of != loss:
            continue
        labelled = of not in ("clip", "alignment", "uniformity") and differently.get("labelled", True)
        for name, reduction in itertools.product(dealt, REDUCTIONS):
            if name not in (names or dealt) or not (labelled or name in UNLABELLED):
                continue
            if loss == "uniformity" and (reduction != "mean" or name in ("all-empty", "one-sample")):
                continue  # it has no reduction, and no value without pairs: see below
            for weight in (False,) if loss in ("uniformity", "alignment") else (False, True):
                case = f"{variant}-{name}-{reduction}" + ("-weight" if weight else "")
                found[case] = make(loss, dealt[name], options, reduction=reduction, weight=weight, **differently)
    return found


@losses
def test_ranks_add_up_to_the_whole_batch(ranks: Ranks, loss: str) -> None:
    check(ranks, problems(ranks, loss))


@losses
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_dtypes(ranks: Ranks, loss: str, dtype: torch.dtype) -> None:
    check(ranks, problems(ranks, loss, "unequal", "empty-shard", "ignored-rank"), dtype)


def with_backend(rank: int, world_size: int, cases: dict[str, Problem], backend: str) -> dict[str, Any]:
    with nckernels.use_backend(backend):
        return {
            n: value_and_grads(p.part(rank), package(p.loss), process_group=dist.group.WORLD) for n, p in cases.items()
        }


@pytest.mark.parametrize("backend", ["reference", "chunked", "native"])
def test_backends(ranks2: Ranks, backend: str) -> None:
    """Each of them, and a group given as such."""
    cases = {n: p for loss in NAMES for n, p in problems(ranks2, loss, "unequal", "all-ignored").items()}
    results = ranks2.run(with_backend, cases, backend)
    assert_none(f"{n}: {f}" for n, p in cases.items() for f in faults(p, [r[n] for r in results]))


@losses
def test_many_more_samples_than_a_tile(ranks2: Ranks, loss: str) -> None:
    g = torch.Generator().manual_seed(5)
    batch = Batch((301, 420), torch.randint(11, (721,), generator=g))
    for dtype in (torch.float64, torch.float32):
        cases = {
            r: make(loss, batch, {}, reduction=r, weight=loss not in ("alignment", "uniformity"), dim=33)
            for r in REDUCTIONS
        }
        check(ranks2, cases, dtype)


def keys_of_others(rank: int, world_size: int, cases: dict[str, Problem]) -> dict[str, Any]:
    return {n: value_and_grads(p.part(rank), package(p.loss), process_group="world") for n, p in cases.items()}


def test_info_nce_of_ranks_without_queries_or_keys(ranks2: Ranks) -> None:
    """A rank may have keys and no queries, or neither."""
    g = torch.Generator().manual_seed(2)
    rows = [torch.randn(n, 6, generator=g, dtype=torch.float64) for n in (8, 12)]
    target = torch.randint(5, (8,), generator=g)
    cases = {}
    for keys, reduction, decoupled in itertools.product(((5, 7), (12, 0)), REDUCTIONS, (False, True)):
        upstream = torch.randn((8,) if reduction == "none" else (), generator=g, dtype=torch.float64)
        cases[f"{keys}-{reduction}-{decoupled}"] = Problem(
            "info_nce", tuple(rows), ((8, 0), keys), target, temperature=torch.tensor(0.3, dtype=torch.float64),
            upstream=upstream, options={"reduction": reduction, "decoupled": decoupled},
        )  # fmt: skip
    results = ranks2.run(keys_of_others, cases)
    assert_none(f"{n}: {f}" for n, p in cases.items() for f in faults(p, [r[n] for r in results]))


def of_subgroups(rank: int, world_size: int, cases: dict[str, list[Problem]]) -> dict[str, Any]:
    groups = [dist.new_group([0, 3]), dist.new_group([1, 2])]
    mine = 0 if rank in (0, 3) else 1
    place = [[0, 3], [1, 2]][mine].index(rank)
    return {
        n: value_and_grads(p[mine].part(place), package(p[mine].loss), process_group=groups[mine])
        for n, p in cases.items()
    }


def test_subgroups(ranks4: Ranks) -> None:
    """Two groups of two at the same time, with batches of their own."""
    dealt, cases = batches(2), {}
    for loss, reduction in itertools.product(NAMES, REDUCTIONS):
        p = make(loss, dealt["unequal"], {}, reduction=reduction)
        cases[f"{loss}-{reduction}"] = [p, make(loss, dealt["empty-shard"], {}, reduction=reduction, seed=1)]
    results = ranks4.run(of_subgroups, cases)
    lines = []
    for name, (first, second) in cases.items():
        for p, members in ((first, (0, 3)), (second, (1, 2))):
            lines += [f"{name} {members}: {f}" for f in faults(p, [results[m][name] for m in members])]
    assert_none(lines)


def without_pairs(rank: int, world_size: int, rows: int) -> None:
    nckernels.uniformity_loss(torch.ones(rows if rank == 1 else 0, 3), process_group="world")


@pytest.mark.parametrize("rows", [0, 1])
def test_uniformity_needs_a_pair_somewhere(ranks2: Ranks, rows: int) -> None:
    for error in ranks2.errors(without_pairs, rows):
        assert isinstance(error, ValueError)
        assert "at least two rows" in str(error)


def a_pair_apart(rank: int, world_size: int) -> tuple[float, list[float]]:
    x = torch.eye(2, dtype=torch.float64)[rank : rank + 1].requires_grad_()
    value = nckernels.uniformity_loss(x, process_group="world")
    value.backward()
    assert x.grad is not None
    return float(value), x.grad.flatten().tolist()


def test_uniformity_of_a_pair_on_two_ranks(ranks2: Ranks) -> None:
    """Two orthogonal rows: log e^(-2 |a - b|^2) = -4; its gradient in the other's direction is 4, times two ranks."""
    first, second = ranks2.run(a_pair_apart)
    assert first == (pytest.approx(-4.0), [0.0, pytest.approx(8.0)])
    assert second == (pytest.approx(-4.0), [pytest.approx(8.0), 0.0])
