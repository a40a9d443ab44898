"""Subsets of a data set: some classes, a held-out fifth."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .seeds import generator
from .sets import Dataset, Split, single_labels


def hold_out(dataset: Dataset) -> Dataset:
    """Replace the test set by a fifth of every class of the training set, always the same fifth.

    If samples have several labels, it is a fifth of all samples.
    """
    labels = dataset.train.labels
    if labels.dim() == 1:
        held = torch.zeros(len(labels), dtype=torch.bool)
        for c in range(dataset.num_classes):
            rows = shuffled_rows(labels, c, "validation")
            held[rows[: max(round(len(rows) / 5), 1 if len(rows) > 1 else 0)]] = True
    else:
        held = torch.zeros(len(labels), dtype=torch.bool)
        held[torch.randperm(len(labels), generator=generator("validation"))[: round(len(labels) / 5)]] = True
    train, test = (dataset.train.take(rows.nonzero()[:, 0]) for rows in (~held, held))
    return replace(dataset, train=train, test=test)


def select_classes(dataset: Dataset, first: int, last: int) -> Dataset:
    """The classes [first, last) of both splits, labelled from 0."""
    if last > dataset.num_classes:
        raise ValueError(f"data.classes: expected at most {dataset.num_classes}, got {first}, {last}")

    def part(split: Split) -> Split:
        labels = single_labels(split.labels, "data.classes")
        rows = ((labels >= first) & (labels < last)).nonzero()[:, 0]
        return split.take(rows, labels[rows] - first)

    names = dataset.class_names[first:last]
    return replace(
        dataset, train=part(dataset.train), test=part(dataset.test), num_classes=last - first, class_names=names
    )


def shuffled_rows(labels: Tensor, c: int, *parts: int | str) -> Tensor:
    """The rows of class c in an order that depends on ``parts`` and c."""
    rows = (labels == c).nonzero()[:, 0]
    return rows[torch.randperm(len(rows), generator=generator(*parts, c))]
