"""Compare the CPU kernels with the formulas in float64, on this machine and, under emulation, on aarch64.

    python tools/check_aarch64.py [--require] [--jobs 2]

tests/aarch64/check.cpp calls the library's C interface with some thousands of small problems: forward, backward and
step, every mask and direction, float64, float32, bfloat16 and float16, ragged sizes, workspaces that are too small. It
runs with the library of each instruction set that this CPU has. Then a cross compiler builds it for aarch64, and qemu's
user mode emulation runs it. Exits with 1 if a number is wrong.

Without a cross compiler or emulator the second part is skipped with a note, which is a failure only with --require. On
Debian: apt-get install g++-aarch64-linux-gnu qemu-user. Compiled files are cached in out/check_aarch64 until a source,
a flag or the compiler changes.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nckernels.backends import build, native

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = ROOT / "tests" / "aarch64" / "check.cpp"
KEPT = ROOT / "out" / "check_aarch64"
BASELINE = build.CPU["default"]
COMPILERS = ("aarch64-linux-gnu-g++", *(f"aarch64-linux-gnu-g++-{n}" for n in range(16, 9, -1)))
EMULATORS = ("qemu-aarch64", "qemu-aarch64-static")
HOW = "apt-get install g++-aarch64-linux-gnu qemu-user"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--require", action="store_true", help="fail if aarch64 cannot be emulated")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()

    right = True
    for library in native.libraries() if native.SUPPORTED else []:
        right = check_here(library, options.jobs) and right
    if platform.machine() == "aarch64":
        print("aarch64: this machine")
        return int(not right)
    compiler, emulator = first_of(COMPILERS), first_of(EMULATORS)
    if compiler is None or emulator is None:
        print(f"aarch64: skipped, there is no {'cross compiler' if compiler is None else 'emulator'}: {HOW}")
        return int(options.require or not right)
    sources = [PROGRAM, *(build.CSRC / BASELINE.folder / source for source in BASELINE.sources)]
    # A static program: the place of shared libraries for aarch64 depends on the distribution.
    program = linked("aarch64", compiler, sources, ("-static", *BASELINE.link), options.jobs)
    label = f"aarch64, built by {version(compiler)}, under {version(emulator)}"
    return int(not (run(label, [emulator, str(program)], options.jobs) and right))


def check_here(library: build.Library, jobs: int) -> bool:
    """Build and run the program with a library that Python loads; whether it passed."""
    try:
        built = build.find_or_build(library)
    except build.BuildError as error:  # the compiler lacks the instructions; Python would use the next library
        print(f"{library.name}: skipped, {str(error).splitlines()[0]}")
        return True
    program = linked(library.name, build._compiler(), [PROGRAM], (str(built), *library.link), jobs)
    bfloat16 = "bfloat16_entries" if "-mavx512bf16" in library.flags else "bfloat16"
    return run(f"{library.name}, on this machine", [str(program)], jobs, bfloat16)


def linked(name: str, compiler: str, sources: list[Path], link: tuple[str, ...], jobs: int) -> Path:
    """A program from objects that are compiled with the library's flags, or cached."""
    begin = time.perf_counter()
    key = repr((compiler, version(compiler), BASELINE.flags, BASELINE.key(), PROGRAM.read_text()))
    folder = KEPT / hashlib.sha256(key.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)

    def make(output: str, *words: str) -> str:
        path = folder / output
        if not path.exists():
            part = path.with_suffix(".part")
            # The output is shown only on errors: the linker warns of OpenMP's plugins for other devices.
            made = subprocess.run([*compiler.split(), *words, "-o", str(part)], capture_output=True, text=True)
            if made.returncode:
                raise SystemExit(f"{output} cannot be made: {made.stderr}")
            part.rename(path)
        return str(path)

    with ThreadPoolExecutor(jobs) as pool:
        objects = list(pool.map(lambda s: make(f"{s.stem}.o", *BASELINE.flags, "-c", str(s)), sources))
    program = make(f"{name}_{hashlib.sha256(repr(link).encode()).hexdigest()[:8]}", *objects, *link)
    print(f"{name}: made in {time.perf_counter() - begin:.0f} s", flush=True)
    return Path(program)


def run(label: str, command: list[str], jobs: int, bfloat16: str = "bfloat16") -> bool:
    """Run every part of the program in its own process; whether all passed."""
    parts = ("float64", "float32", bfloat16, "float16", "planted")
    begin = time.perf_counter()
    # By default the threads of small problems would busy-wait on cores that other processes need.
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "2"}

    def part(name: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, name], env=environment, capture_output=True, text=True)

    with ThreadPoolExecutor(jobs) as pool:
        results = list(pool.map(part, parts))
    print(f"{label}: {time.perf_counter() - begin:.0f} s")
    for name, result in zip(parts, results, strict=True):
        print("  " + "\n  ".join((result.stdout + result.stderr).splitlines()))
        if result.returncode:
            print(f"FAILED {name}, exit status {result.returncode}")
    sys.stdout.flush()
    return not any(result.returncode for result in results)


def first_of(names: tuple[str, ...]) -> str | None:
    """The first program that is on the PATH."""
    return next((name for name in names if shutil.which(name)), None)


def version(program: str) -> str:
    """The first line of a program's version output."""
    said = subprocess.run([*program.split(), "--version"], capture_output=True, text=True, check=True)
    return said.stdout.splitlines()[0]


if __name__ == "__main__":
    sys.exit(main())
