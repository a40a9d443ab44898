"""Images in folders: ImageNet's layout, corruptions, files that cannot be read, and torchvision's data sets."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

image = pytest.importorskip("PIL.Image")

from nckernels.train.data import DataError, Files, files, folders, imagenet_c, open_data, transfer  # noqa: E402
from nckernels.train.data.imagenet_c import ALEXNET, mean_corruption_error  # noqa: E402
from nckernels.train.recipe import Data  # noqa: E402


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NCKERNELS_CACHE", str(tmp_path / "cache"))
    return tmp_path


def picture(path: Path, colour: tuple[int, int, int] = (200, 100, 50)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.new("RGB", (10, 8), colour).save(path, "JPEG")
    return path


def tree(root: Path, classes: tuple[str, ...] = ("n02", "n01", "n03"), train: int = 4, val: int = 2) -> Path:
    for name in classes:
        for split, count in (("train", train), ("val", val)):
            for i in range(count):
                picture(root / split / name / f"{name}_{i}.JPEG")
    return root


def opened(root: Path, **settings: Any) -> Any:
    return open_data(Data(name="folder", root=str(root), **settings))


def test_folders_are_classes_in_the_order_of_their_names(tmp_path: Path) -> None:
    tree(tmp_path)
    picture(tmp_path / "train" / "n01" / "other.png")
    for stray in ("train/n01/._n01_0.JPEG", "train/n01/notes.txt", "train/.DS_Store", "train/.hidden/a.png"):
        (tmp_path / stray).parent.mkdir(exist_ok=True)
        (tmp_path / stray).write_text("no image")
    made = opened(tmp_path)
    assert made.class_names == ("n01", "n02", "n03")
    assert torch.bincount(made.train.labels).tolist() == [5, 4, 4]
    assert torch.bincount(made.test.labels).tolist() == [2, 2, 2]
    assert isinstance(made.train, Files)
    for path, label in zip(made.train.paths, made.train.labels.tolist(), strict=True):
        assert Path(path).parent.name == made.class_names[label]
        assert Path(path).is_file()
    assert list(made.train.paths) == sorted(made.train.paths)
    assert (made.num_classes, made.channels, made.image_size) == (3, 3, 224)
    assert made.mean == (0.485, 0.456, 0.406)
    assert opened(tmp_path, image_size=64).image_size == 64
    assert opened(tmp_path, classes=(1, 3)).class_names == ("n02", "n03")
    assert len(opened(tmp_path, validation=True).test) == 3


@pytest.mark.parametrize("name", ["validation", "test"])
def test_other_names_of_the_test_set(name: str, tmp_path: Path) -> None:
    (tree(tmp_path) / "val").rename(tmp_path / name)
    assert len(opened(tmp_path).test) == 6


def test_classes_file_selects_classes(tmp_path: Path) -> None:
    tree(tmp_path)
    chosen = tmp_path / "chosen.txt"
    chosen.write_text("n03 a fish\n\nn01\n")
    made = opened(tmp_path, options={"classes_file": str(chosen)})
    assert made.class_names == ("n01", "n03")
    assert torch.bincount(made.train.labels).tolist() == [4, 4]
    for content, message in (
        ("n01\nn07\n", "chosen.txt: 1 classes that data.root does not have: n07"),
        ("n01\nn01\n", "chosen.txt: expected every class once"),
        ("n01\n", "expected at least two folders"),
    ):
        chosen.write_text(content)
        with pytest.raises(DataError, match=message):
            opened(tmp_path, options={"classes_file": str(chosen)})
    with pytest.raises(DataError, match=r"data.options.classes_file: .*no-such-file cannot be read"):
        opened(tmp_path, options={"classes_file": str(tmp_path / "no-such-file")})
    with pytest.raises(ValueError, match=r"data.options.class_file: .* \(did you mean 'classes_file'\?\)"):
        opened(tmp_path, options={"class_file": "x"})


def test_a_list_selects_training_images(tmp_path: Path) -> None:
    """As ImageNet-LT's, whose lines end with a class number that is not needed."""
    listed = tree(tmp_path) / "list.txt"
    listed.write_text("train/n03/n03_1.JPEG 2\ntrain/n01/n01_0.JPEG 0\n")
    made = opened(tmp_path, options={"train_list": str(listed), "cropped": True})
    assert [Path(path).name for path in made.train.paths] == ["n01_0.JPEG", "n03_1.JPEG"]
    assert made.train.labels.tolist() == [0, 2]
    assert (len(made.test), made.num_classes, made.train.cropped, made.test.cropped) == (6, 3, True, True)
    listed.write_text("train/n03/n03_9.JPEG 2\n")
    with pytest.raises(DataError, match=r"list.txt: 1 images that are not there, or in no class: .*n03_9"):
        opened(tmp_path, options={"train_list": str(listed)})


