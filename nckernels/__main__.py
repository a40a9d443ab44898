"""``python -m nckernels COMMAND``: dispatches to a command, which is imported only when it is called."""

from __future__ import annotations

import difflib
import importlib
import os
import sys

COMMANDS = {
    "info": (
        "nckernels.info",
        "print versions, devices and settings, and which backend runs for which device and dtype",
    ),
    "train": ("nckernels.train.cli", "train a network by a recipe; --dry-run only prints settings, model and memory"),
    "evaluate": ("nckernels.train.evaluate_cli", "measure a trained network on its test set or on corrupted images"),
    "recipes": ("nckernels.train.recipes_cli", "list the recipes: the experiments of the papers and small examples"),
    "sweep": ("nckernels.train.sweep", "train many runs: rows of a recipe, a grid of settings, seeds"),
    "report": ("nckernels.train.report.cli", "write an HTML page that compares runs"),
    "demo": ("nckernels.train.demo", "compare CE, NormFace, NTCE, NONL and SupCon on digits: a table and a picture"),
    "lab": ("nckernels.lab.cli", "test the papers' claims: measured values beside their closed forms, with pictures"),
    "convergence": ("nckernels.metrics.cli", "tabulate how fast runs reached neural collapse"),
}
"""For each command the module with its ``main``, and one line of help."""


def usage() -> str:
    lines = [f"  {name:<12} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        ["usage: python -m nckernels COMMAND [options]", "", "commands (COMMAND --help lists the options):", *lines, ""]
    )


def main(argv: list[str]) -> int:
    """Dispatch to a command; return the exit status."""
    command, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if command not in COMMANDS:
        wanted = command in ("-h", "--help")
        print(usage(), end="", file=sys.stdout if wanted else sys.stderr)
        if wanted:
            return 0
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        guess = f" (did you mean {near[0]!r}?)" if near else ""
        print(f"python -m nckernels: error: there is no command {command!r}{guess}", file=sys.stderr)
        return 2
    try:
        run = importlib.import_module(COMMANDS[command][0]).main
    except ImportError as error:
        cause = error.__cause__ or error
        package = (cause.name or "").partition(".")[0] if isinstance(cause, ModuleNotFoundError) else ""
        if package in ("", "nckernels"):
            raise
        extra = "lab" if command in ("lab", "convergence") else "train"
        needs = f'{command} needs {package}: pip install "nckernels[{extra}]"'
        print(f"python -m nckernels: error: {needs}", file=sys.stderr)
        return 1
    return run(rest) or 0


def program(argv: list[str]) -> int | str | None:
    """:func:`main` for a reader that may stop reading, as in ``recipes | head``: not an error to be shown."""
    status: int | str | None
    try:
        try:
            status = main(argv)
        except SystemExit as end:  # of argparse, --help for example
            status = end.code
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush when Python ends
        status = 1
    return status


if __name__ == "__main__":
    sys.exit(program(sys.argv[1:]))
