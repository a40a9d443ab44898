"""How far a classifier is from neural collapse.

Neural collapse (Papyan et al. 2020) is the limit in which the features of a class shrink to their mean
(NC1), the class means form a simplex equiangular tight frame centred at the origin (NC2) and each prototype
points along the mean of its class (NC3). :func:`neural_collapse` measures all of it in two ways: the metrics
of [NCD] Table 3 with the definitions that reproduce its numbers, and direct measurements of NC1 and NC2,
because several of the former say less than their names suggest:

* The **intra-class effective rank** counts the directions of the within-class scatter and ignores its size.
  It is at least 1 as long as there is any scatter, so its printed optimum 0 is approached by no sequence of
  models; it jumps there at exact collapse. :attr:`~NeuralCollapse.nc1` and
  :attr:`~NeuralCollapse.within_scatter` measure the size.
* The **inter-class effective rank** is K - 1 exactly when the *centred* class means form a simplex. Where
  that simplex sits is invisible to it: an orthogonal frame of means, the best that non-negative (ReLU)
  features can do, also scores K - 1. :attr:`~NeuralCollapse.offset` tells them apart. Near the optimum the
  rank is flat: a relative spread e of the eigenvalues lowers it by about (K - 1) e^2 / 2, so that 99.5 % of
  the optimum can hide cosines that are off by 0.08 (K = 10). The ``nc2_*`` deviations grow linearly in e.
* **MIR** at an exact simplex is 1/(K-1) + ((K-2)/(K-1)) ln(K-2)/ln(K-1), not 1: 0.952 for K = 10.
* The **published MIR and HDR** subtract the *direction* of the global mean, which is rounding noise once the
  means are centred. ``mir_centred`` and ``hdr_centred`` subtract the mean first and normalise after.

Features and prototypes are scaled to unit length, as the losses do. All arithmetic is float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "NeuralCollapse",
    "SimplexDeviation",
    "class_means",
    "convergence_iteration",
    "covariance_rank",
    "effective_rank",
    "entropy_difference_ratio",
    "first_reach",
    "instance_alignment",
    "intra_class_rank",
    "matrix_entropy",
    "mutual_information_ratio",
    "neural_collapse",
    "optimum",
    "ranges",
    "simplex_deviation",
    "variability_collapse",
    "weight_alignment",
    "within_class_scatter",
]


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
    noise = _noise(features.dtype)
    u, target = _directions(features), target.to(device=_home(features.device), dtype=torch.int64)
    means, counts = class_means(u, target, num_classes)
    present = counts > 0
    means = means[present]
    compact = (present.cumsum(0) - 1)[target]  # labels without the absent classes
    deviation = simplex_deviation(means)
    v = None if prototypes is None else _directions(prototypes)
    seen = None if v is None else v[present]
    published = _unit(_unit(means) - _unit(u.mean(0)))
    centred = _unit(means - means.mean(0))
    return NeuralCollapse(
        intra_erank=intra_class_rank(u, compact, noise=noise),
        inter_erank=covariance_rank(means, noise=noise),
        weights_erank=_NAN if v is None or prototypes is None else covariance_rank(v, noise=_noise(prototypes.dtype)),
        weight_alignment=_NAN if seen is None else weight_alignment(seen, means),
        instance_alignment=_NAN if seen is None else instance_alignment(u, seen, compact),
        mir=_NAN if seen is None else mutual_information_ratio(seen @ seen.T, published @ published.T),
        hdr=_NAN if seen is None else entropy_difference_ratio(seen @ seen.T, published @ published.T),
        nc1=variability_collapse(u, compact, noise=noise),
        within_scatter=within_class_scatter(u, compact),
        nc2_norms=deviation.norms,
        nc2_cosines=deviation.cosines,
        nc2_cosines_max=deviation.cosines_max,
        offset=deviation.offset,
        mir_centred=_NAN if seen is None else mutual_information_ratio(seen @ seen.T, centred @ centred.T),
        hdr_centred=_NAN if seen is None else entropy_difference_ratio(seen @ seen.T, centred @ centred.T),
    )


def optimum(num_classes: int) -> NeuralCollapse:
    """The value of every metric at exact neural collapse with K classes."""
    k = num_classes
    if k < 2:
        raise ValueError(f"num_classes: expected at least 2, got {k}")
    mir = _NAN if k == 2 else 1 / (k - 1) + (k - 2) / (k - 1) * math.log(k - 2) / math.log(k - 1)
    zero_entropy = _NAN if k == 2 else 0.0  # two antipodal vectors have entropy 0, their ratios are 0/0
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


# The single metrics. They take features as they are: pass unit vectors for the definitions of [NCD], raw ones
# for those of Papyan et al. Labels are expected in [0, K) with every class present.


def class_means(features: Tensor, target: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Plain means per class, (K, d) in float64, zero where a class is absent, and the class counts (K,)."""
    features = _double(features)
    sums = features.new_zeros(num_classes, features.shape[1]).index_add_(0, target, features)
    counts = torch.bincount(target, minlength=num_classes)
    return sums / counts.clamp(min=1).unsqueeze(1), counts


