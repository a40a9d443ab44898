"""The contract between the primitive and its backends.

A backend computes :func:`nckernels.cosine_lse` and its gradient for plain tensors. Autograd, argument checks and
the choice of backend live one level up, in :mod:`nckernels.primitive` and :mod:`nckernels.operators`.

Notation in every backend (docs/kernels.md has a glossary): ``M`` samples (rows) with features ``z`` of size ``d``,
``K`` classes (columns) with prototypes ``w``, unit rows ``u = z / |z|`` and ``v = w / |w|``, cosines ``S[j, c] = u_j .
v_c``, and logits ``t = beta * S`` with ``beta`` the inverse temperature.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
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
    """Whether features and prototypes are one tensor, which implies ``square`` and one direction. S is then
    symmetric, and the whole gradient of the tensor is returned as that of the features. With A = dL/dt it is
    (A + A^T) U, one matrix product instead of two."""

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
        """Whether row i and column i are the same sample: then K = M, and an ignored sample loses both."""
        return self.exclude in ("self", "same_label")


class Inputs(NamedTuple):
    """The tensors of a call, validated and on one device."""

    features: Tensor
    """(M, d), any float dtype."""
    prototypes: Tensor
    """(K, d), the dtype of ``features``."""
    target: Tensor
    """(M,) int64; a sample with ``spec.ignore_index`` is left out everywhere."""
    inv_temperature: Tensor
    """0-dimensional, accumulation dtype; ``Backend.step`` also takes a float."""
    sample_bias: Tensor | None
    """(M,) in the accumulation dtype or None: added to row j of the logits in the class direction."""
    class_bias: Tensor | None
    """(K,) in the accumulation dtype or None: added to column c of the logits in the instance direction."""


class Forward(NamedTuple):
    """Results of the forward pass: everything that the backward pass needs besides the inputs.

    The log-sum-exp of an unwanted direction is an empty tensor. All are in the accumulation dtype.
    """

    class_lse: Tensor
    """(K,) or (0,): log-sum-exp over the batch; -inf for an empty set."""
    instance_lse: Tensor
    """(M,) or (0,): log-sum-exp over the classes; -inf for an empty set."""
    pos: Tensor
    """(M,): beta * cos(feature_i, its positive prototype); 0 for ignored samples."""
    feature_rnorm: Tensor
    """(M,): 1 / max(|z|, eps). For left-out rows, here and below, a value of the backend's choice."""
    prototype_rnorm: Tensor
    """(K,): 1 / max(|w|, eps); with ``present_only`` absent classes are left out."""
    kept: Tensor
    """(n,): scratch that the forward pass leaves for the backward pass, n = ``Backend.kept_numel(...)``."""


class OutputGrads(NamedTuple):
    """Upstream gradients, in the accumulation dtype; None for zero."""

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
    """One gradient per differentiable input, of its shape and dtype; None where not wanted."""

    features: Tensor | None
    prototypes: Tensor | None
    inv_temperature: Tensor | None
    sample_bias: Tensor | None
    class_bias: Tensor | None


class Reduced(NamedTuple):
    """How the ``lse - pos`` of the samples are reduced to one number; for the options see ``Backend.step_options``."""

    weight: Tensor | None
    """(M,) weights of the samples; None for ones."""
    mean: bool
    """Whether to divide the weighted sum by the sum of the weights."""
    of_nothing: float
    """The mean if the weights add up to zero: 0 or NaN."""
    class_weight: Tensor | None = None
    """Option: (K,) factors of the sample weights, by class; None for ones."""
    label_smoothing: float = 0.0
    """Option, instance direction only: as in F.cross_entropy, with ``class_weight``."""
    angular_margin: float = 0.0
    """Option, instance direction only: the positive logit is shifted as in :func:`nckernels.normface_loss`. The spec
    excludes targets; the shifted positive is added to the sum of the negatives."""
    cosine_margin: float = 0.0
    """Option: as ``angular_margin``."""
    joined: bool = False
    """Option: sums are added inside the logarithm. With both directions these are the two sums of a sample, instead of
    the mean of two logarithms; in a symmetric problem the sums of all samples, without positives, weights and mean."""

    @property
    def has_options(self) -> bool:
        """Whether any option is set."""
        return self.class_weight is not None or self[4:] != (0.0, 0.0, 0.0, False)


class Step(NamedTuple):
    """A loss in the accumulation dtype, and the wanted gradients, in that dtype or in the input's."""

    loss: Tensor
    """0-dimensional."""
    features: Tensor | None
    prototypes: Tensor | None
    inv_temperature: Tensor | None


