"""Tests with several ranks: processes that stay, one gloo group, and no test that hangs.

``ranks.run(function, *args)`` calls ``function(rank, world_size, *args)`` on every rank at once and returns the
results in rank order. ``function`` is at the top level of a test module and, like its arguments and results, is
pickled. The default process group is ready when it runs. The fixtures ``ranks2`` and ``ranks4`` start the processes
once per session; a run that goes wrong gives the next one a new group and, where a rank does not answer, new
processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import faulthandler
import os
import pickle
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

COLLECTIVE = 20.0  # seconds until a collective that somebody misses raises
DEADLINE = 60.0  # seconds for a run, then its ranks are killed
START = 120.0  # seconds for the processes to start
GRACE = 1.0  # seconds that the other ranks get to answer when one has failed


@dataclasses.dataclass(frozen=True)
class Failure:
    """A rank that raised ``error``."""

    error: Exception
    traceback: str


@dataclasses.dataclass(frozen=True)
class Dead:
    """A rank whose process ended."""

    exit_code: int


@dataclasses.dataclass(frozen=True)
class Stuck:
    """A rank that did not answer in time, and the stacks of its threads."""

    stacks: str


class RanksError(AssertionError):
    """A run in which a rank failed; the message has each rank's traceback."""


class Ranks:
    """``world_size`` processes with a gloo group whose collectives give up after ``timeout`` seconds."""

    def __init__(self, world_size: int, timeout: float = COLLECTIVE) -> None:
        self.world_size, self.timeout = world_size, timeout
        self._processes: list[subprocess.Popen] = []
        self._pipes: list[Connection] = []
        self._folder = Path()
        self._groups = 0
        self._new_group = True

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def run(self, function: Callable[..., Any], *args: Any, deadline: float = DEADLINE) -> list[Any]:
        """The results of all ranks in order; RanksError as soon as one fails."""
        outcomes = self.outcomes(function, *args, deadline=deadline, grace=GRACE)
        if any(isinstance(o, Failure | Dead | Stuck) for o in outcomes):
            raise RanksError(_report(outcomes))
        return outcomes

    def errors(self, function: Callable[..., Any], *args: Any, deadline: float = DEADLINE) -> list[Exception]:
        """The exceptions of all ranks in order; RanksError if one returns, ends or does not answer."""
        outcomes = self.outcomes(function, *args, deadline=deadline)
        if not all(isinstance(o, Failure) for o in outcomes):
            raise RanksError("Every rank was to raise.\n" + _report(outcomes))
        return [o.error for o in outcomes]

    def outcomes(
        self, function: Callable[..., Any], *args: Any, deadline: float = DEADLINE, grace: float | None = None
    ) -> list[Any]:
        """What became of every rank: its result, or a Failure, Dead or Stuck. Raises for none of them."""
        if not self._processes:
            self._start()
        if self._new_group:
            self._groups += 1
        store = str(self._folder / f"store{self._groups}") if self._new_group else None
        job = pickle.dumps((sys.path, store, pickle.dumps((function, args))))
        for pipe in self._pipes:
            pipe.send_bytes(job)
        outcomes = self._answers(deadline, grace)
        self._new_group = any(isinstance(o, Failure) for o in outcomes)
        if any(isinstance(o, Dead | Stuck) for o in outcomes):
            self.kill()
        return outcomes

    def kill(self) -> None:
        """End the processes; the next run starts new ones."""
        for process in self._processes:
            process.kill()
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            process.wait()
            pipe.close()
        if self._processes:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._processes, self._pipes, self._new_group = [], [], True

    def _start(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="ranks"))
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
        for rank in range(self.world_size):
            ours, theirs = Pipe()
            with theirs:
                work = f"_work({rank}, {self.world_size}, {self.timeout}, {theirs.fileno()}, {str(self._folder)!r})"
                code = f"import sys; sys.path[:] = {sys.path!r}; import ranks; ranks.{work}"
                process = subprocess.Popen(
                    [sys.executable, "-c", code],
                    pass_fds=[theirs.fileno()],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                )
            self._processes.append(process)
            self._pipes.append(ours)
        started = self._answers(START, GRACE)
        if any(isinstance(o, Failure | Dead | Stuck) for o in started):
            self.kill()
            raise RanksError("The processes did not start.\n" + _report(started))

    def _answers(self, deadline: float, grace: float | None) -> list[Any]:
        outcomes: dict[Connection, Any] = {}
        end = time.monotonic() + deadline
        while len(outcomes) < self.world_size:
            ready = wait([p for p in self._pipes if p not in outcomes], max(0.0, end - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                assert isinstance(pipe, Connection)
                try:
                    outcomes[pipe] = pickle.loads(pipe.recv_bytes())
                except (EOFError, ConnectionResetError):
                    outcomes[pipe] = Dead(self._processes[self._pipes.index(pipe)].wait())
                if grace is not None and isinstance(outcomes[pipe], Failure | Dead):
                    end = min(end, time.monotonic() + grace)
        silent = [rank for rank, pipe in enumerate(self._pipes) if pipe not in outcomes]
        for rank in silent:
            self._processes[rank].send_signal(signal.SIGUSR1)
        if silent:
            time.sleep(0.5)  # for the stacks to be written
        for rank in silent:
            outcomes[self._pipes[rank]] = Stuck(_stacks(self._folder, rank).read_text())
        return [outcomes[pipe] for pipe in self._pipes]


def _report(outcomes: list[Any]) -> str:
    lines = []
    for rank, outcome in enumerate(outcomes):
        if isinstance(outcome, Failure):
            lines.append(f"rank {rank} raised\n{outcome.traceback}")
        elif isinstance(outcome, Dead):
            lines.append(f"rank {rank} ended with exit code {outcome.exit_code}")
        elif isinstance(outcome, Stuck):
            lines.append(f"rank {rank} did not answer; it was at\n{outcome.stacks}")
        else:
            lines.append(f"rank {rank} returned {str(outcome)[:200]}")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# in the processes


def _stacks(folder: Path, rank: int) -> Path:
    return folder / f"stacks{rank}"


def _work(rank: int, world_size: int, timeout: float, fd: int, folder: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for pytest, which closes the pipe
    stacks = _stacks(Path(folder), rank).open("w")
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    torch.set_num_threads(1)
    pipe = Connection(fd)
    jobs: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(pipe, jobs), daemon=True).start()
    pipe.send_bytes(pickle.dumps(None))
    while True:
        path, store, call = pickle.loads(jobs.get())
        try:
            sys.path[:] = path
            if store is not None:
                _make_group(rank, world_size, timeout, store)
            function, args = pickle.loads(call)
            answer = pickle.dumps(function(rank, world_size, *args))
        except Exception as error:
            answer = pickle.dumps(Failure(_picklable(error), traceback.format_exc()))
        pipe.send_bytes(answer)


def _listen(pipe: Connection, jobs: queue.SimpleQueue[bytes]) -> None:
    """Put jobs in the queue; end the process, whatever it is doing, when pytest has gone."""
    while True:
        try:
            jobs.put(pipe.recv_bytes())
        except (EOFError, OSError):
            os._exit(1)


def _make_group(rank: int, world_size: int, timeout: float, path: str) -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
    store = dist.FileStore(path, world_size)
    seconds = datetime.timedelta(seconds=timeout)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=seconds)


def _picklable(error: Exception) -> Exception:
    with contextlib.suppress(Exception):
        if type(pickle.loads(pickle.dumps(error))) is type(error):
            return error
    return RuntimeError(f"{type(error).__name__}: {error}")
