"""What a run would be, for ``--dry-run``: nothing is trained, and the data need not be there."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nckernels.backends.registry import DEFAULT_WORKSPACE, get_workspace

from . import models
from .data.glyphs import DEJAVU, MONO, SANS
from .data.longtail import class_counts
from .processes import parse_device
from .recipe import CONTRASTIVE, Recipe


@dataclasses.dataclass(frozen=True)
class Size:
    """Of a training set, as far as it is known without reading it."""

    samples: int
    classes: int
    channels: int = 3
    image_size: int = 224
    counts: tuple[int, ...] = ()
    """Samples of each class, where they differ much."""


SVHN = (4948, 13861, 10585, 8497, 7458, 6882, 5727, 5595, 5045, 4659)
SIZES = {
    "digits": Size(1437, 10, 1, 8),
    "cifar10": Size(50_000, 10, 3, 32),
    "cifar100": Size(50_000, 100, 3, 32),
    "svhn": Size(sum(SVHN), 10, 3, 32, SVHN),
    "stl10": Size(5000, 10, 3, 96),
    "imagenet": Size(1_281_167, 1000),
    "imagenet100": Size(126_689, 100),  # with the classes of Tian et al.
    "tiny-imagenet-200": Size(100_000, 200, 3, 64),
    "ImageNet_LT_train.txt": Size(115_846, 1000),
    "food101": Size(75_750, 101),
    "stanfordcars": Size(8144, 196),
    "dtd": Size(3760, 47),
    "oxfordiiitpet": Size(3680, 37),
    "flowers102": Size(2040, 102),
    "voc2007": Size(5011, 20),
}
"""Training sets by name; folders and lists by the last part of their path, where there is none to count."""

NAIVE_BYTES = {"ce": 12, "psc-star": 12, "bce": 12, "normface": 12, "nonl": 21, "ntce": 20, "scl": 19, "prototype": 20}
"""By loss: bytes an entry of the M x K or N x N matrix of the logits that the plain float32 form takes at its peak,
what autograd keeps and the gradients included. For instance 12 of cross-entropy are the logits, their log-softmax and
a gradient. A test measures them."""

ROW_BYTES = 256
"""Vectors beside the workspace: norms, log-sum-exps, positions, targets; a bound that tests/test_memory.py measures."""


def describe(recipe: Recipe) -> str:
    """The resolved recipe, the model, the steps and the memory of the loss; as a whole a recipe file again."""
    size = training_set(recipe)
    network = _network(recipe, size)
    dim = recipe.model.dim if isinstance(network, str) else network.dim
    notes = [*_model_lines(recipe, size, network), *_step_lines(recipe, size), *_memory_lines(recipe, size, dim)]
    return "\n".join([as_toml(recipe), *(f"# {line}" for line in notes)])


def as_toml(recipe: Recipe) -> str:
    """All settings as a recipe file."""
    content = recipe.to_dict()
    lines = [f"# {content.pop('name')}", *(f"{key} = {json.dumps(content.pop(key))}" for key in ("title", "source"))]
    for section, settings in content.items():
        lines += ["", f"[{section}]", *(f"{key} = {toml_value(value)}" for key, value in settings.items())]
    return "\n".join(lines) + "\n"


def toml_value(value: Any) -> str:
    """A plain value as TOML has it."""
    if isinstance(value, Mapping):
        return (
            "{ " + ", ".join(f"{json.dumps(k)} = {toml_value(v)}" for k, v in value.items()) + " }" if value else "{}"
        )
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)


def training_set(recipe: Recipe) -> Size | None:
    """Its size where that is known: constants, the options of glyphs, folders that are there. Else None."""
    data = recipe.data
    root = Path(data.root)
    if data.name == "glyphs":
        size: Size | None = _glyphs(data.options, data.validation)
    elif data.name == "folder":
        size = _folder(root / "train") or SIZES.get(root.name)
        listed = data.options.get("train_list")
        if listed:
            size = _of_list(size, Path(str(listed)).expanduser())
    else:
        size = SIZES.get(data.name)
    if size is None:
        return None
    samples, classes = size.samples, size.classes
    if data.validation and data.name != "glyphs":
        samples -= round(samples / 5)
    first, last = data.classes
    if last:
        samples, classes = samples * (last - first) // classes, last - first
    if data.imbalance < 1:
        there = size.counts if len(size.counts) == classes else (samples // classes,) * classes
        samples = sum(map(min, there, class_counts(max(there), classes, data.imbalance)))
    return Size(samples, classes, size.channels, data.image_size or size.image_size)


def _glyphs(options: Mapping[str, Any], validation: bool) -> Size:
    faces = (*SANS, *MONO) if validation else options.get("train_faces", DEJAVU)
    classes = options.get("num_classes", 100)
    samples = classes * options.get("train_views", 16) * len(faces)
    return Size(samples, classes, 1, options.get("image_size", 20))


def _folder(path: Path) -> Size | None:
    if not path.is_dir():
        return None
    counts = [sum(1 for _ in folder.iterdir()) for folder in path.iterdir() if folder.is_dir()]
    return Size(sum(counts), len(counts)) if counts else None


def _of_list(size: Size | None, path: Path) -> Size | None:
    """The part of a set that a file lists, line by line."""
    if size is None or not path.is_file():
        return SIZES.get(path.name)
    with path.open(encoding="utf-8") as lines:
        return dataclasses.replace(size, samples=sum(bool(line.strip()) for line in lines))


def _network(recipe: Recipe, size: Size | None) -> Any:
    """The network, or why there is none. The global random state is left as it was."""
    pixels = size.image_size if size else recipe.data.image_size or 224
    try:
        with torch.random.fork_rng(devices=[]):
            model = dataclasses.replace(recipe.model, pretrained=False)
            return models.make_network(model, size.channels if size else 3, pixels)
    except ImportError as error:
        return str(error)


def _model_lines(recipe: Recipe, size: Size | None, network: Any) -> list[str]:
    model = recipe.model
    if isinstance(network, str):
        return [f"model: {model.name}; its parameters are not counted: {network}"]
    count = sum(p.numel() for p in network.parameters())
    lines = [
        f"model: {model.name}, {count:,} parameters{', frozen' if model.freeze else ''}; {network.encoded_dim} "
        f"(encoder) -> {network.dim} (features, projection {model.projection})"
    ]
    if size is not None:
        learned, fixed = _prototypes(recipe, size.classes, network.dim)
        kinds = [f"{n:,} {what} parameters" for n, what in ((learned, "learned"), (fixed, "fixed")) if n]
        lines.append(f"classifier: {' and '.join(kinds) or 'class means, nothing to learn'}")
    return lines


def _prototypes(recipe: Recipe, classes: int, dim: int) -> tuple[int, int]:
    """Numbers of the classifier: learned and fixed ones."""
    if recipe.loss.name in CONTRASTIVE:
        return 0, 0
    if recipe.loss.name in ("etf-dr", "dlp"):
        return 0, classes * dim
    bias = classes if recipe.loss.name in ("ce", "psc-star", "bce") else 0
    return classes * dim + bias, 0


def _step_lines(recipe: Recipe, size: Size | None) -> list[str]:
    if size is None:
        return [f"steps: unknown, the size of {recipe.data.name} is"]
    pixels = f"{size.channels} x {size.image_size} x {size.image_size}"
    lines = [f"data: {size.samples:,} training images of {pixels}, {size.classes:,} classes"]
    batch, epochs = recipe.run.batch_size, recipe.schedule.epochs
    steps = size.samples // batch
    if not steps:
        return [*lines, f"steps: none, a batch of {batch:,} is larger than the training set"]
    steps_line = f"steps: {steps:,} an epoch, {steps * epochs:,} in {epochs:,} epochs"
    return [*lines, f"{steps_line}, batches of {batch:,} (of all ranks together)"]


def _memory_lines(recipe: Recipe, size: Size | None, dim: int) -> list[str]:
    """Of one step on one rank with the whole batch. Everything in float32, whatever autocast does."""
    loss = recipe.loss
    rows = recipe.run.batch_size * recipe.augment.views
    if size is None and loss.name != "scl":
        return ["memory of the loss: unknown, the number of classes is"]
    classes = size.classes if size else 0
    learned, fixed = _prototypes(recipe, classes, dim)
    inputs = 2 * 4 * rows * dim + 2 * 4 * learned + 4 * fixed + 4 * loss.queue * dim
    lines = [
        "memory of the loss, in float32, the whole batch on one rank:",
        f"  features ({rows:,} x {dim}), prototypes{', queue' if loss.queue else ''} and gradients: {amount(inputs)}",
    ]
    entries, shape = naive_entries(recipe, rows, classes)
    if not entries:
        return [*lines, f"  {loss.name} compares each sample with one prototype: no matrix of logits in any form"]
    plain = NAIVE_BYTES[loss.name] * entries
    formula = f"{NAIVE_BYTES[loss.name]} bytes x {shape}, with what autograd keeps"
    if loss.name in ("ce", "psc-star", "bce"):
        return [*lines, f"  logits, PyTorch's own cross-entropy: {amount(plain)} ({formula})"]
    workspace, extra = _workspace(parse_device(recipe.run.device)), ours(recipe, rows, classes, dim)
    parts = f"{amount(workspace)} workspace + {ROW_BYTES} bytes x rows"
    if loss.name in CONTRASTIVE:
        parts += " + five copies of the features for the positives"
    return [
        *lines,
        f"  besides, nckernels: at most {amount(workspace + extra)} ({parts})",
        f"  besides, the naive form: {amount(plain)} ({formula})",
        *(["  the naive form would fit the workspace: memory decides nothing here"] if plain <= workspace else []),
    ]


def naive_entries(recipe: Recipe, rows: int, classes: int) -> tuple[int, str]:
    """Of the matrix of logits, and how it comes about."""
    name, queue = recipe.loss.name, recipe.loss.queue
    if name in ("etf-dr", "dlp"):
        return 0, ""
    if name == "scl":
        return rows * (rows + queue), f"N x N = {rows:,} x {rows + queue:,}"
    rows += queue
    return rows * classes, f"{'N' if name == 'prototype' else 'M'} x K = {rows:,} x {classes:,}"


def ours(recipe: Recipe, rows: int, classes: int, dim: int) -> int:
    """Bytes at most beside the workspace, inputs and gradients; the contract of tests/test_memory.py."""
    vectors = ROW_BYTES * (rows + recipe.loss.queue + classes)
    copies = 5 * 4 * rows * dim if recipe.loss.name in CONTRASTIVE else 0
    return vectors + copies


def amount(size: int) -> str:
    """Bytes, readable."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}" if size < 1000 * factor else f"{size / factor:,.0f} {unit}"
    return f"{size} bytes"


def _workspace(device: torch.device) -> int:
    """The bound on the run's device; the default for a GPU that cannot be asked here."""
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        return DEFAULT_WORKSPACE
    return get_workspace(device)
