"""The native backend: exactness, instruction sets, threads, forks, scratch memory; and building it, with all
that can go wrong there."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import oracle
import pytest
import torch
from torch import Tensor

import nckernels
from nckernels.backends import build, native, registry

pytestmark = pytest.mark.skipif(native.BACKEND.missing() is not None, reason=str(native.BACKEND.missing()))

LOSSES = {"nonl": nckernels.nonl_loss, "ntce": nckernels.ntce_loss, "normface": nckernels.normface_loss}
MIB = 2**20


def problem(m: int, k: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(m, d, generator=g).to(dtype).requires_grad_()
    w = torch.randn(k, d, generator=g).to(dtype).requires_grad_()
    return x, w, torch.randint(k, (m,), generator=g)


def step(x: Tensor, w: Tensor, y: Tensor, loss: str = "nonl", backend: str = "native") -> tuple[Tensor, ...]:
    """Value and gradients."""
    with nckernels.use_backend(backend):
        value = LOSSES[loss](x, w, y)
    return value.detach(), *torch.autograd.grad(value, (x, w))


def assert_same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


# --- numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", [(4096, 200, 512), (1024, 64, 2048), (3000, 500, 96)])
def test_float32_gradients_are_within_3e_7(shape: tuple[int, int, int], loss: str) -> None:
    x, w, y = problem(*shape)
    exact = step(*(t.detach().double().requires_grad_() for t in (x, w)), y, loss, "reference")
    for name, got, truth in zip(("loss", "features", "prototypes"), step(x, w, y, loss), exact, strict=True):
        error = float((got.double() - truth).norm() / truth.norm())
        assert error <= 3e-7, (name, error)


@pytest.mark.parametrize("beta", [1.0, 29.0, 31.0, 500.0])
@pytest.mark.parametrize("workspace", [64 * 1024, 4 * MIB])
def test_both_ways_to_sum_keep_what_fits(beta: float, workspace: int) -> None:
    """Without a running maximum up to beta = 30, with one above; nothing, a part or all of the tiles kept."""
    for direction, exclude in (("class", "target"), ("both", "none"), ("instance", "target")):
        case = oracle.make_problem(500, 70, 20, direction=direction, exclude=exclude, beta=beta, bias=True)
        with nckernels.use_backend("native"), nckernels.use_workspace(workspace):
            oracle.check(case, torch.float64)
            oracle.check(case, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_number_is_converted(dtype: torch.dtype) -> None:
    """All finite numbers as features in rows of one: u is their sign, and the inverse norm shows the number."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[x.isfinite()][:, None]
    y = torch.zeros(len(x), dtype=torch.int64)
    arguments = (x, torch.ones(1, 1, dtype=dtype), y, torch.tensor(1.0), None, None, "instance", "none", False, -100)
    results = torch.ops.nckernels.cosine_lse(*arguments, MIB, "native", False)
    eps = 2.0**-14 if dtype == torch.float16 else 1e-12
    # The squares of bfloat16's largest numbers leave the range of float32: their norm is inf, as in PyTorch.
    x = x[:, 0].double()
    norm = torch.where(x.abs() < 2.0**64, x.abs().clamp_min(eps), torch.inf)
    torch.testing.assert_close(results[2].double(), x / norm, rtol=1e-6, atol=1e-30)
    torch.testing.assert_close(results[3].double(), 1 / norm, rtol=1e-6, atol=0)


# --- threads and processes --------------------------------------------------------------------------------


