"""The native backend: exactness, instruction sets, threads, forks, scratch memory."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import oracle
import pytest
import torch
from torch import Tensor

import nckernels
from nckernels import info
from nckernels.backends import build, native, registry

pytestmark = pytest.mark.skipif(native.BACKEND.missing() is not None, reason=str(native.BACKEND.missing()))

LOSSES = {
    "nonl": nckernels.nonl_loss,
    "ntce": nckernels.ntce_loss,
    "normface": nckernels.normface_loss,
    "nonl-both": functools.partial(nckernels.nonl_loss, direction="both"),
    "smoothing": functools.partial(nckernels.normface_loss, label_smoothing=0.1),
    "margins": functools.partial(nckernels.normface_loss, angular_margin=0.3, cosine_margin=0.1, label_smoothing=0.05),
}
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


def self_step(x: Tensor, y: Tensor, backend: str = "native") -> tuple[Tensor, ...]:
    """Log-sum-exps and positives of features against themselves, and the gradient."""
    with nckernels.use_backend(backend):
        lse, pos = nckernels.cosine_lse(x, x, y, 10.0, exclude="self", direction="instance")
    weight = torch.linspace(0.5, 1.5, len(x), dtype=x.dtype)
    valid = y != -100
    value = (weight * (lse - pos))[valid].sum()
    return lse.detach(), pos.detach(), *torch.autograd.grad(value, x)


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
def test_kept_tiles_with_and_without_a_running_maximum(beta: float, workspace: int) -> None:
    """Shift-free up to beta = 30, a running maximum above; none, some or all of the tiles kept."""
    for direction, exclude in (("class", "target"), ("both", "none"), ("instance", "target")):
        case = oracle.make_problem(500, 70, 20, direction=direction, exclude=exclude, beta=beta, bias=True)
        with nckernels.use_backend("native"), nckernels.use_workspace(workspace):
            oracle.check(case, torch.float64)
            oracle.check(case, torch.float32)


@pytest.mark.parametrize("beta", [1.0, 29.0, 31.0, 500.0])
@pytest.mark.parametrize("workspace", [1, 64 * 1024, 512 * 1024, 8 * MIB])
@pytest.mark.parametrize("exclude", ["self", "same_label"])
def test_symmetric_problems_of_all_sizes(exclude: str, workspace: int, beta: float) -> None:
    """Blocks of columns from one panel to the whole matrix; none, some or all of the tiles kept."""
    for samples in (97, 500):
        for direction in ("class", "instance"):
            case = oracle.make_problem(
                samples, samples, 21, direction=direction, exclude=exclude, beta=beta, bias=True, itself=True
            )
            with nckernels.use_backend("native"), nckernels.use_workspace(workspace):
                oracle.check(case, torch.float64)
                oracle.check(case, torch.float32)


@pytest.mark.parametrize("d", [40, 300])
@pytest.mark.parametrize("workspace", [MIB, 64 * MIB])
def test_large_symmetric_problems_are_within_3e_7(workspace: int, d: int) -> None:
    """Several blocks of columns and several parts of a tile, or one block whose tiles are all kept."""
    x, _, y = problem(3001, 3001, d)
    x64 = x.detach().double().requires_grad_()
    exact = self_step(x64, y, "reference")
    with nckernels.use_workspace(workspace):
        for name, got, truth in zip(("lse", "pos", "features"), self_step(x, y), exact, strict=True):
            error = float((got.double() - truth).norm() / truth.norm())
            assert error <= 3e-7, (name, error)


def test_symmetric_ignored_samples_are_not_read() -> None:
    """NaN in ignored rows that are no positives gives the same bits as numbers there."""
    x, _, y = problem(700, 700, 24)
    y[::7] = -100
    with torch.no_grad():
        named = torch.zeros(700, dtype=torch.bool).index_fill_(0, y[y >= 0], True)
        unread = (y == -100) & ~named
        assert unread.any()
        other = x.detach().clone().requires_grad_()
        other[unread] = torch.nan
    for workspace in (64 * 1024, 8 * MIB):
        with nckernels.use_workspace(workspace):
            assert_same(self_step(other, y), self_step(x, y))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_number_is_converted(dtype: torch.dtype) -> None:
    """As features of size 1: u is their sign, and the inverse norm is 1 over their value. Infinity has no direction."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)[:, None]
    y = torch.zeros(len(x), dtype=torch.int64)
    arguments = (x, torch.ones(1, 1, dtype=dtype), y, torch.tensor(1.0), None, None, "instance", "none", False, -100)
    results = torch.ops.nckernels.cosine_lse(*arguments, MIB, False, "native", False, "")
    eps = 2.0**-14 if dtype == torch.float16 else 1e-12
    # The squares of bfloat16's largest numbers leave the range of float32: their norm is inf, as in PyTorch.
    x = x[:, 0].double()
    norm = torch.where(x.abs() < 2.0**64, x.abs().clamp_min(eps), x.abs() * torch.inf)
    torch.testing.assert_close(results[2].double(), x / norm, rtol=1e-6, atol=1e-30, equal_nan=True)
    torch.testing.assert_close(results[3].double(), 1 / norm, rtol=1e-6, atol=0, equal_nan=True)


