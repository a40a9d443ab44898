"""SVHN and STL-10 from their official files, for the long tails of [DLP] Table 6."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..recipe import Data
from .sets import DataError, Dataset, Memory, check_options, in_memory

OBJECTS = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
"""STL-10's classes, in the order of its labels."""


@dataclass(frozen=True)
class _Source:
    read: Callable[[Path, str], Memory]
    class_names: tuple[str, ...]
    url: str
    files: str


def _svhn(root: Path, split: str) -> Memory:
    """Cropped digits, 32 x 32. The files have the label 10 for the digit 0."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ImportError('SVHN needs scipy: pip install "nckernels[train]"') from error
    try:
        content = loadmat(root / f"{split}_32x32.mat")
    except OSError:
        raise
    except Exception as error:  # what a damaged file raises is not documented
        raise ValueError(f"it cannot be read ({type(error).__name__}: {error})") from None
    images, labels = content["X"], content["y"].reshape(-1)
    return _memory(images.transpose(3, 2, 0, 1), labels.astype(np.int64) % 10, (3, 32, 32))


def _stl10(root: Path, split: str) -> Memory:
    """Images of 96 x 96 with labels from 1; each colour is stored column by column."""
    folder = root / "stl10_binary"
    images = np.fromfile(folder / f"{split}_X.bin", dtype=np.uint8).reshape(-1, 3, 96, 96).transpose(0, 1, 3, 2)
    labels = np.fromfile(folder / f"{split}_y.bin", dtype=np.uint8)
    return _memory(images, labels.astype(np.int64) - 1, (3, 96, 96))


def _memory(images: np.ndarray, labels: np.ndarray, shape: tuple[int, ...]) -> Memory:
    if images.dtype != np.uint8 or images.shape != (len(labels), *shape):
        raise ValueError(f"{len(labels)} labels and {images.dtype} images of shape {images.shape}")
    if not 0 <= labels.min() <= labels.max() < 10:
        raise ValueError(f"labels from {labels.min()} to {labels.max()}")
    return Memory(torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(labels))


_SOURCES = {
    "svhn": _Source(_svhn, tuple("0123456789"), "http://ufldl.stanford.edu/housenumbers/", "{}_32x32.mat"),
    "stl10": _Source(_stl10, OBJECTS, "https://cs.stanford.edu/~acoates/stl10/", "stl10_binary/{}_X.bin and {}_y.bin"),
}

NAMES = tuple(_SOURCES)


def load(data: Data) -> Dataset:
    """The training and the test set in ``data.root``; STL-10 without its unlabelled images.

    Raises:
        ImportError: for SVHN without scipy.
        DataError: for missing or damaged files, with their names and their source.
    """
    check_options(data.name, data.options, ())
    source, root, splits = _SOURCES[data.name], Path(data.root).expanduser(), []
    for split in ("train", "test"):
        try:
            splits.append(source.read(root, split))
        except (OSError, ValueError, KeyError, TypeError) as error:
            expected = source.files.replace("{}", split)
            raise DataError(f"{data.name}: expected {expected} of {source.url} in {root}: {error}") from None
    return in_memory(splits[0], splits[1], source.class_names)
