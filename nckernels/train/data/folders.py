"""Images in folders named after their classes, as in ImageNet."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..recipe import Data
from .sets import DataError, Dataset, Files, check_options

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Statistics of ImageNet's training images, by which all sets of files are normalised."""

SIZE = 224

_SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff")
_TESTS = ("val", "validation", "test")
_LAYOUT = (
    "expected train/CLASS/*.JPEG and val/CLASS/*.JPEG in data.root. ImageNet-1K is ILSVRC2012_img_train.tar and "
    "ILSVRC2012_img_val.tar from https://image-net.org/download.php; ImageNet-100 is a hundred of its classes "
    "(data.options.classes_file lists them)"
)


def load(data: Data) -> Dataset:
    """The images below ``train`` and ``val`` (or ``validation``, ``test``) in ``data.root``, in classes sorted by name.

    The option ``classes_file`` names a text file with a class, for instance a WordNet id, at the start of each line;
    only these classes are kept. The option ``train_list`` names one with an image, such as ``train/CLASS/a.JPEG``, at
    the start of each line; only these training images are kept, as in ImageNet-LT. With ``cropped`` images are used
    whole, and not only their centres: that is for small ones such as Tiny ImageNet's. Images are not opened here.

    Raises:
        DataError: for folders that are missing, empty or not sorted into classes.
    """
    check_options("folder", data.options, ("classes_file", "train_list", "cropped"))
    root = Path(data.root).expanduser()
    if not (root / "train").is_dir():
        raise DataError(f"folder: there is no {root / 'train'}; {_LAYOUT}")
    tests = [root / name for name in _TESTS if (root / name).is_dir()]
    if not tests:
        raise DataError(f"folder: there is none of {', '.join(_TESTS)} in {root}; {_LAYOUT}")
    names = _subfolders(root / "train")
    if data.options.get("classes_file"):
        names = _listed(Path(str(data.options["classes_file"])).expanduser(), names)
    if len(names) < 2:
        raise DataError(f"{root / 'train'}: expected at least two folders named after classes; {_LAYOUT}")
    train, test = scan(root / "train", names), scan(tests[0], names)
    if data.options.get("train_list"):
        train = _kept(train, Path(str(data.options["train_list"])).expanduser(), root)
    if data.options.get("cropped"):
        train, test = replace(train, cropped=True), replace(test, cropped=True)
    return files_dataset(train, test, names)


def files_dataset(train: Files, test: Files, class_names: Sequence[str]) -> Dataset:
    """A data set of image files."""
    return Dataset(train, test, len(class_names), tuple(class_names), 3, SIZE, MEAN, STD)


def scan(folder: Path, class_names: Sequence[str]) -> Files:
    """The images of the classes in ``folder``, sorted, labelled by the index of their class in ``class_names``.

    Raises:
        DataError: naming the classes without images.
    """
    there = set(_subfolders(folder))
    if not there.intersection(class_names):
        loose = sum(entry.name.lower().endswith(_SUFFIXES) for entry in os.scandir(folder))
        if loose:
            raise DataError(
                f"{folder}: {loose} images and no folders of classes. ImageNet's validation images come in one folder: "
                "torchvision.datasets.ImageNet(root, split='val') sorts the original archives into folders, or "
                "move image n to the folder of the class that line n of ILSVRC2012_validation_ground_truth.txt, in the "
                "development kit, numbers"
            )
    paths: list[str] = []
    labels: list[int] = []
    empty = []
    for label, name in enumerate(class_names):
        found = _images(folder / name) if name in there else []
        paths += found
        labels += [label] * len(found)
        if not found:
            empty.append(name)
    if empty:
        listed = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
        raise DataError(f"{folder}: no images of {len(empty)} of {len(class_names)} classes: {listed}")
    return Files(tuple(paths), torch.tensor(labels, dtype=torch.int64))


def _subfolders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _images(folder: Path) -> list[str]:
    """The image files of a folder, sorted, without hidden files such as those that macOS creates."""
    names = (entry.name for entry in os.scandir(folder))
    return [f"{folder}/{name}" for name in sorted(names) if name.lower().endswith(_SUFFIXES) and name[0] != "."]


def _kept(files: Files, path: Path, root: Path) -> Files:
    """The images that a file lists; their labels are those of their folders."""
    wanted = {f"{root}/{name}" for name in _first_words(path, "train_list")}
    rows = torch.tensor([i for i, name in enumerate(files.paths) if str(name) in wanted], dtype=torch.int64)
    if len(rows) < len(wanted):
        missing = sorted(wanted.difference(map(str, files.paths)))
        raise DataError(f"{path}: {len(missing)} images that are not there, or in no class: {', '.join(missing[:3])}")
    return files.take(rows)


def _first_words(path: Path, option: str) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.options.{option}: {path} cannot be read: {error}") from None
    return [line.split()[0] for line in lines if line.strip()]


def _listed(path: Path, names: Sequence[str]) -> list[str]:
    """The classes that a file lists, sorted."""
    wanted = _first_words(path, "classes_file")
    unknown = sorted(set(wanted) - set(names))
    if unknown:
        raise DataError(f"{path}: {len(unknown)} classes that data.root does not have: {', '.join(unknown[:5])}")
    if len(set(wanted)) < len(wanted):
        raise DataError(f"{path}: expected every class once")
    return sorted(wanted)
