"""Builds csrc/cuda for the CPU with the emulator: a library for the tests, programs for the sanitizers.

Objects are cached in out/cuda_host by a hash of their inputs, and built two at a time.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc" / "cuda"
KEPT = ROOT / "out" / "cuda_host"
CXX = os.environ.get("CXX", "g++")
TORCH = Path(torch.__file__).parent

KERNELS = tuple(sorted(CSRC.glob("*.cu")))
FLAGS = (
    "-std=c++20",
    "-O1",
    "-fPIC",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
    f"-I{HERE}",
    f"-I{CSRC}",
)
BINDING_FLAGS = ("-DNCK_HOST", "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-isystem{TORCH / 'include'}")
SANITIZERS = {"thread": ("-fsanitize=thread", "-g1"), "address": ("-fsanitize=address", "-g1")}


def missing() -> str | None:
    """Why the emulator cannot be built here, or None."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return "the emulator's context switch is written for x86-64"
    return None if shutil.which(CXX) else f"no C++ compiler {CXX}"


def library() -> Path:
    """The operators nckernels_cuda::* for tensors on the CPU, and emu_configure."""
    units = [*KERNELS, CSRC / "bindings.cpp", HERE / "control.cpp"]
    libraries = (f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10")
    return _build("libnckernels_host.so", units, (), ("-shared", *libraries))


def program(sanitizer: str) -> Path:
    """A program that runs every kernel once under a sanitizer, without Python."""
    flags = SANITIZERS[sanitizer]
    return _build(f"sanitize_{sanitizer}", [*KERNELS, HERE / "sanitize_main.cpp"], flags, flags)


def _build(name: str, units: list[Path], flags: tuple[str, ...], link: tuple[str, ...]) -> Path:
    KEPT.mkdir(parents=True, exist_ok=True)
    with (KEPT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other test processes wait, then find the cached objects
        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(lambda unit: _compile(unit, flags), units))
        target = KEPT / f"{_hash([str(o) for o in objects] + list(link))}_{name}"
        if not target.exists():
            _run([CXX, *map(str, objects), *link, "-o", str(target)], target)
        return target


def _compile(unit: Path, flags: tuple[str, ...]) -> Path:
    flags = (*FLAGS, *(BINDING_FLAGS if unit.name == "bindings.cpp" else ()), *flags)
    headers = sorted([*CSRC.glob("*.h"), *HERE.glob("*.h")])
    texts = [unit.read_text(), *(header.read_text() for header in headers)]
    target = KEPT / f"{_hash([*texts, *flags, torch.__version__, CXX])}_{unit.stem}.o"
    if not target.exists():
        _run([CXX, *flags, "-x", "c++", "-c", str(unit), "-o", str(target)], target)
    return target


def _hash(parts: list[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _run(command: list[str], target: Path) -> None:
    """Run a command that writes its last argument. The final name never has an incomplete file."""
    partial = target.with_suffix(".partial")
    result = subprocess.run([*command[:-1], str(partial)], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
    partial.rename(target)
