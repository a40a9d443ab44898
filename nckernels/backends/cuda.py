"""The CUDA backend: the kernels of ``csrc/cuda``, called as PyTorch operators ``nckernels_cuda::*``.

It is for machines without Triton. It shares the decomposition and the host side (``tiled``) with the Triton backend;
this file loads the library and passes the arguments. Sums are taken in a fixed order, so the same inputs always give
the same bits. An exception are the sums of sample weights by class, see ``tiled.step.prepared``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import build, tiled
from .base import Backend, Forward, Gradients, Inputs, Needs, OutputGrads, Reduced, Spec, Step, constant
from .tiled import StepKernels
from .tiled.kernels import Finish, Kernels, Partial, Vectors, tf32
from .tiled.plan import FULL_WAVE, Blocks, ceil_div
from .tiled.sides import Result, Side

TILE = 128
"""Rows of a tile of either operand; the kernel for short rows takes half as many of Q."""

SHORT = 256
"""Longest rows, of 16-bit numbers, whose gradient is accumulated on the chip."""

PANEL_ROWS, PANEL_COLUMNS = 32, 128
"""Anchors of a thread block of ``panel.cu``, and the columns that it takes at a time."""

MOST_PARTS = 32
"""The most thread blocks that share an anchor's sum in ``panel.cu``."""

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
        return sum(tiled.Kept.sizes(m, k, dtype, torch.int64, spec))

    def forward(self, inputs: Inputs, spec: Spec, keep: bool) -> Forward:
        return tiled.forward(CudaKernels(inputs, spec), keep)

    def backward(self, inputs: Inputs, saved: Forward, grads: OutputGrads, spec: Spec, needs: Needs) -> Gradients:
        return tiled.backward(CudaKernels(inputs, spec), saved, grads, needs)

    def can_step(self, features: Tensor, prototypes: Tensor, spec: Spec) -> bool:
        return features.shape[0] > 0 and not spec.square  # by panels, or by both passes in one call

    def step(self, inputs: Inputs, reduced: Reduced, spec: Spec, needs: Needs) -> Step:
        inputs, reduced, host_beta = tiled.known(inputs, reduced)
        kernels = CudaStep(inputs, spec, host_beta)
        by_panels = not kernels.fits_on_chip and tiled.fits(inputs.features, inputs.prototypes, spec)
        return (tiled.step if by_panels else tiled.passes)(kernels, reduced, needs)

    def scaled(
        self, grads: Sequence[Tensor], factor: Tensor, dtypes: Sequence[torch.dtype], in_place: bool
    ) -> Sequence[Tensor]:
        found = []
        for grad, dtype in zip(grads, dtypes, strict=True):
            out = grad if in_place and grad.dtype == dtype else torch.empty_like(grad, dtype=dtype)
            torch.ops.nckernels_cuda.scale(grad, factor, out)
            found.append(out)
        return found


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
        vectors = (side.label, side.used, side.bias, side.lse, side.ratio, side.grad, side.pos)
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

    @property
    def fits_on_chip(self) -> bool:
        """Whether rows are short enough for ``short_grad``."""
        d = self.inputs.features.shape[1]
        width = 64 if d <= 64 else 128 if d <= 128 else 256
        shared = 2 * width * 2 * TILE + 48 * TILE  # 256 rows of 16-bit numbers, and the vectors of 128 of them
        return self.half and d <= SHORT and shared <= self.shared

    def short_blocks(self, samples: Side, classes: Side) -> Blocks | None:
        return Blocks(TILE, TILE // 2, self.multiprocessors) if self.fits_on_chip else None

    # --- O(M d) and O(K)

    def row_rnorm(self, x: Tensor, rnorm: Tensor, label: Tensor | None) -> None:
        self.ops.row_rnorm(x, label, rnorm, self.spec.ignore_index, self.eps)

    def prepare_samples(self, z_rnorm: Tensor, pos: Tensor, w_rnorm: Tensor | None, mark: Tensor | None) -> None:
        z, w, target = self.inputs[:3]
        self.ops.prepare_samples(
            z, w, target, self.beta, z_rnorm, pos, w_rnorm, mark,
            self.spec.ignore_index, self.spec.exclude == "same_label", self.spec.symmetric, self.eps,
        )  # fmt: skip

    def compact(self, rank: Tensor, present: Tensor, k: int, slots: int) -> None:
        self.ops.compact(rank, present, k, slots)

    def half_scale(self, samples: Side, classes: Side, scale: Tensor) -> None:
        self.ops.half_scale(
            classes.grad, classes.lse, samples.grad, samples.lse, samples.pos, self.divisor, samples.rnorm,
            classes.rnorm, scale, self.norm_limit,
        )  # fmt: skip

    # --- tiles of products

    def log_sum_exp(
        self, p: Side, q: Side, out: Tensor | None, p_partial: Partial, q_partial: Partial,
        first: int, count: int, split: int, blocks: Blocks,
    ) -> None:  # fmt: skip
        both, sides = q_partial[0] is not None, (*self._side(p, False), *self._side(q, False))
        if self.hopper and self.half and not both and _fits_boxes(p) and _fits_boxes(q):
            self.ops.log_sum_exp_wgmma(*sides, self.beta, out, p.ratio, *p_partial, first, count, split, self.exclude)
        else:
            partial = (*p_partial, *q_partial)
            shares = first, count, split, self.exclude, self.exact
            self.ops.log_sum_exp(*sides, self.beta, out, p.ratio, *partial, *shares)

    def combine(self, partial: Partial, side: Side, out: Tensor, first: int, parts: int, keep: bool) -> None:
        self.ops.combine(
            *partial, side.label, side.used, out, side.ratio, side.skip, first, parts, side.slots, side.gather, keep
        )  # fmt: skip

    def short_grad(
        self, result: Result, q: Side, part: Tensor | None, scale: Tensor | None, split: int, blocks: Blocks
    ) -> None:
        out, dot = (result.out, result.dot) if part is None else (None, None)
        self.ops.short_grad(
            *self._side(result.side), *self._side(q), self.beta, scale, self.divisor, out, dot, part,
            split, self.exclude, self.eps, self.norm_limit,
        )  # fmt: skip

    def entries(
        self, p: Side, q: Side, h: Tensor, start: int, stop: int, begin: int, end: int, scale: Tensor | None
    ) -> None:
        self.ops.entries(
            *self._side(p), *self._side(q), self.beta, scale, self.divisor, h, start, stop, begin, end,
            self.exclude, self.norm_limit, self.exact,
        )  # fmt: skip

    def bias_grad(self, p: Side, q: Side, part: Tensor, split: int, blocks: Blocks) -> None:
        sides = *self._side(p, False), *self._side(q, False)
        self.ops.bias_grad(*sides, self.beta, part, split, self.exclude, self.exact)

    # --- kernels over rows

    def gather(self, side: Side, out: Tensor, start: int, stop: int) -> None:
        self.ops.gather(*self._side(side), out, start, stop)

    def mend(self, h: Tensor, side: Side, out: Tensor) -> None:
        self._mend(side, None, h, out)

    def _mend(self, side: Side, broken: Tensor | None, h: Tensor, out: Tensor) -> None:
        self.ops.mend(*self._side(side), broken, h, out, 2 * self.multiprocessors)

    def finish(
        self, result: Result, sums: Tensor, start: int, stop: int, parts: int, scale: Tensor | None, norm_inside: bool
    ) -> None:
        side = result.side
        self.ops.finish(
            *self._side(side), sums, self.beta, scale, self.divisor, result.out, result.dot, start, stop, parts,
            side.slots * side.x.shape[1], self.eps, self.norm_limit, norm_inside,
        )  # fmt: skip


class CudaStep(CudaKernels, StepKernels):
    """The kernels of two passes and of one step.

    ``host_beta`` is the inverse temperature, if the host knows it.
    """

    def __init__(self, inputs: Inputs, spec: Spec, host_beta: float | None = None) -> None:
        super().__init__(inputs, spec)
        self.host_beta = host_beta

    def prepare_step(self, weight: Tensor | None, vectors: Vectors, nothing_is_zero: bool) -> None:
        z, w, target = self.inputs[:3]
        v, known = vectors, self.host_beta
        self.beta, self.divisor = v.beta, v.divisor
        self.ops.prepare_step(
            z, w, target, weight, self.inputs.inv_temperature if known is None else None, known or 0.0,
            v.z_rnorm, v.pos, v.share, v.pos_grad, v.instance_grad, v.z_broken, v.w_broken, v.w_rnorm, v.mark,
            v.of_class, v.divisor, v.beta, self.spec.ignore_index, self.eps, nothing_is_zero,
        )  # fmt: skip

    def finisher(self, result: Result, scale: Tensor | None, other: Side | None, vectors: Vectors) -> Finish:
        def finished(sums: Tensor, h: Tensor, start: int, stop: int, is_last: bool) -> None:
            if other is not None:
                self._mend(other, vectors.z_broken if other.samples else vectors.w_broken, h, sums)
            self.finish(result, sums, start, stop, 1, scale, norm_inside=True)
            if is_last:
                self.write_loss(vectors)

        return finished

    def write_loss(self, vectors: Vectors) -> None:
        v, by_class = vectors, self.spec.by_class
        of_classes, of_samples = (v.lse, v.instance_lse) if by_class else (None, v.lse)
        self.ops.write_loss(
            self.inputs.target, v.share, v.pos, of_classes, of_samples, v.divisor, v.loss,
            self.spec.ignore_index, self.inputs.prototypes.shape[0],
        )  # fmt: skip

    def panel_split(self, anchors: int, others: int) -> int:
        blocks = ceil_div(anchors, PANEL_ROWS)
        return min(MOST_PARTS, ceil_div(others, PANEL_COLUMNS), ceil_div(4 * self.multiprocessors, blocks))

    def panel_log_sum_exp(self, p: Side, q: Side, products: Tensor, partial: Tensor, start: int, stop: int) -> None:
        sides = *self._side(p), *self._side(q)
        self.ops.panel_log_sum_exp(*sides, self.beta, products, partial, start, stop, self.exclude)

    def panel_entries(
        self, p: Side, q: Side, products: Tensor, partial: Tensor, h: Tensor, start: int, stop: int,
        scale: Tensor | None,
    ) -> None:  # fmt: skip
        self.ops.panel_entries(
            *self._side(p), *self._side(q), self.beta, scale, self.divisor, products, partial, p.lse, h, start, stop,
            self.exclude, self.norm_limit,
        )  # fmt: skip


def _fits_boxes(side: Side) -> bool:
    """Whether TMA can fetch boxes of rows: slots are rows, without overlap, at multiples of 16 bytes."""
    x, distance = side.x, side.x.stride(0)
    return not side.gather and x.data_ptr() % 16 == 0 and distance % 8 == 0 and distance >= x.shape[1]