# --- threads and processes --------------------------------------------------------------------------------


@pytest.fixture
def _restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_restore_threads")
@pytest.mark.parametrize("shape", [(1000, 150, 64), (3000, 10, 128)])
@pytest.mark.parametrize("loss", LOSSES)
def test_threads_do_not_change_the_result(loss: str, shape: tuple[int, int, int]) -> None:
    x, w, y = problem(*shape)
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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_parts_of_rows(dtype: torch.dtype) -> None:
    """Three parts of several blocks of columns."""
    x, w, y = problem(500, 1100, 40, dtype)
    with nckernels.use_workspace(MIB):
        torch.set_num_threads(1)
        one = step(x, w, y, "margins")
        torch.set_num_threads(2)
        assert_same(step(x, w, y, "margins"), one)


@pytest.mark.usefixtures("_restore_threads")
@pytest.mark.parametrize("workspace", [256 * 1024, 32 * MIB])
def test_threads_do_not_change_a_symmetric_result(workspace: int) -> None:
    x, _, y = problem(1300, 1300, 72)
    with nckernels.use_workspace(workspace):
        torch.set_num_threads(1)
        one = self_step(x, y)
        torch.set_num_threads(2)
        for _ in range(3):
            assert_same(self_step(x, y), one)
        torch.set_num_threads(7)
        many = self_step(x, y)
        assert_same(self_step(x, y), many)
    for got, expected in zip(many, one, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("_restore_threads")
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("forward", "backward"), [(2, 1), (1, 8)])
def test_threads_change_between_forward_and_backward(symmetric: bool, forward: int, backward: int) -> None:
    """The height of kept tiles depends on the number of threads."""
    x, w, y = problem(600, 300, 64)

    def gradient(*threads: int) -> Tensor:
        with nckernels.use_backend("native"), nckernels.use_workspace(MIB):
            torch.set_num_threads(threads[0])
            options = {"exclude": "self"} if symmetric else {}
            lse, pos = nckernels.cosine_lse(x, x if symmetric else w, y, 10.0, direction="instance", **options)
            torch.set_num_threads(threads[1])
            return torch.autograd.grad((lse - pos).sum(), x)[0]

    torch.testing.assert_close(gradient(forward, backward), gradient(1, 1), rtol=1e-4, atol=1e-5)


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
    with nckernels.use_backend("native"):  # process-wide: a thread that leaves its own choice must not end this one
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
x16, w16 = x.detach().bfloat16().requires_grad_(), w.detach().bfloat16()
nckernels.set_backend("native")
def forward():
    return nckernels.nonl_loss(x, w, y) + nckernels.nonl_loss(x16, w16, y)
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
    """OpenMP's threads do not exist in a child process, which must not wait for them."""
    result = run_python(FORK, timeout=60)
    assert result.returncode == 0, result.stderr


FORK_OF_ONE_THREAD = """
import os, signal, threading
from nckernels.backends import native
def allocate():
    while True:
        native.peak_scratch()
for _ in range(2):
    threading.Thread(target=allocate, daemon=True).start()
for _ in range(200):
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # ends the process
        native.peak_scratch()
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        os._exit(1)
os._exit(0)
"""


def test_fork_while_other_threads_hold_the_lock_of_scratch_memory() -> None:
    """The child, which does not have these threads, would wait for ever."""
    assert run_python(FORK_OF_ONE_THREAD, timeout=60).returncode == 0


# Models of instructions that this CPU may lack, which run on any CPU.
PAIRS = "-O1 -DNCK_BFLOAT16"
TILES = "-O1 -DNCK_AMX -DNCK_VECTOR_BYTES=64 -Wno-psabi"


