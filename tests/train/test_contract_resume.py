"""Runs that are killed, stopped, truncated or out of disk space, and resumed: nothing is lost, and nothing differs.

Written from the description of the trainer, not from its code.
"""

from __future__ import annotations

import pickle
import random
import re
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from . import contract_process as cli

LONG = {"run__batch_size": 48, "run__save_every": 1, "run__eval_every": 20, "schedule__epochs": 3}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "queue": ("digits/nonl", {"loss__queue": 64, "augment__rotate": 10.0, "augment__shift": 0.1, "run__metrics": True}),
    "decay": ("digits/ntce", {"loss__decay": 0.9, "optimizer__name": "adamw", "optimizer__lr": 0.003}),
    "views": ("digits/scl", {"run__probes": ["FP"], "model__projection": "mlp"}),
    "dlp": ("digits/nonl", {"loss__name": "dlp", "run__batch_size": 100, "schedule__warmup_epochs": 1}),
    "balanced": ("digits/ce", {"data__imbalance": 0.1, "data__balanced": True, "optimizer__clip": 1.0}),
    "precision": ("digits/normface", {"run__precision": "bfloat16", "run__micro_batch_size": 20}),
    "rare": ("digits/nonl", {"run__save_every": 13, "run__eval_every": 7, "run__log_every": 3}),
}
QUICK = ("queue",)


