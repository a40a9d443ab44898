"""The model of traffic and memory in benchmarks/scaling.py against measurements; docs/scaling.md has its tables."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import nckernels
from benchmarks import scaling, two_ranks
from benchmarks.measure import peak_memory
from benchmarks.scaling import Exchange, Step
from nckernels.distributed import contrast

D, VIEWS, PER_CLASS = 6, 2, 3
PROTOTYPES = (
    "ntce", "nonl", "nonl both", "nonl instance", "normface", "dot_regression", "nonl spread", "normface spread",
)  # fmt: skip
KEYS = ("supcon", "simclr", "info_nce", "clip", "uniformity")
SIZES = {2: ((4, 4), (5, 2), (0, 3)), 4: ((1, 4, 0, 2),)}
KINDS = {
    "allreduce": "all-reduce",
    "all_gather_single": "all-gather",  # in torch 2.13
    "_allgather_base": "all-gather",
    "reduce_scatter_single": "reduce-scatter",
    "_reduce_scatter_base": "reduce-scatter",
    "send": "send",
}
CALLS = re.compile("all|reduce|gather|scatter|broadcast|send|barrier")  # a recv is the other end of a send

Calls = Counter[tuple[str, torch.dtype, int, bool]]


@contextlib.contextmanager
def recorded(calls: Calls, *, backward: bool) -> Iterator[None]:
    """Count the collectives that a group is asked for, and the numbers of the tensor given."""

    def instead(name: str) -> Callable[..., Any]:
        method = getattr(dist.ProcessGroup, name)

        def call(group: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
            given = args[1] if isinstance(args[0], Tensor) else args[0]  # (output, input, ...) or ([tensor], ...)
            (tensor,) = [given] if isinstance(given, Tensor) else given
            calls[KINDS[name], tensor.dtype, tensor.numel(), backward] += 1
            return method(group, *args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in filter(CALLS.search, dir(dist.ProcessGroup)):
            if callable(getattr(dist.ProcessGroup, name)):
                patch.setattr(dist.ProcessGroup, name, instead(name))
        yield


def modelled(exchanges: list[Exchange]) -> Calls:
    return Counter((e.kind, e.dtype, e.numbers, e.backward) for e in exchanges)


def call(loss: str, step: Step, x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """The loss of a rank's rows, with prototypes or keys ``w``."""
    name, *rest = loss.split()
    function = getattr(nckernels, f"{name}_loss" if name != "simclr" else "supcon_loss")
    options: dict[str, Any] = {"process_group": "world", "reduction": step.reduction}
    if name in ("ntce", "nonl", "normface", "dot_regression"):
        return function(x, w, y, **options | ({} if rest in ([], ["spread"]) else {"direction": rest[0]}))
    if name == "supcon":
        return function(x, y, **options)
    if name == "simclr":
        return function(x.unflatten(0, (-1, VIEWS)), **options)
    if name == "prototype":
        return function(x, y, num_classes=step.classes or None, **options)
    if name == "uniformity":
        return function(x, process_group="world")
    return function(x, w, **options)


def steps(rank: int, world_size: int) -> Iterator[tuple[str, Step]]:
    """Every loss and reduction, gathered and ring; unequal batches; few classes, many, and more than samples."""
    for sizes, loss in itertools.product(SIZES[world_size], scaling.LOSSES):
        counts = tuple(n * VIEWS for n in sizes) if loss == "simclr" else sizes
        classes = (5, 9, 40) if loss in PROTOTYPES else (0, 5) if loss == "prototype" else (0,)
        reductions = ("mean",) if loss == "uniformity" else ("mean", "sum", "none")
        for k, reduction, ring in itertools.product(classes, reductions, (False, True) if loss in KEYS else (False,)):
            for dtype in (torch.float32, torch.bfloat16, torch.float64) if reduction == "mean" else (torch.bfloat16,):
                yield loss, Step(counts, D, dtype, k, reduction, ring, rank=rank)


def labels_of(rank: int, counts: tuple[int, ...]) -> Tensor:
    """Classes 0, 1, 2, ... of this rank's rows."""
    return torch.arange(sum(counts[:rank]), sum(counts[: rank + 1])) % PER_CLASS


