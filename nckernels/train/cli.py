"""``python -m nckernels train``: one training run from the command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

from nckernels.metrics import optimum

from .data import DATASETS
from .models import FEATURES, LOSSES
from .trainer import Run, TrainConfig, fit

DEFAULTS = TrainConfig()


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, train, print the final metrics and write the results; returns the exit status."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    values = {f.name: getattr(arguments, f.name) for f in fields(TrainConfig)}
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
    add = parser.add_argument
    add("--dataset", choices=sorted(DATASETS), default=DEFAULTS.dataset, help="what to train on")
    add("--loss", choices=LOSSES, default=DEFAULTS.loss, help="what to train with")
    add("--temperature", type=float, default=DEFAULTS.temperature, help="of all losses but ce")
    add("--epochs", type=int, default=DEFAULTS.epochs, help="passes over the training set")
    add("--batch-size", type=int, default=DEFAULTS.batch_size, help="samples per iteration, all the same")
    add("--lr", type=float, default=DEFAULTS.lr, help="initial learning rate; a cosine takes it to lr / 1000")
    add("--weight-decay", type=float, default=DEFAULTS.weight_decay, help="of SGD with momentum 0.9")
    add("--dim", type=int, default=DEFAULTS.dim, help="size of the features")
    add(
        "--features", choices=FEATURES, default=DEFAULTS.features,
        help="linear: signed features; relu: non-negative ones, which cannot reach neural collapse",
    )  # fmt: skip
    add("--seed", type=int, default=DEFAULTS.seed, help="of initialisation and batches")
    add("--device", default=DEFAULTS.device, help="cpu, cuda, cuda:1, mps, ...; auto: accelerator if any")
    add("--threads", type=int, default=DEFAULTS.threads, help="CPU threads; more gain little here")
    add("--amp", action="store_true", help="train in bfloat16 autocast")
    add("--eval-every", type=int, default=DEFAULTS.eval_every, help="iterations between evaluations")
    add("--backend", default=DEFAULTS.backend, help="backend of nckernels; None: the fastest that runs")
    add("--out", type=Path, default=None, help="folder for history.json and checkpoint.pt; None: no files")
    add("--quiet", action="store_true", help="no progress bar")
    return parser


def summary(run: Run) -> str:
    """The final accuracy and metrics, one per line, with the value at neural collapse."""
    history = run.history
    best = asdict(optimum(run.data.num_classes))
    lines = [
        f"{history.config.loss} on {history.config.dataset}: {history.steps[-1]} iterations in "
        f"{history.seconds:.1f} s, accuracy {history.train_accuracy[-1]:.2%} train, "
        f"{history.test_accuracy[-1]:.2%} test",
        f"{'training set':>20} {'measured':>10} {'collapse':>10}",
    ]
    lines += [f"{name:>20} {values[-1]:10.4g} {best[name]:10.4g}" for name, values in history.metrics.items()]
    return "\n".join(lines)
