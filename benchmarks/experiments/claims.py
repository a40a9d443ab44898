"""The claims of [NCD], each as comparisons that the measured numbers decide."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from nckernels.metrics import ConvergenceTable
from nckernels.metrics.convergence import TABLE_7_METRICS

from .collect import Results, mean
from .measured import (
    METRICS,
    NAMES,
    NORMALISED,
    collapse_times,
    distance,
    first_evaluation,
    match_times,
    relative_error,
    speeds,
)
from .paired import Difference, Measure, accuracy, by_seed, classifier, difference, order, transfer
from .stages import STAGES
from .verdicts import HELD, NOT_RUN, REVERSED, UNDECIDED, Claim, Part

MARGIN = 1.0
"""Fixed prototypes that are worse than a linear probe by fewer points than this still match it."""
RANKS = ("weights_erank", "intra_erank", "inter_erank")
AT_ONCE = 0.075
"""[NCD] Table 7 (II): the share of CE's iterations after which NONL has CE's final value, in four of five metrics."""
Tables = dict[int, ConvergenceTable]


def claims(results: Results) -> list[Claim]:
    """All claims, in the order of the table."""
    times = speeds(results)
    of_ce = "Shares of CE's iterations, medians over the seeds"
    of_all = "% of the iterations for NONL : for the rival, medians over the seeds"
    return [
        Claim("EB1", "NormFace, NTCE and NONL reach CE's final value of every metric before CE's training ends",
              tuple(_matched(times, row, metric) for row in NORMALISED for metric in TABLE_7_METRICS),
              of_ce, counted=True),
        Claim("EB2", "NONL reaches 95 % of collapse, and CE's final values, before NormFace and NTCE",
              tuple(_earlier(times, rival, metric, part) for part in (1, 2) for rival in ("normface", "ntce")
                    for metric in TABLE_7_METRICS), of_all, counted=True),
        Claim("EB3", "NTCE is better than NormFace: accuracy, and distance from collapse at the end",
              (_compare(results, accuracy, "ntce", "normface", what="accuracy (points)"),
               *(_closer(results, "ntce", "normface", metric) for metric in TABLE_7_METRICS)), "Differences"),
        Claim("EB4, Table 2", f"Class means of SCL classify as well as a linear probe, within {MARGIN:g} point",
              (_no_worse(results),)),
        Claim("EB5", "NormFace, NTCE, NONL and SCL end nearer to collapse than CE",
              tuple(_closer(results, row, "ce", metric) for row in (*NORMALISED, "scl")
                    for metric in TABLE_7_METRICS),
              "Distances from the optimum; in brackets, of those that hold, as shares of CE's", counted=True),
        Claim("EB6", "NTCE and NONL beat CE in transfer, under corruptions and on long tails",
              (*_transfers(results, ("ntce", "nonl")), *_corrupted(results, ("ntce", "nonl")),
               *_long_tails(results, ("ntce", "nonl")))),
        Claim("Table 1", "NormFace, NTCE and NONL classify better than CE",
              tuple(_compare(results, accuracy, row, "ce") for row in NORMALISED)),
        Claim("Table 1", "NONL classifies better than ETF+DR, NormFace and NTCE",
              tuple(_compare(results, accuracy, "nonl", row) for row in ("etf-dr", "normface", "ntce"))),
        Claim("Table 4", "NormFace, NTCE and NONL transfer better than CE, ETF+DR worse",
              (*_transfers(results, NORMALISED, ""),
               _compare(results, transfer, "etf-dr", "ce", stage="half", wanted=-1))),
        Claim("Table 5", "NormFace, NTCE and NONL have a smaller mCE than CE",
              tuple(_corrupted(results, NORMALISED, ""))),
        Claim("Table 6", "NTCE and NONL beat CE on long tails", tuple(_long_tails(results, ("ntce", "nonl")))),
        Claim("Table 7 (I)", "NONL reaches 95 % of collapse before NormFace, on the effective ranks",
              tuple(replace(_earlier(times, "normface", metric, 1), group="") for metric in RANKS), of_all),
        Claim("Table 7 (II)", f"NONL has CE's final values after {100 * AT_ONCE:g} % of CE's iterations, or at the "
              "first evaluation if that is later, on 4 of 5 metrics",
              tuple(_at_once(times, metric, first_evaluation(results)) for metric in TABLE_7_METRICS),
              "% of CE's iterations, medians over the seeds", needed=4),
        Claim("App. G.4, in spirit",
              "NONL with the negatives of all processes classifies better than with each process's own",
              (_global_batch(results),)),
    ]  # fmt: skip


def sized(found: Difference, digits: int | None = 1) -> str:
    """Mean and standard deviation over the seeds; ``digits`` after the point, or None for three significant ones."""
    if not found.values:
        return ""
    if math.isnan(found.deviation):
        return f"{_number(found.mean, digits)} (one seed)"
    return f"{_number(found.mean, digits)} ± {_number(found.deviation, digits).lstrip('+')}"


def _number(value: float, digits: int | None) -> str:
    return f"{value:+.3g}" if digits is None else f"{value:+.{digits}f}"


def _decide(found: Difference, wanted: int) -> str:
    """The outcome for a difference that should have the sign ``wanted``."""
    if not found.values:
        return NOT_RUN
    return {wanted: HELD, -wanted: REVERSED, 0: UNDECIDED}[found.sign]


def _compare(
    results: Results,
    measure: Measure,
    first: str,
    second: str,
    *,
    stage: str = "main",
    wanted: int = 1,
    what: str = "",
    group: str = "",
    digits: int | None = 1,
    **point: object,
) -> Part:
    """Compare two rows; the first should have the larger value (``wanted`` 1) or the smaller one (-1)."""
    values = [by_seed(results, measure, stage, row, **point) for row in (first, second)]
    found = difference(*values)
    middle, base = (mean(list(one.values())) for one in values)
    share = 100 * middle / base if base else math.nan
    what = what or f"{NAMES[first]} - {NAMES[second]}"
    return Part(what, _decide(found, wanted), sized(found, digits), group, share)


def _closer(results: Results, first: str, second: str, metric: str) -> Part:
    what, measure = METRICS[metric], distance(metric)
    group = NAMES[first] if second == "ce" else "distance from the optimum"
    return _compare(results, measure, first, second, wanted=-1, what=what, group=group, digits=None)


def _no_worse(results: Results) -> Part:
    found = difference(*(by_seed(results, classifier(name), "main", "scl") for name in ("FP", "LP")))
    outcome = NOT_RUN if not found.values else UNDECIDED
    if found.mean - found.half_width > -MARGIN:
        outcome = HELD
    elif found.mean + found.half_width < -MARGIN:
        outcome = REVERSED
    return Part("FP - LP", outcome, sized(found))


def _transfers(results: Results, rows: Iterable[str], group: str = "transfer") -> Iterator[Part]:
    for row in rows:
        yield _compare(results, transfer, row, "ce", stage="half", group=group)


def _corrupted(results: Results, rows: Iterable[str], group: str = "mCE") -> Iterator[Part]:
    measure = relative_error(results)
    for row in rows:
        yield _compare(results, measure, row, "ce", wanted=-1, group=group)


def _long_tails(results: Results, rows: Iterable[str]) -> Iterator[Part]:
    for row in rows:
        for imbalance in STAGES["longtail"].values["data.imbalance"]:
            what, group, point = f"at {imbalance:g}", f"long tail, {NAMES[row]} - CE", {"data__imbalance": imbalance}
            yield _compare(results, accuracy, row, "ce", stage="longtail", what=what, group=group, **point)


def _global_batch(results: Results) -> Part:
    first, second = (
        by_seed(results, accuracy, "ranks", "nonl", loss__global_batch=together) for together in (True, False)
    )
    found = difference(first, second)
    return Part("all - own", _decide(found, 1), sized(found))


def _middle(times: Mapping[int, float]) -> float:
    """The median of shares, in per cent; infinite means never."""
    known = [value for value in times.values() if not math.isnan(value)]
    return 100 * statistics.median_high(known) if known else math.nan


def _percent(times: Mapping[int, float]) -> str:
    middle = _middle(times)
    return "" if math.isnan(middle) else "never" if math.isinf(middle) else f"{middle:.0f}"


def _unanimous(times: Mapping[int, float], yes: Iterable[bool], no: Iterable[bool]) -> str:
    """The outcome of times: decided only if all seeds agree, and there are at least two."""
    if not times:
        return NOT_RUN
    if len(times) < 2:
        return UNDECIDED
    return HELD if all(yes) else REVERSED if all(no) else UNDECIDED


def _matched(tables: Tables, row: str, metric: str) -> Part:
    """Whether CE's final value is reached before CE ends; a value that the untrained network has is undecided."""
    times = match_times(tables, row, metric)
    values = times.values()
    outcome = _unanimous(times, (0 < value < 1 for value in values), (math.isinf(value) for value in values))
    return Part(METRICS[metric], outcome, _percent(times), NAMES[row], _middle(times))


def _at_once(tables: Tables, metric: str, first: float) -> Part:
    """Whether NONL has CE's final value after 7.5 % of CE's iterations, or at the first evaluation if it is later."""
    times = match_times(tables, "nonl", metric)
    limit, values = max(AT_ONCE, first), times.values()
    outcome = _unanimous(times, (value <= limit for value in values), (value > limit for value in values))
    return Part(METRICS[metric], outcome, _percent(times))


def _earlier(tables: Tables, rival: str, metric: str, part: int) -> Part:
    """Whether NONL reaches the value before a rival with every seed."""
    of = collapse_times if part == 1 else match_times
    ours, theirs = of(tables, "nonl", metric), of(tables, rival, metric)
    group = f"{NAMES[rival]}, {'95 % of collapse' if part == 1 else 'as CE'}"
    if not ours.keys() & theirs.keys():
        return Part(METRICS[metric], NOT_RUN, group=group)
    outcome = {-1: HELD, 1: REVERSED, 0: UNDECIDED}[order(ours, theirs)]
    return Part(METRICS[metric], outcome, f"{_percent(ours)} : {_percent(theirs)}", group)
