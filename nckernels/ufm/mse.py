r"""The unconstrained features model with squared error, a regularised bias and any label encoding ([ENC]).

.. math::
    \min_{W, H, b} \frac{1}{2N} \|W H + b 1^\top - Y\|^2 + \frac{\lambda_W}{2} \|W\|^2
    + \frac{\lambda_H}{2} \|H\|^2 + \frac{\lambda_b}{2} \|b\|^2

with weights W (K x d), features H (d x N) and labels :math:`Y = \bar Y C` (K x N): column i is the label of i's class.

**Its optimum is that of a convex problem.** The samples of a class share one feature ([ENC] Theorem IV.1), so let
:math:`\tilde H = \bar H D^{1/2}`, :math:`\tilde Y = \bar Y D^{1/2}` with D the diagonal matrix of the class sizes, and
:math:`v = D^{1/2} 1`. The least cost of a product :math:`Z = W \tilde H` (d >= K) is
:math:`\frac{\lambda_W}{2} \|W\|^2 + \frac{\lambda_H}{2} \|\tilde H\|^2 = \sqrt{\lambda_W \lambda_H} \|Z\|_*`, hence

.. math:: \min_{Z, b} \frac{1}{2N} \|Z + b v^\top - \tilde Y\|^2 + \sqrt{\lambda_W \lambda_H} \|Z\|_*
    + \frac{\lambda_b}{2} \|b\|^2 .

Given b, Z has the singular vectors of :math:`\tilde Y - b v^\top`, and its singular values minus
:math:`t = N \sqrt{\lambda_W \lambda_H}`, or 0 if that is negative. The remaining problem is smooth and convex in the K
numbers of b. If v is a right singular vector of :math:`\tilde Y`, with the singular value :math:`\sigma` and the left
singular vector u, the problem separates, and b is a multiple of u in closed form:

.. math:: b = \frac{\min(\sigma \lambda_b / (1 + \lambda_b),\, t)}{\lambda_b \sqrt N} u, \qquad
    z = \max(0,\, \sigma - t - t / \lambda_b),

where z is the singular value of Z for u and v. Balanced shifted simplices are such encodings, for instance one-hot and
smoothed labels. For them :math:`t = \sqrt n c`, and [ENC] Theorem III.1 follows with its transition at
:math:`\lambda_b = c / (1 - c)`. Centred encodings are also of this kind (:math:`\sigma = 0`). With
:math:`\lambda_b = 0` every encoding behaves as if it were centred (Theorem III.4).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nckernels import _checks

from ._minimise import NEWTON_SIZE, minimise, polish
from .encodings import check

_ALIGNED = 1e-12  # largest relative error at which v counts as a singular vector
_NEAR = 1e-8  # largest entry of the gradient at which Newton's method takes over


@dataclass(frozen=True)
class MSEOptimum:
    """The global optimum, in float64. It is unique up to a rotation of the feature space, which changes no field."""

    gram: Tensor
    """(K, K) inner products of the class means."""
    bias: Tensor
    """(K,) the classifier's bias."""
    loss: float
    """The least value of the regularised loss."""
    kappa: float
    """Scale of the weights relative to the class means, sqrt(n lambda_H / lambda_W); NaN if classes differ in size."""
    logits: Tensor
    """(K, K) W times the class means, without the bias; column k belongs to class k."""
    weight_gram: Tensor
    """(K, K) inner products of the rows of W."""
    closed_form: bool
    """Whether the bias comes from a formula; otherwise it comes from an iteration, with an error of about 1e-13."""


@dataclass(frozen=True)
class MSESolution:
    """A local minimum found by :func:`solve_mse`, in float64."""

    weight: Tensor
    """(K, d) W."""
    features: Tensor
    """(N, d) rows sorted by class, the transpose of [ENC]'s H."""
    target: Tensor
    """(N,) labels, int64."""
    bias: Tensor
    """(K,) b."""
    loss: float
    """The regularised loss."""
    optimum: MSEOptimum
    """The global optimum to compare with, see :func:`mse_optimum`."""

    @property
    def means(self) -> Tensor:
        """(K, d) class means of the features, uncentred."""
        counts = torch.bincount(self.target)
        sums = self.features.new_zeros(len(counts), self.features.shape[1]).index_add_(0, self.target, self.features)
        return sums / counts[:, None]


