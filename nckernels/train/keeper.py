"""Writes and restores the checkpoints and the history of a run, with any number of processes."""

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
    """Rank 0 writes. The other ranks send their own state, wait, and raise the errors that rank 0 raises.

    Args:
        folder: folder of the run; None: nothing is written.
        parts: objects by their name in the checkpoint; those without a ``state_dict`` are left out.
    """

    def __init__(self, folder: Path | None, recipe: Recipe, world: World, parts: Mapping[str, Any]) -> None:
        self._folder, self._recipe, self._world = folder, recipe, world
        self._parts = {name: part for name, part in parts.items() if hasattr(part, "state_dict")}
        self._head = parts["head"]
        self._step = 0

    def save(self, step: int, history: History) -> None:
        """Write a checkpoint, after the losses up to ``step`` have been checked.

        Raises:
            FloatingPointError: if a parameter is not finite; such a network is never written.
            OSError: naming the folder; the previous checkpoint stays.
        """
        folder = self._folder
        if folder is None:
            return
        parameters = [p.detach() for name in ("network", "head") for p in self._parts[name].parameters()]
        if not torch.stack([p.isfinite().all() for p in parameters]).all():
            raise FloatingPointError(f"after step {step}: the parameters are not finite; {self.last()}")
        ranks = self._world.gathered(_own_state(self._head))
        if all(_same(ranks[0], other) for other in ranks[1:]):
            ranks = []  # the same on all ranks: the head's state is enough

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
        """The place of the last checkpoint, for error messages."""
        if not self._step or self._folder is None:
            return "there is no checkpoint"
        return f"the last good checkpoint is {self._folder / 'checkpoint.pt'}, of step {self._step}"

    def restore(self, saved: Mapping[str, Any], versions: dict[str, str]) -> tuple[int, History]:
        """Restore everything from a checkpoint; returns its step and its history.

        Raises:
            ValueError: if its content does not fit, or if it holds the states of another number of processes.
        """
        ranks = saved["ranks"]
        if ranks and len(ranks) != self._world.size:
            raise ValueError(
                f"{self._folder}: the checkpoint is of {len(ranks)} processes, each with its own state of the "
                f"classifier, such as a queue; it cannot be resumed with {self._world.size}"
            )
        try:
            for name, part in self._parts.items():
                part.load_state_dict(saved[name])
            if ranks:
                self._head.load_state_dict(ranks[self._world.rank], strict=False)
            history = History.from_dict(saved["history"])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self._folder}: the checkpoint does not fit: {error}") from error
        self._step = saved["step"]
        return self._step, replace(history, recipe=self._recipe, versions=versions)


def _own_state(module: nn.Module) -> dict[str, Any]:
    """The state that may differ between ranks, such as a queue: everything but the parameters."""
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    state = module.state_dict()
    return {
        key: value.cpu() if isinstance(value, torch.Tensor) else value
        for key, value in state.items()
        if key not in parameters
    }


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(torch.equal(value, other[key]) for key, value in one.items() if isinstance(value, torch.Tensor))