def differences(rank: int, world_size: int) -> tuple[int, list[str]]:
    """The number of compared steps, and the differences."""
    found, compared = [], 0
    mesh = init_device_mesh("cpu", (world_size,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contrast, "COMPACT_ABOVE", 8)
        patch.setattr(scaling, "COMPACT_ABOVE", 8)
        patch.setenv("NCKERNELS_CHECK_RANKS", "0")
        for loss, step in steps(rank, world_size):
            present = min(PER_CLASS, step.total)
            step = dataclasses.replace(step, present=present)
            m = step.counts[rank]
            x, w = (torch.randn(n, D, dtype=step.dtype, requires_grad=True) for n in (m, step.classes or m))
            if "spread" in loss:
                w = distribute_tensor(w, mesh, [Shard(0)])
            calls: Calls = Counter()
            with nckernels.use_workspace(1 if step.ring else 1 << 20):
                with recorded(calls, backward=False):
                    value = call(loss, step, x, w, labels_of(rank, step.counts))
                with recorded(calls, backward=True):
                    value.sum().backward()
            expected = modelled(scaling.exchanges(loss, step))
            compared += 1
            if calls != expected:
                found.append(f"{loss} {step}: {calls - expected} not expected, {expected - calls} missed")
    return compared, found


def test_the_model_predicts_every_collective(ranks: Ranks) -> None:
    for compared, found in ranks.run(differences):
        assert compared > 150
        assert not found, "\n".join(found)


# --------------------------------------------------------------------------------------------------
# memory

HELD = ("nonl", "nonl compact", "normface", "info_nce", "clip", "supcon", "simclr")
WIDE, ROWS = 256, 512


def peaks(rank: int, world_size: int) -> list[tuple[str, int, int, int]]:
    """For each case the least and the largest allowed peak in bytes, by the model, and the measured one."""
    found = []
    for case, dtype, ring in itertools.product(HELD, (torch.float32, torch.bfloat16), (False, True)):
        loss = case.split()[0]
        if ring and loss not in KEYS:
            continue
        classes = 0 if loss in KEYS else 4096 if "compact" in case else 128
        step = Step((ROWS,) * world_size, WIDE, dtype, classes, "mean", ring, ROWS * world_size, rank)
        x, w = (torch.randn(n, WIDE, dtype=dtype, requires_grad=True) for n in (ROWS, classes or ROWS))
        y = torch.arange(rank * ROWS, (rank + 1) * ROWS) % (classes or 64)
        leaves = (x,) if loss in ("supcon", "simclr") else (x, w)
        keys = step.total * WIDE * dtype.itemsize
        workspace = keys - 1 if ring else max(keys, 1 << 20)

        def once() -> None:
            torch.autograd.grad(call(loss, step, x, w, y), leaves)  # noqa: B023

        with pytest.MonkeyPatch.context() as patch, nckernels.use_workspace(workspace):
            for module in (contrast, scaling):
                patch.setattr(module, "COMPACT_ABOVE", 1024)
            once()
            dist.barrier()
            measured = peak_memory(once, torch.device("cpu")).extra
            held = scaling.held(loss, step)
        gradients, vectors = sum(leaf.numel() for leaf in leaves) * 4, 256 * (step.total + ROWS + classes)
        # A step in parts has the sums of the keys' gradient in float32 and the gradient itself.
        rounded = keys if (case, dtype, ring) == ("info_nce", torch.bfloat16, False) else 0
        late = x.numel() * dtype.itemsize  # a thread of gloo may release the features after the call has returned
        most = int(1.1 * held) + gradients + rounded + late + workspace + vectors
        # Scratch depends on the CPU's instructions, and some of what is held may be gone when it is largest.
        found.append((f"{case} {dtype}{' ring' if ring else ''}", int(0.98 * held), most, measured))
    return found


def test_the_model_predicts_the_peak_memory(ranks: Ranks) -> None:
    for found in ranks.run(peaks):
        for case, least, most, measured in found:
            assert least <= measured <= most, f"{case}: {measured} bytes, not {least} to {most}"


# --------------------------------------------------------------------------------------------------
# the page


def test_bytes_on_the_wire() -> None:
    """In a ring of four a rank sends three quarters of the tensor twice: for the reduce-scatter and the all-gather."""
    for kind, factor in (("all-reduce", 1.5), ("all-gather", 3), ("reduce-scatter", 0.75), ("send", 1)):
        assert Exchange(kind, "", torch.float32, 10).wire(4) == factor * 40


def test_the_page_has_the_current_tables(ranks2: Ranks) -> None:
    page = scaling.PAGE.read_text()
    worked = two_ranks.table(*ranks2.run(two_ranks.of_rank))
    assert scaling.written(page, worked) == page, "run python -m benchmarks scaling --write"
