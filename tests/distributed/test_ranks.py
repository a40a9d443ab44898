"""The harness itself: results, errors, hangs and deaths of ranks, and a clean start after each."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import Dead, Failure, Ranks, RanksError, Stuck
from torch import Tensor


def total(rank: int, world_size: int, x: Tensor) -> tuple[int, Tensor, int]:
    x = x * (rank + 1)
    dist.all_reduce(x)
    return os.getpid(), x, torch.get_num_threads()


def one_raises(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("one rank only")
    dist.barrier()


def all_raise(rank: int, world_size: int) -> None:
    raise ValueError(f"rank {rank} of {world_size}")


def out_of_step(rank: int, world_size: int) -> None:
    if rank == 0:
        dist.all_reduce(torch.zeros(1), async_op=True)
    raise ValueError


def one_sleeps(rank: int, world_size: int) -> None:
    if rank == 0:
        time.sleep(1000)


def one_is_killed(rank: int, world_size: int) -> str:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        dist.barrier()
    except RuntimeError:
        return "survived"
    return "no error"


def assert_clean(ranks: Ranks) -> list[int]:
    results = ranks.run(total, torch.ones(3))
    expected = torch.full((3,), sum(range(1, ranks.world_size + 1)) * 1.0)
    assert all(torch.equal(x, expected) and threads == 1 for _, x, threads in results)
    return [pid for pid, _, _ in results]


def test_processes_stay(ranks2: Ranks) -> None:
    assert assert_clean(ranks2) == assert_clean(ranks2)


def test_errors_are_results(ranks2: Ranks) -> None:
    """The processes stay where all have answered; their group is a new one."""
    pids = assert_clean(ranks2)
    errors = ranks2.errors(all_raise)
    assert [(type(e), str(e)) for e in errors] == [(ValueError, "rank 0 of 2"), (ValueError, "rank 1 of 2")]
    ranks2.errors(out_of_step)
    assert assert_clean(ranks2) == pids
    with pytest.raises(RanksError, match="rank 0 returned"):
        ranks2.errors(total, torch.ones(3))


def test_one_failure_is_soon_known(ranks2: Ranks) -> None:
    """Nobody waits for the time-out of the rank that waits for the failed one."""
    assert_clean(ranks2)
    start = time.monotonic()
    with pytest.raises(RanksError) as error:
        ranks2.run(one_raises)
    assert time.monotonic() - start < 10.0
    assert 'raise ValueError("one rank only")' in str(error.value)
    assert "rank 0 did not answer" in str(error.value)
    assert "in one_raises" in str(error.value).split("rank 1 raised")[0]  # where rank 0 is waiting
    assert_clean(ranks2)


def test_hangs_and_deaths() -> None:
    with Ranks(2) as ranks:
        pids = assert_clean(ranks)
        stuck, returned = ranks.outcomes(one_sleeps, deadline=0.5)
        assert isinstance(stuck, Stuck)
        assert "in one_sleeps" in stuck.stacks
        assert returned is None
        again = assert_clean(ranks)
        assert not set(pids) & set(again)
        assert ranks.outcomes(one_is_killed) == ["survived", Dead(-signal.SIGKILL)]
    for pid in (*pids, *again):
        assert not Path(f"/proc/{pid}").exists()


def test_time_out_of_collectives() -> None:
    with Ranks(2, timeout=1.0) as ranks:
        waiting, failed = ranks.outcomes(one_raises)
        assert isinstance(waiting, Failure)
        assert isinstance(waiting.error, RuntimeError)
        assert isinstance(failed, Failure)
        assert isinstance(failed.error, ValueError)
