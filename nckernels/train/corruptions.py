"""Corruptions of small test images in memory, at five severities, modelled on ImageNet-C.

As in Hendrycks & Dietterich (2019) each corruption has five severities, and the mean corruption error is

    mCE = mean over the corruptions of (sum over the severities of the error) / (the same sum of the baseline)

where the baseline is one of our runs, for instance cross-entropy's, instead of AlexNet. Kinds, constants and code are
ours, made for letters and digits of about 20 x 20 pixels, so the numbers cannot be compared with ImageNet-C's. Lengths
are shares of the image's width. :mod:`.data.imagenet_c` reads ImageNet-C itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from . import data as datasets
from .data.seeds import generator

SEVERITIES = 5

Function = Callable[[Tensor, float, torch.Generator], Tensor]


@dataclass(frozen=True)
class Corruption:
    """A function of images (N, C, H, W), a level and a generator on the CPU, and its five levels.

    0 is black and 1 white. Results are clamped to [0, 1], or to the range of the images if that is larger, as for
    glyphs with noise.
    """

    function: Function
    levels: tuple[float, float, float, float, float]

    def __call__(self, images: Tensor, severity: int, random: torch.Generator) -> Tensor:
        """The images at a severity from 1 to 5."""
        if not 1 <= severity <= SEVERITIES:
            raise ValueError(f"severity: expected 1 to {SEVERITIES}, got {severity}")
        low, high = min(0.0, images.min().item()), max(1.0, images.max().item())
        return self.function(images, self.levels[severity - 1], random).clamp(low, high)


def gaussian_noise(images: Tensor, level: float, random: torch.Generator) -> Tensor:
    """Add Gaussian noise with this standard deviation."""
    return images + level * torch.randn(images.shape, generator=random)


def impulse_noise(images: Tensor, level: float, random: torch.Generator) -> Tensor:
    """Make this share of the pixels black or white."""
    n, _, h, w = images.shape
    u = torch.rand(n, 1, h, w, generator=random)
    return torch.where(u < level, (u < level / 2).float(), images)


def blur(images: Tensor, level: float, random: torch.Generator) -> Tensor:
    """Gaussian blur with this standard deviation."""
    deviation = level * images.shape[-1]
    radius = max(1, math.ceil(3 * deviation))
    weights = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / deviation) ** 2)
    weights = (weights / weights.sum()).to(images)
    for across in (False, True):
        pad, shape = ((radius, radius, 0, 0), (1, 1, 1, -1)) if across else ((0, 0, radius, radius), (1, 1, -1, 1))
        flat = F.pad(images.flatten(0, 1)[:, None], pad, mode="replicate")
        images = F.conv2d(flat, weights.view(shape)).view(images.shape)
    return images


def resolution(images: Tensor, level: float, random: torch.Generator) -> Tensor:
    """Scale down to this share of width and height, and back."""
    size = [max(1, round(level * side)) for side in images.shape[-2:]]
    small = F.interpolate(images, size, mode="bilinear", antialias=True)
    return F.interpolate(small, images.shape[-2:], mode="bilinear")


def contrast(images: Tensor, level: float, random: torch.Generator) -> Tensor:
    """Reduce the contrast to this share, about the mean of the image."""
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return mean + level * (images - mean)


def brightness(images: Tensor, level: float, random: torch.Generator) -> Tensor:
    """Add this value to every pixel."""
    return images + level


def shift(images: Tensor, level: float, random: torch.Generator) -> Tensor:
    """Shift by this distance in a random direction."""
    angle = 2 * math.pi * torch.rand(len(images), generator=random)
    zero, one = torch.zeros_like(angle), torch.ones_like(angle)
    return _moved(images, [[one, zero, 2 * level * angle.cos()], [zero, one, 2 * level * angle.sin()]])


def rotate(images: Tensor, level: float, random: torch.Generator) -> Tensor:
    """Rotate by this angle in degrees, to the left or to the right."""
    angle = math.radians(level) * (2 * torch.randint(2, (len(images),), generator=random) - 1)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    return _moved(images, [[cos, -sin, zero], [sin, cos, zero]])


def occlusion(images: Tensor, level: float, random: torch.Generator) -> Tensor:
    """Cover a random square of this side with grey."""
    n, _, h, w = images.shape
    side = max(1, round(level * w))
    top, left = (torch.randint(length - side + 1, (n, 1, 1, 1), generator=random) for length in (h, w))
    y, x = torch.arange(h).view(1, 1, h, 1), torch.arange(w).view(1, 1, 1, w)
    covered = (y >= top) & (y < top + side) & (x >= left) & (x < left + side)
    return torch.where(covered, 0.5, images)


def _moved(images: Tensor, rows: list[list[Tensor]]) -> Tensor:
    """Images under one affine map each, in units of half the width; outside of the image the border is repeated."""
    matrices = torch.stack([torch.stack(row, 1) for row in rows], 1).to(images)
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": Corruption(gaussian_noise, (0.06, 0.12, 0.18, 0.24, 0.30)),
    "impulse_noise": Corruption(impulse_noise, (0.02, 0.05, 0.10, 0.15, 0.20)),
    "blur": Corruption(blur, (0.03, 0.045, 0.06, 0.075, 0.09)),
    "resolution": Corruption(resolution, (0.7, 0.6, 0.5, 0.4, 0.3)),
    "contrast": Corruption(contrast, (0.6, 0.45, 0.3, 0.2, 0.1)),
    "brightness": Corruption(brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "shift": Corruption(shift, (0.04, 0.08, 0.12, 0.16, 0.20)),
    "rotate": Corruption(rotate, (8.0, 16.0, 24.0, 32.0, 40.0)),
    "occlusion": Corruption(occlusion, (0.15, 0.25, 0.35, 0.45, 0.55)),
}
"""The corruptions by name, with the levels of severities 1 to 5."""


def corrupted(split: Any, name: str, severity: int, *, seed: int = 0) -> datasets.Memory:
    """A set in memory under one corruption. The random numbers depend only on seed, name and severity.

    Raises:
        ValueError: for files.
    """
    if not isinstance(split, datasets.Memory):
        raise ValueError("corruptions: expected a data set in memory; for image files there is ImageNet-C")
    images = split.images.cpu()
    images = images / 255 if images.dtype == torch.uint8 else images
    return replace(split, images=CORRUPTIONS[name](images, severity, generator(seed, name, severity)))


def corruption_errors(
    accuracy: Callable[[Any], float],
    corrupt: Callable[[str, int], Any],
    names: Iterable[str] = tuple(CORRUPTIONS),
    *,
    progress: bool | None = None,
) -> dict[str, tuple[float, ...]]:
    """The errors, between 0 and 1, at severities 1 to 5 of each corruption.

    Args:
        accuracy: function that measures the accuracy on a test set.
        corrupt: function that makes the test set for a corruption and a severity.
        progress: whether to show a bar; None: only in a terminal.
    """
    grid = [(name, severity) for name in names for severity in range(1, SEVERITIES + 1)]
    errors: dict[str, tuple[float, ...]] = {}
    for name, severity in tqdm(grid, desc="corruptions", disable=None if progress is None else not progress):
        errors[name] = (*errors.get(name, ()), 1 - accuracy(corrupt(name, severity)))
    return errors


def mean_corruption_error(errors: Mapping[str, Sequence[float]], baseline: Mapping[str, Sequence[float]]) -> float:
    """mCE: 1 for the baseline itself.

    Raises:
        ValueError: if the two have different corruptions, or if the baseline has no errors under one of them.
    """
    if errors.keys() != baseline.keys():
        raise ValueError(f"baseline: expected the corruptions {', '.join(errors)}, got {', '.join(baseline)}")
    for name, values in baseline.items():
        if sum(values) == 0:
            raise ValueError(f"baseline: it has no errors under {name}, so the mCE is undefined")
    return sum(sum(errors[name]) / sum(baseline[name]) for name in errors) / len(errors)
