"""Predictions: the counts agree with the real launches and with formulas."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

import nckernels
from benchmarks import counts, predict, problems, report
from benchmarks.harness import Measured, Result
from benchmarks.measure import Ceilings, Summary
from benchmarks.problems import Problem, samples
from benchmarks.variants import our_loss
from nckernels.backends.triton import config, launch

ROOT = Path(__file__).parents[1]
H100 = config.Arch(90, 132, 227 << 10)
WORKSPACE = 316 << 20


def counted(
    problem: Problem, *, in_one_step: bool = True, dtype: torch.dtype = torch.bfloat16, epilogue: bool = False
) -> counts.Tally:
    return counts.count(problem, WORKSPACE, H100, dtype, in_one_step=in_one_step, epilogue=epilogue)


@pytest.fixture(scope="module")
def rows() -> dict[str, predict.Prediction]:
    return {name: predict.predict(problem, predict.GPUS["h100"]) for name, problem in predict.ROWS.items()}


# --- against formulas --------------------------------------------------------------------------------------

M, K, D = 2048, 1000, 2048
NEW = counts.present_classes(1024, 5000)
CASES = {
    "one step": (Problem("nonl", M, K, D), True, (6 * M * K * D, 0, 2 * M * K)),
    "one step, instances": (Problem("normface", M, K, D), True, (6 * M * K * D, 0, 2 * M * K)),
    "two passes": (Problem("nonl", M, K, D), False, (4 * M * K * D, 4 * M * K * D, 2 * M * K)),
    # The library multiplies the slots of absent classes, the kernels do not.
    "compacted": (
        Problem("nonl", 1024, 5000, 512),
        False,
        (4 * 1024 * 1024 * 512, 4 * 1024 * NEW * 512, 1024 * (NEW + 1024)),
    ),
    "short rows": (Problem("nonl", 4096, 100, 128), True, (0, 10 * 4096 * 100 * 128, 3 * 4096 * 100)),
    "symmetric": (samples("supcon", 2048, 128), True, (0, 6 * 2048**2 * 128, 2 * 2048**2)),
    "both directions": (samples("clip", 1024, 512), True, (4 * 1024**2 * 512, 4 * 1024**2 * 512, 4 * 1024**2)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_operations(name: str) -> None:
    problem, in_one_step, expected = CASES[name]
    tally = counted(problem, in_one_step=in_one_step)
    assert tuple(sum(getattr(s, unit) for s in tally.stages) for unit in ("library", "own", "exps")) == expected


@pytest.mark.parametrize("loss", ["nonl", "normface"])
def test_bytes_and_launches_of_one_step(loss: str) -> None:
    """One panel: 12 bytes an entry for the products, 6 for the gradient's entries, and the sums of both sides."""
    tally = counted(Problem(loss, M, K, D))
    moved: Counter[str] = Counter()
    for stage in tally.stages:
        moved.update(stage.moved)
    both = (M + K) * D
    assert moved[counts.PANELS] == (12 + 6) * M * K
    assert moved[counts.COPIES] == 0
    assert moved[counts.SUMS] == 4 * both
    assert moved[counts.FINISHING] == (4 + 2) * both
    assert moved[counts.INPUTS] == 2 * (3 + 1) * both  # norms and two products read, gradients are written
    # Zeros, preparation, sums, entries, both gradients, PyTorch's upstream gradient of 1, scaling.
    assert besides_products(tally) == 8


def besides_products(tally: counts.Tally) -> int:
    return sum(stage.launches for stage in tally.stages if not stage.library)


def test_launches_for_more_classes_than_samples() -> None:
    """The list of the classes, zeros for the gradients of the others, and a copy of the classes in each panel."""
    assert besides_products(counted(Problem("nonl", 1024, 5000, 512))) == 8 + 4


@pytest.mark.parametrize("loss", ["nonl", "normface"])
def test_product_with_epilogue(loss: str) -> None:
    """One exponential an entry, and 6 bytes (write, read, write) before the gradients' products read it."""
    k = 1008  # rows of 16s, as panels have them
    tally = counted(Problem(loss, M, k, D), epilogue=True)
    assert sum(s.library for s in tally.stages) == 6 * M * k * D
    assert sum(s.exps for s in tally.stages) == M * k
    assert sum(s.moved[counts.PANELS] for s in tally.stages) == (6 + 2 * 2) * M * k
    assert [s.name for s in tally.stages].count("product with epilogue") == 1
    assert besides_products(tally) == 9


def test_present_classes() -> None:
    assert [counts.present_classes(*sizes) for sizes in ((8192, 1000), (10, 1), (1, 7))] == [1000, 1, 1]
    generator = torch.Generator().manual_seed(0)
    for m, k in ((8192, 21841), (500, 1000)):
        found = torch.unique(torch.randint(k, (m,), generator=generator)).numel()
        assert counts.present_classes(m, k) == pytest.approx(found, rel=0.03)


def test_cache() -> None:
    cache = counts.Cache(1000)
    small, large = torch.empty(100, device="meta"), torch.empty(1000, device="meta")

    def memory(access: counts.Access, write: bool = False) -> dict[str, int]:
        found: Counter[str] = Counter()
        (cache.write if write else cache.read)(access, found)
        return dict(found)

    assert memory(("a", small, 400)) == {"a": 400}
    assert memory(("a", small, 400)) == {}
    assert memory(("a", small[:50], 200)) == {}  # a part of what is there
    assert memory(("b", large, 4000)) == {"b": 4000}
    assert memory(("b", large, 4000)) == {"b": 4000}  # never fits
    assert memory(("a", small, 400)) == {"a": 400}  # forgotten
    scratch = torch.empty(150, device="meta")
    assert memory(("c", scratch, 600), write=True) == {}
    assert memory(("c", scratch, 600)) == {}
    assert memory(("b", large, 4000)) == {"b": 4000, "c": 600}  # forgotten, and written for that
    assert memory((counts.INPUTS, small, 400), write=True) == {counts.INPUTS: 400}
    passing: Counter[str] = Counter()
    cache.write(("d", scratch, 600), passing, passes=True)
    cache.read(("e", torch.empty(100, device="meta"), 400), passing, passes=True)
    assert passing == {"d": 600, "e": 400}
    assert memory(("a", small, 400)) == {}  # nothing drove it out
    assert memory(("d", scratch, 600)) == {"d": 600}