@pytest.mark.parametrize(
    ("instructions", "model"),
    [
        pytest.param("default", PAIRS, id="default, and a model of pairs"),
        pytest.param("default", TILES, id="vectors of AVX-512 in halves, and a model of AMX"),
        *(pytest.param(name, "", id=name, marks=pytest.mark.slow) for name in ("default", "avx2", "avx512")),
    ],
)
def test_instruction_sets(instructions: str, model: str) -> None:
    """Every library that this CPU can run agrees with the oracle, and so do models of other instructions."""
    if build.CPU[instructions] not in native.libraries():
        pytest.skip(f"this CPU has no {instructions}")
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import oracle, torch, nckernels
from nckernels.backends import native
assert native.library().name == "cpu_{instructions}", native.library().name
nckernels.set_backend("native")
for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
    for direction in oracle.DIRECTIONS:
        for exclude in oracle.EXCLUDES:
            for beta in (10.0, 100.0):
                shape = (70, 70, 37) if exclude in ("self", "same_label") else (150, 43, 37)
                case = oracle.make_problem(*shape, direction=direction, exclude=exclude, beta=beta, bias=True)
                oracle.check(case, dtype)
                for k in (1, 2, 3, 7, 17) if exclude == "none" else ():
                    case = oracle.make_problem(31, k, 37, direction=direction, exclude=exclude, beta=beta, bias=True)
                    oracle.check(case, dtype)
                if shape[0] == shape[1] and direction != "both":
                    shape = (210, 210, 37)
                    case = oracle.make_problem(
                        *shape, direction=direction, exclude=exclude, beta=beta, bias=True, itself=True
                    )
                    oracle.check(case, dtype)
    case = oracle.make_problem(301, 290, 531, direction="both", exclude="target", beta=10.0, bias=True)
    oracle.check(case, dtype)  # more than one block along d
