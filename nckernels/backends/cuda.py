"""The CUDA backend: the kernels of ``csrc/cuda``, called as PyTorch operators ``nckernels_cuda::*``.

It is for machines without Triton. It shares the decomposition and the host side (``tiled``) with the Triton backend;
this file loads the library and passes the arguments. Sums are taken in a fixed order, without atomics, so the same
inputs always give the same bits.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import build, tiled
from .base import Backend, Forward, Gradients, Inputs, Needs, OutputGrads, Spec, constant
from .tiled.kernels import Kernels, Partial, tf32
from .tiled.plan import FULL_WAVE, Blocks
from .tiled.sides import Result, Side

TILE = 128
"""Rows of a tile of either operand; the kernel for short rows takes half as many of Q."""

SHORT = 256
"""Longest rows, of 16-bit numbers, whose gradient is accumulated on the chip."""

LONG = 256
"""For longer rows several thread blocks share each block of anchors, see ``FULL_WAVE``."""

WGMMA = "NCKERNELS_CUDA_WGMMA"
"""Environment variable: 1 selects the forward kernel with TMA and wgmma on Hopper."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_EXCLUDE = {"none": 0, "target": 1, "self": 2, "same_label": 3}


@cache
def _load() -> str | None:
    """Load the operators. Returns why that failed, or None. Cached, because the search hashes all of csrc/cuda."""
    path = build.find(build.CUDA)
    if path is None:
        return "its library has not been built; nckernels.set_backend('cuda') compiles it if nvcc is installed"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"its library does not load: {error.__cause__ or error}"
    return None


@constant
def _missing() -> str | None:
    return "this build of torch has no CUDA" if torch.version.cuda is None else _load()


class CudaBackend(Backend):
    """float32, bfloat16 and float16 on CUDA devices of compute capability 8.x and 9.0."""

    name = "cuda"

    def missing(self) -> str | None:
        return _missing()

    def prepare(self) -> None:
        if torch.version.cuda is not None:
            build.find_or_build(build.CUDA)
            _load.cache_clear()

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if dtype not in _DTYPES:
            return f"supports float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
        if device.type != "cuda":
            return f"supports CUDA devices, not {device.type}"
        if torch.cuda.get_device_properties(device).major not in (8, 9):
            return "needs compute capability 8.x or 9.0"
        return _missing()

    def kept_numel(self, device: torch.device, dtype: torch.dtype, m: int, k: int, spec: Spec) -> int:
        # The list of classes that occur and its length, as 64-bit integers.
        return 2 * (min(m, k) + 1) if spec.present_only and m else 0

    def forward(self, inputs: Inputs, spec: Spec, keep: bool) -> Forward:
        return tiled.forward(CudaKernels(inputs, spec), keep)

    def backward(self, inputs: Inputs, saved: Forward, grads: OutputGrads, spec: Spec, needs: Needs) -> Gradients:
        return tiled.backward(CudaKernels(inputs, spec), saved, grads, needs)


@cache
def _device(device: torch.device) -> tuple[int, int, bool]:
    """Number of multiprocessors, bytes of shared memory per thread block, whether the device is a Hopper."""
    if device.type != "cuda":
        return 4, 227 << 10, True  # the emulation that the tests use
    properties = torch.cuda.get_device_properties(device)
    # Older versions of torch do not have the opt-in limit; the smallest devices have 99 KB.
    shared = getattr(properties, "shared_memory_per_block_optin", 99 << 10)
    return properties.multi_processor_count, shared, (properties.major, properties.minor) == (9, 0)


