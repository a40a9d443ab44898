"""Measures the memory contract: workspace + O(M + K) beyond inputs and gradients, for any M x K.

The measurements run in a fresh process, which computes the peak from all allocations and releases of torch's CPU
allocator (C++ temporaries included). Memory that a call leaves allocated counts for the calls after it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import nckernels
from nckernels.backends import native

MIB = 2**20
# "O(M + K) vectors": norms, log-sum-exps, their gradients, positions, targets. 256 bytes are two dozen of
# them at least, and less than a copy of a row of any case with d > 64.
BYTES_PER_ROW = 256


@dataclasses.dataclass(frozen=True)
class Case:
    form: str
    samples: int
    classes: int
    dim: int
    workspace: int | None  # None: the default of 32 MiB
    dtype: str = "float32"
    grads: str = "xw"
    backend: str = "chunked"

    def allowed(self, bytes_per_row: int = BYTES_PER_ROW) -> int:
        return (self.workspace or 32 * MIB) + bytes_per_row * (self.samples + self.classes)


def naive(form: str, x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """The naive form: the M x K matrix and autograd."""
    logits = F.normalize(x) @ F.normalize(w).T / 0.1
    if form == "normface":
        return F.cross_entropy(logits, y)
    lse = logits.masked_fill(y[:, None] == torch.arange(len(w)), -torch.inf).logsumexp(0)
    return (lse[y] - logits.gather(1, y[:, None]).squeeze(1)).mean()


FORMS: dict[str, Callable[..., Tensor]] = {
    "nonl": nckernels.nonl_loss,
    "nonl-both": functools.partial(nckernels.nonl_loss, direction="both"),
    "ntce": nckernels.ntce_loss,
    "nonl-sparse": functools.partial(nckernels.nonl_loss, sparse=True),
    "ntce-sparse": functools.partial(nckernels.ntce_loss, sparse=True),
    "normface": nckernels.normface_loss,
    "smoothing": functools.partial(nckernels.normface_loss, label_smoothing=0.1),
    "smoothing-each": lambda *args: nckernels.normface_loss(*args, label_smoothing=0.1, reduction="none").sum(),
    "cosface": functools.partial(nckernels.normface_loss, cosine_margin=0.1),
    "arcface": functools.partial(nckernels.normface_loss, angular_margin=0.2),
    "supcon": lambda x, _, y: nckernels.supcon_loss(x, y),
    "supcon-decoupled": lambda x, _, y: nckernels.supcon_loss(x, y, decoupled=True),
    "prototype": lambda x, _, y: nckernels.prototype_loss(x, y),
    "uniformity": lambda x, *_: nckernels.uniformity_loss(x),
    "clip": lambda x, w, _: nckernels.clip_loss(x[: len(w)], w),
    "naive-normface": functools.partial(naive, "normface"),
    "naive-nonl": functools.partial(naive, "nonl"),
}

# 16384 x 4000 floats are 250 MiB.
NAIVE = [Case(form, 16384, 4000, 64, None) for form in ("naive-normface", "naive-nonl")]
DEFAULT = [Case(form, 16384, 4000, 64, None) for form in ("nonl", "ntce", "normface", "nonl-both")]
# With rows of 512 floats a copy of either input (2 or 1.5 MiB) exceeds a bound of 1.4 MiB.
SMALL = [Case(form, 1024, 768, 512, MIB) for form in ("nonl", "ntce", "normface", "nonl-both")]
OPTIONS = [Case(form, 1024, 768, 512, MIB) for form in ("cosface", "arcface", "smoothing")]
OPTIONS += [Case(form, 1024, 768, 512, MIB, backend="native") for form in ("arcface", "smoothing", "smoothing-each")]
PARTIAL = [Case("ntce", 2048, 1024, 256, MIB, grads=grads) for grads in ("x", "w", "")]
FLOAT64 = [Case("nonl", 2048, 1000, 128, MIB, "float64")]
HALF = [Case(form, 4096, 2000, 128, MIB, "bfloat16") for form in ("nonl", "normface", "smoothing")]
# A copy of the prototypes would be 24 MiB.
MANY_CLASSES = [Case(form, 512, 100_000, 64, MIB) for form in ("nonl", "ntce")]
# The prototypes take 244 MiB, and so would their dense gradient.
SPARSE = [
    Case(f"{f}-sparse", 1024, 1_000_000, 64, None, backend=b) for f, b in (("nonl", "native"), ("ntce", "chunked"))
]
# 8192 x 8192 floats are 256 MiB, a copy of the rows is 4 MiB.
CONTRASTIVE = [Case(f, 8192, 100, 128, MIB, grads="x") for f in ("supcon", "supcon-decoupled", "prototype")]
PAIRS = [Case("uniformity", 8192, 1, 128, MIB, grads="x"), Case("clip", 8192, 8192, 128, MIB)]
# Steps whose matrix is half of the workspace, in one part; in bfloat16 (a CPU that multiplies it fast) a quarter.
STEPS = [
    Case(form, 2000, 2000, 64, None, dtype, grads)
    for form, grads in (("clip", "xw"), ("supcon", "x"))
    for dtype in ("float32", "bfloat16")
]
# In several parts, of which a copy of either input would be an eighth.
STEPS += [Case(form, 4096, 2000, 128, 4 * MIB, "bfloat16") for form in ("ntce", "normface")]
# bfloat16 gradients of a step: few classes, and more, in one part; in several parts, where one of them accumulates in
# float32. The bounds have no room for float32 gradients, of 4 MiB in one part and of 8 MiB in several.
ROUNDED = [
    Case(form, 2048, classes, 512, workspace, "bfloat16", backend="native")
    for form in ("ntce", "normface")
    for classes, workspace in ((10, MIB), (100, 4 * MIB))
]
PARTS = [Case(form, 2048, 2000, 512, 4 * MIB, "bfloat16", backend="native") for form in ("ntce", "normface")]
CASES = (
    ROUNDED
    + PARTS
    + CONTRASTIVE
    + STEPS
    + PAIRS
    + NAIVE
    + DEFAULT
    + SMALL
    + OPTIONS
    + PARTIAL
    + FLOAT64
    + HALF
    + MANY_CLASSES
    + SPARSE
)
LARGE = [Case(f, 32768, 8000, 64, 8 * MIB, dtype) for f in ("nonl", "normface") for dtype in ("float32", "float64")]


def replay(call: Callable[[], object]) -> tuple[int, int]:
    """Bytes allocated beyond those at the start of the call: the peak, and those left after it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    current = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak, current