def test_float16_is_scaled_into_its_range() -> None:
    """Gradients wait in float32, and one more pass converts them to float16."""
    tally = counted(Problem("nonl", M, K, D), dtype=torch.float16)
    scale = [stage for stage in tally.stages if stage.name == "scale"]
    assert sum(stage.moved.total() for stage in scale) == (4 + 2) * (M + K) * D
    assert [stage.moved.total() for stage in counted(Problem("nonl", M, K, D)).stages if stage.name == "scale"] == [0]


# --- against the real launches -----------------------------------------------------------------------------

COMPILED = (Problem("nonl", 512, 10, 128), Problem("nonl", 2048, 1000, 2048))
OTHERS = (
    Problem("nonl", 300, 1000, 512),
    Problem("normface", 4096, 1000, 2048),
    samples("supcon", 512, 128),
    samples("clip", 300, 512),
)


def launched(problem: Problem, *, compiled: bool) -> list[str]:
    """The kernels that the package launches for tensors in memory; if compiled, up to the driver."""
    names: list[str] = []
    real = launch.launch

    def listening(kernel: Any, *args: Any, **options: Any) -> None:
        names.append(kernel.fn.__name__)
        if compiled:
            real(kernel, *args, **options)

    leaves, target = problem.tensors(torch.device("cpu"), torch.bfloat16)
    with (
        counts.pretending(H100),
        nckernels.use_workspace(WORKSPACE),
        mock.patch.object(launch, "launch", listening),
        mock.patch.object(launch.TritonKernels, "matmul"),
    ):
        torch.autograd.grad(our_loss(problem)(*leaves, target), leaves)
    return names


def same_launches() -> None:
    from benchmarks import standin

    standin.install(90, standin.Recorder)
    for problem in COMPILED:
        standin.Recorder.calls.clear()
        names = launched(problem, compiled=True)
        tally = counted(problem)
        assert tally.kernels == names, problem
        ours = sum(s.launches for s in tally.stages if not s.library and not s.name.startswith("torch "))
        assert ours == len(standin.Recorder.calls) == len(names), problem


@pytest.mark.parametrize("problem", OTHERS, ids=str)
def test_kernels_are_those_of_the_backend(problem: Problem) -> None:
    assert counted(problem).kernels == launched(problem, compiled=False)


def test_launches_are_those_of_the_backend() -> None:
    """As they reach a driver, in a separate process, see test_dispatch.py."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "TRITON_DEFAULT_FP_FUSION": "0", "PYTHONPATH": path}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# --- what is printed ---------------------------------------------------------------------------------------


def test_nothing_beats_its_floor(rows: dict[str, predict.Prediction]) -> None:
    for name, p in rows.items():
        assert p.floor <= p.after, name
        memory = sum(stage.memory.total() for stage in p.chosen.stages)
        assert p.work.bytes <= memory, name
        assert all(sum(s.memory.total() for s in t.stages) < 1.1 * sum(s.moved.total() for s in t.stages)
                   for t in (p.passes, p.chosen)), name  # fmt: skip


def test_savings(rows: dict[str, predict.Prediction]) -> None:
    for name, p in rows.items():
        assert all(0 <= seconds < p.after for seconds in p.lost().values()), name
    assert rows["few-classes"].lost()["our kernels' rate"] == 0  # one step: all products are the library's


def test_page_holds_the_tables() -> None:
    page = predict.PAGE.read_text()
    assert predict.written(page) == page, "run python -m benchmarks predict --write"


def test_stages_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "counts.json"
    assert predict.main(["--gpu", "h200", "--stages", "imagenet", "--json", str(path)]) == 0
    text = capsys.readouterr().out
    assert "H200" in text
    assert all(word in text for word in ("one step", "two passes", "panel_entries", "products with entries"))
    ways = json.loads(path.read_text())["imagenet"]["ways"]
    assert set(ways) == {"two passes", "one step", "one step with quack"}
    assert sum(stage["library"] for stage in ways["one step"]["stages"]) == 6 * M * K * D


def test_beside_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    problem = Problem("nonl", M, K, D)
    measured = Measured(
        problem, problem.work(2, K), [Result(predict.TRITON, seconds=Summary(1e-3, 1e-3, 1e-3, 1e-3, 3))]
    )
    machine = {"device": "NVIDIA H200", "memory": 139 << 30}
    ceilings = Ceilings(700e12, 4.0e12, None)
    run = report.Report("quick", "bfloat16", "", machine, ceilings, [measured])
    run.save(tmp_path / "run.json")
    assert predict.main([str(tmp_path / "run.json")]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    gpu = predict.replace(predict.GPUS["h200"], gemm=700e12, copy=4.0e12)
    expected = predict.predict(problem, gpu)
    assert str(problem) in line
    assert f"{1e-3 / expected.after:.2f} | {expected.floor / 1e-3:.2f}" in line
    other = report.Report("quick", "float32", "", machine, ceilings, [measured])
    assert predict.beside(other).startswith("no predictions for float32")


def test_rows_are_problems() -> None:
    assert all(p.loss in problems.LOSSES for p in predict.ROWS.values())


if __name__ == "__main__":
    same_launches()
