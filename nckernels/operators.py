"""The primitive as PyTorch sees it: two operators, their shapes for tracing, autograd, and the checks of values.

``nckernels::cosine_lse`` and ``nckernels::cosine_lse_backward`` serve compilers and tensor subclasses. Plain eager
tensors go around them, with the same autograd formula.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import __version__, _flops
from ._checks import no_autocast
from .backends import reference, registry
from .backends.base import (
    Forward,
    Gradients,
    Inputs,
    Needs,
    OutputGrads,
    Spec,
    accumulation_dtype,
    bad_target,
    bad_temperature,
    number,
)


def run(inputs: Inputs, spec: Spec, backend: str) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Class-direction and instance-direction log-sum-exp (of use where wanted) and positive logits."""
    if backend == registry.REFERENCE:
        with no_autocast(inputs.features):
            if not torch.compiler.is_compiling():
                _check_values(inputs, spec)
            return reference.cosine_lse(inputs, spec)
    if spec.symmetric:
        inputs = inputs._replace(prototypes=one_gradient(inputs.features))
    if plain(*inputs):
        return (
            _Eager.apply(*inputs, spec, backend, False) if _needs_grad(inputs) else forward(inputs, spec, backend)[:3]
        )
    operator = torch.ops.nckernels.cosine_lse
    return operator(*inputs, *spec, backend, _needs_grad(inputs), __version__)[:3]


def run_contrast(inputs: Inputs, spec: Spec, backend: str) -> Tensor:
    """:func:`contrast` of the primitive's results for plain tensors and one direction without bias."""
    if _needs_grad(inputs):
        return _Eager.apply(*inputs, spec, backend, True)
    return contrast(*forward(inputs, spec, backend)[:3], inputs.target, spec)


def contrast(class_lse: Tensor, instance_lse: Tensor, pos: Tensor, target: Tensor, spec: Spec) -> Tensor:
    """(M,) log-sum-exp of each sample, of its class, or the mean of both, minus its positive logit; 0 where ignored.

    Without anything to sum over the positive logit remains.
    """
    ignored = target == spec.ignore_index
    lses = [class_lse.index_select(0, target.masked_fill(ignored, 0))] if spec.by_class else []
    lses += [instance_lse] if spec.by_instance else []
    first, *others = (lse.masked_fill(ignored | (lse == -torch.inf), 0.0) for lse in lses)
    return (0.5 * (first + others[0]) if others else first) - pos


def _needs_grad(inputs: Inputs) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def one_gradient(features: Tensor) -> Tensor:
    """The features once more, for the prototypes' place in a symmetric problem, where one gradient is that of both.

    The same tensor in both places would have a gradient in each, the second one None. Compiled autograd adds the two
    as tensors.
    """
    return features.detach()


def plain(*values: object, refuse: bool = True) -> bool:
    """Whether nobody but autograd needs to know of the call: no compiler, tensor subclass, tracing or logging mode.

    Args:
        values: the tensors of the call; what is not a tensor does not count.
        refuse: raise an error under transforms that would fail obscurely or silently.

    Raises:
        NotImplementedError: where that is refused.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return False
    tensors = [x for x in values if isinstance(x, Tensor)]
    transform = _transform(tensors)
    if transform is not None and refuse:
        raise NotImplementedError(_ONLY_REFERENCE.format(transform))
    if torch._C._len_torch_dispatch_stack():
        _flops.tell_counters()
        return False
    if transform is not None:
        return False
    return not any(x.is_meta or type(x) not in _PLAIN for x in tensors)


_PLAIN = (Tensor, torch.nn.Parameter)


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
    # Nothing reads the version. It makes the graph another one, so that what torch.compile has cached on disk for an
    # earlier release, with other sizes of the results, is not used.
    f"({_INPUT_SCHEMA}, {_SPEC_SCHEMA}, bool keep, str version) -> ({_SAVED_SCHEMA})",
    tags=_TAGS,
)
torch.library.define(
    "nckernels::cosine_lse_backward",
    f"({_INPUT_SCHEMA}, {_SAVED_SCHEMA}, Tensor? grad_class_lse, Tensor? grad_instance_lse, "
    f"Tensor? grad_pos, {_SPEC_SCHEMA}, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


def forward(inputs: Inputs, spec: Spec, backend: str, keep: bool = False) -> Forward:
    with no_autocast(inputs.features):
        chosen = registry.BACKENDS[backend]
        if not chosen.checks_values:
            _check_values(inputs, spec)
        return chosen.forward(inputs, spec, keep)


def _forward_operator(*args: Any) -> Forward:
    return forward(Inputs(*args[:6]), Spec(*args[6:12]), args[12], args[13])


@torch.library.register_fake("nckernels::cosine_lse")
def _forward_fake(*args: Any) -> Forward:
    inputs, spec, backend, keep = Inputs(*args[:6]), Spec(*args[6:12]), args[12], args[13]
    z, (m, k) = inputs.features, (inputs.features.shape[0], inputs.prototypes.shape[0])
    kept = registry.BACKENDS[backend].kept_numel(z.device, z.dtype, m, k, spec) if keep else 0
    sizes = (k if spec.by_class else 0, m if spec.by_instance else 0, m, m, k, kept)
    return Forward(*(z.new_empty(size, dtype=accumulation_dtype(z.dtype)) for size in sizes))


def backward(inputs: Inputs, saved: Forward, grads: OutputGrads, spec: Spec, backend: str, needs: Needs) -> Gradients:
    with no_autocast(inputs.features):
        return registry.BACKENDS[backend].backward(inputs, saved, grads, spec, needs)


def _backward_operator(*args: Any) -> tuple[Tensor, ...]:
    inputs, saved, grads = Inputs(*args[:6]), Forward(*args[6:12]), OutputGrads(*args[12:15])
    result = backward(inputs, saved, grads, Spec(*args[15:21]), args[21], Needs(*args[22]))
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


def _needs(wanted: Sequence[bool], symmetric: bool) -> Needs:
    """What autograd wants of the first six arguments. One tensor in both places has one gradient."""
    return Needs(wanted[0], wanted[1] and not symmetric, wanted[3], wanted[4], wanted[5])


def _in_place(grads: Iterable[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Gradients in the order of the inputs: targets have none."""
    z, w, beta, sample_bias, class_bias = grads
    return z, w, None, beta, sample_bias, class_bias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Forward) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:6], *output)
    ctx.options = inputs[6:13]


def _autograd(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 15
    if all(grad is None for grad in grads[:3]):
        return nothing
    no_batches(*grads[:3])
    needs = _needs(ctx.needs_input_grad, symmetric=ctx.options[5])
    result = torch.ops.nckernels.cosine_lse_backward(*ctx.saved_tensors, *grads[:3], *ctx.options, list(needs))
    found = (grad if need else None for grad, need in zip(result, needs, strict=True))
    return *_in_place(found), *nothing[6:]


class _Eager(torch.autograd.Function):
    """The operator's autograd formula without the operator: the way of plain tensors, for the sake of small
    problems, where PyTorch's dispatch of an operator written in Python takes longer than the computation.

    For their sake too it can go on to :func:`contrast`, half a dozen nodes of the graph in one.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        inputs, (spec, backend, contrasted) = Inputs(*args[:6]), args[6:]
        result = forward(inputs, spec, backend, keep=True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, *result)
        ctx.call = args[6:]
        return contrast(*result[:3], inputs.target, spec) if contrasted else result[:3]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(grad is None for grad in upstream):
            return (None,) * 9
        no_batches(*upstream)
        kept = ctx.saved_tensors
        inputs, saved = Inputs(*kept[:6]), Forward(*kept[6:])
        spec, backend, contrasted = ctx.call
        grads = _through_contrast(upstream[0], inputs.target, saved, spec) if contrasted else OutputGrads(*upstream)
        needs = _needs(ctx.needs_input_grad, spec.symmetric)
        if torch.is_grad_enabled():
            # Under create_graph the operator takes over: its own derivative is an error that says what to do.
            operator = torch.ops.nckernels.cosine_lse_backward
            found = operator(*inputs, *saved, *grads, *spec, backend, list(needs))
            result = [grad if need else None for grad, need in zip(found, needs, strict=True)]
        else:
            result = list(backward(inputs, saved, grads, spec, backend, needs))
        return *_in_place(result), None, None, None


class Step(torch.autograd.Function):
    """The reduced :func:`contrast`, whose gradients come with it: the backward pass has only to scale them.

    Its arguments: features, prototypes (see :func:`one_gradient`), inverse temperature (a number or a tensor), target,
    then what makes one number of the samples' losses, the spec, and the name of a backend that has a step.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, w: Tensor, beta: float | Tensor, target: Tensor, *options: Any) -> Tensor:
        reduced, spec, backend = options
        by_z, by_w, by_beta, *_ = ctx.needs_input_grad
        needs = Needs(by_z, by_w, by_beta, False, False)
        inputs = Inputs(z, w, target, cast(Tensor, beta), None, None)
        chosen = registry.BACKENDS[backend]
        with no_autocast(z):
            if not chosen.checks_values:
                _check_values(inputs, spec, labels=spec.symmetric)
            loss, *grads = chosen.step(inputs, reduced, spec, needs)
        ctx.save_for_backward(z, w, beta if by_beta else None, *grads)
        ctx.backend = backend
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        no_batches(upstream)
        # What nobody will ask for again is scaled in place.
        in_place = not (torch.is_grad_enabled() or torch._C._autograd._get_current_graph_task_keep_graph())
        z, w, beta = once(_scaled, ctx.backend, in_place, upstream, *ctx.saved_tensors)
        return z, w, beta, None, None, None, None


class Losses(torch.autograd.Function):
    """The samples' losses, weighted and not reduced, by a backend that has ``losses``. Its arguments: as in Step."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, w: Tensor, beta: float | Tensor, target: Tensor, *options: Any) -> Tensor:
        reduced, spec, backend = options
        inputs = Inputs(z, w, target, cast(Tensor, beta), None, None)
        chosen = registry.BACKENDS[backend]
        with no_autocast(z):
            if not chosen.checks_values:
                _check_values(inputs, spec, labels=spec.symmetric)
            loss, saved = chosen.losses(inputs, reduced, spec, any(ctx.needs_input_grad))
        by_tensor = isinstance(beta, Tensor)
        ctx.save_for_backward(z, w, beta if by_tensor else None, target, reduced.weight, reduced.class_weight, *saved)
        ctx.call = None if by_tensor else beta, reduced._replace(weight=None, class_weight=None), spec, backend
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        no_batches(upstream)
        by_z, by_w, by_beta, *_ = ctx.needs_input_grad
        z, w, beta = once(_losses_backward, (by_z, by_w, by_beta), ctx.call, upstream, *ctx.saved_tensors)
        return z, w, beta, None, None, None, None


def _losses_backward(
    wanted: tuple[bool, bool, bool], call: tuple[Any, ...], upstream: Tensor, *saved: Tensor
) -> tuple[Tensor | None, ...]:
    z, w, beta, target, weight, class_weight, *results = saved
    number, reduced, spec, backend = call
    by_z, by_w, by_beta = wanted
    needs = Needs(by_z, by_w, by_beta, False, False)
    inputs = Inputs(z, w, target, number if beta is None else beta, None, None)
    reduced = reduced._replace(weight=weight, class_weight=class_weight)
    with no_autocast(z):
        chosen = registry.BACKENDS[backend]
        return chosen.losses_backward(inputs, Forward(*results), upstream, reduced, spec, needs)  # autograd casts them


class HalfSquares(torch.autograd.Function):
    """Dot regression's losses by a backend that has them. Its arguments: features, prototypes of their dtype, int64
    target, index of who is ignored, name of the backend, and the same losses in PyTorch's operations, as a function of
    the first four, whose derivatives are those of the gradient."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, w: Tensor, target: Tensor, ignore_index: int, backend: str, steps: Any) -> Tensor:
        ctx.save_for_backward(z, w, target)
        ctx.call = ignore_index, backend, steps
        return registry.BACKENDS[backend].half_squares(z, w, target, ignore_index)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        z, w, target = ctx.saved_tensors
        ignore_index, backend, steps = ctx.call
        by_z, by_w, *_ = ctx.needs_input_grad
        if not torch.is_grad_enabled() and not batched(upstream):
            chosen = registry.BACKENDS[backend]
            return *chosen.half_squares_backward(z, w, target, ignore_index, upstream, (by_z, by_w)), *(None,) * 4
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            losses = steps(z, w, target, ignore_index)
        wanted = [x for x, need in ((z, by_z), (w, by_w)) if need]
        found = iter(torch.autograd.grad(losses, wanted, upstream, create_graph=create_graph))
        return *(next(found) if need else None for need in (by_z, by_w)), *(None,) * 4


class Once(torch.autograd.Function):
    """A backward pass, a function of its further arguments, whose own derivative is an error that says what to do."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., Any], *args: Any) -> Any:
        return run(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        _no_double_backward(ctx, *grads)


def once(run: Callable[..., Any], *args: Any) -> Any:
    """A backward pass, with that error where PyTorch would differentiate it."""
    return Once.apply(run, *args) if torch.is_grad_enabled() else run(*args)


def _scaled(backend: str, in_place: bool, upstream: Tensor, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Three gradients, the latter half of ``tensors``, times ``upstream``, of the dtypes of the former half."""
    wanted = [(x, grad) for x, grad in zip(tensors[:3], tensors[3:], strict=True) if x is not None and grad is not None]
    dtypes = [x.dtype for x, _ in wanted]
    found = iter(registry.BACKENDS[backend].scaled([grad for _, grad in wanted], upstream, dtypes, in_place))
    return tuple(
        None if x is None or grad is None else next(found) for x, grad in zip(tensors[:3], tensors[3:], strict=True)
    )


def _through_contrast(grad: Tensor | None, target: Tensor, saved: Forward, spec: Spec) -> OutputGrads:
    """What flows back to the primitive's outputs. That empty sums pass nothing on is the backends' business."""
    assert grad is not None
    share = 0.5 * grad if spec.direction == "both" else grad
    by_class = None
    if spec.by_class:
        ignored = target == spec.ignore_index
        by_class = torch.zeros_like(saved.class_lse)
        by_class = by_class.index_add(0, target.masked_fill(ignored, 0), share.masked_fill(ignored, 0.0))
    return OutputGrads(by_class, share if spec.by_instance else None, -grad)


_ONLY_REFERENCE = (
    "nckernels: {} runs under the reference backend only; wrap the forward pass in nckernels.use_backend('reference')"
)


def _no_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(_ONLY_REFERENCE.format("double backward"))


def _transform(tensors: Iterable[Tensor]) -> str | None:
    """What would fail obscurely (torch.func.grad, vmap) or drop tangents silently (forward mode)."""
    if torch._C._are_functorch_transforms_active():
        return "torch.func"
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        return "forward-mode differentiation"
    return None


def batched(x: Tensor) -> bool:
    """Whether it holds many gradients: ``is_grads_batched`` calls a backward pass with all of them at once."""
    return torch._C._functorch.is_legacy_batchedtensor(x)


def no_batches(*upstream: Tensor | None) -> None:
    """Refuse ``is_grads_batched``."""
    if any(x is not None and batched(x) for x in upstream):
        raise NotImplementedError(_ONLY_REFERENCE.format("a backward pass for a batch of gradients"))


torch.library.impl("nckernels::cosine_lse", "CompositeExplicitAutograd", _forward_operator)
torch.library.impl("nckernels::cosine_lse_backward", "CompositeExplicitAutograd", _backward_operator)
torch.library.register_autograd("nckernels::cosine_lse", _autograd, setup_context=_setup_context)
torch.library.register_autograd("nckernels::cosine_lse_backward", _no_double_backward)


def _check_values(inputs: Inputs, spec: Spec, labels: bool = False) -> None:
    """Targets in range, unless they are labels, and a positive temperature: errors on a CPU, device-side assertions on
    CUDA."""
    target, beta, k = inputs.target, inputs.inv_temperature, inputs.prototypes.shape[0]
    if not isinstance(beta, Tensor) or beta.device.type == "cpu":
        value = number(beta, inputs.features.dtype)
        if not 0.0 < value < float("inf"):
            raise bad_temperature(value)
    elif beta.device.type == "cuda":
        torch._assert_async((beta > 0) & beta.isfinite(), "the inverse temperature must be positive and finite")
    if labels or spec.exclude == "same_label" or target.numel() == 0:
        return
    good = ((target >= 0) & (target < k)) | (target == spec.ignore_index)
    if target.device.type == "cpu" and not bool(good.all()):
        raise bad_target(target, k, spec.ignore_index)
    if target.device.type == "cuda":
        torch._assert_async(good.all(), f"target must lie in [0, {k}) or equal ignore_index")
