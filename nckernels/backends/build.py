"""Compiles the C++ of ``csrc/`` when the package is installed (setup.py), or else on first use.

It needs ``ninja`` and a C++ compiler (``$CXX``, else g++ or c++), and imports only the standard library, because
setup.py loads this file by its path in environments without torch. ``$NCKERNELS_CXXFLAGS`` adds flags.
The CUDA library needs nvcc (of ``$CUDA_HOME``, else on the PATH) and torch, whose headers it is compiled with.

A library is searched for in the package (``nckernels/lib``, where setup.py puts it), then in torch's
extension cache (``$TORCH_EXTENSIONS_DIR``, default ``~/.cache/torch_extensions``), and built there if necessary.
A stamp file beside it has the hash of the sources and flags that built it, and the hash of the library's own bytes.
A library that is stale, truncated or corrupted does not match its stamp and is built again.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
INSTALLED = PACKAGE / "lib"
# The sources travel inside an installed package; in a checkout they lie beside it.
CSRC = next((p for p in (PACKAGE / "csrc", PACKAGE.parent / "csrc") if p.is_dir()), PACKAGE / "csrc")


class BuildError(RuntimeError):
    """A library cannot be built on this machine; the message has the compiler's output."""


@dataclass(frozen=True)
class Library:
    """How one shared library is built."""

    name: str
    folder: str
    """Subfolder of ``csrc``; a change to any file in it makes the library stale."""
    sources: tuple[str, ...]
    flags: tuple[str, ...]
    link: tuple[str, ...]
    uses_torch: bool = False
    seconds: int = 20
    """Approximate compile time, for the message."""

    @property
    def is_cuda(self) -> bool:
        """Whether nvcc compiles it."""
        return any(source.endswith(".cu") for source in self.sources)

    @property
    def file(self) -> str:
        """The library's file name."""
        return f"nckernels_{self.name}.so"

    def key(self) -> str:
        """A hash of everything that goes into the library."""
        libraries = _torch_libraries() if self.uses_torch else []  # a torch without CUDA gives another library
        digest = hashlib.sha256(repr((self, platform.machine(), _extra_flags(), libraries)).encode())
        for path in sorted((CSRC / self.folder).iterdir()):
            if path.is_file():
                digest.update(path.name.encode() + b"\0" + path.read_bytes())
        return digest.hexdigest()[:16]


