"""The losses without prototypes with the samples of all ranks: losses and gradients add up to the whole batch's."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from ranks import Ranks
from torch import Tensor

import nckernels
from nckernels.distributed import collectives, groups

from .global_cases import (
    CONTRASTIVE_VARIANTS,
    DTYPES,
    MOST,
    REDUCTIONS,
    SOME,
    Batch,
    Problem,
    batches,
    check,
    check_some_gradients,
    check_two_pairs,
    make,
    otherwise,
)

NAMES = ("supcon", "prototype", "info_nce", "clip", "alignment", "uniformity")
UNLABELLED = ("unequal", "empty-shard", "all-empty", "one-sample", "one-class")  # the others are of labels

losses = pytest.mark.parametrize("loss", NAMES)


def problems(
    ranks: Ranks, loss: str, *names: str, reductions: Sequence[tuple[str, bool]] = SOME, seed: int = 0
) -> dict[str, Problem]:
    """The variants of a loss on the named batches, or all that are not empty; reductions, with or without weights."""
    found = {}
    dealt = batches(ranks.world_size)
    for variant, (of, options, differently) in CONTRASTIVE_VARIANTS.items():
        if of != loss:
            continue
        labelled = loss not in ("clip", "alignment", "uniformity") and differently.get("labelled", True)
        for name, (reduction, weight) in itertools.product(names or [n for n in dealt if n != "all-empty"], reductions):
            if not labelled and name not in UNLABELLED:
                continue
            if loss == "uniformity" and (reduction != "sum" or name in ("all-empty", "one-sample")):
                continue  # it has no reduction, and no value without pairs: see below
            weight = weight and loss != "alignment"
            case = f"{variant}-{name}-{reduction}" + ("-weight" if weight else "")
            found[case] = make(
                loss, dealt[name], options, reduction=reduction, weight=weight, seed=seed, **differently
            )  # fmt: skip
    return found


@losses
def test_ranks_add_up_to_the_whole_batch(ranks: Ranks, loss: str) -> None:
    check(ranks, problems(ranks, loss, reductions=MOST if ranks.world_size == 2 else SOME))


@losses
def test_all_batches_empty(ranks2: Ranks, loss: str) -> None:
    if loss != "uniformity":
        check(ranks2, problems(ranks2, loss, "all-empty", reductions=MOST))


@losses
def test_keys_in_the_ring_add_up_to_the_whole_batch(ranks: Ranks, loss: str) -> None:
    """With a workspace that the keys of all ranks exceed."""
    check(ranks, problems(ranks, loss, seed=3), workspace=512)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("workspace", [None, 512], ids=["gathered", "travelling"])
def test_dtypes(ranks2: Ranks, dtype: torch.dtype, workspace: int | None) -> None:
    for loss in NAMES:
        check(ranks2, problems(ranks2, loss, "unequal", "empty-shard", seed=1), dtype, workspace=workspace)


@pytest.mark.parametrize("workspace", [None, 512], ids=["gathered", "travelling"])
def test_bfloat16_gradients_of_four_ranks_add_up_in_float32(ranks4: Ranks, workspace: int | None) -> None:
    for loss in NAMES:
        check(ranks4, problems(ranks4, loss, "unequal", seed=1), torch.bfloat16, workspace=workspace)


def grad_of_gathered(rank: int, world_size: int, upstream: Tensor) -> Tensor:
    ranks = groups.resolve("world")
    assert ranks is not None
    rows = torch.ones(1, upstream.shape[2], dtype=torch.bfloat16, requires_grad=True)
    collectives.gather(rows, collectives.sizes(rows, ranks), ranks).backward(upstream[rank])
    assert rows.grad is not None
    return rows.grad


def test_gradients_of_gathered_keys_are_rounded_once(ranks4: Ranks) -> None:
    """After the sum over the ranks: to the last bit."""
    upstream = torch.randn(4, 4, 100, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = torch.cat(ranks4.run(grad_of_gathered, upstream))
    assert found.equal(upstream.double().sum(0).bfloat16())


@pytest.mark.parametrize("workspace", [None, 512], ids=["gathered", "travelling"])
def test_autocast(ranks2: Ranks, workspace: int | None) -> None:
    for loss in NAMES:
        cases = problems(ranks2, loss, "unequal", "empty-shard", seed=1)
        check(ranks2, cases, torch.float32, autocast=True, workspace=workspace)


@pytest.mark.parametrize("backend", ["reference", "chunked", "native"])
def test_backends(ranks2: Ranks, backend: str) -> None:
    for loss in NAMES:
        check(ranks2, problems(ranks2, loss, "unequal", "all-ignored", seed=2), backend=backend)


@pytest.mark.parametrize("workspace", [None, 512], ids=["gathered", "travelling"])
def test_some_gradients_and_backward_twice(ranks2: Ranks, workspace: int | None) -> None:
    for loss in NAMES:
        check_some_gradients(ranks2, problems(ranks2, loss, "unequal", seed=4), workspace=workspace)


@pytest.mark.parametrize("workspace", [None, 512], ids=["gathered", "travelling"])
def test_integers_strides_and_ignore_index(ranks2: Ranks, workspace: int | None) -> None:
    for loss in NAMES:
        cases = {n: otherwise(p) for n, p in problems(ranks2, loss, "unequal", seed=5).items()}
        check(ranks2, cases, workspace=workspace)


@losses
def test_more_samples_than_a_tile(ranks2: Ranks, loss: str) -> None:
    g = torch.Generator().manual_seed(5)
    batch = Batch((301, 420), torch.randint(11, (721,), generator=g))
    for dtype in (torch.float64, torch.float32):
        cases = {}
        for reduction in REDUCTIONS[: 1 if loss == "uniformity" else 3]:
            weight = loss not in ("alignment", "uniformity")
            cases[reduction] = make(loss, batch, {}, reduction=reduction, weight=weight, dim=33)
        check(ranks2, cases, dtype)
        check(ranks2, cases, dtype, workspace=64 * 1024)


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
    check(ranks2, cases)
    check(ranks2, cases, workspace=512)


def test_two_groups_at_the_same_time(ranks4: Ranks) -> None:
    dealt, cases = batches(2), {}
    for loss, (reduction, _) in itertools.product(NAMES, SOME):
        pair = [
            make(loss, dealt[name], {}, reduction=reduction, seed=i)
            for i, name in enumerate(("unequal", "empty-shard"))
        ]
        cases[f"{loss}-{reduction}"] = (pair[0], pair[1])
    travelling = {name: pair for name, pair in cases.items() if pair[0].reduction == "mean"}
    gathered = {name: pair for name, pair in cases.items() if name not in travelling}
    check_two_pairs(ranks4, gathered)
    check_two_pairs(ranks4, travelling, workspace=512)


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
