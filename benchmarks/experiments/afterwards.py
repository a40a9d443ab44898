"""Measurements on trained networks: errors on corrupted test images, and transfer to classes never trained on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import nckernels
from nckernels.train import corruptions, evaluate, evaluate_cli
from nckernels.train.data import open_data
from nckernels.train.files import write_text

FILE = "afterwards.json"
OTHERS = (50, 100)
"""The range of classes that the stage "half" has not seen."""


def corruption_errors(folder: Path) -> dict[str, Any]:
    """Errors by corruption, one value per severity."""
    run = _load(folder)

    def corrupt(name: str, severity: int) -> Any:
        return corruptions.corrupted(run.data.test, name, severity)

    return {"corruptions": corruptions.corruption_errors(run.accuracy, corrupt, progress=False)}


def transfer(folder: Path) -> dict[str, Any]:
    """Test accuracy of a linear probe on the encoder's features, for the classes that the encoder has not seen."""
    run = _load(folder)
    data = open_data(run.recipe.replace(data__classes=OTHERS).data)
    (train, train_labels), (test, test_labels) = (
        evaluate.features(run.network, data, split, run.recipe, run.device, run.network.encode)
        for split in (data.train, data.test)
    )
    probe = nckernels.LinearProbe(data.num_classes, train.shape[1]).fit(train, train_labels)
    return {"transfer": probe.score(test, test_labels)}


MEASURES: dict[str, Callable[[Path], dict[str, Any]]] = {"main": corruption_errors, "half": transfer}
"""The measurement that follows a stage."""


def measure(stage: str, folders: Iterable[Path], jobs: int, quiet: bool) -> None:
    """Measure the runs of a stage that have no file of measurements, and write these files."""
    missing = [folder for folder in folders if not (folder / FILE).exists()]
    if stage not in MEASURES or not missing:
        return
    with ProcessPoolExecutor(jobs, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        done = pool.map(_measure, [stage] * len(missing), missing)
        for _ in tqdm(
            done, total=len(missing), desc=f"{stage}, afterwards", unit="run", disable=True if quiet else None
        ):
            pass


def read(folder: Path) -> dict[str, Any]:
    """The measurements of a run; empty if there are none."""
    path = folder / FILE
    return dict(json.loads(path.read_text())) if path.exists() else {}


def _measure(stage: str, folder: Path) -> None:
    write_text(folder / FILE, json.dumps(MEASURES[stage](folder)) + "\n")


def _load(folder: Path) -> evaluate_cli.Trained:
    return evaluate_cli.load(folder, torch.device("cpu"))