def effective_rank(matrix: Tensor) -> float:
    """exp of the entropy of the singular values scaled to sum 1 (Roy & Vetterli 2007), 0 for zero."""
    return _spectrum_rank(torch.linalg.svdvals(_double(matrix)))


def covariance_rank(points: Tensor, *, noise: float | None = None) -> float:
    """Effective rank of the covariance matrix of the rows: at most min(n - 1, d), 0 if all are the same.

    Points whose rms distance from their mean is at most ``noise`` times their rms norm count as the same;
    the default is the rounding error of the dtype. NaN for fewer than two points.

    The authors' code adds 1e-7 to each of the d shares before the entropy, which raises the result by less
    than 0.1 % at d = 512; it is left out here so that a simplex gives K - 1 exactly.
    """
    if len(points) < 2:
        return _NAN
    noise = _noise(points.dtype) if noise is None else noise
    points = _double(points)
    deviations = points - points.mean(0)
    if deviations.norm() <= noise * points.norm():
        return 0.0
    n, d = points.shape
    gram = deviations @ deviations.T if n < d else deviations.T @ deviations  # the same non-zero eigenvalues
    return _spectrum_rank(torch.linalg.eigvalsh(gram).clamp(min=0))


def intra_class_rank(features: Tensor, target: Tensor, *, noise: float | None = None) -> float:
    """Mean over the classes of :func:`covariance_rank`; classes with one sample are left out."""
    by_class = features[target.argsort()].split(torch.bincount(target).tolist())
    ranks = [covariance_rank(rows, noise=noise) for rows in by_class if len(rows) > 1]
    return sum(ranks) / len(ranks) if ranks else _NAN


def weight_alignment(prototypes: Tensor, means: Tensor) -> float:
    """Mean over c of |v_c - m_c/|m_c||^2 with v_c the unit prototype: NC3, from 0 to 4."""
    return (_directions(prototypes) - _unit(means)).square().sum(1).mean().item()


def instance_alignment(features: Tensor, prototypes: Tensor, target: Tensor) -> float:
    """Mean over i of |u_i - v_{y_i}|^2, u and v unit vectors: NC1 and NC3 together, from 0 to 4."""
    return (_directions(features) - _directions(prototypes)[target]).square().sum(1).mean().item()


def matrix_entropy(gram: Tensor) -> float:
    """-sum l ln l over the eigenvalues l of G/K, G = Gram matrix of K unit vectors: from 0 to ln K."""
    eigenvalues = torch.linalg.eigvalsh(_double(gram) / len(gram)).clamp(min=0)
    return -torch.xlogy(eigenvalues, eigenvalues).sum().item()


