"""Covering arrays: of a test's grid of parameters, the part in which every few values meet."""

from __future__ import annotations

import itertools
import random
from collections.abc import Hashable, Mapping, Sequence


def covering(points: Sequence[Mapping[str, Hashable]], strength: int) -> list[int]:
    """Positions of some of ``points`` that hold every combination of ``strength`` values which the points hold.

    A point gives each parameter its value. The search is greedy: it takes the point with the most combinations that no
    point before it has. Ties go by a random order, always the same, which varies the parameters that are left.
    """
    names = sorted(points[0]) if points else []
    if len(names) <= strength:
        return list(range(len(points)))
    choices = list(itertools.combinations(names, strength))
    combinations = [{(choice, *(point[name] for name in choice)) for choice in choices} for point in points]
    order = list(range(len(points)))
    random.Random(0).shuffle(order)
    missing = set().union(*combinations)
    found = []
    while missing:
        best = max(order, key=lambda i: len(combinations[i] & missing))
        missing -= combinations[best]
        order.remove(best)
        found.append(best)
    return sorted(found)
