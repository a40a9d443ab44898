"""python -m benchmarks tune --device cuda: measure the tiles of the Triton kernels and write this GPU's table.

Starts from the current table, runs a few problems forward and backward, and records the entries that each of them uses.
Then it changes one number of an entry at a time and keeps changes that make the whole step faster. Tiles that do not
compile, do not fit or give other results are skipped. Afterwards run tools/check_triton.py --arch and the GPU tests.

--defaults needs no GPU: it writes all tables by the rules in nckernels/backends/triton/config.py.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import torch
from tqdm import tqdm

import nckernels
from nckernels.backends import tiled

from .harness import relative_error, runner
from .measure import clock
from .problems import Problem, samples
from .variants import our_loss

FAMILIES = (80, 90, 100)
KERNELS = ("lse", "bias", "entries", "grad", "pairs_lse", "pairs_grad")
_GAIN = 0.98
"""A new tile is accepted if the step takes at most this share of the time."""
_BF16, _FP32 = torch.bfloat16, torch.float32
WORKLOADS = (
    (Problem("nonl", 8192, 1000, 2048), _BF16),
    (samples("supcon", 16384, 128), _BF16),
    (Problem("normface", 8192, 21841, 2048), _BF16),
    (samples("clip", 8192, 512), _BF16),
    (Problem("nonl", 8192, 1000, 64), _BF16),
    (Problem("nonl", 8192, 1000, 256), _BF16),
    (Problem("nonl", 8192, 1000, 2048), _FP32),
    (samples("supcon", 8192, 128), _FP32),
)

Tables = dict[str, dict[str, Any]]
"""kernel -> name of an entry -> Tile, or None where the kernel is not used."""


def main(argv: list[str]) -> int:
    """Tune, or write the defaults; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--budget", type=float, default=240.0, help="seconds in all: 240")
    parser.add_argument("--out", type=Path, help="folder for the table: the package's own")
    parser.add_argument("--defaults", action="store_true", help="write the rules' tables for all families")
    args = parser.parse_args(argv)
    try:
        from nckernels.backends.triton import config
    except ImportError as error:
        raise SystemExit(f"tune needs Triton: {error}") from error
    folder = args.out or config.TABLES
    if args.defaults:
        for family in FAMILIES:
            print(write(folder, family, defaults(config, family), "rules"))
        return 0
    device = torch.device(args.device)
    if device.type != "cuda" or not torch.cuda.is_available():
        raise SystemExit("tune needs a CUDA device; --defaults writes the rules' tables without one")
    family = config.Shape(config.arch_of(device), "half", 128, True, False).family
    if family not in FAMILIES:
        raise SystemExit(f"no table for sm_{family}: the families are {FAMILIES}")
    tables = defaults(config, family)
    for kernel in KERNELS:
        tables[kernel].update(config.table(family, kernel))
    gains = _measure(config, tables, device, args.budget)
    print(*gains, sep="\n")
    print(write(folder, family, tables, torch.cuda.get_device_name(device)))
    return 0


def defaults(config: Any, family: int) -> Tables:
    """The rules' tiles for every kind, row length, and weight of the epilogue."""
    tables: Tables = {kernel: {} for kernel in KERNELS}
    arch = config.Arch(family, 1, 0)
    kinds, lengths, either = get_args(config.Kind), (16, 32, 64, 128, 256, 512, 1024), (False, True)
    for kernel in KERNELS:
        rule = getattr(config, f"{kernel}_tile").__wrapped__
        for kind, d, heavy, square, full in itertools.product(kinds, lengths, either, either, either):
            shape = config.Shape(arch, kind, d, True, heavy, square=square, entries=1 << 40 if full else 0)
            tables[kernel][shape.key(kernel)] = rule(shape)
    return tables


def write(folder: Path, family: int, tables: Tables, source: str) -> Path:
    """Write a table with one entry per line, for readable diffs."""
    names: list[str] = []
    blocks = []
    for kernel, entries in tables.items():
        rows = []
        for key, tile in entries.items():
            names = names or (list(tile._fields) if tile is not None else [])
            rows.append(f"   {json.dumps(key)}: {json.dumps(None if tile is None else list(tile))}")
        blocks.append(f"  {json.dumps(kernel)}: {{\n" + ",\n".join(rows) + "\n  }")
    head = f' "source": {json.dumps(source)},\n "fields": {json.dumps(names)},\n "tiles": {{\n'
    path = folder / f"sm_{family}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + head + ",\n".join(blocks) + "\n }\n}\n")
    return path


