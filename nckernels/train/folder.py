"""The folder of a run: one process group at a time, one recipe, and whether there is something to go on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from . import checkpoint
from .files import hold, write_text
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
        try:
            self._lock = hold(path / "lock")
        except BlockingIOError as owner:
            raise ValueError(f"{path}: process {owner} trains in this folder") from None
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
