"""Data sets, batches and passes: the contract that the other parts of the trainer rely on.

Written from the description of the trainer, not from its code.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nckernels.train.data import Batches, Dataset, open_data, passes
from nckernels.train.recipe import Data, Recipe
from nckernels.train.recipes import load

from . import contract_process as cli

CPU = torch.device("cpu")
AUGMENTED = {"augment__rotate": 10.0, "augment__zoom": 0.1, "augment__shift": 0.2, "augment__flip": 0.5}
VIEWS = {"loss__name": "scl", "augment__views": 2, **AUGMENTED}


def recipe(**changes: Any) -> Recipe:
    return load("digits/nonl", cli.settings(**{"run__batch_size": 101, **changes}))


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return open_data(Data())


def batches(dataset: Dataset, rank: int = 0, world_size: int = 1, **changes: Any) -> Batches:
    return Batches(dataset, recipe(**changes), CPU, rank=rank, world_size=world_size)


def equal(found: Any, expected: Any) -> bool:
    pairs = list(zip(list(found), list(expected), strict=True))
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in pairs) and bool(pairs)


def standardised(dataset: Dataset, images: Tensor) -> Tensor:
    images = images.float() / 255 if images.dtype == torch.uint8 else images
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (dataset.mean, dataset.std))
    return (images - mean) / std


def which(rows: Tensor, of: Tensor) -> list[int]:
    """The index of each row among the rows of ``of``."""
    distances = torch.cdist(rows.flatten(1).double(), of.flatten(1).double())
    nearest = distances.min(dim=1)
    assert nearest.values.max() < 1e-4, "not an image of the set"
    return nearest.indices.tolist()


def test_set(digits: Dataset) -> None:
    assert digits.num_classes == len(digits.class_names) == 10
    assert len(digits.mean) == len(digits.std) == digits.channels == 1
    for split in (digits.train, digits.test):
        assert split.labels.dtype == torch.int64
        assert split.labels.shape == (len(split),)
        assert split.labels.unique().tolist() == list(range(10))
    images = standardised(digits, digits.train.images)
    assert images.shape == (len(digits.train), 1, digits.image_size, digits.image_size)
    assert abs(images.mean().item()) < 1e-2
    assert abs(images.std().item() - 1) < 1e-2


def test_epochs_are_permutations(digits: Dataset) -> None:
    """479 x 3 = 1437: each sample once an epoch, in an order of its own."""
    made = batches(digits, run__batch_size=479)
    assert made.steps_per_epoch == 3
    images = standardised(digits, digits.train.images)
    orders = []
    for epoch in range(2):
        found = list(made.epoch(epoch))
        assert [x.shape for x, _ in found] == [(479, 1, digits.image_size, digits.image_size)] * 3
        assert all(x.dtype == torch.float32 and y.shape == (479,) and y.dtype == torch.int64 for x, y in found)
        order = which(torch.cat([x for x, _ in found]), images)
        same = (images[order].flatten(1) - torch.cat([x for x, _ in found]).flatten(1)).abs().max()
        assert same < 1e-5
        assert torch.equal(torch.cat([y for _, y in found]), digits.train.labels[order])
        assert len(set(order)) > 1437 - 10  # a few images may be there twice
        assert torch.equal(
            torch.cat([y for _, y in found]).bincount(minlength=10), digits.train.labels.bincount(minlength=10)
        )
        orders.append(order)
    assert sum(a == b for a, b in zip(*orders, strict=True)) < 30
    assert orders[0] != sorted(orders[0])


def test_the_last_smaller_batch_is_dropped(digits: Dataset) -> None:
    made = batches(digits)
    assert made.steps_per_epoch == len(digits.train) // 101
    assert [len(y) for _, y in made.epoch(0)] == [101] * made.steps_per_epoch


@pytest.mark.parametrize("changes", [{}, AUGMENTED, VIEWS], ids=["plain", "augmented", "views"])
def test_batches_depend_on_seed_epoch_and_step_alone(digits: Dataset, changes: dict[str, Any]) -> None:
    made = batches(digits, **changes)
    whole = list(made.epoch(3))
    assert whole[0][0].shape[:-3] == ((101, 2) if changes is VIEWS else (101,))
    torch.manual_seed(7)
    before = torch.get_rng_state()
    assert equal(made.epoch(3), whole), "the second time"
    assert equal(batches(digits, **changes).epoch(3), whole), "of another object"
    for start in (1, 5, made.steps_per_epoch - 1):
        assert equal(batches(digits, **changes).epoch(3, start=start), whole[start:]), f"from step {start}"
    assert list(made.epoch(3, start=made.steps_per_epoch)) == []
    assert torch.equal(torch.get_rng_state(), before), "the global generator has moved"
    assert not equal(made.epoch(4), whole)
    assert not equal(batches(digits, run__seed=43, **changes).epoch(3), whole)
    one, other = made.epoch(3), made.epoch(3)
    for expected in whole[:3]:  # two iterators at once
        assert equal([next(one)], [expected])
        assert equal([next(other)], [expected])


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("changes", [{}, AUGMENTED, VIEWS], ids=["plain", "augmented", "views"])
def test_ranks_share_the_global_batch(digits: Dataset, changes: dict[str, Any], size: int) -> None:
    """Rank r of R has rows [r B // R, (r + 1) B // R) of it, views included."""
    whole = list(batches(digits, **changes).epoch(1))
    for rank in range(size):
        share = slice(rank * 101 // size, (rank + 1) * 101 // size)
        found = list(batches(digits, rank, size, **changes).epoch(1))
        assert len(found) == len(whole)
        for (x, y), (images, labels) in zip(found, whole, strict=True):
            assert torch.equal(y, labels[share])
            assert x.shape == images[share].shape
            assert torch.allclose(x, images[share], atol=1e-5)


def test_augmentation(digits: Dataset) -> None:
    """Augmentation does not change the order, differs between views and epochs, and a flip of probability 1 mirrors."""
    plain, mirrored = (next(iter(batches(digits, augment__flip=flip).epoch(0))) for flip in (0.0, 1.0))
    assert torch.equal(plain[1], mirrored[1])
    assert torch.allclose(plain[0].flip(-1), mirrored[0], atol=1e-4)
    half = next(iter(batches(digits, augment__flip=0.5).epoch(0)))[0]
    flipped = [torch.allclose(a, b, atol=1e-4) for a, b in zip(half, mirrored[0], strict=True)]
    assert 30 < sum(flipped) < 71
    views, labels = next(iter(batches(digits, **VIEWS).epoch(0)))
    assert torch.equal(labels, plain[1])
    differ = (views[:, 0] - views[:, 1]).flatten(1).abs().amax(dim=1) > 0.1
    assert differ.float().mean() > 0.95
    far = (views[:, 0] - plain[0]).flatten(1).norm(dim=1) / plain[0].flatten(1).norm(dim=1)
    assert 0.05 < far.mean() < 1.5


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("name", ["train", "test"])
def test_passes(digits: Dataset, name: str, size: int) -> None:
    """Every sample once and in order over the ranks, without augmentation."""
    split = getattr(digits, name)
    settings = recipe(**AUGMENTED)
    shares = [
        list(passes(digits, split, settings, CPU, rank=rank, world_size=size, batch_size=100)) for rank in range(size)
    ]
    images = torch.cat([x for share in shares for x, _ in share])
    labels = torch.cat([y for share in shares for _, y in share])
    assert torch.equal(labels, split.labels)
    assert torch.allclose(images, standardised(digits, split.images), atol=1e-5)
    counts = [sum(len(y) for _, y in share) for share in shares]
    assert max(counts) - min(counts) <= 1
    assert all(len(y) <= 100 for share in shares for _, y in share)


def test_passes_shorter_than_the_ranks(digits: Dataset) -> None:
    few = open_data(Data(imbalance=0.01, options={}))
    assert len(few.train) < len(digits.train)
    found = [
        list(passes(few, few.train, recipe(), CPU, rank=rank, world_size=len(few.train) + 2, batch_size=100))
        for rank in (0, len(few.train) + 1)
    ]
    assert all(sum(len(y) for _, y in share) <= 1 for share in found)


def test_class_subset(digits: Dataset) -> None:
    part = open_data(Data(classes=(3, 6)))
    assert part.num_classes == 3
    assert part.class_names == digits.class_names[3:6]
    for found, whole in ((part.train, digits.train), (part.test, digits.test)):
        kept = (whole.labels >= 3) & (whole.labels < 6)
        assert torch.equal(found.labels, whole.labels[kept] - 3)
        assert torch.equal(found.images, whole.images[kept])


def test_validation_holds_out_a_part_of_the_training_set(digits: Dataset) -> None:
    part = open_data(Data(validation=True))
    assert len(part.train) + len(part.test) == len(digits.train)
    assert 0.05 < len(part.test) / len(digits.train) < 0.5
    both = torch.cat([part.train.images, part.test.images]).flatten(1)
    order = which(both, digits.train.images)
    assert len(set(order)) > len(order) - 10
    assert part.test.labels.unique().tolist() == list(range(10))
    again = open_data(Data(validation=True))
    assert torch.equal(again.test.images, part.test.images)


def test_image_size(digits: Dataset) -> None:
    made = open_data(Data(image_size=20))
    assert made.image_size == 20
    settings = {"data__image_size": 20}
    images, _ = next(iter(batches(made, **settings).epoch(0)))
    assert images.shape == (101, 1, 20, 20)
    images, _ = next(iter(passes(made, made.test, recipe(**settings), CPU)))
    assert images.shape[1:] == (1, 20, 20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six classes of 200 training images each; nobody decodes them here."""
    root = tmp_path_factory.mktemp("folder")
    for part, count in (("train", 200), ("val", 5)):
        for k in range(6):
            (root / part / f"n{k:04d}").mkdir(parents=True)
            for i in range(count):
                (root / part / f"n{k:04d}" / f"{i:03d}.JPEG").touch()
    return root


@pytest.mark.parametrize("imbalance", [0.1, 0.02, 0.005])
def test_long_tail(folder: Path, imbalance: float) -> None:
    """n_k = n imbalance^(k / (K - 1)), rounded; the test set is unchanged; the seed determines the samples."""
    settings = Data(name="folder", root=str(folder), imbalance=imbalance)
    made = open_data(settings)
    counts = made.train.labels.bincount(minlength=6).tolist()
    assert counts[0] == 200
    for k, count in enumerate(counts):
        assert count >= 1
        assert abs(count - max(1, 200 * imbalance ** (k / 5))) < 1
    assert made.test.labels.bincount(minlength=6).tolist() == [5] * 6
    again, other = open_data(settings), open_data(settings, seed=43)
    assert list(made.train.paths) == list(again.train.paths)
    assert list(made.train.paths) != list(other.train.paths)
    assert other.train.labels.bincount(minlength=6).tolist() == counts
    full = open_data(Data(name="folder", root=str(folder)))
    assert {str(path) for path in made.train.paths} <= {str(path) for path in full.train.paths}
    assert len(set(map(str, made.train.paths))) == len(made.train)
    assert full.class_names == tuple(f"n{k:04d}" for k in range(6))


def test_balanced_batches() -> None:
    """Uniform over the classes of a long tail with ``balanced``, in proportion to their sizes without."""
    changes = {"data__imbalance": 0.02, "run__batch_size": 32}
    made = open_data(recipe(**changes).data)
    tail = made.train.labels.bincount(minlength=10)
    assert tail[0] > 20 * tail[9]
    shares = {}
    for balanced in (True, False):
        found = batches(made, data__balanced=balanced, **changes)
        labels = torch.cat([y for epoch in range(12) for _, y in found.epoch(epoch)])
        assert len(labels) == 12 * 32 * found.steps_per_epoch
        shares[balanced] = labels.bincount(minlength=10) / len(labels)
    assert (shares[True] - 0.1).abs().max() < 0.03
    assert (shares[False] - tail / tail.sum()).abs().max() < 0.02
    part = batches(made, data__balanced=True, **changes)
    rest = batches(made, data__balanced=True, **changes)
    whole = list(part.epoch(2))
    assert equal(rest.epoch(2, start=3), whole[3:])
    halves = [list(batches(made, rank, 2, data__balanced=True, **changes).epoch(2)) for rank in (0, 1)]
    joined = [(torch.cat([a, c]), torch.cat([b, d])) for (a, b), (c, d) in zip(*halves, strict=True)]
    assert equal(joined, whole)
    assert len(set(which(torch.cat([x[y == 0] for x, y in whole]), standardised(made, made.train.images)))) > 10


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"name": "digit"}, "digits"),
        ({"classes": (5, 40)}, "data.classes"),
        ({"options": {"views": 1}}, "views"),
        ({"name": "folder", "root": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"name": "cifar10", "root": "/nowhere/at/all"}, "https://www.cs.toronto.edu/~kriz/"),
    ],
)
def test_errors(settings: dict[str, Any], word: str) -> None:
    with pytest.raises((ValueError, OSError)) as caught:
        open_data(Data(**settings))
    assert word in str(caught.value)
