"""``python -m nckernels COMMAND``: the commands, each imported when it is called."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "info": (
        "nckernels.info",
        "versions, devices, backends, which one would run for which tensors and why not the others",
    ),
    "train": ("nckernels.train.cli", "train a network as a recipe says; --dry-run shows what that would be"),
    "evaluate": ("nckernels.train.evaluate_cli", "test a trained network, also on corrupted images"),
    "recipes": ("nckernels.train.recipes_cli", "the recipes, one per row family of the papers' tables"),
    "sweep": ("nckernels.train.sweep", "many runs: a grid over settings and seeds"),
    "report": ("nckernels.train.report.cli", "an HTML page about runs"),
    "demo": ("nckernels.train.demo", "CE, NormFace, NTCE, NONL and SupCon on digits; a table and a picture"),
    "lab": ("nckernels.lab.cli", "the papers' claims, each measured beside its closed form, with a picture"),
    "convergence": ("nckernels.metrics.cli", "when runs reach neural collapse, from their histories"),
}
"""The module with the ``main`` of each command, and what it does."""


def usage() -> str:
    lines = [f"  {name:<12} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        ["usage: python -m nckernels COMMAND [options]", "", "commands (--help for the options):", *lines, ""]
    )


def main(argv: list[str]) -> int:
    """Dispatch to a command; return the exit status."""
    command, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if command not in COMMANDS:
        wanted = command in ("-h", "--help")
        print(usage(), end="", file=sys.stdout if wanted else sys.stderr)
        return 0 if wanted else 2
    run = importlib.import_module(COMMANDS[command][0]).main
    return run(rest) or 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
