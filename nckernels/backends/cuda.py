"""The CUDA backend: the kernels of ``csrc/cuda`` behind PyTorch operators ``nckernels_cuda::*``.

The decomposition is the Triton backend's: see ``triton/tiles.py`` for the vocabulary, ``triton/grad.py``
for the algebra. It works where Triton does not. Sums are taken in a fixed order, without atomics:
deterministic always.

Nothing here waits for the device: no value is read back and no shape depends on one, so that a whole step
can be captured in a CUDA graph. What depends on the data (which classes occur, how many) stays in device
tensors that the kernels read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .base import Backend, Forward, Gradients, Inputs, Needs, OutputGrads, Spec, norm_eps
from .triton.config import pad16, panel_shape, split_count

SOURCES = ("norms.cu", "lse.cu", "bias_grad.cu", "entries.cu", "short_grad.cu", "finish.cu", "bindings.cpp")
"""The files of csrc/cuda that make up the library."""

CXX_FLAGS = ("-std=c++20", "-O2", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000")
"""For every source; the version is that of the oldest supported torch, 2.10, as its stable ABI wants it."""

NVCC_FLAGS = ("-gencode", "arch=compute_80,code=sm_80", "-gencode", "arch=compute_90a,code=sm_90a")
"""For the .cu files. sm_80 code runs on all 8.x devices, sm_90a on Hopper."""

LIBRARY = Path(__file__).with_name("_cuda.so")
"""Where the built library is looked for."""

TILE = 128
"""Rows of both operands' tiles; in the kernel for short rows those of Q are half as many."""

SHORT = 256
"""Longest rows, of 16-bit numbers, whose gradient stays on the chip."""

LONG = 256
"""Rows longer than this share every block of anchors among several blocks of threads, see ``FULL_WAVE``."""

FULL_WAVE = 16
"""With long rows, at least this many thread blocks share a block of anchors: those that run at the same
time then need about the square root of the device's tiles of each operand, and these fit the L2 cache."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_EXCLUDE = {"none": 0, "target": 1, "self": 2, "same_label": 3}


@cache
def _load() -> str | None:
    """Load the operators; why that failed, or None."""
    if not LIBRARY.exists():
        return "its library has not been built"
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        return f"its library does not load: {error}"
    return None


class CudaBackend(Backend):
    """float32, bfloat16 and float16 on CUDA devices of compute capability 8.x and 9.0."""

    name = "cuda"

    def missing(self) -> str | None:
        if torch.version.cuda is None:
            return "this build of torch has no CUDA"
        return _load()

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if reason := self.missing():
            return reason
        if dtype not in _DTYPES:
            return f"supports float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
        if device.type != "cuda":
            return f"supports CUDA devices, not {device.type}"
        if torch.cuda.get_device_capability(device)[0] not in (8, 9):
            return "needs compute capability 8.x or 9.0"
        return None

    def kept_numel(self, device: torch.device, dtype: torch.dtype, m: int, k: int, spec: Spec) -> int:
        # The list of classes that occur and its length, as 64-bit integers.
        return 2 * (min(m, k) + 1) if spec.present_only and m else 0

    def forward(self, inputs: Inputs, spec: Spec, keep: bool) -> Forward:
        with _on_device(inputs.features):
            return _forward(inputs, spec, keep)

    def backward(self, inputs: Inputs, saved: Forward, grads: OutputGrads, spec: Spec, needs: Needs) -> Gradients:
        with _on_device(inputs.features):
            return _backward(inputs, saved, grads, spec, needs)


@contextmanager
def _on_device(x: Tensor) -> Iterator[None]:
    """The operators follow their tensors' device; autocast must not touch the matrix products in here."""
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        yield


