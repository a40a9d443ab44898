"""The losses as modules that own their prototypes, and a classifier to train with them."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _checks, contrastive, functional
from ._common import REDUCTIONS, Reduction, unit
from .backends.base import Direction
from .distributed.groups import GroupLike, check
from .primitive import DIRECTIONS


class _Loss(nn.Module):
    """What all losses share: whose samples they contrast."""

    def __init__(self, process_group: GroupLike) -> None:
        super().__init__()
        check(process_group)
        self.process_group = process_group

    def __deepcopy__(self, memo: dict[int, Any]) -> _Loss:
        """A copy (of a model, for averaging its weights) spans the same processes: groups cannot be copied."""
        copy = self.__class__.__new__(self.__class__)
        memo[id(self)] = copy
        memo[id(self.process_group)] = self.process_group
        copy.__dict__.update({name: deepcopy(value, memo) for name, value in self.__dict__.items()})
        return copy

    def extra_repr(self) -> str:
        if self.process_group is None:
            return ""
        return f"process_group={self.process_group if isinstance(self.process_group, str) else '...'!r}"


class _OfPrototypes(_Loss):
    """What losses with prototypes share: prototypes, the options of F.cross_entropy, and prediction."""

    prototypes: Tensor
    weight: Tensor | None

    @_checks.options_by_name
    def __init__(
        self,
        in_features: int | None = None,
        num_classes: int | None = None,
        *,
        prototypes: Tensor | None = None,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        process_group: GroupLike = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(process_group)
        if prototypes is None:
            if in_features is None or num_classes is None:
                raise ValueError("give in_features and num_classes, or prototypes=, a tensor of shape (K, d)")
            _checks.positive_integer("in_features", in_features)
            _checks.positive_integer("num_classes", num_classes)
            prototypes = nn.Parameter(torch.empty(num_classes, in_features, device=device, dtype=dtype))
            _draw(prototypes)
        _checks.matrix("prototypes", prototypes, "K", "d", sharded=process_group is not None)
        if in_features not in (None, prototypes.shape[1]) or num_classes not in (None, prototypes.shape[0]):
            raise ValueError(
                f"prototypes of shape {tuple(prototypes.shape)} do not fit "
                f"num_classes={num_classes} and in_features={in_features}"
            )
        _checks.choice("reduction", reduction, REDUCTIONS)
        _checks.integer("ignore_index", ignore_index)
        if weight is not None:
            _checks.vector("weight", weight, prototypes.shape[0], prototypes)
        _register(self, "prototypes", prototypes)
        self.register_buffer("weight", weight)
        self.ignore_index, self.reduction = int(ignore_index), reduction

    def forward(self, input: Tensor, target: Tensor | None = None, sample_weight: Tensor | None = None) -> Tensor:
        """The loss of features (M, d) or (..., d) with class indices (M,) or (...); without them the logits."""
        prototypes = self.prototypes_like(input)
        if target is None:
            return self._logits(input, prototypes)
        return self._loss(input, prototypes, target, sample_weight)

    def reset_parameters(self) -> None:
        """Draw learnable prototypes anew, as after ``to_empty()`` of a module made on the meta device."""
        if isinstance(self.prototypes, nn.Parameter):
            _draw(self.prototypes)

    def prototypes_like(self, input: Tensor) -> Tensor:
        """The prototypes, fixed ones in the dtype of the input: FSDP2's mixed precision casts all else."""
        if "prototypes" in self._buffers and isinstance(input, Tensor):
            return self.prototypes.to(input.dtype)
        return self.prototypes

    def _loss(self, input: Tensor, prototypes: Tensor, target: Tensor, sample_weight: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _logits(self, input: Tensor, prototypes: Tensor) -> Tensor:
        return cosines(input, prototypes)

    def _shared(self) -> dict[str, Any]:
        """The keyword arguments that every loss function takes."""
        return {
            "weight": self.weight,
            "ignore_index": self.ignore_index,
            "reduction": self.reduction,
            "process_group": self.process_group,
        }

    def extra_repr(self) -> str:
        k, d = self.prototypes.shape
        shown = f"in_features={d}, num_classes={k}", self._shown(), f"reduction={self.reduction!r}"
        return _joined(*shown, _changed(self, ignore_index=-100), super().extra_repr())

    def _shown(self) -> str:
        return ""


class _PrototypeLoss(_OfPrototypes):
    """What the losses that contrast share beyond that: temperature and sparse gradients."""

    temperature: float | Tensor

    @_checks.options_by_name
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
        sparse: bool = False,
        process_group: GroupLike = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_features, num_classes, prototypes=prototypes, weight=weight, ignore_index=ignore_index,
            reduction=reduction, process_group=process_group, device=device, dtype=dtype,
        )  # fmt: skip
        _checks.temperature(temperature, self.prototypes)
        _register(self, "temperature", temperature if isinstance(temperature, Tensor) else float(temperature))
        self.sparse = sparse

    def _logits(self, input: Tensor, prototypes: Tensor) -> Tensor:
        return super()._logits(input, prototypes) / self.temperature

    def _shared(self) -> dict[str, Any]:
        return {**super()._shared(), "temperature": self.temperature, "sparse": self.sparse}

    def _shown(self) -> str:
        return _joined(f"temperature={_shown(self.temperature)}", _changed(self, sparse=False))