"""
    result = run_python(code, NCKERNELS_CPU_INSTRUCTIONS=instructions, NCKERNELS_CXXFLAGS=model)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize(
    ("capability", "bf16", "tiles", "permission", "best"),
    [
        ("AVX512", True, True, True, "amx"),
        ("AVX512", True, True, False, "avx512"),  # the kernel lacks AMX, or a sandbox forbids the request
        ("AVX512", True, False, True, "avx512_bf16"),
        ("AVX512", False, False, False, "avx512"),
        ("AVX2", True, True, True, "avx2"),  # $ATEN_CPU_CAPABILITY
        ("NO AVX", False, False, False, "default"),
        ("ZVECTOR", False, False, False, "default"),
    ],
)
def test_library_choice_by_cpu_and_environment(
    monkeypatch: pytest.MonkeyPatch, capability: str, bf16: bool, tiles: bool, permission: bool, best: str
) -> None:
    monkeypatch.delenv("NCKERNELS_CPU_INSTRUCTIONS", raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    for name, value in (
        ("_is_avx512_bf16_supported", bf16),
        ("_is_amx_tile_supported", tiles),
        ("_init_amx", permission),
    ):
        monkeypatch.setattr(torch.cpu, name, lambda value=value: value)
    names = [name for name in build.CPU if not tiles or name != "avx512_bf16"]
    assert native.libraries() == [build.CPU[name] for name in names[names.index(best) :]]


def test_vdpbf16ps_can_be_chosen_on_a_cpu_with_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCKERNELS_CPU_INSTRUCTIONS", "avx512_bf16")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_init_amx"):
        monkeypatch.setattr(torch.cpu, name, lambda: True)
    assert native.libraries()[0] == build.CPU["avx512_bf16"]


def test_unknown_or_unsupported_instruction_set_is_an_error() -> None:
    """An unknown name, or that of a library that would end in SIGILL, is an error that lists the valid names."""
    code = "import nckernels; nckernels.set_backend('native')"
    widest = native.libraries()[0].name.removeprefix("cpu_")
    names = list(build.CPU)
    for name in ("sse9", *names[: names.index(widest)]):
        result = run_python(code, NCKERNELS_CPU_INSTRUCTIONS=name)
        assert "NCKERNELS_CPU_INSTRUCTIONS must be one of " in result.stderr, name
        assert f"default on this CPU, got {name!r}" in result.stderr


@pytest.mark.parametrize("runs", [True, False])
def test_report_names_bfloat16_products_only_with_a_library(monkeypatch: pytest.MonkeyPatch, runs: bool) -> None:
    """Without the library another backend multiplies, possibly in 16 bits."""
    monkeypatch.setattr(native, "library", lambda: build.CPU["avx2"] if runs else None)
    assert ("bfloat16 features are multiplied in float32" in info.report()) == runs


def test_compiler_without_the_instructions_builds_the_next_library(tmp_path: Path) -> None:
    """An old compiler that rejects the flags of the best library builds the next one."""
    best, *others = native.libraries()
    if not others:
        pytest.skip("one library for this CPU")
    flag = next(flag for flag in reversed(best.flags) if flag not in others[0].flags)
    compiler = tmp_path / "compiler"
    compiler.write_text(
        f'#!/bin/sh\ncase " $* " in *" {flag} "*) echo unknown {flag} >&2; exit 1;; esac\nexec g++ "$@"\n'
    )
    compiler.chmod(0o755)
    code = "from nckernels.backends import native; print(native.library().name)"
    result = run_python(code, CXX=str(compiler), TORCH_EXTENSIONS_DIR=str(tmp_path), NCKERNELS_CXXFLAGS="-O0")
    assert result.stdout.strip() == others[0].name, result.stderr


# --- bfloat16 ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["class", "instance"])
def test_bfloat16_logits_have_float32_accuracy(direction: str) -> None:
    """Neither unit vectors nor cosines are rounded to bfloat16 before the sums."""
    x, w, y = problem(700, 300, 531, torch.bfloat16)
    with torch.no_grad():
        exact = nckernels.cosine_lse(x.double(), w.double(), y, 25.0, direction=direction)  # type: ignore[call-overload]
        got = nckernels.cosine_lse(x, w, y, 25.0, direction=direction)  # type: ignore[call-overload]
    for a, b in zip(got, exact, strict=True):
        assert (a.double() - b).abs().max() <= 2e-7 * 25.0


@pytest.mark.parametrize("loss", LOSSES)
def test_bfloat16_gradients_are_rounded_once_or_twice(loss: str) -> None:
    """The entries of dL/dt, with a relative error of 2**-9, and then the gradients."""
    x, w, y = problem(2000, 300, 200, torch.bfloat16)
    exact = step(*(t.detach().double().requires_grad_() for t in (x, w)), y, loss, "reference")
    for got, truth in zip(step(x, w, y, loss), exact, strict=True):
        assert (got.double() - truth).norm() <= 2.0**-8.5 * truth.norm()


@pytest.mark.parametrize("form", ["supcon", "smoothing"])
def test_bfloat16_entries_that_nearly_cancel(form: str) -> None:
    """The difference of weight and positive is rounded, not each of them: for learnt classes and for random
    features."""
    x, w, y = problem(300, 100, 64, torch.bfloat16)

    def gradients(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        if form == "supcon":
            return torch.autograd.grad(nckernels.supcon_loss(x, torch.zeros_like(y), temperature=3.0), x)
        return torch.autograd.grad(nckernels.normface_loss(x, w, y, temperature=0.3, label_smoothing=1.0), (x, w))

    with nckernels.use_backend("reference"):
        exact = gradients(*(t.detach().double().requires_grad_() for t in (x, w)))
    for got, truth in zip(gradients(x, w), exact, strict=True):
        assert (got.double() - truth).norm() <= 2.0**-8.5 * truth.norm()


@pytest.mark.usefixtures("_restore_threads")
def test_bfloat16_between_products_of_other_libraries_and_signals() -> None:
    """oneDNN configures the tile registers of AMX as well, and a signal may arrive while they are in use."""
    case = problem(400, 100, 200, torch.bfloat16)
    query, image = torch.randn(2, 4, 100, 64).bfloat16(), torch.randn(2, 32, 12, 12).bfloat16()

    def others() -> tuple[Tensor, ...]:
        return (
            torch.mm(*(t.detach() for t in (case[1], case[0].T))),
            torch.nn.functional.scaled_dot_product_attention(query, query, query),
            torch.nn.functional.conv2d(image, image[:, :, :3, :3]),
        )

    signals: list[int] = []
    torch.set_num_threads(1)
    expected = step(*case), others()
    before = signal.signal(signal.SIGALRM, lambda number, _: signals.append(number))
    try:
        signal.setitimer(signal.ITIMER_REAL, 1e-3, 1e-3)
        for i in range(40):
            torch.set_num_threads(1 + i % 2)
            assert_same((*step(*case), *others()), (*expected[0], *expected[1]))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert signals


@pytest.mark.parametrize("loss", LOSSES)
def test_bfloat16_unaligned_rows(loss: str) -> None:
    """Rows with odd offsets and an odd stride."""
    x, w, y = problem(300, 70, 45, torch.bfloat16)
    expected = step(x, w, y, loss)
    storage = torch.randn(300 * 53 + 3).bfloat16()
    moved = storage[3:].view(300, 53)[:, :45]
    moved.copy_(x.detach())
    for a, b in zip(step(moved.requires_grad_(), w, y, loss), expected, strict=True):
        assert torch.equal(a, b)


# --- steps ------------------------------------------------------------------------------------------------


def exact_step(x: Tensor, w: Tensor, y: Tensor, loss: str, **options: object) -> tuple[Tensor, ...]:
    """Value and gradients with respect to features, prototypes and temperature, in float64."""
    wide = [t.detach().double().requires_grad_() for t in (x, w, torch.tensor(0.1, dtype=torch.float64))]
    with nckernels.use_backend("reference"):
        value = LOSSES[loss](*wide[:2], y, temperature=wide[2], **options)
    return value.detach(), *torch.autograd.grad(value, wide)


@pytest.mark.covers(2)
@pytest.mark.usefixtures("_restore_threads")
@pytest.mark.parametrize(("dtype", "threads"), [(torch.float64, 1), (torch.float32, 2), (torch.bfloat16, 1)])
@pytest.mark.parametrize("shape", [(1500, 400, 40), (700, 900, 24), (601, 630, 300)])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_in_parts(loss: str, shape: tuple[int, int, int], dtype: torch.dtype, threads: int) -> None:
    """Workspaces of which half holds a third of the matrix, which gives parts of columns or rows, or a fifteenth,
    which is too little for parts, so that tiles are recomputed."""
    torch.set_num_threads(threads)
    x, w, y = problem(*shape, dtype=dtype, seed=1)
    y[::5] = -100
    weight = torch.rand(shape[1], generator=torch.Generator().manual_seed(2)).double()
    expected = exact_step(x, w, y, loss, weight=weight)
    scalar = nckernels.backends.base.accumulation_dtype(dtype).itemsize
    bound = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]
    for share in (3, 15):
        temperature = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        with nckernels.use_backend("native"), nckernels.use_workspace(2 * scalar * shape[0] * shape[1] // share):
            value = LOSSES[loss](x, w, y, temperature=temperature, weight=weight)
            found = value.detach(), *torch.autograd.grad(value, (x, w, temperature))
        for a, b in zip(found, expected, strict=True):
            assert (a.double() - b).norm() <= bound * b.norm()


IN_THE_GRADIENT: dict[str, Callable[..., Tensor]] = {
    **LOSSES,
    "both": functools.partial(nckernels.nonl_loss, direction="both"),
    "smoothing": functools.partial(nckernels.normface_loss, label_smoothing=0.1),
    "arcface": functools.partial(nckernels.normface_loss, angular_margin=0.2),
}


@pytest.mark.covers(2)
@pytest.mark.usefixtures("_restore_threads")
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("m", [5, 192, 1000])  # with a last tile that is whole, and with one that is not
@pytest.mark.parametrize("temperature", [0.1, 0.01])  # exponentials, and logits
@pytest.mark.parametrize("form", IN_THE_GRADIENT)
def test_gradient_rows_hold_exponentials(
    form: str, temperature: float, m: int, dtype: torch.dtype, threads: int
) -> None:
    """Where a row of the gradient is as long as one of the matrix; other memory holds them if nobody wants it."""
    torch.set_num_threads(threads)
    d = 300 if dtype == torch.bfloat16 else 150
    x, w, y = problem(m, 100, d, dtype=dtype, seed=3)
    y[2::5] = -100
    loss, found = IN_THE_GRADIENT[form], []
    with nckernels.use_backend("native"), nckernels.use_workspace(4 * MIB):
        for leaves in ((x, w), (w,)):
            value = loss(x if len(leaves) == 2 else x.detach(), w, y, temperature=temperature)
            found += [value.detach(), *torch.autograd.grad(value, leaves)]
    wide = [t.detach().double().requires_grad_() for t in (x, w)]
    with nckernels.use_backend("reference"):
        exact = loss(*wide, y, temperature=temperature)
    by_x, by_w = torch.autograd.grad(exact, wide)
    bound = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 8e-3}[dtype]
    for a, b in zip(found, (exact.detach(), by_x, by_w, exact.detach(), by_w), strict=True):
        assert (a.double() - b).norm() <= bound * b.norm()


@pytest.mark.parametrize("loss", ["nonl", "normface"])
def test_gradient_rows_save_scratch(loss: str) -> None:
    x, w, y = problem(8000, 100, 150)
    peaks = []
    with nckernels.use_backend("native"), nckernels.use_workspace(64 * MIB):
        for features in (x, x.detach()):
            native.peak_scratch()
            LOSSES[loss](features, w, y)
            peaks.append(native.peak_scratch())
    assert peaks[0] < 4 * 8000 * 100 < peaks[1]


@pytest.mark.parametrize("wanted", ["features", "prototypes"])
@pytest.mark.parametrize("workspace", [MIB, 8 * MIB])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_with_one_wanted_gradient(loss: str, workspace: int, wanted: str) -> None:
    x, w, y = problem(3000, 300, 24)
    leaf = x if wanted == "features" else w
    with nckernels.use_workspace(workspace):
        both = dict(zip(("features", "prototypes"), step(x, w, y, loss)[1:], strict=True))
        (w if leaf is x else x).requires_grad_(False)
        temperature = torch.tensor(0.1, requires_grad=True)
        value = LOSSES[loss](x, w, y, temperature=temperature)
        one, by_temperature = torch.autograd.grad(value, (leaf, temperature))
    assert torch.equal(one, both[wanted])
    expected = exact_step(x, w, y, loss)[3]
    assert abs(by_temperature - expected) <= 1e-5 * abs(expected)


@pytest.mark.parametrize("workspace", [MIB, 8 * MIB])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_for_the_temperature_only(loss: str, workspace: int) -> None:
    x, w, y = problem(3000, 300, 24)
    temperature = torch.tensor(0.1, requires_grad=True)
    with nckernels.use_workspace(workspace):
        value = LOSSES[loss](x.detach(), w.detach(), y, temperature=temperature)
        (by_temperature,) = torch.autograd.grad(value, temperature)
    expected = exact_step(x, w, y, loss)[3]
    assert abs(by_temperature - expected) <= 1e-5 * abs(expected)


@pytest.mark.parametrize("k", [10, 300])  # few classes have a pass of their own
def test_bfloat16_gradients_that_are_not_finite(k: int) -> None:
    x, w, y = problem(200, k, 24)
    x, w = x.detach().bfloat16(), w.detach().bfloat16().requires_grad_()
    x[3, 5] = torch.nan
    by_x, by_w = torch.autograd.grad(nckernels.normface_loss(x.requires_grad_(), w, y), (x, w))
    assert by_x[3].isnan().all()
    assert by_w.isnan().all()


@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_equals_the_mean_of_the_sample_losses(loss: str) -> None:
    """Loss and gradients in one call, compared with the forward and the backward pass of the samples' losses."""
    x, w, y = problem(500, 30, 16, torch.float64)
    mean = step(x, w, y, loss)
    value = LOSSES[loss](x, w, y, reduction="none").mean()
    for a, b in zip(mean, (value.detach(), *torch.autograd.grad(value, (x, w))), strict=True):
        assert (a - b).norm() <= 1e-14 * b.norm()


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("workspace", [MIB, 32 * MIB])
@pytest.mark.parametrize("shape", [(700, 20, 24), (90, 60, 200), (5, 1, 3)])
def test_a_supervised_step_equals_the_mean_of_the_sample_losses(
    shape: tuple[int, int, int], workspace: int, decoupled: bool
) -> None:
    x, _, y = problem(*shape, torch.float64)
    y[::9] = -100
    y[1] = shape[1]  # the only sample of its label
    weight = torch.rand(len(y), dtype=torch.float64)
    temperature = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    with nckernels.use_workspace(workspace):
        for weights in (None, weight):
            options = {"temperature": temperature, "decoupled": decoupled, "sample_weight": weights}
            mean = nckernels.supcon_loss(x, y, **options)
            each = nckernels.supcon_loss(x, y, reduction="none", **options)
            counted = torch.tensor([bool(((y == label).sum() > 1) & (label != -100)) for label in y])
            share = counted if weights is None else weights * counted
            expected = each.sum() / share.sum()
            got, wanted = (torch.autograd.grad(value, (x, temperature)) for value in (mean, expected))
            for a, b in zip((mean, *got), (expected, *wanted), strict=True):
                assert (a - b).norm() <= 1e-13 * b.norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("decoupled", [True, False])
