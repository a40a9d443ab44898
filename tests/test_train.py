"""The trainer, its command line and the demo, in runs of a few iterations."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from nckernels.train.trainer import cosine_lr, extract

from nckernels.metrics import NeuralCollapse, optimum
from nckernels.train import History, TrainConfig, cli, data, demo, fit
from nckernels.train.models import LOSSES, ConvNet, make_head

TINY = TrainConfig(epochs=1, batch_size=512, eval_every=1, dim=16, device="cpu")
METRICS = {field.name for field in dataclasses.fields(NeuralCollapse)}


def tiny(**changes: object) -> TrainConfig:
    return dataclasses.replace(TINY, **changes)


def test_contrastive_run_ends_with_three_classifiers(tmp_path: Path) -> None:
    run = fit(tiny(loss="scl", epochs=4, batch_size=256), progress=False)
    history = run.history
    assert [r.name for r in history.classifiers] == ["FP", "LP", "NLP"]
    assert all(r.accuracy > 0.6 and r.seconds > 0 for r in history.classifiers)
    assert history.classifiers[0].accuracy == pytest.approx(history.test_accuracy[-1])
    assert history.metrics["weight_alignment"][-1] == pytest.approx(0, abs=1e-9)
    assert history.loss[-1] < history.loss[1]
    history.save(tmp_path / "history.json")
    assert History.load(tmp_path / "history.json").classifiers == history.classifiers
    one = fit(tiny(loss="scl", views=1), progress=False).history
    assert one.loss[-1] != fit(tiny(loss="scl", views=2), progress=False).history.loss[-1]


# Trainer


@pytest.mark.parametrize("loss", LOSSES)
def test_history_of_a_run(loss: str) -> None:
    run = fit(tiny(loss=loss), progress=False)
    history = run.history
    assert history.steps == [0, 1, 2]
    assert math.isnan(history.loss[0])
    assert all(math.isfinite(value) for value in history.loss[1:])
    assert set(history.metrics) == METRICS
    series = [history.loss, history.train_accuracy, history.test_accuracy, *history.metrics.values()]
    assert {len(values) for values in series} == {3}
    assert history.seconds > 0
    assert history.num_classes == 10


@pytest.mark.parametrize("changes", [{"loss": "etf-dr"}, {"loss": "dlp", "dim": 4}, {"loss": "psc-star"}])
def test_fixed_and_uniform_prototypes_learn(changes: dict[str, object]) -> None:
    """The loss falls, and the test images are told apart: one of ten by chance."""
    history = fit(tiny(epochs=12, batch_size=128, lr=0.4, eval_every=1000, **changes), progress=False).history
    assert history.test_accuracy[-1] > 0.7


def test_labels_are_assigned_anew_after_every_epoch() -> None:
    """The points stay; which class has which changes in a dynamic head only, after whole epochs."""
    dlp = {"loss": "dlp", "dim": 4, "epochs": 3, "batch_size": 400, "lr": 0.4}
    static, dynamic = (fit(tiny(**dlp, assignment=a), progress=False) for a in ("static", "dynamic"))
    assert static.head.assignment.tolist() == list(range(10))
    assert static.history.loss[1:4] == dynamic.history.loss[1:4]  # one epoch of 3 iterations
    assert static.history.loss[4] != dynamic.history.loss[4]
    assert sorted(dynamic.head.assignment.tolist()) == list(range(10))
    assert dynamic.head.calls == 9
    assert dynamic.head.refresh_every == 3


@pytest.mark.parametrize("loss", ["ce", "psc-star", "nonl", "dlp"])
def test_classifiers_with_a_bias_are_measured_with_it(loss: str) -> None:
    spread = fit(tiny(loss=loss), progress=False).history.metrics["bias_spread"]
    assert all(value > 0 if loss in ("ce", "psc-star") else math.isnan(value) for value in spread)


def test_relu_features_are_never_negative() -> None:
    run = fit(tiny(features="relu"), progress=False)
    line = next(line for line in cli.summary(run).splitlines() if line.split()[0] == "offset")
    assert float(line.split()[2]) == pytest.approx(1 / math.sqrt(10), rel=1e-3)
    features = extract(run.model, run.data.test_images)
    assert features.min() >= 0
    assert features.shape == (360, 16)


def test_nonl_collapses_where_cross_entropy_does_not() -> None:
    config = TrainConfig(epochs=8, batch_size=256, eval_every=1000, device="cpu", lr=0.1)
    ce, nonl = (fit(dataclasses.replace(config, loss=loss), progress=False).history for loss in ("ce", "nonl"))
    assert nonl.train_accuracy[-1] > 0.9
    assert nonl.metrics["nc1"][-1] < 0.5 * ce.metrics["nc1"][-1]
    assert nonl.metrics["nc2_cosines"][-1] < 0.5 * ce.metrics["nc2_cosines"][-1]
    assert nonl.metrics["inter_erank"][-1] > ce.metrics["inter_erank"][-1]


def untimed(history: History) -> str:
    return json.dumps(dataclasses.asdict(dataclasses.replace(history, seconds=0, classifiers=[])))


def test_seed_fixes_the_run() -> None:
    first, again, other = (fit(tiny(seed=seed), progress=False).history for seed in (1, 1, 2))
    assert untimed(first) == untimed(again)
    assert first.metrics != other.metrics


def test_losses_start_alike_and_leave_the_global_seed_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    ce, nonl = (fit(tiny(loss=loss), progress=False).history for loss in ("ce", "nonl"))
    assert torch.equal(torch.rand(1), expected)
    assert ce.metrics["inter_erank"][0] == nonl.metrics["inter_erank"][0]


@pytest.mark.parametrize(("loss", "more"), [("nonl", {"queue": 100}), ("ntce", {"decay": 0.5})])
def test_losses_that_see_past_batches(loss: str, more: dict[str, float]) -> None:
    """From the second step on they are others."""
    plain, longer = (fit(tiny(loss=loss, batch_size=400, **o), progress=False).history for o in ({}, more))
    assert plain.loss[1] == pytest.approx(longer.loss[1], rel=1e-5)
    assert abs(plain.loss[2] - longer.loss[2]) > 1e-3


def test_amp_and_backend() -> None:
    for loss in ("nonl", "dlp"):
        assert math.isfinite(fit(tiny(loss=loss, amp=True), progress=False).history.loss[-1])
    reference = fit(tiny(backend="reference"), progress=False).history
    assert reference.loss[-1] == pytest.approx(fit(tiny(), progress=False).history.loss[-1], rel=1e-3)


def test_cosine_schedule() -> None:
    assert cosine_lr(0.2, 0, 100) == pytest.approx(0.2)
    assert cosine_lr(0.2, 100, 100) == pytest.approx(0.2 * 0.1**3)
    assert cosine_lr(0.2, 50, 100) == pytest.approx(0.2 * (1 + 0.1**3) / 2)


def test_a_run_that_diverges_says_so() -> None:
    with pytest.raises(FloatingPointError, match=r"training diverged before iteration \d+"):
        fit(tiny(loss="ce", lr=1e30, epochs=3), progress=False)


def test_history_round_trip(tmp_path: Path) -> None:
    history = fit(tiny(), progress=False).history
    history.save(tmp_path / "history.json")
    loaded = History.load(tmp_path / "history.json")
    assert loaded.config == history.config
    assert math.isnan(loaded.loss[0])
    assert untimed(loaded) == untimed(history)
    assert loaded.num_classes == 10
    values = json.loads((tmp_path / "history.json").read_text())
    del values["num_classes"], values["config"]["assignment"], values["config"]["width"]
    (tmp_path / "old.json").write_text(json.dumps(values))
    old = History.load(tmp_path / "old.json")
    assert (old.num_classes, old.config) == (0, history.config)
    assert "NaN" not in (tmp_path / "history.json").read_text()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dataset", "mnist"),
        ("loss", "hinge"),
        ("assignment", "random"),
        ("assignment", "static"),
        ("width", 0),
        ("features", "tanh"),
        ("epochs", 0),
        ("batch_size", 0),
        ("dim", -1),
        ("eval_every", 0),
        ("threads", 0),
        ("views", 0),
        ("temperature", 0.0),
        ("temperature", math.nan),
        ("lr", -0.1),
        ("lr", math.inf),
        ("weight_decay", -1e-4),
        ("queue", -1),
        ("decay", -0.5),
        ("decay", 1.0),
    ],
)
def test_bad_settings_are_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: expected .* got '?{value}'?$"):
        tiny(**{name: value})


def test_bad_settings_found_later_are_named() -> None:
    with pytest.raises(ValueError, match="batch_size: expected 1 to 1437"):
        fit(tiny(batch_size=1438), progress=False)
    with pytest.raises(ValueError, match="device: 'quantum' cannot be used here"):
        fit(tiny(device="quantum"), progress=False)
    with pytest.raises(ValueError, match="no-such-backend"):
        fit(tiny(backend="no-such-backend"), progress=False)
    with pytest.raises(ValueError, match=r"queue: criterion must be .* got CrossEntropyHead"):
        fit(tiny(loss="ce", queue=8), progress=False)
    with pytest.raises(ValueError, match=r"decay: criterion must be .* got SupConLoss"):
        fit(tiny(loss="scl", decay=0.5), progress=False)
    with pytest.raises(ValueError, match=r"dim: 10 vectors .* need at least 9 dimensions, got 8"):
        fit(tiny(loss="etf-dr", dim=8), progress=False)
    with pytest.raises(ValueError, match=r"queue: criterion must be .* got FixedPrototypeHead"):
        fit(tiny(loss="dlp", queue=8), progress=False)
    with pytest.raises(ValueError, match="queue, decay: expected one of them"):
        fit(tiny(queue=8, decay=0.5), progress=False)


# Command line


def test_train_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--loss ntce --epochs 1 --batch-size 512 --dim 16 --device cpu --temperature 0.2 --quiet"
    out = tmp_path / "new" / "run"
    assert cli.main([*arguments.split(), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("ntce on digits: 2 iterations")
    assert all(name in printed for name in METRICS)
    history = History.load(out / "history.json")
    assert history.config == TrainConfig(loss="ntce", epochs=1, batch_size=512, dim=16, device="cpu", temperature=0.2)
    checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)
    assert TrainConfig(**checkpoint["config"]) == history.config
    model, head = ConvNet(1, 16), make_head("ntce", 16, 10, 0.2)
    model.load_state_dict(checkpoint["model"])
    head.load_state_dict(checkpoint["head"])
    digits = data.load("digits")
    predicted = head(extract(model, digits.test_images)).argmax(1)
    assert (predicted == digits.test_labels).float().mean().item() == history.test_accuracy[-1]


def test_help_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for field in dataclasses.fields(TrainConfig):
        assert f"--{field.name.replace('_', '-')}" in printed
    assert cli.make_parser().parse_args([]).lr == TrainConfig().lr


@pytest.mark.parametrize("command", [cli.main, demo.main])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--epochs 0", "epochs: expected at least 1, got 0"),
        ("--batch-size 5000 --quiet", "batch_size: expected 1 to 1437"),
        ("--lr much", "argument --lr: invalid float value: 'much'"),
        ("--features tanh", "argument --features: invalid choice: 'tanh'"),
        ("--device quantum --quiet", "device: 'quantum' cannot be used here"),
    ],
)
def test_bad_arguments(command: object, arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert callable(command)
    with pytest.raises(SystemExit) as stop:
        command(arguments.split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_divergence_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--loss", "ce", "--lr", "1e30", "--epochs", "2", "--device", "cpu", "--quiet"])
    assert stop.value.code == 1
    assert "training diverged" in capsys.readouterr().err


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = f"--epochs 1 --batch-size 512 --device cpu --quiet --out {tmp_path}"
    assert demo.main(arguments.split()) == 0
    printed = capsys.readouterr().out
    assert f"written: {tmp_path / 'demo.png'}" in printed
    lines = printed.splitlines()
    labels = [line[:15].strip() for line in lines[1:]]
    like = "like CE after"
    assert labels[:3] == ["loss", "optimum", "-" * 15]
    assert labels[3:12] == ["CE", "NormFace", like, "NTCE", like, "NONL", like, "SCL, FP", like]
    assert {len(line) for line in lines[:12] if line.endswith("|")} == {len(lines[0])}
    for name in ("fixed prototypes (FP)", "linear probe (LP)", "normalised probe (NLP)"):
        assert any(line.startswith(name) for line in lines)
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    for loss in ("ce", "normface", "ntce", "nonl", "scl"):
        assert History.load(tmp_path / f"{loss}.json").config.loss == loss
    assert len(list(tmp_path.glob("*.json"))) == 5


def test_demo_table() -> None:
    best = dataclasses.asdict(optimum(10))

    def history(loss: str, inter: list[float], seconds: float) -> History:
        metrics = {name: [value] * 3 for name, value in best.items()} | {"inter_erank": inter}
        return History(tiny(loss=loss), [0, 10, 20], [1.0] * 3, [1.0] * 3, [0.5, 0.9, 0.98], metrics, seconds)

    table = demo.table(
        [history("ce", [3, 4, 5], 1.5), history("nonl", [3, 9, 9], 2), history("ntce", [3, 3, 3], 2)], 10
    )
    ce, nonl, nonl_share, _, ntce_share = table.splitlines()[4:]
    assert ce.split()[:2] == ["CE", "98.0"]
    assert ce.split()[-1] == "1.5"
    assert nonl.split()[4] == "9.00"
    assert nonl_share.split()[5] == "50%"  # smoothed: 3, 6, 7.5
    assert ntce_share.split()[5] == "never"
