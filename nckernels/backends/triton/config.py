"""Tile sizes and launch shapes: one small table per kernel, chosen offline, without a search at run time.

``tuned/sm_80.json`` and its siblings hold the entries for aligned rows, one file per generation of tensor cores. The
functions below are the rules that wrote the first version of the files; they also serve shapes without an entry.
``python -m benchmarks tune`` measures on a device and rewrites its file. ``tools/check_triton.py`` compiles every
kernel with its entry, and fails on a register spill or on more shared or tensor memory than the device has. The rules
of thumb:

* A tile of float32 products costs ``p * q / (32 * warps)`` registers per thread, and its epilogue about the same again,
  unless it processes the columns in ``parts``. 255 is the limit; 128 lets two programs share a
  multiprocessor, so that one computes exponentials while the other feeds the tensor cores.
* Shared memory holds ``stages`` blocks of both operands: ``stages * (p + q) * d * itemsize`` bytes.
* Rows of at most ``whole`` columns fit on the chip; then a program reads its anchors once.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..tiled.kernels import tf32

Kind = Literal["half", "tf32", "ieee"]
TABLES = Path(__file__).with_name("tuned")


class Arch(NamedTuple):
    """The resources of a device; ``generation`` is 80, 90, 100, ... or 0 for devices that are not NVIDIA's."""

    generation: int
    multiprocessors: int
    shared: int
    """Bytes of shared memory that one program may use."""


class Tile(NamedTuple):
    p: int
    """Anchors per program."""
    q: int
    """Rows of the reduced operand per iteration."""
    d: int
    """Columns per iteration; at least the row length where whole rows are loaded."""
    warps: int
    stages: int
    parts: int = 1
    """The epilogue processes q / parts columns at a time."""
    resident: int = 1
    """Programs that fit on a multiprocessor."""


INTERPRETER = Arch(generation=0, multiprocessors=4, shared=1 << 30)


@cache
def _cuda_arch(index: int) -> Arch:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        return Arch(0, properties.multi_processor_count, 64 << 10)
    generation = 10 * properties.major + properties.minor
    # Older versions of torch do not have the opt-in limit; the smallest devices have 99 KB.
    shared = getattr(properties, "shared_memory_per_block_optin", 99 << 10)
    return Arch(generation, properties.multi_processor_count, shared)


def arch_of(device: torch.device) -> Arch:
    if device.type != "cuda":
        return INTERPRETER
    return _cuda_arch(torch.cuda.current_device() if device.index is None else device.index)


def kind_of(x: Tensor) -> Kind:
    """The precision of products; float32 follows torch's setting for float32 matrix products."""
    if x.dtype != torch.float32:
        return "half"
    return "tf32" if tf32() else "ieee"


def aligned(x: Tensor) -> bool:
    """Whether rows start and end at multiples of 16 bytes, as full-width asynchronous copies require."""
    numbers = 16 // x.element_size()
    return x.shape[1] % numbers == 0 and x.stride(0) % numbers == 0 and x.data_ptr() % 16 == 0


def padded(d: int) -> int:
    """The width of a block that holds whole rows of d: a power of two, at least 16 for the tensor cores."""
    return max(16, 1 << (d - 1).bit_length())


class Shape(NamedTuple):
    """The properties of a problem that determine its tile."""

    arch: Arch
    kind: Kind
    d: int
    aligned: bool
    """Whether the rows of both operands are, see the function of that name."""
    heavy: bool
    """Whether registers are short: two directions at once, 64-bit labels to compare, gathered anchors."""
    square: bool = False
    """Whether both operands have labels to skip, which takes a few registers."""
    entries: int = 0
    """Number of entries that the tiles cover."""

    @property
    def whole(self) -> int:
        return padded(self.d)

    @property
    def family(self) -> int:
        """The tensor cores: 90 wgmma, 100 tcgen05, 80 mma (also newer consumer devices), 0 not NVIDIA."""
        generation = self.arch.generation
        return generation // 10 * 10 if generation in range(90, 120) else min(generation, 80)

    @property
    def fills_device(self) -> bool:
        """Whether there is at least one 128 x 256 tile per multiprocessor."""
        return self.entries >= 128 * 256 * self.arch.multiprocessors

    def key(self, kernel: str) -> str:
        """The key of a table's entry: kind, row length, and the other properties that the rules below read."""
        length = self.whole if self.whole <= 512 else 1024 if self.d >= 1024 else 512
        name = f"{self.kind} {length} heavy" if self.heavy else f"{self.kind} {length}"
        if kernel == "lse" and self.square:
            return name + " square"
        return name + " full" if kernel == "entries" and self.fills_device else name


