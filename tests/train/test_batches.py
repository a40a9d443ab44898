"""Batches are functions of seed, epoch and step, for any number of ranks and workers and any first step."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nckernels.train import vision
from nckernels.train.data import Batches, DataError, Dataset, Files, Memory, passes, sets
from nckernels.train.recipe import Recipe

AUGMENT = {"augment.crop": (0.3, 1.0), "augment.flip": 0.5, "augment.rotate": 20.0}
VIEWS = {**AUGMENT, "augment.views": 2, "loss.name": "scl"}


def recipe(**settings: Any) -> Recipe:
    return Recipe().replace(**{"run.batch_size": 10, "run.seed": 5, "data.workers": 0, **settings})


def in_memory(count: int = 47, classes: int = 3, *, bytes_: bool = True) -> Dataset:
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=random)
    labels = torch.arange(count) % classes
    split = Memory(images if bytes_ else images / 255, labels)
    return sets.in_memory(split, Memory(split.images[:23], labels[:23]), map(str, range(classes)))


def drawn(dataset: Dataset, settings: Recipe, epoch: int = 0, start: int = 0, **ranks: int) -> list[tuple[Tensor, ...]]:
    return list(Batches(dataset, settings, "cpu", **ranks).epoch(epoch, start))


def same(a: list[tuple[Tensor, ...]], b: list[tuple[Tensor, ...]]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True)
    )


def rows_of(batch: Tensor, dataset: Dataset) -> list[int]:
    """The indices of training images, found by their pixels, which were only normalised."""
    assert isinstance(dataset.train, Memory)
    mean, std = (torch.tensor(values)[:, None, None] for values in (dataset.mean, dataset.std))
    pixels = ((batch * std + mean) * 255).round().to(torch.uint8)
    equal = (pixels[:, None] == dataset.train.images[None]).flatten(2).all(2)
    assert (equal.sum(1) == 1).all()
    return equal.int().argmax(1).tolist()


def test_an_epoch_has_full_batches_of_different_samples() -> None:
    dataset = in_memory()
    made = Batches(dataset, recipe(), "cpu")
    assert made.steps_per_epoch == 4
    found = []
    for images, labels in made.epoch(0):
        assert images.shape == (10, 3, 8, 8)
        rows = rows_of(images, dataset)
        assert labels.tolist() == [i % 3 for i in rows]
        found += rows
    assert len(set(found)) == 40
    orders = [[rows_of(x, dataset) for x, _ in made.epoch(epoch)] for epoch in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    other = [rows_of(x, dataset) for x, _ in drawn(dataset, recipe(**{"run.seed": 6}))]
    assert other != orders[0]


def test_images_are_normalised() -> None:
    dataset = in_memory(40)
    whole = torch.cat([x for x, _ in drawn(dataset, recipe())])
    torch.testing.assert_close(whole.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(whole.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0)
    floats = torch.cat([x for x, _ in drawn(in_memory(40, bytes_=False), recipe())])
    torch.testing.assert_close(floats, whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("settings", [{}, AUGMENT, VIEWS, {"data.balanced": True}, {**VIEWS, "data.balanced": True}])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_share_the_batches_of_one_process(settings: dict[str, Any], ranks: int) -> None:
    dataset = in_memory()
    alone = drawn(dataset, recipe(**settings), epoch=2)
    shares = [drawn(dataset, recipe(**settings), epoch=2, rank=r, world_size=ranks) for r in range(ranks)]
    for step, (images, labels) in enumerate(alone):
        torch.testing.assert_close(torch.cat([share[step][0] for share in shares]), images, rtol=0, atol=1e-6)
        assert torch.equal(torch.cat([share[step][1] for share in shares]), labels)
    assert [len(share[0][1]) for share in shares] == [(r + 1) * 10 // ranks - r * 10 // ranks for r in range(ranks)]


@pytest.mark.parametrize("settings", [{}, AUGMENT, VIEWS, {"data.balanced": True}])
def test_an_epoch_resumes_at_any_step(settings: dict[str, Any]) -> None:
    dataset = in_memory()
    whole = drawn(dataset, recipe(**settings), epoch=1)
    for start in range(5):
        assert same(drawn(dataset, recipe(**settings), epoch=1, start=start), whole[start:])


def test_batches_leave_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    drawn(in_memory(), recipe(**VIEWS))
    assert torch.equal(torch.get_rng_state(), before)


def test_views_differ_and_come_with_one_label_each() -> None:
    (images, labels), *_ = drawn(in_memory(), recipe(**VIEWS))
    assert images.shape == (10, 2, 3, 8, 8)
    assert labels.shape == (10,)
    assert (images[:, 0] != images[:, 1]).flatten(1).any(1).all()
    first, second = (drawn(in_memory(), recipe(**AUGMENT), epoch=epoch)[0][0] for epoch in (0, 1))
    assert first.shape == (10, 3, 8, 8)
    assert not torch.equal(first, second)


def test_balanced_batches_have_no_long_tail() -> None:
    labels = torch.tensor([0] * 180 + [1] * 15 + [3] * 5)  # and no sample of class 2
    images = torch.arange(200).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).to(torch.uint8)
    split = Memory(images, labels)
    dataset = sets.in_memory(split, split, "abcd")
    settings = recipe(**{"data.balanced": True, "run.batch_size": 100})
    made = Batches(dataset, settings, "cpu")
    assert made.steps_per_epoch == 2
    seen = [pair for epoch in range(20) for pair in made.epoch(epoch)]
    found = torch.cat([y for _, y in seen])
    shares = torch.bincount(found, minlength=4) / len(found)
    assert shares[2] == 0
    assert (shares[[0, 1, 3]] - 1 / 3).abs().max() < 0.03  # 3.4 standard deviations of 4000 draws are 0.025
    rows = torch.cat([(x[:, 0, 0, 0] * dataset.std[0] + dataset.mean[0]) * 255 for x, _ in seen]).round().long()
    assert torch.equal(labels[rows], found)
    assert set(range(180, 200)) <= set(rows.tolist())


def test_images_are_resized_to_the_input_size_of_the_network() -> None:
    dataset = dataclasses.replace(in_memory(), image_size=12)
    (images, _), *_ = drawn(dataset, recipe(**VIEWS))
    assert images.shape == (10, 2, 3, 12, 12)
    assert next(iter(passes(dataset, dataset.test, recipe(), "cpu")))[0].shape == (23, 3, 12, 12)


@pytest.mark.parametrize("ranks", [1, 2, 3, 30])
def test_passes_have_every_sample_once_and_in_order(ranks: int) -> None:
    dataset = in_memory()
    found, labels, sizes = [], [], []
    for rank in range(ranks):
        parts = list(passes(dataset, dataset.test, recipe(**VIEWS), "cpu", rank=rank, world_size=ranks, batch_size=5))
        found += [i for x, _ in parts for i in rows_of(x, dataset)]
        labels += [y for _, part in parts for y in part.tolist()]
        sizes.append(sum(len(y) for _, y in parts))
        assert all(1 <= len(y) <= 5 for _, y in parts)
    assert found == list(range(23))
    assert labels == [i % 3 for i in range(23)]
    assert max(sizes) - min(sizes) <= 1


def test_bad_batch_sizes_are_named() -> None:
    with pytest.raises(ValueError, match=r"run.batch_size: expected at most 47, the size of the training set, got 48"):
        Batches(in_memory(), recipe(**{"run.batch_size": 48}), "cpu")
    with pytest.raises(ValueError, match=r"run.batch_size: expected at least one sample for each of 11 ranks"):
        Batches(in_memory(), recipe(), "cpu", rank=0, world_size=11)
    split = Memory(torch.rand(40, 1, 2, 2), torch.ones(40, 3))
    with pytest.raises(ValueError, match=r"data.balanced: .* several labels"):
        Batches(sets.in_memory(split, split, "abc"), recipe(**{"data.balanced": True}), "cpu")


# Files


def pixels(picture: Any) -> Tensor:
    """A transform with nothing random."""
    return torch.tensor(list(picture.tobytes()), dtype=torch.float32).view(picture.height, picture.width, 3)


def noisy(picture: Any) -> Tensor:
    """A transform that draws from torch's generator, as torchvision's do."""
    return pixels(picture) + torch.rand(())


def deadly(picture: Any) -> Tensor:
    if picture.getpixel((0, 0))[0] == 33:
        os._exit(9)
    return pixels(picture)


def group(picture: Any) -> Tensor:
    return torch.tensor(os.getpgrp())


def use(monkeypatch: pytest.MonkeyPatch, train: Any, evaluation: Any) -> None:
    """These transforms, in place of torchvision's."""
    monkeypatch.setattr(vision, "train_transform", lambda *_, **__: train)
    monkeypatch.setattr(vision, "eval_transform", lambda *_, **__: evaluation)


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """Forty images, read without torchvision."""
    use(monkeypatch, noisy, pixels)
    return gray_images(tmp_path)


