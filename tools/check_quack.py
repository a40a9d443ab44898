"""Compile quack's product with our epilogues without a GPU, and check the compiler's results.

    python tools/check_quack.py [--arch 90]

Each architecture has its own process, because quack reads it from the environment once. Prints registers and
instructions of each kernel. Exits with 1 if a kernel spills or uses a stack, does not run on the architecture's tensor
cores, does not load and store by TMA, or has more or less than one exponential per entry. Without quack-kernels the
tool prints a note and exits with 0.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from nckernels.backends import quack

ARCHES = {90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
"""The instruction of each architecture's tensor cores."""

ANCHORS, OTHERS, D = 512, 1000, 2048
ELF = b"\x7fELF"
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", re.MULTILINE)
EXPONENTIAL, COMPARISON, SELECTION = "MUFU.EX2", "FSETP", "FSEL"


def disassembler(name: str) -> str:
    """The path of cuobjdump or nvdisasm, from the CUDA toolkit or from Triton."""
    found = shutil.which(name)
    if found is None:
        import triton

        found = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, action="append", choices=sorted(ARCHES), help="default: all")
    parser.add_argument("--this-arch", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.this_arch:
        return compile_both(options.this_arch)
    if quack.missing() is not None:
        print(f"skipped: {quack.missing()}")
        return int("cannot be imported" in (quack.missing() or ""))
    failed = 0
    for arch in options.arch or sorted(ARCHES):
        with tempfile.TemporaryDirectory() as cache:
            settings = {"QUACK_ARCH": str(arch), "CUTE_DSL_ARCH": f"sm_{arch}a", "QUACK_CACHE_DIR": cache}
            command = [sys.executable, __file__, "--this-arch", str(arch)]
            failed += subprocess.run(command, env=os.environ | settings).returncode != 0
    print(f"{failed} of {len(options.arch or ARCHES)} architectures failed" if failed else "all good")
    return int(failed > 0)


def compile_both(arch: int) -> int:
    """Compile both epilogues, in a process with quack's settings in the environment."""
    import quack.gemm_runtime.host as host

    from nckernels.backends.quack.call import QuackProduct

    # The number of clusters that fit a device comes from its driver and is only needed for the launch.
    host.get_max_active_clusters = lambda *_, **__: 1
    product, failed = QuackProduct(arch // 10), False
    width = -(-OTHERS // product.columns) * product.columns
    e = torch.empty(ANCHORS, -(-OTHERS // 16) * 16, dtype=torch.bfloat16)[:, :OTHERS]
    sums = torch.empty(ANCHORS, width // product.columns)
    for excluding in (False, True):
        p, q = (
            quack.Operand(
                torch.empty(rows, D, dtype=torch.bfloat16), torch.empty(n), torch.empty(n) if excluding else None
            )
            for rows, n in ((ANCHORS, ANCHORS), (OTHERS, width))
        )
        begin, before = time.perf_counter(), objects()
        product.compile(p, q, 14.4, e, sums)
        seconds = time.perf_counter() - begin
        (found,) = objects() - before
        row, problems = judge(found, arch, product.tile.rows * product.columns)
        name = "exponentials_of_others" if excluding else "exponentials"
        print(f"{name:24}sm_{arch}a  {row}  {seconds:4.1f}s", *problems, flush=True)
        failed |= bool(problems)
    return int(failed)


def objects() -> set[Path]:
    """The object files in quack's cache."""
    return set(Path(os.environ["QUACK_CACHE_DIR"]).rglob("*.o"))


def judge(compiled: Path, arch: int, entries: int) -> tuple[str, list[str]]:
    """A row of the table, and the problems found."""
    image = compiled.read_bytes()
    cubin = compiled.with_suffix(".cubin")
    cubin.write_bytes(image[image.index(ELF, 4) :])  # the device's code, inside the host's object file

    def text(tool: str, option: str) -> str:
        command = [disassembler(tool), option, str(cubin)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    usage = text("cuobjdump", "--dump-resource-usage")
    registers, stack, local = (max(map(int, re.findall(rf"{x}:(\d+)", usage))) for x in ("REG", "STACK", "LOCAL"))
    code = Counter(INSTRUCTION.findall(text("nvdisasm", "-c")))

    def count(instruction: str) -> int:
        return sum(n for name, n in code.items() if f"{name}.".startswith(f"{instruction}."))

    unit, spilled = ARCHES[arch], count("STL") + count("LDL")
    per_thread = count(EXPONENTIAL)
    problems = []
    if stack or local or spilled:
        problems.append(f"{stack + local} bytes of stack, {spilled} loads and stores of it")
    if not count(unit):
        problems.append(f"no {unit}")
    if not count("UTMALDG") or not count("UTMASTG"):
        problems.append("no TMA")
    if per_thread == 0 or entries % (32 * per_thread):
        problems.append("not one exponential an entry")
    row = (
        f"{registers:3} registers {unit:8}{count(unit):4}   a thread: {per_thread} exponentials, "
        f"{count(COMPARISON)} comparisons, {count(SELECTION)} selections"
    )
    return row, problems


if __name__ == "__main__":
    sys.exit(main())
