"""Curves and heat maps, drawn by matplotlib as SVG with the page's font and colours."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .load import Array
from .markup import NONE, Raw, minus, number, superscript, tag
from .style import COLD, COLOURS, WARM, themed

try:
    from matplotlib import rc_context
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.colors import LinearSegmentedColormap, to_rgb
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
except ImportError as error:
    raise ImportError('the report needs matplotlib: pip install "nckernels[train]"') from error

INK, MUTED, LINE, PAPER = (COLOURS[name][0] for name in ("ink", "muted", "line", "paper"))
POINTS = 240
"""Largest number of points that are drawn of a curve, about one per pixel."""
DIVERGING = LinearSegmentedColormap.from_list(
    "diverging",
    [
        (0.0, (*to_rgb(COLD), 1.0)),
        (0.5, (*to_rgb(COLD), 0.0)),
        (0.5, (*to_rgb(WARM), 0.0)),
        (1.0, (*to_rgb(WARM), 1.0)),
    ],
)
"""Transparent at 0, so that it suits light and dark pages."""


@dataclass(frozen=True)
class Line:
    """A curve, its deviation over the seeds, and the step at which it converges, if any."""

    colour: str
    steps: Array
    mean: Array
    deviation: Array
    mark: float | None = None


def curves(
    lines: Sequence[Line],
    *,
    label: str,
    optima: Sequence[float] = (),
    logarithmic: bool = False,
    bottom: float | None = None,
) -> Raw:
    """A panel of curves against iterations.

    Args:
        lines: what to draw; NaN is a gap.
        label: text for screen readers.
        optima: values to mark with dashed lines.
        logarithmic: whether to use a logarithmic axis, which shows positive values only; see :func:`spans_decades`.
        bottom: for percentages: lower values are cut off, so that the final values can be distinguished.
    """
    figure = Figure(figsize=(3.5, 2.1))
    ax = figure.add_axes((0.125, 0.165, 0.845, 0.8))
    for line in lines:
        _draw(ax, line, logarithmic)
    for optimum in optima:
        if optimum > 0 or not logarithmic:
            ax.axhline(optimum, color=MUTED, ls=(0, (4, 3)), lw=1.1, zorder=1)
    if logarithmic:
        ax.set_yscale("log")
        low, high = ax.get_ylim()
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 100 * low else (1.0,), numticks=6))
        ax.yaxis.set_minor_formatter(NullFormatter())
    else:
        ax.yaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 2.5, 5, 10)))
    if bottom is not None:
        margin = 0.04 * (100 - bottom)
        ax.set_ylim(bottom - margin, min(ax.get_ylim()[1], 100 + margin))
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=(1, 2, 5, 10)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda step, _: _thousands(step)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    ax.margins(x=0.02)
    ax.grid(color=LINE, lw=0.7)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(MUTED)
    ax.tick_params(colors=INK, labelsize=8.5, color=MUTED, length=3, pad=2.5)
    ax.tick_params(which="minor", length=0)
    ax.set_xlabel("iterations", fontsize=8.5, color=INK, labelpad=1.5)
    return _svg(figure, label)


def spans_decades(lines: Sequence[Line]) -> bool:
    """Whether a logarithmic axis helps: at least one decade, and nothing negative."""
    values = np.concatenate([line.mean for line in lines])
    values = values[np.isfinite(values) & (values != 0)]
    return bool(len(values) and values.min() > 0 and values.max() > 10 * values.min())


def heat_map(matrix: NDArray[np.float32], limit: float, names: Sequence[str], *, label: str) -> Raw:
    """Cosines between classes, from -limit to limit. Classes are named if there are at most 20."""
    k = len(matrix)
    few = len(names) == k and k <= 20
    short = [name if len(name) <= 11 else f"{name[:10]}…" for name in names] if few else []
    margin = 0.05 + 0.024 * max(map(len, short), default=3)
    figure = Figure(figsize=(3.0, 3.0))
    ax = figure.add_axes((margin, margin, 0.99 - margin, 0.99 - margin))
    ax.imshow(matrix, cmap=DIVERGING, vmin=-limit, vmax=limit, interpolation="none", aspect="equal")
    if few:
        ax.set_xticks(range(k), short, rotation=90 if max(map(len, short)) > 2 else 0, parse_math=False)
        ax.set_yticks(range(k), short, parse_math=False)
    else:
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(5, integer=True, prune="upper"))
    ax.tick_params(length=0, labelsize=8.5 if k <= 14 else 7, colors=INK, pad=2)
    ax.spines[:].set_color(LINE)
    return _svg(figure, label)


def _draw(ax: Axes, line: Line, logarithmic: bool) -> None:
    keep = np.unique(np.linspace(0, len(line.steps) - 1, min(POINTS, len(line.steps))).astype(int))
    gaps = np.flatnonzero(~np.isfinite(line.mean))
    keep = np.union1d(keep, gaps[:POINTS])  # a gap stays a gap
    steps, mean, deviation = line.steps[keep], line.mean[keep], line.deviation[keep]
    if logarithmic:
        mean = np.where(mean > 0, mean, np.nan)
    colour = COLOURS[line.colour][0]
    isolated = np.isfinite(mean).sum() == 1
    ax.plot(steps, mean, color=colour, lw=1.6, marker="o" if isolated else "", ms=4, solid_capstyle="round", zorder=3)
    if (deviation > 0).any():
        low, high = mean - deviation, mean + deviation
        if logarithmic:
            low = np.where(low > 0, low, mean)
        ax.fill_between(steps, low, high, color=colour, alpha=0.2, lw=0, zorder=2)
    if line.mark is not None:
        value = line.mean[np.searchsorted(line.steps, line.mark)]
        ax.plot([line.mark], [value], "o", ms=6, mfc=PAPER, mec=colour, mew=1.6, zorder=5, clip_on=False)


def _thousands(step: float) -> str:
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if abs(step) >= size:
            return f"{step / size:g}{unit}"
    return f"{step:g}"


def _tick(value: float) -> str:
    exponent = np.log10(abs(value)) if value else 0.0
    if not -3 <= exponent < 5:
        rounded = int(np.floor(exponent + 1e-9))
        mantissa = value / 10.0**rounded
        factor = "" if np.isclose(mantissa, 1) else f"{mantissa:.3g}·"
        return minus(f"{factor}10{superscript(rounded)}")
    return minus(f"{value:.6g}")


def _svg(figure: Figure, label: str) -> Raw:
    """The figure as a scalable element with the page's colours and font, without the metadata of files."""
    FigureCanvasSVG(figure)
    buffer = io.StringIO()
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": label,
        "font.family": "sans-serif",
        "path.simplify": True,
    }
    with rc_context(settings), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # class names in scripts that matplotlib's own font lacks
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    box = re.search(r'viewBox="[^"]*"', text)
    body = text[text.index(">") + 1 : text.rindex("</svg>")]
    body = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>|<!--.*?-->", "", body, flags=re.S)
    body = re.sub(r' id="(?:figure|axes|patch|matplotlib|xtick|ytick|text|line2d|FillBetween|PolyC)[^"]*"', "", body)
    body = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", body)
    body = re.sub(r' style="[^"]*"', lambda part: themed(part[0]), body)
    body = re.sub(r' (?:d|x|y)="[^"]*"', lambda part: re.sub(r"(\.\d\d)\d+", r"\1", part[0]), body)
    body = re.sub(r"\s*\n\s*", "\n", body)
    title = tag("title", label)
    return Raw(f'<svg {box[0] if box else ""} role="img">{title}{body}</svg>')


def off_diagonal(matrix: NDArray[np.float32]) -> NDArray[np.float32]:
    """The entries off the diagonal: cosines between different classes."""
    return matrix[~np.eye(len(matrix), dtype=bool)]


def span(matrix: NDArray[np.float32]) -> str:
    """ "−0.12 to −0.09", the range of the cosines between different classes."""
    off = off_diagonal(matrix)
    off = off[np.isfinite(off)]
    return f"{number(float(off.min()))} to {number(float(off.max()))}" if len(off) else NONE
