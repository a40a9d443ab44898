"""The documentation says what the package does: its code runs, its figures are those of the reports."""

from __future__ import annotations

import ast
import doctest
import importlib
import math
import pkgutil
import re
import shlex
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import nckernels
from nckernels.__main__ import COMMANDS

DOCS = Path(__file__).resolve().parents[1] / "docs"
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
NAMES = {"torch": torch, "nn": nn, "F": F, "math": math, "nckernels": nckernels}
"""What the examples of docstrings need not import."""

BLOCK = re.compile(r"^(?P<not_run><!-- not run: .+ -->\n+)?```(?P<language>\w+)\n(?P<code>.*?)^```$", re.M | re.S)
PAGES = (
    "quickstart",
    "choosing-a-loss",
    "temperature-and-batch",
    "migrating",
    "training-at-speed",
    "many-classes",
    "scaling",
    "neural-collapse",
    "backends-and-memory",
    "errors",
)
"""Pages whose blocks are all run, in order and in one namespace, but for those that are marked."""
NEEDS = {"migrating": ["pytorch_metric_learning"], "neural-collapse": ["scipy", "torchmetrics", "tqdm"]}
"""What need not be installed."""


def public_modules() -> list[str]:
    """All modules but the private ones, and those that need what need not be installed."""
    found = pkgutil.walk_packages(nckernels.__path__, "nckernels.")
    names = ["nckernels", *(m.name for m in found)]
    return [name for name in names if not re.search(r"\._|triton|quack|train\.vision", name)]


def test_examples_of_docstrings() -> None:
    finder, runner, count = doctest.DocTestFinder(exclude_empty=True), doctest.DocTestRunner(optionflags=OPTIONS), 0
    for name in public_modules():
        for example in finder.find(importlib.import_module(name), globs=dict(NAMES)):
            torch.manual_seed(0)
            count += runner.run(example).attempted
    assert runner.failures == 0
    assert count > 200  # they have been found


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The environment that torchrun gives to a job of one process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("page", PAGES)
def test_code_of_pages(page: str, one_rank: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order and in one namespace, as a reader would: ``python`` as it stands, ``pycon`` with what it prints."""
    for needed in NEEDS.get(page, ()):
        pytest.importorskip(needed)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    blocks = 0
    for block in BLOCK.finditer((DOCS / f"{page}.md").read_text(encoding="utf-8")):
        if block["not_run"]:
            continue
        if block["language"] == "python":
            exec(compile(block["code"], f"{page}.md", "exec"), names)
            blocks += 1
        elif block["language"] == "pycon":
            example = doctest.DocTestParser().get_doctest(block["code"], {}, page, f"{page}.md", 0)
            example.globs = names
            runner = doctest.DocTestRunner(optionflags=OPTIONS)
            runner.run(example, clear_globs=False)
            assert runner.failures == 0
            blocks += 1
    assert blocks  # they have been found
    if page == "quickstart":
        assert names["accuracy"] > 0.9
        assert names["means_accuracy"] > 0.9


def test_what_the_page_of_the_papers_names_exists(capsys: pytest.CaptureFixture[str]) -> None:
    """Functions, tests, and commands with all their options. Recipes and sweeps are resolved; nothing is trained."""
    for needed in ("matplotlib", "scipy", "sklearn", "tqdm"):
        pytest.importorskip(needed)
    from nckernels.train import load_recipe

    benchmarks = (DOCS.parent / "benchmarks" / "__main__.py").read_text(encoding="utf-8")
    columns: list[str] = []
    names = set()
    for line in (DOCS / "papers.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        columns = cells if cells[:1] == ["in the paper"] else columns
        for column, cell in zip(columns, cells, strict=False):
            if column in ("here", "command", "checked by"):
                names.update(re.findall(r"`([^`]+)`", cell))
    assert len(names) > 100  # they have been found
    for name in sorted(names):
        command, *arguments = shlex.split(name)
        if name.startswith("tests/"):
            assert (DOCS.parent / name).is_file(), name
        elif name.startswith("python -m benchmarks "):
            assert f"\npython -m benchmarks {arguments[2]} " in benchmarks, name
        elif command in COMMANDS:
            module = importlib.import_module(COMMANDS[command][0])
            if command == "train":
                parsed = module.make_parser().parse_args(arguments)
                load_recipe(parsed.recipe, parsed.set)
            elif command == "sweep":
                assert module.main([*arguments, "--dry-run"]) == 0, name
            elif command == "recipes":
                assert module.main(arguments) == 0, name
            else:
                module.make_parser().parse_args(arguments)
        else:
            assert pkgutil.resolve_name(f"nckernels.{name}") is not None, name


def test_quoted_messages_are_those_of_the_code() -> None:
    """The tables of errors.md, whose errors need what a test has not: every part is in a string of the package."""
    strings = [
        node.value
        for path in Path(nckernels.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    rows = re.findall(r"^\| (?:warning )?`([^`]* [^`]*)` \|", (DOCS / "errors.md").read_text(encoding="utf-8"), re.M)
    assert len(rows) > 10
    for message in rows:
        for part in re.split(r"…|'world'", message):
            assert any(part.strip(" .;:,=") in text for text in strings), part


@pytest.mark.parametrize("page", ["README", "choosing-a-loss", "temperature-and-batch"])
def test_figures_are_those_of_the_results(page: str) -> None:
    """A program writes results.md; what other pages repeat of it must not stay behind."""
    results = (DOCS / "results.md").read_text(encoding="utf-8")
    figures = re.findall(r"[+-]?[\d.]+ ± [\d.]+", (DOCS / f"{page}.md").read_text(encoding="utf-8"))
    assert figures
    assert [figure for figure in figures if figure not in results] == []
