"""The campaign for a GPU, on a CPU: wrong kernels are found and named, and stages do not affect each other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as suite
from benchmarks import correctness, measure, report
from benchmarks.correctness import Case, examine
from nckernels.backends.base import Forward, Step
from nckernels.backends.registry import BACKENDS

CPU = torch.device("cpu")
CASE = Case("nonl", "chunked", "float32", 40, 11, 16, reduction="mean")
SCRIPT = Path(suite.__file__).with_name("gpu_check.sh")

# --- correctness -------------------------------------------------------------------------------------------


def test_cases_cover_all_kernels_and_options() -> None:
    cases = correctness.cases(["triton", "cuda"], "cuda")
    assert len({str(case) for case in cases}) == len(cases)
    for backend in ("triton", "cuda"):
        mine = [case for case in cases if case.backend == backend]
        assert {case.dtype for case in mine} == set(correctness.DTYPES)
        primitive = {(c.exclude, c.direction, c.dtype, c.d > 256) for c in mine if c.primitive and c.d != 45}
        assert len(primitive) == 4 * 3 * 4 * 2
        losses = {(c.call, c.direction, c.reduction) for c in mine if not c.primitive}
        assert losses > {(x, "class", r) for x in ("nonl", "normface") for r in ("mean", "sum")}
        assert {("nonl", "instance", "mean"), ("nonl", "both", "mean"), ("nonl", "class", "none")} < losses
        assert {"supcon", "clip", "ntce"} < {c.call for c in mine}
        stepping = [case for case in mine if case.one_step]
        panels = {(case.dtype, case.workspace is None) for case in stepping if case.call != "supcon"}
        assert len(panels) == 8
        assert any(case.call == "supcon" for case in stepping) == (backend == "triton")
    assert [case.d for case in cases[:4]] == [2048] * 4  # what the campaign times comes first


def test_backends_are_right() -> None:
    cases = [case for case in correctness.cases(["chunked", "native"], "cpu") if case.d <= correctness.SHORT]
    for case in cases[:: max(1, len(cases) // 24)]:
        assert examine(case, CPU).status == "ok", case


def test_a_wrong_kernel_is_found_and_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backend = type(BACKENDS["chunked"])
    forward, step = backend.forward, backend.step

    def wrong(self: object, *args: object) -> Forward:
        result = forward(self, *args)
        return result._replace(instance_lse=result.instance_lse + 1e-4)

    def one_row_wrong(self: object, *args: object) -> Step:
        result = step(self, *args)
        result.prototypes[3] *= 1 + 1e-3
        return result

    monkeypatch.setattr(backend, "forward", wrong)
    monkeypatch.setattr(backend, "step", one_row_wrong)
    path = tmp_path / "found.json"
    words = f"--backends chunked --only cosine_lse normface --json {path} --budget 100"
    assert correctness.main(words.split()) == 1
    said = capsys.readouterr().out
    rows = json.loads(path.read_text())["cases"]
    bad = [row for row in rows if row["status"] == "wrong"]
    assert rows[: len(bad)] == bad
    for row in rows:
        case = row["case"]
        if case["dtype"] == "float32":
            spoilt = case["direction"] != "class" if case["call"] == "cosine_lse" else case["reduction"] != "none"
            assert (row["status"] == "wrong") == spoilt, row
    assert any("prototypes: error 1.0e-03" in row["note"] for row in bad)
    assert bad[0]["name"] in said
    monkeypatch.undo()
    assert (
        correctness.main(["--backends", "chunked", "--again", str(path), "--json", str(tmp_path / "again.json")]) == 0
    )
    again = json.loads((tmp_path / "again.json").read_text())["cases"]
    assert {row["name"] for row in again} == {row["name"] for row in bad}


@pytest.mark.parametrize("spoil", [torch.nan, torch.inf])
def test_nonfinite_results_have_infinite_error(spoil: float) -> None:
    exact = torch.tensor([1.0, -torch.inf, 2.0]).double()
    assert correctness.worst_row(exact.float(), exact) == 0
    assert correctness.worst_row(torch.tensor([1.0, -torch.inf, spoil]), exact) == float("inf")
    assert correctness.worst_row(torch.tensor([1.0, spoil, 2.0]), exact) == float("inf")
    assert correctness.worst_row(torch.tensor([1.0, -torch.inf, 2.2]), exact) == pytest.approx(0.1)


def test_failing_cases_are_reported() -> None:
    finding = examine(replace(CASE, call="absent"), CPU)
    assert (finding.status, finding.note.split(":")[0]) == ("fails", "AttributeError")
    if not torch.cuda.is_available():
        assert examine(replace(CASE, backend="cuda"), CPU).status == "fails"


@pytest.mark.slow
def test_workers_that_die_are_named_and_replaced() -> None:
    chosen = [CASE, replace(CASE, call="absent"), replace(CASE, m=41), replace(CASE, m=42)]
    found = list(correctness.examine_all(chosen, CPU, 1, deadline=time.monotonic() + 100))
    assert [f.status for f in found] == ["ok", "fails", "ok", "ok"]
    found = list(correctness.examine_all(chosen, CPU, 1, deadline=0.0))
    assert {f.status for f in found} == {"unfinished", "not run"}


# --- the suites --------------------------------------------------------------------------------------------


def test_a_lost_device_continues_in_a_new_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = f"--loss nonl --size 32,6,16 64,6,16 --only chunked --budget 3 --brief --out {tmp_path}".split()
    monkeypatch.setattr(measure, "ceilings", lambda *_: measure.Ceilings(1e9, 1e9, None))
    monkeypatch.setattr(suite, "lost", lambda _: True)

    def execv(_: str, argv: list[str]) -> None:
        raise SystemExit(" ".join(argv))

    monkeypatch.setattr(suite.os, "execv", execv)
    with pytest.raises(SystemExit, match="--resume --budget"):
        suite.main(words)
    path = tmp_path / "quick-cpu-float32.json"
    first = report.load(path)
    assert [m.problem.m for m in first.measured] == [32]
    monkeypatch.setattr(suite, "lost", lambda _: False)
    assert suite.main([*words, "--resume"]) == 0
    resumed = report.load(path)
    assert [m.problem.m for m in resumed.measured] == [32, 64]
    assert resumed.measured[0] == first.measured[0]


# --- the script --------------------------------------------------------------------------------------------


def rehearse(run: str, folder: Path, python: str = sys.executable, *options: str) -> tuple[int, str, dict[str, str]]:
    """Exit code, summary, and the result of every stage."""
    command = [str(SCRIPT), run, "--rehearse", "--python", python, "--out", str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    text = (folder / "summary.txt").read_text()
    assert done.stderr == ""
    assert done.stdout.endswith(text[-5000:])
    words = [line.split() for line in text.splitlines()]
    states = {w[1].rstrip(":"): w[0] for w in words if w and w[0] in ("ok", "FAILED", "TIMEOUT", "skipped")}
    return done.returncode, text, states


def logs(folder: Path) -> set[str]:
    with tarfile.open(folder / "record.tar.gz") as tar:
        return {Path(name).stem for name in tar.getnames() if name.endswith(".log")}


FIRST = ["info", "build", "correctness", "campaign", "launch", "memcheck"]
SECOND = ["info", "build", "again", "tune", "e2e", "compiled", "memory", "racecheck", "tests"]


def test_a_failing_or_hanging_stage_does_not_affect_others(tmp_path: Path) -> None:
    """Most stages are replaced, because each would start a process and import torch."""
    python = tmp_path / "python"
    python.write_text(f"""#!/bin/bash
