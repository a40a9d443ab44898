"""Classifiers by the name of their loss: what a network's features are trained and tested with."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nckernels
from nckernels import geometry
from nckernels.distributed import collectives, groups

from .cache import cache_folder
from .recipe import Loss
from .typed import nearest

UNIFORMITY = 1e-2  # lambda of PSC*, [DLP] Table 8

Group = Literal["world"] | None

OPTIONS: dict[str, tuple[str, ...]] = {
    "ce": ("label_smoothing",),
    "bce": (),
    "psc-star": ("label_smoothing", "uniformity"),
    "normface": ("label_smoothing", "angular_margin", "cosine_margin", "class_fraction"),
    "ntce": (),
    "nonl": ("direction",),
    "scl": ("decoupled",),
    "prototype": (),
    "etf-dr": (),
    "dlp": ("momentum", "t"),
}
"""What ``loss.options`` may hold, by ``loss.name``."""


class Head(Protocol):
    """What the trainer asks of a classifier. It is a module whose state dict has all that training changes."""

    @property
    def prototypes(self) -> Tensor:
        """(K, d), a row for each class."""

    def __call__(self, features: Tensor) -> Tensor:
        """Features (N, d) -> logits (N, K)."""

    def loss(self, features: Tensor, target: Tensor) -> Tensor:
        """The scalar training loss of features (b, d), of contrastive heads (b, V, d), with labels (b,).

        With a process group it is the number of ranks times this rank's share of the global batch's loss, so that the
        average over the ranks, of losses and of gradients, is the global batch's.
        """


class LinearHead(nn.Linear):
    """A linear layer with bias; its weight rows are the prototypes."""

    def __init__(self, dim: int, num_classes: int, process_group: Group) -> None:
        super().__init__(dim, num_classes)
        self.process_group = process_group

    @property
    def prototypes(self) -> Tensor:
        return self.weight

    def _mean(self, losses: Tensor) -> Tensor:
        """Over the samples of all ranks, of (b,) losses."""
        ranks = groups.resolve(self.process_group)
        if ranks is None:
            return losses.mean()
        with torch.no_grad():
            samples = collectives.all_reduce(losses.new_tensor(float(len(losses))), ranks)
        return losses.sum() * (ranks.size / samples)


class CrossEntropyHead(LinearHead):
    """The baseline: cross-entropy of a linear layer, plus ``uniformity`` times that of the rows' directions.

    With a uniformity of 1e-2 it is PSC* ([DLP] section 4.4.4), whose rows have any length. The uniformity leaves out
    the pairs of a prototype with itself, which [DLP] Eq. 5 has.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        process_group: Group = None,
        *,
        label_smoothing: float = 0.0,
        uniformity: float = 0.0,
    ) -> None:
        super().__init__(dim, num_classes, process_group)
        self.label_smoothing = _share("label_smoothing", label_smoothing)
        self.uniformity = _share("uniformity", uniformity)

    def loss(self, features: Tensor, target: Tensor) -> Tensor:
        losses = F.cross_entropy(self(features), target, label_smoothing=self.label_smoothing, reduction="none")
        loss = self._mean(losses)
        return loss + self.uniformity * nckernels.uniformity_loss(self.weight) if self.uniformity else loss


class BinaryHead(LinearHead):
    """Any number of labels a sample: the mean binary cross-entropy of the classes."""

    def loss(self, features: Tensor, target: Tensor) -> Tensor:
        """``target``: (b, K) of zeros and ones."""
        logits = self(features)
        losses = F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype), reduction="none")
        return self._mean(losses.mean(1))


class CosineHead(nn.Module):
    """Learnt prototypes and cosine logits, trained by ``objective``: NormFace, NTCE or NONL, or one of them with past
    features or running denominators. Its state dict has these."""

    def __init__(self, objective: nn.Module) -> None:
        super().__init__()
        self.objective = objective

    @property
    def criterion(self) -> Any:
        """The loss without a past, which has the prototypes."""
        return getattr(self.objective, "criterion", self.objective)

    @property
    def prototypes(self) -> Tensor:
        return cast(Tensor, self.criterion.prototypes)

    def forward(self, features: Tensor) -> Tensor:
        """Features (N, d) -> logits (N, K)."""
        return cast(Tensor, self.criterion(features))

    def loss(self, features: Tensor, target: Tensor) -> Tensor:
        return cast(Tensor, self.objective(features, target))


class ContrastiveHead(nckernels.FixedPrototypes):
    """Nothing to learn: a loss of the features, and the class means of the last ``fit`` as the classifier."""

    def __init__(self, num_classes: int, dim: int, objective: nn.Module, *, temperature: float) -> None:
        super().__init__(num_classes, dim, temperature=temperature)
        self.objective = objective

    def loss(self, features: Tensor, target: Tensor) -> Tensor:
        """Of all views of the batch: features (b, V, d)."""
        return cast(Tensor, self.objective(features, target))


