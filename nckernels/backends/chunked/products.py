"""Where 16-bit matrices multiply faster than float32 ones, and products of them.

Rows of a 16-bit tensor are exact in 16 bits; their unit vectors are not. So rows are multiplied as they are, or times
powers of two, and norms are applied to the product.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
_FEWEST = 48  # rows and columns from which products in 16 bits save more than the exact logits of positives cost
_LEAST = 2**24  # multiplications of a product from which that is more than the time of the calls


def pay(z: Tensor, w: Tensor, small_logits: bool) -> bool:
    """Whether to multiply features and prototypes in 16 bits.

    Where products come back rounded, by 2^-9 of a logit, ``small_logits`` says whether that does not matter.
    """
    if not fast(z.device, z.dtype):
        return False
    if has_wide_product(z.device.type):
        return True
    (m, d), k = z.shape, w.shape[0]
    return small_logits and min(m, k) >= _FEWEST and m * k * d >= _LEAST


def fast(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device multiplies matrices of a 16-bit type at twice the rate of float32 or more, and usably.

    Float16 has too few exponents for sums that come back in it: its products must come in float32.
    """
    if dtype not in HALF or (dtype == torch.float16 and not has_wide_product(device.type)):
        return False
    if device.type == "cpu":
        return _mkldnn_enabled() and _has_bfloat16_units()
    if device.type == "cuda":
        return _has_tensor_cores(dtype, device.index)
    return device.type in ("xpu", "mps")


def _mkldnn_enabled() -> bool:
    """Whether oneDNN may multiply; without it ATen's own loops do, which are slower in 16 bits than in 32."""
    return torch.backends.mkldnn.is_available() and torch._C._get_mkldnn_enabled()


@functools.cache
def _has_bfloat16_units() -> bool:
    """AMX or AVX512-BF16, by torch's reading of cpuid, as oneDNN looks for them. On other CPUs operands are converted
    on the way. (Float16 without such a unit is 50 times slower than float32: torch 2.13 on Zen 4.)"""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


@functools.cache
def _has_tensor_cores(dtype: torch.dtype, index: int | None) -> bool:
    """Of float16 since sm_70, of bfloat16 since sm_80 (CUDA's programming guide); AMD's matrix cores take both."""
    if torch.version.hip is not None:
        return True
    return torch.cuda.get_device_capability(index) >= ((8, 0) if dtype == torch.bfloat16 else (7, 0))


def product(a: Tensor, b: Tensor) -> Tensor:
    """The product in float32 where PyTorch offers that, as on CUDA, or else rounded to the operands' type."""
    if has_wide_product(a.device.type):
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b)


@functools.cache
def has_wide_product(device: str) -> bool:
    """Whether there is a product of 16-bit matrices with a float32 result, by trying once."""
    one = torch.ones(8, 8, dtype=torch.bfloat16, device=device)
    try:
        torch.mm(one, one, out_dtype=torch.float32)
    except (RuntimeError, NotImplementedError, TypeError):
        return False
    return True