@dataclass(frozen=True)
class Side:
    """One operand of the similarity matrix, with all that belongs to its rows. See csrc/cuda/args.h."""

    x: Tensor
    rnorm: Tensor
    samples: bool
    slots: int
    label: Tensor | None = None
    skip: int = 0
    gather: bool = False
    count: Tensor | None = None
    unsummed: bool = False
    bias: Tensor | None = None
    lse: Tensor | None = None
    grad: Tensor | None = None
    pos: Tensor | None = None

    @property
    def args(self) -> tuple[Any, ...]:
        vectors = (self.label, self.count, self.bias, self.lse, self.grad, self.pos)
        return (self.x, self.rnorm, *vectors, self.slots, self.skip, self.samples, self.gather, self.unsummed)

    @property
    def tiles(self) -> int:
        return -(-self.slots // TILE)


@dataclass(frozen=True)
class Call:
    """What all launches of one call have in common."""

    spec: Spec
    beta: Tensor
    eps: float
    exclude: int
    exact: bool
    """float32 products as exact as float32; else rounded to tf32, as torch is set to do."""
    places: int
    """Thread blocks that the device runs at the same time."""
    shared: int
    """Bytes of shared memory that one of them may use."""
    norm_limit: float
    """Inverse norms from here on belong to rows shorter than eps; 0 where it does not matter."""

    @staticmethod
    def of(z: Tensor, inputs: Inputs, spec: Spec) -> Call:
        half = z.dtype != torch.float32
        multiprocessors, shared = _device(z.device)
        eps = norm_eps(z.dtype)
        return Call(
            spec,
            inputs.inv_temperature,
            eps,
            _EXCLUDE[spec.exclude],
            not half and torch.get_float32_matmul_precision() == "highest",
            multiprocessors * (2 if half and spec.direction != "both" else 1),
            shared,
            0.999999 / eps if z.dtype == torch.float16 else 0.0,
        )


@cache
def _device(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory that a thread block may use."""
    if device.type != "cuda":
        return 4, 227 << 10  # the emulation that the tests use
    properties = torch.cuda.get_device_properties(device)
    # The opt-in limit has no name in older versions of torch; 99 KB is what the smallest parts offer.
    return properties.multi_processor_count, getattr(properties, "shared_memory_per_block_optin", 99 << 10)


def _ops() -> Any:
    return torch.ops.nckernels_cuda


def _rows(x: Tensor) -> Tensor:
    """A matrix whose rows are contiguous, at any distance from each other."""
    return x if x.stride(1) == 1 or x.is_contiguous() else x.contiguous()


def _vector(x: Tensor | None) -> Tensor | None:
    """Upstream gradients may be expanded scalars, biases anything; the kernels index vectors directly."""
    return None if x is None else x.contiguous()


# --- forward ----------------------------------------------------------------------------------------------


def _forward(inputs: Inputs, spec: Spec, keep: bool) -> Forward:
    z, w, target = _rows(inputs.features), _rows(inputs.prototypes), inputs.target.contiguous()
    m, k = z.shape[0], w.shape[0]
    call = Call.of(z, inputs, spec)

    def new(n: int) -> Tensor:
        return torch.empty(n, dtype=torch.float32, device=z.device)

    z_rnorm, pos, w_rnorm, kept = _prepare(z, w, target, call)
    samples, classes = _sides(z, w, target, z_rnorm, w_rnorm, kept, inputs, spec)
    class_lse, instance_lse = new(0), new(0)
    if spec.by_class:
        # Compacted: the kernels write the classes that occur, into a vector of -inf.
        class_lse = new(k) if m and not classes.gather else new(k).fill_(-torch.inf)
    if spec.by_instance:
        instance_lse = new(m)
    if m:
        if spec.by_class:
            _log_sum_exp(classes, samples, class_lse, instance_lse if spec.by_instance else None, call)
        else:
            _log_sum_exp(samples, classes, instance_lse, None, call)
    return Forward(class_lse, instance_lse, pos, z_rnorm, w_rnorm, kept.view(torch.float32) if keep else new(0))


def _prepare(z: Tensor, w: Tensor, target: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inverse norms, positives and, with ``present_only``, the labels of the prototypes and their count."""
    spec, device, m, k = call.spec, z.device, z.shape[0], w.shape[0]
    z_rnorm, pos = (torch.empty(m, dtype=torch.float32, device=device) for _ in range(2))
    labels = torch.empty(0, dtype=torch.int64, device=device)
    mark = None
    if spec.present_only:
        w_rnorm = torch.zeros(k, dtype=torch.float32, device=device)
        if m:
            mark = torch.full((k + 1,), -1, dtype=torch.int64, device=device)
    else:
        w_rnorm = torch.empty(k, dtype=torch.float32, device=device)
        _ops().row_rnorm(w, w_rnorm, call.eps)
    if m:
        _ops().prepare_samples(
            z, w, target, call.beta, z_rnorm, pos, w_rnorm if mark is not None else None, mark,
            spec.ignore_index, spec.exclude == "same_label", call.eps,
        )  # fmt: skip
    if mark is not None:
        labels = mark
        if k > m:
            labels = torch.empty(m + 1, dtype=torch.int64, device=device)
            _ops().compact(mark, torch.cumsum(mark[:k] >= 0, 0), labels, k, m)
    return z_rnorm, pos, w_rnorm, labels


def _sides(
    z: Tensor,
    w: Tensor,
    target: Tensor,
    z_rnorm: Tensor,
    w_rnorm: Tensor,
    kept: Tensor,
    inputs: Inputs,
    spec: Spec,
) -> tuple[Side, Side]:
    """Both operands; ``kept`` are the prototypes' labels if only present classes count."""
    m, k = z.shape[0], w.shape[0]
    samples = Side(z, z_rnorm, True, m, target, spec.ignore_index, bias=_vector(inputs.sample_bias))
    classes = Side(w, w_rnorm, False, k, bias=_vector(inputs.class_bias))
    if spec.square:
        classes = replace(classes, label=target, skip=spec.ignore_index, unsummed=spec.exclude == "self")
    elif kept.numel():
        slots = min(m, k)
        count = kept[slots:] if k > m else None
        classes = replace(classes, slots=slots, label=kept, skip=-1, gather=k > m, count=count)
    return samples, classes


def _split(
    call: Call, p: Side, q: Side, partial_bytes: int, least: int = 1, q_tile: int = TILE, places: int = 0
) -> int:
    """Thread blocks for each tile of anchors, their partial results within the workspace."""
    most = call.spec.workspace // max(1, partial_bytes)
    return split_count(p.tiles, -(-q.slots // q_tile), places or call.places, least, most)


def _least(d: int) -> int:
    return FULL_WAVE if d > LONG else 1


def _log_sum_exp(p: Side, q: Side, p_out: Tensor, q_out: Tensor | None, call: Call) -> None:
    """``p_out``: the log-sum-exp of p's rows over q; ``q_out``: that of q's rows over p, or None."""
    # Two numbers for every anchor and split, and for every row of q and tile of a panel of anchors.
    split = _split(call, p, q, 8 * p.slots, _least(p.x.shape[1]))
    panel = p.tiles
    p_partial: tuple[Tensor | None, Tensor | None] = (None, None)
    q_partial: tuple[Tensor | None, Tensor | None] = (None, None)
    if split > 1:
        both = torch.empty(2, split, p.slots, dtype=torch.float32, device=p.x.device)
        p_partial = (both[0], both[1])
    if q_out is not None:
        budget = call.spec.workspace - (8 * split * p.slots if split > 1 else 0)
        panel = max(1, min(p.tiles, budget // (8 * q.slots) - 1))
        both = torch.empty(2, 1 + panel, q.slots, dtype=torch.float32, device=p.x.device)
        q_partial = (both[0], both[1])
    for first in range(0, p.tiles, panel):
        tiles = min(panel, p.tiles - first)
        _ops().log_sum_exp(
            *p.args, *q.args, call.beta, p_out if split == 1 else None, *p_partial, *q_partial,
            first, tiles, split, call.exclude, call.exact,
        )  # fmt: skip
        if q_out is not None:
            last = first + tiles == p.tiles
            _combine(q, q_partial, q_out if last else None, 0 if first else 1, 1 + tiles, keep=not last)
    if split > 1:
        _combine(p, p_partial, p_out, 0, split)


def _combine(
    side: Side,
    partial: tuple[Tensor | None, Tensor | None],
    out: Tensor | None,
    first: int,
    parts: int,
    keep: bool = False,
) -> None:
    _ops().combine(*partial, side.label, side.count, out, side.skip, first, parts, side.slots, side.gather, keep)


# --- backward ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What the backward pass is to produce for one side; nothing if both tensors are None."""

    side: Side
    out: Tensor | None
    dot: Tensor | None
    """(slots,), zeros: each slot's share of the gradient of beta."""

    @property
    def wanted(self) -> bool:
        return self.out is not None or self.dot is not None

    @property
    def in_place(self) -> bool:
        """Whether the gradient itself can be the float32 accumulator."""
        return self.out is not None and self.out.dtype == torch.float32 and not self.side.gather


def _backward(inputs: Inputs, saved: Forward, grads: OutputGrads, spec: Spec, needs: Needs) -> Gradients:
    z, w, target = _rows(inputs.features), _rows(inputs.prototypes), inputs.target.contiguous()
    m, k, d = z.shape[0], w.shape[0], z.shape[1]
    if m == 0 or all(g is None for g in grads):
        return _no_gradients(inputs, needs)
    call = Call.of(z, inputs, spec)
    kept = saved.kept.view(torch.int64)
    samples, classes = _sides(z, w, target, saved.feature_rnorm, saved.prototype_rnorm, kept, inputs, spec)
    samples = replace(samples, lse=saved.instance_lse, grad=_vector(grads.instance_lse), pos=_vector(grads.pos))
    classes = replace(classes, lse=saved.class_lse, grad=_vector(grads.class_lse))

    def sums(wanted: bool, side: Side) -> Tensor | None:
        return torch.zeros(side.slots, dtype=torch.float32, device=z.device) if wanted else None

    # The gradient of beta is a sum over the rows of either side: take it where the rows are needed anyway.
    by_samples = needs.features or not needs.prototypes
    sample_dot = sums(needs.inv_temperature and by_samples, samples)
    class_dot = sums(needs.inv_temperature and not by_samples, classes)
    d_z = torch.empty(m, d, dtype=z.dtype, device=z.device) if needs.features else None
    d_w = None
    if needs.prototypes:
        # Compacted: the kernels write the rows of classes that occur, into zeros.
        make = torch.zeros if classes.gather else torch.empty
        d_w = make(k, d, dtype=w.dtype, device=w.device)
    scale = None
    if z.dtype == torch.float16:
        scale = torch.empty(3, dtype=torch.float32, device=z.device)
        _ops().half_scale(
            classes.grad, classes.lse, samples.grad, samples.lse, samples.pos, samples.rnorm, classes.rnorm,
            scale, call.norm_limit,
        )  # fmt: skip

    for_samples = Result(samples, d_z, sample_dot)
    for_classes = Result(classes, d_w, class_dot)
    if z.dtype != torch.float32 and d <= SHORT and _short_shared(d) <= call.shared:
        _short_rows(for_samples, classes, None if scale is None else scale[0:], call)
        _short_rows(for_classes, samples, None if scale is None else scale[1:], call)
    else:
        both = (for_samples, for_classes) if samples.slots >= classes.slots else (for_classes, for_samples)
        _long_rows(*both, None if scale is None else scale[2:], call)

    dot = sample_dot if sample_dot is not None else class_dot
    return Gradients(
        d_z,
        d_w,
        dot.sum().to(inputs.inv_temperature.dtype) if dot is not None else None,
        _bias_grad(samples, classes, call) if needs.sample_bias else None,
        _bias_grad(classes, samples, call) if needs.class_bias else None,
    )


def _no_gradients(inputs: Inputs, needs: Needs) -> Gradients:
    tensors = (
        inputs.features,
        inputs.prototypes,
        inputs.inv_temperature,
        inputs.sample_bias,
        inputs.class_bias,
    )
    zeros = [
        torch.zeros_like(x, memory_format=torch.contiguous_format) if need and x is not None else None
        for x, need in zip(tensors, needs, strict=True)
    ]
    return Gradients(*zeros)


def _short_shared(d: int) -> int:
    """Bytes of shared memory of the kernel for short rows: 256 of them, and what 128 carry."""
    width = 64 if d <= 64 else 128 if d <= 128 else 256
    return 2 * width * 256 + 48 * TILE


def _short_rows(result: Result, q: Side, scale: Tensor | None, call: Call) -> None:
    """One side's gradient, accumulated on the chip."""
    if not result.wanted:
        return
    p, d = result.side, result.side.x.shape[1]
    split = _split(call, p, q, 4 * p.slots * d, q_tile=TILE // 2)
    part = None
    if split > 1:
        part = torch.empty(split, p.slots, d, dtype=torch.float32, device=p.x.device)
    out, dot = (result.out, result.dot) if part is None else (None, None)
    _ops().short_grad(
        *p.args, *q.args, call.beta, scale, out, dot, part, split, call.exclude, call.eps, call.norm_limit
    )
    if part is not None:
        _finish(result, part, 0, p.slots, scale, call, parts=split)


def _long_rows(p: Result, q: Result, scale: Tensor | None, call: Call) -> None:
    """Both gradients by panels of entries and the library's matrix products; p is the longer side.

    For every panel of p the sums over q are completed before the next one; the sums over p go on through
    all panels, so q's float32 accumulator exists for all its rows (the shorter side; the gradient itself
    where that is float32).
    """
    if not (p.wanted or q.wanted):
        return
    x, y = p.side, q.side
    d, itemsize, device = x.x.shape[1], x.x.element_size(), x.x.device
    copy_x, copy_y = x.gather and q.wanted, y.gather and p.wanted
    p_bytes = (0 if p.in_place or not p.wanted else 4 * d) + (itemsize * d if copy_x else 0)
    q_bytes = itemsize * d if copy_y else 0
    rows, columns = panel_shape(x.slots, y.slots, p_bytes, q_bytes, itemsize, call.spec.workspace)

    def buffer(n: int, width: int, dtype: torch.dtype, wanted: bool = True) -> Tensor | None:
        return torch.empty(n, width, dtype=dtype, device=device) if wanted else None

    h = torch.empty(rows, pad16(columns), dtype=x.x.dtype, device=device)
    p_sums = buffer(rows, d, torch.float32, p.wanted and not p.in_place)
    q_sums = q.out if q.in_place else buffer(y.slots, d, torch.float32, q.wanted)
    x_copy, y_copy = buffer(rows, d, x.x.dtype, copy_x), buffer(columns, d, x.x.dtype, copy_y)
    for start in range(0, x.slots, rows):
        stop = min(start + rows, x.slots)
        x_panel = _dense(x, start, stop, x_copy)
        p_panel = None
        if p.wanted:
            p_panel = p_sums[: stop - start] if p_sums is not None else p.out[start:stop]  # type: ignore[index]
        for begin in range(0, y.slots, columns):
            end = min(begin + columns, y.slots)
            _ops().entries(
                *x.args, *y.args, call.beta, scale, h, start, stop, begin, end,
                call.exclude, call.norm_limit, call.exact,
            )  # fmt: skip
            panel = h[: stop - start, : end - begin]
            if p_panel is not None:
                _matmul(panel, _dense(y, begin, end, y_copy), p_panel, accumulate=begin > 0)
            if q_sums is not None:
                _matmul(panel.t(), x_panel, q_sums[begin:end], accumulate=start > 0)
        if p_panel is not None:
            _finish(p, p_panel, start, stop, scale, call, norm_inside=True)
    if q_sums is not None:
        _finish(q, q_sums, 0, y.slots, scale, call, norm_inside=True)


def _matmul(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
    """``out = a @ b`` (+ out) with a float32 result: nothing is rounded to half precision between panels."""
    if a.dtype != torch.float32 and a.device.type == "cpu":
        a, b = a.float(), b.float()
    if a.dtype == torch.float32:
        torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)
    elif accumulate:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)


def _dense(side: Side, start: int, stop: int, copy: Tensor | None) -> Tensor:
    """The rows of some slots as a matrix: a view, or gathered into ``copy``."""
    if copy is None:
        return side.x[start:stop]
    _ops().gather(*side.args, copy, start, stop)
    return copy[: stop - start]


def _finish(
    result: Result, sums: Tensor, start: int, stop: int, scale: Tensor | None, call: Call,
    parts: int = 1, norm_inside: bool = False,
) -> None:  # fmt: skip
    side = result.side
    _ops().finish(
        *side.args, sums, call.beta, scale, result.out, result.dot, start, stop, parts,
        side.slots * side.x.shape[1], call.eps, call.norm_limit, norm_inside,
    )  # fmt: skip


def _bias_grad(p: Side, q: Side, call: Call) -> Tensor:
    """Gradient of p's bias, which sits in the log-sum-exps of q's rows."""
    n, d = p.x.shape
    if q.grad is None:
        return torch.zeros(n, dtype=torch.float32, device=p.x.device)
    split = _split(call, p, q, 4 * n, _least(d))
    part = torch.empty(split, n, dtype=torch.float32, device=p.x.device)
    _ops().bias_grad(*p.args, *q.args, call.beta, part, split, call.exclude, call.exact)
    return part[0] if split == 1 else part.sum(0)
