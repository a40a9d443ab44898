"""Random views of images in memory: batched, on their device, each a function of a few random numbers.

The operations and their parameters are those of torchvision's RandomResizedCrop, RandomHorizontalFlip, ColorJitter and
RandomGrayscale, in this order. Rotation, zoom and shift come between crop and flip, blur comes last. Differences:

- Crop, rotation, zoom and shift are one bilinear resampling. A crop is not rounded to whole pixels, and its edge is
  interpolated with the pixels outside of it. Outside of the image the border is repeated.
- This module draws no random numbers. A view is a function of its image and of :data:`NUMBERS` numbers, which the
  caller draws, so that the caller controls reproducibility.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .recipe import Augment

_TRIES = 10  # attempts to find a crop that lies within the image, as in torchvision
ASPECT = (3 / 4, 4 / 3)
BLUR_SD = (0.1, 2.0)  # standard deviations of the blur, in pixels
BLUR_RADIUS = 6  # radius of the blur's kernel: three times the largest standard deviation
_LUMA = (0.2989, 0.587, 0.114)  # torchvision's weights of red, green and blue
_ORDERS = torch.tensor(list(itertools.permutations(range(4))))  # of brightness, contrast, saturation and hue

# Columns of the random numbers. The first 2 x _TRIES are area and aspect ratio of the attempts.
_X, _Y, _FLIP, _ROTATE, _ZOOM, _SHIFT_X, _SHIFT_Y = range(2 * _TRIES, 2 * _TRIES + 7)
_JITTER, _ORDER, _FACTORS, _GREY, _BLUR, _BLUR_WIDTH = (2 * _TRIES + n for n in (7, 8, 9, 13, 14, 15))

NUMBERS = _BLUR_WIDTH + 1
"""Uniform random numbers that one view needs."""


def numbers(generator: torch.Generator, count: int) -> Tensor:
    """(count, NUMBERS) in [0, 1) for ``count`` views; on the CPU, so that a seed gives the same numbers everywhere."""
    return torch.rand(count, NUMBERS, generator=generator)


def is_identity(augment: Augment) -> bool:
    """Whether :func:`views` would return every image once and unchanged."""
    colour = (any(augment.jitter) and augment.jitter_probability > 0) or augment.grayscale > 0 or augment.blur > 0
    return augment.views == 1 and not (_moves(augment) or augment.flip > 0 or colour)


def views(images: Tensor, augment: Augment, u: Tensor) -> Tensor:
    """Random views of every image; the same arguments give the same views.

    Args:
        images: (b, C, H, W), floating. Colour operations (jitter, grey) need values in [0, 1] and C = 1 or 3, and clamp
            their results to [0, 1]; the other operations take any values. Saturation, hue and grey do not change grey
            images (C = 1).
        augment: the operations.
        u: (b * V, NUMBERS) in [0, 1), from :func:`numbers`; row ``i * V + v`` makes view v of image i.

    Returns:
        (b, V, C, H, W) with V = ``augment.views``, in new memory.

    Raises:
        ValueError: for another shape or dtype, and for colours of images that are neither grey nor RGB.
    """
    if images.dim() != 4 or not images.is_floating_point():
        raise ValueError(f"images: expected (b, C, H, W) of a floating dtype, got {tuple(images.shape)} {images.dtype}")
    count, channels = len(images) * augment.views, images.shape[1]
    if u.shape != (count, NUMBERS):
        raise ValueError(f"u: expected ({count}, {NUMBERS}) for {augment.views} views each, got {tuple(u.shape)}")
    coloured = any(augment.jitter) and augment.jitter_probability > 0
    if channels not in (1, 3) and (coloured or augment.grayscale > 0):
        name = "augment.jitter" if coloured else "augment.grayscale"
        raise ValueError(f"{name}: expected images of 1 or 3 channels, got {channels}")

    out = images.repeat_interleave(augment.views, 0)
    if _moves(augment):
        theta = affine(augment, u, *images.shape[2:]).to(images)
        grid = F.affine_grid(theta, list(out.shape), align_corners=False)
        out = F.grid_sample(out, grid, padding_mode="border", align_corners=False)
    if augment.flip > 0:  # not part of the resampling, so that a flip alone is exact
        out = torch.where(_where(u[:, _FLIP] < augment.flip, out), out.flip(-1), out)
    if coloured:
        out = _jitter(out, augment, u)
    if augment.grayscale > 0 and channels == 3:
        out = torch.where(_where(u[:, _GREY] < augment.grayscale, out), grey(out), out)
    if augment.blur > 0:
        low, high = BLUR_SD
        sd = low + (high - low) * u[:, _BLUR_WIDTH]
        out = blur(out, sd.masked_fill(u[:, _BLUR] >= augment.blur, 0.0))
    return out.unflatten(0, (len(images), augment.views))


def affine(augment: Augment, u: Tensor, height: int, width: int) -> Tensor:
    """(n, 2, 3) matrices of crop, rotation, zoom and shift, from views to images, as F.affine_grid takes them."""
    angle = _signed(u[:, _ROTATE]) * math.radians(augment.rotate)
    scale = 1.0 / (1.0 + _signed(u[:, _ZOOM]) * augment.zoom)
    shift_x, shift_y = (_signed(u[:, column]) * augment.shift for column in (_SHIFT_X, _SHIFT_Y))
    sine, cosine = scale * angle.sin(), scale * angle.cos()
    w, h = _crop(augment, u, height, width)
    left, top = (2.0 * u[:, _X] - 1.0) * (1.0 - w), (2.0 * u[:, _Y] - 1.0) * (1.0 - h)  # centre of the crop
    # Coordinates run from -1 to 1 along both sides; angles are in pixel space.
    across, down = height / width, width / height
    return torch.stack(
        [
            torch.stack([w * cosine, -w * sine * across, w * shift_x + left], 1),
            torch.stack([h * sine * down, h * cosine, h * shift_y + top], 1),
        ],
        1,
    )


def _crop(augment: Augment, u: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Width and height of the crops as shares of the image: the first attempt that fits, else the largest that fits."""
    low, high = augment.crop
    if low == 1.0:
        return torch.ones(len(u)).to(u), torch.ones(len(u)).to(u)
    tries = u[:, : 2 * _TRIES].unflatten(1, (_TRIES, 2))
    area = low + (high - low) * tries[..., 0]
    aspect = _log_uniform(tries[..., 1])
    w, h = (area * aspect * (height / width)).sqrt(), (area / aspect * (width / height)).sqrt()
    fits = (w <= 1.0) & (h <= 1.0)
    first = fits.int().argmax(1, keepdim=True)
    # If none fits: the whole image, cut so that the aspect ratio is within the limits.
    most = min(max(width / height, ASPECT[0]), ASPECT[1]) * height / width
    found = fits.any(1)
    w = w.gather(1, first)[:, 0].where(found, min(1.0, most))
    h = h.gather(1, first)[:, 0].where(found, min(1.0, 1.0 / most))
    return w, h


