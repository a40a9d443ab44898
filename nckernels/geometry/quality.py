"""How well a set of prototypes is spread over the sphere."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _checks
from ..metrics.measures import directions

_TILE = 1024  # rows and columns of cosines at a time: 8 MiB


@dataclass(frozen=True)
class PrototypeQuality:
    """Result of :func:`prototype_quality`. All fields but the last have no unit."""

    max_cosine: float
    """Cosine of the closest pair; -1/(K-1) is the least possible, reached by the simplex."""
    min_cosine: float
    mean_cosine: float
    """Mean over the pairs; at least -1/(K-1), reached whenever the unit vectors sum to zero."""
    uniformity: float
    """log of the mean over the pairs of ``exp(-t |w_i - w_j|^2)``, lower is more uniform."""
    separation: float
    """Angle of the closest pair in degrees."""


def prototype_quality(prototypes: Tensor, t: float = 2.0) -> PrototypeQuality:
    """Pairwise cosines, uniformity and separation of the directions of the rows ([DLP] Table 7, Eqs. 3-5).

    A vector is never paired with itself. The arithmetic is float64, in tiles of 1024 x 1024 cosines, so memory is a
    float64 copy of the rows and a constant.

    Args:
        prototypes: (K, d) of a floating dtype, rows of any length but zero.
        t: > 0, scale of the Gaussian potential in ``uniformity``.

    Returns:
        PrototypeQuality of floats; all NaN for a single vector, which has no pairs.

    Raises:
        TypeError, ValueError: naming the argument; ``prototypes`` must have rows, and each must be finite and not zero.

    Example:
        >>> nckernels.geometry.prototype_quality(torch.eye(3)).separation
        90.0
    """
    _checks.matrix("prototypes", prototypes, "K", "d")
    check_potential(t)
    if prototypes.shape[0] == 0:
        raise ValueError(f"prototypes must have K >= 1 rows, got {tuple(prototypes.shape)}")
    rows = _directions(prototypes)
    if len(rows) == 1:
        return PrototypeQuality(*[math.nan] * 5)
    largest, smallest, total, log_sums, closest = -math.inf, math.inf, 0.0, [], (0, 0)
    for i in range(0, len(rows), _TILE):
        for j in range(i, len(rows), _TILE):
            cosines = (rows[i : i + _TILE] @ rows[j : j + _TILE].T).clamp_(-1.0, 1.0)
            # On the diagonal each pair counts once: entries right of it.
            seen = torch.ones_like(cosines, dtype=torch.bool).triu(1) if i == j else None
            values = cosines.flatten() if seen is None else cosines[seen]
            if len(values) == 0:  # the last tile may hold one row
                continue
            if values.max() > largest:
                largest = values.max().item()
                ranked = cosines if seen is None else cosines.masked_fill(~seen, -math.inf)
                row, column = divmod(int(ranked.argmax()), cosines.shape[1])
                closest = (i + row, j + column)
            smallest = min(smallest, values.min().item())
            total += values.sum().item()
            log_sums.append(torch.logsumexp(2.0 * t * values, 0))
    pairs = len(rows) * (len(rows) - 1) / 2
    # |a - b|^2 = 2 - 2 cos, hence exp(-t |a - b|^2) = exp(2 t cos) exp(-2 t).
    uniformity = torch.logsumexp(torch.stack(log_sums), 0).item() - math.log(pairs) - 2.0 * t
    return PrototypeQuality(largest, smallest, total / pairs, uniformity, _angle(rows[closest[0]], rows[closest[1]]))


def check_potential(t: float) -> None:
    """Check the argument ``t`` of a Gaussian potential: a positive, finite number."""
    _checks.number("t", t)
    if not 0.0 < t < math.inf:
        raise ValueError(f"t must be positive and finite, got {t}")


def _directions(prototypes: Tensor) -> Tensor:
    """Unit rows in float64."""
    rows = prototypes.detach()
    size = rows.abs().amax(1) if rows.shape[1] else rows.new_zeros(len(rows))
    for bad, what in ((~size.isfinite(), "be finite"), (size == 0.0, "not be zero")):
        if bool(bad.any()):
            raise ValueError(f"prototypes: every row must {what}, row {int(bad.int().argmax())} breaks this")
    return directions(rows)


def _angle(a: Tensor, b: Tensor) -> float:
    """Angle between unit vectors in degrees, accurate also near 0 and 180 degrees, where the cosine is flat."""
    return math.degrees(2.0 * math.atan2((a - b).norm().item(), (a + b).norm().item()))
