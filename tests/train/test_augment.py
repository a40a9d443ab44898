"""Random views of images in memory, against the formulas of each operation."""

from __future__ import annotations

import colorsys
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nckernels.train import augment
from nckernels.train.augment import NUMBERS, is_identity, numbers, views
from nckernels.train.recipe import Augment

ALL = Augment(
    views=2, crop=(0.2, 1.0), flip=0.5, jitter=(0.4, 0.4, 0.4, 0.1), grayscale=0.2, blur=0.5, rotate=20.0, zoom=0.2,
    shift=0.2,
)  # fmt: skip


def images(count: int = 6, channels: int = 3, height: int = 12, width: int = 12) -> Tensor:
    """Smooth, in [0, 1]."""
    coarse = torch.rand(count, channels, 4, 4, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, (height, width), mode="bilinear").clamp(0, 1)


def drawn(count: int, seed: int = 0) -> Tensor:
    return numbers(torch.Generator().manual_seed(seed), count)


def only(x: Tensor, settings: Augment, **columns: float) -> Tensor:
    """Views with all random numbers 1/2, which changes least, except for the named ones."""
    u = torch.full((len(x) * settings.views, NUMBERS), 0.5)
    for name, value in columns.items():
        u[:, getattr(augment, name)] = value
    return views(x, settings, u)[:, 0]


def test_random_numbers_depend_on_the_seed() -> None:
    u = drawn(7)
    assert u.shape == (7, NUMBERS)
    assert u.min() >= 0
    assert u.max() < 1
    assert torch.equal(u, drawn(7))
    assert not torch.equal(u, drawn(7, seed=1))


def test_default_settings_return_the_image() -> None:
    x = torch.randn(3, 5, 8, 6)  # of any values and channels
    out = views(x, Augment(views=2), drawn(6))
    assert torch.equal(out, torch.stack([x, x], 1))
    out.zero_()
    assert x.abs().min() > 0


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"jitter": (0.4, 0.4, 0.4, 0.1), "jitter_probability": 0.0}, True),
        ({"views": 2}, False),
        ({"crop": (0.2, 1.0)}, False),
        ({"flip": 0.5}, False),
        ({"jitter": (0.0, 0.0, 0.0, 0.1)}, False),
        ({"grayscale": 0.9}, False),
        ({"blur": 0.5}, False),
        ({"rotate": 5.0}, False),
        ({"zoom": 0.1}, False),
        ({"shift": 0.1}, False),
    ],
)
def test_is_identity(changes: dict[str, object], expected: bool) -> None:
    settings = Augment(**changes)
    assert is_identity(settings) == expected
    changed = not torch.equal(views(images(), settings, drawn(6 * settings.views))[:, 0], images())
    assert changed != (expected or changes == {"views": 2})


def test_views_depend_on_their_own_image_and_numbers_only() -> None:
    """So ranks and micro-batches, which draw numbers for the whole batch, see slices of the same views."""
    x, u = images(8), drawn(16)
    whole = views(x, ALL, u)
    before = (x.clone(), u.clone())
    assert whole.shape == (8, 2, 3, 12, 12)
    assert torch.equal(whole, views(x, ALL, u))
    assert torch.equal(whole, torch.cat([views(x[:3], ALL, u[:6]), views(x[3:], ALL, u[6:])]))
    assert torch.equal(whole[2, 1], views(x[2:3], Augment(**{**vars(ALL), "views": 1}), u[5:6])[0, 0])
    assert torch.equal(x, before[0])
    assert torch.equal(u, before[1])
    assert not torch.equal(whole[:, 0], whole[:, 1])


def test_views_are_of_their_own_image() -> None:
    """A view correlates with its image more than with the average other."""
    x = images(50)
    flat = F.normalize(torch.stack([x, views(x, ALL, drawn(100))[:, 0]]).flatten(2) - x.mean(), dim=2)
    cosines = flat[0] @ flat[1].T
    assert cosines.diagonal().mean() > cosines.mean() + 0.2


# Geometry


