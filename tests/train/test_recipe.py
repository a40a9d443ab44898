"""Settings of a run: valid and invalid ones, and the messages of errors."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from nckernels.train import recipes, typed
from nckernels.train.recipe import Recipe, differences, from_dict

OWN = """
title = "mine"
[loss]
name = "normface"
options = { label_smoothing = 0.1 }
[rows.warm]
loss = { temperature = 0.5 }
[rows.queue.loss]
name = "nonl"
queue = 64
options = { direction = "both" }
[sweep]
seeds = [1, 2]
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(OWN)
    return path


def test_the_defaults_are_a_recipe_and_survive_json() -> None:
    recipe = Recipe()
    assert from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert from_dict({}) == recipe


def test_a_recipe_with_everything_changed_survives_json() -> None:
    recipe = from_dict(
        {
            "title": "t",
            "data": {"name": "glyphs", "classes": [2, 9], "imbalance": 0.1, "options": {"num_classes": 12}},
            "augment": {"views": 3, "crop": [0.2, 1], "jitter": [0.4, 0.4, 0.4, 0.1]},
            "loss": {"name": "scl", "queue": 8},
            "schedule": {"name": "step", "milestones": [3, 5], "epochs": 9},
            "run": {"probes": ["FP", "LP"]},
        }
    )
    again = from_dict(json.loads(json.dumps(recipe.to_dict())))
    assert again == recipe
    assert recipe.augment.crop == (0.2, 1.0)
    assert isinstance(recipe.augment.crop[1], float)
    assert recipe.schedule.milestones == (3, 5)
    assert recipe.run.probes == ("FP", "LP")


def test_settings_cannot_be_assigned() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().loss.temperature = 0.2  # type: ignore[misc]


def test_flat_and_nested_undo_each_other() -> None:
    content = {"a": {"b": 1, "c": {"d": [2]}}, "e": "x"}
    assert dict(typed.flat(content)) == {"a.b": 1, "a.c.d": [2], "e": "x"}
    assert typed.nested(typed.flat(content)) == content


def test_merge_changes_neither_argument() -> None:
    base, change = {"a": {"b": 1, "c": 2}}, {"a": {"b": 3}, "d": 4}
    assert typed.merge(base, change) == {"a": {"b": 3, "c": 2}, "d": 4}
    assert (base, change) == ({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}, "d": 4})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"loss": {"temprature": 0.1}}, "unknown key loss.temprature (did you mean 'loss.temperature'?)"),
        ({"temperature": 0.1}, "unknown key temperature (did you mean 'loss.temperature'?)"),
        ({"optimiser": {"lr": 1.0}}, "unknown key optimiser"),
        ({"run": {"lr": 1.0}}, "unknown key run.lr (did you mean 'optimizer.lr'?)"),
        ({"loss": 3}, "loss: expected a section, got 3"),
        ({"loss": {"name": "noln"}}, "loss.name: expected one of ce, normface"),
        ({"loss": {"name": "noln"}}, "(did you mean 'nonl'?)"),
        ({"loss": {"temperature": "hot"}}, "loss.temperature: expected a number, got 'hot'"),
        ({"loss": {"temperature": True}}, "loss.temperature: expected a number, got True"),
        ({"loss": {"temperature": float("nan")}}, "loss.temperature: expected a finite number"),
        ({"loss": {"options": 1}}, "loss.options: expected a section"),
        ({"run": {"batch_size": 2.5}}, "run.batch_size: expected a whole number, got 2.5"),
        ({"run": {"batch_size": True}}, "run.batch_size: expected a whole number, got True"),
        ({"run": {"metrics": 1}}, "run.metrics: expected true or false, got 1"),
        ({"run": {"probes": ["FP", "XP"]}}, "run.probes: expected one of FP, LP, NLP, got 'XP'"),
        ({"data": {"name": 3}}, "data.name: expected text, got 3"),
        ({"data": {"classes": [1]}}, "data.classes: expected 2 values, got [1]"),
        ({"augment": {"crop": 0.2}}, "augment.crop: expected a list, got 0.2"),
        ({"schedule": {"milestones": [1.5]}}, "schedule.milestones: expected a whole number, got 1.5"),
    ],
)
def test_wrong_keys_and_types_are_named(content: dict, message: str) -> None:
    with pytest.raises(ValueError) as error:
        from_dict(content)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.imbalance", 0.0), ("data.imbalance", 1.5), ("data.workers", -1), ("data.image_size", -1),
        ("data.classes", (3, 4)), ("data.classes", (5, 2)), ("data.classes", (-1, 4)),
        ("augment.views", 0), ("augment.flip", 1.1), ("augment.crop", (0.0, 1.0)), ("augment.crop", (0.9, 0.5)),
        ("augment.blur", -0.1), ("augment.rotate", 181.0), ("augment.zoom", 1.0), ("augment.shift", 1.5),
        ("model.dim", 0), ("model.width", 0), ("loss.temperature", 0.0), ("loss.temperature", -1.0),
        ("loss.queue", -1), ("loss.decay", 1.0), ("optimizer.lr", 0.0), ("optimizer.momentum", 1.0),
        ("optimizer.weight_decay", -1.0), ("optimizer.clip", -1.0), ("schedule.epochs", 0), ("schedule.gamma", 0.0),
        ("schedule.final", 2.0), ("schedule.warmup_epochs", -1), ("run.batch_size", 0), ("run.log_every", 0),
        ("run.micro_batch_size", -1), ("run.eval_every", -1), ("run.threads", -1),
    ],
)  # fmt: skip
def test_values_out_of_range_are_named(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{key}: expected"):
        Recipe().replace(**{key: value})


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"loss.name": "scl"}, "augment.views"),
        ({"augment.views": 2}, "augment.views"),
        ({"loss.queue": 8, "loss.decay": 0.5}, "loss.queue, loss.decay"),
        ({"loss.assignment": "static"}, "loss.assignment"),
        ({"loss.name": "scl", "augment.views": 2, "model.freeze": True}, "model.freeze"),
        ({"model.freeze": True}, "model.freeze"),
        ({"schedule.epochs": 5, "schedule.warmup_epochs": 5}, "schedule.warmup_epochs"),
        ({"schedule.milestones": [5, 3]}, "schedule.milestones"),
        ({"schedule.milestones": [3, 3]}, "schedule.milestones"),
        ({"schedule.milestones": [0, 3]}, "schedule.milestones"),
    ],
)
def test_impossible_combinations_are_named(settings: dict, key: str) -> None:
    with pytest.raises(ValueError, match=f"^{key}: "):
        Recipe().replace(**settings)


