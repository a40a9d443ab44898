"""Files that are written atomically, and lock files."""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl


def write_atomically(path: Path, content: Callable[[IO[bytes]], Any], part: Path | None = None) -> None:
    """Replace ``path`` by a file that ``content`` writes. If anything fails, the old file stays.

    A crash may leave ``part`` behind, an error does not.

    Args:
        part: temporary name of the new file; None: ``path`` with ``.part``, for a path that only one process writes.

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
        kept = "; the previous one is kept" if path.exists() else ""
        raise OSError(
            error.errno, f"{path.parent}: {path.name} could not be written ({error.strerror or error}){kept}"
        ) from error


def write_text(path: Path, text: str) -> None:
    """:func:`write_atomically` of a text, in UTF-8."""
    write_atomically(path, lambda file: file.write(text.encode()))


_held: weakref.WeakSet[IO[str]] = weakref.WeakSet()


def hold(path: Path) -> IO[str]:
    """Lock a file until it is closed or the process ends, and write the process id into it.

    Raises:
        BlockingIOError: if another process holds the lock; the text is the id of that process.
    """
    file = open(path, "a+")  # noqa: SIM115 - the caller closes it
    try:
        _lock(file.fileno())
    except (BlockingIOError, PermissionError):  # Windows raises the latter
        file.seek(0)
        owner = file.read().strip()
        file.close()
        raise BlockingIOError(owner or "unknown") from None
    _held.add(file)
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def _lock(file: int) -> None:
    """Lock an open file, or raise an error at once."""
    if sys.platform == "win32":
        os.lseek(file, 2**20, os.SEEK_SET)  # a byte far behind the process id: nobody else can read what is locked
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _leave_to_parent() -> None:
    """Close the locks in a forked worker: a lock lasts while any copy of its file is open, even if the parent ends."""
    for file in _held:
        file.close()


if sys.platform != "win32":  # where processes do not fork
    os.register_at_fork(after_in_child=_leave_to_parent)


def _sync_folder(folder: Path) -> None:
    """Flush a folder to disk, without which a renamed file may be lost in a power failure. Windows cannot do it."""
    if sys.platform == "win32":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
