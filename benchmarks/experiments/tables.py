"""The tables of the page, in Markdown; cells of runs that are missing say "not run"."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

from nckernels.metrics.convergence import TABLE_7, TABLE_7_METRICS

from . import published
from .collect import Results, deviation, mean, tuned
from .measured import (
    METRICS,
    NAMES,
    best,
    collapse_times,
    dim,
    match_times,
    mean_errors,
    relative_error,
    speeds,
)
from .paired import accuracy, by_seed, classifier, difference, final, train_accuracy, transfer
from .stages import STAGES
from .verdicts import NOT_RUN

OURS = ("within_scatter", "cdnv", "nc2_cosines")
"""Metrics beside those of [NCD] Table 3: the size of the scatter, and errors that grow linearly near the optimum."""


def table(head: Sequence[str], rows: Iterable[Sequence[str]], text: Sequence[int] = (0,)) -> str:
    """A table whose columns ``text`` are aligned left and all others, which hold numbers, right."""
    lines = [head, ["---" if i in text else "---:" for i in range(len(head))], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def name(row: str) -> str:
    """The row's name, with the number of dimensions if it differs from CE's."""
    return f"{NAMES[row]}, d = {dim(row)}" if dim(row) != dim("ce") else NAMES[row]


def spread(values: Mapping[int, float], digits: int | None = 1) -> str:
    """Mean and standard deviation over the seeds; ``digits`` after the point, or None for three significant ones."""
    if not values:
        return NOT_RUN
    found = list(values.values())
    middle, width = (".3g", ".2g") if digits is None else (f".{digits}f", f".{digits}f")
    if len(found) < 2:
        return f"{found[0]:{middle}} (one seed)"
    return f"{mean(found):{middle}} ± {deviation(found):{width}}"


def rates(results: Results) -> str:
    """The chosen learning rates, and whether the grid was wide enough."""
    chosen, rows = tuned(results), []
    for row in NAMES:
        runs = sorted((run for run in results.runs if (run.stage, run.row) == ("tune", row)), key=lambda run: run.lr)
        if row not in chosen:
            rows.append([name(row), NOT_RUN, "", ""])
            continue
        without = [f"{run.lr:g}" for run in runs if not run.finished]
        notes = [f"{missing(results)} at {', '.join(without)}"] if without else []
        if chosen[row] in (runs[0].lr, runs[-1].lr):
            notes.append("the best is at the edge of the grid")
        elif not next(run for run in runs if run.lr > chosen[row]).finished:
            notes.append("the next larger rate has no result")
        trained = {run.lr for run in results.of("main", row)} - {chosen[row]}
        notes += [f"later stages use {lr:g}" for lr in trained]
        found = max(accuracy(run) for run in runs if run.finished)
        rows.append([name(row), f"{chosen[row]:g}", f"{found:.1f}", "; ".join(notes)])
    return table(["", "learning rate", "held-out faces, %", ""], rows, (0, 3))


def missing(results: Results) -> str:
    """Why runs of the stage "tune" have no accuracy; later stages begin only when all of them have been tried."""
    return "diverged" if any(run.finished and run.stage != "tune" for run in results.runs) else "diverged or not run"


def accuracies(results: Results) -> str:
    """[NCD] Table 1, with DLP and SCL."""
    rows = []
    for row in NAMES:
        test, train = (by_seed(results, measure, "main", row) for measure in (accuracy, train_accuracy))
        gain = difference(test, by_seed(results, accuracy, "main", "ce"))
        beside = "" if row == "ce" or not gain.values else _signed(gain.mean, gain.deviation)
        printed = f"{published.TABLE_1[row]:.1f}" if row in published.TABLE_1 else ""
        rows.append(
            [f"{name(row)} with FP" if row == "scl" else name(row), spread(test), beside, spread(train), printed]
        )
    return table(["", "unseen faces, %", "minus CE, points", "training faces, %", "[NCD], CIFAR-100"], rows)


def contrastive(results: Results) -> str:
    """[NCD] Table 2."""
    titles = {"FP": "FP: class means", "LP": "LP: linear probe", "NLP": "NLP: normalised linear probe"}
    rows = []
    for key, title in titles.items():
        found = by_seed(results, classifier(key), "main", "scl")
        gain = difference(found, by_seed(results, classifier("LP"), "main", "scl"))
        beside = "" if key == "LP" or not gain.values else _signed(gain.mean, gain.deviation)
        rows.append([title, spread(found), beside, f"{published.TABLE_2[key]:.1f}"])
    return table(["SCL", "unseen faces, %", "minus LP, points", "[NCD], CIFAR-100"], rows)


def collapse(results: Results) -> str:
    """[NCD] Table 3, transposed, and three further metrics."""
    rows = []
    for i, metric in enumerate((*published.TABLE_3_METRICS, *OURS)):
        found = [by_seed(results, final(metric), "main", row) for row in NAMES]
        rows.append([METRICS[metric], f"{best(metric):.3g}", *(spread(values, None) for values in found)])
        if metric in published.TABLE_3_METRICS:
            printed = [f"{published.TABLE_3[row][i]:g}" if row in published.TABLE_3 else "" for row in NAMES]
            rows.append(["*[NCD]*", "", *printed])
    return table(["", "optimum", *map(name, NAMES)], rows)


def convergence(results: Results, part: int) -> str:
    """[NCD] Table 7, part 1 or 2."""
    times, of = speeds(results), (collapse_times, match_times)[part - 1]
    rows = []
    for row in NAMES:
        if row == "dlp":
            continue
        found = [of(times, row, metric) for metric in TABLE_7_METRICS]
        settled = ", settled" if part == 2 and row == "ce" else ""
        rows.append([f"**{name(row)}**{settled}", *map(_shares, found)])
        if row in TABLE_7:
            rows.append(["[NCD]", *(_share(value) for value in TABLE_7[row][part - 1])])
    title = "within 5 % of collapse after" if part == 1 else "as close as CE's final value after"
    return table([title, *(METRICS[metric] for metric in TABLE_7_METRICS)], rows)


def transfers(results: Results) -> str:
    """[NCD] Table 4."""
    rows = [
        [name(row), spread(by_seed(results, transfer, "half", row)), spread(by_seed(results, accuracy, "half", row)),
         f"{published.TABLE_4[row]:.1f}" if row in published.TABLE_4 else ""]
        for row in STAGES["half"].rows or NAMES
    ]  # fmt: skip
    return table(["", "other classes, %", "trained classes, %", "[NCD], mean of eight sets"], rows)


def corruptions(results: Results) -> str:
    """[NCD] Table 5, transposed."""
    errors = {row: mean_errors(results, row) for row in NAMES}
    measure = relative_error(results)
    clean = [by_seed(results, lambda run: 100 - accuracy(run), "main", row) for row in NAMES]
    relative = [by_seed(results, measure, "main", row) for row in NAMES]
    rows = [["clean, error, %", *map(spread, clean)], ["**mCE, %**", *map(spread, relative)]]
    rows.append(
        ["*[NCD] mCE*", *(f"{published.TABLE_5[row]:.1f}" if row in published.TABLE_5 else "" for row in NAMES)]
    )
    for kind in dict.fromkeys(kind for found in errors.values() for kind in found):
        means = [f"{100 * mean(errors[row][kind]):.1f}" if kind in errors[row] else NOT_RUN for row in NAMES]
        rows.append([f"{kind.replace('_', ' ')}, error, %", *means])
    return table(["", *map(name, NAMES)], rows)


def long_tails(results: Results) -> str:
    """[NCD] Table 6."""
    stage = STAGES["longtail"]
    shares = stage.values["data.imbalance"]
    rows = []
    for row in stage.rows or NAMES:
        found = [by_seed(results, accuracy, "longtail", row, data__imbalance=share) for share in shares]
        rows.append([f"**{name(row)}**", *map(spread, found)])
        rows.append(["[NCD]", *(f"{published.TABLE_6[row][share]:.1f}" for share in shares)])
    return table(["imbalance", *(f"{share:g}" for share in shares)], rows)


def ranks(results: Results) -> str:
    """One batch over several processes, seed by seed."""
    titles = {True: "negatives of the whole batch", False: "negatives of each process alone"}
    both = {key: by_seed(results, accuracy, "ranks", "nonl", loss__global_batch=key) for key in titles}
    seeds = sorted(both[True].keys() | both[False].keys())

    def cells(values: Mapping[int, float], show: Callable[[float], str]) -> list[str]:
        return [show(values[seed]) if seed in values else NOT_RUN for seed in seeds]

    rows = [[titles[key], *cells(values, "{:.1f}".format), spread(values)] for key, values in both.items()]
    gain = {seed: both[True][seed] - both[False][seed] for seed in both[True].keys() & both[False].keys()}
    found = difference(both[True], both[False])
    total = _signed(found.mean, found.deviation) if found.values else NOT_RUN
    rows.append(["difference, points", *cells(gain, "{:+.1f}".format), total])
    return table(["NONL, unseen faces, %", *(f"seed {seed}" for seed in seeds), "mean"], rows)


def _signed(value: float, spread: float) -> str:
    return f"{value:+.1f}" + ("" if math.isnan(spread) else f" ± {spread:.1f}")


def _shares(times: Mapping[int, float]) -> str:
    """The median over the seeds, and the smallest and largest value if they differ."""
    known = sorted(value for value in times.values() if not math.isnan(value))
    if not times:
        return NOT_RUN
    if not known:
        return ""
    middle = _share(statistics.median_high(known))
    low, high = _share(known[0]), _share(known[-1])
    return middle if low == high else f"{middle} ({low.removesuffix(' %')} to {high.removesuffix(' %')})"


def _share(value: float) -> str:
    return "never" if math.isinf(value) else f"{100 * value:.0f} %"
