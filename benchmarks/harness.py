"""One problem: every variant checked against float64, then timed in turns, then its memory measured."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

import nckernels
from nckernels.backends import registry
from nckernels.backends.base import accumulation_dtype

from .measure import Ceilings, Progress, Step, Summary, interleave, peak_memory, ratios, summary
from .problems import Problem, Work
from .rivals import BASELINE
from .variants import Variant, matrix, memory_room, our_loss

GEMM = "bare GEMMs"
READY = "F.cross_entropy on ready logits"
YARDSTICKS = {
    GEMM: "only the products of the naive form with autograd: three, or two for features with themselves",
    READY: "not this loss: plain PyTorch's overhead in Python and kernel launches",
}

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-1, torch.float16: 2e-2, torch.float64: 1e-10}
"""Largest accepted relative error of loss and gradients. Rounding of cosines at temperature 0.1 is a tenth of it."""
_TF32_TOLERANCE = 1e-2
_CHECK_FLOPS = {"cpu": 15e9, "cuda": 2e12}
"""For problems with more operations the check runs on fewer rows of the same length."""


@dataclass
class Result:
    """Forward + backward of one variant on one problem."""

    variant: str
    note: str = ""
    seconds: Summary | None = None
    to_gemm: Summary | None = None
    to_baseline: Summary | None = None
    extra_bytes: int | None = None
    peak_bytes: int | None = None
    error: float | None = None
    """Largest relative error, against float64, of loss and gradients."""
    absent: str | None = None

    @property
    def ours(self) -> bool:
        return self.variant.startswith("nckernels")

    @property
    def broken(self) -> bool:
        """Absent because it failed, not because it does not apply."""
        return self.absent is not None and self.absent.startswith(("wrong", "fails"))


@dataclass
class Measured:
    """A problem and its results."""

    problem: Problem
    work: Work | None
    results: list[Result]
    baseline: str = BASELINE
    checked_on: str = ""

    def share(self, result: Result, ceilings: Ceilings, *, again: bool = False) -> float | None:
        """The floor divided by the measured time."""
        if self.work is None or result.seconds is None:
            return None
        return self.work.floor(ceilings.gemm, ceilings.copy, ceilings.exp, again=again) / result.seconds.median


@dataclass
class Session:
    """The settings that all problems of a run share."""

    device: torch.device
    dtype: torch.dtype
    variants: tuple[Variant, ...]
    progress: Progress = lambda _: None
    compile_seconds: dict[str, float] = field(default_factory=dict)
    """The longest time of a first step, by variant, for variants that compile."""


Outputs = tuple[Tensor, ...]


def runner(function: Callable[..., Tensor], leaves: list[Tensor], target: Tensor, graph: bool) -> Callable[[], Outputs]:
    """A function that runs forward and backward, and returns the loss or losses and the gradients."""
    wanted = [x for x in leaves if x.requires_grad]
    upstream = torch.linspace(0.5, 1.5, len(target), device=target.device, dtype=accumulation_dtype(leaves[0].dtype))

    def run() -> Outputs:
        loss = function(*leaves, target)
        return (loss.detach(), *torch.autograd.grad(loss, wanted, upstream if loss.dim() else None))

    return _captured(run) if graph else run


def _captured(run: Callable[[], Outputs]) -> Callable[[], Outputs]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()

    def replay() -> Outputs:
        graph.replay()
        return outputs

    return replay


def build(device: torch.device, dtype: torch.dtype) -> None:
    """Run every backend once, so that backends that compile on first use do so before anything is timed."""
    for name, state in registry.explain(device, dtype).items():
        if state == "ready":
            with nckernels.use_backend(name):
                small = Problem("nonl", 32, 4, 16)
                leaves, target = small.tensors(device, dtype)
                runner(our_loss(small), leaves, target, False)()


def exact(problem: Problem, leaves: list[Tensor], target: Tensor) -> Outputs:
    """Loss and gradients in float64, every matrix in memory."""
    wide = [x.detach().double().requires_grad_(x.requires_grad) for x in leaves]
    with nckernels.use_backend("reference"):
        return runner(our_loss(problem), wide, target, False)()


def relative_error(outputs: Outputs, expected: Outputs) -> float:
    """The largest relative error, in norms, of loss and gradients; NaN if there is a NaN."""
    errors = [float((a.double() - b).norm() / b.norm()) for a, b in zip(outputs, expected, strict=True)]
    return float("nan") if any(e != e for e in errors) else max(errors)


def tolerance(variant: Variant, dtype: torch.dtype) -> float:
    return max(TOLERANCE[dtype], _TF32_TOLERANCE) if variant.tf32 else TOLERANCE[dtype]


def measure(problem: Problem, session: Session, seconds: float) -> Measured:
    """All variants of one problem, for about ``seconds`` in all."""
    begin, device, dtype = time.perf_counter(), session.device, session.dtype
    leaves, target = problem.tensors(device, dtype)
    present = int(torch.unique(target).numel())
    work = problem.work(leaves[0].element_size(), present)
    checked = problem if _affordable(problem, work, device) else problem.shrunk()
    small = (leaves, target) if checked == problem else checked.tensors(device, dtype)
    expected = exact(checked, *small)

    results = {name: Result(name, note) for name, note in YARDSTICKS.items()}
    steps: dict[str, Step] = {}
    for name, yardstick in ((GEMM, _gemms(problem, leaves)), (READY, _ready(problem, leaves, target))):
        if yardstick is None:
            del results[name]
        else:
            steps[name] = yardstick
    for variant in session.variants:
        session.progress(f"{problem}: checking {variant.name}")
        result = results[variant.name] = Result(variant.name, variant.note)
        result.absent = variant.absent(problem, device, dtype) or _too_slow_to_compile(variant, session, seconds)
        started = time.perf_counter()
        needed = result.ours or variant.name == BASELINE
        if result.absent is None and not needed and started - begin > seconds:
            result.absent = f"not reached: this problem's {seconds:.0f} s are spent: raise --budget"
        if result.absent is not None:
            continue
        try:
            run = runner(function := variant.make(problem), *small, variant.graph)
            result.error = relative_error(run(), expected)
            if not result.error <= tolerance(variant, dtype):
                result.absent = f"wrong: relative error {result.error:.1e} on {checked}"
                continue
            if checked != problem:
                run = runner(function, leaves, target, variant.graph)
                run()
            steps[variant.name] = run
        except Exception as error:  # report a rival that fails or takes too much memory, and go on
            result.absent = failure(error, device)
        if variant.compiles:
            took = time.perf_counter() - started
            session.compile_seconds[variant.name] = max(took, session.compile_seconds.get(variant.name, 0.0))
    left = max(0.2 * seconds, seconds - (time.perf_counter() - begin))
    graphs = {v.name for v in session.variants if v.graph}
    fill(results, steps, session, left, BASELINE, str(problem), without_memory=graphs | set(YARDSTICKS))
    return Measured(problem, work, list(results.values()), BASELINE, str(checked))


def fill(
    results: dict[str, Result],
    steps: dict[str, Step],
    session: Session,
    seconds: float,
    baseline: str,
    label: str,
    without_memory: set[str] = frozenset(),  # type: ignore[assignment]
) -> None:
    """Measure memory, then times, into ``results``; all steps but those without memory have run before."""
    for name, step in list(steps.items()):
        session.progress(f"{label}: memory of {name}")
        try:
            if name in without_memory:
                step()
            else:
                memory = peak_memory(step, session.device)
                results[name].extra_bytes, results[name].peak_bytes = memory.extra, memory.peak
        except Exception as error:  # out of memory at this size
            results[name].absent = failure(error, session.device)
            del steps[name]
    always = tuple(name for name in steps if name in (GEMM, baseline) or results[name].ours)
    rounds = interleave(steps, session.device, seconds, lambda text: session.progress(f"{label}: {text}"), always)
    for name in steps:
        results[name].seconds = summary([r[name] for r in rounds if name in r])
        results[name].to_gemm = summary(ratios(rounds, name, GEMM))
        results[name].to_baseline = summary(ratios(rounds, name, baseline))


def failure(error: Exception, device: torch.device) -> str:
    """A line for an exception; on CUDA the allocator's cache is released."""
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):  # after an error in a kernel every call fails
            torch.cuda.empty_cache()
    return f"fails: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:100]}"


