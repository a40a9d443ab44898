"""Backends under test: each test that takes `backend` runs once per (device, backend) pair."""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
import time
from collections.abc import Hashable, Iterator
from typing import Any

import pytest
import torch
from covering import covering

import nckernels

CPU_BACKENDS = ["reference", "chunked", "native"]
CUDA_BACKENDS = ["triton", "cuda", "chunked"]
NO_FLOAT64 = {"triton", "cuda"}  # kernels without float64
SINGLE_BACKWARD = {"chunked", "native", "triton", "cuda"}  # everything but the reference raises on double backward

# Inductor's caches outlive the process and do not notice that the shapes of our operators' results have changed.
os.environ["TORCHINDUCTOR_FX_GRAPH_CACHE"] = os.environ["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "0"

# The problems are small: a second thread only waits, for milliseconds per call where cores are shared. The
# tests of threading ask for theirs.
torch.set_num_threads(1)

DEADLINE, LEFT = pytest.StashKey[float](), pytest.StashKey[int]()
STRENGTH = 3  # of the covering of a grid of parameters, unless a test is marked ``covers``
ONE_PROCESS = ("tests/distributed/", "tests/cuda_host/", "tests/test_memory.py")
"""Whose tests share what takes long to make: ranks, a library, measurements of all cases."""
SMALL_WORKSPACE = 64 * 1024  # bytes; the "tiles" shapes below need several ragged tiles under it


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--seconds",
        type=float,
        help="run tests in a random order, always the same, as many as this time suffices for",
    )
    parser.addoption(
        "--full-grid",
        action="store_true",
        help="run a test with every combination of its parameters, instead of as many combinations as hold every "
        f"{STRENGTH} values of different parameters, or every n where the test is marked covers(n)",
    )


@pytest.hookimpl(trylast=True)  # after -m and -k: what they leave is covered
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--full-grid"):
        left_out = _beyond_covering(items)
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]
    if config.getoption("--seconds") is not None:
        random.Random(0).shuffle(items)
        config.stash[DEADLINE] = time.monotonic() + config.getoption("--seconds")


def _beyond_covering(items: list[pytest.Item]) -> set[pytest.Item]:
    """The parametrised tests that a covering of their function's grid does without."""
    left_out: set[pytest.Item] = set()
    grids = [item for item in items if isinstance(item, pytest.Function) and hasattr(item, "callspec")]
    for _, group in itertools.groupby(grids, key=lambda item: (item.parent, item.originalname)):
        tests = list(group)
        mark = tests[0].get_closest_marker("covers")
        strength = mark.args[0] if mark else STRENGTH
        points = [{name: _identity(value) for name, value in test.callspec.params.items()} for test in tests]
        kept = covering(points, strength)
        left_out.update(set(tests) - {tests[i] for i in kept})
    return left_out


def _identity(value: object) -> Hashable:
    """What tells a parameter's values apart, alike in all processes of pytest-xdist."""
    return (type(value), value) if isinstance(value, Hashable) else id(value)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """What runs in one process of pytest-xdist: a test with all its parameters, or everything of ``ONE_PROCESS``.

    Not by xdist's own groups: version 3.8 loses them under pytest 9.2, and takes seconds to find thousands of them.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return next((shared for shared in ONE_PROCESS if nodeid.startswith(shared)), nodeid.partition("[")[0])

    return Scheduling(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    if time.monotonic() < item.config.stash.get(DEADLINE, float("inf")):
        return None
    item.config.stash[LEFT] = item.config.stash.get(LEFT, 0) + 1
    return True


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if LEFT in config.stash:
        terminalreporter.line(f"{config.stash[LEFT]} tests were not run: the time is over")


@dataclasses.dataclass(frozen=True)
class Backend:
    name: str
    device: str

    def require(self, dtype: torch.dtype) -> None:
        if dtype == torch.float64 and self.name in NO_FLOAT64:
            pytest.skip(f"{self.name} has no float64")


def _pairs(names: list[str], device: str) -> list:
    marks = [pytest.mark.cuda] if device == "cuda" else []
    return [pytest.param(Backend(name, device), marks=marks, id=f"{device}-{name}") for name in names]


CPU_PAIRS = _pairs(CPU_BACKENDS, "cpu")
ALL_PAIRS = CPU_PAIRS + (_pairs(CUDA_BACKENDS, "cuda") if torch.cuda.is_available() else [])


@pytest.fixture(params=ALL_PAIRS)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Every backend on every device."""
    with nckernels.use_backend(request.param.name):
        yield request.param


@pytest.fixture(params=CPU_PAIRS)
def cpu_backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Every CPU backend, for tests in float64 and of host behaviour."""
    with nckernels.use_backend(request.param.name):
        yield request.param


@pytest.fixture
def small_workspace() -> Iterator[None]:
    with nckernels.use_workspace(SMALL_WORKSPACE):
        yield
