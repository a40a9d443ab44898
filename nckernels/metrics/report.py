"""Every metric of neural collapse in one call."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor

from .. import _checks
from .measures import (
    NAN,
    ClassStatistics,
    SimplexDeviation,
    between_class_axes,
    check_features,
    check_labels,
    check_matrix,
    check_positive,
    class_distance_variance_of,
    class_statistics,
    covariance_rank,
    described,
    directions,
    double,
    entropy_ratios,
    home,
    intra_class_rank,
    matrix_entropy,
    nearest_mean_agreement,
    rotated_self_duality,
    rounding_noise,
    scatter_ratio_of,
    simplex_deviation,
    unit,
    weight_alignment,
    whitened_scatter,
)

Features = Literal["signed", "relu"]


@dataclass(frozen=True)
class NeuralCollapse:
    """Result of :func:`neural_collapse`. A value that the data leave undefined is NaN.

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
    """Mean over the classes of ``|v_c - m_c/|m_c||^2``; optimum 0."""
    instance_alignment: float
    """Mean over the samples of ``|u_i - v_{y_i}|^2``; optimum 0."""
    mir: float
    """Mutual information ratio of prototypes and class means, centred as published; optimum: see above."""
    hdr: float
    """Relative difference of their matrix entropies, centred as published; optimum 0."""
    nc1: float
    """tr(S_W S_B^+) / K: within-class scatter relative to the scatter of the means; optimum 0."""
    within_scatter: float
    """Mean over the samples of ``|u_i - m_{y_i}|^2``, from 0 (collapsed) to 1."""
    nc2_norms: float
    """Standard deviation over mean of the norms of the centred class means; optimum 0."""
    nc2_cosines: float
    """Root mean square deviation of the pairwise cosines of the centred means from -1/(K-1); optimum 0."""
    nc2_cosines_max: float
    """The largest such deviation; optimum 0."""
    offset: float
    """``|mean of the m_c| / rms |m_c|``: 0 for a centred simplex, 1/sqrt(K) for an orthogonal frame."""
    mir_centred: float
    """MIR with the class means centred before they are normalised; optimum as for ``mir``."""
    hdr_centred: float
    """HDR with the class means centred before they are normalised; optimum 0."""
    nc1_rank: float
    """Number of directions of S_B^+ in ``nc1``, at most min(K - 1, d); 0 if the means coincide, optimum K - 1."""
    scatter_ratio: float
    """tr(S_W) / tr(S_B): within-class scatter relative to that of the means, all directions alike; optimum 0."""
    cdnv: float
    """Mean over the pairs of ``(v_c + v_c') / (2 |m_c - m_c'|^2)``, v_c the mean of ``|u_i - m_c|^2``; optimum 0."""
    nc3_rotated: float
    """NC3' of [ENC] Eq. 12: v_c against the centred means up to rotation and scale, from 0 to 2; optimum 0."""
    nc4: float
    """Share of the samples that the classifier gives to the class of the nearest mean; optimum 1."""
    bias_spread: float
    """Standard deviation over the classes of the bias; optimum 0."""


