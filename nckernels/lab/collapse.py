"""Every loss on unit vectors collapses to the simplex, from any start ([NCD] Theorem A.1, Theorem 4.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from nckernels.ufm import LOSSES, Solution, solve

from . import style
from .report import Check, Result, bar

Case = tuple[str, int, int]  # loss, K, d


def run(
    *,
    seed: int = 0,
    progress: bool = False,
    sizes: Sequence[tuple[int, int]] = ((3, 2), (3, 5), (4, 4), (10, 9), (10, 12)),
    samples_per_class: int = 4,
    temperature: float = 0.2,
) -> Result:
    """Minimise each loss from a random start for each (K, d), d >= K - 1."""
    cases = [(loss, k, d) for loss in LOSSES for k, d in sizes]
    found: dict[Case, Solution] = {}
    for loss, k, d in bar(cases, "collapse", progress):
        found[loss, k, d] = solve(loss, k, d, samples_per_class, temperature, seed=seed)
    checks = [
        Check(f"{style.LOSS_NAMES[loss]}, {k} classes in {d} dimensions: value", s.value, s.minimum, 1e-9)
        for (loss, k, d), s in found.items()
    ]
    for loss in LOSSES:
        worst = max(_distance_from_collapse(s) for (of, _, _), s in found.items() if of == loss)
        checks.append(Check(f"{style.LOSS_NAMES[loss]}: the metric furthest from collapse", worst, 0.0, 1e-5))
    return Result(
        "Every loss on unit vectors has the same minimisers: samples at their class mean, means and prototypes on a "
        "simplex.",
        checks,
        lambda path: draw(found, path, seed),
    )


def _distance_from_collapse(solution: Solution) -> float:
    """The largest of the metrics of NC1, NC2 and NC3 whose optimum is 0."""
    c = solution.collapse
    return max(c.within_scatter, c.nc2_norms, c.nc2_cosines_max, c.offset, c.weight_alignment, c.nc3_rotated)


def draw(found: dict[Case, Solution], path: Path, seed: int) -> None:
    """Top: three classes on the circle under each loss. Bottom: the distance of each value from its minimum."""
    figure = style.canvas(
        15, 8.2, "Five losses, one geometry: free features collapse to a simplex from random starts",
        "Nothing but the loss moves the points. Samples of a class end on one spot, the spots as far apart as can "
        "be,\nthe prototypes (stars) on top of them. The value is then that of the closed form to the last digits of "
        "float64.",
    )  # fmt: skip
    grid = figure.add_gridspec(2, len(LOSSES), left=0.05, right=0.98, top=0.82, bottom=0.09, height_ratios=(1.35, 1),
                               hspace=0.28, wspace=0.08)  # fmt: skip
    for column, loss in enumerate(LOSSES):
        flat = found.get((loss, 3, 2)) or solve(loss, 3, 2, 4, 0.2, seed=seed)
        ax = figure.add_subplot(grid[0, column])
        turn = torch.linspace(0, 2 * math.pi, 200)
        ax.plot(turn.cos(), turn.sin(), color=style.GRID, lw=1.5, zorder=1)
        ideal = torch.cat([flat.prototypes, flat.prototypes[:1]])
        ax.plot(ideal[:, 0], ideal[:, 1], color=style.MUTED, ls="--", lw=1.2, zorder=2)
        for c in range(3):
            colour, of_class = style.CLASSES[c], flat.target == c
            for begin, end in zip(flat.start[of_class], flat.features[of_class], strict=True):
                ax.plot([begin[0], end[0]], [begin[1], end[1]], color=colour, lw=0.9, alpha=0.45, zorder=2)
            (x, y), (x_end, y_end), star = flat.start[of_class].T, flat.features[of_class].T, flat.prototypes[c]
            ax.scatter(x, y, s=34, facecolor="white", edgecolor=colour, lw=1.4, zorder=3)
            ax.scatter(x_end, y_end, s=130, color=colour, zorder=4)
            ax.scatter(star[0], star[1], s=150, marker="*", color="white", edgecolor=style.INK, lw=0.8, zorder=5)
        ax.set_title(style.LOSS_NAMES[loss], fontsize=12.5, color=style.LOSS_COLOURS[loss], weight="bold")
        ax.set(xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), aspect="equal", xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
        if column == 0:
            key = "○ random start    ● where the loss takes it    ☆ prototype, or class mean    - - simplex"
            ax.text(-1.15, -1.35, key, fontsize=10, color=style.MUTED)

    ax = figure.add_subplot(grid[1, :])
    sizes = list(dict.fromkeys((k, d) for _, k, d in found))
    for loss in LOSSES:
        offset = (LOSSES.index(loss) - 2) * 0.13
        for i, (k, d) in enumerate(sizes):
            s, colour = found[loss, k, d], style.LOSS_COLOURS[loss]
            begin, end = s.start_value - s.minimum, max(abs(s.gap), 1e-17)
            ax.plot([i + offset] * 2, [begin, end], color=colour, lw=1.2, alpha=0.5)
            ax.plot(i + offset, begin, "o", ms=7, mfc="white", mec=colour, mew=1.6)
            ax.plot(i + offset, end, "o", ms=8, color=colour, label=None if i else style.LOSS_NAMES[loss])
    ax.axhspan(1e-18, 1e-13, color=style.GRID, alpha=0.5, zorder=0)
    ax.text(0.5, 5e-16, "float64's\nrounding", color=style.MUTED, fontsize=10, va="center", ha="center")
    ax.text(0.5, 1.0, "○ random start", color=style.MUTED, fontsize=10, va="center", ha="center")
    ax.set_yscale("log")
    ax.set(ylim=(3e-18, 60), xlim=(-0.5, len(sizes) - 0.5), xticks=range(len(sizes)))
    ax.set_xticklabels([f"{k} classes, {d} dimensions" for k, d in sizes])
    ax.set_ylabel("|value \N{MINUS SIGN} closed-form minimum|")
    style.tidy(ax, "How far the value is from the closed form")
    ax.legend(ncols=5, frameon=False, loc="upper right", bbox_to_anchor=(1, 1.16), fontsize=10, labelcolor=style.INK)
    style.save(figure, path)
