from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from emulation import Emulator, HostBackend

import nckernels
from nckernels.backends import registry


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