class CudaKernels(Kernels):
    """This backend's kernels, which run on the device of their tensors; csrc/cuda/args.h has the contract."""

    index_dtype = torch.int64

    def __init__(self, inputs: Inputs, spec: Spec) -> None:
        super().__init__(inputs, spec)
        self.ops: Any = torch.ops.nckernels_cuda
        self.exclude = _EXCLUDE[spec.exclude]
        z = self.inputs.features
        self.half = z.dtype != torch.float32
        self.exact = not self.half and not tf32()
        """Whether products have the full precision of float32, which torch's tf32 setting turns off."""
        self.multiprocessors, self.shared, hopper = _device(z.device)
        self.hopper = hopper and os.environ.get(WGMMA) == "1"

    def _side(self, side: Side, positives: bool = True) -> tuple[Any, ...]:
        """The arguments of ``Side`` in args.h. Without ``positives``, for sums only, left-out slots are not read."""
        vectors = (side.label, side.used, side.bias, side.lse, side.grad, side.pos)
        kind = (side.samples, side.gather, side.unsummed and positives)
        return side.x, side.rnorm, *vectors, side.slots, side.skip, *kind

    # --- tiles

    def _loop_blocks(self, q: Side, resident: int) -> Blocks:
        least = FULL_WAVE if q.x.shape[1] > LONG else 1
        return Blocks(TILE, TILE, self.multiprocessors * resident, least)

    def lse_blocks(self, p: Side, q: Side, both: bool) -> Blocks:
        return self._loop_blocks(q, 2 if self.half and not both else 1)

    def bias_blocks(self, p: Side, q: Side) -> Blocks:
        return self._loop_blocks(q, 1)

    def short_blocks(self, samples: Side, classes: Side) -> Blocks | None:
        d = samples.x.shape[1]
        width = 64 if d <= 64 else 128 if d <= 128 else 256
        shared = 2 * width * 2 * TILE + 48 * TILE  # 256 rows of 16-bit numbers, and the vectors of 128 of them
        if not self.half or d > SHORT or shared > self.shared:
            return None
        return Blocks(TILE, TILE // 2, self.multiprocessors)

    # --- O(M d) and O(K)

    def row_rnorm(self, x: Tensor, rnorm: Tensor, label: Tensor | None) -> None:
        self.ops.row_rnorm(x, label, rnorm, self.spec.ignore_index, self.eps)

    def prepare_samples(self, z_rnorm: Tensor, pos: Tensor, w_rnorm: Tensor | None, mark: Tensor | None) -> None:
        z, w, target = self.inputs[:3]
        self.ops.prepare_samples(
            z, w, target, self.beta, z_rnorm, pos, w_rnorm, mark,
            self.spec.ignore_index, self.spec.exclude == "same_label", self.spec.symmetric, self.eps,
        )  # fmt: skip

    def compact(self, mark: Tensor, rank: Tensor, present: Tensor, k: int, slots: int) -> None:
        self.ops.compact(mark, rank, present, k, slots)

    def half_scale(self, samples: Side, classes: Side, scale: Tensor) -> None:
        self.ops.half_scale(
            classes.grad, classes.lse, samples.grad, samples.lse, samples.pos, samples.rnorm, classes.rnorm,
            scale, self.norm_limit,
        )  # fmt: skip

    # --- tiles of products

    def log_sum_exp(
        self, p: Side, q: Side, out: Tensor | None, p_partial: Partial, q_partial: Partial,
        first: int, count: int, split: int, blocks: Blocks,
    ) -> None:  # fmt: skip
        both, sides = q_partial[0] is not None, (*self._side(p, False), *self._side(q, False))
        if self.hopper and self.half and not both and _fits_boxes(p) and _fits_boxes(q):
            self.ops.log_sum_exp_wgmma(*sides, self.beta, out, *p_partial, first, count, split, self.exclude)
        else:
            partial = (*p_partial, *q_partial)
            self.ops.log_sum_exp(*sides, self.beta, out, *partial, first, count, split, self.exclude, self.exact)

    def combine(self, partial: Partial, side: Side, out: Tensor, first: int, parts: int, keep: bool) -> None:
        self.ops.combine(*partial, side.label, side.used, out, side.skip, first, parts, side.slots, side.gather, keep)

    def short_grad(
        self, result: Result, q: Side, part: Tensor | None, scale: Tensor | None, split: int, blocks: Blocks
    ) -> None:
        out, dot = (result.out, result.dot) if part is None else (None, None)
        self.ops.short_grad(
            *self._side(result.side), *self._side(q), self.beta, scale, out, dot, part,
            split, self.exclude, self.eps, self.norm_limit,
        )  # fmt: skip

    def entries(
        self, p: Side, q: Side, h: Tensor, start: int, stop: int, begin: int, end: int, scale: Tensor | None
    ) -> None:
        self.ops.entries(
            *self._side(p), *self._side(q), self.beta, scale, h, start, stop, begin, end,
            self.exclude, self.norm_limit, self.exact,
        )  # fmt: skip

    def bias_grad(self, p: Side, q: Side, part: Tensor, split: int, blocks: Blocks) -> None:
        sides = *self._side(p, False), *self._side(q, False)
        self.ops.bias_grad(*sides, self.beta, part, split, self.exclude, self.exact)

    # --- kernels over rows

    def gather(self, side: Side, out: Tensor, start: int, stop: int) -> None:
        self.ops.gather(*self._side(side), out, start, stop)

    def mend(self, h: Tensor, side: Side, out: Tensor) -> None:
        self.ops.mend(*self._side(side), h, out, 2 * self.multiprocessors)

    def finish(
        self, result: Result, sums: Tensor, start: int, stop: int, parts: int, scale: Tensor | None, norm_inside: bool
    ) -> None:
        side = result.side
        self.ops.finish(
            *self._side(side), sums, self.beta, scale, result.out, result.dot, start, stop, parts,
            side.slots * side.x.shape[1], self.eps, self.norm_limit, norm_inside,
        )  # fmt: skip


def _fits_boxes(side: Side) -> bool:
    """Whether TMA can fetch boxes of rows: slots are rows, without overlap, at multiples of 16 bytes."""
    x, distance = side.x, side.x.stride(0)
    return not side.gather and x.data_ptr() % 16 == 0 and distance % 8 == 0 and distance >= x.shape[1]
