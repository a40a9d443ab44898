"""The losses as modules that own their prototypes, and a classifier to train with them."""

from __future__ import annotations

import math
from typing import Any, Literal, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from . import _checks, contrastive, functional
from ._common import REDUCTIONS, Reduction, unit
from .backends.base import Direction
from .primitive import DIRECTIONS


class LossOptions(TypedDict, total=False):
    """Keyword arguments that all loss modules share; see :class:`NONLLoss`."""

    prototypes: Tensor | None
    temperature: float | Tensor
    weight: Tensor | None
    ignore_index: int
    reduction: Reduction
    device: torch.device | str | None
    dtype: torch.dtype | None


class _PrototypeLoss(nn.Module):
    """What the three losses share: prototypes, temperature and the options of F.cross_entropy."""

    prototypes: Tensor
    temperature: float | Tensor
    weight: Tensor | None

    def __init__(
        self,
        in_features: int | None = None,
        num_classes: int | None = None,
        *,
        prototypes: Tensor | None = None,
        temperature: float | Tensor = 0.1,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if prototypes is None:
            if in_features is None or num_classes is None:
                raise ValueError("give in_features and num_classes, or prototypes of shape (K, d)")
            _checks.positive_integer("in_features", in_features)
            _checks.positive_integer("num_classes", num_classes)
            prototypes = nn.Parameter(torch.empty(num_classes, in_features, device=device, dtype=dtype))
            nn.init.normal_(prototypes, std=1.0 / math.sqrt(in_features))  # rows of about unit norm
        _checks.matrix("prototypes", prototypes, "K", "d")
        if in_features not in (None, prototypes.shape[1]) or num_classes not in (None, prototypes.shape[0]):
            raise ValueError(
                f"prototypes of shape {tuple(prototypes.shape)} do not fit "
                f"num_classes={num_classes} and in_features={in_features}"
            )
        _checks.choice("reduction", reduction, REDUCTIONS)
        _checks.integer("ignore_index", ignore_index)
        _checks.positive_scalar("temperature", temperature, prototypes)
        if weight is not None:
            _checks.vector("weight", weight, prototypes.shape[0], prototypes)
        _register(self, "prototypes", prototypes)
        _register(self, "temperature", temperature)
        self.register_buffer("weight", weight)
        self.ignore_index, self.reduction = ignore_index, reduction

    def _shared(self) -> dict[str, Any]:
        """The keyword arguments that every loss function takes."""
        return {
            "temperature": self.temperature,
            "weight": self.weight,
            "ignore_index": self.ignore_index,
            "reduction": self.reduction,
        }

    def extra_repr(self) -> str:
        k, d = self.prototypes.shape
        shown = f"in_features={d}, num_classes={k}, temperature={_shown(self.temperature)}"
        return f"{shown}, reduction={self.reduction!r}"


class NONLLoss(_PrototypeLoss):
    r"""Module form of :func:`nckernels.nonl_loss` ([NCD] Eq. 5).

    Args:
        in_features: d; with ``num_classes`` it makes learnable prototypes, initialised to nearly unit rows.
        num_classes: K.
        prototypes: instead of making them: a Parameter (K, d) to share, for example ``head.weight``, or a
            plain tensor, which stays fixed (a buffer), for example :func:`nckernels.geometry.simplex_etf`.
        temperature: a number; a tensor for a buffer; a Parameter to learn it.
        weight, ignore_index, reduction, direction: as in the function.
        device, dtype: of prototypes made here.

    Shape:
        input (M, d), target (M,), sample_weight (M,) or None -> scalar, or (M,) for ``reduction="none"``.

    Example:
        >>> criterion = nckernels.NONLLoss(64, 10, temperature=0.1)
        >>> loss = criterion(torch.randn(32, 64), torch.randint(10, (32,)))
    """

    def __init__(
        self,
        in_features: int | None = None,
        num_classes: int | None = None,
        *,
        direction: Direction = "class",
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(in_features, num_classes, **options)
        _checks.choice("direction", direction, DIRECTIONS)
        self.direction = direction

    def forward(self, input: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """The loss of features (M, d) with class indices (M,)."""
        return functional.nonl_loss(
            input, self.prototypes, target, sample_weight=sample_weight, direction=self.direction, **self._shared()
        )


class NTCELoss(_PrototypeLoss):
    """Module form of :func:`nckernels.ntce_loss` ([NCD] Eq. 4); arguments as in :class:`NONLLoss`."""

    def forward(self, input: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """The loss of features (M, d) with class indices (M,)."""
        return functional.ntce_loss(input, self.prototypes, target, sample_weight=sample_weight, **self._shared())


class NormFaceLoss(_PrototypeLoss):
    """Module form of :func:`nckernels.normface_loss` ([NCD] Eq. 3).

    Arguments as in :class:`NONLLoss`, and the function's ``label_smoothing``, ``angular_margin`` and
    ``cosine_margin``.
    """

    def __init__(
        self,
        in_features: int | None = None,
        num_classes: int | None = None,
        *,
        label_smoothing: float = 0.0,
        angular_margin: float = 0.0,
        cosine_margin: float = 0.0,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(in_features, num_classes, **options)
        _checks.in_range("label_smoothing", label_smoothing, 0.0, 1.0)
        _checks.in_range("angular_margin", angular_margin, 0.0, math.pi)
        _checks.in_range("cosine_margin", cosine_margin, 0.0, 2.0)
        self.label_smoothing = label_smoothing
        self.angular_margin, self.cosine_margin = angular_margin, cosine_margin

    def forward(self, input: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """The loss of features (M, d) with class indices (M,)."""
        return functional.normface_loss(
            input,
            self.prototypes,
            target,
            sample_weight=sample_weight,
            label_smoothing=self.label_smoothing,
            angular_margin=self.angular_margin,
            cosine_margin=self.cosine_margin,
            **self._shared(),
        )


LOSSES: dict[str, type[_PrototypeLoss]] = {"nonl": NONLLoss, "ntce": NTCELoss, "normface": NormFaceLoss}


class PrototypeClassifier(nn.Module):
    r"""A cosine classifier: forward gives logits, :meth:`loss` trains it.

    Takes the place of the last ``nn.Linear`` of a network. The decision is the nearest prototype in angle.

    Args:
        in_features: d.
        num_classes: K.
        loss: ``"nonl"``, ``"ntce"`` or ``"normface"``.
        **options: ``temperature``, ``weight``, ``prototypes`` and the others of :class:`LossOptions`.

    Shape:
        input (M, d) or (..., d) -> logits (M, K) or (..., K), :math:`\cos(z_i, w_c) / \tau`.

    Example:
        >>> head = nckernels.PrototypeClassifier(64, 10, loss="nonl")
        >>> x, y = torch.randn(32, 64), torch.randint(10, (32,))
        >>> head.loss(x, y).backward()
        >>> head(x).argmax(1)
    """

    def __init__(
        self,
        in_features: int | None = None,
        num_classes: int | None = None,
        *,
        loss: Literal["nonl", "ntce", "normface"] = "nonl",
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__()
        _checks.choice("loss", loss, tuple(LOSSES))
        self.criterion = LOSSES[loss](in_features, num_classes, **options)

    @property
    def prototypes(self) -> Tensor:
        """(K, d), as learnt; not normalised."""
        return self.criterion.prototypes

    def forward(self, input: Tensor) -> Tensor:
        # Norms in the accumulation dtype: those of float16 rows can exceed what float16 holds.
        rows, columns = (unit(x).to(x.dtype) for x in (input, self.prototypes))
        return F.linear(rows, columns) / self.criterion.temperature

    def loss(self, input: Tensor, target: Tensor) -> Tensor:
        """The training loss of features (M, d) with labels (M,)."""
        loss = self.criterion(input, target)
        assert isinstance(loss, Tensor)
        return loss


class ContrastiveOptions(TypedDict, total=False):
    """Keyword arguments that the contrastive loss modules share; see :class:`SupConLoss`."""

    temperature: float | Tensor
    reduction: Reduction


class _ContrastiveLoss(nn.Module):
    """What the losses without prototypes share."""

    temperature: float | Tensor

    def __init__(self, *, temperature: float | Tensor = 0.1, reduction: Reduction = "mean") -> None:
        super().__init__()
        like = temperature if isinstance(temperature, Tensor) else torch.empty(0)
        _checks.positive_scalar("temperature", temperature, like)
        _checks.choice("reduction", reduction, REDUCTIONS)
        _register(self, "temperature", temperature)
        self.reduction: Reduction = reduction

    def extra_repr(self) -> str:
        return f"temperature={_shown(self.temperature)}, reduction={self.reduction!r}"


class _AnchorLoss(_ContrastiveLoss):
    """What SupCon and InfoNCE share beyond that."""

    def __init__(
        self, *, ignore_index: int = -100, decoupled: bool = False, **options: Unpack[ContrastiveOptions]
    ) -> None:
        super().__init__(**options)
        _checks.integer("ignore_index", ignore_index)
        self.ignore_index, self.decoupled = ignore_index, decoupled


class SupConLoss(_AnchorLoss):
    """Module form of :func:`nckernels.supcon_loss` ([NCD] Eq. 2).

    Args:
        temperature: a number; a tensor for a buffer; a Parameter to learn it.
        ignore_index, reduction, decoupled: as in the function.

    Shape:
        input (N, d) or (B, V, d), target (N,) or (B,) or None -> scalar, or (N,), (B, V).
    """

    def forward(self, input: Tensor, target: Tensor | None = None, sample_weight: Tensor | None = None) -> Tensor:
        """The loss of features with labels, or of views without."""
        return contrastive.supcon_loss(
            input,
            target,
            temperature=self.temperature,
            ignore_index=self.ignore_index,
            sample_weight=sample_weight,
            reduction=self.reduction,
            decoupled=self.decoupled,
        )


class PrototypeLoss(_ContrastiveLoss):
    """Module form of :func:`nckernels.prototype_loss` ([NCD] Eq. 6); arguments as in :class:`SupConLoss`."""

    def __init__(
        self, *, num_classes: int | None = None, ignore_index: int = -100, **options: Unpack[ContrastiveOptions]
    ) -> None:
        super().__init__(**options)
        _checks.integer("ignore_index", ignore_index)
        if num_classes is not None:
            _checks.positive_integer("num_classes", num_classes)
        self.num_classes, self.ignore_index = num_classes, ignore_index

    def forward(self, input: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """The loss of features with labels."""
        return contrastive.prototype_loss(
            input,
            target,
            temperature=self.temperature,
            num_classes=self.num_classes,
            ignore_index=self.ignore_index,
            sample_weight=sample_weight,
            reduction=self.reduction,
        )


class InfoNCELoss(_AnchorLoss):
    """Module form of :func:`nckernels.info_nce_loss`; arguments as in :class:`SupConLoss`."""

    def forward(
        self, query: Tensor, key: Tensor, target: Tensor | None = None, sample_weight: Tensor | None = None
    ) -> Tensor:
        """The loss of queries (M, d) against keys (K, d)."""
        return contrastive.info_nce_loss(
            query,
            key,
            target,
            temperature=self.temperature,
            ignore_index=self.ignore_index,
            sample_weight=sample_weight,
            reduction=self.reduction,
            decoupled=self.decoupled,
        )


class CLIPLoss(_ContrastiveLoss):
    """Module form of :func:`nckernels.clip_loss`, temperature 0.07; arguments as in :class:`SupConLoss`."""

    def __init__(
        self, *, temperature: float | Tensor = 0.07, reduction: Reduction = "mean", decoupled: bool = False
    ) -> None:
        super().__init__(temperature=temperature, reduction=reduction)
        self.decoupled = decoupled

    def forward(self, a: Tensor, b: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """The loss of pairs (N, d), (N, d)."""
        return contrastive.clip_loss(
            a,
            b,
            temperature=self.temperature,
            sample_weight=sample_weight,
            reduction=self.reduction,
            decoupled=self.decoupled,
        )


class UniformityLoss(nn.Module):
    """Module form of :func:`nckernels.uniformity_loss`."""

    def __init__(self, *, t: float = 2.0) -> None:
        super().__init__()
        _checks.positive_scalar("t", t, torch.empty(0))
        self.t = t

    def forward(self, input: Tensor) -> Tensor:
        """The potential of features (N, d)."""
        return contrastive.uniformity_loss(input, t=self.t)

    def extra_repr(self) -> str:
        return f"t={self.t:g}"


class AlignmentLoss(nn.Module):
    """Module form of :func:`nckernels.alignment_loss`."""

    def __init__(self, *, alpha: float = 2.0, reduction: Reduction = "mean") -> None:
        super().__init__()
        _checks.positive_scalar("alpha", alpha, torch.empty(0))
        _checks.choice("reduction", reduction, REDUCTIONS)
        self.alpha, self.reduction = alpha, reduction

    def forward(self, input: Tensor, other: Tensor) -> Tensor:
        """The distance of pairs (N, d), (N, d)."""
        return contrastive.alignment_loss(input, other, alpha=self.alpha, reduction=self.reduction)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:g}, reduction={self.reduction!r}"


def _shown(temperature: float | Tensor) -> str:
    if isinstance(temperature, nn.Parameter):
        return "learnable"
    if isinstance(temperature, Tensor):
        return "a tensor" if temperature.is_meta else f"{temperature.item():g}"
    return f"{temperature:g}"


def _register(module: nn.Module, name: str, value: object) -> None:
    """A Parameter as a parameter, a plain tensor as a buffer (fixed), anything else as an attribute."""
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        module.register_buffer(name, value)
    else:
        setattr(module, name, value)
