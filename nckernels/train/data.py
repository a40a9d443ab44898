"""Datasets that fit into memory, by name, and their batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Dataset:
    """Images (N, C, H, W) in float32 and labels (N,) in int64, split into training and test set."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    num_classes: int

    def to(self, device: torch.device) -> Dataset:
        return replace(
            self,
            train_images=self.train_images.to(device),
            train_labels=self.train_labels.to(device),
            test_images=self.test_images.to(device),
            test_labels=self.test_labels.to(device),
        )


DATASETS: dict[str, Callable[[], Dataset]] = {}
"""Every dataset by name. To add one, decorate its loader with ``@register("name")``."""


def register(name: str) -> Callable[[Callable[[], Dataset]], Callable[[], Dataset]]:
    def add(loader: Callable[[], Dataset]) -> Callable[[], Dataset]:
        DATASETS[name] = loader
        return loader

    return add


def load(name: str) -> Dataset:
    """The dataset called ``name``."""
    if name not in DATASETS:
        raise ValueError(f"dataset: expected one of {', '.join(sorted(DATASETS))}, got {name!r}")
    return DATASETS[name]()


@register("digits")
def digits() -> Dataset:
    """Handwritten digits of scikit-learn: 1,797 images of 8 x 8, ten classes; a fifth is the test set.

    The split is stratified and always the same. Pixels are scaled to [0, 1] and standardised with the mean
    and standard deviation of the training set.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        images / 16, labels, test_size=0.2, random_state=0, stratify=labels
    )
    mean, std = train_x.mean(), train_x.std()

    def as_images(x: object) -> Tensor:
        return torch.as_tensor((x - mean) / std, dtype=torch.float32).view(-1, 1, 8, 8)

    return Dataset(
        as_images(train_x),
        torch.as_tensor(train_y, dtype=torch.int64),
        as_images(test_x),
        torch.as_tensor(test_y, dtype=torch.int64),
        num_classes=10,
    )


def batches(count: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Index tensors of one shuffled epoch, all of the same size: the last, smaller batch is dropped."""
    if not 1 <= batch_size <= count:
        raise ValueError(f"batch_size: expected 1 to {count}, the size of the training set, got {batch_size}")
    order = torch.randperm(count, generator=generator, device=generator.device)
    yield from order[: count - count % batch_size].split(batch_size)
