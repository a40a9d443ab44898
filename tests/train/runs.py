"""Short runs for the tests of the engine: a few steps on the digits."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import sys
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


class Process:
    """``python -m nckernels train ...`` in a process of its own, forked from one that has imported all of it.

    Args:
        words: of the command line.
        output: a file for what it prints.
        file_size: its limit, in bytes.
    """

    def __init__(self, output: Path, *words: str | Path, file_size: int = 0) -> None:
        self.output = output
        arguments = (str(output), list(map(str, words)), file_size)
        self._process = _CONTEXT.Process(target=_train, args=arguments, daemon=True)
        self._process.start()

    @property
    def running(self) -> bool:
        return self._process.is_alive()

    def send(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def status(self) -> int | None:
        """The exit status, after its end."""
        self._process.join(60)
        return self._process.exitcode

    def printed(self) -> str:
        return self.output.read_text()


_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["nckernels.train.cli", "sklearn.datasets", "sklearn.model_selection"])


def _train(output: str, words: list[str], file_size: int) -> None:
    from nckernels.train import cli

    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    if file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    sys.exit(cli.main(words))


def outcome(folder: Path) -> dict[str, Any]:
    """All that a run leaves, without what the clock says."""
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
