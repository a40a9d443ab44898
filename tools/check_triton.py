"""Compile every Triton kernel without a GPU, and check the compiler's results.

    python tools/check_triton.py [--arch 90] [--only grad_kernel] [--jobs 2]

The backend's own launch code runs on small CPU tensors, with its launch function replaced by a recorder, and with the
tiles that ``config.py`` chooses for the architecture. The tool compiles the products of all ``scenarios``. Of the other
recorded kernels, and of those of many ``drawn`` problems, it compiles as many as it takes that every two values of a
kernel's parameters that meet in a launch meet in a compiled kernel. With --quick it compiles a few kernels of the
``scenarios``.

It exits with 1 if a kernel spills registers (one that only ``drawn`` problems launch, more than FEW_BYTES), needs more
shared or tensor memory than the device has, stores a panel two bytes at a time, or has a matrix product that does not
run on tensor cores (except float32 at "highest", which must run as fused multiply-adds).

The row of a kernel without findings is kept in out/check_triton. The kernel is compiled again when its source, its
specialisation, Triton or this file changes.
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ["TRITON_DEFAULT_FP_FUSION"] = "0"  # the future default of Triton
os.environ.pop("TRITON_INTERPRET", None)  # the kernels must be compiled, not interpreted
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource

from nckernels.backends import quack
from nckernels.backends import triton as triton_backend
from nckernels.backends.base import Inputs, Needs, OutputGrads, Reduced, Spec
from nckernels.backends.triton import TritonBackend, config, dispatch, launch

KEPT = Path(__file__).resolve().parents[1] / "out" / "check_triton"
SHARED_KB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
TENSOR_MEMORY_COLUMNS = 512
FEW_BYTES = 64
"""Spills of a rare specialisation that are no failure: a few registers outside of what most callers launch, or in what
is rarely executed. Often the assembler prefers them to fewer programs on a multiprocessor."""
TENSOR_CORES = re.compile(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)")
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
KERNELS_WITH_PRODUCT = (
    "lse_kernel", "grad_kernel", "entries_kernel", "bias_grad_kernel", "mend_kernel", "pairs_lse_kernel",
    "pairs_grad_kernel",
)  # fmt: skip


@dataclass(frozen=True)
class Scenario:
    """One call of the backend, forward and backward."""

    dtype: torch.dtype
    d: int
    direction: str = "class"
    exclude: str = "target"
    m: int = 256
    k: int = 192
    precision: str = "high"
    present_only: bool = False
    bias: bool = False
    busy: bool = False
    """Pretend that the device has one multiprocessor, so that programs process whole rows, without partial sums."""
    itself: bool = False
    """Features against themselves."""
    shifted: bool = False
    """Operands begin 8 bytes past a multiple of 16, as slices of the columns of a wider matrix may."""
    step: bool = False
    """Loss and gradient in one step, and their scaling by the upstream gradient."""
    epilogue: bool = False
    """The step uses a product with an epilogue, which ``check_quack.py`` compiles."""
    wanted: str = "zwbo"
    """The wanted gradients: z features, w prototypes, b beta, o bias."""
    upstream: str = "lip"
    """The upstream gradients of two passes: l and i those of both directions' log-sum-exps, p that of the positives."""
    reduction: str = "mean"
    """Of a step. "nothing": a mean that is 0 if no sample counts."""
    weight: str = ""
    """The samples' weights in a step: "" none, "any" given, "ordered" given and added in order."""
    beta_on_device: bool = False
    """The host does not know the inverse temperature of a step."""
    ignore_index: int = -100
    workspace: int = 32 << 20


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def scenarios() -> Iterator[Scenario]:
    """Every entry of the tile tables with the lightest and the heaviest epilogue, and each rarer branch once."""
    for d in (64, 128, 256):
        yield Scenario(BF16, d, "class", "target", busy=True)
        yield Scenario(BF16, d, "both", "same_label", m=192, busy=True)
    yield Scenario(BF16, 2048, "class", "target", m=4608, k=1000)
    yield Scenario(BF16, 2048, "class", "target")
    yield Scenario(BF16, 2048, "both", "same_label", m=192, bias=True)
    yield Scenario(BF16, 2048, "both", "none")
    yield Scenario(BF16, 128, "both", "none", bias=True)
    yield Scenario(BF16, 100, "both", "none")
    yield Scenario(BF16, 1001, "instance", "self", m=192)
    yield Scenario(FP16, 128, "class", "target", m=128, present_only=True, busy=True)
    yield Scenario(FP16, 512, "class", "target", m=128, present_only=True)
    for d in (64, 128, 256):
        yield Scenario(BF16, d, "instance", "self", k=256, busy=True, itself=True)
        yield Scenario(FP16, d, "instance", "self", k=256, busy=True, itself=True)
        yield Scenario(BF16, d, "instance", "same_label", k=256, busy=True, itself=True)
    yield Scenario(BF16, 128, "class", "self", k=256, bias=True, itself=True)
    yield Scenario(BF16, 2048, "instance", "self", k=256, itself=True)
    yield Scenario(BF16, 2048, "instance", "same_label", k=256, itself=True)
    yield Scenario(FP16, 128, "instance", "self", k=256, busy=True, itself=True)
    yield Scenario(FP32, 128, "instance", "self", k=256, busy=True, itself=True)
    yield Scenario(FP32, 512, "instance", "self", k=256, itself=True)
    for d in (128, 256, 2048):
        yield Scenario(BF16, d, "class", "target", shifted=True, busy=d <= 256)
    for precision in ("high", "highest"):
        yield Scenario(FP32, 64, "both", "none", precision=precision, busy=True)
        yield Scenario(FP32, 512, "both", "none", precision=precision)
    yield Scenario(FP32, 128, "class", "target", busy=True)
    yield Scenario(BF16, 2048, "instance", "none", step=True)
    yield Scenario(BF16, 2048, "class", "target", present_only=True, step=True)
    yield Scenario(FP16, 512, "class", "target", m=128, present_only=True, step=True)
    for precision in ("high", "highest"):
        yield Scenario(FP32, 512, "class", "none", precision=precision, present_only=True, step=True)
    for d in (64, 128, 256):
        yield Scenario(BF16, d, "class", "target", present_only=True, busy=True, step=True)
        yield Scenario(BF16, d, "both", "none", busy=True, step=True)
    yield Scenario(FP16, 128, "both", "target", busy=True, step=True)
    # SupCon's temperature is rarely learnt.
    for d in (64, 128, 256):
        yield Scenario(BF16, d, "instance", "same_label", m=2048, k=2048, itself=True, step=True, wanted="z")
        yield Scenario(FP16, d, "instance", "self", m=256, k=256, itself=True, step=True, wanted="z")
        yield Scenario(BF16, d, "instance", "self", m=256, k=256, busy=True, itself=True, step=True, wanted="z")
    yield Scenario(BF16, 100, "instance", "self", m=256, k=256, itself=True, step=True, wanted="z")
    yield Scenario(FP32, 128, "instance", "self", m=256, k=256, itself=True, step=True, wanted="z")
    for dtype, d, mask in ((FP32, 128, "self"), (BF16, 2048, "self"), (BF16, 2048, "same_label"), (FP16, 512, "self")):
        precision = "highest" if dtype == FP32 else "high"
        yield Scenario(
            dtype, d, "instance", mask, m=2048, k=2048, precision=precision, itself=True, step=True, wanted="zb"
        )  # fmt: skip
    yield Scenario(BF16, 2048, "instance", "none", step=True, epilogue=True)
    yield Scenario(BF16, 2048, "class", "target", m=128, present_only=True, step=True, epilogue=True)


