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
    """Blocks of 16 or 32, so that small problems, which the interpreter runs quickly, have several and a ragged tail.

    As on devices, tiles are not square, their epilogues process a part of the columns at a time, and long rows take
    several blocks of columns.
    """
    from nckernels.backends.triton import config, launch, step

    def shrunk(choose: Callable, p: int, q: int, parts: int) -> Callable:
        def chosen(*args: object) -> object:
            tile = choose(*args)
            if tile is None:
                return None
            whole_rows = choose.__name__.endswith("grad_tile")
            return tile._replace(p=p, q=q, parts=parts, d=tile.d if whole_rows else min(tile.d, 16))

        return chosen

    tiles = {"lse": (16, 32, 4), "entries": (32, 16, 2), "grad": (16, 16, 1), "pairs_lse": (32, 16, 2)}
    for name, sizes in {**tiles, "pairs_grad": (16, 16, 1)}.items():
        monkeypatch.setattr(config, f"{name}_tile", shrunk(getattr(config, f"{name}_tile"), *sizes))
    row_blocks = launch.row_blocks
    for module in (launch, step):
        monkeypatch.setattr(module, "row_blocks", lambda d: row_blocks(min(d, 128)))
    monkeypatch.setattr(config, "panel_tile", lambda: config.PanelTile(16, 16, 4, 8))
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
