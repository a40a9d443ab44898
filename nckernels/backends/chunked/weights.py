"""The gradient with respect to the logits, tile by tile."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import Forward, Gradients, Needs, OutputGrads, Spec
from .tiles import Tiles


class Weights:
    """dL/dt without the positives, as row_scale * tile * col_scale, and the gradients of the biases from it."""

    def __init__(self, tiles: Tiles, saved: Forward, grads: OutputGrads, spec: Spec, needs: Needs) -> None:
        self.tiles, self.saved = tiles, saved
        self.g_class = grads.class_lse if spec.by_class else None
        self.g_instance = grads.instance_lse if spec.by_instance else None
        self.sample_bias, self.class_bias = tiles.inputs.sample_bias, tiles.inputs.class_bias
        self.grad_sample_bias = torch.zeros_like(self.sample_bias) if needs.sample_bias else None  # type: ignore[arg-type]
        self.grad_class_bias = torch.zeros_like(self.class_bias) if needs.class_bias else None  # type: ignore[arg-type]

        if self.g_class is not None:
            self.class_lse = tiles.columns_of(saved.class_lse, -torch.inf)
            self.g_class = tiles.columns_of(self.g_class, 0.0).masked_fill(self.class_lse == -torch.inf, 0.0)
        if self.g_instance is not None:
            self.g_instance = self.g_instance.masked_fill(saved.instance_lse == -torch.inf, 0.0)
        self.row_scale: Tensor | None = None
        self.col_scale: Tensor | None = None
        if tiles.shift_free:
            self._scale()

    def allocate(self, needs: Needs) -> tuple[Tensor | None, Tensor | None]:
        """Zeros for the gradients of features and prototypes. dL/dbeta needs one of the two."""
        z, w = self.tiles.inputs.features, self.tiles.inputs.prototypes
        by_z = needs.features or (needs.inv_temperature and not needs.prototypes)
        return (
            torch.zeros_like(z, dtype=self.tiles.acc, memory_format=torch.contiguous_format) if by_z else None,
            torch.zeros_like(w, memory_format=torch.contiguous_format) if needs.prototypes else None,
        )

    def gradients(self, needs: Needs, grad_z: Tensor | None, grad_w: Tensor | None, energy: Tensor) -> Gradients:
        """All wanted gradients, given ``energy``, the sum of dL/dt t, which is beta dL/dbeta."""
        z, beta = self.tiles.inputs.features, self.tiles.inputs.inv_temperature
        return Gradients(
            grad_z.to(z.dtype) if grad_z is not None and needs.features else None,
            grad_w,
            energy / beta if needs.inv_temperature else None,
            self.grad_sample_bias,
            self.grad_class_bias,
        )

    def _scale(self) -> None:
        """Shift-free mode: the weights of each direction are an outer product times E = exp(t)."""
        self.class_outer: tuple[Tensor | None, Tensor] | None = None
        self.instance_outer: tuple[Tensor, Tensor | None] | None = None
        if self.g_class is not None:
            rows = None if self.sample_bias is None else self.sample_bias.exp()
            self.class_outer = rows, over_sum(self.g_class, self.class_lse)
        if self.g_instance is not None:
            cols = None if self.class_bias is None else self.class_bias.exp()
            self.instance_outer = over_sum(self.g_instance, self.saved.instance_lse), cols
        if self.class_outer is None or self.instance_outer is None:
            self.row_scale, self.col_scale = self.class_outer or self.instance_outer or (None, None)

    def tile(self, rows: slice, cols: slice) -> tuple[Tensor, Tensor | None]:
        """A tile, and the (m, 1) scale of its rows or None for ones. ``col_scale`` has the scales of all columns."""
        if self.g_class is None and self.g_instance is None:
            return self.saved.pos.new_zeros(rows.stop - rows.start, cols.stop - cols.start), None
        if self.tiles.shift_free:
            tile = self._scaled_tile(rows, cols)
            return tile, None if self.row_scale is None else self.row_scale[rows, None]
        return self._shifted_tile(rows, cols), None

    def _scaled_tile(self, rows: slice, cols: slice) -> Tensor:
        e = self.tiles.storage(rows, cols, self.saved.kept)
        if not self.saved.kept.numel():
            self.tiles.logits(rows, cols, e).exp_()
        if self.grad_sample_bias is not None and self.class_outer is not None:
            by_row, by_col = self.class_outer
            assert by_row is not None
            self.grad_sample_bias[rows] += torch.mv(e, by_col[cols]) * by_row[rows]
        if self.grad_class_bias is not None and self.instance_outer is not None:
            per_row, per_col = self.instance_outer
            assert per_col is not None
            self.grad_class_bias[cols] += torch.mv(e.T, per_row[rows]) * per_col[cols]
        if self.class_outer is None or self.instance_outer is None:
            return e
        return e.mul_(_outer(self.class_outer, rows, cols) + _outer(self.instance_outer, rows, cols))

    def _shifted_tile(self, rows: slice, cols: slice) -> Tensor:
        t = self.tiles.logits(rows, cols, self.saved.pos.new_empty(rows.stop - rows.start, cols.stop - cols.start))
        a = None
        if self.g_class is not None:
            a = t - finite(self.class_lse[cols])
            if self.sample_bias is not None:
                a += self.sample_bias[rows, None]
            a.exp_().mul_(self.g_class[cols])
            if self.grad_sample_bias is not None:
                self.grad_sample_bias[rows] += a.sum(1)
        if self.g_instance is not None:
            b = t.sub_(finite(self.saved.instance_lse[rows, None]))
            if self.class_bias is not None:
                b += self.class_bias[cols]
            b.exp_().mul_(self.g_instance[rows, None])
            if self.grad_class_bias is not None:
                self.grad_class_bias[cols] += b.sum(0)
            a = b if a is None else a.add_(b)
        assert a is not None
        return a


def over_sum(grad: Tensor, lse: Tensor) -> Tensor:
    """grad / exp(lse), 0 for an empty sum."""
    return grad * finite(lse).neg().exp_()


def finite(lse: Tensor) -> Tensor:
    return lse.masked_fill(lse == -torch.inf, 0.0)


def _outer(factors: tuple[Tensor | None, Tensor | None], rows: slice, cols: slice) -> Tensor:
    """The outer product of two vectors, either of which may be None for ones."""
    x, y = factors
    if x is None:
        assert y is not None
        return y[cols].expand(rows.stop - rows.start, -1)
    return x[rows, None] if y is None else torch.outer(x[rows], y[cols])
