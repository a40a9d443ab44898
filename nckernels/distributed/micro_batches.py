"""The gradient of a batch that does not fit into memory, from micro-batches that run twice."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import _checks
from .gradient_sync import GradientSync
from .replay import Call
from .streamed import ByClass, streamed_loss


class MicroBatches:
    r"""Runs an encoder on micro-batches, with the loss and the gradient of the whole batch.

    A contrastive loss of a batch is not the sum of the losses of its parts, so accumulated gradients are those of
    another loss. Here each micro-batch runs twice (gradient caching, Gao et al. 2021, arXiv 2101.06983). The first
    run, without gradient, computes the features of the whole batch. Any loss of these features, and its ``backward()``,
    give their gradient. The second run, :meth:`backward`, builds the graph of one micro-batch at a time and propagates
    that gradient through it. Memory is that of one micro-batch's graph and of the features; the price is a second
    forward pass.

    Three lines of a training loop change::

        micro = nckernels.MicroBatches(encoder, 64)  # once

        features = micro(x)                          # was: encoder(x)
        loss = criterion(features, y)
        loss.backward()
        micro.backward()                             # new
        optimizer.step()

    Everything else stays: gradient accumulation, clipping, GradScaler, autocast (the second run uses the settings of
    the first), losses with a ``process_group``. ``micro`` may be called several times before ``loss.backward()``. Use
    one ``MicroBatches`` for each of two encoders.

    Args:
        encoder: a module that returns tensors with one row per sample. Wrap it in DistributedDataParallel or
            ``fully_shard`` first: they then reduce gradients once, in the last backward pass of :meth:`backward`,
            together with those of the loss's parameters if these are in the wrapped module.
        micro_batch_size: samples per micro-batch, at least 1; the last one of a batch may have fewer.

    Both runs compute the same:

    - Dropout and similar layers see the same random numbers, on the CPU and on accelerators. (Generators of Python and
      NumPy are not restored.)
    - Buffers are updated once. BatchNorm normalises with the statistics of the micro-batch, in both runs, and its
      running statistics are those of one pass over the micro-batches. One pass over the whole batch would give other
      results, because it would normalise with the statistics of that batch. The second run starts with copies of all
      buffers as they were (power iterations, moving averages). State that is not a buffer is not covered.
    - An encoder that changes its input in place is an error.

    Ranks may have batches of different sizes and different numbers of micro-batches, unless the forward pass
    communicates (SyncBatchNorm, ``fully_shard``).

    Raises:
        TypeError: if ``encoder`` is not a module, or ``micro_batch_size`` not an int.
        ValueError: if ``micro_batch_size`` is below 1, or for DistributedDataParallel with ``static_graph=True``.

    Example:
        >>> encoder, criterion = nn.Linear(8, 16), nckernels.NONLLoss(16, 10)
        >>> micro = nckernels.MicroBatches(encoder, 32)
        >>> x, y = torch.randn(100, 8), torch.randint(10, (100,))
        >>> criterion(micro(x), y).backward()
        >>> micro.backward()
        >>> (whole,) = torch.autograd.grad(criterion(encoder(x), y), encoder.weight)
        >>> torch.testing.assert_close(encoder.weight.grad, whole)
    """

    def __init__(self, encoder: nn.Module, micro_batch_size: int) -> None:
        if not isinstance(encoder, nn.Module):
            raise TypeError(f"encoder must be a torch.nn.Module, got {type(encoder).__name__}")
        _checks.positive_integer("micro_batch_size", micro_batch_size)
        self.encoder, self.micro_batch_size = encoder, micro_batch_size
        self._reduction = GradientSync(encoder)
        self._pending: dict[Call, dict[int, Tensor]] = {}  # outputs that have a gradient, by index

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The first run: what ``encoder(*args, **kwargs)`` returns, for the whole batch.

        Args:
            args, kwargs: arguments of the encoder, also in tuples, lists and dictionaries. Tensors have one row per
                sample and are split. 0-dimensional tensors and other values go to every micro-batch unchanged. Tensors
                may be on the CPU if the encoder moves its inputs. None may require grad.

        Returns:
            Tensors with one row per sample, in the tuple, list or dictionary that the encoder returns. Tensors of a
            floating dtype are leaves, and require grad if a parameter of the encoder does. Under ``torch.no_grad()``
            they do not, and :meth:`backward` is not needed.

        Raises:
            RuntimeError: if :meth:`backward` has not been called after an earlier ``loss.backward()``.
            TypeError, ValueError: for other inputs and outputs than these.
        """
        if self._pending:
            raise RuntimeError(
                "features of an earlier call have a gradient that has not reached the encoder: call backward() of "
                "MicroBatches after that of the loss, or discard() to leave that step out"
            )
        call = Call(self.encoder, args, kwargs, self.micro_batch_size)
        self._reduction.broadcast_buffers()  # before they are copied for the second run
        with call.first_run():
            parts = [call.first(i) for i in range(len(call.slices))]
        features = [torch.cat(column) for column in zip(*parts, strict=True)]
        if torch.is_grad_enabled() and self._trained():
            for i, x in enumerate(features):
                if x.is_floating_point():
                    # The call lives as long as the features, unless they get a gradient.
                    x.requires_grad_().register_post_accumulate_grad_hook(partial(self._remember, call, i))
        return call.unflatten(features)

    def backward(self, *, sync: bool = True) -> None:
        """The second run, after ``loss.backward()``: propagates the features' gradient to the encoder's parameters.

        Args:
            sync: whether DistributedDataParallel and ``fully_shard`` reduce gradients, once, at the end. For gradient
                accumulation pass False in all steps but the last. ``DistributedDataParallel.no_sync()`` around the step
                has the same effect.

        Raises:
            RuntimeError: if no gradient has reached the features, or if an input was changed in place since.
        """
        pending, self._pending = list(self._pending.items()), {}
        if not pending and self._trained():
            raise RuntimeError("no gradient has reached the features: call backward() of the loss first")
        while pending:
            call, features = pending.pop(0)
            gradients = {i: cast(Tensor, x.grad) for i, x in features.items()}
            for x in features.values():
                x.grad = None
            with call.second_run():
                for i, rows in enumerate(call.slices):
                    last = not pending and i + 1 == len(call.slices)
                    with self._synced(sync and last):
                        outputs = call.again(i)
                        trained = [j for j in gradients if outputs[j].requires_grad]  # frozen parts do not
                        if trained:
                            torch.autograd.backward(
                                [outputs[j] for j in trained], [gradients[j][rows] for j in trained]
                            )

    def discard(self) -> None:
        """Drop the gradients that wait for :meth:`backward`, to skip a step after ``loss.backward()``."""
        self._pending = {}

    def stream(
        self,
        criterion: nn.Module,
        target: Tensor,
        /,
        *args: Any,
        scale: Callable[[Tensor], Tensor] | None = None,
        sync: bool = True,
        **kwargs: Any,
    ) -> Tensor:
        """Loss and gradient of ``criterion(encoder(*args, **kwargs), target)``, keeping no features of the batch.

        For losses with prototypes, which need only a number per class of the whole batch (NTCE and NONL: micro-batches
        run twice) or the total weight (NormFace, and NONL with ``direction="instance"``: they run once). NTCE and NONL
        compare every micro-batch with all K prototypes, in each run. If the features of the batch fit into memory,
        :meth:`__call__` and :meth:`backward` are quicker.

        Args:
            criterion: :class:`NONLLoss`, :class:`NTCELoss`, :class:`NormFaceLoss` or :class:`PrototypeClassifier`.
            target: (M,) labels, or (M, ...) for an encoder that returns (B, ..., d).
            args, kwargs: arguments of the encoder, which must return one tensor (B, d) or (B, ..., d).
            scale: a linear function that the training loop would apply to the loss before ``backward()``:
                ``scaler.scale``, or ``lambda loss: loss / steps``.
            sync: as in :meth:`backward`.

        Returns:
            The loss, a scalar without graph, not scaled. The gradients of encoder, prototypes and temperature have been
            added to their ``.grad``.

        Raises:
            TypeError, ValueError: for other criteria, targets, inputs and outputs than these.

        Example:
            >>> encoder, criterion = nn.Linear(8, 16), nckernels.NONLLoss(16, 10)
            >>> micro = nckernels.MicroBatches(encoder, 32)
            >>> x, y = torch.randn(100, 8), torch.randint(10, (100,))
            >>> loss = micro.stream(criterion, y, x)  # was: loss = criterion(encoder(x), y); loss.backward()
            >>> torch.testing.assert_close(loss, criterion(encoder(x), y).detach())
        """
        target = _checks.class_indices(target)
        call = Call(self.encoder, args, kwargs, self.micro_batch_size)
        if target.shape[:1] != (call.samples,):
            raise ValueError(
                f"target must have one label for each of {call.samples} samples, got {tuple(target.shape)}"
            )
        loss = streamed_loss(criterion, target)
        if isinstance(loss, ByClass):
            self._reduction.broadcast_buffers()
            with call.first_run():
                for i, rows in enumerate(call.slices):
                    loss.collect(_only(call.first(i)), rows)
            loss.collected()
        run, context = (call.again, call.second_run()) if isinstance(loss, ByClass) else (call.once, nullcontext())
        with context:
            for i, rows in enumerate(call.slices):
                with self._synced(sync and i + 1 == len(call.slices)):
                    part = loss.part(_only(run(i)), rows)
                    if part.requires_grad:
                        (part if scale is None else scale(part)).backward()
        return loss.value()

    def _remember(self, call: Call, index: int, features: Tensor) -> None:
        """Note that an output of a call has a gradient."""
        self._pending.setdefault(call, {})[index] = features

    def _trained(self) -> bool:
        return any(p.requires_grad for p in self.encoder.parameters())

    def _synced(self, sync: bool) -> AbstractContextManager[None]:
        """Context of one forward and backward pass; with ``sync`` it ends by reducing gradients."""
        return self._reduction.once() if sync else self._reduction.none()


def _only(outputs: list[Tensor]) -> Tensor:
    if len(outputs) != 1:
        raise ValueError(f"the encoder must return one tensor of features, got {len(outputs)}")
    return outputs[0]
