"""docs/results.md, from the numbers."""

from __future__ import annotations

from pathlib import Path

from .collect import Results


def write(results: Results) -> list[Path]:
    """Write the page and its pictures; returns what was written."""
    raise NotImplementedError
