"""Compile every file of csrc/cuda without a GPU, and check the compiler's results.

    python tools/check_cuda.py [--quick] [--arch 80] [--only lse.cu] [--jobs 2] [--all-rows]

Prints registers and spills of the kernels (of the worse of two types of mask tags, or of all). Exits with 1 if a
kernel spills or uses a stack, if asynchronous products are serialised, or if a file does not compile. The bindings
are compiled against torch's headers; those of a CPU build are sufficient. Shared memory is dynamic: static
assertions beside the kernels bound the size of a launch, and the emulator of tests/cuda_host checks that
the kernel stays within it.

``--quick`` compiles for sm_90a only. Results are cached in out/check_cuda until a source, a header, a flag or the
compiler changes. Without nvcc the tool prints a note and exits with 0.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from nckernels.backends import build

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc" / "cuda"
KEPT = ROOT / "out" / "check_cuda"
TORCH_INCLUDE = Path(torch.__file__).parent / "include"
ARCHES = build.CUDA_ARCHITECTURES
FLAGS = tuple(flag for flag in build.CUDA.flags if flag.startswith(("-std", "-D")))
KINDS = ("bf16", "fp16", "tf32", "tf32x3")
SUMS = ("one", "each", "shared")


@dataclass(frozen=True)
class Kernel:
    name: str
    arch: str
    registers: int
    spills: int
    stack: int
    static_shared: int


@dataclass(frozen=True)
class Outcome:
    label: str
    seconds: float
    kernels: list[Kernel]
    error: str = ""


def readable(symbol: str) -> str:
    """'lse_kernel<bf16, int, false>' from a demangled signature that says '(nck::Kind)0'."""
    name = re.sub(r"\(anonymous namespace\)::|^void |nck::", "", symbol)
    name = re.sub(r"\(Kind\)(\d)", lambda match: KINDS[int(match[1])], name)
    name = re.sub(r"\(Sums\)(\d)", lambda match: SUMS[int(match[1])], name)
    return re.sub(r"\(int\)", "", re.sub(r"\([A-Z]\w+Args\)$", "", name))


def parse(log: str, arch: str) -> list[Kernel]:
    """The kernels in the output of ``ptxas -v``."""
    blocks = re.split(r"Compiling entry function '", log)[1:]
    symbols = [block.split("'", 1)[0] for block in blocks]
    filt = shutil.which("c++filt")
    if filt and symbols:
        listing = subprocess.run([filt, *symbols], capture_output=True, text=True, check=True).stdout
        symbols = listing.splitlines()

    def number(pattern: str, block: str) -> int:
        return sum(int(n) for n in re.findall(pattern, block))

    return [
        Kernel(
            readable(symbol),
            arch,
            number(r"Used (\d+) registers", block),
            number(r"(\d+) bytes spill", block),
            number(r"(\d+) bytes stack frame", block),
            number(r"(\d+) bytes smem", block),
        )
        for symbol, block in zip(symbols, blocks, strict=True)
    ]


def compile_one(nvcc: str, version: str, source: str, arch: str) -> Outcome:
    flags = [*FLAGS, f"-I{TORCH_INCLUDE}"]
    if source.endswith(".cu"):
        flags += ["-gencode", f"arch=compute_{arch},code=sm_{arch}", "-Xptxas", "-v"]
    label = f"{source} sm_{arch}" if source.endswith(".cu") else source
    texts = [path.read_text() for path in (CSRC / source, *sorted(CSRC.glob("*.h")), Path(__file__))]
    key = hashlib.sha256("\0".join([*texts, *flags, version, torch.__version__]).encode()).hexdigest()[:16]
    kept = KEPT / f"{Path(source).stem}_{key}.json"
    if kept.exists():
        return Outcome(label, 0.0, [Kernel(**row) for row in json.loads(kept.read_text())])
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, *flags, "-c", str(CSRC / source), "-o", f"{folder}/object.o"]
        result = subprocess.run(command, capture_output=True, text=True)
    seconds, log = time.perf_counter() - begin, result.stdout + result.stderr
    if result.returncode or "serialized" in log:  # ptxas notes products that do not overlap
        return Outcome(label, seconds, [], log)
    kernels = parse(log, arch)
    kept.parent.mkdir(parents=True, exist_ok=True)
    partial = kept.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps([asdict(kernel) for kernel in kernels]))
    partial.replace(kept)  # never half a file under the final name
    return Outcome(label, seconds, kernels)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", action="append", choices=ARCHES)
    parser.add_argument("--quick", action="store_true", help="the newest architecture only")
    parser.add_argument("--only", default="", help="a part of the file name")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--all-rows", action="store_true", help="every instantiation, not the worst of a kernel")
    options = parser.parse_args()

    try:
        nvcc = build.nvcc()
    except build.BuildError as error:
        print(f"the CUDA kernels are not checked: {error}")
        return 0
    arches = ARCHES[-1:] if options.quick else options.arch or ARCHES
    # Longest files first. The bindings are plain C++, the same for all architectures.
    sources = sorted((s for s in build.CUDA.sources if options.only in s), key=lambda s: -(CSRC / s).stat().st_size)
    jobs = [(s, a) for s in sources for a in (arches if s.endswith(".cu") else arches[:1])]
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    with ThreadPoolExecutor(options.jobs) as pool:
        outcomes = list(pool.map(lambda job: compile_one(nvcc, version, *job), jobs))

    kernels = [kernel for outcome in outcomes for kernel in outcome.kernels]
    rows = kernels if options.all_rows else worst_of_each(kernels)
    print(f"{'kernel':56} {'arch':7} {'registers':>9} {'spills':>7} {'stack':>6} {'static shared':>14}")
    for k in sorted(rows, key=lambda k: (k.name, k.arch)):
        print(f"{k.name:56} sm_{k.arch:4} {k.registers:9} {k.spills:7} {k.stack:6} {k.static_shared:14}")
    failed = False
    for outcome in outcomes:
        time_taken = f"{outcome.seconds:6.1f} s" if outcome.seconds else "  as kept"
        print(f"{outcome.label:32} {len(outcome.kernels):3} kernels {time_taken}")
        if outcome.error:
            print(outcome.error)
            failed = True
    for k in kernels:
        if k.spills or k.stack:
            print(f"FAILED {k.name} sm_{k.arch}: {k.spills} bytes of spills, {k.stack} bytes of stack")
            failed = True
    print("failed" if failed else f"all good: {len(kernels)} kernels, no spills")
    return int(failed)


def worst_of_each(kernels: list[Kernel]) -> list[Kernel]:
    """Of the two types of mask tags, the instantiation that is nearer to spilling."""
    worst: dict[tuple[str, ...], Kernel] = {}
    for k in kernels:
        key = (re.sub(r", (int|long)\b", "", k.name), k.arch)
        if key not in worst or (k.spills, k.registers) > (worst[key].spills, worst[key].registers):
            worst[key] = k
    return list(worst.values())


if __name__ == "__main__":
    sys.exit(main())
