"""Features without negative entries cannot form the simplex; their optimum is an orthonormal frame.

The networks of [NCD] end in ReLU and average pooling. The closed-form optimum of such features explains the distance
from collapse in the paper's Table 3, which more training does not reduce.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.figure import Figure

from nckernels.metrics import optimum
from nckernels.ufm import Solution, solve

from . import style
from .report import Check, Result, bar

# [NCD] Table 3 by K: weight alignment and published HDR, each of NONL, NTCE, NormFace.
TABLE_3 = {10: ((0.11, 0.08, 0.12), (0.05, 0.05, 0.04)), 100: ((0.01, 0.01, 0.01), (0.30, 0.30, 0.30))}
Kind = Literal["signed", "relu"]
KINDS: tuple[Kind, ...] = ("signed", "relu")


def run(
    *,
    seed: int = 0,
    progress: bool = False,
    losses: Sequence[str] = ("nonl", "ntce", "normface"),
    classes: Sequence[int] = (3, 4, 6, 10),
    samples_per_class: int = 3,
    temperature: float = 0.5,
) -> Result:
    """Minimise losses over signed and over non-negative features, K classes in K + 2 dimensions."""
    cases: list[tuple[str, int, Kind]] = [(loss, k, kind) for loss in losses for k in classes for kind in KINDS]
    found: dict[tuple[str, int, Kind], Solution] = {}
    for loss, k, kind in bar(cases, "relu", progress):
        found[loss, k, kind] = solve(loss, k, k + 2, samples_per_class, temperature, seed=seed, features=kind)
    checks = []
    for (loss, k, kind), s in found.items():
        best, label = optimum(k, features=kind), f"{loss}, K = {k}, {kind}"
        checks += [
            Check(f"{label}: value", s.value, s.minimum, 1e-8),
            Check(f"{label}: weight alignment", s.collapse.weight_alignment, best.weight_alignment, 1e-5),
            Check(f"{label}: offset of the means", s.collapse.offset, best.offset, 1e-5),
        ]
        if kind == "relu":
            checks.append(Check(f"{label}: HDR, as published", s.collapse.hdr, best.hdr, 1e-4))
    return Result(
        "Signed features collapse. Non-negative features end in an orthonormal frame, at a squared distance of "
        "2 - 2 sqrt((K-1)/K) from their prototypes.",
        checks,
        lambda path: draw(found, classes, losses[0], path),
    )


def draw(found: dict[tuple[str, int, Kind], Solution], classes: Sequence[int], loss: str, path: Path) -> None:
    """Three classes in space with and without signs; the residue over K; the paper's values on the same curves."""
    figure = style.canvas(
        15, 6.2, "ReLU features cannot collapse: the distance that remains is geometry, not lack of training",
        "Non-negative features span at most a right angle, a simplex needs more. Their best is an orthonormal frame, "
        "with the prototypes (stars) on a simplex below it.\nThe residue that [NCD] Table 3 prints (triangles: deep "
        "networks that end in ReLU) is that of the closed form. A signed last layer removes it.",
    )  # fmt: skip
    for place, kind in enumerate(KINDS):
        _space(figure, place, kind)
    grid = figure.add_gridspec(1, 2, left=0.475, right=0.985, top=0.71, bottom=0.26, wspace=0.22)
    smooth = list(range(3, 121))
    panels = (
        ("weight_alignment", "Squared distance, prototype to mean", 0),
        ("hdr", "Difference of entropies (HDR)", 1),
    )
    for column, (metric, title, entry) in enumerate(panels):
        ax = figure.add_subplot(grid[0, column])
        ax.plot(smooth, [getattr(optimum(k, features="relu"), metric) for k in smooth], color=style.PINK, lw=2,
                label="non-negative, closed form")  # fmt: skip
        ax.axhline(0, color=style.BLUE, lw=2, label="signed, closed form")
        for kind, colour in zip(KINDS, (style.BLUE, style.PINK), strict=True):
            shown = [k for k in classes if not (metric == "hdr" and kind == "signed")]
            ax.plot(shown, [getattr(found[loss, k, kind].collapse, metric) for k in shown], "o", ms=7, mfc="white",
                    mec=colour, mew=1.8, label=f"{'signed' if kind == 'signed' else 'non-negative'}, minimised",
                    zorder=4, clip_on=False)  # fmt: skip
        for k, values in TABLE_3.items():
            ax.plot([k] * 3, values[entry], "v", ms=8, color=style.INK, alpha=0.75, zorder=3, lw=0,
                    label="[NCD] Table 3" if k == 10 else None)  # fmt: skip
        ax.set_xscale("log")
        ax.set_xticks([3, 10, 30, 100])
        ax.set_xticklabels(["3", "10", "30", "100"])
        ax.minorticks_off()
        ax.set_xlabel("number of classes K")
        style.tidy(ax, title)
    handles, labels = figure.axes[-2].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=3, loc="lower left", bbox_to_anchor=(0.46, 0.01), frameon=False, fontsize=10,
                  labelcolor=style.INK)  # fmt: skip
    style.save(figure, path)


def _space(figure: Figure, place: int, kind: str) -> None:
    """The optimum of three classes: features as arrows, prototypes as stars."""
    frame = np.eye(3)
    simplex = frame - 1 / 3
    simplex /= np.linalg.norm(simplex, axis=1, keepdims=True)
    gap = 2 - 2 * math.sqrt(2 / 3) if kind == "relu" else 0.0
    title = "Non-negative features" if kind == "relu" else "Signed features"
    note = f"{90 if kind == 'relu' else 120}° apart, squared distance\nto their prototypes {gap:.2g}"
    ax = style.space(figure, (0.015 + 0.215 * place, 0.14, 0.205, 0.42), title, note)
    style.arrows(ax, frame if kind == "relu" else simplex)
    for c, (x, y) in enumerate(style.project(style.upright(1.1 * simplex))):
        ax.scatter(x, y, s=190, marker="*", color=style.CLASSES[c], edgecolor=style.INK, lw=0.8, zorder=4)
