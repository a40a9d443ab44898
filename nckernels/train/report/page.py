"""The page and its sections; sections without content are left out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from . import tables
from .figures import MOST_DATA_SETS, cosines, curves, each, selected
from .load import Record, common
from .markup import NONE, Raw, count, duration, folded, join, percent, small, table, tag
from .rows import LABELS, DataSet, Row, group, sortable, value_text
from .style import style_sheet

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def make_page(
    records: Sequence[Record], *, title: str | None = None, problems: Sequence[str] = (), waiting: Sequence[Path] = ()
) -> str:
    """The HTML page of the runs, with a list of the files that could not be read."""
    data_sets = group(records)
    title = title or common([record.settings["title"] for record in records]) or "Training runs"
    sections = [
        ("results", "Results", _results(data_sets)),
        ("long-tail", "Long tail", _long_tail(data_sets)),
        ("collapse", "Neural collapse at the end", _collapse(data_sets)),
        ("convergence", "Convergence", _convergence(data_sets)),
        ("classifiers", "Classifiers on the features", each(data_sets, tables.classifiers)),
        ("curves", "Curves", curves(data_sets)),
        ("cosines", "Cosines between classes", cosines(data_sets)),
        ("phases", "Temperature and batch size", _phases(data_sets)),
        ("settings", "Settings", _settings(records)),
        ("runs", "Runs", _runs(data_sets)),
    ]
    sections = [section for section in sections if section[2]]
    links = tag("nav", *(tag("a", heading, href=f"#{name}") for name, heading, _ in sections), aria_label="Sections")
    body = [
        tag("header", tag("h1", title), _summary(data_sets), _missing(problems, waiting), links),
        *(tag("section", tag("h2", heading), content, id=name) for name, heading, content in sections),
    ]
    head = [
        Raw('<meta charset="utf-8">'),
        Raw('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Raw(f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'),
        tag("title", title),
        tag("style", Raw(style_sheet())),
    ]
    html = tag("html", tag("head", *head), "\n", tag("body", tag("main", join(body, "\n"))), lang="en")
    return f"<!DOCTYPE html>\n{html}\n"


def _summary(data_sets: Sequence[DataSet]) -> Raw:
    """How many runs there are, which row is best by how much, and the spread over the seeds."""
    sentences = [f"{tables.summary_counts(data_sets)}."]
    if len(data_sets) > 1:
        bests = [f"{data.best.name} with {_accuracy(data.best)} on {data.name}" for data in data_sets[:4]]
        sentences.append(f"Best rows: {', '.join(bests)}{', …' if len(data_sets) > 4 else ''}.")
    elif data_sets[0].best.accuracy >= 0:
        best = data_sets[0].best
        others = [row for row in data_sets[0].rows if row is not best and row.finished == best.finished]
        second = max(others, key=lambda row: row.accuracy, default=None)
        ahead = ""
        if second is not None and second.accuracy >= 0:
            points = 100 * (best.accuracy - second.accuracy)
            ahead = f", {points:.2f} points ahead of {second.name}" if points > 0 else f", and so is {second.name}"
        sentences.append(
            f"The best test accuracy{'' if best.finished else ' so far'} is {_accuracy(best)} with {best.name}{ahead}."
        )
    deviations = [row.final("test_accuracy").deviation for data in data_sets for row in data.rows]
    deviations = [deviation for deviation in deviations if not math.isnan(deviation)]
    if deviations:
        low, high = percent(min(deviations)), percent(max(deviations))
        span = low if low == high else f"{low} to {high}"
        sentences.append(f"The standard deviation over the seeds is {span} points.")
    unfinished = sum(not run.finished for data in data_sets for run in data.records)
    if unfinished:
        sentences.append(f"{count(unfinished, 'run is', 'runs are')} unfinished.")
    return tag("p", " ".join(sentences), class_="lead")


def _accuracy(row: Row) -> str:
    final = row.final("test_accuracy")
    deviation = "" if math.isnan(final.deviation) else f" ± {percent(final.deviation)}"
    return f"{percent(final.mean)}{deviation} %".replace(" ", "\N{NO-BREAK SPACE}")


def _missing(problems: Sequence[str], waiting: Sequence[Path]) -> Raw:
    parts = []
    if problems:
        lines = tag("ul", *(tag("li", tag("code", problem)) for problem in problems))
        parts.append(
            tag("div", tag("strong", "These files could not be read and are not shown:"), lines, class_="problem")
        )
    if waiting:
        folders = join((tag("code", folder) for folder in waiting), ", ")
        parts.append(small("Started, but not evaluated yet: ", folders, "."))
    return join(parts)


def _families(data_sets: Sequence[DataSet]) -> list[list[DataSet]]:
    """Data sets that differ only in their imbalance, together."""
    ordered = sorted(data_sets, key=lambda data: data.family)
    return [sorted(members, key=lambda data: -data.imbalance) for _, members in
            ((key, list(group)) for key, group in groupby(ordered, key=lambda data: data.family))]  # fmt: skip


def _results(data_sets: Sequence[DataSet]) -> Raw:
    tailed = {data.name for family in _families(data_sets) if len(family) > 1 for data in family}
    plain = [data for data in data_sets if data.name not in tailed]
    parts: list[Raw | str] = []
    if len(plain) > 1:
        parts.append(tables.overview(plain, "Test accuracy, %", [data.name for data in plain]))
        if any(len(data.rows) > len({row.base for row in data.rows}) for data in plain):
            parts.append(small("If several rows have the same name, the best is shown."))
    for data in data_sets:
        heading = f"{data.name}, {data.num_classes} classes"
        if data.name in tailed or len(plain) > 4:
            parts.append(folded(heading, tables.results(data)))
        else:
            parts += [tag("h3", heading) if len(data_sets) > 1 else "", tables.results(data)]
    losses = {row.loss for data in data_sets for row in data.rows}
    notes = ["Mean ± sample standard deviation over the seeds, after the last step."]
    if "bce" in losses:
        notes.append("The accuracy of BCE is the mean average precision.")
    if any(record.settings["data.validation"] for data in data_sets for record in data.records):
        notes.append("Held out (data.validation): the test set is a part of the training set, not used for training.")
    if any(row.unfinished for data in data_sets for row in data.rows):
        notes.append("Unfinished runs are left out of rows with finished ones.")
    if any(not row.finished for data in data_sets for row in data.rows):
        notes.append(f"{tables.DAGGER} no run has finished; the values are those of the latest evaluation.")
    return join([*parts, small(" ".join(notes))])


def _long_tail(data_sets: Sequence[DataSet]) -> Raw:
    parts = []
    for family in _families(data_sets):
        if len(family) > 1:
            name = family[0].rows[0].settings["data.name"]
            parts.append(small(f"{LABELS.get(name, name)}: test accuracy, %, by smallest / largest class"))
            parts.append(tables.overview(family, "Imbalance", [f"{data.imbalance:g}" for data in family]))
    return join(parts)


def _collapse(data_sets: Sequence[DataSet]) -> Raw:
    content = each(data_sets[:MOST_DATA_SETS], tables.collapse)
    rows = [row for data in data_sets for row in data.shown]
    relu = " ReLU: the optimum of features without negative entries." if any(r.features == "relu" for r in rows) else ""
    note = small(
        f"Measured on the training set. Bold: closest to the optimum.{relu} The intra-class rank counts directions of "
        f"scatter and ignores its size; NC1 and CDNV, under direct measurements, measure it. {selected(data_sets)}"
    )
    return join([content, note]) if content else content


def _convergence(data_sets: Sequence[DataSet]) -> Raw:
    content = each(data_sets[:MOST_DATA_SETS], tables.convergence)
    note = small(
        "The iterations after which the smoothed metric, averaged over the seeds, is as close to its optimum as the "
        f"heading says, and stays so. {NONE}: undefined; never: not so at the end."
    )
    return join([note, content]) if content else content


def _phases(data_sets: Sequence[DataSet]) -> Raw:
    grids = [grid for data in data_sets for grid in tables.phases(data)]
    note = small(
        "Test accuracy in %; the best value of a grid is framed. Colours range from the lower quartile of the data "
        "set's cells to the best. If rows differ in more than temperature τ and batch size B, the best is shown."
    )
    return join([note, tag("div", *grids, class_="panels grids")]) if grids else Raw()


def _settings(records: Sequence[Record]) -> Raw:
    keys = list(dict.fromkeys(key for record in records for key in record.settings if key not in ("name", "title")))
    same, differing = [], []
    for key in keys:
        values = [record.settings.get(key, NONE) for record in records]
        times = Counter(map(value_text, sorted(values, key=sortable)))
        if len(times) == 1:
            same.append([tag("code", key), next(iter(times))])
        else:
            listed = [f"{value} ({number})" for value, number in times.items()]
            differing.append([tag("code", key), " · ".join(listed[:12]) + (" · …" if len(listed) > 12 else "")])
    parts = []
    if differing:
        made = table(["Key", "Values (runs)"], differing, label="Settings that differ", kind="text")
        parts += [tag("h3", "Settings that differ"), made]
    common_table = table(["Key", "Value"], same, label="Settings that all runs have in common", kind="text")
    parts.append(folded(f"{len(same)} settings that all runs have in common", common_table))
    versions = dict.fromkeys(tuple(record.versions.items()) for record in records)
    for version in versions:
        parts.append(small("Versions: ", ", ".join(f"{name} {value}" for name, value in version), "."))
    notes = dict.fromkeys(record.note for record in records if record.note)
    parts += [small("Note: ", note) for note in list(notes)[:20]]
    return join(parts)


def _runs(data_sets: Sequence[DataSet]) -> Raw:
    lines = [
        [
            tag("code", run.path.parent.name or run.path.name),
            row.name if len(data_sets) == 1 else f"{row.name}, {data.name}",
            value_text(run.settings["run.seed"]),
            percent(float(run.curves["test_accuracy"][-1])),
            f"{run.steps[-1]:g}",
            duration(run.facts["seconds"]),
            "yes" if run.finished else "no",
            *(
                f"{run.facts[name]:,.0f}" if not math.isnan(run.facts[name]) else NONE
                for name in ("parameters", "train_samples")
            ),
        ]
        for data in data_sets
        for row in data.rows
        for run in row.runs
    ]
    head = ["Folder", "Row", "Seed", "Test, %", "Steps", "Time", "Finished", "Parameters", "Training samples"]
    return folded(count(len(lines), "run"), table(head, lines, label="Runs"))