def gray_images(folder: Path) -> Dataset:
    """Images of one grey each, which identifies the image."""
    image = pytest.importorskip("PIL.Image")
    paths = [folder / f"{i}.png" for i in range(40)]
    for i, path in enumerate(paths):
        image.new("RGB" if i % 2 else "L", (4, 4), (i, i, i) if i % 2 else i).save(path)
    split = Files(tuple(paths), torch.arange(40) % 4)
    return Dataset(split, split.take(torch.arange(15)), 4, tuple("abcd"), 3, 4, (0.0,) * 3, (1.0,) * 3)


@pytest.mark.parametrize("settings", [{}, VIEWS])
def test_file_batches_do_not_depend_on_workers_ranks_or_the_first_step(
    settings: dict[str, Any], pictures: Dataset
) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    alone = [drawn(pictures, recipe(**settings), epoch=epoch) for epoch in (0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    assert len(alone[0]) == 4
    assert alone[0][0][0].shape == ((10, 2, 4, 4, 3) if settings else (10, 4, 4, 3))
    for made in alone:
        for images, labels in made:
            which = images.flatten(1)[:, 0].floor().long()
            assert torch.equal(which % 4, labels)
        assert len({i for x, _ in made for i in x.flatten(1)[:, 0].floor().tolist()}) == 40
    assert not same(*alone)
    workers = Batches(pictures, recipe(**settings, **{"data.workers": 2}), "cpu")
    assert same(list(workers.epoch(0)), alone[0])
    assert same(list(workers.epoch(1, 2)), alone[1][2:])  # the same processes, in the middle of another epoch
    assert torch.equal(torch.get_rng_state(), before)
    shares = [drawn(pictures, recipe(**settings), rank=r, world_size=3) for r in range(3)]
    assert same([tuple(map(torch.cat, zip(*parts, strict=True))) for parts in zip(*shares, strict=True)], alone[0])


def test_views_of_files_differ(pictures: Dataset) -> None:
    noise = torch.cat([x for x, _ in drawn(pictures, recipe(**VIEWS))])[:, :, 0, 0, 0] % 1
    assert len(noise.unique()) > 75  # 80 draws, few of them the same in float32


def test_an_epoch_may_be_left_in_the_middle(pictures: Dataset) -> None:
    made = Batches(pictures, recipe(**{"data.workers": 2}), "cpu")
    next(iter(made.epoch(0)))
    assert same(list(made.epoch(1)), drawn(pictures, recipe(), epoch=1))


def test_passes_over_files(pictures: Dataset) -> None:
    for workers in (0, 2):
        settings = recipe(**{"data.workers": workers})
        parts = [
            pair
            for rank in range(2)
            for pair in passes(pictures, pictures.test, settings, "cpu", rank=rank, world_size=2, batch_size=4)
        ]
        assert torch.cat([x for x, _ in parts])[:, 0, 0, 0].tolist() == list(range(15))
        assert torch.cat([y for _, y in parts]).tolist() == [i % 4 for i in range(15)]


@pytest.mark.parametrize(("settings", "most"), [({"run.batch_size": 6}, 6), ({"run.micro_batch_size": 2}, 2)])
def test_passes_over_files_have_no_larger_batches_than_training(
    settings: dict[str, int], most: int, pictures: Dataset
) -> None:
    sizes = [len(y) for _, y in passes(pictures, pictures.test, recipe(**{"data.workers": 0, **settings}), "cpu")]
    assert max(sizes) == most
    assert sum(sizes) == 15


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named(workers: int, pictures: Dataset) -> None:
    assert isinstance(pictures.test, Files)
    Path(pictures.test.paths[7]).write_bytes(b"no image")
    with pytest.raises(DataError, match=r"7.png: the image cannot be read \(cannot identify .*data.skip_unreadable"):
        list(passes(pictures, pictures.test, recipe(**{"data.workers": workers}), "cpu", batch_size=4))


@pytest.mark.parametrize(
    "error",
    [RuntimeError("DataLoader worker (pid 1) exited unexpectedly"), EOFError(), ConnectionResetError("reset by peer")],
)
def test_a_worker_that_dies_is_an_error(error: Exception, pictures: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> Iterator[Tensor]:
        yield torch.zeros(10, 4, 4, 3)
        raise error

    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", broken)
    with pytest.raises(DataError, match=r"one of the 1 processes that read images died .*data.workers"):
        drawn(pictures, recipe(**{"data.workers": 1}))


@pytest.mark.slow
def test_a_worker_that_is_killed_is_an_error(pictures: Dataset) -> None:
    # In a process of its own: PyTorch's signal handler may raise its error wherever the main thread happens to be.
    assert isinstance(pictures.train, Files)
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r}); from train import test_batches as t; "
    code += f"t.read_until_a_worker_dies({str(Path(pictures.train.paths[0]).parent)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert "DataError: one of the 1 processes" in done.stderr or "DataLoader worker" in done.stderr


def read_until_a_worker_dies(folder: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        use(patch, deadly, pixels)
        drawn(gray_images(Path(folder)), recipe(**{"data.workers": 1}))


def test_files_need_torchvision(pictures: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for name in ("torchvision", "torchvision.transforms"):  # the second may have been imported already
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="pip install"):
        Batches(pictures, recipe(), "cpu")
    with pytest.raises(ImportError, match="pip install"):
        next(iter(passes(pictures, pictures.test, recipe(), "cpu")))


def test_files_through_torchvision(pictures: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision")
    image = pytest.importorskip("PIL.Image")
    monkeypatch.undo()
    assert isinstance(pictures.train, Files)
    for path in pictures.train.paths:
        image.effect_noise((30, 20), 80).convert("RGB").save(path)
    dataset = dataclasses.replace(pictures, image_size=16, mean=(0.5,) * 3, std=(0.25,) * 3)
    changes = {**VIEWS, "augment.jitter": (0.4, 0.4, 0.4, 0.1), "augment.grayscale": 0.2, "augment.blur": 0.5}
    alone = drawn(dataset, recipe(**changes), epoch=1)
    assert alone[0][0].shape == (10, 2, 3, 16, 16)
    assert (alone[0][0][:, 0] != alone[0][0][:, 1]).flatten(1).any(1).all()
    assert same(drawn(dataset, recipe(**changes, **{"data.workers": 2}), epoch=1, start=1), alone[1:])
    shares = [drawn(dataset, recipe(**changes), epoch=1, rank=r, world_size=2) for r in range(2)]
    assert same([tuple(map(torch.cat, zip(*parts, strict=True))) for parts in zip(*shares, strict=True)], alone)
    parts = list(passes(dataset, dataset.test, recipe(), "cpu"))
    assert [x.shape for x, _ in parts] == [(10, 3, 16, 16), (5, 3, 16, 16)]


@pytest.mark.skipif(not hasattr(os, "setpgrp"), reason="no process groups")
def test_a_signal_to_the_group_reaches_no_worker(pictures: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, noisy, group)
    found = torch.cat([x for x, _ in passes(pictures, pictures.test, recipe(**{"data.workers": 1}), "cpu")])
    assert os.getpgrp() not in found.tolist()
