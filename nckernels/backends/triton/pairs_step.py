"""The order of launches of SupCon's loss and gradient in one step, and their arguments; the kernels are in pairs.py."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..base import Inputs, Needs, Reduced, Spec, Step
from ..tiled.plan import ceil_div
from ..tiled.sides import Result, Side
from . import config, launch, pairs
from .config import Tile
from .dispatch import Options

ROWS_OF_A_BLOCK = 128
"""Rows of a program of ``pairs_reduce_kernel``."""

# The options of a launch are created once for each set of values that they depend on.
_made_once = lru_cache(maxsize=1024)


@_made_once
def _prepare_options(columns: int, unit: int, eps: float) -> Options:
    # Device assertions need debug, whose overflow checks of every index are turned off.
    checks = {} if launch.INTERPRETED else {"debug": True, "sanitize_overflow": False}
    return Options(UNIT=unit, EPS=eps, **launch.row_blocks(columns), **checks)


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


def step(inputs: Inputs, reduced: Reduced, spec: Spec, needs: Needs) -> Step:
    """See :meth:`nckernels.backends.base.Backend.step`; for features against themselves that ``fits``.

    The gradient of float16 features is float32, see ``tiled/step.py``.
    """
    return PairsStep(inputs, reduced, spec).run(needs)


def _shape(features: Tensor) -> config.Shape:
    arch, kind, (n, d) = config.arch_of(features.device), config.kind_of(features), features.shape
    return config.Shape(arch, kind, d, config.aligned(features), heavy=False, square=True, entries=n * n)


class PairsStep(launch.TritonKernels):
    """One call."""

    def __init__(self, inputs: Inputs, reduced: Reduced, spec: Spec) -> None:
        super().__init__(inputs, spec)
        assert reduced.of_nothing == 0.0 or not reduced.mean
        self.reduced = reduced
        self.negatives = spec.exclude == "same_label"
        shape = _shape(self.inputs.features)
        self.tiles = config.pairs_lse_tile(shape), config.pairs_grad_tile(shape)

    def run(self, needs: Needs) -> Step:
        """Loss and gradient."""
        z, target, spec = self.inputs.features, self.inputs.target, self.spec
        (n, d), device = z.shape, z.device
        lse_tile, grad_tile = self.tiles
        assert grad_tile is not None
        parts = self._loop_blocks(lse_tile).split(n, n, spec.workspace, 16 * n)
        split = self._blocks(grad_tile).split(n, n, spec.workspace, 4 * n * d)
        width = ceil_div(n, pairs.PADDING) * pairs.PADDING
        blocks = width // ROWS_OF_A_BLOCK
        sizes = *[width] * 5, 4 * blocks, 2, 4 * parts * width
        memory = torch.empty(sum(sizes), dtype=torch.float32, device=device)
        rnorm, bias, shift, factor, pos, totals, results, partial = memory.split(sizes)
        tag = torch.empty(width, dtype=torch.int64, device=device)
        loss, divisor = results
        rows, shape = (z, rnorm, bias, tag), (self.d, self._units(z))
        row_blocks = launch.row_blocks(d)
        launch.launch(
            pairs.pairs_prepare_kernel, (width // row_blocks["BR"],),
            z, target, self.beta, rnorm, bias, tag, n, *shape, spec.ignore_index,
            options=_prepare_options(row_blocks["BD"], self.unit, self.eps),
        )  # fmt: skip
        launch.launch(
            pairs.pairs_lse_kernel, (ceil_div(n, lse_tile.p) * parts,),
            *rows, self.beta, partial, n, width, *shape, parts,
            options=_lse_options(
                self.negatives, self.unit, self._whole(lse_tile), self._even(lse_tile), self.precision, lse_tile
            ),
        )  # fmt: skip
        launch.launch(
            pairs.pairs_reduce_kernel, (blocks,),
            partial, rnorm, bias, self.reduced.weight, shift, factor, pos, totals, n, width, parts,
            options=_reduce_options(self.norm_limit),
        )  # fmt: skip
        side = Side(z, rnorm, True, n, target, spec.ignore_index)
        dtype = torch.float32 if z.dtype == torch.float16 else z.dtype
        out = torch.empty((n, d), dtype=dtype, device=device)
        dot = torch.empty(n, dtype=torch.float32, device=device) if needs.inv_temperature else None
        result = Result(side, out, dot)
        part = torch.empty(split, n, d, dtype=torch.float32, device=device) if split > 1 else None
        launch.launch(
            pairs.pairs_grad_kernel, (ceil_div(n, grad_tile.p) * split,),
            *rows, shift, factor, pos, totals, self.beta,
            *((out, dot) if part is None else (None, None)), part, divisor, loss,
            n, *shape, split, blocks,
            options=_grad_options(
                self.negatives, self.reduced.mean, config.may_share(grad_tile, self.arch), self.unit,
                d == grad_tile.d, self.eps, self.norm_limit, self.precision, grad_tile,
            ),
        )  # fmt: skip
        if part is not None:
            self.finish(result, part, 0, n, split, divisor, norm_inside=False)
        # Every pair is counted twice.
        return Step(loss, out if needs.features else None, None, None if dot is None else dot.sum() / 2)

