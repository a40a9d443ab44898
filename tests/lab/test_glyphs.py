"""The glyphs: images, split and cache."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

matplotlib = pytest.importorskip("matplotlib")

from nckernels.train.data import Dataset, glyphs, open_data  # noqa: E402
from nckernels.train.recipe import Data  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:these glyphs are drawn by matplotlib")
TINY = {"num_classes": 7, "image_size": 16, "train_views": 2, "test_views": 1, "seed": 3}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NCKERNELS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def same(a: Dataset, b: Dataset) -> bool:
    return torch.equal(a.train.images, b.train.images) and torch.equal(a.test.images, b.test.images)


def test_shapes_labels_and_scale() -> None:
    made = glyphs.glyphs(**TINY)
    assert made.train.images.shape == (7 * 2 * 12, 1, 16, 16)
    assert made.test.images.shape == (7 * 1 * 4, 1, 16, 16)
    assert made.train.images.dtype == made.test.images.dtype == torch.float32
    assert made.train.labels.dtype == made.test.labels.dtype == torch.int64
    assert torch.equal(made.train.labels.bincount(), torch.full((7,), 24))
    assert torch.equal(made.test.labels.bincount(), torch.full((7,), 4))
    assert made.mean[0] == pytest.approx(made.train.images.mean().item(), abs=1e-5)
    assert made.std[0] == pytest.approx(made.train.images.std(correction=0).item(), abs=1e-5)
    assert made.train.images.quantile(0.25) == pytest.approx(0, abs=0.1)  # paper
    assert (made.num_classes, made.channels, made.image_size) == (7, 1, 16)
    assert "".join(made.class_names) == glyphs.classes(7, 3)
    assert made.note.startswith(f"drawn by matplotlib {matplotlib.__version__}")


def test_an_image_is_of_the_character_of_its_label() -> None:
    """The mean image of most classes is closest to the class's own picture; by chance one of thirty would be."""
    made = glyphs.glyphs(30, train_views=20, test_views=20)
    pictures = torch.stack([glyphs._picture(c, "DejaVuSans", 40).float() for c in glyphs.classes(30)])
    pictures = F.avg_pool2d(pictures[:, None], 4).flatten(1)
    for images, labels in ((made.train.images, made.train.labels), (made.test.images, made.test.labels)):
        means = torch.stack([F.avg_pool2d(images[labels == c].mean(0), 2).flatten() for c in range(30)])
        a, b = (
            F.normalize(x - x.mean(1, keepdim=True), dim=1)
            for x in (means - means.mean(0), pictures - pictures.mean(0))
        )
        assert ((a @ b.T).argmax(1) == torch.arange(30)).float().mean() > 0.5


def test_no_test_face_is_trained_on() -> None:
    assert not set(glyphs.DEJAVU) & set(glyphs.STIX)
    assert len(glyphs.DEJAVU) == 12
    assert len(glyphs.STIX) == 4
    made = glyphs.glyphs(**TINY)
    other_train = glyphs.glyphs(**TINY, train_faces=glyphs.SANS)
    other_test = glyphs.glyphs(**TINY, test_faces=glyphs.STIX[:1])
    assert torch.equal(made.test.images, other_train.test.images)
    assert torch.equal(made.train.images, other_test.train.images)
    assert torch.equal(made.test.images[:7], other_test.test.images)
    pictures = [torch.stack([glyphs._picture(c, face, 32) for c in glyphs.classes(7, 3)]) for face in glyphs.FACES]
    assert all(not torch.equal(a, b) for a in pictures[:12] for b in pictures[12:])


def test_views_and_noise_of_the_two_sets_are_different() -> None:
    """The same face in training and test set gives different images."""
    options = {**TINY, "test_views": 2}
    test = glyphs.glyphs(**options, train_faces=glyphs.MONO, test_faces=glyphs.SANS).test.images
    train = glyphs.glyphs(**options, train_faces=glyphs.SANS, test_faces=glyphs.MONO).train.images
    assert torch.corrcoef(torch.stack([test.flatten(), train.flatten()]))[0, 1] < 0.95


def test_characters_differ_in_every_face() -> None:
    found = glyphs.characters()
    assert len(found) >= 400
    assert set("0123456789abcdefghijkmnopqrstuvwxyz") - set(found) == set()
    assert ("A" in found, "\N{GREEK CAPITAL LETTER ALPHA}" in found) == (True, False)
    for face in ("DejaVuSans-Oblique", "STIXGeneralBolIta"):
        pictures = [glyphs._picture(c, face, 40) for c in found]
        assert len({p.numpy().tobytes() for p in pictures}) == len(found)
        assert min(p.sum() for p in pictures) > 0


def test_a_smaller_set_has_the_first_classes_of_a_larger_one() -> None:
    assert glyphs.classes(100).startswith(glyphs.classes(10))
    assert len(set(glyphs.classes(100))) == 100
    assert glyphs.classes(10, seed=1) != glyphs.classes(10)


def test_another_process_without_a_cache_draws_the_same_bytes(place: Path) -> None:
    made = glyphs.glyphs(**TINY)
    script = (
        "import sys, numpy as np; from nckernels.train.data import glyphs; "
        f"d = glyphs.glyphs(**{TINY!r}); np.savez(sys.argv[1], d.train.images.numpy(), d.test.images.numpy())"
    )
    environment = {**os.environ, "NCKERNELS_CACHE": str(place / "other"), "PYTHONHASHSEED": "7"}
    out = place / "out.npz"
    subprocess.run([sys.executable, "-c", script, str(out)], check=True, env=environment, timeout=120)
    import numpy as np

    with np.load(out) as file:
        assert file["arr_0"].tobytes() == made.train.images.numpy().tobytes()
        assert file["arr_1"].tobytes() == made.test.images.numpy().tobytes()
    assert not same(made, glyphs.glyphs(**{**TINY, "seed": 4}))


