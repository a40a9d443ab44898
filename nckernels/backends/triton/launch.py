"""The host side: allocates, chooses tiles and panels, and launches the kernels in order.

Nothing here waits for the device: no value is read back and no shape depends on one, so that a whole step
can be captured in a CUDA graph. What depends on the data (which classes occur, how many) stays in device
tensors that the kernels read.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from ..base import Forward, Gradients, Inputs, Needs, OutputGrads, Spec, norm_eps
from . import config, finish, grad, lse, norms
from .config import Arch, Tile, pad16

INTERPRETED = not isinstance(lse.lse_kernel, triton.JITFunction)
"""Whether the kernels run in Triton's interpreter: TRITON_INTERPRET=1 when this module was imported."""

FULL_WAVE = 16
"""With long rows, at least this many programs share a block of anchors: those that run at the same time
then need about the square root of the device's tiles of each operand, and these fit the L2 cache."""


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, warps: int = 4, stages: int = 2, **options: Any) -> None:
    """The one place that starts a kernel."""
    kernel[grid](*args, **options, num_warps=warps, num_stages=stages)


def _tile_options(tile: Tile) -> dict[str, Any]:
    """The launch options of a tile of products."""
    options: dict[str, Any] = {"BP": tile.p, "BQ": tile.q, "BD": tile.d}
    options |= {"warps": tile.warps, "stages": tile.stages}
    if tile.resident > 1 and not INTERPRETED:
        # Left alone, the compiler takes what registers it likes and one program fills a multiprocessor.
        options["maxnreg"] = (1 << 16) // (32 * tile.warps * tile.resident)
    return options


def _on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


@dataclass(frozen=True)
class Side:
    """One operand of the similarity matrix, with all that belongs to its rows. See tiles.py."""

    x: Tensor
    rnorm: Tensor
    samples: bool
    slots: int
    label: Tensor | None = None
    skip: int = 0
    gather: bool = False
    count: Tensor | None = None
    bias: Tensor | None = None
    lse: Tensor | None = None
    grad: Tensor | None = None
    pos: Tensor | None = None


@dataclass(frozen=True)
class Call:
    """What all launches of one call have in common."""

    spec: Spec
    beta: Tensor
    arch: Arch
    kind: config.Kind
    eps: float
    unit: int
    """The largest common divisor of row length and row strides, up to 8; see tiles.py."""

    @staticmethod
    def of(z: Tensor, w: Tensor, beta: Tensor, spec: Spec) -> Call:
        unit = math.gcd(8, z.shape[1], z.stride(0), w.stride(0))
        return Call(spec, beta, config.arch_of(z.device), config.kind_of(z), norm_eps(z.dtype), unit)

    def shape(self, d: int, heavy: bool, entries: int) -> config.Shape:
        itemsize = 4 if self.kind != "half" else 2
        return config.Shape(self.arch, self.kind, d, self.unit * itemsize >= 16, heavy or self.wide, entries)

    @property
    def wide(self) -> bool:
        """Whether masks compare 64-bit labels."""
        return self.spec.exclude == "same_label"

    @property
    def precision(self) -> str:
        if INTERPRETED:
            return "upcast"
        return "ieee" if self.kind == "ieee" else "tf32"  # half types ignore it


def _rows(x: Tensor) -> Tensor:
    """A matrix whose rows are contiguous, at any distance from each other."""
    return x if x.stride(1) == 1 or x.is_contiguous() else x.contiguous()


def _vector(x: Tensor | None) -> Tensor | None:
    """Biases and upstream gradients may be expanded or strided; the kernels index plain vectors."""
    return None if x is None else x.contiguous()


