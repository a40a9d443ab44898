"""Corruptions: each has its effect, which grows with the severity and depends on the seed only."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

pytest.importorskip("tqdm")

from nckernels.train import corruptions
from nckernels.train.corruptions import CORRUPTIONS, corrupted, corruption_errors, mean_corruption_error
from nckernels.train.data import Memory
from nckernels.train.data.sets import Files


def pictures(count: int = 40, size: int = 20) -> Tensor:
    """A bright cross on black, of other widths."""
    images = torch.zeros(count, 1, size, size)
    for i in range(count):
        w = 2 + i % 4
        images[i, :, 4:16, 9 : 9 + w] = 1
        images[i, :, 9 : 9 + w, 4:16] = 0.8
    return images


def apply(name: str, severity: int, images: Tensor, seed: int = 0) -> Tensor:
    return CORRUPTIONS[name](images, severity, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_severity_increases_the_distance_from_the_image(name: str) -> None:
    images = pictures()
    before = images.clone()
    distances = [(apply(name, severity, images) - images).square().mean().item() for severity in range(1, 6)]
    assert torch.equal(images, before)
    assert distances[0] > 0
    assert all(a < b for a, b in itertools.pairwise(distances)), distances


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_images_keep_their_shape_and_range_and_depend_on_the_seed_alone(name: str) -> None:
    images = pictures().repeat(1, 3, 1, 1)
    one, again, other = (apply(name, 3, images, seed) for seed in (1, 1, 2))
    assert (one.shape, one.dtype) == (images.shape, torch.float32)
    assert 0 <= one.min() <= one.max() <= 1
    assert torch.equal(one, again)
    random = name in ("gaussian_noise", "impulse_noise", "shift", "rotate", "occlusion")
    assert torch.equal(one, other) != random


def test_effect_of_each_corruption() -> None:
    grey, images = torch.full((200, 1, 20, 20), 0.5), pictures()
    noisy = corruptions.gaussian_noise(grey, 0.1, torch.Generator().manual_seed(0))
    assert noisy.std().item() == pytest.approx(0.1, rel=0.02)
    hit = corruptions.impulse_noise(grey, 0.2, torch.Generator().manual_seed(0))
    assert (hit == 0).float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert (hit == 1).float().mean().item() == pytest.approx(0.1, abs=0.01)
    g = torch.Generator()
    torch.testing.assert_close(corruptions.blur(grey, 0.05, g), grey)
    torch.testing.assert_close(corruptions.blur(images, 0.05, g).sum(), images.sum())
    torch.testing.assert_close(corruptions.contrast(images, 0.3, g).std((1, 2, 3)), 0.3 * images.std((1, 2, 3)))
    torch.testing.assert_close(corruptions.contrast(images, 0.3, g).mean((1, 2, 3)), images.mean((1, 2, 3)))
    torch.testing.assert_close(corruptions.brightness(images, 0.2, g), images + 0.2)
    covered = (corruptions.occlusion(torch.zeros(30, 1, 20, 20), 0.25, g) == 0.5).sum((1, 2, 3))
    assert set(covered.tolist()) == {25}
    torch.testing.assert_close(corruptions.resolution(grey, 0.3, g), grey)


def test_shifts_and_rotations_are_of_their_size() -> None:
    """The centre of a spot in the middle, before and after."""
    size = 40
    y = torch.arange(size) - (size - 1) / 2
    spot = torch.exp(-(y[:, None] ** 2 + y[None] ** 2) / 8).expand(50, 1, size, size)

    def centre(images: Tensor) -> Tensor:
        share = images / images.sum((1, 2, 3), keepdim=True)
        return torch.stack([(share.sum((1, 2)) * y).sum(1), (share.sum((1, 3)) * y).sum(1)], 1)

    moved = centre(corruptions.shift(spot, 0.1, torch.Generator().manual_seed(0)))
    torch.testing.assert_close(moved.norm(dim=1), torch.full((50,), 0.1 * size), atol=0.02, rtol=0)
    assert moved.mean(0).norm() < 0.3 * 0.1 * size  # in all directions
    aside = torch.roll(spot, 10, dims=3)
    turned = centre(corruptions.rotate(aside, 30.0, torch.Generator().manual_seed(0)))
    angles = torch.atan2(turned[:, 1], turned[:, 0]).rad2deg()
    torch.testing.assert_close(angles.abs(), torch.full((50,), 30.0), atol=0.5, rtol=0)
    assert (angles > 0).any()
    assert (angles < 0).any()


def test_byte_images_and_images_beyond_zero_and_one() -> None:
    labels = torch.zeros(40, dtype=torch.int64)
    images = pictures()
    as_bytes, as_floats = (
        corrupted(Memory(x, labels), "gaussian_noise", 2, seed=3).images for x in ((255 * images).byte(), images)
    )
    torch.testing.assert_close(as_bytes, as_floats, atol=1 / 255, rtol=0)
    wide = corrupted(Memory(2.5 * images - 0.75, labels), "gaussian_noise", 5).images
    assert wide.min() == -0.75
    assert wide.max() == 1.75
    other = corrupted(Memory(images, labels), "gaussian_noise", 2, seed=4).images
    assert not torch.equal(as_floats, other)
    with pytest.raises(ValueError, match="expected a data set in memory"):
        corrupted(Files(("a.png",), labels[:1]), "blur", 1)
    with pytest.raises(ValueError, match="severity: expected 1 to 5, got 6"):
        corrupted(Memory(images, labels), "blur", 6)


def test_errors_are_those_of_each_corruption_and_severity() -> None:
    def accuracy(which: tuple[str, int]) -> float:
        name, severity = which
        return 1 - severity / 10 if name == "blur" else 1.0

    errors = corruption_errors(accuracy, lambda *which: which, ["blur", "shift"], progress=False)
    assert errors.keys() == {"blur", "shift"}
    assert errors["blur"] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert errors["shift"] == (0.0,) * 5


def test_mean_corruption_error() -> None:
    """Sums over the severities are divided by the baseline's, and then averaged over the corruptions."""
    baseline = {"blur": [0.1, 0.1, 0.1, 0.1, 0.6], "shift": [0.2] * 5}
    errors = {"blur": [0.2, 0.2, 0.2, 0.2, 0.2], "shift": [0.1] * 5}
    assert mean_corruption_error(errors, baseline) == pytest.approx((1.0 + 0.5) / 2)
    assert mean_corruption_error(baseline, baseline) == pytest.approx(1)
    with pytest.raises(ValueError, match="baseline: expected the corruptions blur, shift, got blur"):
        mean_corruption_error(errors, {"blur": [0.1] * 5})
    with pytest.raises(ValueError, match="baseline: it has no errors under shift"):
        mean_corruption_error(errors, {**baseline, "shift": [0.0] * 5})
