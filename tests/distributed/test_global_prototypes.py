"""NONL, NTCE and NormFace with the negatives of all ranks: losses and gradients add up to the whole batch's."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from oracle import LOSSES
from ranks import Ranks
from torch import Tensor, nn

import nckernels

from .global_cases import (
    CLASSES,
    DTYPES,
    MOST,
    PROTOTYPE_VARIANTS,
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
    package,
    value_and_grads,
)

losses = pytest.mark.parametrize("loss", LOSSES)


def problems(
    ranks: Ranks, loss: str, *names: str, reductions: Sequence[tuple[str, bool]] = SOME, seed: int = 0
) -> dict[str, Problem]:
    """The variants of a loss on the named batches, or all; reductions, and whether with class weights."""
    found = {}
    dealt = batches(ranks.world_size)
    variants = {v: options for v, (of, options) in PROTOTYPE_VARIANTS.items() if of == loss}
    for name, variant, (reduction, weight) in itertools.product(names or dealt, variants, reductions):
        case = f"{variant}-{name}-{reduction}" + ("-weight" if weight else "")
        found[case] = make(loss, dealt[name], variants[variant], reduction=reduction, weight=weight, seed=seed)
    return found


@losses
def test_ranks_add_up_to_the_whole_batch(ranks: Ranks, loss: str) -> None:
    check(ranks, problems(ranks, loss, reductions=MOST if ranks.world_size == 2 else SOME))


def sequences(rank: int, world_size: int, x: Tensor, w: Tensor, y: Tensor, reduction: Any) -> Tensor:
    """The first rank has one of them, the others the rest."""
    mine = slice(0, 1) if rank == 0 else slice(1, None)
    return nckernels.nonl_loss(x[mine], w, y[mine], reduction=reduction, process_group="world")


def test_leading_dimensions(ranks2: Ranks) -> None:
    """Every rank flattens its own."""
    x, w = torch.randn(4, 3, 6, dtype=torch.float64), torch.randn(CLASSES, 6, dtype=torch.float64)
    y = torch.randint(CLASSES, (4, 3))
    found = ranks2.run(sequences, x, w, y, "none")
    torch.testing.assert_close(torch.cat(found), nckernels.nonl_loss(x, w, y, reduction="none"), rtol=1e-12, atol=1e-12)
    found = ranks2.run(sequences, x, w, y, "mean")
    torch.testing.assert_close(sum(found) / 2, nckernels.nonl_loss(x, w, y), rtol=1e-12, atol=1e-12)


def grad_of_weights(rank: int, world_size: int, x: Tensor, w: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    mine = slice(0, 3) if rank == 0 else slice(3, None)
    weight = weight[mine].clone().requires_grad_()
    nckernels.nonl_loss(x[mine], w, y[mine], sample_weight=weight, process_group="world").backward()
    assert weight.grad is not None
    return weight.grad


def test_gradient_of_sample_weights(ranks2: Ranks) -> None:
    """All ranks' losses depend on the sum of all weights."""
    x, w = torch.randn(10, 6, dtype=torch.float64), torch.randn(CLASSES, 6, dtype=torch.float64)
    y, weight = torch.arange(10) % 4, torch.rand(10, dtype=torch.float64, requires_grad=True)
    found = torch.cat(ranks2.run(grad_of_weights, x, w, y, weight.detach()))
    nckernels.nonl_loss(x, w, y, sample_weight=weight).backward()
    torch.testing.assert_close(found / 2, weight.grad, rtol=1e-12, atol=1e-12)


def smoothed_over_nothing(rank: int, world_size: int) -> Tensor:
    weight = torch.tensor([0.0, 0.0, 1.0])
    return nckernels.normface_loss(
        torch.randn(4, 6), torch.ones(3, 6), torch.tensor([0, 1, 0, 1]), weight=weight, label_smoothing=0.1,
        process_group="world",
    )  # fmt: skip


def test_label_smoothing_over_a_total_weight_of_zero(ranks2: Ranks) -> None:
    """NaN, as in F.cross_entropy."""
    assert all(bool(loss.isnan()) for loss in ranks2.run(smoothed_over_nothing))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(ranks: Ranks, dtype: torch.dtype) -> None:
    for loss in LOSSES:
        check(ranks, problems(ranks, loss, "unequal", "empty-shard", seed=1), dtype)


def test_autocast(ranks2: Ranks) -> None:
    for loss in LOSSES:
        check(ranks2, problems(ranks2, loss, "unequal", "empty-shard", seed=1), torch.float32, autocast=True)


@pytest.mark.parametrize("backend", ["reference", "chunked", "native"])
def test_backends(ranks2: Ranks, backend: str) -> None:
    for loss in LOSSES:
        check(ranks2, problems(ranks2, loss, "unequal", "all-ignored", seed=2), backend=backend)


