"""Speed of convergence, [NCD] Table 7."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .measures import NAN


def convergence_iteration(
    steps: Sequence[int], values: Sequence[float], optimum: float, tolerance: float, *, smoothing: float = 0.5
) -> int | None:
    """First step from which the smoothed values stay within ``tolerance`` of ``optimum``; or None.

    Args:
        steps: iterations at which ``values`` were taken, increasing.
        values: one metric. A NaN counts as outside and restarts the average.
        optimum: see :func:`optimum`.
        tolerance: for "95 % NC" 0.05 times the metric's entry in :func:`ranges`.
        smoothing: weight of the past in the exponentially weighted average a_t = s a_{t-1} + (1 - s) x_t over
            the evaluations, in [0, 1); 0 takes the values as they are.
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
    """
    return convergence_iteration(steps, values, optimum, abs(level - optimum), smoothing=smoothing)


def _smoothed(values: Sequence[float], smoothing: float) -> list[float]:
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing: expected a number in [0, 1), got {smoothing}")
    averages: list[float] = []
    average = NAN
    for value in values:
        average = value if math.isnan(average) else smoothing * average + (1 - smoothing) * value
        averages.append(average)
    return averages
