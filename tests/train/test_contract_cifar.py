"""CIFAR archives in the official format, written here byte by byte as Python 2 pickled them.

Written from the description of the trainer, not from its code. The published checksums are those of other content,
so hashlib is made to return them.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import struct
import tarfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from nckernels.train.data import Dataset, open_data
from nckernels.train.recipe import Data

CHECKSUMS = {
    "cifar10": {
        "md5": "c58f30108f718f92721af3b95e74349a",
        "sha256": "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
    },
    "cifar100": {
        "md5": "eb9058c3a382ffc7106e4002c42a8d85",
        "sha256": "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
    },
}
FILES = {"cifar10": "cifar-10-python.tar.gz", "cifar100": "cifar-100-python.tar.gz"}


class Python2(pickle._Pickler):  # type: ignore[name-defined,misc]
    """Protocol 2 with the strings of Python 2, and numpy under the names that it had."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_string(self, obj: Any) -> None:
        raw = obj.encode("ascii") if isinstance(obj, str) else obj
        short = len(raw) < 256
        self.write((b"U" + bytes([len(raw)]) if short else b"T" + struct.pack("<i", len(raw))) + raw)
        self.memoize(obj)

    def save_function(self, obj: Any, name: str | None = None) -> None:
        if getattr(obj, "__name__", "") == "_reconstruct":
            self.write(b"cnumpy.core.multiarray\n_reconstruct\n")
            self.memoize(obj)
        else:
            self.save_global(obj, name)

    dispatch[bytes] = dispatch[str] = save_string
    dispatch[type(lambda: 0)] = dispatch[type(len)] = save_function


def pickled(content: Any) -> bytes:
    file = io.BytesIO()
    Python2(file, protocol=2).dump(content)
    return file.getvalue()


def members(name: str, seed: int = 0, count: int = 20) -> dict[str, Any]:
    """The files of an archive with ``count`` images each, unpickled."""
    random = np.random.default_rng(seed)

    def batch(classes: int) -> dict[str, Any]:
        key = "labels" if name == "cifar10" else "fine_labels"
        content = {
            "batch_label": "training batch 1 of 5",
            key: [int(k) for k in random.integers(0, classes, count)],
            "data": random.integers(0, 256, (count, 3072), dtype=np.uint8),
            "filenames": [f"name_{i}.png" for i in range(count)],
        }
        return content if name == "cifar10" else {**content, "coarse_labels": [0] * count}

    if name == "cifar10":
        names = [f"class{k}" for k in range(10)]
        meta = {"num_cases_per_batch": 10000, "label_names": names, "num_vis": 3072}
        parts = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
        return {f"cifar-10-batches-py/{part}": batch(10) for part in parts} | {"cifar-10-batches-py/batches.meta": meta}
    meta = {"fine_label_names": [f"class{k}" for k in range(100)], "coarse_label_names": [f"c{k}" for k in range(20)]}
    return {f"cifar-100-python/{part}": batch(100) for part in ("train", "test")} | {"cifar-100-python/meta": meta}


def write(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for member, content in files.items():
            info = tarfile.TarInfo(member)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


class Published:
    """A hash of anything, with the published value."""

    def __init__(self, value: str) -> None:
        self.value, self.name = value, "published"
        self.digest_size, self.block_size = len(value) // 2, 64

    def update(self, data: Any) -> None:
        pass

    def hexdigest(self) -> str:
        return self.value

    def digest(self) -> bytes:
        return bytes.fromhex(self.value)


@pytest.fixture
def accept(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let every file have the checksum of an archive."""

    def patch(name: str) -> None:
        real = hashlib.new
        values = CHECKSUMS[name]

        def new(algorithm: str, *arguments: Any, **options: Any) -> Any:
            if algorithm in values:
                return Published(values[algorithm])
            return real(algorithm, *arguments, **options)

        monkeypatch.setattr(hashlib, "new", new)
        if hasattr(hashlib, "file_digest"):
            monkeypatch.setattr(
                hashlib, "file_digest", lambda file, kind: kind() if callable(kind) else hashlib.new(kind)
            )
        for algorithm, value in values.items():
            monkeypatch.setattr(hashlib, algorithm, lambda *a, value=value, **o: Published(value))

    return patch


def opened(root: Path, name: str) -> Dataset:
    return open_data(Data(name=name, root=str(root)))


@pytest.mark.parametrize("name", FILES)
def test_official_archives(name: str, tmp_path: Path, accept: Any) -> None:
    content = members(name)
    write(tmp_path / FILES[name], {key: pickled(value) for key, value in content.items()})
    control = pickle.loads(pickled(next(iter(content.values()))), encoding="bytes")
    assert b"data" in control
    assert (control[b"data"] == next(iter(content.values()))["data"]).all()
    accept(name)
    dataset = opened(tmp_path, name)
    classes, label = (10, "labels") if name == "cifar10" else (100, "fine_labels")
    assert dataset.num_classes == classes
    assert dataset.class_names == tuple(f"class{k}" for k in range(classes))
    assert (dataset.channels, dataset.image_size) == (3, 32)
    train = [value for key, value in content.items() if "data_batch" in key or key.endswith("/train")]
    test = [value for key, value in content.items() if "test" in key]
    for split, parts in ((dataset.train, train), (dataset.test, test)):
        images = np.concatenate([part["data"] for part in parts]).reshape(-1, 3, 32, 32)
        assert torch.equal(split.images, torch.from_numpy(images))
        assert split.labels.tolist() == [k for part in parts for k in part[label]]
    pixels = dataset.train.images.double() / 255
    assert dataset.mean == pytest.approx(pixels.mean(dim=(0, 2, 3)).tolist(), abs=0.05)
    assert dataset.std == pytest.approx(pixels.std(dim=(0, 2, 3)).tolist(), abs=0.1)


def test_other_content_is_refused(tmp_path: Path) -> None:
    """An archive without the published checksum: damaged, or not the official one."""
    path = tmp_path / FILES["cifar10"]
    write(path, {key: pickled(value) for key, value in members("cifar10").items()})
    for size in (None, path.stat().st_size // 2, 0):
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises((ValueError, OSError)) as caught:
            opened(tmp_path, "cifar10")
        assert FILES["cifar10"] in str(caught.value)


@pytest.mark.parametrize("name", FILES)
def test_pickles_run_no_code(name: str, tmp_path: Path, accept: Any) -> None:
    attack, control = tmp_path / "attack", tmp_path / "control"
    pickle.loads(pickle.dumps(Opens(control), protocol=2))
    assert control.exists(), "the attack does nothing to be protected from"
    files = {key: pickled(value) for key, value in members(name).items()}
    accept(name)
    for i, key in enumerate(files):
        if i not in (0, len(files) - 1):
            continue
        for evil in (Opens(attack), {"data": Opens(attack), "labels": [0]}, Evaluates(attack)):
            write(tmp_path / FILES[name], {**files, key: pickle.dumps(evil, protocol=2)})
            with pytest.raises((ValueError, OSError, pickle.UnpicklingError)) as caught:
                opened(tmp_path, name)
            assert not attack.exists(), f"code of {key} has run"
            assert FILES[name] in str(caught.value) or key in str(caught.value)


class Opens:
    """A pickle of it creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


class Evaluates(Opens):
    def __reduce__(self) -> Any:
        return eval, (f"open({str(self.path)!r}, 'w')",)
