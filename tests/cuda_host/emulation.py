"""The emulated backend, its settings, and the fixtures of its tests."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import host_build
import pytest
import torch

import nckernels
from nckernels.backends import cuda, registry

ROUND_ROBIN, UNIFORM, RUN_AHEAD = SCHEDULES = range(3)
NAN, LARGE = 0xFFFFFFFF, 0x7E007E00
"""Poisons: NaN in every format, and a large finite number, because a maximum ignores NaN."""
FAULTS = {"missing barrier": 1, "missing wait": 2, "wrong fragment": 3, "missing tail mask": 4}


class HostBackend(cuda.CudaBackend):
    """The CUDA backend for tensors on the CPU."""

    def missing(self) -> str | None:
        return None

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return None


class Emulator:
    def __init__(self) -> None:
        path = host_build.library()
        torch.ops.load_library(path)
        self._configure = ctypes.CDLL(str(path)).emu_configure
        self._configure.argtypes = [ctypes.c_int, ctypes.c_uint64, ctypes.c_int, ctypes.c_uint32]

    def configure(self, schedule: int = UNIFORM, seed: int = 1, fault: int = 0, poison: int = NAN) -> None:
        self._configure(schedule, seed, fault, poison)


@pytest.fixture(scope="session")
def loaded() -> Emulator:
    return Emulator()


@pytest.fixture
def emulator(loaded: Emulator, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    """Makes the emulated backend the backend "cuda", and fills the tensors that it allocates with NaN."""
    monkeypatch.setitem(registry.BACKENDS, "cuda", HostBackend())
    loaded.configure()
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns
    with nckernels.use_backend("cuda"):
        yield loaded
    torch.use_deterministic_algorithms(before)
    loaded.configure()
