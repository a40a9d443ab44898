"""Keeps a run: writes its checkpoints and its history, and goes on from them, with any number of processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import checkpoint
from .history import History
from .processes import World
from .recipe import Recipe


class Keeper:
    """Rank 0 writes; the others give it what is their own, wait, and raise what it raises.

    Args:
        folder: of the run; None: nothing is written.
        parts: what has a state, by its name in the checkpoint; what has none is left out.
    """

    def __init__(self, folder: Path | None, recipe: Recipe, world: World, parts: Mapping[str, Any]) -> None:
        self._folder, self._recipe, self._world = folder, recipe, world
        self._parts = {name: part for name, part in parts.items() if hasattr(part, "state_dict")}
        self._head = parts["head"]
        self._step = 0

    def save(self, step: int, history: History) -> None:
        """Write a checkpoint. Losses up to ``step`` have been looked at: that of a broken network is never written.

        Raises:
            OSError: naming the folder; the checkpoint before is still there.
        """
        folder = self._folder
        if folder is None:
            return
        own = {"head": _own_state(self._head), "random": _random_state(self._world.device)}
        ranks = self._world.gathered(own)

        def write() -> None:
            state = {
                "step": step,
                "recipe": self._recipe.to_dict(),
                "history": history.to_dict(),
                "ranks": ranks,
                **{name: part.state_dict() for name, part in self._parts.items()},
            }
            checkpoint.save(folder / "checkpoint.pt", state)

        self._world.agreed(write)
        self._step = step

    def write(self, history: History) -> None:
        """Write ``history.json``."""
        folder = self._folder
        if folder is not None:
            self._world.agreed(lambda: history.save(folder / "history.json"))

    def last(self) -> str:
        """Where the last checkpoint is, for an error."""
        if not self._step or self._folder is None:
            return "there is no checkpoint"
        return f"the last good checkpoint is {self._folder / 'checkpoint.pt'}, of step {self._step}"

    def restore(self, saved: Mapping[str, Any], versions: dict[str, str]) -> tuple[int, History]:
        """Everything as it was in a checkpoint; returns its step and its history.

        Raises:
            ValueError: if another number of processes wrote it, or its content does not fit.
        """
        ranks = saved["ranks"]
        if len(ranks) != self._world.size:
            raise ValueError(
                f"{self._folder}: the checkpoint is of {len(ranks)} process{'es' if len(ranks) > 1 else ''}, each with "
                f"its own random numbers and queue; it cannot go on with {self._world.size}"
            )
        try:
            for name, part in self._parts.items():
                part.load_state_dict(saved[name])
            own = ranks[self._world.rank]
            self._head.load_state_dict(own["head"], strict=False)
            _set_random_state(own["random"], self._world.device)
            history = History.from_dict(saved["history"])
        except (RuntimeError, KeyError, TypeError) as error:
            raise ValueError(f"{self._folder}: the checkpoint does not fit: {error}") from error
        self._step = saved["step"]
        return self._step, replace(history, recipe=self._recipe, versions=versions)


def _own_state(module: nn.Module) -> dict[str, Any]:
    """What ranks may have of their own, such as a queue: all of the state but the parameters, which are the same."""
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    return {key: value for key, value in module.state_dict().items() if key not in parameters}


def _random_state(device: torch.device) -> dict[str, Any]:
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state


def _set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """A run that moved to another kind of device goes on with that one's random numbers."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