case "$*" in
  *"nckernels info"*) echo "before it hangs"; sleep 60 ;;
  *"--suite launch"*) echo "launch is broken"; exit 3 ;;
  *"--processes"* | *"--suite campaign"*) exec {sys.executable} "$@" ;;
  *" correctness "*) echo '{{}}' >"${{@: -1}}" ;;
esac
""")
    python.chmod(0o755)
    out = tmp_path / "out"
    code, text, states = rehearse("first", out, str(python))
    assert code == 1
    assert states == dict.fromkeys(FIRST, "ok") | {"info": "TIMEOUT", "launch": "FAILED"}, text
    assert "launch (exit 3): launch is broken" in text
    assert logs(out) == set(FIRST)
    assert json.loads((out / "correctness.json").read_text())["cases"]
    assert report.load(out / "campaign-cpu-float32.json").suite == "campaign"
    assert {p.name for p in out.iterdir()} == {
        "summary.txt", "record.tar.gz", "correctness.json", "campaign-cpu-float32.json", "memcheck.json",
    }  # fmt: skip


@pytest.mark.slow
def test_both_runs_work(tmp_path: Path) -> None:
    code, text, states = rehearse("first", tmp_path / "first")
    assert (code, states) == (0, dict.fromkeys(FIRST, "ok")), text
    again = ("--again", str(tmp_path / "first" / "correctness.json"))
    code, text, states = rehearse("second", tmp_path / "second", sys.executable, *again)
    assert (code, states) == (0, dict.fromkeys(SECOND, "ok")), text
    assert logs(tmp_path / "second") == set(SECOND)
    for folder in (tmp_path / "first", tmp_path / "second"):
        assert len(list(folder.iterdir())) <= 8


def test_bad_arguments_print_the_usage() -> None:
    for words in ([], ["third"], ["first", "--out"], ["first", "--wrong", "x"]):
        done = subprocess.run([str(SCRIPT), *words], capture_output=True, text=True)
        assert (done.returncode, "gpu_check.sh first|second" in done.stdout) == (2, True)
