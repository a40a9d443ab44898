"""Point sets on the unit sphere in closed form."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _checks


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
        generator: source of the random orientation, which is uniform over all rotations and reflections. It is drawn
            on the generator's device, or on the CPU without one. So a seed gives the same frame for every ``device``.
        dtype: floating-point dtype of the result, torch's default if None. Computed in float64.
        device: device of the result.

    Returns:
        Tensor of shape (num_classes, dim).

    Example:
        >>> w = nckernels.geometry.simplex_etf(10, 64, generator=torch.Generator().manual_seed(0))
        >>> (w @ w.T)[0, 1]  # -1/9
        tensor(-0.1111)
    """
    check_sizes(num_classes, dim)
    if dim < num_classes - 1:
        raise ValueError(
            f"dim: {num_classes} vectors with equal pairwise cosines -1/(K-1) need at least "
            f"{num_classes - 1} dimensions, got {dim}"
        )
    dtype = checked_dtype(dtype)
    frame = _random_frame(dim, max(1, num_classes - 1), generator)
    if num_classes == 1:
        rows = frame.T
    else:
        rows = math.sqrt(num_classes / (num_classes - 1)) * (_centred_basis(num_classes, frame.device) @ frame.T)
    return placed(rows, dtype, device)


def orthogonal_frame(
    num_classes: int,
    dim: int,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Orthonormal rows: ``num_classes`` unit vectors at right angles, uniform over all such frames.

    These are the class means of non-negative features at their optimum, and those of [ENC] Theorem III.1 as
    the penalty on the bias grows.

    Args:
        num_classes: number of vectors K, at least 1.
        dim: dimension d, at least K.
        generator, dtype, device: as in :func:`simplex_etf`.

    Returns:
        Tensor of shape (num_classes, dim).

    Example:
        >>> w = nckernels.geometry.orthogonal_frame(10, 64)
        >>> torch.testing.assert_close(w @ w.T, torch.eye(10))
    """
    check_sizes(num_classes, dim)
    if dim < num_classes:
        raise ValueError(f"dim: {num_classes} orthogonal vectors need at least {num_classes} dimensions, got {dim}")
    dtype = checked_dtype(dtype)
    return placed(_random_frame(dim, num_classes, generator).T, dtype, device)


def shifted_simplex_etf(
    num_classes: int,
    dim: int,
    alpha: float = 1.0,
    beta: float = 1.0,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    r"""Shifted simplex equiangular tight frame ([ENC] Definition III.1), classes in rows.

    With ``P`` a random semi-orthogonal ``d x K`` matrix, the columns of

    .. math:: M = \alpha P \Big( I - \frac{\beta}{K} 1 1^\top \Big), \qquad
              M^\top M = \alpha^2 \Big( I - \frac{1 - (1 - \beta)^2}{K} 1 1^\top \Big).

    ``beta=0`` is an orthogonal frame, ``beta=1`` a simplex. ``beta`` and ``2 - beta`` give the same angles.
    Subtracting the mean row from any of them leaves the simplex, ``beta=1``. The rows all have the norm
    :math:`\alpha \sqrt{1 - (1 - (1 - \beta)^2)/K}`, which is not 1: :func:`simplex_etf` is
    :math:`\alpha = \sqrt{K/(K-1)}, \beta = 1`.

    Args:
        num_classes: number of vectors K, at least 1. A single one has the norm :math:`\alpha |1 - \beta|`,
            which is 0 for ``beta=1``.
        dim: dimension d, at least K; for ``beta=1``, where the rows sum to zero, K - 1 (and at least 1).
        alpha: scale, positive and finite.
        beta: shift, any finite number.
        generator, dtype, device: as in :func:`simplex_etf`. For d >= K a seed gives the same P whatever
            ``alpha`` and ``beta`` are.

    Returns:
        Tensor of shape (num_classes, dim).

    Example:
        >>> w = nckernels.geometry.shifted_simplex_etf(10, 64, beta=0.5)
        >>> centred = F.normalize(w - w.mean(0))  # a simplex, whatever beta is
        >>> print(f"{centred[0] @ centred[1]:.4f}")
        -0.1111
    """
    check_sizes(num_classes, dim)
    _checks.number("alpha", alpha)
    if not 0.0 < alpha < math.inf:
        raise ValueError(f"alpha must be positive and finite, got {alpha}")
    _checks.number("beta", beta)
    if not math.isfinite(beta):
        raise ValueError(f"beta must be finite, got {beta}")
    needed = max(1, num_classes - 1 if beta == 1.0 else num_classes)
    if dim < needed:
        instead = "" if beta == 1.0 else f" (beta=1 needs {max(1, num_classes - 1)})"
        raise ValueError(
            f"dim: {num_classes} vectors with beta={beta:g} need at least {needed} dimensions{instead}, got {dim}"
        )
    dtype = checked_dtype(dtype)
    # I - beta 11'/K = V V' + (1 - beta) 11'/K with V the basis of the hyperplane that is orthogonal to the ones.
    frame = _random_frame(dim, min(dim, num_classes), generator)
    ones = frame.new_full((num_classes, 1), (1.0 - beta) / math.sqrt(num_classes))
    coordinates = torch.cat([_centred_basis(num_classes, frame.device), ones], 1)[:, : frame.shape[1]]
    return placed(alpha * (coordinates @ frame.T), dtype, device)


def cross_polytope(
    num_classes: int,
    dim: int,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Cross-polytope: the 2d vectors +-e_i, randomly rotated. Rows i and i + d are antipodal.

    It is the only set of K = 2d unit vectors with no cosine above 0. With fewer vectors, d + 1 < K < 2d, the largest
    cosine cannot be below 0 either (Rankin 1955). But a part of the polytope is less uniform than other sets, for
    instance simplices in orthogonal subspaces, so K must be 2d.

    Args:
        num_classes: number of vectors K, exactly 2d.
        dim: dimension d, at least 1.
        generator, dtype, device: as in :func:`simplex_etf`.

    Returns:
        Tensor of shape (num_classes, dim).

    Example:
        >>> w = nckernels.geometry.cross_polytope(8, 4)
        >>> torch.equal(w[:4], -w[4:])
        True
    """
    check_sizes(num_classes, dim)
    if num_classes != 2 * dim:
        raise ValueError(
            f"dim: a cross-polytope has 2d vectors, so {num_classes} of them need dim = num_classes / 2"
            f"{'' if num_classes % 2 else f' = {num_classes // 2}'}, got {dim}"
        )
    dtype = checked_dtype(dtype)
    axes = _random_frame(dim, dim, generator).T
    return placed(torch.cat([axes, -axes]), dtype, device)


def check_sizes(num_classes: int, dim: int) -> None:
    _checks.integer("num_classes", num_classes)
    _checks.integer("dim", dim)
    if num_classes < 1:
        raise ValueError(f"num_classes: expected at least 1, got {num_classes}")
    if dim < 1:
        raise ValueError(f"dim: expected at least 1, got {dim}")


def checked_dtype(dtype: torch.dtype | None) -> torch.dtype:
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating-point dtype, got {dtype!r}")
    return dtype


def placed(rows: Tensor, dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
    return rows.to(device="cpu" if device is None else device, dtype=dtype).contiguous()


def _random_frame(dim: int, count: int, generator: torch.Generator | None) -> Tensor:
    """``count`` orthonormal columns in ``dim`` dimensions, uniform over all such frames, on the generator's device."""
    device = torch.device("cpu") if generator is None else generator.device
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
