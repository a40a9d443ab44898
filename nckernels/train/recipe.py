"""The settings of a training run by section, with their defaults and meanings.

:mod:`.recipes` reads them from TOML files, those of the package or the user's own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, cast, get_args

from . import typed

LossName = Literal["ce", "normface", "ntce", "nonl", "scl", "prototype", "etf-dr", "dlp", "psc-star", "bce"]
Projection = Literal["none", "linear", "mlp"]
Precision = Literal["float32", "bfloat16", "float16"]

LOSSES: tuple[str, ...] = get_args(LossName)
CONTRASTIVE = ("scl", "prototype")
"""Losses without prototypes: they contrast views of samples, and the class means are the classifier."""


@dataclass(frozen=True)
class Data:
    """``[data]``: the training set and the test set."""

    name: str = "digits"
    """digits, glyphs, cifar10, cifar100, svhn, stl10, folder, or one of torchvision's data sets such as food101."""
    root: str = "data"
    """Folder with the files; nothing is downloaded into it."""
    validation: bool = False
    """Hold out a part of the training set and test on it, to choose settings without the test set."""
    classes: tuple[int, int] = (0, 0)
    """Keep only the classes [from, to), labelled from 0; (0, 0): all."""
    image_size: int = 0
    """Height and width of the network's input in pixels; 0: those of the data set (224 for files)."""
    statistics: Literal["own", "imagenet"] = "own"
    """Mean and deviation that normalise images in memory: those of the data set, or ImageNet's, by which files always
    are. A frozen encoder needs those that it was trained with."""
    imbalance: float = 1.0
    """Smallest / largest class size of a long-tailed training set, exponential in between; 1: unchanged."""
    balanced: bool = False
    """Draw a class uniformly, then a sample of the class, so that batches have no long tail."""
    workers: int = 4
    """Processes that read files, on each rank; data sets in memory need none."""
    skip_unreadable: bool = False
    """Leave out images that cannot be read, with a warning that counts them; otherwise they are an error."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the data set, for instance ``num_classes`` and ``train_views`` of glyphs."""


@dataclass(frozen=True)
class Augment:
    """``[augment]``: random views of the training images; by default the images themselves."""

    views: int = 1
    """Views of each sample in a batch; at least 2 for losses without prototypes."""
    crop: tuple[float, float] = (1.0, 1.0)
    """Smallest and largest area of a random crop, as shares of the image; aspect ratios 3/4 to 4/3. (1, 1): none."""
    flip: float = 0.0
    """Probability of a horizontal flip."""
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """Brightness, contrast, saturation, hue of ColorJitter."""
    jitter_probability: float = 0.8
    """Probability of the jitter."""
    grayscale: float = 0.0
    """Probability of a conversion to grey."""
    blur: float = 0.0
    """Probability of a Gaussian blur, of standard deviation 0.1 to 2 pixels."""
    rotate: float = 0.0
    """Largest rotation in degrees."""
    zoom: float = 0.0
    """Largest relative change of the size."""
    shift: float = 0.0
    """Largest shift, as a share of half the width."""


@dataclass(frozen=True)
class Model:
    """``[model]``: an encoder, and a projection between it and the loss."""

    name: str = "convnet"
    """convnet, resnet18 or resnet32 (for small images), ``timm:NAME`` or ``torchvision:NAME``."""
    width: int = 16
    """Channels of the first block of convnet."""
    norm: Literal["batch", "group"] = "batch"
    """Normalisation of convnet, resnet18 and resnet32; group norm uses no statistics of other samples."""
    projection: Projection = "linear"
    """none: the features are the pooled activations, which are never negative after a ReLU; linear: signed features of
    size ``dim``; mlp: the same with one hidden layer, as wide as its input."""
    dim: int = 64
    """Size d of the features. Without a projection it is the encoder's own, except for convnet, which uses ``dim``."""
    pretrained: bool = False
    """timm and torchvision: start from pretrained weights, which must be in the library's cache."""
    init: str = ""
    """A run's folder or checkpoint: start from its encoder, and from its projection if the shapes fit."""
    freeze: bool = False
    """Train only the classifier, on the encoder in eval mode (linear probing)."""


