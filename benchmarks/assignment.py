"""Fixed prototypes on the glyphs with more classes than dimensions: labels assigned at random, or again every epoch.

python -m benchmarks assignment --out out/assignment.json --processes 2
python -m benchmarks assignment --report benchmarks/results/FILE.json --write

The data are 100 classes of letters and digits, tested in unseen typefaces. All rows have the same network, batches
and number of epochs. First each row gets the learning rate of a common grid with the best accuracy on the serif
faces, which are held out from the training faces (one seed). Then it is trained on all training faces with every seed.
Each run is saved when it ends, and the same command continues an interrupted run.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import math
import multiprocessing
import platform
import statistics
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from nckernels.train.data import glyphs
from nckernels.train.engine import fit
from nckernels.train.files import write_text
from nckernels.train.recipe import Recipe

from .report import commit

PAGE = Path(__file__).resolve().parents[1] / "docs" / "neural-collapse.md"
MARKERS = tuple(f"<!-- assignment table: {word} -->" for word in ("begin", "end"))
RATES = (0.03, 0.1, 0.3, 1.0, 3.0)
ROWS: dict[str, dict[str, Any]] = {
    "static": {"loss.name": "dlp", "loss.assignment": "static"},
    "dynamic": {"loss.name": "dlp"},
    "psc": {"loss.name": "ce"},
    "psc-star": {"loss.name": "psc-star"},
    "nonl": {"loss.name": "nonl"},
}
TITLES = {
    "static": "fixed points, labels at random for good",
    "dynamic": "fixed points, labels assigned anew every epoch",
    "psc": "PSC: cross-entropy",
    "psc-star": "PSC*: cross-entropy + 0.01 uniformity",
    "nonl": "NONL",
}


@dataclass(frozen=True)
class Task:
    """One training."""

    row: str
    dim: int
    lr: float
    seed: int
    dataset: str


@dataclass(frozen=True)
class Outcome(Task):
    """The result of one training."""

    accuracy: float
    """On the faces that the dataset holds out; 0 if the training diverged."""
    train_accuracy: float


@dataclass
class Results:
    """All runs so far, and their common settings."""

    settings: dict[str, Any]
    runs: list[Outcome] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    started: str = ""
    commands: list[str] = field(default_factory=list)
    commits: list[str] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write the file atomically."""
        write_text(path, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Results:
        try:
            values = json.loads(path.read_text())
            return cls(**{**values, "runs": [Outcome(**run) for run in values["runs"]]})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise SystemExit(f"{path} has no results of python -m benchmarks assignment: {error!r}") from error

    def find(self, row: str, dim: int, dataset: str) -> list[Outcome]:
        return [r for r in self.runs if (r.row, r.dim, r.dataset) == (row, dim, dataset)]

    def rate(self, row: str, dim: int) -> float:
        """The learning rate with the best accuracy on the held-out training faces; the smaller one of equals."""
        runs = self.find(row, dim, "glyphs-validation")
        return max(sorted(runs, key=lambda r: r.lr), key=lambda r: r.accuracy).lr if runs else math.nan

    def tests(self, row: str, dim: int) -> list[Outcome]:
        """The runs on all training faces with that rate, one per seed."""
        lr = self.rate(row, dim)
        return sorted((r for r in self.find(row, dim, "glyphs") if r.lr == lr), key=lambda r: r.seed)


def main(argv: list[str]) -> int:
    """Train what is missing, print the table and write it; return the exit status."""
    args = _parse(argv)
    if args.write and not PAGE.exists():
        raise SystemExit(f"--write: there is no {PAGE}")
    results = Results.load(args.report) if args.report is not None else run(args, argv)
    print(table(results), verdict(results), sep="\n\n")
    if args.write:
        PAGE.write_text(written(PAGE.read_text(), results))
    return 0


def run(args: argparse.Namespace, argv: Sequence[str]) -> Results:
    """Run both stages, continuing the results in ``--out``."""
    settings = {name: getattr(args, name) for name in ("epochs", "batch_size", "width", "temperature")}
    results = Results.load(args.out) if args.out.exists() else Results(settings, started=_now(), versions=_versions())
    if results.settings != settings:
        raise SystemExit(f"--out {args.out} was made with {results.settings}, not with {settings}: choose another file")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for values, new in (
        (results.commands, " ".join(["python -m benchmarks assignment", *argv])),
        (results.commits, commit()),
    ):
        if new not in values:
            values.append(new)
    tried = [Task(row, dim, lr, 0, "glyphs-validation") for row in args.rows for dim in args.dims for lr in args.rates]
    _train_all(tried, results, args, "learning rates")
    tests = [
        Task(row, dim, results.rate(row, dim), seed, "glyphs")
        for seed in range(args.seeds)
        for row in args.rows
        for dim in args.dims
    ]
    _train_all(tests, results, args, "all training faces")
    return results


def _train_all(tasks: Iterable[Task], results: Results, args: argparse.Namespace, what: str) -> None:
    """Train the tasks that have no result yet, saving after each."""
    names = tuple(Task.__dataclass_fields__)
    done = {Task(**{name: getattr(r, name) for name in names}) for r in results.runs}
    todo = [task for task in tasks if task not in done]
    work = functools.partial(train, settings=results.settings)
    with tqdm(total=len(todo), desc=what, unit="run", disable=True if args.quiet else None) as bar:
        for outcome in _each(work, todo, args.processes):
            results.runs.append(outcome)
            results.save(args.out)
            bar.update()
            if not args.quiet:
                run = f"{outcome.row}, d={outcome.dim}, lr {outcome.lr:g}, seed {outcome.seed}"
                bar.write(f"{run}: {outcome.accuracy:.1%}")


def _each(work: Callable[[Task], Outcome], todo: Sequence[Task], processes: int) -> Iterable[Outcome]:
    """The outcomes as they are ready."""
    if processes == 1:
        yield from map(work, todo)
        return
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(work, task) for task in todo]):
            yield future.result()


