"""The single metrics of neural collapse.

They take features as they are: pass unit vectors for the definitions of [NCD], raw ones for those of Papyan et al.
Functions of ``(features, target)`` take (N, d) floating-point features and (N,) integer labels, on whatever device, and
look at the classes that occur. Prototypes, means and points are floating-point matrices with a row for each class or
point. Anything else, and values that are not finite, is a ValueError that names the argument. All arithmetic is
float64.
"""

from __future__ import annotations

import math
from numbers import Integral
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _checks

NAN = float("nan")
_NO_ENTROPY = 1e-12  # the entropy of a rank-one Gram matrix, up to rounding
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_CHUNK = 2**22  # entries of a block of samples or classes against classes: 32 MiB


def class_means(features: Tensor, target: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Plain means per class, (K, d) in float64, zero where a class is absent, and the class counts (K,).

    Example:
        >>> x = torch.tensor([[1.0], [3.0], [5.0]])
        >>> means, counts = nckernels.metrics.class_means(x, torch.tensor([0, 0, 2]), 3)
        >>> means.flatten().tolist(), counts.tolist()
        ([2.0, 0.0, 5.0], [2, 0, 1])
    """
    check_features(features, target)
    check_positive("num_classes", num_classes)
    check_labels(target, num_classes)
    return _class_means(double(features), _index(target, features), num_classes)


def effective_rank(matrix: Tensor) -> float:
    """exp of the entropy of the singular values scaled to sum 1 (Roy & Vetterli 2007), 0 for zero.

    Example:
        >>> nckernels.metrics.effective_rank(torch.diag(torch.tensor([2.0, 2.0, 0.0])))
        2.0
    """
    check_matrix("matrix", matrix)
    return _spectrum_rank(torch.linalg.svdvals(double(matrix)))


def covariance_rank(points: Tensor, *, noise: float | None = None) -> float:
    """Effective rank of the covariance matrix of the rows: at most min(n - 1, d), 0 if all are the same.

    Points whose rms distance from their mean is at most ``noise`` times their rms norm count as the same;
    the default is the rounding error of the dtype. NaN for fewer than two points.

    The authors' code adds 1e-7 to each of the d shares before the entropy, which raises the result by less
    than 0.1 % at d = 512; it is left out here so that a simplex gives K - 1 exactly.

    Example:
        >>> points = nckernels.geometry.simplex_etf(4, 8, dtype=torch.float64)
        >>> print(f"{nckernels.metrics.covariance_rank(points):.6f}")  # K - 1
        3.000000
    """
    check_matrix("points", points)
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
    """Mean over the classes of :func:`covariance_rank`; classes with one sample are left out.

    Example:
        >>> y = torch.arange(4).repeat(50)
        >>> x = torch.eye(4, dtype=torch.float64)[y] + 0.1 * torch.randn(200, 4, dtype=torch.float64)

        >>> print(f"{nckernels.metrics.intra_class_rank(x, y):.0f}")  # noise in all four directions
        4
    """
    check_features(features, target)
    target = _index(target, features)
    by_class = double(features)[target.argsort()].split(target.unique(return_counts=True)[1].tolist())
    noise = rounding_noise(features.dtype) if noise is None else noise
    ranks = [covariance_rank(rows, noise=noise) for rows in by_class if len(rows) > 1]
    return sum(ranks) / len(ranks) if ranks else NAN


def weight_alignment(prototypes: Tensor, means: Tensor) -> float:
    """Mean over c of ``|v_c - m_c/|m_c||^2`` with v_c the unit prototype: NC3, from 0 to 4.

    Example:
        >>> nckernels.metrics.weight_alignment(torch.eye(3), 0.5 * torch.eye(3))  # the same directions
        0.0
        >>> nckernels.metrics.weight_alignment(torch.eye(3), -torch.eye(3))  # opposite ones
        4.0
    """
    check_matrix("prototypes", prototypes)
    check_matrix("means", means)
    _check_shape("means", means, tuple(prototypes.shape))
    return (directions(prototypes) - unit(means).to(home(prototypes.device))).square().sum(1).mean().item()


def instance_alignment(features: Tensor, prototypes: Tensor, target: Tensor) -> float:
    """Mean over i of ``|u_i - v_{y_i}|^2``, u and v unit vectors: NC1 and NC3 together, from 0 to 4.

    Example:
        >>> y = torch.arange(4).repeat(5)
        >>> x = torch.eye(4)[y]  # an orthogonal frame, collapsed

        >>> nckernels.metrics.instance_alignment(x, torch.eye(4), y)
        0.0
    """
    check_features(features, target)
    check_matrix("prototypes", prototypes)
    _check_shape("prototypes", prototypes, (len(prototypes), features.shape[1]))
    check_labels(target, len(prototypes))
    v = directions(prototypes).to(home(features.device))[_index(target, features)]
    return (directions(features) - v).square().sum(1).mean().item()


def matrix_entropy(gram: Tensor) -> float:
    """-sum l ln l over the eigenvalues l of G/K, G = Gram matrix of K unit vectors: from 0 to ln K.

    Example:
        >>> print(f"{nckernels.metrics.matrix_entropy(torch.eye(4)):.4f} = ln 4")
        1.3863 = ln 4
    """
    _check_square("gram", gram)
    eigenvalues = torch.linalg.eigvalsh(double(gram) / len(gram)).clamp(min=0)
    return -torch.xlogy(eigenvalues, eigenvalues).sum().item()


def mutual_information_ratio(gram_w: Tensor, gram_m: Tensor) -> float:
    """MIR, ``(H(G_W) + H(G_M) - H(G_W * G_M)) / min(H(G_W), H(G_M))``, * the entrywise product [NCD §5.2].

    NaN where an entropy is 0: one vector, or two that are parallel.

    Example:
        >>> w = nckernels.geometry.simplex_etf(10, 64, dtype=torch.float64)
        >>> print(f"{nckernels.metrics.mutual_information_ratio(w @ w.T, w @ w.T):.3f}")  # the optimum for K = 10
        0.952
    """
    _check_square("gram_w", gram_w)
    _check_square("gram_m", gram_m, len(gram_w))
    return _mutual_information_ratio(*map(matrix_entropy, (gram_w, gram_m, gram_w * gram_m)))


def entropy_difference_ratio(gram_w: Tensor, gram_m: Tensor) -> float:
    """HDR, ``|H(G_W) - H(G_M)| / max(H(G_W), H(G_M))`` [NCD §5.2]; NaN where both are 0.

    Example:
        >>> w = nckernels.geometry.simplex_etf(10, 64, dtype=torch.float64)
        >>> print(f"{nckernels.metrics.entropy_difference_ratio(w @ w.T, torch.eye(10)):.3f}")  # a simplex and a frame
        0.046
    """
    _check_square("gram_w", gram_w)
    _check_square("gram_m", gram_m, len(gram_w))
    return _entropy_difference_ratio(matrix_entropy(gram_w), matrix_entropy(gram_m))


def entropy_ratios(h_w: float, gram_w: Tensor, gram_m: Tensor) -> tuple[float, float]:
    """MIR and HDR with H(G_W) known, which is the same for every G_M: an eigenvalue problem costs O(K^3)."""
    h_m = matrix_entropy(gram_m)
    mir = _mutual_information_ratio(h_w, h_m, matrix_entropy(gram_w * gram_m))
    return mir, _entropy_difference_ratio(h_w, h_m)


def within_class_scatter(features: Tensor, target: Tensor) -> float:
    """Mean over i of ``|z_i - m_{y_i}|^2``, tr S_W, the plain size of the within-class scatter.

    Example:
        >>> y = torch.arange(4).repeat(5)
        >>> x = torch.eye(4)[y]  # an orthogonal frame, collapsed

        >>> nckernels.metrics.within_class_scatter(x, y)
        0.0
    """
    return class_statistics(features, target).within


def variability_collapse(features: Tensor, target: Tensor, *, noise: float | None = None) -> float:
    """NC1 of Papyan et al.: tr(S_W S_B^+) / K.

    S_W = (1/N) sum_i (z_i - m_{y_i})(z_i - m_{y_i})^T and S_B = (1/K) sum_c (m_c - m)(m_c - m)^T, m the mean
    of the class means. Only the scatter along the directions in which the means differ counts. Directions
    whose spread is at most the rounding error (``noise``, by default of the dtype) are left out of S_B;
    :func:`between_class_rank` counts the others. NaN if the means coincide: nothing is then separated, though
    the formula would give 0. The value is large without any harm where the means spread little along one of
    the directions; :mod:`nckernels.metrics` explains it.

    Example:
        >>> y = torch.arange(4).repeat(50)
        >>> x = torch.eye(4, dtype=torch.float64)[y] + 0.1 * torch.randn(200, 4, dtype=torch.float64)

        >>> print(f"{nckernels.metrics.variability_collapse(x, y):.2f}")
        0.03
    """
    statistics = class_statistics(features, target, noise=noise)
    return whitened_scatter(features, statistics, between_class_axes(statistics))


def between_class_rank(features: Tensor, target: Tensor, *, noise: float | None = None) -> int:
    """The number of directions that S_B^+ has in :func:`variability_collapse`.

    At most min(K - 1, d), and 0 if the means coincide.

    Example:
        >>> y = torch.arange(4).repeat(5)
        >>> x = torch.eye(4)[y]  # an orthogonal frame, collapsed

        >>> nckernels.metrics.between_class_rank(x, y)  # K - 1
        3
    """
    return between_class_axes(class_statistics(features, target, noise=noise)).shape[1]


def scatter_ratio(features: Tensor, target: Tensor, *, noise: float | None = None) -> float:
    """tr(S_W) / tr(S_B), S_W and S_B as in :func:`variability_collapse`: 0 at collapse, unbounded.

    Every direction counts with its size, so that no direction in which the means hardly differ can dominate.
    NaN if the means coincide up to the rounding error (``noise``, by default of the dtype).

    Example:
        >>> y = torch.arange(4).repeat(50)
        >>> x = torch.eye(4, dtype=torch.float64)[y] + 0.1 * torch.randn(200, 4, dtype=torch.float64)

        >>> print(f"{nckernels.metrics.scatter_ratio(x, y):.2f}")
        0.05
    """
    return scatter_ratio_of(class_statistics(features, target, noise=noise))


def class_distance_variance(features: Tensor, target: Tensor, *, noise: float | None = None) -> float:
    """Class-distance normalised variance (Galanti et al. 2022): 0 at collapse, unbounded.

    The mean over the pairs of classes of ``(v_c + v_c') / (2 |m_c - m_c'|^2)`` with v_c the mean of ``|z_i - m_c|^2``
    in class c. It takes O(K^2 d) time and no K x K matrix. NaN for one class, and as soon as the means of any two
    classes coincide up to the rounding error (``noise``, by default of the dtype).

    Example:
        >>> y = torch.arange(4).repeat(50)
        >>> x = torch.eye(4, dtype=torch.float64)[y] + 0.1 * torch.randn(200, 4, dtype=torch.float64)

        >>> print(f"{nckernels.metrics.class_distance_variance(x, y):.2f}")
        0.02
    """
    return class_distance_variance_of(class_statistics(features, target, noise=noise))


class ClassStatistics(NamedTuple):
    """What the sizes of scatter are made of, for the classes that occur, in the order of their labels."""

    means: Tensor
    """(K, d) m_c, plain means; zero where |m_c| is at most ``rounding``."""
    variances: Tensor
    """(K,) v_c, mean over the class of |z_i - m_c|^2."""
    counts: Tensor
    """(K,) n_c."""
    labels: Tensor
    """(N,) labels in [0, K)."""
    rounding: float
    """The rounding error of a mean: ``noise`` times the rms norm of the features."""

    @property
    def within(self) -> float:
        """tr S_W."""
        return ((self.counts * self.variances).sum() / self.counts.sum()).item()

    @property
    def between(self) -> float:
        """tr S_B; NaN if the means coincide, that is, differ by no more than the rounding error."""
        spread = _rms(self.means - self.means.mean(0))
        return spread**2 if spread > self.rounding else NAN


def class_statistics(features: Tensor, target: Tensor, *, noise: float | None = None) -> ClassStatistics:
    """See :class:`ClassStatistics`; ``noise`` is by default the rounding error of the features' dtype."""
    check_features(features, target)
    noise = rounding_noise(features.dtype) if noise is None else noise
    features = double(features)
    present, labels = _index(target, features).unique(return_inverse=True)
    means, counts = _class_means(features, labels, len(present))
    deviations = (features - means[labels]).square().sum(1)
    variances = torch.zeros_like(means[:, 0]).index_add_(0, labels, deviations) / counts
    rounding = noise * _rms(features)
    return ClassStatistics(without_rounding(means, rounding), variances, counts, labels, rounding)


def without_rounding(means: Tensor, rounding: float) -> Tensor:
    """The means with zeros for those that are rounding errors, whose direction says nothing."""
    return means.masked_fill((means.norm(dim=1) <= rounding).unsqueeze(1), 0.0)


def between_class_axes(statistics: ClassStatistics) -> Tensor:
    """(d, r) matrix X with X X^T = S_B^+ / K, a column for each direction in which the means differ.

    With B the (K, d) matrix of the m_c - m and its SVD B = P diag(s) Q^T, S_B^+ = K Q diag(s)^-2 Q^T and
    X = Q diag(s)^-1: no d x d matrix is formed. An s_j of at most the rounding error is taken for 0.
    """
    means = statistics.means
    _, s, q_t = torch.linalg.svd(means - means.mean(0), full_matrices=False)
    of_svd = max(means.shape) * torch.finfo(s.dtype).eps * s[0]
    keep = s > torch.clamp(of_svd, min=statistics.rounding * math.sqrt(len(means)))
    return q_t[keep].T / s[keep]


def whitened_scatter(features: Tensor, statistics: ClassStatistics, axes: Tensor) -> float:
    """tr(S_W X X^T) = mean over i of |X^T (z_i - m_{y_i})|^2; NaN without a direction."""
    if axes.shape[1] == 0:
        return NAN
    deviations = double(features) - statistics.means[statistics.labels]
    return (deviations @ axes).square().sum(1).mean().item()


def scatter_ratio_of(statistics: ClassStatistics) -> float:
    """:func:`scatter_ratio` of given statistics."""
    return statistics.within / statistics.between


def class_distance_variance_of(statistics: ClassStatistics) -> float:
    """:func:`class_distance_variance` of given statistics."""
    means, variances = statistics.means, statistics.variances
    k = len(means)
    if k < 2:
        return NAN
    # The sum over the pairs is that of v_c / (2 |m_c - m_c'|^2) over all c != c': rows in blocks, no K x K matrix.
    total, closest = means.new_zeros(()), means.new_tensor(math.inf)
    for block, v in zip(_blocks(k), variances.split(_block_size(k)), strict=True):
        # Differences, not a Gram matrix: close means stay apart.
        distances = torch.cdist(means[block], means, compute_mode="donot_use_mm_for_euclid_dist")
        distances.diagonal(block.start).fill_(math.inf)
        closest = torch.minimum(closest, distances.min())
        total += (v * distances.square_().reciprocal_().sum(1)).sum()
    return NAN if closest <= statistics.rounding else (total / (k * (k - 1))).item()


def rotated_self_duality(prototypes: Tensor, means: Tensor) -> float:
    """NC3' ([ENC] Eq. 12): how far the prototypes are from a rotation of the means, up to a scale.

    min over orthogonal (K, K) matrices Q of ``|V^T/|V| - B^T Q/|B||_F^2 = 2 - 2 |V B^T|_* / (|V| |B|)`` with V the
    (K, d) prototypes and B the (K, d) means as they are given, neither centred nor normalised, and ``|.|_*`` the
    nuclear norm (orthogonal Procrustes problem). Q mixes classes. From 0, where the directions and relative
    sizes of the scatter are the same, ``V^T V / |V|^2 = B^T B / |B|^2``, to 2, where the two spans are orthogonal.
    NaN where either is zero.

    Example:
        >>> w = torch.randn(5, 8, dtype=torch.float64)
        >>> q, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))
        >>> print(f"{nckernels.metrics.rotated_self_duality(2 * q @ w, w):.6f}")
        0.000000
    """
    check_matrix("prototypes", prototypes)
    check_matrix("means", means)
    _check_shape("means", means, tuple(prototypes.shape))
    v, b = double(prototypes), double(means).to(home(prototypes.device))
    size = (v.norm() * b.norm()).item()
    if size == 0:
        return NAN
    # V B^T has the singular values of R_V R_B^T with V = Q_V R_V, B = Q_B R_B: at most min(K, d) of them.
    r_v, r_b = torch.linalg.qr(v / v.norm(), mode="r").R, torch.linalg.qr(b / b.norm(), mode="r").R
    return max(0.0, 2 - 2 * torch.linalg.svdvals(r_v @ r_b.T).sum().item())


def nearest_mean_agreement(features: Tensor, prototypes: Tensor, means: Tensor, bias: Tensor | None = None) -> float:
    """NC4: share of samples that argmax_c z.w_c + b_c assigns to the class of the nearest mean m_c.

    Features (N, d), prototypes and means (K, d) and bias (K,) are taken as they are: with unit features and
    unit prototypes and no bias the classifier compares cosines. Ties, which are values within the rounding error of
    float64 products, go to the lower class; so do all samples where all prototypes are zero. The (N, K) matrices
    exist in blocks only.

    Example:
        >>> y = torch.arange(4).repeat(5)
        >>> x = torch.eye(4)[y]  # an orthogonal frame, collapsed

        >>> nckernels.metrics.nearest_mean_agreement(x, torch.eye(4), torch.eye(4))
        1.0
    """
    check_features(features)
    check_matrix("prototypes", prototypes, empty=False)
    check_matrix("means", means)
    _check_shape("means", means, (len(prototypes), features.shape[1]))
    _check_shape("prototypes", prototypes, tuple(means.shape))
    z = double(features)
    w, m = double(prototypes).to(z.device), double(means).to(z.device)
    offset = torch.zeros_like(w[:, 0]) if bias is None else double(bias).to(z.device)
    _check_shape("bias", offset, (len(w),))
    _checks.finite("bias", offset, wait=True)
    centre = m.mean(0)  # |z - m_c|^2 loses nothing to a common offset
    m = m - centre
    agree = 0
    for rows in z.split(_block_size(len(w))):
        agree += int((_largest(rows, w, offset) == _largest(rows - centre, m, -m.square().sum(1) / 2)).sum())
    return agree / len(z)


def _largest(rows: Tensor, columns: Tensor, offset: Tensor) -> Tensor:
    """(N,) the first class c whose rows . columns_c + offset_c is the largest, up to the rounding error of a product.

    How a matrix product rounds depends on its shape and on the CPU, so that ties would otherwise go anywhere.
    """
    scores = rows @ columns.T + offset
    sizes = rows.norm(dim=1, keepdim=True) * columns.norm(dim=1).max() + offset.abs().max()
    slack = columns.shape[1] * torch.finfo(torch.float64).eps * sizes
    return (scores >= scores.amax(1, keepdim=True) - slack).byte().argmax(1)


class SimplexDeviation(NamedTuple):
    """Result of :func:`simplex_deviation`; all are 0 for a simplex centred at the origin."""

    norms: float
    cosines: float
    cosines_max: float
    offset: float


def simplex_deviation(means: Tensor) -> SimplexDeviation:
    """Distance of K class means (K, d) from a centred simplex: true NC2. NaN for fewer than two means.

    With b_c = m_c - mean(m): ``norms`` is ``std |b_c| / mean |b_c|``; ``cosines`` and ``cosines_max`` are the
    root mean square and the largest deviation of cos(b_c, b_c') from -1/(K-1) over the pairs; ``offset`` is
    ``|mean(m)| / rms |m_c|``, which is the only one of them that an orthogonal frame does not bring to 0. The first
    three are NaN if the means coincide up to the rounding error of their dtype.

    Example:
        >>> deviation = nckernels.metrics.simplex_deviation(torch.eye(4))  # a simplex, but not centred at the origin
        >>> deviation.cosines_max < 1e-15, deviation.offset
        (True, 0.5)
    """
    check_matrix("means", means)
    k = len(means)
    if k < 2:
        return SimplexDeviation(NAN, NAN, NAN, NAN)
    noise, means = rounding_noise(means.dtype), double(means)
    centre = means.mean(0)
    centred = means - centre
    spread, size = _rms(centred), _rms(means)
    offset = _ratio(centre.norm().item(), size)
    if spread <= noise * size:  # they would have cosines of 0 with one another, next to a simplex of many classes
        return SimplexDeviation(NAN, NAN, NAN, offset)
    norms = centred.norm(dim=1)
    pointing = unit(centred / spread)
    squares, largest = means.new_zeros(()), means.new_zeros(())
    for block in _blocks(k):
        error = pointing[block] @ pointing.T + 1 / (k - 1)
        error.diagonal(block.start).zero_()
        squares += error.square().sum()
        largest = torch.maximum(largest, error.abs().max())
    return SimplexDeviation(
        norms=_ratio(norms.std(correction=0).item(), norms.mean().item()),
        cosines=(squares / (k * (k - 1))).sqrt().item(),
        cosines_max=largest.item(),
        offset=offset,
    )


def check_features(features: Tensor, target: Tensor | None = None) -> None:
    """ValueError unless these are (N, d) finite floating-point features, N and d >= 1, and (N,) integer labels."""
    if not is_matrix(features) or 0 in features.shape:
        raise ValueError(
            f"features: expected a floating-point tensor (N, d) with N >= 1 and d >= 1, got {described(features)}"
        )
    if target is not None and not are_labels(target, len(features)):
        raise ValueError(f"target: expected {len(features)} integer labels, got {described(target)}")
    _checks.finite("features", features, wait=True)


def check_matrix(name: str, value: Tensor, *, empty: bool = True) -> None:
    """ValueError unless this is a finite floating-point matrix with columns, and with rows unless it may be empty."""
    if not is_matrix(value) or value.shape[1] == 0 or not (empty or len(value)):
        least = "one column" if empty else "one row and one column"
        raise ValueError(f"{name}: expected a floating-point matrix with at least {least}, got {described(value)}")
    _checks.finite(name, value, wait=True)


def is_matrix(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim == 2 and value.is_floating_point()


def are_labels(value: object, count: int) -> bool:
    return isinstance(value, Tensor) and value.shape == (count,) and value.dtype in _INTEGERS


def described(value: object) -> str:
    """What came, for the message of an error."""
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    kind = type(value).__name__
    return f"a {kind} of {len(value)}" if isinstance(value, tuple | list) else f"a {kind}"


def check_positive(name: str, value: object, *, least: int = 1) -> None:
    """ValueError unless this is an integer and at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
        raise ValueError(f"{name}: expected an integer >= {least}, got {value!r}")


def check_labels(target: Tensor, num_classes: int) -> None:
    """ValueError unless all labels are in [0, num_classes)."""
    low, high = int(target.min()), int(target.max())
    if low < 0 or high >= num_classes:
        raise ValueError(f"target: expected labels in [0, {num_classes}), got {low} to {high}")


def home(device: torch.device) -> torch.device:
    """Where float64 arithmetic runs: Metal has none."""
    return torch.device("cpu") if device.type == "mps" else device


def double(x: Tensor) -> Tensor:
    return x.detach().to(device=home(x.device), dtype=torch.float64)


def directions(x: Tensor) -> Tensor:
    """Unit rows in float64, however short or long they were; zero rows stay zero."""
    tiny = torch.finfo(torch.float64).tiny
    rows = double(x)
    if x.dtype == torch.float64:  # the squares of smaller dtypes have room in float64
        rows = rows / rows.abs().amax(-1, keepdim=True).clamp(min=tiny)
    return F.normalize(rows, dim=-1, eps=tiny)


def unit(x: Tensor) -> Tensor:
    """Unit rows in float64 of sums and differences of unit rows; those of the size of rounding errors stay short."""
    return F.normalize(double(x), dim=-1, eps=1e-12)


def rounding_noise(dtype: torch.dtype) -> float:
    """Relative rounding error of vectors given in ``dtype`` and averaged in float64."""
    return torch.finfo(dtype).eps / 4 + 16 * torch.finfo(torch.float64).eps


def _check_shape(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(value.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(value.shape)}")


def _check_square(name: str, value: Tensor, size: int | None = None) -> None:
    check_matrix(name, value, empty=False)
    size = len(value) if size is None else size
    _check_shape(name, value, (size, size))


def _class_means(features: Tensor, target: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """:func:`class_means` of float64 features and int64 labels that have been checked."""
    counts = torch.bincount(target, minlength=num_classes)
    divisor = counts.clamp(min=1).unsqueeze(1)
    means = features.new_zeros(num_classes, features.shape[1]).index_add_(0, target, features) / divisor
    # The rounding errors of long sums grow with the number of samples; those of the deviations' sums do not.
    return means.add_(torch.zeros_like(means).index_add_(0, target, features - means[target]) / divisor), counts


def _index(target: Tensor, features: Tensor) -> Tensor:
    """Labels that can index what is computed from the features. Others would: uint8 is taken for a mask."""
    return target.to(device=home(features.device), dtype=torch.int64)


def _block_size(classes: int) -> int:
    return max(1, _CHUNK // classes)


def _blocks(classes: int) -> list[slice]:
    """Rows of a matrix of all classes against all, as many at a time as there is room for."""
    size = _block_size(classes)
    return [slice(start, min(start + size, classes)) for start in range(0, classes, size)]


def _mutual_information_ratio(h_w: float, h_m: float, h_joint: float) -> float:
    return _ratio(h_w + h_m - h_joint, min(h_w, h_m), floor=_NO_ENTROPY)


def _entropy_difference_ratio(h_w: float, h_m: float) -> float:
    return _ratio(abs(h_w - h_m), max(h_w, h_m), floor=_NO_ENTROPY)


def _rms(rows: Tensor) -> float:
    return rows.norm().item() / math.sqrt(len(rows))


def _spectrum_rank(spectrum: Tensor) -> float:
    total = spectrum.sum()
    if total == 0:
        return 0.0
    share = spectrum / total
    return math.exp(-torch.xlogy(share, share).sum().item())


def _ratio(numerator: float, denominator: float, floor: float = 0.0) -> float:
    return numerator / denominator if denominator > floor else NAN
