"""How work is divided: thread blocks that share a task, panels that fit the workspace. Plain arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

FULL_WAVE = 16
"""With long rows, at least this many thread blocks share a block of anchors: those that run at the same time
then need about the square root of the device's tiles of each operand, and these fit the L2 cache."""

MIN_PANEL = 64
"""The smallest side of a panel of gradient entries, however small the workspace."""


@dataclass(frozen=True)
class Blocks:
    """How a kernel covers its operands."""

    p: int
    """Anchors of a thread block."""
    q: int
    """Reduced rows a step."""
    places: int
    """Thread blocks that the device runs at the same time."""
    least: int = 1
    """Thread blocks that should share their anchors at least; see ``FULL_WAVE``."""
    tile: Any = None
    """What else the kernel's launch wants to know."""

    def split(self, p_slots: int, q_slots: int, workspace: int, partial_bytes: int) -> int:
        """Thread blocks that share their anchors; the partial results of each take ``partial_bytes``."""
        most = workspace // max(1, partial_bytes)
        return split_count(ceil_div(p_slots, self.p), ceil_div(q_slots, self.q), self.places, self.least, most)


@lru_cache(maxsize=1024)
def split_count(p_blocks: int, q_blocks: int, places: int, least: int, most: int) -> int:
    """How many thread blocks share the Q blocks of one block of anchors.

    Minimises the time of the longest chain of blocks on one of ``places`` places, where a thread block costs
    a third of a block on top of its blocks. ``most`` bounds the memory of the partial results; ``least``
    keeps thread blocks that run together on few anchors when these are re-read from the L2 cache.
    """
    most = max(1, min(most, q_blocks))
    least = max(1, min(least, most))
    best, best_time = most, float("inf")
    for split in range(least, min(most, max(least, 4 * places)) + 1):
        rounds = ceil_div(p_blocks * split, places)
        time = rounds * (ceil_div(q_blocks, split) + 1 / 3)
        if time < best_time:
            best, best_time = split, time
    return best


def panel_shape(n_p: int, n_q: int, p_row_bytes: int, q_row_bytes: int, itemsize: int, budget: int) -> tuple[int, int]:
    """Anchors and reduced rows of a panel of gradient entries, so that everything it needs fits ``budget``.

    A panel of (p, q) takes ``p * q * itemsize + p * p_row_bytes + q * q_row_bytes`` bytes. Both sides are
    inner dimensions of a matrix product whose result is accumulated, so the shorter one decides the
    speed: take the panel whose shorter side is longest. Powers of two fill the device evenly.
    """
    best = (min(n_p, MIN_PANEL), min(n_q, MIN_PANEL))
    candidates = [n_q] + [1 << i for i in range(n_q.bit_length()) if MIN_PANEL <= 1 << i < n_q]
    for q in candidates:
        p = (budget - q * q_row_bytes) // (pad16(q) * itemsize + p_row_bytes)
        p = n_p if p >= n_p else 1 << (p.bit_length() - 1) if p >= MIN_PANEL else 0
        if p and (min(p, q), p) > (min(best), best[0]):
            best = (p, q)
    return best


def pad16(n: int) -> int:
    """Leading dimensions that are multiples of 16 keep rows aligned for vector loads and tensor cores."""
    return ceil_div(n, 16) * 16


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)
