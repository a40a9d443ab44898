"""Small archives in the official format: what is read, and that nothing else is."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nckernels.train.data import DataError, Dataset, Memory, cifar, open_data
from nckernels.train.recipe import Data

PER_BATCH = 20
ARCHIVES = {"cifar10": "cifar-10-python.tar.gz", "cifar100": "cifar-100-python.tar.gz"}
FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}


def batch(name: str, seed: int, count: int = PER_BATCH) -> dict[bytes, Any]:
    random = np.random.default_rng(seed)
    data = random.integers(0, 256, (count, 3072), dtype=np.uint8)
    names = [f"image_{i}.png".encode() for i in range(count)]
    if name == "cifar10":
        labels = {b"labels": [i % 10 for i in range(count)], b"batch_label": b"testing batch"}
    else:
        labels = {
            b"fine_labels": [(7 * i) % 100 for i in range(count)],
            b"coarse_labels": [i % 20 for i in range(count)],
        }
    return {b"data": data, b"filenames": names, **labels}


def files(name: str) -> dict[str, dict[bytes, Any]]:
    if name == "cifar10":
        train = {f"data_batch_{i}": batch(name, i) for i in range(1, 6)}
        names = [f"class {c}".encode() for c in range(10)]
        return {**train, "test_batch": batch(name, 6), "batches.meta": {b"label_names": names, b"num_vis": 3072}}
    fine, coarse = ([f"{kind} {c}".encode() for c in range(n)] for kind, n in (("fine", 100), ("coarse", 20)))
    meta = {b"fine_label_names": fine, b"coarse_label_names": coarse}
    return {"train": batch(name, 1), "test": batch(name, 2), "meta": meta}


def write(root: Path, name: str, content: dict[str, Any], *, packed: bool = True) -> Path:
    """An archive or a folder with pickles; bytes are written as they are."""
    path = root / (ARCHIVES[name] if packed else FOLDERS[name])
    encoded = {k: v if isinstance(v, bytes) else pickle.dumps(v, protocol=2) for k, v in content.items()}
    if not packed:
        path.mkdir(parents=True)
        for file, body in encoded.items():
            (path / file).write_bytes(body)
        return path
    with tarfile.open(path, "w:gz") as archive:
        for file, body in {**encoded, "readme.html": b"<html>"}.items():
            member = tarfile.TarInfo(f"{FOLDERS[name]}/{file}")
            member.size = len(body)
            archive.addfile(member, io.BytesIO(body))
    return path


@pytest.fixture
def trusted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the checksum of a file the published one."""

    def trust(path: Path) -> Path:
        digest = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
        monkeypatch.setitem(cifar.CHECKSUMS, path.name, digest)
        return path

    return trust


def opened(root: Path, name: str) -> Dataset:
    return open_data(Data(name=name, root=str(root)))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_archives_and_folders_are_read(name: str, packed: bool, tmp_path: Path, trusted: Any) -> None:
    content = files(name)
    path = write(tmp_path, name, content, packed=packed)
    if packed:
        trusted(path)
    made = opened(tmp_path, name)
    assert isinstance(made.train, Memory)
    assert isinstance(made.test, Memory)
    train = [content[f"data_batch_{i}"] for i in range(1, 6)] if name == "cifar10" else [content["train"]]
    test = content["test_batch" if name == "cifar10" else "test"]
    key = b"labels" if name == "cifar10" else b"fine_labels"
    assert np.array_equal(made.train.images.numpy().reshape(-1, 3072), np.concatenate([b[b"data"] for b in train]))
    assert np.array_equal(made.test.images.numpy().reshape(-1, 3072), test[b"data"])
    assert made.train.labels.tolist() == [label for b in train for label in b[key]]
    assert made.test.labels.tolist() == test[key]
    assert made.train.images.shape[1:] == (3, 32, 32)
    assert made.train.images.dtype == torch.uint8
    assert made.num_classes == {"cifar10": 10, "cifar100": 100}[name]
    assert made.class_names[9] == {"cifar10": "class 9", "cifar100": "fine 9"}[name]
    whole = made.train.images.double() / 255
    assert made.mean == pytest.approx(whole.mean((0, 2, 3)).tolist())
    assert made.std == pytest.approx(whole.std((0, 2, 3), correction=0).tolist())


def python2(data: bytes, labels: list[int]) -> bytes:
    """A batch as Python 2 wrote it: text is bytes without an encoding, written out opcode by opcode."""

    def text(value: bytes) -> bytes:
        return pickle.SHORT_BINSTRING + bytes([len(value)]) + value

    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n"
        + b"cnumpy\nndarray\n" + b"K\x00\x85" + text(b"b") + b"\x87R"
        + b"(K\x01K" + bytes([len(labels)]) + b"M\x00\x0c\x86"
        + b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R"
        + b"(K\x03" + text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        + b"\x89" + pickle.BINSTRING + len(data).to_bytes(4, "little") + data + b"tb"
    )  # fmt: skip
    listed = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(b"labels") + listed + b"u."


