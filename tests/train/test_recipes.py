"""The recipes of the package, against settings copied here from the papers."""

from __future__ import annotations

from typing import Any

import pytest

from nckernels.train import recipes
from nckernels.train.grid import plan
from nckernels.train.recipe import CONTRASTIVE
from nckernels.train.recipes_cli import main

ALL = [name for file in recipes.names() for name in (file, *(f"{file}/{row}" for row in recipes.rows(file)))]

SGD = {"optimizer.name": "sgd", "optimizer.momentum": 0.9}
COSINE = {"schedule.name": "cosine", "schedule.final": 0.1**3, "schedule.every": "epoch"}
VIEW = {"augment.crop": (0.2, 1.0), "augment.flip": 0.5}
TWO_VIEWS = {
    **VIEW,
    "augment.views": 2,
    "augment.jitter": (0.4, 0.4, 0.4, 0.1),
    "augment.jitter_probability": 0.8,
    "augment.grayscale": 0.2,
}
# [NCD] App. E.1 and E.2; seed of E.3.
TRAINED = {**SGD, **COSINE, "optimizer.weight_decay": 1e-4, "run.seed": 42}
CIFAR = {
    **TRAINED, **VIEW, "model.name": "resnet18", "model.projection": "none", "augment.views": 1,
    "schedule.epochs": 1000, "schedule.warmup_epochs": 0, "run.batch_size": 512, "optimizer.lr": 0.2,
    "optimizer.lr_batch": 0,
}  # fmt: skip
CIFAR_SCL = {
    **TRAINED, **TWO_VIEWS, "model.name": "resnet18", "loss.name": "scl", "augment.blur": 0.0,
    "schedule.epochs": 1000, "run.batch_size": 512, "optimizer.lr": 0.05,
}  # fmt: skip
IMAGENET = {
    **TRAINED, **VIEW, "model.name": "torchvision:resnet50", "model.projection": "none", "schedule.epochs": 500,
    "schedule.warmup_epochs": 10, "schedule.warmup_lr": 0.01, "optimizer.lr": 0.1, "optimizer.lr_batch": 256,
    "run.sync_batchnorm": True, "data.name": "folder",
}  # fmt: skip
IMAGENET_SCL = {
    **TRAINED, **TWO_VIEWS, "model.name": "torchvision:resnet50", "loss.name": "scl", "loss.temperature": 0.1,
    "schedule.epochs": 500, "schedule.warmup_lr": 0.01,
}  # fmt: skip
LINEAR = {
    **SGD, **VIEW, "optimizer.weight_decay": 0.0, "schedule.name": "step", "schedule.gamma": 0.2,
    "model.freeze": True, "model.projection": "none", "schedule.warmup_epochs": 0, "optimizer.lr_batch": 0,
}  # fmt: skip
CIFAR_LINEAR = {**LINEAR, "schedule.epochs": 100, "schedule.milestones": (60, 75, 90), "optimizer.lr": 5.0}
IMAGENET_LINEAR = {**LINEAR, "schedule.epochs": 90, "schedule.milestones": (30, 60, 80)}
# Tables 10 and 9, the temperatures in bold by number of classes.
BEST = {"normface": {10: 0.8, 100: 0.2}, "ntce": {10: 0.8, 100: 0.2}, "nonl": {10: 0.2, 100: 0.1}}

