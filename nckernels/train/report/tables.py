"""The papers' tables, filled with the runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict

import numpy as np

from nckernels.metrics import ConvergenceTable, RunHistory, convergence_table, optimum
from nckernels.metrics.convergence import TABLE_7, TABLE_7_METRICS

from .load import Record
from .markup import NONE, Raw, count, duration, folded, join, number, percent, safe, small, spread, table, tag
from .rows import DataSet, Row, Spread, key_text, rank, sortable, value_text

PUBLISHED = {
    "intra_erank": "Intra-class rank\N{NO-BREAK SPACE}↓",
    "inter_erank": "Inter-class rank\N{NO-BREAK SPACE}↑",
    "weights_erank": "Prototypes' rank\N{NO-BREAK SPACE}↑",
    "weight_alignment": "Prototype to mean²\N{NO-BREAK SPACE}↓",
    "instance_alignment": "Prototype to sample²\N{NO-BREAK SPACE}↓",
    "mir": "MIR\N{NO-BREAK SPACE}↑",
    "hdr": "HDR\N{NO-BREAK SPACE}↓",
}
"""The columns of [NCD] Table 3: metric and heading."""
DIRECT = {
    "nc1": "NC1\N{NO-BREAK SPACE}↓",
    "nc1_rank": "Rank in NC1\N{NO-BREAK SPACE}↑",
    "within_scatter": "Within-class scatter\N{NO-BREAK SPACE}↓",
    "scatter_ratio": "Scatter ratio\N{NO-BREAK SPACE}↓",
    "cdnv": "CDNV\N{NO-BREAK SPACE}↓",
    "nc2_norms": "NC2, norms\N{NO-BREAK SPACE}↓",
    "nc2_cosines": "NC2, cosines\N{NO-BREAK SPACE}↓",
    "nc2_cosines_max": "NC2, largest\N{NO-BREAK SPACE}↓",
    "nc3_rotated": "NC3, rotated\N{NO-BREAK SPACE}↓",
    "nc4": "NC4\N{NO-BREAK SPACE}↑",
    "offset": "Offset\N{NO-BREAK SPACE}↓",
    "mir_centred": "MIR, centred\N{NO-BREAK SPACE}↑",
    "hdr_centred": "HDR, centred\N{NO-BREAK SPACE}↓",
    "bias_spread": "Bias spread\N{NO-BREAK SPACE}↓",
}
OPTIMUM = {"signed": "Optimum", "relu": "Optimum, ReLU"}
DAGGER = "†"
MOST_LINES = 20
"""Largest number of lines in the results. Of more rows the best of each name are shown, and all can be unfolded."""


def name_of(row: Row) -> Raw:
    """The row's name, marked if none of its runs has finished."""
    return safe(row.name + _mark(row))


def overview(data_sets: Sequence[DataSet], heading: str, columns: Sequence[str]) -> Raw:
    """Test accuracies: one line per name, with its best row, and one column per data set."""
    cells = [data.bests for data in data_sets]
    finals = [{name: row.final("test_accuracy") for name, row in column.items()} for column in cells]
    tops = [_top(list(column.values())) for column in finals]
    order = {name: row for column in cells for name, row in column.items()}
    order = dict(sorted(order.items(), key=lambda pair: rank(pair[1].loss)))
    lines = []
    for name in order:
        line: list[object] = [name]
        for column, final, top in zip(cells, finals, tops, strict=True):
            if name not in column:
                line.append(NONE)
                continue
            mark = "" if column[name].finished else f" {DAGGER}"
            line.append(join([spread(final[name], percentage=True, best=final[name].mean == top), mark]))
        lines.append(line)
    return table([heading, *columns], lines, label=heading)


def results(data: DataSet) -> Raw:
    """Accuracies of the rows of a data set, with numbers of seeds and times."""
    tops = {name: _top([row.final(name) for row in data.rows]) for name in ("test_accuracy", "train_accuracy")}

    def accuracy(row: Row, name: str) -> Raw:
        value = row.final(name)
        return spread(value, percentage=True, best=value.mean == tops[name] and len(data.rows) > 1)

    def line(row: Row) -> list[object]:
        return [
            name_of(row),
            accuracy(row, "test_accuracy"),
            accuracy(row, "train_accuracy"),
            _seeds(row),
            spread(row.final("loss")),
            duration(Spread.of([run.facts["seconds"] for run in row.counted]).mean),
        ]

    head = ["Row", "Test, %", "Training, %", "Seeds", "Loss", "Time a run"]
    everything = table(head, map(line, data.rows), label=f"Results on {data.name}")
    if len(data.rows) <= MOST_LINES:
        return everything
    best = sorted(data.bests.values(), key=lambda row: -row.accuracy)[:MOST_LINES]
    first = table(head, map(line, best), label=f"The best rows on {data.name}")
    named = small("The best row of each name:")
    return join([named, first, sweep(data), folded(f"All {len(data.rows)} rows", everything)])


