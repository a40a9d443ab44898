"""Covering arrays: of a test's grid of parameters, the part in which every few values meet."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence


def covering(points: Sequence[Mapping[str, int]], strength: int) -> list[int]:
    """Positions of some of ``points`` that hold every combination of ``strength`` values which the points hold.

    A point gives each parameter the number of its value. Greedy: of the next points the one with the most combinations
    that no chosen one has. Points come in an order that looks random and is always the same, so that parameters which
    are not combined do not go in step.
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
        # What a point adds only falls: the best of the last round that still adds as much is the best of this one.
        best = max(order, key=lambda i: len(combinations[i] & missing))
        missing -= combinations[best]
        order.remove(best)
        found.append(best)
    return sorted(found)
