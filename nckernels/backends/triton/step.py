"""The launches of loss and gradient in one step; their order is in ``tiled/step.py``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .. import quack
from ..base import Inputs, Spec
from ..tiled import EpilogueKernels
from ..tiled.kernels import Finish, Vectors
from ..tiled.plan import ceil_div
from ..tiled.sides import Result, Side
from . import config, epilogue, finish, launch, panel, prepare, reduce
from .dispatch import Options
from .launch import CHECKS, row_blocks

# The options of a launch are created once for each set of values that they depend on.
_made_once = lru_cache(maxsize=1024)


@_made_once
def _panel_options(exclude: str, samples: bool, gather: bool, tile: config.PanelTile) -> Options:
    return Options(EXCLUDE=exclude, P_SAMPLES=samples, P_GATHER=gather, BP=tile.p, BQ=tile.q, warps=tile.warps)


@_made_once
def _entries_options(exclude: str, samples: bool, gather: bool, limit: float, tile: config.PanelTile) -> Options:
    return Options(
        EXCLUDE=exclude, P_SAMPLES=samples, P_GATHER=gather, BP=tile.p, BQ=tile.q, BS=tile.most_parts,
        NORM_LIMIT=limit, warps=tile.warps,
    )  # fmt: skip


@_made_once
def _operands_options(exclude: str, samples: bool, gather: bool) -> Options:
    return Options(EXCLUDE=exclude, P_SAMPLES=samples, P_GATHER=gather, B=1024)


@_made_once
def _positives_options(by_class: bool, exclude: str) -> Options:
    return Options(BY_CLASS=by_class, EXCLUDE=exclude, B=1024)


_WEIGHTED = {gather: Options(GATHER=gather, BP=8, BQ=1024, BS=32, warps=8) for gather in (False, True)}
_SCALED_BLOCK = 4096
_SCALED = Options(B=_SCALED_BLOCK, warps=8)


@_made_once
def _prepare_options(columns: int, nothing_is_zero: bool, unit: int, eps: float) -> Options:
    return Options(NOTHING_IS_ZERO=nothing_is_zero, UNIT=unit, EPS=eps, B=2048, **row_blocks(columns), **CHECKS)


@_made_once
def _finish_options(
    columns: int, whole: bool, gather: bool, by_class: bool, unit: int, eps: float, limit: float, precision: str
) -> Options:
    blocks = row_blocks(columns)
    return Options(
        GATHER=gather, BY_CLASS=by_class, WHOLE_D=whole, UNIT=unit, EPS=eps, NORM_LIMIT=limit, PRECISION=precision,
        BP=max(32, blocks["BR"]), BQ=16, BN=32, B=2048, stages=1, **blocks,
    )  # fmt: skip


_LOSS = {by_class: Options(BY_CLASS=by_class, B=8192, warps=32) for by_class in (False, True)}
_NO_LOSS = (None,) * 5


class TritonStep(launch.TritonKernels, EpilogueKernels):
    """The kernels of two passes and of one step.

    ``host_beta`` is the inverse temperature, if the host knows it.
    """

    def __init__(self, inputs: Inputs, spec: Spec, host_beta: float | None = None) -> None:
        super().__init__(inputs, spec)
        self.host_beta = host_beta

    @property
    def fits_on_chip(self) -> bool:
        """Whether rows are short enough for the two passes that accumulate gradients on the chip."""
        return config.grad_tile(self._shape(False, 0)) is not None

    def prepare_step(self, weight: Tensor | None, vectors: Vectors, nothing_is_zero: bool) -> None:
        z, w, target, *_ = self.inputs
        m, k, v, blocks = z.shape[0], w.shape[0], vectors, row_blocks(z.shape[1])
        of_samples = ceil_div(m, blocks["BR"])
        of_classes = ceil_div(k, blocks["BR"]) if v.mark is None or v.w_broken is not None else 0
        on_device, bits = launch.known_number(self.inputs.inv_temperature, self.host_beta)
        self.beta, self.divisor = v.beta, v.divisor
        launch.launch(
            prepare.prepare_step_kernel, (1 + of_samples + of_classes,),
            z, w, target, weight, on_device, v.z_rnorm, v.pos, v.share, v.pos_grad, v.instance_grad, v.z_broken,
            v.w_rnorm, v.w_broken, v.mark, v.of_class, v.divisor, v.beta,
            m, k, self.d, self._units(z), self._units(w), self.spec.ignore_index, bits, of_samples,
            options=_prepare_options(blocks["BD"], nothing_is_zero, self.unit, self.eps),
        )  # fmt: skip

    def finisher(self, result: Result, scale: Tensor | None, other: Side | None, vectors: Vectors) -> Finish:
        # One call for each block of rows: what its arguments have in common is prepared here.
        side, (z, w, target, *_), spec = result.side, self.inputs, self.spec
        d, blocks = z.shape[1], row_blocks(z.shape[1])
        rows, columns = blocks["BR"], blocks["BD"]
        options = _finish_options(
            columns, columns >= d, side.gather, spec.by_class, self.unit, self.eps, self.norm_limit, self.precision
        )
        tensors: tuple[Tensor | None, ...] = (
            side.x, side.rnorm, side.label, side.used, self.beta, scale, vectors.divisor, result.out, result.dot
        )  # fmt: skip
        sizes: tuple[int, ...] = (self.d, self._units(side.x), side.skip, z.shape[0], w.shape[0], spec.ignore_index)
        if other is None:
            tensors += None, None, None
            sizes += 0, 0, 0
        else:
            tensors += vectors.z_broken if other.samples else vectors.w_broken, other.x, other.label
            sizes += other.slots, self._units(other.x), other.skip
        of_loss = target, vectors.share, vectors.lse, vectors.pos, vectors.loss

        def finished(sums: Tensor, h: Tensor, start: int, stop: int, is_last: bool) -> None:
            with_h, strides = (None, (0, 0)) if other is None else (h, h.stride())
            launch.launch(
                finish.finish_step_kernel, (ceil_div(stop - start, rows) + is_last,),
                sums, with_h, *tensors, *(of_loss if is_last else _NO_LOSS), start, stop, *strides, *sizes,
                options=options,
            )  # fmt: skip

        return finished

    def write_loss(self, vectors: Vectors) -> None:
        (z, w, target, *_), v = self.inputs, vectors
        launch.launch(
            reduce.loss_kernel, (1,),
            target, v.share, v.lse, v.instance_lse, v.pos, v.divisor, v.loss,
            z.shape[0], w.shape[0], self.spec.ignore_index,
            options=_LOSS[self.spec.by_class],
        )  # fmt: skip

    def panel_split(self, anchors: int, others: int) -> int:
        tile = config.panel_tile()
        return min(tile.most_parts, ceil_div(4 * self.arch.multiprocessors, ceil_div(anchors, tile.p)))

    def panel_log_sum_exp(self, p: Side, q: Side, products: Tensor, partial: Tensor, start: int, stop: int) -> None:
        tile, split = config.panel_tile(), partial.shape[1]
        launch.launch(
            panel.panel_lse_kernel, (ceil_div(stop - start, tile.p) * split,),
            products, p.rnorm, p.label, p.used, q.rnorm, q.label, self.beta, partial,
            start, stop, q.slots, products.stride(0) // 16, p.skip, q.skip, split,
            options=_panel_options(self.spec.exclude, p.samples, p.gather, tile),
        )  # fmt: skip

    def panel_entries(
        self, p: Side, q: Side, products: Tensor, partial: Tensor, h: Tensor, start: int, stop: int,
        scale: Tensor | None,
    ) -> None:  # fmt: skip
        tile, split = config.panel_tile(), partial.shape[1]
        launch.launch(
            panel.panel_entries_kernel, (ceil_div(stop - start, tile.p) * ceil_div(q.slots, tile.q),),
            products, partial, p.rnorm, p.label, p.used, p.grad, p.pos, q.rnorm, q.label, q.pos,
            self.beta, scale, self.divisor, p.lse, h,
            start, stop, q.slots, products.stride(0) // 16, h.stride(0) // 16, p.skip, q.skip, split,
            options=_entries_options(self.spec.exclude, p.samples, p.gather, self.norm_limit, tile),
        )  # fmt: skip

    def epilogue_product(self) -> tuple[EpilogueKernels, quack.Product, float] | None:
        z, w, beta = self.inputs.features, self.inputs.prototypes, self.host_beta
        if beta is None or quack.why_not(z.device) is not None or not quack.takes(z, w, beta):
            return None
        product = quack.product(z.device, self.spec.exclude == "target")
        return None if product is None else (self, product, beta)

    def epilogue_operands(
        self, p: Side, p_scale: Tensor, p_tag: Tensor | None, slot: Tensor | None,
        q: Side, q_scale: Tensor, q_tag: Tensor | None,
    ) -> None:  # fmt: skip
        padded = q_scale.shape[0]
        launch.launch(
            epilogue.operands_kernel, (ceil_div(p.slots, 1024) + ceil_div(padded, 1024),),
            p.rnorm, p.label, p.used, p_scale, p_tag, slot, q.rnorm, q.label, q_scale, q_tag, self.beta,
            p.slots, q.slots, padded, p.skip, q.skip,
            options=_operands_options(self.spec.exclude, p.samples, p.gather),
        )  # fmt: skip

    def weighted_entries(self, p: Side, sums: Tensor, weight: Tensor, h: Tensor, start: int, stop: int) -> None:
        launch.launch(
            epilogue.weighted_entries_kernel, (ceil_div(stop - start, 8), ceil_div(h.shape[1], 1024)),
            sums, p.rnorm, p.label, p.used, p.grad, self.beta, self.divisor, p.lse, weight, h,
            start, stop, sums.shape[1], h.stride(0) // 16, p.skip,
            options=_WEIGHTED[p.gather],
        )  # fmt: skip

    def positives(
        self, p: Side, q: Side, pos: Tensor, weight: Tensor, slot: Tensor | None, h: Tensor, start: int, stop: int
    ) -> None:
        m, k, pos_grad = pos.shape[0], self.inputs.prototypes.shape[0], (p if p.samples else q).pos
        launch.launch(
            epilogue.positives_kernel, (ceil_div(m, 1024),),
            self.inputs.target, pos, pos_grad, p.rnorm, q.rnorm, weight, slot, self.beta, self.divisor, h,
            m, k, start, stop, h.stride(0) // 16, self.spec.ignore_index,
            options=_positives_options(self.spec.by_class, self.spec.exclude),
        )  # fmt: skip


def scaled(
    tensors: Sequence[Tensor], factor: Tensor, dtypes: Sequence[torch.dtype], in_place: bool
) -> Sequence[Tensor]:
    """Up to three contiguous tensors times a 0-dimensional factor on their device, which the host does not read."""
    out = [
        None if in_place and x.dtype == dtype else torch.empty_like(x, dtype=dtype)
        for x, dtype in zip(tensors, dtypes, strict=True)
    ]
    none = [None] * (3 - len(tensors))
    x, y, z = [x.numel() for x in tensors] + [0] * len(none)
    x_blocks, y_blocks = ceil_div(x, _SCALED_BLOCK), ceil_div(y, _SCALED_BLOCK)
    with launch.on_device(factor):
        launch.launch(
            reduce.scale_kernel, (x_blocks + y_blocks + ceil_div(z, _SCALED_BLOCK),),
            factor, *tensors, *none, *out, *none, x, y, z, x_blocks, y_blocks,
            options=_SCALED,
        )  # fmt: skip
    return [x if y is None else y for x, y in zip(tensors, out, strict=True)]
