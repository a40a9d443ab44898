"""The backward pass with 16-bit products: features and prototypes are not rounded, the weights of the logits are.

A weight and the gradient of a positive are added in float32 before they are rounded. The products of tiles are summed
in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import Gradients, Needs, OutputGrads
from . import products
from .tiles import Tiles, where
from .weights import Weights


def backward(tiles: Tiles, weights: Weights, grads: OutputGrads, needs: Needs) -> Gradients:
    """See :meth:`nckernels.backends.base.Backend.backward`."""
    assert tiles.halves is not None
    samples, classes = tiles.halves
    z, beta = tiles.inputs.features, tiles.inputs.inv_temperature
    g_pos = None if grads.pos is None else tiles.only_valid(grads.pos)
    grad_z, grad_w = weights.allocate(needs)
    divisor = _divisor(tiles, grads)
    energy = beta.new_zeros(())  # sum of dL/dt * t = beta dL/dbeta

    for cols in tiles.column_tiles():
        grad_v = z.new_zeros(cols.stop - cols.start, z.shape[1], dtype=tiles.acc) if grad_w is not None else None
        for rows in tiles.row_tiles():
            a = _operand_weights(tiles, weights, rows, cols, g_pos, beta / divisor)
            if grad_z is not None:
                part = products.product(a, tiles.v(cols))
                grad_z[rows].add_(part) if tiles.several_columns else grad_z[rows].copy_(part)
            if grad_v is not None:
                grad_v.add_(products.product(a.T, tiles.u(rows)))
        if grad_w is not None and grad_v is not None:
            dot = classes.finish(grad_v, tiles.class_ids(cols)) * divisor
            tiles.put_classes(grad_w, grad_v.mul_(divisor), cols)
            if grad_z is None:
                energy += dot

    if grad_z is not None:
        for rows in tiles.row_tiles():
            energy += samples.finish(grad_z[rows], rows) * divisor
        grad_z.mul_(divisor)
    return weights.gradients(needs, grad_z, grad_w, energy)


def _divisor(tiles: Tiles, grads: OutputGrads) -> Tensor:
    """The divisor of the weights: 1, or in float16, where small weights would underflow, a bound of the largest."""
    beta = tiles.inputs.inv_temperature
    if tiles.inputs.features.dtype != torch.float16:
        return torch.ones_like(beta)
    largest = [g.abs().amax() for g in grads if g is not None and g.numel()]
    divisor = (torch.stack(largest).sum() * beta).to(beta.dtype)
    return divisor.masked_fill((divisor == 0.0) | ~divisor.isfinite(), 1.0)


def _operand_weights(
    tiles: Tiles, weights: Weights, rows: slice, cols: slice, g_pos: Tensor | None, factor: Tensor
) -> Tensor:
    """A tile of dL/dt times ``factor`` and the scales of both sides, in 16 bits."""
    a, by_row = weights.tile(rows, cols)
    r, c = tiles.scales(rows, cols)
    r = r * factor
    b = a * (r[:, None] if by_row is None else r[:, None] * by_row)
    b.mul_(c if weights.col_scale is None else c * weights.col_scale[cols])
    if g_pos is not None:
        inside, local = tiles.within(tiles.positive, rows, cols)
        b.scatter_add_(1, local[:, None], (where(inside, g_pos[rows]) * r * c[local])[:, None])
    return b.to(tiles.inputs.features.dtype)
