"""Short runs for the tests of the engine: a few steps on the digits."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from nckernels.train.recipe import Recipe

ROOT = Path(__file__).parents[2]
TINY: dict[str, Any] = {
    "data.classes": (0, 4),
    "model.width": 4,
    "model.dim": 8,
    "schedule.epochs": 2,
    "optimizer.lr": 0.1,
    "run.batch_size": 64,
    "run.device": "cpu",
    "run.log_every": 3,
}
"""576 training images of 4 classes: 9 steps an epoch."""


def recipe(**changes: Any) -> Recipe:
    """Keys with ``__`` for the dot."""
    return Recipe().replace(**TINY).replace(**changes)


def file(folder: Path, **changes: Any) -> Path:
    """The same as a TOML file."""
    settings = {**TINY, **{key.replace("__", "."): value for key, value in changes.items()}}
    path = folder / "tiny.toml"
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items()))
    return path


def environment() -> dict[str, str]:
    """For programs that import nckernels."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def outcome(folder: Path) -> dict[str, Any]:
    """Everything that a run leaves, without times."""
    history = json.loads((folder / "history.json").read_text())
    history["seconds"] = 0
    history["classifiers"] = [{**result, "seconds": 0} for result in history["classifiers"]]
    history["recipe"]["name"] = ""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for line in lines:
        line["seconds"] = line["samples_per_second"] = 0
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    weights = {
        f"{part}.{name}": value.tolist()
        for part in ("network", "head")
        for name, value in saved[part].items()
        if isinstance(value, torch.Tensor)
    }
    momenta = {str(key): value["momentum_buffer"].tolist() for key, value in saved["optimizer"]["state"].items()}
    return {"history": history, "log": lines, "weights": weights, "momenta": momenta, "step": saved["step"]}
