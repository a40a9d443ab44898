"""A run that is killed and resumed has the bits of an uninterrupted one; no failure loses a checkpoint."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import signal
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

from nckernels.train import checkpoint, cli, engine, fit
from nckernels.train.files import write_atomically
from nckernels.train.folder import Folder
from nckernels.train.processes import Stop

from . import contract_process
from .runs import file, outcome, recipe


class Killed(BaseException):
    """Nothing in the trainer handles it."""


def killed_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """The next run ends without a word after so many steps."""
    original, calls = engine.Optimisation.step, itertools.count(1)

    def step(self: Any, *arguments: Any) -> Any:
        if next(calls) > steps:
            raise Killed
        return original(self, *arguments)

    monkeypatch.setattr(engine.Optimisation, "step", step)


def interrupted(folder: Path, changes: dict[str, Any], *after: int) -> None:
    """Train to the end, killed after some numbers of steps."""
    for steps in after:
        with pytest.MonkeyPatch.context() as patch:
            killed_after(patch, steps)
            with pytest.raises(Killed):
                fit(recipe(**changes), folder, resume=True, progress=False)
    fit(recipe(**changes), folder, resume=True, progress=False)


@pytest.mark.parametrize(
    "changes",
    [
        {"loss.queue": 100, "run.save_every": 5},
        {"loss.decay": 0.9, "run.eval_every": 7, "optimizer.nesterov": True},
        {"loss.name": "dlp", "model.dim": 2, "run.save_every": 4, "loss.options": {"refreshes": 9, "momentum": 0.5}},
        {"loss.name": "scl", "augment.views": 2, "augment.rotate": 10.0, "run.probes": ("FP", "LP")},
        {"loss.name": "normface", "loss.options": {"class_fraction": 0.5}, "run.save_every": 4},
        {"loss.name": "ntce", "run.micro_batch_size": 20, "data.balanced": True},
    ],
    ids=["queue", "decay", "dlp", "scl", "random", "micro"],
)
def test_a_resumed_run_equals_an_uninterrupted_one(changes: dict[str, Any], tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fit(recipe(**changes), whole, progress=False)
    interrupted(parts, changes, 2, 9, 4)  # before the first checkpoint, in the first epoch, in the second
    assert outcome(parts) == outcome(whole)
    assert outcome(whole)["step"] == 18
    if changes.get("loss.name") == "dlp":  # the share of the classes that the last assignment moved, [DLP] Fig. 4b
        assert 0 < max(line["reassigned"] for line in outcome(whole)["log"]) <= 1
    assert json.loads((whole / "history.json").read_text())["finished"] is True


def test_adamw_and_bfloat16_resume_too(tmp_path: Path) -> None:
    changes = {"optimizer.name": "adamw", "optimizer.lr": 0.01, "run.precision": "bfloat16", "run.save_every": 5}
    fit(recipe(**changes), tmp_path / "whole", progress=False)
    interrupted(tmp_path / "parts", changes, 7)
    one, other = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "parts"))
    for key, state in one["optimizer"]["state"].items():
        assert all(torch.equal(value, other["optimizer"]["state"][key][name]) for name, value in state.items())


def test_an_interrupt_saves_and_prints_the_command_that_resumes(tmp_path: Path) -> None:
    toml = str(file(tmp_path, **{"schedule.epochs": 2000, "run.metrics": False}))
    words = ["train", toml, "--out", "run", "--set", "optimizer.lr=0.05", "--quiet"]
    process = contract_process.start(*words, folder=tmp_path)
    assert process.until((tmp_path / "run" / "checkpoint.pt").exists), process.stderr
    process.signal(signal.SIGINT)
    assert process.wait().returncode == 0, process.stderr
    line = f"python -m nckernels train {toml} --out run --resume auto --set optimizer.lr=0.05"
    assert process.stdout == f"saved; to resume: {line}\n"
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert not history["finished"]
    stored = checkpoint.load(tmp_path / "run" / "checkpoint.pt")
    assert history["steps"] == stored["history"]["steps"]


def test_stopped_within_an_epoch_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(recipe(), tmp_path / "whole", progress=False)
    original = engine.Optimisation.step

    def step(self: Any, done: int, *arguments: Any) -> Any:
        if done == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, done, *arguments)

    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(engine.Optimisation, "step", step)
    run = fit(recipe(), tmp_path / "parts", progress=False)
    assert not run.history.finished
    assert checkpoint.load(tmp_path / "parts" / "checkpoint.pt")["step"] == 5
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    fit(recipe(), tmp_path / "parts", resume=True, progress=False)
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")


def test_a_second_interrupt_raises_keyboard_interrupt() -> None:
    before = signal.getsignal(signal.SIGINT)  # a shell's background jobs ignore it
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with Stop(wanted=False):
        assert signal.getsignal(signal.SIGINT) is before


def test_a_finished_run_is_not_trained_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toml, out = file(tmp_path, **{"schedule.epochs": 1, "run.probes": ["FP"]}), tmp_path / "run"
    words = [str(toml), "--out", str(out), "--quiet"]
    assert cli.main(words) == 0
    before = outcome(out), (out / "history.json").read_bytes()
    capsys.readouterr()
    assert cli.main([*words, "--resume", "auto"]) == 0
    assert "this run was already finished" in capsys.readouterr().out
    assert (outcome(out), (out / "history.json").read_bytes()) == before
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    assert f"{out} already has a run; --resume auto continues it" in capsys.readouterr().err


def test_killed_after_the_last_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"schedule.epochs": 1, "run.probes": ("FP",)}
    fit(recipe(**changes), tmp_path / "whole", progress=False)

    def probe(*_: Any, **__: Any) -> Any:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(engine, "probe", probe)
        with pytest.raises(Killed):
            fit(recipe(**changes), tmp_path / "parts", progress=False)
    fit(recipe(**changes), tmp_path / "parts", resume=True, progress=False)
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")


# What is refused


def test_a_checkpoint_of_another_recipe_is_an_error(tmp_path: Path) -> None:
    fit(recipe(schedule__epochs=1), tmp_path, progress=False)
    message = r"another recipe: loss\.temperature = 0\.1 there, 0\.2 here, optimizer\.lr = 0\.1 there, 0\.05 here$"
    with pytest.raises(ValueError, match=message):
        fit(recipe(schedule__epochs=1, loss__temperature=0.2, optimizer__lr=0.05), tmp_path, resume=True)
    (tmp_path / "recipe.json").unlink()
    with pytest.raises(ValueError, match=r"checkpoint\.pt is of another recipe: run\.seed = 42 there, 1 here"):
        fit(recipe(schedule__epochs=1, run__seed=1), tmp_path, resume=True)
    free = {"run.log_every": 7, "run.save_every": 2, "data.root": "elsewhere", "data.workers": 0, "run.threads": 2}
    assert fit(recipe(schedule__epochs=1, **free), tmp_path, resume=True, progress=False).history.finished
    assert set(free) < set(checkpoint.FREE)


@pytest.mark.parametrize("damage", ["flipped", "tensor"])
def test_a_damaged_checkpoint_is_named(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    fit(recipe(schedule__epochs=1), tmp_path, progress=False)
    content = bytearray(path.read_bytes())
    if damage == "tensor":
        torch.save(torch.zeros(2), path)
    else:
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)
    message = r"checkpoint\.pt: (damaged, or not a checkpoint: |expected a checkpoint of version 1)"
    with pytest.raises(ValueError, match=message):
        fit(recipe(schedule__epochs=1), tmp_path, resume=True, progress=False)


def test_two_processes_in_one_folder_are_an_error(tmp_path: Path) -> None:
    held = Folder(tmp_path)
    with pytest.raises(ValueError, match=rf"{tmp_path}: process {os.getpid()} is already training in this folder"):
        fit(recipe(), tmp_path, progress=False)
    held.close()
    here, there = os.pipe()
    other = os.fork()
    if other == 0:
        folder = Folder(tmp_path)
        child = os.fork()  # which outlives its parent, and holds nothing
        if child:
            os.write(there, f"{child}\n".encode())
        time.sleep(60)
        folder.close()
        os._exit(0)
    with open(here) as pipe:
        child = int(pipe.readline())
    os.close(there)
    try:
        with pytest.raises(ValueError, match=f"process {other} is already training in this folder"):
            Folder(tmp_path)
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)
        Folder(tmp_path).close()
    finally:
        os.kill(child, signal.SIGKILL)


def test_windows_has_no_fcntl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There a byte is locked, which others cannot read: none of those of the process id. Folders are not flushed."""
    locked = set()

    def locking(file: int, mode: int, count: int) -> None:
        place = os.fstat(file).st_ino, os.lseek(file, 0, os.SEEK_CUR)
        assert (mode, count) == (2, 1)
        assert place[1] > 100
        if place in locked:
            raise PermissionError(13, "Permission denied")
        locked.add(place)

    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", types.SimpleNamespace(locking=locking, LK_NBLCK=2))
    monkeypatch.delattr(os, "register_at_fork")
    spec = importlib.util.spec_from_file_location("files_of_windows", write_atomically.__code__.co_filename)
    assert spec is not None
    assert spec.loader is not None
    files = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(files)
    with files.hold(tmp_path / "lock"), pytest.raises(BlockingIOError, match=f"^{os.getpid()}$"):
        files.hold(tmp_path / "lock")
    monkeypatch.setattr(os, "open", lambda *_: pytest.fail("a folder was opened"))
    files.write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new"


# A full disk: with the rest of it in test_contract_resume.py


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    write_atomically(path, lambda out: out.write(b"old"))

    def fsync(_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match=r"a could not be written \(Input/output error\); the previous one is kept"):
        write_atomically(path, lambda out: out.write(b"new"))
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]