def make(case: Case, samples: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    dtype = getattr(torch, case.dtype)
    x = torch.randn(samples, case.dim, generator=g).to(dtype).requires_grad_("x" in case.grads)
    w = torch.randn(classes, case.dim, generator=g).to(dtype).requires_grad_("w" in case.grads)
    return x, w, torch.randint(classes, (samples,), generator=g)


def step(form: str, x: Tensor, w: Tensor, y: Tensor) -> None:
    value = FORMS[form](x, w, y)
    leaves = [t for t in (x, w) if t.requires_grad]
    if leaves:
        torch.autograd.grad(value, leaves)


def measure(cases: list[Case]) -> list[int]:
    """Peaks of forward and backward beyond inputs and gradients."""
    peaks, left = [], 0
    for case in cases:
        workspace = contextlib.nullcontext() if case.workspace is None else nckernels.use_workspace(case.workspace)
        with nckernels.use_backend(case.backend), workspace:
            step(case.form, *make(case, 8, 4))  # lazy initialisation
            x, w, y = make(case, case.samples, case.classes)
            native.peak_scratch()
            peak, more = replay(functools.partial(step, case.form, x, w, y))
        peak += native.peak_scratch()  # which torch does not see
        peaks.append(left + peak - sum(t.nbytes for t in (x, w) if t.requires_grad))
        left += more
    return peaks


def measured(cases: list[Case]) -> dict[Case, int]:
    """measure() in a fresh process."""
    root = str(Path(nckernels.__file__).resolve().parents[1])
    environment = {k: v for k, v in os.environ.items() if not k.startswith("NCKERNELS_")}
    environment["PYTHONPATH"] = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    arguments = json.dumps([dataclasses.asdict(case) for case in cases])
    command = [sys.executable, __file__, arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert result.returncode == 0, result.stderr
    return dict(zip(cases, json.loads(result.stdout.strip().splitlines()[-1]), strict=True))


@pytest.fixture(scope="module")
def peaks() -> dict[Case, int]:
    return measured(CASES)


def assert_within(case: Case, peak: int, bound: int) -> None:
    assert peak <= bound, f"{case}: {peak / MIB:.2f} MiB beyond inputs and gradients, allowed {bound / MIB:.2f}"


def id_of(case: Case) -> str:
    return f"{case.backend}-{case.form}-{case.samples}x{case.classes}x{case.dim}-{case.dtype}-{case.grads or 'none'}"


@pytest.mark.parametrize("case", NAIVE, ids=id_of)
def test_measurement_finds_the_matrices_of_the_naive_form(peaks: dict[Case, int], case: Case) -> None:
    """The measurement finds several M x K matrices in the naive forms, so the bounds below can fail."""
    assert peaks[case] > 2 * 4 * case.samples * case.classes > 4 * case.allowed()


def test_measurement_is_exact() -> None:
    """Known allocations: the peak of two tensors alive together, and not of two in turn."""

    def together() -> Tensor:
        first = torch.empty(MIB)  # 4 MiB
        second = torch.empty(MIB // 2)  # 2 MiB more
        return first[:1] + second[:1]

    def in_turn() -> Tensor:
        torch.empty(MIB)
        torch.empty(MIB // 2)
        return torch.empty(1)

    for call, expected in ((together, 6 * MIB), (in_turn, 4 * MIB)):
        peak, left = replay(call)
        assert expected <= peak < expected + 4096
        assert left == 0


@pytest.mark.parametrize("case", DEFAULT + SMALL + OPTIONS + PARTIAL + FLOAT64, ids=id_of)
def test_forward_and_backward_keep_to_the_workspace(peaks: dict[Case, int], case: Case) -> None:
    assert_within(case, peaks[case], case.allowed())


@pytest.mark.parametrize("case", PAIRS, ids=id_of)
def test_all_pairs_keep_to_the_workspace(peaks: dict[Case, int], case: Case) -> None:
    assert_within(case, peaks[case], case.allowed())


@pytest.mark.parametrize("case", CONTRASTIVE, ids=id_of)
def test_positives_need_a_few_copies_of_the_rows(peaks: dict[Case, int], case: Case) -> None:
    """O(N d) beyond the workspace: unit rows, gathered class sums, and their gradients."""
    assert_within(case, peaks[case], case.allowed() + 5 * 4 * case.samples * case.dim)


@pytest.mark.parametrize("case", HALF, ids=id_of)
def test_half_gradients_accumulate_in_float32(peaks: dict[Case, int], case: Case) -> None:
    """One additional float32 buffer per gradient, and nothing else of that size."""
    assert_within(case, peaks[case], case.allowed() + 4 * case.dim * (case.samples + case.classes))


@pytest.mark.parametrize("case", ROUNDED, ids=id_of)
def test_complete_gradients_are_rounded_at_once(peaks: dict[Case, int], case: Case) -> None:
    assert_within(case, peaks[case], case.allowed())


@pytest.mark.parametrize("case", PARTS, ids=id_of)
def test_one_gradient_of_parts_accumulates_in_float32(peaks: dict[Case, int], case: Case) -> None:
    rows = case.samples if case.form == "ntce" else case.classes
    assert_within(case, peaks[case], case.allowed() + 4 * case.dim * rows)


@pytest.mark.parametrize("case", STEPS, ids=id_of)
def test_steps_keep_to_the_workspace(peaks: dict[Case, int], case: Case) -> None:
    assert_within(case, peaks[case], case.allowed())


@pytest.mark.parametrize("case", MANY_CLASSES, ids=id_of)
def test_absent_classes_cost_a_few_bytes(peaks: dict[Case, int], case: Case) -> None:
    """The class direction reads the prototypes of present classes only: 64 bytes per class, not a row."""
    assert_within(case, peaks[case], case.allowed(bytes_per_row=64))


@pytest.mark.parametrize("case", SPARSE, ids=id_of)
def test_sparse_gradients_of_a_million_classes(peaks: dict[Case, int], case: Case) -> None:
    """8 MiB, gradients included."""
    whole = peaks[case] + 4 * case.classes * case.dim
    assert whole <= 8 * MIB, f"{case}: {whole / MIB:.2f} MiB beyond the prototypes"


@pytest.mark.slow
def test_large_problems() -> None:
    for case, peak in measured(LARGE).items():
        assert_within(case, peak, case.allowed())


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(measure([Case(**arguments) for arguments in json.loads(sys.argv[1])])))
