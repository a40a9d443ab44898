"""The cache folder, for files that can be recomputed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

from .files import write_atomically


def cache_folder() -> Path:
    """``$NCKERNELS_CACHE``, or ``nckernels`` in the user's cache folder (``$XDG_CACHE_HOME``, ``~/.cache``)."""
    own = os.environ.get("NCKERNELS_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "nckernels"


def write(path: Path, content: Callable[[IO[bytes]], object]) -> None:
    """Write a file atomically; if the folder cannot be written to, nothing is cached."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Several processes may write it at the same time.
        write_atomically(path, content, path.with_name(f"{path.name}.{os.getpid()}.part"))
