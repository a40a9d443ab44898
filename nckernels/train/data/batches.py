"""Batches of the training set and passes over a split, for one rank of any number."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import augment, vision
from ..recipe import Recipe
from .files import FileReader, Sample
from .seeds import generator
from .sets import Dataset, Files, Memory, Split, single_labels


def share(count: int, rank: int, world_size: int) -> tuple[int, int]:
    """The range [low, high) of a rank's rows among ``count`` rows."""
    return rank * count // world_size, (rank + 1) * count // world_size


class Batches:
    """A rank's part of the training batches of a recipe.

    The order of an epoch comes from a generator seeded by (seed, epoch). The random numbers of a global batch's views
    come from a generator seeded by (seed, epoch, step) and are drawn for the whole batch. Rank r of R has the rows from
    r B // R to (r + 1) B // R. So the ranks together see the same views of the same samples, whatever their number.
    Images in memory are moved to the device once. Each view of a file has its own seed, made of (seed, epoch, step,
    position in the global batch, view).
    """

    steps_per_epoch: int
    """Batches per epoch. All have the same size, and the remainder of the training set is left out."""

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
        self._labels = dataset.train.labels.to(self._device)
        self._classes = _Classes(dataset.train.labels) if recipe.data.balanced else None
        self._source: FileReader | _Memory
        if isinstance(dataset.train, Files):
            transform = vision.train_transform(
                recipe.augment, dataset.image_size, dataset.mean, dataset.std, cropped=dataset.train.cropped
            )
            self._source = FileReader(
                dataset.train,
                transform,
                views=recipe.augment.views,
                workers=recipe.data.workers,
                device=self._device,
                persistent=True,
            )
        else:
            images = cast(Memory, dataset.train).images.to(self._device)
            self._source = _Memory(dataset, images, self._device)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches ``start``, ``start + 1``, ... of an epoch.

        Yields:
            Normalised images (b, C, H, W), or (b, V, C, H, W) with V > 1 views, and the labels of the b samples, on the
            device.
        """
        order = self._order(epoch)
        there = order.to(self._device)
        steps = range(start, self.steps_per_epoch)
        if isinstance(self._source, FileReader):
            images = self._source.read(self._samples(order, epoch, step) for step in steps)
        else:
            images = (self._from_memory(self._source, there, epoch, step) for step in steps)
        for step, batch in zip(steps, images, strict=True):
            yield batch.to(self._device, non_blocking=True), self._labels[self._rows(there, step)]

    def _rows(self, order: Tensor, step: int) -> Tensor:
        """The rank's rows of the training set in a step."""
        return order[step * self._size + self._low : step * self._size + self._high]

    def _order(self, epoch: int) -> Tensor:
        """The rows of the epoch's batches, one after the other."""
        random = generator(self._recipe.run.seed, "order", epoch)
        count = self.steps_per_epoch * self._size
        if self._classes is not None:
            return self._classes.draw(count, random)
        return torch.randperm(len(self._labels), generator=random)[:count]

    def _samples(self, order: Tensor, epoch: int, step: int) -> list[Sample]:
        parts = (self._recipe.run.seed, "views", epoch, step)
        rows = self._rows(order, step).tolist()
        return [(row, (*parts, place)) for place, row in enumerate(rows, self._low)]

    def _from_memory(self, source: _Memory, order: Tensor, epoch: int, step: int) -> Tensor:
        settings = self._recipe.augment
        count = settings.views
        images = source.take(self._rows(order, step))
        if augment.is_identity(settings):
            return source.normalise(images)
        random = generator(self._recipe.run.seed, "views", epoch, step)
        u = augment.numbers(random, self._size * count)[self._low * count : self._high * count]
        views = source.normalise(augment.views(images, settings, u))
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

    Each rank has a contiguous share of the samples; the sizes of the shares differ by at most one.

    Args:
        batch_size: largest batch. A batch of files has no more images than the network gets at once in training, so
            that a device that can train can also evaluate.

    Yields:
        Normalised images (b, C, H, W) and labels, on the device; the last batch may be smaller.
    """
    low, high = share(len(split), rank, world_size)
    device = torch.device(device)
    if isinstance(split, Files):
        run = recipe.run
        batch_size = min(batch_size, (run.micro_batch_size or -(-run.batch_size // world_size)) * recipe.augment.views)
    parts = [range(i, min(i + batch_size, high)) for i in range(low, high, batch_size)]
    if isinstance(split, Files):
        transform = vision.eval_transform(dataset.image_size, dataset.mean, dataset.std, cropped=split.cropped)
        reader = FileReader(split, transform, workers=recipe.data.workers, device=device)
        images = reader.read([(row, ()) for row in part] for part in parts)
    else:
        source = _Memory(dataset, cast(Memory, split).images, device)
        images = (source.normalise(source.take(slice(part.start, part.stop))) for part in parts)
    for part, batch in zip(parts, images, strict=True):
        yield batch.to(device, non_blocking=True), split.labels[part.start : part.stop].to(device)


class _Memory:
    """Reads batches onto the device from images in memory, which may lie on another device."""

    def __init__(self, dataset: Dataset, images: Tensor, device: torch.device) -> None:
        self._images, self._size, self._device = images, dataset.image_size, device
        self._mean, self._std = (
            torch.tensor(values, device=device)[:, None, None] for values in (dataset.mean, dataset.std)
        )

    def take(self, rows: Tensor | slice) -> Tensor:
        """Rows as float32 images of the network's input size; bytes are scaled to [0, 1]."""
        images = self._images[rows].to(self._device)
        images = images / 255 if images.dtype == torch.uint8 else images
        if images.shape[-1] == self._size:
            return images
        return F.interpolate(images, (self._size, self._size), mode="bilinear", antialias=True)

    def normalise(self, images: Tensor) -> Tensor:
        return (images - self._mean) / self._std


class _Classes:
    """Draws rows with replacement: first a class, uniformly, then a sample of the class."""

    def __init__(self, labels: Tensor) -> None:
        counts = torch.bincount(single_labels(labels, "data.balanced"))
        self._rows = labels.argsort(stable=True)
        self._starts, self._counts = (counts.cumsum(0) - counts)[counts > 0], counts[counts > 0]

    def draw(self, count: int, random: torch.Generator) -> Tensor:
        chosen = torch.randint(len(self._counts), (count,), generator=random)
        place = torch.rand(count, generator=random, dtype=torch.float64)
        return self._rows[self._starts[chosen] + (place * self._counts[chosen]).long()]
