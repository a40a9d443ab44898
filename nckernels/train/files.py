"""Files that are there as a whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any


def write_atomically(path: Path, content: Callable[[IO[bytes]], Any], part: Path | None = None) -> None:
    """Replace ``path`` by what ``content`` writes into a file; whatever happens on the way leaves the old one.

    A crash may leave ``part`` behind, an error does not.

    Args:
        part: the new file until it is on the disk; None: ``path`` with ``.part``, for a path that one process writes.

    Raises:
        OSError: naming the folder, for instance when the disk is full.
    """
    part = part or path.with_name(path.name + ".part")
    try:
        try:
            with open(part, "wb") as file:
                content(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
            _sync_folder(path.parent)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    except OSError as error:
        kept = "; the one before is kept" if path.exists() else ""
        raise OSError(
            error.errno, f"{path.parent}: {path.name} could not be written ({error.strerror or error}){kept}"
        ) from error


def write_text(path: Path, text: str) -> None:
    """:func:`write_atomically` of a text, in UTF-8."""
    write_atomically(path, lambda file: file.write(text.encode()))


def _sync_folder(folder: Path) -> None:
    """A renamed file is there after a power failure only if its folder is on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
