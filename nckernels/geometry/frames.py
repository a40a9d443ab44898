"""Point sets on the unit sphere in closed form."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def simplex_etf(
    num_classes: int,
    dim: int,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    r"""Simplex equiangular tight frame: ``num_classes`` unit vectors, all equally far from one another.

    The rows have norm 1, pairwise cosine :math:`-1/(K-1)` and sum to zero. With ``V`` an orthonormal basis
    of the hyperplane of :math:`\mathbb{R}^K` orthogonal to the ones vector and ``Q`` a random orthonormal
    frame of ``K - 1`` directions in :math:`\mathbb{R}^d`,

    .. math:: W = \sqrt{K/(K-1)} \; V Q^\top .

    This is the configuration of neural collapse ([NCD] Theorem A.1). A construction that starts from a
    semi-orthogonal ``d x K`` matrix asks for ``d >= K``; this one needs only ``d >= K - 1``.

    Args:
        num_classes: number of vectors K, at least 1. One vector is a random direction; two are antipodal.
        dim: dimension d, at least K - 1 (and at least 1).
        generator: source of the random orientation, which is uniform over all rotations and reflections.
            It is drawn on the generator's device, on the CPU without one: a seed then gives the same frame
            whatever ``device`` is.
        dtype: floating-point dtype of the result, torch's default if None. Computed in float64.
        device: device of the result.

    Returns:
        Tensor of shape (num_classes, dim).

    Example::

        >>> w = simplex_etf(10, 64, generator=torch.Generator().manual_seed(0))
        >>> (w @ w.T)[0, 1]  # -1/9
        tensor(-0.1111)
    """
    if num_classes < 1:
        raise ValueError(f"num_classes: expected at least 1, got {num_classes}")
    if dim < max(1, num_classes - 1):
        raise ValueError(
            f"dim: {num_classes} vectors with equal pairwise cosines -1/(K-1) need at least "
            f"{max(1, num_classes - 1)} dimensions, got {dim}"
        )
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating-point dtype, got {dtype}")

    home = torch.device("cpu") if generator is None else generator.device
    frame = _random_frame(dim, max(1, num_classes - 1), generator, home)
    if num_classes == 1:
        rows = frame.T
    else:
        rows = math.sqrt(num_classes / (num_classes - 1)) * (_centred_basis(num_classes, home) @ frame.T)
    return rows.to(device=torch.device("cpu") if device is None else device, dtype=dtype)


def _random_frame(dim: int, count: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """``count`` orthonormal columns in ``dim`` dimensions, uniform over all such frames."""
    gaussian = torch.randn(dim, count, generator=generator, dtype=torch.float64, device=device)
    q, r = torch.linalg.qr(gaussian)
    # QR is unique only up to the signs of R's diagonal; fixing them makes Q's distribution uniform.
    signs = torch.where(r.diagonal() < 0, -1.0, 1.0).to(q.dtype)
    return q * signs


def _centred_basis(num_classes: int, device: torch.device) -> Tensor:
    """Helmert basis: K x (K-1) orthonormal columns, each orthogonal to the ones vector.

    Column k is (1, ..., 1, -k, 0, ..., 0) / sqrt(k(k+1)) with k leading ones.
    """
    k = torch.arange(1, num_classes, dtype=torch.float64, device=device)
    ones = torch.ones(num_classes, num_classes - 1, dtype=torch.float64, device=device)
    steps = ones.triu() - torch.diag_embed(k, offset=-1)[:, : num_classes - 1]
    return steps / (k * (k + 1)).sqrt()