@torch.no_grad()
def neural_collapse(
    features: Tensor,
    target: Tensor,
    prototypes: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    num_classes: int | None = None,
) -> NeuralCollapse:
    """Every metric of neural collapse, of a whole (training) set at once.

    Args:
        features: (N, d), any floating-point dtype, any positive scale per row.
        target: (N,) integer labels in [0, num_classes).
        prototypes: (num_classes, d), any positive scale per row. Without them the metrics that compare with
            prototypes are NaN.
        bias: (num_classes,) floating-point. With it the classifier of ``nc4`` is linear, argmax_c z.w_c + b_c
            against the nearest mean of the features, all of them as given. Without it the classifier compares
            cosines, argmax_c u.v_c against the nearest mean of unit features. The other metrics ignore it.
        num_classes: by default the number of prototypes, or without prototypes the length of the bias, or
            without either the largest label + 1.

    Classes without samples are left out everywhere but in ``weights_erank`` and ``bias_spread``. Classes with
    one sample have no covariance and are left out of ``intra_erank``; in ``cdnv`` their variance is 0. With a
    single class every between-class metric is NaN and ``nc1_rank`` is 0. If the means coincide, up to the
    rounding error of the features' dtype, ``nc1``, ``scatter_ratio``, ``cdnv``, ``mir``, ``hdr``, their centred
    forms, the ``nc2_*``, ``nc3_rotated`` and ``nc4`` are NaN, and ``inter_erank`` and ``nc1_rank`` are 0; for ``cdnv``
    two means that coincide suffice. A mean of at most the rounding error counts as zero, at a squared distance of 1
    from every unit vector in ``weight_alignment``; ``offset`` is NaN if all means are zero.
    Prototypes that are all zero have rank 0, squared distance 1 from every unit vector and entropy 0 (``hdr`` 1,
    ``mir`` NaN), no rotation (``nc3_rotated`` NaN), and the decision is always the first class.

    With prototypes, ``mir``, ``hdr`` and their centred forms need the eigenvalues of five K x K matrices: O(K^3) time,
    and about six such matrices in memory (800 MB each at K = 10,000). For d < K nothing else makes one.

    Raises:
        ValueError: where a shape, a dtype, a label or a value that is not finite does not fit the above.

    Example:
        >>> y = torch.arange(4).repeat(5)
        >>> x = torch.eye(4)[y]  # an orthogonal frame, collapsed

        >>> result = nckernels.metrics.neural_collapse(x, y, prototypes=torch.eye(4))
        >>> result.within_scatter, result.nc4, result.offset  # collapsed, but off centre by 1 / sqrt(K)
        (0.0, 1.0, 0.5)
    """
    num_classes = _check(features, target, prototypes, bias, num_classes)
    noise = rounding_noise(features.dtype)
    u, target = directions(features), target.to(device=home(features.device), dtype=torch.int64)
    statistics = class_statistics(u, target, noise=noise)
    means, compact = statistics.means, statistics.labels
    present = torch.bincount(target, minlength=num_classes) > 0

    def agreement() -> float:
        if prototypes is None:
            return NAN
        if bias is None:
            v = directions(prototypes).to(u.device)[present]
            return NAN if math.isnan(statistics.between) else nearest_mean_agreement(u, v, means)
        raw = class_statistics(features, target)
        w, b = double(prototypes).to(u.device)[present], double(bias).to(u.device)[present]
        return NAN if math.isnan(raw.between) else nearest_mean_agreement(features, w, raw.means, b)

    axes = between_class_axes(statistics)
    return report_of(
        statistics,
        axes,
        present,
        prototypes,
        bias,
        mean=u.mean(0),
        noise=noise,
        intra_erank=intra_class_rank(u, compact, noise=noise),
        nc1=whitened_scatter(u, statistics, axes),
        nc4=agreement(),
    )


def report_of(
    statistics: ClassStatistics,
    axes: Tensor,
    present: Tensor,
    prototypes: Tensor | None,
    bias: Tensor | None,
    *,
    mean: Tensor,
    noise: float,
    intra_erank: float,
    nc1: float,
    nc4: float,
) -> NeuralCollapse:
    """What follows from the statistics of the classes that are ``present``, and the three metrics that do not.

    Args:
        statistics: of the unit features.
        axes: their :func:`between_class_axes`.
        present: (K,) bool.
        prototypes, bias: of all K classes.
        mean: (d,) of all unit features.
        noise: :func:`rounding_noise` of the features.
    """
    means, counts = statistics.means, statistics.counts
    coincide = math.isnan(statistics.between)  # then the centred means are rounding errors
    deviation = simplex_deviation(means)
    if coincide:
        deviation = SimplexDeviation(NAN, NAN, NAN, deviation.offset)
    b = means - means.mean(0)
    v, weights_erank = None, NAN
    if prototypes is not None:
        rows = directions(prototypes)
        v = rows.to(means.device)[present]
        weights_erank = covariance_rank(rows, noise=rounding_noise(prototypes.dtype))

    def against(metric: Callable[[Tensor], float], *, of_differences: bool = False) -> float:
        """A metric of the unit prototypes of the classes that occur."""
        return NAN if v is None or (of_differences and coincide) else metric(v)

    def instances(v: Tensor) -> float:
        """The mean of |u_i - v_{y_i}|^2: sum_c n_c (v_c + |m_c - v_c|^2) / N."""
        squares = statistics.variances + (means - v).square().sum(1)
        return ((counts * squares).sum() / counts.sum()).item()

    mir = hdr = mir_centred = hdr_centred = NAN
    if v is not None and not coincide:  # K x K matrices
        gram, published, centred = v @ v.T, unit(unit(means) - unit(mean)), unit(b)
        entropy = matrix_entropy(gram)
        mir, hdr = entropy_ratios(entropy, gram, published @ published.T)
        mir_centred, hdr_centred = entropy_ratios(entropy, gram, centred @ centred.T)
    return NeuralCollapse(
        intra_erank=intra_erank,
        inter_erank=0.0 if coincide and len(means) > 1 else covariance_rank(means, noise=noise),
        weights_erank=weights_erank,
        weight_alignment=against(lambda v: weight_alignment(v, means)),
        instance_alignment=against(instances),
        mir=mir,
        hdr=hdr,
        nc1=nc1,
        within_scatter=statistics.within,
        nc2_norms=deviation.norms,
        nc2_cosines=deviation.cosines,
        nc2_cosines_max=deviation.cosines_max,
        offset=deviation.offset,
        mir_centred=mir_centred,
        hdr_centred=hdr_centred,
        nc1_rank=float(axes.shape[1]),
        scatter_ratio=scatter_ratio_of(statistics),
        cdnv=class_distance_variance_of(statistics),
        nc3_rotated=against(lambda v: rotated_self_duality(v, b), of_differences=True),
        nc4=nc4,
        bias_spread=NAN if bias is None else double(bias).std(correction=0).item(),
    )


