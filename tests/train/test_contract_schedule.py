"""Learning rates against the formulas of [NCD] App. E.3, written out.

Written from the description of the trainer, not from its code.
"""

from __future__ import annotations

from collections.abc import Callable
from math import cos, pi
from typing import Any

import pytest
import torch

from nckernels.train.recipe import Recipe
from nckernels.train.recipes import load
from nckernels.train.schedule import learning_rate

from . import contract_process as cli

LR, FINAL, EPOCHS, STEPS = 0.2, 0.001, 4, 5  # 1437 // 256 = 5 steps an epoch
LAST = LR * FINAL


def cosine(t: float, total: float, high: float = LR, low: float = LAST) -> float:
    return low + 0.5 * (high - low) * (1 + cos(pi * t / total))


def warm(t: float, start: float = 0.01, high: float = LR, epochs: int = 2) -> float:
    """Linear over two epochs, and cosine over the other two."""
    if t < epochs:
        return start + (high - start) * t / epochs
    return cosine(t - epochs, EPOCHS - epochs, high, high * FINAL)


CASES: dict[str, tuple[dict[str, Any], Callable[[float], float]]] = {
    "cosine": ({}, lambda t: cosine(t, EPOCHS)),
    "cosine by epoch": ({"schedule__every": "epoch"}, lambda t: cosine(int(t), EPOCHS)),
    "warm-up": ({"schedule__warmup_epochs": 2}, warm),
    "warm-up by epoch": ({"schedule__warmup_epochs": 2, "schedule__every": "epoch"}, lambda t: warm(int(t))),
    "warm-up from 0": ({"schedule__warmup_epochs": 2, "schedule__warmup_lr": 0.0}, lambda t: warm(t, 0.0)),
    "step": (
        {"schedule__name": "step", "schedule__milestones": [1, 3], "schedule__gamma": 0.2},
        lambda t: LR * (1.0 if t < 1 else 0.2 if t < 3 else 0.2 * 0.2),
    ),
    "constant": ({"schedule__name": "constant"}, lambda t: LR),
    "scaled with the batch": (  # 256 / 64 times as high; the warm-up's start is absolute
        {"optimizer__lr_batch": 64, "schedule__warmup_epochs": 2},
        lambda t: warm(t, 0.01, 4 * LR),
    ),
    "adamw": ({"optimizer__name": "adamw"}, lambda t: cosine(t, EPOCHS)),
    "to zero": ({"schedule__final": 0.0}, lambda t: cosine(t, EPOCHS, LR, 0.0)),
}


def recipe(**changes: Any) -> Recipe:
    few = {"run__batch_size": 256, "run__eval_every": 100000, "optimizer__lr": LR, "schedule__epochs": EPOCHS}
    return load("digits/normface", cli.settings(**{**few, **changes}))


@pytest.mark.parametrize("case", CASES)
def test_learning_rates(case: str) -> None:
    changes, formula = CASES[case]
    wanted = recipe(**changes)
    rates = [
        learning_rate(wanted.schedule, wanted.optimizer, step, STEPS, wanted.run.batch_size)
        for step in range(EPOCHS * STEPS)
    ]
    assert rates == pytest.approx([formula(i / STEPS) for i in range(EPOCHS * STEPS)], rel=1e-6, abs=1e-12)


def test_the_optimizer_uses_the_rate_of_the_log() -> None:
    """An epoch at a rate of almost nothing leaves the weights where the first epoch brought them."""
    from nckernels.train import fit

    still = {"schedule__name": "step", "schedule__milestones": [1], "schedule__gamma": 1e-12}
    plain = {"optimizer__weight_decay": 0.0, "optimizer__lr": 0.05}
    one = fit(recipe(schedule__name="constant", schedule__epochs=1, **plain), progress=False)
    two = fit(recipe(schedule__epochs=2, **still, **plain), progress=False)
    moved = fit(recipe(schedule__name="constant", schedule__epochs=2, **plain), progress=False)
    for (name, a), b, c in zip(
        one.network.named_parameters(), two.network.parameters(), moved.network.parameters(), strict=True
    ):
        assert torch.allclose(a, b, atol=1e-6), name
        assert not torch.allclose(a, c, atol=1e-6), name
    for a, b in zip(one.head.parameters(), two.head.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_clipped_steps_are_short() -> None:
    """Without momentum and decay a step is at most the rate x the largest norm of the gradient."""
    from nckernels.train import fit

    plain = {"optimizer__momentum": 0.0, "optimizer__weight_decay": 0.0, "schedule__name": "constant"}
    run = {"schedule__epochs": 1, "run__batch_size": 1000, "optimizer__lr": 1.0, **plain}
    start = fit(recipe(**{**run, "optimizer__lr": 1e-12}), progress=False)
    for limit in (1e-3, 1e-2):
        moved = fit(recipe(optimizer__clip=limit, **run), progress=False)
        pairs = [
            *zip(start.network.parameters(), moved.network.parameters(), strict=True),
            *zip(start.head.parameters(), moved.head.parameters(), strict=True),
        ]
        length = sum((a - b).double().square().sum() for a, b in pairs).sqrt().item()
        assert length == pytest.approx(limit, rel=1e-3)
