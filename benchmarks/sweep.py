"""python -m benchmarks --suite sweep: every loss and option at random sizes, against naive eager, on the CPU.

Each form of a loss gets a few log-uniform sizes, half of them multiples of 32; the same seed draws the same problems.
Our loss, with the automatically chosen backend, and the naive form are checked and timed in turns, forward and
backward; short steps are repeated within a sample. Problems slower than naive are measured a second time at the end,
and the better result counts, so that a problem counts as slower only if it was slower twice.
"""

from __future__ import annotations

import math
import random
import time
from collections import defaultdict

import torch
from tqdm import tqdm

from . import harness, report
from .harness import Measured, Result
from .measure import interleave, ratios, summary
from .naive import FORMS
from .problems import PROTOTYPE_LOSSES, Options, Problem, paired
from .rivals import BASELINE, naive
from .variants import our_loss

OURS = "nckernels"
NOISE = 0.05
_NONE: Options = (("reduction", "none"),)
_LEARNABLE: Options = (("learnable", True),)
_SMOOTHING: Options = (("label_smoothing", 0.1),)
_ARCFACE: Options = (("angular_margin", 0.3),)
_WEIGHT: Options = (("weight", True),)
_IGNORED: Options = (("ignored", 0.2),)
_QUEUE: Options = (("frozen", True),)
_DECOUPLED: Options = (("decoupled", True),)
OPTIONS: dict[str, tuple[Options, ...]] = {
    "nonl": (
        *((), _NONE, _LEARNABLE, (("direction", "instance"),), (("direction", "both"),)),
        *((("direction", "instance"), *_NONE), (("direction", "both"), *_NONE)),
    ),
    "ntce": ((), _NONE, _LEARNABLE),
    "normface": (
        *((), _NONE, _LEARNABLE, _WEIGHT, _IGNORED, _SMOOTHING, _ARCFACE, (("cosine_margin", 0.2),)),
        *(_SMOOTHING + _ARCFACE, _SMOOTHING + _WEIGHT, _SMOOTHING + _IGNORED, _SMOOTHING + _NONE, _ARCFACE + _NONE),
        *(_SMOOTHING + _LEARNABLE, _WEIGHT + _NONE),
    ),
    "info_nce": ((), _NONE, _LEARNABLE, _QUEUE, _QUEUE + _NONE),
    "clip": ((), _NONE, _LEARNABLE),
    "supcon": ((), _NONE, _LEARNABLE, _DECOUPLED),
    "simclr": ((), _NONE, _DECOUPLED),
    "uniformity": ((),),
    "prototype": ((), _NONE),
    "dot_regression": ((), _NONE),
}
LOSSES = tuple(OPTIONS)
assert set(LOSSES) == set(FORMS)
_ROUNDS = 30
_SAMPLE = 1e-3
"""Least seconds per sample."""
_AGAIN = 0.25
"""Share of the budget for the second measurement of slower problems."""


def problems(seed: int, losses: tuple[str, ...] = LOSSES, draws: int = 3) -> list[Problem]:
    """Every form at ``draws`` sizes, in random order."""
    rng = random.Random(seed)
    drawn = [_drawn(loss, options, rng) for _ in range(draws) for loss in LOSSES for options in OPTIONS[loss]]
    rng.shuffle(drawn)
    return [p for p in dict.fromkeys(drawn) if p.loss in losses]


