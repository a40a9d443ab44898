"""Groups runs into the rows of a table: runs that differ only in their seed are one row."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from ..recipe import LOSSES
from .load import Array, Record

LABELS = {
    "ce": "CE",
    "normface": "NormFace",
    "ntce": "NTCE",
    "nonl": "NONL",
    "scl": "SCL",
    "prototype": "Prototype",
    "etf-dr": "ETF + DR",
    "dlp": "DLP",
    "psc-star": "PSC*",
    "bce": "BCE",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
}
KEYS = {
    "loss.temperature": "τ",
    "run.batch_size": "batch size",
    "model.dim": "d",
    "loss.name": "loss",
    "optimizer.lr": "lr",
}
"""Keys with their own labels. They come first if several keys differ."""
TITLES = ("name", "title", "source")
UNRELATED = (
    *(*TITLES, "run.seed", "data.root", "data.workers"),
    *("run.save_every", "run.log_every", "run.eval_every", "run.metrics"),
)
"""Settings that do not distinguish rows. ``data.root`` does if nothing else names the data."""
MOST_ROWS = 8
"""Largest number of rows in a chart."""


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over ``count`` seeds; NaN with too few seeds."""

    mean: float
    deviation: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        numbers = [value for value in values if not math.isnan(value)]
        mean = float(np.mean(numbers)) if numbers else math.nan
        return cls(mean, float(np.std(numbers, ddof=1)) if len(numbers) > 1 else math.nan, len(numbers))


@dataclass(frozen=True, eq=False)
class Row:
    """Runs of one recipe, with a name that is unique among the rows of their data set."""

    name: str
    base: str
    """The name without the settings that distinguish rows: the recipe's row, or the loss."""
    loss: str
    runs: tuple[Record, ...]
    differing: tuple[tuple[str, Any], ...] = ()
    """The settings that the name adds to ``base``."""

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.runs[0].settings)

    @cached_property
    def counted(self) -> tuple[Record, ...]:
        """The runs that means are taken over: the finished ones, or all if none is finished."""
        return tuple(run for run in self.runs if run.finished) or self.runs

    @property
    def unfinished(self) -> int:
        return sum(not run.finished for run in self.runs)

    @property
    def finished(self) -> bool:
        return self.counted[0].finished

    @property
    def features(self) -> Literal["signed", "relu"]:
        """The kind of features, which determines the optimum: pooled ReLU activations have no negative entries."""
        return "relu" if self.settings["model.projection"] == "none" else "signed"

    def final(self, curve: str) -> Spread:
        return Spread.of([float(run.curves[curve][-1]) for run in self.counted if curve in run.curves])

    @property
    def accuracy(self) -> float:
        """The accuracy by which rows are ranked; -1 for a row without one."""
        mean = self.final("test_accuracy").mean
        return -1.0 if math.isnan(mean) else mean

    def curve(self, name: str) -> tuple[Array, Array, Array]:
        """Steps, mean and deviation over the seeds. The deviation is 0 if only one seed has a value."""
        runs = [run for run in self.counted if name in run.curves]
        steps = np.unique(np.concatenate([run.steps for run in runs])) if runs else np.zeros(0)
        values = np.full((len(runs), len(steps)), math.nan)
        for line, run in zip(values, runs, strict=True):
            line[np.searchsorted(steps, run.steps)] = run.curves[name]
        count = (~np.isnan(values)).sum(axis=0)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = np.nansum(values, axis=0) / count
            square = np.nansum((values - mean) ** 2, axis=0) / np.maximum(count - 1, 1)
        return steps, mean, np.sqrt(square)


@dataclass(frozen=True, eq=False)
class DataSet:
    """The rows that were trained on the same data."""

    name: str
    family: tuple[Any, ...]
    """A key that is the same for data sets that differ only in their imbalance."""
    num_classes: int
    rows: tuple[Row, ...]

    @property
    def imbalance(self) -> float:
        return float(self.rows[0].settings["data.imbalance"])

    @property
    def records(self) -> list[Record]:
        return [run for row in self.rows for run in row.runs]

    @cached_property
    def shown(self) -> tuple[Row, ...]:
        """The rows for charts: all rows, or the best of each name if there are many."""
        if len(self.rows) <= MOST_ROWS:
            return self.rows
        ranked = sorted(self.bests.values(), key=lambda row: -row.accuracy)[:MOST_ROWS]
        return tuple(row for row in self.rows if row in ranked)

    @cached_property
    def bests(self) -> dict[str, Row]:
        """The best row of each name."""
        best: dict[str, Row] = {}
        for row in self.rows:
            if row.base not in best or row.accuracy > best[row.base].accuracy:
                best[row.base] = row
        return best

    @property
    def best(self) -> Row:
        return max(self.rows, key=lambda row: (row.finished, row.accuracy))