def optimum(num_classes: int, *, features: Features = "signed") -> NeuralCollapse:
    """The value of every metric at the optimum of K >= 2 classes; NaN where that is 0/0.

    Args:
        num_classes: K.
        features: ``"signed"``: neural collapse, means and prototypes on one centred simplex. ``"relu"``: the optimum
            of features without negative entries, which cannot form that simplex. The features of a class are all one
            vector of an orthonormal frame and the prototypes are the simplex of the centred frame (u_i.v_y =
            sqrt((K-1)/K)). Alignments, ``mir``, ``hdr`` and ``offset`` differ, nothing else does.

    With h(r) the entropy of K unit vectors that have pairwise cosines r, and s = -1/(K-1) those of the simplex,
    MIR = (h(s) + h(r) - h(r s)) / min(h(s), h(r)) and HDR = ``|h(s) - h(r)| / max(h(s), h(r))``. Signed r is s, hence
    MIR = 1/(K-1) + ((K-2)/(K-1)) ln(K-2)/ln(K-1) and HDR = 0. For an orthonormal frame the published centring makes
    r = (1 - 2/sqrt(K)) / (2 - 2/sqrt(K)).

    Example:
        >>> best = nckernels.metrics.optimum(10)
        >>> best.inter_erank, best.nc1, round(best.mir, 3)
        (9.0, 0.0, 0.952)
        >>> round(nckernels.metrics.optimum(10, features="relu").offset, 3)
        0.316
    """
    k = num_classes
    check_positive("num_classes", k, least=2)
    if features not in ("signed", "relu"):
        raise ValueError(f"features: expected 'signed' or 'relu', got {features!r}")
    relu = features == "relu"
    simplex = -1 / (k - 1)
    published = (1 - 2 / math.sqrt(k)) / (2 - 2 / math.sqrt(k)) if relu else simplex
    mir, hdr = _entropy_ratios(k, simplex, published)
    mir_centred, hdr_centred = _entropy_ratios(k, simplex, simplex)
    alignment = 2 - 2 * math.sqrt((k - 1) / k) if relu else 0.0
    return NeuralCollapse(
        intra_erank=0.0, inter_erank=k - 1.0, weights_erank=k - 1.0, weight_alignment=alignment,
        instance_alignment=alignment, mir=mir, hdr=hdr, nc1=0.0, within_scatter=0.0, nc2_norms=0.0,
        nc2_cosines=0.0, nc2_cosines_max=0.0, offset=1 / math.sqrt(k) if relu else 0.0, mir_centred=mir_centred,
        hdr_centred=hdr_centred, nc1_rank=k - 1.0, scatter_ratio=0.0, cdnv=0.0, nc3_rotated=0.0, nc4=1.0,
        bias_spread=0.0,
    )  # fmt: skip