# Strict IEEE arithmetic, except that multiply-adds are contracted and sqrt does not set errno.
_CPU_FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden"),
    *("-fno-math-errno", "-ffp-contract=fast", "-Wall", "-Wextra"),
)
_AVX512 = ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mprefer-vector-width=512")
_INSTRUCTIONS = {
    "amx": (*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
    "avx512_bf16": (*_AVX512, "-mavx512bf16"),
    "avx512": _AVX512,
    "avx2": ("-mavx2", "-mfma"),
    "default": (),
}

CPU = {
    name: Library(
        f"cpu_{name}",
        "cpu",
        ("bfloat16.cpp", "float32.cpp", "float64.cpp", "library.cpp", "portable.cpp"),
        (*_CPU_FLAGS, *flags),
        ("-fopenmp",),
    )
    for name, flags in _INSTRUCTIONS.items()
}
"""The CPU kernels by instruction set, widest first: a CPU that has one also has those after it."""


CUDA_ARCHITECTURES = ("80", "90a")
"""sm_80 code runs on all devices of compute capability 8.x, sm_90a on Hopper."""

CUDA = Library(
    "cuda",
    "cuda",
    (
        *("norms.cu", "lse.cu", "lse_wgmma.cu", "bias_grad.cu", "entries.cu", "short_grad.cu", "finish.cu"),
        *("panel.cu", "reduce.cu", "bindings.cpp"),
    ),
    # Torch's stable ABI of the oldest supported version: the library works with all later versions.
    (
        *("-std=c++20", "-O2", "-Xcompiler", "-fPIC", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"),
        *(word for arch in CUDA_ARCHITECTURES for word in ("-gencode", f"arch=compute_{arch},code=sm_{arch}")),
    ),
    (),
    uses_torch=True,
    seconds=300,
)
"""The kernels for NVIDIA GPUs."""


def cpu_libraries() -> list[Library]:
    """The CPU libraries for this machine's architecture."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return list(CPU.values()) if x86 else [CPU["default"]]


def find(library: Library) -> Path | None:
    """The path of the library if it exists and matches its stamp, else None; builds nothing."""
    key = library.key()
    folders = (INSTALLED, _cache() / f"{library.name}_{key}")
    return next((folder / library.file for folder in folders if _sound(folder / library.file, key)), None)


def find_or_build(library: Library) -> Path:
    """The path of the library, which is built in the cache if it is not found.

    Raises:
        BuildError: if it cannot be built.
    """
    path = find(library)
    if path is not None:
        return path
    folder = _cache() / f"{library.name}_{library.key()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / "lock"):
            path = find(library)  # another process may have built it meanwhile
            if path is None:
                _say(f"compiling {library.file} for this machine, once (takes some {library.seconds} seconds) ...")
                path = build(library, folder)
                _say(f"compiled to {path}")
            return path
    except OSError as error:
        raise BuildError(
            f"cannot write to the cache of compiled code, {folder}: {error}; set TORCH_EXTENSIONS_DIR to a folder "
            "that is writable"
        ) from error


def _say(text: str) -> None:
    print(f"nckernels: {text}", file=sys.stderr, flush=True)


def build(library: Library, folder: Path) -> Path:
    """Compile ``library`` into ``folder``, unless a valid one is there.

    Raises:
        BuildError: with the compiler's output.
        OSError: if the folder cannot be written.
    """
    key, target = library.key(), folder / library.file
    if _sound(target, key):
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="build_") as name:
        work = Path(name)
        (work / "build.ninja").write_text(_ninja_file(library))
        _run_ninja(library, work)
        fresh = work / library.file
        stamp = work / "stamp"
        stamp.write_text(json.dumps({"key": key, "sha256": _digest(fresh), "compiler": _version(library)}))
        # Atomic moves: no process sees half a library. Until its stamp has been moved too, it counts as stale.
        os.replace(fresh, target)
        os.replace(stamp, _stamp(target))
    return target


def describe(library: Library) -> str:
    """The path of a library and the compiler that built it, or "not built"."""
    path = find(library)
    if path is None:
        return "not built"
    return f"{path}, by {json.loads(_stamp(path).read_text())['compiler']}"


def _run_ninja(library: Library, folder: Path) -> None:
    log = []
    # "-k 0": go on after errors, to report all of them.
    with subprocess.Popen(
        [_ninja(), "-k", "0"], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            log.append(line)
            if line.startswith("["):  # [1/4] float32.cpp.o
                _say(line.rstrip())
    if process.returncode:
        raise BuildError(f"{library.file} does not compile:\n{''.join(log)}")


def _ninja_file(library: Library) -> str:
    """The ninja file: one compile command per source, in parallel, which also suits ``CXX="ccache g++"``."""
    compiler = nvcc() if library.is_cuda else _compiler()
    flags, link = [*library.flags, _extra_flags()], [*library.link, _extra_flags()]
    if library.uses_torch:
        torch = _torch()
        flags += [f"-I{_escaped(torch / 'include')}"]
        link += [f"-L{_escaped(torch / 'lib')}", *(f"-l{name}" for name in _torch_libraries())]
    lines = [
        "rule compile",
        f"  command = {compiler} {' '.join(flags)} -c $in -o $out",
        "  description = $out",
        "rule link",
        f"  command = {compiler} -shared $in {' '.join(link)} -o $out",
        "  description = $out",
    ]
    objects = []
    for source in library.sources:
        objects.append(f"{source}.o")
        lines.append(f"build {objects[-1]}: compile {_escaped(CSRC / library.folder / source)}")
    lines.append(f"build {library.file}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def _torch() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError("torch is not installed; the CUDA library is compiled with its headers")
    return Path(spec.origin).parent


def _torch_libraries() -> list[str]:
    """The libraries of torch that export its stable ABI; the library must be linked to them to find their symbols."""
    names = ("torch_cpu", "torch_cuda", "torch", "c10", "c10_cuda")
    return [name for name in names if (_torch() / "lib" / f"lib{name}.so").exists()]


def _escaped(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def nvcc() -> str:
    """The CUDA compiler's command.

    Raises:
        BuildError: if there is none.
    """
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    found = shutil.which("nvcc", path=str(home / "bin")) or shutil.which("nvcc")
    if found is None:
        raise BuildError("no CUDA compiler: nvcc is neither in $CUDA_HOME/bin nor on the PATH")
    return found


def _ninja() -> str:
    """The ninja program: from the Python package if installed, else from the PATH."""
    if importlib.util.find_spec("ninja"):
        import ninja

        bundled = Path(ninja.BIN_DIR) / "ninja"
        if bundled.exists():
            return str(bundled)
    found = shutil.which("ninja")
    if found is None:
        raise BuildError("ninja is not installed: pip install ninja")
    return found


def _compiler() -> str:
    """The command of the C++ compiler, which may consist of several words."""
    command = os.environ.get("CXX")
    if command:
        return command
    return next((name for name in ("g++", "c++") if shutil.which(name)), "c++")


def _extra_flags() -> str:
    return os.environ.get("NCKERNELS_CXXFLAGS", "")


def _version(library: Library) -> str:
    """The compiler's version line and, for CUDA, the architectures that it compiled for."""
    compiler = nvcc() if library.is_cuda else _compiler()
    try:
        said = subprocess.run([*compiler.split(), "--version"], capture_output=True, text=True).stdout.splitlines()
    except OSError:
        return compiler
    lines = [line for line in said if "release" in line] or said[:1] or [compiler]
    devices = f" for sm_{', sm_'.join(CUDA_ARCHITECTURES)}" if library.is_cuda else ""
    return lines[0] + devices


def _cache() -> Path:
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if root:
        return Path(root).expanduser() / "nckernels"
    base = Path("~/Library/Caches") if sys.platform == "darwin" else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"))
    return base.expanduser() / "torch_extensions" / "nckernels"


def _stamp(path: Path) -> Path:
    return path.with_suffix(".json")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _sound(path: Path, key: str) -> bool:
    """Whether the library exists, matches the current sources and flags, and is not corrupted."""
    try:
        stamp = json.loads(_stamp(path).read_text())
        return bool(stamp["key"] == key and stamp["sha256"] == _digest(path))
    except (OSError, ValueError, KeyError, TypeError):
        return False


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file. The system releases the lock of a killed process."""
    try:
        import fcntl
    except ImportError:  # not POSIX: two processes may both build, and the later library stays
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
