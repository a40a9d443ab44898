"""Data sets by name, and the effect of the settings of ``[data]``."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

pytest.importorskip("sklearn")

from nckernels.train.data import DATASETS, Dataset, Files, Memory, longtail, open_data, seeds, sets, subsets
from nckernels.train.recipe import Data


def counts(labels: torch.Tensor) -> list[int]:
    return torch.bincount(labels).tolist()


def small(per_class: int = 50, classes: int = 4) -> Dataset:
    """A set whose images say which class and which sample of it they are."""
    labels = torch.arange(classes).repeat(per_class)
    images = torch.stack([labels, torch.arange(per_class).repeat_interleave(classes)], 1)[:, None, :, None]
    split = Memory(images.expand(-1, 1, 2, 2).to(torch.uint8), labels)
    return sets.in_memory(split, split, [f"class {c}" for c in range(classes)])


def several() -> Dataset:
    """Two labels for each sample."""
    split = Memory(torch.rand(40, 1, 2, 2), (torch.rand(40, 3) > 0.5).float())
    return sets.in_memory(split, split, "abc")


def rows(dataset: Dataset) -> set[tuple[int, ...]]:
    assert isinstance(dataset.train, Memory)
    return {tuple(image[0, :, 0].tolist()) for image in dataset.train.images}


def test_digits_are_split_and_described() -> None:
    digits = open_data(Data())
    assert isinstance(digits.train, Memory)
    assert isinstance(digits.test, Memory)
    assert digits.train.images.shape == (1437, 1, 8, 8)
    assert digits.test.images.shape == (360, 1, 8, 8)
    assert digits.train.images.dtype == torch.float32
    assert digits.train.labels.dtype == torch.int64
    assert (digits.train.images.min(), digits.train.images.max()) == (0, 1)
    assert digits.mean == pytest.approx([digits.train.images.mean().item()], abs=1e-6)
    assert digits.std == pytest.approx([digits.train.images.std(correction=0).item()], abs=1e-6)
    assert (digits.num_classes, digits.channels, digits.image_size) == (10, 1, 8)
    assert digits.class_names == tuple("0123456789")
    shares = torch.bincount(digits.test.labels) / torch.bincount(digits.train.labels)
    assert 0.24 < shares.min() <= shares.max() < 0.26
    again = open_data(Data()).train
    assert isinstance(again, Memory)
    assert torch.equal(digits.train.images, again.images)


def test_a_validation_set_is_a_stratified_fifth_of_the_training_set() -> None:
    whole, part = open_data(Data()), open_data(Data(validation=True))
    assert len(part.train) + len(part.test) == len(whole.train)
    for all_of_class, held in zip(counts(whole.train.labels), counts(part.test.labels), strict=True):
        assert held == round(all_of_class / 5)
    assert isinstance(part.train, Memory)
    assert isinstance(part.test, Memory)
    assert isinstance(whole.train, Memory)
    # The same images, none on both sides. Some images of the digits are there twice.
    both = torch.cat([part.train.images, part.test.images]).flatten(1)
    assert torch.equal(both.sort(0).values, whole.train.images.flatten(1).sort(0).values)
    other_seed = open_data(Data(validation=True), seed=7)
    assert torch.equal(other_seed.test.labels, part.test.labels)


def test_statistics_of_bytes_and_of_floats_agree() -> None:
    images = torch.randint(0, 256, (20, 3, 5, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    bytes_, floats = sets.statistics(images), sets.statistics(images.double() / 255)
    assert bytes_[0] == pytest.approx(floats[0], rel=1e-12)
    assert bytes_[1] == pytest.approx(floats[1], rel=1e-12)
    assert len(bytes_[0]) == 3


def test_classes_are_relabelled_in_both_splits() -> None:
    part = open_data(Data(classes=(3, 7)))
    whole = open_data(Data())
    assert part.num_classes == 4
    assert part.class_names == tuple("3456")
    for split in ("train", "test"):
        assert counts(getattr(part, split).labels) == counts(getattr(whole, split).labels)[3:7]
    assert isinstance(part.train, Memory)
    assert isinstance(whole.train, Memory)
    assert torch.equal(part.train.images[part.train.labels == 1], whole.train.images[whole.train.labels == 4])
    assert (part.mean, part.std) == (whole.mean, whole.std)  # an encoder of other classes sees the same scale
    with pytest.raises(ValueError, match=r"data.classes: expected at most 10, got 5, 11"):
        open_data(Data(classes=(5, 11)))


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [(0.1, (5000, 500)), (0.02, (5000, 100)), (0.01, (5000, 50)), (1e-9, (5000, 1)), (1.0, (5000, 5000))],
)
def test_a_long_tail_is_exponential(ratio: float, expected: tuple[int, int]) -> None:
    found = longtail.class_counts(5000, 10, ratio)
    assert (found[0], found[-1]) == expected
    for c, n in enumerate(found):
        exact = 5000 * ratio ** (c / 9)
        assert exact - 1 < n <= exact + 1e-6 or (exact < 1 and n == 1)
    # The size that long-tailed CIFAR-10 has elsewhere, too.
    if ratio == 0.01:
        assert sum(found) == 12406


def test_a_long_tailed_set_is_a_part_that_the_seed_decides() -> None:
    whole = small()
    long, longer = (longtail.long_tailed(whole, ratio, seed=3) for ratio in (0.5, 0.1))
    assert counts(longer.train.labels) == longtail.class_counts(50, 4, 0.1)
    assert rows(longer) < rows(long) < rows(whole)
    assert rows(longtail.long_tailed(whole, 0.1, seed=3)) == rows(longer)
    assert rows(longtail.long_tailed(whole, 0.1, seed=4)) != rows(longer)
    assert longer.test is whole.test
    digits = open_data(Data(imbalance=0.1), seed=1)
    assert counts(digits.train.labels)[9] == 14  # of 146 of the largest class
    assert len(digits.test) == 360
    both = open_data(Data(imbalance=0.1, validation=True))  # the held-out part keeps its classes even
    assert min(counts(both.test.labels)) > 25


def test_settings_that_need_single_labels_are_errors() -> None:
    with pytest.raises(ValueError, match=r"data.imbalance: .* several labels"):
        longtail.long_tailed(several(), 0.1, 0)
    with pytest.raises(ValueError, match=r"data.classes: .* several labels"):
        subsets.select_classes(several(), 0, 2)
    part = subsets.hold_out(several())
    assert (len(part.train), len(part.test)) == (32, 8)


def test_files_can_be_split_into_subsets() -> None:
    files = Files(tuple(f"{i}.png" for i in range(10)), torch.arange(10) % 2)
    taken = files.take(torch.tensor([7, 2]), torch.tensor([0, 1]))
    assert taken.paths == ("7.png", "2.png")
    assert taken.labels.tolist() == [0, 1]
    assert files.take(torch.tensor([7, 2])).labels.tolist() == [1, 0]
    part = subsets.hold_out(dataclasses.replace(small(), train=files, num_classes=2))
    assert len(part.test) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "cifr10"}, r"data.name: expected one of digits, .*, got 'cifr10' \(did you mean 'cifar10'\?\)"),
        ({"options": {"size": 3}}, "data.options.size: digits has no such option; it has none"),
        ({"statistics": "imagenet"}, "data.statistics: ImageNet's are of 3 channels, digits has 1"),
        ({"name": "food101", "options": {"split": "x"}}, "data.options.split: food101 has no such option"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_data(Data(**settings))


def test_every_name_is_known() -> None:
    assert len(set(DATASETS)) == len(DATASETS)
    assert {"digits", "glyphs", "cifar10", "cifar100", "folder", "food101", "voc2007"} <= set(DATASETS)


def test_seeds_are_functions_of_their_parts() -> None:
    different = {
        seeds.mix(*parts) for parts in [(1, 2), (2, 1), (1, 2, 0), (12,), (1, "2"), ("order", 1, 2), ("views", 1, 2)]
    }
    assert len(different) == 7
    assert all(0 <= seed < 2**63 for seed in different)
    assert seeds.mix(42, "order", 0) == 1608622093565479053  # the same on every machine and in every version
    assert torch.equal(*(torch.rand(3, generator=seeds.generator(1, "a")) for _ in range(2)))