def ranges(num_classes: int, dim: int) -> dict[str, float]:
    """Size of the range of the metrics that have a natural one; "95 % NC" is within 5 % of it of the optimum.

    The ranks span 0 to d within classes and 0 to K - 1 between them; squared distances of unit vectors span 0
    to 2, the value of unrelated directions; the rest spans 0 to 1. [NCD] does not print its tolerances:
    these match the axes of its Fig. 2. ``nc1``, ``scatter_ratio``, ``cdnv`` and ``bias_spread`` are unbounded
    and therefore not listed.

    Args:
        num_classes: K, at least 2.
        dim: d, at least 1.

    Example:
        >>> nckernels.metrics.ranges(10, 64)["inter_erank"]
        9.0
    """
    check_positive("num_classes", num_classes, least=2)
    check_positive("dim", dim)
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
        "nc1_rank": num_classes - 1.0,
        "nc3_rotated": 2.0,
        "nc4": 1.0,
    }


def shares(result: NeuralCollapse, num_classes: int, dim: int, *, features: Features = "signed") -> dict[str, float]:
    """How much of the way to the optimum each metric of :func:`ranges` has gone: ``1 - |value - optimum| / range``.

    Clipped to [0, 1]; NaN where the value or the optimum is. "95 % NC" is a share of at least 0.95.

    Args:
        result: of :func:`neural_collapse`.
        num_classes: K, the number of classes that occur, which is what all but ``weights_erank`` are measured against.
        dim: number of features d.
        features: which :func:`optimum` counts.

    Example:
        >>> y = torch.arange(4).repeat(5)
        >>> points = nckernels.geometry.simplex_etf(4, 8, dtype=torch.float64)
        >>> result = nckernels.metrics.neural_collapse(points[y], y, points)
        >>> share = nckernels.metrics.shares(result, num_classes=4, dim=8)
        >>> share["nc2_cosines"] > 0.95, share["weight_alignment"] > 0.95  # "95 % NC"
        (True, True)
    """
    values, best = asdict(result), asdict(optimum(num_classes, features=features))

    def share(name: str, size: float) -> float:
        missing = abs(values[name] - best[name]) / size
        return NAN if math.isnan(missing) else max(0.0, 1 - missing)

    return {name: share(name, size) for name, size in ranges(num_classes, dim).items()}


def _entropy_ratios(k: int, r_w: float, r_m: float) -> tuple[float, float]:
    """MIR and HDR of K equiangular vectors with cosines r_w and K with r_m; NaN where the denominator is 0."""

    def entropy(r: float) -> float:
        eigenvalues = ((1 - r) / k, k - 1), ((1 + (k - 1) * r) / k, 1)  # of the Gram matrix over K, how often
        return -sum(times * x * math.log(x) for x, times in eigenvalues if x > 1e-15)

    h_w, h_m = entropy(r_w), entropy(r_m)
    low, high = min(h_w, h_m), max(h_w, h_m)
    mir = (h_w + h_m - entropy(r_w * r_m)) / low if low > 0 else NAN
    return mir, (high - low) / high if high > 0 else NAN


def _check(
    features: Tensor, target: Tensor, prototypes: Tensor | None, bias: Tensor | None, num_classes: int | None
) -> int:
    """The number of classes, if everything fits."""
    check_features(features, target)
    if num_classes is not None:
        check_positive("num_classes", num_classes)
    if prototypes is not None:
        check_matrix("prototypes", prototypes, empty=False)
        if prototypes.shape[1] != features.shape[1]:
            raise ValueError(
                f"prototypes: expected shape (num_classes, {features.shape[1]}), got {tuple(prototypes.shape)}"
            )
        if num_classes is not None and num_classes != len(prototypes):
            raise ValueError(f"num_classes: expected {len(prototypes)}, the number of prototypes, got {num_classes}")
        num_classes = len(prototypes)
    if bias is not None:
        wanted = "num_classes" if num_classes is None else num_classes
        fits = isinstance(bias, Tensor) and bias.ndim == 1 and bias.is_floating_point()
        if not fits or num_classes not in (None, len(bias)):
            raise ValueError(f"bias: expected a floating-point tensor ({wanted},), got {described(bias)}")
        _checks.finite("bias", bias, wait=True)
        num_classes = len(bias)
    if num_classes is None:
        num_classes = int(target.max()) + 1
    check_labels(target, num_classes)
    return num_classes
