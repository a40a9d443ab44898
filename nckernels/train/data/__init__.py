"""Data sets by name, and their batches.

The section ``[data]`` of a recipe determines the data set. Small images lie in memory, on the device (:class:`Memory`).
Large ones are files that worker processes decode (:class:`Files`). Nothing is downloaded. The order of the samples and
the random numbers of their views are functions of the seed, the epoch and the step. They depend neither on the number
of ranks nor on the number of workers, and a run resumes at any step without saved state.
"""

from __future__ import annotations

from dataclasses import replace

from ..recipe import Data
from ..typed import nearest
from . import cifar, digits, folders, glyphs, longtail, small, subsets, transfer
from .batches import Batches, passes
from .files import readable
from .sets import DataError, Dataset, Files, Memory, Split

__all__ = ["DATASETS", "Batches", "DataError", "Dataset", "Files", "Memory", "Split", "open_data", "passes"]

_LOADERS = {
    "digits": digits.load,
    "glyphs": glyphs.load,
    "cifar10": cifar.load,
    "cifar100": cifar.load,
    "folder": folders.load,
    **dict.fromkeys(small.NAMES, small.load),
    **dict.fromkeys(transfer.NAMES, transfer.load),
}

DATASETS = tuple(_LOADERS)
"""The names that :func:`open_data` knows."""


def open_data(data: Data, *, seed: int = 42) -> Dataset:
    """The data set of a recipe's section ``[data]``.

    The steps are, in this order: leave out unreadable files (``skip_unreadable``), ``validation``, ``classes``,
    ``imbalance``. ``seed`` determines the samples of ``imbalance``; those of ``validation`` are always the same.

    Raises:
        ValueError: naming the key, for settings that do not fit the data set.
        DataError: a ValueError, for data that are missing or damaged, with the official source and the layout.
        ImportError: for a missing optional library, with the command that installs it.
    """
    if data.name not in DATASETS:
        raise ValueError(
            f"data.name: expected one of {', '.join(DATASETS)}, got {data.name!r}{nearest(data.name, DATASETS)}"
        )
    dataset = _LOADERS[data.name](data)
    if data.skip_unreadable:
        dataset = readable(dataset, data.workers)
    if data.validation and data.name != "glyphs":  # glyphs hold out faces instead
        dataset = subsets.hold_out(dataset)
    if data.classes != (0, 0):
        dataset = subsets.select_classes(dataset, *data.classes)
    if data.imbalance < 1:
        dataset = longtail.long_tailed(dataset, data.imbalance, seed)
    if data.statistics == "imagenet":
        if dataset.channels != 3:
            raise ValueError(f"data.statistics: ImageNet's are of 3 channels, {data.name} has {dataset.channels}")
        dataset = replace(dataset, mean=folders.MEAN, std=folders.STD)
    return replace(dataset, image_size=data.image_size or dataset.image_size)
