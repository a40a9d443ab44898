"""The style of the lab's pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nckernels import _palette

try:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError('the lab\'s pictures need matplotlib: pip install "nckernels[lab]"') from error

Array = NDArray[Any]

INK, MUTED, GRID = _palette.INK, _palette.MUTED, _palette.GRID
BLUE, ORANGE, GREEN, PINK, GREY = _palette.BLUE, _palette.ORANGE, _palette.GREEN, _palette.PINK, _palette.GREY
CLASSES = (BLUE, ORANGE, GREEN, PINK, "#56b4e9", GREY)
LOSS_COLOURS = {"normface": ORANGE, "ntce": BLUE, "nonl": PINK, "supcon": GREEN, "prototype": "#7b5fc7"}
LOSS_NAMES = {
    "normface": "NormFace", "ntce": "NTCE", "nonl": "NONL", "supcon": "SupCon", "prototype": "Prototype loss",
}  # fmt: skip


def canvas(width: float, height: float, title: str, subtitle: str) -> Figure:
    """A figure with a title and a subtitle; place the axes below 84 % of its height."""
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(0.03, 1 - 0.2 / height, title, fontsize=15, color=INK, weight="bold", va="top")
    figure.text(0.03, 1 - 0.56 / height, subtitle, fontsize=11, color=INK, va="top", linespacing=1.4)
    return figure


def tidy(ax: Axes, title: str = "", grid: bool = True) -> None:
    """Axes with a title, light lines and an optional grid."""
    ax.set_title(title, fontsize=11.5, color=INK, loc="left", pad=8)
    if grid:
        ax.grid(color=GRID, lw=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(MUTED)
    ax.tick_params(colors=INK, labelsize=10)
    ax.xaxis.label.set_color(INK)
    ax.yaxis.label.set_color(INK)


def space(figure: Figure, where: tuple[float, float, float, float], title: str, note: str) -> Axes:
    """Axes for the arrows of three classes in space, seen slightly from above (:func:`project`).

    (1, 1, 1) points up. A simplex lies flat in the grey disc, an orthogonal frame opens upwards.
    """
    x, y, width, height = where
    ax = figure.add_axes((x, y, width, height))
    ax.set(xlim=(-1.25, 1.25), ylim=(-0.5, 1.15), aspect="equal")
    ax.set_axis_off()
    turn = np.linspace(0, 2 * np.pi, 200)
    disc = project(np.stack([np.cos(turn), np.sin(turn), np.zeros_like(turn)], axis=1))
    ax.fill(disc[:, 0], disc[:, 1], color=GRID, alpha=0.6, lw=0, zorder=0)
    ax.plot([0, 0], [0, 0.95], color=MUTED, lw=1, ls=":", zorder=1)
    middle = x + width / 2
    figure.text(middle, y + height + 0.045, title, fontsize=12, color=INK, ha="center", va="bottom", weight="bold")
    figure.text(middle, y + height + 0.035, note, fontsize=11, color=INK, ha="center", va="top", linespacing=1.3)
    return ax


def upright(points: Array) -> Array:
    """Rows of (n, 3), rotated so that (1, 1, 1) is the third axis."""
    across, up = np.array([2.0, -1.0, -1.0]) / np.sqrt(6), np.ones(3) / np.sqrt(3)
    turned: Array = points @ np.stack([across, np.cross(up, across), up], axis=1)
    return turned


def project(points: Array) -> Array:
    """Rows of (n, 3) onto the page, orthogonally: the third axis up, seen from 20 degrees above."""
    around, above = np.radians(40), np.radians(20)
    right = np.array([np.cos(around), np.sin(around), 0])
    away = np.array([-np.sin(around), np.cos(around), 0])
    flat: Array = points @ np.stack([right, away * np.sin(above) + np.array([0, 0, np.cos(above)])], axis=1)
    return flat


def arrows(ax: Axes, points: Array) -> None:
    """An arrow per class from the origin of :func:`space`."""
    for c, (x, y) in enumerate(project(upright(points))):
        arrow = {
            "arrowstyle": "-|>,head_length=0.55,head_width=0.28",
            "color": CLASSES[c],
            "lw": 3,
            "shrinkA": 0,
            "shrinkB": 0,
        }
        ax.annotate("", (x, y), (0, 0), arrowprops=arrow, zorder=3)


def heat(ax: Axes, matrix: Array, title: str, limit: float = 1.0) -> Any:
    """A small square matrix in red and blue, with its numbers."""
    image = ax.imshow(matrix, cmap="RdBu_r", vmin=-limit, vmax=limit)
    ax.set_title(title, fontsize=10.5, color=INK, pad=6)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    for (i, j), value in np.ndenumerate(matrix):
        text = f"{value:.2f}".replace("-", "\N{MINUS SIGN}")
        colour = "white" if abs(value) > 0.6 * limit else INK
        ax.text(j, i, text, ha="center", va="center", fontsize=8, color=colour)
    return image


def save(figure: Figure, path: Path) -> None:
    """Write a PNG."""
    figure.savefig(path, dpi=110)
