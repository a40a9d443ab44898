"""The order of launches of SupCon's loss and gradient in one step, and their arguments; the kernels are in pairs.py."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..base import Inputs, Needs, Reduced, Spec, Step
from ..tiled.plan import Blocks, ceil_div
from ..tiled.sides import Result, Side
from . import config, launch, pairs
from .config import Tile
from .dispatch import Options

ROWS_OF_A_BLOCK = 128
"""Samples of a program of ``pairs_reduce_kernel``; divides ``pairs.PADDING``."""

# The options of a launch are created once for each set of values that they depend on.
_made_once = lru_cache(maxsize=1024)


@_made_once
def _prepare_options(columns: int, unit: int, eps: float) -> Options:
    return Options(UNIT=unit, EPS=eps, **launch.row_blocks(columns), **launch.CHECKS)


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


def fits(features: Tensor, spec: Spec) -> bool:
    """Whether a step takes the problem: rows that are short enough for gradients to accumulate on the chip."""
    return features.shape[0] > 0 and spec.direction != "both" and config.pairs_grad_tile(_shape(features)) is not None


def _shape(features: Tensor) -> config.Shape:
    arch, kind, (n, d) = config.arch_of(features.device), config.kind_of(features), features.shape
    return config.Shape(arch, kind, d, config.aligned(features), heavy=False, square=True, entries=n * n)


def step(kernels: PairKernels, reduced: Reduced, needs: Needs) -> Step:
    """See :meth:`nckernels.backends.base.Backend.step`; for features against themselves that ``fits``.

    The gradient of float16 features is float32, see ``tiled/step.py``. The mean of nothing is 0.
    """
    z, target, spec = kernels.inputs.features, kernels.inputs.target, kernels.spec
    (n, d), device, half = z.shape, z.device, z.dtype == torch.float16
    rows = Rows.empty(n, device)
    kernels.beta = rows.beta
    kernels.prepare_rows(rows)
    blocks = kernels.lse_pairs_blocks()
    partial = torch.empty(4, blocks.split(n, n, spec.workspace, 16 * n), rows.width, dtype=torch.float32, device=device)
    kernels.log_sum_exp_of_pairs(rows, partial, blocks)
    kernels.reduce_pairs(rows, partial, reduced.weight)
    out = torch.empty((n, d), dtype=torch.float32 if half else z.dtype, device=device)
    dot = torch.empty(n, dtype=torch.float32, device=device) if needs.inv_temperature else None
    result = Result(Side(z, rows.rnorm, True, n, target, spec.ignore_index), out, dot)
    blocks = kernels.grad_pairs_blocks()
    split = blocks.split(n, n, spec.workspace, 4 * n * d)
    part = torch.empty(split, n, d, dtype=torch.float32, device=device) if split > 1 else None
    # Not views of one tensor: a loss that is a view could not be changed in place.
    loss, divisor = (torch.empty((), dtype=torch.float32, device=device) for _ in range(2))
    kernels.divisor = divisor
    kernels.grad_of_pairs(rows, result, part, divisor, loss, reduced.mean, split, blocks)
    if part is not None:
        kernels.finish(result, part, 0, n, split, None, norm_inside=False)
    # Every pair is counted twice.
    return Step(loss, out if needs.features else None, None, None if dot is None else dot.sum() / 2)


class Rows(NamedTuple):
    """The vectors of the samples, up to a multiple of ``pairs.PADDING``; see the kernels that write them."""

    rnorm: Tensor
    bias: Tensor
    shift: Tensor
    factor: Tensor
    pos: Tensor
    totals: Tensor
    """(4, blocks): sums and maxima over ``ROWS_OF_A_BLOCK`` samples."""
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
        memory = torch.empty(5 * width + 4 * blocks + 1, dtype=torch.float32, device=device)
        rnorm, bias, shift, factor, pos, totals, beta = memory.split([width] * 5 + [4 * blocks, 1])
        tag = torch.empty(width, dtype=torch.int64, device=device)
        return cls(rnorm, bias, shift, factor, pos, totals.view(4, blocks), tag, beta)


class PairKernels(launch.TritonKernels):
    """The kernels of pairs.py, ready for one call with features in both places and labels as targets.

    ``host_beta`` is the inverse temperature, if the host knows it.
    """

    def __init__(self, inputs: Inputs, spec: Spec, host_beta: float | None = None) -> None:
        super().__init__(inputs, spec)
        self.host_beta = host_beta
        self.negatives = spec.exclude == "same_label"
        self.row_shape = self.d, self._units(self.inputs.features)

    def lse_pairs_blocks(self) -> Blocks:
        return self._loop_blocks(config.pairs_lse_tile(_shape(self.inputs.features)))

    def grad_pairs_blocks(self) -> Blocks:
        tile = config.pairs_grad_tile(_shape(self.inputs.features))
        assert tile is not None
        return self._blocks(tile)

    def prepare_rows(self, rows: Rows) -> None:
        """Inverse norms, biases, tags, and the inverse temperature."""
        z, blocks = self.inputs.features, launch.row_blocks(self.inputs.features.shape[1])
        beta, bits = launch.known_number(self.inputs.inv_temperature, self.host_beta)
        launch.launch(
            pairs.pairs_prepare_kernel, (rows.width // blocks["BR"],),
            z, self.inputs.target, beta, rows.rnorm, rows.bias, rows.tag, rows.beta,
            len(z), *self.row_shape, self.spec.ignore_index, bits,
            options=_prepare_options(blocks["BD"], self.unit, self.eps),
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

    def reduce_pairs(self, rows: Rows, partial: Tensor, weight: Tensor | None) -> None:
        """The other vectors, from the parts and the weights of the samples."""
        launch.launch(
            pairs.pairs_reduce_kernel, (rows.totals.shape[1],),
            partial, rows.rnorm, rows.bias, weight, rows.shift, rows.factor, rows.pos, rows.totals,
            rows.width, partial.shape[1],
            options=_reduce_options(self.norm_limit),
        )  # fmt: skip

    def grad_of_pairs(
        self, rows: Rows, result: Result, part: Tensor | None, divisor: Tensor, loss: Tensor,
        mean: bool, split: int, blocks: Blocks,
    ) -> None:  # fmt: skip
        """The loss, and the gradient or ``split`` partial sums of it in ``part`` with their ``divisor``."""
        z, tile = self.inputs.features, blocks.tile
        out, dot = (result.out, result.dot) if part is None else (None, None)
        launch.launch(
            pairs.pairs_grad_kernel, (ceil_div(len(z), tile.p) * split,),
            z, rows.rnorm, rows.bias, rows.tag, rows.shift, rows.factor, rows.pos, rows.totals, self.beta,
            out, dot, part, divisor, loss, len(z), *self.row_shape, split, rows.totals.shape[1],
            options=_grad_options(
                self.negatives, mean, config.may_share(tile, self.arch), self.unit, z.shape[1] == tile.d,
                self.eps, self.norm_limit, self.precision, tile,
            ),
        )  # fmt: skip
