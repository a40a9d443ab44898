"""Resolves which processes a loss spans, and checks that they use the same options.

A loss takes ``process_group``: None for this process alone, ``"world"`` for the default group, which is looked up
when the loss is called, or a group of :func:`torch.distributed.new_group`. A process that no launcher has started
with others is the whole world, so that one program runs on one device and on many.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _checks

GroupLike = Any
"""ProcessGroup | Literal["world"] | None. (A build of torch without distributed has no ProcessGroup to name.)"""

WORLD: Literal["world"] = "world"

_LAUNCHED = ("WORLD_SIZE", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
"""Where torchrun, srun and mpirun tell how many processes they have started."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a group, seen from one of them."""

    group: Any
    rank: int
    size: int


def check(process_group: GroupLike) -> None:
    """Check the type of ``process_group``; :func:`resolve` checks whether it contains this process."""
    if process_group is None or process_group == WORLD:
        return
    is_group = dist.is_available() and (
        isinstance(process_group, dist.ProcessGroup) or process_group == dist.GroupMember.NON_GROUP_MEMBER
    )
    if not is_group:
        raise TypeError(
            "process_group must be a torch.distributed.ProcessGroup, 'world' or None, "
            f"got {process_group!r} of type {type(process_group).__name__}"
        )


def resolve(process_group: GroupLike) -> Ranks | None:
    """The processes that a loss spans; None for one process, alone in its group or without any.

    Raises:
        TypeError: if ``process_group`` is something else.
        ValueError: if ``torch.distributed`` is not initialised although there are other processes, or this process is
            not in the group.
    """
    check(process_group)
    if process_group is None:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        if process_group == WORLD and all(os.environ.get(name, "1") == "1" for name in _LAUNCHED):
            return None
        raise ValueError(
            f"process_group={process_group!r} needs a call of torch.distributed.init_process_group first; "
            "process_group=None is this process alone"
        )
    if process_group == WORLD:
        process_group = dist.group.WORLD
    rank, size = dist.get_rank(process_group), dist.get_world_size(process_group)
    if rank < 0:
        raise ValueError(f"process_group does not contain this process, rank {dist.get_rank()} of the world")
    return None if size == 1 else Ranks(process_group, rank, size)


_agreed: weakref.WeakKeyDictionary[Any, set[Hashable]] = weakref.WeakKeyDictionary()


def agree(ranks: Ranks, loss: str, input: Tensor, values: dict[str, float | Tensor], **options: Hashable) -> None:
    """Compare the options on all ranks, once for each group and configuration, in one small exchange.

    Args:
        values: numbers or tensors that may change from call to call, such as a temperature. Numbers are compared, but a
            new number is not a new configuration.
        options: the configuration, together with the name of the loss and the dtype.

    The environment variable ``NCKERNELS_CHECK_RANKS=0`` switches the exchange off.

    Raises:
        ValueError: on every rank, naming the first option that differs.
    """
    if torch.compiler.is_compiling() or input.is_meta or os.environ.get("NCKERNELS_CHECK_RANKS") == "0":
        return
    autocast = torch.get_autocast_dtype(input.device.type) if _checks.autocast_enabled(input) else None
    options = {"loss": loss, **options, "dtype": input.dtype, "autocast": autocast}
    known, configuration = _agreed.setdefault(ranks.group, set()), tuple(options.items())
    if configuration in known:
        return
    shown = {name: "a tensor" if isinstance(value, Tensor) else value for name, value in values.items()}
    everybody: list[Any] = [None] * ranks.size
    dist.all_gather_object(everybody, options | shown, group=ranks.group)
    for name in dict.fromkeys(name for theirs in everybody for name in theirs):
        found = [theirs.get(name, "nothing") for theirs in everybody]
        for rank, value in enumerate(found):
            if value != found[0]:
                raise ValueError(
                    f"{loss}: the ranks of process_group must agree on {name}, "
                    f"got {found[0]} on rank 0 and {value} on rank {rank}"
                )
    known.add(configuration)
