"""The order of launches of SupCon's loss and gradient in one step, and their arguments.

The kernels are in pairs.py, and in pairs_panel.py where the library multiplies: 4 N^2 d operations if one panel holds
the matrix, else 6 N^2 d, because the products are computed twice.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..base import Inputs, Needs, Reduced, Spec, Step
from ..tiled.plan import Blocks, StepPanels, ceil_div, pad16, pair_panels
from ..tiled.sides import Result, Side
from ..tiled.step import blocks_of
from . import config, launch, pairs, pairs_panel
from .config import Tile
from .dispatch import Options

ROWS_OF_A_BLOCK = 128
"""Samples of a program of ``pairs_reduce_kernel``; divides ``pairs.PADDING``."""

# The options of a launch are created once for each set of values that they depend on.
_made_once = lru_cache(maxsize=1024)


@_made_once
def _prepare_options(columns: int, looks: bool, unit: int, eps: float) -> Options:
    return Options(UNIT=unit, EPS=eps, LOOKS=looks, **launch.row_blocks(columns), **launch.CHECKS)


@_made_once
def _lse_options(negatives: bool, unit: int, whole: bool, even: bool, precision: str, tile: Tile) -> Options:
    return Options(
        NEGATIVES=negatives, UNIT=unit, WHOLE_D=whole, EVEN_D=even,
        PARTS=tile.parts, PRECISION=precision, **launch.tile_options(tile),
    )  # fmt: skip


@_made_once
def _reduce_options(limit: float) -> Options:
    return Options(NORM_LIMIT=limit, B=ROWS_OF_A_BLOCK)


@_made_once
def _grad_options(
    negatives: bool, mean: bool, share: bool, unit: int, even: bool,
    eps: float, limit: float, precision: str, tile: Tile,
) -> Options:  # fmt: skip
    return Options(
        NEGATIVES=negatives, MEAN=mean, MAY_SHARE=share, UNIT=unit, EVEN_D=even,
        EPS=eps, NORM_LIMIT=limit, PRECISION=precision, **launch.tile_options(tile),
    )  # fmt: skip


@_made_once
def _panel_options(negatives: bool, tile: config.PanelTile) -> Options:
    return Options(NEGATIVES=negatives, BP=tile.p, BQ=tile.q, warps=tile.warps)


@_made_once
def _entries_options(negatives: bool, limit: float, tile: config.PanelTile) -> Options:
    return Options(NEGATIVES=negatives, NORM_LIMIT=limit, BP=tile.p, BQ=tile.q, warps=tile.warps)


@_made_once
def _scale_options(mean: bool, limit: float) -> Options:
    return Options(MEAN=mean, NORM_LIMIT=limit)


def fits(features: Tensor, spec: Spec) -> bool:
    """Whether a step takes the problem: by panels, or with rows short enough for gradients to accumulate on the
    chip."""
    if features.shape[0] == 0 or spec.direction == "both":
        return False
    shape = _shape(features)
    return config.pairs_grad_tile(shape) is not None or _panels(features, shape, spec) is not None


def _panels(features: Tensor, shape: config.Shape, spec: Spec) -> StepPanels | None:
    """The panels of the library's products; None if the on-chip kernels are faster, or two passes.

    Float32 products of full precision always have panels if these fit the workspace: the library's are faster than
    ours, and the entries of panels are more exact than those on the chip.
    """
    if shape.kind != "ieee" and config.pairs_grad_tile(shape) is not None:
        return None
    return pair_panels(*features.shape, features.element_size(), spec.workspace)


def _shape(features: Tensor) -> config.Shape:
    arch, kind, (n, d) = config.arch_of(features.device), config.kind_of(features), features.shape
    return config.Shape(arch, kind, d, config.aligned(features), heavy=False, square=True, entries=n * n)


def step(kernels: PairKernels, reduced: Reduced, needs: Needs) -> Step:
    """See :meth:`nckernels.backends.base.Backend.step`; for features against themselves that ``fits``.

    The gradient of float16 features is float32, see ``tiled/step.py``. The mean of nothing is 0.
    """
    z, spec = kernels.inputs.features, kernels.spec
    n, device = len(z), z.device
    panels, rows = _panels(z, kernels.shape, spec), Rows.empty(n, device)
    kernels.beta = rows.beta
    kernels.prepare_rows(rows, looks=panels is not None)
    # Not a view of one tensor with others: such a loss could not be changed in place.
    loss = torch.empty((), dtype=torch.float32, device=device)
    if panels is None:
        grad = _on_chip(kernels, rows, reduced, needs, loss)
    else:
        grad = _by_panels(kernels, rows, reduced, needs, loss, panels)
    # Every pair is counted twice.
    by_beta = None if grad.dots is None else grad.dots.sum() / 2
    return Step(loss, grad.result.out if needs.features else None, None, by_beta)


class Gradient(NamedTuple):
    """Memory for the gradients."""

    result: Result
    rest: Tensor | None
    """(programs,): what they add to the gradient of beta, see ``pairs.typical_cosine``; None if it is not wanted."""
    dots: Tensor | None
    """The result's dots and the rest, one after the other."""

    @classmethod
    def empty(cls, kernels: PairKernels, rows: Rows, programs: int, by_beta: bool) -> Gradient:
        z = kernels.inputs.features
        n, dtype = len(z), torch.float32 if z.dtype == torch.float16 else z.dtype
        out, dots = torch.empty(z.shape, dtype=dtype, device=z.device), None
        if by_beta:
            dots = torch.zeros(n + programs, dtype=torch.float32, device=z.device)
        side = Side(z, rows.rnorm, True, n, kernels.inputs.target, kernels.spec.ignore_index)
        dot, rest = (None, None) if dots is None else (dots[:n], dots[n:])
        return cls(Result(side, out, dot), rest, dots)


