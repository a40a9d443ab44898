"""Triton's launches and those of the package's own dispatch, argument by argument, without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")


class Bench:
    """Launches one kernel repeatedly and records the calls of the driver."""

    def __init__(self) -> None:
        from benchmarks import standin
        from nckernels.backends.triton import dispatch, lse

        self.driver = standin.install(90, standin.Recorder)
        self.calls = standin.Recorder.calls
        self.calls.clear()
        self.dispatch, self.kernel = dispatch, lse.combine_kernel
        self.kernel.device_caches.clear()
        dispatch._FORMS.clear()
        self.options = dispatch.Options(GATHER=False, KEEP=False, BR=16, BN=64)
        self.general = 0
        run = type(self.kernel).run.__get__(self.kernel)

        def counted(*args: Any, **options: Any) -> Any:
            self.general += 1
            return run(*args, **options)

        self.kernel.run = counted
        self.tensors = [torch.empty(4, 100), torch.empty(4, 100), None, None, torch.empty(100), None]
        self.numbers = [0, 4, 100, -1]

    def launch(self, *tensors: Any, numbers: list[Any] | None = None, options: Any = None, grid: Any = (2,)) -> bool:
        """Whether a launch went the direct way."""
        before, reached = self.general, len(self.calls)
        args = (*(tensors or self.tensors), *(numbers or self.numbers))
        self.dispatch.launch(self.kernel, grid, *args, options=options or self.options)
        assert len(self.calls) == reached + 1  # once, direct or general
        return self.general == before

    def learn(self, *tensors: Any, **more: Any) -> None:
        """Another specialisation: two launches the general way, those that follow the direct way."""
        assert [self.launch(*tensors, **more) for _ in range(4)] == [False, False, True, True]

    def functions(self) -> list[int]:
        return [call[4] for call in self.calls]


def _flat(call: tuple[Any, ...]) -> list[Any]:
    """The arguments that reached the driver, without hooks and their data."""
    from triton.compiler.compiler import LazyDict
    from triton.knobs import HookChain

    flat = [*call[:-1], *call[-1]] if isinstance(call[-1], tuple) else list(call)
    flat = [None if isinstance(x, (LazyDict, HookChain)) else x for x in flat]
    return [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in flat]


def same_arguments() -> None:
    bench = Bench()
    bench.learn()
    first, second, third, _ = map(_flat, bench.calls)
    assert first == second == third
    assert first[:5] == [2, 1, 1, 7, 1001]  # grid, stream, function
    count = len(bench.kernel.params)
    constants = [False, False, 16, 64]
    pointers = [x if x is None else x.data_ptr() for x in bench.tensors]
    assert third[-count:] == [*pointers, *bench.numbers, *constants]
    # Values that no compiled code depends on: other tensors, other numbers, another grid, another stream.
    others = [torch.empty_like(x) if isinstance(x, torch.Tensor) else None for x in bench.tensors]
    bench.driver.get_current_stream = lambda device: 11  # type: ignore[method-assign]
    assert bench.launch(*others, numbers=[1, 16, 64, 7], grid=(3, 5))
    direct = _flat(bench.calls[-1])
    bench.kernel[3, 5](*others, 1, 16, 64, 7, **bench.options)
    assert _flat(bench.calls[-1]) == direct
    assert direct[:5] == [3, 5, 1, 11, 1001]


def another_kernel() -> None:
    bench = Bench()
    bench.learn()
    largest, sums, _, _, out, _ = bench.tensors
    assert isinstance(sums, torch.Tensor)
    assert isinstance(out, torch.Tensor)
    shifted = torch.empty(404)[1:401].view(4, 100)
    count = torch.zeros(1, dtype=torch.int32)
    kept = bench.dispatch.Options(GATHER=False, KEEP=True, BR=16, BN=64)
    warps = bench.dispatch.Options(GATHER=False, KEEP=False, BR=16, BN=64, warps=8)
    cases: list[tuple[tuple[Any, ...], Any]] = [
        ((shifted, sums, None, None, out, None), None),  # alignment
        ((largest, shifted, None, None, out, None), None),
        ((largest, sums, None, count, out, None), None),  # a tensor or None
        ((largest, sums.half(), None, None, out, None), None),  # dtype
        ((), kept),  # a constexpr
        ((), warps),  # a compile option
    ]
    seen = {1001}
    for tensors, options in cases:
        bench.learn(*tensors, options=options)
        (function,) = set(bench.functions()[-4:])
        assert function not in seen
        seen.add(function)
        assert bench.launch()  # and back
        assert bench.functions()[-1] == 1001
    bench.driver.device = 1
    bench.learn()
    assert bench.functions()[-1] not in seen
    assert bench.calls[-1][3] == 8  # that device's stream
    bench.driver.device = 0
    # Arguments that a direct launch does not support always go through Triton.
    for numbers in ([0, 4, 1 << 40, -1], [0, 4, 100, -1.0]):
        assert not any(bench.launch(numbers=numbers) for _ in range(3))
    assert bench.launch()


def specialised_numbers() -> None:
    import triton
    import triton.language

    from benchmarks import standin
    from nckernels.backends.triton import dispatch

    standin.install(90, standin.Recorder)
    standin.Recorder.calls.clear()
    globals()["tl"] = triton.language  # the kernel reads this global
    _store.__annotations__["B"] = "tl.constexpr"
    kernel = triton.jit(_store)
    options = dispatch.Options(B=16)
    x = torch.empty(64)
    for n in (3, 5, 7, 16, 32, 160, 1, 1, 1):
        dispatch.launch(kernel, (1,), x, n, options=options)
    functions = [call[4] for call in standin.Recorder.calls]
    assert functions == [1001] * 3 + [1002] * 3 + [1003] * 3
    assert len(options.compiled) == 3
    assert all(found.direct for found in options.compiled.values())


def watched() -> None:
    from triton import knobs

    bench = Bench()
    bench.learn()
    seen: list[Any] = []
    knobs.runtime.launch_enter_hook.add(seen.append)
    assert not bench.launch()
    assert any(knobs.runtime.launch_enter_hook is x for x in bench.calls[-1])
    knobs.runtime.launch_enter_hook.remove(seen.append)
    assert bench.launch()
    knobs.runtime.launch_exit_hook = seen.append  # type: ignore[assignment]
    assert not bench.launch()
    knobs.runtime.launch_exit_hook = None  # type: ignore[assignment]
    assert bench.launch()
    bench.kernel.pre_run_hooks.append(lambda *_, **__: None)
    assert not bench.launch()
    bench.kernel.pre_run_hooks.clear()
    assert bench.launch()
    knobs.runtime.debug = True
    assert not any(bench.launch() for _ in range(3))
    assert bench.functions()[-1] != 1001  # compiled with assertions
    knobs.runtime.debug = False
    assert bench.launch()
    assert bench.functions()[-1] == 1001


def unknown_versions() -> None:
    import triton
    from triton import knobs

    bench = Bench()
    assert bench.dispatch._known()
    version, hook = triton.__version__, knobs.runtime_knobs.launch_exit_hook
    triton.__version__ = "99.0.0"
    assert not bench.dispatch._known()
    triton.__version__ = version
    knobs.runtime.__dict__.pop("launch_exit_hook", None)
    del knobs.runtime_knobs.launch_exit_hook
    assert not bench.dispatch._known()
    knobs.runtime_knobs.launch_exit_hook = hook
    bench.dispatch.KNOWN = False
    assert not any(bench.launch() for _ in range(4))
    bench.dispatch.KNOWN = True


def unknown_launcher() -> None:
    """A launcher that passes additional arguments to the driver keeps Triton's launches."""
    from benchmarks import standin

    class Own(standin.Recorder):
        def __call__(self, *args: Any) -> None:
            self.launch(*args[:5], object(), *args[5:])

    bench = Bench()
    bench.driver.launcher_cls = Own
    assert not any(bench.launch() for _ in range(4))

    class Bare:
        def __init__(self, *_: Any) -> None:
            pass

        def __call__(self, *args: Any) -> None:
            standin.Recorder.calls.append(args)

    bench.driver.launcher_cls = Bare
    kept = bench.dispatch.Options(GATHER=False, KEEP=True, BR=16, BN=64)
    assert not any(bench.launch(options=kept) for _ in range(4))


