"""Heads, by the name of their loss: each has a loss of the network's features and classifies them."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import nckernels
from nckernels import geometry
from nckernels.distributed import collectives, groups

from . import checkpoint
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
    "dlp": ("momentum", "t", "refreshes", "points"),
}
"""The valid keys of ``loss.options``, by ``loss.name``. Of dlp: ``momentum`` of the class averages; ``t`` of the
Gaussian potential that spreads the points; ``refreshes``, assignments per epoch ([DLP] Fig. 3b); ``points``, the folder
of a run whose prototypes are the points, instead of uniform ones ([DLP] Table 8, "Ours*")."""


class Head(Protocol):
    """The interface of a head: a module whose state dict has everything that training changes."""

    @property
    def prototypes(self) -> Tensor:
        """(K, d), one row per class."""

    def __call__(self, features: Tensor) -> Tensor:
        """Features (N, d) -> logits (N, K)."""

    def loss(self, features: Tensor, target: Tensor) -> Tensor:
        """The scalar training loss of features (b, d), of contrastive heads (b, V, d), with labels (b,).

        With a process group it is the number of ranks times this rank's share of the loss of the global batch. The
        average over the ranks, of losses and of gradients, is then that of the global batch.
        """


class LinearHead(nn.Linear):
    """A linear layer with bias; its weight rows are the prototypes."""

    def __init__(self, dim: int, num_classes: int, process_group: Group) -> None:
        super().__init__(dim, num_classes)
        self.process_group = process_group

    @property
    def prototypes(self) -> Tensor:
        return self.weight

    def _wide(self, features: Tensor) -> Tensor:
        """Logits in float32 or wider, also under autocast."""
        logits: Tensor = self(features)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _mean(self, losses: Tensor) -> Tensor:
        """The mean of (b,) losses over the samples of all ranks."""
        ranks = groups.resolve(self.process_group)
        if ranks is None:
            return losses.mean()
        with torch.no_grad():
            samples = collectives.all_reduce(losses.new_tensor(float(len(losses))), ranks)
        return losses.sum() * (ranks.size / samples)


class CrossEntropyHead(LinearHead):
    """The baseline: cross-entropy of a linear layer, plus ``uniformity`` times the uniformity loss of its unit rows.

    With a factor of 1e-2 it is PSC* ([DLP] section 4.4.4), whose rows have any length. Unlike [DLP] Eq. 5, the
    uniformity loss leaves out the pairs of a prototype with itself.
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
        logits = self._wide(features)
        loss = self._mean(F.cross_entropy(logits, target, label_smoothing=self.label_smoothing, reduction="none"))
        return loss + self.uniformity * nckernels.uniformity_loss(self.weight) if self.uniformity else loss


class BinaryHead(LinearHead):
    """Any number of labels per sample: the mean binary cross-entropy over the classes."""

    def loss(self, features: Tensor, target: Tensor) -> Tensor:
        """``target``: (b, K) of zeros and ones."""
        logits = self._wide(features)
        losses = F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype), reduction="none")
        return self._mean(losses.mean(1))


class CosineHead(nn.Module):
    """Learnt prototypes and cosine logits, trained by ``objective``: NormFace, NTCE or NONL, optionally with a queue or
    running denominators, which are part of the state dict."""

    def __init__(self, objective: nn.Module) -> None:
        super().__init__()
        self.objective = objective

    @property
    def criterion(self) -> Any:
        """The loss without queue or running denominators; it has the prototypes."""
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
    """A head without parameters: a loss of the features, and the class means of the last ``fit`` as classifier."""

    def __init__(self, num_classes: int, dim: int, objective: nn.Module, *, temperature: float) -> None:
        super().__init__(num_classes, dim, temperature=temperature)
        self.objective = objective

    def loss(self, features: Tensor, target: Tensor) -> Tensor:
        """The loss of all views of the batch, features (b, V, d)."""
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
    start: bool = True,
) -> AnyHead:
    """The classifier that trains with a loss, initialised from torch's global random state.

    Args:
        dim: size d of the features.
        steps_per_epoch: training steps after which dlp reassigns its points.
        process_group: the ranks whose samples the loss sees. They share the rows of a queue.
        start: whether to read the run of ``loss.options.points``; False if a state dict will be loaded anyway.

    Fixed points are those of rank 0, so all ranks of a distributed run must call this together.

    Raises:
        ValueError: naming the key, for unknown options, values out of range, a queue or decay of a loss without one,
            and etf-dr with fewer than K - 1 dimensions, where there is no simplex.
    """
    for name in loss.options:
        if name not in OPTIONS[loss.name]:
            raise ValueError(
                f"loss.options.{name}: the options of {loss.name} are {', '.join(OPTIONS[loss.name]) or 'none'}"
                f"{nearest(name, OPTIONS[loss.name])}"
            )
    try:
        head = _make(loss, dim, num_classes, max(1, steps_per_epoch), process_group, device, start)
    except (TypeError, ValueError) as error:
        if any(str(error).startswith(f"{name} ") for name in loss.options):  # the losses name their argument first
            raise ValueError(f"loss.options.{error}") from error
        raise
    return head.to(device)