@cache
def table(family: int, kernel: str) -> dict[str, Tile | None]:
    """The entries of a kernel in the tuned file; empty for devices without a file."""
    path = TABLES / f"sm_{family}.json"
    if not path.exists():
        return {}
    entries = json.loads(path.read_text())["tiles"].get(kernel, {})
    return {key: None if fields is None else Tile(*fields) for key, fields in entries.items()}


def tuned(rule: Callable[[Shape], Any]) -> Callable[[Shape], Any]:
    """Decorate a rule: use the table's entry if there is one."""
    kernel = rule.__name__.removesuffix("_tile")

    @wraps(rule)
    def choose(shape: Shape) -> Tile | None:
        if shape.aligned:
            entries, key = table(shape.family, kernel), shape.key(kernel)
            if key in entries:
                return entries[key]
        return rule(shape)

    return choose


@tuned
def lse_tile(shape: Shape) -> Tile:
    """For ``lse_kernel``."""
    whole, heavy = shape.whole, shape.heavy
    if not shape.aligned:
        # Loads go through registers, so the tile is small. Callers who pad d to a multiple of 8 are faster.
        return Tile(64, 64, min(whole, 32), 8, 1, parts=2 if shape.kind == "ieee" else 1)
    if shape.family == 0:
        return Tile(64, 64, min(whole, 64 if shape.kind == "half" else 32), 4, 2)
    if shape.kind == "ieee":
        return Tile(64, 64, min(whole, 16), 8, 2, parts=2)
    if shape.kind == "tf32":
        if shape.family == 80:
            return Tile(64, 64, min(whole, 32), 4, 3, resident=2)
        if shape.family == 100:
            # With column parts, labels on both sides make Triton 3.6 spill.
            return Tile(128, 64, min(whole, 32), 8, 3, parts=1 if shape.square else 2)
        return Tile(128, 64, min(whole, 32), 8, 3, parts=2, resident=1 if heavy else 2)
    if shape.family == 80:
        # Warps are laid out in both directions of the tile, so the epilogue's sums over q cross warps.
        if whole <= 64:
            return Tile(64, 128, whole, 4, 3, parts=2, resident=2)
        if whole <= 256:
            return Tile(64, 64, whole, 4, 2, resident=2 if whole == 128 else 1)
        return Tile(64, 128, 32, 4, 4, parts=2, resident=2)
    stages = 2 if whole in (128, 256) else 3
    if shape.family == 100:
        if heavy:
            return Tile(128, 64, whole if whole <= 256 else 64, 8, stages)
        if whole <= 128:
            # With four warps a thread holds one row of the tile, and no sum crosses threads.
            return Tile(128, 64, whole, 4, stages, parts=2, resident=2)
        return Tile(128, 128, whole if whole == 256 else 64, 8, stages, parts=4)
    if heavy or whole == 256:
        return Tile(128, 128, whole if whole <= 256 else 64, 8, stages, parts=4)
    if whole <= 64:
        return Tile(128, 64, whole, 8, stages, parts=2, resident=2)
    if whole == 128:
        return Tile(128, 64 if shape.square else 128, 128, 8, stages, parts=2 if shape.square else 4, resident=2)
    return Tile(128, 128, 64, 8, stages, parts=8, resident=2)


@tuned
def bias_tile(shape: Shape) -> Tile:
    """For ``bias_grad_kernel``, which is rarely used: a tile that compiles well everywhere."""
    if not shape.aligned or shape.family == 0:
        return lse_tile(shape)
    if shape.kind == "half":
        return Tile(64, 32, min(shape.whole, 64), 8, 2)
    return Tile(64, 64, min(shape.whole, 32 if shape.kind == "tf32" else 16), 8, 2, parts=2)


