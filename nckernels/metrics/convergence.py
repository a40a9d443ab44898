"""Speed of convergence, [NCD] App. F and Table 7: when a run comes near collapse, and when it matches another run."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .measures import NAN
from .report import Features, optimum, ranges

HISTORY_VERSION = 2
"""Of the format of ``history.json`` that :meth:`RunHistory.load` reads."""
TABLE_7_METRICS = ("instance_alignment", "weight_alignment", "weights_erank", "intra_erank", "inter_erank")
"""The columns of [NCD] Table 7, in its order."""
TABLE_7 = {
    "normface": ((0.794, 0.082, 0.526, 0.454, 0.562), (0.022, 0.020, 0.663, 0.0, 0.074)),
    "ntce": ((0.794, 0.068, 0.564, 0.366, 0.524), (0.022, 0.018, 0.739, 0.0, 0.074)),
    "nonl": ((0.794, 0.074, 0.346, 0.146, 0.472), (0.022, 0.018, 0.354, 0.0, 0.060)),
}
"""[NCD] Table 7 by loss, parts (I) and (II), for ResNet-18 on CIFAR-100."""


def convergence_iteration(
    steps: Sequence[int], values: Sequence[float], optimum: float, tolerance: float, *, smoothing: float = 0.5
) -> int | None:
    """First step from which the smoothed values stay within ``tolerance`` of ``optimum``; or None.

    Args:
        steps: iterations at which ``values`` were taken, increasing.
        values: one metric. One that is not finite counts as outside and restarts the average.
        optimum: see :func:`optimum`. NaN is never reached.
        tolerance: for "95 % NC" 0.05 times the metric's entry in :func:`ranges`.
        smoothing: weight of the past in the exponentially weighted average a_t = s a_{t-1} + (1 - s) x_t over
            the evaluations, in [0, 1); 0 takes the values as they are.

    Example:
        >>> steps, values = [0, 100, 200, 300], [0.0, 0.5, 0.97, 0.99]
        >>> nckernels.metrics.convergence_iteration(steps, values, optimum=1.0, tolerance=0.05, smoothing=0)
        200
    """
    if len(steps) != len(values):
        raise ValueError(f"values: expected one per step ({len(steps)}), got {len(values)}")
    if not tolerance >= 0:
        raise ValueError(f"tolerance: expected a number >= 0, got {tolerance}")
    reached = None
    for step, value in zip(steps, _smoothed(values, smoothing), strict=True):
        if not abs(value - optimum) <= tolerance:
            reached = None
        elif reached is None:
            reached = step
    return reached


def first_reach(
    steps: Sequence[int], values: Sequence[float], level: float, optimum: float, *, smoothing: float = 0.5
) -> int | None:
    """First step from which the smoothed values stay at least as close to ``optimum`` as ``level`` is.

    With ``level`` the final value of another run, divided by that run's iterations, this is part (II) of
    [NCD] Table 7: the share of its iterations needed to match it. None if it is not matched at the end.

    Example:
        >>> steps, values = [0, 100, 200, 300], [0.0, 0.5, 0.97, 0.99]
        >>> nckernels.metrics.first_reach(steps, values, level=0.4, optimum=1.0, smoothing=0)
        100
    """
    if math.isnan(level):
        raise ValueError("level: expected a number, got nan")
    if math.isnan(optimum):
        raise ValueError("optimum: expected a number, got nan")
    return convergence_iteration(steps, values, optimum, abs(level - optimum), smoothing=smoothing)


@dataclass(frozen=True)
class RunHistory:
    """What a training run measured, as far as its convergence is concerned.

    Example:
        >>> run = nckernels.metrics.RunHistory(
        ...     "nonl", loss="nonl", num_classes=10, dim=64, steps=[0, 100], metrics={"inter_erank": [1.0, 8.9]}
        ... )
        >>> run.metrics["inter_erank"][-1]
        8.9
    """

    name: str
    loss: str
    """The loss that it trained with, such as "ce" or "nonl"."""
    num_classes: int
    dim: int
    """Number of features d."""
    steps: Sequence[int]
    """Iterations done at each evaluation, increasing."""
    metrics: Mapping[str, Sequence[float]]
    """:class:`NeuralCollapse` field by field, a value per evaluation; NaN where undefined."""

    @classmethod
    def load(cls, path: str | Path) -> RunHistory:
        """Read the history of a run of ``python -m nckernels train --out`` or ``demo``.

        Args:
            path: the run's folder, or its ``history.json``.

        Raises:
            OSError: if the file cannot be read.
            ValueError: naming the file, if it holds something else.
        """
        path = Path(path)
        file = path / "history.json" if path.is_dir() else path
        try:
            content = json.loads(file.read_bytes())
        except ValueError as error:  # what is no text, too
            raise ValueError(f"{file}: not a JSON file: {error}") from None
        try:
            return cls._parse(str(path), content)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None

    @classmethod
    def _parse(cls, name: str, content: Any) -> RunHistory:
        content = _typed("the history", content, dict)
        if content.get("version") != HISTORY_VERSION:
            raise ValueError(f"version: expected {HISTORY_VERSION}, got {content.get('version')!r}")
        recipe = _typed("recipe", content.get("recipe"), dict)
        loss = _typed("recipe.loss", recipe.get("loss"), dict)
        steps = _typed("steps", content.get("steps"), list)
        metrics = _typed("metrics", content.get("metrics"), dict)
        if not steps or not all(_is_integer(step) for step in steps):
            raise ValueError("steps: expected a list of steps, at least one")
        if any(later <= earlier for earlier, later in itertools.pairwise(steps)):
            raise ValueError("steps: expected increasing numbers")
        return cls(
            name=name,
            loss=_typed("recipe.loss.name", loss.get("name"), str),
            num_classes=_positive("num_classes", content.get("num_classes")),
            dim=_positive("dim", content.get("dim")),
            steps=steps,
            metrics={metric: _numbers(f"metrics.{metric}", values, len(steps)) for metric, values in metrics.items()},
        )


@dataclass(frozen=True)
class ConvergenceTable:
    """[NCD] Table 7 of a set of runs. Shares of iterations: infinite for never, NaN where it is undefined."""

    metrics: tuple[str, ...]
    """The columns."""
    losses: Mapping[str, str]
    """The loss by the name of its run, in the order of the rows."""
    collapse: Mapping[str, Mapping[str, float]]
    """Part (I), run by run: share of its own iterations until the metric is near collapse for good. NaN for a metric
    without a natural range, see :func:`ranges`."""
    baseline: str | None
    """The run that the others are compared with."""
    match: Mapping[str, Mapping[str, float]]
    """Part (II): share of the baseline's iterations until the metric is for good as close to its optimum as the
    baseline's at the end. The baseline's own row has the share at which it is for good within the tolerance of its
    final value."""
    tolerance: float
    """Share of a metric's range that counts as near."""

    def text(self) -> str:
        """A Markdown table that reads as plain text too, with the rows of [NCD] Table 7 below those of its losses."""
        parts = [self._part(f"(I) within {self.tolerance:.0%} of collapse after", self.collapse, 0)]
        if self.baseline is not None:
            parts.append(self._part(f"(II) like the final {self.baseline} after", self.match, 1))
        return "\n\n".join(parts)

    def _part(self, title: str, rows: Mapping[str, Mapping[str, float]], part: int) -> str:
        lines = [[title, *self.metrics]]
        for name, row in rows.items():
            settled = part == 1 and name == self.baseline
            lines.append([f"{name}, settled" if settled else name, *(_percent(row[metric]) for metric in self.metrics)])
            if self.losses[name] in TABLE_7:
                published = dict(zip(TABLE_7_METRICS, TABLE_7[self.losses[name]][part], strict=True))
                lines.append(["[NCD], CIFAR-100", *(_percent(published.get(metric, NAN)) for metric in self.metrics)])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
        return "\n".join(
            "| " + " | ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) + " |"
            for line in lines
        )


