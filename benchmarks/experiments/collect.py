"""All numbers of the experiments in one file, from which the page is made."""

from __future__ import annotations

import json
import math
import platform
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import torch

import nckernels
from nckernels.train import grid, recipes
from nckernels.train.files import write_text
from nckernels.train.history import finite_or_none, none_to_nan

from . import afterwards
from .stages import STAGES


@dataclass(frozen=True)
class Run:
    """One training run and the measurements after it."""

    stage: str
    row: str
    seed: int
    point: dict[str, Any] = field(default_factory=dict)
    """The settings of the stage's grid, by dotted key."""
    lr: float = math.nan
    finished: bool = True
    """False: it diverged or was not run."""
    seconds: float = math.nan
    test_accuracy: float = math.nan
    train_accuracy: float = math.nan
    steps: list[int] = field(default_factory=list)
    """Steps of the evaluations, in the stage "main"."""
    test_accuracies: list[float] = field(default_factory=list)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    """Neural-collapse metrics at each evaluation."""
    classifiers: dict[str, float] = field(default_factory=dict)
    """Test accuracy of FP, LP and NLP."""
    corruptions: dict[str, list[float]] = field(default_factory=dict)
    """Errors at severities 1 to 5."""
    transfer: float = math.nan
    """Test accuracy of a linear probe on 50 classes never trained on."""


@dataclass
class Results:
    """All runs, with the versions and commits that produced them."""

    runs: list[Run] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    date: str = ""
    command: str = ""
    matplotlib: str = ""
    """Version of matplotlib, whose fonts the glyphs are drawn with."""

    def of(self, stage: str, row: str | None = None, **point: Any) -> list[Run]:
        """The finished runs of a stage, of a row, with these values of the grid (``loss__temperature=0.1``)."""
        wanted = {key.replace("__", "."): value for key, value in point.items()}
        return [
            run
            for run in self.runs
            if run.stage == stage
            and run.finished
            and row in (None, run.row)
            and all(run.point.get(key) == value for key, value in wanted.items())
        ]

    def save(self, path: Path) -> None:
        """The whole file or the one before; numbers that are not finite become null."""
        head = {key: value for key, value in asdict(self).items() if key != "runs"}
        runs = ",\n".join(json.dumps(finite_or_none(asdict(run)), allow_nan=False) for run in self.runs)
        write_text(path, f'{json.dumps(head)[:-1]},\n"runs": [\n{runs}\n]}}\n')

    @classmethod
    def load(cls, path: Path) -> Results:
        try:
            content = json.loads(path.read_text())
            return cls(**{**content, "runs": [Run(**none_to_nan(run)) for run in content["runs"]]})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise SystemExit(f"{path} has no results of python -m benchmarks experiments: {error!r}") from error


def collect(out: Path) -> Results:
    """Collect the runs of all stages from their folders."""
    results = Results(versions=_versions(), matplotlib=matplotlib.__version__)
    for name, stage in STAGES.items():
        for planned in stage.sweep().runs():
            results.runs.append(_run(name, planned, out / name / planned.name))
    return results


def tuned(results: Results) -> dict[str, float]:
    """The learning rate with the best accuracy on the held-out faces, by row; the smaller one of equals."""
    best: dict[str, float] = {}
    for row in recipes.rows("glyphs"):
        runs = sorted(results.of("tune", row), key=lambda run: run.lr)
        if runs:
            best[row] = max(runs, key=lambda run: run.test_accuracy).lr
    return best


def mean(values: list[float]) -> float:
    return statistics.fmean(values) if values else math.nan


def deviation(values: list[float]) -> float:
    """Standard deviation over seeds; NaN for fewer than two."""
    return statistics.stdev(values) if len(values) > 1 else math.nan


def _run(stage: str, planned: grid.Run, folder: Path) -> Run:
    history = grid.history(folder) or {}
    point, finished = dict(planned.point), history.get("finished") is True
    lr = point.get("optimizer.lr", recipes.load(planned.recipe, planned.settings).optimizer.lr)
    if not finished:
        return Run(stage, planned.row, planned.seed, point, lr, finished=False)
    full = stage == "main"
    after = afterwards.read(folder)
    return Run(
        stage,
        planned.row,
        planned.seed,
        point,
        lr,
        seconds=history["seconds"],
        test_accuracy=history["test_accuracy"][-1],
        train_accuracy=history["train_accuracy"][-1],
        steps=history["steps"] if full else [],
        test_accuracies=history["test_accuracy"] if full else [],
        metrics=none_to_nan(history["metrics"]) if full else {},
        classifiers={c["name"]: c["accuracy"] for c in history["classifiers"]},
        corruptions={key: list(values) for key, values in after.get("corruptions", {}).items()},
        transfer=after.get("transfer", math.nan),
    )


def _versions() -> dict[str, str]:
    return {"nckernels": nckernels.__version__, "torch": torch.__version__, "python": platform.python_version()}


def folders(out: Path, stage: str) -> Iterator[Path]:
    """Folders of the finished runs of a stage."""
    for planned in STAGES[stage].sweep().runs():
        if grid.finished(out / stage / planned.name):
            yield out / stage / planned.name
