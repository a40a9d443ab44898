"""``python -m nckernels evaluate`` on the folder of a run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("torchmetrics")

from nckernels.__main__ import main as program
from nckernels.train import corruptions, evaluate_cli
from nckernels.train.data import Dataset, imagenet_c, passes
from nckernels.train.engine import fit
from nckernels.train.recipes import load

TINY = ["schedule.epochs=4", "run.batch_size=256", "model.width=4", "model.dim=16", "run.device=cpu"]
CPU = ["--device", "cpu"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of a run with prototypes and of one without."""
    folder = tmp_path_factory.mktemp("runs")
    for row in ("ce", "scl"):
        fit(load(f"digits/{row}", [*TINY, "run.probes=[]"]), folder / row, progress=False)
    return folder


def history(folder: Path) -> dict:
    return json.loads((folder / "history.json").read_text())


@pytest.mark.parametrize("row", ["ce", "scl"])
def test_the_test_set_is_measured_as_in_training(row: str, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = runs / f"{row}-test.json"
    random = torch.get_rng_state()
    assert program(["evaluate", str(runs / row), "--json", str(out), *CPU]) == 0
    assert torch.equal(random, torch.get_rng_state())
    values, before = json.loads(out.read_text()), history(runs / row)
    assert values["test_accuracy"] == before["test_accuracy"][-1]
    assert values["train_accuracy"] == before["train_accuracy"][-1]
    for name, series in before["metrics"].items():
        assert values["metrics"][name] == (series[-1] if series[-1] is None else pytest.approx(series[-1], rel=1e-4))
    printed = capsys.readouterr().out
    assert printed.startswith(f"digits/{row}: accuracy {before['train_accuracy'][-1]:.2%} train")
    assert all(name in printed for name in before["metrics"])


def test_corruptions_against_a_baseline(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = runs / "corruptions.json"
    scl, ce = str(runs / "scl"), str(runs / "ce")
    assert evaluate_cli.main([scl, "--on", "corruptions", "--baseline", ce, "--json", str(out), *CPU]) == 0
    values = json.loads(out.read_text())
    assert values["clean"] == pytest.approx(1 - history(runs / "scl")["test_accuracy"][-1])
    assert values["errors"].keys() == corruptions.CORRUPTIONS.keys()
    assert {len(series) for series in values["errors"].values()} == {5}
    assert values["mce"] > 0
    head, clean, *rows, last = capsys.readouterr().out.splitlines()
    assert head.split() == ["error,", "%", "1", "2", "3", "4", "5", "mean", "CE,", "%"]
    assert clean.split() == ["clean", f"{100 * values['clean']:.1f}"]
    assert [row.split()[0] for row in rows] == list(corruptions.CORRUPTIONS)
    assert last.split()[-1] == f"{100 * values['mce']:.1f}"
    assert evaluate_cli.main([ce, "--on", "corruptions", "--baseline", ce, *CPU]) == 0
    assert {line.split()[-1] for line in capsys.readouterr().out.splitlines()[2:]} == {"100.0"}


def test_imagenet_c_is_divided_by_alexnet(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the run's test set in the place of every corruption."""
    run = evaluate_cli.load(runs / "ce", torch.device("cpu"))
    asked = []

    def read(root: str, corruption: str, severity: int, class_names: object) -> object:
        asked.append((root, corruption, severity))
        assert list(class_names) == list(run.data.class_names)  # type: ignore[call-overload]
        return run.data.test

    monkeypatch.setattr(imagenet_c, "read", read)
    out = runs / "imagenet-c.json"
    arguments = ["--on", "imagenet-c", "--root", "somewhere", "--json", str(out)]
    assert evaluate_cli.main([str(runs / "ce"), *arguments, *CPU]) == 0
    values = json.loads(out.read_text())
    assert asked == [("somewhere", name, severity) for name in imagenet_c.CORRUPTIONS for severity in range(1, 6)]
    alexnet = imagenet_c.ALEXNET.values()
    assert values["mce"] == pytest.approx(values["clean"] * sum(1 / error for error in alexnet) / len(alexnet))
    assert capsys.readouterr().out.splitlines()[-1].split()[-1] == f"{100 * values['mce']:.1f}"


def test_the_images_of_imagenet_c_are_not_cropped_again(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    image = pytest.importorskip("PIL.Image")
    names = ("a", "b")
    pixels = torch.randint(256, (224, 224, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for name in names:
        folder = tmp_path / "fog" / "3" / name
        folder.mkdir(parents=True)
        image.fromarray(pixels.numpy()).save(folder / "1.png")
    files = imagenet_c.read(tmp_path, "fog", 3, names)
    data = Dataset(files, files, 2, names, 3, 224, (0.0,) * 3, (1.0,) * 3)
    recipe = load("digits/ce", ["data.workers=0"])
    ((images, labels),) = passes(data, files, recipe, "cpu")
    assert labels.tolist() == [0, 1]
    assert torch.equal((255 * images).round().byte(), pixels.permute(2, 0, 1).expand(2, -1, -1, -1))
    ((images, _),) = passes(data, dataclasses.replace(files, cropped=False), recipe, "cpu")
    assert images.shape == (2, 3, 224, 224)
    assert not torch.equal((255 * images).round().byte(), pixels.permute(2, 0, 1).expand(2, -1, -1, -1))


def test_probes(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = runs / "probes.json"
    assert evaluate_cli.main([str(runs / "scl"), "--probes", "--json", str(out), *CPU]) == 0
    results = json.loads(out.read_text())["classifiers"]
    assert [result["name"] for result in results] == ["FP", "LP", "NLP"]
    assert results[0]["accuracy"] == pytest.approx(history(runs / "scl")["test_accuracy"][-1])
    assert "normalised probe (NLP)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ce", "--on", "imagenet-c"], "--on imagenet-c needs --root"),
        (["ce", "--baseline", "scl"], "--baseline needs --on corruptions"),
        (["nothing"], "no run with a checkpoint"),
        (["ce", "--device", "quantum"], "--device: 'quantum' cannot be used here"),
        (["damaged"], "checkpoint.pt: damaged"),
    ],
)
def test_bad_arguments(
    arguments: list[str], message: str, runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs)
    damaged = runs / "damaged"
    damaged.mkdir(exist_ok=True)
    (damaged / "recipe.json").write_bytes((runs / "ce" / "recipe.json").read_bytes())
    (damaged / "checkpoint.pt").write_bytes((runs / "ce" / "checkpoint.pt").read_bytes()[:2000])
    with pytest.raises(SystemExit) as stop:
        evaluate_cli.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_missing_data(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        evaluate_cli.main([str(runs / "ce"), "--on", "imagenet-c", "--root", "nowhere", *CPU])
    assert stop.value.code == 1
    assert "imagenet-c: there is no nowhere" in capsys.readouterr().err
