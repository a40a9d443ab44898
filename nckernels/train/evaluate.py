"""Accuracies of a trained network and neural collapse of its training set.

Every rank processes its share of the samples (:func:`~nckernels.train.data.passes`), and gets the result of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from nckernels import FixedPrototypes
from nckernels.classifiers import _evaluating
from nckernels.distributed import collectives, groups
from nckernels.metrics import neural_collapse

from . import data as datasets
from .recipe import Recipe

MOST_COSINES = 200
"""Largest number of classes for which the matrices of cosines are kept: 40,000 numbers each."""
_CHUNK = 8192  # rows of logits at a time


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation. With several labels per sample the accuracies are mean average precisions."""

    train_accuracy: float
    test_accuracy: float
    metrics: dict[str, float]
    """:class:`nckernels.metrics.NeuralCollapse` of the training set, field by field. For image files ``intra_erank``
    and ``nc4`` are NaN, because they need a second pass over the samples. Empty if ``run.metrics`` is false, or if
    samples have several labels."""
    prototype_cosines: list[list[float]] | None = None
    mean_cosines: list[list[float]] | None = None
    """Cosines of the mean unit features of the training set's classes."""


@torch.no_grad()
def evaluate(
    network: nn.Module,
    head: Any,
    dataset: datasets.Dataset,
    recipe: Recipe,
    device: torch.device,
    *,
    rank: int = 0,
    world_size: int = 1,
    cosines: bool = False,
) -> Evaluation:
    """Measure on all samples of both sets, in eval mode, in float32; the result is the same on every rank.

    A classifier of class means is fitted to the training set first. The features of a training set in memory are
    computed at once, those of a set of files batch by batch.

    Args:
        rank, world_size: of the default process group, all of whose ranks must call this.
        cosines: whether to return the matrices of cosines, for at most 200 classes.

    Raises:
        FloatingPointError: if a feature is not finite.
    """

    def batches(split: datasets.Split) -> Iterator[tuple[Tensor, Tensor]]:
        return _outputs(network, dataset, split, recipe, device, rank, world_size)

    cosines = cosines and dataset.num_classes <= MOST_COSINES
    several = dataset.train.labels.ndim > 1
    wanted = recipe.run.metrics and not several
    with measuring(network, head, device):
        means: FixedPrototypes | None = None
        report: dict[str, float] = {}
        if several or isinstance(dataset.train, datasets.Memory):
            z, y = _gathered(batches(dataset.train), world_size)
            _check_finite(z.isfinite().all(), 1)
            if isinstance(head, FixedPrototypes):
                head.fit(z, y)
            train = _score(zip(z.split(_CHUNK), y.split(_CHUNK), strict=True), head)
            if wanted:
                report = asdict(neural_collapse(z, y, head.prototypes, bias=getattr(head, "bias", None)))
            if cosines and not several:
                means = FixedPrototypes(dataset.num_classes, z.shape[1], device=z.device).fit(z, y)
        else:
            if isinstance(head, FixedPrototypes):
                _fit(head, batches(dataset.train), world_size)
            streamed = _Streamed(head, dataset.num_classes, world_size) if wanted or cosines else None
            train = _score(batches(dataset.train), head, world_size, streamed)
            if streamed is not None:
                report = streamed.report() if wanted else {}
                means = streamed.class_means() if cosines else None
        test = _score(batches(dataset.test), head, world_size)
        result = Evaluation(
            train,
            test,
            report,
            _cosines(head.prototypes) if cosines else None,
            _cosines(means.prototypes) if means is not None else None,
        )
    return cast(Evaluation, of_the_first_rank(result, rank, world_size))


@torch.no_grad()
def accuracy(
    network: nn.Module,
    head: Any,
    dataset: datasets.Dataset,
    split: datasets.Split,
    recipe: Recipe,
    device: torch.device,
    *,
    rank: int = 0,
    world_size: int = 1,
) -> float:
    """Share of a set's samples that are classified as labelled, or the mean average precision."""
    with measuring(network, head, device):
        return _score(_outputs(network, dataset, split, recipe, device, rank, world_size), head, world_size)


@torch.no_grad()
def features(
    network: nn.Module,
    dataset: datasets.Dataset,
    split: datasets.Split,
    recipe: Recipe,
    device: torch.device,
    function: Callable[[Tensor], Tensor] | None = None,
    *,
    rank: int = 0,
    world_size: int = 1,
) -> tuple[Tensor, Tensor]:
    """Features and labels of all samples of a set in its order, on every rank.

    Args:
        function: computes the features of images, for example ``network.encode``; None: the network.
    """
    with measuring(network, None, device):
        return _gathered(_outputs(function or network, dataset, split, recipe, device, rank, world_size), world_size)


