"""Data sets for transfer, read by torchvision in the layout that it expects; nothing is downloaded."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..recipe import Data
from .folders import files_dataset
from .sets import DataError, Dataset, Files, check_options

VOC = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)

Listing = tuple[list[Any], list[Any], Sequence[str]]
"""Paths, labels and class names; no names if the set has none."""


@dataclass(frozen=True)
class _Source:
    """The source of a set, and how torchvision's class reads it."""

    kind: str
    train: tuple[dict[str, Any], ...]
    """Arguments for each split that is part of the training set."""
    test: dict[str, Any]
    listing: Callable[[Any], Listing]
    url: str
    layout: str


def _attributes(paths: str, labels: str) -> Callable[[Any], Listing]:
    return lambda data: (getattr(data, paths), getattr(data, labels), getattr(data, "classes", ()))


def _cars(data: Any) -> Listing:
    return [path for path, _ in data._samples], [int(label) for _, label in data._samples], data.classes


def _voc(data: Any) -> Listing:
    return data.images, [_objects(path) for path in data.annotations], VOC


def _objects(path: str) -> Tensor:
    """0 and 1 for the twenty classes: 1 if there is an object of the class that is not marked as difficult."""
    present = torch.zeros(len(VOC))
    for item in ET.parse(path).iter("object"):
        if item.findtext("difficult", "0").strip() != "1":
            present[VOC.index(item.findtext("name", "").strip())] = 1
    return present


_TRAIN, _VAL, _TEST, _TRAINVAL = ({"split": name} for name in ("train", "val", "test", "trainval"))

_SOURCES = {
    "food101": _Source(
        "Food101",
        (_TRAIN,),
        _TEST,
        _attributes("_image_files", "_labels"),
        "https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
        "food-101/images and food-101/meta, as in food-101.tar.gz",
    ),
    "stanfordcars": _Source(
        "StanfordCars",
        (_TRAIN,),
        _TEST,
        _cars,
        "https://ai.stanford.edu/~jkrause/cars/car_dataset.html",
        "stanford_cars/cars_train, stanford_cars/cars_test, stanford_cars/devkit and "
        "stanford_cars/cars_test_annos_withlabels.mat",
    ),
    "dtd": _Source(
        "DTD",
        (_TRAIN, _VAL),
        _TEST,
        _attributes("_image_files", "_labels"),
        "https://www.robots.ox.ac.uk/~vgg/data/dtd/",
        "dtd/dtd/images and dtd/dtd/labels, dtd-r1.0.1.tar.gz extracted in dtd; the split is the first of ten",
    ),
    "oxfordiiitpet": _Source(
        "OxfordIIITPet",
        (_TRAINVAL,),
        _TEST,
        _attributes("_images", "_labels"),
        "https://www.robots.ox.ac.uk/~vgg/data/pets/",
        "oxford-iiit-pet/images and oxford-iiit-pet/annotations, of images.tar.gz and annotations.tar.gz",
    ),
    "flowers102": _Source(
        "Flowers102",
        (_TRAIN, _VAL),
        _TEST,
        _attributes("_image_files", "_labels"),
        "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
        "flowers-102/jpg of 102flowers.tgz, flowers-102/imagelabels.mat and flowers-102/setid.mat",
    ),
    "voc2007": _Source(
        "VOCDetection",
        ({"year": "2007", "image_set": "trainval"},),
        {"year": "2007", "image_set": "test"},
        _voc,
        "http://host.robots.ox.ac.uk/pascal/VOC/voc2007/",
        "VOCdevkit/VOC2007 with VOCtrainval_06-Nov-2007.tar and VOCtest_06-Nov-2007.tar extracted into it",
    ),
}

NAMES = tuple(_SOURCES)


def load(data: Data) -> Dataset:
    """Training and test set; a validation split is added to the training set.

    VOC2007 has several labels per sample; objects marked as difficult do not count.

    Raises:
        ImportError: without torchvision.
        DataError: for missing or damaged files, with their source and the layout that torchvision expects.
    """
    check_options(data.name, data.options, ())
    source = _SOURCES[data.name]
    try:
        from torchvision import datasets
    except ImportError as error:
        raise ImportError(f"{data.name} is read by torchvision: pip install torchvision") from error
    try:
        kind = getattr(datasets, source.kind)
        listings = [source.listing(kind(data.root, download=False, **split)) for split in (*source.train, source.test)]
    except (RuntimeError, OSError, ValueError, KeyError, ET.ParseError) as error:
        raise DataError(
            f"{data.name}: {str(error).split('. ')[0]}. Nothing is downloaded. The source is {source.url}; below "
            f"data.root, {data.root}, torchvision expects {source.layout}"
        ) from None
    train, test = _files(listings[:-1]), _files(listings[-1:])
    names = listings[0][2] or [str(c) for c in range(int(train.labels.max()) + 1)]
    return files_dataset(train, test, names)


def _files(listings: Sequence[Listing]) -> Files:
    paths = tuple(str(path) for listing in listings for path in listing[0])
    labels = [label for listing in listings for label in listing[1]]
    return Files(paths, torch.stack(labels) if torch.is_tensor(labels[0]) else torch.tensor(labels))
