"""The grid, arguments and tile of each kernel's launch. The order of launches is in ``tiled``."""

from __future__ import annotations

import math
import struct
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from ..base import Inputs, Spec
from ..tiled import Kernels
from ..tiled.kernels import Partial
from ..tiled.plan import FULL_WAVE, Blocks, ceil_div
from ..tiled.sides import Result, Side
from . import config, finish, grad, lse, norms
from .config import Tile
from .dispatch import Options
from .dispatch import launch as launch  # tools replace it here

INTERPRETED = not isinstance(lse.lse_kernel, triton.JITFunction)
"""Whether the kernels run in Triton's interpreter: TRITON_INTERPRET=1 when this module was imported."""

CHECKS: dict[str, Any] = {} if INTERPRETED else {"debug": True, "sanitize_overflow": False}
"""Options for device assertions. They need debug, whose overflow checks of every index are turned off."""


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Make the tensor's device current, because Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


_FLOAT, _INTEGER = struct.Struct("f"), struct.Struct("i")


def known_number(tensor: Tensor, number: float | None) -> tuple[Tensor | None, int]:
    """The two arguments of ``prepare.known_number``: the tensor, if the host does not know the number, or its bits."""
    return (tensor, 0) if number is None else (None, int(_INTEGER.unpack(_FLOAT.pack(number))[0]))


# The options of a launch are created once for each set of values that they depend on.
_made_once = lru_cache(maxsize=1024)


def tile_options(tile: Tile) -> dict[str, Any]:
    """The launch options of a tile of products."""
    options: dict[str, Any] = {"BP": tile.p, "BQ": tile.q, "BD": tile.d}
    options |= {"warps": tile.warps, "stages": tile.stages}
    if tile.resident > 1 and not INTERPRETED:
        # Without a limit the compiler uses so many registers that one program fills a multiprocessor.
        options["maxnreg"] = (1 << 16) // (32 * tile.warps * tile.resident)
    return options


