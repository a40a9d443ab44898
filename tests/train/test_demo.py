"""The demo in a run of a few iterations, and its table."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("torchmetrics")

from nckernels.metrics import RunHistory, optimum
from nckernels.train import demo
from nckernels.train.history import History
from nckernels.train.recipe import Recipe

TINY = ("schedule.epochs=1", "run.batch_size=512", "model.dim=16", "model.width=4", "run.device=cpu")


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [word for setting in TINY for word in ("--set", setting)]
    assert demo.main([*settings, "--quiet", "--out", str(tmp_path)]) == 0
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
        path = tmp_path / f"{loss}.json"
        history = History.load(path)
        assert (history.recipe.loss.name, history.recipe.model.dim, history.steps) == (loss, 16, [0, 2])
        assert RunHistory.load(path).loss == loss
    assert len(list(tmp_path.glob("*.json"))) == 5


def test_table() -> None:
    best = dataclasses.asdict(optimum(10))

    def history(inter: list[float], seconds: float) -> History:
        metrics = {name: [value] * 3 for name, value in best.items()} | {"inter_erank": inter}
        series = {"steps": [0, 10, 20], "test_accuracy": [0.5, 0.9, 0.98], "metrics": metrics, "seconds": seconds}
        return History(Recipe(), num_classes=10, **series)

    table = demo.table({"ce": history([3, 4, 5], 1.5), "nonl": history([3, 9, 9], 2), "ntce": history([3, 3, 3], 2)})
    ce, nonl, nonl_share, _, ntce_share = table.splitlines()[4:]
    assert ce.split()[:2] == ["CE", "98.0"]
    assert ce.split()[-1] == "1.5"
    assert nonl.split()[4] == "9.00"
    assert nonl_share.split()[5] == "50%"  # smoothed: 3, 6, 7.5
    assert ntce_share.split()[5] == "never"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "schedule.epoch=1"], "unknown key schedule.epoch (did you mean 'schedule.epochs'?)"),
        (["--set", "run.batch_size=5000"], "run.batch_size: expected"),
        (["--set", "run.device=quantum"], "run.device: 'quantum' cannot be used here"),
        (["--epochs", "1"], "unrecognized arguments: --epochs 1"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        demo.main([*arguments, "--quiet", "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_divergence_ends_with_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        demo.main(["--set", "optimizer.lr=1e30", "--set", "run.device=cpu", "--quiet", "--out", str(tmp_path)])
    assert stop.value.code == 1
    assert "training diverged" in capsys.readouterr().err
