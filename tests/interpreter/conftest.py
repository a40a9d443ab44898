"""Triton's interpreter must be on before anything imports the kernels: TRITON_INTERPRET=1 pytest tests/interpreter."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import pytest

import nckernels

if os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blocks of 16, so that small problems, which the interpreter runs quickly, have several and a ragged tail."""
    from nckernels.backends.triton import config

    def shrunk(choose: Callable, whole_rows: bool) -> Callable:
        def chosen(*args: object) -> object:
            tile = choose(*args)
            if tile is None:
                return None
            return tile._replace(p=16, q=16, d=tile.d if whole_rows else min(tile.d, 16))

        return chosen

    for name in ("lse_tile", "entries_tile", "grad_tile", "pairs_lse_tile", "pairs_grad_tile"):
        monkeypatch.setattr(config, name, shrunk(getattr(config, name), name.endswith("grad_tile")))
    monkeypatch.setattr(config, "panel_tile", lambda: config.PanelTile(16, 16, 4, 4))
    with nckernels.use_backend("triton"):
        yield


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each kernel was launched."""
    from nckernels.backends.triton import launch

    counts: Counter[str] = Counter()
    original = launch.launch

    def counted(kernel: Any, *args: Any, **options: Any) -> None:
        counts[kernel.__name__] += 1
        original(kernel, *args, **options)

    monkeypatch.setattr(launch, "launch", counted)
    return counts