def test_supervised_temperature_gradient_with_frozen_features(decoupled: bool, dtype: torch.dtype) -> None:
    """With frozen features the gradient of the temperature still includes the positives, once."""
    input, target = torch.randn(90, 20).to(dtype), torch.arange(90) % 7
    weight = torch.linspace(0, 1, 90, dtype=torch.promote_types(dtype, torch.float32))
    grads = []
    for frozen in (True, False):
        tau = torch.full_like(weight[0], 0.2).requires_grad_()
        rows = input.clone().requires_grad_(not frozen)
        losses = nckernels.supcon_loss(rows, target, temperature=tau, decoupled=decoupled, reduction="none")
        grads.append(torch.autograd.grad(losses @ weight, tau)[0])
    torch.testing.assert_close(
        *grads, rtol=1e-4 if dtype == torch.bfloat16 else None, atol=0.0 if dtype == torch.bfloat16 else None
    )


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("workspace", [MIB, 32 * MIB])
@pytest.mark.parametrize("n", [700, 3, 1])
def test_a_step_in_both_directions_equals_the_mean_of_the_pair_losses(n: int, workspace: int, decoupled: bool) -> None:
    a, b, _ = problem(n, n, 24, torch.float64)
    weight = torch.rand(n, dtype=torch.float64)
    temperature = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    with nckernels.use_workspace(workspace):
        for weights in (None, weight):
            options = {"temperature": temperature, "decoupled": decoupled, "sample_weight": weights}
            mean = nckernels.clip_loss(a, b, **options)
            each = nckernels.clip_loss(a, b, reduction="none", **options)
            expected = each.sum() / (n if weights is None else weights.sum())
            got, wanted = (torch.autograd.grad(value, (a, b, temperature)) for value in (mean, expected))
            for x, y in zip((mean, *got), (expected, *wanted), strict=True):
                assert (x - y).norm() <= 1e-13 * max(1.0, y.norm())


