"""The pictures of docs/results.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from nckernels._palette import GRID, INK, MUTED
from nckernels.metrics import ranges
from nckernels.train.report.style import COLOURS as THEMES

from .collect import Results, Run, tuned
from .measured import METRICS, NAMES, best, dim, mean_errors, num_classes
from .paired import accuracy
from .stages import STAGES
from .tables import missing, name

COLOURS = {row: THEMES[row][0] for row in NAMES}
CURVES = ("inter_erank", "weights_erank", "intra_erank", "weight_alignment", "instance_alignment", "within_scatter")
WIDTH = 9.0
"""Inches. With this dpi a picture has twice the pixels of GitHub's column; its letters are as large as the text."""
DPI = 180
LOGARITHMIC = ("within_scatter",)


def rates(results: Results) -> Figure | None:
    """Accuracy on the held-out faces by learning rate. Circles mark the chosen rates, crosses runs without accuracy."""
    chosen = tuned(results)
    if not chosen:
        return None
    figure, ((ax,),) = _figure(1, 1, 4.6)
    for row in chosen:
        runs = sorted((run for run in results.runs if (run.stage, run.row) == ("tune", row)), key=lambda run: run.lr)
        done = [run for run in runs if run.finished]
        ax.plot([run.lr for run in done], [accuracy(run) for run in done], color=COLOURS[row], lw=2, marker=".", ms=6)
        top = next(run for run in done if run.lr == chosen[row])
        ax.plot(top.lr, accuracy(top), "o", ms=10, mfc="none", mec=COLOURS[row], mew=2)
    lost = {
        row: [run.lr for run in results.runs if (run.stage, run.row) == ("tune", row) and not run.finished]
        for row in chosen
    }
    lost = {row: values for row, values in lost.items() if values}
    for i, (row, values) in enumerate(lost.items()):
        # Side by side, because several losses may diverge at one rate.
        beside = np.array(values) * 1.06 ** (i - (len(lost) - 1) / 2)
        ax.plot(beside, np.full(len(values), 1.5), "x", ms=6, color=COLOURS[row], mew=2)
    ticks = sorted({run.lr for run in results.runs if run.stage == "tune"})
    _logarithmic(ax, ticks, [f"{lr:g}" for lr in ticks])
    ax.set_ylim(bottom=0)
    ax.set_xlabel("learning rate")
    ax.set_ylabel("accuracy on held-out faces, %")
    _legend(figure, list(chosen), [_mark("o", "chosen"), *([_mark("x", missing(results))] if lost else [])])
    return figure


def convergence(results: Results) -> Figure | None:
    """[NCD] Figure 2: metrics over the iterations, mean and standard deviation over the seeds."""
    rows = {row: [run for run in results.of("main", row) if run.metrics] for row in NAMES}
    rows = {row: runs for row, runs in rows.items() if runs}
    if not rows:
        return None
    figure, axes = _figure(2, 3, 6.4, sharex=True)
    for ax, metric in zip(axes.flat, CURVES, strict=True):
        for row, runs in rows.items():
            _band(ax, runs, lambda run, metric=metric: run.metrics[metric], COLOURS[row])  # type: ignore[misc]
        if metric in LOGARITHMIC:
            ax.set_yscale("log")
        else:
            # Of the number of dimensions that all but DLP have.
            aim, tolerance = best(metric), 0.05 * ranges(num_classes(), dim("ce"))[metric]
            ax.axhline(tolerance if aim == 0 else aim - tolerance, color=MUTED, ls="--", lw=1.2)
            ax.set_ylim(bottom=0)
        ax.set_title(METRICS[metric], loc="left", fontsize=11, color=INK)
    for ax in axes[-1]:
        ax.set_xlabel("iteration")
    _legend(figure, list(rows), [Line2D([], [], color=MUTED, ls="--", lw=1.2, label="95 % of collapse")])
    return figure