def train(task: Task, settings: dict[str, Any]) -> Outcome:
    """One run from beginning to end, on one thread."""
    recipe = Recipe().replace(
        **{
            "data.name": "glyphs",
            "data.validation": task.dataset == "glyphs-validation",
            "model.dim": task.dim,
            "model.width": settings["width"],
            "loss.temperature": settings["temperature"],
            "optimizer.lr": task.lr,
            "schedule.epochs": settings["epochs"],
            "run.batch_size": settings["batch_size"],
            "run.seed": task.seed,
            "run.eval_every": 10**9,
            "run.metrics": False,
            **ROWS[task.row],
        }
    )
    try:
        history = fit(recipe, progress=False).history
        accuracies = history.test_accuracy[-1], history.train_accuracy[-1]
    except FloatingPointError:
        accuracies = 0.0, 0.0
    return Outcome(**asdict(task), accuracy=accuracies[0], train_accuracy=accuracies[1])


def table(results: Results) -> str:
    """Markdown: means over the seeds, standard deviations in brackets."""
    dims = sorted({r.dim for r in results.runs})
    cells = ["", *(f"d = {dim}: unseen faces, % | trained faces, % | lr" for dim in dims)]
    lines = ["| " + " | ".join(cells) + " |", "|---" * (1 + 3 * len(dims)) + "|"]
    for row in ROWS:
        cells = [TITLES[row]]
        for dim in dims:
            runs = results.tests(row, dim)
            if runs:
                unseen, trained = ([100 * getattr(r, name) for r in runs] for name in ("accuracy", "train_accuracy"))
                cells += [f"{statistics.fmean(unseen):.1f} ({_deviation(unseen):.1f})"]
                cells += [f"{statistics.fmean(trained):.1f}", f"{runs[0].lr:g}"]
            else:
                cells += ["", "", ""]
        if any(cells[1:]):
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def verdict(results: Results) -> str:
    """The gain of reassigning over the random assignment, by seed."""
    lines = []
    for dim in sorted({r.dim for r in results.runs}):
        dynamic, static = ({r.seed: r.accuracy for r in results.tests(row, dim)} for row in ("dynamic", "static"))
        gains = [100 * (dynamic[seed] - static[seed]) for seed in sorted(dynamic.keys() & static.keys())]
        if gains:
            each = ", ".join(f"{gain:+.1f}" for gain in gains)
            lines.append(f"d = {dim}: assigning anew gains {statistics.fmean(gains):+.1f} points ({each}).")
    return "\n".join(lines)


def written(page: str, results: Results) -> str:
    """A page with the table between its markers."""
    begin, end = MARKERS
    if begin not in page or end not in page:
        raise SystemExit(f"{PAGE} has no '{begin}' with an end")
    before, after = page.index(begin) + len(begin), page.index(end)
    return page[:before] + "\n" + table(results) + "\n" + page[after:]


def _deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    import matplotlib

    drawn = {"matplotlib": matplotlib.__version__, "characters": str(len(glyphs.characters()))}
    return {"python": platform.python_version(), "torch": torch.__version__, **drawn}


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks assignment",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--dims", type=int, nargs="+", default=[10, 25], help="dimensions: 10 25")
    add("--seeds", type=int, default=3, help="runs of each row at its rate: 3")
    add("--rates", type=float, nargs="+", default=list(RATES), help="learning rates to choose from: 0.03 0.1 0.3 1 3")
    add("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), help="all")
    add("--epochs", type=int, default=10, help="passes over the training set: 10")
    add("--batch-size", type=int, default=128, help="128")
    add("--width", type=int, default=16, help="channels of the network's first block: 16")
    add("--temperature", type=float, default=0.1, help="of NONL: 0.1")
    add("--processes", type=int, default=1, help="runs at the same time, each on one thread: 1")
    add("--out", type=Path, default=Path("out/assignment.json"), help="results, to go on with: out/assignment.json")
    add("--report", type=Path, help="train nothing, read such a file")
    add("--write", action="store_true", help="write the table into docs/neural-collapse.md")
    add("--quiet", action="store_true", help="the table only")
    args = parser.parse_args(argv)
    for name in ("seeds", "processes", "epochs", "batch_size", "width"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(args, name)}")
    return args
