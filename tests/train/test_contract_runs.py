"""The files of a run and its failures, through the command line and ``nckernels.train.fit``.

Written from the description of the trainer, not from its code.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from nckernels.metrics import NeuralCollapse, RunHistory
from nckernels.train.recipe import from_dict
from nckernels.train.recipes import load

from . import contract_process as cli

LOG_KEYS = {"step", "epoch", "loss", "lr", "grad_norm", "feature_norm", "samples_per_second", "seconds"}
HISTORY_KEYS = {
    *("version", "recipe", "num_classes", "class_names", "dim", "encoded_dim", "parameters"),
    *("train_samples", "test_samples", "steps", "epochs", "loss", "train_accuracy", "test_accuracy", "metrics"),
    *("seconds", "classifiers", "prototype_cosines", "mean_cosines", "finished", "versions", "note"),
}


def fit(folder: Path | None = None, recipe: str = "digits/nonl", **changes: Any) -> Any:
    from nckernels.train import fit

    return fit(load(recipe, cli.settings(**changes)), folder, progress=False)


def state(run: Any) -> dict[str, torch.Tensor]:
    return {**run.network.state_dict(), **{f"head.{k}": v for k, v in run.head.state_dict().items()}}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[cli.Process, Path]:
    """A run with metrics and probes."""
    folder = tmp_path_factory.mktemp("run")
    changes = cli.options(run__metrics=True, run__probes=["FP", "LP"], run__log_every=4)
    process = cli.run("train", "digits/nonl", *changes, "--out", "r", folder=folder)
    assert process.returncode == 0, process.stderr
    return process, folder / "r"


def test_folder(run: tuple[cli.Process, Path]) -> None:
    process, folder = run
    names = {path.name for path in folder.iterdir()}
    assert {"recipe.json", "checkpoint.pt", "history.json", "log.jsonl"} <= names
    assert not [name for name in names if name.endswith((".part", ".tmp"))]
    assert "\r" not in process.stdout + process.stderr, "a progress bar without a terminal"


def test_recipe_is_the_resolved_one(run: tuple[cli.Process, Path]) -> None:
    recipe = from_dict(json.loads((run[1] / "recipe.json").read_text()))
    expected = load("digits/nonl", cli.settings(run__metrics=True, run__probes=["FP", "LP"], run__log_every=4))
    assert recipe == expected


def test_history(run: tuple[cli.Process, Path]) -> None:
    history = cli.history(run[1], timed=True)
    assert set(history) == HISTORY_KEYS
    assert history["version"] == 2
    assert from_dict(history["recipe"]) == from_dict(json.loads((run[1] / "recipe.json").read_text()))
    assert history["num_classes"] == len(history["class_names"]) == 10
    assert history["dim"] == 8
    assert history["encoded_dim"] >= 8
    assert history["parameters"] > 8 * 10
    assert history["train_samples"] + history["test_samples"] == 1797
    per_epoch = history["train_samples"] // 128
    assert history["steps"] == [0, per_epoch, 2 * per_epoch]
    assert history["epochs"] == [0.0, 1.0, 2.0]
    assert history["loss"][0] is None
    assert all(isinstance(value, float) for value in history["loss"][1:])
    assert history["loss"][2] < history["loss"][1]
    for key in ("train_accuracy", "test_accuracy"):
        assert len(history[key]) == 3
        assert all(0 <= value <= 1 for value in history[key])
        assert history[key][-1] > history[key][0]
    assert set(history["metrics"]) == {field.name for field in dataclasses.fields(NeuralCollapse)}
    for name, values in history["metrics"].items():
        assert len(values) == 3, name
        assert all(value is None or isinstance(value, (int, float)) for value in values), name
    assert any(None not in values for values in history["metrics"].values())
    assert history["seconds"] > 0
    assert [c["name"] for c in history["classifiers"]] == ["FP", "LP"]
    for classifier in history["classifiers"]:
        assert set(classifier) == {"name", "accuracy", "seconds"}
        assert classifier["accuracy"] > 0.3
    for key in ("prototype_cosines", "mean_cosines"):
        cosines = torch.tensor(history[key])
        assert cosines.shape == (10, 10), key
        assert torch.allclose(cosines, cosines.T, atol=1e-5), key
        assert torch.allclose(cosines.diagonal(), torch.ones(10), atol=1e-5), key
        assert (cosines.abs() <= 1 + 1e-5).all(), key
    assert history["finished"] is True
    assert set(history["versions"]) == {"nckernels", "torch", "python", "device"}
    assert history["versions"]["torch"] == torch.__version__
    assert isinstance(history["note"], str)


def test_the_lab_reads_the_history(run: tuple[cli.Process, Path]) -> None:
    read = RunHistory.load(run[1] / "history.json")
    history = cli.history(run[1])
    assert (read.loss, read.dim, read.num_classes) == ("nonl", 8, 10)
    assert list(read.steps) == history["steps"]
    assert set(read.metrics) == set(history["metrics"])
    for name, values in history["metrics"].items():
        expected = [math.nan if value is None else value for value in values]
        assert list(read.metrics[name]) == pytest.approx(expected, nan_ok=True), name


def test_log(run: tuple[cli.Process, Path]) -> None:
    lines = cli.log(run[1], timed=True)
    assert all(set(line) == LOG_KEYS for line in lines)
    steps = [line["step"] for line in lines]
    assert len(steps) in (5, 6)  # 22 steps, every 4th
    assert {b - a for a, b in pairwise(steps)} == {4}
    for line in lines:
        assert line["loss"] > 0
        assert line["grad_norm"] > 0
        assert line["feature_norm"] > 0
        assert line["samples_per_second"] > 0
        assert line["epoch"] == pytest.approx(line["step"] / 11, abs=1 + 1e-3)
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)
    assert seconds[0] >= 0


def test_checkpoint_needs_no_code(run: tuple[cli.Process, Path]) -> None:
    content = torch.load(run[1] / "checkpoint.pt", weights_only=True)
    assert cli.tensors(content)


def test_evaluate_reads_a_run(run: tuple[cli.Process, Path]) -> None:
    process = cli.run("evaluate", str(run[1]), folder=run[1].parent)
    assert process.returncode == 0, process.stderr
    accuracy = cli.history(run[1])["test_accuracy"][-1]
    shown = (f"{accuracy:.4f}"[:5], f"{100 * accuracy:.2f}"[:4], f"{100 * accuracy:.1f}")
    assert any(text in process.stdout for text in shown), f"{accuracy} in\n{process.stdout}"


def test_a_finished_run_resumed_stays_as_it_is(run: tuple[cli.Process, Path]) -> None:
    before = cli.contents(run[1])
    changes = cli.options(run__metrics=True, run__probes=["FP", "LP"], run__log_every=4)
    process = cli.run("train", "digits/nonl", *changes, "--out", "r", "--resume", "auto", folder=run[1].parent)
    assert process.returncode == 0, process.stderr
    after = cli.contents(run[1])
    assert after["checkpoint.pt"] == before["checkpoint.pt"]
    assert after["log.jsonl"] == before["log.jsonl"]
    assert cli.untimed(json.loads(after["history.json"])) == cli.untimed(json.loads(before["history.json"]))


def test_folder_with_a_run(run: tuple[cli.Process, Path]) -> None:
    """Without --resume an existing run is not overwritten."""
    before = cli.contents(run[1])
    process = cli.run("train", "digits/ce", *cli.options(), "--out", "r", folder=run[1].parent)
    cli.refused(process, "r")
    assert "--resume" in process.stderr
    assert cli.contents(run[1]) == before


@pytest.mark.parametrize(
    ("recipe", "changes", "key"),
    [("digits/nonl", {"model__dim": 9}, "model.dim"), ("digits/ntce", {}, "loss.name")],
)
def test_checkpoint_of_another_recipe(
    run: tuple[cli.Process, Path], recipe: str, changes: dict[str, Any], key: str
) -> None:
    before = cli.contents(run[1])
    same = {"run__metrics": True, "run__probes": ["FP", "LP"], "run__log_every": 4}
    arguments = cli.options(**same, **changes)
    process = cli.run("train", recipe, *arguments, "--out", "r", "--resume", "auto", folder=run[1].parent)
    cli.refused(process, key)
    assert cli.contents(run[1]) == before


def test_two_processes_in_one_folder(tmp_path: Path) -> None:
    arguments = ("train", "digits/nonl", *cli.options(schedule__epochs=1000, run__save_every=5), "--out", "r")
    first = cli.start(*arguments, folder=tmp_path)
    try:
        assert first.until((tmp_path / "r/checkpoint.pt").exists), first.stderr
        first.signal(cli.signal.SIGSTOP)
        before = cli.contents(tmp_path / "r")
        for resume in ((), ("--resume", "auto")):
            cli.refused(cli.start(*arguments, *resume, folder=tmp_path).wait(30), "r")
        assert cli.contents(tmp_path / "r") == before
    finally:
        first.kill()


# In one process


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "least"),
    [
        *(("ce", 0.7), ("normface", 0.7), ("ntce", 0.7), ("nonl", 0.7), ("psc-star", 0.7)),
        *(("scl", 0.5), ("prototype", 0.5), ("etf-dr", 0.5), ("dlp", 0.5)),
    ],
)
def test_losses_beat_chance(name: str, least: float, tmp_path: Path) -> None:
    views = {"augment__views": 2, "augment__shift": 0.1} if name in ("scl", "prototype") else {}
    few = {"model__dim": 16, "model__width": 8, "run__batch_size": 32, "run__eval_every": 1000, "schedule__epochs": 4}
    result = fit(tmp_path / "r", loss__name=name, **few, **views)
    assert result.folder == tmp_path / "r"
    history = cli.history(tmp_path / "r")
    for key in ("train_accuracy", "test_accuracy"):
        assert history[key][0] < 0.35, "chance is 0.1"
        assert history[key][-1] > least


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, Path]]:
    """Seeds 1, 1 and 2, each under another state of the global generators."""
    found = []
    for i, seed in enumerate((1, 1, 2)):
        torch.manual_seed(i)
        random.seed(i)
        folder = tmp_path_factory.mktemp(f"seed{i}")
        augment = {"augment__rotate": 10.0, "augment__shift": 0.1}
        found.append((fit(folder, run__seed=seed, **augment), folder))
    return found


def test_same_seed_same_bits(twins: list[tuple[Any, Path]]) -> None:
    (one, a), (other, b), _ = twins
    assert not cli.unequal(state(one), state(other))
    assert cli.history(a) == cli.history(b)
    assert cli.log(a) == cli.log(b)
    load_ = [torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (a, b)]
    assert not cli.unequal(*load_)


def test_another_seed_another_run(twins: list[tuple[Any, Path]]) -> None:
    (one, a), _, (other, b) = twins
    assert cli.unequal(state(one), state(other))
    assert [line["loss"] for line in cli.log(a)] != [line["loss"] for line in cli.log(b)]
    assert cli.history(a)["test_accuracy"][0] != cli.history(b)["test_accuracy"][0], "the same initial weights"


def test_fit_and_the_command_line_agree(twins: list[tuple[Any, Path]], tmp_path: Path) -> None:
    changes = cli.options(run__seed=1, augment__rotate=10.0, augment__shift=0.1)
    process = cli.run("train", "digits/nonl", *changes, "--out", "r", folder=tmp_path)
    assert process.returncode == 0, process.stderr
    assert cli.log(tmp_path / "r") == cli.log(twins[0][1])
    assert cli.history(tmp_path / "r") == cli.history(twins[0][1])


def test_the_global_generators_are_left_alone() -> None:
    import numpy as np

    before = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())  # noqa: NPY002
    deterministic = torch.are_deterministic_algorithms_enabled()
    fit(None, schedule__epochs=1, augment__shift=0.1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert repr(np.random.get_state()) == before[2]  # noqa: NPY002
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert torch.get_default_dtype() == torch.float32