def drawn(count: int) -> Iterator[Scenario]:
    """Problems with every option that a caller has, drawn at random, always the same ones."""
    r = random.Random(0)
    for _ in range(count):
        dtype, step = r.choice((BF16, FP16, FP32)), r.random() < 0.5
        direction, exclude = r.choice(("class", "instance", "both")), r.choice(("none", "target", "self", "same_label"))
        d = r.choice((16, 30, 64, 100, 128, 256, 512, 1001, 2048))
        m, k = r.choice(((256, 192), (128, 192), (48, 4000), (100, 36), (1, 1)))
        square = exclude in ("self", "same_label")
        itself = square and direction != "both" and r.random() < 0.6
        if square:
            m = k = r.choice((m, 2048)) if itself else m
        present_only = direction == "class" and not square and (step or r.random() < 0.5)
        yield Scenario(
            dtype, d, direction, exclude, m, k,
            precision=r.choice(("high", "highest")) if dtype == FP32 else "high",
            present_only=present_only,
            bias=not step and r.random() < 0.4,
            busy=r.random() < 0.5,
            itself=itself,
            shifted=r.random() < 0.2,
            step=step,
            epilogue=step and r.random() < 0.7,
            wanted=r.choice(("zwbo", "zwo", "zb", "wb", "z", "w", "bo", "o")),
            upstream=r.choice(("lip", "lip", "li", "lp", "ip", "l", "i", "p")),
            reduction=r.choice(("mean", "sum", "nothing")),
            weight=r.choice(("", "any", "ordered")),
            beta_on_device=r.random() < 0.5,
            ignore_index=r.choice((-100, 2**40)),
            workspace=r.choice((32 << 20, 1 << 16)),
        )  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One specialisation of one kernel."""

    label: str
    kernel: Any
    tile: str
    arch: int
    tensor_cores: bool | None
    """Whether its products must use tensor cores (True) or must not (False); None if it has no products."""
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[int, Any], ...]
    divisible: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]
    allowed: int = 0
    """Bytes of spills that are no failure."""

    @property
    def key(self) -> tuple[Any, ...]:
        """What the compiler is given."""
        return self.kernel.__name__, self.arch, self.signature, self.constants, self.divisible, self.options

    @property
    def described(self) -> str:
        """Every parameter's type or constant value."""
        constants = dict(self.constants)
        return " ".join(f"{n}={constants.get(i, kind)}" for i, (n, kind) in enumerate(self.signature))

    @property
    def values(self) -> tuple[Any, ...]:
        """The architecture, and each parameter's type and alignment or constant value."""
        constants = dict(self.constants)
        of_parameters = ((kind, i in self.divisible, constants.get(i)) for i, (_, kind) in enumerate(self.signature))
        return self.arch, *of_parameters, self.options


_TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


def job_of(kernel: Any, arch: int, scenario: Scenario, args: tuple[Any, ...], options: dict[str, Any]) -> Job:
    """The specialisation that Triton's just-in-time compiler would compile for a launch."""
    values = dict(zip(kernel.arg_names, args, strict=False))
    values.update({name: options.pop(name) for name in kernel.arg_names if name in options})
    signature, constants, divisible = [], [], []
    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and isinstance(value, int) and value == 1):
            signature.append((parameter.name, "constexpr"))
            constants.append((index, value))
        elif isinstance(value, torch.Tensor):
            signature.append((parameter.name, "*" + _TYPES[value.dtype]))
            if value.data_ptr() % 16 == 0:
                divisible.append(index)
        else:
            signature.append((parameter.name, "i32" if -(2**31) <= value < 2**31 else "i64"))
            if special and value % 16 == 0:
                divisible.append(index)
    tile = "x".join(str(values[n]) for n in ("BP", "BQ", "BD") if n in values)
    kind = {BF16: "bf16", FP16: "fp16", FP32: "tf32" if scenario.precision == "high" else "fp32"}[scenario.dtype]
    flags = [kind, f"d={scenario.d}", str(values.get("EXCLUDE", "")), tile]
    flags += ["both"] if values.get("Q_max") is not None else []
    flags += ["P+Q"] if values.get("P_grad") is not None and values.get("Q_grad") is not None else []
    flags += ["once" if values.get("MAY_SHARE") else "itself"] if scenario.itself else []
    flags += ["parts"] if values.get("Part") is not None or values.get("P_max") is not None else []
    flags += [n.lower() for n in ("P_GATHER", "Q_GATHER", "GATHER") if values.get(n)]
    flags += ["shifted"] if scenario.shifted else []
    flags += ["i64"] if any(kind == "i64" for _, kind in signature) else []
    flags += ["mends"] if values.get("Broken") is not None else []
    flags += ["bias"] if values.get("P_bias") is not None or values.get("Q_bias") is not None else []
    with_product = kernel.__name__ in KERNELS_WITH_PRODUCT or values.get("Broken") is not None
    if kernel.__name__ == "entries_kernel" and values["P_grad"] is None and values["Q_grad"] is None:
        with_product = False  # the entries of positives alone need none, and the compiler removes it
    return Job(
        f"{kernel.__name__:22} {' '.join(f for f in flags if f)}",
        kernel,
        tile,
        arch,
        scenario.precision == "high" if with_product else None,
        tuple(signature),
        tuple(constants),
        tuple(divisible),
        tuple(sorted(options.items())),
        FEW_BYTES if kernel.__name__ == "mend_kernel" or values.get("Broken") is not None else 0,  # rarely executed
    )