PAPER: dict[str, dict[str, Any]] = {
    "cifar-scl/cifar10": {**CIFAR_SCL, "data.name": "cifar10", "model.projection": "mlp", "model.dim": 128},
    "cifar-scl/cifar100": {**CIFAR_SCL, "data.name": "cifar100", "model.projection": "mlp", "model.dim": 128},
    "cifar100-no-projection/cifar10": {**CIFAR_SCL, "data.name": "cifar10", "model.projection": "none"},
    "cifar100-no-projection/cifar100": {**CIFAR_SCL, "data.name": "cifar100", "model.projection": "none"},
    "cifar-probe/cifar10-lp": {**CIFAR_LINEAR, "data.name": "cifar10", "loss.name": "ce"},
    "cifar-probe/cifar10-nlp": {**CIFAR_LINEAR, "data.name": "cifar10", "loss.name": "normface"},
    "cifar-probe/cifar100-lp": {**CIFAR_LINEAR, "data.name": "cifar100", "loss.name": "ce"},
    "cifar-probe/cifar100-nlp": {**CIFAR_LINEAR, "data.name": "cifar100", "loss.name": "normface"},
    "imagenet100-scl/projection": {
        **IMAGENET_SCL, "run.batch_size": 1024, "optimizer.lr": 0.8, "schedule.warmup_epochs": 10,
        "model.projection": "mlp", "model.dim": 128,
    },
    "imagenet100-scl/no-projection": {**IMAGENET_SCL, "run.batch_size": 1024, "model.projection": "none"},
    "imagenet1k-scl/projection": {
        **IMAGENET_SCL, "run.batch_size": 2048, "optimizer.lr": 0.1, "schedule.warmup_epochs": 5,
        "model.projection": "mlp", "model.dim": 128,
    },
    "imagenet-probe/imagenet100-lp": {**IMAGENET_LINEAR, "optimizer.lr": 2.0, "loss.name": "ce"},
    "imagenet-probe/imagenet100-nlp": {**IMAGENET_LINEAR, "optimizer.lr": 2.0, "loss.name": "normface"},
    "imagenet-probe/imagenet1k-lp": {**IMAGENET_LINEAR, "optimizer.lr": 0.8, "loss.name": "ce"},
    "imagenet-probe/imagenet1k-nlp": {**IMAGENET_LINEAR, "optimizer.lr": 0.8, "loss.name": "normface"},
    "transfer/voc2007": {**LINEAR, "loss.name": "bce", "data.name": "voc2007"},
    # [DLP] section 4.1, Tables 1 to 6.
    "dlp-cifar100/dynamic": {"model.name": "resnet32", "loss.name": "dlp", "loss.assignment": "dynamic"},
    "dlp-cifar100/static": {"model.name": "resnet32", "loss.name": "dlp", "loss.assignment": "static"},
    "dlp-cifar100/psc": {"model.name": "resnet32", "loss.name": "ce"},
    "dlp-cifar100/psc-star": {"model.name": "resnet32", "loss.name": "psc-star"},
    "dlp-imagenet/dynamic": {
        "model.name": "torchvision:resnet50", "model.dim": 512, "schedule.epochs": 100, "optimizer.name": "sgd",
    },
    "dlp-imagenet/psc-swin-t": {"model.name": "torchvision:swin_t", "optimizer.name": "adamw", "schedule.epochs": 100},
    "dlp-cifar-lt/cifar100-dlp": {"model.name": "resnet32", "model.dim": 128},
    "dlp-cifar-lt/cifar100-dlp-50": {"model.name": "resnet32", "model.dim": 50, "data.name": "cifar100"},
    "dlp-cifar100/etf": {"model.name": "resnet32", "loss.name": "etf-dr", "model.dim": 100},
    "dlp-cifar-lt/cifar10-dlp": {"model.name": "resnet32", "model.dim": 64, "data.name": "cifar10"},
    "dlp-cifar-lt/svhn-dlp": {"model.name": "resnet32", "model.dim": 64, "data.name": "svhn", "augment.flip": 0.0},
    "dlp-cifar-lt/stl10-etf": {"model.name": "resnet32", "model.dim": 64, "data.name": "stl10", "loss.name": "etf-dr"},
    "dlp-imagenet200/etf": {"model.name": "resnet32", "model.dim": 200, "loss.name": "etf-dr"},
    "dlp-imagenet-lt/dynamic": {"model.name": "torchvision:resnet50", "model.dim": 512, "loss.name": "dlp"},
    "dlp-imagenet-lt/etf": {"model.name": "torchvision:resnet50", "model.dim": 4096, "loss.name": "etf-dr"},
}  # fmt: skip
for loss in ("ce", "etf-dr", "normface", "ntce", "nonl"):
    for classes in (10, 100):
        expected = {**CIFAR, "data.name": f"cifar{classes}", "loss.name": loss}
        if loss in BEST:
            expected["loss.temperature"] = BEST[loss][classes]
        PAPER[f"cifar{classes}/{loss}"] = PAPER[f"cifar{classes}-lt/{loss}"] = expected
    PAPER[f"imagenet100/{loss}"] = {**IMAGENET, "loss.name": loss, "loss.temperature": 0.2, "run.batch_size": 1024}
    PAPER[f"imagenet1k/{loss}"] = {**IMAGENET, "loss.name": loss, "loss.temperature": 0.1}
    if loss != "etf-dr":
        for depth in (50, 101, 152):
            PAPER[f"imagenet100-backbones/resnet{depth}-{loss}"] = {
                **PAPER[f"imagenet100/{loss}"],
                "model.name": f"torchvision:resnet{depth}",
            }


