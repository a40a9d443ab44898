"""The choice of the backend: explicit, or the fastest one available.

The choice is process-wide. It is made by :func:`set_backend`, the context manager :func:`use_backend`, or the
environment variable ``NCKERNELS_BACKEND``, read at import. The workspace is set in the same ways:
:func:`set_workspace`, :func:`use_workspace`, ``NCKERNELS_WORKSPACE``.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from . import native
from .base import Backend, Spec
from .chunked import ChunkedBackend
from .cuda import CudaBackend
from .triton import TritonBackend

REFERENCE = "reference"
DEFAULT_WORKSPACE = 32 * 2**20
SHARE_OF_DEVICE = 256
"""The default workspace of a GPU is its memory divided by this, if that is more: wide panels multiply faster."""

#: All backends but the reference, which is plain differentiable PyTorch and no ``Backend``.
BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (TritonBackend(), CudaBackend(), native.BACKEND, ChunkedBackend())
}

#: The backends to try for each device type, fastest first; "any" for other types. The last one runs anywhere.
PREFERENCE: dict[str, tuple[str, ...]] = {
    "cuda": ("triton", "cuda", "chunked"),
    "cpu": ("native", "chunked") if native.SUPPORTED else ("chunked",),
    "any": ("chunked",),
}


@dataclass
class _Settings:
    backend: str | None
    workspace: int | str | None
    warned: bool = False


_settings = _Settings(os.environ.get("NCKERNELS_BACKEND") or None, os.environ.get("NCKERNELS_WORKSPACE") or None)


def backend_names() -> tuple[str, ...]:
    """All backends by name."""
    return (REFERENCE, *BACKENDS)


def chosen() -> str | None:
    """The explicit choice, or None for the automatic one."""
    return _settings.backend


def set_backend(name: str | None) -> None:
    """Run all following calls of the process on one backend; None returns to the automatic choice.

    Raises:
        ValueError: if there is no such backend, or something that it needs (a compiler, Triton, CUDA) is missing. A
            backend for GPUs can be chosen without a GPU; calls with tensors that it does not take raise an error.

    Example:
        >>> nckernels.set_backend("chunked")
        >>> nckernels.set_backend(None)  # the best one again
    """
    if name is not None and name != REFERENCE:
        reason = _prepared(_get(name, "backend"))
        if reason is not None:
            raise ValueError(f"backend {name!r} cannot run here: {reason}")
    _settings.backend = name


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Context manager form of :func:`set_backend`.

    Example:
        >>> x = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
        >>> with nckernels.use_backend("reference"):  # the only one with double backward
        ...     loss = nckernels.supcon_loss(x, torch.tensor([0, 0, 1, 1]))
        ...     (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        ...     gradient.square().sum().backward()
    """
    previous = _settings.backend
    set_backend(name)
    try:
        yield
    finally:
        _settings.backend = previous


def set_workspace(size: int) -> None:
    """Bound the scratch memory of all following calls of the process.

    Args:
        size: bytes, positive. The default is 32 MiB, or on CUDA and ROCm devices 1/256 of their memory if that is
            more (320 MiB of 80 GiB). A larger workspace allows larger tiles, which are faster, and on a CPU it keeps
            more of the similarity matrix for the backward pass, up to half of the workspace.

    Raises:
        ValueError: if ``size`` is not a positive integer.

    Example:
        >>> nckernels.set_workspace(32 * 2**20)  # bytes: the default on a CPU
    """
    _settings.workspace = _checked_workspace(size, "size")


@contextmanager
def use_workspace(size: int) -> Iterator[None]:
    """Context manager form of :func:`set_workspace`.

    Example:
        >>> x, w, y = torch.randn(64, 8), torch.randn(10, 8), torch.randint(10, (64,))
        >>> with nckernels.use_workspace(2**20):
        ...     loss = nckernels.nonl_loss(x, w, y)
    """
    previous = _settings.workspace
    set_workspace(size)
    try:
        yield
    finally:
        _settings.workspace = previous


def get_workspace(device: torch.device) -> int:
    """The bound on scratch memory for calls on ``device``, in bytes."""
    if _settings.workspace is None:
        if device.type != "cuda":
            return DEFAULT_WORKSPACE
        return max(DEFAULT_WORKSPACE, torch.cuda.get_device_properties(device).total_memory // SHARE_OF_DEVICE)
    if isinstance(_settings.workspace, str):  # from the environment, unchecked
        text = _settings.workspace
        _settings.workspace = _checked_workspace(int(text) if text.isdecimal() else text, "NCKERNELS_WORKSPACE")
    return _settings.workspace


def resolve(device: torch.device, dtype: torch.dtype) -> str:
    """The name of the backend for features on ``device`` in ``dtype``.

    Raises:
        ValueError: if the chosen backend does not exist or cannot take them; the message says why.
    """
    name = _settings.backend
    if name == REFERENCE:
        return name
    if name is not None:
        backend = _get(name, "NCKERNELS_BACKEND or set_backend")
        reason = _prepared(backend) or backend.why_not(device, dtype)
        if reason is not None:
            raise ValueError(f"backend {name!r} was chosen but cannot run: {reason}")
        return name
    for rank, candidate in enumerate(PREFERENCE.get(device.type, PREFERENCE["any"])):
        backend = BACKENDS[candidate]
        missing = backend.missing()
        if missing is not None:
            if rank == 0:  # no warning for a missing second choice
                _warn_once(candidate, missing)
        elif backend.why_not(device, dtype) is None:
            return candidate
    raise ValueError(f"no backend takes {dtype} on {device}: " + "; ".join(explain(device, dtype).values()))


def can_step(name: str, features: Tensor, prototypes: Tensor, spec: Spec, options: bool = False) -> bool:
    """Whether the backend computes loss and gradient of such a problem in one step; ``options``: with options."""
    if name not in BACKENDS or (options and not BACKENDS[name].step_options):
        return False
    return BACKENDS[name].can_step(features, prototypes, spec)


def has_dot_regression(name: str) -> bool:
    """Whether the backend implements dot regression."""
    return name in BACKENDS and BACKENDS[name].dot_regression


def explain(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """For each backend "ready", or why it does not take features on ``device`` in ``dtype``."""
    reasons = {name: b.missing() or b.why_not(device, dtype) or "ready" for name, b in BACKENDS.items()}
    return {REFERENCE: "ready"} | reasons


def _prepared(backend: Backend) -> str | None:
    """Prepare a backend that was chosen by name. Returns why it cannot run on this machine, or None."""
    if backend.missing() is None:
        return None
    try:
        backend.prepare()
    except RuntimeError as error:
        return str(error)
    return backend.missing()


def _get(name: str, origin: str) -> Backend:
    if name not in BACKENDS:
        raise ValueError(f"{origin}: unknown backend {name!r}, expected one of {', '.join(backend_names())}")
    return BACKENDS[name]


def _checked_workspace(size: object, name: str) -> int:
    if not isinstance(size, int) or isinstance(size, bool) or size <= 0:
        raise ValueError(f"{name} must be a positive number of bytes, got {size!r}")
    return size


def _warn_once(name: str, reason: str) -> None:
    if not _settings.warned and not torch.compiler.is_compiling():
        _settings.warned = True
        first, _, more = reason.partition("\n")
        advice = f" (nckernels.set_backend({name!r}) shows the full message)" if more else ""
        warnings.warn(f"nckernels: falling back from backend {name!r}: {first}{advice}", stacklevel=2)
