"""Errors in the three papers, each with a measured number that shows it."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import nckernels
from nckernels.geometry import orthogonal_frame, prototype_quality, simplex_etf
from nckernels.geometry.dlp import dlp_recipe
from nckernels.metrics import neural_collapse, optimum
from nckernels.ufm import label_smoothing, one_hot, solve_mse

from . import style
from .bias import shifted_simplex
from .report import Check, Result, bar


@dataclass(frozen=True)
class Erratum:
    """The printed statement, the measured one, and the checks that compare them."""

    where: str
    says: str
    found: str
    checks: Sequence[Check]


def run(*, seed: int = 0, progress: bool = False, num_classes: int = 10) -> Result:
    """Measure every erratum; a check agrees if the correction is right."""
    experiments: Sequence[Callable[[], Erratum]] = (
        lambda: gradient_of_dot_regression(seed),
        lambda: learning_rate_of_prototypes(seed),
        lambda: rank_of_vanishing_scatter(seed, num_classes),
        lambda: rank_of_an_orthogonal_frame(seed, num_classes),
        lambda: mir_of_a_simplex(seed, num_classes),
        lambda: direction_of_no_mean(seed, num_classes),
        sign_of_label_smoothing,
        lambda: scale_without_bias_penalty(seed),
        lambda: simplices_of_other_labels(seed),
    )
    errata = [experiment() for experiment in bar(experiments, "errata", progress)]
    return Result(
        "Errors in the papers: printed, measured and correct values.",
        [check for erratum in errata for check in erratum.checks],
        lambda path: draw(errata, path),
    )


def gradient_of_dot_regression(seed: int) -> Erratum:
    """The gradient of (z.w - 1)^2/2 in x, z = x/|x| and s = z.w, is -(1 - s)(w - s z)/|x|, which is not 0 at s = 0."""
    generator = torch.Generator().manual_seed(seed)
    x, w = torch.randn(2, 1, 8, generator=generator, dtype=torch.float64)
    w = F.normalize(w)
    x = (2.0 * F.normalize(x - (x @ w.T) * w)).requires_grad_()  # orthogonal to w, of length 2
    nckernels.dot_regression_loss(x, w, torch.zeros(1, dtype=torch.int64)).backward()
    assert x.grad is not None
    length = float(x.grad.norm())
    return Erratum(
        "[DLP] Eq. 7",
        "The gradient of the dot-regression loss is \N{MINUS SIGN}(1 \N{MINUS SIGN} z·w) z·w, a number. "
        "It is 0 where z is orthogonal to w.",
        f"It is the vector \N{MINUS SIGN}(1 \N{MINUS SIGN} s)(w \N{MINUS SIGN} s z)/|x|, s = z·w. There its length "
        f"is {length:.3g} (|x| = 2).",
        [
            Check("[DLP] Eq. 7: length of the gradient, z.w = 0, |x| = 2", length, 0.5, 1e-12, printed="0"),
            Check("[DLP] Eq. 7: error of -(1-s)(w - s z)/|x|", float((x.grad + w / 2).abs().max()), 0.0, 1e-12),
        ],
    )


def learning_rate_of_prototypes(seed: int) -> Erratum:
    """100 prototypes in 100 dimensions with learning rate 0.1, as published, and with 10."""
    generator = torch.Generator().manual_seed(seed)
    start = F.normalize(torch.randn(100, 100, generator=generator, dtype=torch.float64))
    slow = prototype_quality(dlp_recipe(start)).max_cosine
    fast = prototype_quality(dlp_recipe(start, learning_rate=10.0)).max_cosine
    return Erratum(
        "[DLP] §4.1, Table 7",
        "1000 steps at rate 0.1 spread 100 prototypes in 100 dimensions so that no cosine exceeds 0.0.",
        f"They leave a cosine of {slow:.2f}. At rate 10 it is {_number(fast)}, the simplex's \N{MINUS SIGN}1/99.",
        [
            Check("[DLP] Table 7, d = 100: largest cosine at rate 0.1", slow, 0.15, 0.0, ">", "0.0"),
            Check("[DLP] Table 7, d = 100: largest cosine at rate 10", fast, -1 / 99, 1e-4),
        ],
    )


def rank_of_vanishing_scatter(seed: int, num_classes: int) -> Erratum:
    """The effective rank of a covariance ignores its size, as a simplex with samples 1e-6 from their means shows."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.arange(num_classes).repeat_interleave(20)
    points = simplex_etf(num_classes, max(16, num_classes), generator=generator, dtype=torch.float64)[target]
    noise = torch.randn(points.shape, generator=generator, dtype=torch.float64)
    near = neural_collapse(points + 1e-6 / math.sqrt(points.shape[1]) * noise, target)
    return Erratum(
        "[NCD] Table 3",
        "The optimum of the intra-class effective rank is 0: lower is more collapsed.",
        f"It counts directions, at least 1, whatever their size. Features about "
        f"{10 ** round(math.log10(near.within_scatter) / 2):.0e} from their means have {near.intra_erank:.1f}.",
        [Check("[NCD] Table 3: intra-class rank, features 1e-6 from collapse", near.intra_erank, 1.0, 0.0, ">", "0")],
    )


