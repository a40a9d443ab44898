"""The ranks of a run, and signals that stop it."""

from __future__ import annotations

import atexit
import importlib
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes of a run, and the device of this one."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def share(self) -> dict[str, int]:
        """Keyword arguments of the functions that divide the samples among the ranks."""
        return {"rank": self.rank, "world_size": self.size}

    def agreed(self, function: Callable[[], T]) -> T:
        """Run ``function`` on rank 0 and return its result on all ranks; its exception is raised on all ranks."""
        if self.size == 1:
            return function()
        box: list[Any] = [None, None]
        if self.rank == 0:
            try:
                box[0] = function()
            except Exception as error:
                box[1] = error
        dist.broadcast_object_list(box, src=0)
        if box[1] is not None:
            raise box[1]
        return box[0]

    def gathered(self, value: T) -> list[T]:
        """The values of all ranks, on rank 0; an empty list on the others."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size if self.rank == 0 else []
        dist.gather_object(value, values or None, dst=0)
        return values


def world(device: str, option: str = "run.device") -> World:
    """The ranks of the default process group, which is made under torchrun if there is none; else one process.

    A group that is made here stays to the end of the process: what torchrun's store says of it would confuse another.

    Raises:
        ValueError: naming the option, for a device that this machine does not have.
    """
    place = _device(device, int(os.environ.get("LOCAL_RANK", "0")), option)
    if "RANK" in os.environ and not dist.is_initialized():
        # Its functions have the default group of the time of this import as default arguments. Imported later, by
        # DistributedDataParallel for instance, they would keep a group with its threads beyond _leave, to the end of
        # Python, when a thread that needs Python's lock ends the process with an abort.
        importlib.import_module("torch.distributed.nn.functional")
        # Without a name there is a CPU backend beside that of the accelerator, through which objects travel.
        dist.init_process_group("gloo" if place.type == "cpu" else None)
        atexit.register(_leave)
    return World(place, dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else World(place)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


class Stop:
    """Context that turns SIGTERM and SIGINT into a request to stop; a second SIGINT raises KeyboardInterrupt.

    Only the main thread can install handlers. In another thread, or with ``wanted=False``, signals are not handled.
    """

    def __init__(self, wanted: bool = True) -> None:
        self.requested = False
        self._wanted = wanted and threading.current_thread() is threading.main_thread()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if self._wanted:
            self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            # None: a handler that was not installed from Python and cannot be put back
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True


def parse_device(name: str, option: str = "run.device") -> torch.device:
    """The device of that name, whether or not this machine has it; auto: the accelerator if there is one, else the CPU.

    Raises:
        ValueError: naming the option, for what is no device that can compute.
    """
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"{option}: {name!r} cannot be used here; expected auto, cpu, cuda or cuda:1") from None
    if device.type == "meta":
        raise ValueError(
            f"{option}: {name!r} cannot be used here: its tensors have no values to compute with; expected auto, cpu, "
            "cuda or cuda:1. `train --dry-run` prints what a run would be"
        )
    return device


def _device(name: str, local_rank: int, option: str) -> torch.device:
    """With the index of the local rank, if the name has none."""
    device = parse_device(name, option)
    try:
        if device.type == "cuda":
            device = torch.device("cuda", local_rank if device.index is None else device.index)
            torch.cuda.set_device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, AttributeError, NotImplementedError) as error:  # as various as the backends
        raise ValueError(f"{option}: {name!r} cannot be used here; PyTorch finds {_found()}") from error
    return device


def _found() -> str:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return "cpu only"
    return ", ".join(["cpu", *(f"{accelerator.type}:{index}" for index in range(torch.accelerator.device_count()))])
