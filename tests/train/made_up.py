"""Made-up histories, for tests of code that reads them."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from nckernels.metrics import NeuralCollapse, optimum
from nckernels.train.recipe import Recipe

SKILL = {"ce": 0.3, "normface": 0.8, "ntce": 0.9, "nonl": 1.0, "scl": 0.7}
"""The share of the way to collapse that each loss reaches at the end."""


def history(
    loss: str = "nonl", *, seed: int = 0, classes: int = 10, evaluations: int = 30, finished: bool = True,
    accuracy: float | None = None, name: str | None = None, dim: int = 64, class_names: list[str] | None = None,
    note: str = "", last: bool = False, **settings: Any,
) -> dict[str, Any]:  # fmt: skip
    """The content of a ``history.json``; ``settings`` are keys of the recipe, as ``loss__temperature``.

    With ``last`` there is only the last evaluation, and no cosines: nothing to draw.
    """
    random = np.random.default_rng([seed, sum(map(ord, loss)), classes])
    views = {"augment.views": 2} if loss in ("scl", "prototype") else {}
    changes = {key.replace("__", "."): value for key, value in settings.items()}
    recipe = Recipe(title="Made up").replace(
        **{"loss.name": loss, "run.seed": seed, "name": f"made-up/{loss}" if name is None else name, **views, **changes}
    )
    skill = SKILL.get(loss, 0.6)
    best = asdict(optimum(classes, features="relu" if recipe.model.projection == "none" else "signed"))
    start = asdict(NeuralCollapse(
        intra_erank=0.8 * dim, inter_erank=0.4 * classes, weights_erank=0.8 * (classes - 1), weight_alignment=1.9,
        instance_alignment=1.95, mir=0.4, hdr=0.3, nc1=9.0, within_scatter=0.8, nc2_norms=0.5, nc2_cosines=0.4,
        nc2_cosines_max=0.9, offset=0.8, mir_centred=0.5, hdr_centred=0.3, nc1_rank=classes - 1.0, scatter_ratio=5.0,
        cdnv=3.0, nc3_rotated=1.0, nc4=0.3, bias_spread=math.nan,
    ))  # fmt: skip
    done = evaluations if finished else max(evaluations // 2, 1)
    time = np.linspace(0, 1, evaluations)[:done]
    progress = (1 - np.exp(-6 * time)) * skill

    def way(first: float, last: float, noise: float) -> list[float | None]:
        values = first + progress * (last - first) + noise * (last - first) * random.normal(size=done)
        return [None if math.isnan(value) else float(value) for value in values]

    top = 0.9 + 0.08 * skill if accuracy is None else accuracy
    reached = np.clip(
        1 / classes + (1 - np.exp(-8 * time)) * (top - 1 / classes) + random.normal(size=done) * 2e-3, 0, 1
    )
    off = (1 - skill) * random.uniform(-0.3, 0.5, (classes, classes)) - skill / (classes - 1)
    cosines = np.clip((off + off.T) / 2, -1, 1)
    np.fill_diagonal(cosines, 1.0)
    made: dict[str, Any] = {
        "version": 2,
        "recipe": recipe.to_dict(),
        "num_classes": classes,
        "class_names": class_names or [str(c) for c in range(classes)],
        "dim": dim,
        "encoded_dim": dim,
        "parameters": 12345,
        "train_samples": 1437,
        "test_samples": 360,
        "steps": [5 * i for i in range(done)],
        "epochs": [float(i) for i in range(done)],
        "loss": [None, *(2.3 * np.exp(-5 * time[1:]) + 0.01)],
        "train_accuracy": np.clip(reached + 0.02, 0, 1).tolist(),
        "test_accuracy": reached.tolist(),
        "metrics": {metric: way(start[metric], best[metric], 0.005) for metric in start},
        "seconds": 12.3 + seed,
        "classifiers": [
            {"name": "FP", "accuracy": top, "seconds": 0.01},
            {"name": "LP", "accuracy": top - 0.01, "seconds": 2.5},
        ]
        if loss == "scl"
        else [],
        "prototype_cosines": cosines.tolist(),
        "mean_cosines": (cosines if loss == "scl" else cosines**3).tolist(),
        "finished": finished,
        "versions": {"nckernels": "0.9", "torch": "2.13", "python": "3.11", "device": "cpu"},
        "note": note,
    }
    if last:
        made |= {key: made[key][-1:] for key in ("steps", "epochs", "loss", "train_accuracy", "test_accuracy")}
        made |= {"metrics": {metric: values[-1:] for metric, values in made["metrics"].items()}}
        made |= {"prototype_cosines": None, "mean_cosines": None}
    return made


def write(folder: Path, content: Any) -> Path:
    """``history.json`` and ``recipe.json`` in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.json").write_text(json.dumps(content["recipe"]))
    (folder / "history.json").write_text(json.dumps(content))
    return folder
