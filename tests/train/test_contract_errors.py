"""Settings, arguments and data that cannot work, seen from the command line.

Written from the description of the trainer, not from its code.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nckernels.train.cli import main

from . import contract_process as cli

BAD = {
    "unknown section": ({"optimiser__lr": 1.0}, "optimizer.lr"),
    "unknown key": ({"loss__temprature": 0.1}, "loss.temperature"),
    "wrong type": ({"run__batch_size": "many"}, "run.batch_size"),
    "not positive": ({"loss__temperature": 0.0}, "loss.temperature"),
    "contrastive without views": ({"loss__name": "scl"}, "augment.views"),
    "unknown loss": ({"loss__name": "nonll"}, "nonl"),
    "unknown data": ({"data__name": "digit"}, "data.name"),
    "unknown model": ({"model__name": "resnet19"}, "model.name"),
    "unknown option of the loss": ({"loss__options": {"smoothing": 0.1}}, "smoothing"),
    "unknown option of the data": ({"data__options": {"views": 3}}, "views"),
    "queue of a loss without": ({"loss__name": "normface", "loss__queue": 64}, "loss.queue"),
    "decay of a loss without": ({"loss__name": "ce", "loss__decay": 0.9}, "loss.decay"),
    "several labels": ({"loss__name": "bce"}, "bce"),
    "too few dimensions": ({"loss__name": "etf-dr", "model__dim": 4}, "dim"),
    "weights of a model without": ({"model__pretrained": True}, "model.pretrained"),
    "batch larger than the set": ({"run__batch_size": 5000}, "run.batch_size"),
    "unknown device": ({"run__device": "warp"}, "run.device"),
    "classes that are not there": ({"data__classes": [5, 40]}, "data.classes"),
    "no such start": ({"model__init": "nowhere"}, "nowhere"),
    "no such backend": ({"run__backend": "abacus"}, "abacus"),
}


def refused(arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> int:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    message = capsys.readouterr().err
    assert word in message
    assert len(message) < 4000
    assert isinstance(stop.value.code, int)
    return stop.value.code


@pytest.mark.parametrize("case", BAD)
def test_bad_settings(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A message on stderr, and no files that would hinder the next attempt."""
    changes, word = BAD[case]
    arguments = ["digits/nonl", *cli.options(**changes), "--out", str(tmp_path / "r")]
    assert refused(arguments, word, capsys) in (1, 2)
    assert not (tmp_path / "r/checkpoint.pt").exists()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["digts/nonl"], "digits"),
        (["digits/nonll"], "nonl"),
        (["none.toml"], "none.toml"),
        (["digits/nonl", "--set", "run.seed"], "KEY=VALUE"),
        (["digits/nonl", "--sett", "run.seed=1"], "--sett"),
        ([], "RECIPE"),
    ],
)
def test_bad_arguments(arguments: list[str], word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused([*arguments, "--out", str(tmp_path / "r")], word, capsys) == 2
    assert not (tmp_path / "r").exists()


def test_a_setting_that_fails_can_be_corrected(tmp_path: Path) -> None:
    for epochs, batch, status in ((1, 5000, (1, 2)), (1, 512, (0,))):
        changes = cli.options(schedule__epochs=epochs, run__batch_size=batch)
        process = cli.run("train", "digits/nonl", *changes, "--out", "r", folder=tmp_path)
        assert process.returncode in status, process.stderr


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cifar10", ("cs.toronto.edu", "cifar-10-python")),
        ("cifar100", ("cs.toronto.edu", "cifar-100-python")),
        ("folder", ("train",)),
    ],
)
def test_missing_data(name: str, expected: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The message has the official source and the expected layout."""
    changes = cli.options(data__name=name, data__root=str(tmp_path / "absent"))
    for word in ("absent", *expected):
        assert refused(["digits/nonl", *changes], word, capsys) == 1


def test_dry_run(tmp_path: Path) -> None:
    process = cli.run("train", "digits/nonl", *cli.options(), "--out", "r", "--dry-run", folder=tmp_path)
    assert process.returncode == 0, process.stderr
    assert not (tmp_path / "r").exists()
    text = process.stdout.lower()
    for word in ("temperature", "0.1", "128", "convnet", "parameters", "memory", "naive"):
        assert word in text, f"{word} in\n{process.stdout}"


def test_diverged(tmp_path: Path) -> None:
    """A loss that is not finite stops the run with the step and the last good checkpoint."""
    changes = cli.options(optimizer__lr=1e30, run__save_every=1, schedule__name="constant")
    process = cli.run("train", "digits/ce", *changes, "--out", "r", folder=tmp_path)
    assert process.returncode == 1
    cli.refused(process, "step", "checkpoint.pt")
    cli.log(tmp_path / "r")
    cli.history(tmp_path / "r")
    assert all(t.isfinite().all() for t in cli.tensors(torch.load(tmp_path / "r/checkpoint.pt", weights_only=True)))
