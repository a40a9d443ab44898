"""The output of ``--dry-run``: sizes against arithmetic, memory against measurements."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_memory import FORMS, MIB, Case, make, naive, replay, step
from torch import Tensor

import nckernels
from nckernels.train import plan, recipes
from nckernels.train.recipe import Recipe, differences


def facts(name: str, *settings: str) -> str:
    """The part after the settings."""
    return plan.describe(recipes.load(name, settings)).rpartition("\n\n")[2]


@pytest.mark.parametrize("name", ["digits", "cifar100/nonl", "dlp-cifar100/psc-star", "glyphs/scl"])
def test_the_output_is_a_valid_recipe_file(name: str, tmp_path: Path) -> None:
    recipe = recipes.load(name, ['data.root="a \\"b\\" \\\\ ü"', "optimizer.lr=1e-7"])
    path = tmp_path / "again.toml"
    path.write_text(plan.describe(recipe), encoding="utf-8")
    again = recipes.load(str(path))
    assert differences(recipe, again) == []
    assert (again.title, again.source) == (recipe.title, recipe.source)


def test_parameters_of_the_small_network() -> None:
    """3 x 3 convolutions without bias, batch norm of two vectors, a linear layer."""
    blocks = 9 * (1 * 16 + 16 * 32 + 32 * 64) + 2 * (16 + 32 + 64)
    assert f"model: convnet, {blocks + 64 * 64 + 64:,} parameters; 64 (encoder) -> 64" in facts("digits/nonl")
    assert "classifier: 640 learned parameters" in facts("digits/nonl")
    assert "classifier: 650 learned parameters" in facts("digits/ce")
    assert "classifier: class means, nothing to learn" in facts("digits/scl")
    assert "classifier: 640 fixed parameters" in facts("digits", "loss.name=dlp")


def test_parameters_of_resnet18() -> None:
    """11,689,512 with ImageNet's stem and classifier: 7 x 7 instead of 3 x 3 kernels, 513,000 in the classifier."""
    count = 11_689_512 - 513_000 - 3 * 64 * (49 - 9)
    assert f"model: resnet18, {count:,} parameters; 512 (encoder) -> 512" in facts("cifar100/nonl")


def test_a_missing_library_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise ImportError("torchvision:... needs torchvision: pip install torchvision")

    monkeypatch.setattr(plan.models, "make_network", missing)
    printed = facts("imagenet1k/nonl")
    assert "model: torchvision:resnet50; its parameters are not counted: torchvision:... needs torchvision" in printed
    assert "features (8,192 x 2048)" in printed


@pytest.mark.parametrize("name", ["imagenet1k/nonl", "dlp-imagenet/dynamic-swin-t"])
def test_networks_of_libraries_are_built(name: str) -> None:
    pytest.importorskip("torchvision")
    assert " parameters; " in facts(name)


@pytest.mark.parametrize(
    ("name", "settings", "line"),
    [
        ("cifar100/nonl", [], "steps: 97 an epoch, 97,000 in 1,000 epochs, batches of 512"),  # 50,000 / 512 = 97.7
        ("cifar100/nonl", ["run.batch_size=60000"], "steps: none, a batch of 60,000 is larger than the training set"),
        ("cifar100/nonl", ["data.validation=true"], "data: 40,000 training images of 3 x 32 x 32, 100 classes"),
        ("cifar10-lt/nonl", [], "data: 12,406 training images of 3 x 32 x 32, 10 classes"),  # the usual CIFAR-10-LT
        ("cifar100-lt/nonl", [], "data: 10,847 training images of 3 x 32 x 32, 100 classes"),
        # No class has more than 13,861 x 0.01 ** (c / 9) samples, and SVHN has 4,948 images of a 0.
        ("dlp-cifar-lt/svhn-dlp", [], "data: 25,484 training images of 3 x 32 x 32, 10 classes"),
        ("dlp-imagenet-lt/dynamic", [], "steps: 452 an epoch"),
        ("imagenet1k/nonl", [], "steps: 156 an epoch, 78,000 in 500 epochs, batches of 8,192"),
        ("glyphs/nonl", [], "data: 9,600 training images of 1 x 20 x 20, 100 classes"),
        ("glyphs/nonl", ["data.validation=true"], "data: 6,400 training images of 1 x 20 x 20, 100 classes"),
        ("glyphs/nonl", ["data.classes=[0, 50]"], "data: 4,800 training images of 1 x 20 x 20, 50 classes"),
        ("transfer/voc2007", [], "data: 5,011 training images of 3 x 224 x 224, 20 classes"),
        ("transfer/cifar10", [], "data: 50,000 training images of 3 x 224 x 224, 10 classes"),
        ("imagenet1k/nonl", ["data.root=elsewhere"], "steps: unknown, the size of folder is"),
        ("imagenet1k/nonl", ["data.root=elsewhere"], "memory of the loss: unknown, the number of classes is"),
    ],
)
def test_steps(name: str, settings: list[str], line: str) -> None:
    assert line in facts(name, *settings)


def test_folders_that_are_there_are_counted(tmp_path: Path) -> None:
    for label, count in (("a", 3), ("b", 5)):
        (tmp_path / "train" / label).mkdir(parents=True)
        for i in range(count):
            (tmp_path / "train" / label / f"{i}.png").touch()
    printed = facts("imagenet1k/nonl", f"data.root={tmp_path}", "run.batch_size=2")
    assert "data: 8 training images of 3 x 224 x 224, 2 classes" in printed
    assert "steps: 4 an epoch" in printed
    listed = tmp_path / "list.txt"
    for content, line in (("train/a/0.png 0\ntrain/b/1.png 1\n", "data: 2 training images"), (None, "steps: unknown")):
        listed.unlink() if content is None else listed.write_text(content)
        assert line in facts("imagenet1k/nonl", f"data.root={tmp_path}", f"data.options.train_list={listed}")


