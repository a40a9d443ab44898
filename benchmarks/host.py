"""python -m benchmarks host: the host time of one step of the Triton backend, without a GPU.

A stand-in replaces the driver (standin.py), so that kernels are compiled and not launched. The times are medians of
many steps in bfloat16 with the default workspace of 80 GiB. Triton's own launches and those of
nckernels/backends/triton/dispatch.py are timed in turn.

Not included: the launch in the driver, the vendor library's matrix products, fills and sums on a device, PyTorch's
autograd. The allocator is the CPU's, set to keep freed memory as PyTorch's allocator for GPUs does.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

PROBLEMS = (
    ("nonl", 512, 10, 128),
    ("nonl", 8192, 1000, 128),
    ("nonl", 8192, 1000, 2048),
    ("nonl", 8192, 21841, 2048),
    ("supcon", 4096, 0, 128),
)
"""Loss, samples, classes, columns."""
MULTIPROCESSORS, SHARED = 132, 227 << 10  # an H100's

Launch = Callable[..., None]


def main(argv: list[str]) -> int:
    """Measure and print; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks host", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200, help="steps timed each way: 200")
    parser.add_argument("--arch", type=int, default=90, help="compute capability of the pretended GPU: 90")
    args = parser.parse_args(argv)
    os.environ.pop("TRITON_INTERPRET", None)  # kernels are compiled
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "0")  # Triton 3.9 warns if it is not set
    try:
        import triton

        from nckernels.backends.triton import config, dispatch

        from . import standin
    except ImportError as error:
        raise SystemExit(f"host needs Triton: {error}") from error
    standin.install(args.arch)
    keep_freed_memory()
    arch = config.Arch(args.arch, MULTIPROCESSORS, SHARED)

    def arch_of(device: torch.device) -> config.Arch:
        return arch

    print(f"triton {triton.__version__}, torch {torch.__version__}, sm_{args.arch}, medians of {args.steps} steps")
    print("host time without the driver's own launch, without the library's products and without autograd")
    print(f"{'loss, M, K, d':>24} {'launches':>9}   {'':9}{'us a step':>10}{'in launches':>13}{'us a launch':>13}")
    with (
        mock.patch.object(config, "arch_of", arch_of),
        mock.patch.object(torch, "zeros", torch.empty),  # the time of a CPU to fill a matrix is nobody's
    ):
        for problem in PROBLEMS:
            ways: dict[str, Launch] = {"general": general, "direct": dispatch.launch}
            for name, (launches, step, inside) in measure(problem, ways, args.steps).items():
                shown = ", ".join(map(str, problem)) if name == "general" else ""
                count = str(launches) if name == "general" else ""
                each = inside / launches
                print(f"{shown:>24} {count:>9}   {name:9}{step:10.0f}{inside:13.0f}{each:13.1f}", flush=True)
    return 0


def keep_freed_memory() -> None:
    """Allocate large blocks from a heap that does not shrink, without a system call for each block."""
    trim_threshold, mmap_max = -1, -4  # malloc.h
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


def general(
    kernel: Any, grid: tuple[int, ...], *args: Any, warps: int = 4, stages: int = 2, options: Any = None, **named: Any
) -> None:
    """A launch through Triton."""
    if options is None:
        kernel[grid](*args, **named, num_warps=warps, num_stages=stages)
    else:
        kernel[grid](*args, **options)


def _nothing(*_: Any, **__: Any) -> None:
    pass


def measure(
    problem: tuple[str, int, int, int], ways: dict[str, Launch], steps: int
) -> dict[str, tuple[int, float, float]]:
    """For each way to launch: launches per step, microseconds per step, and microseconds in launches."""
    from nckernels.backends.triton import launch

    one = _step(*problem)
    whole: dict[str, list[float]] = {name: [] for name in ways}
    inside: dict[str, list[float]] = {name: [] for name in ways}
    launches = 0
    spent = 0.0

    def timed(way: Launch) -> Launch:
        def timed_launch(*args: Any, **options: Any) -> None:
            nonlocal launches, spent
            begin = time.perf_counter()
            way(*args, **options)
            spent += time.perf_counter() - begin
            launches += 1

        return timed_launch

    with mock.patch.object(launch.TritonKernels, "matmul", _nothing):
        for i in range(-3, steps):  # the first ones compile
            for name, way in ways.items():
                with mock.patch.object(launch, "launch", way):
                    begin = time.perf_counter()
                    one()
                    whole[name].append(time.perf_counter() - begin)
                launches, spent = 0, 0.0
                with mock.patch.object(launch, "launch", timed(way)):
                    one()
                inside[name].append(spent)
                if i < 0:
                    whole[name].clear()
                    inside[name].clear()
    middle = statistics.median
    return {name: (launches, 1e6 * middle(whole[name]), 1e6 * middle(inside[name])) for name in ways}


def _step(loss: str, m: int, k: int, d: int) -> Callable[[], None]:
    """A step as the backend takes it, on tensors whose memory is never read."""
    from nckernels.backends.base import Inputs, Needs, Reduced, Spec
    from nckernels.backends.registry import SHARE_OF_DEVICE
    from nckernels.backends.triton import TritonBackend

    backend, itself = TritonBackend(), loss == "supcon"
    direction, exclude = ("instance", "self") if itself else ("class", "target")
    spec = Spec(direction, exclude, not itself, -100, (80 << 30) // SHARE_OF_DEVICE, itself)  # type: ignore[arg-type]
    z = torch.empty(m, d, dtype=torch.bfloat16)
    w = z if itself else torch.empty(k, d, dtype=torch.bfloat16)
    inputs = Inputs(z, w, torch.zeros(m, dtype=torch.int64), 10.0, None, None)  # type: ignore[arg-type]
    needs, reduced = Needs(True, not itself, False, False, False), Reduced(None, True, 0.0)

    def one() -> None:
        found = backend.step(inputs, reduced, spec, needs)
        grads = [grad for grad in (found.features, found.prototypes) if grad is not None]
        backend.scaled(grads, found.loss, [grad.dtype for grad in grads], in_place=True)

    assert backend.can_step(z, w, spec)
    return one