def mutual_information_ratio(gram_w: Tensor, gram_m: Tensor) -> float:
    """MIR = (H(G_W) + H(G_M) - H(G_W * G_M)) / min(H(G_W), H(G_M)), * the entrywise product [NCD §5.2].

    NaN where an entropy is 0: one vector, or two that are parallel.
    """
    if len(gram_w) < 2:
        return _NAN
    h_w, h_m, h_joint = matrix_entropy(gram_w), matrix_entropy(gram_m), matrix_entropy(gram_w * gram_m)
    return _ratio(h_w + h_m - h_joint, min(h_w, h_m), floor=_NO_ENTROPY)


def entropy_difference_ratio(gram_w: Tensor, gram_m: Tensor) -> float:
    """HDR = |H(G_W) - H(G_M)| / max(H(G_W), H(G_M)) [NCD §5.2]; NaN where both are 0."""
    if len(gram_w) < 2:
        return _NAN
    h_w, h_m = matrix_entropy(gram_w), matrix_entropy(gram_m)
    return _ratio(abs(h_w - h_m), max(h_w, h_m), floor=_NO_ENTROPY)


def variability_collapse(features: Tensor, target: Tensor, *, noise: float | None = None) -> float:
    """NC1 of Papyan et al.: tr(S_W S_B^+) / K.

    S_W = (1/N) sum_i (z_i - m_{y_i})(z_i - m_{y_i})^T and S_B = (1/K) sum_c (m_c - m)(m_c - m)^T, m the mean
    of the class means. Only the scatter along the directions in which the means differ counts. Directions
    whose spread is at most the rounding error (``noise``, by default of the dtype) are left out of S_B. NaN
    if the means coincide: nothing is then separated, though the formula would give 0.

    With B the (K, d) matrix of the m_c - m and its SVD B = P diag(s) Q^T, S_B^+ = K Q diag(s)^-2 Q^T, hence
    the value is the mean of |diag(s)^-1 Q^T (z_i - m_{y_i})|^2: no d x d matrix is formed.
    """
    noise = _noise(features.dtype) if noise is None else noise
    features = _double(features)
    means, _ = class_means(features, target, int(target.max()) + 1)
    _, s, q_t = torch.linalg.svd(means - means.mean(0), full_matrices=False)
    rounding = torch.maximum(noise * means.norm(), max(means.shape) * torch.finfo(s.dtype).eps * s[0])
    keep = s > rounding
    if not keep.any():
        return _NAN
    whitening = q_t[keep].T / s[keep]
    return ((features @ whitening) - (means @ whitening)[target]).square().sum(1).mean().item()


def within_class_scatter(features: Tensor, target: Tensor) -> float:
    """Mean over i of |z_i - m_{y_i}|^2 = tr S_W, the plain size of the within-class scatter."""
    features = _double(features)
    means, _ = class_means(features, target, int(target.max()) + 1)
    return (features - means[target]).square().sum(1).mean().item()


class SimplexDeviation(NamedTuple):
    """Result of :func:`simplex_deviation`; all are 0 for a simplex centred at the origin."""

    norms: float
    cosines: float
    cosines_max: float
    offset: float


def simplex_deviation(means: Tensor) -> SimplexDeviation:
    """Distance of K class means from a centred simplex: true NC2. NaN for fewer than two means.

    With b_c = m_c - mean(m): ``norms`` is std |b_c| / mean |b_c|; ``cosines`` and ``cosines_max`` are the
    root mean square and the largest deviation of cos(b_c, b_c') from -1/(K-1) over the pairs; ``offset`` is
    |mean(m)| / rms |m_c|, which is the only one of them that an orthogonal frame does not bring to 0.
    """
    k = len(means)
    if k < 2:
        return SimplexDeviation(_NAN, _NAN, _NAN, _NAN)
    means = _double(means)
    centre = means.mean(0)
    centred = means - centre
    norms = centred.norm(dim=1)
    directions = _unit(centred)
    upper = torch.triu_indices(k, k, offset=1, device=means.device)
    error = (directions @ directions.T)[upper[0], upper[1]] + 1 / (k - 1)
    return SimplexDeviation(
        norms=_ratio(norms.std(correction=0).item(), norms.mean().item()),
        cosines=error.square().mean().sqrt().item(),
        cosines_max=error.abs().max().item(),
        offset=_ratio(centre.norm().item(), means.square().sum(1).mean().sqrt().item()),
    )


