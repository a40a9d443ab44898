"""Many runs of one recipe: rows x grid x seeds, each in its own process.

A folder holds one sweep. ``sweep.json`` has its definition. Each run has a subfolder, with its output in
``output.txt``. The same command resumes an unfinished sweep.
"""

from __future__ import annotations

import itertools
import json
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import recipes, typed
from .files import hold, write_text
from .plan import toml_value
from .recipe import Recipe


@dataclass(frozen=True)
class Run:
    """One run of a sweep."""

    name: str
    """Name of its folder: the row, the grid's settings with several values, and the seed if there are several."""
    recipe: str
    settings: tuple[str, ...]
    row: str
    point: tuple[tuple[str, Any], ...]
    """The keys of the grid with their values in this run."""
    seed: int

    def arguments(self) -> list[str]:
        """Arguments of ``python -m nckernels train``, without the folder."""
        return [self.recipe, *(argument for setting in self.settings for argument in ("--set", setting))]


@dataclass(frozen=True)
class Sweep:
    """The definition of a sweep; :func:`plan` makes one."""

    recipe: str
    settings: tuple[str, ...]
    rows: tuple[str, ...]
    grid: Mapping[str, Sequence[Any]]
    seeds: tuple[int, ...]

    def row_recipe(self, row: str) -> str:
        """The name of a row as ``train`` takes it."""
        if not row:
            return self.recipe
        return f"{self.recipe}{':' if self.recipe.endswith('.toml') else '/'}{row}"

    def load(self, row: str) -> Recipe:
        return recipes.load(self.row_recipe(row), self.settings)

    def runs(self) -> list[Run]:
        """All runs, ordered by row, grid point and seed."""
        return [
            self._run(row, tuple(zip(self.grid, values, strict=True)), seed)
            for row, *values in itertools.product(self.rows, *self.grid.values())
            for seed in self.seeds
        ]

    def _run(self, row: str, point: tuple[tuple[str, Any], ...], seed: int) -> Run:
        changed = [f"{key}={toml_value(value)}" for key, value in point]
        short = {key: _last(key, self.grid) for key in self.grid}
        parts = [row or Path(self.recipe).stem]
        parts += [f"{short[key]}={_readable(value)}" for key, value in point if len(self.grid[key]) > 1]
        parts += [f"seed={seed}"] if len(self.seeds) > 1 else []
        settings = (*self.settings, *changed, f"run.seed={seed}")
        return Run("_".join(parts), self.row_recipe(row), settings, row, point, seed)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, including the resolved settings of the rows, so that a changed recipe file is another sweep."""
        free = {*self.grid, "run.seed"}
        asked = {
            "recipe": self.recipe,
            "settings": self.settings,
            "rows": self.rows,
            "grid": dict(self.grid),
            "seeds": self.seeds,
            "resolved": {
                row: {key: value for key, value in self.load(row).flat().items() if key not in free}
                for row in self.rows
            },
        }
        return dict(json.loads(json.dumps(asked)))


def plan(
    name: str,
    settings: Iterable[str] = (),
    rows: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    grid: Mapping[str, Sequence[Any]] | None = None,
) -> Sweep:
    """A sweep over a recipe, all of whose runs have valid settings.

    Args:
        name: a recipe, or a row of one.
        settings: ``"key=value"``, for all runs.
        rows: rows of the recipe; None: those of its ``[sweep]``, or all rows.
        seeds: None: those of its ``[sweep]``, or the recipe's seed.
        grid: values by dotted key; they replace those of ``[sweep]``.

    Raises:
        ValueError: naming the wrong row, key or run.
    """
    base, row = recipes.split(name)
    content = recipes.read(name)[0]
    asked = content.get("sweep", {})
    if not isinstance(asked, Mapping):
        raise ValueError(f"recipe {base}: sweep: expected a section, got {asked!r}")
    for key in asked:
        if key not in ("rows", "seeds", "grid"):
            raise ValueError(f"recipe {base}: unknown key sweep.{key}{typed.nearest(key, ('rows', 'seeds', 'grid'))}")
    if row and rows is not None:
        raise ValueError(f"--rows: {name} already names a row")
    settings = tuple(settings)
    if rows is None:
        rows = (row,) if row else asked.get("rows", recipes.rows(name)) or ("",)
    if seeds is None:
        seeds = asked.get("seeds") or (recipes.load(name, settings).run.seed,)
    if not isinstance(asked.get("grid", {}), Mapping):
        raise ValueError(f"recipe {base}: sweep.grid: expected a section, got {asked['grid']!r}")
    grid = {**dict(typed.flat(asked.get("grid", {}))), **(grid or {})}
    taken = {setting.partition("=")[0].strip() for setting in settings}
    for key, values in grid.items():
        if key in taken:
            raise ValueError(f"{key}: it is in --set and in the grid; use --grid {key}=VALUE for a single value")
        _check_distinct(f"grid {key}", values)
    if "run.seed" in {*taken, *grid}:
        raise ValueError("run.seed: use --seeds instead of --set or --grid")
    _check_distinct("rows", rows)
    _check_distinct("seeds", seeds)
    sweep = Sweep(base, settings, tuple(rows), grid, tuple(seeds))
    for run in sweep.runs():
        try:
            recipes.load(run.recipe, run.settings)
        except ValueError as error:
            raise ValueError(f"run {run.name}: {error}") from None
    names = [run.name for run in sweep.runs()]
    _check_distinct("names of runs", names)
    return sweep


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder, and lock it against other processes while the context lasts.

    Raises:
        ValueError: if another process has locked it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = hold(folder / "lock")
    except BlockingIOError:
        raise ValueError(f"{folder}: another process is running this sweep") from None
    with lock:
        yield


def claim(folder: Path, sweep: Sweep) -> None:
    """Write the definition of the sweep into its folder, which this process has locked.

    Raises:
        ValueError: if the folder holds another sweep, naming the differences.
    """
    path, new = folder / "sweep.json", sweep.to_dict()
    if path.exists():
        try:
            old = json.loads(path.read_text(encoding="utf-8"))
            differing = _differences(old, new)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
        if differing:
            raise ValueError(
                f"{folder} holds another sweep, which differs in {'; '.join(differing)}; choose another --out"
            )
        return
    write_text(path, json.dumps(new, indent=1) + "\n")


def history(folder: Path) -> dict[str, Any] | None:
    """The history that a run has written so far; None if there is no readable file."""
    try:
        content = json.loads((folder / "history.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def finished(folder: Path) -> bool:
    return (history(folder) or {}).get("finished") is True


def table(folder: Path, sweep: Sweep) -> str:
    """Mean and standard deviation over the seeds of the final test accuracy, by row and grid point."""
    groups: dict[tuple[str, tuple[Any, ...]], list[float]] = {}
    for run in sweep.runs():
        values = groups.setdefault((run.row, tuple(_readable(value) for _, value in run.point)), [])
        found = history(folder / run.name) or {}
        if found.get("finished") is True:
            accuracies = found.get("test_accuracy") or [None]
            values += [100 * accuracies[-1]] if accuracies[-1] is not None else []
    cells = [["row", *sweep.grid, "runs", "test accuracy, %"]]
    for (row, point), values in groups.items():
        cells.append([row or "-", *point, str(len(values)), _mean(values)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )


def _mean(values: Sequence[float]) -> str:
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    asked = [key for key in new if key != "resolved" and old.get(key) != new[key]]
    if asked:
        return [f"{key} ({json.dumps(old.get(key))} there, {json.dumps(new[key])} here)" for key in asked]
    lines = []
    for row, settings in new["resolved"].items():
        there = old["resolved"].get(row, {})
        for key in sorted({*there, *settings}):
            if key not in ("name", "title", "source") and there.get(key) != settings.get(key):
                lines.append(f"{row and row + ': '}{key} ({there.get(key)!r} there, {settings.get(key)!r} here)")
    return lines


def _last(key: str, keys: Iterable[str]) -> str:
    """The last part of a dotted key, or the whole key if another key has the same last part."""
    last = key.rpartition(".")[2]
    return last if [k.rpartition(".")[2] for k in keys].count(last) == 1 else key


def _readable(value: Any) -> str:
    """A value as part of a folder's name, without blanks, slashes and special characters of shells."""
    text = value if isinstance(value, str) else toml_value(value)
    return re.sub(r"[^\w.+-]+", "-", text).strip("-") or "none"


def _check_distinct(what: str, values: Any) -> None:
    if not isinstance(values, (list, tuple)) or not values:
        raise ValueError(f"{what}: expected a list of at least one, got {values!r}")
    for value in values:
        if list(values).count(value) > 1:
            raise ValueError(f"{what}: {value!r} occurs twice")
