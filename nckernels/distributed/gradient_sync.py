"""Makes DistributedDataParallel and ``fully_shard`` reduce gradients once per step, after many backward passes.

Both reduce the accumulated ``.grad`` at the end of a backward pass that reaches every parameter. Here this is the last
pass of a step, which need not reach all parameters by itself: parameters of the loss may have their gradients already,
and the last samples may use frozen parts only. A hook makes the pass reach them without adding a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree


class GradientSync:
    """The wrappers in ``module`` that reduce gradients: DistributedDataParallel and ``fully_shard``."""

    def __init__(self, module: nn.Module) -> None:
        wrappers = list(_outermost(module))
        if any(getattr(x, "static_graph", False) for x in wrappers):
            raise ValueError(
                "DistributedDataParallel with static_graph=True fails, or stops reducing gradients, where several "
                "backward passes make one step (PyTorch issue 143580); leave static_graph out"
            )
        self._replicated = [x for x in wrappers if isinstance(x, DistributedDataParallel)]
        self._sharded: list[Any] = [x for x in wrappers if not isinstance(x, DistributedDataParallel)]

    def broadcast_buffers(self) -> None:
        """Broadcast rank 0's buffers now, as DistributedDataParallel would in its next forward pass."""
        for wrapper in self._replicated:
            if wrapper._check_sync_bufs_pre_fwd():
                wrapper._sync_buffers()
                wrapper.require_forward_param_sync = False  # until the end of the next pass that reduces gradients

    @contextmanager
    def none(self) -> Iterator[None]:
        """Forward and backward passes inside do not reduce gradients."""
        with ExitStack() as stack:
            for wrapper in self._replicated:
                stack.enter_context(wrapper.no_sync())
            for wrapper in self._sharded:
                stack.callback(wrapper.set_requires_gradient_sync, True)
                wrapper.set_requires_gradient_sync(False)
            yield

    @contextmanager
    def once(self) -> Iterator[None]:
        """One forward and backward pass inside reduces all gradients that have accumulated by its end.

        (Except in DistributedDataParallel if the user's ``no_sync`` is active.)
        """
        reached: list[nn.Module] = []
        with ExitStack() as stack:
            for wrapper in self._replicated:
                parameters = [p for p in wrapper.module.parameters() if p.requires_grad]
                hook = _reaching(parameters, partial(reached.append, wrapper))
                stack.enter_context(wrapper.module.register_forward_hook(hook))
            for wrapper in self._sharded:
                wrapper.set_requires_gradient_sync(True)
                # ``fully_shard`` needs only a gradient at its output; a dummy leaf ensures that there is one.
                hook = _reaching([torch.zeros((), requires_grad=True)], partial(reached.append, wrapper))
                stack.enter_context(wrapper.register_forward_hook(hook, prepend=True))
            yield
        if any(x not in reached for x in self._replicated + self._sharded):
            raise RuntimeError(
                "gradients have not been reduced: the encoder's output for the last micro-batch does not depend on "
                "that of a module in it which is wrapped in DistributedDataParallel or fully_shard"
            )


def _outermost(module: nn.Module) -> Iterator[nn.Module]:
    if isinstance(module, DistributedDataParallel) or hasattr(module, "set_requires_gradient_sync"):
        yield module
        return
    for child in module.children():
        yield from _outermost(child)


def _reaching(parameters: list[Tensor], notify: Callable[[], None]) -> Callable[..., Any]:
    """A forward hook: a backward pass from any output calls ``notify`` and continues to ``parameters``."""

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        values, structure = pytree.tree_flatten(output)
        places = [i for i, x in enumerate(values) if isinstance(x, Tensor) and x.is_floating_point()]
        reached = _Reach.apply(notify, len(places), *(values[i] for i in places), *parameters)
        for i, x in zip(places, reached, strict=True):
            values[i] = x
        return pytree.tree_unflatten(values, structure)

    return hook


class _Reach(torch.autograd.Function):
    """Copies of the first ``count`` tensors. Autograd also visits the other tensors, but gives them no gradient."""

    @staticmethod
    def forward(ctx: Any, notify: Callable[[], None], count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.notify, ctx.others = notify, len(tensors) - count
        return tuple(x.clone() for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.notify()
        return None, None, *grads, *[None] * ctx.others
