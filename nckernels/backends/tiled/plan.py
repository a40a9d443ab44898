"""The division of work: thread blocks that share a task, and panels that fit the workspace. Plain arithmetic."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

FULL_WAVE = 16
"""With long rows, at least this many thread blocks share a block of anchors. The thread blocks that run at the same
time then read, of each operand, about the square root of their number of tiles, and these fit the L2 cache."""

MIN_PANEL = 64
"""The smallest side of a panel of gradient entries, however small the workspace."""

OWN_RATE = 0.5
"""The rate of products in our own kernels with rows too long to stay on the chip, as a fraction of the library's. Their
tiles of 128 x 128 without multicast are bound by the L2 cache. An estimate, not yet measured."""

IN_L2 = 24 << 20
"""Bytes that stay in the L2 cache (50 MB on an H100) until the next kernel reads them."""

EPILOGUE_COLUMNS = 128
"""Columns of the narrowest tile of a product with an epilogue, which writes one float32 partial sum per anchor."""

OPERATIONS_PER_BYTE = 266
"""Operations of the tensor cores in the time of one byte of memory traffic: an H100 multiplies bfloat16 matrices of
8192 x 8192 at 798 TFLOP/s and copies at 3.0 TB/s."""

OPERATIONS_PER_LAUNCH = 2_400_000_000
"""Operations of the tensor cores in the 3 us that the smallest kernel takes."""

PAIR_LAUNCHES = 90
"""Launches of SupCon in two passes, most of them PyTorch's, for the sums of the classes."""

PANEL_LAUNCHES = 8
"""Launches of a panel of SupCon's step, its products among them, and a panel's share of those before and after."""


class Blocks(NamedTuple):
    """How a kernel covers its operands."""

    p: int
    """Anchors per thread block."""
    q: int
    """Reduced rows per iteration of its loop."""
    places: int
    """Number of thread blocks that the device runs at the same time."""
    least: int = 1
    """Least number of thread blocks that should share their anchors, see ``FULL_WAVE``."""
    tile: Any = None
    """The backend's own launch parameters."""

    def split(self, p_slots: int, q_slots: int, workspace: int, partial_bytes: int) -> int:
        """Number of thread blocks that share their anchors; each needs ``partial_bytes`` for partial results."""
        most = workspace // max(1, partial_bytes)
        return split_count(ceil_div(p_slots, self.p), ceil_div(q_slots, self.q), self.places, self.least, most)


