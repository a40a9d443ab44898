"""The part of a grid of parameters that `make test` runs."""

from __future__ import annotations

import itertools

import pytest
from covering import covering

GRID = [dict(zip("abcde", values, strict=True)) for values in itertools.product(*map(range, (4, 3, 3, 2, 2)))]


def held(points: list[dict[str, int]], strength: int) -> set[tuple[tuple[str, int], ...]]:
    return {some for point in points for some in itertools.combinations(sorted(point.items()), strength)}


@pytest.mark.parametrize(("strength", "most"), [(2, 16), (3, 48), (4, 100)])
@pytest.mark.parametrize("holes", [False, True])
def test_every_few_values_meet(strength: int, most: int, holes: bool) -> None:
    """Also where some combinations are not in the grid."""
    points = [p for p in GRID if not (holes and p["a"] == p["b"])]
    some = [points[i] for i in covering(points, strength)]
    assert held(some, strength) == held(points, strength)
    assert len(some) <= most < len(points)


@pytest.mark.parametrize("points", [[], [{}], GRID])
def test_small_grids_are_left_as_they_are(points: list[dict[str, int]]) -> None:
    assert covering(points, 5) == list(range(len(points)))