def mse_optimum(
    encoding: Tensor,
    samples_per_class: int | Sequence[int],
    *,
    lambda_w: float,
    lambda_h: float,
    lambda_b: float,
) -> MSEOptimum:
    r"""The global optimum for any encoding and d >= K, exactly.

    With :math:`c = K \sqrt{n \lambda_W \lambda_H} \ge 1` one-hot labels have the optimum W = H = 0,
    :math:`b = \frac{1}{(1 + \lambda_b) K} 1`. In general the features vanish if no singular value of the labels minus
    the bias exceeds c.

    Args:
        encoding: (K, K) floating-point, column k the label vector of class k.
        samples_per_class: n, or K sample counts, each at least 1.
        lambda_w, lambda_h: positive.
        lambda_b: at least 0.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
        RuntimeError: if the iteration for an encoding without closed form does not converge.

    Example:
        >>> from nckernels import ufm
        >>> best = ufm.mse_optimum(ufm.one_hot(4), 10, lambda_w=1e-3, lambda_h=1e-3, lambda_b=0.0)
        >>> best.bias  # the mean label: class means form a simplex
        tensor([0.2500, 0.2500, 0.2500, 0.2500], dtype=torch.float64)
    """
    labels, counts = check(encoding), _counts(samples_per_class, len(encoding))
    _check_lambdas(lambda_w, lambda_h, lambda_b)
    total, root = float(counts.sum()), counts.sqrt()
    threshold = total * math.sqrt(lambda_w * lambda_h)
    weighted = labels * root  # Y~
    bias = _bias_in_closed_form(weighted, root, threshold, lambda_b)
    closed_form = bias is not None
    if bias is None:
        bias = _bias(weighted, root, threshold, lambda_b)

    left, values, right = torch.linalg.svd(weighted - bias[:, None] * root)
    values = (values - threshold).clamp(min=0)
    product = (left * values) @ right  # Z
    residual = product + bias[:, None] * root - weighted
    loss = residual.square().sum() / (2 * total) + threshold / total * values.sum() + lambda_b / 2 * bias.square().sum()
    gram = math.sqrt(lambda_w / lambda_h) * (right.T * values) @ right / root / root[:, None]
    balanced = bool((counts == counts[0]).all())
    return MSEOptimum(
        gram=gram,
        bias=bias,
        loss=float(loss),
        kappa=math.sqrt(float(counts[0]) * lambda_h / lambda_w) if balanced else math.nan,
        logits=product / root,
        weight_gram=math.sqrt(lambda_h / lambda_w) * (left * values) @ left.T,
        closed_form=closed_form,
    )