@pytest.fixture
def _restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_restore_threads")
@pytest.mark.parametrize("loss", LOSSES)
def test_threads_do_not_change_the_result(loss: str) -> None:
    x, w, y = problem(1000, 150, 64)
    torch.set_num_threads(1)
    one = step(x, w, y, loss)
    torch.set_num_threads(2)
    assert_same(step(x, w, y, loss), one)
    torch.set_num_threads(7)  # other tiles: equal up to rounding, and the same each time
    many = step(x, w, y, loss)
    assert_same(step(x, w, y, loss), many)
    for got, expected in zip(many, one, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.usefixtures("_restore_threads")
def test_called_from_several_python_threads() -> None:
    torch.set_num_threads(2)
    cases = [problem(400 + 37 * i, 50, 48, seed=i) for i in range(4)]
    expected = [step(*case) for case in cases]
    failures: list[BaseException] = []

    def work(i: int) -> None:
        try:
            torch.set_num_threads(2)
            for _ in range(5):
                assert_same(step(*cases[i], backend="native"), expected[i])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    with nckernels.use_backend("native"):  # the choice is process-wide: threads that leave theirs must not end it
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    assert not failures, failures[0]


FORK = """
import os, sys, torch, nckernels
torch.set_num_threads(2)
torch.manual_seed(0)
x, w, y = torch.randn(2000, 64, requires_grad=True), torch.randn(100, 64, requires_grad=True), torch.arange(2000) % 100
nckernels.set_backend("native")
def forward():
    return nckernels.nonl_loss(x, w, y)
before = forward()
before.backward()
child = os.fork()
if child == 0:  # without a backward pass: PyTorch refuses one in a child of a process that has had one
    os._exit(0 if torch.equal(forward(), before) else 1)
_, status = os.waitpid(child, 0)
assert torch.equal(forward(), before)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def run_python(code: str, timeout: float = 240, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=timeout
    )


def test_fork_after_use() -> None:
    """OpenMP's threads are not there in a child: it must not wait for them."""
    result = run_python(FORK, timeout=60)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("capability", ["default", pytest.param("avx2", marks=pytest.mark.slow)])
def test_instruction_sets(capability: str) -> None:
    """Every library that this CPU can run gives the oracle's results."""
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import oracle, torch, nckernels
from nckernels.backends import native
assert native.library().name == "cpu_{capability}", native.library().name
nckernels.set_backend("native")
for dtype in (torch.float64, torch.float32, torch.bfloat16):
    for direction in oracle.DIRECTIONS:
        for exclude in oracle.EXCLUDES:
            for beta in (10.0, 100.0):
                shape = (70, 70, 37) if exclude in ("self", "same_label") else (150, 43, 37)
                case = oracle.make_problem(*shape, direction=direction, exclude=exclude, beta=beta, bias=True)
                oracle.check(case, dtype)
"""
    result = run_python(code, ATEN_CPU_CAPABILITY=capability)
    assert result.returncode == 0, result.stderr[-3000:]


# --- memory -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_restore_threads")
@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize("workspace", [MIB, 8 * MIB])
@pytest.mark.parametrize("loss", LOSSES)
def test_scratch_stays_within_the_workspace(loss: str, workspace: int, threads: int) -> None:
    """Scratch of the C++ code (which torch's allocator does not see) plus what is kept for the backward."""
    torch.set_num_threads(threads)
    with nckernels.use_workspace(workspace):
        for m, k, d in ((4096, 600, 64), (600, 20_000, 32), (300, 200, 512)):
            native.peak_scratch()
            step(*problem(m, k, d), loss)
            dense = nckernels.backends.base.Spec("class", "target", loss != "normface", -100, workspace)
            kept = 4 * native.BACKEND.kept_numel(torch.device("cpu"), torch.float32, m, k, dense)
            vectors = 256 * (m + k)
            assert native.peak_scratch() + kept <= workspace + vectors, (m, k, d)


# --- building ---------------------------------------------------------------------------------------------

USE = """
import warnings, torch, nckernels
warnings.simplefilter("always")
loss = nckernels.nonl_loss(torch.eye(4), torch.eye(4), torch.arange(4))
loss = nckernels.nonl_loss(torch.eye(4), torch.eye(4), torch.arange(4))
from nckernels.backends import registry
print(registry.resolve(torch.device("cpu"), torch.float32))
"""


@pytest.fixture(scope="session")
def compiled() -> Path:
    """The library of this machine."""
    path = build.find(native.library())
    assert path is not None
    return path


# A compiler that takes no time: it "compiles" by copying the library that is there already.
FAKE_COMPILER = """#!/bin/sh
for last; do :; done
case "$*" in *--version*) echo fake 1.0; exit;; esac
sleep 0.2
echo run >> {log}
cp {library} "$last"
"""


@pytest.fixture
def fake(tmp_path: Path, compiled: Path) -> tuple[dict[str, str], Path]:
    """An empty cache, a compiler that takes no time, and its log: one line a run."""
    script, log = tmp_path / "cxx", tmp_path / "log"
    script.write_text(FAKE_COMPILER.format(library=compiled, log=log))
    script.chmod(0o755)
    return {"CXX": str(script), "TORCH_EXTENSIONS_DIR": str(tmp_path / "cache")}, log


RUNS = len(native.library().sources) + 1  # of the compiler: each source, and the link


def test_a_second_process_uses_what_the_first_one_built(fake: tuple[dict[str, str], Path]) -> None:
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
    """Automatically: one warning, and the next backend. By name: an error with the reason in full."""
    result = run_python(USE, **environment)
    assert result.stdout.split() == ["chunked"], result.stderr
    assert result.stderr.count("falling back from backend 'native'") == 1, result.stderr
    explicit = run_python("import nckernels; nckernels.set_backend('native')", **environment)
    assert explicit.returncode == 1
    assert "ValueError: backend 'native' cannot run here: " in explicit.stderr
    assert reason in explicit.stderr, explicit.stderr


def test_a_compiler_that_fails(tmp_path: Path) -> None:
    script = tmp_path / "cxx"
    script.write_text("#!/bin/sh\necho first line >&2\necho 'tiles.hpp:1: error: no such luck' >&2\nexit 1\n")
    script.chmod(0o755)
    environment = {"CXX": str(script), "TORCH_EXTENSIONS_DIR": str(tmp_path / "cache")}
    fall_back(environment, "error: no such luck")


def test_no_compiler(tmp_path: Path) -> None:
    environment = {"CXX": str(tmp_path / "no-such-compiler"), "TORCH_EXTENSIONS_DIR": str(tmp_path / "cache")}
    fall_back(environment, "no-such-compiler")


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where a folder should be")
    fall_back({"TORCH_EXTENSIONS_DIR": str(tmp_path / "cache")}, "set TORCH_EXTENSIONS_DIR")


def test_a_library_that_does_not_load(tmp_path: Path) -> None:
    """A compiler that makes something else of it."""
    script = tmp_path / "cxx"
    script.write_text('#!/bin/sh\nfor last; do :; done\necho not a library > "$last"\n')
    script.chmod(0o755)
    fall_back({"CXX": str(script), "TORCH_EXTENSIONS_DIR": str(tmp_path / "cache")}, "nckernels_cpu")


def test_changed_sources_are_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = native.library().key()
    sources = tmp_path / "cpu"
    sources.mkdir()
    for path in (build.CSRC / "cpu").iterdir():
        (sources / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(build, "CSRC", tmp_path)
    assert native.library().key() == before
    (sources / "simd.hpp").write_text((sources / "simd.hpp").read_text() + "\n")
    assert native.library().key() != before


def test_registry_prefers_native_on_the_cpu() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        assert registry.resolve(torch.device("cpu"), dtype) == "native"