@pytest.mark.parametrize("name", [n for f in recipes.names() for n in (f, *(f"{f}/{r}" for r in recipes.rows(f)))])
def test_every_row_can_be_described(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Small:
        encoded_dim, dim = 8, 4

        def parameters(self) -> list[Tensor]:
            return [torch.zeros(3)]

    monkeypatch.setattr(plan.models, "make_network", lambda *_: Small())
    printed = facts(name)
    assert "steps: " in printed
    assert "unknown" not in printed
    assert "memory of the loss" in printed


def test_memory_by_hand() -> None:
    printed = facts("cifar100/nonl", "run.device=cpu")
    inputs = (2 * 512 * 512 + 2 * 100 * 512) * 4  # features, prototypes and their gradients
    assert f"features (512 x 512), prototypes and gradients: {inputs / MIB:.3g} MiB" in printed
    assert f"the naive form: {21 * 512 * 100 / MIB:.3g} MiB (21 bytes x M x K = 512 x 100" in printed
    views = facts("imagenet100-scl/projection", "run.device=cpu")
    assert f"the naive form: {19 * 2048**2 / MIB:.3g} MiB (19 bytes x N x N = 2,048 x 2,048" in views
    assert "no matrix of logits in any form" in facts("dlp-cifar100/dynamic")
    assert "PyTorch's own cross-entropy" in facts("cifar100/ce")


def test_the_workspace_is_the_one_that_is_set() -> None:
    with nckernels.use_workspace(3 * MIB):
        assert "3 MiB workspace" in facts("cifar100/nonl", "run.device=cpu")


def supcon(x: Tensor, y: Tensor) -> Tensor:
    """What a user writes: N x N, and autograd."""
    logits = F.normalize(x) @ F.normalize(x).T / 0.1
    self = torch.eye(len(x), dtype=torch.bool)
    same = (y[:, None] == y) & ~self
    logs = logits.masked_fill(self, -torch.inf).log_softmax(1)
    return -(logs.masked_fill(~same, 0).sum(1) / same.sum(1).clamp_min(1)).mean()


def ntce(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    logits = F.normalize(x) @ F.normalize(w).T / 0.1
    return (logits.logsumexp(0)[y] - logits.gather(1, y[:, None]).squeeze(1)).mean()


def prototype(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    u, counts = F.normalize(x), torch.bincount(y, minlength=len(w)).float()
    means = torch.zeros(len(w), x.shape[1]).index_add(0, y, u) / counts.clamp_min(1)[:, None]
    logits = u @ means.T / 0.1
    others = counts - (y[:, None] == torch.arange(len(w))).float()
    return ((logits + others.log()).logsumexp(1) - logits.gather(1, y[:, None]).squeeze(1)).mean()


NAIVE = {
    "ce": lambda x, w, y: F.cross_entropy(F.linear(x, w), y),
    "normface": functools.partial(naive, "normface"),
    "nonl": functools.partial(naive, "nonl"),
    "ntce": ntce,
    "scl": lambda x, _, y: supcon(x, y),
    "prototype": prototype,
}


def peak(form: str, case: Case) -> int:
    """Bytes beyond the inputs and their gradients."""
    x, w, y = make(case, case.samples, case.classes)
    most, _ = replay(functools.partial(step, form, x, w, y))
    return most - sum(t.nbytes for t in (x, w) if t.requires_grad)


@pytest.mark.parametrize("loss", NAIVE)
def test_naive_forms_take_the_stated_memory(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMS, "form", NAIVE[loss])
    case = Case("form", 2048, 1500, 32, None, grads="x" if loss in ("scl", "prototype") else "xw")
    augment = {"augment.views": 2} if loss in ("scl", "prototype") else {}
    entries, _ = plan.naive_entries(Recipe().replace(**{"loss.name": loss, **augment}), case.samples, case.classes)
    assert peak("form", case) == pytest.approx(plan.NAIVE_BYTES[loss] * entries, rel=0.06)


@pytest.mark.parametrize("loss", ["normface", "nonl", "ntce", "scl", "prototype"])
def test_fused_losses_stay_within_the_stated_memory(loss: str) -> None:
    """Twice the workspace would not."""
    contrastive = loss in ("scl", "prototype")
    form = {"scl": "supcon"}.get(loss, loss)
    case = Case(form, 2048, 1000, 64, MIB // 2, grads="x" if contrastive else "xw")
    recipe = Recipe().replace(**{"loss.name": loss, **({"augment.views": 2} if contrastive else {})})
    with nckernels.use_backend("chunked"), nckernels.use_workspace(MIB // 2):
        step(form, *make(case, 8, 4))
        most = peak(form, case)
    assert most <= MIB // 2 + plan.ours(recipe, case.samples, case.classes, case.dim)


def test_amounts() -> None:
    assert [plan.amount(n) for n in (0, 1023, 1024, 1536, 2**20, 1001 * 2**20, 5 * 2**40)] == [
        "0 bytes", "1023 bytes", "1 KiB", "1.5 KiB", "1 MiB", "1,001 MiB", "5,120 GiB",
    ]  # fmt: skip
    assert math.isclose(float(plan.amount(123_456_789).split()[0]), 123_456_789 / MIB, rel_tol=5e-3)
