"""Batches of the training set and passes over a split, for one rank of any number."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import augment
from ..recipe import Recipe
from .seeds import generator
from .sets import Dataset, Memory, Split, single_labels


def share(count: int, rank: int, world_size: int) -> tuple[int, int]:
    """The rows [low, high) of ``count`` that are a rank's."""
    return rank * count // world_size, (rank + 1) * count // world_size


class Batches:
    """A rank's part of the training batches, as ``recipe`` wants them.

    The order of an epoch comes from a generator seeded by (seed, epoch). The random numbers of a global batch's views
    come from one seeded by (seed, epoch, step) and are drawn for the whole batch, of which rank r of R has the rows
    from r B // R to (r + 1) B // R. Together, the ranks therefore see the same views of the same samples, whatever
    their number. Images in memory are moved to the device once.
    """

    steps_per_epoch: int
    """Batches of an epoch; all are of the same size, and the rest of the training set is left out."""

    def __init__(
        self, dataset: Dataset, recipe: Recipe, device: torch.device | str, *, rank: int = 0, world_size: int = 1
    ) -> None:
        count, self._size = len(dataset.train), recipe.run.batch_size
        if self._size > count:
            raise ValueError(
                f"run.batch_size: expected at most {count}, the size of the training set, got {self._size}"
            )
        if self._size < world_size:
            raise ValueError(f"run.batch_size: expected at least one sample for each of {world_size} ranks")
        self.steps_per_epoch = count // self._size
        self._recipe, self._device = recipe, torch.device(device)
        self._low, self._high = share(self._size, rank, world_size)
        self._labels = dataset.train.labels
        self._classes = _Classes(self._labels) if recipe.data.balanced else None
        train = cast(Memory, dataset.train)
        self._memory = Memory(train.images.to(device), train.labels.to(device))
        self._prepare = _Prepare(dataset, self._device)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches ``start``, ``start + 1``, ... of an epoch.

        Yields:
            Normalised images (b, C, H, W), or (b, V, C, H, W) with V > 1 views, and the labels of the b samples, on the
            device.
        """
        order = self._order(epoch)
        for step in range(start, self.steps_per_epoch):
            rows = order[step * self._size : (step + 1) * self._size][self._low : self._high].to(self._device)
            images = self._prepare.scale(self._memory.images[rows])
            yield self._prepare.normalise(self._views(images, epoch, step)), self._memory.labels[rows]

    def _order(self, epoch: int) -> Tensor:
        """The rows of the epoch's batches, one after the other."""
        random = generator(self._recipe.run.seed, "order", epoch)
        count = self.steps_per_epoch * self._size
        if self._classes is not None:
            return self._classes.draw(count, random)
        return torch.randperm(len(self._labels), generator=random)[:count]

    def _views(self, images: Tensor, epoch: int, step: int) -> Tensor:
        settings = self._recipe.augment
        count = settings.views
        if augment.is_identity(settings):
            return images if count == 1 else images[:, None].expand(-1, count, -1, -1, -1)
        random = generator(self._recipe.run.seed, "views", epoch, step)
        u = augment.numbers(random, self._size * count)[self._low * count : self._high * count]
        views = augment.views(images, settings, u)
        return views[:, 0] if count == 1 else views


def passes(
    dataset: Dataset,
    split: Split,
    recipe: Recipe,
    device: torch.device | str,
    *,
    rank: int = 0,
    world_size: int = 1,
    batch_size: int = 1024,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every sample of a split once, in order, without augmentation.

    A rank has a contiguous share of the samples, and the sizes of the shares differ by one at most.

    Yields:
        Normalised images (b, C, H, W) and labels, on the device; the last batch may be smaller.
    """
    low, high = share(len(split), rank, world_size)
    prepare = _Prepare(dataset, torch.device(device))
    images = cast(Memory, split).images
    for i in range(low, high, batch_size):
        rows = slice(i, min(i + batch_size, high))
        yield prepare.normalise(prepare.scale(images[rows].to(device))), split.labels[rows].to(device)


class _Prepare:
    """What happens to images in memory before and after their augmentation."""

    def __init__(self, dataset: Dataset, device: torch.device) -> None:
        self._size = dataset.image_size
        self._mean, self._std = (
            torch.tensor(values, device=device)[:, None, None] for values in (dataset.mean, dataset.std)
        )

    def scale(self, images: Tensor) -> Tensor:
        """In float32, bytes in [0, 1], and of the size that the network sees."""
        images = images / 255 if images.dtype == torch.uint8 else images
        if images.shape[-1] == self._size:
            return images
        return F.interpolate(images, (self._size, self._size), mode="bilinear", antialias=True)

    def normalise(self, images: Tensor) -> Tensor:
        return (images - self._mean) / self._std


class _Classes:
    """Rows drawn with replacement: a class, all equally probable, then a sample of the class."""

    def __init__(self, labels: Tensor) -> None:
        counts = torch.bincount(single_labels(labels, "data.balanced"))
        self._rows = labels.argsort(stable=True)
        self._starts, self._counts = (counts.cumsum(0) - counts)[counts > 0], counts[counts > 0]

    def draw(self, count: int, random: torch.Generator) -> Tensor:
        chosen = torch.randint(len(self._counts), (count,), generator=random)
        place = torch.rand(count, generator=random, dtype=torch.float64)
        return self._rows[self._starts[chosen] + (place * self._counts[chosen]).long()]
