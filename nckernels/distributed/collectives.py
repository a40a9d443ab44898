"""Collectives with gradients.

The gradient of a rank's tensor is that of the sum of all ranks' results. So the backward pass of an all-reduce sums the
ranks' upstream gradients, and the backward pass of an all-gather sums each row's gradients on the rank that owns it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends import registry
from .groups import Ranks

# torch 2.13 renamed these and warns about the old names. A build without distributed has neither.
_gather_into: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)


class Sizes(NamedTuple):
    """The number of rows on every rank, and the smallest of their workspaces."""

    counts: tuple[int, ...]
    rank: int
    workspace: int

    @property
    def own(self) -> slice:
        """This rank's rows in the concatenation of all."""
        return self.of(self.rank)

    def of(self, rank: int) -> slice:
        """The rows of a rank in the concatenation of all."""
        start = sum(self.counts[:rank])
        return slice(start, start + self.counts[rank])

    @property
    def total(self) -> int:
        return sum(self.counts)

    @property
    def longest(self) -> int:
        return max(self.counts)

    @property
    def equal(self) -> bool:
        return min(self.counts) == self.longest


def sizes(rows: Tensor, ranks: Ranks) -> Sizes:
    """What all ranks must know before they exchange rows.

    The workspace decides how rows travel. Ranks may have different ones, for example on GPUs with different amounts of
    memory, so all go by the smallest.

    The numbers are exchanged between hosts if the group has a CPU backend ("cpu:gloo,cuda:nccl", the default of
    ``init_process_group()``). In a group with NCCL alone they are exchanged between GPUs, and the host waits for them.
    """
    if torch.compiler.is_compiling():
        torch._dynamo.graph_break("the host has to know how many rows all ranks have")  # type: ignore[no-untyped-call]
    by_host = "cpu" in dist.get_backend_config(ranks.group)
    mine = torch.tensor([len(rows), registry.get_workspace(rows.device)], device="cpu" if by_host else rows.device)
    found = mine.new_empty(2 * ranks.size)
    _gather_into(found, mine, group=ranks.group)
    numbers = found.tolist()
    return Sizes(tuple(numbers[::2]), ranks.rank, min(numbers[1::2]))


def all_reduce(x: Tensor, ranks: Ranks) -> Tensor:
    """The sum over all ranks; ``x`` has the same shape on each."""
    return _Sum.apply(x, ranks)  # type: ignore[no-any-return, no-untyped-call]


def gather(rows: Tensor, counts: Sizes, ranks: Ranks) -> Tensor:
    """The rows of all ranks in the order of the ranks, (n_r, ...) -> (N, ...)."""
    return _Gather.apply(rows, counts, ranks)  # type: ignore[no-any-return, no-untyped-call]


def logsumexp(lse: Tensor, ranks: Ranks) -> Tensor:
    """Log-sum-exp over all ranks, elementwise; -inf, without gradient, where all of them have -inf."""
    return _LogSumExp.apply(lse, ranks)  # type: ignore[no-any-return, no-untyped-call]


def shared_logsumexp(lse: Tensor, weight: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    r"""This rank's share of a weighted sum of log-sum-exps over all ranks, and the sum of all weights.

    .. math::
        \sum_c a_{rc} \log \sum_q e^{l_{qc}} \qquad \sum_q \sum_c a_{qc}

    Every rank's share depends on the ``lse`` l of all ranks. The gradient of the sum of all shares needs only the sum
    of all weights a, which is exchanged together with the exponentials, so the backward pass exchanges nothing. This
    requires the same upstream gradient on all ranks, as is the case when each calls ``backward()`` on its loss.

    Args:
        lse: (K,), -inf where this rank has no terms. Where all ranks have -inf, the log-sum-exp counts as 0.
        weight: (K,), the weights of this rank.
    """
    return _SharedLogSumExp.apply(lse, weight, ranks)  # type: ignore[no-any-return, no-untyped-call]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return _summed(x, ranks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _summed(grad, ctx.ranks), None


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, lse: Tensor, ranks: Ranks) -> Tensor:
        top = _top(lse, ranks)
        terms = (lse - top).exp()
        total = _summed(terms, ranks)
        ctx.ranks = ranks
        ctx.save_for_backward(terms, total)
        return total.log() + top

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        terms, total = ctx.saved_tensors
        grad = _summed(grad.masked_fill(total == 0.0, 0.0), ctx.ranks)
        return grad * _share(terms, total), None


class _SharedLogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, lse: Tensor, weight: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
        top = _top(lse, ranks)
        terms = (lse - top).exp()
        both = terms.new_empty(2, *terms.shape)  # not torch.stack: Inductor would then reduce ``terms`` in place
        both[0], both[1] = terms, weight
        total, weights = _summed(both, ranks)
        whole = (total.log() + top).masked_fill(total == 0.0, 0.0)
        ctx.ranks = ranks
        ctx.save_for_backward(weights * _share(terms, total), whole)
        return (weight * whole).sum(), weights.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, of_total: Tensor) -> tuple[Tensor | None, ...]:
        coefficient, whole = ctx.saved_tensors
        by_weight = None
        if ctx.needs_input_grad[1]:
            by_weight = grad * whole + _summed(of_total, ctx.ranks)
        return grad * coefficient, by_weight, None


class _Gather(torch.autograd.Function):
    """Collectives need equal sizes, so rows are padded to the number of rows of the longest rank."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: Sizes, ranks: Ranks) -> Tensor:
        ctx.counts, ctx.ranks = counts, ranks
        longest = counts.longest
        gathered = rows.new_empty(ranks.size * longest, *rows.shape[1:])
        _gather_into(gathered, _padded(rows, longest), group=ranks.group)
        if counts.equal:
            return gathered
        blocks = gathered.split(longest) if longest else []
        return torch.cat([block[:n] for block, n in zip(blocks, counts.counts, strict=False)] or [gathered])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        counts, ranks = ctx.counts, ctx.ranks
        wide = (grad.float() if grad.dtype.itemsize < 4 else grad).contiguous()  # gradients of many ranks are summed
        if not counts.equal:
            wide = torch.cat([_padded(block, counts.longest) for block in wide.split(counts.counts)])
        own = wide.new_empty(counts.longest, *grad.shape[1:])
        _reduce_scatter(own, wide, group=ranks.group)
        return own[: counts.counts[ranks.rank]].to(grad.dtype), None, None


def _summed(x: Tensor, ranks: Ranks) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=ranks.group)
    return total


def _top(lse: Tensor, ranks: Ranks) -> Tensor:
    """The maximum over all ranks, which keeps the exponentials from overflowing; 0 where all ranks have -inf."""
    top = lse.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=ranks.group)
    return top.masked_fill(top == -torch.inf, 0.0)


def _share(terms: Tensor, total: Tensor) -> Tensor:
    """exp(lse - whole), this rank's share of the sum of exponentials; 0 where the sum has no terms."""
    return (terms / total).masked_fill(total == 0.0, 0.0)


def _padded(rows: Tensor, length: int) -> Tensor:
    missing = length - len(rows)
    return F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, missing)) if missing else rows.contiguous()
