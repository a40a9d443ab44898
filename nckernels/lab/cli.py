"""``python -m nckernels lab``: tests the papers' claims against their closed forms, with one picture each."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from . import bias, collapse, encodings, errata, prototypes, relu, supcon
from .report import Result, table

#: The experiments by name. Every function takes ``seed`` and ``progress``.
EXPERIMENTS: dict[str, Callable[..., Result]] = {
    "collapse": collapse.run,
    "bias": bias.run,
    "encodings": encodings.run,
    "relu": relu.run,
    "supcon": supcon.run,
    "prototypes": prototypes.run,
    "errata": errata.run,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one experiment or all, print the tables, write the pictures; 1 if anything disagrees with its closed form."""
    arguments = make_parser().parse_args(argv)
    names = list(EXPERIMENTS) if arguments.name == "all" else [arguments.name]
    arguments.out.mkdir(parents=True, exist_ok=True)
    wrong = []
    for name in names:
        result = EXPERIMENTS[name](seed=arguments.seed, progress=not arguments.quiet)
        picture = arguments.out / f"{name}.png"
        result.draw(picture)
        print(f"{name}: {table(result)}\n{picture}\n", flush=True)
        if not result.agrees:
            wrong.append(name)
    if len(names) > 1:
        print(
            f"{len(names) - len(wrong)} of {len(names)} experiments agree"
            + (f"; not {', '.join(wrong)}" if wrong else "")
        )
    return 1 if wrong else 0


def make_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m nckernels lab",
        description="Test the papers' claims: each experiment prints measured values beside their closed forms and "
        "draws a picture. The exit status is 1 if anything disagrees.",
    )
    parser.add_argument("name", choices=[*EXPERIMENTS, "all"], help="the experiment")
    parser.add_argument("--out", type=Path, default=Path("out/lab"), help="folder of the pictures (default: out/lab)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random starts (default: 0)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser
