"""The contract between the primitive and its backends.

A backend computes :func:`nckernels.cosine_lse` and its gradient for plain tensors: no autograd, no
argument checking, no policy. All of that lives one level up, in :mod:`nckernels.primitive`.

Notation, used in every backend: ``M`` samples (rows) with features ``z`` of size ``d``, ``K`` classes
(columns) with prototypes ``w``; ``u = z / |z|``, ``v = w / |w|``, ``S[j, c] = u_j . v_c`` and the logits
``t = beta * S`` with ``beta`` the inverse temperature.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

Direction = Literal["class", "instance", "both"]
Exclude = Literal["none", "target", "self", "same_label"]


class Spec(NamedTuple):
    """Everything about a call that is not a tensor. See :func:`nckernels.cosine_lse` for the meaning."""

    direction: Direction
    exclude: Exclude
    present_only: bool
    ignore_index: int
    workspace: int
    """Bytes of scratch a backend may use beyond inputs, gradients and O(M + K) vectors."""
    symmetric: bool = False
    """Whether features and prototypes are one tensor, which implies ``square`` and one direction. Then S is
    symmetric, and the tensor's whole gradient is wanted as that of the features: with A = dL/dt, (A + A^T) U
    takes one matrix product, where A U and A^T U take two."""

    @property
    def by_class(self) -> bool:
        """Whether the log-sum-exp over the batch (one value per class) is wanted."""
        return self.direction != "instance"

    @property
    def by_instance(self) -> bool:
        """Whether the log-sum-exp over the classes (one value per sample) is wanted."""
        return self.direction != "class"

    @property
    def square(self) -> bool:
        """Whether row i and column i are the same sample, so that K = M and ignoring drops both."""
        return self.exclude in ("self", "same_label")


class Inputs(NamedTuple):
    """The tensors of a call, validated and on one device."""

    features: Tensor
    """(M, d), any float dtype."""
    prototypes: Tensor
    """(K, d), the dtype of ``features``."""
    target: Tensor
    """(M,) int64; ``spec.ignore_index`` marks a sample that is left out everywhere."""
    inv_temperature: Tensor
    """0-dimensional, accumulation dtype; for ``Backend.step`` a float will do."""
    sample_bias: Tensor | None
    """(M,) in the accumulation dtype or None: added to row j of the logits in the class direction."""
    class_bias: Tensor | None
    """(K,) in the accumulation dtype or None: added to column c of the logits in the instance direction."""


class Forward(NamedTuple):
    """Results of the forward pass; everything that the backward needs besides the inputs.

    A direction that was not asked for gives an empty tensor. All but ``kept`` are in the accumulation
    dtype.
    """

    class_lse: Tensor
    """(K,) or (0,): log-sum-exp over the batch; -inf for an empty set."""
    instance_lse: Tensor
    """(M,) or (0,): log-sum-exp over the classes; -inf for an empty set."""
    pos: Tensor
    """(M,): beta * cos(feature_i, its positive prototype); 0 for ignored samples."""
    feature_rnorm: Tensor
    """(M,): 1 / max(|z|, eps). Of rows that take no part, here and below, anything that the backend likes."""
    prototype_rnorm: Tensor
    """(K,): 1 / max(|w|, eps); with ``present_only`` absent classes take no part."""
    kept: Tensor
    """(n,): scratch that the backend wants back in its backward, n = ``Backend.kept_numel(...)``."""


class OutputGrads(NamedTuple):
    """Upstream gradients, in the accumulation dtype; None where nothing flows back."""

    class_lse: Tensor | None
    instance_lse: Tensor | None
    pos: Tensor | None


class Needs(NamedTuple):
    """Which gradients are wanted."""

    features: bool
    prototypes: bool
    inv_temperature: bool
    sample_bias: bool
    class_bias: bool


class Gradients(NamedTuple):
    """One gradient per differentiable input (its shape; its dtype), None where not wanted."""

    features: Tensor | None
    prototypes: Tensor | None
    inv_temperature: Tensor | None
    sample_bias: Tensor | None
    class_bias: Tensor | None


class Reduced(NamedTuple):
    """What makes one number of the ``lse - pos`` of the samples, and options of it, see ``Backend.step_options``."""

    weight: Tensor | None
    """(M,), of the samples; None for ones."""
    mean: bool
    """Divide the sum by that of the weights."""
    of_nothing: float
    """The mean where the weights add up to zero: 0 or NaN."""
    class_weight: Tensor | None = None
    """Option: (K,), a factor of the weights of each class's samples; None for ones."""
    label_smoothing: float = 0.0
    """Option, in the instance direction: as in F.cross_entropy, with ``class_weight``."""
    angular_margin: float = 0.0
    """Option, in the instance direction, as is the next one: the positive moves, as in
    :func:`nckernels.normface_loss`. The spec excludes targets, and the moved positive joins the others' sum."""
    cosine_margin: float = 0.0
    joined: bool = False
    """Option: sums are added inside the logarithm, those of both directions, instead of the mean of two logarithms;
    in a symmetric problem those of all samples, without positives, weights and mean."""

    @property
    def has_options(self) -> bool:
        """Whether it is more than a sum or mean."""
        return self.class_weight is not None or self[4:] != (0.0, 0.0, 0.0, False)


