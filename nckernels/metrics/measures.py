"""The single metrics of neural collapse.

They take features as they are: pass unit vectors for the definitions of [NCD], raw ones for those of Papyan et al.
Labels are expected in [0, K) with every class present. All arithmetic is float64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NAN = float("nan")
_NO_ENTROPY = 1e-12  # the entropy of a rank-one Gram matrix, up to rounding


def class_means(features: Tensor, target: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Plain means per class, (K, d) in float64, zero where a class is absent, and the class counts (K,)."""
    features = double(features)
    sums = features.new_zeros(num_classes, features.shape[1]).index_add_(0, target, features)
    counts = torch.bincount(target, minlength=num_classes)
    return sums / counts.clamp(min=1).unsqueeze(1), counts


def effective_rank(matrix: Tensor) -> float:
    """exp of the entropy of the singular values scaled to sum 1 (Roy & Vetterli 2007), 0 for zero."""
    return _spectrum_rank(torch.linalg.svdvals(double(matrix)))


def covariance_rank(points: Tensor, *, noise: float | None = None) -> float:
    """Effective rank of the covariance matrix of the rows: at most min(n - 1, d), 0 if all are the same.

    Points whose rms distance from their mean is at most ``noise`` times their rms norm count as the same;
    the default is the rounding error of the dtype. NaN for fewer than two points.

    The authors' code adds 1e-7 to each of the d shares before the entropy, which raises the result by less
    than 0.1 % at d = 512; it is left out here so that a simplex gives K - 1 exactly.
    """
    if len(points) < 2:
        return NAN
    noise = rounding_noise(points.dtype) if noise is None else noise
    points = double(points)
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
    return sum(ranks) / len(ranks) if ranks else NAN


def weight_alignment(prototypes: Tensor, means: Tensor) -> float:
    """Mean over c of |v_c - m_c/|m_c||^2 with v_c the unit prototype: NC3, from 0 to 4."""
    return (directions(prototypes) - unit(means)).square().sum(1).mean().item()


def instance_alignment(features: Tensor, prototypes: Tensor, target: Tensor) -> float:
    """Mean over i of |u_i - v_{y_i}|^2, u and v unit vectors: NC1 and NC3 together, from 0 to 4."""
    return (directions(features) - directions(prototypes)[target]).square().sum(1).mean().item()


def matrix_entropy(gram: Tensor) -> float:
    """-sum l ln l over the eigenvalues l of G/K, G = Gram matrix of K unit vectors: from 0 to ln K."""
    eigenvalues = torch.linalg.eigvalsh(double(gram) / len(gram)).clamp(min=0)
    return -torch.xlogy(eigenvalues, eigenvalues).sum().item()


def mutual_information_ratio(gram_w: Tensor, gram_m: Tensor) -> float:
    """MIR = (H(G_W) + H(G_M) - H(G_W * G_M)) / min(H(G_W), H(G_M)), * the entrywise product [NCD §5.2].

    NaN where an entropy is 0: one vector, or two that are parallel.
    """
    if len(gram_w) < 2:
        return NAN
    h_w, h_m, h_joint = matrix_entropy(gram_w), matrix_entropy(gram_m), matrix_entropy(gram_w * gram_m)
    return _ratio(h_w + h_m - h_joint, min(h_w, h_m), floor=_NO_ENTROPY)


def entropy_difference_ratio(gram_w: Tensor, gram_m: Tensor) -> float:
    """HDR = |H(G_W) - H(G_M)| / max(H(G_W), H(G_M)) [NCD §5.2]; NaN where both are 0."""
    if len(gram_w) < 2:
        return NAN
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
    noise = rounding_noise(features.dtype) if noise is None else noise
    features = double(features)
    means, _ = class_means(features, target, int(target.max()) + 1)
    _, s, q_t = torch.linalg.svd(means - means.mean(0), full_matrices=False)
    rounding = torch.maximum(noise * means.norm(), max(means.shape) * torch.finfo(s.dtype).eps * s[0])
    keep = s > rounding
    if not keep.any():
        return NAN
    whitening = q_t[keep].T / s[keep]
    return ((features @ whitening) - (means @ whitening)[target]).square().sum(1).mean().item()


def within_class_scatter(features: Tensor, target: Tensor) -> float:
    """Mean over i of |z_i - m_{y_i}|^2 = tr S_W, the plain size of the within-class scatter."""
    features = double(features)
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
        return SimplexDeviation(NAN, NAN, NAN, NAN)
    means = double(means)
    centre = means.mean(0)
    centred = means - centre
    norms = centred.norm(dim=1)
    pointing = unit(centred)
    upper = torch.triu_indices(k, k, offset=1, device=means.device)
    error = (pointing @ pointing.T)[upper[0], upper[1]] + 1 / (k - 1)
    return SimplexDeviation(
        norms=_ratio(norms.std(correction=0).item(), norms.mean().item()),
        cosines=error.square().mean().sqrt().item(),
        cosines_max=error.abs().max().item(),
        offset=_ratio(centre.norm().item(), means.square().sum(1).mean().sqrt().item()),
    )


def home(device: torch.device) -> torch.device:
    """Where float64 arithmetic runs: Metal has none."""
    return torch.device("cpu") if device.type == "mps" else device


def double(x: Tensor) -> Tensor:
    return x.detach().to(device=home(x.device), dtype=torch.float64)


def directions(x: Tensor) -> Tensor:
    """Unit rows in float64, however short they were; zero rows stay zero."""
    return F.normalize(double(x), dim=-1, eps=torch.finfo(torch.float64).tiny)


def unit(x: Tensor) -> Tensor:
    """Unit rows in float64 of sums and differences of unit rows; those of the size of rounding errors stay short."""
    return F.normalize(double(x), dim=-1, eps=1e-12)


def rounding_noise(dtype: torch.dtype) -> float:
    """Relative rounding error of vectors given in ``dtype`` and averaged in float64."""
    return torch.finfo(dtype).eps / 4 + 16 * torch.finfo(torch.float64).eps


def _spectrum_rank(spectrum: Tensor) -> float:
    total = spectrum.sum()
    if total == 0:
        return 0.0
    share = spectrum / total
    return math.exp(-torch.xlogy(share, share).sum().item())


def _ratio(numerator: float, denominator: float, floor: float = 0.0) -> float:
    return numerator / denominator if denominator > floor else NAN
