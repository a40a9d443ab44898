"""``python -m nckernels report``: the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .load import find, load_all


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page; returns the exit status. It is 1 if a file could not be read; the page then shows the others."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    try:
        found = find(arguments.runs)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    records, problems = load_all(found.histories)
    for problem in problems:
        print(f"{parser.prog}: {problem}", file=sys.stderr)
    if not records:
        for folder in found.waiting:
            print(f"{parser.prog}: {folder}: no evaluation yet", file=sys.stderr)
        return 1
    try:
        from .page import make_page

        page = make_page(records, title=arguments.title, problems=problems, waiting=found.waiting)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(page, encoding="utf-8", errors="replace")
    except (ImportError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.out}: {len(records)} {'run' if len(records) == 1 else 'runs'}")
    return 1 if problems else 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m nckernels report",
        description="Write one self-contained HTML page about training runs: tables, curves and geometry.",
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, a history.json, or a folder of runs")
    add("--out", type=Path, default=Path("report.html"), metavar="FILE", help="the page (default: report.html)")
    add("--title", help="title of the page (default: the title of the recipe that all runs share)")
    return parser
