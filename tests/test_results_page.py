"""The page about the experiments: verdicts in both directions, missing stages, and the committed page."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from benchmarks.experiments import page, pictures
from benchmarks.experiments.claims import claims, sized
from benchmarks.experiments.collect import Results, Run
from benchmarks.experiments.measured import NAMES, NORMALISED, relative_error
from benchmarks.experiments.paired import Difference, difference, order
from benchmarks.experiments.stages import STAGES
from benchmarks.experiments.verdicts import FAILED, HELD, MIXED, NOT_RUN, PARTLY, REVERSED, UNDECIDED, Claim, Part
from nckernels.metrics import optimum

ROOT = Path(__file__).resolve().parents[1]
STEPS = [75 * epoch for epoch in range(13)]
START = {"inter_erank": 60.0, "weights_erank": 60.0, "intra_erank": 80.0, "mir": 0.5, "nc4": 0.0}
"""Of the metrics before training; of the others 1."""
SEEDED = {0: -0.4, 1: 0.1, 2: 0.3}
"""What all rows have in common with a seed, in points."""
OWN = {row: i % 3 for i, row in enumerate(NAMES)}


def made_up(gain: float, *, noise: float = 0.2) -> Results:
    """All stages, with NormFace, NTCE and NONL better than CE by ``gain`` to three times that, in points or speed.

    With more ``noise`` than gain the seeds disagree.
    """
    results = Results(date="2026-01-02", commits=["abc1234"], versions={"torch": "2.13.0"})
    for stage, plan in STAGES.items():
        for planned in plan.sweep().runs():
            results.runs.append(run(stage, planned.row, planned.seed, dict(planned.point), gain, noise))
    return results


def run(stage: str, row: str, seed: int, point: dict[str, object], gain: float, noise: float) -> Run:
    rank = NORMALISED.index(row) + 1 if row in NORMALISED else 0
    better = gain * rank + SEEDED[seed] + noise * ((seed + OWN[row]) % 3 - 1)
    if stage == "ranks" and point["loss.global_batch"]:
        better += gain
    lr = float(point.get("optimizer.lr", 0.1))  # type: ignore[arg-type]
    if stage == "tune":
        better -= abs(math.log(lr / 0.5))
    if stage == "tune" and row == "ce" and lr > 1:
        return Run(stage, row, seed, point, lr, finished=False)
    accuracy = 0.6 + better / 100
    plain = Run(stage, row, seed, point, lr, seconds=60.0, test_accuracy=accuracy, train_accuracy=0.99)
    if stage == "half":
        return replace(plain, transfer=accuracy - 0.1)
    if stage != "main":
        return plain
    best, fraction = asdict(optimum(100)), 0.8 * math.exp(-better / 10 - 0.05 * (row == "scl" and gain > 0))
    metrics = {
        name: [aim + (START.get(name, 1.0) - aim) * (1 - (1 - fraction) * (step / 900) ** 0.5) for step in STEPS]
        for name, aim in best.items()
    }
    return replace(
        plain,
        steps=STEPS,
        test_accuracies=[accuracy * (step / 900) ** 0.5 for step in STEPS],
        metrics=metrics,
        classifiers={"FP": accuracy, "LP": accuracy - gain / 100, "NLP": accuracy} if row == "scl" else {},
        corruptions={kind: [1 - 0.1 * (5 - s) * accuracy for s in range(5)] for kind in ("blur", "shift", "rotate")},
    )


def verdicts(results: Results) -> dict[str, str]:
    """By source; two of a source are numbered."""
    found: dict[str, str] = {}
    for claim in claims(results):
        found[claim.source + "'" * (claim.source in found)] = claim.verdict
    return found


def test_what_is_better_for_all_seeds_holds() -> None:
    found = verdicts(made_up(3.0))
    assert found.pop("EB2") == PARTLY  # 95 % of collapse is reached by none
    assert found.pop("Table 7 (I)") == UNDECIDED
    assert found.pop("Table 4") == PARTLY  # ETF+DR transfers like CE
    assert found.pop("Table 7 (II)") == FAILED  # none is there after one epoch
    assert set(found.values()) == {HELD}


def test_what_is_worse_for_all_seeds_does_not_hold() -> None:
    found = verdicts(made_up(-3.0))
    assert found.pop("Table 7 (I)") == UNDECIDED
    assert found.pop("EB5") == FAILED
    assert set(found.values()) == {FAILED}


def test_differences_within_the_seeds_decide_nothing() -> None:
    found = verdicts(made_up(0.0, noise=1.0))
    assert found.pop("EB4, Table 2") == HELD  # equal within a point
    assert found.pop("Table 7 (II)") == FAILED
    assert set(found.values()) == {UNDECIDED}