@dataclass(frozen=True)
class Loss:
    """``[loss]``: the loss and its classifier."""

    name: LossName = "nonl"
    """ce, normface, ntce, nonl: with a learnt classifier; scl, prototype: without one; etf-dr, dlp: with fixed
    prototypes; psc-star: ce + 0.01 uniformity; bce: several labels per sample."""
    temperature: float = 0.1
    """Temperature of the losses with cosine logits."""
    global_batch: bool = True
    """Contrast with the samples of all ranks (``process_group="world"``)."""
    assignment: Literal["dynamic", "static"] = "dynamic"
    """How dlp assigns its points to the classes: dynamic: by the Hungarian method after every epoch; static: once at
    random."""
    queue: int = 0
    """Number of past features that nonl, ntce, scl and prototype contrast with in addition to the batch; 0: none."""
    decay: float = 0.0
    """Decay of running denominators, for nonl and ntce; 0: no running denominators."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the loss function, for instance ``label_smoothing`` of normface and ce."""


@dataclass(frozen=True)
class Optimizer:
    """``[optimizer]``."""

    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.05
    """The highest learning rate; with ``lr_batch``, that of batches of ``lr_batch`` samples."""
    lr_batch: int = 0
    """If not 0, the learning rate is scaled to lr x batch size / lr_batch."""
    momentum: float = 0.9
    """Momentum of sgd; beta_1 of adamw, whose beta_2 is 0.999."""
    nesterov: bool = False
    weight_decay: float = 1e-4
    clip: float = 0.0
    """Largest norm of the gradient, to which it is clipped; 0: no clipping."""


@dataclass(frozen=True)
class Schedule:
    """``[schedule]``: the number of epochs and the course of the learning rate."""

    name: Literal["cosine", "step", "constant"] = "cosine"
    epochs: int = 60
    final: float = 1e-3
    """cosine: the final learning rate as a share of the highest."""
    milestones: tuple[int, ...] = ()
    """step: epochs after which the learning rate is multiplied by ``gamma``."""
    gamma: float = 0.2
    warmup_epochs: int = 0
    """Epochs of linear warm-up from ``warmup_lr`` to the highest learning rate; the schedule covers the rest."""
    warmup_lr: float = 0.01
    """First learning rate of the warm-up; not scaled with the batch size."""
    every: Literal["step", "epoch"] = "step"
    """Whether the learning rate changes after every step or after every epoch."""


@dataclass(frozen=True)
class Run:
    """``[run]``: batches, precision, evaluations and files."""

    batch_size: int = 256
    """Samples per step, over all ranks."""
    micro_batch_size: int = 0
    """Run a rank's batch in micro-batches of this size, with the gradient of the whole batch; 0: in one piece."""
    seed: int = 42
    device: str = "auto"
    """auto: the accelerator if there is one, else the CPU."""
    threads: int = 1
    """CPU threads; 0: torch's default. With one thread the result does not depend on the number of cores."""
    precision: Precision = "float32"
    """Precision of the network in training, by autocast; float16 uses a gradient scaler."""
    channels_last: bool = False
    compile: bool = False
    sync_batchnorm: bool = True
    """Compute the statistics of BatchNorm over all ranks, on accelerators."""
    eval_every: int = 0
    """Steps between evaluations; 0: evaluate after every epoch. There is also one before the first and one after the
    last step."""
    metrics: bool = True
    """Measure neural collapse on the training set in every evaluation."""
    probes: tuple[Literal["FP", "LP", "NLP"], ...] = ()
    """Classifiers fitted after the training ([NCD] Table 2): class means (FP), a linear probe (LP), a normalised
    one (NLP). The probes hold the encoder's features of the training set in memory."""
    save_every: int = 0
    """Steps between checkpoints; 0: save at every evaluation."""
    log_every: int = 10
    """Steps between lines of the log. At each line the host waits for the device and checks the losses."""
    backend: str = ""
    """Backend of nckernels; empty: the automatic choice."""


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a run. It is immutable; :meth:`replace` makes another recipe.

    Example:
        >>> from nckernels.train import Recipe
        >>> Recipe().replace(loss__temperature=0.2).flat()["loss.temperature"]
        0.2
    """

    name: str = ""
    title: str = ""
    source: str = ""
    """Where the numbers come from, for instance "[NCD] App. E.1"."""
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    model: Model = field(default_factory=Model)
    loss: Loss = field(default_factory=Loss)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    run: Run = field(default_factory=Run)

    def __post_init__(self) -> None:
        _check(self)

    def replace(self, **settings: Any) -> Recipe:
        """A changed recipe; keys are ``loss__temperature=0.2`` or ``**{"loss.temperature": 0.2}``."""
        changes = typed.nested({key.replace("__", "."): value for key, value in settings.items()})
        return from_dict(typed.merge(self.to_dict(), changes))

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionaries of plain values, which ``from_dict`` takes."""
        return asdict(self)

    def flat(self) -> dict[str, Any]:
        """Every setting by its dotted key."""
        return dict(typed.flat(self.to_dict()))