def _affordable(problem: Problem, work: Work, device: torch.device) -> bool:
    fits = 6 * 8 * matrix(problem) <= memory_room(device) // 4
    return fits and work.flops <= _CHECK_FLOPS["cuda" if device.type == "cuda" else "cpu"]


def _too_slow_to_compile(variant: Variant, session: Session, seconds: float) -> str | None:
    took = session.compile_seconds.get(variant.name, 0.0)
    if took <= seconds:
        return None
    return f"compiling took {took:.0f} s before, longer than this problem's {seconds:.0f} s: raise --budget"


def _gemms(problem: Problem, leaves: list[Tensor]) -> Step | None:
    z, w = leaves[0].detach(), leaves[-1].detach()
    if z.element_size() * matrix(problem) > memory_room(z.device) // 2:
        return None
    s = torch.mm(z, w.T)

    def step() -> None:
        torch.mm(z, w.T)
        torch.mm(s, w)
        if not problem.with_itself:
            torch.mm(s.T, z)

    return step


def _ready(problem: Problem, leaves: list[Tensor], target: Tensor) -> Step | None:
    if problem.with_itself or matrix(problem) > 1 << 20:
        return None
    logits = torch.zeros(problem.m, problem.k, device=target.device, dtype=leaves[0].dtype, requires_grad=True)
    return lambda: torch.autograd.grad(F.cross_entropy(logits, target), logits)
