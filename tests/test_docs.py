"""The documentation says what the package does: its code runs, its figures are those of the reports."""

from __future__ import annotations

import ast
import doctest
import importlib
import math
import os
import pkgutil
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import nckernels

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
    "backends-and-memory",
    "scikit-learn",
    "errors",
)
"""Pages whose blocks are all run, in order and in one namespace, but for those that are marked."""


def public_modules() -> list[str]:
    """All modules but the private ones, and those that need what is not installed."""
    found = pkgutil.walk_packages(nckernels.__path__, "nckernels.")
    names = ["nckernels", *(m.name for m in found if "._" not in m.name and "triton" not in m.name)]
    return [name for name in names if "quack" not in name and not name.endswith("__main__")]


def test_examples_of_docstrings() -> None:
    finder, count = doctest.DocTestFinder(exclude_empty=True), 0
    runner = doctest.DocTestRunner(optionflags=OPTIONS)
    for name in public_modules():
        module = importlib.import_module(name)
        for example in finder.find(module, globs=dict(NAMES)):
            torch.manual_seed(0)
            count += runner.run(example).attempted
    assert runner.failures == 0
    assert count > 150  # they have been found