AnyHead = CrossEntropyHead | BinaryHead | CosineHead | ContrastiveHead | nckernels.FixedPrototypeHead


def make_head(
    loss: Loss,
    dim: int,
    num_classes: int,
    *,
    steps_per_epoch: int = 1,
    process_group: Group = None,
    device: torch.device | str | None = None,
) -> AnyHead:
    """The classifier that trains with a loss, initialised from torch's global random state.

    Args:
        dim: size d of the features.
        steps_per_epoch: of training, after which dlp assigns its points anew.
        process_group: whose samples the loss sees.

    Raises:
        ValueError: naming the key, for options that the loss does not have, values that they cannot have, a queue or
            decay of a loss without one, and etf-dr with fewer than K - 1 dimensions, where there is no simplex.
    """
    for name in loss.options:
        if name not in OPTIONS[loss.name]:
            raise ValueError(
                f"loss.options.{name}: {loss.name} has {', '.join(OPTIONS[loss.name]) or 'no options'}"
                f"{nearest(name, OPTIONS[loss.name])}"
            )
    try:
        head = _make(loss, dim, num_classes, max(1, steps_per_epoch), process_group, device)
    except (TypeError, ValueError) as error:
        if any(str(error).startswith(f"{name} ") for name in loss.options):  # the losses name their argument first
            raise ValueError(f"loss.options.{error}") from error
        raise
    return head.to(device)


def _make(
    loss: Loss, dim: int, num_classes: int, steps: int, group: Group, device: torch.device | str | None
) -> AnyHead:
    options: dict[str, Any] = dict(loss.options)
    if loss.name in ("ce", "psc-star", "bce", "etf-dr", "dlp") and (loss.queue or loss.decay):
        raise ValueError(f"loss.{'queue' if loss.queue else 'decay'}: {loss.name} contrasts no samples, expected 0")
    if loss.name == "ce":
        return CrossEntropyHead(dim, num_classes, group, **options)
    if loss.name == "psc-star":
        return CrossEntropyHead(dim, num_classes, group, **{"uniformity": UNIFORMITY, **options})
    if loss.name == "bce":
        return BinaryHead(dim, num_classes, group)
    if loss.name == "etf-dr":
        if dim < num_classes - 1:
            raise ValueError(
                f"model.dim: a simplex of {num_classes} classes needs features of at least {num_classes - 1} "
                f"dimensions, got {dim}"
            )
        points = geometry.simplex_etf(num_classes, dim)
        return nckernels.FixedPrototypeHead(points, assignment="static", process_group=group)
    if loss.name == "dlp":
        points = _uniform(num_classes, dim, options.pop("t", 2.0), device)[torch.randperm(num_classes)]
        return nckernels.FixedPrototypeHead(
            points, assignment=loss.assignment, refresh_every=steps, process_group=group, **options
        )
    shared: dict[str, Any] = {"temperature": loss.temperature, "process_group": group}
    if loss.name == "scl":
        objective = _with_past(nckernels.SupConLoss(**shared, **options), loss, dim)
        return ContrastiveHead(num_classes, dim, objective, temperature=loss.temperature)
    if loss.name == "prototype":
        objective = _with_past(nckernels.PrototypeLoss(num_classes=num_classes, **shared), loss, dim)
        return ContrastiveHead(num_classes, dim, objective, temperature=loss.temperature)
    kinds: Mapping[str, Any] = {
        "normface": nckernels.NormFaceLoss,
        "ntce": nckernels.NTCELoss,
        "nonl": nckernels.NONLLoss,
    }
    return CosineHead(_with_past(kinds[loss.name](dim, num_classes, **shared, **options), loss, dim))


def _with_past(criterion: Any, loss: Loss, dim: int) -> nn.Module:
    """The criterion, or one that sees past features or running denominators too."""
    try:
        if loss.decay:
            return nckernels.RunningDenominatorLoss(criterion, loss.decay)
        if loss.queue:
            return nckernels.QueueLoss(criterion, nckernels.FeatureQueue(loss.queue, dim))
    except (TypeError, ValueError) as error:
        raise ValueError(f"loss.{'decay' if loss.decay else 'queue'}: {error}") from error
    return cast(nn.Module, criterion)


def _uniform(num_classes: int, dim: int, t: float, device: torch.device | str | None) -> Tensor:
    """Points of [DLP], from the cache if they are there: with thousands of classes they take minutes."""
    folder: Path | None = cache_folder()
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
    except OSError:  # costs the cache and nothing else
        folder = None
    progress = num_classes > 1000 and sys.stderr.isatty()
    points = geometry.uniform_prototypes(num_classes, dim, t, cache=folder, device=device, progress=progress)
    return points.cpu()


def _share(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
        raise ValueError(f"loss.options.{name}: expected a number from 0 to 1, got {value!r}")
    return float(value)
