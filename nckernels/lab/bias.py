"""A penalty on the classifier's bias turns the simplex into an orthogonal frame ([ENC] Theorem III.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from nckernels.ufm import MSESolution, one_hot, solve_mse

from . import style
from .report import Check, Result, bar

MULTIPLES = (0.01, 0.1, 0.3, 0.6, 0.9, 1.1, 1.3, 1.7, 2.5, 4.0, 8.0, 20.0, 100.0)


def run(
    *,
    seed: int = 0,
    progress: bool = False,
    num_classes: int = 3,
    samples_per_class: int = 4,
    c: float = 0.25,
    multiples: Sequence[float] = MULTIPLES,
) -> Result:
    """Minimise squared error with one-hot labels for lambda_b at multiples of the transition c / (1 - c)."""
    k, n = num_classes, samples_per_class
    lambda_w = lambda_h = c / (k * math.sqrt(n))  # c = K sqrt(n lambda_W lambda_H)
    transition = c / (1 - c)
    sweep = [m * transition for m in multiples]
    found = [
        solve_mse(one_hot(k), n, k, lambda_w=lambda_w, lambda_h=lambda_h, lambda_b=lambda_b, seed=seed)
        for lambda_b in bar(sweep, "bias", progress)
    ]
    scale = (1 - c) * math.sqrt(lambda_w / (n * lambda_h))
    checks = []
    for multiple, lambda_b, s in zip(multiples, sweep, found, strict=True):
        alpha, beta = shifted_simplex(s.means @ s.means.T)
        label = f"lambda_b = {multiple:g} c/(1-c)"
        checks += [
            Check(f"{label}: shift beta of the means", beta, expected_shift(lambda_b, c), 1e-6),
            Check(f"{label}: their scale alpha^2", alpha**2, scale, 1e-9),
            Check(f"{label}: length of the bias", float(s.bias.norm()), expected_bias(lambda_b, c, k), 1e-9),
        ]
    return Result(
        "Class means go from a simplex (beta = 1) to an orthogonal frame (beta = 0) as the bias is penalised, from "
        "lambda_b = c/(1-c) on.",
        checks,
        lambda path: draw(sweep, found, c, k, path),
    )


def shifted_simplex(gram: Tensor) -> tuple[float, float]:
    """alpha and beta <= 1 of the shifted simplex alpha P (I - beta J/K) with this Gram matrix ([ENC] Def. III.1).

    Its Gram matrix is alpha^2 (I - J/K) + alpha^2 (1 - beta)^2 J/K.
    """
    k = len(gram)
    along = float(gram.mean() * k)  # eigenvalue of the ones vector
    alpha = math.sqrt(float(gram.trace() - along) / (k - 1))
    return alpha, 1 - math.sqrt(max(along, 0.0)) / alpha


def expected_shift(lambda_b: float, c: float) -> float:
    """[ENC] Eq. 4: the Gram matrix is alpha (I - min(1, c / (lambda_b (1 - c))) J/K)."""
    return 1 - math.sqrt(1 - min(1.0, c / (lambda_b * (1 - c))))


def expected_bias(lambda_b: float, c: float, k: int) -> float:
    """[ENC] Eq. 5, the norm of a multiple of the ones vector."""
    each = 1 / (1 + lambda_b) if lambda_b <= c / (1 - c) else c / lambda_b
    return each / math.sqrt(k)


def draw(sweep: Sequence[float], found: Sequence[MSESolution], c: float, k: int, path: Path) -> None:
    """The class means in space at three penalties; shift and bias over the whole sweep."""
    figure = style.canvas(
        14, 8.4, "Penalising the classifier's bias turns the simplex into an orthogonal frame",
        "The bias can take the labels' common part off the features. As it gets more expensive it shrinks, and the "
        "features have to carry that part:\nthe class means rise out of the plane in which they sum to 0, until they "
        "are orthogonal. Nothing moves before the penalty reaches c/(1\N{MINUS SIGN}c).",
    )  # fmt: skip
    transition = c / (1 - c)
    if k == 3:
        shown = (0, int(np.argmin([abs(x / transition - 1.7) for x in sweep])), len(sweep) - 1)
        for place, index in enumerate(shown):
            _means_in_space(figure, place, found[index].means, sweep[index] / transition)
    smooth = np.geomspace(min(sweep), max(sweep), 600)
    below = figure.add_gridspec(1, 2, left=0.07, right=0.97, top=0.4, bottom=0.1, wspace=0.18)
    curves = (
        ("Shift of the class means: 1 simplex, 0 orthogonal frame", [expected_shift(x, c) for x in smooth],
         [shifted_simplex(s.means @ s.means.T)[1] for s in found]),
        ("Length of the bias", [expected_bias(x, c, k) for x in smooth], [float(s.bias.norm()) for s in found]),
    )  # fmt: skip
    for column, (title, line, dots) in enumerate(curves):
        ax = figure.add_subplot(below[0, column])
        ax.axvline(transition, color=style.MUTED, lw=1.2, ls="--")
        ax.plot(smooth, line, color=style.BLUE, lw=2, label="closed form")
        ax.plot(sweep, dots, "o", ms=7, mfc="white", mec=style.PINK, mew=1.8, label="minimised from random numbers")
        ax.set_xscale("log")
        ax.set_ylim(bottom=-0.03 * max(line), top=1.12 * max(line))
        ax.set_xlabel(r"penalty on the bias, $\lambda_b$")
        style.tidy(ax, title)
        ax.text(transition * 1.06, 1.06 * max(line), r"$c/(1-c)$", color=style.MUTED, fontsize=10, va="center")
        if column == 0:
            ax.legend(frameon=False, loc="lower left", fontsize=10, labelcolor=style.INK)
    style.save(figure, path)


def _means_in_space(figure: Figure, place: int, means: Tensor, multiple: float) -> None:
    """Three arrows, rotated so that their sum points up."""
    left, values, _ = torch.linalg.svd(means)
    rows = (left * values) @ left.T  # the symmetric root of the Gram matrix: the means, rotated
    unit = rows / rows.norm(dim=1, keepdim=True)
    cosine = float((unit @ unit.T)[0, 1])
    kind = ("simplex", "in between", "nearly orthogonal")[place]
    note = f"{math.degrees(math.acos(max(-1.0, cosine))):.0f}° apart, penalty {multiple:g} c/(1\N{MINUS SIGN}c)"
    ax = style.space(figure, (0.05 + 0.31 * place, 0.47, 0.29, 0.27), f"Class means: {kind}", note)
    style.arrows(ax, (rows / rows.norm(dim=1).max()).numpy())