def test_flips_are_exact() -> None:
    x = torch.randn(200, 2, 3, 5)
    out = views(x, Augment(flip=0.25), drawn(200))[:, 0]
    flipped = (out == x.flip(-1)).flatten(1).all(1)
    assert torch.equal(out, torch.where(flipped[:, None, None, None], x.flip(-1), x))
    assert flipped.float().mean().item() == pytest.approx(0.25, abs=0.08)


@pytest.mark.parametrize("shape", [(9, 9), (6, 10), (4, 12)])
def test_crops_are_the_first_that_fit(shape: tuple[int, int]) -> None:
    """Area, aspect ratio and place in pixels, and the fallback if ten attempts fail."""
    height, width = shape
    low, high = crop = (0.4, 1.0)
    u = drawn(500)
    u[:20, :20] = 0.999  # tries that do not fit
    for row, matrix in zip(u.tolist(), augment.affine(Augment(crop=crop), u, *shape).tolist(), strict=True):
        (w, zero, x), (also_zero, h, y) = matrix
        assert zero == also_zero == 0
        for area, aspect in zip(row[:20:2], row[1:20:2], strict=True):
            pixels = (low + (high - low) * area) * height * width
            ratio = math.exp(math.log(3 / 4) + aspect * math.log(16 / 9))
            expected = math.sqrt(pixels * ratio), math.sqrt(pixels / ratio)
            if expected[0] <= width and expected[1] <= height:
                break
        else:
            expected = (min(width, height * 4 / 3), height)
        assert (w * width, h * height) == pytest.approx(expected, rel=1e-4)
        assert abs(x) + w <= 1 + 1e-6
        assert abs(y) + h <= 1 + 1e-6


def test_a_crop_shows_its_part_of_the_image() -> None:
    """The upper left quarter of a linear image, which bilinear interpolation reproduces exactly."""
    plane = (torch.arange(8.0)[:, None] * 10 + torch.arange(8.0)).expand(1, 1, 8, 8)
    u = torch.zeros(1, NUMBERS)
    u[:, 1:20:2] = 0.5  # aspect ratio 1
    out = views(plane, Augment(crop=(0.25, 0.25)), u)[0, 0, 0]
    at = (torch.arange(8.0) + 0.5) / 2 - 0.5
    expected = at.clamp(min=0)[:, None] * 10 + at.clamp(min=0)
    torch.testing.assert_close(out, expected)


def test_rotation() -> None:
    x = torch.randn(2, 3, 7, 7)
    out = only(x, Augment(rotate=180.0), _ROTATE=0.75)
    torch.testing.assert_close(out, x.rot90(1, (2, 3)), atol=1e-5, rtol=0)
    matrix = augment.affine(Augment(rotate=180.0), drawn(20), 6, 10)[:, :, :2]
    pixels = torch.tensor([10.0, 6.0])
    turned = matrix * pixels[:, None] / pixels
    torch.testing.assert_close(turned @ turned.mT, torch.eye(2).expand(20, 2, 2))
    assert (torch.linalg.det(turned) > 0).all()


def test_shift_repeats_the_border() -> None:
    x = torch.randn(2, 3, 8, 8)
    out = only(x, Augment(shift=0.25), _SHIFT_X=1.0)
    torch.testing.assert_close(out, torch.cat([x[..., 1:], x[..., -1:]], -1), atol=1e-5, rtol=0)
    out = only(x, Augment(shift=0.5), _SHIFT_Y=0.0)
    torch.testing.assert_close(out, torch.cat([x[:, :, :1], x[:, :, :1], x[:, :, :-2]], 2), atol=1e-5, rtol=0)


