"""The picture of the demo: the metrics during training, and the geometry of the class means at the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter
from numpy.typing import NDArray
from torch import Tensor

from nckernels._palette import GRID, INK, LOSSES, MUTED
from nckernels.metrics import class_means, convergence_iteration, optimum, ranges

from .engine import Run
from .evaluate import features as extract
from .history import History

Array = NDArray[Any]

LEFT_MARGINS = {"left": 0.06, "right": 0.985, "top": 0.85, "bottom": 0.065, "hspace": 0.28, "wspace": 0.2}
RIGHT_MARGINS = {"left": 0.05, "right": 0.9, "top": 0.85, "bottom": 0.03, "hspace": 0.24, "wspace": 0.1}

# Title, metric, logarithmic axis.
CURVES = (
    ("Inter-class effective rank", "inter_erank", False),
    ("Prototypes' effective rank", "weights_erank", False),
    ("Intra-class rank (blind to size)", "intra_erank", False),
    ("Prototype-to-mean distance²", "weight_alignment", False),
    ("Prototype-to-sample distance²", "instance_alignment", False),
    ("Entropy difference HDR (centred)", "hdr_centred", False),
    (r"NC1: $\mathrm{tr}(\Sigma_W \Sigma_B^+)\,/\,K$", "nc1", True),
    ("Within-class scatter", "within_scatter", True),
    ("NC2: error of pairwise cosines", "nc2_cosines", True),
)


def demo_figure(runs: Mapping[str, Run], names: Mapping[str, str], path: Path) -> None:
    """Left: the curves of all runs, by loss. Right: the final geometry under CE and NONL."""
    figure = Figure(figsize=(19, 10.2), facecolor="white")
    FigureCanvasAgg(figure)
    halves = figure.subfigures(1, 2, width_ratios=(1.28, 1), wspace=0.0, squeeze=False)[0]
    _curves(halves[0], {loss: run.history for loss, run in runs.items()}, names)
    _geometry(halves[1], {loss: runs[loss] for loss in ("ce", "nonl")}, names)
    figure.savefig(path, dpi=110)


# Left half: one small panel per metric.


def _curves(area: SubFigure, histories: Mapping[str, History], names: Mapping[str, str]) -> None:
    first = next(iter(histories.values()))
    best, spans = asdict(optimum(first.num_classes)), ranges(first.num_classes, first.dim)
    axes = area.subplots(3, 3, sharex=True, gridspec_kw=LEFT_MARGINS)
    for ax, (title, metric, logarithmic) in zip(axes.flat, CURVES, strict=True):
        _style(ax, title)
        tolerance = 0.05 * spans[metric] if metric in spans else None
        if tolerance is not None:
            threshold = tolerance if best[metric] == 0 else best[metric] - tolerance
            ax.axhline(threshold, color=MUTED, ls="--", lw=1.2)
        for loss, history in histories.items():
            colour, values = LOSSES[loss], history.metrics[metric]
            ax.plot(history.steps, values, color=colour, lw=1.8, solid_capstyle="round")
            if tolerance is None:
                continue
            reached = convergence_iteration(history.steps, values, best[metric], tolerance)
            if reached is not None:
                value = values[history.steps.index(reached)]
                ax.plot(reached, value, "o", ms=7, mfc="white", mec=colour, mew=1.8, zorder=5, clip_on=False)
        if logarithmic:
            ax.set_yscale("log")
            ax.yaxis.set_minor_formatter(NullFormatter())
        else:
            ax.set_ylim(bottom=0)
        ax.margins(x=0.02)
    for ax in axes[-1]:
        ax.set_xlabel("iteration", color=INK)
    handles = [Line2D([], [], color=LOSSES[loss], lw=2.5, label=names[loss]) for loss in histories]
    handles += [
        Line2D([], [], color=MUTED, ls="--", lw=1.2, label="95 % of the way to collapse"),
        Line2D([], [], color=MUTED, ls="", marker="o", ms=7, mfc="white", label="stays beyond it from here"),
    ]
    area.suptitle(
        f"Neural collapse during training: {first.recipe.data.name}, {first.steps[-1]} iterations each",
        x=0.06, y=0.975, ha="left", fontsize=15, color=INK, weight="bold",
    )  # fmt: skip
    area.legend(handles=handles, loc="upper left", bbox_to_anchor=(0.052, 0.945), ncols=7, frameon=False,
                fontsize=10.5, columnspacing=1.1, handlelength=1.5, handletextpad=0.5, labelcolor=INK)  # fmt: skip


# Right half: for each run the cosines of its class means, and a projection that shows a simplex as a polygon.


def _geometry(area: SubFigure, runs: Mapping[str, Run], names: Mapping[str, str]) -> None:
    axes = area.subplots(2, len(runs), gridspec_kw=RIGHT_MARGINS)
    views = [_View.of(run) for run in runs.values()]
    limit = 1.1 * max(view.extent() for view in views)
    for (top, bottom), loss, view in zip(axes.T, runs, views, strict=True):
        name = names[loss]
        image = _cosines(top, view.means, name)
        _projection(bottom, view, limit, name)

    k = len(views[0].means)
    box = axes[0, -1].get_position()
    bar = area.colorbar(image, cax=area.add_axes((box.x1 + 0.016, box.y0, 0.015, box.height)))
    ticks = (-1.0, -0.5, -1 / (k - 1), 0.5, 1.0)
    bar.set_ticks(ticks, labels=[_minus(f"{tick:.2g}") for tick in ticks])
    bar.ax.tick_params(colors=INK, labelsize=10.5)
    bar.outline.set_visible(False)
    area.suptitle("Geometry at the end", x=0.05, y=0.975, ha="left", fontsize=15, color=INK, weight="bold")
    handles = [
        Line2D([], [], color=MUTED, ls="", marker=".", ms=7, label="samples"),
        Line2D([], [], color=MUTED, ls="", marker="o", ms=10, mec="white", label="class means"),
        Line2D([], [], color=MUTED, ls="", marker="*", ms=16, mec=INK, mew=0.8, label="prototypes"),
        Line2D([], [], color=MUTED, ls="--", lw=1.2, label="a perfect simplex"),
    ]
    area.legend(handles=handles, loc="upper left", bbox_to_anchor=(0.04, 0.945), ncols=4, frameon=False,
                fontsize=11.5, labelcolor=INK)  # fmt: skip


@dataclass(frozen=True)
class _View:
    """Unit features, class means and unit prototypes of a run, and their projection onto a plane.

    A simplex of K points has planes onto which it projects orthogonally as a regular K-gon of radius
    sqrt(2/(K-1)). For other means, the polar factor below is the plane with the largest inner product of projected
    means and polygon, so every loss is shown in its most favourable view.
    """

    labels: Array
    means: Tensor
    polygon: Array
    samples_2d: Array
    means_2d: Array
    prototypes_2d: Array

    @classmethod
    def of(cls, run: Run) -> _View:
        prototypes = F.normalize(run.head.prototypes.detach().cpu().double())
        z, labels = extract(run.network, run.data, run.data.train, run.history.recipe, run.head.prototypes.device)
        features, labels, k = F.normalize(z.cpu().double()), labels.cpu(), len(prototypes)
        means, _ = class_means(features, labels, k)
        angles = 2 * torch.pi * torch.arange(k, dtype=torch.float64) / k + torch.pi / 2
        polygon = (2 / (k - 1)) ** 0.5 * torch.stack([angles.cos(), angles.sin()], dim=1)
        left, _, right = torch.linalg.svd((means - means.mean(0)).T @ polygon, full_matrices=False)
        plane = left @ right  # d x 2, orthonormal columns
        flat = [(points @ plane).numpy() for points in (features, means, prototypes)]
        return cls(labels.numpy(), means, polygon.numpy(), *flat)

    def extent(self) -> float:
        """Half the side of a square that shows everything except a few samples."""
        points = np.concatenate([self.means_2d, self.prototypes_2d, 1.2 * self.polygon])
        return float(max(np.quantile(np.abs(self.samples_2d), 0.995), np.abs(points).max()))


def _cosines(ax: Axes, means: Tensor, name: str) -> AxesImage:
    """Pairwise cosines of the centred class means."""
    directions = F.normalize(means - means.mean(0))
    cosines = (directions @ directions.T).numpy()
    k = len(means)
    off = cosines[~np.eye(k, dtype=bool)]
    image = ax.imshow(cosines, cmap="RdBu_r", vmin=-1, vmax=1)
    ax.set_title(f"{name}: cosines of the class means", fontsize=12.5, color=INK, pad=8)
    ax.set_xlabel(_minus(f"different classes: {off.min():.2f} to {off.max():.2f}"), color=INK, fontsize=11.5)
    ax.set_xticks(range(k))
    ax.set_yticks(range(k))
    ax.tick_params(length=0, colors=INK)
    ax.spines[:].set_visible(False)
    ax.set_xticks(np.arange(k - 1) + 0.5, minor=True)
    ax.set_yticks(np.arange(k - 1) + 0.5, minor=True)
    ax.grid(which="minor", color="white", lw=1.2)
    ax.tick_params(which="minor", length=0)
    return image


def _projection(ax: Axes, view: _View, limit: float, name: str) -> None:
    k = len(view.means)
    colours = colormaps["tab10"](np.arange(k) % 10)
    ring = np.concatenate([view.polygon, view.polygon[:1]])
    ax.plot(ring[:, 0], ring[:, 1], color=MUTED, ls="--", lw=1.2, zorder=3)
    samples, means, prototypes = view.samples_2d, view.means_2d, view.prototypes_2d
    ax.scatter(samples[:, 0], samples[:, 1], s=9, c=colours[view.labels], alpha=0.3, lw=0, zorder=2)
    ax.scatter(prototypes[:, 0], prototypes[:, 1], s=420, marker="*", c=colours, edgecolors=INK, lw=0.8, zorder=4)
    ax.scatter(means[:, 0], means[:, 1], s=130, c=colours, edgecolors="white", lw=1.2, zorder=5)
    for c, (x, y) in enumerate(means.tolist()):
        text = ax.text(x, y, str(c), ha="center", va="center_baseline", zorder=6)
        text.set(fontsize=9, color="white", weight="bold")
    ax.set_title(f"{name}: view that fits a simplex best", fontsize=12.5, color=INK, pad=7)
    ax.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=[], yticks=[])
    ax.spines[:].set_color(GRID)


def _minus(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")


def _style(ax: Axes, title: str) -> None:
    ax.set_title(title, fontsize=12.5, color=INK, loc="left", pad=7)
    ax.grid(color=GRID, lw=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(MUTED)
    ax.tick_params(colors=INK, labelsize=10.5)
