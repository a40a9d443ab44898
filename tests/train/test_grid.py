"""The runs of a sweep: rows, grid and seeds, and the names of their folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from nckernels.train import recipes
from nckernels.train.grid import plan


def test_rows_times_grid_times_seeds() -> None:
    sweep = plan("digits", ["run.batch_size=64"], ["nonl", "ntce"], [0, 1], {"loss.temperature": [0.1, 0.2]})
    runs = sweep.runs()
    assert [run.name for run in runs] == [
        f"{row}_temperature={t}_seed={seed}" for row in ("nonl", "ntce") for t in (0.1, 0.2) for seed in (0, 1)
    ]
    for run in runs:
        recipe = recipes.load(run.recipe, run.settings)
        assert (recipe.name, recipe.run.batch_size, recipe.run.seed) == (f"digits/{run.row}", 64, run.seed)
        assert recipe.loss.temperature == dict(run.point)["loss.temperature"]


def test_run_names_show_only_settings_with_several_values() -> None:
    assert [run.name for run in plan("digits", rows=["nonl"], grid={"model.dim": [32]}).runs()] == ["nonl"]
    assert [run.name for run in plan("digits/nonl").runs()] == ["nonl"]
    grid = {"model.name": ["timm:a/b", "convnet"], "data.name": ["digits"], "loss.temperature": [0.1]}
    assert [run.name for run in plan("digits/ce", grid=grid).runs()] == [
        "ce_model.name=timm-a-b",
        "ce_model.name=convnet",
    ]
    crops = {"augment.crop": [[0.2, 1.0], [1.0, 1.0]]}
    assert [run.name for run in plan("digits/ce", grid=crops).runs()] == ["ce_crop=0.2-1.0", "ce_crop=1.0-1.0"]


def test_sweep_section_sets_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        '[rows.a.loss]\nname = "nonl"\n[rows.b.loss]\nname = "ntce"\n[rows.c.loss]\nname = "ce"\n[sweep]\n'
        'rows = ["a", "b"]\nseeds = [1, 2]\ngrid = { "model.dim" = [8, 16] }\n'
    )
    assert len(plan(str(path)).runs()) == 8
    assert plan(str(path), rows=["c"]).rows == ("c",)
    assert plan(str(path), seeds=[5]).seeds == (5,)
    assert dict(plan(str(path), grid={"model.dim": [4]}).grid) == {"model.dim": [4]}
    run = plan(str(path)).runs()[0]
    assert recipes.load(run.recipe, run.settings).model.dim == 8
    path.write_text('title = "no rows"\n')
    assert [run.name for run in plan(str(path)).runs()] == ["mine"]


def test_a_wrong_sweep_section_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    for text, message in (
        ("[sweep]\nseed = [1]", r"sweep\.seed \(did you mean 'seeds'\?\)"),
        ("sweep = 1", "sweep: expected a section"),
        ("[sweep]\ngrid = [1]", r"sweep\.grid: expected a section"),
        ("[sweep]\nseeds = 3", "seeds: expected a list"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            plan(str(path))