@tuned
def entries_tile(shape: Shape) -> Tile:
    """For ``entries_kernel``, which loops over the columns for every d."""
    heavy = shape.heavy
    if not shape.aligned:
        return Tile(64, 64, 32, 8, 1, parts=2 if shape.kind == "ieee" else 1)
    if shape.family == 0:
        return Tile(64, 64, 64 if shape.kind == "half" else 32, 4, 2)
    if shape.kind == "ieee":
        return Tile(64, 64, 16, 8, 2, parts=4)
    if shape.kind == "tf32":
        if shape.family == 80:
            return Tile(64, 64, 32, 4, 3, resident=2)
        return Tile(128, 64, 32, 8, 3, parts=2, resident=1 if heavy else 2)
    if shape.family == 80:
        return Tile(64, 128, 32, 4, 4, parts=4, resident=3)
    if shape.family == 90 and shape.d >= 1024 and shape.fills_device and not heavy:
        # A third less traffic from the L2 cache; with long rows the epilogue matters less.
        return Tile(128, 256, 64, 8, 3, parts=4)
    return Tile(128, 128, 64, 8, 3, parts=8, resident=2)


def may_share(tile: Tile, arch: Arch) -> bool:
    """Whether ``grad_kernel`` also gets the code path with one exponential per entry instead of two.

    It pays where exponentials take as long as the tensor cores' products: on an H100 the two exponentials of an entry
    (16 per clock) take as long as its two products over 128 columns (4096 operations per clock). The additional path
    needs registers, and on sm_100 none are left.
    """
    return tile.d <= 128 and arch.generation < 100


@tuned
def grad_tile(shape: Shape) -> Tile | None:
    """For ``grad_kernel``; None if rows are too long for it, so that panels of entries are used."""
    whole, heavy = shape.whole, shape.heavy
    if not shape.aligned:
        return Tile(32, 32, whole, 8, 1) if whole <= 128 and shape.kind != "ieee" else None
    if shape.family == 0:
        return Tile(64, 32, whole, 4, 1) if whole <= 128 and shape.kind == "half" else None
    if shape.kind == "ieee":
        return Tile(32, 32, whole, 4, 2) if whole <= 64 else None
    if shape.kind == "tf32":
        return Tile(64, 32, whole, 8, 2) if whole <= 128 else None
    if whole > 256:
        return None
    if shape.family == 80:
        if whole <= 64:
            return Tile(64, 32, whole, 8 if heavy else 4, 3)
        if whole == 128:
            return Tile(64, 32, 128, 8 if heavy else 4, 2)
        return Tile(32, 32, 256, 8, 2) if heavy else Tile(64, 32, 256, 8, 2)
    if whole <= 128:
        # With two stages, labels on both sides make Triton 3.9 spill on sm_100.
        return Tile(128, 32 if heavy else 64, whole, 8, 3 if heavy and whole <= 64 and shape.family == 100 else 2)
    return Tile(64, 32 if heavy and shape.family == 90 else 64, 256, 8, 2)


@tuned
def pairs_lse_tile(shape: Shape) -> Tile:
    """For ``pairs_lse_kernel``."""
    whole = shape.whole
    if shape.aligned and shape.kind == "half":
        if shape.family == 100 and whole <= 128:
            # With four warps a thread holds one row of the tile, and no sum crosses threads. Without a limit it takes
            # 118 registers; with one of 255 the compiler spills.
            return Tile(128, 64, whole, 4, 2, parts=4)
        if shape.family == 80 and whole <= 64:
            return Tile(64, 64, whole, 4, 2)
        if shape.family == 80 and whole == 256:
            return Tile(64, 64, whole, 8, 2)  # with four warps decoupled SupCon spills
    return lse_tile(shape._replace(heavy=False, square=True))


@tuned
def pairs_grad_tile(shape: Shape) -> Tile | None:
    """For ``pairs_grad_kernel``; None if rows are too long for it.

    A thread has two rows of a tile, whatever its size, and instructions for every column; hence as many columns as
    registers allow.
    """
    whole, longest = shape.whole, 64 if shape.family == 80 else 128
    if shape.aligned and shape.kind == "half" and shape.family > 0 and whole <= longest:
        return Tile(128, 64, whole, 8, 2)
    return grad_tile(shape._replace(heavy=True))


class PanelTile(NamedTuple):
    """A tile of stored products."""

    p: int
    q: int
    warps: int
    most_parts: int
    """The most programs that may share an anchor's sum; a power of two."""


_PANEL_TILE = PanelTile(16, 256, 8, 16)


def panel_tile() -> PanelTile:
    """For the kernels of panel.py: rows of 1 KB for wide loads, and 16 numbers per thread; 32 spill on sm_80."""
    return _PANEL_TILE