@_made_once
def row_blocks(d: int) -> dict[str, int]:
    """Rows and columns of a block for kernels that read rows once, with 8 numbers per thread."""
    columns = min(config.padded(d), 1024)
    return {"BR": 16 if INTERPRETED else 2048 // columns, "BD": columns, "warps": 8}


@_made_once
def _row_rnorm_options(columns: int, unit: int, eps: float) -> Options:
    return Options(UNIT=unit, EPS=eps, **row_blocks(columns))


@_made_once
def _samples_options(columns: int, same_label: bool, itself: bool, unit: int, eps: float) -> Options:
    return Options(SAME_LABEL=same_label, ITSELF=itself, UNIT=unit, EPS=eps, **row_blocks(columns), **CHECKS)


_COMPACT = Options(B=1024)


@_made_once
def _scale_options(limit: float) -> Options:
    return Options(LIMIT=limit, B=4096, warps=16)


@_made_once
def _lse_options(
    exclude: str, samples: bool, gather: bool, unit: int, whole: bool, even: bool, precision: str, tile: Tile
) -> Options:
    return Options(
        EXCLUDE=exclude, P_SAMPLES=samples, P_GATHER=gather, UNIT=unit, WHOLE_D=whole, EVEN_D=even,
        PARTS=tile.parts, PRECISION=precision, **tile_options(tile),
    )  # fmt: skip


@_made_once
def _combine_options(gather: bool, keep: bool) -> Options:
    return Options(GATHER=gather, KEEP=keep, BR=16, BN=64)


Entry = tuple[str, bool, bool, bool, bool, bool]
"""The constexprs of ``_entry_options``."""


def _entry_options(entry: Entry) -> dict[str, Any]:
    names = ("EXCLUDE", "P_SAMPLES", "P_UNSUMMED", "Q_UNSUMMED", "P_GATHER", "Q_GATHER")
    return dict(zip(names, entry, strict=True))


@_made_once
def _grad_options(
    entry: Entry, share: bool, unit: int, even: bool, eps: float, limit: float, precision: str, tile: Tile
) -> Options:
    return Options(
        **_entry_options(entry), MAY_SHARE=share, UNIT=unit, EVEN_D=even,
        EPS=eps, NORM_LIMIT=limit, PRECISION=precision, **tile_options(tile),
    )  # fmt: skip


@_made_once
def _entries_options(entry: Entry, unit: int, even: bool, limit: float, precision: str, tile: Tile) -> Options:
    return Options(
        **_entry_options(entry), UNIT=unit, EVEN_D=even, PARTS=tile.parts, GROUP=8,
        NORM_LIMIT=limit, PRECISION=precision, **tile_options(tile),
    )  # fmt: skip


@_made_once
def _bias_options(
    exclude: str, samples: bool, gather: bool, unit: int, whole: bool, even: bool, precision: str, tile: Tile
) -> Options:
    return Options(
        EXCLUDE=exclude, P_SAMPLES=samples, Q_GATHER=gather, UNIT=unit, WHOLE_D=whole, EVEN_D=even,
        PARTS=tile.parts, PRECISION=precision, **tile_options(tile),
    )  # fmt: skip


@_made_once
def _gather_options(gather: bool, unsummed: bool, unit: int) -> Options:
    return Options(GATHER=gather, UNSUMMED=unsummed, UNIT=unit, BR=16, BD=256)


@_made_once
def _mend_options(unsummed: bool, unit: int, precision: str) -> Options:
    return Options(UNSUMMED=unsummed, UNIT=unit, PRECISION=precision, BP=64, BQ=32, BD=64, BN=2048, warps=8, stages=1)


@_made_once
def _finish_options(
    columns: int, whole: bool, gather: bool, unsummed: bool, norm_inside: bool, unit: int, eps: float, limit: float
) -> Options:
    return Options(
        GATHER=gather, UNSUMMED=unsummed, NORM_INSIDE=norm_inside, WHOLE_D=whole,
        UNIT=unit, EPS=eps, NORM_LIMIT=limit, **row_blocks(columns),
    )  # fmt: skip


class TritonKernels(Kernels):
    """This backend's kernels. Row lengths and strides are in the units of tiles.py."""

    index_dtype = torch.int32

    def __init__(self, inputs: Inputs, spec: Spec) -> None:
        super().__init__(inputs, spec)
        z, w = self.inputs.features, self.inputs.prototypes
        self.arch = config.arch_of(z.device)
        self.kind = config.kind_of(z)
        self.unit = math.gcd(8, z.shape[1], z.stride(0), w.stride(0))
        """The largest common divisor of row length and row strides, up to 8."""
        self.d = z.shape[1] // self.unit
        """Row length in units."""
        self.precision = "upcast" if INTERPRETED else "ieee" if self.kind == "ieee" else "tf32"
        """Precision of float32 products; 16-bit dtypes ignore it."""
        self.aligned = config.aligned(z) and (w is z or config.aligned(w))
        self._entries_tiles: dict[tuple[bool, int], Tile] = {}
        """Tiles by (two terms, entries): cached, because every panel has a launch."""

    def _units(self, x: Tensor) -> int:
        """The row stride in units."""
        return x.stride(0) // self.unit

    # --- tiles

    def _shape(self, heavy: bool, entries: int) -> config.Shape:
        # 64-bit numbers in comparisons: labels in masks, and a label that does not fit 32 bits.
        wide = self.spec.exclude == "same_label" or not -(2**31) <= self.spec.ignore_index < 2**31
        d = self.d * self.unit
        return config.Shape(self.arch, self.kind, d, self.aligned, heavy or wide, self.spec.square, entries)

    def _blocks(self, tile: Tile, least: int = 1) -> Blocks:
        return Blocks(tile.p, tile.q, self.arch.multiprocessors * tile.resident, least, tile)

    def _loop_blocks(self, tile: Tile) -> Blocks:
        """The blocks of kernels that load whole rows if they fit the chip, and loop over the columns if not."""
        return self._blocks(tile, 1 if self._whole(tile) else FULL_WAVE)

    def _whole(self, tile: Tile) -> bool:
        return tile.d >= self.d * self.unit

    def _even(self, tile: Tile) -> bool:
        return self.d * self.unit % tile.d == 0

    def lse_blocks(self, p: Side, q: Side, both: bool) -> Blocks:
        return self._loop_blocks(config.lse_tile(self._shape(both or p.gather, p.slots * q.slots)))

    def short_blocks(self, samples: Side, classes: Side) -> Blocks | None:
        two = samples.grad is not None and classes.grad is not None
        entries = samples.x.shape[0] * classes.x.shape[0]
        tile = config.grad_tile(self._shape(two, entries))
        return None if tile is None else self._blocks(tile)

    def bias_blocks(self, p: Side, q: Side) -> Blocks:
        return self._loop_blocks(config.bias_tile(self._shape(False, p.x.shape[0] * q.slots)))

    # --- O(M d) and O(K)

    def row_rnorm(self, x: Tensor, rnorm: Tensor, label: Tensor | None) -> None:
        n, blocks = x.shape[0], row_blocks(x.shape[1])
        launch(
            norms.row_rnorm_kernel, (ceil_div(n, blocks["BR"]),),
            x, label, rnorm, n, self.d, self._units(x), self.spec.ignore_index,
            options=_row_rnorm_options(blocks["BD"], self.unit, self.eps),
        )  # fmt: skip

    def prepare_samples(self, z_rnorm: Tensor, pos: Tensor, w_rnorm: Tensor | None, mark: Tensor | None) -> None:
        z, w, spec = self.inputs.features, self.inputs.prototypes, self.spec
        m, blocks = z.shape[0], row_blocks(z.shape[1])
        launch(
            norms.prepare_samples_kernel, (ceil_div(m, blocks["BR"]),),
            z, w, self.inputs.target, self.beta, z_rnorm, pos, w_rnorm, mark,
            m, w.shape[0], self.d, self._units(z), self._units(w), spec.ignore_index,
            options=_samples_options(
                blocks["BD"], spec.exclude == "same_label", spec.symmetric, self.unit, self.eps
            ),
        )  # fmt: skip

    def compact(self, rank: Tensor, present: Tensor, k: int, slots: int) -> None:
        launch(norms.compact_kernel, (ceil_div(k, 1024),), rank, present, k, slots, options=_COMPACT)

    def half_scale(self, samples: Side, classes: Side, scale: Tensor) -> None:
        launch(
            norms.half_scale_kernel, (1,),
            classes.grad, classes.lse, samples.grad, samples.lse, samples.pos, samples.rnorm, classes.rnorm,
            self.divisor, scale, samples.x.shape[0], classes.x.shape[0],
            options=_scale_options(self.norm_limit),
        )  # fmt: skip

    # --- tiles of products

    def log_sum_exp(
        self, p: Side, q: Side, out: Tensor | None, p_partial: Partial, q_partial: Partial,
        first: int, count: int, split: int, blocks: Blocks,
    ) -> None:  # fmt: skip
        tile = blocks.tile
        if split == 1 and not self._whole(tile):
            # Anchors are shared if there is enough work. If not, the limit of registers would only make them spill.
            tile = tile._replace(resident=1)
        launch(
            lse.lse_kernel, (count * split,),
            p.x, p.rnorm, p.label, p.bias, p.used, q.x, q.rnorm, q.label, q.bias, self.beta,
            out, p.ratio, *p_partial, *q_partial,
            first, p.slots, q.slots, p.slots, self.d, self._units(p.x), self._units(q.x), p.skip, q.skip, split,
            options=_lse_options(
                self.spec.exclude, p.samples, p.gather, self.unit, self._whole(tile), self._even(tile),
                self.precision, tile,
            ),
        )  # fmt: skip

    def combine(self, partial: Partial, side: Side, out: Tensor, first: int, parts: int, keep: bool) -> None:
        launch(
            lse.combine_kernel, (ceil_div(side.slots, 64),),
            *partial, side.label if side.gather else None, side.used, out, side.ratio,
            first, parts, side.slots, side.skip,
            options=_combine_options(side.gather, keep),
        )  # fmt: skip

    def short_grad(
        self, result: Result, q: Side, part: Tensor | None, scale: Tensor | None, split: int, blocks: Blocks
    ) -> None:
        p, tile = result.side, blocks.tile
        out, dot = (result.out, result.dot) if part is None else (None, None)
        share = self.spec.symmetric and p.grad is not None and p.bias is None
        launch(
            grad.grad_kernel, (ceil_div(p.slots, tile.p) * split,),
            *_all_of(p), *_all_of(q), self.beta, scale, self.divisor, out, dot, part,
            p.slots, q.slots, p.slots, self.d, self._units(p.x), self._units(q.x), p.skip, q.skip, split,
            options=_grad_options(
                self._entry(p, q), share and config.may_share(tile, self.arch), self.unit,
                self.d * self.unit == tile.d, self.eps, self.norm_limit, self.precision, tile,
            ),
        )  # fmt: skip

    def entries(
        self, p: Side, q: Side, h: Tensor, start: int, stop: int, begin: int, end: int, scale: Tensor | None
    ) -> None:
        two = p.grad is not None and q.grad is not None
        chosen = two, (stop - start) * (end - begin)
        tile = self._entries_tiles.get(chosen)
        if tile is None:
            tile = self._entries_tiles[chosen] = config.entries_tile(self._shape(*chosen))
        launch(
            grad.entries_kernel, (ceil_div(stop - start, tile.p) * ceil_div(end - begin, tile.q),),
            *_all_of(p), *_all_of(q), self.beta, scale, self.divisor, h,
            start, stop, begin, end, self.d, self._units(p.x), self._units(q.x), h.stride(0) // 16, p.skip, q.skip,
            options=_entries_options(
                self._entry(p, q), self.unit, self._even(tile), self.norm_limit, self.precision, tile
            ),
        )  # fmt: skip

    def bias_grad(self, p: Side, q: Side, part: Tensor, split: int, blocks: Blocks) -> None:
        n, tile = p.x.shape[0], blocks.tile
        launch(
            finish.bias_grad_kernel, (ceil_div(n, tile.p) * split,),
            p.x, p.rnorm, p.label, p.bias, q.x, q.rnorm, q.label, q.used, q.lse, q.ratio, q.grad, self.beta, part,
            n, q.slots, self.d, self._units(p.x), self._units(q.x), p.skip, q.skip, split,
            options=_bias_options(
                self.spec.exclude, p.samples, q.gather, self.unit, self._whole(tile), self._even(tile),
                self.precision, tile,
            ),
        )  # fmt: skip

    def _entry(self, p: Side, q: Side) -> Entry:
        return self.spec.exclude, p.samples, p.unsummed, q.unsummed, p.gather, q.gather

    # --- kernels over rows

    def gather(self, side: Side, out: Tensor, start: int, stop: int) -> None:
        launch(
            finish.gather_kernel, (ceil_div(stop - start, 16), ceil_div(self.d * self.unit, 256)),
            side.x, side.rnorm, side.label, side.used, out,
            start, stop, self.d, self._units(side.x), side.skip,
            options=_gather_options(side.gather, side.unsummed, self.unit),
        )  # fmt: skip

    def mend(self, h: Tensor, side: Side, out: Tensor) -> None:
        blocks = ceil_div(h.shape[0], 64) * ceil_div(out.shape[1], 64)
        launch(
            finish.mend_kernel, (min(blocks, 2 * self.arch.multiprocessors),),
            h, side.x, side.rnorm, side.label, out, *h.shape, self.d, *h.stride(), self._units(side.x), side.skip,
            options=_mend_options(side.unsummed, self.unit, self.precision),
        )  # fmt: skip

    def finish(
        self, result: Result, sums: Tensor, start: int, stop: int, parts: int, scale: Tensor | None, norm_inside: bool
    ) -> None:
        side = result.side
        d = side.x.shape[1]
        blocks = row_blocks(d)
        launch(
            finish.finish_kernel, (ceil_div(stop - start, blocks["BR"]),),
            sums, side.x, side.rnorm, side.label, side.used, self.beta, scale, self.divisor, result.out, result.dot,
            start, stop, parts, side.slots * self.d, self.d, self._units(side.x), side.skip,
            options=_finish_options(
                blocks["BD"], blocks["BD"] >= d, side.gather, side.unsummed, norm_inside,
                self.unit, self.eps, self.norm_limit,
            ),
        )  # fmt: skip


def _all_of(side: Side) -> tuple[Tensor | None, ...]:
    """A side's arguments of the kernels that compute entries."""
    return side.x, side.rnorm, side.label, side.used, side.bias, side.lse, side.ratio, side.grad, side.pos
