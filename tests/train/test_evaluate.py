"""Evaluations of a briefly trained network, on sets in memory and batch by batch."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("sklearn")
pytest.importorskip("torchmetrics")

import nckernels
from nckernels.metrics import NeuralCollapse, neural_collapse
from nckernels.train import evaluate
from nckernels.train.data import Batches, Dataset, Memory, open_data
from nckernels.train.evaluate import Evaluation
from nckernels.train.heads import make_head
from nckernels.train.models import make_network
from nckernels.train.probes import probe
from nckernels.train.recipe import Recipe
from nckernels.train.recipes import load

CPU = torch.device("cpu")
SMALL = ["model.width=8", "model.dim=16", "run.batch_size=128", "data.workers=0"]


class InBatches:
    """Images that an evaluation treats as files, not as a set in memory."""

    def __init__(self, split: Memory) -> None:
        self.images, self.labels = split.images, split.labels

    def __len__(self) -> int:
        return len(self.labels)


@dataclasses.dataclass(frozen=True)
class Trained:
    recipe: Recipe
    data: Dataset
    network: Any
    head: Any

    def evaluate(self, **options: Any) -> Evaluation:
        return evaluate.evaluate(self.network, self.head, self.data, self.recipe, CPU, **options)


def trained(row: str = "nonl", *settings: str, steps: int = 20) -> Trained:
    recipe = load(f"digits/{row}", [*SMALL, *settings])
    data = open_data(recipe.data)
    torch.manual_seed(0)
    network = make_network(recipe.model, data.channels, data.image_size)
    head = make_head(recipe.loss, network.dim, data.num_classes)
    optimizer = torch.optim.SGD([*network.parameters(), *head.parameters()], lr=0.1, momentum=0.9)
    batches = Batches(data, recipe, CPU)
    for epoch in range(-(-steps // batches.steps_per_epoch)):
        for images, labels in batches.epoch(epoch):
            views = images if images.ndim == 5 else images[:, None]
            features = network(views.flatten(0, 1)).unflatten(0, views.shape[:2])
            optimizer.zero_grad()
            head.loss(features if images.ndim == 5 else features[:, 0], labels).backward()
            optimizer.step()
    return Trained(recipe, data, network, head)


def in_batches(run: Trained) -> Trained:
    data = dataclasses.replace(run.data, train=InBatches(run.data.train), test=InBatches(run.data.test))
    return dataclasses.replace(run, data=data)


@pytest.fixture(scope="module")
def run() -> Trained:
    return trained()


def plain_features(run: Trained, split: Memory) -> torch.Tensor:
    """Without the code under test: one forward pass of standardised images."""
    run.network.eval()
    mean, std = torch.tensor(run.data.mean), torch.tensor(run.data.std)
    with torch.no_grad():
        return run.network((split.images - mean[:, None, None]) / std[:, None, None])


def test_accuracies_metrics_and_cosines(run: Trained) -> None:
    found = run.evaluate(cosines=True)
    for split, accuracy in ((run.data.train, found.train_accuracy), (run.data.test, found.test_accuracy)):
        z = plain_features(run, split)
        cosines = F.normalize(z) @ F.normalize(run.head.prototypes).T
        assert accuracy == pytest.approx((cosines.argmax(1) == split.labels).double().mean().item(), abs=1e-12)
    assert found.test_accuracy > 0.5  # one of ten by chance
    z = plain_features(run, run.data.train)
    expected = dataclasses.asdict(neural_collapse(z, run.data.train.labels, run.head.prototypes))
    assert found.metrics == pytest.approx(expected, rel=1e-4, abs=1e-5, nan_ok=True)
    means = torch.stack([F.normalize(z)[run.data.train.labels == c].mean(0) for c in range(10)])
    for points, cosines in ((means, found.mean_cosines), (run.head.prototypes, found.prototype_cosines)):
        unit = F.normalize(points.detach())
        torch.testing.assert_close(torch.tensor(cosines), unit @ unit.T, atol=1e-5, rtol=0)


def test_evaluation_restores_modes_and_random_state(run: Trained) -> None:
    """The modes of the modules, some of which may be frozen, BatchNorm statistics and random state are unchanged."""
    run.network.train()
    run.network.encoder[1].eval()
    before = {key: value.clone() for key, value in run.network.state_dict().items()}
    random = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        found = run.evaluate()
    assert torch.equal(random, torch.get_rng_state())
    assert (run.network.training, run.network.encoder[1].training) == (True, False)
    assert all(torch.equal(value, before[key]) for key, value in run.network.state_dict().items())
    run.network.eval()
    assert run.evaluate() == found  # in float32 in spite of the autocast


@pytest.mark.parametrize("row", ["ce", "scl"])
def test_files_are_measured_batch_by_batch_with_the_same_result(row: str) -> None:
    whole = trained(row, steps=10)
    found, streamed = whole.evaluate(cosines=True), in_batches(whole).evaluate(cosines=True)
    assert (streamed.train_accuracy, streamed.test_accuracy) == (found.train_accuracy, found.test_accuracy)
    for name, value in streamed.metrics.items():
        wanted = math.nan if name in ("intra_erank", "nc4") else found.metrics[name]
        assert value == pytest.approx(wanted, rel=1e-6, abs=1e-9, nan_ok=True), name
    torch.testing.assert_close(torch.tensor(streamed.mean_cosines), torch.tensor(found.mean_cosines))


@pytest.mark.parametrize("row", ["ce", "nonl"])
def test_bias_spread_needs_a_bias(row: str) -> None:
    spread = trained(row, steps=1).evaluate().metrics["bias_spread"]
    assert spread > 0 if row == "ce" else math.isnan(spread)


def test_class_means_classify_after_contrastive_training() -> None:
    run = trained("scl", "run.probes=['FP', 'NLP']", steps=30)
    found = run.evaluate(cosines=True)
    assert found.test_accuracy > 0.8
    assert found.metrics["weight_alignment"] == pytest.approx(0, abs=1e-9)
    assert found.prototype_cosines == found.mean_cosines
    results = probe(run.network, run.data, run.recipe, CPU)
    assert [result.name for result in results] == ["FP", "NLP"]
    assert results[0].accuracy == pytest.approx(found.test_accuracy)
    assert all(result.seconds > 0 and result.accuracy > 0.6 for result in results)


def test_class_means_take_one_pass_and_keep_no_features(run: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("the features of a whole set")

    sizes: list[int] = []
    hook = run.network.register_forward_hook(lambda _, inputs, output: sizes.append(len(output)))
    monkeypatch.setattr("nckernels.train.probes.features", forbidden)
    recipe = run.recipe.replace(run__probes=["FP"])
    (result,) = probe(run.network, run.data, recipe, CPU)
    hook.remove()
    assert sum(sizes) == len(run.data.train) + len(run.data.test)
    expected = nckernels.FixedPrototypes(10, run.network.dim)
    expected.fit(plain_features(run, run.data.train), run.data.train.labels)
    assert result.accuracy == pytest.approx(expected.score(plain_features(run, run.data.test), run.data.test.labels))


def test_features_come_in_the_order_of_the_set(run: Trained) -> None:
    z, labels = evaluate.features(run.network, run.data, run.data.test, run.recipe, CPU)
    assert torch.equal(labels, run.data.test.labels)
    torch.testing.assert_close(z, plain_features(run, run.data.test), atol=1e-4, rtol=1e-4)
    encoded, _ = evaluate.features(run.network, run.data, run.data.test, run.recipe, CPU, run.network.encode)
    assert encoded.shape == (360, run.network.encoded_dim)
    assert not encoded.requires_grad


def test_metrics_and_cosines_are_optional(run: Trained) -> None:
    bare = dataclasses.replace(run, recipe=run.recipe.replace(run__metrics=False)).evaluate()
    assert (bare.metrics, bare.prototype_cosines, bare.mean_cosines) == ({}, None, None)


def test_cosines_of_many_classes_are_left_out(run: Trained) -> None:
    many = dataclasses.replace(run.data, num_classes=201)
    head = nckernels.PrototypeClassifier(16, 201)
    found = evaluate.evaluate(run.network, head, many, run.recipe, CPU, cosines=True)
    assert (found.prototype_cosines, found.mean_cosines) == (None, None)
    assert set(found.metrics) == {field.name for field in dataclasses.fields(NeuralCollapse)}


def test_several_labels_have_a_mean_average_precision(run: Trained) -> None:
    """Ranks of the positives by hand: with one class of positives at ranks 1 and 3 of 4 it is (1/1 + 2/3) / 2."""
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 8, 8)
    labels = torch.tensor([[1.0, 0], [0, 1], [1, 0], [0, 1]])
    data = dataclasses.replace(
        run.data, train=Memory(images, labels), test=Memory(images, 1 - labels), num_classes=2, mean=(0.0,), std=(1.0,)
    )

    class Brightness(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return -x.mean(dim=(1, 2, 3))[:, None].expand(-1, 2)

    head = torch.nn.Linear(2, 2)
    head.weight.data.copy_(torch.eye(2))
    head.prototypes = head.weight
    found = evaluate.evaluate(Brightness(), head, data, run.recipe, CPU, cosines=True)
    first, second = (1 + 2 / 3) / 2, (1 / 2 + 2 / 4) / 2
    assert found.train_accuracy == pytest.approx((first + second) / 2)
    assert found.test_accuracy == pytest.approx((first + second) / 2)
    assert (found.metrics, found.mean_cosines) == ({}, None)
    with pytest.raises(ValueError, match=r"run.probes: expected none"):
        probe(run.network, data, run.recipe, CPU)


@pytest.mark.parametrize("streamed", [False, True])
def test_features_that_are_not_finite_are_an_error(streamed: bool) -> None:
    run = trained(steps=1)
    run.network.projection.weight.data[0, 0] = math.inf
    with pytest.raises(FloatingPointError, match="features are not finite"):
        (in_batches(run) if streamed else run).evaluate()
