"""Short trainings with the losses: accuracy and neural collapse."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("torchmetrics")

from nckernels.train.cli import summary
from nckernels.train.engine import Run, fit
from nckernels.train.evaluate import features
from nckernels.train.history import History
from nckernels.train.recipes import load

SHORT = ("model.width=8", "run.eval_every=100000", "run.device=cpu")


def trained(row: str, *settings: str) -> Run:
    return fit(load(f"digits/{row}", [*SHORT, *settings]), progress=False)


def test_nonl_collapses_where_cross_entropy_does_not() -> None:
    settings = ("schedule.epochs=8", "optimizer.lr=0.1")
    ce, nonl = (trained(row, *settings).history for row in ("ce", "nonl"))
    assert nonl.train_accuracy[-1] > 0.9
    assert nonl.metrics["nc1"][-1] < 0.5 * ce.metrics["nc1"][-1]
    assert nonl.metrics["nc2_cosines"][-1] < 0.5 * ce.metrics["nc2_cosines"][-1]
    assert nonl.metrics["inter_erank"][-1] > ce.metrics["inter_erank"][-1]


@pytest.mark.parametrize("settings", [("loss.name=etf-dr",), ("loss.name=dlp", "model.dim=4"), ("loss.name=psc-star",)])
def test_fixed_and_uniform_prototypes_learn(settings: tuple[str, ...]) -> None:
    """The test images are told apart: one of ten by chance."""
    small = ("model.dim=16", "schedule.epochs=12", "run.batch_size=128", "optimizer.lr=0.4", "run.metrics=false")
    assert trained("ce", *small, *settings).history.test_accuracy[-1] > 0.7


def test_contrastive_run_ends_with_three_classifiers(tmp_path: Path) -> None:
    history = trained("scl", "schedule.epochs=4", "model.dim=16", "run.eval_every=0").history
    assert [r.name for r in history.classifiers] == ["FP", "LP", "NLP"]
    assert all(r.accuracy > 0.6 and r.seconds > 0 for r in history.classifiers)
    assert history.classifiers[0].accuracy == pytest.approx(history.test_accuracy[-1])
    assert history.metrics["weight_alignment"][-1] == pytest.approx(0, abs=1e-9)
    assert history.loss[-1] < history.loss[1]
    history.save(tmp_path / "history.json")
    assert History.load(tmp_path / "history.json").classifiers == history.classifiers


def test_features_without_a_projection_are_never_negative() -> None:
    """Their optimum is an orthogonal frame, whose centre is 1/sqrt(K) from the origin."""
    run = trained("nonl", "model.projection=none", "model.dim=16", "schedule.epochs=1")
    line = next(line for line in summary(run.history).splitlines() if line.split()[0] == "offset")
    assert float(line.split()[2]) == pytest.approx(1 / math.sqrt(10), rel=1e-3)
    z, _ = features(run.network, run.data, run.data.test, run.history.recipe, run.head.prototypes.device)
    assert z.min() >= 0
    assert z.shape == (360, 16)


def test_labels_are_reassigned_after_every_epoch() -> None:
    """The points do not change; their assignment changes in a dynamic head only, after whole epochs."""
    dlp = ("loss.name=dlp", "model.dim=4", "schedule.epochs=3", "run.batch_size=400", "optimizer.lr=0.4")
    static, dynamic = (
        trained("ce", *dlp, f"loss.assignment={a}", "run.eval_every=1", "run.metrics=false")
        for a in ("static", "dynamic")
    )
    assert static.head.assignment.tolist() == list(range(10))
    assert static.history.loss[1:4] == dynamic.history.loss[1:4]  # one epoch of 3 steps
    assert static.history.loss[4] != dynamic.history.loss[4]
    assert sorted(dynamic.head.assignment.tolist()) == list(range(10))