def test_zoom_changes_the_size_by_its_share() -> None:
    settings, x = Augment(zoom=0.5), torch.zeros(1, 1, 9, 9)
    x[0, 0, 3:6, 3:6] = 1.0
    larger, same, smaller = (only(x, settings, _ZOOM=u) for u in (1.0, 0.5, 0.0))
    torch.testing.assert_close(same, x, atol=1e-5, rtol=0)
    assert larger.sum().sqrt().item() == pytest.approx(4.5, rel=0.05)
    assert smaller.sum() < same.sum()
    scale = [augment.affine(settings, torch.full((1, NUMBERS), u), 9, 9)[0, 0, 0].item() for u in (1.0, 0.0)]
    assert scale == pytest.approx([1 / 1.5, 1 / 0.5])


def test_crop_comes_before_the_other_moves() -> None:
    settings = Augment(crop=(0.3, 0.8), rotate=30.0, zoom=0.2, shift=0.3)
    u = drawn(50)
    crop = augment.affine(Augment(crop=(0.3, 0.8)), u, 6, 9).double()
    rest = augment.affine(Augment(rotate=30.0, zoom=0.2, shift=0.3), u, 6, 9).double()
    last = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64).expand(50, 1, 3)
    both = augment.affine(settings, u, 6, 9).double()
    torch.testing.assert_close(both, crop @ torch.cat([rest, last], 1), atol=1e-6, rtol=0)


# Colours


def luminance(x: Tensor) -> Tensor:
    return 0.2989 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]


def test_brightness_contrast_saturation() -> None:
    x = images()
    jitter = {"jitter_probability": 1.0}
    torch.testing.assert_close(only(x, Augment(jitter=(0.4, 0, 0, 0), **jitter), _FACTORS=0.75), (1.2 * x).clamp(0, 1))
    torch.testing.assert_close(only(x, Augment(jitter=(0, 0, 0.4, 0), **jitter)), x)
    factors = torch.tensor([0.0, 0.3, 1.0, 1.4, 2.0, 5.0]).view(-1, 1, 1, 1)
    mean = luminance(x).mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(augment.adjust_contrast(x, factors), (mean + factors * (x - mean)).clamp(0, 1))
    grey = luminance(x)
    torch.testing.assert_close(augment.adjust_saturation(x, factors), (grey + factors * (x - grey)).clamp(0, 1))


def test_hue_turns_the_colour() -> None:
    x = images(5)
    x[0, :, :2] = 0.25  # grey
    x[1, 0], x[1, 1], x[1, 2] = 1.0, 0.0, 0.0
    x[2, :, 0, :3] = torch.eye(3)
    turns = torch.tensor([0.1, 1 / 3, -0.2, 0.5, -0.5])
    out = augment.adjust_hue(x, turns.view(-1, 1, 1, 1))
    for before, after, turn in zip(x, out, turns.tolist(), strict=True):
        for rgb, new in zip(before.flatten(1).T.tolist(), after.flatten(1).T.tolist(), strict=True):
            h, s, v = colorsys.rgb_to_hsv(*rgb)
            assert new == pytest.approx(colorsys.hsv_to_rgb((h + turn) % 1.0, s, v), abs=1e-5)
    torch.testing.assert_close(out[1], torch.tensor([0.0, 1.0, 0.0])[:, None, None].expand(3, 12, 12))


def test_factors_of_colours() -> None:
    """ColorJitter's: uniform in 1 plus or minus the strength, never below 0; hue around 0."""
    u = torch.tensor([0.0, 0.5, 1.0])
    for operation in range(3):
        torch.testing.assert_close(augment._factor(operation, 0.4, u), torch.tensor([0.6, 1.0, 1.4]))
        torch.testing.assert_close(augment._factor(operation, 1.5, u), torch.tensor([0.0, 1.25, 2.5]))
    torch.testing.assert_close(augment._factor(3, 0.1, u), torch.tensor([-0.1, 0.0, 0.1]))


def test_jitter_uses_every_order() -> None:
    x, strengths = images(24), (0.6, 0.5, 0.9, 0.3)
    u = drawn(24)
    u[:, augment._ORDER] = (torch.arange(24) + 0.5) / 24
    out = views(x, Augment(jitter=strengths, jitter_probability=1.0), u)[:, 0]
    orders = list(itertools.permutations(range(4)))
    for i, order in enumerate(orders):
        expected = x[i : i + 1]
        for operation in order:
            number = u[i : i + 1, augment._FACTORS + operation]
            factor = augment._factor(operation, strengths[operation], number)
            expected = augment._ADJUST[operation](expected, factor.view(-1, 1, 1, 1))
        torch.testing.assert_close(out[i : i + 1], expected)


