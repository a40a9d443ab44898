"""Memory of a call with keys in a ring, during the call and after it."""

from __future__ import annotations

import gc
import weakref
from unittest import mock

import pytest
import torch
from ranks import Ranks
from test_memory import replay

import nckernels
from nckernels.distributed import ring
from nckernels.distributed.groups import Ranks as GroupOfRanks

LOSSES = {
    "supcon": lambda x: nckernels.supcon_loss(x, torch.arange(len(x)) % 3, process_group="world"),
    "clip": lambda x: nckernels.clip_loss(x, x.tanh(), process_group="world"),
    "uniformity": lambda x: nckernels.uniformity_loss(x, process_group="world"),
}


def left_behind(rank: int, world_size: int, name: str, backward: bool) -> bool:
    """Whether the features are left to the garbage collector, as they are in a cycle of references.

    The rest of the garbage is not looked at: the processes have threads and tests before this one that leave some.
    """

    def call() -> weakref.ref[torch.Tensor]:
        features = torch.randn(6, 4, requires_grad=True) * 1.0
        with nckernels.use_workspace(64):
            loss = LOSSES[name](features)
        if backward:
            loss.backward()
        return weakref.ref(features)

    gc.disable()
    try:
        return call()() is not None
    finally:
        gc.enable()


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_no_tensor_outlives_the_loss(ranks2: Ranks, name: str, backward: bool) -> None:
    assert ranks2.run(left_behind, name, backward) == [False, False]


def peak(rank: int, world_size: int, backward: bool) -> float:
    """The peak of the memory that a call allocates, in rows of a rank."""
    rows, columns = 1024, 128
    x = torch.randn(rows, columns, requires_grad=backward)

    def call() -> None:
        loss = nckernels.uniformity_loss(x, process_group="world")
        if backward:
            loss.backward()

    with nckernels.use_workspace(2**14):
        call()
        x.grad = None
        return replay(call)[0] / (4 * rows * columns)


@pytest.mark.parametrize(("backward", "blocks"), [(False, 2), (True, 8)])
def test_memory_does_not_grow_with_the_number_of_ranks(ranks4: Ranks, backward: bool, blocks: int) -> None:
    """Two blocks in the forward pass. Then the gradients of one block in use, leaving, arriving; of the rows twice."""
    for found in ranks4.run(peak, backward):
        assert found < blocks + 0.4  # vectors and tiles


def travelling(rank: int, world_size: int) -> tuple[set[torch.dtype], set[torch.dtype]]:
    """The dtypes of what is sent and received in a forward and in a backward pass of bfloat16 features."""
    sent: set[torch.dtype] = set()

    def spied(leaving: torch.Tensor, arriving: torch.Tensor, ranks: GroupOfRanks) -> list[object]:
        sent.update((leaving.dtype, arriving.dtype))
        return pass_on(leaving, arriving, ranks)

    pass_on = ring._pass_on
    x = torch.randn(6, 4, dtype=torch.bfloat16, requires_grad=True)
    with mock.patch.object(ring, "_pass_on", spied), nckernels.use_workspace(64):
        loss = LOSSES["clip"](x)
        forward = sent.copy()
        sent.clear()
        loss.backward()
    return forward, sent


def test_gradients_travel_in_float32(ranks2: Ranks) -> None:
    """Rounded to 16 bits on every rank, the sums would have errors that grow with the number of ranks."""
    half = {torch.bfloat16}
    assert ranks2.run(travelling) == [(half, half | {torch.float32})] * 2
