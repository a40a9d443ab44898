"""Random views of small images, for contrastive training."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_DEGREES, _SCALE, _SHIFT, _GAIN = 15.0, 0.15, 0.15, 0.2


def views(images: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` random views of every image: rotated, scaled, shifted, brighter or darker.

    Rotations by up to 15 degrees, sizes within 15 %, shifts by up to 15 % of the half width and contrast within
    20 %, each uniform; what comes in from outside repeats the border. No flips: digits have a handedness.

    Args:
        images: (B, C, H, W).
        generator: on the CPU, so that a seed gives the same views on every device.

    Returns:
        (B, count, C, H, W).
    """
    total = len(images) * count

    def uniform(limit: float) -> Tensor:
        return (2.0 * torch.rand(total, generator=generator, device=generator.device) - 1.0) * limit

    angle, scale = uniform(math.radians(_DEGREES)), 1.0 + uniform(_SCALE)
    matrix = torch.stack(
        [
            torch.stack([scale * angle.cos(), -scale * angle.sin(), uniform(_SHIFT)], 1),
            torch.stack([scale * angle.sin(), scale * angle.cos(), uniform(_SHIFT)], 1),
        ],
        1,
    )
    gain = (1.0 + uniform(_GAIN)).view(-1, 1, 1, 1)
    source = images.repeat_interleave(count, 0)
    grid = F.affine_grid(matrix.to(images), list(source.shape), align_corners=False)
    moved = F.grid_sample(source, grid, padding_mode="border", align_corners=False) * gain.to(images)
    return moved.unflatten(0, (len(images), count))
