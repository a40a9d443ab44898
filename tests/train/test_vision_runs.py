"""Trainings of torchvision's and timm's networks on files, as the ImageNet recipes have them, two steps long."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("timm")

from PIL import Image

from nckernels.__main__ import main
from nckernels.train import fit
from nckernels.train.data import imagenet_c
from nckernels.train.recipes import load

CLASSES = ("n01440764", "n01443537")


def picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = torch.randint(256, (40, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    Image.fromarray(pixels.numpy()).save(path)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight training images and four others, as ImageNet lies on disk."""
    folder = tmp_path_factory.mktemp("imagenet")
    for c, name in enumerate(CLASSES):
        for i in range(4):
            picture(folder / "train" / name / f"{name}_{i}.JPEG", 10 * c + i)
        for i in range(2):
            picture(folder / "val" / name / f"val_{i}.JPEG", 100 + 10 * c + i)
    return folder


def small(root: Path) -> list[str]:
    """Settings that make an ImageNet recipe two steps of four small images."""
    return [
        f"data.root={json.dumps(str(root))}",
        "data.workers=1",
        "data.image_size=64",
        "schedule.epochs=1",
        "schedule.warmup_epochs=0",
        "run.batch_size=4",
        "run.eval_every=1000",
        "run.log_every=1",
        'run.device="cpu"',
    ]


@pytest.mark.parametrize("recipe", ["imagenet1k/nonl", "imagenet100/ntce", "imagenet1k-scl/projection"])
def test_imagenet_recipes(recipe: str, root: Path, tmp_path: Path) -> None:
    run = fit(load(recipe, [*small(root), "run.metrics=false"]), tmp_path / "run", progress=False)
    assert run.history.finished
    assert run.history.steps[-1] == 2
    assert run.history.loss[-1] == run.history.loss[-1]  # a number
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["grad_norm"] > 0 for line in lines)


@pytest.mark.parametrize("name", ["timm:resnet18", "torchvision:mobilenet_v3_small"])
def test_other_networks(name: str, root: Path) -> None:
    settings = [*small(root), f'model.name="{name}"', 'model.projection="linear"', "model.dim=16"]
    run = fit(load("imagenet1k/normface", settings), progress=False)
    assert run.history.finished
    assert len(run.history.metrics["nc1"]) == 2


def test_training_probing_and_corruptions(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A network, its linear probe, and ImageNet-C from the command line."""
    network = ['model.name="timm:resnet18"', "model.dim=512", "run.metrics=false"]
    options = [part for setting in [*small(root), *network] for part in ("--set", setting)]
    pretrained, probed = tmp_path / "pretrained", tmp_path / "probed"
    assert main(["train", "imagenet1k/nonl", *options, "--out", str(pretrained), "--quiet"]) == 0
    init = ["--set", f"model.init={json.dumps(str(pretrained))}"]
    assert main(["train", "imagenet-probe/imagenet1k-lp", *options, *init, "--out", str(probed), "--quiet"]) == 0
    before = torch.load(pretrained / "checkpoint.pt", weights_only=True)["network"]
    after = torch.load(probed / "checkpoint.pt", weights_only=True)["network"]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)

    corrupted = tmp_path / "imagenet-c"
    for corruption in imagenet_c.CORRUPTIONS:
        for severity in range(1, 6):
            for c, name in enumerate(CLASSES):
                picture(corrupted / corruption / str(severity) / name / "val_0.JPEG", 1000 + c)
    numbers = tmp_path / "c.json"
    capsys.readouterr()
    arguments = ["evaluate", str(pretrained), "--on", "imagenet-c", "--root", str(corrupted), "--device", "cpu"]
    assert main([*arguments, "--json", str(numbers)]) == 0
    assert "mCE" in capsys.readouterr().out
    assert os.path.getsize(numbers) > 100
