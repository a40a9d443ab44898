"""The trainer on two ranks: it trains like one process, and signals and errors of one rank end both."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from train.runs import environment, file, outcome, recipe

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

from nckernels.train import History, checkpoint, engine, fit

GROUP = {"model.norm": "group", "optimizer.lr": 0.02}
VIEWS = {"loss.name": "scl", "augment.views": 2, "augment.rotate": 10.0}
QUEUE = {"loss.queue": 50, "run.save_every": 4}


def train(rank: int, world_size: int, changes: dict[str, Any], folder: Path | None, resume: bool = False) -> History:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of BatchNorm
        return fit(recipe(**changes), folder, resume=resume, progress=False).history


def train_killed(rank: int, world_size: int, changes: dict[str, Any], folder: Path, steps: int) -> None:
    """Both ranks exit within a step."""
    original, calls = engine.Optimisation.step, itertools.count(1)

    def step(self: Any, *arguments: Any) -> Any:
        if next(calls) > steps:
            raise ConnectionAbortedError
        return original(self, *arguments)

    engine.Optimisation.step = step
    try:
        train(rank, world_size, changes, folder)
    except ConnectionAbortedError:
        return
    finally:
        engine.Optimisation.step = original


def train_told_to_stop(rank: int, world_size: int, changes: dict[str, Any], folder: Path) -> bool:
    """The last rank alone gets a signal, in its fifth step."""
    original = engine.Optimisation.step

    def step(self: Any, done: int, *arguments: Any) -> Any:
        if done == 4 and rank == world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, done, *arguments)

    engine.Optimisation.step = step
    try:
        return train(rank, world_size, changes, folder).finished
    finally:
        engine.Optimisation.step = original


def warned(rank: int, world_size: int) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(recipe(schedule__epochs=1), progress=False)
    return [str(w.message) for w in caught if "BatchNorm" in str(w.message)]


def diverge(rank: int, world_size: int, folder: Path) -> None:
    """The last rank alone has a bad batch."""
    original = engine.Optimisation.step

    def step(self: Any, done: int, images: torch.Tensor, labels: torch.Tensor) -> Any:
        return original(self, done, images * (float("nan") if rank == world_size - 1 and done == 4 else 1), labels)

    engine.Optimisation.step = step
    try:
        train(rank, world_size, GROUP, folder)
    finally:
        engine.Optimisation.step = original


ODD = {"run.batch_size": 63}
CASES: dict[str, dict[str, Any]] = {
    "nonl": {},
    "scl": {**VIEWS, **ODD},
    "ce": {"loss.name": "ce", **ODD, "optimizer.clip": 1.0},
    "micro": {"run.micro_batch_size": 10, **ODD},
    "normface": {"loss.name": "normface", "loss.options": {"label_smoothing": 0.1}, **ODD},
    "ntce": {"loss.name": "ntce", "loss.decay": 0.9, **ODD},
    "instance": {"loss.options": {"direction": "instance"}, **ODD},
    "prototype": {**VIEWS, "loss.name": "prototype", "run.micro_batch_size": 10},
    "etf-dr": {"loss.name": "etf-dr", **ODD},
    "dlp": {"loss.name": "dlp", **ODD},
    "psc-star": {"loss.name": "psc-star", **ODD},
    "balanced": {"data.imbalance": 0.2, "data.balanced": True, "run.batch_size": 31},
    "moved": {"augment.shift": 0.1, "augment.zoom": 0.1, **ODD},
}
QUICK = ("nonl", "scl", "ce", "micro")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES]
)
def test_two_ranks_train_like_one(case: str, ranks2: Ranks) -> None:
    changes = {**GROUP, **CASES[case], "run.log_every": 1}
    one = fit(recipe(**changes), progress=False).history
    first, second = ranks2.run(train, changes, None)
    # One process with other backends ends 2e-5 away: training amplifies roundings.
    assert first.loss[1:] == pytest.approx(one.loss[1:], rel=1e-5, abs=5e-5)
    for name in ("nc1", "weight_alignment"):
        assert first.metrics[name] == pytest.approx(one.metrics[name], rel=1e-3, abs=1e-6)
    assert {**first.to_dict(), "seconds": 0} == {**second.to_dict(), "seconds": 0}


def test_a_loss_per_rank_differs_from_the_global_one(ranks2: Ranks) -> None:
    """Shows that the comparison above can fail."""
    changes = {**GROUP, "schedule.epochs": 1, "run.log_every": 1}
    one = fit(recipe(**changes), progress=False).history
    assert abs(ranks2.run(train, {**changes, "loss.global_batch": False}, None)[0].loss[1] - one.loss[1]) > 1e-2


@pytest.mark.parametrize("times", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_training_under_torchrun(times: int, tmp_path: Path) -> None:
    """Both processes end (once they did not always), without a warning, and the folder is that of one run."""
    wanted = {**GROUP, "schedule.epochs": 1, "run.metrics": False}
    one = fit(recipe(**wanted), progress=False).history
    for attempt in range(times):
        folder = tmp_path / f"run{attempt}"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
        command += ["nckernels", "train", str(file(tmp_path, **wanted)), "--out", str(folder), "--quiet"]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert "Warning" not in done.stderr
        assert done.stdout.count("nonl on digits: 9 steps in ") == 1
        assert History.load(folder).loss[1:] == pytest.approx(one.loss[1:], rel=1e-5)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are listed on Linux only")
def test_no_thread_of_the_process_group_outlives_it() -> None:
    """One that still runs as Python ends can abort the process."""
    program = """