def convergence_table(
    runs: Sequence[RunHistory],
    *,
    baseline: RunHistory | None = None,
    features: Features = "signed",
    tolerance: float = 0.05,
    smoothing: float = 0.5,
    metrics: Sequence[str] = TABLE_7_METRICS,
) -> ConvergenceTable:
    """How fast runs reach collapse, and a baseline's final values: [NCD] Table 7, parts (I) and (II).

    Args:
        runs: one row each; their names are distinct and their numbers of classes the same.
        baseline: what part (II) compares with, one of the runs or not. By default the run with the loss "ce", if there
            is exactly one; otherwise part (II) is left out.
        features: which :func:`optimum` counts as collapse.
        tolerance: share of the range of a metric (:func:`ranges`) that counts as near, 0.05 for "95 % NC".
        smoothing: see :func:`convergence_iteration`.
        metrics: fields of :class:`NeuralCollapse`, the columns.

    [NCD] prints part (II) as "ratio to CE converged iteration", which cannot be all of CE's iterations: NTCE would
    reach CE's final rank of the weights (89.7 of 99, Table 3) after 73.9 % of them, but 95 % of the optimum after
    56.4 %. What it divides by is thus at most 0.564 / 0.739 = 76 % of the iterations. It does not say when CE counts as
    converged. We divide by all of the baseline's iterations and print beside it when the baseline has settled.

    Raises:
        ValueError: for runs that do not fit together, metrics that do not exist or that a run lacks, a tolerance
            outside (0, 1], or a smoothing outside [0, 1).

    Example:
        >>> metrics = {"ce": [2.0, 4.0, 6.0], "nonl": [2.0, 7.0, 8.9]}
        >>> runs = [
        ...     nckernels.metrics.RunHistory(name, name, 10, 64, [0, 100, 200], {"inter_erank": values})
        ...     for name, values in metrics.items()
        ... ]
        >>> table = nckernels.metrics.convergence_table(runs, smoothing=0, metrics=["inter_erank"])
        >>> table.match["nonl"]["inter_erank"]  # of cross-entropy's iterations, until its final value is reached
        0.5
    """
    if not runs:
        raise ValueError("runs: expected at least one")
    if baseline is None:
        candidates = [run for run in runs if run.loss == "ce"]
        baseline = candidates[0] if len(candidates) == 1 else None
    everyone = [*runs, *([] if baseline is None or baseline in runs else [baseline])]
    _fit_together(everyone, metrics)
    if not 0 < tolerance <= 1:
        raise ValueError(f"tolerance: expected a number in (0, 1], got {tolerance}")
    best = asdict(optimum(runs[0].num_classes, features=features))

    def share(run: RunHistory, metric: str, aim: float, within: float, iterations: int) -> float:
        values = run.metrics[metric]
        if math.isnan(aim) or math.isnan(within) or all(map(math.isnan, values)):
            return NAN
        step = convergence_iteration(run.steps, values, aim, within, smoothing=smoothing)
        return math.inf if step is None else step / iterations

    def near(run: RunHistory, metric: str) -> float:
        return tolerance * ranges(run.num_classes, run.dim).get(metric, NAN)

    def row(share_of: Callable[[str], float]) -> dict[str, float]:
        return {metric: share_of(metric) for metric in metrics}

    def collapse(run: RunHistory) -> dict[str, float]:
        return row(lambda metric: share(run, metric, best[metric], near(run, metric), run.steps[-1]))

    def match(run: RunHistory, other: RunHistory) -> dict[str, float]:
        final = {metric: other.metrics[metric][-1] for metric in metrics}
        if run == other:
            return row(lambda metric: share(run, metric, final[metric], near(run, metric), run.steps[-1]))
        return row(lambda metric: share(run, metric, best[metric], abs(final[metric] - best[metric]), other.steps[-1]))

    return ConvergenceTable(
        metrics=tuple(metrics),
        losses={run.name: run.loss for run in everyone},
        collapse={run.name: collapse(run) for run in runs},
        baseline=None if baseline is None else baseline.name,
        match={} if baseline is None else {run.name: match(run, baseline) for run in everyone},
        tolerance=tolerance,
    )