# Speed of convergence, [NCD] Table 7.


def convergence_iteration(
    steps: Sequence[int], values: Sequence[float], optimum: float, tolerance: float, *, smoothing: float = 0.5
) -> int | None:
    """First step from which the smoothed values stay within ``tolerance`` of ``optimum``; or None.

    Args:
        steps: iterations at which ``values`` were taken, increasing.
        values: one metric. A NaN counts as outside and restarts the average.
        optimum: see :func:`optimum`.
        tolerance: for "95 % NC" 0.05 times the metric's entry in :func:`ranges`.
        smoothing: weight of the past in the exponentially weighted average a_t = s a_{t-1} + (1 - s) x_t over
            the evaluations, in [0, 1); 0 takes the values as they are.
    """
    if len(steps) != len(values):
        raise ValueError(f"values: expected one per step ({len(steps)}), got {len(values)}")
    if not tolerance >= 0:
        raise ValueError(f"tolerance: expected a number >= 0, got {tolerance}")
    reached = None
    for step, value in zip(steps, _smoothed(values, smoothing), strict=True):
        if not abs(value - optimum) <= tolerance:
            reached = None
        elif reached is None:
            reached = step
    return reached


def first_reach(
    steps: Sequence[int], values: Sequence[float], level: float, optimum: float, *, smoothing: float = 0.5
) -> int | None:
    """First step from which the smoothed values stay at least as close to ``optimum`` as ``level`` is.

    With ``level`` the final value of another run, divided by that run's iterations, this is part (II) of
    [NCD] Table 7: the share of its iterations needed to match it. None if it is not matched at the end.
    """
    return convergence_iteration(steps, values, optimum, abs(level - optimum), smoothing=smoothing)


def _smoothed(values: Sequence[float], smoothing: float) -> list[float]:
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing: expected a number in [0, 1), got {smoothing}")
    averages: list[float] = []
    average = _NAN
    for value in values:
        average = value if math.isnan(average) else smoothing * average + (1 - smoothing) * value
        averages.append(average)
    return averages


_NAN = float("nan")
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_NO_ENTROPY = 1e-12  # the entropy of a rank-one Gram matrix, up to rounding


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


def _home(device: torch.device) -> torch.device:
    """Where float64 arithmetic runs: Metal has none."""
    return torch.device("cpu") if device.type == "mps" else device


def _double(x: Tensor) -> Tensor:
    return x.detach().to(device=_home(x.device), dtype=torch.float64)


def _directions(x: Tensor) -> Tensor:
    """Unit rows in float64, however short they were; zero rows stay zero."""
    return F.normalize(_double(x), dim=-1, eps=torch.finfo(torch.float64).tiny)


def _unit(x: Tensor) -> Tensor:
    """Unit rows in float64 of sums and differences of unit rows; those of the size of rounding errors stay short."""
    return F.normalize(_double(x), dim=-1, eps=1e-12)


def _noise(dtype: torch.dtype) -> float:
    """Relative rounding error of vectors given in ``dtype`` and averaged in float64."""
    return torch.finfo(dtype).eps / 4 + 16 * torch.finfo(torch.float64).eps


def _spectrum_rank(spectrum: Tensor) -> float:
    total = spectrum.sum()
    if total == 0:
        return 0.0
    share = spectrum / total
    return math.exp(-torch.xlogy(share, share).sum().item())


def _ratio(numerator: float, denominator: float, floor: float = 0.0) -> float:
    return numerator / denominator if denominator > floor else _NAN