def sweep(data: DataSet) -> Raw:
    """Test accuracy by name and value of a setting, if the rows of a name differ in exactly one setting."""
    keys = {tuple(key for key, _ in row.differing) for row in data.rows}
    if len(keys) != 1 or len(next(iter(keys))) != 1:
        return Raw()
    values = sorted({row.differing[0][1] for row in data.rows}, key=sortable)
    lines: list[list[object]] = []
    for name, best in data.bests.items():
        rows = {row.differing[0][1]: row for row in data.rows if row.base == name}
        cells = (
            join([spread(row.final("test_accuracy"), percentage=True, best=row is best), _mark(row)])
            if (row := rows.get(value))
            else NONE
            for value in values
        )
        lines.append([name, *cells])
    key = key_text(next(iter(keys))[0])
    made = table([key, *map(value_text, values)], lines, label=f"Test accuracy by {key} on {data.name}")
    return join([small(f"Test accuracy, %, by {key}:"), made])


def _mark(row: Row) -> str:
    return "" if row.finished else f"\N{NO-BREAK SPACE}{DAGGER}"


def collapse(data: DataSet) -> Raw:
    """[NCD] Table 3 and the direct measurements, beside the optimum."""
    rows = [row for row in data.shown if any(run.metrics for run in row.counted)]
    if not rows:
        return Raw()
    further = _metrics(data, rows, DIRECT, "Direct measurements")
    return join([_metrics(data, rows, PUBLISHED, "Metrics of Table 3"), folded("Direct measurements", further)])


def _metrics(data: DataSet, rows: Sequence[Row], names: dict[str, str], label: str) -> Raw:
    best = {kind: asdict(optimum(data.num_classes, features=kind)) for kind in dict.fromkeys(r.features for r in rows)}
    known = [name for name in names if any(not math.isnan(row.final(name).mean) for row in rows)]
    nearest: dict[str, float] = {}
    for name in known:
        distances = [abs(row.final(name).mean - best[row.features][name]) for row in rows]
        nearest[name] = min((distance for distance in distances if not math.isnan(distance)), default=math.nan)

    def cell(row: Row, name: str) -> Raw:
        value = row.final(name)
        wins = len(rows) > 1 and abs(value.mean - best[row.features][name]) == nearest[name]
        return spread(value, best=wins)

    lines: list[list[object]] = [
        [tag("span", OPTIMUM[kind], class_="optimum"),
         *(tag("span", number(values[name]), class_="optimum") for name in known)]
        for kind, values in best.items()
    ]  # fmt: skip
    lines += [[name_of(row), *(cell(row, name) for name in known)] for row in rows]
    return table(["Row", *(names[name] for name in known)], lines, label=f"{label}, {data.name}")


def convergence(data: DataSet) -> Raw:
    """[NCD] Table 7 of the means over the seeds, separately for signed and for ReLU features."""
    parts = []
    for kind in ("signed", "relu"):
        rows = [row for row in data.shown if row.features == kind and row.finished]
        runs = {row.name: history for row in rows if (history := _history(row)) is not None}
        if not runs:
            continue
        ce = [row for row in rows if row.loss == "ce" and row.name in runs]
        baseline = runs[max(ce, key=lambda row: row.accuracy).name] if ce else None
        made = convergence_table(list(runs.values()), baseline=baseline, features=kind)
        published = data.rows[0].settings["data.name"] == "cifar100"
        parts.append(_convergence(made, data, ", ReLU features" if kind == "relu" else "", published))
    return join(parts)


def _history(row: Row) -> RunHistory | None:
    curves = {name: row.curve(name) for name in TABLE_7_METRICS}
    steps = [int(step) for step in curves[TABLE_7_METRICS[0]][0]]
    if not steps or steps[-1] < 1 or any(len(curve[0]) != len(steps) for curve in curves.values()):
        return None
    metrics = {name: mean.tolist() for name, (_, mean, _) in curves.items()}
    return RunHistory(row.name, row.loss, row.runs[0].num_classes, row.runs[0].dim, steps, metrics)


def _convergence(made: ConvergenceTable, data: DataSet, suffix: str, published: bool) -> Raw:
    headings = [PUBLISHED[name].rstrip("\N{NO-BREAK SPACE}↑↓") for name in made.metrics]
    parts = [(f"(I) Within {made.tolerance:.0%} of collapse after, % of iterations{suffix}", made.collapse, 0)]
    if made.baseline is not None:
        parts.append((f"(II) As close as the final {made.baseline} after, % of its iterations{suffix}", made.match, 1))
    tables = []
    for title, rows, part in parts:
        lines: list[list[object]] = []
        for name, row in rows.items():
            settled = part == 1 and name == made.baseline
            shown = [percent(row[metric], 1) for metric in made.metrics]
            lines.append([f"{name}, settled" if settled else name, *shown])
            if published and made.losses[name] in TABLE_7:
                values = dict(zip(TABLE_7_METRICS, TABLE_7[made.losses[name]][part], strict=True))
                cells = [tag("span", percent(values[metric], 1), class_="optimum") for metric in made.metrics]
                lines.append([tag("span", "[NCD], ResNet-18", class_="optimum"), *cells])
        tables += [small(title), table(["Row", *headings], lines, label=f"{title}, {data.name}")]
    return join(tables)


