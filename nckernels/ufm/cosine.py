"""The unconstrained features model of the losses on unit vectors ([NCD] Theorem A.1, Theorem 4.2)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nckernels import _checks
from nckernels.contrastive import prototype_loss, supcon_loss
from nckernels.functional import nonl_loss, normface_loss, ntce_loss
from nckernels.metrics import NeuralCollapse, class_means, neural_collapse

from ._minimise import minimise

Features = Literal["signed", "relu"]
FEATURES = ("signed", "relu")

WITH_PROTOTYPES: dict[str, Callable[..., Tensor]] = {
    "normface": normface_loss,
    "ntce": ntce_loss,
    "nonl": nonl_loss,
}
WITHOUT_PROTOTYPES: dict[str, Callable[..., Tensor]] = {"supcon": supcon_loss, "prototype": prototype_loss}
LOSSES = (*WITH_PROTOTYPES, *WITHOUT_PROTOTYPES)

# At a low temperature the gradient of NormFace and NTCE vanishes like exp(-a) before the features have collapsed. The
# minimisers are the same at every temperature, so the search starts at a temperature where they are easy to find.
_EASY_TEMPERATURE = 0.5

_REACHED = 1e-9  # the closed form is a lower bound: a start that comes this close ends the search


@dataclass(frozen=True)
class Solution:
    """Result of :func:`solve`: unit vectors in float64, K classes, n samples of each."""

    features: Tensor
    """(n K, d) unit rows, sorted by class."""
    target: Tensor
    """(n K,) labels, int64."""
    prototypes: Tensor
    """(K, d) unit rows: the loss's prototypes, or the directions of the class means for a loss without any."""
    value: float
    """The loss at the features and prototypes."""
    minimum: float
    """The closed form, see :func:`minimum`."""
    collapse: NeuralCollapse
    """All metrics of neural collapse of the features and prototypes."""
    start: Tensor
    """(n K, d) unit rows, the random features from which the search started."""
    start_value: float
    """The loss at the random start; prototypes, if the loss has them, are also random there."""

    @property
    def gap(self) -> float:
        """``value - minimum``: 0 at a global minimiser; negative only by rounding."""
        return self.value - self.minimum


def minimum(
    loss: str, num_classes: int, samples_per_class: int, temperature: float, *, features: Features = "signed"
) -> float:
    r"""The least value of a loss over all unit vectors, K classes with n samples each.

    ========================= ===================================== =================================
    loss                      minimum                               source
    ========================= ===================================== =================================
    ``normface``              log(1 + (K-1) exp(-a))                [NCD] Eq. 3, Theorem A.1
    ``ntce``                  log n + log(1 + (K-1) exp(-a))        [NCD] Eq. 4, Theorem A.1
    ``nonl``                  log(n (K-1)) - a                      [NCD] Eq. 5, Theorem A.1
    ``supcon``, ``prototype`` log(n - 1 + n (K-1) exp(-a))          [NCD] Eqs. 2 and 6, Theorem 4.2
    ========================= ===================================== =================================

    Here :math:`a` is the distance between the logit of the own class and those of the others at the minimiser. It is
    :math:`\frac{K}{(K-1)\tau}` for signed features, which collapse to a simplex (d >= K - 1). Non-negative features
    (``"relu"``) collapse to an orthonormal frame (d >= K): then :math:`a = \sqrt{K/(K-1)}/\tau` for a loss with
    prototypes, which are free and form a simplex, and :math:`a = 1/\tau` for a loss without.

    Why the non-negative bound holds: by Jensen's inequality the losses with prototypes are at least the value of the
    mean gap :math:`\frac{1}{K-1} \sum_c \hat w_c \cdot (\mu_c - \mu)`, which is at most
    :math:`\frac{1}{K-1} \sum_c |\mu_c - \mu| \le \sqrt{K/(K-1)}` because :math:`\mu_c \cdot \mu_{c'} \ge 0`; the losses
    without prototypes see no cosine below 0 between classes and none above 1 inside them.

    Args:
        loss: ``"normface"``, ``"ntce"``, ``"nonl"``, ``"supcon"`` or ``"prototype"``.
        num_classes: K, at least 2.
        samples_per_class: n, at least 1; at least 2 for ``"supcon"``, which is 0 without positives.
        temperature: :math:`\tau > 0`.
        features: ``"signed"``, or ``"relu"`` for features without negative entries.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.

    Example:
        >>> from nckernels import ufm
        >>> print(f"{ufm.minimum('nonl', num_classes=10, samples_per_class=5, temperature=0.1):.4f}")
        -7.3044
    """
    _check(loss, num_classes, samples_per_class, temperature, features)
    k, n = num_classes, samples_per_class
    if features == "signed":
        a = k / (k - 1) / temperature
    elif loss in WITH_PROTOTYPES:
        a = math.sqrt(k / (k - 1)) / temperature
    else:
        a = 1.0 / temperature
    if loss == "normface":
        return math.log1p((k - 1) * math.exp(-a))
    if loss == "ntce":
        return math.log(n) + math.log1p((k - 1) * math.exp(-a))
    if loss == "nonl" or n == 1:
        return math.log(n * (k - 1)) - a
    return math.log(n - 1 + n * (k - 1) * math.exp(-a))


