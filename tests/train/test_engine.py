"""The training loop: the records of a run, reproducibility, and errors."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

import nckernels
from nckernels.metrics import NeuralCollapse
from nckernels.train import History, checkpoint, engine, fit
from nckernels.train.recipe import LOSSES, Recipe
from nckernels.train.step import build

from .runs import outcome, recipe

METRICS = {field.name for field in dataclasses.fields(NeuralCollapse)}
NEEDS: dict[str, dict[str, Any]] = {
    "scl": {"augment.views": 2, "augment.rotate": 10.0, "optimizer.lr": 0.02},
    "prototype": {"augment.views": 2, "augment.rotate": 10.0},
}


def trained(**changes: Any) -> History:
    return fit(recipe(**changes), progress=False).history


def untimed(history: History) -> dict[str, Any]:
    return {**history.to_dict(), "seconds": 0, "recipe": None}


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss != "bce"])
def test_history_of_a_run(loss: str) -> None:
    history = trained(loss__name=loss, **NEEDS.get(loss, {}))
    assert history.steps == [0, 9, 18]
    assert history.epochs == [0, 1, 2]
    assert math.isnan(history.loss[0])
    assert history.loss[2] < history.loss[1]
    assert set(history.metrics) == METRICS
    series = [history.loss, history.train_accuracy, history.test_accuracy, *history.metrics.values()]
    assert {len(values) for values in series} == {3}
    assert history.seconds > 0
    assert (history.num_classes, history.class_names, history.dim) == (4, ["0", "1", "2", "3"], 8)
    assert (history.train_samples, history.test_samples) == (576, 144)
    assert history.prototype_cosines is not None
    assert len(history.prototype_cosines) == 4
    assert history.finished


def test_files_in_the_folder_of_a_run(tmp_path: Path) -> None:
    run = fit(recipe(), tmp_path / "new" / "run", progress=False)
    folder = tmp_path / "new" / "run"
    assert sorted(path.name for path in folder.iterdir() if path.name != "tensorboard") == [
        "checkpoint.pt", "history.json", "lock", "log.jsonl", "recipe.json",
    ]  # fmt: skip
    assert Recipe() != recipe()
    stored = json.loads((folder / "recipe.json").read_text())
    assert stored == json.loads((folder / "history.json").read_text())["recipe"]
    assert untimed(History.load(folder)) == untimed(run.history)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6, 9, 12, 15, 18]
    assert set(lines[0]) == {
        "step", "epoch", "loss", "lr", "grad_norm", "feature_norm", "samples_per_second", "seconds",
    }  # fmt: skip
    assert sum(line["loss"] for line in lines[:3]) / 3 == pytest.approx(run.history.loss[1])
    assert lines[0]["lr"] == pytest.approx(1e-4 + (0.1 - 1e-4) * (1 + math.cos(math.pi * 2 / 18)) / 2)
    assert lines[0]["epoch"] == pytest.approx(1 / 3)
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    network, head = build(recipe(), run.data, engine.World(torch.device("cpu")))
    network.load_state_dict(saved["network"])
    head.load_state_dict(saved["head"])
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), run.network.parameters(), strict=True))


def test_damaged_histories_are_named(tmp_path: Path) -> None:
    path = tmp_path / "history.json"
    for text in ("", "[]", '{"version": 1}', '{"version": 2}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"history\.json: "):
            History.load(tmp_path)


# What determines a run


def test_losses_share_initialisation_and_keep_the_global_state() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    ce, nonl = (trained(loss__name=loss) for loss in ("ce", "nonl"))
    assert torch.equal(torch.rand(1), expected)
    assert ce.metrics["inter_erank"][0] == nonl.metrics["inter_erank"][0]


def test_the_recipe_sets_the_threads_while_it_runs() -> None:
    before, seen = torch.get_num_threads(), []

    def loss_of(head: Any) -> Any:
        seen.append(torch.get_num_threads())
        return head.loss

    torch.set_num_threads(3)
    try:
        for threads in (1, 0):
            fit(recipe(schedule__epochs=1, run__threads=threads), progress=False, loss_of=loss_of)
        assert seen == [1, 3]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_logging_and_saving_do_not_change_the_result() -> None:
    assert untimed(trained(run__log_every=1)) == untimed(trained(run__log_every=100))


def test_eval_every_sets_the_evaluations() -> None:
    assert trained(run__eval_every=7, run__metrics=False).steps == [0, 7, 14, 18]
    assert trained(run__eval_every=1000, run__metrics=False).metrics == {}


def test_a_step_is_plain_sgd() -> None:
    """Two steps by hand: weight decay, momentum, Nesterov, clipping, the schedule."""
    settings = {
        "loss.name": "ce", "optimizer.weight_decay": 0.01, "optimizer.nesterov": True, "optimizer.clip": 0.5,
        "run.batch_size": 288, "schedule.epochs": 1, "run.metrics": False,
    }  # fmt: skip
    wanted = recipe(**settings)
    run = fit(wanted, progress=False)
    network, head = build(wanted, run.data, engine.World(torch.device("cpu")))
    weights = [*network.parameters(), *head.parameters()]
    velocity = [torch.zeros_like(w) for w in weights]
    batches = engine.Batches(run.data, wanted, "cpu")
    for step, (images, labels) in enumerate(batches.epoch(0)):
        lr = 1e-4 + (0.1 - 1e-4) * (1 + math.cos(math.pi * step / 2)) / 2
        gradients = torch.autograd.grad(F.cross_entropy(head(network(images)), labels), weights)
        norm = torch.stack([g.norm() for g in gradients]).norm()
        with torch.no_grad():
            for w, v, g in zip(weights, velocity, gradients, strict=True):
                g = g * min(1.0, 0.5 / norm.item()) + 0.01 * w
                v.mul_(0.9).add_(g)
                w -= lr * (g + 0.9 * v)
    for mine, theirs in zip(weights, [*run.network.parameters(), *run.head.parameters()], strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("loss", "more"), [("nonl", {"loss.queue": 50}), ("ntce", {"loss.decay": 0.9}), ("scl", {})])
def test_micro_batches_give_the_gradient_of_the_batch(loss: str, more: dict[str, Any]) -> None:
    settings = {"loss.name": loss, "model.norm": "group", "optimizer.lr": 0.02, **NEEDS.get(loss, {}), **more}
    whole, parts = trained(**settings), trained(run__micro_batch_size=24, **settings)
    assert parts.loss[1:] == pytest.approx(whole.loss[1:], rel=1e-3)
    assert parts.metrics["nc1"] == pytest.approx(whole.metrics["nc1"], rel=1e-3)


def test_precision_layout_and_backend() -> None:
    plain = trained(optimizer__lr=0.005)
    for changes in ({"run.precision": "bfloat16"}, {"run.channels_last": True}, {"run.backend": "reference"}):
        other = trained(optimizer__lr=0.005, **changes)
        assert other.loss[1] == pytest.approx(plain.loss[1], rel=0.05)
        assert other.loss[1:] != plain.loss[1:]


@pytest.mark.slow
def test_compiled_network_trains_alike() -> None:
    assert trained(run__compile=True).loss[1:] == pytest.approx(trained().loss[1:], rel=1e-3)


def test_another_loss_for_the_head(tmp_path: Path) -> None:
    """A function, or a module, whose state is kept."""

    class Counting(nn.Module):
        calls: Tensor

        def __init__(self, head: Any) -> None:
            super().__init__()
            self.loss = head.loss
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, features: Tensor, labels: Tensor) -> Tensor:
            self.calls += 1
            return 2 * self.loss(features, labels)

    wanted = recipe(schedule__epochs=1)
    fit(wanted, tmp_path, progress=False, loss_of=Counting)
    assert checkpoint.load(tmp_path / "checkpoint.pt")["criterion"]["calls"] == 9
    zero = fit(wanted, progress=False, loss_of=lambda head: lambda z, y: 0 * head.loss(z, y)).history
    assert zero.loss[1] == 0


# From other runs


def test_start_from_another_run(tmp_path: Path) -> None:
    fit(recipe(), tmp_path / "first", progress=False)
    first = checkpoint.load(tmp_path / "first" / "checkpoint.pt")["network"]
    data = fit(recipe(schedule__epochs=1), progress=False).data
    place = engine.World(torch.device("cpu"))
    for source in (tmp_path / "first", tmp_path / "first" / "checkpoint.pt"):
        network, _ = build(recipe(model__init=str(source)), data, place)
        assert all(torch.equal(value, first[key]) for key, value in network.state_dict().items())
    other, _ = build(recipe(model__init=str(tmp_path / "first"), model__projection="mlp", model__dim=5), data, place)
    fresh, _ = build(recipe(model__projection="mlp", model__dim=5), data, place)
    for key, value in other.state_dict().items():
        assert torch.equal(value, first[key] if key.startswith("encoder.") else fresh.state_dict()[key])
    with pytest.raises(ValueError, match=r"model\.init: the encoder of .* differs: encoder\.0\.0\.weight \(4, 1,"):
        build(recipe(model__init=str(tmp_path / "first"), model__width=5), data, place)
    with pytest.raises(ValueError, match=r"model\.init: there is no checkpoint .*nowhere"):
        build(recipe(model__init=str(tmp_path / "nowhere")), data, place)


def test_a_frozen_encoder(tmp_path: Path) -> None:
    """Linear probing: the classifier trains on the encoder's output; the encoder and its statistics do not change."""
    fit(recipe(), tmp_path / "first", progress=False)
    first = checkpoint.load(tmp_path / "first" / "checkpoint.pt")["network"]
    probing = {"model.init": str(tmp_path / "first"), "model.freeze": True, "loss.name": "ce"}
    run = fit(recipe(**probing), tmp_path / "probe", progress=False)
    assert run.history.dim == run.history.encoded_dim == 16
    assert run.head.prototypes.shape == (4, 16)
    stored = checkpoint.load(tmp_path / "probe" / "checkpoint.pt")["network"]
    assert stored.keys() == {key for key in first if key.startswith("encoder.")}
    assert all(torch.equal(value, first[key]) for key, value in stored.items())
    assert run.history.train_accuracy[-1] > run.history.train_accuracy[0]
    resumed = fit(recipe(**probing), tmp_path / "probe", resume=True, progress=False)
    assert untimed(resumed.history) == untimed(run.history)
    with pytest.raises(ValueError, match=r"model\.freeze: loss\.name = 'dlp' has no parameters to train"):
        fit(recipe(**{**probing, "loss.name": "dlp"}), progress=False)
    pieces = trained(**probing, run__micro_batch_size=20)
    assert pieces.loss[1:] == pytest.approx(run.history.loss[1:], rel=1e-4)