def rank_of_an_orthogonal_frame(seed: int, num_classes: int) -> Erratum:
    """An orthogonal frame has the same inter-class rank as the simplex."""
    generator = torch.Generator().manual_seed(seed)
    frame = orthogonal_frame(num_classes, num_classes, generator=generator, dtype=torch.float64)
    at = neural_collapse(frame, torch.arange(num_classes))
    return Erratum(
        "[NCD] Table 3",
        "The inter-class effective rank shows the simplex of class means: its optimum is K \N{MINUS SIGN} 1.",
        f"Orthogonal means have it as well: {at.inter_erank:.3g} for K = {num_classes}. Their distance from the "
        f"origin, {at.offset:.2f}, tells them apart.",
        [
            Check("[NCD] Table 3: inter-class rank of an orthogonal frame", at.inter_erank, num_classes - 1.0, 1e-9),
            Check("[NCD] Table 3: offset of the orthogonal frame", at.offset, 1 / math.sqrt(num_classes), 1e-9),
        ],
    )


def mir_of_a_simplex(seed: int, num_classes: int) -> Erratum:
    """At exact collapse MIR is 1 only in the limit of many classes."""
    points = _simplex(seed, num_classes)
    at = neural_collapse(points, torch.arange(num_classes), points)
    return Erratum(
        "[NCD] Table 3",
        "The optimum of the mutual information ratio MIR is 1.",
        f"At exact collapse of {num_classes} classes it is {at.mir_centred:.3f}.",
        [
            Check(f"[NCD] Table 3: MIR at a simplex of {num_classes}", at.mir_centred, optimum(num_classes).mir, 1e-9,
                  printed="1"),
        ],
    )  # fmt: skip


def direction_of_no_mean(seed: int, num_classes: int) -> Erratum:
    """The direction of the global mean is noise if that mean is 0, as a simplex that is off by 1e-9 shows."""
    points = _simplex(seed, num_classes)
    generator = torch.Generator().manual_seed(seed + 1)
    off = points + 1e-9 * torch.randn(points.shape, generator=generator, dtype=torch.float64)
    at = neural_collapse(off, torch.arange(num_classes), points)
    return Erratum(
        "[NCD] code",
        "MIR and HDR subtract the direction of the global mean from the directions of the class means.",
        f"At collapse that mean is 0 and its direction chance: a simplex off by 1e-9 has an HDR of {at.hdr:.2f} "
        f"instead of 0. Subtracting the mean itself gives {_number(at.hdr_centred)}.",
        [
            Check("[NCD] code: HDR of a simplex that is off by 1e-9", at.hdr, 0.02, 0.0, ">", "0"),
            Check("[NCD] code: the same, centred by the mean itself", at.hdr_centred, 0.0, 1e-6),
        ],
    )


def sign_of_label_smoothing() -> Erratum:
    """Smoothed labels as a shifted simplex alpha (I - beta J/K)."""
    k, delta = 5, 0.2
    labels = label_smoothing(k, delta)
    alpha = float(labels[0, 0] - labels[0, 1])
    beta = -k * float(labels[0, 1]) / alpha  # alpha (I - beta J/K) has -alpha beta / K off its diagonal
    return Erratum(
        "[ENC] §IV-B",
        f"Labels smoothed by δ are a shifted simplex with β = δ/(1 \N{MINUS SIGN} δ): +{delta / (1 - delta):.2f} for "
        f"δ = {delta}.",
        f"β is {_number(beta)}: smoothing adds to the other classes, it takes nothing off.",
        [
            Check("[ENC] §IV-B: beta of labels smoothed by 0.2", beta, -delta / (1 - delta), 1e-12,
                  printed=f"+{delta / (1 - delta):.2f}"),
        ],
    )  # fmt: skip


