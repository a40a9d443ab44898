"""Which tiles are tuned. The search is tested in tests/test_benchmarks.py."""

from __future__ import annotations

import pytest
import torch

from benchmarks import tune
from benchmarks.problems import Problem
from nckernels.backends import tiled
from nckernels.backends.base import Spec
from nckernels.backends.tiled import plan
from nckernels.backends.triton import config


def test_tiles_of_long_rows_are_tuned_with_two_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, cpu, found = Problem("nonl", 32, 16, 264), torch.device("cpu"), []

    def search(_: object, entries: list[tuple[str, str]], *__: object) -> float:
        found.extend(kernel for kernel, _ in entries)
        return 1.0

    monkeypatch.setattr(tune, "WORKLOADS", ((problem, torch.float32),))
    monkeypatch.setattr(tune, "search", search)
    monkeypatch.setattr(tune, "clock", lambda *_: 1.0)
    monkeypatch.setattr(plan, "two_passes_cost", lambda *_: float("inf"))
    plan.step_panels.cache_clear()
    before = torch.get_float32_matmul_precision()
    (z, w), _ = problem.tensors(cpu, torch.float32)
    spec = Spec("class", "target", True, -100, 32 << 20)
    try:
        assert tiled.fits(z, w, spec)
        tune._measure(config, {kernel: {} for kernel in tune.KERNELS}, cpu, 0.0)
        assert tiled.fits(z, w, spec)
    finally:
        torch.set_float32_matmul_precision(before)
        plan.step_panels.cache_clear()
    assert {"lse", "entries"} <= set(found)
