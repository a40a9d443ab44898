"""The worked example of docs/scaling.md: two ranks with batches of five and three samples."""

from __future__ import annotations

import itertools
import math
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

import nckernels
from nckernels._common import Reduction
from nckernels.distributed.groups import GroupLike

DEGREES = ((10.0, 35.0, 80.0, 120.0, 150.0), (20.0, 95.0, 130.0))
LABELS = ((0, 0, 1, 1, 1), (0, 1, 0))
PROTOTYPES = (0.0, 120.0)
TEMPERATURE = 0.5


def ntce(rank: int, group: GroupLike, reduction: Reduction = "mean") -> tuple[Tensor, Tensor]:
    """NTCE of a rank's samples, or of all eight for rank -1, and its derivative with respect to the temperature."""
    own = slice(None) if rank < 0 else slice(rank, rank + 1)
    degrees, labels = (torch.tensor([*itertools.chain(*whole[own])]) for whole in (DEGREES, LABELS))
    temperature = torch.tensor(TEMPERATURE, requires_grad=True)
    loss = nckernels.ntce_loss(
        _points(degrees), _points(torch.tensor(PROTOTYPES)), labels, temperature=temperature,
        reduction=reduction, process_group=group,
    )  # fmt: skip
    return loss.detach(), torch.autograd.grad(loss.sum(), temperature)[0]


def of_rank(rank: int, world_size: int) -> list[float]:
    """The sum of a rank's losses; the returned loss and its gradient; the same for its own samples alone."""
    per_sample, _ = ntce(rank, "world", "none")
    results = (*ntce(rank, "world"), *ntce(rank, None))
    return [float(per_sample.sum()), *(float(x) for x in results)]


def table(first: list[float], second: list[float]) -> str:
    """A Markdown table of the results of :func:`of_rank` on both ranks."""
    whole, slope = (float(x) for x in ntce(-1, None))
    sizes = [len(degrees) for degrees in DEGREES]
    total = sum(sizes)
    averages = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
    own_means = [ranks[0] / n for ranks, n in zip((first, second), sizes, strict=True)]

    def row(name: str, *cells: float | None) -> str:
        return f"| {name} | " + " | ".join("" if x is None else f"{x:.4f}" for x in cells) + " |"

    lines = [
        "| | rank 0 | rank 1 | average over the ranks | one process with all eight |",
        "|---|---|---|---|---|",
        f"| samples | {sizes[0]} | {sizes[1]} | | {total} |",
        row("sum of the samples' losses", first[0], second[0], None, whole * total),
        row(f"**returned**: 2 x the sum / {total}", first[1], second[1], averages[1], whole),
        row("its derivative by the temperature", first[2], second[2], averages[2], slope),
        row("wrong: the mean of the rank's losses", *own_means, sum(own_means) / 2, whole),
        row("other: `process_group=None`", first[3], second[3], averages[3], whole),
        row("its derivative by the temperature", first[4], second[4], averages[4], slope),
    ]
    return "\n".join(lines)


def example() -> str:
    """The table, computed by two processes."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_process, args=(folder,), nprocs=2)
        return table(*(torch.load(Path(folder) / f"{rank}") for rank in range(2)))


def _process(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(of_rank(rank, 2), Path(folder) / f"{rank}")
    time.sleep(0.1)  # lets gloo's threads release their last tensors; otherwise torch 2.13 may hang
    dist.destroy_process_group()


def _points(degrees: Tensor) -> Tensor:
    angle = degrees * (math.pi / 180)
    return torch.stack([angle.cos(), angle.sin()], 1)
