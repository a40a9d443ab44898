"""An evaluation by two ranks has the numbers of one, on both of them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from ranks import Failure, Ranks

pytest.importorskip("sklearn")
pytest.importorskip("torchmetrics")

from nckernels.train import evaluate
from nckernels.train.data import Memory, open_data
from nckernels.train.evaluate import Evaluation
from nckernels.train.heads import make_head
from nckernels.train.models import make_network
from nckernels.train.recipes import load

CPU = torch.device("cpu")


class InBatches:
    """Images that an evaluation treats as files, not as a set in memory."""

    def __init__(self, split: Memory) -> None:
        self.images, self.labels = split.images, split.labels

    def __len__(self) -> int:
        return len(self.labels)


def measured(
    rank: int, world_size: int, row: str, streamed: bool, bad: bool = False
) -> tuple[Evaluation, torch.Tensor, torch.Tensor]:
    recipe = load(f"digits/{row}", ["model.width=4", "model.dim=12"])
    data = open_data(recipe.data)
    if bad:  # one image of the last rank
        data.train.images[-1] = math.nan
    if streamed:
        data = dataclasses.replace(data, train=InBatches(data.train), test=InBatches(data.test))
    torch.manual_seed(0)
    network = make_network(recipe.model, data.channels, data.image_size)
    head = make_head(recipe.loss, network.dim, data.num_classes)
    ranks = {"rank": rank, "world_size": world_size}
    found = evaluate.evaluate(network, head, data, recipe, CPU, cosines=True, **ranks)
    return found, *evaluate.features(network, data, data.test, recipe, CPU, **ranks)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("row", ["ce", "scl"])
def test_two_ranks_measure_the_same_as_one(row: str, streamed: bool, ranks2: Ranks) -> None:
    alone, z, labels = measured(0, 1, row, streamed)
    results: list[Any] = ranks2.run(measured, row, streamed)
    for found, rows, classes in results:
        assert found.train_accuracy == pytest.approx(alone.train_accuracy, abs=1.1 / 1437)  # a tie of rounding
        assert found.test_accuracy == pytest.approx(alone.test_accuracy, abs=1.1 / 360)
        assert found.metrics == pytest.approx(alone.metrics, rel=1e-4, abs=1e-6, nan_ok=True)
        torch.testing.assert_close(rows, z)
        assert torch.equal(classes, labels)
    assert repr(results[0][0]) == repr(results[1][0])


@pytest.mark.parametrize("streamed", [False, True])
def test_non_finite_features_raise_on_all_ranks(streamed: bool, ranks2: Ranks) -> None:
    for outcome in ranks2.outcomes(measured, "ce", streamed, True):
        assert isinstance(outcome, Failure)
        assert isinstance(outcome.error, FloatingPointError)