def _store(X, n, B):  # type: ignore[no-untyped-def]
    at = tl.arange(0, B)  # noqa: F821
    tl.store(X + at, 0.0, mask=at < n)  # noqa: F821


def sizes_of_kernels() -> None:
    """Another batch size compiles nothing: kernels are specialised only on lengths, usually multiples of 16, that
    decide whether a thread accesses several numbers at once."""
    import triton

    from nckernels.backends.triton import epilogue, finish, grad, lse, norms, pairs, panel, prepare, reduce

    specialised = {
        name: numbers
        for module in (epilogue, finish, grad, lse, norms, pairs, panel, prepare, reduce)
        for name, kernel in vars(module).items()
        if name.endswith("_kernel") and isinstance(kernel, triton.JITFunction)
        if (numbers := [p.name for p in kernel.params if p.name.islower() and not p.do_not_specialize])
    }
    assert specialised == {
        "pairs_lse_kernel": ["width"], "pairs_reduce_kernel": ["width"], "scale_kernel": ["n_x", "n_y", "n_z"]
    }, specialised  # fmt: skip


SCENARIOS = (
    same_arguments, another_kernel, specialised_numbers, watched, unknown_versions, unknown_launcher, sizes_of_kernels,
)  # fmt: skip


def test_dispatch() -> None:
    """In a separate process, because the driver is replaced in the whole process, and the interpreter must be off."""
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "TRITON_DEFAULT_FP_FUSION": "0", "PYTHONPATH": path}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
    for scenario in SCENARIOS:
        print(scenario.__name__, flush=True)
        scenario()