import os
import torch
from nckernels.train import processes
processes.world("cpu")
torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))(torch.ones(1, 2)).sum().backward()
for moment in "before", "after":
    names = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
    print(moment, any("gloo" in name for name in names))
    processes._leave()
"""
    job = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = subprocess.run([sys.executable, "-c", program], env=environment() | job, capture_output=True, text=True)
    assert done.stdout == "before True\nafter False\n", done.stderr


def test_killed_and_resumed_runs_keep_the_queue_of_each_rank(ranks2: Ranks, tmp_path: Path) -> None:
    """Each rank has a queue of its own, and all of it goes on."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    ranks2.run(train, QUEUE, whole)
    ranks2.run(train_killed, QUEUE, parts, 7)
    queues = checkpoint.load(parts / "checkpoint.pt")["ranks"]
    assert len(queues) == 2
    ranks2.run(train, QUEUE, parts, True)
    assert outcome(parts) == outcome(whole)


def test_resuming_with_another_number_of_ranks(ranks2: Ranks, tmp_path: Path) -> None:
    for name, changes in (("queue", QUEUE), ("none", {})):
        ranks2.run(train_killed, changes, tmp_path / name, 10)
    with pytest.raises(ValueError, match=r"queue: the checkpoint is of 2 processes, .*; it cannot be resumed with 1"):
        fit(recipe(**QUEUE), tmp_path / "queue", resume=True, progress=False)
    assert checkpoint.load(tmp_path / "none" / "checkpoint.pt")["ranks"] == []
    assert fit(recipe(), tmp_path / "none", resume=True, progress=False).history.finished


def test_a_signal_to_one_rank_stops_both(ranks2: Ranks, tmp_path: Path) -> None:
    """At the next line of the log, which every rank looks at."""
    assert ranks2.run(train_told_to_stop, {}, tmp_path / "parts") == [False, False]
    assert checkpoint.load(tmp_path / "parts" / "checkpoint.pt")["step"] == 6
    ranks2.run(train, {}, tmp_path / "parts", True)
    ranks2.run(train, {}, tmp_path / "whole")
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")


def test_errors_on_one_rank_raise_on_all(ranks2: Ranks, tmp_path: Path) -> None:
    fit(recipe(), tmp_path / "run", progress=False)
    for error in ranks2.errors(train, {}, tmp_path / "run"):
        assert "already has a run; --resume auto continues it" in str(error)
    for error in ranks2.errors(diverge, tmp_path / "bad"):
        assert isinstance(error, FloatingPointError)
        assert str(error).startswith("training diverged in step 5 (epoch 1): the loss is nan")


def test_local_batch_norm_warns_once(ranks2: Ranks) -> None:
    first, second = ranks2.run(warned)
    assert len(first) == 1
    assert "BatchNorm normalises with the samples of its own rank only" in first[0]
    assert second == []
