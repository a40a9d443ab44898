"""Two processes train like one with the same global batch.

Queues are left out: each process has one of its own.

Group norm needs no statistics of other samples, so the only difference is the order of sums. Written from the
description of the trainer, not from its code.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from . import contract_process as cli

SHORT = {"model__norm": "group", "schedule__epochs": 1, "optimizer__lr": 0.02}
VIEWS = {"augment__views": 2, "augment__rotate": 10.0, "augment__shift": 0.1}
CASES: dict[str, dict[str, Any]] = {
    "nonl": {"loss__name": "nonl", "run__metrics": True},
    "normface": {"loss__name": "normface", "augment__shift": 0.1},
    "ce": {"loss__name": "ce", "augment__zoom": 0.1},
    "scl": {"loss__name": "scl", **VIEWS},
    "odd nonl": {"loss__name": "nonl", "run__batch_size": 101},
    "odd scl": {"loss__name": "scl", "run__batch_size": 101, **VIEWS},
    "odd ce": {"loss__name": "ce", "run__batch_size": 101, "run__micro_batch_size": 20},
    "decay": {"loss__name": "ntce", "loss__decay": 0.9},
    "dlp": {"loss__name": "dlp", "schedule__epochs": 2},
    "prototype": {"loss__name": "prototype", **VIEWS},
    "micro": {"loss__name": "nonl", "run__micro_batch_size": 30},
    "balanced": {"loss__name": "nonl", "data__imbalance": 0.2, "data__balanced": True, "run__batch_size": 51},
}
QUICK = ("nonl", "normface", "scl", "odd nonl", "odd ce")


def arguments(changes: dict[str, Any], out: str = "r") -> list[str]:
    return ["train", "digits/nonl", *cli.options(**{**SHORT, **changes}), "--out", out]


def one(folder: Path, changes: dict[str, Any]) -> Path:
    process = cli.run(*arguments(changes, "one"), folder=folder)
    assert process.returncode == 0, process.stderr
    return folder / "one"


def two(folder: Path, changes: dict[str, Any], *more: str, out: str = "two", size: int = 2) -> Path:
    for process in cli.ranks(*arguments(changes, out), *more, folder=folder, size=size):
        assert process.returncode == 0, process.stderr
    return folder / out


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in cli.log(folder)]


def agree(found: Path, expected: Path) -> None:
    assert losses(found) == pytest.approx(losses(expected), rel=1e-5, abs=1e-5)
    a, b = cli.history(found), cli.history(expected)
    assert a["steps"] == b["steps"]
    assert a["loss"][1:] == pytest.approx(b["loss"][1:], rel=1e-4, abs=1e-5)
    for key, size in (("train_accuracy", a["train_samples"]), ("test_accuracy", a["test_samples"])):
        assert a[key][0] == pytest.approx(b[key][0], abs=1e-9), f"{key} of the same weights"
        assert a[key] == pytest.approx(b[key], abs=1.5 / size), key
    assert set(a["metrics"]) == set(b["metrics"])
    for name, values in b["metrics"].items():
        wanted = values[0] if values[0] is None else pytest.approx(values[0], rel=1e-3, abs=1e-4)
        assert a["metrics"][name][0] == wanted, name
    rates = [[line["lr"] for line in cli.log(folder)] for folder in (found, expected)]
    assert rates[0] == rates[1]


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES]
)
def test_two_ranks_train_like_one(case: str, tmp_path: Path) -> None:
    agree(two(tmp_path, CASES[case]), one(tmp_path, CASES[case]))


@pytest.mark.slow
def test_three_ranks_train_like_one(tmp_path: Path) -> None:
    changes = {"loss__name": "nonl", "run__batch_size": 100, "augment__shift": 0.1}
    agree(two(tmp_path, changes, size=3), one(tmp_path, changes))


def test_contrast_within_a_rank_differs(tmp_path: Path) -> None:
    """The comparison above can fail: without the other rank's samples NONL is another loss."""
    changes = {"loss__name": "nonl", "loss__global_batch": False}
    local, whole = losses(two(tmp_path, changes)), losses(one(tmp_path, {"loss__name": "nonl"}))
    assert len(local) == len(whole)
    assert abs(local[0] - whole[0]) > 1e-3


def test_torchrun(tmp_path: Path) -> None:
    """The real thing; one rank writes, and a resumed run is the uninterrupted one."""
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "nckernels")
    process = cli.run(*arguments({"augment__shift": 0.1}, "torchrun"), folder=tmp_path, fork=False, command=command)
    assert process.returncode == 0, process.stderr
    agree(tmp_path / "torchrun", one(tmp_path, {"augment__shift": 0.1}))


def test_ranks_killed_and_resumed(tmp_path: Path) -> None:
    changes = {"loss__queue": 64, "augment__shift": 0.1, "run__save_every": 2, "run__batch_size": 64}
    whole = two(tmp_path, changes, out="whole")
    started = cli.start_ranks(*arguments(changes, "two"), folder=tmp_path)
    log = tmp_path / "two/log.jsonl"
    assert started[0].until(lambda: log.exists() and log.read_bytes().count(b"\n") > 8), started[0].stderr
    for process in started:
        process.kill()
    resumed = two(tmp_path, changes, "--resume", "auto")
    assert cli.log(resumed) == cli.log(whole)
    assert cli.history(resumed) == cli.history(whole)
    checkpoints = [torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (resumed, whole)]
    assert not cli.unequal(*checkpoints)


def test_one_rank_that_is_told_to_stop_stops_both(tmp_path: Path) -> None:
    started = cli.start_ranks(*arguments({"schedule__epochs": 1000}, "two"), folder=tmp_path)
    assert started[0].until((tmp_path / "two/checkpoint.pt").exists), started[0].stderr
    started[1].signal(cli.signal.SIGTERM)
    try:
        for process in started:
            assert process.wait(30).returncode == 0, process.stderr
    finally:
        for process in started:
            process.kill()
    assert cli.history(tmp_path / "two")["finished"] is False
    torch.load(tmp_path / "two/checkpoint.pt", weights_only=True)


def test_bad_settings_end_both(tmp_path: Path) -> None:
    for process in cli.ranks(*arguments({"run__batch_size": 5000}), folder=tmp_path):
        assert process.returncode in (1, 2)
    assert "run.batch_size" in process.stderr
