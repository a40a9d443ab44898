"""Training sets with a long tail: class sizes that decrease exponentially."""

from __future__ import annotations

import torch
from torch import Tensor

from .sets import Dataset, single_labels
from .subsets import shuffled_rows


def class_counts(largest: int, num_classes: int, ratio: float) -> list[int]:
    """n_c = largest * ratio^(c / (K - 1)), rounded down and at least 1; class 0 is the largest, K - 1 the smallest."""
    steps = max(num_classes - 1, 1)
    return [max(int(largest * ratio ** (c / steps) + 1e-9), 1) for c in range(num_classes)]


def long_tailed(dataset: Dataset, ratio: float, seed: int) -> Dataset:
    """The data set with a part of the training set, of class sizes by :func:`class_counts`, and the whole test set.

    The samples of class c are the first n_c of a permutation that depends on the seed and c, so the set of a larger
    ratio contains that of a smaller one. No class gets more samples than it has.
    """
    labels = single_labels(dataset.train.labels, "data.imbalance")
    return dataset.subset(_rows(labels, dataset.num_classes, ratio, seed))


def _rows(labels: Tensor, num_classes: int, ratio: float, seed: int) -> Tensor:
    largest = int(torch.bincount(labels).max())
    counts = class_counts(largest, num_classes, ratio)
    kept = [shuffled_rows(labels, c, "long tail", seed)[:count] for c, count in enumerate(counts)]
    return torch.cat(kept).sort().values
