"""CIFAR-10 and CIFAR-100 from the official archives in their "python version".

The batches in an archive are pickles. A restricted unpickler reads them: it knows arrays of bytes, lists, dictionaries,
numbers and text, all by code of this file, and refuses everything else. No code in an archive is run.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..recipe import Data
from .sets import DataError, Dataset, Memory, check_options, in_memory

SOURCE = "https://www.cs.toronto.edu/~kriz/cifar.html"

CHECKSUMS = {
    "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
    "cifar-100-python.tar.gz": "eb9058c3a382ffc7106e4002c42a8d85",
}
"""MD5 of the archives, as published on their page."""


@dataclass(frozen=True)
class _Layout:
    num_classes: int
    archive: str
    folder: str
    train: tuple[str, ...]
    test: str
    labels: str
    meta: str
    names: str


_LAYOUTS = {
    "cifar10": _Layout(
        10,
        "cifar-10-python.tar.gz",
        "cifar-10-batches-py",
        tuple(f"data_batch_{i}" for i in range(1, 6)),
        "test_batch",
        "labels",
        "batches.meta",
        "label_names",
    ),
    "cifar100": _Layout(
        100,
        "cifar-100-python.tar.gz",
        "cifar-100-python",
        ("train",),
        "test",
        "fine_labels",
        "meta",
        "fine_label_names",
    ),
}


def load(data: Data) -> Dataset:
    """The archive in ``data.root``, or the folder that was extracted from it.

    Raises:
        DataError: if neither exists, if the checksum of the archive is not the published one, and if a batch is damaged
            or has unexpected content.
    """
    check_options(data.name, data.options, ())
    layout, root = _LAYOUTS[data.name], Path(data.root).expanduser()
    archive, folder = root / layout.archive, root / layout.folder
    if archive.is_file():
        parts, place = _from_archive(archive, layout), archive
    elif folder.is_dir():
        wanted = (*layout.train, layout.test, layout.meta)
        parts, place = {n: (folder / n).read_bytes() for n in wanted if (folder / n).is_file()}, folder
    else:
        raise DataError(
            f"{data.name}: there is neither {archive} nor {folder}. Download {layout.archive} (the python version) "
            f"from {SOURCE} into {root}, or name its folder by --set data.root=FOLDER"
        )
    train = [_batch(parts, name, place, layout) for name in layout.train]
    test_images, test_labels = _batch(parts, layout.test, place, layout)
    images, labels = (torch.cat(columns) for columns in zip(*train, strict=True))
    return in_memory(Memory(images, labels), Memory(test_images, test_labels), _class_names(parts, place, layout))


def _from_archive(path: Path, layout: _Layout) -> dict[str, bytes]:
    """The files of an archive by their names; nothing is written to the disk."""
    content, expected = path.read_bytes(), CHECKSUMS[layout.archive]
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != expected:
        raise DataError(
            f"{path}: expected the MD5 checksum {expected}, found {found} of {len(content)} bytes; the file is damaged "
            f"or not complete. Download it again from {SOURCE}"
        )
    parts = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
            for member in archive:
                folder, _, name = member.name.removeprefix("./").partition("/")
                if folder == layout.folder and member.isfile():
                    file = archive.extractfile(member)
                    assert file is not None
                    parts[name] = file.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{path}: the archive cannot be read: {error}. Download it again from {SOURCE}") from None
    return parts


def _batch(parts: Mapping[str, bytes], name: str, place: Path, layout: _Layout) -> tuple[Tensor, Tensor]:
    if name not in parts:
        raise DataError(f"{place}: there is no {name} in it. Download {layout.archive} again from {SOURCE}")
    where = f"{place}: {name}"
    content = unpickle(parts[name], where)
    data, labels = content.get("data"), content.get(layout.labels)
    if not isinstance(data, _Array) or not isinstance(labels, list):
        raise DataError(f"{where}: expected an array 'data' and a list {layout.labels!r}, found {', '.join(content)}")
    if data.dtype.lstrip("|") not in ("u1", "uint8") or data.shape != (len(labels), 3072) or data.fortran:
        raise DataError(f"{where}: expected {len(labels)} rows of 3072 bytes, found {data.shape} of {data.dtype}")
    if len(data.content) != 3072 * len(labels):
        raise DataError(f"{where}: expected {3072 * len(labels)} bytes of images, found {len(data.content)}")
    if not all(type(label) is int and 0 <= label < layout.num_classes for label in labels):
        raise DataError(f"{where}: expected labels from 0 to {layout.num_classes - 1}")
    images = torch.frombuffer(bytearray(data.content), dtype=torch.uint8).view(-1, 3, 32, 32)
    return images, torch.tensor(labels, dtype=torch.int64)


def _class_names(parts: Mapping[str, bytes], place: Path, layout: _Layout) -> list[str]:
    """The names from their file, or the numbers of the classes if there is no such file."""
    if layout.meta not in parts:
        return [str(c) for c in range(layout.num_classes)]
    where = f"{place}: {layout.meta}"
    names = unpickle(parts[layout.meta], where).get(layout.names)
    if not isinstance(names, list) or len(names) != layout.num_classes:
        raise DataError(f"{where}: expected a list {layout.names!r} of {layout.num_classes} names")
    return [_text(name) for name in names]


def unpickle(content: bytes, where: str) -> dict[str, Any]:
    """The dictionary in a pickle that holds nothing but plain values and arrays of bytes.

    Raises:
        DataError: for anything else, naming it and ``where``.
    """
    try:
        values = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    except Exception as error:  # a damaged pickle fails in many ways
        raise DataError(f"{where}: it cannot be read: {error or type(error).__name__}") from None
    if not isinstance(values, dict):
        raise DataError(f"{where}: expected a dictionary, found {type(values).__name__}")
    return {_text(key): value for key, value in values.items()}


def _text(value: object) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


class _Type:
    """Replaces numpy.dtype in a pickle; keeps only the type code."""

    def __init__(self, code: object = "", *_: object) -> None:
        self.code = _text(code)

    def __setstate__(self, state: object) -> None:
        pass


class _Array:
    """Replaces numpy.ndarray in a pickle, without numpy's own reconstruction."""

    shape: tuple[int, ...] = ()
    dtype: str = ""
    fortran: bool = False
    content: bytes = b""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, content = state
        if not isinstance(kind, _Type) or not isinstance(content, bytes):
            raise DataError("an array of something other than bytes")
        self.shape, self.dtype, self.fortran, self.content = tuple(shape), kind.code, bool(fortran), content


def _latin1(text: object, encoding: object = "latin1") -> bytes:
    """Replaces codecs.encode, by which Python 3 writes bytes in the old protocols of pickle."""
    if not isinstance(text, str) or encoding != "latin1":
        raise DataError(f"text in the encoding {encoding!r}")
    return text.encode("latin1")


_KNOWN = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _latin1,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise DataError(f"it asks for {module}.{name}, which these data do not need; nothing was run")
        return _KNOWN[module, name]
