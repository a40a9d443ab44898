"""``checkpoint.pt``: everything that a run needs to resume exactly."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import write_atomically
from .recipe import Recipe, differences, from_dict

VERSION = 1
"""Version of the format."""

FREE = (
    "run.device",
    "run.threads",
    "run.log_every",
    "run.save_every",
    "data.root",
    "data.workers",
)
"""The keys that may change when a run is resumed. They do not change the computation, except for rounding if the device
or the number of threads changes."""

_PARTS = ("step", "recipe", "network", "head", "optimizer", "history", "ranks")


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically.

    Raises:
        OSError: naming the folder; the previous checkpoint stays.
    """

    def content(file: Any) -> None:
        try:
            torch.save({"version": VERSION, **state}, file)
        except RuntimeError as error:  # torch wraps the error of the file in its own
            cause = error.__context__ or error.__cause__
            raise cause if isinstance(cause, OSError) else OSError(f"{error}") from error

    write_atomically(path, content)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint, with all tensors on the CPU. Loading cannot run code.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: naming the file, if it is damaged or no checkpoint.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch does not verify the checksums
            broken = archive.testzip()
        if broken is not None:
            raise ValueError(f"the checksum of {broken} does not match")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        reason = str(error).split("\n", 1)[0]
        raise ValueError(f"{path}: damaged, or not a checkpoint: {reason}") from error
    if not isinstance(state, dict) or state.get("version") != VERSION or any(part not in state for part in _PARTS):
        raise ValueError(f"{path}: expected a checkpoint of version {VERSION}")
    return state


def check_recipe(path: Path, stored: Mapping[str, Any], recipe: Recipe) -> None:
    """Raises ValueError if the recipe of a file differs in keys that are not in :data:`FREE`, listing them."""
    try:
        other = from_dict(stored)
    except ValueError as error:
        raise ValueError(f"{path}: the recipe does not fit this version: {error}") from None
    keys = [key for key in differences(other, recipe) if key not in FREE]
    if keys:
        before, now = other.flat(), recipe.flat()
        listed = ", ".join(f"{key} = {before.get(key)!r} there, {now.get(key)!r} here" for key in keys)
        raise ValueError(f"{path} is of another recipe: {listed}")


def start_from(network: Any, source: str) -> None:
    """Load the encoder of a run, and its projection if all of its shapes fit (``model.init``).

    Raises:
        ValueError: if there is no such run, if it is damaged, or if its encoder has other parameters.
    """
    path = Path(source)
    path = path / "checkpoint.pt" if path.is_dir() else path
    try:
        stored: dict[str, Tensor] = load(path)["network"]
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"model.init: there is no checkpoint {path}") from None
    except ValueError as error:
        raise ValueError(f"model.init: {error}") from None
    own: dict[str, Tensor] = network.state_dict()
    encoder = {key for key in {**stored, **own} if not key.startswith("projection.")}
    unlike = sorted(key for key in encoder if _shape(stored.get(key)) != _shape(own.get(key)))
    if unlike:
        shown = ", ".join(f"{key} {_shape(stored.get(key))} there, {_shape(own.get(key))} here" for key in unlike[:3])
        raise ValueError(f"model.init: the encoder of {path} differs: {shown}{', ...' if len(unlike) > 3 else ''}")
    projection = {key for key in {**stored, **own} if key.startswith("projection.")}
    fits = all(_shape(stored.get(key)) == _shape(own.get(key)) for key in projection)
    network.load_state_dict(stored if fits else {key: stored[key] for key in encoder}, strict=fits)


def _shape(value: Any) -> Any:
    if value is None:
        return "missing"
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
