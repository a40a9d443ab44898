"""The one primitive: positive logits and a masked log-sum-exp of cosine similarities.

Every loss of the package is a few lines on top of :func:`cosine_lse`, or of its shortcut :func:`contrast`.
"""

from __future__ import annotations

import math
from typing import Literal, cast, overload

import torch
from torch import Tensor

from . import _checks, operators
from ._common import Reduction, reduce
from .backends import registry
from .backends.base import Direction, Exclude, Inputs, Reduced, Spec, accumulation_dtype, number

DIRECTIONS = ("class", "instance", "both")
EXCLUDES = ("none", "target", "self", "same_label")

Bias = Tensor | None
BiasPair = tuple[Bias, Bias]


@overload
def cosine_lse(
    features: Tensor,
    prototypes: Tensor,
    target: Tensor,
    inv_temperature: float | Tensor,
    *,
    direction: Literal["class", "instance"] = ...,
    exclude: Exclude = ...,
    logit_bias: Bias = ...,
    present_only: bool = ...,
    ignore_index: int = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def cosine_lse(
    features: Tensor,
    prototypes: Tensor,
    target: Tensor,
    inv_temperature: float | Tensor,
    *,
    direction: Literal["both"],
    exclude: Exclude = ...,
    logit_bias: BiasPair | None = ...,
    present_only: bool = ...,
    ignore_index: int = ...,
) -> tuple[tuple[Tensor, Tensor], Tensor]: ...
def cosine_lse(
    features: Tensor,
    prototypes: Tensor,
    target: Tensor,
    inv_temperature: float | Tensor,
    *,
    direction: Direction = "class",
    exclude: Exclude = "none",
    logit_bias: Bias | BiasPair = None,
    present_only: bool = False,
    ignore_index: int = -100,
) -> tuple[Tensor | tuple[Tensor, Tensor], Tensor]:
    r"""Masked log-sum-exp of scaled cosine similarities, and the positive logits, in bounded memory.

    With :math:`t_{jc} = \beta \cos(z_j, w_c)` for features :math:`z` and prototypes :math:`w`:

    .. math::
        \text{class: } \mathrm{lse}_c = \log \sum_{j \in A_c} e^{t_{jc} + b_j} \qquad
        \text{instance: } \mathrm{lse}_j = \log \sum_{c \in A_j} e^{t_{jc} + b_c} \qquad
        \mathrm{pos}_j = t_{j, y_j}

    where ``exclude`` says which entries the sets :math:`A` leave out. The (M, K) matrix :math:`t` is never
    stored: beyond inputs, gradients (in float32 while they accumulate) and O(M + K) vectors, the call uses
    at most the workspace (:func:`nckernels.set_workspace`), whatever M and K are.

    Args:
        features: (M, d), float32, bfloat16, float16 or float64; M may be 0. Normalised inside, as by
            :func:`torch.nn.functional.normalize` (``eps`` 1e-12; 2**-14 in float16).
        prototypes: (K, d), same dtype and device; normalised inside. Under ``exclude`` "self" or
            "same_label" give ``features`` itself to compare samples with samples: one tensor in both places
            makes the matrix symmetric, which saves up to half of the work.
        target: (M,) integers: the index of each sample's positive prototype (for ``exclude="same_label"``
            any label).
        inv_temperature: :math:`\beta > 0`, a number or a 0-dimensional float tensor, which may require grad.
        direction: ``"class"`` sums over the samples ([NCD] Eqs. 4-5), ``"instance"`` over the classes
            ([NCD] Eq. 3), ``"both"`` does both in one pass.
        exclude: entries left out of the sums: ``"none"``; ``"target"``, those with :math:`y_j = c` (negatives
            only); ``"self"``, the diagonal (features against themselves, K = M); ``"same_label"``, those
            with :math:`y_j = y_c` (K = M, ``target`` labels both sides; the positive is then the diagonal).
        logit_bias: term added to the logits along the summed axis: (M,) in the class direction, (K,) in the
            instance direction, a pair of them (either may be None) for both; may require grad.
        present_only: compute the class direction only for classes that occur in ``target``; the others get
            -inf. Exact for losses that anchor at the samples' classes, and much faster when K > M.
        ignore_index: samples with this target take no part: in no sum, with pos 0, instance lse -inf and no
            gradient. Where rows and columns are the same samples (``"self"``, ``"same_label"``), their
            columns are left out too.

    Returns:
        ``(lse, pos)``: lse of shape (K,) or (M,), for ``"both"`` the pair of them; pos of shape (M,). Float32
        (float64 for float64 features). An empty sum is -inf and passes no gradient.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected. On CUDA, where looking at
            values would stall, targets out of range trip a device-side assertion instead; on devices other than
            that and the CPU nothing notices them.
        NotImplementedError: on double backward, forward-mode differentiation and ``torch.func`` transforms,
            except under backend ``"reference"``, which supports them all.

    Example:
        >>> z, w = torch.randn(8, 16), torch.randn(3, 16)
        >>> y = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
        >>> lse, pos = nckernels.cosine_lse(z, w, y, 10.0, exclude="target")  # one value per class
        >>> nonl = (lse[y] - pos).mean()
    """
    _checks.choice("direction", direction, DIRECTIONS)
    _checks.choice("exclude", exclude, EXCLUDES)
    _checks.features_and_prototypes(features, prototypes)
    target = _checks.target(target, features)
    _checks.positive_scalar("inv_temperature", inv_temperature, features)
    _checks.integer("ignore_index", ignore_index)
    if exclude in ("self", "same_label") and features.shape[0] != prototypes.shape[0]:
        raise ValueError(
            f"exclude={exclude!r} compares samples with samples and needs as many prototypes as features, "
            f"got {prototypes.shape[0]} and {features.shape[0]}"
        )
    if present_only and (direction != "class" or exclude in ("self", "same_label")):
        raise ValueError(
            "present_only needs direction='class' and exclude 'none' or 'target', "
            f"got direction={direction!r} and exclude={exclude!r}"
        )
    sample_bias, class_bias = _split_bias(logit_bias, direction, features, prototypes)

    symmetric = features is prototypes and direction != "both" and exclude in ("self", "same_label")
    spec = Spec(direction, exclude, present_only, int(ignore_index), registry.get_workspace(features.device), symmetric)
    features, prototypes = autocast(features), autocast(prototypes)
    dtype = accumulation_dtype(features.dtype)
    biases = (None if bias is None else bias.to(dtype) for bias in (sample_bias, class_bias))
    inputs = Inputs(features, prototypes, target, scalar(inv_temperature, features), *biases)
    class_lse, instance_lse, pos = operators.run(inputs, spec, registry.resolve(features.device, features.dtype))
    if direction == "both":
        return (cast(Tensor, class_lse), cast(Tensor, instance_lse)), pos
    return cast(Tensor, class_lse if direction == "class" else instance_lse), pos


def contrast(
    features: Tensor,
    prototypes: Tensor,
    target: Tensor,
    inv_temperature: float | Tensor,
    *,
    direction: Direction,
    exclude: Literal["none", "target"],
    ignore_index: int,
    weight: Tensor | None,
    reduction: Reduction,
    of_nothing: float = math.nan,
) -> Tensor:
    """``lse - pos`` of :func:`cosine_lse`, reduced; the lse is that of each sample's class, its own, or their mean.

    Arguments are as there and checked already, ``target`` is int64; ``present_only`` in the class direction. A sample
    is 0 where ignored and ``-pos`` where its sum is empty. ``weight`` (M,) and ``reduction`` are as in
    F.cross_entropy; ``of_nothing`` is what the mean of no samples is.

    The gradient of a sum or mean is known, up to a factor, when the loss is; where the backend can, both are computed
    in one step. For plain tensors the call is one node of the graph, or else two. Other losses ask for their
    :func:`step` first.
    """
    features, prototypes = autocast(features), autocast(prototypes)
    spec = Spec(direction, exclude, direction == "class", int(ignore_index), registry.get_workspace(features.device))
    backend = registry.resolve(features.device, features.dtype)
    reduced = Reduced(weight, reduction == "mean", of_nothing)
    loss = _step(features, prototypes, target, inv_temperature, reduced, spec, backend, each=reduction == "none")
    if loss is not None:
        return loss
    inputs = Inputs(features, prototypes, target, scalar(inv_temperature, features), None, None)
    if backend != registry.REFERENCE and operators.plain(*inputs, weight):
        loss = operators.run_contrast(inputs, spec, backend)
    else:
        class_lse, instance_lse, pos = operators.run(inputs, spec, backend)
        loss = operators.contrast(cast(Tensor, class_lse), cast(Tensor, instance_lse), pos, target, spec)
    return reduce(loss, target != ignore_index, weight, reduction, of_nothing)


def step(
    features: Tensor,
    prototypes: Tensor,
    target: Tensor,
    inv_temperature: float | Tensor,
    reduced: Reduced,
    *,
    direction: Direction,
    exclude: Exclude,
    ignore_index: int,
    each: bool = False,
) -> Tensor | None:
    """A loss of checked arguments, ``target`` int64, in one node of the graph: reduced, and then its gradient is
    computed with it, or (M,) that of ``each`` sample. None where the backend has none, or something of the call needs
    the single pieces.

    One tensor in both places is compared with itself, see :meth:`nckernels.backends.base.Backend.step`.
    """
    symmetric = features is prototypes and exclude in ("self", "same_label")
    features, other = autocast(features), autocast(prototypes)
    present_only = direction == "class" and not symmetric
    spec = Spec(direction, exclude, present_only, int(ignore_index), registry.get_workspace(features.device), symmetric)
    backend = registry.resolve(features.device, features.dtype)
    prototypes = features if symmetric else other
    return _step(features, prototypes, target, inv_temperature, reduced, spec, backend, each)


def _step(
    features: Tensor,
    prototypes: Tensor,
    target: Tensor,
    inv_temperature: float | Tensor,
    reduced: Reduced,
    spec: Spec,
    backend: str,
    each: bool,
) -> Tensor | None:
    weights = reduced.weight, reduced.class_weight
    in_vain = not each and not (torch.is_grad_enabled() and (features.requires_grad or prototypes.requires_grad))
    if (
        in_vain
        or (each and len(features) == 0)
        or backend == registry.REFERENCE
        or any(weight is not None and weight.requires_grad for weight in weights)  # which a step does not know
        or not operators.plain(features, prototypes, target, inv_temperature, *weights)
        or not registry.can_step(backend, features, prototypes, spec, each or reduced.has_options)
    ):
        return None
    if each and not torch.is_grad_enabled():  # then nothing is kept for a backward pass
        features, prototypes = features.detach(), prototypes.detach()
        inv_temperature = inv_temperature.detach() if isinstance(inv_temperature, Tensor) else inv_temperature
    if spec.symmetric:
        prototypes = operators.one_gradient(features)
    node = operators.Losses if each else operators.Step
    return node.apply(features, prototypes, inv_temperature, target, reduced, spec, backend)


def autocast(operand: Tensor) -> Tensor:
    """In the dtype of autocast where that is on; float64 stays."""
    if operand.dtype == torch.float64 or not _checks.autocast_enabled(operand):
        return operand
    return operand.to(torch.get_autocast_dtype(operand.device.type))


def scalar(value: float | Tensor, features: Tensor) -> Tensor:
    """A 0-dimensional tensor in the accumulation dtype."""
    dtype = accumulation_dtype(features.dtype)
    if isinstance(value, Tensor):
        return value.to(dtype)
    if torch.compiler.is_compiling():
        # torch.full would make the number a constant of the graph: a graph for each value of the temperature.
        return torch.ones((), dtype=dtype, device=features.device) * value
    value = number(value, features.dtype)  # infinite rather than torch.full's own error where float32 overflows
    return torch.full((), value, dtype=dtype, device=features.device)


def _split_bias(bias: Bias | BiasPair, direction: Direction, features: Tensor, prototypes: Tensor) -> BiasPair:
    """``logit_bias`` as (over the samples, over the classes), checked."""
    if direction == "both":
        if bias is not None and not (isinstance(bias, tuple) and len(bias) == 2):
            raise TypeError(
                "logit_bias must be a pair (over the samples, over the classes) for direction='both', "
                f"got {type(bias).__name__}"
            )
        pair: BiasPair = (None, None) if bias is None else bias
    else:
        pair = (cast(Bias, bias), None) if direction == "class" else (None, cast(Bias, bias))
    for value, size in zip(pair, (features.shape[0], prototypes.shape[0]), strict=True):
        if value is not None:
            _checks.vector("logit_bias", value, size, features)
    return pair
