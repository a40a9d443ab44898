"""Runs a module on micro-batches twice, with the same result both times.

A forward pass reads and changes the state of the random number generators and the buffers of the module (running
statistics, power iterations, moving averages), and it depends on the settings of autocast. The second run starts from
the same state as the first. At its end, generators and buffers are restored to the state before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import get_device_states, set_device_states


class Call:
    """``module(*args, **kwargs)`` in slices of ``size`` samples; the arguments are kept, not copied.

    Either :meth:`first` for all slices within :meth:`first_run`, then :meth:`again` for all of them, in the same
    order, within :meth:`second_run`; or just :meth:`once`.
    """

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], size: int) -> None:
        self.module = module
        self._values, self._structure = pytree.tree_flatten((args, kwargs))
        self.samples = _samples(self._values)
        self.slices = [slice(i, min(i + size, self.samples)) for i in range(0, max(self.samples, 1), size)]
        tensors = [x for x in self._values if isinstance(x, Tensor)]
        self._devices = _accelerators([*module.parameters(), *module.buffers(), *tensors])
        self._autocast = [_Autocast.now(kind) for kind in {"cpu", *(device.type for device in self._devices)}]
        self._random: list[_Random] = []  # before every micro-batch of the first run

    @contextmanager
    def first_run(self) -> Iterator[None]:
        """Context of the first run. If it fails, the buffers are restored."""
        self._versions, self._buffers = _versions(self._values), _Buffers(self.module)
        try:
            yield
        except BaseException:
            self._buffers.restore()
            raise
        finally:
            # PyTorch 2.10's autocast caches the weights that it has cast. These have no gradient here, so later code
            # must not find them (PyTorch issue 158232).
            torch.clear_autocast_cache()

    @contextmanager
    def second_run(self) -> Iterator[None]:
        """Context of the second run. At its end buffers and random state are restored, also after an error."""
        if _versions(self._values) != self._versions:
            raise RuntimeError(
                "an input of the encoder was changed in place after MicroBatches got it, perhaps by the encoder "
                "itself; the second run would not see what the first one saw"
            )
        buffers, random = _Buffers(self.module), _Random.now(self._devices)
        try:
            self._buffers.restore()
            yield
        finally:
            buffers.restore()
            random.restore()

    def first(self, i: int) -> list[Tensor]:
        """The outputs for slice i, without gradient."""
        self._random.append(_Random.now(self._devices))
        with torch.no_grad():
            return self.once(i)

    def again(self, i: int) -> list[Tensor]:
        """The outputs for slice i, with gradient."""
        self._random[i].restore()
        with ExitStack() as stack:
            for mode in self._autocast:
                stack.enter_context(mode.context())
            return self.once(i)

    def once(self, i: int) -> list[Tensor]:
        """The outputs for slice i."""
        rows = self.slices[i]
        values = [x[rows] if _has_rows(x) else x for x in self._values]
        args, kwargs = pytree.tree_unflatten(values, self._structure)
        outputs, self._returned = pytree.tree_flatten(self.module(*args, **kwargs))
        count = rows.stop - rows.start
        for x in outputs:
            if not isinstance(x, Tensor):
                raise TypeError(f"the encoder must return tensors, got {type(x).__name__}")
            if x.dim() == 0 or x.shape[0] != count:
                raise ValueError(
                    f"every output of the encoder must have one row per sample, got shape {tuple(x.shape)} for {count} "
                    f"samples; what belongs to the batch as a whole, such as a temperature, is for the loss to take "
                    f"from the module itself"
                )
        return outputs

    def unflatten(self, outputs: list[Tensor]) -> Any:
        """Outputs in the structure in which the module returns them."""
        return pytree.tree_unflatten(outputs, self._returned)


def _has_rows(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _samples(values: list[Any]) -> int:
    """The number of rows that all tensors have."""
    shapes = [tuple(x.shape) for x in values if _has_rows(x)]
    if not shapes:
        raise ValueError("inputs must hold a tensor with one row per sample, got none")
    if any(shape[0] != shapes[0][0] for shape in shapes):
        raise ValueError(f"all tensors in the inputs must have one row per sample, got shapes {shapes}")
    if any(isinstance(x, Tensor) and x.requires_grad for x in values):
        raise ValueError("inputs must not require grad: gradients go to the parameters of the encoder only")
    return shapes[0][0]


def _versions(values: list[Any]) -> list[int]:
    """Version counters of the tensors, which in-place changes increment."""
    return [x._version for x in values if isinstance(x, Tensor) and not x.is_inference()]


def _accelerators(tensors: list[Tensor]) -> list[torch.device]:
    """Devices with a random state of their own."""
    return list({x.device for x in tensors if x.device.type not in ("cpu", "meta")})


class _Random(NamedTuple):
    """The state of the random number generators."""

    cpu: Tensor
    devices: list[int]
    states: list[Tensor]
    kind: str

    @staticmethod
    def now(devices: list[torch.device]) -> _Random:
        states = get_device_states(*(torch.empty(0, device=device) for device in devices))
        return _Random(torch.get_rng_state(), *states, devices[0].type if devices else "meta")

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        set_device_states(self.devices, self.states, device_type=self.kind)


class _Autocast(NamedTuple):
    """Whether and how autocast is on for one type of device."""

    kind: str
    enabled: bool
    dtype: torch.dtype
    cache: bool

    @staticmethod
    def now(kind: str) -> _Autocast:
        dtype, cache = torch.get_autocast_dtype(kind), torch.is_autocast_cache_enabled()
        return _Autocast(kind, torch.is_autocast_enabled(kind), dtype, cache)

    def context(self) -> torch.autocast:
        return torch.autocast(self.kind, self.dtype, self.enabled, self.cache)


class _Buffers:
    """The buffers of a module and copies of their values."""

    def __init__(self, module: nn.Module) -> None:
        self._copies = [
            (owner, name, buffer, buffer.detach().clone())
            for owner in module.modules()
            for name, buffer in owner.named_buffers(recurse=False)
        ]

    def restore(self) -> None:
        with torch.no_grad():
            for owner, name, buffer, value in self._copies:
                buffer.copy_(value)
                setattr(owner, name, buffer)  # for modules that replace the tensor