def solve(
    loss: str,
    num_classes: int,
    dim: int,
    samples_per_class: int,
    temperature: float,
    *,
    seed: int = 0,
    features: Features = "signed",
    starts: int = 8,
    steps: int = 1000,
    tolerance: float = 1e-11,
) -> Solution:
    """Minimise a loss over free unit features, and free unit prototypes if it has them, from random starts.

    The loss is the package's public function in float64, and the search does not use the known minimiser. Temperatures
    below 0.5 are reached from 0.5 by halving, and each minimum is the start of the next search, because at a low
    temperature a random start has almost no gradient.

    No other local minima were observed for signed features. Non-negative features have some: of 10 classes in 10
    dimensions, 2 to 4 of 10 starts end where two classes share a direction and one class has two. So the best of
    several starts is returned. The search ends when a start reaches the closed form, which is a lower bound.

    Args:
        loss, num_classes, samples_per_class, temperature, features: as in :func:`minimum`.
        dim: d, at least K - 1 for signed features and K for non-negative ones; in fewer dimensions the closed form is
            a bound that is not reached.
        seed: seed of the Gaussian starts.
        starts: largest number of random starts.
        steps: largest number of iterations of a run of L-BFGS.
        tolerance: a run ends when no entry of the gradient is larger than this.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.

    Example:
        >>> from nckernels import ufm
        >>> found = ufm.solve("nonl", num_classes=4, dim=3, samples_per_class=2, temperature=0.5)
        >>> found.gap < 1e-9, found.collapse.within_scatter < 1e-9
        (True, True)
    """
    lowest = minimum(loss, num_classes, samples_per_class, temperature, features=features)
    least = num_classes - 1 if features == "signed" else num_classes
    _checks.integer("dim", dim)
    if dim < least:
        raise ValueError(f"dim must be at least {least} for {num_classes} classes of {features} features, got {dim}")
    _checks.integer("seed", seed)
    _checks.positive_integer("starts", starts)
    _checks.positive_integer("steps", steps)
    _checks.positive_scalar("tolerance", tolerance, torch.empty(0))

    generator = torch.Generator().manual_seed(seed)
    best: Solution | None = None
    for _ in range(starts):
        found = _search(
            loss, num_classes, dim, samples_per_class, temperature, generator, features, lowest, steps, tolerance
        )
        best = found if best is None or found.value < best.value else best
        if best.gap <= _REACHED:
            break
    assert best is not None
    return best


def _search(
    loss: str,
    num_classes: int,
    dim: int,
    samples_per_class: int,
    temperature: float,
    generator: torch.Generator,
    features: Features,
    lowest: float,
    steps: int,
    tolerance: float,
) -> Solution:
    """Minimise from one random start."""
    target = torch.arange(num_classes).repeat_interleave(samples_per_class)
    free = torch.randn(len(target), dim, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(num_classes, dim, generator=generator, dtype=torch.float64).requires_grad_()
    learnable = loss in WITH_PROTOTYPES

    def rows() -> Tensor:
        return free if features == "signed" else free.square()  # squares: every non-negative direction, and smooth

    def value(at: float) -> Tensor:
        if learnable:
            return WITH_PROTOTYPES[loss](rows(), weight, target, temperature=at)
        return WITHOUT_PROTOTYPES[loss](rows(), target, temperature=at)

    with torch.no_grad():
        start, start_value = F.normalize(rows()), float(value(temperature))
    for at in _cooling(temperature):
        minimise(partial(value, at), [free, weight] if learnable else [free], steps=steps, tolerance=tolerance)

    with torch.no_grad():
        unit = F.normalize(rows())
        prototypes = F.normalize(weight if learnable else class_means(unit, target, num_classes)[0])
        reached = float(value(temperature))
    return Solution(
        unit, target, prototypes, reached, lowest, neural_collapse(unit, target, prototypes), start, start_value
    )


def _cooling(temperature: float) -> list[float]:
    """Temperatures from an easy one down to ``temperature``, each half of the one before or more."""
    stages = [temperature]
    while stages[-1] < _EASY_TEMPERATURE:
        stages.append(min(2 * stages[-1], _EASY_TEMPERATURE))
    return stages[::-1]


def _check(loss: str, num_classes: int, samples_per_class: int, temperature: float, features: str) -> None:
    _checks.choice("loss", loss, LOSSES)
    _checks.choice("features", features, FEATURES)
    _checks.integer("num_classes", num_classes)
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    _checks.positive_integer("samples_per_class", samples_per_class)
    if loss == "supcon" and samples_per_class < 2:
        raise ValueError(f"samples_per_class must be at least 2 for 'supcon', got {samples_per_class}")
    _checks.positive_scalar("temperature", temperature, torch.empty(0))