def test_probabilities() -> None:
    x = images(1).expand(2000, -1, -1, -1)
    jittered = views(x, Augment(jitter=(0.4, 0.4, 0.4, 0.1), jitter_probability=0.8), drawn(2000))[:, 0]
    assert (jittered != x).flatten(1).any(1).float().mean().item() == pytest.approx(0.8, abs=0.03)
    grey = views(x, Augment(grayscale=0.2), drawn(2000))[:, 0]
    changed = (grey != x).flatten(1).any(1)
    assert changed.float().mean().item() == pytest.approx(0.2, abs=0.03)
    torch.testing.assert_close(grey[changed], luminance(x[changed]).expand(-1, 3, -1, -1))
    blurred = views(x, Augment(blur=0.5), drawn(2000))[:, 0]
    assert (blurred != x).flatten(1).any(1).float().mean().item() == pytest.approx(0.5, abs=0.04)


def test_colours_stay_in_range() -> None:
    out = views(images(100), ALL, drawn(200))
    assert out.min() >= 0
    assert out.max() <= 1 + 1e-6
    assert out.isfinite().all()


def test_grey_images_have_no_colour_to_change() -> None:
    x = images(20, channels=1)
    settings = Augment(jitter=(0.0, 0.0, 0.9, 0.5), jitter_probability=1.0, grayscale=1.0)
    assert torch.equal(views(x, settings, drawn(20))[:, 0], x)
    contrast = only(x, Augment(jitter=(0.0, 0.8, 0.0, 0.0), jitter_probability=1.0))
    torch.testing.assert_close(contrast, x)
    mean = x.mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(augment.adjust_contrast(x, torch.tensor(0.5)), (x + mean) / 2)


# Blur


def test_blur_is_a_gaussian() -> None:
    x = torch.zeros(3, 1, 21, 21)
    x[:, :, 10, 10] = 1.0
    sd = torch.tensor([0.0, 0.7, 2.0])
    out = augment.blur(x, sd)
    assert torch.equal(out[0], x[0])
    offset = torch.arange(21.0) - 10
    for image, s in zip(out[1:], sd[1:].tolist(), strict=True):
        weights = torch.exp(-offset.square() / (2 * s * s)) * (offset.abs() <= 6)
        weights /= weights.sum()
        torch.testing.assert_close(image[0], weights[:, None] * weights)


@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (8, 8)])
def test_blur_keeps_flat_images_and_small_ones(shape: tuple[int, int]) -> None:
    flat = torch.full((4, 3, *shape), 0.3)
    torch.testing.assert_close(augment.blur(flat, torch.tensor([0.0, 0.1, 1.0, 2.0])), flat)


# Faults


@pytest.mark.parametrize(
    ("x", "settings", "rows", "message"),
    [
        (torch.rand(2, 3, 4), Augment(), 2, r"images: expected \(b, C, H, W\) of a floating dtype, got \(2, 3, 4\)"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), Augment(), 2, r"images: .*uint8"),
        (torch.rand(2, 3, 4, 4), Augment(views=2), 2, r"u: expected \(4, \d+\) for 2 views each, got \(2, "),
        (torch.rand(2, 2, 4, 4), Augment(jitter=(0.1, 0, 0, 0)), 2, "augment.jitter: expected images of 1 or 3 .* 2"),
        (torch.rand(2, 4, 4, 4), Augment(grayscale=0.1), 2, "augment.grayscale: expected images of 1 or 3 .* 4"),
    ],
)
def test_bad_images_are_named(x: Tensor, settings: Augment, rows: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        views(x, settings, drawn(rows))


def test_other_dtypes() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        assert views(images().to(dtype), ALL, drawn(12)).dtype == dtype
