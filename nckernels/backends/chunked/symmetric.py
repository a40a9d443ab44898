"""Samples against themselves: the upper triangle of tiles, each used for its rows and its columns.

With ``E = exp(t)`` (masked, symmetric), one bias b along the summed axis and the upstream gradient g, the weight of
an entry in the sum of its column's sample is ``A_ij = g_j E_ij exp(b_i - lse_j)``. Each sample occurs as a row and as a
column, so the gradient of the unit features is ``(A + A^T) U``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..base import Forward, Gradients, Inputs, Needs, OutputGrads, Spec
from . import products
from .norms import through_normalisation
from .sums import PlainLSE, StreamingLSE
from .tiles import Tiles
from .weights import finite, over_sum


def forward(inputs: Inputs, spec: Spec) -> Forward:
    """The forward pass, which keeps no tiles."""
    tiles, bias = Tiles(inputs, spec, 0), _bias(inputs, spec)
    z, acc = inputs.features, tiles.acc
    sums = (PlainLSE if tiles.shift_free else StreamingLSE)(tiles.m, bias, z, acc)
    for rows, columns in _triangle(tiles):
        for cols in columns:
            t = tiles.logits(rows, cols, z.new_empty(_shape(rows, cols), dtype=acc))
            if tiles.shift_free:
                t.exp_()
            sums.update(t, 1, rows, cols)
            if cols != rows:
                sums.update(t, 0, cols, rows)
    lse, other, kept = sums.result(acc), z.new_empty(0, dtype=acc), z.new_empty(0, dtype=acc)
    both = (lse, other) if spec.by_class else (other, lse)
    return Forward(*both, tiles.positive_logits(), tiles.z_rnorm, tiles.w_rnorm, kept)


def backward(inputs: Inputs, saved: Forward, grads: OutputGrads, spec: Spec, needs: Needs) -> Gradients:
    """The whole gradient of the tensor, returned as that of the features."""
    tiles, bias = Tiles(inputs, spec, 0, saved), _bias(inputs, spec)
    z, beta = inputs.features, inputs.inv_temperature
    lse, g = (saved.class_lse, grads.class_lse) if spec.by_class else (saved.instance_lse, grads.instance_lse)
    grad_u = z.new_zeros(z.shape, dtype=tiles.acc) if needs.features or needs.inv_temperature else None
    grad_bias = torch.zeros_like(bias) if bias is not None and (needs.sample_bias or needs.class_bias) else None
    scale = None if tiles.halves is None else tiles.halves[0].scale  # of the gradients, see Side.finish
    if g is not None:
        entries = _Entries(tiles, bias, lse, g, grad_bias)
        for rows, columns in _triangle(tiles):
            v = tiles.unit(rows) if tiles.halves is None else tiles.u(rows)
            for cols in columns:
                weights = entries.both_ways(rows, cols)
                if grad_u is None:
                    continue
                if tiles.halves is not None:
                    weights = tiles.operand_weights(weights, rows, cols)
                products.add_product(grad_u[rows], weights, tiles.v(cols))
                if cols != rows:
                    products.add_product(grad_u[cols], weights.T, v)
    if grad_u is not None and grads.pos is not None:
        g_pos = tiles.only_valid(grads.pos)
        for rows in tiles.row_tiles():
            partners, weight = tiles.positive[rows], g_pos[rows, None]
            there = back = weight
            if scale is not None:
                there, back = weight * scale[rows, None], weight * scale[partners, None]
            grad_u[rows].addcmul_(tiles.unit(partners), there)
            grad_u.index_add_(0, partners, tiles.unit(rows) * back)

    energy = beta.new_zeros(())
    if grad_u is not None:
        for rows in tiles.row_tiles():
            if tiles.halves is None:
                dot = through_normalisation(grad_u[rows], tiles.unit(rows), tiles.w_rnorm[rows], z)
                energy += dot.sum()
            else:
                energy += tiles.halves[0].finish(grad_u[rows], rows)
            grad_u[rows] *= beta
    return Gradients(
        grad_u.to(z.dtype) if grad_u is not None and needs.features else None,
        None,
        energy / 2 if needs.inv_temperature else None,  # every pair is counted twice
        grad_bias if needs.sample_bias else None,
        grad_bias if needs.class_bias else None,
    )


def _bias(inputs: Inputs, spec: Spec) -> Tensor | None:
    return inputs.sample_bias if spec.by_class else inputs.class_bias


def _triangle(tiles: Tiles) -> Iterator[tuple[slice, list[slice]]]:
    """The row tiles, each with its column tiles from the diagonal on."""
    every = list(tiles.row_tiles())
    return ((rows, every[i:]) for i, rows in enumerate(every))


def _shape(rows: slice, cols: slice) -> tuple[int, int]:
    return rows.stop - rows.start, cols.stop - cols.start


class _Entries:
    """Computes tiles of ``A + A^T`` and, from them, the gradient of the bias."""

    def __init__(self, tiles: Tiles, bias: Tensor | None, lse: Tensor, g: Tensor, grad_bias: Tensor | None) -> None:
        self.tiles, self.bias, self.lse, self.grad_bias = tiles, bias, lse, grad_bias
        self.g = g.masked_fill(lse == -torch.inf, 0.0)
        if tiles.shift_free:
            self.factor = torch.ones_like(lse) if bias is None else bias.exp()
            self.by_sum = over_sum(self.g, lse)

    def both_ways(self, rows: slice, cols: slice) -> Tensor:
        """One tile of ``A + A^T``. A diagonal tile adds only one of its two terms to the gradient of the bias."""
        t = self.tiles.logits(rows, cols, self.lse.new_empty(_shape(rows, cols)))
        if self.tiles.shift_free:
            return self._scaled(t.exp_(), rows, cols)
        there = self._shifted(t, rows, cols)
        back = self._shifted(t.T, cols, rows)
        if self.grad_bias is not None:
            self.grad_bias[rows] += there.sum(1)
            if cols != rows:
                self.grad_bias[cols] += back.sum(1)
        return there.add_(back.T)

    def _scaled(self, e: Tensor, rows: slice, cols: slice) -> Tensor:
        if self.grad_bias is not None:
            self.grad_bias[rows] += torch.mv(e, self.by_sum[cols]) * self.factor[rows]
            if cols != rows:
                self.grad_bias[cols] += torch.mv(e.T, self.by_sum[rows]) * self.factor[cols]
        scale = torch.outer(self.factor[rows], self.by_sum[cols])
        return e.mul_(scale.addr_(self.by_sum[rows], self.factor[cols]))

    def _shifted(self, t: Tensor, rows: slice, cols: slice) -> Tensor:
        """A tile of A, whose anchors are the columns."""
        a = t - finite(self.lse[cols])
        if self.bias is not None:
            a += self.bias[rows, None]
        return a.exp_().mul_(self.g[cols])
