"""The harness itself: results and errors of ranks, and a clean start after each."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist
from ranks import COLLECTIVE, Ranks, RanksError
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


def assert_clean(ranks: Ranks) -> list[int]:
    results = ranks.run(total, torch.ones(3))
    expected = torch.full((3,), sum(range(1, ranks.world_size + 1)) * 1.0)
    assert all(torch.equal(x, expected) and threads == 1 for _, x, threads in results)
    return [pid for pid, _, _ in results]


def test_processes_are_reused(ranks2: Ranks) -> None:
    assert assert_clean(ranks2) == assert_clean(ranks2)


def test_errors_are_returned_as_results(ranks2: Ranks) -> None:
    """The processes are reused if all have answered; their group is a new one."""
    pids = assert_clean(ranks2)
    errors = ranks2.errors(all_raise)
    assert [(type(e), str(e)) for e in errors] == [(ValueError, "rank 0 of 2"), (ValueError, "rank 1 of 2")]
    ranks2.errors(out_of_step)
    assert assert_clean(ranks2) == pids
    with pytest.raises(RanksError, match="rank 0 returned"):
        ranks2.errors(total, torch.ones(3))


def test_one_failing_rank_ends_the_run_at_once(ranks2: Ranks) -> None:
    """The run ends before the time-out of the rank that waits for the failed one; the next run has new processes."""
    pids = assert_clean(ranks2)
    start = time.monotonic()
    with pytest.raises(RanksError) as error:
        ranks2.run(one_raises)
    assert time.monotonic() - start < COLLECTIVE / 2
    assert 'raise ValueError("one rank only")' in str(error.value)
    where, _ = str(error.value).split("rank 1 raised")
    assert "rank 0 did not answer" in where
    assert "in one_raises" in where
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert not set(pids) & set(assert_clean(ranks2))
