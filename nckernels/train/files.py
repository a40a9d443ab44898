"""Files that are there as a whole or not at all, and files that one process holds at a time."""

from __future__ import annotations

import fcntl
import os
import weakref
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


_held: weakref.WeakSet[IO[str]] = weakref.WeakSet()


def hold(path: Path) -> IO[str]:
    """Lock a file, which gets the number of this process, until it is closed or the process ends.

    Raises:
        BlockingIOError: if another process holds it, with the number of that one as its text.
    """
    file = open(path, "a+")  # noqa: SIM115 - the caller closes it
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip()
        file.close()
        raise BlockingIOError(owner or "unknown") from None
    _held.add(file)
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def _leave_to_parent() -> None:
    """A lock lasts until the last copy of its file is closed; a worker's would outlive a parent that is killed."""
    for file in _held:
        file.close()


os.register_at_fork(after_in_child=_leave_to_parent)


def _sync_folder(folder: Path) -> None:
    """A renamed file is there after a power failure only if its folder is on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
