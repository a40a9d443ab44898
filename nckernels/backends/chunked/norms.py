"""The norms of rows, and the gradient through the normalisation."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import norm_eps
from .products import HALF

_CONVERTED = 2**17  # numbers that are converted to float32 at once


def rnorm_of(x: Tensor, acc: torch.dtype, valid: Tensor | None = None) -> Tensor:
    """1 / max(|x|, eps) of each row; 1 where ``valid`` is False."""
    if x.dtype in HALF and x.device.type == "cpu" and x.numel() > _CONVERTED:  # bounds the float32 copy
        rows = x.split(max(_CONVERTED // x.shape[1], 1))
        norm = torch.cat([torch.linalg.vector_norm(some, dim=1, dtype=acc) for some in rows])
    else:
        norm = torch.linalg.vector_norm(x, dim=1, dtype=acc)
    rnorm = norm.clamp_min_(norm_eps(x.dtype)).reciprocal_()
    return rnorm if valid is None else rnorm.masked_fill_(~valid, 1.0)


def through_normalisation(grad: Tensor, unit: Tensor, rnorm: Tensor, x: Tensor, beta: Tensor | None = None) -> Tensor:
    """Turn dL/du into dL/dx for u = x / |x|, in place: (dL/du - (dL/du . u) u) / |x|. Returns dL/du . u.

    ``unit`` and ``grad`` are u and dL/du, or with ``beta`` they are beta u and dL/d(beta u). Where |x| was
    clamped to eps (rnorm at its largest), u is linear in x and nothing is projected out.
    """
    dot = torch.linalg.vecdot(grad, unit)
    radial, scale = dot.masked_fill(rnorm >= 1.0 / norm_eps(x.dtype), 0.0), rnorm
    if beta is not None:
        radial, scale = radial / (beta * beta), rnorm * beta
    grad.addcmul_(unit, radial[:, None], value=-1.0)
    grad.mul_(scale[:, None])
    return dot