class NONLLoss(_PrototypeLoss):
    r"""Module form of :func:`nckernels.nonl_loss` ([NCD] Eq. 5).

    Args:
        in_features: d; with ``num_classes`` it makes learnable prototypes, initialised to nearly unit rows.
        num_classes: K.
        prototypes: instead of making them: a Parameter (K, d) to share, for example ``head.weight``, or a
            plain tensor, which stays fixed (a buffer), for example :func:`nckernels.geometry.simplex_etf`, and
            takes the dtype of the input.
        temperature: a number; a tensor for a buffer; a Parameter to learn it, 0-dimensional or of shape (1,),
            which is what ``fully_shard`` takes.
        weight, ignore_index, reduction, direction, sparse, process_group: as in the function.
        device, dtype: of prototypes made here.

    Shape:
        input (M, d), target (M,), sample_weight (M,) or None -> scalar, or (M,) for ``reduction="none"``; or (..., d)
        and (...), as in the function.
        input (M, d) or (..., d) alone -> logits (M, K) or (..., K), as :class:`PrototypeClassifier`.

    Example:
        >>> criterion = nckernels.NONLLoss(64, 10, temperature=0.1)
        >>> x, y = torch.randn(32, 64), torch.randint(10, (32,))
        >>> criterion(x, y).backward()
        >>> criterion(x).shape  # logits, for prediction
        torch.Size([32, 10])

        Prototypes that another module owns:

        >>> head = nn.Linear(64, 10, bias=False)
        >>> criterion = nckernels.NONLLoss(prototypes=head.weight, temperature=nn.Parameter(torch.tensor([0.1])))
        >>> criterion(x, y).backward()
        >>> head.weight.grad.shape, criterion.temperature.grad.shape
        (torch.Size([10, 64]), torch.Size([1]))
    """

    @_checks.options_by_name
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
        direction: Direction = "class",
        sparse: bool = False,
        process_group: GroupLike = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_features, num_classes, prototypes=prototypes, temperature=temperature, weight=weight,
            ignore_index=ignore_index, reduction=reduction, sparse=sparse, process_group=process_group,
            device=device, dtype=dtype,
        )  # fmt: skip
        _checks.choice("direction", direction, DIRECTIONS)
        _checks.sparse(self.sparse, direction)
        self.direction = direction

    def _shown(self) -> str:
        return _joined(super()._shown(), _changed(self, direction="class"))

    def _loss(self, input: Tensor, prototypes: Tensor, target: Tensor, sample_weight: Tensor | None) -> Tensor:
        return functional.nonl_loss(
            input, prototypes, target, sample_weight=sample_weight, direction=self.direction, **self._shared()
        )


