"""Measurement: interleaved rounds, medians with quartiles, peak memory, and the device's ceilings."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from nckernels.backends import native

Step = Callable[[], Any]
Progress = Callable[[str], None]
MIN_ROUNDS = 3


@dataclass(frozen=True)
class Summary:
    """Samples of one quantity."""

    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""
    least: float
    count: int


def summary(values: list[float]) -> Summary | None:
    """The summary of some values, or None if there are none."""
    if not values:
        return None
    if len(values) == 1:
        return Summary(values[0], values[0], values[0], values[0], 1)
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Summary(median, low, high, min(values), len(values))


def clock(step: Step, device: torch.device, repeats: int = 1) -> float:
    """Seconds of one step, averaged over ``repeats`` in a row."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            step()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / repeats
    begin = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - begin) / repeats


def interleave(
    steps: dict[str, Step],
    device: torch.device,
    seconds: float,
    progress: Progress,
    always: tuple[str, ...] = (),
    sample: float = 0.0,
    most: int | None = None,
) -> list[dict[str, float]]:
    """Rounds in which every step is timed once, for about ``seconds`` or ``most`` rounds; at least three rounds.

    A step so slow that three rounds of it would not fit its share is timed in the first round only, unless it is in
    ``always``. Rounds begin with different steps, so that no step always follows the same one. On CUDA a short step
    is repeated within a sample, as in a training loop, where the host may run ahead. On a CPU it is repeated so that a
    sample takes at least ``sample`` seconds.
    """
    if not steps:
        return []
    share = seconds / (MIN_ROUNDS + 1) / len(steps)
    repeats = dict.fromkeys(steps, 1)
    rounds: list[dict[str, float]] = []
    names = list(steps)
    gc.collect()
    begin = time.perf_counter()
    while True:
        turn = len(rounds) % len(names)
        rounds.append({n: clock(steps[n], device, repeats[n]) for n in names[turn:] + names[:turn]})
        if len(rounds) == 1:
            if device.type == "cuda":
                repeats = {n: max(1, min(20, int(2e-3 / t))) for n, t in rounds[0].items()}
            else:
                repeats = {n: max(1, math.ceil(sample / t)) for n, t in rounds[0].items()}
            names = [n for n in names if n in always or rounds[0][n] <= share] or names
        progress(f"round {len(rounds)}")
        spent = time.perf_counter() - begin >= seconds or (most is not None and len(rounds) >= most)
        if len(rounds) >= MIN_ROUNDS and spent:
            return rounds


def ratios(rounds: list[dict[str, float]], name: str, to: str) -> list[float]:
    """The ratios of two steps' times within each round, which cancel drifts of the machine's speed."""
    return [r[name] / r[to] for r in rounds if name in r and to in r]


@dataclass(frozen=True)
class Memory:
    extra: int
    """Peak of live allocations during a step, gradients included, beyond those before it."""
    peak: int | None
    """Peak of all live allocations; known on CUDA only."""


@contextlib.contextmanager
def _no_stderr() -> Iterator[None]:
    """Suppress the profiler's log, which bypasses Python's stderr."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def peak_memory(step: Step, device: torch.device) -> Memory:
    """The memory of one step. The peak of the native backend's scratch, which torch does not see, is added."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
        return Memory(peak - before, peak)
    native.peak_scratch()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _no_stderr(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    live = most = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return Memory(most + native.peak_scratch(), None)


@dataclass(frozen=True)
class Ceilings:
    """The best rates that the device reached in this run, with large operands."""

    gemm: float
    """Operations per second of a square matrix product in the run's dtype."""
    copy: float
    """Bytes read plus bytes written per second by a copy that fits no cache."""
    exp: float | None
    """Exponentials per second: on a CPU measured in the cache; on CUDA 16 per clock and multiprocessor."""


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """The best of several measurements."""
    gpu = device.type == "cuda"
    n = 8192 if gpu and dtype != torch.float32 else 4096 if gpu else 1536
    a, b = torch.randn(n, n, device=device).to(dtype), torch.randn(n, n, device=device).to(dtype)
    product = _best(lambda: torch.mm(a, b), device)
    source = torch.empty((1 << 30) if gpu else (1 << 27), dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    copied = _best(lambda: target.copy_(source), device)
    return Ceilings(2 * n**3 / product, 2 * source.numel() / copied, _exp_rate(device))


def _exp_rate(device: torch.device) -> float | None:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        kilohertz = getattr(properties, "clock_rate", None)  # missing in older versions of torch
        return None if not kilohertz else 16.0 * properties.multi_processor_count * kilohertz * 1e3
    x, out = torch.randn(1 << 16), torch.empty(1 << 16)
    return (1 << 16) / _best(lambda: torch.exp(x, out=out), device)


def _best(step: Step, device: torch.device) -> float:
    clock(step, device)
    return min(clock(step, device) for _ in range(7))