def _fit_together(runs: Sequence[RunHistory], metrics: Sequence[str]) -> None:
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise ValueError(f"runs: expected distinct names, got {', '.join(names)}")
    classes = {run.name: run.num_classes for run in runs}
    if len(set(classes.values())) > 1:
        raise ValueError(f"runs: expected the same number of classes, got {classes}")
    known = asdict(optimum(runs[0].num_classes))
    for metric in metrics:
        if metric not in known:
            raise ValueError(f"metrics: expected some of {', '.join(known)}, got {metric!r}")
    for run in runs:
        if run.steps[-1] < 1:
            raise ValueError(f"{run.name}: no iterations, the last evaluation is at step {run.steps[-1]}")
        for metric in metrics:
            if metric not in run.metrics:
                raise ValueError(f"{run.name}: has no metric {metric!r}")


def _percent(share: float) -> str:
    if math.isnan(share):
        return "-"
    return "never" if math.isinf(share) else f"{share:.1%}"


def _typed(name: str, value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        kinds: dict[type, str] = {dict: "an object", list: "a list", str: "a string"}
        raise ValueError(f"{name}: expected {kinds[kind]}, got {type(value).__name__}")
    return value


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _positive(name: str, value: Any) -> int:
    if not _is_integer(value) or value < 1:
        raise ValueError(f"{name}: expected a positive whole number, got {value!r}")
    return int(value)


def _numbers(name: str, values: Any, length: int) -> list[float]:
    """Numbers, with null for NaN."""
    if not isinstance(values, list) or len(values) != length:
        raise ValueError(f"{name}: expected one value per step ({length})")
    if not all(value is None or (isinstance(value, int | float) and not isinstance(value, bool)) for value in values):
        raise ValueError(f"{name}: expected numbers or null")
    return [NAN if value is None else float(value) for value in values]


def _smoothed(values: Sequence[float], smoothing: float) -> list[float]:
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing: expected a number in [0, 1), got {smoothing}")
    averages: list[float] = []
    average = NAN
    for value in values:
        average = value if not math.isfinite(average) else smoothing * average + (1 - smoothing) * value
        averages.append(average)
    return averages