class NTCELoss(_PrototypeLoss):
    """Module form of :func:`nckernels.ntce_loss` ([NCD] Eq. 4); arguments as in :class:`NONLLoss`.

    Example:
        >>> criterion = nckernels.NTCELoss(64, 10, temperature=0.2)
        >>> criterion(torch.randn(32, 64), torch.randint(10, (32,))).backward()
        >>> criterion.prototypes.grad.shape
        torch.Size([10, 64])
    """

    def _loss(self, input: Tensor, prototypes: Tensor, target: Tensor, sample_weight: Tensor | None) -> Tensor:
        return functional.ntce_loss(input, prototypes, target, sample_weight=sample_weight, **self._shared())


class NormFaceLoss(_PrototypeLoss):
    """Module form of :func:`nckernels.normface_loss` ([NCD] Eq. 3).

    Arguments as in :class:`NONLLoss`, and the function's ``label_smoothing``, ``angular_margin``, ``cosine_margin``,
    ``class_fraction`` and ``generator``.

    Example:
        >>> arcface = nckernels.NormFaceLoss(64, 10, temperature=1 / 64, angular_margin=0.5)
        >>> arcface(torch.randn(32, 64), torch.randint(10, (32,))).backward()
        >>> arcface(torch.randn(5, 64)).argmax(1).shape  # prediction has no margin
        torch.Size([5])
    """

    @_checks.options_by_name
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
        label_smoothing: float = 0.0,
        angular_margin: float = 0.0,
        cosine_margin: float = 0.0,
        class_fraction: float = 1.0,
        generator: torch.Generator | None = None,
        sparse: bool = False,
        process_group: GroupLike = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_features, num_classes, prototypes=prototypes, temperature=temperature, weight=weight,
            ignore_index=ignore_index, reduction=reduction, sparse=sparse, process_group=process_group,
            device=device, dtype=dtype,
        )  # fmt: skip
        _checks.in_range("label_smoothing", label_smoothing, 0.0, 1.0)
        _checks.in_range("angular_margin", angular_margin, 0.0, math.pi)
        _checks.in_range("cosine_margin", cosine_margin, 0.0, 2.0)
        _checks.sampling(class_fraction, label_smoothing, self.sparse)
        self.label_smoothing = float(label_smoothing)
        self.class_fraction, self.generator = float(class_fraction), generator
        self.angular_margin, self.cosine_margin = float(angular_margin), float(cosine_margin)

    def _shown(self) -> str:
        defaults = {"label_smoothing": 0.0, "angular_margin": 0.0, "cosine_margin": 0.0, "class_fraction": 1.0}
        return _joined(super()._shown(), _changed(self, **defaults))

    def _loss(self, input: Tensor, prototypes: Tensor, target: Tensor, sample_weight: Tensor | None) -> Tensor:
        return functional.normface_loss(
            input,
            prototypes,
            target,
            sample_weight=sample_weight,
            label_smoothing=self.label_smoothing,
            angular_margin=self.angular_margin,
            cosine_margin=self.cosine_margin,
            class_fraction=self.class_fraction,
            generator=self.generator,
            **self._shared(),
        )


class DotRegressionLoss(_OfPrototypes):
    """Module form of :func:`nckernels.dot_regression_loss` ([DLP] Eq. 6).

    Arguments as in :class:`NONLLoss`, without ``temperature`` and ``sparse``. Without labels it gives cosines.
    Prototypes are meant to be fixed, a plain tensor: learnt ones can gather in one point, with all features.
    :class:`nckernels.FixedPrototypeHead` can also choose which prototype belongs to which class.

    Example:
        >>> points = nckernels.geometry.simplex_etf(10, 64)  # a plain tensor: fixed
        >>> criterion = nckernels.DotRegressionLoss(prototypes=points)
        >>> list(criterion.parameters())
        []
        >>> criterion(torch.randn(32, 64, requires_grad=True), torch.randint(10, (32,))).backward()
    """

    def _loss(self, input: Tensor, prototypes: Tensor, target: Tensor, sample_weight: Tensor | None) -> Tensor:
        return functional.dot_regression_loss(input, prototypes, target, sample_weight=sample_weight, **self._shared())