class Step(NamedTuple):
    """A loss in the accumulation dtype, and its gradients where wanted, in that dtype or their input's."""

    loss: Tensor
    """0-dimensional."""
    features: Tensor | None
    prototypes: Tensor | None
    inv_temperature: Tensor | None


class Backend(ABC):
    """One implementation of the primitive."""

    name: ClassVar[str]
    checks_values: ClassVar[bool] = False
    """Whether ``forward`` itself notices bad targets and temperatures; else they are checked before the call."""
    step_options: ClassVar[bool] = False
    """Whether ``step`` takes the options of ``Reduced``, and there are ``losses`` and ``losses_backward``."""

    def missing(self) -> str | None:
        """Why this backend cannot run on this machine at all, or None."""
        return None

    def prepare(self) -> None:
        """Called when this backend is chosen by name: what takes minutes, such as compiling for a GPU, happens here.

        Raises:
            RuntimeError: if it fails, with the whole reason.
        """
        return

    @abstractmethod
    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why this backend cannot take features of this kind, or None."""

    def kept_numel(self, device: torch.device, dtype: torch.dtype, m: int, k: int, spec: Spec) -> int:
        """Elements (of ``dtype``'s accumulation dtype) that the forward keeps for the backward."""
        return 0

    @abstractmethod
    def forward(self, inputs: Inputs, spec: Spec, keep: bool) -> Forward:
        """Compute the forward pass; ``keep`` is False where no backward will follow."""

    @abstractmethod
    def backward(self, inputs: Inputs, saved: Forward, grads: OutputGrads, spec: Spec, needs: Needs) -> Gradients:
        """Compute the wanted gradients. Neither ``inputs`` nor ``saved`` may be changed.

        Where the classes are part of more, ``saved.instance_lse`` can be that over all of them: exponentials are
        divided by it, whatever the sum of this call's would be.
        """

    def can_step(self, features: Tensor, prototypes: Tensor, spec: Spec) -> bool:
        """Whether there is a ``step`` for such a problem."""
        return False

    def step(self, inputs: Inputs, reduced: Reduced, spec: Spec, needs: Needs) -> Step:
        """Forward and backward in one, without biases, for the gradient of at least one matrix; see :class:`Reduced`.

        The loss has the log-sum-exp of each sample, of its class, or the mean of both, as the direction says.
        In a symmetric problem targets are labels, the positive is the mean logit with the others of the label, and
        samples without others do not count.
        """
        raise NotImplementedError

    def losses(self, inputs: Inputs, reduced: Reduced, spec: Spec, keep: bool) -> tuple[Tensor, Forward]:
        """(M,) weighted losses of the samples, M > 0, which are not reduced, and what their backward needs; ``keep`` is
        False where none will follow."""
        raise NotImplementedError

    def losses_backward(
        self, inputs: Inputs, saved: Forward, upstream: Tensor, reduced: Reduced, spec: Spec, needs: Needs
    ) -> tuple[Tensor | None, ...]:
        """The wanted gradients of :class:`Step`, given those of the losses."""
        raise NotImplementedError

    def scaled(self, grad: Tensor, factor: Tensor, dtype: torch.dtype, in_place: bool) -> Tensor:
        """A step's gradient times a 0-dimensional factor, as ``dtype``, perhaps in the gradient's own memory."""
        value = factor.item()
        if not in_place:
            grad = grad * value
        elif value != 1.0:  # as backward() of the loss itself has it
            grad = grad.mul_(value)
        return grad.to(dtype)


def constant(function: Callable[[], str | None]) -> Callable[[], str | None]:
    """Let compilers take the function's result for a constant, without looking inside.

    As :func:`torch.compiler.assume_constant_result`, which imports all of the compiler for it: a second and a half of
    everybody's ``import nckernels``.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def bad_temperature(value: float) -> ValueError:
    """The error for an inverse temperature that is not positive and finite."""
    return ValueError(f"the inverse temperature must be positive and finite, got {value}")


def bad_target(target: Tensor, k: int, ignore_index: int | None) -> ValueError:
    """The error for targets of which at least one is neither a class nor ``ignore_index`` (None: there is none)."""
    bad, allowed = (target < 0) | (target >= k), f"[0, {k})"
    if ignore_index is not None:
        bad, allowed = bad & (target != ignore_index), f"{allowed} or equal ignore_index={ignore_index}"
    return ValueError(f"target must lie in {allowed}, got {int(target[bad][0])}")


def number(scalar: float | Tensor, dtype: torch.dtype) -> float:
    """A number, or that of a 0-dimensional tensor on the CPU, as ``dtype``'s accumulation dtype holds it: 0 or
    infinite where float32 cannot."""
    value = float(scalar.item() if isinstance(scalar, Tensor) else scalar)
    return value if dtype == torch.float64 else ctypes.c_float(value).value


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Float64 for float64, float32 for everything smaller."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def norm_eps(dtype: torch.dtype) -> float:
    """The ``eps`` of :func:`torch.nn.functional.normalize`; float16's smallest normal number for float16,
    where 1e-12 is zero and a zero vector would divide by it."""
    return 2.0**-14 if dtype == torch.float16 else 1e-12
