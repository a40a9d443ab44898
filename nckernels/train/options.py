"""The fields of :class:`~.trainer.TrainConfig` as command-line options."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from .data import DATASETS
from .models import ASSIGNMENTS, FEATURES, LOSSES
from .trainer import TrainConfig

_OPTIONS: dict[str, dict[str, Any]] = {
    "dataset": {"choices": sorted(DATASETS), "help": "what to train on"},
    "loss": {"choices": LOSSES, "help": "what to train with; scl is SupCon, without a classifier"},
    "temperature": {"type": float, "help": "of normface, ntce, nonl and scl"},
    "assignment": {"choices": ASSIGNMENTS, "help": "of dlp's points to the classes: after every epoch, or at random"},
    "queue": {"type": int, "help": "past features that nonl, ntce and scl contrast with besides the batch"},
    "decay": {"type": float, "help": "of running denominators of nonl and ntce, for instance 0.9; 0: none"},
    "views": {"type": int, "help": "random views of each sample under scl"},
    "epochs": {"type": int, "help": "passes over the training set"},
    "batch_size": {"type": int, "help": "samples per iteration, all the same"},
    "lr": {"type": float, "help": "initial learning rate; a cosine takes it to lr / 1000"},
    "weight_decay": {"type": float, "help": "of SGD with momentum 0.9"},
    "dim": {"type": int, "help": "size of the features"},
    "width": {"type": int, "help": "channels of the network's first block"},
    "features": {
        "choices": FEATURES,
        "help": "linear, mlp: signed features; relu: non-negative ones, which cannot reach neural collapse",
    },
    "seed": {"type": int, "help": "of initialisation, batches and views"},
    "device": {"help": "cpu, cuda, cuda:1, mps, ...; auto: accelerator if any"},
    "threads": {"type": int, "help": "CPU threads; more gain little here"},
    "amp": {"action": "store_true", "help": "train in bfloat16 autocast"},
    "eval_every": {"type": int, "help": "iterations between evaluations"},
    "backend": {"help": "backend of nckernels; None: the fastest that runs"},
}


def add_options(parser: argparse.ArgumentParser, defaults: TrainConfig, names: Iterable[str] = tuple(_OPTIONS)) -> None:
    """Give the parser an option for each named field."""
    for name in names:
        parser.add_argument(f"--{name.replace('_', '-')}", default=getattr(defaults, name), **_OPTIONS[name])