def test_missing_folders_have_a_source_and_a_layout(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no .*train; expected train/CLASS/.*https://image-net.org/download"):
        opened(tmp_path)
    tree(tmp_path)
    (tmp_path / "val").rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"there is none of val, validation, test in .*; expected train/CLASS"):
        opened(tmp_path)


def test_a_flat_validation_folder_is_an_error_that_explains_the_layout(tmp_path: Path) -> None:
    tree(tmp_path, val=0)
    for i in range(3):
        picture(tmp_path / "val" / f"ILSVRC2012_val_0000000{i}.JPEG")
    with pytest.raises(DataError, match=r"val: 3 images and no folders of classes.*torchvision.datasets.ImageNet"):
        opened(tmp_path)


def test_classes_without_images_are_named(tmp_path: Path) -> None:
    tree(tmp_path)
    (tmp_path / "train" / "n04").mkdir()
    with pytest.raises(DataError, match=r"train: no images of 1 of 4 classes: n04"):
        opened(tmp_path)
    picture(tmp_path / "train" / "n04" / "a.JPEG")
    with pytest.raises(DataError, match=r"val: no images of 1 of 4 classes: n04"):
        opened(tmp_path)


def test_unreadable_images_are_left_out_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path)
    good = picture(tmp_path / "good.jpg").read_bytes()
    bad = {"train/n01/n01_1.JPEG": good[: len(good) // 2], "train/n02/n02_0.JPEG": b"text", "val/n03/n03_1.JPEG": b""}
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    assert len(opened(tmp_path).train) == 12  # opening looks at no image
    with pytest.warns(UserWarning, match=r"^3 of 18 images cannot be read and are left out: .*n01_1.*n02_0.*n03_1"):
        made = opened(tmp_path, skip_unreadable=True)
    assert torch.bincount(made.train.labels).tolist() == [3, 3, 4]
    assert torch.bincount(made.test.labels).tolist() == [2, 2, 1]
    kept = {str(Path(path).relative_to(tmp_path)) for path in (*made.train.paths, *made.test.paths)}
    assert not kept & set(bad)
    assert len(kept) == 15
    # What was found is kept: the second time nothing is decoded, until a file changes.
    monkeypatch.setattr(files, "_decode", None)
    with pytest.warns(UserWarning, match="3 of 18"):
        assert len(opened(tmp_path, skip_unreadable=True).train) == 10
    monkeypatch.undo()
    monkeypatch.setenv("NCKERNELS_CACHE", str(tmp_path / "cache"))
    for name in bad:
        picture(tmp_path / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(opened(tmp_path, skip_unreadable=True).train) == 12
    assert not [path for path in tmp_path.rglob("unreadable-*") if path.parent != tmp_path / "cache"]


# ImageNet-C


def test_corruptions_are_read_and_labelled(tmp_path: Path) -> None:
    for name in ("n01", "n02", "n03"):
        picture(tmp_path / "fog" / "3" / name / "a.JPEG")
    found = imagenet_c.read(tmp_path, "fog", 3, ["n01", "n03"])  # an encoder of some of the classes
    assert [Path(path).parent.name for path in found.paths] == ["n01", "n03"]
    assert found.labels.tolist() == [0, 1]
    assert found.cropped
    assert found.take(torch.tensor([1])).cropped
    with pytest.raises(DataError, match=r"there is no .*fog/4; expected CORRUPTION/SEVERITY/CLASS.*zenodo.org"):
        imagenet_c.read(tmp_path, "fog", 4, ["n01"])
    with pytest.raises(DataError, match=r"no images of 1 of 2 classes: n09"):
        imagenet_c.read(tmp_path, "fog", 3, ["n01", "n09"])
    with pytest.raises(ValueError, match=r"corruption: .* got 'foggy' \(did you mean 'fog'\?\)"):
        imagenet_c.read(tmp_path, "foggy", 3, ["n01"])
    with pytest.raises(ValueError, match="severity: expected 1 to 5, got 0"):
        imagenet_c.read(tmp_path, "fog", 0, ["n01"])


def test_mean_corruption_error() -> None:
    assert len(ALEXNET) == 15
    alexnet = {name: [error] * 5 for name, error in ALEXNET.items()}
    assert mean_corruption_error(alexnet) == pytest.approx(1, rel=1e-12)
    assert mean_corruption_error({name: [0.0] * 5 for name in ALEXNET}) == 0
    # Severities count alike, corruptions by what AlexNet found hard.
    errors = {**alexnet, "brightness": [0.1, 0.2, 0.3, 0.4, 0.5]}
    assert mean_corruption_error(errors) == pytest.approx((14 + 0.3 / 0.564592) / 15, rel=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"snow": None, "fog": None}, "errors: expected all 15 corruptions; snow, fog missing"),
        ({"sno": [0.1] * 5}, r"errors: there is no corruption 'sno' \(did you mean 'snow'\?\)"),
        ({"snow": [0.1] * 4}, "errors: expected five shares, one for each severity, for snow"),
        ({"snow": [10.0] * 5}, "errors: expected five shares, one for each severity, for snow"),
    ],
)
def test_incomplete_errors_are_named(changes: dict[str, Any], message: str) -> None:
    errors = {**{name: [0.5] * 5 for name in ALEXNET}, **changes}
    with pytest.raises(ValueError, match=message):
        mean_corruption_error({name: values for name, values in errors.items() if values is not None})


