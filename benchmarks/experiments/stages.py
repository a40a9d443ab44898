"""The training runs of the experiments: sweeps of the recipe glyphs, one after the other."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nckernels.train import grid
from nckernels.train.sweep import TRAIN

SEEDS = (0, 1, 2)
RATES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 1.5, 2.0, 5.0, 10.0)
WITH_CLASSIFIER = ("ce", "etf-dr", "normface", "ntce", "nonl")
PROCESSES = 4
NEVER = 10**6
FINAL_ONLY = (f"run.eval_every={NEVER}", "run.metrics=false", "run.probes=[]")


@dataclass(frozen=True)
class Stage:
    """A sweep of the recipe glyphs."""

    title: str
    settings: Sequence[str] = ()
    rows: Sequence[str] | None = None
    """None: all."""
    seeds: Sequence[int] = SEEDS
    values: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """The grid: values by dotted key."""
    processes: int = 1
    """Processes of each run."""

    def sweep(self) -> grid.Sweep:
        return grid.plan("glyphs", self.settings, self.rows, self.seeds, self.values)

    def command(self) -> tuple[str, ...]:
        """The command that starts a run, without the run's arguments."""
        if self.processes == 1:
            return TRAIN
        launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.processes}")
        return (sys.executable, *launcher, "-m", "nckernels", "train")


STAGES: dict[str, Stage] = {
    "tune": Stage(
        "learning rates, on the serif faces held out from the training faces",
        ("data.validation=true", *FINAL_ONLY),
        seeds=(0,),
        values={"optimizer.lr": RATES},
    ),
    "main": Stage("all losses on 100 classes, with neural collapse after every epoch"),
    # 24 epochs give the smallest training set 390 steps; the whole set has 900 in the stage "main".
    "longtail": Stage(
        "long-tailed training sets",
        ("schedule.epochs=24", *FINAL_ONLY),
        rows=WITH_CLASSIFIER,
        values={"data.imbalance": (0.1, 0.02, 0.01)},
    ),
    # Half the images, so twice the epochs for the same number of steps.
    "half": Stage(
        "50 of the classes, for transfer to the other 50",
        ("data.classes=[0, 50]", "schedule.epochs=24", *FINAL_ONLY),
        rows=(*WITH_CLASSIFIER, "scl"),
    ),
    # 16 samples on each process. Group norm, because on CPUs the statistics of batch norm would be each process's own.
    "ranks": Stage(
        f"batches of 64 on {PROCESSES} processes, with the negatives of the whole batch or of each process",
        ("run.batch_size=64", 'model.norm="group"', "optimizer.lr_batch=128", *FINAL_ONLY),
        rows=("nonl",),
        values={"loss.global_batch": (True, False)},
        processes=PROCESSES,
    ),
    # The learning rate grows with the batch, from the tuned one at 128.
    "grid": Stage(
        "temperature x batch size",
        ("optimizer.lr_batch=128", *FINAL_ONLY),
        rows=("normface", "nonl"),
        seeds=(0,),
        values={"loss.temperature": (0.05, 0.1, 0.2, 0.5), "run.batch_size": (32, 128, 512)},
    ),
}