def test_pickles_of_python_2_are_read() -> None:
    data = bytes(range(256)) * 24
    content = cifar.unpickle(python2(data, [3, 4]), "here")
    assert content["labels"] == [3, 4]
    assert content["data"].shape == (2, 3072)
    assert content["data"].content == data
    assert pickle.loads(python2(data, [3, 4]), encoding="bytes")[b"data"].tobytes() == data  # a true one


class Attack:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


@pytest.mark.parametrize(
    ("made", "named"),
    [
        (lambda path: Attack(os.mkdir, str(path)), r"(posix|nt)\.mkdir"),
        (lambda path: Attack(eval, f"__import__('os').mkdir({str(path)!r})"), r"(__builtin__|builtins)\.eval"),
        (lambda path: Attack(getattr, "text", "upper"), r"(__builtin__|builtins)\.getattr"),
        (lambda path: Path(path), "pathlib"),
    ],
)
def test_no_code_of_an_archive_is_run(made: Any, named: str, tmp_path: Path, trusted: Any) -> None:
    content = files("cifar10")
    content["data_batch_3"][b"labels"] = made(tmp_path / "attacked")
    trusted(write(tmp_path, "cifar10", content))
    with pytest.raises(DataError, match=rf"data_batch_3: it asks for {named}.*, which these data do not need"):
        opened(tmp_path, "cifar10")
    assert not (tmp_path / "attacked").exists()


def test_text_in_other_encodings_is_refused() -> None:
    import codecs

    with pytest.raises(DataError, match=r"here: text in the encoding 'rot13'"):
        cifar.unpickle(pickle.dumps({b"a": Attack(codecs.encode, "text", "rot13")}, protocol=2), "here")


def test_a_wrong_checksum_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path, "cifar10", files("cifar10"))
    found = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    with pytest.raises(DataError) as caught:
        opened(tmp_path, "cifar10")
    for part in (str(path), found, "c58f30108f718f92721af3b95e74349a", "https://www.cs.toronto.edu/~kriz/cifar.html"):
        assert part in str(caught.value)


@pytest.mark.parametrize("keep", [0, 1000, -1000])
def test_a_truncated_archive_is_an_error(keep: int, tmp_path: Path, trusted: Any) -> None:
    path = trusted(write(tmp_path, "cifar100", files("cifar100")))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"cifar-100-python.tar.gz: expected the MD5 checksum \w+, found \w+ of \d+"):
        opened(tmp_path, "cifar100")
    trusted(path)  # even if the checksum were right
    with pytest.raises(DataError, match=r"cifar-100-python.tar.gz: (the archive cannot be read|there is no)"):
        opened(tmp_path, "cifar100")


def damage(key: str, change: Any) -> dict[str, Any]:
    content = files("cifar10")
    content[key] = change(content[key])
    return content


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("data_batch_2", lambda b: pickle.dumps(b, protocol=2)[:-100], "data_batch_2: it cannot be read"),
        ("data_batch_2", lambda b: b"", "data_batch_2: it cannot be read"),
        ("data_batch_2", lambda b: [1, 2], "data_batch_2: expected a dictionary, found list"),
        ("data_batch_2", lambda b: {b"labels": b[b"labels"]}, "data_batch_2: expected an array 'data'"),
        ("test_batch", lambda b: {**b, b"labels": [1]}, r"test_batch: expected 1 rows of 3072 bytes"),
        ("test_batch", lambda b: {**b, b"labels": [10] * PER_BATCH}, "test_batch: expected labels from 0 to 9"),
        ("test_batch", lambda b: {**b, b"data": b[b"data"].astype("f4")}, "test_batch: expected 20 rows of 3072 bytes"),
        ("test_batch", lambda b: {**b, b"data": b[b"data"].astype(object)}, "test_batch: an array of something other"),
        ("batches.meta", lambda b: {b"label_names": [b"a"]}, "batches.meta: expected a list 'label_names' of 10"),
    ],
)
def test_damaged_batches_are_named(key: str, change: Any, message: str, tmp_path: Path) -> None:
    write(tmp_path, "cifar10", damage(key, change), packed=False)
    with pytest.raises(DataError, match=message):
        opened(tmp_path, "cifar10")


def test_missing_data_have_a_source_and_a_layout(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        opened(tmp_path / "nowhere", "cifar100")
    for part in ("nowhere/cifar-100-python.tar.gz", "nowhere/cifar-100-python", "www.cs.toronto.edu", "data.root"):
        assert part in str(caught.value)
    path = write(tmp_path, "cifar10", files("cifar10"), packed=False)
    (path / "data_batch_4").unlink()
    with pytest.raises(DataError, match="cifar-10-batches-py: there is no data_batch_4 in it"):
        opened(tmp_path, "cifar10")
    shutil.rmtree(path)
    with pytest.raises(DataError, match="there is neither"):
        opened(tmp_path, "cifar10")


def test_the_published_checksums() -> None:
    assert cifar.CHECKSUMS == {
        "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
        "cifar-100-python.tar.gz": "eb9058c3a382ffc7106e4002c42a8d85",
    }