# SVHN and STL-10


def test_svhn_and_stl10_are_read_as_their_pages_say(tmp_path: Path) -> None:
    scipy = pytest.importorskip("scipy.io")
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 96, 96), dtype=np.uint8)  # sample, colour, row, column
    labels = np.array([10, 1, 9, 3], dtype=np.uint8)
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    for split in ("train", "test"):
        digits = pixels[:, :, :32, :32].transpose(2, 3, 1, 0)
        scipy.savemat(tmp_path / f"{split}_32x32.mat", {"X": digits, "y": labels[:, None]})
        pixels.transpose(0, 1, 3, 2).tofile(folder / f"{split}_X.bin")
        labels.tofile(folder / f"{split}_y.bin")
    for name, size, wanted in (("svhn", 32, [0, 1, 9, 3]), ("stl10", 96, [9, 0, 8, 2])):
        made = open_data(Data(name=name, root=str(tmp_path)))
        assert made.train.labels.tolist() == made.test.labels.tolist() == wanted
        assert torch.equal(made.train.images, torch.from_numpy(pixels[:, :, :size, :size]))
        assert (made.num_classes, made.channels, made.image_size) == (10, 3, size)
        other = open_data(Data(name=name, root=str(tmp_path), statistics="imagenet"))
        assert (other.mean, other.std) == (folders.MEAN, folders.STD) != (made.mean, made.std)
    (folder / "test_y.bin").write_bytes(b"\x01\x02")
    with pytest.raises(DataError, match=r"^stl10: expected .*test_y.bin of https?://.* 2 labels and uint8 images"):
        open_data(Data(name="stl10", root=str(tmp_path)))
    for content in (b"", (tmp_path / "train_32x32.mat").read_bytes()[:50], None):
        file = tmp_path / "train_32x32.mat"
        file.unlink() if content is None else file.write_bytes(content)
        with pytest.raises(DataError, match=r"^svhn: expected train_32x32.mat of https?://"):
            open_data(Data(name="svhn", root=str(tmp_path)))


# Transfer


def test_without_torchvision_an_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match="pip install torchvision"):
        open_data(Data(name="dtd"))


