"""Keys that travel round the ranks: all similarities of this rank's rows, without everybody's keys in one place.

Each rank starts with its own keys. While it compares its rows with the block that it holds, the block is already on its
way to the neighbour on the left, and the next one comes in from the right. After R steps every rank has seen every key,
and has held two blocks at a time. The backward pass sends the keys round once more; a second train of blocks follows
them, in which each rank adds its gradients of a block, and which ends where the keys came from.

    step      rank 0      rank 1      rank 2
    0         keys 0  <-  keys 1  <-  keys 2  <- (to rank 0's left neighbour, rank 2)
    1         keys 1      keys 2      keys 0
    2         keys 2      keys 0      keys 1
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import operators
from .._class_sums import add_unit_rows, grad_of_unit_rows
from ..backends import registry
from ..backends.base import Forward, Inputs, Needs, OutputGrads, Spec
from ..primitive import scalar
from .collectives import Sizes
from .groups import Ranks


class Job(NamedTuple):
    """What all steps have in common."""

    spec: Spec
    backend: str
    counts: Sizes
    ranks: Ranks


def lse(
    rows: Tensor,
    keys: Tensor,
    target: Tensor,
    inv_temperature: float | Tensor,
    counts: Sizes,
    ranks: Ranks,
    *,
    direction: Literal["instance", "both"],
    exclude: Literal["none", "target"],
    ignore_index: int,
    key_bias: Tensor | None = None,
    key_group: Tensor | None = None,
    groups: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-sum-exps of this rank's rows over the keys of all ranks, and sums of keys.

    Args:
        rows: (n, d).
        keys: (k, d), this rank's, in the dtype of the rows.
        target: (n,) each row's positive among this rank's keys.
        counts: how many keys all ranks have, at least one in all.
        key_bias: (N,) for the keys of all ranks, without gradient.
        key_group: (N,) which of some groups a key belongs to, -1 for none; None: no sums are wanted.
        groups: how many groups there are.

    Returns:
        (N,) class direction, this rank's part of the sums, empty for ``direction="instance"``; (n,) instance
        direction, whole; (n,) positive logits; (groups, d) sums of the unit keys of each group.
    """
    spec = Spec(direction, exclude, False, ignore_index, registry.get_workspace(rows.device))
    job = Job(spec, registry.resolve(rows.device, rows.dtype), counts, ranks)
    beta = scalar(inv_temperature, rows)
    return _Ring.apply(rows, keys, beta, target, key_bias, key_group, groups, job)  # type: ignore[no-any-return, no-untyped-call]


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, keys: Tensor, *args: Any) -> tuple[Tensor, ...]:
        beta, target, key_bias, key_group, groups, job = args
        sums = torch.zeros(groups, rows.shape[1], dtype=beta.dtype, device=rows.device)
        seen: dict[int, Forward] = {}
        for owner, block in _round(keys, job):
            if len(block):
                inputs, spec = _step(rows, block, beta, target, key_bias, owner, job)
                seen[owner] = operators.forward(inputs, spec, job.backend)
                if key_group is not None:
                    add_unit_rows(sums, block, key_group[job.counts.of(owner)])
        by_class = torch.cat([seen[owner].class_lse for owner in sorted(seen)])
        instance = torch.stack([result.instance_lse for result in seen.values()]).logsumexp(0)
        own = seen.get(job.ranks.rank)
        # A copy: an output that ``ctx`` keeps would keep ``ctx``, and with it all tensors of the call.
        pos = rows.new_zeros(len(rows), dtype=beta.dtype) if own is None else own.pos.clone()
        ctx.save_for_backward(rows, keys, beta, target, key_bias, key_group, instance)
        ctx.seen, ctx.job = seen, job  # of vectors, some N numbers
        return by_class, instance, pos, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        rows, keys, beta, target, key_bias, key_group, instance = ctx.saved_tensors
        by_class, by_instance, by_pos, by_sums = upstream
        job: Job = ctx.job
        by_rows, by_keys, by_beta, *_ = ctx.needs_input_grad
        needs = Needs(by_rows, by_keys, by_beta, False, False)
        rows_grad, beta_grad = torch.zeros_like(rows, dtype=beta.dtype), torch.zeros_like(beta)
        train = _Train(keys.shape[1], beta, job)
        for owner, block in _round(keys, job):
            block_grad = beta.new_zeros(block.shape)
            if len(block):
                inputs, spec = _step(rows, block, beta, target, key_bias, owner, job)
                # Divided by the sum over all blocks, the exponentials are the whole softmax.
                saved = ctx.seen[owner]._replace(instance_lse=instance)
                of_class = by_class[job.counts.of(owner)] if spec.by_class else None
                grads = OutputGrads(of_class, by_instance, by_pos if owner == job.ranks.rank else None)
                part = operators.backward(inputs, saved, grads, spec, job.backend, needs)
                for total, term in (
                    (rows_grad, part.features), (block_grad, part.prototypes), (beta_grad, part.inv_temperature),
                ):  # fmt: skip
                    if term is not None:
                        total += term
                del part, term  # before the next ones come
                if key_group is not None:
                    block_grad += grad_of_unit_rows(by_sums, block, key_group[job.counts.of(owner)])
            train.add(block_grad)
        found = (rows_grad.to(rows.dtype), train.arrived().to(keys.dtype), beta_grad)
        wanted = (grad if need else None for grad, need in zip(found, needs[:3], strict=True))
        return *wanted, *(None,) * 5