def _outputs(
    function: Callable[[Tensor], Tensor],
    dataset: datasets.Dataset,
    split: datasets.Split,
    recipe: Recipe,
    device: torch.device,
    rank: int,
    world_size: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """A function's outputs for this rank's share of a set, batch by batch, with the labels."""
    for images, labels in datasets.passes(dataset, split, recipe, device, rank=rank, world_size=world_size):
        yield function(images), labels


class _Streamed:
    """Neural collapse and class means of features that come in batches."""

    def __init__(self, head: Any, num_classes: int, world_size: int) -> None:
        from nckernels.metrics.streaming import CollapseMetric

        self.head, self.world_size = head, world_size
        prototypes = head.prototypes
        place = {"num_classes": num_classes, "dim": prototypes.shape[1]}
        self.metric = CollapseMetric(**place, sync_on_compute=world_size > 1).to(prototypes.device)
        self.means = FixedPrototypes(num_classes, prototypes.shape[1], device=prototypes.device)

    def add(self, z: Tensor, y: Tensor) -> None:
        self.metric.update(z, y)
        self.means.partial_fit(z, y)

    def report(self) -> dict[str, float]:
        self.metric.set_classifier(self.head.prototypes, getattr(self.head, "bias", None))
        return asdict(self.metric.report())

    def class_means(self) -> FixedPrototypes:
        return self.means.all_reduce() if self.world_size > 1 else self.means


def _score(
    batches: Iterable[tuple[Tensor, Tensor]], head: Any, world_size: int = 1, streamed: _Streamed | None = None
) -> float:
    """Accuracy, or mean average precision, over the samples of all ranks."""
    place = head.prototypes.device
    right, total = torch.zeros((), dtype=torch.int64, device=place), 0
    finite = torch.ones((), dtype=torch.bool, device=place)
    logits, several = [], []
    for z, y in batches:
        finite &= z.isfinite().all()
        if y.ndim > 1:
            logits.append(head(z))
            several.append(y)
            continue
        right += (head(z).argmax(1) == y).sum()
        total += len(y)
        if streamed is not None and finite:  # an error in the metric would leave the other ranks waiting
            streamed.add(z, y)
    _check_finite(finite, world_size)
    if several:
        return _mean_average_precision(*_gathered(zip(logits, several, strict=True), world_size))
    counts = torch.stack([right, torch.full_like(right, total)])
    if world_size > 1:
        dist.all_reduce(counts)
    hits, samples = counts.tolist()
    return hits / samples if samples else float("nan")


def _mean_average_precision(logits: Tensor, labels: Tensor) -> float:
    """The mean over the classes of the area under the precision-recall curve, at all thresholds."""
    from torchmetrics.functional.classification import multilabel_average_precision

    value = multilabel_average_precision(logits, labels.long(), num_labels=labels.shape[1], average="macro")
    return float(value)


def _fit(head: FixedPrototypes, batches: Iterable[tuple[Tensor, Tensor]], world_size: int) -> None:
    head.fit(batches)
    if world_size > 1:
        head.all_reduce()


def _cosines(points: Tensor) -> list[list[float]]:
    unit = F.normalize(points.detach().float().cpu().double(), dim=1)
    return cast("list[list[float]]", (unit @ unit.T).tolist())


def _gathered(batches: Iterable[tuple[Tensor, Tensor]], world_size: int) -> tuple[Tensor, Tensor]:
    """The rows of all ranks. Shares are contiguous, so the rows are in the order of the set."""
    pairs = [(z.float(), y) for z, y in batches]
    z, y = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    ranks = groups.resolve("world") if world_size > 1 else None
    if ranks is not None:
        counts = collectives.sizes(z, ranks)
        z, y = (collectives.gather(rows, counts, ranks) for rows in (z.contiguous(), y.contiguous()))
    return z, y


def of_the_first_rank(value: Any, rank: int, world_size: int) -> Any:
    """Broadcast the value of rank 0: the ranks' own values may differ by rounding and in times."""
    if world_size == 1:
        return value
    box = [value if rank == 0 else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _check_finite(finite: Tensor, world_size: int) -> None:
    bad = (~finite).to(torch.int64)
    if world_size > 1:
        dist.all_reduce(bad)
    if bad:
        raise FloatingPointError("the features are not finite")


@contextmanager
def measuring(network: nn.Module, head: Any, device: torch.device) -> Iterator[None]:
    """Context in eval mode and without autocast."""
    modules = nn.ModuleList([module for module in (network, head) if isinstance(module, nn.Module)])
    with _evaluating(modules), torch.autocast(device.type, enabled=False):
        yield
