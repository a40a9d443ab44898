"""Products of 16-bit matrices, and where they are faster than float32.

Rows of a 16-bit tensor are exact in 16 bits, their unit vectors are not. So the rows are multiplied without
normalisation, or times powers of two, and the norms are applied to the product.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
_FEWEST = 48  # least rows and columns for which 16-bit products save more than the exact positive logits cost
_LEAST = 2**24  # least multiplications of a product for which the savings exceed the overhead of the calls


def use_half(z: Tensor, w: Tensor, small_logits: bool) -> bool:
    """Whether to multiply features and prototypes in 16 bits.

    Where PyTorch rounds the products, to a relative error of 2^-9, they are used only with ``small_logits``.
    """
    if not fast(z.device, z.dtype):
        return False
    if has_wide_product(z.device.type):
        return True
    (m, d), k = z.shape, w.shape[0]
    return small_logits and min(m, k) >= _FEWEST and m * k * d >= _LEAST


def fast(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device multiplies matrices of a 16-bit dtype at twice the rate of float32 or more.

    Float16 has too small a range for results, so its products must be available in float32.
    """
    if dtype not in HALF or (dtype == torch.float16 and not has_wide_product(device.type)):
        return False
    if device.type == "cpu":
        return _mkldnn_enabled() and _has_bfloat16_units()
    if device.type == "cuda":
        return _has_tensor_cores(dtype, device.index)
    return device.type in ("xpu", "mps")


def _mkldnn_enabled() -> bool:
    """Whether torch uses oneDNN. Without it ATen's own loops run, which are slower in 16 bits than in float32."""
    return torch.backends.mkldnn.is_available() and torch._C._get_mkldnn_enabled()


@functools.cache
def _has_bfloat16_units() -> bool:
    """Whether torch finds AMX or AVX512-BF16, which oneDNN uses. On other CPUs oneDNN converts the operands.

    (Float16 without such a unit is 50 times slower than float32: torch 2.13 on Zen 4.)
    """
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


@functools.cache
def _has_tensor_cores(dtype: torch.dtype, index: int | None) -> bool:
    """NVIDIA: float16 since sm_70, bfloat16 since sm_80 (CUDA programming guide). AMD's matrix cores take both."""
    if torch.version.hip is not None:
        return True
    return torch.cuda.get_device_capability(index) >= ((8, 0) if dtype == torch.bfloat16 else (7, 0))


def product(a: Tensor, b: Tensor) -> Tensor:
    """The product in float32 where PyTorch supports that (CUDA), else rounded to the operands' dtype."""
    if has_wide_product(a.device.type):
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add the product of two matrices, of the dtype of ``total`` or of 16 bits."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total.add_(product(a, b))


@functools.cache
def has_wide_product(device: str) -> bool:
    """Whether torch.mm of 16-bit matrices can return float32 on this device type, found by trying once."""
    one = torch.ones(8, 8, dtype=torch.bfloat16, device=device)
    try:
        torch.mm(one, one, out_dtype=torch.float32)
    except (RuntimeError, NotImplementedError, TypeError):
        return False
    return True
