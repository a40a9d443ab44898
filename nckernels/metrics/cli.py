"""``python -m nckernels convergence``: the speed of training runs, from the histories that they wrote."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .convergence import TABLE_7_METRICS, RunHistory, convergence_table

NOTES = """\
Shares of iterations after which the smoothed metric is and stays there; -: undefined, never: not at the end.
(I) of the run's own iterations.
(II) of the baseline's iterations, until the metric is as close to its optimum as the baseline's final value; "settled":
the baseline itself within the tolerance of that value. [NCD] Table 7 divides by the iteration at which CE has
"converged", at most 76 % of all, which makes its (II) larger than ours.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Read the histories and print the table; returns the exit status."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    try:
        paths = list(dict.fromkeys(arguments.runs))
        runs = {path: RunHistory.load(path) for path in paths}
        given = arguments.baseline
        if given is not None and given not in runs:
            runs[given] = RunHistory.load(given)
        losses = [run.loss for run in runs.values()]
        for path, run in runs.items():
            if losses.count(run.loss) == 1:
                runs[path] = replace(run, name=run.loss)
        table = convergence_table(
            [runs[path] for path in paths],
            baseline=None if given is None else runs[given],
            features=arguments.reference,
            tolerance=arguments.tolerance,
            smoothing=arguments.smoothing,
            metrics=arguments.metrics,
        )
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(table.text(), NOTES, sep="\n\n", end="")
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m nckernels convergence",
        description="Tabulate after how many iterations training runs come close to neural collapse and match a "
        "baseline run ([NCD] Table 7).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="the folder of a run, or its history.json")
    add(
        "--baseline",
        type=Path,
        metavar="RUN",
        help="the run to match; by default the run with the loss ce, if there is exactly one",
    )
    add(
        "--reference",
        choices=("signed", "relu"),
        default="signed",
        help="the features whose optimum counts as collapse",
    )
    add("--tolerance", type=float, default=0.05, help="share of a metric's range that counts as near its optimum")
    add("--smoothing", type=float, default=0.5, help="weight of the past in the exponentially weighted average")
    add("--metrics", nargs="+", default=TABLE_7_METRICS, metavar="METRIC", help="fields of NeuralCollapse")
    return parser