def record(scenario: Scenario, arch: int) -> list[Job]:
    """The kernels that a step, or a forward and a backward pass, launch; none if there is no step."""
    jobs: list[Job] = []

    def recorder(
        kernel: Any, grid: tuple[int, ...], *args: Any, options: dispatch.Options | None = None, **named: Any
    ) -> None:
        if options is None:
            options = dispatch.Options(**named)
        jobs.append(job_of(kernel, arch, scenario, args, dict(options)))

    quack.why_not = lambda _: None if scenario.epilogue else "not asked for"  # type: ignore[assignment]
    quack.product = lambda *_: quack.PlainProduct()  # type: ignore[assignment]
    device = config.Arch(arch, 1 if scenario.busy else 132, SHARED_KB[arch] << 10)
    launch.launch = recorder
    launch.TritonKernels.matmul = lambda *_, **__: None  # type: ignore[method-assign]
    config.arch_of = lambda _: device  # type: ignore[assignment]
    torch.set_float32_matmul_precision(scenario.precision)
    triton_backend.number = lambda *_: None if scenario.beta_on_device else 10.0  # type: ignore
    torch.use_deterministic_algorithms(scenario.weight == "ordered")
    m, k, d = scenario.m, scenario.k, scenario.d
    spec = Spec(
        scenario.direction,  # type: ignore[arg-type]
        scenario.exclude,  # type: ignore[arg-type]
        scenario.present_only,
        scenario.ignore_index,
        scenario.workspace,
        scenario.itself,
    )

    def tensor(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        skipped = 8 // dtype.itemsize if scenario.shifted else 0
        return torch.zeros(math.prod(size) + skipped, dtype=dtype)[skipped:].view(size)

    def given(wanted: bool, rows: int) -> torch.Tensor | None:
        return tensor(rows) if wanted else None

    features = tensor(m, d, dtype=scenario.dtype)
    inputs = Inputs(
        features,
        features if scenario.itself else tensor(k, d, dtype=scenario.dtype),
        tensor(m, dtype=torch.int64),
        torch.tensor(10.0),
        given(scenario.bias and spec.by_class, m),
        given(scenario.bias and spec.by_instance, k),
    )
    backend = TritonBackend()
    z, w, b, o = (name in scenario.wanted for name in "zwbo")
    w = w and not scenario.itself
    if scenario.step:
        if not backend.can_step(features, inputs.prototypes, spec) or not (z or w):
            return []
        reduced = Reduced(
            given(scenario.weight != "", m),
            scenario.reduction != "sum",
            0.0 if scenario.reduction == "nothing" else math.nan,
        )
        found = backend.step(inputs, reduced, spec, Needs(z, w, b, False, False))
        steps = [x for x in found[1:] if x is not None]
        for in_place in (True, False):
            backend.scaled(steps, found.loss, [scenario.dtype] * len(steps), in_place)
        return jobs
    saved = backend.forward(inputs, spec, True)
    grads = OutputGrads(
        given("l" in scenario.upstream and spec.by_class, k),
        given("i" in scenario.upstream and spec.by_instance, m),
        given("p" in scenario.upstream, m),
    )
    needs = Needs(z, w, b, o and inputs.sample_bias is not None, o and inputs.class_bias is not None)
    backend.backward(inputs, saved, grads, spec, needs)
    return jobs


def covering(jobs: Sequence[Job], chosen: Sequence[Job]) -> list[Job]:
    """Some of a kernel's ``jobs``: every pair of values that any job holds is held by one of them or of the ``chosen``.

    Always takes the job that adds the most pairs.
    """
    # Parameters that vary together are one column.
    rows = [job.values for job in (*chosen, *jobs)]
    columns = {tuple(map({v: i for i, v in enumerate(dict.fromkeys(c))}.get, c)) for c in zip(*rows, strict=True)}
    pairs = [set(itertools.combinations(enumerate(row), 2)) for row in zip(*sorted(columns), strict=True)]
    missing = set().union(*pairs).difference(*pairs[: len(chosen)])
    left = [(-len(held), i) for i, held in enumerate(pairs[len(chosen) :])]
    heapq.heapify(left)
    found = []
    while missing:
        _, i = heapq.heappop(left)
        held = pairs[len(chosen) + i] & missing
        if left and -len(held) > left[0][0]:  # others have become better
            heapq.heappush(left, (-len(held), i))
        else:
            missing -= held
            found.append(jobs[i])
    return found


@dataclass(frozen=True)
class Outcome:
    row: str
    problems: tuple[str, ...]


def usage(cubin: bytes, ptx: str, arch: int) -> tuple[int, int]:
    """Number of registers, and bytes of spills."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        listing = subprocess.run(
            [BIN / "cuobjdump", "--dump-resource-usage", path], capture_output=True, text=True, check=True
        ).stdout
        registers = max(int(r) for r in re.findall(r"REG:(\d+)", listing))
        if all(s == "0" for s in re.findall(r"(?:STACK|LOCAL):(\d+)", listing)):
            return registers, 0
        # A stack frame is a spill or belongs to a call (of a failing assertion); the assembler reports which.
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [
            get_ptxas(arch).path,
            "-v",
            f"--gpu-name={sm_arch_from_capability(arch)}",
            source,
            "-o",
            path,
        ]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        return registers, sum(int(n) for n in re.findall(r"(\d+) bytes spill", log))


def kept(job: Job) -> Path:
    """Where the row of a kernel that was found good is kept."""
    specialised = (job.label, job.arch, job.tensor_cores, job.signature, job.constants, job.divisible, job.options)
    # Triton's key of a kernel covers the functions that it calls.
    parts = (job.kernel.cache_key, repr(specialised), triton.__version__, Path(__file__).read_text())
    return KEPT / f"{job.kernel.__name__}_{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}.json"


def build(index: int) -> Outcome:
    job = JOBS[index]
    file = kept(job)
    if file.exists():
        return Outcome(json.loads(file.read_text()) + "  kept", ())
    outcome = compile_(job)
    if not outcome.problems:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(outcome.row))
        partial.replace(file)  # never half a file under the final name
    return outcome


def compile_(job: Job) -> Outcome:
    source = ASTSource(
        job.kernel,
        dict(job.signature),
        {(i,): value for i, value in job.constants},
        {(i,): [["tt.divisibility", 16]] for i in job.divisible},
    )
    begin = time.perf_counter()
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", job.arch, 32), options=dict(job.options))
    except Exception as error:  # report any failure of the compiler and go on
        return Outcome(f"{job.label:72} sm_{job.arch}", (f"{type(error).__name__}: {error}",))
    ptx = compiled.asm["ptx"]
    registers, spills = usage(compiled.asm["cubin"], ptx, job.arch)
    shared = compiled.metadata.shared
    columns = getattr(compiled.metadata, "tmem_size", 0) or 0
    unit = TENSOR_CORES.search(ptx)
    name = unit.group(1).split(".")[0] if unit else "fma" if "fma.rn.f32" in ptx else "-"
    asynchronous = "cp.async" if "cp.async" in ptx else ""
    options = dict(job.options)
    problems = []
    if spills > job.allowed:
        problems.append(f"spills {spills} bytes")
    if shared > SHARED_KB[job.arch] << 10:
        problems.append("too much shared memory")
    if columns > TENSOR_MEMORY_COLUMNS:
        problems.append("too much tensor memory")
    if job.tensor_cores is True and unit is None:
        problems.append("no tensor cores")
    if job.kernel.__name__.endswith("entries_kernel") and "st.global.b16" in ptx:
        problems.append("stores of 2 bytes")
    if job.tensor_cores is False and name != "fma":
        problems.append("no fused multiply-adds")
    row = (
        f"{job.label:72} sm_{job.arch:<4}{options['num_warps']:3}{options['num_stages']:4}{registers:6}{spills:7}"
        f"{shared / 1024:8.1f}{columns:6}  {name:8}{asynchronous:9}{time.perf_counter() - begin:5.1f}s"
    )
    return Outcome(row, tuple(problems))


JOBS: list[Job] = []


def unique(problems: Iterable[Scenario], archs: Sequence[int]) -> list[Job]:
    """The specialisations that the problems launch."""
    jobs = (job for problem in problems for arch in archs for job in record(problem, arch))
    return list({job.key: job for job in jobs}.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, action="append", choices=sorted(SHARED_KB), help="default: 80 90 100")
    parser.add_argument("--only", default="", help="a part of the label: a kernel, a dtype, a mask")
    parser.add_argument("--quick", action="store_true", help="one specialisation of each kernel, dtype and arch")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()

    archs = options.arch or (80, 90, 100)
    jobs = unique(scenarios(), archs)
    if options.quick:  # the last one of each group: scenarios are ordered from simple to complex
        jobs = list({(job.kernel.__name__, job.label.split()[1], job.arch): job for job in jobs}.values())
    else:
        known = [job for job in jobs if job.tensor_cores is not None]
        by_kernel: dict[str, list[Job]] = {}
        common = {job.key for job in jobs}
        rare = [replace(job, allowed=FEW_BYTES) for job in unique(drawn(2000), archs) if job.key not in common]
        for job in (*jobs, *rare):
            by_kernel.setdefault(job.kernel.__name__, []).append(job)
        jobs = known.copy()
        for name, of_kernel in by_kernel.items():
            jobs += covering(of_kernel, [job for job in known if job.kernel.__name__ == name])
    JOBS.extend(job for job in jobs if options.only in job.label)
    JOBS.sort(key=lambda job: (job.label, job.arch))

    print(f"triton {triton.__version__}, {len(JOBS)} kernels")
    print(f"{'kernel':72} {'arch':7}warps stages regs spill  shared tmem  unit             time")
    failed = 0
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # an empty cache, removed afterwards
        context = multiprocessing.get_context("fork")  # workers inherit JOBS
        with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
            for job, outcome in zip(JOBS, pool.map(build, range(len(JOBS))), strict=True):
                print(outcome.row, *outcome.problems, *((job.described,) if outcome.problems else ()), flush=True)
                failed += bool(outcome.problems)
    print(f"{failed} of {len(JOBS)} failed" if failed else "all good")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
