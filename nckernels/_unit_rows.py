"""Products of a matrix of unit rows with a vector, without a copy of the matrix.

With :math:`u_j = x_j / \\lVert x_j \\rVert` they are :math:`\\sum_j a_j u_j` and :math:`u_j \\cdot b`, of which label
smoothing is made. Rows are read in tiles, and the gradient, :math:`g_j (b - (u_j \\cdot b) u_j) / \\lVert x_j \\rVert`
in both cases, is added to that of the other things that are done with the rows, in its own memory: each function
returns the rows too, for those other things.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import operators
from ._checks import no_autocast
from ._common import norms
from .backends import registry
from .backends.base import accumulation_dtype
from .backends.chunked.norms import rnorm_of, through_normalisation


def sum_of_unit_rows(rows: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """``rows`` (K, d), and the (d,) sum of their unit rows, each times its factor, in the dtype of the (K,) factors."""
    if _by_pytorch(rows, factor):
        return rows, _plain_sum(rows, factor)
    passed, result = _UnitRows.apply(rows, factor, None, True)
    return passed if rows.requires_grad else rows, result


def dots_with_unit_rows(rows: Tensor, vector: Tensor, ignored: Tensor) -> tuple[Tensor, Tensor]:
    """``rows`` (M, d), and the (M,) inner products of their unit rows with a (d,) vector, in its dtype; 0 where
    ignored."""
    if _by_pytorch(rows, vector, ignored):
        return rows, _plain_dots(rows, vector, ignored)
    passed, result = _UnitRows.apply(rows, vector, ignored, False)
    return passed if rows.requires_grad else rows, result


def _by_pytorch(*tensors: Tensor) -> bool:
    """Whether PyTorch is to see the single steps: for compilers, which need no tiles, and double backward."""
    return registry.chosen() == registry.REFERENCE or not operators.plain(*tensors)


def _plain_sum(rows: Tensor, factor: Tensor) -> Tensor:
    wide = rows.to(factor.dtype)
    return (factor / norms(wide, rows.dtype)) @ wide


def _plain_dots(rows: Tensor, vector: Tensor, ignored: Tensor) -> Tensor:
    wide = rows.to(vector.dtype).masked_fill(ignored[:, None], 0.0)
    return wide @ vector / norms(wide, rows.dtype)


class _UnitRows(torch.autograd.Function):
    """The rows, and their sum with factors (``summed``) or their inner products with a vector."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, vector: Tensor, ignored: Tensor | None, summed: bool) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(rows, vector, ignored)
        ctx.summed = summed
        with no_autocast(rows):
            return rows, (_sum if summed else _dots)(rows, vector, ignored)

    @staticmethod
    def backward(ctx: Any, passed: Tensor | None, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        rows, vector, ignored = ctx.saved_tensors
        operators.no_batches(passed, upstream)
        if upstream is None:
            return passed, None, None, None
        with no_autocast(rows):
            if torch.is_grad_enabled():  # create_graph
                result = _plain_sum(rows, vector) if ctx.summed else _plain_dots(rows, vector, ignored)
                wanted = [x for x, need in zip((rows, vector), ctx.needs_input_grad[:2], strict=True) if need]
                found = iter(torch.autograd.grad(result, wanted, upstream, create_graph=True))
                of_rows, of_vector = (next(found) if need else None for need in ctx.needs_input_grad[:2])
                return of_rows if passed is None or of_rows is None else passed + of_rows, of_vector, None, None
            if ignored is not None:
                upstream = upstream.masked_fill(ignored, 0.0)
            of_vector = (_dots if ctx.summed else _sum)(rows, upstream, ignored) if ctx.needs_input_grad[1] else None
            if ctx.needs_input_grad[0]:
                passed = torch.zeros_like(rows) if passed is None else passed
                factor, along = (vector, upstream) if ctx.summed else (upstream, vector)
                _add_gradient(passed, rows, factor, along, ignored)
            return passed, of_vector, None, None


def _sum(rows: Tensor, factor: Tensor, ignored: Tensor | None) -> Tensor:
    total = factor.new_zeros(rows.shape[1])
    for part, wide, rnorm in _tiles(rows, ignored, factor.dtype):
        total.addmv_(wide.T, factor[part] * rnorm)
    return total


def _dots(rows: Tensor, vector: Tensor, ignored: Tensor | None) -> Tensor:
    result = vector.new_empty(len(rows))
    for part, wide, rnorm in _tiles(rows, ignored, vector.dtype):
        torch.mv(wide, vector, out=result[part])
        result[part].mul_(rnorm)
    return result


def _add_gradient(grad: Tensor, rows: Tensor, factor: Tensor, vector: Tensor, ignored: Tensor | None) -> None:
    """Add that of ``sum_j factor_j u_j . vector``."""
    for part, wide, rnorm in _tiles(rows, ignored, vector.dtype):
        tile = torch.outer(factor[part], vector)
        through_normalisation(tile, wide * rnorm[:, None], rnorm, rows)
        grad[part].add_(tile)


def _tiles(rows: Tensor, ignored: Tensor | None, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Parts of the rows in ``dtype``, of a sixteenth of the workspace, zeros where ignored, and their inverse norms."""
    size = registry.get_workspace(rows.device) // 16 // (rows.shape[1] * accumulation_dtype(rows.dtype).itemsize)
    for first in range(0, len(rows), max(size, 1)):
        part = slice(first, first + max(size, 1))
        tile = rows[part] if ignored is None else rows[part].masked_fill(ignored[part, None], 0.0)
        yield part, tile.to(dtype), rnorm_of(tile, dtype)