def group(records: Sequence[Record]) -> list[DataSet]:
    """Group the records: data sets in the order of the records, rows in the order of losses and settings."""
    by_data: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for record in records:
        by_data[_data_of(record)].append(record)
    names = _data_names([runs[0] for runs in by_data.values()])
    return [
        DataSet(name, _data_of(runs[0], imbalance=False), runs[0].num_classes, _rows(runs))
        for name, runs in zip(names, by_data.values(), strict=True)
    ]


def describe(settings: Sequence[tuple[str, Any]]) -> str:
    """ "τ = 0.1, batch size = 512", which breaks at commas only."""
    pairs = (f"{key_text(key)} = {value_text(value)}" for key, value in settings)
    return ", ".join(pair.replace(" ", "\N{NO-BREAK SPACE}") for pair in pairs)


def value_text(value: Any) -> str:
    """The text of a setting's value."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(value_text, value)) or "none"
    return str(value) or "none"


def key_text(key: str) -> str:
    """A short name of a setting: the last part of its key, with the section if the last part is too general."""
    if key in KEYS:
        return KEYS[key]
    section, _, last = key.rpartition(".")
    return key if last in ("name", "options", "every", "final") or not section else last.replace("_", " ")


def _data_of(record: Record, *, imbalance: bool = True) -> tuple[Any, ...]:
    skip = ("data.workers", *(() if record.settings["data.name"] == "folder" else ("data.root",)))
    skip = skip if imbalance else (*skip, "data.imbalance")
    settings = record.settings.items()
    return (record.num_classes, *((k, repr(v)) for k, v in settings if k.startswith("data.") and k not in skip))


def _data_names(examples: Sequence[Record]) -> list[str]:
    """The name of each data set, with the settings that distinguish data sets of the same name."""
    names = []
    for record in examples:
        name = record.settings["data.name"]
        same = [other for other in examples if other.settings["data.name"] == name]
        keys = [key for key in _differing(same) if key.startswith("data.") and key != "data.workers"]
        keys = [key for key in keys if key != "data.root" or name == "folder"]
        known = [(key, record.settings[key]) for key in keys if key in record.settings]
        known = [setting for setting in known if setting != ("data.imbalance", 1.0)]
        classes = [f"{record.num_classes} classes"] if len({other.num_classes for other in same}) > 1 else []
        held_out = ["held out"] if record.settings["data.validation"] and "data.validation" not in keys else []
        differing = ", ".join(filter(None, [describe(known), *classes, *held_out]))
        names.append(LABELS.get(name, name) + (f" ({differing})" if differing else ""))
    return names


def _rows(records: Sequence[Record]) -> tuple[Row, ...]:
    groups: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for record in records:
        settings = ((key, repr(value)) for key, value in record.settings.items() if key not in UNRELATED)
        groups[tuple(sorted(settings))].append(record)
    clusters: dict[str, list[list[Record]]] = defaultdict(list)
    for runs in groups.values():
        clusters[_base(runs[0])].append(runs)
    rows = []
    for base, members in clusters.items():
        keys = _differing([runs[0] for runs in members])
        for runs in members:
            differing = tuple((key, runs[0].settings[key]) for key in keys if key in runs[0].settings)
            few = (*differing[:4], *differing[4:][: 0 if len(differing) > 5 else 1])
            name = ", ".join(filter(None, [base, describe(few), "…" if len(few) < len(differing) else ""]))
            rows.append(Row(name, base, runs[0].settings["loss.name"], tuple(runs), differing))
    rows.sort(key=lambda row: (rank(row.loss), row.base, [sortable(value) for _, value in row.differing]))
    seen: dict[str, int] = defaultdict(int)
    for i, row in enumerate(rows):
        seen[row.name] += 1
        if seen[row.name] > 1:
            rows[i] = Row(f"{row.name} ({seen[row.name]})", row.base, row.loss, row.runs, row.differing)
    return tuple(rows)


def _base(record: Record) -> str:
    """The row of the recipe, or the loss of a recipe without rows."""
    name = record.settings["name"]
    row = (name.rpartition(".toml")[2].lstrip(":/") if ".toml" in name else name.partition("/")[2]).strip()
    row = row or record.settings["loss.name"]
    return LABELS.get(row, row)


def _differing(records: Sequence[Record]) -> list[str]:
    keys = list(dict.fromkeys([*KEYS, *(key for record in records for key in record.settings)]))
    named = len({record.settings["data.root"] for record in records if record.settings["data.name"] == "folder"}) > 1
    skip = [key for key in UNRELATED if key != "data.root" or not named]
    return [key for key in keys if key not in skip and len({repr(r.settings.get(key)) for r in records}) > 1]


def rank(loss: str) -> int:
    """Position of a loss in the order of the recipes."""
    return LOSSES.index(loss) if loss in LOSSES else len(LOSSES)


def sortable(value: Any) -> tuple[int, float, str]:
    """Sort key: numbers by size, then texts."""
    number = isinstance(value, (int, float))
    return (0, float(value), "") if number else (1, 0.0, str(value))
