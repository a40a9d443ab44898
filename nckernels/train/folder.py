"""The folder of a run: one process group at a time, one recipe, and whether there is something to go on with."""

from __future__ import annotations

import fcntl
import json
import os
import weakref
from pathlib import Path
from typing import IO, Any

from . import checkpoint
from .files import write_text
from .recipe import Recipe


class Folder:
    """A run's folder, held by a lock until :meth:`close` or the end of the process.

    Raises:
        ValueError: if another process trains in it.
        OSError: if it cannot be made or written to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoint = path / "checkpoint.pt"
        path.mkdir(parents=True, exist_ok=True)
        self._lock = open(path / "lock", "a+")  # noqa: SIM115 - held
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            owner = self._lock.read().strip()
            self._lock.close()
            raise ValueError(f"{path}: process {owner or 'unknown'} trains in this folder") from None
        _held.add(self._lock)
        self._lock.truncate(0)
        self._lock.write(f"{os.getpid()}\n")
        self._lock.flush()
        for part in path.glob("*.part"):  # of a process that was killed while it wrote
            part.unlink()

    def open(self, recipe: Recipe, resume: bool) -> dict[str, Any] | None:
        """The checkpoint to go on from, or None for a new run, whose recipe is written.

        Raises:
            ValueError: if there is a run and ``resume`` is False, or a run of another recipe, or a damaged checkpoint.
        """
        file, history = self.path / "recipe.json", self.path / "history.json"
        if self.checkpoint.exists() or history.exists():  # a recipe alone is of a run that never began
            if not resume:
                raise ValueError(f"{self.path} has a run; --resume auto goes on with it")
            if file.exists():
                checkpoint.check_recipe(file, _read(file), recipe)
        saved = checkpoint.load(self.checkpoint) if self.checkpoint.exists() else None
        if saved is not None:
            checkpoint.check_recipe(self.checkpoint, saved["recipe"], recipe)
            done = _read(history) if history.exists() else {}
            if done.get("finished"):  # then it has more than the checkpoint: what came after the last step
                saved["history"] = done
        write_text(file, json.dumps(recipe.to_dict(), indent=1) + "\n")
        return saved

    def close(self) -> None:
        """Let others train here."""
        self._lock.close()


def _read(file: Path) -> Any:
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected an object, got {type(content).__name__}")
    return content


_held: weakref.WeakSet[IO[str]] = weakref.WeakSet()


def _leave_to_parent() -> None:
    """A lock lasts until the last copy of its file is closed; a worker's would outlive a parent that is killed."""
    for file in _held:
        file.close()


os.register_at_fork(after_in_child=_leave_to_parent)
