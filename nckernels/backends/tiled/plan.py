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

OWN_RATE = 0.5
"""The rate of products in kernels of our own with rows too long to stay on the chip, as a share of the library's:
their tiles of 128 x 128 without multicast are bound by the L2 cache. An estimate, not yet measured."""

IN_L2 = 24 << 20
"""Bytes that survive in the L2 cache, 50 MB on an H100, until the next kernel reads them."""

EPILOGUE_COLUMNS = 128
"""Of the narrowest tile of a product with an epilogue: each leaves one float32 number of an anchor's sum."""

OPERATIONS_PER_BYTE = 266
"""What the tensor cores do while a byte of memory moves: an H100 multiplies bfloat16 matrices of 8192 x 8192 at 798
TFLOP/s and copies at 3.0 TB/s."""


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


@dataclass(frozen=True)
class StepPanels:
    """How loss and gradient in one step cut their work."""

    rows: int
    """Anchors of a panel, which meets all rows of the other operand."""
    block: int
    """Rows of either operand whose gradients are summed up, and finished, at a time: few enough for the L2 cache."""


@lru_cache(maxsize=1024)
def step_panels(n_p: int, n_q: int, d: int, itemsize: int, workspace: int, epilogue: bool = False) -> StepPanels | None:
    """The panels of one step, or None where they would be so thin that two passes are faster.

    A panel of n anchors takes, for every one of them, a row of float32 products and one of entries (float32 entries
    replace their products) and a copy of the anchor; and float32 sums for a block of rows. With an ``epilogue`` there
    are no products, but the partial sums of tiles.
    """
    if epilogue:
        row = pad16(n_q) * itemsize + 4 * ceil_div(n_q, EPILOGUE_COLUMNS) + d * itemsize
    else:
        row = pad16(n_q) * (4 + (itemsize if itemsize < 4 else 0)) + d * itemsize
    block = max(MIN_PANEL, 1 << (max(1, min(workspace // 4, IN_L2) // (4 * d)).bit_length() - 1))
    rows = min(n_p, (workspace - block * 4 * d) // row)
    if rows < n_p:
        rows -= rows % MIN_PANEL
        if rows <= 0:
            return None
        equal = ceil_div(n_p, ceil_div(n_p, rows))
        rows = ceil_div(equal, MIN_PANEL) * MIN_PANEL  # equal panels, in whole tiles of the library's
    if step_cost(n_p, n_q, d, itemsize, rows, epilogue) > two_passes_cost(n_p, n_q, d, itemsize):
        return None
    return StepPanels(rows, min(block, max(rows, n_q)))


def step_cost(n_p: int, n_q: int, d: int, itemsize: int, rows: int, epilogue: bool = False) -> float:
    """Loss and gradient in one step by panels of ``rows`` anchors, in operations of the tensor cores.

    Each product takes as long as its operations or as its bytes, whichever is more; what is elementwise takes its
    bytes.
    """
    products, p, q, entries = 2 * rows * n_q * d, rows * d, n_q * d, rows * n_q
    several = rows < n_p
    if epilogue:
        panel = _time(products, itemsize * (p + q + entries))  # products, and exponentials written
        panel += _time(0, 2 * itemsize * entries)  # which become entries in place
    else:
        panel = _time(products, itemsize * (p + q) + 4 * entries)  # the products themselves
        panel += _time(0, (4 + 4 + itemsize) * entries)  # read for sums, read again, entries written
    panel += _time(products, itemsize * (entries + q) + 4 * p)  # gradient of the anchors
    panel += _time(products, itemsize * (entries + p) + (8 if several else 4) * q)  # and of the others
    return panel * ceil_div(n_p, rows)


def two_passes_cost(n_p: int, n_q: int, d: int, itemsize: int) -> float:
    """The same for a forward pass and a backward pass that makes the products again."""
    products, p, q, entries = 2 * n_p * n_q * d, n_p * d, n_q * d, n_p * n_q
    own = _time(products / OWN_RATE, itemsize * (p + q))
    gradients = _time(products, itemsize * (entries + q) + 4 * p) + _time(products, itemsize * (entries + p) + 4 * q)
    return 2 * own + _time(0, itemsize * entries) + gradients


def _time(operations: float, moved: float) -> float:
    return max(operations, OPERATIONS_PER_BYTE * moved)


def pad16(n: int) -> int:
    """Leading dimensions that are multiples of 16 keep rows aligned for vector loads and tensor cores."""
    return ceil_div(n, 16) * 16


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)