def _drawn(loss: str, options: Options, rng: random.Random) -> Problem:
    multiple = 32 if rng.random() < 0.5 else 1

    def size(low: int, high: int) -> int:
        value = math.exp(rng.uniform(math.log(low), math.log(high)))
        return max(low, round(value / multiple) * multiple)

    d = size(64, 512)
    if loss in (*PROTOTYPE_LOSSES, "dot_regression"):
        return Problem(loss, size(32, 4096), size(10, 1000), d, options)
    n = 2 * (size(64, 2048) // 2)
    if loss == "info_nce":
        return Problem(loss, n, n + size(1024, 8192) if options[:1] == _QUEUE else n, d, options)
    k = {"clip": n, "uniformity": 1}.get(loss) or size(8, max(9, n // 4))
    return paired(Problem(loss, n, k, d, options))


def run(
    dtype: torch.dtype, name: str, command: str, budget: float, seed: int, losses: tuple[str, ...]
) -> report.Report:
    """Measure all problems in one dtype, within a budget of seconds."""
    device, begin = torch.device("cpu"), time.perf_counter()
    result = report.start("sweep", device, name, command, None)
    chosen = problems(seed, losses)
    with tqdm(chosen, unit="problem", disable=None) as bar:
        for i, problem in enumerate(bar):
            left = (1 - _AGAIN) * budget - (time.perf_counter() - begin)
            if left <= 0:
                result.notes.append(f"not run, the budget is spent: {len(chosen) - i} of {len(chosen)} problems")
                break
            bar.set_description_str(str(problem))
            share = left * problem.weight / sum(p.weight for p in chosen[i:])
            result.measured.append(measure(problem, dtype, share))
    slow = [m for m in result.measured if (ratio(m) or 0.0) > 1.0]
    for i, found in enumerate(sorted(slow, key=lambda m: m.problem.weight)):
        left = budget - (time.perf_counter() - begin)
        again = measure(found.problem, dtype, max(left, 0.0) / (len(slow) - i))
        if (ratio(again) or 0.0) < (ratio(found) or 0.0):
            found.results = again.results
    return result


def measure(problem: Problem, dtype: torch.dtype, seconds: float) -> Measured:
    """Check both forms of one problem, then time them in turns. A wrong result of ours is not timed."""
    device, begin = torch.device("cpu"), time.perf_counter()
    leaves, target = problem.tensors(device, dtype)
    expected = harness.exact(problem, leaves, target)
    functions = {OURS: our_loss(problem), BASELINE: naive(problem)}
    steps = {name: harness.runner(function, leaves, target, False) for name, function in functions.items()}
    results = {name: Result(name) for name in steps}
    for name, result in results.items():
        result.error = harness.relative_error(steps[name](), expected)
    ours, theirs = results[OURS], results[BASELINE]
    assert ours.error is not None
    assert theirs.error is not None
    # Sums that cancel, such as the temperature's gradient, are inaccurate in 16 bits in any form.
    if not ours.error <= max(harness.TOLERANCE[dtype], theirs.error):
        ours.absent = f"wrong: relative error {ours.error:.1e}, naive {theirs.error:.1e}"
        return Measured(problem, None, list(results.values()), BASELINE, str(problem))
    left = max(seconds - (time.perf_counter() - begin), 0.0)
    rounds = interleave(dict(steps), device, left, lambda _: None, always=tuple(steps), sample=_SAMPLE, most=_ROUNDS)
    for name, result in results.items():
        result.seconds = summary([r[name] for r in rounds])
        result.to_baseline = summary(ratios(rounds, name, BASELINE))
    return Measured(problem, None, list(results.values()), BASELINE, str(problem))


def ratio(measured: Measured) -> float | None:
    """The median of ours over naive; None for a wrong result."""
    ours = next(r for r in measured.results if r.variant == OURS)
    return None if ours.to_baseline is None else ours.to_baseline.median


def table(result: report.Report) -> str:
    """The problems that were slower than naive, the medians of each form, and a summary."""
    rated = sorted(((r, m) for m in result.measured if (r := ratio(m)) is not None), key=lambda pair: -pair[0])
    lines = [f"{'ours/naive':>10} {'quartiles':>11} {'ours':>8} {'naive':>8}  slower than naive, twice"]
    for value, m in rated:
        if value <= 1.0:
            break
        ours, theirs = m.results
        assert ours.to_baseline is not None
        assert ours.seconds is not None
        assert theirs.seconds is not None
        quartiles = f"{ours.to_baseline.low:.2f}-{ours.to_baseline.high:.2f}"
        times = f"{report.duration(ours.seconds.median):>8} {report.duration(theirs.seconds.median):>8}"
        lines.append(f"{value:10.2f} {quartiles:>11} {times}  {m.problem}")
    forms: dict[str, list[float]] = defaultdict(list)
    for value, m in rated:
        forms[" ".join([m.problem.loss, *(f"{a}={b}" for a, b in m.problem.options)])].append(value)
    lines += ["", f"{'least':>10} {'most':>8}  form"]
    lines += [f"{min(v):10.2f} {max(v):8.2f}  {form}" for form, v in sorted(forms.items())]
    if rated:
        above = [sum(value > limit for value, _ in rated) for limit in (1.0, 1.0 + NOISE)]
        middle = rated[len(rated) // 2][0]
        lines += ["", f"{result.dtype}: {len(rated)} problems, {above[0]} above 1.0, {above[1]} above {1 + NOISE}; "]
        lines[-1] += f"median {middle:.2f}, worst {rated[0][0]:.2f} ({rated[0][1].problem})"
    return "\n".join(lines)
