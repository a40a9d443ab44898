"""The first product of a panel on Hopper and Blackwell: quack's, with our exponentials as its epilogue.

It is an engine of ``tiled/step.py``, not a backend. Reading order: ``epilogue`` (the kernel, a few lines of Python),
``contract`` (what it computes, in PyTorch), ``call`` (its tiles and arguments). quack is imported where a device is
there that it is for, and nothing fails without it: ``pip install "nckernels[hopper]"`` brings it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from functools import lru_cache

import torch
from torch import Tensor

from .contract import MOST_BETA, MOST_TAGS, Operand, PlainProduct, Product

__all__ = ["MAJORS", "Operand", "PlainProduct", "Product", "missing", "product", "takes", "why_not"]

MAJORS = (9, 10, 12)
"""Compute capabilities: Hopper, Blackwell for data centres and for desks."""


@lru_cache(maxsize=1)
def missing() -> str | None:
    """Why quack cannot be used on this machine, or None."""
    try:
        importlib.metadata.version("quack-kernels")
    except importlib.metadata.PackageNotFoundError:
        return 'quack-kernels is not installed (pip install "nckernels[hopper]")'
    try:
        importlib.import_module(f"{__name__}.call")
    except Exception as error:  # its interface, or that of what it stands on, may have moved on
        return f"quack-kernels cannot be imported: {type(error).__name__}: {error}"
    return None


@lru_cache(maxsize=64)
def why_not(device: torch.device) -> str | None:
    """Why the device has no such product, or None."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"there is none for {device.type if device.type != 'cuda' else 'ROCm'} devices"
    if torch.cuda.get_device_capability(device)[0] not in MAJORS:
        return "it needs compute capability 9, 10 or 12"
    return missing()


def takes(features: Tensor, prototypes: Tensor, beta: float) -> bool:
    """Whether a device's product takes such matrices, whose rows begin at multiples of 16 bytes, and such a beta."""
    return (
        features.dtype == torch.bfloat16
        and 0.0 < beta <= MOST_BETA
        and max(features.shape[0], prototypes.shape[0]) < MOST_TAGS
        and all(x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0 and x.shape[1] % 8 == 0 for x in (features, prototypes))
    )


@lru_cache(maxsize=64)
def product(device: torch.device) -> Product:
    """The device's, where ``why_not`` has no objection."""
    from .call import product_for

    return product_for(device)
