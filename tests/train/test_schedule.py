"""Learning rates by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from nckernels.train.recipe import Optimizer, Schedule
from nckernels.train.schedule import learning_rate


def rates(schedule: Schedule, per_epoch: int, batch_size: int = 256, **optimizer: Any) -> list[float]:
    settings = Optimizer(**{"lr": 0.2, **optimizer})
    steps = schedule.epochs * per_epoch
    return [learning_rate(schedule, settings, step, per_epoch, batch_size) for step in range(steps + 1)]


def test_cosine_goes_from_the_highest_to_its_share() -> None:
    found = rates(Schedule(epochs=10, final=1e-3), 10)
    assert found[0] == 0.2
    assert found[50] == pytest.approx(0.2 * (1 + 1e-3) / 2)
    assert found[100] == pytest.approx(0.2e-3)
    assert found[25] == pytest.approx(2e-4 + (0.2 - 2e-4) * (1 + math.cos(math.pi / 4)) / 2)
    assert found == sorted(found, reverse=True)


def test_cosine_epoch_by_epoch() -> None:
    found = rates(Schedule(epochs=4, final=0, every="epoch"), 3)
    expected = [0.1 * (1 + math.cos(math.pi * epoch / 4)) for epoch in range(5) for _ in range(3)]
    assert found == pytest.approx(expected[:13])


def test_warmup_is_linear_and_the_cosine_runs_over_the_rest() -> None:
    schedule = Schedule(epochs=6, final=0, warmup_epochs=2, warmup_lr=0.01)
    found = rates(schedule, 5)
    assert found[:10] == pytest.approx([0.01 + 0.019 * step for step in range(10)])
    assert found[10] == 0.2
    assert found[20] == pytest.approx(0.1)
    assert found[30] == pytest.approx(0)
    by_epoch = rates(Schedule(epochs=6, warmup_epochs=2, warmup_lr=0.01, every="epoch"), 5)
    assert by_epoch[:10] == pytest.approx([0.01] * 5 + [0.105] * 5)


def test_steps_and_constant() -> None:
    found = rates(Schedule(name="step", epochs=6, milestones=(2, 4), gamma=0.1), 2)
    assert found == pytest.approx([0.2] * 4 + [0.02] * 4 + [0.002] * 5)
    assert set(rates(Schedule(name="constant", epochs=3), 2)) == {0.2}


def test_scaled_with_the_batch_but_not_the_warmup() -> None:
    schedule = Schedule(name="constant", epochs=3, warmup_epochs=1, warmup_lr=0.01)
    found = rates(schedule, 4, batch_size=64, lr_batch=256)
    assert found[0] == 0.01
    assert found[4] == 0.05
