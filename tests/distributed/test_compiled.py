"""torch.compile of losses that span ranks: the numbers of eager mode, in one graph where no sizes are exchanged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import Ranks
from torch import Tensor

import nckernels
from nckernels.distributed import collectives
from nckernels.distributed.groups import resolve

K, D = 5, 8
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

# Of (M, D) rows, (K, D) prototypes and labels.
ONE_GRAPH: dict[str, Loss] = {
    "nonl": lambda x, w, y: nckernels.nonl_loss(x, w, y, process_group="world"),
    "nonl both": lambda x, w, y: nckernels.nonl_loss(x, w, y, direction="both", process_group="world"),
    "ntce none": lambda x, w, y: nckernels.ntce_loss(x, w, y, reduction="none", process_group="world").square().sum(),
    "normface": lambda x, w, y: nckernels.normface_loss(x, w, y, process_group="world"),
    "prototype": lambda x, w, y: nckernels.prototype_loss(x * w[0], y, num_classes=K, process_group="world"),
}
GRAPHS: dict[str, Loss] = {
    "supcon": lambda x, w, y: nckernels.supcon_loss(x * w[0], y, process_group="world"),
    "clip": lambda x, w, y: nckernels.clip_loss(x, x * w[0], process_group="world"),
}


def compiled_and_eager(rank: int, world_size: int, name: str, options: dict[str, Any]) -> list[tuple[Tensor, ...]]:
    loss = {**ONE_GRAPH, **GRAPHS}[name]
    generator = torch.Generator().manual_seed(rank)
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", **options)
    found = []
    for m in (6 + rank, 9 + rank):
        x = torch.randn(m, D, generator=generator, requires_grad=True)
        w = torch.randn(K, D, generator=torch.Generator().manual_seed(0), requires_grad=True)
        y = torch.randint(K, (m,), generator=generator)
        for call in (compiled, loss):
            value = call(x, w, y)
            found.append((value.detach(), *torch.autograd.grad(value, (x, w))))
    return found


def assert_equal(found: list[tuple[Tensor, ...]]) -> None:
    for compiled, eager in zip(found[::2], found[1::2], strict=True):
        torch.testing.assert_close(compiled, eager)


QUICK = ("nonl", "normface")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in ONE_GRAPH])
def test_compiles_to_one_graph(ranks2: Ranks, name: str) -> None:
    for found in ranks2.run(compiled_and_eager, name, {"fullgraph": True, "dynamic": True}):
        assert_equal(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", GRAPHS)
def test_results_with_a_graph_break_equal_eager(ranks2: Ranks, name: str) -> None:
    """The graph breaks where the host asks for the sizes of the batches."""
    for found in ranks2.run(compiled_and_eager, name, {}):
        assert_equal(found)


def as_one_graph(rank: int, world_size: int) -> None:
    compiled_and_eager(rank, world_size, "supcon", {"fullgraph": True})


def test_fullgraph_error_names_the_graph_break(ranks2: Ranks) -> None:
    for error in ranks2.errors(as_one_graph):
        assert "the host has to know how many rows all ranks have" in str(error)


def by_inductor(rank: int, world_size: int) -> list[tuple[Tensor, ...]]:
    ranks = resolve("world")
    assert ranks is not None

    def share(lse: Tensor, weight: Tensor) -> Tensor:
        own, total = collectives.shared_logsumexp(2 * lse, weight, ranks)
        return own / total

    torch._dynamo.reset()
    lse = torch.linspace(-1.0, rank, K, requires_grad=True)
    found = []
    for call in (torch.compile(share, fullgraph=True), share):
        value = call(lse, torch.arange(1.0, K + 1))
        found.append((value.detach(), *torch.autograd.grad(value, lse)))
    return found


def test_inductor_does_not_all_reduce_in_place(ranks2: Ranks) -> None:
    """The rank's own terms are needed after the all-reduce, so it must not overwrite them."""
    for found in ranks2.run(by_inductor):
        assert_equal(found)
