"""What a call with keys that go round leaves behind: nothing."""

from __future__ import annotations

import gc

import pytest
import torch
from ranks import Ranks

import nckernels

LOSSES = {
    "supcon": lambda x: nckernels.supcon_loss(x, torch.arange(len(x)) % 3, process_group="world"),
    "clip": lambda x: nckernels.clip_loss(x, x.tanh(), process_group="world"),
    "uniformity": lambda x: nckernels.uniformity_loss(x, process_group="world"),
}


def left_behind(rank: int, world_size: int, name: str, backward: bool) -> bool:
    """Whether anything of the call is left to the garbage collector, as its tensors are in a cycle of references."""

    features = torch.randn(6, 4, requires_grad=True) * 1.0
    gc.collect()
    gc.disable()
    try:
        with nckernels.use_workspace(64):
            loss = LOSSES[name](features)
        if backward:
            loss.backward()
        del features, loss
        return gc.collect() > 0
    finally:
        gc.enable()


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_nothing_outlives_the_loss(ranks2: Ranks, name: str, backward: bool) -> None:
    assert ranks2.run(left_behind, name, backward) == [False, False]
