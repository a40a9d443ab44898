"""Quantities derived from the results: errors relative to CE's, and speeds of convergence."""

from __future__ import annotations

import math
from dataclasses import asdict
from functools import cache

from nckernels.metrics import ConvergenceTable, RunHistory, convergence_table, optimum
from nckernels.metrics.convergence import TABLE_7_METRICS
from nckernels.train import recipes
from nckernels.train.corruptions import mean_corruption_error

from .collect import Results, Run, mean
from .paired import Measure, final

NAMES = {
    "ce": "CE",
    "etf-dr": "ETF+DR",
    "normface": "NormFace",
    "ntce": "NTCE",
    "nonl": "NONL",
    "scl": "SCL",
    "dlp": "DLP",
}
"""Rows of the recipe, in the order of the tables."""
NORMALISED = ("normface", "ntce", "nonl")
METRICS = {
    "intra_erank": "intra erank",
    "inter_erank": "inter erank",
    "weights_erank": "weights erank",
    "weight_alignment": "weight align.",
    "instance_alignment": "instance align.",
    "mir": "MIR",
    "hdr": "HDR",
    "within_scatter": "within-class scatter",
    "nc2_cosines": "error of cosines",
    "cdnv": "CDNV",
}


@cache
def dim(row: str) -> int:
    return recipes.load(f"glyphs/{row}").model.dim


@cache
def num_classes() -> int:
    return int(recipes.load("glyphs/ce").data.options["num_classes"])


@cache
def best(metric: str) -> float:
    """A metric's value at neural collapse."""
    return float(asdict(optimum(num_classes()))[metric])


def distance(metric: str) -> Measure:
    """A metric's final distance from its value at neural collapse."""
    return lambda run: abs(final(metric)(run) - best(metric))


def mean_errors(results: Results, row: str) -> dict[str, list[float]]:
    """Mean errors over the seeds, by corruption, at each severity; empty if nothing was measured."""
    runs = [run for run in results.of("main", row) if run.corruptions]
    return {name: [mean(list(v)) for v in zip(*(r.corruptions[name] for r in runs), strict=True)]
            for name in (runs[0].corruptions if runs else {})}  # fmt: skip


def relative_error(results: Results) -> Measure:
    """mCE in per cent, with the mean errors of CE as the baseline; NaN without them."""
    baseline = mean_errors(results, "ce")

    def measure(run: Run) -> float:
        if not baseline or run.corruptions.keys() != baseline.keys():
            return math.nan
        return 100 * mean_corruption_error(run.corruptions, baseline)

    return measure


def speeds(results: Results) -> dict[int, ConvergenceTable]:
    """[NCD] Table 7 by seed, without smoothing: with one evaluation per epoch it would dominate the result."""
    tables = {}
    for seed in sorted({run.seed for run in results.of("main")}):
        runs = [
            RunHistory(run.row, run.row, num_classes(), dim(run.row), run.steps, run.metrics)
            for run in results.of("main")
            if run.seed == seed and run.row != "dlp" and run.steps and set(TABLE_7_METRICS) <= run.metrics.keys()
        ]
        if runs:
            tables[seed] = convergence_table(runs, smoothing=0.0)
    return tables


def collapse_times(tables: dict[int, ConvergenceTable], row: str, metric: str) -> dict[int, float]:
    """Part (I) of Table 7: share of the iterations until 95 % of collapse, by seed."""
    return {seed: t.collapse[row][metric] for seed, t in tables.items() if row in t.collapse}


def match_times(tables: dict[int, ConvergenceTable], row: str, metric: str) -> dict[int, float]:
    """Part (II): share of CE's iterations until the metric is as close to collapse as CE's final value, by seed."""
    return {seed: t.match[row][metric] for seed, t in tables.items() if row in t.match}


def first_evaluation(results: Results) -> float:
    """Share of CE's iterations at its first evaluation after the start; NaN without CE."""
    steps = next((run.steps for run in results.of("main", "ce") if run.steps), [])
    return next((step / steps[-1] for step in steps if step > 0), math.nan)
