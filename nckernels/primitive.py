"""The one primitive: positive logits and a masked log-sum-exp of cosine similarities.

Every loss of the package is a few lines on top of :func:`cosine_lse`. This file holds what is common to all
backends: the public function, the operators ``nckernels::cosine_lse`` and ``nckernels::cosine_lse_backward``
with their fake (shape) implementations and the autograd formula, and the checks of values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _checks
from .backends import reference, registry
from .backends.base import (
    Direction,
    Exclude,
    Forward,
    Inputs,
    Needs,
    OutputGrads,
    Spec,
    accumulation_dtype,
    bad_target,
    bad_temperature,
)

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
        TypeError, ValueError: naming the argument, what came and what was expected. On a GPU, where looking
            at values would stall, targets out of range trip a device-side assertion instead.
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
    _checks.is_tensor("features", features)
    autocast = _checks.autocast_enabled(features)
    _checks.features_and_prototypes(features, prototypes, mixed=autocast)
    _checks.target(target, features)
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
    if autocast and features.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(features.device.type)
        features, prototypes = features.to(dtype), prototypes.to(dtype)
    acc = accumulation_dtype(features.dtype)
    if isinstance(inv_temperature, Tensor):
        beta = inv_temperature.to(acc)
    else:
        beta = torch.full((), inv_temperature, dtype=acc, device=features.device)
    inputs = Inputs(
        features,
        prototypes,
        target.long(),
        beta,
        None if sample_bias is None else sample_bias.to(acc),
        None if class_bias is None else class_bias.to(acc),
    )
    backend = registry.resolve(features.device, features.dtype)
    spec = Spec(direction, exclude, present_only, ignore_index, registry.get_workspace(), symmetric)
    class_lse, instance_lse, pos = _run(inputs, spec, backend)
    if direction == "both":
        return (cast(Tensor, class_lse), cast(Tensor, instance_lse)), pos
    return cast(Tensor, class_lse if direction == "class" else instance_lse), pos


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


def _run(inputs: Inputs, spec: Spec, backend: str) -> tuple[Tensor | None, Tensor | None, Tensor]:
    if backend == registry.REFERENCE:
        with _no_autocast(inputs.features):
            if not torch.compiler.is_compiling():
                _check_values(inputs, spec)
            return reference.cosine_lse(inputs, spec)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    arguments = (*inputs, *_spec_args(spec), backend, keep)
    compiling = torch.compiler.is_compiling()
    if not compiling:
        _no_transforms(inputs)
    if compiling or not _plain(inputs):
        result = torch.ops.nckernels.cosine_lse(*arguments)
    else:
        result = _Eager.apply(*arguments) if keep else _forward(*arguments)
    return cast(tuple[Tensor, Tensor, Tensor], result[:3])


def _plain(inputs: Inputs) -> bool:
    """Whether nobody but autograd needs to know of the call: no tensor subclass, no tracing or logging mode."""
    kinds = (Tensor, torch.nn.Parameter)
    tensors = (x for x in inputs if x is not None)
    return torch._C._len_torch_dispatch_stack() == 0 and all(type(x) in kinds and not x.is_meta for x in tensors)


# --- operators --------------------------------------------------------------------------------------------

_SPEC_SCHEMA = (
    "str direction, str exclude, bool present_only, int ignore_index, int workspace, bool symmetric, str backend"
)
_INPUT_SCHEMA = (
    "Tensor features, Tensor prototypes, Tensor target, Tensor inv_temperature, Tensor? sample_bias, Tensor? class_bias"
)
_SAVED_SCHEMA = (
    "Tensor class_lse, Tensor instance_lse, Tensor pos, Tensor feature_rnorm, Tensor prototype_rnorm, Tensor kept"
)
_TAGS = (torch.Tag.pt2_compliant_tag,)

torch.library.define(
    "nckernels::cosine_lse",
    f"({_INPUT_SCHEMA}, {_SPEC_SCHEMA}, bool keep) -> ({_SAVED_SCHEMA})",
    tags=_TAGS,
)
torch.library.define(
    "nckernels::cosine_lse_backward",
    f"({_INPUT_SCHEMA}, {_SAVED_SCHEMA}, Tensor? grad_class_lse, Tensor? grad_instance_lse, "
    f"Tensor? grad_pos, {_SPEC_SCHEMA}, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


def _spec_args(spec: Spec) -> tuple[str, str, bool, int, int, bool]:
    return spec.direction, spec.exclude, spec.present_only, spec.ignore_index, spec.workspace, spec.symmetric


def _forward(*args: Any) -> Forward:
    inputs, spec, backend, keep = Inputs(*args[:6]), Spec(*args[6:12]), args[12], args[13]
    with _no_autocast(inputs.features):
        chosen = registry.BACKENDS[backend]
        if not chosen.checks_values:
            _check_values(inputs, spec)
        return chosen.forward(inputs, spec, keep)


@torch.library.register_fake("nckernels::cosine_lse")
def _forward_fake(*args: Any) -> Forward:
    inputs, spec, backend, keep = Inputs(*args[:6]), Spec(*args[6:12]), args[12], args[13]
    z, (m, k) = inputs.features, (inputs.features.shape[0], inputs.prototypes.shape[0])
    kept = registry.BACKENDS[backend].kept_numel(z.device, z.dtype, m, k, spec) if keep else 0
    sizes = (k if spec.by_class else 0, m if spec.by_instance else 0, m, m, k, kept)
    return Forward(*(z.new_empty(size, dtype=accumulation_dtype(z.dtype)) for size in sizes))


def _backward(*args: Any) -> tuple[Tensor, ...]:
    inputs, saved, grads = Inputs(*args[:6]), Forward(*args[6:12]), OutputGrads(*args[12:15])
    spec, backend, needs = Spec(*args[15:21]), args[21], Needs(*args[22])
    with _no_autocast(inputs.features):
        result = registry.BACKENDS[backend].backward(inputs, saved, grads, spec, needs)
    return tuple(inputs.features.new_empty(0) if grad is None else grad for grad in result)


@torch.library.register_fake("nckernels::cosine_lse_backward")
def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    inputs, needs = Inputs(*args[:6]), Needs(*args[22])
    differentiable = (*inputs[:2], *inputs[3:])
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format)
        if need and x is not None
        else inputs.features.new_empty(0)
        for x, need in zip(differentiable, needs, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Forward) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:6], *output)
    ctx.options = inputs[6:13]


def _autograd(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    return _differentiate(torch.ops.nckernels.cosine_lse_backward, ctx, *grads)


def _differentiate(
    backward: Callable[..., tuple[Tensor, ...]], ctx: Any, *grads: Tensor | None
) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 14
    if all(grad is None for grad in grads[:3]):
        return nothing
    wanted = ctx.needs_input_grad
    symmetric = ctx.options[5]
    needs = [wanted[0], wanted[1] and not symmetric, wanted[3], wanted[4], wanted[5]]
    result = backward(*ctx.saved_tensors, *grads[:3], *ctx.options, needs)
    z, w, beta, sample_bias, class_bias = (grad if need else None for grad, need in zip(result, needs, strict=True))
    return z, w, None, beta, sample_bias, class_bias, *nothing[6:]


class _Eager(torch.autograd.Function):
    """The operator's autograd formula without the operator: the way of plain tensors, for the sake of small
    problems, where PyTorch's dispatch of an operator written in Python takes longer than the computation."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        result = _forward(*args)
        _setup_context(ctx, args, result)
        ctx.mark_non_differentiable(*result[3:])
        return tuple(result)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        # Under create_graph the operator takes over: its own derivative is an error that says what to do.
        return _differentiate(_backward, ctx, *grads) if not torch.is_grad_enabled() else _autograd(ctx, *grads)


