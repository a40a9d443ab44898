"""Building the native code: concurrent processes, the cache, and failures."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nckernels.backends import build, native

pytestmark = pytest.mark.skipif(native.BACKEND.missing() is not None, reason=str(native.BACKEND.missing()))

USE = """
import warnings, torch, nckernels
warnings.simplefilter("always")
loss = nckernels.nonl_loss(torch.eye(4), torch.eye(4), torch.arange(4))
loss = nckernels.nonl_loss(torch.eye(4), torch.eye(4), torch.arange(4))
from nckernels.backends import registry
print(registry.resolve(torch.device("cpu"), torch.float32))
"""


def run_python(code: str, timeout: float = 240, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=timeout
    )


@pytest.fixture(scope="session")
def compiled() -> Path:
    """The library of this machine."""
    path = build.find(native.library())
    assert path is not None
    return path


def test_every_file_of_cuda_is_compiled() -> None:
    folder = Path(__file__).parents[1] / "csrc" / "cuda"
    assert set(build.CUDA.sources) == {file.name for ending in ("*.cu", "*.cpp") for file in folder.glob(ending)}


# A fast fake compiler, which copies the existing library.
FAKE_COMPILER = """#!/bin/sh
for last; do :; done
case "$*" in *--version*) echo fake 1.0; exit;; esac
sleep 0.2
echo run >> {log}
cp {library} "$last"
"""


@pytest.fixture
def fake(tmp_path: Path, compiled: Path) -> tuple[dict[str, str], Path]:
    """An empty cache, a fast fake compiler, and its log with one line per run."""
    script, log = tmp_path / "cxx", tmp_path / "log"
    script.write_text(FAKE_COMPILER.format(library=compiled, log=log))
    script.chmod(0o755)
    return {"CXX": str(script), "TORCH_EXTENSIONS_DIR": str(tmp_path / "cache")}, log


RUNS = len(native.library().sources) + 1  # of the compiler: each source, and the link


def test_a_second_process_uses_the_library_of_the_first(fake: tuple[dict[str, str], Path]) -> None:
    environment, log = fake
    first = run_python(USE, **environment)
    assert first.stdout.split() == ["native"], first.stderr
    assert "compiling" in first.stderr
    second = run_python(USE, **environment)
    assert second.stdout.split() == ["native"]
    assert "compiling" not in second.stderr
    assert len(log.read_text().split()) == RUNS


def test_two_processes_build_once(fake: tuple[dict[str, str], Path]) -> None:
    environment, log = fake
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", USE], env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(2)
    ]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert out.split() == [b"native"], err
    assert len(log.read_text().split()) == RUNS


def test_a_killed_build_leaves_no_lock(fake: tuple[dict[str, str], Path], tmp_path: Path) -> None:
    environment, log = fake
    slow = tmp_path / "slow"
    slow.write_text(f"#!/bin/sh\necho run >> {log}\nexec sleep 600\n")
    slow.chmod(0o755)
    process = subprocess.Popen([sys.executable, "-c", USE], env=os.environ | environment | {"CXX": str(slow)})
    end = time.monotonic() + 60
    while not log.exists() and time.monotonic() < end:
        time.sleep(0.05)
    process.kill()
    process.wait()
    result = run_python(USE, **environment)
    assert result.stdout.split() == ["native"], result.stderr


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "stale", "no stamp", "stamp is garbage"])
def test_damaged_caches_are_built_again(
    fake: tuple[dict[str, str], Path], compiled: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment, log = fake
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    path = build.find_or_build(native.library())
    content, stamp = compiled.read_bytes(), path.with_suffix(".json")
    assert path.read_bytes() == content
    if damage == "no stamp":
        stamp.unlink()
    elif damage == "stamp is garbage":
        stamp.write_text("{")
    elif damage == "stale":
        stamp.write_text(stamp.read_text().replace(native.library().key(), "0" * 16))
    else:
        flipped = content[:5000] + bytes([content[5000] ^ 255]) + content[5001:]
        path.write_bytes({"truncated": content[: len(content) // 2], "flipped": flipped, "empty": b""}[damage])
    assert build.find(native.library()) is None
    assert build.find_or_build(native.library()) == path
    assert path.read_bytes() == content
    assert len(log.read_text().split()) == 2 * RUNS
    assert build.find_or_build(native.library()) == path
    assert len(log.read_text().split()) == 2 * RUNS


def fall_back(environment: dict[str, str], reason: str) -> None:
    """The automatic choice warns once and takes the next backend. A choice by name is an error with the full reason."""
    result = run_python(USE + "nckernels.set_backend('native')", **environment)
    assert result.stdout.split() == ["chunked"], result.stderr
    assert result.stderr.count("falling back from backend 'native'") == 1, result.stderr
    assert result.returncode == 1
    assert "ValueError: backend 'native' cannot run here: " in result.stderr
    assert reason in result.stderr.rpartition("ValueError: ")[2], result.stderr


def test_a_failing_compiler(tmp_path: Path) -> None:
    script = tmp_path / "cxx"
    script.write_text("#!/bin/sh\necho first line >&2\necho 'tiles.hpp:1: error: no such luck' >&2\nexit 1\n")
    script.chmod(0o755)
    environment = {"CXX": str(script), "TORCH_EXTENSIONS_DIR": str(tmp_path / "cache")}
    fall_back(environment, "error: no such luck")


def test_no_compiler(tmp_path: Path) -> None:
    environment = {"CXX": str(tmp_path / "no-such-compiler"), "TORCH_EXTENSIONS_DIR": str(tmp_path / "cache")}
    fall_back(environment, "no-such-compiler")


def test_an_unwritable_cache(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where a folder should be")
    fall_back({"TORCH_EXTENSIONS_DIR": str(tmp_path / "cache")}, "set TORCH_EXTENSIONS_DIR")


def test_a_library_that_does_not_load(tmp_path: Path) -> None:
    """A compiler whose output is not a library."""
    script = tmp_path / "cxx"
    script.write_text('#!/bin/sh\nfor last; do :; done\n[ "$last" = --version ] || echo not a library > "$last"\n')
    script.chmod(0o755)
    fall_back({"CXX": str(script), "TORCH_EXTENSIONS_DIR": str(tmp_path / "cache")}, "nckernels_cpu")


def test_changed_sources_change_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = native.library().key()
    sources = tmp_path / "cpu"
    sources.mkdir()
    for path in (build.CSRC / "cpu").iterdir():
        (sources / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(build, "CSRC", tmp_path)
    assert native.library().key() == before
    (sources / "simd.hpp").write_text((sources / "simd.hpp").read_text() + "\n")
    assert native.library().key() != before


def test_import_does_not_import_the_pytorch_compiler() -> None:
    """torch._dynamo would double the time of the import."""
    found = run_python("import nckernels, sys; print('torch._dynamo' in sys.modules)")
    assert found.stdout.strip() == "False", found.stderr


@pytest.mark.skipif(platform.machine() != "x86_64", reason="portable.cpp is for x86-64")
def test_the_library_runs_with_an_older_glibc_and_libstdcxx() -> None:
    """It asks for no version of a symbol that portable.cpp replaces: a linker takes the newest that it finds."""
    library = native.library()
    assert library is not None
    path = build.find(library)
    assert path is not None
    versions = set(re.findall(rb"GLIBC(?:XX)?_[\d.]+", path.read_bytes()))
    assert b"GLIBC_2.2.5" in versions
    assert not versions & {b"GLIBC_2.29", b"GLIBCXX_3.4.29"}