def _row_blocks(d: int) -> dict[str, int]:
    """Rows and columns of a block, for kernels that go over rows once: 8 numbers a thread."""
    columns = min(config.padded(d), 1024)
    return {"BR": 16 if INTERPRETED else 2048 // columns, "BD": columns, "warps": 8}


def forward(inputs: Inputs, spec: Spec, keep: bool) -> Forward:
    with _on_device(inputs.features):
        return _forward(inputs, spec, keep)


def _forward(inputs: Inputs, spec: Spec, keep: bool) -> Forward:
    z, w, target = _rows(inputs.features), _rows(inputs.prototypes), inputs.target.contiguous()
    m, k = z.shape[0], w.shape[0]
    call = Call.of(z, w, inputs.inv_temperature, spec)

    def new(n: int) -> Tensor:
        return torch.empty(n, dtype=torch.float32, device=z.device)

    z_rnorm, pos, w_rnorm, kept = _prepare(z, w, target, call, new)
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


def _prepare(z: Tensor, w: Tensor, target: Tensor, call: Call, new: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inverse norms, positives and, with ``present_only``, the labels of the prototypes and their count."""
    spec, d, u = call.spec, z.shape[1], call.unit
    m, k = z.shape[0], w.shape[0]
    blocks = _row_blocks(d)
    z_rnorm, pos = new(m), new(m)
    labels = torch.empty(0, dtype=torch.int32, device=z.device)
    mark = None
    if spec.present_only:
        w_rnorm = torch.zeros(k, dtype=torch.float32, device=z.device)
        if m:
            mark = torch.full((k + 1,), -1, dtype=torch.int32, device=z.device)
    else:
        w_rnorm = new(k)
        launch(
            norms.row_rnorm_kernel, (triton.cdiv(k, blocks["BR"]),),
            w, w_rnorm, k, d // u, w.stride(0) // u, UNIT=u, EPS=call.eps, **blocks,
        )  # fmt: skip
    if m:
        # The assertion on targets is compiled only with debug; without its overflow checks on every index.
        checks = {} if INTERPRETED else {"debug": True, "sanitize_overflow": False}
        launch(
            norms.prepare_samples_kernel, (triton.cdiv(m, blocks["BR"]),),
            z, w, target, call.beta, z_rnorm, pos, w_rnorm if mark is not None else None, mark,
            m, k, d // u, z.stride(0) // u, w.stride(0) // u, spec.ignore_index,
            SAME_LABEL=spec.exclude == "same_label", UNIT=u, EPS=call.eps, **blocks, **checks,
        )  # fmt: skip
    if mark is not None:
        labels = mark
        if k > m:
            rank = torch.cumsum(mark[:k] >= 0, 0, dtype=torch.int32)
            labels = torch.empty(m + 1, dtype=torch.int32, device=z.device)
            launch(norms.compact_kernel, (triton.cdiv(k, 1024),), mark, rank, labels, k, m, B=1024)
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
    sample_bias, class_bias = _vector(inputs.sample_bias), _vector(inputs.class_bias)
    samples = Side(z, z_rnorm, True, m, target, spec.ignore_index, bias=sample_bias)
    if spec.square:
        classes = Side(w, w_rnorm, False, k, target, spec.ignore_index, bias=class_bias)
    elif kept.numel():
        slots = min(m, k)
        count = kept[slots:] if k > m else None
        classes = Side(w, w_rnorm, False, slots, kept, -1, k > m, count, class_bias)
    else:
        classes = Side(w, w_rnorm, False, k, bias=class_bias)
    return samples, classes


def _split(call: Call, tile: Tile, p: int, q: int, partial_bytes: int, least: int = 1) -> int:
    """Programs for each block of anchors, their partial results within the workspace."""
    return config.split_count(
        triton.cdiv(p, tile.p),
        triton.cdiv(q, tile.q),
        call.arch.multiprocessors * tile.resident,
        least,
        call.spec.workspace // max(1, partial_bytes),
    )


def _log_sum_exp(p: Side, q: Side, p_out: Tensor, q_out: Tensor | None, call: Call) -> None:
    """``p_out``: the log-sum-exp of p's rows over q; ``q_out``: that of q's rows over p, or None."""
    d, u = p.x.shape[1], call.unit
    tile = config.lse_tile(call.shape(d, q_out is not None or p.gather, p.slots * q.slots))
    whole = tile.d >= d
    # Two numbers for every anchor and split, and for every row of q and block of a panel of anchors.
    share = 1 if q_out is None else 2  # of the workspace, for the anchors' partial results
    split = _split(call, tile, p.slots, q.slots, 8 * p.slots * share, least=1 if whole else FULL_WAVE)
    blocks = triton.cdiv(p.slots, tile.p)
    panel = blocks
    p_partial: tuple[Tensor | None, Tensor | None] = (None, None)
    q_partial: tuple[Tensor | None, Tensor | None] = (None, None)
    if split > 1:
        both = torch.empty(2, split, p.slots, dtype=torch.float32, device=p.x.device)
        p_partial = (both[0], both[1])
    if q_out is not None:
        left = call.spec.workspace - (8 * split * p.slots if split > 1 else 0)
        panel = max(1, min(blocks, left // (8 * q.slots) - 1))
        both = torch.empty(2, 1 + panel, q.slots, dtype=torch.float32, device=p.x.device)
        q_partial = (both[0], both[1])
    for first in range(0, blocks, panel):
        here = min(panel, blocks - first)
        launch(
            lse.lse_kernel, (here * split,),
            p.x, p.rnorm, p.label, p.bias, p.count, q.x, q.rnorm, q.label, q.bias, call.beta,
            p_out if split == 1 else None, *p_partial, *q_partial,
            first, p.slots, q.slots, p.slots, d // u, p.x.stride(0) // u, q.x.stride(0) // u, p.skip, q.skip, split,
            EXCLUDE=call.spec.exclude, P_SAMPLES=p.samples, P_GATHER=p.gather,
            UNIT=u, WHOLE_D=whole, EVEN_D=d % tile.d == 0, PARTS=tile.parts,
            PRECISION=call.precision, **_tile_options(tile),
        )  # fmt: skip
        if q_out is not None:
            # The first panel has no state in part 0 yet; the last one's need not be kept.
            begin, more = (1 if first == 0 else 0), first + panel < blocks
            _combine(*q_partial, q, q_out, begin, 1 + here, keep=more)
    if split > 1:
        _combine(*p_partial, p, p_out, 0, split)


def _combine(
    largest: Tensor | None,
    total: Tensor | None,
    side: Side,
    out: Tensor,
    first: int,
    parts: int,
    keep: bool = False,
) -> None:
    launch(
        lse.combine_kernel, (triton.cdiv(side.slots, 64),),
        largest, total, side.label if side.gather else None, side.count, out,
        first, parts, side.slots, side.skip,
        GATHER=side.gather, KEEP=keep, BR=16, BN=64,
    )  # fmt: skip


def backward(inputs: Inputs, saved: Forward, grads: OutputGrads, spec: Spec, needs: Needs) -> Gradients:
    with _on_device(inputs.features):
        return _backward(inputs, saved, grads, spec, needs)


def _backward(inputs: Inputs, saved: Forward, grads: OutputGrads, spec: Spec, needs: Needs) -> Gradients:
    z, w, target = _rows(inputs.features), _rows(inputs.prototypes), inputs.target.contiguous()
    m, k = z.shape[0], w.shape[0]
    if m == 0 or all(g is None for g in grads):
        return _no_gradients(inputs, needs)
    call = Call.of(z, w, inputs.inv_temperature, spec)
    kept = saved.kept.view(torch.int32)
    samples, classes = _sides(z, w, target, saved.feature_rnorm, saved.prototype_rnorm, kept, inputs, spec)
    samples = replace(samples, lse=saved.instance_lse, grad=_vector(grads.instance_lse), pos=_vector(grads.pos))
    classes = replace(classes, lse=saved.class_lse, grad=_vector(grads.class_lse))

    def sums(wanted: bool, side: Side) -> Tensor | None:
        if not wanted:
            return None
        make = torch.empty if side.count is None else torch.zeros  # unused slots are not written
        return make(side.slots, dtype=torch.float32, device=z.device)

    # The gradient of beta is a sum over the rows of either side: take it where the rows are needed anyway.
    by_samples = needs.features or not needs.prototypes
    sample_dot = sums(needs.inv_temperature and by_samples, samples)
    class_dot = sums(needs.inv_temperature and not by_samples, classes)
    d_z = torch.empty(m, z.shape[1], dtype=z.dtype, device=z.device) if needs.features else None
    d_w = None
    if needs.prototypes:
        # Compacted: the kernels write the rows of classes that occur, into zeros.
        make = torch.zeros if classes.gather else torch.empty
        d_w = make(k, w.shape[1], dtype=w.dtype, device=w.device)
    scale = _half_scale(samples, classes, call) if z.dtype == torch.float16 else None

    for_samples = Result(samples, d_z, sample_dot)
    for_classes = Result(classes, d_w, class_dot)
    two_directions = grads.class_lse is not None and grads.instance_lse is not None
    tile = config.grad_tile(call.shape(z.shape[1], two_directions, m * k))
    if tile is None:
        both = (for_samples, for_classes) if samples.slots >= classes.slots else (for_classes, for_samples)
        _long_rows(*both, scale, call)
    else:
        _short_rows(for_samples, classes, None if scale is None else scale[0:], tile, call)
        _short_rows(for_classes, samples, None if scale is None else scale[1:], tile, call)

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
    zeros = [torch.zeros_like(x) if need and x is not None else None for x, need in zip(tensors, needs, strict=True)]
    return Gradients(*zeros)


@dataclass(frozen=True)
class Result:
    """What the backward pass is to produce for one side; nothing if both tensors are None."""

    side: Side
    out: Tensor | None
    dot: Tensor | None
    """(slots,): each slot's share of the gradient of beta."""

    @property
    def wanted(self) -> bool:
        return self.out is not None or self.dot is not None

    @property
    def in_place(self) -> bool:
        """Whether the gradient itself can be the float32 accumulator."""
        return self.out is not None and self.out.dtype == torch.float32 and not self.side.gather


def _norm_limit(call: Call, x: Tensor) -> float:
    """Inverse norms from here on belong to rows shorter than eps; 0 where it does not matter."""
    return 0.999999 / call.eps if x.dtype == torch.float16 else 0.0


def _half_scale(samples: Side, classes: Side, call: Call) -> Tensor:
    """Powers of two for float16 entries, see ``half_scale_kernel``."""
    scale = torch.empty(3, dtype=torch.float32, device=samples.x.device)
    launch(
        norms.half_scale_kernel, (1,),
        classes.grad, classes.lse, samples.grad, samples.lse, samples.pos, samples.rnorm, classes.rnorm, scale,
        samples.x.shape[0], classes.x.shape[0], LIMIT=_norm_limit(call, samples.x), B=4096, warps=16,
    )  # fmt: skip
    return scale


def _short_rows(result: Result, q: Side, scale: Tensor | None, tile: Tile, call: Call) -> None:
    """One side's gradient with ``grad_kernel``."""
    if not result.wanted:
        return
    p = result.side
    d, u = p.x.shape[1], call.unit
    split = _split(call, tile, p.slots, q.slots, 4 * p.slots * d)
    part = None
    if split > 1:
        part = torch.empty(split, p.slots, d, dtype=torch.float32, device=p.x.device)
    launch(
        grad.grad_kernel, (triton.cdiv(p.slots, tile.p) * split,),
        p.x, p.rnorm, p.label, p.count, p.bias, p.lse, p.grad, p.pos,
        q.x, q.rnorm, q.label, q.count, q.bias, q.lse, q.grad, q.pos,
        call.beta, scale,
        result.out if part is None else None, result.dot if part is None else None, part,
        p.slots, q.slots, p.slots, d // u, p.x.stride(0) // u, q.x.stride(0) // u, p.skip, q.skip, split,
        EXCLUDE=call.spec.exclude, P_SAMPLES=p.samples, P_GATHER=p.gather, Q_GATHER=q.gather,
        UNIT=u, EVEN_D=d == tile.d,
        EPS=call.eps, NORM_LIMIT=_norm_limit(call, p.x), PRECISION=call.precision,
        **_tile_options(tile),
    )  # fmt: skip
    if part is not None:
        _finish(result, part, 0, p.slots, scale, call, parts=split, norm_inside=False)


def _long_rows(p: Result, q: Result, scale: Tensor | None, call: Call) -> None:
    """Both gradients by panels of entries; p is the longer side.

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
    rows, columns = config.panel_shape(x.slots, y.slots, p_bytes, q_bytes, itemsize, call.spec.workspace)

    def buffer(n: int, width: int, dtype: torch.dtype, wanted: bool = True) -> Tensor | None:
        return torch.empty(n, width, dtype=dtype, device=device) if wanted else None

    h = torch.empty(rows, pad16(columns), dtype=x.x.dtype, device=device)
    p_sums = buffer(rows, d, torch.float32, p.wanted and not p.in_place)
    q_sums = q.out if q.in_place else buffer(y.slots, d, torch.float32, q.wanted)
    x_copy, y_copy = buffer(rows, d, x.x.dtype, copy_x), buffer(columns, d, x.x.dtype, copy_y)
    both_scale = None if scale is None else scale[2:]
    for start in range(0, x.slots, rows):
        stop = min(start + rows, x.slots)
        x_panel = _dense(x, start, stop, x_copy, call)
        p_panel = p_sums[: stop - start] if p_sums is not None else p.out[start:stop] if p.out is not None else None
        for begin in range(0, y.slots, columns):
            end = min(begin + columns, y.slots)
            _entries(x, y, h, start, stop, begin, end, both_scale, call)
            panel = h[: stop - start, : end - begin]
            if p.wanted and p_panel is not None:
                matmul(panel, _dense(y, begin, end, y_copy, call), p_panel, accumulate=begin > 0)
            if q_sums is not None:
                matmul(panel.t(), x_panel, q_sums[begin:end], accumulate=start > 0)
        if p.wanted and p_panel is not None:
            _finish(p, p_panel, start, stop, both_scale, call, norm_inside=True)
    if q_sums is not None:
        _finish(q, q_sums, 0, y.slots, both_scale, call, norm_inside=True)


def matmul(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
    """``out = a @ b`` (+ out) with a float32 result."""
    if a.dtype == torch.float32:
        torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)
    elif a.device.type == "cuda" and torch.version.hip is None:
        # The library's own float32 output: nothing is rounded to half precision between panels.
        if accumulate:
            torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
        else:
            torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        product = torch.mm(a.float(), b.float()) if a.device.type == "cpu" else torch.mm(a, b)
        out.add_(product) if accumulate else out.copy_(product)


def _entries(
    p: Side, q: Side, h: Tensor, start: int, stop: int, begin: int, end: int, scale: Tensor | None, call: Call
) -> None:
    d, u = p.x.shape[1], call.unit
    two = p.grad is not None and q.grad is not None
    tile = config.entries_tile(call.shape(d, two, (stop - start) * (end - begin)))
    launch(
        grad.entries_kernel, (triton.cdiv(stop - start, tile.p) * triton.cdiv(end - begin, tile.q),),
        p.x, p.rnorm, p.label, p.count, p.bias, p.lse, p.grad, p.pos,
        q.x, q.rnorm, q.label, q.count, q.bias, q.lse, q.grad, q.pos,
        call.beta, scale, h,
        start, stop, begin, end, d // u, p.x.stride(0) // u, q.x.stride(0) // u, h.stride(0) // 16, p.skip, q.skip,
        EXCLUDE=call.spec.exclude, P_SAMPLES=p.samples, P_GATHER=p.gather, Q_GATHER=q.gather,
        UNIT=u, EVEN_D=d % tile.d == 0, PARTS=tile.parts, GROUP=8,
        NORM_LIMIT=_norm_limit(call, p.x), PRECISION=call.precision,
        **_tile_options(tile),
    )  # fmt: skip


def _dense(side: Side, start: int, stop: int, copy: Tensor | None, call: Call) -> Tensor:
    """The rows of some slots as a matrix: a view, or gathered into ``copy``."""
    if copy is None:
        return side.x[start:stop]
    d, u = side.x.shape[1], call.unit
    launch(
        finish.gather_kernel, (triton.cdiv(stop - start, 16), triton.cdiv(d, 256)),
        side.x, side.label, side.count, copy, start, stop, d // u, side.x.stride(0) // u, side.skip,
        UNIT=u, BR=16, BD=256,
    )  # fmt: skip
    return copy[: stop - start]


def _finish(
    result: Result, sums: Tensor, start: int, stop: int, scale: Tensor | None, call: Call,
    parts: int = 1, norm_inside: bool = False,
) -> None:  # fmt: skip
    side = result.side
    d, u = side.x.shape[1], call.unit
    blocks = _row_blocks(d)
    # As in ``paired_rows``: with the mask "self", prototypes outside all sums can still have a gradient.
    label = None if call.spec.exclude == "self" and not side.samples else side.label
    launch(
        finish.finish_kernel, (triton.cdiv(stop - start, blocks["BR"]),),
        sums, side.x, side.rnorm, label, side.count, call.beta, scale, result.out, result.dot,
        start, stop, parts, side.slots * (d // u), d // u, side.x.stride(0) // u, side.skip,
        GATHER=side.gather, NORM_INSIDE=norm_inside, WHOLE_D=blocks["BD"] >= d,
        UNIT=u, EPS=call.eps, NORM_LIMIT=_norm_limit(call, side.x), **blocks,
    )  # fmt: skip


def _bias_grad(p: Side, q: Side, call: Call) -> Tensor:
    """Gradient of p's bias, which sits in the log-sum-exps of q's rows."""
    (n, d), u = p.x.shape, call.unit
    if q.grad is None:
        return torch.zeros(n, dtype=torch.float32, device=p.x.device)
    tile = config.bias_tile(call.shape(d, False, n * q.slots))
    whole = tile.d >= d
    split = _split(call, tile, n, q.slots, 4 * n, least=1 if whole else FULL_WAVE)
    part = torch.empty(split, n, dtype=torch.float32, device=p.x.device)
    launch(
        finish.bias_grad_kernel, (triton.cdiv(n, tile.p) * split,),
        p.x, p.rnorm, p.label, p.bias, q.x, q.rnorm, q.label, q.count, q.lse, q.grad, call.beta, part,
        n, q.slots, d // u, p.x.stride(0) // u, q.x.stride(0) // u, p.skip, q.skip, split,
        EXCLUDE=call.spec.exclude, P_SAMPLES=p.samples, Q_GATHER=q.gather,
        UNIT=u, WHOLE_D=whole, EVEN_D=d % tile.d == 0, PARTS=tile.parts,
        PRECISION=call.precision, **_tile_options(tile),
    )  # fmt: skip
    return part[0] if split == 1 else part.sum(0)