def test_the_second_call_reads_the_cache(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = glyphs.glyphs(**TINY)
    (file,) = place.iterdir()
    assert file.name.startswith(f"glyphs-7-matplotlib-{matplotlib.__version__}-")
    monkeypatch.setattr(glyphs, "_draw", None)
    assert same(glyphs.glyphs(**TINY), made)
    with pytest.raises(TypeError):
        glyphs.glyphs(**{**TINY, "test_views": 2})  # other options, another file


@pytest.mark.parametrize("damage", ["truncated", "bit flipped", "empty", "text", "other content"])
def test_a_damaged_file_is_made_again(damage: str, place: Path) -> None:
    made = glyphs.glyphs(**TINY)
    (file,) = place.iterdir()
    good = file.read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    other = {"truncated": good[:-200], "bit flipped": bytes(flipped), "empty": b"", "text": b"not a zip"}
    if damage == "other content":
        import numpy as np

        np.savez(file, train=np.zeros((3, 1, 16, 16), np.uint8), test=np.zeros(1, np.uint8))
    else:
        file.write_bytes(other[damage])
    assert same(glyphs.glyphs(**TINY), made)
    assert file.read_bytes() == good
    assert list(place.iterdir()) == [file]  # nothing unfinished lies about


def test_an_unwritable_cache_folder_is_no_error(place: Path) -> None:
    place.write_text("a file where the folder would be")
    assert glyphs.glyphs(**TINY).num_classes == 7


def test_the_cache_follows_the_usual_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NCKERNELS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    glyphs.glyphs(**TINY)
    assert len(list((tmp_path / "xdg" / "nckernels").iterdir())) == 1


def test_another_matplotlib_warns(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    monkeypatch.setattr(matplotlib, "__version__", "3.99.0")
    with pytest.warns(UserWarning, match=r"drawn by matplotlib 3\.99\.0; the documentation's figures .* 3\.11\.2"):
        glyphs.glyphs(**TINY)
    assert "3.99.0" in next(place.iterdir()).name


def test_sets_of_a_recipe() -> None:
    made, validation = open_data(Data(name="glyphs")), open_data(Data(name="glyphs", validation=True))
    assert made.train.images.shape == (19200, 1, 20, 20)
    assert made.test.images.shape == (4000, 1, 20, 20)
    assert validation.train.images.shape == (12800, 1, 20, 20)
    assert validation.test.images.shape == (4000, 1, 20, 20)
    assert made.num_classes == validation.num_classes == 100
    # The faces to choose settings on are among the training faces, none of them a test face of "glyphs".
    assert not set(glyphs.SERIF) & {*glyphs.SANS, *glyphs.MONO, *glyphs.STIX}


def test_options_of_a_recipe() -> None:
    assert same(open_data(Data(name="glyphs", options=TINY)), glyphs.glyphs(**TINY))
    options = {"num_classes": 5, "train_views": 1, "test_views": 1, "train_faces": ["DejaVuSans"]}
    made = open_data(Data(name="glyphs", image_size=12, options=options))
    assert made.train.images.shape == (5, 1, 12, 12)
    everything = {"num_classes": len(glyphs.characters()), "train_views": 1, "test_views": 1}
    most = open_data(Data(name="glyphs", options=everything))
    assert most.num_classes == len(glyphs.characters()) >= 400
    assert len(most.train) == 12 * most.num_classes
    drawn = open_data(Data(name="glyphs", image_size=24, options=TINY))  # drawn at 16 pixels, batches of 24
    assert (drawn.image_size, drawn.train.images.shape[-1]) == (24, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 1}, "num_classes: expected at least 2, got 1"),
        ({"num_classes": 10_000}, r"num_classes: expected 2 to \d+, got 10000"),
        ({"image_size": 4}, "image_size: expected at least 8, got 4"),
        ({"train_views": 0}, "train_views: expected at least 1, got 0"),
        ({"test_faces": ("Comic",)}, "test_faces: expected some of DejaVuSans, .*, got Comic"),
        ({"train_faces": ()}, "train_faces: expected some of .*, got none"),
        ({"train_faces": ("DejaVuSans", "DejaVuSans")}, "train_faces: expected every face once"),
        ({"test_faces": ("DejaVuSans",)}, "test_faces: expected none of the training faces, got DejaVuSans"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        glyphs.glyphs(**options)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"options": {"num_clases": 5}}, r"data.options.num_clases: .* \(did you mean 'num_classes'\?\)"),
        ({"options": {"num_classes": 5.5}}, r"data.options.num_classes: expected a whole number, got 5.5"),
        ({"options": {"test_faces": "DejaVuSans"}}, "data.options.test_faces: expected a list of names"),
        ({"options": {"train_faces": ["Comic"]}}, "data.options.train_faces: expected some of .*, got Comic"),
        ({"options": {"train_faces": ["DejaVuSans"]}, "validation": True}, "data.options.train_faces: data.validation"),
    ],
)
def test_bad_options_of_a_recipe_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_data(Data(name="glyphs", **settings))
