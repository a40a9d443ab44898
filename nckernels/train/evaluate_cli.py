"""``python -m nckernels evaluate``: measures a run's last checkpoint, on its own sets, corruptions or ImageNet-C."""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from nckernels.metrics import optimum

from . import checkpoint, corruptions, evaluate
from .cli import classifier_table
from .data import DataError, Dataset, imagenet_c, open_data
from .heads import Head
from .models import Network
from .probes import probe
from .processes import World, world
from .recipe import Recipe, from_dict
from .step import build

Errors = dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class Trained:
    """A trained run, loaded from its folder onto a device."""

    recipe: Recipe
    network: Network
    head: Head
    data: Dataset
    device: torch.device

    def accuracy(self, split: Any) -> float:
        return evaluate.accuracy(self.network, self.head, self.data, split, self.recipe, self.device)


def load(folder: Path, device: torch.device, *, root: str = "") -> Trained:
    """Network and classifier of a run's last checkpoint, and the data of its recipe.

    Args:
        root: replaces the ``data.root`` of the run.

    Raises:
        ValueError: naming the file that is missing or damaged, or the problem with the data.
    """
    file = folder / "recipe.json"
    try:
        content, state = file.read_bytes(), checkpoint.load(folder / "checkpoint.pt")
    except OSError as error:
        raise ValueError(f"{folder}: no run with a checkpoint in this folder: {error}") from None
    try:
        recipe = from_dict(json.loads(content))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    if root:
        recipe = recipe.replace(data__root=root)
    data = open_data(recipe.data, seed=recipe.run.seed)
    with torch.random.fork_rng(devices=[]):
        network, head = build(recipe.replace(model__pretrained=False), data, World(device), start=False)
    network.load_state_dict(state["network"])
    head.load_state_dict(state["head"])
    return Trained(recipe, network, head, data, device)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table and write it; returns the exit status."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    if arguments.on == "imagenet-c" and not arguments.root:
        parser.error("--on imagenet-c needs --root, the folder of ImageNet-C")
    if arguments.baseline and arguments.on != "corruptions":
        parser.error("--baseline needs --on corruptions; the errors on ImageNet-C are divided by AlexNet's")
    try:
        results, text = _measure(arguments)
        print(text)
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    except (DataError, FloatingPointError, OSError) as error:
        parser.exit(1, f"{parser.prog}: {arguments.run}: {error}\n")
    except (ValueError, ImportError) as error:
        parser.error(str(error))
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m nckernels evaluate",
        description="Measure a run's last checkpoint: accuracies, neural collapse, errors under corruptions.",
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="a run's folder")
    add(
        "--on",
        choices=("test", "corruptions", "imagenet-c"),
        default="test",
        help="test (default): training and test set of the run, with the metrics of neural collapse; corruptions: "
        "nine corruptions of a test set in memory, at five severities; imagenet-c: ImageNet-C on disk",
    )
    add(
        "--root",
        default="",
        metavar="DIR",
        help="with --on imagenet-c: the folder of ImageNet-C; otherwise: replaces the data.root of the run",
    )
    add(
        "--baseline",
        type=Path,
        metavar="RUN",
        help="with --on corruptions: divide the errors by those of this run, for the mCE",
    )
    add("--probes", action="store_true", help="also fit class means and linear probes to the features: FP, LP, NLP")
    add("--json", type=Path, metavar="FILE", help="write the numbers to this file")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto (default): an accelerator if there is one")
    return parser


def _measure(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The numbers, and a table of them."""
    on, device = arguments.on, world(arguments.device, "--device").device
    run = load(arguments.run, device, root="" if on == "imagenet-c" else arguments.root)
    results: dict[str, Any] = {"run": str(arguments.run), "name": run.recipe.name, "on": on}
    if on == "test":
        found = evaluate.evaluate(run.network, run.head, run.data, run.recipe, device)
        results |= asdict(found)
        results["metrics"] = {name: value if math.isfinite(value) else None for name, value in found.metrics.items()}
        text = _test_table(run, found)
    else:
        results["clean"] = 1 - run.accuracy(run.data.test)
        errors = _errors(run, arguments.root if on == "imagenet-c" else None)
        results["errors"] = {name: list(values) for name, values in errors.items()}
        baseline: Mapping[str, Sequence[float]] | None = None
        if on == "imagenet-c":
            results["mce"] = imagenet_c.mean_corruption_error(errors)
            baseline = {name: [error] for name, error in imagenet_c.ALEXNET.items()}
        elif arguments.baseline is not None:
            baseline = _errors(load(arguments.baseline, device, root=arguments.root))
            results["mce"] = corruptions.mean_corruption_error(errors, baseline)
        text = _error_table(results["clean"], errors, baseline, results.get("mce"))
    if arguments.probes:
        recipe = run.recipe.replace(run__probes=["FP", "LP", "NLP"])
        classifiers = probe(run.network, run.data, recipe, device)
        results["classifiers"] = [asdict(result) for result in classifiers]
        text += "\n\n" + classifier_table(classifiers)
    return results, text


def _errors(run: Trained, imagenet_root: str | None = None) -> Errors:
    """Errors on corruptions of the test set, or on ImageNet-C."""
    if imagenet_root is None:
        return corruptions.corruption_errors(run.accuracy, lambda n, s: corruptions.corrupted(run.data.test, n, s))
    names = run.data.class_names
    return corruptions.corruption_errors(
        run.accuracy, lambda n, s: imagenet_c.read(imagenet_root, n, s, names), imagenet_c.CORRUPTIONS
    )


def _test_table(run: Trained, found: evaluate.Evaluation) -> str:
    several = run.data.train.labels.ndim > 1
    word = "mean average precision" if several else "accuracy"
    lines = [f"{run.recipe.name}: {word} {found.train_accuracy:.2%} train, {found.test_accuracy:.2%} test"]
    if found.metrics:
        model = run.recipe.model
        reach: Literal["relu", "signed"] = "relu" if model.projection == "none" or model.freeze else "signed"
        best = asdict(optimum(run.data.num_classes, features=reach))
        lines.append(f"{'training set':>20} {'measured':>10} {'collapse':>10}")
        lines += [f"{name:>20} {value:10.4g} {best[name]:10.4g}" for name, value in found.metrics.items()]
    return "\n".join(lines)


def _error_table(
    clean: float, errors: Errors, baseline: Mapping[str, Sequence[float]] | None, mce: float | None
) -> str:
    """Errors in percent at severities 1 to 5, their mean, and the mean divided by the baseline's."""
    width = max(map(len, errors))
    head = f"{'error, %':<{width}}" + "".join(f"{s:>7}" for s in range(1, corruptions.SEVERITIES + 1)) + f"{'mean':>8}"
    lines = [head + (f"{'CE, %':>8}" if baseline else ""), f"{'clean':<{width}}{'':{7 * corruptions.SEVERITIES}}"]
    lines[1] += f"{100 * clean:8.1f}"
    for name, values in errors.items():
        mean = statistics.fmean(values)
        line = f"{name:<{width}}" + "".join(f"{100 * value:7.1f}" for value in values) + f"{100 * mean:8.1f}"
        if baseline:
            line += f"{100 * mean / statistics.fmean(baseline[name]):8.1f}"
        lines.append(line)
    means = [statistics.fmean(values) for values in errors.values()]
    name = "mean" if mce is None else "mean, mCE"
    last = f"{name:<{width}}{'':{7 * corruptions.SEVERITIES}}{100 * statistics.fmean(means):8.1f}"
    return "\n".join([*lines, last + (f"{100 * mce:8.1f}" if mce is not None else "")])