@pytest.mark.parametrize("name", transfer.NAMES)
def test_missing_transfer_sets_have_a_source_and_a_layout(name: str, tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    with pytest.raises(
        DataError, match=rf"^{name}: .*Nothing is downloaded. The source is https?://.* torchvision expects"
    ):
        open_data(Data(name=name, root=str(tmp_path)))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_textures_through_torchvision(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    base = tmp_path / "dtd" / "dtd"
    for split, numbers in (("train", (0, 1)), ("val", (2,)), ("test", (3,))):
        lines = [f"{name}/{name}_{i}.jpg" for name in ("banded", "woven") for i in numbers]
        (base / "labels").mkdir(parents=True, exist_ok=True)
        (base / "labels" / f"{split}1.txt").write_text("\n".join(lines))
        for line in lines:
            picture(base / "images" / line)
    made = open_data(Data(name="dtd", root=str(tmp_path)))
    assert made.class_names == ("banded", "woven")
    assert len(made.train) == 6  # train and val
    assert len(made.test) == 2
    assert isinstance(made.train, Files)
    for path, label in zip(made.train.paths, made.train.labels.tolist(), strict=True):
        assert Path(path).parent.name == made.class_names[label]
    assert made.mean == folders.MEAN


def test_other_sets_through_torchvision(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    scipy = pytest.importorskip("scipy.io")
    food, pets, cars = tmp_path / "food-101", tmp_path / "oxford-iiit-pet", tmp_path / "stanford_cars"
    (food / "images").mkdir(parents=True)
    (food / "meta").mkdir()
    for split, number in (("train", 0), ("test", 1)):
        listing = {name: [f"{name}/{number}"] for name in ("pho", "apple_pie")}
        (food / "meta" / f"{split}.json").write_text(json.dumps(listing))
    (pets / "images").mkdir(parents=True)
    (pets / "annotations").mkdir()
    for split, number in (("trainval", 0), ("test", 1)):
        (pets / "annotations" / f"{split}.txt").write_text(f"Abyssinian_{number} 1 1 1\nbeagle_{number} 2 2 1\n")
    for folder in ("cars_train", "cars_test", "devkit"):
        (cars / folder).mkdir(parents=True)
    for path in (cars / "devkit" / "cars_train_annos.mat", cars / "cars_test_annos_withlabels.mat"):
        entries = np.array([(2, "1.jpg"), (1, "2.jpg")], dtype=[("class", "O"), ("fname", "O")])
        scipy.savemat(path, {"annotations": entries})
    scipy.savemat(cars / "devkit" / "cars_meta.mat", {"class_names": np.array(["coupe", "van"], dtype=object)})
    expected = {
        "food101": (("apple_pie", "pho"), [1, 0], "food-101/images/pho/0.jpg"),
        "oxfordiiitpet": (("Abyssinian", "Beagle"), [0, 1], "oxford-iiit-pet/images/Abyssinian_0.jpg"),
        "stanfordcars": (("coupe", "van"), [1, 0], "stanford_cars/cars_train/1.jpg"),
    }
    for name, (names, labels, first) in expected.items():
        made = open_data(Data(name=name, root=str(tmp_path)))
        assert isinstance(made.train, Files)
        assert made.class_names == names
        assert made.train.labels.tolist() == made.test.labels.tolist() == labels
        assert made.train.paths[0] == str(tmp_path / first)


def test_voc_has_several_labels_a_sample(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    base = tmp_path / "VOCdevkit" / "VOC2007"
    objects = {"000001": [("dog", 0), ("person", 0), ("dog", 0)], "000002": [("car", 1), ("train", 0)], "000003": []}
    (base / "ImageSets" / "Main").mkdir(parents=True)
    (base / "Annotations").mkdir()
    (base / "ImageSets" / "Main" / "trainval.txt").write_text("000001\n000002\n")
    (base / "ImageSets" / "Main" / "test.txt").write_text("000003\n")
    for name, found in objects.items():
        picture(base / "JPEGImages" / f"{name}.jpg")
        inner = "".join(f"<object><name>{n}</name><difficult>{d}</difficult></object>" for n, d in found)
        (base / "Annotations" / f"{name}.xml").write_text(f"<annotation>{inner}</annotation>")
    made = open_data(Data(name="voc2007", root=str(tmp_path)))
    assert made.num_classes == 20
    assert made.train.labels.shape == (2, 20)
    assert made.train.labels.dtype == torch.float32
    present = [[made.class_names[c] for c in row.nonzero()[:, 0]] for row in (*made.train.labels, *made.test.labels)]
    assert present == [["dog", "person"], ["train"], []]