def classifiers(data: DataSet) -> Raw:
    """[NCD] Table 2: classifiers on the features, fitted at the end."""
    rows = [row for row in data.rows if any(run.classifiers for run in row.counted)]
    names = list(dict.fromkeys(name for row in rows for run in row.counted for name in run.classifiers))
    if not rows:
        return Raw()

    def cell(row: Row, name: str) -> Raw:
        found = [run.classifiers[name] for run in row.counted if name in run.classifiers]
        accuracy, seconds = Spread.of([a for a, _ in found]), Spread.of([s for _, s in found])
        best = accuracy.mean == max(_final(row, other) for other in names) and len(names) > 1
        return join([spread(accuracy, percentage=True, best=best), tag("small", f" in {duration(seconds.mean)}")])

    lines = [[name_of(row), *(cell(row, name) for name in names)] for row in rows]
    note = small("FP: class means. LP: linear probe. NLP: normalised linear probe. Small type: time of the fit.")
    return join([table(["Row", *(f"{name}, %" for name in names)], lines, label=f"Classifiers, {data.name}"), note])


def _final(row: Row, classifier: str) -> float:
    values = [run.classifiers[classifier][0] for run in row.counted if classifier in run.classifiers]
    mean = Spread.of(values).mean
    return -1.0 if math.isnan(mean) else mean


def phases(data: DataSet) -> list[Raw]:
    """[NCD] Fig. 3: test accuracy by temperature and batch size, one grid per loss with such runs."""
    grids: dict[str, dict[tuple[float, int], Row]] = {}
    for row in data.rows:
        key = (row.settings["loss.temperature"], row.settings["run.batch_size"])
        cells = grids.setdefault(row.base, {})
        if key not in cells or row.accuracy > cells[key].accuracy:
            cells[key] = row
    grids = {
        name: cells for name, cells in grids.items() if all(len(set(axis)) > 1 for axis in zip(*cells, strict=True))
    }
    values = [row.accuracy for cells in grids.values() for row in cells.values() if row.accuracy >= 0]
    if not values:
        return []
    low, high = float(np.quantile(values, 0.25)), max(values)
    return [_grid(name, cells, low, high, data) for name, cells in grids.items()]


def _grid(name: str, cells: dict[tuple[float, int], Row], low: float, high: float, data: DataSet) -> Raw:
    temperatures, batches = (sorted(set(axis)) for axis in zip(*cells, strict=True))
    top = max(row.accuracy for row in cells.values())

    def cell(row: Row | None) -> Raw:
        if row is None or row.accuracy < 0:
            return Raw("<td></td>")
        strength = 0.62 * max(0.0, row.accuracy - low) / (high - low) if high > low else 0.3
        text = percent(row.accuracy, 1) + ("" if row.finished else DAGGER)
        marked = {"class_": "best"} if row.accuracy == top else {}
        return tag("td", text, style=f"--strength: {strength:.2f}", **marked)

    head = tag("tr", tag("th", "τ \\ B"), *(tag("th", batch, scope="col") for batch in batches))
    body = [
        tag("tr", tag("th", f"{t:g}", scope="row"), *(cell(cells.get((t, batch))) for batch in batches))
        for t in temperatures
    ]
    grid = tag("table", tag("thead", head), tag("tbody", *body), class_="grid")
    label = f"{name} on {data.name}: test accuracy by temperature and batch size"
    box = tag("div", grid, class_="scroll", tabindex=0, role="region", aria_label=label)
    at = next(key for key, row in cells.items() if row.accuracy == top)
    best = f"best {percent(top)} % at τ = {at[0]:g}, B = {at[1]}"
    return tag("figure", tag("figcaption", f"{name}, {data.name}", tag("small", best)), box)


def _top(values: Sequence[Spread]) -> float:
    return max((value.mean for value in values if not math.isnan(value.mean)), default=math.nan)


def _seeds(row: Row) -> str:
    done = len(row.runs) - row.unfinished
    progress: Callable[[Record], str] = lambda run: f"{run.epochs[-1]:g} of {run.settings['schedule.epochs']} epochs"  # noqa: E731
    if not row.unfinished:
        return str(done)
    where = progress(row.runs[0]) if len(row.runs) == 1 else f"{row.unfinished} unfinished"
    return f"{done} + {where}" if done else f"{where} {DAGGER}"


def summary_counts(data_sets: Sequence[DataSet]) -> str:
    runs = [run for data in data_sets for run in data.records]
    rows = sum(len(data.rows) for data in data_sets)
    seeds = sorted({len(row.runs) for data in data_sets for row in data.rows})
    each = f"{seeds[0]} to {seeds[-1]} seeds" if len(seeds) > 1 else count(seeds[0], "seed")
    names = ", ".join(data.name for data in data_sets[:4]) + (", …" if len(data_sets) > 4 else "")
    return f"{count(len(runs), 'run')}: {count(rows, 'row')} on {names}, {each}{' each' if rows > 1 else ''}"
