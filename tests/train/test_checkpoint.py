"""Killed at any moment and resumed, a run has the bits of one that was not; nothing that goes wrong loses anything."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
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

from .runs import Process, environment, file, outcome, recipe


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
        {"loss.name": "dlp", "model.dim": 2, "run.save_every": 3},
        {"loss.name": "scl", "augment.views": 2, "augment.rotate": 10.0, "run.probes": ("FP", "LP")},
        {"loss.name": "normface", "loss.options": {"class_fraction": 0.5}, "run.save_every": 4},
        {"loss.name": "ntce", "run.micro_batch_size": 20, "data.balanced": True},
    ],
    ids=["queue", "decay", "dlp", "scl", "random", "micro"],
)
def test_resumed_is_as_if_never_interrupted(changes: dict[str, Any], tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fit(recipe(**changes), whole, progress=False)
    interrupted(parts, changes, 2, 9, 4)  # before the first checkpoint, in the first epoch, in the second
    assert outcome(parts) == outcome(whole)
    assert outcome(whole)["step"] == 18
    assert json.loads((whole / "history.json").read_text())["finished"] is True


def test_adamw_and_bfloat16_resume_too(tmp_path: Path) -> None:
    changes = {"optimizer.name": "adamw", "optimizer.lr": 0.01, "run.precision": "bfloat16", "run.save_every": 5}
    fit(recipe(**changes), tmp_path / "whole", progress=False)
    interrupted(tmp_path / "parts", changes, 7)
    one, other = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "parts"))
    for key, state in one["optimizer"]["state"].items():
        assert all(torch.equal(value, other["optimizer"]["state"][key][name]) for name, value in state.items())


def test_sigkill_at_random_moments(tmp_path: Path) -> None:
    """Also while a checkpoint is written, which the part file shows."""
    few = {"data.classes": (0, 2), "schedule.epochs": 3, "run.eval_every": 1000, "run.metrics": False}
    changes = {"model.width": 32, "run.batch_size": 32, "run.save_every": 1, **few}  # 27 steps
    toml, whole, parts = file(tmp_path, **changes), tmp_path / "whole", tmp_path / "parts"
    reference = Process(tmp_path / "whole.txt", toml, "--out", whole)
    saved, part, moments = parts / "checkpoint.pt", parts / "checkpoint.pt.part", random.Random(0)
    in_save = 0
    for attempt in range(4):
        before = saved.stat().st_mtime_ns if saved.exists() else 0
        process = Process(tmp_path / "parts.txt", toml, "--out", parts, "--resume", "auto")
        while process.running and not (saved.exists() and saved.stat().st_mtime_ns > before):
            time.sleep(0.001)
        if attempt % 2:
            time.sleep(0.05 * moments.random())
        else:
            while process.running and not part.exists():
                pass
        assert process.running, process.printed()
        process.kill()
        in_save += part.exists()
    assert in_save > 0
    last = Process(tmp_path / "parts.txt", toml, "--out", parts, "--resume", "auto")
    assert last.status() == 0, last.printed()
    assert reference.status() == 0, reference.printed()
    assert outcome(parts) == outcome(whole)
    assert not list(parts.glob("*.part"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_go_on(number: signal.Signals, tmp_path: Path) -> None:
    toml, out = file(tmp_path, **{"schedule.epochs": 2000, "run.metrics": False}), tmp_path / "run"
    process = Process(tmp_path / "out.txt", toml, "--out", out, "--set", "optimizer.lr=0.05", "--quiet")
    while process.running and not (out / "checkpoint.pt").exists():
        time.sleep(0.01)
    process.send(number)
    assert process.status() == 0, process.printed()
    line = f"python -m nckernels train {toml} --out {out} --resume auto --set optimizer.lr=0.05"
    assert process.printed() == f"saved; to go on: {line}\n"
    history = json.loads((out / "history.json").read_text())
    assert not history["finished"]
    assert history["steps"] == checkpoint.load(out / "checkpoint.pt")["history"]["steps"]


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


def test_a_second_interrupt_is_one() -> None:
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with Stop(wanted=False):
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_finished_run_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toml, out = file(tmp_path, **{"schedule.epochs": 1, "run.probes": ["FP"]}), tmp_path / "run"
    words = [str(toml), "--out", str(out), "--quiet"]
    assert cli.main(words) == 0
    before = outcome(out), (out / "history.json").read_bytes()
    capsys.readouterr()
    assert cli.main([*words, "--resume", "auto"]) == 0
    assert "this run was finished already" in capsys.readouterr().out
    assert (outcome(out), (out / "history.json").read_bytes()) == before
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    assert f"{out} has a run; --resume auto goes on with it" in capsys.readouterr().err


def test_killed_in_what_comes_after_the_last_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_another_recipe(tmp_path: Path) -> None:
    fit(recipe(schedule__epochs=1), tmp_path, progress=False)
    message = r"recipe\.json is of another recipe: loss\.temperature = 0\.1, not 0\.2, optimizer\.lr = 0\.1, not 0\.05$"
    with pytest.raises(ValueError, match=message):
        fit(recipe(schedule__epochs=1, loss__temperature=0.2, optimizer__lr=0.05), tmp_path, resume=True)
    (tmp_path / "recipe.json").unlink()
    with pytest.raises(ValueError, match=r"checkpoint\.pt is of another recipe: run\.seed = 42, not 1"):
        fit(recipe(schedule__epochs=1, run__seed=1), tmp_path, resume=True)
    free = {"run.log_every": 7, "run.save_every": 2, "data.root": "elsewhere", "data.workers": 0, "run.threads": 2}
    assert fit(recipe(schedule__epochs=1, **free), tmp_path, resume=True, progress=False).history.finished
    assert set(free) < set(checkpoint.FREE)


@pytest.mark.parametrize("damage", ["half", "empty", "text", "flipped", "tensor"])
def test_a_damaged_checkpoint(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    fit(recipe(schedule__epochs=1), tmp_path, progress=False)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    if damage == "tensor":
        torch.save(torch.zeros(2), path)
    else:
        content[middle] ^= 0xFF
        whole = bytes(content)
        path.write_bytes({"half": whole[:middle], "empty": b"", "text": b"weights", "flipped": whole}[damage])
    message = r"checkpoint\.pt: (damaged, or no checkpoint: |expected a checkpoint of version 1)"
    with pytest.raises(ValueError, match=message):
        fit(recipe(schedule__epochs=1), tmp_path, resume=True, progress=False)


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.system, ("true",)

    torch.save({"version": 1, "network": Evil()}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"checkpoint\.pt: damaged, or no checkpoint"):
        checkpoint.load(tmp_path / "checkpoint.pt")


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    held = Folder(tmp_path)
    with pytest.raises(ValueError, match=rf"{tmp_path}: process {os.getpid()} trains in this folder"):
        fit(recipe(), tmp_path, progress=False)
    held.close()
    other = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time, os; from pathlib import Path; from nckernels.train.folder import Folder\n"
            "folder = Folder(Path(sys.argv[1]))\n"
            "child = os.fork()\n"  # which outlives its parent, and holds nothing
            "child or time.sleep(20)\n"
            "print(child, flush=True)\n"
            "time.sleep(60)",
            str(tmp_path),
        ],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout is not None
    child = int(other.stdout.readline())
    with pytest.raises(ValueError, match=f"process {other.pid} trains in this folder"):
        Folder(tmp_path)
    other.kill()
    other.wait()
    Folder(tmp_path).close()
    os.kill(child, signal.SIGKILL)
    other.stdout.close()


# A full disk


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resumed when there is space again, nothing is lost."""
    fit(recipe(), tmp_path / "whole", progress=False)
    folder = tmp_path / "parts"
    original, calls = checkpoint.write_atomically, itertools.count(1)

    def full(path: Path, content: Any) -> None:
        def no_space(out: Any) -> None:
            content(out)
            if next(calls) == 2:
                raise OSError(28, "No space left on device")

        original(path, no_space)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_atomically", full)
        message = rf"{folder}: checkpoint\.pt could not be written \(No space left on device\); the one before is kept"
        with pytest.raises(OSError, match=message):
            fit(recipe(), folder, progress=False)
    assert checkpoint.load(folder / "checkpoint.pt")["step"] == 9
    assert not list(folder.glob("*.part"))
    fit(recipe(), folder, resume=True, progress=False)
    assert outcome(folder) == outcome(tmp_path / "whole")


def test_a_disk_that_is_full_from_the_start(tmp_path: Path) -> None:
    """A limit of the file size stands for it: the network's checkpoint does not fit, its history does."""
    toml = file(tmp_path, **{"model.width": 48, "schedule.epochs": 1, "run.metrics": False})
    process = Process(tmp_path / "out.txt", toml, "--out", tmp_path / "run", "--quiet", file_size=200_000)
    assert process.status() == 1
    assert f"{tmp_path / 'run'}: checkpoint.pt could not be written (File too large)\n" in process.printed()
    assert not list((tmp_path / "run").glob("checkpoint*"))


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    write_atomically(path, lambda out: out.write(b"old"))

    def fsync(_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match=r"a could not be written \(Input/output error\); the one before is kept"):
        write_atomically(path, lambda out: out.write(b"new"))
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]
