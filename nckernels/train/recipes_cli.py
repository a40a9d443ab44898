"""``python -m nckernels recipes``: lists the recipes and prints their settings."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import recipes


def main(argv: Sequence[str] | None = None) -> int:
    """List the recipes, or print one; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m nckernels recipes",
        description="List the recipes of the package with their rows, or print the file of one.",
    )
    parser.add_argument(
        "name",
        nargs="?",
        metavar="RECIPE",
        help="NAME: print its file; NAME/ROW or a file of your own: print all settings (default: list the recipes)",
    )
    arguments = parser.parse_args(argv)
    try:
        print(listing() if arguments.name is None else shown(arguments.name))
    except ValueError as error:
        parser.error(str(error))
    return 0


def listing() -> str:
    """Name and title of every recipe, each followed by its rows."""
    lines = []
    for name in recipes.names():
        lines.append(f"{name:<24} {recipes.read(name)[0].get('title', '')}")
        rows = recipes.rows(name)
        if rows:
            lines.append(f"{'':<24} rows: {', '.join(rows)}")
    return "\n".join(lines)


def shown(name: str) -> str:
    """The file of a recipe, or all settings of a row."""
    if name in recipes.names():
        return (recipes.FOLDER / f"{name}.toml").read_text(encoding="utf-8").rstrip("\n")
    from .plan import as_toml

    return as_toml(recipes.load(name)).rstrip("\n")


if __name__ == "__main__":
    sys.exit(main())
