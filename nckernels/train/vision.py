"""Random views of image files, by torchvision.transforms.v2: the operations of :mod:`.augment`, on PIL images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .augment import ASPECT, BLUR_RADIUS, BLUR_SD
from .recipe import Augment

Transform = Callable[[Any], Tensor]
"""A PIL image in RGB -> (3, size, size) in float32, normalised."""

_RESIZED = 256 / 224  # shorter side of the resized image, as a multiple of the centre crop


def train_transform(
    augment: Augment, size: int, mean: tuple[float, ...], std: tuple[float, ...], *, cropped: bool = False
) -> Transform:
    """One random view. The random numbers are torch's, so ``torch.manual_seed`` makes it reproducible.

    Without a random crop it starts with the crop of :func:`eval_transform`. Rotation, zoom and shift fill with
    black from outside of the image.

    Raises:
        ImportError: without torchvision.
    """
    v2 = _transforms()
    if augment.crop == (1.0, 1.0):
        steps = _centre_crop(v2, size, 1.0 if cropped else _RESIZED)
    else:
        steps = [v2.RandomResizedCrop(size, scale=augment.crop, ratio=ASPECT, antialias=True)]
    if augment.rotate or augment.zoom or augment.shift:
        steps.append(
            v2.RandomAffine(
                augment.rotate,
                translate=(augment.shift / 2, augment.shift / 2),  # shares of the whole width and height
                scale=(1 - augment.zoom, 1 + augment.zoom),
                interpolation=v2.InterpolationMode.BILINEAR,
            )
        )
    if augment.flip:
        steps.append(v2.RandomHorizontalFlip(augment.flip))
    if any(augment.jitter):
        steps.append(v2.RandomApply([v2.ColorJitter(*augment.jitter)], augment.jitter_probability))
    if augment.grayscale:
        steps.append(v2.RandomGrayscale(augment.grayscale))
    if augment.blur:
        kernel = 2 * min(BLUR_RADIUS, size - 1) + 1
        steps.append(v2.RandomApply([v2.GaussianBlur(kernel, BLUR_SD)], augment.blur))
    return _normalised(v2, steps, mean, std)


def eval_transform(size: int, mean: tuple[float, ...], std: tuple[float, ...], *, cropped: bool = False) -> Transform:
    """The centre crop: the shorter side is resized to 256/224 of the size, and the centre is cropped.

    Args:
        cropped: whether the image is already such a crop; then its shorter side is only resized to the size.

    Raises:
        ImportError: without torchvision.
    """
    v2 = _transforms()
    return _normalised(v2, _centre_crop(v2, size, 1.0 if cropped else _RESIZED), mean, std)


def _centre_crop(v2: Any, size: int, share: float) -> list[Any]:
    return [v2.Resize(round(size * share), antialias=True), v2.CenterCrop(size)]


def _normalised(v2: Any, steps: list[Any], mean: tuple[float, ...], std: tuple[float, ...]) -> Transform:
    ending = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std), v2.ToPureTensor()]
    composed: Transform = v2.Compose([*steps, *ending])
    return composed


def _transforms() -> Any:
    try:
        from torchvision.transforms import v2
    except ImportError as error:
        raise ImportError("image files are augmented by torchvision: pip install torchvision") from error
    return v2