def _log_uniform(u: Tensor) -> Tensor:
    low, high = map(math.log, ASPECT)
    return (low + (high - low) * u).exp()


def _jitter(images: Tensor, augment: Augment, u: Tensor) -> Tensor:
    """ColorJitter, in place; each image has its own order of operations."""
    chosen = u[:, _JITTER] < augment.jitter_probability
    order = _ORDERS.to(u.device)[(u[:, _ORDER] * len(_ORDERS)).long()]
    for place in range(4):
        for operation, strength in enumerate(augment.jitter):
            if strength == 0.0:
                continue
            rows = (chosen & (order[:, place] == operation)).nonzero()[:, 0]  # nothing waits: u is on the CPU
            factor = _factor(operation, strength, u[rows, _FACTORS + operation]).to(images)
            rows = rows.to(images.device)
            images[rows] = _ADJUST[operation](images[rows], factor.view(-1, 1, 1, 1))
    return images


def _factor(operation: int, strength: float, u: Tensor) -> Tensor:
    """A shift in [-strength, strength] for the hue; for the other operations a factor around 1 that is not below 0."""
    if operation == 3:
        return _signed(u) * strength
    low = max(0.0, 1.0 - strength)
    return low + (1.0 + strength - low) * u


def grey(images: Tensor) -> Tensor:
    """(n, 1, H, W): the luminance of RGB images; grey images are returned."""
    if images.shape[1] == 1:
        return images
    weights = torch.tensor(_LUMA, dtype=images.dtype, device=images.device)
    return (images * weights.view(-1, 1, 1)).sum(1, keepdim=True)


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Multiply by the factor."""
    return (images * factor).clamp(0.0, 1.0)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Multiply the distance from the image's mean luminance by the factor."""
    return _blend(images, grey(images).mean((1, 2, 3), keepdim=True), factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Multiply the distance from grey by the factor."""
    return images if images.shape[1] == 1 else _blend(images, grey(images), factor)


def adjust_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Rotate the hue of HSV by a share of the circle."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(1)
    value, channel = images.max(1)
    chroma = value - images.amin(1)
    safe = chroma.where(chroma > 0, 1.0)
    sixths = torch.stack([(green - blue) / safe, (blue - red) / safe + 2.0, (red - green) / safe + 4.0], 1)
    hue = sixths.gather(1, channel[:, None]) + 6.0 * turns
    # Red, green and blue are the same trapezium of the hue, a third of the circle apart.
    position = (hue + hue.new_tensor([5.0, 3.0, 1.0]).view(-1, 1, 1)) % 6.0
    depth = torch.minimum(position, 4.0 - position).clamp(0.0, 1.0)
    return (value[:, None] - chroma[:, None] * depth).clamp(0.0, 1.0)


_ADJUST: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    adjust_brightness,
    adjust_contrast,
    adjust_saturation,
    adjust_hue,
)


def blur(images: Tensor, sd: Tensor) -> Tensor:
    """Gaussian blur with standard deviations ``sd`` (n,) in pixels; borders are reflected; 0 changes nothing."""
    for dim in (2, 3):
        radius = min(BLUR_RADIUS, images.shape[dim] - 1)
        offset = torch.arange(-radius, radius + 1, dtype=sd.dtype, device=sd.device)
        # With a deviation near zero all weights but the central one vanish.
        weights = (-0.5 * (offset / sd.clamp_min(1e-3)[:, None]).square()).softmax(1).to(images)
        padding = (radius, radius, 0, 0) if dim == 3 else (0, 0, radius, radius)
        padded, size = F.pad(images, padding, mode="reflect"), images.shape[dim]
        images = torch.zeros_like(images)
        for i, weight in enumerate(weights.unbind(1)):
            images += weight.view(-1, 1, 1, 1) * padded.narrow(dim, i, size)
    return images


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return (factor * images + (1.0 - factor) * other).clamp(0.0, 1.0)


def _moves(augment: Augment) -> bool:
    return augment.crop != (1.0, 1.0) or any((augment.rotate, augment.zoom, augment.shift))


def _signed(u: Tensor) -> Tensor:
    """From [0, 1) to [-1, 1)."""
    return 2.0 * u - 1.0


def _where(chosen: Tensor, images: Tensor) -> Tensor:
    return chosen.to(images.device).view(-1, 1, 1, 1)
