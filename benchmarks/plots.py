"""A report as pictures: time and memory against M, K and N on log axes, and bars of the share of the floor.

Imports matplotlib on first use. The colours are those of Okabe and Ito, which people with any colour vision can
distinguish; markers and dashes encode the same.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .harness import READY, YARDSTICKS, Measured, Result
from .problems import Problem
from .report import Report

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D1F")
_MARKERS = "osD^vPX*"
_SKIPPED = {READY}
_MIN_POINTS = 3
_MOST_BARS = 10
"""Most problems in one bar chart."""


def draw(report: Report, folder: Path, stem: str) -> list[Path]:
    """All pictures that the report has the data for."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    style = _styles(report)
    pictures: list[tuple[str, Any]] = []
    for axis, fixed, points in _sweeps(report):
        pictures.append((f"{axis}-{_slug(fixed)}", _curves(plt, report, axis, fixed, points, style)))
    if report.ceilings is not None and any(m.work is not None for m in report.measured):
        for loss in dict.fromkeys(m.problem.loss for m in report.measured if m.work is not None):
            pictures.append((f"floor-{loss}", _bars(plt, report, loss, style)))
    paths = []
    for name, figure in pictures:
        path = folder / f"{stem}-{name}.png"
        figure.savefig(path, dpi=130)
        plt.close(figure)
        paths.append(path)
    return paths


def _styles(report: Report) -> dict[str, dict[str, Any]]:
    """Every variant keeps its colour in all pictures; ours are drawn thicker."""
    names = list(dict.fromkeys(r.variant for m in report.measured for r in m.results if r.seconds is not None))
    names = sorted((n for n in names if n not in _SKIPPED), key=lambda n: not n.startswith("nckernels"))
    styles: dict[str, dict[str, Any]] = {}
    for i, name in enumerate(names):
        ours = name.startswith("nckernels")
        styles[name] = {
            "color": _COLOURS[i % len(_COLOURS)],
            "marker": _MARKERS[i % len(_MARKERS)],
            "linestyle": "-" if ours else "--",
            "linewidth": 2.2 if ours else 1.3,
            "markersize": 5.5,
        }
    return styles


def _sweeps(report: Report) -> list[tuple[str, str, list[Measured]]]:
    """Problems that differ in one size only, three or more of them: its letter, what is fixed, and the problems."""
    keys: dict[str, Callable[[Problem], str | None]] = {
        "M": lambda p: None if _square(p) else f"{p.loss}, K = {p.k}, d = {p.d}",
        "K": lambda p: None if _square(p) else f"{p.loss}, M = {p.m}, d = {p.d}",
        "N": lambda p: f"{p.loss}, d = {p.d}" if _square(p) else None,
    }
    sweeps = []
    for axis, key in keys.items():
        groups: dict[str, list[Measured]] = {}
        for measured in report.measured:
            if (fixed := key(measured.problem)) is not None:
                groups.setdefault(fixed, []).append(measured)
        for fixed, group in groups.items():
            points = sorted(group, key=lambda m: _size(m.problem, axis))
            if len({_size(m.problem, axis) for m in points}) >= _MIN_POINTS:
                sweeps.append((axis, fixed, points))
    return sweeps


def _square(problem: Problem) -> bool:
    return problem.loss in ("supcon", "simclr", "clip", "SupCon step")


def _size(problem: Problem, axis: str) -> int:
    return problem.k if axis == "K" else problem.m


def _curves(
    plt: Any, report: Report, axis: str, fixed: str, points: list[Measured], style: dict[str, dict[str, Any]]
) -> Any:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for name, look in style.items():
        found = [(_size(m.problem, axis), r) for m in points for r in m.results if r.variant == name and r.seconds]
        if not found:
            continue
        sizes = [size for size, _ in found]
        times = [r.seconds for _, r in found if r.seconds is not None]
        left.plot(sizes, [1e3 * t.median for t in times], label=name, **look)
        left.fill_between(
            sizes, [1e3 * t.low for t in times], [1e3 * t.high for t in times], color=look["color"], alpha=0.15, lw=0
        )
        memory = [(size, r.extra_bytes / 2**20) for size, r in found if r.extra_bytes]
        if memory:
            right.plot(*zip(*memory, strict=True), **look)
    floor = [(_size(m.problem, axis), 1e3 * f) for m in points if (f := _floor(report, m)) is not None]
    if floor:
        left.plot(*zip(*floor, strict=True), color="0.5", linewidth=1, linestyle=":", label="floor")
    for axes, title in ((left, "forward + backward, ms"), (right, "memory beyond inputs, MiB")):
        axes.set(xscale="log", yscale="log", xlabel=axis, title=title)
        sizes = sorted({_size(m.problem, axis) for m in points})
        axes.set_xticks(sizes, [f"{s:,}" for s in sizes], rotation=30 if len(sizes) > 5 else 0)
        axes.minorticks_off()
        axes.grid(True, which="major", color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{fixed}   ({_where(report)})", fontsize=11)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def _bars(plt: Any, report: Report, loss: str, style: dict[str, dict[str, Any]]) -> Any:
    """The share of the floor that each variant reaches, for the largest problems of a loss."""
    assert report.ceilings is not None
    rows: list[tuple[str, Result | None, float]] = []
    found = [m for m in report.measured if m.problem.loss == loss]
    for measured in sorted(found, key=lambda m: -m.problem.weight)[:_MOST_BARS]:
        shares = [(r, measured.share(r, report.ceilings)) for r in measured.results]
        known = [(r, s) for r, s in shares if s is not None and r.variant not in YARDSTICKS]
        if known:
            rows.append((str(measured.problem), None, 0.0))
            rows += [("", r, 100 * s) for r, s in known]
    figure, axes = plt.subplots(figsize=(8.5, max(2.5, 0.5 + 0.19 * len(rows))), layout="constrained")
    for y, (label, result, share) in enumerate(rows):
        if result is None:
            axes.text(0, y, label, va="center", ha="left", fontsize=8, weight="bold")
            continue
        look = style[result.variant]
        axes.barh(y, share, color=look["color"], height=0.8, alpha=1.0 if result.ours else 0.6)
        axes.text(share + 0.7, y, f"{share:.1f}", va="center", fontsize=7)
    axes.set_yticks(
        [y for y, row in enumerate(rows) if row[1] is not None],
        [row[1].variant for row in rows if row[1] is not None],
        fontsize=7,
    )
    axes.set_ylim(len(rows) - 0.4, -1)
    axes.set_xlim(0, max(100.0, 1.08 * max((share for *_, share in rows), default=0.0)))
    axes.set_xlabel("share of the floor, %: work counted once, at this run's ceilings")
    axes.axvline(100, color="0.4", linewidth=0.8, linestyle=":")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(_where(report), fontsize=9)
    return figure


def _floor(report: Report, measured: Measured) -> float | None:
    c = report.ceilings
    return None if c is None or measured.work is None else measured.work.floor(c.gemm, c.copy, c.exp)


def _where(report: Report) -> str:
    return f"{report.machine['device']}, {report.machine['threads']} threads, {report.dtype}, {report.date[:10]}"


def _slug(text: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in text).split())
