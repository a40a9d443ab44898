"""The folder of a run, which belongs to one recipe and is locked while a run trains in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from . import checkpoint
from .files import hold, write_text
from .recipe import Recipe


class Folder:
    """A run's folder, locked until :meth:`close` or the end of the process.

    Raises:
        ValueError: if another process trains in it.
        OSError: if it cannot be made or written to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoint = path / "checkpoint.pt"
        path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock = hold(path / "lock")
        except BlockingIOError as owner:
            raise ValueError(f"{path}: process {owner} is already training in this folder") from None
        for part in path.glob("*.part"):  # left by a process that was killed while writing
            part.unlink()

    def open(self, recipe: Recipe, resume: bool) -> dict[str, Any] | None:
        """The checkpoint to resume from, or None for a new run, whose recipe is written.

        Raises:
            ValueError: if there is a run and ``resume`` is False, if it has another recipe, or if its checkpoint is
                damaged.
        """
        file, history = self.path / "recipe.json", self.path / "history.json"
        if self.checkpoint.exists() or history.exists():  # a recipe alone is from a run that never began
            if not resume:
                raise ValueError(
                    f"{self.path} already has a run; --resume auto continues it, another --out starts a new one"
                )
            if file.exists():
                checkpoint.check_recipe(file, _read(file), recipe)
        saved = checkpoint.load(self.checkpoint) if self.checkpoint.exists() else None
        if saved is not None:
            checkpoint.check_recipe(self.checkpoint, saved["recipe"], recipe)
            done = _read(history) if history.exists() else {}
            if done.get("finished"):  # then it also has what was measured after the last step
                saved["history"] = done
        write_text(file, json.dumps(recipe.to_dict(), indent=1) + "\n")
        return saved

    def close(self) -> None:
        """Release the lock."""
        self._lock.close()


def _read(file: Path) -> Any:
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected an object, got {type(content).__name__}")
    return content
