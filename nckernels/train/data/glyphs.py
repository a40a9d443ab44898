"""Letters and digits drawn with matplotlib's fonts: many classes, and a test set in unseen faces.

Nothing is downloaded. A set of 100 classes is made in seconds and kept in the cache folder (:mod:`..cache`).
"""

from __future__ import annotations

import functools
import hashlib
import json
import unicodedata
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import cache
from ..recipe import Data
from .sets import Dataset, Memory, check_options, in_memory

SANS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique")
MONO = ("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique")
SERIF = ("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic")
DEJAVU = (*SANS, *MONO, *SERIF)
STIX = ("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta")
FACES = (*DEJAVU, *STIX)

MATPLOTLIB = "3.11.2"
"""The version that drew the images for the figures in the documentation."""

_FORMAT = 1  # version of the cached files; raise it if the code draws other images for the same options
_ANGLE, _SCALE, _SHEAR, _SHIFT, _NOISE = 0.3, 0.25, 0.2, 0.125, 0.15
_LOWEST, _STEPS = -0.75, 100  # pixels are kept as bytes: -0.75 to 1.8 in steps of 0.01


@dataclass(frozen=True)
class _Options:
    num_classes: int
    image_size: int
    train_views: int
    test_views: int
    train_faces: tuple[str, ...]
    test_faces: tuple[str, ...]
    seed: int

    def __post_init__(self) -> None:
        for name, least in (("num_classes", 2), ("image_size", 8), ("train_views", 1), ("test_views", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"{name}: expected a whole number, got {value!r}")
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        for name in ("train_faces", "test_faces"):
            faces = getattr(self, name)
            unknown = [face for face in faces if face not in FACES]
            if unknown or not faces:
                raise ValueError(f"{name}: expected some of {', '.join(FACES)}, got {', '.join(unknown) or 'none'}")
            if len(set(faces)) < len(faces):
                raise ValueError(f"{name}: expected every face once, got {', '.join(faces)}")
        both = [face for face in self.test_faces if face in self.train_faces]
        if both:
            raise ValueError(f"test_faces: expected none of the training faces, got {', '.join(both)}")


def glyphs(
    num_classes: int = 100,
    *,
    image_size: int = 20,
    train_views: int = 16,
    test_views: int = 10,
    train_faces: Sequence[str] = DEJAVU,
    test_faces: Sequence[str] = STIX,
    seed: int = 0,
) -> Dataset:
    """Images of letters and digits; the test set is drawn in faces that the training set lacks.

    A class is a character. The candidates (:func:`characters`) are the upper- and lower-case letters and decimal
    digits that all sixteen faces have and whose pictures differ in each of them. An image is a random view of a
    character in a face: rotated by up to 0.3 rad, scaled by up to 25 %, sheared by up to 0.2, shifted by up to 1/8
    of the half width, each uniform, with Gaussian noise of 0.15 where ink is 1 and paper 0.

    The same options give the same bytes with the same versions of torch and of matplotlib, whose fonts and FreeType
    draw the pictures. The documentation uses matplotlib 3.11.2. Training and test set are drawn independently: the test
    set does not depend on ``train_views`` or ``train_faces``.

    Args:
        num_classes: K, at least 2. The classes of a smaller set are the first of a larger one with the same seed.
        image_size: height and width in pixels, at least 8.
        train_views: images of each character in each training face, at least 1.
        test_views: images of each character in each test face, at least 1.
        train_faces: some of :data:`FACES`. The default is the twelve DejaVu faces (sans, mono, serif).
        test_faces: faces that are not in ``train_faces``. The default is the four STIX faces.
        seed: determines the choice of characters, the views and the noise.

    Returns:
        ``num_classes * train_views * len(train_faces)`` training images of shape (1, image_size, image_size), test
        images likewise. Labels follow the order of the classes in :func:`classes`.

    Raises:
        ValueError: for more classes than characters, unknown faces, and faces in both sets.
        ImportError: without matplotlib.

    Warns:
        UserWarning: if matplotlib is not version 3.11.2.
    """
    options = _Options(num_classes, image_size, train_views, test_views, tuple(train_faces), tuple(test_faces), seed)
    version = _matplotlib_version()
    if version != MATPLOTLIB:
        warnings.warn(
            f"these glyphs are drawn by matplotlib {version}; the documentation's figures were made with "
            f"{MATPLOTLIB}, and images may differ",
            stacklevel=2,
        )
    path = cache.cache_folder() / _file_name(options, version)
    parts = _read(path, options)
    if parts is None:
        parts = _draw(options)
        _write(path, parts)
    train, test = parts
    table = _LOWEST + torch.arange(256) / _STEPS

    def split(images: Tensor) -> Memory:
        return Memory(table[images.int()], torch.arange(num_classes).repeat(len(images) // num_classes))

    note = f"drawn by matplotlib {version}; the documentation's figures are of {MATPLOTLIB}"
    return in_memory(split(train), split(test), classes(num_classes, seed), note)


def load(data: Data) -> Dataset:
    """:func:`glyphs` with the options of ``[data]``. With ``validation`` the serif faces are held out of the training
    faces and become the test set."""
    known = [field.name for field in fields(_Options)]
    options = dict(data.options)
    check_options("glyphs", options, known)
    if data.image_size:
        options.setdefault("image_size", data.image_size)
    if data.validation:
        for name in ("train_faces", "test_faces"):
            if name in options:
                raise ValueError(f"data.options.{name}: data.validation also sets the faces; expected one of the two")
        options |= {"train_faces": (*SANS, *MONO), "test_faces": SERIF}
    for name in ("train_faces", "test_faces"):
        faces = options.get(name, ())
        if not isinstance(faces, (list, tuple)) or not all(isinstance(face, str) for face in faces):
            raise ValueError(f"data.options.{name}: expected a list of names, got {faces!r}")
    try:
        return glyphs(**options)
    except ValueError as error:
        raise ValueError(f"data.options.{error}") from None


@functools.cache
def characters() -> str:
    """The characters that can be classes, in the order of their code points.

    If several characters have the same picture in some face, such as Latin A and Greek Alpha, the first is kept.
    """
    fonts = [_font(face) for face in FACES]
    codes = set.intersection(*(set(font.get_charmap()) for font in fonts))
    candidates = (chr(code) for code in sorted(codes))
    seen: set[bytes] = set()
    kept = []
    for character in candidates:
        if unicodedata.category(character) not in ("Lu", "Ll", "Nd"):
            continue
        pictures = {face.encode() + _picture(character, face, 40).numpy().tobytes() for face in FACES}
        if not pictures & seen:
            seen |= pictures
            kept.append(character)
    return "".join(kept)


def classes(num_classes: int, seed: int = 0) -> str:
    """The characters of a set: class c is character c of the string."""
    everything = characters()
    if not 2 <= num_classes <= len(everything):
        raise ValueError(f"num_classes: expected 2 to {len(everything)}, got {num_classes}")
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(seed))
    return "".join(everything[i] for i in order[:num_classes].tolist())


def _draw(options: _Options) -> tuple[Tensor, Tensor]:
    """Training and test images as bytes."""
    chosen, size, seed = classes(options.num_classes, options.seed), options.image_size, 2 * options.seed
    train = _views(chosen, options.train_faces, options.train_views, size, torch.Generator().manual_seed(seed))
    test = _views(chosen, options.test_faces, options.test_views, size, torch.Generator().manual_seed(seed + 1))
    return train, test


def _views(chosen: str, faces: Sequence[str], count: int, size: int, generator: torch.Generator) -> Tensor:
    """Bytes (len(faces) * count * K, 1, size, size): every character once for each face and view."""
    k = len(chosen)

    def uniform(limit: float) -> Tensor:
        return (2 * torch.rand(k, generator=generator) - 1) * limit

    images = []
    for face in faces:
        source = torch.stack([_picture(c, face, 2 * size) for c in chosen])[:, None].float() / 255
        for _ in range(count):
            angle, scale, shear = uniform(_ANGLE), 1 + uniform(_SCALE), uniform(_SHEAR)
            rows = (
                torch.stack([scale * angle.cos(), shear - scale * angle.sin(), uniform(_SHIFT)], 1),
                torch.stack([scale * angle.sin(), scale * angle.cos(), uniform(_SHIFT)], 1),
            )
            grid = F.affine_grid(torch.stack(rows, 1), [k, 1, size, size], align_corners=False)
            view = F.grid_sample(source, grid, align_corners=False)
            view += _NOISE * torch.randn(view.shape, generator=generator)
            images.append(((view - _LOWEST) * _STEPS).round().clamp(0, 255).to(torch.uint8))
    return torch.cat(images)


def _picture(character: str, face: str, size: int) -> Tensor:
    """A character in the middle of ``size`` x ``size`` bytes, with an em of 3/4 of the size, clipped at the border."""
    from matplotlib.ft2font import LoadFlags

    font = _font(face)
    font.set_size(0.75 * size, 72)
    font.set_text(character, 0, flags=LoadFlags.NO_HINTING)
    font.draw_glyphs_to_bitmap(antialiased=True)
    ink = torch.tensor(font.get_image())
    height, width = ink.shape
    top, left = (size - height) // 2, (size - width) // 2
    return F.pad(ink, (left, size - width - left, top, size - height - top))  # a negative pad cuts


@functools.cache
def _font(face: str):  # type: ignore[no-untyped-def]
    import matplotlib
    from matplotlib.ft2font import FT2Font

    return FT2Font(str(Path(matplotlib.get_data_path(), "fonts", "ttf", f"{face}.ttf")))


def _matplotlib_version() -> str:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError('glyphs are drawn by matplotlib: pip install "nckernels[train]"') from error
    return str(matplotlib.__version__)


def _file_name(options: _Options, version: str) -> str:
    key = hashlib.sha256(json.dumps([_FORMAT, torch.__version__, asdict(options)]).encode()).hexdigest()[:16]
    return f"glyphs-{options.num_classes}-matplotlib-{version}-{key}.npz"


def _read(path: Path, options: _Options) -> tuple[Tensor, Tensor] | None:
    """Training and test images, or None if there is no valid file; the zip format has checksums."""
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as file:
            parts = torch.from_numpy(file["train"]), torch.from_numpy(file["test"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    counts = len(options.train_faces) * options.train_views, len(options.test_faces) * options.test_views
    shapes = tuple((n * options.num_classes, 1, options.image_size, options.image_size) for n in counts)
    good = tuple(tuple(part.shape) for part in parts) == shapes and all(part.dtype == torch.uint8 for part in parts)
    return parts if good else None


def _write(path: Path, parts: tuple[Tensor, Tensor]) -> None:
    import numpy as np

    cache.write(path, lambda file: np.savez(file, train=parts[0].numpy(), test=parts[1].numpy()))