class Backend(ABC):
    """One implementation of the primitive."""

    name: ClassVar[str]
    checks_values: ClassVar[bool] = False
    """Whether the backend itself checks targets and temperatures; if not, they are checked before the call."""
    step_options: ClassVar[bool] = False
    """Whether ``step`` takes the options of ``Reduced``, and ``losses`` and ``losses_backward`` are implemented."""

    dot_regression: ClassVar[bool] = False
    """Whether ``half_squares`` and ``half_squares_backward`` are implemented."""

    def missing(self) -> str | None:
        """Why this backend cannot run on this machine at all, or None."""
        return None

    def prepare(self) -> None:
        """Do slow preparations, such as compiling for a GPU; called when this backend is chosen by name.

        Raises:
            RuntimeError: if that fails; the message has the full reason.
        """
        return

    @abstractmethod
    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why this backend cannot take features on this device in this dtype, or None."""

    def kept_numel(self, device: torch.device, dtype: torch.dtype, m: int, k: int, spec: Spec) -> int:
        """Number of elements, in ``dtype``'s accumulation dtype, of ``Forward.kept``."""
        return 0

    @abstractmethod
    def forward(self, inputs: Inputs, spec: Spec, keep: bool) -> Forward:
        """Compute the forward pass; ``keep`` is False if no backward pass will follow, or one that is given other
        log-sum-exps."""

    @abstractmethod
    def backward(self, inputs: Inputs, saved: Forward, grads: OutputGrads, spec: Spec, needs: Needs) -> Gradients:
        """Compute the wanted gradients, without changing ``inputs`` or ``saved``.

        If the prototypes are a shard of the classes, ``saved.instance_lse`` may be the log-sum-exp over all shards.
        Exponentials are normalised by it, so it must not be recomputed from this call's classes. Then ``saved.kept`` is
        empty: the forward pass was called without ``keep``.
        """

    def can_step(self, features: Tensor, prototypes: Tensor, spec: Spec) -> bool:
        """Whether ``step`` takes such a problem."""
        return False

    def step(self, inputs: Inputs, reduced: Reduced, spec: Spec, needs: Needs) -> Step:
        """Loss and gradient in one call, without biases; the gradient of at least one matrix is wanted.

        The loss of a sample is ``lse - pos``, where lse is the log-sum-exp of its class, of the sample, or the mean of
        both, by ``spec.direction``. In a symmetric problem targets are labels, the positive is the mean logit with the
        other samples of the label, and samples without others do not count.
        """
        raise NotImplementedError

    def losses(self, inputs: Inputs, reduced: Reduced, spec: Spec, keep: bool) -> tuple[Tensor, Forward]:
        """(M,) weighted losses of the samples without a reduction, M > 0, and the state for ``losses_backward``;
        ``keep`` is False if that will not follow."""
        raise NotImplementedError

    def losses_backward(
        self, inputs: Inputs, saved: Forward, upstream: Tensor, reduced: Reduced, spec: Spec, needs: Needs
    ) -> tuple[Tensor | None, ...]:
        """The wanted gradients of :class:`Step`, from the (M,) upstream gradients of the losses."""
        raise NotImplementedError

    def half_squares(self, rows: Tensor, prototypes: Tensor, target: Tensor, ignore_index: int) -> Tensor:
        """(M,) losses of dot regression: (1 - cos)^2 / 2 of each row with the prototype of its class; 0 if ignored."""
        raise NotImplementedError

    def half_squares_backward(
        self,
        rows: Tensor,
        prototypes: Tensor,
        target: Tensor,
        ignore_index: int,
        upstream: Tensor,
        needs: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        """The wanted gradients of rows and prototypes, from the (M,) upstream gradients of the losses."""
        raise NotImplementedError

    def scaled(
        self, grads: Sequence[Tensor], factor: Tensor, dtypes: Sequence[torch.dtype], in_place: bool
    ) -> Sequence[Tensor]:
        """A step's gradients, one to three, times a 0-dimensional factor, in ``dtypes``; ``in_place`` allows
        overwriting ``grads``."""
        value = factor.item()
        if not in_place:
            grads = [grad * value for grad in grads]
        elif value != 1.0:  # the factor is 1 in loss.backward()
            grads = [grad.mul_(value) for grad in grads]
        return [grad.to(dtype) for grad, dtype in zip(grads, dtypes, strict=True)]


def constant(function: Callable[[], str | None]) -> Callable[[], str | None]:
    """Make torch.compile treat the function's result as a constant, without tracing it.

    The same as :func:`torch.compiler.assume_constant_result`, which would import the whole compiler and add a second
    and a half to ``import nckernels``.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def bad_temperature(value: float) -> ValueError:
    """The error for an inverse temperature that is not positive and finite."""
    return ValueError(f"the inverse temperature must be positive and finite, got {value}")


def bad_target(target: Tensor, k: int, ignore_index: int | None) -> ValueError:
    """The error for targets that are neither a class nor ``ignore_index`` (None if there is no such index)."""
    bad, allowed = (target < 0) | (target >= k), f"[0, {k})"
    if ignore_index is not None:
        bad, allowed = bad & (target != ignore_index), f"{allowed} or equal ignore_index={ignore_index}"
    return ValueError(f"target must lie in {allowed}, got {int(target[bad][0])}")


def number(scalar: float | Tensor, dtype: torch.dtype) -> float:
    """The value of a number or a 0-dimensional CPU tensor, rounded to ``dtype``'s accumulation dtype: 0 or infinity
    outside of the range of float32."""
    value = float(scalar.item() if isinstance(scalar, Tensor) else scalar)
    return value if dtype == torch.float64 else ctypes.c_float(value).value


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Float64 for float64, float32 for everything smaller."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def norm_eps(dtype: torch.dtype) -> float:
    """The ``eps`` of :func:`torch.nn.functional.normalize`; for float16, where 1e-12 rounds to zero, its smallest
    normal number."""
    return 2.0**-14 if dtype == torch.float16 else 1e-12
