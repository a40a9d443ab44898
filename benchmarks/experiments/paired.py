"""Differences between two rows seed by seed, and when they count.

A difference counts when the 95 % confidence interval of its mean over the seeds (Student's t) leaves out zero. For
three seeds that asks for a mean of 2.5 times the standard deviation of the differences. The rule of thumb "twice the
standard error" would let through one in five differences that are not there, because three seeds say little about
their own spread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from scipy.special import stdtrit

from .collect import Results, Run, deviation, mean

CONFIDENCE = 0.95
Measure = Callable[[Run], float]


@dataclass(frozen=True)
class Difference:
    """First minus second, a value for each seed that both have."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return mean(list(self.values))

    @property
    def deviation(self) -> float:
        """Over the seeds; NaN for fewer than two."""
        return deviation(list(self.values))

    @property
    def half_width(self) -> float:
        """Of the confidence interval of the mean; NaN for fewer than two seeds."""
        return critical(len(self.values)) * self.deviation

    @property
    def sign(self) -> int:
        """1 or -1 for a difference that counts; 0 for one that does not, or that cannot be told."""
        if not abs(self.mean) > self.half_width:
            return 0
        return 1 if self.mean > 0 else -1


def critical(count: int) -> float:
    """Half the width of the confidence interval of a mean in standard deviations of the values."""
    return float(stdtrit(count - 1, (1 + CONFIDENCE) / 2)) / math.sqrt(count) if count > 1 else math.nan


def by_seed(results: Results, measure: Measure, stage: str, row: str, **point: Any) -> dict[int, float]:
    """What a row's runs measured; runs for which it is NaN are left out."""
    values = {run.seed: measure(run) for run in results.of(stage, row, **point)}
    return {seed: value for seed, value in sorted(values.items()) if not math.isnan(value)}


def difference(first: Mapping[int, float], second: Mapping[int, float]) -> Difference:
    """Of the seeds that both have."""
    return Difference(tuple(first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())))


def order(first: Mapping[int, float], second: Mapping[int, float]) -> int:
    """-1 if the first is the smaller one with every seed, 1 if it is the larger one, 0 where the seeds disagree.

    For times until something happens, which have no mean where one is infinite. One seed does not decide.
    """
    signs = {(first[seed] > second[seed]) - (first[seed] < second[seed]) for seed in first.keys() & second.keys()}
    return signs.pop() if len(signs) == 1 and len(first.keys() & second.keys()) > 1 else 0


def accuracy(run: Run) -> float:
    """On the test set, in per cent."""
    return 100 * run.test_accuracy


def train_accuracy(run: Run) -> float:
    return 100 * run.train_accuracy


def transfer(run: Run) -> float:
    return 100 * run.transfer


def final(metric: str) -> Measure:
    """A metric of neural collapse at the end."""
    return lambda run: run.metrics.get(metric, [math.nan])[-1]


def classifier(name: str) -> Measure:
    """Test accuracy of FP, LP or NLP, in per cent."""
    return lambda run: 100 * run.classifiers.get(name, math.nan)
