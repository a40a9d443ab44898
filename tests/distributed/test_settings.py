"""Settings of the package that decide how keys travel have to be the same on all ranks."""

from __future__ import annotations

import contextlib
import re

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks

import nckernels

SETTINGS = {
    "set_backend": lambda: nckernels.use_backend("reference"),
    "set_workspace": lambda: nckernels.use_workspace(1234),
}


def differently(rank: int, world_size: int, name: str) -> list[str]:
    group = dist.new_group()  # which has compared nothing yet
    x, y, found = torch.randn(6, 4), torch.arange(6) % 3, []
    for loss in (
        lambda: nckernels.supcon_loss(x, y, process_group=group),
        lambda: nckernels.info_nce_loss(x, x + 1.0, process_group=group),
        lambda: nckernels.uniformity_loss(x, process_group=group),
    ):
        with SETTINGS[name]() if rank == 1 else contextlib.nullcontext(), pytest.raises(ValueError) as error:
            loss()
        found.append(str(error.value))
    return found


@pytest.mark.parametrize("name", SETTINGS)
def test_environment_settings_that_differ_are_errors(ranks2: Ranks, name: str) -> None:
    """A ValueError on all ranks that names the setting, instead of a rank that waits for a message."""
    for messages in ranks2.run(differently, name):
        for message in messages:
            assert re.search(rf"agree on {name}, got .* on rank 0 and .* on rank 1$", message), message
