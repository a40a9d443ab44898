"""``python -m benchmarks experiments`` tests the papers' claims on glyphs, in about an hour and a half on two cores.

python -m benchmarks experiments --out out/experiments          train the missing runs, collect the numbers
python -m benchmarks experiments --report FILE.json --write     write the page and its pictures from a committed file

The same command resumes after an interruption. The learning rates are those of the recipe. If the stage "tune" finds
others, the command says so and stops, because all later stages depend on them.
"""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path

from nckernels.train import grid, recipes, sweep

from ..report import commit
from . import afterwards
from .collect import Results, collect, folders, tuned
from .page import write
from .stages import STAGES


def main(argv: list[str]) -> int:
    """Run the missing stages and write the results; returns the exit status."""
    args = _parse(argv)
    if args.report is not None:
        results = Results.load(args.report)
    else:
        status = run(args.out, args.stages, args.jobs, args.quiet)
        results = collect(args.out)
        results.commits, results.date = [commit()], datetime.date.today().isoformat()
        results.command = "python -m benchmarks experiments"
        results.save(args.out / "results.json")
        print(f"written: {args.out / 'results.json'}")
        if status:
            return status
    if args.write:
        for path in write(results):
            print(f"written: {path}")
    return 0


def run(out: Path, stages: list[str], jobs: int, quiet: bool) -> int:
    """Run the stages one after the other. A run that diverges is a result: it is listed, and the others go on."""
    for name in stages:
        stage, folder = STAGES[name], out / name
        asked = stage.sweep()
        print(f"{name}: {stage.title}; {len(asked.runs())} runs", flush=True)
        with grid.locked(folder):
            grid.claim(folder, asked)
            # Processes of a run share the cores as runs do.
            at_once = max(1, jobs // stage.processes)
            status = sweep.execute(asked, folder, jobs=at_once, command=stage.command(), quiet=quiet)
        if not status and not all(grid.finished(folder / planned.name) for planned in asked.runs()):
            return 1  # stopped by a signal
        afterwards.measure(name, folders(out, name), jobs, quiet)
        if name == "tune":
            for line in (wrong := untuned(collect(out))):
                print(line)
            if wrong:
                return 1
    return 0


def untuned(results: Results) -> list[str]:
    """Messages for the rows of the recipe glyphs whose learning rate is not the best of the grid."""
    lines = []
    for row, best in tuned(results).items():
        present = recipes.load(f"glyphs/{row}").optimizer.lr
        if present != best:
            lines.append(
                f"glyphs/{row}: the best learning rate is {best:g}, but the recipe has {present:g}; change the recipe"
            )
    return lines


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks experiments",
        description="Test the papers' claims on glyphs; --write updates docs/results.md.",
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("out/experiments"), help="folder of the runs")
    add(
        "--stages",
        type=_stages,
        default=list(STAGES),
        help=f"comma-separated, some of {','.join(STAGES)} (default: all)",
    )
    add("--jobs", type=int, default=2, help="processes at the same time (default: 2)")
    add("--report", type=Path, metavar="FILE", help="read the numbers from this file and train nothing")
    add("--write", action="store_true", help="write docs/results.md and its pictures")
    add("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs: expected at least 1, got {args.jobs}")
    return args


def _stages(text: str) -> list[str]:
    wanted = text.split(",")
    unknown = [name for name in wanted if name not in STAGES]
    if unknown:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(STAGES)}, got {', '.join(unknown)}")
    return [name for name in STAGES if name in wanted]
