"""``python -m nckernels train``: one training run from the command line."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from nckernels import ClassifierResult
from nckernels.metrics import optimum

from .data import DataError
from .engine import TrainingError, fit
from .history import History
from .recipes import load


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, train, print the final metrics.

    Returns:
        0 for a run that is finished, or saved after a signal; 1 for a training that failed (diverged, data unreadable,
        folder not writable). Bad arguments exit with 2.
    """
    parser = make_parser()
    arguments = parser.parse_args(argv)
    if arguments.device is not None:
        arguments.set.append(f"run.device={arguments.device}")
    if arguments.resume and arguments.out is None:
        parser.error("--resume needs --out, the folder of the run")
    first = os.environ.get("RANK", "0") == "0"
    try:
        recipe = load(arguments.recipe, arguments.set)
        if arguments.dry_run:
            from . import plan

            print(plan.describe(recipe))
            return 0
        before = _finished(arguments.out)
        run = fit(
            recipe, arguments.out, resume=arguments.resume is not None, progress=False if arguments.quiet else None
        )
    except (DataError, FloatingPointError, TrainingError, OSError) as error:
        message = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        if isinstance(error, OSError) and error.filename:
            message = f"{error.filename}: {message}"
        parser.exit(1, f"{parser.prog}: {message}\n")
    except (ValueError, ImportError) as error:
        parser.error(str(error))
    if not first:
        return 0
    if not run.history.finished:
        print(f"saved; to resume: {resume_line(arguments)}")
        return 0
    if before:
        print(f"{arguments.out}: this run was already finished")
    print(summary(run.history))
    if arguments.out is not None:
        print(f"written: {arguments.out / 'history.json'}, {arguments.out / 'checkpoint.pt'}")
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m nckernels train",
        description="Train a network by a recipe and measure neural collapse during training. "
        "`python -m nckernels recipes` lists the recipes; `torchrun --nproc-per-node=N -m nckernels train ...` "
        "trains on N devices. Example: python -m nckernels train digits/nonl --out runs/nonl",
    )
    add = parser.add_argument
    add("recipe", metavar="RECIPE", help="NAME or NAME/ROW of the package, FILE.toml, or FILE.toml:ROW")
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a setting, such as --set loss.name=ntce --set schedule.epochs=10; may be repeated",
    )
    add(
        "--device",
        help="cpu, cuda, cuda:1, ...; auto: an accelerator if there is one; short for --set run.device=DEVICE",
    )
    add("--out", type=Path, metavar="FOLDER", help="folder for checkpoints, history and logs (default: write no files)")
    add(
        "--resume",
        nargs="?",
        const="auto",
        choices=("auto",),
        help="continue from the checkpoint in --out, or start a new run if there is none",
    )
    add("--dry-run", action="store_true", help="print the settings, the model and the memory of the loss, then exit")
    add("--quiet", action="store_true", help="no progress bar, and no line for each evaluation")
    return parser


def resume_line(arguments: argparse.Namespace) -> str:
    """The command that resumes a run."""
    processes = os.environ.get("LOCAL_WORLD_SIZE")
    program = f"torchrun --nproc-per-node={processes}" if processes else "python"
    settings = [word for setting in arguments.set for word in ("--set", setting)]
    words = [arguments.recipe, "--out", str(arguments.out), "--resume", "auto", *settings]
    return f"{program} -m nckernels train {shlex.join(words)}"


def summary(history: History) -> str:
    """The final accuracy and metrics, one per line, with the optimum of signed or of ReLU features."""
    recipe = history.recipe
    reach: Literal["relu", "signed"] = "relu" if recipe.model.projection == "none" or recipe.model.freeze else "signed"
    best = asdict(optimum(history.num_classes, features=reach))
    lines = [
        f"{recipe.loss.name} on {recipe.data.name}: {history.steps[-1]} steps in {history.seconds:.1f} s, "
        f"accuracy {history.train_accuracy[-1]:.2%} train, {history.test_accuracy[-1]:.2%} test"
    ]
    if history.metrics:
        lines.append(f"{'training set':>20} {'measured':>10} {'collapse':>10}")
    lines += [f"{name:>20} {values[-1]:10.4g} {best[name]:10.4g}" for name, values in history.metrics.items()]
    if history.classifiers:
        lines += ["", classifier_table(history.classifiers)]
    return "\n".join(lines)


CLASSIFIERS = {"FP": "fixed prototypes (FP)", "LP": "linear probe (LP)", "NLP": "normalised probe (NLP)"}


def classifier_table(results: Sequence[ClassifierResult]) -> str:
    """Accuracies of the classifiers on a trained network, and the seconds that fitting each of them took."""
    lines = [f"{'classifier':<22} {'test %':>7} {'s':>7}"]
    lines += [f"{CLASSIFIERS[r.name]:<22} {100 * r.accuracy:7.1f} {r.seconds:7.3f}" for r in results]
    return "\n".join(lines)


def _finished(folder: Path | None) -> bool:
    try:
        return folder is not None and History.load(folder).finished
    except (OSError, ValueError):
        return False


if __name__ == "__main__":
    sys.exit(main())
