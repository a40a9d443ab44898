"""The programs in examples/, as a reader would start them: with torchrun, two processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("sklearn")

ROOT = Path(__file__).parents[2]
PROGRAMS = ("nonl_ddp.py", "clip_ddp.py")
SECONDS = 180


def start(program: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*torchrun, str(ROOT / "examples" / program), "--epochs", "2"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def started() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """Both at once: most of their time is imports."""
    processes = {program: start(program) for program in PROGRAMS}
    yield processes
    for process in processes.values():
        process.terminate()  # its workers, too
        process.communicate()


@pytest.mark.parametrize("program", PROGRAMS)
def test_example(started: dict[str, subprocess.Popen[str]], program: str) -> None:
    check(started[program])


@pytest.mark.slow  # the trainer's tests run the same loss on two ranks
def test_supcon() -> None:
    check(start("supcon_ddp.py"))


def check(process: subprocess.Popen[str]) -> None:
    text, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, text
    first, second = (float(loss) for loss in re.findall(r"^epoch \d: loss (-?[\d.]+)$", text, re.MULTILINE))
    assert second < first, text
    assert re.search(r"^processes: 2 .*: 0\.[6-9]\d*$", text, re.MULTILINE), text
