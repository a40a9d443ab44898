"""The processor time of each stage of a step of the native backend, on one thread.

    python -m benchmarks stages
    python -m benchmarks stages --size 8192,1000,128 --dtype float32 --loss nonl

The first run compiles a separate library with clocks in the kernels. Rates are a product's operations over the time of
its stage. Processor time is meaningful on a busy machine too, but does not include the waiting of threads.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import time
from collections.abc import Callable, Sequence

import torch

import nckernels
from nckernels.backends import native

STAGES = {
    "norms": "norms",
    "pack prototypes": "both layouts of V",
    "pack features": "both layouts of U",
    "logits": "t = U V^T",
    "exponentials": "exp(t) and its sums",
    "entries": "dL/dt",
    "rows": "dL/dU = A V",
    "columns": "dL/dV = A^T U",
    "finish": "gradients through the normalisation",
}
"""As in csrc/cpu/stages.hpp."""
PRODUCTS = ("logits", "rows", "columns")
SIZES = ((4096, 1000, 512), (8192, 1000, 128), (8192, 1000, 2048))
LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "normface": nckernels.normface_loss,
    "nonl": nckernels.nonl_loss,
    "ntce": nckernels.ntce_loss,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main(argv: list[str]) -> int:
    """Print the table; return the exit status."""
    args = _parse(argv)
    flags = os.environ.get("NCKERNELS_CXXFLAGS", "")
    os.environ["NCKERNELS_CXXFLAGS"] = f"{flags} -DNCK_STAGES".strip()
    torch.set_num_threads(1)
    nckernels.set_backend("native")
    library = native.library()
    assert library is not None
    print(f"a step of {args.loss} on one thread, ms of processor time, {library.name}, torch {torch.__version__}")
    problems = [(dtype, size) for dtype in args.dtype for size in args.size]
    columns = [_column(size, DTYPES[dtype], args.loss) for dtype, size in problems]
    titles = [f"{dtype} {', '.join(map(str, size))}" for dtype, size in problems]
    print(_table(["stage", *titles], list(zip(columns[0], *(column.values() for column in columns), strict=True))))
    return 0


def _column(size: tuple[int, int, int], dtype: torch.dtype, loss: str) -> dict[str, str]:
    """The cells of a problem's column, by row."""
    m, k, d = size
    z, w = (torch.randn(n, d).to(dtype).requires_grad_() for n in (m, k))
    y = torch.randint(k, (m,))
    entries = torch.randn(m, k).to(dtype)
    a, b = z.detach(), w.detach()

    def step() -> None:
        z.grad = w.grad = None
        LOSSES[loss](z, w, y).backward()  # type: ignore[no-untyped-call]

    def bare() -> None:
        torch.mm(a, b.T)
        torch.mm(entries, b)
        torch.mm(entries.T, a)

    rounds = max(1, int(2e10 / (m * k * d)))
    read = native._library().nckernels_stages
    times = (ctypes.c_int64 * len(STAGES))()
    step()
    read(times)  # discards the times of the first call
    whole = _seconds(step, rounds)
    read(times)
    seconds = {name: 1e-9 * t / rounds for name, t in zip(STAGES, times, strict=True)}
    bare()
    products = _seconds(bare, rounds)
    work = 2.0 * m * k * d

    def cell(name: str) -> str:
        rate = f" ({1e-9 * work / seconds[name]:.0f} GFLOP/s)" if name in PRODUCTS else ""
        return f"{1e3 * seconds[name]:.2f}{rate}"

    rows = {f"{name}: {what}" if name != what else name: cell(name) for name, what in STAGES.items()}
    rows["outside the library"] = f"{1e3 * (whole - sum(seconds.values())):.2f}"
    rows["the step"] = f"{1e3 * whole:.2f}"
    rows["three bare products of torch"] = f"{1e3 * products:.2f} ({3e-9 * work / products:.0f} GFLOP/s)"
    rows["ratio"] = f"{whole / products:.2f}"
    return rows


def _seconds(run: Callable[[], None], rounds: int) -> float:
    """Processor time of one call."""
    start = time.thread_time()
    for _ in range(rounds):
        run()
    return (time.thread_time() - start) / rounds


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _size(text: str) -> tuple[int, int, int]:
    m, k, d = (int(part) for part in text.split(","))
    return m, k, d


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks stages", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=_size, nargs="+", metavar="M,K,d", default=SIZES, help="three sizes")
    parser.add_argument("--dtype", nargs="+", choices=tuple(DTYPES), default=list(DTYPES), help="both")
    parser.add_argument("--loss", choices=tuple(LOSSES), default="normface", help="normface")
    return parser.parse_args(argv)
