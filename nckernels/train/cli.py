"""``python -m nckernels train``: one training run from the command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Literal

from nckernels import ClassifierResult
from nckernels.metrics import optimum

from .options import add_options
from .trainer import Run, TrainConfig, fit

DEFAULTS = TrainConfig()


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, train, print the final metrics and write the results; returns the exit status."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    values = {f.name: getattr(arguments, f.name) for f in fields(TrainConfig)}
    if arguments.out is not None:
        try:
            arguments.out.mkdir(parents=True, exist_ok=True)  # before the training, not after it
        except OSError as error:
            parser.error(f"--out: {error}")
    try:
        run = fit(TrainConfig(**values), progress=not arguments.quiet)
    except ValueError as error:
        parser.error(str(error))
    except FloatingPointError as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    print(summary(run))
    if arguments.out is not None:
        run.save(arguments.out)
        print(f"written: {arguments.out / 'history.json'}, {arguments.out / 'checkpoint.pt'}")
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m nckernels train",
        description="Train a small network with one loss and measure neural collapse on the way.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_options(parser, DEFAULTS)
    add = parser.add_argument
    add("--out", type=Path, default=None, help="folder for history.json and checkpoint.pt; None: no files")
    add("--quiet", action="store_true", help="no progress bar")
    return parser


def summary(run: Run) -> str:
    """The final accuracy and metrics, one per line, with the value at neural collapse, or as close as ReLU gets."""
    history = run.history
    reach: Literal["relu", "signed"] = "relu" if history.config.features == "relu" else "signed"
    best = asdict(optimum(run.data.num_classes, features=reach))
    lines = [
        f"{history.config.loss} on {history.config.dataset}: {history.steps[-1]} iterations in "
        f"{history.seconds:.1f} s, accuracy {history.train_accuracy[-1]:.2%} train, "
        f"{history.test_accuracy[-1]:.2%} test",
        f"{'training set':>20} {'measured':>10} {'collapse':>10}",
    ]
    lines += [f"{name:>20} {values[-1]:10.4g} {best[name]:10.4g}" for name, values in history.metrics.items()]
    if history.classifiers:
        lines += ["", classifier_table(history.classifiers)]
    return "\n".join(lines)


CLASSIFIERS = {"FP": "fixed prototypes (FP)", "LP": "linear probe (LP)", "NLP": "normalised probe (NLP)"}


def classifier_table(results: Sequence[ClassifierResult]) -> str:
    """Accuracies on one network after contrastive training, and what each classifier's own training took."""
    lines = [f"{'classifier':<22} {'test %':>7} {'s':>7}"]
    lines += [f"{CLASSIFIERS[r.name]:<22} {100 * r.accuracy:7.1f} {r.seconds:7.3f}" for r in results]
    return "\n".join(lines)