@lru_cache(maxsize=1024)
def split_count(p_blocks: int, q_blocks: int, places: int, least: int, most: int) -> int:
    """How many thread blocks share the Q blocks of one block of anchors.

    Minimises the longest time among ``places`` concurrent thread blocks, counted in Q blocks; the start of a thread
    block costs a third of a Q block. ``most`` bounds the memory of the partial results. ``least`` makes concurrent
    thread blocks share anchors that are read again from the L2 cache.
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
    """Anchors and reduced rows of a panel of gradient entries that fits ``budget`` bytes with its buffers.

    A panel of (p, q) takes ``p * q * itemsize + p * p_row_bytes + q * q_row_bytes`` bytes. Each side is the
    inner dimension of an accumulating matrix product, so the shorter side determines the speed, and the panel with the
    longest shorter side is chosen. Sides are powers of two, which fill the device evenly.
    """
    best = (min(n_p, MIN_PANEL), min(n_q, MIN_PANEL))
    candidates = [n_q] + [1 << i for i in range(n_q.bit_length()) if MIN_PANEL <= 1 << i < n_q]
    for q in candidates:
        p = (budget - q * q_row_bytes) // (pad16(q) * itemsize + p_row_bytes)
        p = n_p if p >= n_p else 1 << (p.bit_length() - 1) if p >= MIN_PANEL else 0
        if p and (min(p, q), p) > (min(best), best[0]):
            best = (p, q)
    return best


class StepPanels(NamedTuple):
    """The panels of loss and gradient in one step."""

    rows: int
    """Anchors of a panel; its columns are all rows of the other operand."""
    block: int
    """Rows of either operand whose gradients are computed and finished at a time, few enough for the L2 cache."""


@lru_cache(maxsize=1024)
def step_panels(n_p: int, n_q: int, d: int, itemsize: int, workspace: int, epilogue: bool = False) -> StepPanels | None:
    """The panels of one step, or None if they would be so thin that two passes are faster.

    For each of its anchors a panel needs a row of float32 products, a row of entries (float32 entries replace the
    products) and a copy of the anchor; in addition float32 sums for one block of rows. With an ``epilogue`` it needs
    the partial sums of tiles instead of the products.
    """
    if epilogue:
        row = pad16(n_q) * itemsize + 4 * ceil_div(n_q, EPILOGUE_COLUMNS) + d * itemsize
    else:
        row = pad16(n_q) * (4 + (itemsize if itemsize < 4 else 0)) + d * itemsize
    panels = _equal_panels(n_p, row, d, workspace)
    if panels is None or step_cost(n_p, n_q, d, itemsize, panels.rows, epilogue) > two_passes_cost(
        n_p, n_q, d, itemsize
    ):
        return None
    return StepPanels(panels.rows, min(panels.block, max(panels.rows, n_q)))


def _equal_panels(n: int, row: int, d: int, workspace: int) -> StepPanels | None:
    """Panels of equal height, whose rows take ``row`` bytes each, with float32 sums for one block of rows; None if the
    workspace has no room for them."""
    block = max(MIN_PANEL, 1 << (max(1, min(workspace // 4, IN_L2) // (4 * d)).bit_length() - 1))
    rows = min(n, (workspace - block * 4 * d) // row)
    if rows < n:
        rows -= rows % MIN_PANEL
        if rows <= 0:
            return None
        equal = ceil_div(n, ceil_div(n, rows))
        rows = ceil_div(equal, MIN_PANEL) * MIN_PANEL  # of whole tiles of the library
    return StepPanels(rows, block)


@lru_cache(maxsize=1024)
def pair_panels(n: int, d: int, itemsize: int, workspace: int) -> StepPanels | None:
    """The panels of SupCon's step, see ``triton/pairs_step.py``; None as in ``step_panels``, but float32 rows, whose
    own products are slow, have panels if there is room for them."""
    row = pad16(n) * (4 + (itemsize if itemsize < 4 else 0))
    panels = _equal_panels(n, row, d, workspace - workspace // 8)  # the rest is for the statistics
    if panels is None or (
        itemsize < 4 and pairs_cost(n, d, itemsize, panels.rows) > two_pair_passes_cost(n, d, itemsize)
    ):
        return None
    return StepPanels(panels.rows, min(panels.block, panels.rows))


def pairs_cost(n: int, d: int, itemsize: int, rows: int) -> float:
    """The time of SupCon's step by panels of ``rows`` samples, as ``step_cost``. If there are several, their products
    are computed twice."""
    products, entries = 2 * rows * n * d, rows * n
    panel = (2 if rows < n else 1) * _time(products, itemsize * (rows + n) * d + 4 * entries)
    panel += _time(0, (4 + 4 + itemsize) * entries)  # reads products for statistics and for entries, writes entries
    panel += _time(products, itemsize * (entries + n * d) + 4 * rows * d)
    return (panel + PANEL_LAUNCHES * OPERATIONS_PER_LAUNCH) * ceil_div(n, rows)


def two_pair_passes_cost(n: int, d: int, itemsize: int) -> float:
    """As ``two_passes_cost``, for samples with themselves: one product makes the gradient."""
    products = 2 * n * n * d
    own = _time(products / OWN_RATE, 2 * itemsize * n * d)
    gradient = _time(0, itemsize * n * n) + _time(products, itemsize * (n * n + n * d) + 4 * n * d)
    return 2 * own + gradient + PAIR_LAUNCHES * OPERATIONS_PER_LAUNCH


def step_cost(n_p: int, n_q: int, d: int, itemsize: int, rows: int, epilogue: bool = False) -> float:
    """The time of one step by panels of ``rows`` anchors, in operations of the tensor cores.

    Each product takes as long as its operations or its bytes, whichever is more; an elementwise pass takes its bytes.
    """
    products, p, q, entries = 2 * rows * n_q * d, rows * d, n_q * d, rows * n_q
    several = rows < n_p
    if epilogue:
        panel = _time(products, itemsize * (p + q + entries))  # products; writes exponentials
        panel += _time(0, 2 * itemsize * entries)  # exponentials to entries, in place
    else:
        panel = _time(products, itemsize * (p + q) + 4 * entries)  # products
        panel += _time(0, (4 + 4 + itemsize) * entries)  # reads products for sums and for entries, writes entries
    panel += _time(products, itemsize * (entries + q) + 4 * p)  # gradient of the anchors
    panel += _time(products, itemsize * (entries + p) + (8 if several else 4) * q)  # gradient of the others
    return panel * ceil_div(n_p, rows)


def two_passes_cost(n_p: int, n_q: int, d: int, itemsize: int) -> float:
    """The time of a forward pass and a backward pass that recomputes the products, in the same unit."""
    products, p, q, entries = 2 * n_p * n_q * d, n_p * d, n_q * d, n_p * n_q
    own = _time(products / OWN_RATE, itemsize * (p + q))
    gradients = _time(products, itemsize * (entries + q) + 4 * p) + _time(products, itemsize * (entries + p) + 4 * q)
    return 2 * own + _time(0, itemsize * entries) + gradients


def _time(operations: float, moved: float) -> float:
    return max(operations, OPERATIONS_PER_BYTE * moved)


def pad16(n: int) -> int:
    """``n`` rounded up to a multiple of 16: such leading dimensions align rows for vector loads and tensor cores."""
    return ceil_div(n, 16) * 16


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)
