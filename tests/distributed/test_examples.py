"""The programs in examples/, as a user starts them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*_ddp.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path: Path) -> None:
    """Two processes, two epochs: the loss falls, and one process says how it ended."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    found = subprocess.run(
        [*run, str(path), "--epochs", "2"],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    first, second = map(float, re.findall(r"^epoch \d: loss (-?[\d.]+)$", found.stdout, re.MULTILINE))
    assert second < first
    assert re.search(r"^2 processes \(\w+\), .*\d$", found.stdout, re.MULTILINE), found.stdout


def test_there_are_examples() -> None:
    assert len(EXAMPLES) == 3