@losses
def test_exchange_of_the_classes_that_occur(ranks: Ranks, loss: str) -> None:
    """More than 16,384 classes; some occur on several ranks, some on one."""
    classes = 20_000
    g = torch.Generator().manual_seed(3)
    few = torch.randint(classes, (8,), generator=g)
    cases = {}
    for name, batch in batches(ranks.world_size).items():
        if name not in ("unequal", "empty-shard", "all-empty", "ignored-rank"):
            continue
        anywhere = torch.randint(classes, batch.classes.shape, generator=g)
        shared = few[batch.classes % 8].where(batch.classes % 3 > 0, anywhere)
        batch = Batch(batch.sizes, shared.where(batch.classes >= 0, batch.classes))
        for variant in ("nonl", "nonl-instance", "nonl-both", "ntce", "normface"):
            of, options = PROTOTYPE_VARIANTS[variant]
            if of != loss:
                continue
            for reduction, weight in (("none", False), ("mean", True), ("sum", False)):
                p = make(loss, batch, options, reduction=reduction, weight=weight, classes=classes, dim=4)
                cases[f"{variant}-{name}-{reduction}"] = p
    check(ranks, cases)


@losses
def test_more_samples_than_a_tile(ranks2: Ranks, loss: str) -> None:
    """Several hundred samples and classes, a cold temperature."""
    g = torch.Generator().manual_seed(5)
    batch = Batch((301, 420), torch.randint(150, (721,), generator=g))
    for dtype in (torch.float64, torch.float32):
        cases = {
            r: make(loss, batch, {}, reduction=r, weight=True, classes=150, dim=33, temperature=0.02)
            for r in REDUCTIONS
        }
        check(ranks2, cases, dtype)


def temperatures(rank: int, world_size: int, p: Problem) -> dict[str, Any]:
    p = p.part(rank)
    leaves = p.leaves
    loss = package(p.loss)
    tau = float(p.temperature)  # type: ignore[arg-type]
    parameter = nn.Parameter(torch.tensor(tau, dtype=torch.float64))
    kinds = {"number": tau, "tensor": torch.tensor(tau, dtype=torch.float64), "parameter": parameter}
    found = {n: p.call(loss, {**leaves, "temperature": t}, process_group="world") for n, t in kinds.items()}
    found["parameter"].backward(p.upstream)
    # From a parameter in log space, as CLIP has it.
    log = torch.tensor(tau, dtype=torch.float64).log().requires_grad_()
    value = p.call(loss, {**leaves, "temperature": log.exp()}, process_group="world")
    value.backward(p.upstream)
    return {
        **{n: x.detach() for n, x in found.items()}, "requires": [x.requires_grad for x in found.values()],
        "grad": parameter.grad, "log grad": log.grad,
    }  # fmt: skip


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_kinds_of_temperature(ranks2: Ranks, reduction: str) -> None:
    """A number, a tensor, a parameter give the same loss, and a gradient if they require one."""
    for loss in LOSSES:
        p = make(loss, batches(2)["unequal"], {}, reduction=reduction)
        results = ranks2.run(temperatures, p)
        for r in results:
            torch.testing.assert_close(r["tensor"], r["number"], rtol=1e-14, atol=1e-14)
            torch.testing.assert_close(r["parameter"], r["number"], rtol=1e-14, atol=1e-14)
            assert r["requires"] == [False, False, True]
            torch.testing.assert_close(r["log grad"], r["grad"] * p.temperature, rtol=1e-12, atol=1e-14)
        truth = value_and_grads(p.whole(), package(loss))["temperature"]
        total = sum(r["grad"] for r in results) / (1 if reduction == "none" else 2)
        torch.testing.assert_close(total, truth, rtol=1e-11, atol=0)


def test_some_gradients_and_backward_twice(ranks2: Ranks) -> None:
    for loss in LOSSES:
        check_some_gradients(ranks2, problems(ranks2, loss, "unequal", seed=4))


def test_integers_strides_and_ignore_index(ranks2: Ranks) -> None:
    for loss in LOSSES:
        check(ranks2, {n: otherwise(p) for n, p in problems(ranks2, loss, "unequal", seed=5).items()})


def test_two_groups_at_the_same_time(ranks4: Ranks) -> None:
    dealt, cases = batches(2), {}
    for loss, (reduction, weight) in itertools.product(LOSSES, SOME):
        first = make(loss, dealt["unequal"], {}, reduction=reduction, weight=weight)
        second = make(loss, dealt["empty-shard"], {}, reduction=reduction, weight=weight, seed=1)
        cases[f"{loss}-{reduction}"] = first, second
    check_two_pairs(ranks4, cases)


def one_rank(rank: int, world_size: int, p: Problem) -> list[Tensor]:
    groups = [dist.new_group([r]) for r in range(world_size)]
    got = value_and_grads(p, package(p.loss), process_group=groups[rank])
    alone = value_and_grads(p, package(p.loss))
    return [got[n] - alone[n] for n in got]


def test_a_group_of_one_rank_equals_no_group(ranks2: Ranks) -> None:
    """The loss of one process, to a few roundings."""
    for loss in LOSSES:
        p = make(loss, Batch((20,), torch.arange(20) % CLASSES), {}, weight=True)
        p = dataclasses.replace(p, sizes=((20,),))
        for differences in ranks2.run(one_rank, p):
            for difference in differences:
                assert difference.abs().max() <= 1e-13