_ONLY_REFERENCE = (
    "nckernels: {} runs under the reference backend only; wrap the forward pass in nckernels.use_backend('reference')"
)


def _no_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(_ONLY_REFERENCE.format("double backward"))


def _no_transforms(inputs: Inputs) -> None:
    """Refuse what would fail obscurely (torch.func.grad, vmap) or drop tangents silently (forward mode)."""
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(_ONLY_REFERENCE.format("torch.func"))
    if forward_ad._current_level >= 0 and any(
        x is not None and forward_ad.unpack_dual(x).tangent is not None for x in inputs
    ):
        raise NotImplementedError(_ONLY_REFERENCE.format("forward-mode differentiation"))


torch.library.impl("nckernels::cosine_lse", "CompositeExplicitAutograd", _forward)
torch.library.impl("nckernels::cosine_lse_backward", "CompositeExplicitAutograd", _backward)
torch.library.register_autograd("nckernels::cosine_lse", _autograd, setup_context=_setup_context)
torch.library.register_autograd("nckernels::cosine_lse_backward", _no_double_backward)


def _no_autocast(like: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Autocast was honoured on entry; inside, dtypes are chosen with care."""
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


def _check_values(inputs: Inputs, spec: Spec) -> None:
    """Targets in range and a positive temperature: errors on a CPU, device-side assertions on CUDA."""
    target, beta, k = inputs.target, inputs.inv_temperature, inputs.prototypes.shape[0]
    if beta.device.type == "cpu":
        if not 0.0 < beta.item() < float("inf"):
            raise bad_temperature(beta.item())
    elif beta.device.type == "cuda":
        torch._assert_async((beta > 0) & beta.isfinite(), "the inverse temperature must be positive and finite")
    if spec.exclude == "same_label" or target.numel() == 0:
        return
    good = ((target >= 0) & (target < k)) | (target == spec.ignore_index)
    if target.device.type == "cpu" and not bool(good.all()):
        raise bad_target(target, k, spec.ignore_index)
    if target.device.type == "cuda":
        torch._assert_async(good.all(), f"target must lie in [0, {k}) or equal ignore_index")