def _step(
    rows: Tensor, block: Tensor, beta: Tensor, target: Tensor, key_bias: Tensor | None, owner: int, job: Job
) -> tuple[Inputs, Spec]:
    """The problem of this rank's rows and one block. A row's positive is in its own rank's block alone."""
    spec = job.spec
    if owner != job.ranks.rank:
        target, spec = target.where(target == spec.ignore_index, 0), spec._replace(exclude="none")
    bias = None if key_bias is None else key_bias[job.counts.of(owner)]
    return Inputs(rows, block, target, beta, None, bias), spec


def _round(keys: Tensor, job: Job) -> Iterator[tuple[int, Tensor]]:
    """(owner, its keys) of every rank; the next block is under way while one is in use.

    Blocks arrive in two places by turns: each block is valid until the next one is asked for.
    """
    ranks, block = job.ranks, keys.contiguous()
    places = [keys.new_empty(max(job.counts.counts), keys.shape[1]) for _ in range(min(2, ranks.size - 1))]
    for step in range(ranks.size):
        owner, following = ((ranks.rank + step + ahead) % ranks.size for ahead in (0, 1))
        if step + 1 == ranks.size:
            yield owner, block
            return
        arriving = places[step % 2][: job.counts.counts[following]]
        under_way = _pass_on(block, arriving, ranks, tag=0)
        yield owner, block
        for work in under_way:
            work.wait()
        block = arriving


class _Train:
    """Gradients of the blocks, which go round one step behind them."""

    def __init__(self, columns: int, like: Tensor, job: Job) -> None:
        self.columns, self.like, self.job, self.step = columns, like, job, 0
        self.under_way: list[Any] = []

    def add(self, grad: Tensor) -> None:
        """Add this rank's gradient of the block in use to those that have arrived, and pass the sum on."""
        ranks, counts = self.job.ranks, self.job.counts.counts
        if self.step:
            grad += self.arrived()
        self.step += 1
        self.leaving = grad  # alive until it has left
        self.arriving = self.like.new_empty(counts[(ranks.rank + self.step) % ranks.size], self.columns)
        self.under_way = _pass_on(grad, self.arriving, ranks, tag=1)

    def arrived(self) -> Tensor:
        """The sums of the ranks to the right; after the last step those of all ranks for this rank's keys."""
        for work in self.under_way:
            work.wait()
        self.under_way = []
        return self.arriving


def _pass_on(leaving: Tensor, arriving: Tensor, ranks: Ranks, tag: int) -> list[Any]:
    """Start to send to the left and to receive from the right."""
    left, right = (dist.get_global_rank(ranks.group, (ranks.rank + side) % ranks.size) for side in (-1, 1))
    ends = [
        dist.P2POp(operation, tensor, peer, ranks.group, tag)
        for operation, tensor, peer in ((dist.isend, leaving, left), (dist.irecv, arriving, right))
        if tensor.numel()
    ]
    return dist.batch_isend_irecv(ends) if ends else []