@pytest.mark.parametrize("loss", [*LOSSES, "nonl-instance"])
@pytest.mark.parametrize("k", [10, 300])
def test_every_option_is_one_node_of_the_graph(k: int, loss: str) -> None:
    """The graph has only the native step, or the samples' losses, between the inputs and the value."""
    x, w, y = problem(64, k, 8)
    function = LOSSES.get(loss, functools.partial(nckernels.nonl_loss, direction="instance"))
    weights = {"weight": torch.rand(k), "sample_weight": torch.rand(64)}
    for reduction, node in (("mean", "StepBackward"), ("sum", "StepBackward"), ("none", "LossesBackward")):
        for options in ({}, weights):
            value = function(x, w, y, reduction=reduction, temperature=torch.tensor(0.1), **options)
            assert type(value.grad_fn).__name__ == node
            assert [type(after).__name__ for after, _ in value.grad_fn.next_functions if after is not None] == [
                "AccumulateGrad"
            ] * 2
    trained = torch.rand(64, requires_grad=True)
    assert type(function(x, w, y, sample_weight=trained).grad_fn).__name__ != "StepBackward"


def test_sample_losses_without_grad_keep_no_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, y = problem(64, 10, 8)
    temperature = torch.tensor(0.1, requires_grad=True)
    keeps = []
    losses = native.NativeBackend.losses

    def spy(self: native.NativeBackend, *args: object) -> object:
        keeps.append(args[3])
        return losses(self, *args)

    monkeypatch.setattr(native.NativeBackend, "losses", spy)
    values = [nckernels.nonl_loss(x, w, y, reduction="none", temperature=temperature)]
    with torch.no_grad():
        values.append(nckernels.nonl_loss(x, w, y, reduction="none", temperature=temperature))
    assert keeps == [True, False]
    assert torch.equal(*values)


