"""A small convolutional network and what sits on its features: classifier heads, or SupCon's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nckernels
from nckernels import geometry

Features = Literal["linear", "mlp", "relu"]
LossName = Literal["ce", "normface", "ntce", "nonl", "scl", "etf-dr", "dlp", "psc-star"]
Assignment = Literal["dynamic", "static"]

FEATURES: tuple[str, ...] = get_args(Features)
LOSSES: tuple[str, ...] = get_args(LossName)
ASSIGNMENTS: tuple[str, ...] = get_args(Assignment)

UNIFORMITY = 1e-2  # lambda of PSC*, [DLP] Table 8


class ConvNet(nn.Module):
    """Three blocks of convolution, batch norm and ReLU, then the average over positions; for small images.

    Args:
        in_channels: channels of the images.
        dim: size d of the features.
        features: ``"linear"`` maps the pooled activations to d signed features, ``"mlp"`` does so with a
            hidden layer, the usual projection head of contrastive training. ``"relu"`` returns d pooled
            activations as they are, the usual last layer of image networks. Those are never negative, and so
            are their cosines: a simplex, whose cosines are -1/(K-1), is out of their reach, and the best they
            can do is an orthogonal frame.
        width: channels of the first block.
    """

    def __init__(self, in_channels: int, dim: int, features: Features = "linear", width: int = 16) -> None:
        super().__init__()
        pooled = dim if features == "relu" else 4 * width
        self.blocks = nn.Sequential(
            _block(in_channels, width, stride=1),
            _block(width, 2 * width, stride=2),
            _block(2 * width, pooled, stride=1),
        )
        self.head: nn.Module = nn.Identity()
        if features == "linear":
            self.head = nn.Linear(pooled, dim)
        elif features == "mlp":
            self.head = nn.Sequential(nn.Linear(pooled, pooled), nn.ReLU(inplace=True), nn.Linear(pooled, dim))

    def encode(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) -> what lies below the head: pooled activations (N, D)."""
        pooled: Tensor = self.blocks(images).mean(dim=(2, 3))
        return pooled

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) -> features (N, d)."""
        features: Tensor = self.head(self.encode(images))
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


class PSCStarHead(CrossEntropyHead):
    """PSC*: cross-entropy plus 1e-2 times the uniformity of the prototypes' directions ([DLP] section 4.4.4).

    PSC is the usual linear layer with bias, whose rows have any length. The uniformity leaves out the pairs of a
    prototype with itself, which [DLP] Eq. 5 has.
    """

    def loss(self, features: Tensor, target: Tensor) -> Tensor:
        return super().loss(features, target) + UNIFORMITY * nckernels.uniformity_loss(self.weight)


class ContrastiveHead(nckernels.FixedPrototypes):
    """Nothing to learn: SupCon on the features, and the class means of the last ``fit`` as the classifier."""

    def loss(self, features: Tensor, target: Tensor) -> Tensor:
        """Of all views of the batch: features (B, V, d)."""
        return nckernels.supcon_loss(features, target, temperature=self.temperature)


AnyHead = CrossEntropyHead | nckernels.PrototypeClassifier | ContrastiveHead | nckernels.FixedPrototypeHead


def make_head(
    loss: LossName,
    dim: int,
    num_classes: int,
    temperature: float,
    device: torch.device | None = None,
    *,
    assignment: Assignment = "dynamic",
    refresh_every: int = 1,
) -> AnyHead:
    """The classifier that trains with ``loss``.

    Args:
        temperature: of the losses with cosine logits: not of cross-entropy, PSC* and dot regression.
        assignment: of ``"dlp"``, whose points the classes first get at random. ``"static"`` leaves it at that.
        refresh_every: iterations between two assignments; once an epoch in [DLP].

    Raises:
        ValueError: for ``"etf-dr"`` with dim < num_classes - 1, where there is no simplex.
    """
    if loss == "etf-dr":
        points = geometry.simplex_etf(num_classes, dim)
        return nckernels.FixedPrototypeHead(points, assignment="static").to(device)
    if loss == "dlp":
        points = geometry.uniform_prototypes(num_classes, dim)[torch.randperm(num_classes)]
        return nckernels.FixedPrototypeHead(points, assignment=assignment, refresh_every=refresh_every).to(device)
    if loss == "psc-star":
        return PSCStarHead(dim, num_classes).to(device)
    if loss == "scl":
        return ContrastiveHead(num_classes, dim, temperature=temperature, device=device)
    if loss == "ce":
        return CrossEntropyHead(dim, num_classes).to(device)
    return nckernels.PrototypeClassifier(dim, num_classes, loss=loss, temperature=temperature).to(device)


def make_loss(head: AnyHead, queue: int, decay: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The training loss of a head: its own, or one that sees ``queue`` past features or running denominators too.

    Raises:
        ValueError: for both at once, and for losses whose sums do not run over the samples.
    """
    if not queue and not decay:
        return head.loss
    if queue and decay:
        raise ValueError("queue, decay: expected one of them")
    criterion: Any = getattr(head, "criterion", head)
    if isinstance(head, ContrastiveHead):
        criterion = nckernels.SupConLoss(temperature=head.temperature)
    try:
        if decay:
            return nckernels.RunningDenominatorLoss(criterion, decay)
        prototypes = head.prototypes
        return nckernels.QueueLoss(
            criterion, nckernels.FeatureQueue(queue, prototypes.shape[1], device=prototypes.device)
        )
    except TypeError as error:
        raise ValueError(f"{'decay' if decay else 'queue'}: {error}") from error
