"""Processes for the tests with several ranks, started once per session: see ranks.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from ranks import Ranks


@pytest.fixture(scope="session")
def ranks2() -> Iterator[Ranks]:
    """Two ranks."""
    with Ranks(2) as ranks:
        yield ranks


@pytest.fixture(scope="session")
def ranks4() -> Iterator[Ranks]:
    """Four ranks."""
    with Ranks(4) as ranks:
        yield ranks


@pytest.fixture(params=[2, 4], ids=["2-ranks", "4-ranks"])
def ranks(request: pytest.FixtureRequest) -> Ranks:
    """Two ranks, then four."""
    return request.getfixturevalue(f"ranks{request.param}")