def corruptions(results: Results) -> Figure | None:
    """Mean errors over the seeds by severity, one panel per corruption."""
    errors = {row: found for row in NAMES if (found := mean_errors(results, row))}
    if not errors:
        return None
    kinds = list(dict.fromkeys(kind for found in errors.values() for kind in found))
    figure, axes = _figure(-(-len(kinds) // 3), 3, 7.6, sharex=True, sharey=True)
    for ax, kind in zip(axes.flat, kinds, strict=False):
        for row, found in errors.items():
            values = [100 * error for error in found.get(kind, [])]
            ax.plot(range(1, len(values) + 1), values, color=COLOURS[row], lw=1.8)
        ax.set_title(kind.replace("_", " "), loc="left", fontsize=11, color=INK)
        ax.set_xticks(range(1, 6))
        ax.set_ylim(0, 100)
    for ax in axes.flat[len(kinds) :]:
        ax.set_visible(False)
    for ax in axes[-1]:
        ax.set_xlabel("severity")
    for ax in axes[:, 0]:
        ax.set_ylabel("error, %")
    _legend(figure, list(errors), [])
    return figure


def temperatures(results: Results) -> Figure | None:
    """[NCD] Figure 3: accuracy by temperature and batch size."""
    runs = results.of("grid")
    if not runs:
        return None
    rows = STAGES["grid"].rows or ()
    taus, sizes = (STAGES["grid"].values[key] for key in ("loss.temperature", "run.batch_size"))
    figure, (axes,) = _figure(1, len(rows), 3.2, sharey=True)
    low, high = min(map(accuracy, runs)), max(map(accuracy, runs))
    for ax, row in zip(axes, rows, strict=True):
        values = np.full((len(sizes), len(taus)), np.nan)
        for run in results.of("grid", row):
            values[sizes.index(run.point["run.batch_size"]), taus.index(run.point["loss.temperature"])] = accuracy(run)
        ax.imshow(np.ma.masked_invalid(values), cmap="viridis", vmin=low, vmax=high, origin="lower", aspect="auto")
        for (y, x), value in np.ndenumerate(values):
            dark = np.isnan(value) or value > low + 0.6 * (high - low)
            text = "none" if np.isnan(value) else f"{value:.1f}"
            ax.text(x, y, text, ha="center", va="center", color=INK if dark else "white", fontsize=11)
        ax.set_xticks(range(len(taus)), [f"{tau:g}" for tau in taus])
        ax.set_yticks(range(len(sizes)), [str(size) for size in sizes])
        ax.grid(False)
        ax.set_title(f"{name(row)}: unseen faces, %", loc="left", fontsize=11, color=INK)
        ax.set_xlabel("temperature")
    axes[0].set_ylabel("batch size")
    return figure


PICTURES: dict[str, Callable[[Results], Figure | None]] = {
    "rates": rates,
    "convergence": convergence,
    "temperatures": temperatures,
    "corruptions": corruptions,
}
"""Drawing functions by the last part of the file's name."""


def draw(results: Results, folder: Path) -> list[Path]:
    """Draw the pictures for which there are numbers; returns their paths."""
    written = []
    for key, picture in PICTURES.items():
        figure = picture(results)
        if figure is not None:
            written.append(path(folder, key))
            figure.savefig(written[-1], dpi=DPI, metadata={"Software": None})
    return written


def path(folder: Path, key: str) -> Path:
    return folder / f"results-{key}.png"


def _figure(rows: int, columns: int, height: float, **shared: Any) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(WIDTH, height), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **shared)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(GRID)
        ax.tick_params(colors=INK, labelsize=10)
        ax.grid(color=GRID, lw=0.8)
        ax.set_axisbelow(True)
    return figure, axes


def _band(ax: Axes, runs: Sequence[Run], values: Callable[[Run], list[float]], colour: str) -> None:
    """The mean of the runs with the same evaluations as the first, with a band of one standard deviation."""
    steps = runs[0].steps
    series = np.array([values(run) for run in runs if run.steps == steps])
    middle = series.mean(0)
    ax.plot(steps, middle, color=colour, lw=1.8, solid_capstyle="round")
    if len(series) > 1:
        width = series.std(0, ddof=1)
        ax.fill_between(steps, middle - width, middle + width, color=colour, alpha=0.2, lw=0)


def _logarithmic(ax: Axes, ticks: Sequence[float], labels: Sequence[str]) -> None:
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticklabels(labels)


def _mark(marker: str, label: str) -> Line2D:
    return Line2D([], [], color=MUTED, ls="", marker=marker, ms=8, mfc="none", mew=2, label=label)


def _legend(figure: Figure, rows: Sequence[str], others: Sequence[Line2D]) -> None:
    handles = [Line2D([], [], color=COLOURS[row], lw=2.5, label=name(row)) for row in rows] + list(others)
    figure.legend(handles=handles, loc="outside upper left", ncols=5, frameon=False, fontsize=10, labelcolor=INK,
                  columnspacing=1.2, handlelength=1.5)  # fmt: skip
