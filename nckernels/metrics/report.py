"""Every metric of neural collapse in one call."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .measures import (
    NAN,
    class_means,
    covariance_rank,
    directions,
    entropy_difference_ratio,
    home,
    instance_alignment,
    intra_class_rank,
    mutual_information_ratio,
    rounding_noise,
    simplex_deviation,
    unit,
    variability_collapse,
    weight_alignment,
    within_class_scatter,
)

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class NeuralCollapse:
    """Result of :func:`neural_collapse`. A value that the data leaves undefined is NaN.

    u_i: unit features; m_c: plain mean of the u_i of class c; v_c: unit prototypes; K: classes present.
    The first seven fields follow [NCD] Table 3, the others are ours.
    """

    intra_erank: float
    """Mean over the classes of the effective rank of the covariance of u_i - m_c; optimum 0."""
    inter_erank: float
    """Effective rank of the covariance of the class means; optimum K - 1."""
    weights_erank: float
    """Effective rank of the covariance of the prototypes; optimum K - 1."""
    weight_alignment: float
    """Mean over the classes of |v_c - m_c/|m_c||^2; optimum 0."""
    instance_alignment: float
    """Mean over the samples of |u_i - v_{y_i}|^2; optimum 0."""
    mir: float
    """Mutual information ratio of prototypes and class means, centred as published; optimum: see above."""
    hdr: float
    """Relative difference of their matrix entropies, centred as published; optimum 0."""
    nc1: float
    """tr(S_W S_B^+) / K: within-class scatter relative to the scatter of the means; optimum 0."""
    within_scatter: float
    """Mean over the samples of |u_i - m_{y_i}|^2, from 0 (collapsed) to 1."""
    nc2_norms: float
    """Standard deviation over mean of the norms of the centred class means; optimum 0."""
    nc2_cosines: float
    """Root mean square deviation of the pairwise cosines of the centred means from -1/(K-1); optimum 0."""
    nc2_cosines_max: float
    """The largest such deviation; optimum 0."""
    offset: float
    """|mean of the m_c| / rms |m_c|: 0 for a centred simplex, 1/sqrt(K) for an orthogonal frame."""
    mir_centred: float
    """MIR with the class means centred before they are normalised; optimum as for ``mir``."""
    hdr_centred: float
    """HDR with the class means centred before they are normalised; optimum 0."""


@torch.no_grad()
def neural_collapse(
    features: Tensor, target: Tensor, prototypes: Tensor | None = None, *, num_classes: int | None = None
) -> NeuralCollapse:
    """Every metric of neural collapse, of a whole (training) set at once.

    Args:
        features: (N, d), any floating-point dtype, any positive scale per row.
        target: (N,) integer labels in [0, num_classes).
        prototypes: (num_classes, d), any positive scale per row. Without them the metrics that compare with
            prototypes are NaN.
        num_classes: by default the number of prototypes, or without prototypes the largest label + 1.

    Classes without samples are left out everywhere but in ``weights_erank``. Classes with one sample have no
    covariance and are left out of ``intra_erank``. With a single class every between-class metric is NaN.
    """
    _check(features, target, prototypes, num_classes)
    if num_classes is None:
        num_classes = int(target.max()) + 1 if prototypes is None else len(prototypes)
    if int(target.min()) < 0 or int(target.max()) >= num_classes:
        raise ValueError(
            f"target: expected labels in [0, {num_classes}), got {int(target.min())} to {int(target.max())}"
        )
    noise = rounding_noise(features.dtype)
    u, target = directions(features), target.to(device=home(features.device), dtype=torch.int64)
    means, counts = class_means(u, target, num_classes)
    present = counts > 0
    means = means[present]
    compact = (present.cumsum(0) - 1)[target]  # labels without the absent classes
    deviation = simplex_deviation(means)
    v = None if prototypes is None else directions(prototypes)
    seen = None if v is None else v[present]
    published = unit(unit(means) - unit(u.mean(0)))
    centred = unit(means - means.mean(0))
    return NeuralCollapse(
        intra_erank=intra_class_rank(u, compact, noise=noise),
        inter_erank=covariance_rank(means, noise=noise),
        weights_erank=NAN
        if v is None or prototypes is None
        else covariance_rank(v, noise=rounding_noise(prototypes.dtype)),
        weight_alignment=NAN if seen is None else weight_alignment(seen, means),
        instance_alignment=NAN if seen is None else instance_alignment(u, seen, compact),
        mir=NAN if seen is None else mutual_information_ratio(seen @ seen.T, published @ published.T),
        hdr=NAN if seen is None else entropy_difference_ratio(seen @ seen.T, published @ published.T),
        nc1=variability_collapse(u, compact, noise=noise),
        within_scatter=within_class_scatter(u, compact),
        nc2_norms=deviation.norms,
        nc2_cosines=deviation.cosines,
        nc2_cosines_max=deviation.cosines_max,
        offset=deviation.offset,
        mir_centred=NAN if seen is None else mutual_information_ratio(seen @ seen.T, centred @ centred.T),
        hdr_centred=NAN if seen is None else entropy_difference_ratio(seen @ seen.T, centred @ centred.T),
    )


def optimum(num_classes: int) -> NeuralCollapse:
    """The value of every metric at exact neural collapse with K classes."""
    k = num_classes
    if k < 2:
        raise ValueError(f"num_classes: expected at least 2, got {k}")
    mir = NAN if k == 2 else 1 / (k - 1) + (k - 2) / (k - 1) * math.log(k - 2) / math.log(k - 1)
    zero_entropy = NAN if k == 2 else 0.0  # two antipodal vectors have entropy 0, their ratios are 0/0
    return NeuralCollapse(
        intra_erank=0.0, inter_erank=k - 1.0, weights_erank=k - 1.0, weight_alignment=0.0,
        instance_alignment=0.0, mir=mir, hdr=zero_entropy, nc1=0.0, within_scatter=0.0, nc2_norms=0.0,
        nc2_cosines=0.0, nc2_cosines_max=0.0, offset=0.0, mir_centred=mir, hdr_centred=zero_entropy,
    )  # fmt: skip


def ranges(num_classes: int, dim: int) -> dict[str, float]:
    """Size of the range of the metrics that have a natural one; "95 % NC" is within 5 % of it of the optimum.

    The ranks span 0 to d within classes and 0 to K - 1 between them; squared distances of unit vectors span 0
    to 2, the value of unrelated directions; the rest spans 0 to 1. [NCD] does not print its tolerances:
    these match the axes of its Fig. 2. ``nc1`` is unbounded and therefore not listed.
    """
    return {
        "intra_erank": float(dim),
        "inter_erank": num_classes - 1.0,
        "weights_erank": num_classes - 1.0,
        "weight_alignment": 2.0,
        "instance_alignment": 2.0,
        "mir": 1.0,
        "hdr": 1.0,
        "within_scatter": 1.0,
        "nc2_norms": 1.0,
        "nc2_cosines": 1.0,
        "nc2_cosines_max": 1.0,
        "offset": 1.0,
        "mir_centred": 1.0,
        "hdr_centred": 1.0,
    }


def _check(features: Tensor, target: Tensor, prototypes: Tensor | None, num_classes: int | None) -> None:
    if features.ndim != 2 or len(features) == 0 or not features.is_floating_point():
        raise ValueError(
            f"features: expected a floating-point tensor (N, d) with N >= 1, got {features.dtype} of shape "
            f"{tuple(features.shape)}"
        )
    if target.shape != features.shape[:1] or target.dtype not in _INTEGERS:
        raise ValueError(
            f"target: expected {len(features)} integer labels, got {target.dtype} of shape {tuple(target.shape)}"
        )
    if not features.isfinite().all():
        raise ValueError("features: expected finite values, got inf or NaN")
    if prototypes is None:
        return
    if prototypes.ndim != 2 or prototypes.shape[1] != features.shape[1] or len(prototypes) == 0:
        raise ValueError(
            f"prototypes: expected shape (num_classes, {features.shape[1]}), got {tuple(prototypes.shape)}"
        )
    if num_classes is not None and num_classes != len(prototypes):
        raise ValueError(f"num_classes: expected {len(prototypes)}, the number of prototypes, got {num_classes}")
    if not prototypes.isfinite().all():
        raise ValueError("prototypes: expected finite values, got inf or NaN")
