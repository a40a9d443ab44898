"""Differences between two rows, seed by seed, and when they count.

A difference counts if the 95 % confidence interval of its mean over the seeds (Student's t) excludes zero. For three
seeds the mean must be 2.5 times the standard deviation of the differences. The rule of thumb "twice the standard error"
would accept one in five differences that do not exist, because three seeds estimate their own spread badly.
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
        """Standard deviation over the seeds; NaN for fewer than two."""
        return deviation(list(self.values))

    @property
    def half_width(self) -> float:
        """Half the width of the confidence interval of the mean; NaN for fewer than two seeds."""
        return critical(len(self.values)) * self.deviation

    @property
    def sign(self) -> int:
        """1 or -1 for a difference that counts, 0 for one that does not or is undefined."""
        if not abs(self.mean) > self.half_width:
            return 0
        return 1 if self.mean > 0 else -1


def critical(count: int) -> float:
    """Half the width of the confidence interval of a mean in standard deviations of the values."""
    return float(stdtrit(count - 1, (1 + CONFIDENCE) / 2)) / math.sqrt(count) if count > 1 else math.nan


def by_seed(results: Results, measure: Measure, stage: str, row: str, **point: Any) -> dict[int, float]:
    """A measure of a row's runs by seed; runs where it is NaN are left out."""
    values = {run.seed: measure(run) for run in results.of(stage, row, **point)}
    return {seed: value for seed, value in sorted(values.items()) if not math.isnan(value)}


def difference(first: Mapping[int, float], second: Mapping[int, float]) -> Difference:
    """First minus second, for the seeds that both have."""
    return Difference(tuple(first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())))


def order(first: Mapping[int, float], second: Mapping[int, float]) -> int:
    """-1 if the first is smaller with every seed, 1 if it is larger with every seed, 0 if the seeds disagree.

    It compares times until an event, which have no mean if one of them is infinite. One seed alone gives 0.
    """
    signs = {(first[seed] > second[seed]) - (first[seed] < second[seed]) for seed in first.keys() & second.keys()}
    return signs.pop() if len(signs) == 1 and len(first.keys() & second.keys()) > 1 else 0


def accuracy(run: Run) -> float:
    """Test accuracy in per cent."""
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
