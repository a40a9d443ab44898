"""Measurement: check against float64, then interleaved timing, then peak memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

import nckernels
from nckernels.backends import native

from .problems import Problem
from .variants import BASELINE, VARIANTS, LossFunction, Variant

GEMM = "three bare GEMMs"
_CHECK = (192, 40, 64)
#: A variant is wrong beyond this relative error of its gradients on the small check; float32 rounding is
#: 1e-6 there and bfloat16 rounding of the cosines at temperature 0.1 is 2e-2.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-1, torch.float16: 2e-2, torch.float64: 1e-10}


@dataclass
class Result:
    """Forward + backward of one variant on one problem."""

    problem: Problem
    variant: str
    seconds: list[float] = field(default_factory=list)
    to_gemm: list[float] = field(default_factory=list)
    to_naive: list[float] = field(default_factory=list)
    extra_bytes: int | None = None
    absent: str | None = None


def measure(
    problem: Problem,
    device: torch.device,
    dtype: torch.dtype,
    seconds: float,
    variants: tuple[Variant, ...] = VARIANTS,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Result]:
    """All variants of one problem, in turns, for about ``seconds``.

    Every round times the three GEMMs and each variant once; ratios are taken within a round, so that they
    hold while the speed of the machine drifts.
    """
    steps: dict[str, Callable[[], None]] = {GEMM: _gemms(problem, device, dtype)}
    results = {GEMM: Result(problem, GEMM)}
    for variant in variants:
        progress(f"{problem}: checking {variant.name}")
        results[variant.name] = Result(problem, variant.name)
        absent = variant.why_not(problem, device, dtype)
        if absent is None:
            function = variant.make(problem)
            absent = check(problem.loss, function, device, dtype)
        if absent is None:
            steps[variant.name] = _step(function, *problem.tensors(device, dtype))
        results[variant.name].absent = absent

    for name, step in list(steps.items()):
        progress(f"{problem}: warming up {name}")
        try:
            step()  # compiles, fills caches
        except Exception as error:  # out of memory, or a compiler that fails at this size
            results[name].absent = _failure(error)
            del steps[name]
            continue
        results[name].extra_bytes = peak_extra_bytes(step, device) if name != GEMM else None
    deadline, rounds = time.perf_counter() + seconds, 0
    while rounds < 3 or time.perf_counter() < deadline:
        rounds += 1
        progress(f"{problem}: round {rounds}")
        times = {name: _time(step, device) for name, step in steps.items()}
        for name, value in times.items():
            results[name].seconds.append(value)
            results[name].to_gemm.append(value / times[GEMM])
            if BASELINE in times:
                results[name].to_naive.append(value / times[BASELINE])
    return list(results.values())


def check(loss: str, function: LossFunction, device: torch.device, dtype: torch.dtype) -> str | None:
    """None if loss and gradients agree with float64 on a small problem; otherwise what is wrong."""
    small = Problem(loss, *_CHECK)
    z, w, y = small.tensors(device, dtype)
    try:
        ours = (value := function(z, w, y)).detach(), *torch.autograd.grad(value, (z, w))
    except Exception as error:  # a rival that fails is reported, not fatal
        return _failure(error)
    z64, w64 = (x.detach().double().requires_grad_() for x in (z, w))
    with nckernels.use_backend("reference"):
        exact = getattr(nckernels, f"{loss}_loss")(z64, w64, y)
    expected = exact.detach(), *torch.autograd.grad(exact, (z64, w64))
    errors = [float((a.double() - b).norm() / b.norm()) for a, b in zip(ours, expected, strict=True)]
    return None if max(errors) < _TOLERANCE[dtype] else f"wrong: relative errors {errors}"


def _failure(error: Exception) -> str:
    return f"fails: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"


def peak_extra_bytes(step: Callable[[], None], device: torch.device) -> int:
    """Highest sum of live allocations during a step, above what was live before it.

    Gradients of the inputs count: they are made anew in every step. The native backend's scratch, which torch's
    allocator does not see, is added as if its peak came at the same time.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    native.peak_scratch()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    live = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak + native.peak_scratch()


def median(values: list[float]) -> float:
    """The median; NaN of nothing."""
    return statistics.median(values) if values else float("nan")


def _gemms(problem: Problem, device: torch.device, dtype: torch.dtype) -> Callable[[], None]:
    z, w, _ = (x.detach() for x in problem.tensors(device, dtype))
    s = torch.mm(z, w.T)

    def step() -> None:
        torch.mm(z, w.T)
        torch.mm(s, w)
        torch.mm(s.T, z)

    return step


def _step(function: LossFunction, z: Tensor, w: Tensor, y: Tensor) -> Callable[[], None]:
    def step() -> None:
        z.grad = w.grad = None
        function(z, w, y).backward()  # type: ignore[no-untyped-call]
        z.grad = w.grad = None

    return step


def _time(step: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin
