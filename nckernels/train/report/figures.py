"""The sections with drawings: curves and cosines."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray

from nckernels.metrics import convergence_iteration, optimum, ranges

from . import charts
from .load import Record
from .markup import Raw, join, minus, number, small, tag
from .rows import MOST_ROWS, DataSet, Row
from .style import colour_names
from .tables import name_of

PANELS = (
    ("test_accuracy", "Test accuracy, %", False),
    ("train_accuracy", "Training accuracy, %", False),
    ("loss", "Loss", True),
    ("weights_erank", "Prototypes' effective rank", False),
    ("inter_erank", "Inter-class effective rank", False),
    ("intra_erank", "Intra-class effective rank", False),
    ("weight_alignment", "Prototype to class mean, distance²", False),
    ("instance_alignment", "Prototype to sample, distance²", False),
    ("nc1", "NC1: scatter within / between classes", True),
)
"""Curve, heading, logarithmic axis: [NCD] Fig. 2, the loss, the test accuracy and NC1."""
MOST_DATA_SETS = 8
MOST_MAPS = 32


def each(data_sets: Iterable[DataSet], make: Callable[[DataSet], Raw]) -> Raw:
    """The part of each data set that has one, under the data set's name if there are several."""
    made = [(data, content) for data in data_sets if (content := make(data))]
    named = len(made) > 1
    return join(join([tag("h3", data.name) if named else "", content]) for data, content in made)


def selected(data_sets: Sequence[DataSet]) -> str:
    parts = []
    if any(len(data.shown) < len(data.rows) for data in data_sets):
        parts.append(f"There are many rows: the best of each name are shown, at most {MOST_ROWS}.")
    if len(data_sets) > MOST_DATA_SETS:
        parts.append(f"Only the first {MOST_DATA_SETS} data sets are shown.")
    return " ".join(parts)


def curves(data_sets: Sequence[DataSet]) -> Raw:
    drawn = [data for data in data_sets[:MOST_DATA_SETS] if max(len(run.steps) for run in data.records) > 1]
    content = each(drawn, _panels)
    several = any(len(row.counted) > 1 for data in drawn for row in data.shown)
    band = " Bands: ± one standard deviation over the seeds." if several else ""
    return join([small(selected(drawn) + band), content]) if content else content


def _panels(data: DataSet) -> Raw:
    colours = colour_names(data.shown)
    figures = []
    marked = dashed = False
    for name, heading, logarithmic in PANELS:
        share = name in ("test_accuracy", "train_accuracy")
        lines, aims = [], set()
        for row, colour in zip(data.shown, colours, strict=True):
            steps, mean, deviation = row.curve(name)
            if np.isfinite(mean).any():
                factor = 100 if share else 1
                mark = _mark(row, name)
                lines.append(charts.Line(colour, steps, factor * mean, factor * deviation, mark))
                marked = marked or mark is not None
                aims.add(asdict(optimum(data.num_classes, features=row.features)).get(name, math.nan))
        if all(np.isfinite(line.mean).sum() < 2 for line in lines):  # also where there are none
            continue
        logarithmic = logarithmic and charts.spans_decades(lines)
        bottom = _bottom(lines) if share else None
        optima = sorted(aim for aim in aims if not math.isnan(aim))
        dashed = dashed or bool(optima)
        notes = [f"optimum {' or '.join(minus(f'{aim:.3g}') for aim in optima)}"] if optima else []
        if name == "loss" and len({row.loss for row in data.shown}) > 1:
            notes.append("different losses, not comparable")
        if logarithmic:
            notes.append("logarithmic")
        if bottom:
            notes.append("low values at the start are cut off")
        caption = tag("figcaption", heading, tag("small", ", ".join(notes)))
        drawing = charts.curves(
            lines, label=f"{heading}, {data.name}", optima=optima, logarithmic=logarithmic, bottom=bottom
        )
        figures.append(tag("figure", caption, drawing))
    entries = [
        tag("li", tag("span", style=f"background: var(--{colour})"), name_of(row))
        for row, colour in zip(data.shown, colours, strict=True)
    ]
    if dashed:
        entries.append(tag("li", tag("span", class_="dashed"), "optimum"))
    if marked:
        entries.append(tag("li", tag("span", class_="mark"), "within 5 % of collapse from here"))
    return join([tag("ul", *entries, class_="legend"), tag("div", *figures, class_="panels")])


def _bottom(lines: Sequence[charts.Line]) -> float:
    """Lower end of an axis of percentages: below the final values of all curves."""
    last = min(float(line.mean[np.isfinite(line.mean)][-1]) for line in lines)
    return max(0.0, 100 - 5 * (100.5 - last))


def _mark(row: Row, name: str) -> float | None:
    record = row.runs[0]
    size = ranges(record.num_classes, record.dim).get(name)
    if size is None:
        return None
    steps, mean, _ = row.curve(name)
    aim = asdict(optimum(record.num_classes, features=row.features))[name]
    return convergence_iteration(steps.tolist(), mean.tolist(), aim, 0.05 * size)


def cosines(data_sets: Sequence[DataSet]) -> Raw:
    rows = [(data, row) for data in data_sets[:MOST_DATA_SETS] for row in data.shown]
    wanted = [(data, row, kind, matrix) for data, row in rows for kind, matrix in _matrices(row.counted[0])]
    if not wanted:
        return Raw()
    figures = []
    shown = wanted[:MOST_MAPS]
    extremes = [np.nanmax(np.abs(charts.off_diagonal(matrix)), initial=0) for *_, matrix in shown]
    limit = min(1.0, max(0.05, math.ceil(20 * max(map(float, extremes))) / 20))
    for data, row, kind, matrix in shown:
        where = f", {data.name}" if len(data_sets) > 1 else ""
        caption = tag("figcaption", f"{row.name}: {kind}{where}", tag("small", charts.span(matrix)))
        label = f"Cosines of the {kind} of {row.name} on {data.name}"
        figures.append(tag("figure", caption, charts.heat_map(matrix, limit, row.runs[0].class_names, label=label)))
    simplexes = dict.fromkeys(f"{number(-1 / (data.num_classes - 1))} for {data.num_classes}" for data in data_sets)
    note = small(
        f"Below each name: the range between different classes. A simplex has {', '.join(simplexes)} classes. "
        "If there are several seeds, the first is shown. ",
        selected(data_sets),
        f" Only the first {len(shown)} of {len(wanted)} maps are shown." if len(shown) < len(wanted) else "",
    )
    less, more = (" or less", " or more") if limit < 1 else ("", "")
    scale = tag("div", minus(f"-{limit:g}{less}"), tag("span"), f"{limit:g}{more}", class_="scale")
    return join([note, scale, tag("div", *figures, class_="panels maps")])


def _matrices(run: Record) -> list[tuple[str, NDArray[np.float32]]]:
    """Matrices of prototypes and of class means; only one if they are the same, as after a contrastive loss."""
    prototypes, means = run.prototype_cosines, run.mean_cosines
    if prototypes is not None and means is not None and np.allclose(prototypes, means, atol=1e-4):
        return [("prototypes = class means", prototypes)]
    return [(kind, m) for kind, m in (("prototypes", prototypes), ("class means", means)) if m is not None]
