"""The primitive over tiles, in plain PyTorch: any device, bounded memory, no compiler.

A GEMM computes one tile of logits ``t = (beta u) v^T`` at a time, which is reduced and dropped. The backward pass
recomputes the tiles, unless the whole matrix fits half of the workspace and was kept.

Two modes share the code:

*shift-free* (on a CPU, where beta can be read, if beta plus the biases is at most 30): ``exp(t)`` cannot overflow
and its sums cannot underflow, so tiles need no shift. All weights are the exponentials ``E = exp(t)`` with scaled rows
and columns; in the class direction ``g_c exp(t + b_j - lse_c) = exp(b_j) * E * (g_c exp(-lse_c))``. In one direction
the backward pass therefore has no elementwise pass.

*running maximum* (all other cases): a streaming log-sum-exp in the forward pass, ``exp(t + b - lse)`` in the backward
pass.

Matrices are multiplied in float32 (float64), or in the features' 16 bits where the device does that fast (products.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import (
    Backend,
    Forward,
    Gradients,
    Inputs,
    Needs,
    OutputGrads,
    Reduced,
    Spec,
    Step,
    accumulation_dtype,
)
from . import halves, step, symmetric
from .norms import through_normalisation
from .sums import PlainLSE, StreamingLSE
from .tiles import Tiles, where
from .weights import Weights

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class ChunkedBackend(Backend):
    """Tiles in plain PyTorch, see the module's docstring."""

    name = "chunked"

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return None if dtype in _DTYPES else f"no support for {dtype}"

    def kept_numel(self, device: torch.device, dtype: torch.dtype, m: int, k: int, spec: Spec) -> int:
        """The whole matrix of logits, if it fits half of the workspace; depends on sizes alone."""
        numel = m * (min(m, k) if spec.present_only else k)
        fits = numel * accumulation_dtype(dtype).itemsize <= spec.workspace // 2
        supported = device.type == "cpu" and spec.direction != "both" and not spec.symmetric
        return numel if supported and fits else 0

    def can_step(self, features: Tensor, prototypes: Tensor, spec: Spec) -> bool:
        return step.fits(features, prototypes, spec)

    def step(self, inputs: Inputs, reduced: Reduced, spec: Spec, needs: Needs) -> Step:
        return step.step(inputs, reduced, spec, needs)

    def forward(self, inputs: Inputs, spec: Spec, keep: bool) -> Forward:
        if spec.symmetric:
            return symmetric.forward(inputs, spec)
        z, acc = inputs.features, inputs.inv_temperature.dtype
        numel = self.kept_numel(z.device, z.dtype, z.shape[0], inputs.prototypes.shape[0], spec) if keep else 0
        kept = z.new_empty(numel, dtype=acc)
        tiles = Tiles(inputs, spec, numel)
        pos = z.new_zeros(tiles.m, dtype=acc)
        lse = StreamingLSE if not tiles.shift_free else PlainLSE
        by_class = lse(tiles.k, inputs.sample_bias, z, acc) if spec.by_class else None
        by_instance = lse(tiles.m, inputs.class_bias, z, acc) if spec.by_instance else None

        for cols in tiles.column_tiles():
            for rows in tiles.row_tiles():
                t = tiles.logits(rows, cols, tiles.storage(rows, cols, kept), pos)
                if tiles.shift_free:
                    t.exp_()
                if by_class is not None:
                    by_class.update(t, 0, cols, rows)
                if by_instance is not None:
                    by_instance.update(t, 1, rows, cols)

        kept[tiles.m * tiles.k :] = 0.0  # space for classes that do not occur
        return Forward(
            z.new_empty(0, dtype=acc) if by_class is None else tiles.all_classes(by_class.result(acc), -torch.inf),
            z.new_empty(0, dtype=acc) if by_instance is None else by_instance.result(acc),
            pos,
            tiles.z_rnorm,
            tiles.w_rnorm,
            kept,
        )

    def backward(self, inputs: Inputs, saved: Forward, grads: OutputGrads, spec: Spec, needs: Needs) -> Gradients:
        if spec.symmetric:
            return symmetric.backward(inputs, saved, grads, spec, needs)
        tiles = Tiles(inputs, spec, saved.kept.numel(), saved)
        weights = Weights(tiles, saved, grads, spec, needs)
        if tiles.halves is not None:
            return halves.backward(tiles, weights, grads, needs)
        z, w, beta = inputs.features, inputs.prototypes, inputs.inv_temperature
        g_pos = None if grads.pos is None else tiles.only_valid(grads.pos)
        grad_z, grad_w = weights.allocate(needs)
        # beta dL/dbeta = sum of A * t = sum_j u_j . dL/du_j = sum_c v_c . dL/dv_c
        energy = beta.new_zeros(())

        for cols in tiles.column_tiles():
            v = tiles.v(cols)
            col_scale = None if weights.col_scale is None else weights.col_scale[cols, None]
            scaled_v = v if col_scale is None else v * col_scale
            grad_v = torch.zeros_like(v) if grad_w is not None else None
            positives = torch.zeros_like(v) if grad_w is not None and g_pos is not None else None
            for rows in tiles.row_tiles():
                a, row_scale = weights.tile(rows, cols)
                inside, local = tiles.within(tiles.positive, rows, cols)
                g = None if g_pos is None else where(inside, g_pos[rows])[:, None]
                if grad_z is not None:
                    part = torch.mm(a, scaled_v)
                    if row_scale is not None:
                        part.mul_(row_scale)
                    if g is not None:
                        part.addcmul_(v.index_select(0, local), g)
                    grad_z[rows].add_(part) if tiles.several_columns else grad_z[rows].copy_(part)
                if grad_v is not None:
                    u = tiles.u(rows)  # includes the factor beta
                    if positives is not None and g is not None:
                        positives.index_add_(0, local, u * g)
                    grad_v.addmm_(a.T, u if row_scale is None else u * row_scale)
            if grad_w is not None and grad_v is not None:
                if col_scale is not None:
                    grad_v.mul_(col_scale)
                if positives is not None:
                    grad_v.add_(positives)
                dot = through_normalisation(grad_v, v, tiles.w_rnorm_of(cols), w)
                tiles.put_classes(grad_w, grad_v, cols)
                if grad_z is None:
                    energy += dot.sum()

        if grad_z is not None:
            for rows in tiles.row_tiles():
                dot = through_normalisation(grad_z[rows], tiles.u(rows), tiles.z_rnorm[rows], z, beta)
                if needs.inv_temperature:
                    energy += dot.sum()
        return weights.gradients(needs, grad_z, grad_w, energy)