def _on_chip(kernels: PairKernels, rows: Rows, reduced: Reduced, needs: Needs, loss: Tensor) -> Gradient:
    """The loss and the gradient with our own products."""
    z, workspace = kernels.inputs.features, kernels.spec.workspace
    (n, d), device = z.shape, z.device
    blocks = kernels.lse_pairs_blocks()
    partial = torch.empty(4, blocks.split(n, n, workspace, 16 * n), rows.width, dtype=torch.float32, device=device)
    kernels.log_sum_exp_of_pairs(rows, partial, blocks)
    kernels.reduce_pairs(rows, partial, reduced.weight, exact=False)
    blocks = kernels.grad_pairs_blocks()
    split = blocks.split(n, n, workspace, 4 * n * d)
    grad = Gradient.empty(kernels, rows, ceil_div(n, blocks.p) * split, needs.inv_temperature)
    part = torch.empty(split, n, d, dtype=torch.float32, device=device) if split > 1 else None
    kernels.divisor = torch.empty(1, dtype=torch.float32, device=device)
    kernels.grad_of_pairs(rows, grad, part, loss, reduced.mean, split, blocks)
    if part is not None:
        kernels.finish(grad.result, part, 0, n, split, None, norm_inside=False)
    return grad


def _by_panels(
    kernels: PairKernels, rows: Rows, reduced: Reduced, needs: Needs, loss: Tensor, panels: StepPanels
) -> Gradient:
    """The loss and the gradient with the library's products."""
    z = kernels.inputs.features
    (n, d), height = z.shape, panels.rows
    grad = Gradient.empty(kernels, rows, kernels.panel_programs(height), needs.inv_temperature)
    out = grad.result.accumulator

    def new(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device=z.device)

    products = new(height, pad16(n))
    h = products if z.dtype == torch.float32 else new(height, pad16(n), dtype=z.dtype)
    products, h = products[:, :n], h[:, :n]
    sums = new(min(panels.block, height), d) if out is None else out
    most = max(1, kernels.spec.workspace // 8 // (16 * rows.width))
    partial = new(4, min(kernels.panel_split(height, n), most), rows.width)
    starts = range(0, n, height)

    def multiplied(start: int) -> tuple[Tensor, int]:
        """A panel's products, and its end."""
        stop = min(start + height, n)
        kernels.matmul(z[start:stop], z.t(), products[: stop - start], accumulate=False)
        return products[: stop - start], stop

    for start in starts:
        panel, stop = multiplied(start)
        kernels.panel_log_sum_exp_of_pairs(rows, panel, partial, start, stop)
    kernels.reduce_pairs(rows, partial, reduced.weight, exact=True)
    kernels.divisor = new(3)
    kernels.scale_pairs(rows, loss, reduced.mean)
    for start in starts:
        if len(starts) > 1:  # the products of a single panel are still there
            panel, stop = multiplied(start)
        entries = h[: stop - start]
        kernels.panel_entries_of_pairs(rows, panel, entries, grad.rest, start, stop)
        for begin, end, of_block, part in blocks_of(entries, sums if out is None else out[start:stop], panels.block):
            kernels.matmul(of_block, z, part, accumulate=False)
            kernels.mend(of_block, grad.result.side, part)
            kernels.finish(grad.result, part, start + begin, start + end, 1, None, norm_inside=False)
    return grad


class Rows(NamedTuple):
    """The vectors of the samples, up to a multiple of ``pairs.PADDING``; see the kernels that write them."""

    rnorm: Tensor
    bias: Tensor
    shift: Tensor
    factor: Tensor
    """Or ``Ratio``, for panels."""
    pos: Tensor
    totals: Tensor
    """(5, blocks): sums and maxima over ``ROWS_OF_A_BLOCK`` samples."""
    tag: Tensor
    beta: Tensor
    """(1,): the inverse temperature."""

    @property
    def width(self) -> int:
        return self.rnorm.shape[0]

    @classmethod
    def empty(cls, n: int, device: torch.device) -> Rows:
        width = ceil_div(n, pairs.PADDING) * pairs.PADDING
        blocks = width // ROWS_OF_A_BLOCK
        memory = torch.empty(5 * width + 5 * blocks + 1, dtype=torch.float32, device=device)
        rnorm, bias, shift, factor, pos, totals, beta = memory.split([width] * 5 + [5 * blocks, 1])
        tag = torch.empty(width, dtype=torch.int64, device=device)
        return cls(rnorm, bias, shift, factor, pos, totals.view(5, blocks), tag, beta)


class PairKernels(launch.TritonKernels):
    """The kernels of pairs.py, ready for one call with features in both places and labels as targets.

    ``host_beta`` is the inverse temperature, if the host knows it.
    """

    def __init__(self, inputs: Inputs, spec: Spec, host_beta: float | None = None) -> None:
        super().__init__(inputs, spec)
        self.host_beta = host_beta
        self.shape = _shape(self.inputs.features)
        self.negatives = spec.exclude == "same_label"
        self.row_shape = self.d, self._units(self.inputs.features)

    def lse_pairs_blocks(self) -> Blocks:
        return self._loop_blocks(config.pairs_lse_tile(self.shape))

    def grad_pairs_blocks(self) -> Blocks:
        tile = config.pairs_grad_tile(self.shape)
        assert tile is not None
        return self._blocks(tile)

    def prepare_rows(self, rows: Rows, looks: bool) -> None:
        """Inverse norms, biases, tags, and the inverse temperature; ``looks``: whether ignored rows are looked at."""
        z, blocks = self.inputs.features, launch.row_blocks(self.inputs.features.shape[1])
        beta, bits = launch.known_number(self.inputs.inv_temperature, self.host_beta)
        launch.launch(
            pairs.pairs_prepare_kernel, (rows.width // blocks["BR"],),
            z, self.inputs.target, beta, rows.rnorm, rows.bias, rows.tag, rows.beta,
            len(z), *self.row_shape, self.spec.ignore_index, bits,
            options=_prepare_options(blocks["BD"], looks, self.unit, self.eps),
        )  # fmt: skip

    def log_sum_exp_of_pairs(self, rows: Rows, partial: Tensor, blocks: Blocks) -> None:
        """``partial`` (4, parts, width): see ``pairs_lse_kernel``."""
        z, tile, parts = self.inputs.features, blocks.tile, partial.shape[1]
        launch.launch(
            pairs.pairs_lse_kernel, (ceil_div(len(z), tile.p) * parts,),
            z, rows.rnorm, rows.bias, rows.tag, self.beta, partial, len(z), rows.width, *self.row_shape, parts,
            options=_lse_options(
                self.negatives, self.unit, self._whole(tile), self._even(tile), self.precision, tile
            ),
        )  # fmt: skip

    def reduce_pairs(self, rows: Rows, partial: Tensor, weight: Tensor | None, exact: bool) -> None:
        """The other vectors, from the parts and the weights of the samples; ``exact``: with the ratio as factor."""
        factor, ratio = (None, rows.factor) if exact else (rows.factor, None)
        launch.launch(
            pairs.pairs_reduce_kernel, (rows.totals.shape[1],),
            partial, rows.rnorm, rows.bias, weight, self.beta, rows.shift, factor, ratio, rows.pos, rows.totals,
            rows.width, partial.shape[1],
            options=_reduce_options(self.norm_limit),
        )  # fmt: skip

    def grad_of_pairs(
        self, rows: Rows, grad: Gradient, part: Tensor | None, loss: Tensor, mean: bool, split: int, blocks: Blocks
    ) -> None:
        """The loss, the divisor, and the gradient or ``split`` partial sums of it in ``part``."""
        z, tile = self.inputs.features, blocks.tile
        out, dot = grad.result[1:] if part is None else (None, None)
        launch.launch(
            pairs.pairs_grad_kernel, (ceil_div(len(z), tile.p) * split,),
            z, rows.rnorm, rows.bias, rows.tag, rows.shift, rows.factor, rows.pos, rows.totals, self.beta,
            out, dot, grad.rest, part, self.divisor, loss, len(z), *self.row_shape, split, rows.totals.shape[1],
            options=_grad_options(
                self.negatives, mean, config.may_share(tile, self.arch), self.unit, z.shape[1] == tile.d,
                self.eps, self.norm_limit, self.precision, tile,
            ),
        )  # fmt: skip

    def panel_split(self, anchors: int, others: int) -> int:
        """Number of programs that share their samples in ``panel_log_sum_exp_of_pairs``."""
        tile = config.panel_tile()
        return min(ceil_div(others, tile.q), ceil_div(4 * self.arch.multiprocessors, ceil_div(anchors, tile.p)))

    def panel_log_sum_exp_of_pairs(self, rows: Rows, products: Tensor, partial: Tensor, start: int, stop: int) -> None:
        """As ``log_sum_exp_of_pairs``, for the samples [start, stop), from their products with all."""
        tile, parts = config.panel_tile(), partial.shape[1]
        launch.launch(
            pairs_panel.pairs_panel_lse_kernel, (ceil_div(stop - start, tile.p) * parts,),
            products, rows.rnorm, rows.bias, rows.tag, self.beta, partial,
            start, stop, products.shape[1], rows.width, products.stride(0) // 16, parts,
            options=_panel_options(self.negatives, tile),
        )  # fmt: skip

    def scale_pairs(self, rows: Rows, loss: Tensor, mean: bool) -> None:
        """The loss, the divisor, and the scale of the entries."""
        launch.launch(
            pairs_panel.pairs_scale_kernel, (1,),
            rows.totals, self.beta, self.divisor, loss, rows.totals.shape[1],
            options=_scale_options(mean, self.norm_limit),
        )  # fmt: skip

    def panel_programs(self, anchors: int) -> int:
        """Number of programs of ``panel_entries_of_pairs``."""
        tile = config.panel_tile()
        return ceil_div(anchors, tile.p) * ceil_div(len(self.inputs.features), tile.q)

    def panel_entries_of_pairs(
        self, rows: Rows, products: Tensor, h: Tensor, rest: Tensor | None, start: int, stop: int
    ) -> None:
        """The entries of the samples [start, stop) from their products, which ``h`` may be."""
        tile, n = config.panel_tile(), h.shape[1]
        launch.launch(
            pairs_panel.pairs_panel_entries_kernel, (self.panel_programs(stop - start),),
            products, rows.rnorm, rows.bias, rows.tag, rows.shift, rows.factor, rows.pos, self.beta, self.divisor,
            h, rest, start, stop, n, products.stride(0) // 16, h.stride(0) // 16,
            options=_entries_options(self.negatives, self.norm_limit, tile),
        )  # fmt: skip
