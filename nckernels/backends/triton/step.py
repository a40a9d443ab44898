"""The launches of loss and gradient in one step; their order is in ``tiled/step.py``."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from .. import quack
from ..base import Inputs, Spec
from ..tiled import StepKernels
from ..tiled.plan import ceil_div
from ..tiled.sides import Side
from ..tiled.step import SAMPLES_OF_A_BLOCK
from . import config, epilogue, launch, panel
from . import reduce as sums
from .dispatch import Options

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
def _operand_options(exclude: str, samples: bool, gather: bool) -> Options:
    return Options(EXCLUDE=exclude, SAMPLES=samples, GATHER=gather, B=1024)


_WEIGHTS = {gather: Options(GATHER=gather, BP=32, BS=32) for gather in (False, True)}


@_made_once
def _positives_options(by_class: bool, exclude: str) -> Options:
    return Options(BY_CLASS=by_class, EXCLUDE=exclude, B=1024)


_WEIGHTED = {gather: Options(GATHER=gather, BP=8, BQ=1024, warps=8) for gather in (False, True)}
_SHARES = Options(B=SAMPLES_OF_A_BLOCK)
_DIVISOR = {nothing: Options(NOTHING_IS_ZERO=nothing, B=1024) for nothing in (False, True)}
_LOSS = {by_class: Options(BY_CLASS=by_class, B=SAMPLES_OF_A_BLOCK) for by_class in (False, True)}
_LOSS_SUM = Options(B=1024)
_SCALED = {in_place: Options(IN_PLACE=in_place, B=4096) for in_place in (False, True)}


def fits_on_chip(features: Tensor, prototypes: Tensor) -> bool:
    """Whether rows are short enough for the two passes that accumulate gradients on the chip."""
    unit = math.gcd(8, features.shape[1], features.stride(0), prototypes.stride(0))
    aligned = unit * features.element_size() >= 16 and (features.data_ptr() | prototypes.data_ptr()) % 16 == 0
    return _on_chip(config.arch_of(features.device), config.kind_of(features), features.shape[1], aligned)


@_made_once
def _on_chip(arch: config.Arch, kind: config.Kind, d: int, aligned: bool) -> bool:
    return config.grad_tile(config.Shape(arch, kind, d, aligned, heavy=False)) is not None


class TritonStep(launch.TritonKernels, StepKernels):
    """The kernels of two passes and of one step.

    ``host_beta`` is the inverse temperature, if the host knows it.
    """

    def __init__(self, inputs: Inputs, spec: Spec, host_beta: float | None = None) -> None:
        super().__init__(inputs, spec)
        self.host_beta = host_beta

    def shares(
        self, weight: Tensor | None, share: Tensor, pos_grad: Tensor, of_class: Tensor | None, part: Tensor
    ) -> None:
        m, k = share.shape[0], self.inputs.prototypes.shape[0]
        launch.launch(
            sums.share_kernel, (part.shape[1],),
            self.inputs.target, weight, share, pos_grad, of_class, part, m, k, self.spec.ignore_index,
            options=_SHARES,
        )  # fmt: skip

    def divisor(self, part: Tensor, out: Tensor, nothing_is_zero: bool) -> None:
        launch.launch(sums.divisor_kernel, (1,), part, out, part.shape[1], options=_DIVISOR[nothing_is_zero])

    def panel_split(self, anchors: int, others: int) -> int:
        tile = config.panel_tile()
        return min(tile.most_parts, ceil_div(4 * self.arch.multiprocessors, ceil_div(anchors, tile.p)))

    def panel_log_sum_exp(
        self, p: Side, q: Side, products: Tensor, partial: tuple[Tensor, Tensor], start: int, stop: int
    ) -> None:
        tile, split = config.panel_tile(), partial[0].shape[0]
        launch.launch(
            panel.panel_lse_kernel, (ceil_div(stop - start, tile.p) * split,),
            products, p.rnorm, p.label, p.used, q.rnorm, q.label, self.beta, *partial,
            start, stop, q.slots, products.stride(0) // 16, p.skip, q.skip, split,
            options=_panel_options(self.spec.exclude, p.samples, p.gather, tile),
        )  # fmt: skip

    def panel_entries(
        self, p: Side, q: Side, products: Tensor, partial: tuple[Tensor, Tensor], h: Tensor,
        start: int, stop: int, scale: Tensor | None,
    ) -> None:  # fmt: skip
        tile, split = config.panel_tile(), partial[0].shape[0]
        launch.launch(
            panel.panel_entries_kernel, (ceil_div(stop - start, tile.p) * ceil_div(q.slots, tile.q),),
            products, *partial, p.rnorm, p.label, p.used, p.grad, p.pos, q.rnorm, q.label, q.pos,
            self.beta, scale, p.lse, h,
            start, stop, q.slots, products.stride(0) // 16, h.stride(0) // 16, p.skip, q.skip, split,
            options=_entries_options(self.spec.exclude, p.samples, p.gather, self.norm_limit, tile),
        )  # fmt: skip

    def epilogue_product(self) -> tuple[quack.Product, float] | None:
        z, w, beta = self.inputs.features, self.inputs.prototypes, self.host_beta
        if beta is None or quack.why_not(z.device) is not None or not quack.takes(z, w, beta):
            return None
        product = quack.product(z.device, self.spec.exclude == "target")
        return None if product is None else (product, beta)

    def epilogue_operand(
        self, side: Side, scale: Tensor, tag: Tensor | None, slot: Tensor | None, anchors: bool
    ) -> None:
        n = scale.shape[0]
        launch.launch(
            epilogue.operand_kernel, (ceil_div(n, 1024),),
            side.rnorm, side.label, side.used, self.beta if anchors else None, scale, tag, slot,
            side.slots, n, side.skip,
            options=_operand_options(self.spec.exclude, side.samples, side.gather),
        )  # fmt: skip

    def epilogue_weights(self, p: Side, sums: Tensor, weight: Tensor, start: int, stop: int) -> None:
        launch.launch(
            epilogue.weights_kernel, (ceil_div(stop - start, 32),),
            sums, p.label, p.used, p.grad, self.beta, p.lse, weight, start, stop, sums.shape[1], p.skip,
            options=_WEIGHTS[p.gather],
        )  # fmt: skip

    def weighted_entries(self, p: Side, weight: Tensor, h: Tensor, start: int, stop: int) -> None:
        launch.launch(
            epilogue.weighted_entries_kernel, (ceil_div(stop - start, 8), ceil_div(h.shape[1], 1024)),
            weight, p.rnorm, p.label, p.used, h, start, stop, h.stride(0) // 16, p.skip,
            options=_WEIGHTED[p.gather],
        )  # fmt: skip

    def positives(
        self, p: Side, q: Side, pos: Tensor, weight: Tensor, slot: Tensor | None, h: Tensor, start: int, stop: int
    ) -> None:
        m, k, pos_grad = pos.shape[0], self.inputs.prototypes.shape[0], (p if p.samples else q).pos
        launch.launch(
            epilogue.positives_kernel, (ceil_div(m, 1024),),
            self.inputs.target, pos, pos_grad, p.rnorm, q.rnorm, weight, slot, self.beta, h,
            m, k, start, stop, h.stride(0) // 16, self.spec.ignore_index,
            options=_positives_options(self.spec.by_class, self.spec.exclude),
        )  # fmt: skip

    def loss(self, share: Tensor, lse: Tensor, pos: Tensor, part: Tensor, divisor: Tensor | None, out: Tensor) -> None:
        k = self.inputs.prototypes.shape[0]
        launch.launch(
            sums.loss_kernel, (part.shape[0],),
            self.inputs.target, share, lse, pos, part, share.shape[0], k, self.spec.ignore_index,
            options=_LOSS[self.spec.by_class],
        )  # fmt: skip
        launch.launch(sums.loss_sum_kernel, (1,), part, divisor, out, part.shape[0], options=_LOSS_SUM)


def scaled(x: Tensor, factor: Tensor, dtype: torch.dtype, in_place: bool) -> Tensor:
    """``x * factor`` for a contiguous tensor and a 0-dimensional factor on its device, which the host does not read."""
    in_place = in_place and x.dtype == dtype
    out = x if in_place else torch.empty_like(x, dtype=dtype)
    launch.launch(sums.scale_kernel, (ceil_div(x.numel(), 4096),), x, factor, out, x.numel(), options=_SCALED[in_place])
    return out