def _make(
    loss: Loss, dim: int, num_classes: int, steps: int, group: Group, device: torch.device | str | None, start: bool
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
        points = _of_rank_0(geometry.simplex_etf(num_classes, dim), device)
        return nckernels.FixedPrototypeHead(points, assignment="static", process_group=group)
    if loss.name == "dlp":
        order = torch.randperm(num_classes)
        source, t, refreshes = options.pop("points", ""), options.pop("t", 2.0), options.pop("refreshes", 1.0)
        if source:
            points = _of_run(source, num_classes, dim) if start else torch.ones(num_classes, dim)
        else:
            points = _uniform(num_classes, dim, t, device)
        return nckernels.FixedPrototypeHead(
            _of_rank_0(points[order], device), assignment=loss.assignment, process_group=group,
            refresh_every=max(1, round(steps / _positive("refreshes", refreshes))), **options,
        )  # fmt: skip
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
    """The criterion, wrapped with a queue or running denominators if the recipe has them."""
    try:
        if loss.decay:
            return nckernels.RunningDenominatorLoss(criterion, loss.decay)
        if loss.queue:
            ranks = groups.resolve(criterion.process_group)
            share = loss.queue if ranks is None else math.ceil(loss.queue / ranks.size)
            return nckernels.QueueLoss(criterion, nckernels.FeatureQueue(share, dim))
    except (TypeError, ValueError) as error:
        raise ValueError(f"loss.{'decay' if loss.decay else 'queue'}: {error}") from error
    return cast(nn.Module, criterion)


def _uniform(num_classes: int, dim: int, t: float, device: torch.device | str | None) -> Tensor:
    """Points of [DLP], cached, because with thousands of classes they take minutes."""
    folder: Path | None = cache_folder()
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
    except OSError:  # then nothing is cached
        folder = None
    progress = num_classes > 1000 and sys.stderr.isatty()
    points = geometry.uniform_prototypes(num_classes, dim, t, cache=folder, device=device, progress=progress)
    return points.cpu()


def _of_run(source: object, num_classes: int, dim: int) -> Tensor:
    """The prototypes of another run's classifier."""
    path = Path(str(source))
    path = path / "checkpoint.pt" if path.is_dir() else path
    try:
        head = checkpoint.load(path)["head"]
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"loss.options.points: there is no checkpoint {path}") from None
    except ValueError as error:
        raise ValueError(f"loss.options.points: {error}") from None
    shapes = {key: tuple(value.shape) for key, value in head.items() if isinstance(value, Tensor)}
    for key, shape in shapes.items():
        if key.rpartition(".")[2] in ("weight", "prototypes") and shape == (num_classes, dim):
            return cast(Tensor, head[key])
    raise ValueError(
        f"loss.options.points: expected prototypes of shape {(num_classes, dim)} in {path}, got {shapes or 'none'}"
    )


def _of_rank_0(points: Tensor, device: torch.device | str | None) -> Tensor:
    """Broadcast the points of rank 0: other machines may round differently."""
    points = points.to(device)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast(points, src=0)
    return points


def _positive(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value < math.inf:
        raise ValueError(f"loss.options.{name}: expected a positive number, got {value!r}")
    return float(value)


def _share(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
        raise ValueError(f"loss.options.{name}: expected a number from 0 to 1, got {value!r}")
    return float(value)
