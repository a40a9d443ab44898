"""`python -m nckernels ...` in processes of its own, without waiting seconds for PyTorch each time.

``start(...)`` forks a server that has imported PyTorch and runs the package as `python -m` does. The processes can be
killed, stopped and limited like any others.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

DEADLINE = 60.0  # seconds until a process that does not end is killed and the test fails


@functools.cache
def _server() -> subprocess.Popen[str]:
    command = [sys.executable, str(Path(__file__).with_name("contract_server.py"))]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment())
    atexit.register(server.kill)
    return server


def _ask(**request: Any) -> Any:
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    return json.loads(server.stdout.readline())


def environment() -> dict[str, str]:
    """For processes that import the same nckernels as this one, with one thread."""
    import nckernels

    own = str(Path(nckernels.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": own, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


@dataclasses.dataclass
class Process:
    arguments: list[str]
    pid: int
    output: str
    returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = _ask(poll=self.pid)
        return self.returncode

    def wait(self, timeout: float = DEADLINE) -> Process:
        self.until(lambda: False, timeout)
        return self

    def until(self, condition: Callable[[], bool], timeout: float = DEADLINE) -> bool:
        """Wait for the condition or the end of the process; whether it still runs."""
        end = time.monotonic() + timeout
        while self.poll() is None and not condition():
            if time.monotonic() > end:
                self.signal(signal.SIGABRT)  # with the stacks of its threads
                time.sleep(1)
                self.signal(signal.SIGKILL)
                raise AssertionError(f"{self} does not end within {timeout:g} s:\n{self.stdout}\n{self.stderr}")
            time.sleep(0.003)
        return self.returncode is None

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> Process:
        self.signal(signal.SIGKILL)
        return self.wait()

    @property
    def stdout(self) -> str:
        return Path(f"{self.output}.out").read_text()

    @property
    def stderr(self) -> str:
        return Path(f"{self.output}.err").read_text()

    def __str__(self) -> str:
        return f"`nckernels {' '.join(self.arguments)}` (status {self.returncode})"


def start(*arguments: str, folder: Path, file_size: int = 0) -> Process:
    """Start `python -m nckernels ARGUMENTS` in a folder, with files of at most ``file_size`` bytes if it is not 0."""
    output = tempfile.mktemp(dir=folder, prefix="output-")
    return Process(
        list(arguments), _ask(arguments=arguments, folder=str(folder), output=output, file_size=file_size), output
    )


def run(*arguments: str, folder: Path, **options: Any) -> Process:
    return start(*arguments, folder=folder, **options).wait()


TINY = {
    "model.width": 4,
    "model.dim": 8,
    "run.batch_size": 128,
    "run.device": "cpu",
    "run.metrics": False,
    "run.log_every": 1,
    "schedule.epochs": 2,
}
"""Settings of a run of a second."""


def settings(**changes: Any) -> list[str]:
    """``key=value`` of TINY and of changes, whose keys have ``__`` for the dot."""
    values = {**TINY, **{key.replace("__", "."): value for key, value in changes.items()}}
    return [f"{key}={_toml(value)}" for key, value in values.items()]


def options(**changes: Any) -> list[str]:
    """The same for the command line."""
    return [word for setting in settings(**changes) for word in ("--set", setting)]


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value)


def history(folder: Path, *, timed: bool = False) -> dict[str, Any]:
    """history.json, where NaN and Infinity are errors; without times unless ``timed``."""

    def no_json(text: str) -> Any:
        raise AssertionError(f"{folder}/history.json has {text}, which is no JSON")

    content = json.loads((folder / "history.json").read_text(), parse_constant=no_json)
    return content if timed else untimed(content)


def log(folder: Path, *, timed: bool = False) -> list[dict[str, Any]]:
    """The lines of log.jsonl."""
    text = (folder / "log.jsonl").read_text()
    assert text.endswith("\n")
    lines = [json.loads(line) for line in text.splitlines()]
    return lines if timed else untimed(lines)


def untimed(content: Any) -> Any:
    """The content without times."""
    if isinstance(content, Mapping):
        return {key: untimed(value) for key, value in content.items() if "second" not in str(key)}
    return [untimed(value) for value in content] if isinstance(content, (list, tuple)) else content


def unequal(one: Any, other: Any, path: str = "") -> list[str]:
    """Where two checkpoints differ, times aside."""
    import torch

    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape
        same = same and torch.equal(one.nan_to_num(1.5), other.nan_to_num(1.5))
        return [] if same else [path]
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        found = [] if list(map(str, one)) == list(map(str, other)) else [f"{path}: {list(one)} and {list(other)}"]
        keys = [key for key in one if key in other and "second" not in str(key)]
        return found + [line for key in keys for line in unequal(one[key], other[key], f"{path}/{key}")]
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        found = [] if len(one) == len(other) else [f"{path}: {len(one)} and {len(other)} long"]
        pairs = enumerate(zip(one, other, strict=False))
        return found + [line for i, (a, b) in pairs for line in unequal(a, b, f"{path}/{i}")]
    same = type(one) is type(other) and (one == other or (one != one and other != other))
    return [] if same else [f"{path}: {one!r} and {other!r}"]


def refused(process: Process, *words: str) -> None:
    """Assert that it failed with a message that has these words, and without a traceback."""
    assert process.returncode in (1, 2), f"{process}\n{process.stdout}\n{process.stderr}"
    assert "Traceback" not in process.stderr, process.stderr
    assert len(process.stderr.strip()) < 4000
    for word in words:
        assert word in process.stderr, f"{word!r} in\n{process.stderr}"


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder, without the lock."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "lock"
    }


def tensors(content: Any) -> list[Any]:
    import torch

    if isinstance(content, torch.Tensor):
        return [content]
    values = content.values() if isinstance(content, dict) else content if isinstance(content, (list, tuple)) else ()
    return [tensor for value in values for tensor in tensors(value)]