LOSSES: dict[str, type[_PrototypeLoss]] = {"nonl": NONLLoss, "ntce": NTCELoss, "normface": NormFaceLoss}


class PrototypeClassifier(nn.Module):
    r"""A cosine classifier: it gives logits for features, and their loss if the labels are given too.

    Takes the place of the last ``nn.Linear`` of a network. The decision is the nearest prototype in angle.

    Training and prediction are both calls of the module, so that whatever wraps modules works with it: ``fully_shard``
    of the classifier, of its ``criterion`` or of the network that holds it, DistributedDataParallel, activation
    checkpointing, ``torch.compile``, parametrizations, forward hooks.

    Args:
        in_features: d.
        num_classes: K.
        loss: ``"nonl"``, ``"ntce"`` or ``"normface"``.
        prototypes, temperature, weight, ignore_index, reduction, sparse, process_group, device, dtype: as in
            :class:`NONLLoss`.

    Options that only one loss has are in its module, :class:`NONLLoss` or :class:`NormFaceLoss`, which is a classifier
    as well: without labels it gives logits.

    Shape:
        input (M, d) or (..., d) -> logits (M, K) or (..., K), :math:`\cos(z_i, w_c) / \tau`.
        input (M, d), target (M,), sample_weight (M,) or None -> the loss, a scalar, or (M,) for ``reduction="none"``;
        or (..., d) and (...).

    Example:
        >>> head = nckernels.PrototypeClassifier(64, 10, loss="nonl")
        >>> x, y = torch.randn(32, 64), torch.randint(10, (32,))
        >>> head(x, y).backward()
        >>> head(x).argmax(1).shape
        torch.Size([32])
    """

    @_checks.options_by_name
    def __init__(
        self,
        in_features: int | None = None,
        num_classes: int | None = None,
        *,
        loss: Literal["nonl", "ntce", "normface"] = "nonl",
        prototypes: Tensor | None = None,
        temperature: float | Tensor = 0.1,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        sparse: bool = False,
        process_group: GroupLike = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _checks.choice("loss", loss, tuple(LOSSES))
        self.criterion = LOSSES[loss](
            in_features, num_classes, prototypes=prototypes, temperature=temperature, weight=weight,
            ignore_index=ignore_index, reduction=reduction, sparse=sparse, process_group=process_group,
            device=device, dtype=dtype,
        )  # fmt: skip

    @property
    def prototypes(self) -> Tensor:
        """(K, d), as learnt; not normalised."""
        return self.criterion.prototypes

    def forward(self, input: Tensor, target: Tensor | None = None, sample_weight: Tensor | None = None) -> Tensor:
        """The logits of features (..., d), or their loss with labels (...)."""
        result: Tensor = self.criterion(input, target, sample_weight)
        return result

    def loss(self, input: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """``self(input, target, sample_weight)``: the training loss of features (..., d) with labels (...)."""
        _checks.is_tensor("target", target)
        result: Tensor = self(input, target, sample_weight)
        return result


class _ContrastiveLoss(_Loss):
    """What the losses without prototypes share."""

    temperature: float | Tensor

    def __init__(
        self, *, temperature: float | Tensor = 0.1, reduction: Reduction = "mean", process_group: GroupLike = None
    ) -> None:
        super().__init__(process_group)
        like = temperature if isinstance(temperature, Tensor) else torch.empty(0)
        _checks.temperature(temperature, like)
        _checks.choice("reduction", reduction, REDUCTIONS)
        _register(self, "temperature", temperature if isinstance(temperature, Tensor) else float(temperature))
        self.reduction: Reduction = reduction

    def extra_repr(self) -> str:
        return _joined(f"temperature={_shown(self.temperature)}, reduction={self.reduction!r}", super().extra_repr())


class _AnchorLoss(_ContrastiveLoss):
    """What SupCon and InfoNCE share beyond that."""

    @_checks.options_by_name
    def __init__(
        self,
        *,
        temperature: float | Tensor = 0.1,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        decoupled: bool = False,
        process_group: GroupLike = None,
    ) -> None:
        super().__init__(temperature=temperature, reduction=reduction, process_group=process_group)
        _checks.integer("ignore_index", ignore_index)
        self.ignore_index, self.decoupled = int(ignore_index), decoupled

    def extra_repr(self) -> str:
        return _joined(super().extra_repr(), _changed(self, ignore_index=-100, decoupled=False))


class SupConLoss(_AnchorLoss):
    """Module form of :func:`nckernels.supcon_loss` ([NCD] Eq. 2).

    Args:
        temperature: a number; a tensor for a buffer; a Parameter to learn it.
        ignore_index, reduction, decoupled, process_group: as in the function.

    Shape:
        input (N, d) or (B, V, d), target (N,) or (B,) or None -> scalar, or (N,), (B, V); or (..., d) and (...).

    Example:
        >>> criterion = nckernels.SupConLoss(temperature=0.1)
        >>> views, y = torch.randn(32, 2, 64, requires_grad=True), torch.randint(10, (32,))
        >>> criterion(views, y).backward()
        >>> simclr = criterion(views)
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
            process_group=self.process_group,
        )


class PrototypeLoss(_ContrastiveLoss):
    """Module form of :func:`nckernels.prototype_loss` ([NCD] Eq. 6); arguments as in :class:`SupConLoss`.

    Example:
        >>> criterion = nckernels.PrototypeLoss(num_classes=10)
        >>> criterion(torch.randn(32, 64, requires_grad=True), torch.randint(10, (32,))).backward()
    """

    @_checks.options_by_name
    def __init__(
        self,
        *,
        temperature: float | Tensor = 0.1,
        num_classes: int | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        process_group: GroupLike = None,
    ) -> None:
        super().__init__(temperature=temperature, reduction=reduction, process_group=process_group)
        _checks.integer("ignore_index", ignore_index)
        if num_classes is not None:
            _checks.positive_integer("num_classes", num_classes)
            num_classes = int(num_classes)
        self.num_classes, self.ignore_index = num_classes, int(ignore_index)

    def extra_repr(self) -> str:
        return _joined(super().extra_repr(), _changed(self, num_classes=None, ignore_index=-100))

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
            process_group=self.process_group,
        )


class InfoNCELoss(_AnchorLoss):
    """Module form of :func:`nckernels.info_nce_loss`; arguments as in :class:`SupConLoss`.

    Shape:
        query (M, d), key (K, d), target (M,) or None, sample_weight (M,) or None -> scalar, or (M,). Without ``target``
        the first M keys are the positives.

    Example:
        >>> criterion = nckernels.InfoNCELoss(temperature=0.07)
        >>> query, key = torch.randn(32, 64, requires_grad=True), torch.randn(32, 64)
        >>> criterion(query, key).backward()
    """

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
            process_group=self.process_group,
        )


class CLIPLoss(_ContrastiveLoss):
    """Module form of :func:`nckernels.clip_loss`, temperature 0.07; arguments as in :class:`SupConLoss`.

    Example:
        >>> criterion = nckernels.CLIPLoss(temperature=nn.Parameter(torch.tensor(0.07)))
        >>> criterion(torch.randn(32, 64), torch.randn(32, 64)).backward()
        >>> criterion.temperature.grad.shape
        torch.Size([])
    """

    @_checks.options_by_name
    def __init__(
        self,
        *,
        temperature: float | Tensor = 0.07,
        reduction: Reduction = "mean",
        decoupled: bool = False,
        process_group: GroupLike = None,
    ) -> None:
        super().__init__(temperature=temperature, reduction=reduction, process_group=process_group)
        self.decoupled = decoupled

    def extra_repr(self) -> str:
        return _joined(super().extra_repr(), _changed(self, decoupled=False))

    def forward(self, a: Tensor, b: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """The loss of pairs (N, d), (N, d)."""
        return contrastive.clip_loss(
            a,
            b,
            temperature=self.temperature,
            sample_weight=sample_weight,
            reduction=self.reduction,
            decoupled=self.decoupled,
            process_group=self.process_group,
        )


class UniformityLoss(_Loss):
    """Module form of :func:`nckernels.uniformity_loss`.

    Example:
        >>> x, y = torch.randn(2, 32, 64, requires_grad=True)  # two views (Wang & Isola 2020)
        >>> alignment, uniformity = nckernels.AlignmentLoss(), nckernels.UniformityLoss()
        >>> (alignment(x, y) + (uniformity(x) + uniformity(y)) / 2).backward()
    """

    @_checks.options_by_name
    def __init__(self, *, t: float = 2.0, process_group: GroupLike = None) -> None:
        super().__init__(process_group)
        _checks.positive_scalar("t", t, torch.empty(0))
        self.t = float(t)

    def forward(self, input: Tensor) -> Tensor:
        """The potential of features (N, d)."""
        return contrastive.uniformity_loss(input, t=self.t, process_group=self.process_group)

    def extra_repr(self) -> str:
        return _joined(f"t={self.t:g}", super().extra_repr())


class AlignmentLoss(_Loss):
    """Module form of :func:`nckernels.alignment_loss`.

    Example:
        >>> x = torch.randn(32, 64)
        >>> nckernels.AlignmentLoss()(x, 4 * x)  # lengths do not matter
        tensor(0.)
    """

    @_checks.options_by_name
    def __init__(self, *, alpha: float = 2.0, reduction: Reduction = "mean", process_group: GroupLike = None) -> None:
        super().__init__(process_group)
        _checks.positive_scalar("alpha", alpha, torch.empty(0))
        _checks.choice("reduction", reduction, REDUCTIONS)
        self.alpha, self.reduction = float(alpha), reduction

    def forward(self, input: Tensor, other: Tensor) -> Tensor:
        """The distance of pairs (N, d), (N, d), or (..., d) both."""
        return contrastive.alignment_loss(
            input, other, alpha=self.alpha, reduction=self.reduction, process_group=self.process_group
        )

    def extra_repr(self) -> str:
        return _joined(f"alpha={self.alpha:g}, reduction={self.reduction!r}", super().extra_repr())


def _draw(prototypes: nn.Parameter) -> None:
    """Rows of about unit norm."""
    nn.init.normal_(prototypes, std=1.0 / math.sqrt(prototypes.shape[1]))


def cosines(input: Tensor, prototypes: Tensor) -> Tensor:
    """(..., K) cosines of features (..., d) with prototypes (K, d)."""
    if not (isinstance(input, Tensor) and _checks.is_dtensor(input)):
        _checks.is_tensor("prototypes", prototypes)
        _checks.columns("input", input, prototypes.shape[1], "the prototypes have")
    # Norms in the accumulation dtype: those of float16 rows can exceed what float16 holds.
    rows, columns = (unit(x).to(x.dtype) for x in (input, prototypes))
    return F.linear(rows, columns)


def _joined(*shown: str) -> str:
    return ", ".join(part for part in shown if part)


def _changed(module: nn.Module, **defaults: object) -> str:
    """The options of a module that are not at their defaults."""
    values = {name: getattr(module, name) for name, default in defaults.items() if getattr(module, name) != default}
    return _joined(
        *(f"{name}={value:g}" if type(value) is float else f"{name}={value!r}" for name, value in values.items())
    )


def _shown(temperature: float | Tensor) -> str:
    if isinstance(temperature, nn.Parameter):
        return "learnable"
    if isinstance(temperature, Tensor):
        return "a tensor" if temperature.is_meta else f"{temperature.item():g}"
    return f"{temperature:g}"


def _register(module: nn.Module, name: str, value: object) -> None:
    """A Parameter as a parameter, a plain tensor as a buffer (fixed), anything else as an attribute."""
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        if value.grad_fn is not None:
            raise ValueError(
                f"{name} must be a Parameter or a tensor without history, got the result of {value.grad_fn.name()}, "
                f"which a module does not compute anew; give {name}.detach() to keep it fixed, or call the function"
            )
        module.register_buffer(name, value)
    else:
        setattr(module, name, value)