class Recorder(dict[str, Any]):
    """A table that records the entries that are looked up."""

    def __init__(self, entries: dict[str, Any]) -> None:
        super().__init__(entries)
        self.used: list[str] = []

    def __contains__(self, key: object) -> bool:
        if isinstance(key, str) and key not in self.used:
            self.used.append(key)
        return super().__contains__(key)


def _measure(config: Any, tables: Tables, device: torch.device, budget: float) -> list[str]:
    """Tune every workload's entries in place; returns a line with the gain of each."""
    begin, gains = time.perf_counter(), []
    torch.set_float32_matmul_precision("high")
    live = {kernel: Recorder(entries) for kernel, entries in tables.items()}
    original, fits = config.table, tiled.fits
    config.table = lambda _, kernel: live[kernel]
    tiled.fits = lambda *_: False  # long rows in two passes, which have tiles; panels are library products
    try:
        with tqdm(WORKLOADS, unit="problem", disable=None) as bar:
            for i, (problem, dtype) in enumerate(bar):
                bar.set_description_str(f"{problem} {dtype}")
                deadline = time.perf_counter() + (budget - time.perf_counter() + begin) / (len(WORKLOADS) - i)
                gains.append(f"{problem}, {dtype}: {_tune_one(problem, dtype, device, live, deadline)}")
    finally:
        config.table, tiled.fits = original, fits
        original.cache_clear()
    for kernel in KERNELS:
        tables[kernel].update(live[kernel])
    return gains


def _tune_one(
    problem: Problem, dtype: torch.dtype, device: torch.device, live: dict[str, Recorder], deadline: float
) -> str:
    leaves, target = problem.tensors(device, dtype)
    function = our_loss(problem)
    for recorder in live.values():
        recorder.used.clear()

    def step() -> Any:
        with nckernels.use_backend("triton"):
            return runner(function, leaves, target, False)()

    try:
        expected = [x.double() for x in step()]
    except Exception as error:  # cannot tune a kernel that fails
        return f"fails: {type(error).__name__}: {str(error)[:100]}"

    def cost() -> float:
        try:
            if not relative_error(step(), tuple(expected)) < 2e-2:
                return float("inf")
            return statistics.median(clock(step, device, 3) for _ in range(9))
        except Exception:  # does not compile, or does not fit
            return float("inf")

    before = cost()
    after = search(live, [(k, key) for k, r in live.items() for key in r.used], cost, deadline)
    return f"{before * 1e3:.3f} ms -> {after * 1e3:.3f} ms"


def search(
    tables: dict[str, Recorder], entries: list[tuple[str, str]], cost: Callable[[], float], deadline: float
) -> float:
    """Change one number of one entry at a time while that reduces the cost and time is left; return the cost."""
    best = cost()
    for kernel, key in entries:
        improved = True
        while improved and time.perf_counter() < deadline:
            improved = False
            current = tables[kernel].get(key)
            for candidate in () if current is None else neighbours(current):
                if time.perf_counter() >= deadline:
                    break
                tables[kernel][key] = candidate
                if (found := cost()) < best * _GAIN:
                    best, current, improved = found, candidate, True
                tables[kernel][key] = current
    return best


def neighbours(tile: Any) -> Iterator[Any]:
    """Tiles that differ in one number, or in both sides, likeliest gains first."""
    for stages in (tile.stages - 1, tile.stages + 1):
        if 1 <= stages <= 5:
            yield tile._replace(stages=stages)
    for resident in {1, 2, 3} - {tile.resident}:
        yield tile._replace(resident=resident)
    for parts in (tile.parts // 2, tile.parts * 2):
        if 1 <= parts <= 8 and tile.q // max(1, parts) >= 16:
            yield tile._replace(parts=parts)
    yield tile._replace(warps=12 - tile.warps)  # 4 or 8
    for p, q in ((64, 64), (64, 128), (128, 64), (128, 128), (128, 256), (256, 128)):
        if (p, q) != (tile.p, tile.q) and q // tile.parts >= 16:
            yield tile._replace(p=p, q=q)