def scale_without_bias_penalty(seed: int) -> Erratum:
    """The scale of the means below and above the transition at lambda_b = c/(1 - c) = 0.22."""
    k, n, weight_decay = 3, 4, 0.03
    c = k * math.sqrt(n) * weight_decay
    scales = []
    for lambda_b in (0.1, 0.4, 5.0):
        s = solve_mse(one_hot(k), n, k, lambda_w=weight_decay, lambda_h=weight_decay, lambda_b=lambda_b, seed=seed)
        scales.append(shifted_simplex(s.means @ s.means.T)[0] ** 2)
    right, spread = (1 - c) / math.sqrt(n), max(scales) - min(scales)
    return Erratum(
        "[ENC] Theorem III.1",
        "The scales α₁ and α₂ of the class means depend on λ_W, λ_H and λ_b.",
        f"They are one number, (1 \N{MINUS SIGN} c) sqrt(λ_W/(n λ_H)), whatever λ_b: {scales[0]:.3f}, {scales[1]:.3f}, "
        f"{scales[2]:.3f} at 0.1, 0.4, 5.",
        [
            Check("[ENC] Theorem III.1: alpha_1", scales[0], right, 1e-9),
            Check("[ENC] Theorem III.1: spread of alpha over lambda_b", spread, 0.0, 1e-9, printed="not 0"),
        ],
    )


def simplices_of_other_labels(seed: int) -> Erratum:
    """A free bias absorbs any common shift of the labels, such as that of one-hot labels plus (1, 0, ..., 0)."""
    k = 4
    labels = one_hot(k)
    labels[0] += 1.0
    s = solve_mse(labels, 4, k, lambda_w=0.01, lambda_h=0.01, lambda_b=0.0, seed=seed)
    of_labels, of_means = _irregularity(labels.T @ labels), _irregularity(s.means @ s.means.T)
    return Erratum(
        "[ENC] §IV-B, conjecture",
        "The class means form a shifted simplex if and only if the labels do.",
        f"Only \N{LEFT DOUBLE QUOTATION MARK}if\N{RIGHT DOUBLE QUOTATION MARK} holds at λ_b = 0: one-hot labels plus "
        f"(1, 0, 0, 0) are {100 * of_labels:.0f} % off any shifted simplex, their class means {_number(of_means)} %.",
        [
            Check("[ENC] conjecture: labels' distance from shifted simplices", of_labels, 0.1, 0.0, ">"),
            Check("[ENC] conjecture: their class means', lambda_b = 0", of_means, 0.0, 1e-9, printed="not 0"),
        ],
    )


def _simplex(seed: int, num_classes: int) -> Tensor:
    return simplex_etf(num_classes, num_classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _irregularity(gram: Tensor) -> float:
    """Relative distance of a Gram matrix from those of shifted simplices, a I + b 1 1^T."""
    k = len(gram)
    own = gram.diagonal().mean()
    between = (gram.sum() - gram.trace()) / (k * (k - 1))
    nearest = between.expand(k, k) + (own - between) * torch.eye(k, dtype=gram.dtype)
    return float((gram - nearest).norm() / gram.norm())


def _number(value: float) -> str:
    return "0" if abs(value) < 1e-9 else f"{value:.3g}".replace("-", "\N{MINUS SIGN}")


def draw(errata: Sequence[Erratum], path: Path) -> None:
    """One line per erratum: place, printed statement, measured value."""
    widths = (62, 66)
    cells = [
        (e.where, textwrap.fill(e.says, widths[0]), textwrap.fill(e.found, widths[1])) for e in errata
    ]  # fmt: skip
    heights = [0.2 + 0.21 * max(text.count("\n") + 1 for text in row) for row in cells]
    total = 1.45 + sum(heights)
    figure = style.canvas(
        14, total, "What the papers say, and what is measured",
        "Each line was measured by this experiment, on exact configurations or minima in float64.",
    )  # fmt: skip
    ax = figure.add_axes((0.03, 0.02, 0.94, 1 - 1.0 / total))
    ax.set_axis_off()
    ax.set(xlim=(0, 1), ylim=(sum(heights) + 0.15, -0.3))
    columns = (0.0, 0.16, 0.555)
    for x, head in zip(columns, ("", "the paper says", "measured here"), strict=True):
        ax.text(x, -0.14, head, fontsize=10.5, color=style.MUTED, va="center")
    y = 0.0
    for row, height in zip(cells, heights, strict=True):
        ax.axhline(y, color=style.GRID, lw=0.9)
        for x, text, colour in zip(columns, row, (style.MUTED, style.INK, style.PINK), strict=True):
            ax.text(x, y + height / 2, text, fontsize=10.5, color=colour, va="center", linespacing=1.3)
        y += height
    style.save(figure, path)
