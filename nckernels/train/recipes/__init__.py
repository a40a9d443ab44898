"""Recipes as TOML files: those of the package, next to this file, and the user's own.

A file has the sections of :class:`~nckernels.train.recipe.Recipe`; settings that it leaves out have their defaults.
``[rows.NAME]`` is a row of a paper's table: the settings in which it differs, section by section. ``cifar100/nonl`` is
the row ``nonl`` of ``cifar100``, and ``mine.toml:nonl`` that of a file. ``[sweep]`` is what a sweep runs by default.

The sources are [NCD], Neural Collapse by Design (arXiv 2605.20302), and [DLP], Hyperspherical Classification with
Dynamic Label-to-Prototype Assignment (CVPR 2024). "Ours" marks settings that neither gives.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

from .. import typed
from ..recipe import Recipe, from_dict

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = resources.files(__name__)


def load(name: str, settings: Iterable[str] = ()) -> Recipe:
    """A recipe of the package or of a file, or one of its rows, with settings changed.

    Args:
        name: ``"cifar100"``, ``"cifar100/nonl"``, ``"path/to/file.toml"`` or ``"path/to/file.toml:row"``.
        settings: ``"key=value"`` with a dotted key and a value in TOML; anything else is a string.

    Raises:
        ValueError: for a recipe, a row or a key that does not exist, naming it and the nearest known one; for values of
            the wrong type; for settings that do not go together.

    Example:
        >>> from nckernels.train import load_recipe
        >>> recipe = load_recipe("cifar100/nonl", ["loss.temperature=0.2"])
        >>> recipe.loss.name, recipe.loss.temperature, recipe.run.batch_size
        ('nonl', 0.2, 512)
    """
    content, title = read(name)
    row = split(name)[1]
    rows = _rows(content, title)
    content.pop("rows", None)
    content.pop("sweep", None)
    if row:
        if row not in rows:
            raise ValueError(
                f"recipe {title}: no row {row!r}{typed.nearest(row, rows)}; its rows are {', '.join(rows) or 'none'}"
            )
        content = typed.merge(content, rows[row])
    content["name"] = f"{title}/{row}" if row else title
    for setting in settings:
        content = typed.merge(content, typed.nested([_assignment(setting)]))
    return from_dict(content)


def rows(name: str) -> tuple[str, ...]:
    """The rows of a recipe; none if it is a single run."""
    return tuple(_rows(*read(name)))


def names() -> tuple[str, ...]:
    """The recipes of the package."""
    return tuple(sorted(path.name.removesuffix(".toml") for path in FOLDER.iterdir() if path.name.endswith(".toml")))


def read(name: str) -> tuple[dict[str, Any], str]:
    """The content of a recipe file, ``rows`` and ``sweep`` included, and the recipe's own name."""
    base, _ = split(name)
    if base.endswith(".toml"):
        path: Any = Path(base)
        if not path.is_file():
            raise ValueError(f"recipe: there is no file {base}")
    else:
        path = FOLDER / f"{base}.toml"
        if not path.is_file():
            raise ValueError(
                f"recipe: there is no {base!r}{typed.nearest(base, names())}; `python -m nckernels recipes` lists them"
            )
    try:
        return tomllib.loads(path.read_text(encoding="utf-8")), base
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {base}: {error}") from None


def _rows(content: dict[str, Any], title: str) -> dict[str, Any]:
    rows = content.get("rows", {})
    for row, settings in rows.items() if isinstance(rows, dict) else (("", rows),):
        if not isinstance(settings, dict):
            raise ValueError(f"recipe {title}: rows{row and '.'}{row}: expected a section, got {settings!r}")
    return dict(rows)


def split(name: str) -> tuple[str, str]:
    if ".toml" in name:
        base, _, row = name.rpartition(".toml")
        return base + ".toml", row.lstrip(":/")
    base, _, row = name.partition("/")
    return base, row


def _assignment(setting: str) -> tuple[str, Any]:
    key, equals, text = setting.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"--set: expected KEY=VALUE, got {setting!r}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    return key.strip(), value


def values(text: str) -> tuple[str, list[Any]]:
    """``"key=v1,v2"`` as a key and its values; text that is no TOML is split at its commas."""
    key, equals, rest = text.partition("=")
    if not equals or not key.strip() or not rest.strip():
        raise ValueError(f"--grid: expected KEY=V1,V2, got {text!r}")
    try:
        return key.strip(), list(tomllib.loads(f"values = [{rest}]")["values"])
    except tomllib.TOMLDecodeError:
        return key.strip(), [_assignment(f"{key}={part}")[1] for part in rest.split(",")]