@pytest.mark.parametrize("workspace", [64 * 1024, 32 * MIB])
@pytest.mark.parametrize("shape", [(2, 1, 5), (64, 1, 33), (300, 1, 24)])
def test_a_uniformity_step(shape: tuple[int, int, int], workspace: int) -> None:
    for dtype, bound in ((torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 4e-3)):
        x, _, _ = problem(*shape, dtype)
        for t in (2.0, 40.0):
            wide = x.detach().double().requires_grad_()
            with nckernels.use_backend("reference"):
                expected = nckernels.uniformity_loss(wide, t=t)
            with nckernels.use_workspace(workspace):
                value = nckernels.uniformity_loss(x, t=t)
            assert "StepBackward" in str(value.grad_fn.next_functions)
            (got,), (truth,) = torch.autograd.grad(value, x), torch.autograd.grad(expected, wide)
            assert abs(value.double() - expected) <= bound * max(4 * t, 1)
            assert (got.double() - truth).norm() <= bound * max(t, 1) * truth.norm()


def test_a_step_on_the_cpu_under_another_default_device() -> None:
    x, w, y = problem(64, 10, 8)
    plain, self_plain = step(x, w, y), torch.autograd.grad(nckernels.supcon_loss(x, y), x)
    with torch.device("meta"):
        assert_same(step(x, w, y), plain)
        assert_same(torch.autograd.grad(nckernels.supcon_loss(x, y), x), self_plain)


def test_supervised_losses_agree_under_autocast() -> None:
    x, _, y = problem(256, 8, 64)
    with torch.autocast("cpu", torch.bfloat16):
        mean = nckernels.supcon_loss(x, y)
        each = nckernels.supcon_loss(x, y, reduction="none")
    assert abs(float(mean.detach() - each.detach().mean())) < 2e-6


def test_repeated_backward_of_a_step_scales_a_copy() -> None:
    """With the graph retained, the first pass must not return the node's own memory."""
    x, w, y = problem(64, 10, 8)
    plain = step(x, w, y)[1:]
    value = nckernels.nonl_loss(x, w, y)
    for factor in (1.0, 3.0):
        for got, expected in zip(torch.autograd.grad(factor * value, (x, w), retain_graph=True), plain, strict=True):
            assert torch.equal(got, factor * expected)
            got.zero_()
    for got, expected in zip(torch.autograd.grad(value, (x, w)), plain, strict=True):
        assert torch.equal(got, expected)


def test_leaves_take_over_the_memory_of_a_step() -> None:
    """Leaves take over the node's memory, without a copy."""
    x, w, y = problem(64, 10, 8)
    value = nckernels.nonl_loss(x, w, y)
    ours = {t.data_ptr() for t in value.grad_fn.saved_tensors if t is not None}  # type: ignore[union-attr]
    value.backward()
    assert x.grad is not None
    assert w.grad is not None
    assert {x.grad.data_ptr(), w.grad.data_ptr()} <= ours


# --- memory -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_restore_threads")
@pytest.mark.parametrize("threads", [1, 8])
@pytest.mark.parametrize("workspace", [MIB, 8 * MIB])
@pytest.mark.parametrize("in_one_step", [True, False])
@pytest.mark.parametrize("shape", [(4096, 600, 64), (600, 20_000, 32), (300, 200, 512), (4096, 20, 700)])
@pytest.mark.parametrize("loss", LOSSES)
def test_scratch_stays_within_the_workspace(
    loss: str, shape: tuple[int, int, int], in_one_step: bool, workspace: int, threads: int
) -> None:
    """Scratch of the C++ code (which torch's allocator does not see) plus the tiles kept for a backward pass."""
    torch.set_num_threads(threads)
    m, k, _ = shape
    x, w, y = problem(*shape)
    with nckernels.use_workspace(workspace):
        native.peak_scratch()
        if in_one_step:
            step(x, w, y, loss)
            kept = 0
        else:
            torch.autograd.grad(LOSSES[loss](x, w, y, reduction="none").sum(), (x, w))
            spec = nckernels.backends.base.Spec("class", "target", loss != "normface", -100, workspace)
            kept = 4 * native.BACKEND.kept_numel(torch.device("cpu"), torch.float32, m, k, spec)
        assert native.peak_scratch() + kept <= workspace + 256 * (m + k)


