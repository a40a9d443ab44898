"""A small convolutional network and the classifier heads that sit on its features."""

from __future__ import annotations

from typing import Literal, Protocol, get_args

import torch.nn.functional as F
from torch import Tensor, nn

import nckernels

Features = Literal["linear", "relu"]
LossName = Literal["ce", "normface", "ntce", "nonl"]

FEATURES: tuple[str, ...] = get_args(Features)
LOSSES: tuple[str, ...] = get_args(LossName)


class ConvNet(nn.Module):
    """Three blocks of convolution, batch norm and ReLU, then the average over positions; for small images.

    Args:
        in_channels: channels of the images.
        dim: size d of the features.
        features: ``"linear"`` maps the pooled activations to d signed features. ``"relu"`` returns d pooled
            activations as they are, the usual last layer of image networks. Those are never negative, and so
            are their cosines: a simplex, whose cosines are -1/(K-1), is out of their reach, and the best they
            can do is an orthogonal frame.
        width: channels of the first block.
    """

    def __init__(self, in_channels: int, dim: int, features: Features = "linear", width: int = 16) -> None:
        super().__init__()
        pooled = 4 * width if features == "linear" else dim
        self.blocks = nn.Sequential(
            _block(in_channels, width, stride=1),
            _block(width, 2 * width, stride=2),
            _block(2 * width, pooled, stride=1),
        )
        self.head = nn.Linear(pooled, dim) if features == "linear" else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) -> features (N, d)."""
        features: Tensor = self.head(self.blocks(images).mean(dim=(2, 3)))
        return features


def _block(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


class Head(Protocol):
    """What the trainer asks of a classifier: :class:`nckernels.PrototypeClassifier` is one."""

    @property
    def prototypes(self) -> Tensor: ...

    def __call__(self, features: Tensor) -> Tensor:
        """Features (N, d) -> logits (N, K)."""

    def loss(self, features: Tensor, target: Tensor) -> Tensor:
        """Scalar training loss."""


class CrossEntropyHead(nn.Linear):
    """The baseline: a linear layer with bias under cross-entropy; its weight rows are the prototypes."""

    @property
    def prototypes(self) -> Tensor:
        return self.weight

    def loss(self, features: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(self(features), target)


def make_head(
    loss: LossName, dim: int, num_classes: int, temperature: float
) -> CrossEntropyHead | nckernels.PrototypeClassifier:
    """The classifier that trains with ``loss``; cross-entropy has no temperature."""
    if loss == "ce":
        return CrossEntropyHead(dim, num_classes)
    return nckernels.PrototypeClassifier(dim, num_classes, loss=loss, temperature=temperature)
