"""Finds, reads and checks the histories of training runs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import typed
from ..recipe import Recipe

Array = NDArray[np.float64]
HISTORY = "history.json"
LARGEST = 1e100
"""Larger values count as undefined, like infinity, because their squares would overflow."""
CURVES = ("loss", "train_accuracy", "test_accuracy")


@dataclass(frozen=True)
class Found:
    """The histories in the given paths."""

    histories: tuple[Path, ...]
    waiting: tuple[Path, ...]
    """Folders of runs that have not been evaluated yet."""


@dataclass(frozen=True, eq=False)
class Record:
    """One run, from its ``history.json``, with NaN for null."""

    path: Path
    settings: Mapping[str, Any]
    """The recipe by dotted keys."""
    num_classes: int
    class_names: tuple[str, ...]
    dim: int
    steps: Array
    epochs: Array
    curves: Mapping[str, Array]
    """Loss, accuracies and metrics, one value per step."""
    metrics: tuple[str, ...]
    """The names of the curves that are metrics."""
    classifiers: Mapping[str, tuple[float, float]]
    """Accuracy and seconds of the classifiers that were fitted at the end."""
    prototype_cosines: NDArray[np.float32] | None
    mean_cosines: NDArray[np.float32] | None
    facts: Mapping[str, Any]
    """Numbers of parameters and samples, seconds."""
    finished: bool
    versions: Mapping[str, str]
    note: str


def find(paths: Iterable[Path]) -> Found:
    """The histories in files, runs' folders and folders of runs, without duplicates and sorted by name.

    Raises:
        ValueError: for a path that does not exist, and for a folder without a run.
    """
    histories: dict[Path, Path] = {}
    waiting: dict[Path, Path] = {}
    for path in paths:
        if path.is_dir():
            inside = sorted(path.rglob(HISTORY))
            begun = [recipe.parent for recipe in sorted(path.rglob("recipe.json"))]
            empty = [folder for folder in begun if not (folder / HISTORY).exists()]
            if not inside and not empty:
                raise ValueError(f"{path}: there is no {HISTORY} in this folder or below it")
        elif path.exists():
            inside, empty = [path], []
        else:
            raise ValueError(f"{path}: there is no such file or folder")
        histories.update((file.resolve(), file) for file in inside)
        waiting.update((folder.resolve(), folder) for folder in empty)
    return Found(tuple(histories.values()), tuple(waiting.values()))


def load_all(paths: Iterable[Path]) -> tuple[list[Record], list[str]]:
    """The runs, and a message for each file that could not be read."""
    records, problems = [], []
    for path in paths:
        try:
            records.append(load(path))
        except OSError as error:
            problems.append(f"{path}: {error.strerror or error}")
        except ValueError as error:
            problems.append(str(error))
    return records, problems


def load(path: Path) -> Record:
    """Read one history.

    Raises:
        OSError: if the file cannot be read.
        ValueError: naming the file, if it is not a history.
    """
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from None
    try:
        return _parse(path, content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _parse(path: Path, content: Any) -> Record:
    get = _typed("the history", content, dict).get
    if get("version") != 2:
        raise ValueError(f"version: expected 2, got {get('version')!r}; not a history of `nckernels train`")
    settings = _settings(_typed("recipe", get("recipe"), dict))
    steps = _column("steps", get("steps"))
    if not len(steps) or np.isnan(steps).any() or any(later <= earlier for earlier, later in pairwise(steps)):
        raise ValueError("steps: expected increasing numbers, at least one")
    metrics = _typed("metrics", get("metrics", {}), dict)
    curves = {name: _column(name, get(name), len(steps)) for name in CURVES}
    for name, values in metrics.items():
        if name in CURVES:
            raise ValueError(f"metrics.{name}: not a metric")
        curves[name] = _column(f"metrics.{name}", values, len(steps))
    classes = _whole("num_classes", get("num_classes"), 2)
    return Record(
        path=path,
        settings=settings,
        num_classes=classes,
        class_names=tuple(map(str, _typed("class_names", get("class_names") or [], list))),
        dim=_whole("dim", get("dim"), 1),
        steps=steps,
        epochs=_column("epochs", get("epochs"), len(steps)),
        curves=curves,
        metrics=tuple(metrics),
        classifiers=_classifiers(get("classifiers") or []),
        prototype_cosines=_matrix("prototype_cosines", get("prototype_cosines"), classes),
        mean_cosines=_matrix("mean_cosines", get("mean_cosines"), classes),
        facts={
            name: _column(name, [get(name)])[0]
            for name in ("parameters", "train_samples", "test_samples", "encoded_dim", "seconds")
        },
        finished=get("finished") is True,
        versions={str(name): str(value) for name, value in _typed("versions", get("versions") or {}, dict).items()},
        note=str(get("note") or ""),
    )


def _settings(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe by dotted keys, with defaults for keys that an older version lacks; unknown keys are kept."""
    try:
        settings = dict(typed.flat(typed.merge(Recipe().to_dict(), recipe)))
    except RecursionError:
        raise ValueError("recipe: nested too deeply") from None
    for key, default in Recipe().flat().items():
        kinds: tuple[type, ...] = (int, float) if type(default) in (int, float) else (type(default),)
        if isinstance(default, (str, int, float)) and not isinstance(settings.get(key), kinds):
            raise ValueError(f"recipe.{key}: expected {kinds[0].__name__}, got {settings.get(key)!r}")
    return {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}


def _classifiers(content: Any) -> dict[str, tuple[float, float]]:
    result = {}
    for entry in _typed("classifiers", content, list):
        get = _typed("classifiers", entry, dict).get
        accuracy, seconds = _column("classifiers", [get("accuracy"), get("seconds")])
        result[str(get("name"))] = (float(accuracy), float(seconds))
    return result


def _column(name: str, values: Any, length: int | None = None) -> Array:
    """Numbers, with NaN for null."""
    if not isinstance(values, list) or (length is not None and len(values) != length):
        raise ValueError(f"{name}: expected {'numbers' if length is None else f'one number per step ({length})'}")
    if not all(value is None or type(value) in (int, float) for value in values):
        raise ValueError(f"{name}: expected numbers or null")
    try:
        column = np.array([math.nan if value is None else value for value in values], dtype=np.float64)
    except OverflowError:
        raise ValueError(f"{name}: expected numbers of double precision") from None
    column[np.abs(column) > LARGEST] = math.nan
    return column


def _matrix(name: str, rows: Any, size: int) -> NDArray[np.float32] | None:
    if rows is None:
        return None
    columns = [_column(name, row, size) for row in _typed(name, rows, list)]
    if len(columns) != size:
        raise ValueError(f"{name}: expected {size} rows, got {len(columns)}")
    return np.stack(columns).astype(np.float32)


def _whole(name: str, value: Any, least: int) -> int:
    if type(value) is not int or value < least:
        raise ValueError(f"{name}: expected a whole number of at least {least}, got {value!r}")
    return value


def _typed(name: str, value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        kinds: dict[type, str] = {dict: "an object", list: "a list"}
        raise ValueError(f"{name}: expected {kinds[kind]}, got {type(value).__name__}")
    return value


def common(values: Sequence[Any]) -> Any:
    """The value that all have, or None."""
    return values[0] if values and all(value == values[0] for value in values) else None
