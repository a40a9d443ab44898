"""What the losses with and without prototypes share."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, ParamSpec, cast

import torch
from torch import Tensor

from . import _checks
from .backends.base import accumulation_dtype, norm_eps

Reduction = Literal["none", "mean", "sum"]
REDUCTIONS = ("none", "mean", "sum")

P = ParamSpec("P")


def inverse(temperature: float | Tensor) -> float | Tensor:
    """beta = 1 / temperature, of a tensor 0-dimensional and in its accumulation dtype."""
    if isinstance(temperature, Tensor):
        beta = temperature.to(accumulation_dtype(temperature.dtype)).reciprocal()
        return beta.reshape(()) if beta.dim() else beta
    return 1.0 / float(temperature)


def logaddexp(a: Tensor, b: Tensor) -> Tensor:
    """log(e^a + e^b), whose derivatives, the second ones too, are finite where either is -inf (PyTorch's are NaN)."""
    no_a, no_b = a == -torch.inf, b == -torch.inf
    both = torch.logaddexp(a.masked_fill(no_a, 0.0), b.masked_fill(no_b, 0.0))
    return torch.where(no_a, b, torch.where(no_b, a, both))


def or_zero(lse: Tensor) -> Tensor:
    """0, without gradient, for an empty sum: what remains of a loss is the alignment."""
    return lse.masked_fill(lse == -torch.inf, 0.0)


def norms(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Row norms, at least the eps of the dtype that the rows were given in."""
    return torch.linalg.vector_norm(rows, dim=-1).clamp_min(norm_eps(dtype))


def unit(rows: Tensor) -> Tensor:
    """Unit rows in the accumulation dtype."""
    wide = rows.to(accumulation_dtype(rows.dtype))
    return wide / norms(wide, rows.dtype).unsqueeze(-1)


def leading_dimensions(loss: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Let a loss of rows (M, d), prototypes and labels (M,) take features (..., d) with labels and weights (...)."""
    of_rows = cast(Callable[..., Tensor], loss)

    @functools.wraps(loss)
    def of_any_shape(input: Tensor, prototypes: Tensor, target: Tensor, **options: Any) -> Tensor:
        if not isinstance(input, Tensor) or input.dim() == 2:
            return of_rows(input, prototypes, target, **options)
        weight = options.pop("sample_weight", None)
        rows, labels, weight = as_rows(input, target, weight, prototypes)
        return in_shape(of_rows(rows, prototypes, labels, sample_weight=weight, **options), target)

    return cast(Callable[P, Tensor], of_any_shape)


def as_rows(
    input: Tensor, target: Tensor, sample_weight: Tensor | None, prototypes: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Features (..., d), labels (...) and weights (...) as rows (M, d), (M,) and (M,), without copies of what is
    contiguous. One of (M, d) is left as it is, and what comes with it is not checked.

    Raises:
        TypeError, ValueError: for what is no tensor, or does not have the shape (...), or not the columns of
            ``prototypes``; here, where errors can tell the shape that was given.
    """
    _checks.is_tensor("input", input)
    if input.dim() == 2:
        return input, target, sample_weight
    if input.dim() == 0:
        raise ValueError("input must have shape (M, d) or (..., d), got ()")
    if isinstance(prototypes, Tensor) and prototypes.dim() == 2:
        _checks.same_columns("input", input, "prototypes", prototypes)
    _checks.leading("target", target, input, "one class index")
    if sample_weight is not None:
        _checks.leading("sample_weight", sample_weight, input, "one weight")
        sample_weight = sample_weight.reshape(-1)
    return input.flatten(0, -2) if input.dim() > 2 else input[None], target.reshape(-1), sample_weight


def in_shape(loss: Tensor, target: Tensor) -> Tensor:
    """The losses of rows in the shape of ``target``; one number stays what it is."""
    return loss.view(target.shape) if loss.dim() else loss


def of_samples(weight: Tensor | None, sample_weight: Tensor | None, target: Tensor) -> Tensor | None:
    """Weights of classes and of samples as (M,) of the samples. Targets out of range are for the kernels to notice."""
    if weight is None:
        return sample_weight
    by_class = weight.index_select(0, target.clamp(0, len(weight) - 1))
    return by_class if sample_weight is None else by_class * sample_weight


def reduce(
    loss: Tensor, counted: Tensor | None, weight: Tensor | None, reduction: Reduction, of_nothing: float = math.nan
) -> Tensor:
    """Weight and reduce per-sample losses, which are 0 where not ``counted`` (None: all are, of at least one).

    ``of_nothing`` is the mean of none.
    """
    if weight is not None:
        weight = weight.to(loss.dtype) if counted is None else weight.to(loss.dtype).where(counted, 0.0)
        loss = loss * weight
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if weight is None and counted is None:
        return loss.mean()
    return mean(loss, cast(Tensor, counted) if weight is None else weight, of_nothing)


def mean(weighted: Tensor, weight: Tensor, of_nothing: float = math.nan) -> Tensor:
    """Sum of ``weighted`` over that of ``weight``."""
    total = weight.sum()
    if of_nothing == 0.0:
        total = total.masked_fill(total == 0, 1)
    return weighted.sum() / total
