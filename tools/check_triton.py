"""Compile every Triton kernel without a GPU, and check the compiler's results.

    python tools/check_triton.py [--arch 90] [--only grad_kernel] [--jobs 2]

The backend's own launch code runs on small CPU tensors, with its launch function replaced by a recorder. The tool
compiles the recorded kernels, with the tiles that ``config.py`` chooses for the architecture. Exits with 1 if a kernel
spills registers, needs more shared or tensor memory than the device has, stores a panel two bytes at a time, or has a
matrix product that does not run on tensor cores (except float32 at "highest", which must run as fused multiply-adds).

The row of a kernel without findings is kept in out/check_triton. The kernel is compiled again when its source, its
specialisation, Triton or this file changes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
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
from nckernels.backends.base import Inputs, Needs, OutputGrads, Reduced, Spec
from nckernels.backends.triton import TritonBackend, config, dispatch, launch

KEPT = Path(__file__).resolve().parents[1] / "out" / "check_triton"
SHARED_KB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
TENSOR_MEMORY_COLUMNS = 512
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
    for d in (64, 128, 256):
        yield Scenario(BF16, d, "instance", "same_label", m=2048, k=2048, itself=True, step=True)
        yield Scenario(FP16, d, "instance", "self", m=256, k=256, itself=True, step=True)
        yield Scenario(BF16, d, "instance", "self", m=256, k=256, busy=True, itself=True, step=True)
    yield Scenario(BF16, 100, "instance", "self", m=256, k=256, itself=True, step=True)
    yield Scenario(FP32, 128, "instance", "self", m=256, k=256, itself=True, step=True)
    yield Scenario(FP32, 64, "instance", "self", m=256, k=256, precision="highest", itself=True, step=True)
    yield Scenario(BF16, 2048, "instance", "none", step=True, epilogue=True)
    yield Scenario(BF16, 2048, "class", "target", m=128, present_only=True, step=True, epilogue=True)


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
            signature.append((parameter.name, "i32"))
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
    flags += ["mends"] if values.get("Broken") is not None else []
    flags += ["bias"] if values.get("P_bias") is not None or values.get("Q_bias") is not None else []
    with_product = kernel.__name__ in KERNELS_WITH_PRODUCT or values.get("Broken") is not None
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
    )


def record(scenario: Scenario, arch: int) -> list[Job]:
    """The kernels that a forward and a backward pass launch."""
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
    m, k, d = scenario.m, scenario.k, scenario.d
    spec = Spec(
        scenario.direction,  # type: ignore[arg-type]
        scenario.exclude,  # type: ignore[arg-type]
        scenario.present_only,
        -100,
        32 << 20,
        scenario.itself,
    )

    def operand(rows: int) -> torch.Tensor:
        skipped = 8 // scenario.dtype.itemsize if scenario.shifted else 0
        return torch.zeros(rows * d + skipped, dtype=scenario.dtype)[skipped:].view(rows, d)

    features = operand(m)
    inputs = Inputs(
        features,
        features if scenario.itself else operand(k),
        torch.zeros(m, dtype=torch.int64),
        torch.tensor(10.0),
        torch.zeros(m) if scenario.bias and spec.by_class else None,
        torch.zeros(k) if scenario.bias and spec.by_instance else None,
    )
    backend = TritonBackend()
    needs = Needs(True, not scenario.itself, True, inputs.sample_bias is not None, inputs.class_bias is not None)
    if scenario.step:
        found = backend.step(inputs, Reduced(torch.ones(m), True, 0.0), spec, needs)
        steps = [x for x in found[1:] if x is not None]
        for in_place in (True, False):
            backend.scaled(steps, found.loss, [scenario.dtype] * len(steps), in_place)
        return jobs
    saved = backend.forward(inputs, spec, True)
    grads = OutputGrads(
        torch.zeros(k) if spec.by_class else None,
        torch.zeros(m) if spec.by_instance else None,
        torch.zeros(m),
    )
    backend.backward(inputs, saved, grads, spec, needs)
    return jobs


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
    if spills:
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, action="append", choices=sorted(SHARED_KB), help="default: 80 90 100")
    parser.add_argument("--only", default="", help="a part of the label: a kernel, a dtype, a mask")
    parser.add_argument("--quick", action="store_true", help="one specialisation of each kernel, dtype and arch")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()

    unique: dict[Any, Job] = {}
    per_kernel: Counter[Any] = Counter()
    for arch in options.arch or (80, 90, 100):
        for scenario in scenarios():
            for job in record(scenario, arch):
                name = job.kernel.__name__
                key = (name, arch, job.signature, job.constants, job.divisible, job.options)
                # Kernels that only stream rows hardly differ between specialisations: compile one per block size.
                streams = job.tensor_cores is None and "EXCLUDE" not in dict(job.signature)
                if key in unique or (streams and per_kernel[name, arch, job.tile] == 1):
                    continue
                per_kernel[name, arch, job.tile] += 1
                unique[key] = job
    jobs = list(unique.values())
    if options.quick:  # the last one of each group: scenarios are ordered from simple to complex
        jobs = list({(job.kernel.__name__, job.label.split()[1], job.arch): job for job in jobs}.values())
    JOBS.extend(job for job in jobs if options.only in job.label)
    JOBS.sort(key=lambda job: (job.label, job.arch))

    print(f"triton {triton.__version__}, {len(JOBS)} kernels")
    print(f"{'kernel':72} {'arch':7}warps stages regs spill  shared tmem  unit             time")
    failed = 0
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # an empty cache, removed afterwards
        context = multiprocessing.get_context("fork")  # workers inherit JOBS
        with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
            for outcome in pool.map(build, range(len(JOBS))):
                print(outcome.row, *outcome.problems, flush=True)
                failed += bool(outcome.problems)
    print(f"{failed} of {len(JOBS)} failed" if failed else "all good")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
