"""ResNets (He et al. 2016) for small images: the first convolution is 3x3, and there is no pooling before the last."""

from __future__ import annotations

import math
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

Norm = Literal["batch", "group"]

_GROUPS = 8


def normalisation(kind: Norm, channels: int) -> nn.Module:
    """Batch norm, or group norm with 8 groups, or fewer if 8 does not divide the channels."""
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.GroupNorm(math.gcd(_GROUPS, channels), channels)


def resnet(in_channels: int, widths: tuple[int, ...], blocks: int, norm: Norm, *, padded: bool) -> nn.Sequential:
    """A 3x3 convolution, stages of basic blocks, each but the first at half the size, and the average over positions.

    Args:
        in_channels: channels of the images.
        widths: channels of the stages.
        blocks: blocks per stage.
        norm: normalisation after every convolution.
        padded: whether shortcuts of blocks that change the shape take every other position and pad the channels with
            zeros; otherwise they are 1x1 convolutions.
    """
    layers: list[nn.Module] = [_conv(in_channels, widths[0], 3), normalisation(norm, widths[0]), nn.ReLU()]
    last = widths[0]
    for stage, width in enumerate(widths):
        for block in range(blocks):
            layers.append(BasicBlock(last, width, 2 if stage and not block else 1, norm, padded))
            last = width
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: Norm, padded: bool) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            _conv(in_channels, out_channels, 3, stride),
            normalisation(norm, out_channels),
            nn.ReLU(),
            _conv(out_channels, out_channels, 3),
            normalisation(norm, out_channels),
        )
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels or stride != 1:
            self.shortcut = (
                PaddedShortcut(out_channels - in_channels, stride)
                if padded
                else nn.Sequential(_conv(in_channels, out_channels, 1, stride), normalisation(norm, out_channels))
            )

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W')."""
        return F.relu(self.branch(images) + self.shortcut(images))


class PaddedShortcut(nn.Module):
    """A shortcut without parameters, option A of the paper."""

    def __init__(self, more: int, stride: int) -> None:
        super().__init__()
        self.more, self.stride = more, stride

    def forward(self, images: Tensor) -> Tensor:
        """Every ``stride``-th position, padded with zero channels on both sides."""
        before = self.more // 2
        return F.pad(images[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.more - before))


def resnet18(in_channels: int, norm: Norm = "batch") -> nn.Sequential:
    """Four stages of two blocks, 64 to 512 channels: 11.2 million parameters."""
    return resnet(in_channels, (64, 128, 256, 512), 2, norm, padded=False)


def resnet32(in_channels: int, norm: Norm = "batch") -> nn.Sequential:
    """Three stages of five blocks, 16 to 64 channels: 0.46 million parameters."""
    return resnet(in_channels, (16, 32, 64), 5, norm, padded=True)


def _conv(in_channels: int, out_channels: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, size, stride=stride, padding=size // 2, bias=False)