def solve_mse(
    encoding: Tensor,
    samples_per_class: int | Sequence[int],
    dim: int,
    *,
    lambda_w: float,
    lambda_h: float,
    lambda_b: float,
    seed: int = 0,
    steps: int = 2000,
    tolerance: float = 1e-11,
) -> MSESolution:
    """Minimise over W, H and b from a Gaussian start; nothing here knows the optimum.

    L-BFGS, then Newton's method on all numbers at once where there are at most 2000. The last digits do not come where
    the optimum is degenerate: at the transition itself, and at c = 1.

    Args:
        encoding, samples_per_class, lambda_w, lambda_h, lambda_b: as in :func:`mse_optimum`.
        dim: d, at least K.
        seed: of the start.
        steps: iterations of a run of L-BFGS at most.
        tolerance: largest entry of the gradient at which L-BFGS is over.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.

    Example:
        >>> from nckernels import ufm
        >>> found = ufm.solve_mse(ufm.one_hot(3), 4, dim=3, lambda_w=0.01, lambda_h=0.01, lambda_b=0.01)
        >>> math.isclose(found.loss, found.optimum.loss, abs_tol=1e-9)
        True
    """
    best = mse_optimum(encoding, samples_per_class, lambda_w=lambda_w, lambda_h=lambda_h, lambda_b=lambda_b)
    labels, counts = check(encoding), _counts(samples_per_class, len(encoding))
    k = len(labels)
    _checks.integer("dim", dim)
    if dim < k:
        raise ValueError(f"dim must be at least {k}, the number of classes, got {dim}")
    _checks.integer("seed", seed)
    _checks.positive_integer("steps", steps)
    _checks.positive_scalar("tolerance", tolerance, torch.empty(0))

    target = torch.arange(k).repeat_interleave(counts.long())
    wanted = labels.T[target]
    generator = torch.Generator().manual_seed(seed)
    sizes = (k * dim, len(target) * dim, k)
    start = torch.randn(sum(sizes), generator=generator, dtype=torch.float64)

    def parts(of: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        w, h, b = of.split(sizes)
        return (
            w.view(k, dim),
            h.view(-1, dim),
            b / math.sqrt(1 + lambda_b),
        )  # scaled so that all parameters have similar curvature

    def loss(of: Tensor) -> Tensor:
        w, h, b = parts(of)
        error = (h @ w.T + b - wanted).square().sum() / (2 * len(target))
        return error + (lambda_w * w.square().sum() + lambda_h * h.square().sum() + lambda_b * b.square().sum()) / 2

    at = start.requires_grad_()
    near = max(tolerance, _NEAR) if at.numel() <= NEWTON_SIZE else tolerance
    minimise(lambda: loss(at), [at], steps=steps, tolerance=near)
    at = polish(loss, at.detach(), tolerance=1e-15)
    w, h, b = parts(at)
    return MSESolution(w, h, target, b, float(loss(at)), best)


def _bias_in_closed_form(weighted: Tensor, root: Tensor, threshold: float, lambda_b: float) -> Tensor | None:
    """The bias by the formula of the module's docstring, or None if v is not a singular vector."""
    norm = root.norm()  # sqrt(N)
    v = root / norm
    along = weighted @ v  # sigma u
    if lambda_b == 0.0:
        return along / norm  # the mean label
    if (weighted.T @ along - along.square().sum() * v).norm() > _ALIGNED * weighted.square().sum():
        return None
    sigma = along.norm()
    if sigma <= _ALIGNED * weighted.norm():
        return torch.zeros_like(along)
    length = torch.clamp(sigma * lambda_b / (1 + lambda_b), max=threshold) / (lambda_b * norm)
    return length * along / sigma


def _bias(weighted: Tensor, root: Tensor, threshold: float, lambda_b: float) -> Tensor:
    r"""The bias that minimises the convex problem after Z, by Newton's method.

    With the SVD :math:`U s Q^\top` of Y~ - b v^T and :math:`f = \min(s, t)`, the gradient is
    :math:`\lambda_b b - U f Q^\top v / N`, which is Lipschitz with constant 1 + lambda_b. So a gradient step of length
    1 / (1 + lambda_b) always helps, even if Newton's step does not. The Hessian is that of a function of singular
    values: with :math:`q = Q^\top v`, :math:`A_{ij} = (f_i - f_j)/(s_i - s_j)` (f' where equal) and
    :math:`B_{ij} = (f_i + f_j)/(s_i + s_j)` it is :math:`\lambda_b I + U M U^\top / N`,
    :math:`M_{ij} = \frac12 [i = j] \sum_l (A + B)_{il} q_l^2 + \frac12 q_i (A - B)_{ij} q_j`.
    """
    total = float(root.square().sum())

    def slope(at: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        left, s, right = torch.linalg.svd(weighted - at[:, None] * root)
        q = right @ root
        return lambda_b * at - left @ (s.clamp(max=threshold) * q) / total, (left, s, q)

    at = weighted @ root / (total * (1 + lambda_b))
    gradient, factors = slope(at)
    enough = 1e-14 * float(weighted.abs().max() / root.max())
    for _ in range(1000):
        if float(gradient.abs().max()) <= enough:
            return at
        newton = _newton_step(gradient, *factors, threshold, lambda_b, total)
        for step in (newton, newton / 2, newton / 8, gradient / (1 + lambda_b)):
            there, there_factors = slope(at - step)
            if there.norm() < gradient.norm():
                break
        at, gradient, factors = at - step, there, there_factors
    if float(gradient.abs().max()) > 100 * enough:
        raise RuntimeError(f"the bias has not converged: a gradient of {float(gradient.abs().max()):.1e} is left")
    return at


def _newton_step(
    gradient: Tensor, left: Tensor, s: Tensor, q: Tensor, threshold: float, lambda_b: float, total: float
) -> Tensor:
    """Inverse Hessian times gradient, see :func:`_bias`."""
    f = s.clamp(max=threshold)
    difference, total_s = s[:, None] - s, s[:, None] + s
    same = difference.abs() <= 1e-12 * s[0]
    a = torch.where(same, (s < threshold).to(s.dtype), (f[:, None] - f) / difference.masked_fill(same, 1.0))
    b = torch.where(total_s > 0, (f[:, None] + f) / total_s.masked_fill(total_s == 0, 1.0), torch.ones_like(s))
    curvature = ((a + b) @ q.square()).diag() + q[:, None] * (a - b) * q
    hessian = lambda_b * torch.eye(len(s), dtype=s.dtype) + curvature / (2 * total)
    return left @ torch.linalg.solve(hessian, left.T @ gradient)


def _counts(samples_per_class: int | Sequence[int], num_classes: int) -> Tensor:
    if isinstance(samples_per_class, Sequence):
        counts = list(samples_per_class)
        if len(counts) != num_classes:
            raise ValueError(f"samples_per_class must have {num_classes} counts, one per class, got {len(counts)}")
    else:
        counts = [samples_per_class] * num_classes
    for count in counts:
        _checks.positive_integer("samples_per_class", count)
    return torch.tensor(counts, dtype=torch.float64)


def _check_lambdas(lambda_w: float, lambda_h: float, lambda_b: float) -> None:
    for name, value in (("lambda_w", lambda_w), ("lambda_h", lambda_h)):
        _checks.positive_scalar(name, value, torch.empty(0))
    _checks.in_range("lambda_b", lambda_b, 0.0, math.inf)
    if not math.isfinite(lambda_b):
        raise ValueError(f"lambda_b must be finite, got {lambda_b}")