triangles = pytest.mark.parametrize(("m", "d"), [(300, 64), (5000, 64), (1500, 512), (9000, 16)])


@pytest.mark.covers(2)
@pytest.mark.usefixtures("_restore_threads")
@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize("workspace", [2 * MIB, 8 * MIB])
@pytest.mark.parametrize("wanted", ["features", "inv_temperature", "logit_bias"])
@triangles
def test_symmetric_scratch_stays_within_the_workspace(
    m: int, d: int, wanted: str, workspace: int, threads: int
) -> None:
    torch.set_num_threads(threads)
    spec = nckernels.backends.base.Spec("instance", "self", False, -100, workspace, symmetric=True)
    x, _, y = problem(m, m, d)
    beta, bias = torch.tensor(10.0), torch.zeros(m)
    leaf = {"features": x, "inv_temperature": beta, "logit_bias": bias}[wanted]
    for tensor in (x, beta, bias):
        tensor.requires_grad_(tensor is leaf)
    with nckernels.use_backend("native"), nckernels.use_workspace(workspace):
        native.peak_scratch()
        lse, pos = nckernels.cosine_lse(x, x, y, beta, exclude="self", direction="instance", logit_bias=bias)
        torch.autograd.grad((lse - pos).mean(), leaf)
        kept = 4 * native.BACKEND.kept_numel(x.device, x.dtype, m, m, spec)
        assert kept <= workspace // 2
        assert native.peak_scratch() + kept <= workspace + 256 * 2 * m


@pytest.mark.covers(2)
@pytest.mark.usefixtures("_restore_threads")
@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize("workspace", [2 * MIB, 8 * MIB])
@triangles
def test_scratch_of_a_supervised_step_stays_within_the_workspace(m: int, d: int, workspace: int, threads: int) -> None:
    torch.set_num_threads(threads)
    x, _, y = problem(m, 10, d)
    with nckernels.use_backend("native"), nckernels.use_workspace(workspace):
        native.peak_scratch()
        torch.autograd.grad(nckernels.supcon_loss(x, y), x)
        assert native.peak_scratch() <= workspace + 256 * 2 * m


def test_symmetric_kept_tiles_are_half_of_the_matrix() -> None:
    for m in (1, 200, 3000):
        whole, half = (
            native.BACKEND.kept_numel(
                torch.device("cpu"),
                torch.float32,
                m,
                m,
                nckernels.backends.base.Spec("instance", "self", False, -100, 2**40, symmetric),
            )
            for symmetric in (False, True)
        )
        assert half <= whole
    assert half < 0.65 * whole


def test_registry_prefers_native_on_the_cpu() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        assert registry.resolve(torch.device("cpu"), dtype) == "native"


def test_ragged_last_tile_is_kept_whole_with_several_blocks_of_columns() -> None:
    """200 rows in tiles of 30 and 128 columns in two blocks, all of them kept for the backward pass."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 64, generator=generator, requires_grad=True)
    w = torch.randn(128, 64, generator=generator, requires_grad=True)
    y = torch.randint(128, (200,), generator=generator)
    with nckernels.use_workspace(256 * 1024), nckernels.use_backend("native"):
        found = torch.autograd.grad(nckernels.normface_loss(x, w, y), (x, w))
    wide = [t.detach().double().requires_grad_() for t in (x, w)]
    with nckernels.use_backend("reference"):
        expected = torch.autograd.grad(nckernels.normface_loss(*wide, y), wide)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() < 1e-6 * b.norm()


WITHOUT_MEMORY = """
import resource, torch, nckernels
torch.set_num_threads(2)
x, w, y = torch.randn(4000, 64).requires_grad_(), torch.randn(3000, 64).requires_grad_(), torch.arange(4000) % 3000
nckernels.set_backend("native")
nckernels.nonl_loss(x[:600], w[:400], y[:600] % 400)  # starts the threads
for mebibytes in (2, 4, 8, 16):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (mebibytes << 20), resource.RLIM_INFINITY))
    try:
        nckernels.nonl_loss(x, w, y)
    except MemoryError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
nckernels.nonl_loss(x, w, y).backward()
"""


def test_no_memory_for_scratch_is_a_memory_error() -> None:
    """And the next call, with memory, works."""
    result = subprocess.run([sys.executable, "-c", WITHOUT_MEMORY], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["nckernels: no memory for the scratch buffers of the native backend"] * 4