def test_replace_takes_dots_and_underscores_and_leaves_the_old_one() -> None:
    old = Recipe()
    new = old.replace(loss__temperature=0.3, **{"run.batch_size": 8})
    assert (new.loss.temperature, new.run.batch_size) == (0.3, 8)
    assert old == Recipe()
    assert differences(old, new) == ["loss.temperature", "run.batch_size"]


def test_names_and_titles_do_not_count_as_differences() -> None:
    assert differences(Recipe(name="a", title="b", source="c"), Recipe()) == []


def test_an_option_on_one_side_is_a_difference() -> None:
    assert differences(Recipe(), Recipe().replace(**{"loss.options.label_smoothing": 0.1})) == [
        "loss.options.label_smoothing"
    ]


@pytest.mark.parametrize("separator", [":", "/"])
def test_rows_override_the_settings_of_their_file(own: Path, separator: str) -> None:
    base, warm = recipes.load(str(own)), recipes.load(f"{own}{separator}warm")
    assert differences(base, warm) == ["loss.temperature"]
    assert warm.name == f"{own}/warm"
    assert recipes.rows(str(own)) == ("warm", "queue")
    queue = recipes.load(f"{own}{separator}queue").loss
    assert (queue.name, queue.queue) == ("nonl", 64)
    assert queue.options == {"label_smoothing": 0.1, "direction": "both"}


def test_set_overrides_the_row(own: Path) -> None:
    recipe = recipes.load(f"{own}:warm", ["loss.temperature=0.7", "loss.temperature=0.8", "run.seed = 3"])
    assert (recipe.loss.temperature, recipe.run.seed) == (0.8, 3)


@pytest.mark.parametrize(
    ("setting", "key", "value"),
    [
        ("run.metrics=false", "run.metrics", False),
        ("data.root=/some/where", "data.root", "/some/where"),
        ('data.root="x y"', "data.root", "x y"),
        ("data.root=", "data.root", ""),
        ("model.name=timm:resnet50", "model.name", "timm:resnet50"),
        ("augment.crop=[0.2, 1]", "augment.crop", (0.2, 1.0)),
        ("optimizer.lr=1", "optimizer.lr", 1.0),
        ("optimizer.lr=1e-3", "optimizer.lr", 1e-3),
        ("data.options.num_classes=7", "data.options.num_classes", 7),
    ],
)
def test_settings_are_toml_or_text(setting: str, key: str, value: object) -> None:
    assert recipes.load("digits", [setting]).flat()[key] == value


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("digts", [], "there is no 'digts' (did you mean 'digits'?)"),
        ("digits/nolm", [], "recipe digits: no row 'nolm' (did you mean 'nonl'?); its rows are ce, normface"),
        ("nowhere/mine.toml", [], "there is no file nowhere/mine.toml"),
        ("digits", ["loss.temperature"], "--set: expected KEY=VALUE, got 'loss.temperature'"),
        ("digits", ["=3"], "--set: expected KEY=VALUE"),
        ("digits", ["loss.temperatur=3"], "did you mean 'loss.temperature'?"),
        ("digits", ["loss=3"], "loss: expected a section"),
        ("digits", ["loss.temperature.x=3"], "loss.temperature: expected a number"),
    ],
)
def test_missing_recipes_rows_and_keys_are_named(name: str, settings: list[str], message: str) -> None:
    with pytest.raises(ValueError) as error:
        recipes.load(name, settings)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[loss\n", "recipe .*mine.toml: .*line 1"),
        (b'title = "\xff"\n', "recipe .*mine.toml: "),
        (b"[rows.a.los]\nx = 1\n", "unknown key los"),
        (b"[rows]\na = 1\n", r"rows\.a: expected a section, got 1"),
        (b"rows = 1\n", "rows: expected a section, got 1"),
        (b"[row.a.loss]\nqueue = 1\n", "no row 'a'; its rows are none"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        recipes.load(f"{path}:a")
