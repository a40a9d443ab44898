"""The first product of a panel on Hopper and Blackwell: quack's GEMM with our exponentials as its epilogue.

It is an engine of ``tiled/step.py``, not a backend. Reading order: ``epilogue`` (the kernel, a few lines of Python),
``contract`` (its definition in PyTorch), ``call`` (its tiles and arguments). quack is optional and is imported only if
there is a device for it; ``pip install "nckernels[hopper]"`` installs it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import warnings
from functools import lru_cache

import torch
from torch import Tensor

from .contract import MOST_BETA, MOST_TAGS, Operand, PlainProduct, Product

__all__ = ["MAJORS", "Operand", "PlainProduct", "Product", "missing", "product", "takes", "why_not"]

MAJORS = (9, 10, 12)
"""Major compute capabilities: Hopper, data-centre Blackwell, consumer Blackwell."""

SWITCH = "NCKERNELS_QUACK"
"""Environment variable: 0 disables quack."""


@lru_cache(maxsize=1)
def missing() -> str | None:
    """Why quack cannot be used on this machine, or None."""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0"
    try:
        importlib.metadata.version("quack-kernels")
    except importlib.metadata.PackageNotFoundError:
        return 'quack-kernels is not installed (pip install "nckernels[hopper]")'
    try:
        importlib.import_module(f"{__name__}.call")
    except Exception as error:  # its interface, or that of a dependency, may have changed
        return f"quack-kernels cannot be imported: {type(error).__name__}: {error}"
    return None


@lru_cache(maxsize=64)
def why_not(device: torch.device) -> str | None:
    """Why quack's product cannot be used on the device, or None."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"it does not support {device.type if device.type != 'cuda' else 'ROCm'} devices"
    if torch.cuda.get_device_capability(device)[0] not in MAJORS:
        return "it needs compute capability 9, 10 or 12"
    return missing()


def takes(features: Tensor, prototypes: Tensor, beta: float) -> bool:
    """Whether the product takes these matrices (bfloat16, rows at multiples of 16 bytes) and this beta."""
    return (
        features.dtype == torch.bfloat16
        and 0.0 < beta <= MOST_BETA
        and max(features.shape[0], prototypes.shape[0]) < MOST_TAGS
        and all(x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0 and x.shape[1] % 8 == 0 for x in (features, prototypes))
    )


@lru_cache(maxsize=64)
def product(device: torch.device, tagged: bool) -> Product | None:
    """The product of a device for which ``why_not`` is None, compiled for operands with or without tags.

    None, with a warning, if it does not compile: the vendor's library is used instead.
    """
    from .call import product_for

    n, d = 128, 64
    try:
        found = product_for(device)
        width = -(-n // found.columns) * found.columns
        rows = torch.empty(n, d, dtype=torch.bfloat16, device=device)
        e = torch.empty(n, n, dtype=torch.bfloat16, device=device)
        of_p, of_q = torch.empty(n, device=device), torch.empty(width, device=device)
        p, q = (Operand(rows, x, x if tagged else None) for x in (of_p, of_q))
        found.compile(p, q, 1.0, e, torch.empty(n, width // found.columns, device=device))
    except Exception as error:  # any failure of the compiler: the library's product is used instead
        message = f"quack's product does not compile for {device}; using the library's product instead: {error}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return None
    return found
