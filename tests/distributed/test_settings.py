"""Settings of the package that decide how keys travel: ranks agree on a workspace, and have to have one backend."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch import Tensor

import nckernels
from nckernels.distributed import ring

LOSSES: tuple[Callable[[Tensor, Any], Tensor], ...] = (
    lambda x, group: nckernels.supcon_loss(x, torch.arange(6) % 3, process_group=group),
    lambda x, group: nckernels.info_nce_loss(x, x + 1.0, process_group=group),
    lambda x, group: nckernels.uniformity_loss(x, process_group=group),
)


def other_backend(rank: int, world_size: int) -> list[str]:
    group = dist.new_group()  # which has compared nothing yet
    x, found = torch.randn(6, 4), []
    for loss in LOSSES:
        chosen = nckernels.use_backend("reference") if rank == 1 else contextlib.nullcontext()
        with chosen, pytest.raises(ValueError) as error:
            loss(x, group)
        found.append(str(error.value))
    return found


def test_a_backend_that_differs_is_an_error(ranks2: Ranks) -> None:
    """A ValueError on all ranks that names the setting, instead of a rank that waits for a message."""
    for messages in ranks2.run(other_backend):
        for message in messages:
            assert re.search(r"agree on set_backend, got .* on rank 0 and .* on rank 1$", message), message


def rounds(rank: int, world_size: int, workspaces: list[int]) -> list[bool]:
    """Whether the keys of each loss went round the ring."""
    x, found = torch.randn(6, 4, requires_grad=True), []
    for loss in LOSSES:
        with nckernels.use_workspace(workspaces[rank]), mock.patch.object(ring, "lse", wraps=ring.lse) as spy:
            loss(x, "world").backward()
        found.append(spy.called)
    return found


@pytest.mark.parametrize(
    ("workspaces", "travel"),
    [([191, 2**20], True), ([2**20, 191], True), ([192, 2**20], False)],
    ids=["first", "second", "fits"],
)
def test_the_smallest_workspace_decides_how_keys_travel(ranks2: Ranks, workspaces: list[int], travel: bool) -> None:
    """On all ranks: one that sends its keys round the ring would wait for one that gathers them.

    Here they take 192 bytes.
    """
    assert ranks2.run(rounds, workspaces) == [[travel] * 3] * 2
