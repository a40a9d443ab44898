"""``python -m nckernels sweep``: trains the runs of a sweep, several at a time."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from . import recipes
from .grid import Run, Sweep, claim, finished, locked, plan, table

TRAIN = (sys.executable, "-m", "nckernels", "train")
STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, train the missing runs, print the table and the failures; returns the exit status."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    try:
        grid = dict(recipes.values(text) for text in arguments.grid)
        sweep = plan(arguments.recipe, arguments.set, arguments.rows, arguments.seeds, grid)
        if arguments.jobs < 1:
            raise ValueError(f"--jobs: expected at least 1, got {arguments.jobs}")
        if arguments.dry_run:
            print(listing(sweep))
            return 0
        if arguments.out is None:
            raise ValueError("--out is missing: the folder of the sweep")
        with locked(arguments.out):
            claim(arguments.out, sweep)
            return execute(sweep, arguments.out, jobs=arguments.jobs, quiet=arguments.quiet)
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.exit(1, f"{parser.prog}: {error}\n")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m nckernels sweep",
        description="Train a recipe for several rows, settings and seeds. The same command resumes the sweep.",
    )
    add = parser.add_argument
    add("recipe", metavar="RECIPE", help="a recipe of the package or a file; its [sweep] has the defaults")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting of all runs; may be repeated")
    add("--rows", type=lambda text: text.split(","), metavar="A,B", help="rows of the recipe")
    add("--seeds", type=_integers, metavar="0,1,2", help="seeds")
    add(
        "--grid",
        action="append",
        default=[],
        metavar="KEY=V1,V2",
        help="try several values of a setting; may be repeated",
    )
    add("--jobs", type=int, default=1, help="runs at the same time (default: 1)")
    add("--out", type=Path, metavar="FOLDER", help="folder of the sweep, with a subfolder for each run")
    add("--dry-run", action="store_true", help="list the runs, train nothing")
    add("--quiet", action="store_true", help="no progress bar")
    return parser


def listing(sweep: Sweep) -> str:
    """The runs as commands."""
    runs = sweep.runs()
    lines = [f"{len(runs)} {'run' if len(runs) == 1 else 'runs'} of {sweep.recipe}"]
    lines += [f"{run.name}: python -m nckernels train {shlex.join(run.arguments())}" for run in runs]
    return "\n".join(lines)


def execute(sweep: Sweep, folder: Path, *, jobs: int = 1, command: Sequence[str] = TRAIN, quiet: bool = False) -> int:
    """Train the unfinished runs, ``jobs`` processes at a time; returns the exit status.

    SIGINT, SIGTERM and SIGHUP are passed on to the processes as SIGTERM, and the processes save; a second signal kills
    them.
    """
    runs = sweep.runs()
    waiting = deque(run for run in runs if not finished(folder / run.name))
    failures: dict[str, str] = {}
    active: dict[str, _Process] = {}
    bar = tqdm(total=len(runs), initial=len(runs) - len(waiting), unit="run", disable=True if quiet else None)
    with bar, _signals() as caught:
        passed_on = 0
        try:
            while active or (waiting and not caught):
                while waiting and len(active) < jobs and not caught:
                    run = waiting.popleft()
                    active[run.name] = _Process(command, run, folder)
                if len(caught) > passed_on:
                    passed_on = len(caught)
                    for process in active.values():
                        process.stop(kill=passed_on > 1)
                for name, process in list(active.items()):
                    if process.ended():
                        del active[name]
                        reason = process.failure(stopped=bool(caught))
                        if reason:
                            failures[name] = reason
                        bar.update(finished(folder / name))
                        bar.set_postfix(failed=len(failures), refresh=False)
                time.sleep(0.05)
        finally:
            for process in active.values():  # only after an error in this loop
                process.stop()
    done = sum(finished(folder / run.name) for run in runs)
    print(table(folder, sweep))
    print(f"{done} of {len(runs)} runs finished, {len(failures)} failed")
    for name, reason in failures.items():
        print(f"\n{folder / name}: {reason}")
    if caught and done < len(runs):
        print("stopped; the same command resumes")
    return 1 if failures else 0


class _Process:
    """A run's process and what it prints."""

    def __init__(self, command: Sequence[str], run: Run, folder: Path) -> None:
        self.folder = folder / run.name
        options = ["--out", str(self.folder), "--resume", "auto", "--quiet"]
        arguments = [*command, *run.arguments(), *options]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.output: IO[bytes] = (self.folder / "output.txt").open("ab")
        self.output.write(f"$ {shlex.join(arguments)}\n".encode())
        self.output.flush()
        self.start = self.output.tell()
        self.process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # Ctrl-C reaches only this process, which passes it on once
        )

    def stop(self, kill: bool = False) -> None:
        if self.process.poll() is None:
            (self.process.kill if kill else self.process.terminate)()

    def ended(self) -> bool:
        if self.process.poll() is None:
            return False
        self.output.close()
        return True

    def failure(self, stopped: bool) -> str:
        """Why the run is not finished, with the last lines of its output; empty if it is, or was stopped by us."""
        status = self.process.returncode
        if (status == 0 and finished(self.folder)) or (stopped and status in (0, -signal.SIGTERM, -signal.SIGKILL)):
            return ""
        what = f"exit status {status}" if status else "exited before the training was finished"
        if status < 0:
            what = f"killed by {signal.Signals(-status).name}"
        with (self.folder / "output.txt").open("rb") as file:
            file.seek(max(self.start, file.seek(0, os.SEEK_END) - 4096))
            lines = file.read().decode(errors="replace").splitlines()[-8:]
        return "\n    ".join([what, *lines])


@contextmanager
def _signals() -> Iterator[list[Any]]:
    """A list of the signals that arrive inside the context; only the main thread can handle signals."""
    caught: list[Any] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = {number: signal.signal(number, lambda n, _: caught.append(n)) for number in STOPPING}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _integers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers separated by commas, got {text!r}") from None