# Trouble


def test_a_run_that_diverges_names_step_and_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run diverges in step 13; losses are checked after steps 12 and 15."""
    original = engine.Optimisation.step

    def step(self: Any, done: int, images: Tensor, labels: Tensor) -> Tensor:
        return original(self, done, images * (math.inf if done == 12 else 1), labels)

    monkeypatch.setattr(engine.Optimisation, "step", step)
    with pytest.raises(FloatingPointError) as raised:
        fit(recipe(run__save_every=5), tmp_path, progress=False)
    text = str(raised.value)
    assert text.startswith("training diverged in step 13 (epoch 2): the loss is nan, the norm of the gradient nan")
    images, labels = next(engine.Batches(fit(recipe(schedule__epochs=1)).data, recipe(), "cpu").epoch(1, 3))
    assert f"images: min {images.min():.4g}, max {images.max():.4g}, mean {images.double().mean():.4g}, std " in text
    counts = ", ".join(f"{(labels == c).sum()} of {c}" for c in range(4))
    assert f"; labels: {counts}; the last good checkpoint is {tmp_path / 'checkpoint.pt'}, of step 10; " in text
    assert checkpoint.load(tmp_path / "checkpoint.pt")["step"] == 10


@pytest.mark.parametrize("changes", [{"run.log_every": 1}, {"run.log_every": 1000}, {"run.save_every": 1}])
def test_no_checkpoint_of_a_broken_network(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError):
        fit(recipe(loss__name="ce", optimizer__lr=1e30, **changes), tmp_path, progress=False)
    if (tmp_path / "checkpoint.pt").exists():
        saved = checkpoint.load(tmp_path / "checkpoint.pt")
        assert all(torch.isfinite(value).all() for value in saved["network"].values())


def test_settings_that_do_not_fit_the_data_are_named() -> None:
    for message, changes in (
        ("run.batch_size: expected at most 576", {"run.batch_size": 577}),
        ("run.device: 'quantum' cannot be used here", {"run.device": "quantum"}),
        ("run.precision: float16 needs an accelerator", {"run.precision": "float16"}),
        ("loss.name: a sample of digits has one label; expected any other than 'bce'", {"loss.name": "bce"}),
        ("no-such-backend", {"run.backend": "no-such-backend"}),
        ("optimizer.nesterov: expected sgd with a momentum", {"optimizer.nesterov": True, "optimizer.momentum": 0.0}),
        ("optimizer.nesterov: expected sgd with a momentum", {"optimizer.nesterov": True, "optimizer.name": "adamw"}),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            trained(**changes)


@pytest.mark.parametrize("error", [engine.DataError("photo.jpg: truncated"), OSError("photo.jpg: truncated")])
def test_data_that_cannot_be_read(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    original = engine.Batches.epoch

    def epoch(self: Any, *arguments: int) -> Any:
        for i, batch in enumerate(original(self, *arguments)):
            if i == 4:
                raise error
            yield batch

    monkeypatch.setattr(engine.Batches, "epoch", epoch)
    with pytest.raises(engine.TrainingError, match=r"after step 4: photo\.jpg: truncated; there is no checkpoint"):
        trained()


def test_without_a_terminal_each_evaluation_prints_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    fit(recipe(), progress=None)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["step 0/18", "step 9/18", "step 18/18"]
    fit(recipe(), progress=False)
    assert capsys.readouterr().err == ""
    fit(recipe(), progress=True)
    assert "18/18" in capsys.readouterr().err


def test_tensorboard_events_if_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[Any, ...]] = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            written.append((folder, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, step))

        def flush(self) -> None:
            written.append(("flush",))

        def close(self) -> None:
            written.append(("close",))

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    fit(recipe(schedule__epochs=1), tmp_path, progress=False)
    assert written[0] == (str(tmp_path / "tensorboard"), 1)
    assert ("evaluation/test_accuracy", 0) in written
    assert {step for name, *rest in written for step in rest if name == "train/loss"} == {3, 6, 9}
    assert written[-1] == ("close",)


def test_outcome_tells_different_runs_apart(tmp_path: Path) -> None:
    """The tests of resuming use ``outcome`` for their comparison."""
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        fit(recipe(run__seed=seed), tmp_path / name, progress=False)
    a, b, c = (outcome(tmp_path / name) for name in ("a", "b", "c"))
    assert a == b
    assert all(a[part] != c[part] for part in ("history", "log", "weights", "momenta"))


def test_import_of_the_package_imports_no_trainer() -> None:
    assert not hasattr(nckernels, "fit")