def from_dict(content: Mapping[str, Any]) -> Recipe:
    """A recipe from nested dictionaries. Unknown keys and values of the wrong type are errors that name the key."""
    return cast(Recipe, typed.build(Recipe, content))


def differences(one: Recipe, other: Recipe) -> list[str]:
    """The dotted keys in which two recipes differ, names and titles aside."""
    a, b = one.flat(), other.flat()
    return sorted(key for key in {**a, **b} if key not in ("name", "title", "source") and a.get(key) != b.get(key))


def _check(recipe: Recipe) -> None:
    """Check ranges, and settings that do not go together."""
    values = recipe.flat()
    for key, low, high in _RANGES:
        if not low <= values[key] <= high:
            span = f"at least {low:g}" if high == math.inf else f"{low:g} to {high:g}"
            raise ValueError(f"{key}: expected {span}, got {values[key]!r}")
    for key in ("loss.temperature", "optimizer.lr", "schedule.gamma", "data.imbalance"):
        if values[key] <= 0:
            raise ValueError(f"{key}: expected a positive number, got {values[key]!r}")
    low, high = recipe.augment.crop
    if not 0 < low <= high <= 1:
        raise ValueError(f"augment.crop: expected two shares, 0 < low <= high <= 1, got {low:g}, {high:g}")
    first, last = recipe.data.classes
    if (first, last) != (0, 0) and not 0 <= first < last - 1:
        raise ValueError(f"data.classes: expected [from, to) of at least two classes, got {first}, {last}")
    loss, warmup, epochs = recipe.loss, recipe.schedule.warmup_epochs, recipe.schedule.epochs
    if loss.name in CONTRASTIVE and recipe.augment.views < 2:
        raise ValueError(f"augment.views: loss.name = {loss.name!r} contrasts views and needs at least 2")
    if loss.name not in CONTRASTIVE and recipe.augment.views > 1:
        raise ValueError(f"augment.views: expected 1 for loss.name = {loss.name!r}, got {recipe.augment.views}")
    if loss.queue and loss.decay:
        raise ValueError("loss.queue, loss.decay: expected at most one of them")
    if loss.assignment == "static" and loss.name != "dlp":
        raise ValueError(f"loss.assignment: expected 'dynamic' for every loss but dlp, got {loss.assignment!r}")
    if recipe.model.freeze and loss.name in CONTRASTIVE:
        raise ValueError(f"model.freeze: loss.name = {loss.name!r} has no classifier to train")
    if recipe.model.freeze and not (recipe.model.init or recipe.model.pretrained):
        raise ValueError("model.freeze: a random encoder would stay random; set model.init or model.pretrained")
    if warmup >= epochs > 0:
        raise ValueError(f"schedule.warmup_epochs: expected less than schedule.epochs, {epochs}, got {warmup}")
    milestones = recipe.schedule.milestones
    if list(milestones) != sorted(set(milestones)) or any(m < 1 for m in milestones):
        raise ValueError(f"schedule.milestones: expected increasing epochs, got {list(milestones)}")


_RANGES: tuple[tuple[str, float, float], ...] = (
    ("data.image_size", 0, math.inf),
    ("data.imbalance", 0, 1),
    ("data.workers", 0, math.inf),
    ("augment.views", 1, math.inf),
    ("augment.flip", 0, 1),
    ("augment.jitter_probability", 0, 1),
    ("augment.grayscale", 0, 1),
    ("augment.blur", 0, 1),
    ("augment.rotate", 0, 180),
    ("augment.zoom", 0, 0.9),
    ("augment.shift", 0, 1),
    ("model.width", 1, math.inf),
    ("model.dim", 1, math.inf),
    ("loss.queue", 0, math.inf),
    ("loss.decay", 0, 0.999999),
    ("optimizer.lr_batch", 0, math.inf),
    ("optimizer.momentum", 0, 0.999999),
    ("optimizer.weight_decay", 0, math.inf),
    ("optimizer.clip", 0, math.inf),
    ("schedule.epochs", 1, math.inf),
    ("schedule.final", 0, 1),
    ("schedule.warmup_epochs", 0, math.inf),
    ("schedule.warmup_lr", 0, math.inf),
    ("run.batch_size", 1, math.inf),
    ("run.micro_batch_size", 0, math.inf),
    ("run.threads", 0, math.inf),
    ("run.eval_every", 0, math.inf),
    ("run.save_every", 0, math.inf),
    ("run.log_every", 1, math.inf),
)
