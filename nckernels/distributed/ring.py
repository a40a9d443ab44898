"""Keys that circulate in a ring: similarities of this rank's rows with all keys, without gathering the keys.

Each rank starts with its own block of keys. While it compares its rows with the block that it holds, it sends the block
to the neighbour on the left and receives the next one from the right. After R steps every rank has used every block,
and has held two blocks at a time. In the backward pass the keys go round once more, followed by blocks of gradients:
each rank adds its gradients of a block, and the sum arrives at the rank that owns the keys.

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
    """What is the same in all steps."""

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
        keys: (k, d), the keys of this rank, in the dtype of the rows.
        target: (n,) index of each row's positive among this rank's keys.
        counts: number of keys on every rank, at least one in all.
        key_bias: (N,) biases of the keys of all ranks, without gradient.
        key_group: (N,) group of each key, -1 for none; None: no sums are computed.
        groups: number of groups.

    Returns:
        (N,) log-sum-exp in the class direction over this rank's rows only, empty for ``direction="instance"``;
        (n,) log-sum-exp in the instance direction over all keys; (n,) positive logits; (groups, d) sums of the unit
        keys of each group.
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
        # A copy: an output that is stored in ``ctx`` would keep ``ctx`` alive, and with it all tensors of the call.
        pos = rows.new_zeros(len(rows), dtype=beta.dtype) if own is None else own.pos.clone()
        ctx.save_for_backward(rows, keys, beta, target, key_bias, key_group, instance)
        ctx.seen, ctx.job = seen, job  # vectors only, about N numbers
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
                # With the log-sum-exp over all blocks, the exponentials of this block are its part of the softmax.
                saved = ctx.seen[owner]._replace(instance_lse=instance)
                of_class = by_class[job.counts.of(owner)] if spec.by_class else None
                grads = OutputGrads(of_class, by_instance, by_pos if owner == job.ranks.rank else None)
                part = operators.backward(inputs, saved, grads, spec, job.backend, needs)
                for total, term in (
                    (rows_grad, part.features), (block_grad, part.prototypes), (beta_grad, part.inv_temperature),
                ):  # fmt: skip
                    if term is not None:
                        total += term
                del part, term  # frees them before the next step
                if key_group is not None:
                    block_grad += grad_of_unit_rows(by_sums, block, key_group[job.counts.of(owner)])
            train.add(block_grad)
        found = (rows_grad.to(rows.dtype), train.arrived().to(keys.dtype), beta_grad)
        wanted = (grad if need else None for grad, need in zip(found, needs[:3], strict=True))
        return *wanted, *(None,) * 5


def _step(
    rows: Tensor, block: Tensor, beta: Tensor, target: Tensor, key_bias: Tensor | None, owner: int, job: Job
) -> tuple[Inputs, Spec]:
    """The problem of this rank's rows and one block. Only this rank's own block contains the rows' positives."""
    spec = job.spec
    if owner != job.ranks.rank:
        target, spec = target.where(target == spec.ignore_index, 0), spec._replace(exclude="none")
    bias = None if key_bias is None else key_bias[job.counts.of(owner)]
    return Inputs(rows, block, target, beta, None, bias), spec


def _round(keys: Tensor, job: Job) -> Iterator[tuple[int, Tensor]]:
    """Yield (owner, its keys) for every rank; the next block is received while one is in use.

    Blocks arrive in two buffers by turns, so a block is valid only until the next one is requested.
    """
    ranks, block = job.ranks, keys.contiguous()
    places = [keys.new_empty(max(job.counts.counts), keys.shape[1]) for _ in range(min(2, ranks.size - 1))]
    for step in range(ranks.size):
        owner, following = ((ranks.rank + step + ahead) % ranks.size for ahead in (0, 1))
        if step + 1 == ranks.size:
            yield owner, block
            return
        arriving = places[step % 2][: job.counts.counts[following]]
        under_way = _pass_on(block, arriving, ranks)
        yield owner, block
        for work in under_way:
            work.wait()
        block = arriving


class _Train:
    """Gradients of the blocks, which circulate one step behind the blocks."""

    def __init__(self, columns: int, like: Tensor, job: Job) -> None:
        self.columns, self.like, self.job, self.step = columns, like, job, 0
        self.under_way: list[Any] = []

    def add(self, grad: Tensor) -> None:
        """Add this rank's gradient of the block in use to those that have arrived, and pass the sum on."""
        ranks, counts = self.job.ranks, self.job.counts.counts
        if self.step:
            grad += self.arrived()
        self.step += 1
        self.leaving = grad  # keeps it alive until it has been sent
        self.arriving = self.like.new_empty(counts[(ranks.rank + self.step) % ranks.size], self.columns)
        self.under_way = _pass_on(grad, self.arriving, ranks)

    def arrived(self) -> Tensor:
        """The sum that arrived from the right; after the last step it is the gradient of this rank's keys."""
        for work in self.under_way:
            work.wait()
        self.under_way = []
        return self.arriving


def _pass_on(leaving: Tensor, arriving: Tensor, ranks: Ranks) -> list[Any]:
    """Start to send to the left and to receive from the right. All ranks do it in the same order."""
    left, right = (dist.get_global_rank(ranks.group, (ranks.rank + side) % ranks.size) for side in (-1, 1))
    ends = [
        dist.P2POp(operation, tensor, peer, ranks.group)
        for operation, tensor, peer in ((dist.isend, leaving, left), (dist.irecv, arriving, right))
        if tensor.numel()
    ]
    return dist.batch_isend_irecv(ends) if ends else []