@pytest.mark.parametrize("name", ALL)
def test_every_row_resolves_and_says_where_it_comes_from(name: str) -> None:
    recipe = recipes.load(name)
    assert recipe.name == name
    assert recipe.title
    assert recipe.source
    if recipe.model.freeze:
        assert recipe.model.init
    if recipe.loss.name in CONTRASTIVE:
        assert "FP" in recipe.run.probes


@pytest.mark.parametrize("name", PAPER)
def test_settings_are_the_papers(name: str) -> None:
    settings = recipes.load(name).flat()
    different = {key: settings[key] for key, value in PAPER[name].items() if settings[key] != pytest.approx(value)}
    assert different == {}


def test_every_row_of_the_papers_but_sweeps_and_glyphs_is_checked() -> None:
    ours = ("digits", "glyphs", "cifar-temperature-batch")
    rows = {name for name in ALL if "/" in name and not name.startswith(ours)}
    unchecked = {name for name in rows - set(PAPER) if not name.startswith(("transfer/", "dlp-"))}
    assert unchecked == {"imagenet1k-scl/no-projection"}  # nothing but the projection, Table 8


@pytest.mark.parametrize(
    ("name", "grid", "count"),
    [
        ("imagenet1k", {"run.batch_size": [2048, 4096, 8192]}, 12),  # Table 11: four losses
        ("cifar10-lt", {"data.imbalance": [0.1, 0.02, 0.01]}, 15),  # Table 6
        ("cifar100-lt", {"data.imbalance": [0.1, 0.02, 0.01]}, 15),
        ("dlp-cifar100", {"model.dim": [10, 25, 50, 100]}, 16),  # Table 1
        ("dlp-imagenet200", {"model.dim": [25, 50, 100, 200]}, 12),
        ("dlp-cifar-lt", {"data.imbalance": [0.005, 0.01, 0.02]}, 39),  # Tables 4 and 6
        (
            "cifar-temperature-batch",  # App. G.2
            {
                "loss.temperature": [0.07, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0],
                "run.batch_size": [32, 64, 128, 256, 512, 1024, 2048],
            },
            2 * 3 * 11 * 7,
        ),
    ],
)
def test_sweeps_cover_the_tables(name: str, grid: dict[str, list[float]], count: int) -> None:
    sweep = plan(name)
    assert dict(sweep.grid) == grid
    assert len(sweep.runs()) == count


@pytest.mark.parametrize("name", [n for n in recipes.names() if n != "cifar-temperature-batch"])
def test_every_recipe_can_be_swept(name: str) -> None:
    assert plan(name).runs()


def test_probes_and_transfer_start_from_folders_that_sweeps_make() -> None:
    for name in ALL:
        init = recipes.load(name).model.init
        if init:
            runs, recipe, folder = init.split("/")
            assert runs == "runs"
            assert folder in {run.row for run in plan(recipe).runs()}


def test_transfer_goes_to_the_eight_data_sets_of_table_4() -> None:
    in_memory = {recipes.load(f"transfer/{row}").data.statistics for row in ("cifar10", "cifar100")}
    assert in_memory == {"imagenet"}  # those of the frozen encoder, as for files
    assert recipes.rows("transfer") == ("food", "cifar10", "cifar100", "cars", "dtd", "pets", "flowers", "voc2007")


def test_listing_and_printing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    listed = capsys.readouterr().out
    for name in recipes.names():
        assert name in listed
        assert recipes.read(name)[0]["title"] in listed
    assert main(["cifar100"]) == 0
    assert capsys.readouterr().out == (recipes.FOLDER / "cifar100.toml").read_text(encoding="utf-8")
    assert main(["cifar100/nonl"]) == 0
    assert "temperature = 0.1\n" in capsys.readouterr().out


def test_a_recipe_that_is_not_there_ends_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["cifar100-l"])
    assert exit_.value.code == 2
    assert "did you mean 'cifar100-lt'?" in capsys.readouterr().err
