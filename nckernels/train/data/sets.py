"""Data sets: images in memory or in files, with their labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..typed import nearest


class DataError(ValueError):
    """Data on disk that cannot be used: missing, damaged or unreadable. The message names the file or folder."""


class Split(Protocol):
    """A training or a test set."""

    @property
    def labels(self) -> Tensor:
        """(N,) in int64, or (N, K) of 0 and 1 in float32 if samples have several labels; on the CPU."""

    def __len__(self) -> int: ...

    def take(self, rows: Tensor, labels: Tensor | None = None) -> Split:
        """The samples of these rows, with ``labels`` in place of their own if given."""


@dataclass(frozen=True)
class Memory:
    """Images (N, C, H, W) in memory: uint8, which is scaled from 0..255 to [0, 1], or float32, which is not scaled."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Tensor, labels: Tensor | None = None) -> Memory:
        return Memory(self.images[rows], self.labels[rows] if labels is None else labels)


@dataclass(frozen=True)
class Files:
    """Image files, which PIL decodes to RGB when they are read."""

    paths: tuple[Path | str, ...]
    labels: Tensor
    cropped: bool = False
    """Whether the images are already centre crops, and used whole where otherwise their centre is cropped."""

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Tensor, labels: Tensor | None = None) -> Files:
        paths = tuple(self.paths[i] for i in rows.tolist())
        return replace(self, paths=paths, labels=self.labels[rows] if labels is None else labels)


@dataclass(frozen=True)
class Dataset:
    """Training and test set, with the properties of their images."""

    train: Split
    test: Split
    num_classes: int
    class_names: tuple[str, ...]
    channels: int
    image_size: int
    """Height and width of the batches; images in memory of another size are resized batch by batch."""
    mean: tuple[float, ...]
    """Mean of each channel over the full training set, so that a subset is normalised like the whole set. For files:
    ImageNet's."""
    std: tuple[float, ...]
    note: str = ""
    """A remark for reports."""

    def subset(self, rows: Tensor) -> Dataset:
        """The data set with these training samples only."""
        return replace(self, train=self.train.take(rows))


def in_memory(train: Memory, test: Memory, class_names: Iterable[str], note: str = "") -> Dataset:
    """A data set of images in memory, with the mean and standard deviation of the training images."""
    mean, std = statistics(train.images)
    names = tuple(class_names)
    channels, size = train.images.shape[1], train.images.shape[-1]
    return Dataset(train, test, len(names), names, channels, size, mean, std, note)


def statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, in float64; for bytes from their histogram, without a copy."""
    pairs = []
    for channel in images.unbind(1):
        if images.dtype == torch.uint8:
            counts = torch.bincount(channel.flatten(), minlength=256).double()
            values = torch.arange(256).double() / 255
            mean = (counts @ values) / counts.sum()
            pairs.append((mean.item(), ((counts @ (values - mean) ** 2) / counts.sum()).sqrt().item()))
        else:
            pairs.append((channel.double().mean().item(), channel.double().std(correction=0).item()))
    return tuple(mean for mean, _ in pairs), tuple(max(std, 1e-6) for _, std in pairs)


def check_options(name: str, options: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raises ValueError for options that the data set does not have."""
    known = tuple(known)
    for key in options:
        if key not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise ValueError(f"data.options.{key}: {name} has no such option{nearest(key, known)}; {has}")


def single_labels(labels: Tensor, key: str) -> Tensor:
    """``labels`` if each sample has one label; otherwise a ValueError that names the setting ``key``."""
    if labels.dim() != 1:
        raise ValueError(f"{key}: expected the default, because a sample of the data set has several labels")
    return labels