def arguments(kind: str, *more: str) -> tuple[str, ...]:
    recipe, changes = KINDS[kind]
    return ("train", recipe, *cli.options(**{**LONG, **changes}), *more)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folders of the uninterrupted runs."""
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            process = cli.run(*arguments(kind, "--out", "r"), folder=folder)
            assert process.returncode == 0, process.stderr
            made[kind] = folder / "r"
        return made[kind]

    return get


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in KINDS]
)
def test_killed_at_any_moment(kind: str, whole: Any, tmp_path: Path) -> None:
    """Checkpoints at every step; every other kill hits one that is being written."""
    delays = random.Random(kind)
    folder = tmp_path / "r"
    command = arguments(kind, "--out", "r", "--resume", "auto")
    kills = in_save = 0
    for attempt in range(8):
        process = cli.start(*command, folder=tmp_path)
        before = stamp(folder)
        if process.until(lambda before=before: stamp(folder) != before):
            if attempt % 2:
                for _ in range(300_000):  # without a pause, for it is there for a millisecond
                    if (folder / "checkpoint.pt.part").exists():
                        break
            else:
                pause(process, delays.random() * 0.12)
        if process.poll() is not None:
            break
        process.kill()
        assert process.returncode == -signal.SIGKILL
        kills += 1
        in_save += (folder / "checkpoint.pt.part").exists()
        if (folder / "checkpoint.pt").exists():
            torch.load(folder / "checkpoint.pt", weights_only=True)
    assert kills >= 3, "the run was too short to be killed"
    assert in_save, "no kill hit a checkpoint that was being written"
    last = cli.run(*command, folder=tmp_path)
    assert last.returncode == 0, last.stderr
    same(folder, whole(kind))


def test_sigterm_saves_and_says_how_to_resume(whole: Any, tmp_path: Path) -> None:
    process = cli.start(*arguments("queue", "--out", "r"), folder=tmp_path)
    assert process.until((tmp_path / "r/checkpoint.pt").exists), process.stderr
    pause(process, 0.1)
    process.signal(signal.SIGTERM)
    assert process.wait(30).returncode == 0, process.stderr
    history = cli.history(tmp_path / "r") if (tmp_path / "r/history.json").exists() else {"finished": False}
    assert history["finished"] is False
    lines = re.findall(r"(\S*-m nckernels train .*)", process.stdout + process.stderr)
    assert lines, f"no command that resumes in\n{process.stdout}\n{process.stderr}"
    words = shlex.split(lines[-1].strip().strip("`"))
    again = cli.run(*words[words.index("nckernels") + 1 :], folder=tmp_path)
    assert again.returncode == 0, again.stderr
    same(tmp_path / "r", whole("queue"))


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """A run killed in the middle."""
    process = cli.start(*arguments("queue", "--out", "r"), folder=tmp_path)
    log = tmp_path / "r/log.jsonl"
    assert process.until(lambda: log.exists() and log.read_bytes().count(b"\n") > 25), process.stderr
    process.kill()
    return tmp_path / "r"


def resume(folder: Path, **options: Any) -> cli.Process:
    return cli.run(*arguments("queue", "--out", "r", "--resume", "auto"), folder=folder.parent, **options)


def test_leftovers_do_no_harm(stopped: Path, whole: Any) -> None:
    """Leftovers: partly written files, log lines after the checkpoint, and a part of a line."""
    (stopped / "checkpoint.pt.part").write_bytes((stopped / "checkpoint.pt").read_bytes()[:1000])
    (stopped / "history.json.part").write_bytes(b"{")
    with open(stopped / "log.jsonl", "a") as file:
        file.write('{"step": 100000, "epoch": 7.0}\n{"step": 100001, "epoch": 7.0, "lo')
    process = resume(stopped)
    assert process.returncode == 0, process.stderr
    same(stopped, whole("queue"))
    assert not (stopped / "checkpoint.pt.part").exists()


def test_broken_checkpoints_are_named(stopped: Path, tmp_path: Path) -> None:
    good = (stopped / "checkpoint.pt").read_bytes()
    control, attack = tmp_path / "control", tmp_path / "attack"
    with open(tmp_path / "evil", "wb") as file:
        torch.save({"model": Opens(control)}, file)
    torch.load(tmp_path / "evil", weights_only=False)
    assert control.exists(), "the attack does nothing to be protected from"
    with open(tmp_path / "evil", "wb") as file:
        torch.save({"model": Opens(attack)}, file)
    evil = (tmp_path / "evil").read_bytes()
    plain = pickle.dumps(Opens(attack), protocol=2)
    for name, content in {
        "truncated": good[: len(good) // 2],
        "a few bytes": good[:10],
        "empty": b"",
        "text": b"no checkpoint at all\n" * 50,
        "malicious": evil,
        "malicious pickle": plain,
    }.items():
        (stopped / "checkpoint.pt").write_bytes(content)
        process = resume(stopped)
        assert process.returncode in (1, 2), f"{name}: {process.returncode}\n{process.stderr}"
        assert "checkpoint.pt" in process.stderr, f"{name}:\n{process.stderr}"
        assert "Traceback" not in process.stderr, f"{name}:\n{process.stderr}"
        assert (stopped / "checkpoint.pt").read_bytes() == content, f"{name}: the file was touched"
        assert not attack.exists(), f"{name}: code has run"
    start = cli.run("train", "digits/nonl", *cli.options(model__init=str(stopped)), folder=tmp_path)
    assert start.returncode in (1, 2)
    assert "checkpoint.pt" in start.stderr
    evaluated = cli.run("evaluate", str(stopped), folder=tmp_path)
    assert evaluated.returncode in (1, 2)
    assert "checkpoint.pt" in evaluated.stderr
    assert not attack.exists()


def test_full_disk(stopped: Path, whole: Any) -> None:
    """A limit on the size of files simulates a full disk: the next checkpoint does not fit, and the old one stays."""
    old = torch.load(stopped / "checkpoint.pt", weights_only=True)
    size = (stopped / "checkpoint.pt").stat().st_size
    limit = size - 2000
    assert (stopped / "log.jsonl").stat().st_size + 2000 < limit
    assert (stopped / "history.json").stat().st_size + 2000 < limit
    process = resume(stopped, file_size=limit)
    assert process.returncode == 1, f"{process}\n{process.stderr}"
    assert "checkpoint.pt" in process.stderr
    assert "Traceback" not in process.stderr, process.stderr
    assert not cli.unequal(torch.load(stopped / "checkpoint.pt", weights_only=True), old)
    process = resume(stopped)
    assert process.returncode == 0, process.stderr
    same(stopped, whole("queue"))


class Opens:
    """A pickle of it creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


def stamp(folder: Path) -> tuple[int, int] | None:
    try:
        found = (folder / "checkpoint.pt").stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def pause(process: cli.Process, seconds: float) -> None:
    end = cli.time.monotonic() + seconds
    process.until(lambda: cli.time.monotonic() > end)


def same(folder: Path, expected: Path) -> None:
    """Checkpoints, history and log agree bit for bit, times aside."""
    assert cli.log(folder) == cli.log(expected)
    assert cli.history(folder) == cli.history(expected)
    found, whole = (torch.load(f / "checkpoint.pt", weights_only=True) for f in (folder, expected))
    assert not cli.unequal(found, whole)
    assert {p.name for p in folder.iterdir()} == {p.name for p in expected.iterdir()}
