"""``history.json``: the measurements of a run."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

import nckernels
from nckernels import ClassifierResult

from .files import write_text
from .recipe import Recipe, from_dict

VERSION = 2
"""Version of the format of ``history.json``."""


@dataclass
class History:
    """One entry per evaluation in every list. In JSON, numbers that are not finite are null."""

    recipe: Recipe
    num_classes: int = 0
    class_names: list[str] = field(default_factory=list)
    dim: int = 0
    """Size d of the features."""
    encoded_dim: int = 0
    """Size of the encoder's output, below the projection."""
    parameters: int = 0
    """Number of parameters of network and classifier together."""
    train_samples: int = 0
    test_samples: int = 0
    steps: list[int] = field(default_factory=list)
    """Steps done before the evaluation."""
    epochs: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    """Mean training loss since the previous evaluation; NaN at the first."""
    train_accuracy: list[float] = field(default_factory=list)
    """In eval mode, without augmentation."""
    test_accuracy: list[float] = field(default_factory=list)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    """:class:`nckernels.metrics.NeuralCollapse` of the training set, field by field."""
    seconds: float = 0.0
    """Time spent on training steps, without evaluations and checkpoints."""
    classifiers: list[ClassifierResult] = field(default_factory=list)
    """Results of ``run.probes`` on the trained network."""
    prototype_cosines: list[list[float]] | None = None
    mean_cosines: list[list[float]] | None = None
    """Cosines of the class means of the training set at the end."""
    finished: bool = False
    versions: dict[str, str] = field(default_factory=dict)
    note: str = ""
    """Remark of the data set."""

    def add(self, step: int, epoch: float, loss: float, evaluation: Any) -> None:
        """Append an :class:`~.evaluate.Evaluation`."""
        self.steps.append(step)
        self.epochs.append(epoch)
        self.loss.append(loss)
        self.train_accuracy.append(evaluation.train_accuracy)
        self.test_accuracy.append(evaluation.test_accuracy)
        for name, value in evaluation.metrics.items():
            self.metrics.setdefault(name, []).append(value)
        self.prototype_cosines, self.mean_cosines = evaluation.prototype_cosines, evaluation.mean_cosines

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in the file."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values |= {"recipe": self.recipe.to_dict(), "classifiers": [asdict(result) for result in self.classifiers]}
        return {"version": VERSION, **finite_or_none(values)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> History:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: if the content is not a history.
        """
        if not isinstance(content, Mapping) or content.get("version") != VERSION:
            raise ValueError(f"expected a history of version {VERSION}")
        try:
            values = {f.name: content[f.name] for f in fields(cls)}
            values["classifiers"] = [ClassifierResult(**none_to_nan(result)) for result in values["classifiers"]]
            for name in ("loss", "train_accuracy", "test_accuracy"):
                values[name] = none_to_nan(values[name])
            values["metrics"] = {name: none_to_nan(series) for name, series in values["metrics"].items()}
            for name in ("steps", "epochs", "class_names"):
                values[name] = list(values[name])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"expected a history, but {type(error).__name__}: {error}") from None
        return cls(**{**values, "recipe": from_dict(content["recipe"])})

    def save(self, path: Path) -> None:
        write_text(path, json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> History:
        """Read a ``history.json``, given as the file or as the run's folder.

        Raises:
            OSError: if there is none.
            ValueError: naming the file, if it is damaged or not a history.
        """
        path = Path(path)
        path = path / "history.json" if path.is_dir() else path
        try:
            return cls.from_dict(json.loads(path.read_bytes()))
        except ValueError as error:  # also raised for invalid JSON
            raise ValueError(f"{path}: {error}") from None


def new_history(recipe: Recipe, data: Any, step: Any, device: torch.device) -> History:
    """The history of a new run: what is known before the first step.

    Args:
        step: a module with the network and the head.
    """
    return History(
        recipe,
        num_classes=data.num_classes,
        class_names=list(data.class_names),
        dim=step.network.dim,
        encoded_dim=step.network.encoded_dim,
        parameters=sum(p.numel() for part in (step.network, step.head) for p in part.parameters()),
        train_samples=len(data.train),
        test_samples=len(data.test),
        versions=versions(device),
        note=data.note,
    )


def versions(device: torch.device) -> dict[str, str]:
    """Versions and device, on which a run's numbers may depend."""
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return {
        "nckernels": nckernels.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "device": place,
    }


def finite_or_none(value: Any) -> Any:
    """The value with None, which becomes null in JSON, in place of numbers that are not finite."""
    if isinstance(value, Mapping):
        return {key: finite_or_none(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def none_to_nan(value: Any) -> Any:
    """The value with NaN in place of None; the inverse of :func:`finite_or_none` except for infinities."""
    if isinstance(value, Mapping):
        return {key: none_to_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [none_to_nan(item) for item in value]
    return math.nan if value is None else value
