"""The primitive over tiles, in plain PyTorch: any device, bounded memory, no compiler.

One tile of logits ``t = (beta u) v^T`` at a time: produced by a GEMM, reduced, thrown away; produced again
in the backward, unless the whole matrix fits half of the workspace and was kept.

Two regimes share the code:

*shift-free* (CPU, where beta can be read, and beta plus the biases at most 30): ``exp(t)`` cannot overflow
and no sum of it can underflow, so tiles need no shift. The entries ``E = exp(t)`` then serve every purpose by
scaling rows and columns, for the weight of an entry in the class direction is
``g_c exp(t + b_j - lse_c) = exp(b_j) * E * (g_c exp(-lse_c))``. The backward has no elementwise pass at all.

*running maximum* (everything else): streaming log-sum-exp forward, ``exp(t + b - lse)`` backward.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .base import (
    Backend,
    Forward,
    Gradients,
    Inputs,
    Needs,
    OutputGrads,
    Spec,
    accumulation_dtype,
    norm_eps,
)

_SHIFT_FREE_LIMIT = 30.0  # exp(30) sums over 1e12 entries and exp(-30) / 1e12 are normal float32 numbers
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class ChunkedBackend(Backend):
    """Plain PyTorch over tiles, see the module's text."""

    name = "chunked"

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return None if dtype in _DTYPES else f"no support for {dtype}"

    def kept_numel(self, device: torch.device, dtype: torch.dtype, m: int, k: int, spec: Spec) -> int:
        """The whole matrix of logits, if it fits half of the workspace (decided on sizes alone)."""
        numel = m * (min(m, k) if spec.present_only else k)
        fits = numel * accumulation_dtype(dtype).itemsize <= spec.workspace // 2
        return numel if device.type == "cpu" and spec.direction != "both" and fits else 0

    def forward(self, inputs: Inputs, spec: Spec, keep: bool) -> Forward:
        z, acc = inputs.features, inputs.inv_temperature.dtype
        numel = self.kept_numel(z.device, z.dtype, z.shape[0], inputs.prototypes.shape[0], spec) if keep else 0
        kept = z.new_empty(numel, dtype=acc)
        tiles = _Tiles(inputs, spec, numel)
        pos = z.new_zeros(tiles.m, dtype=acc)
        lse = _StreamingLSE if not tiles.shift_free else _PlainLSE
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

        kept[tiles.m * tiles.k :] = 0.0  # where there was room for classes that do not occur
        return Forward(
            z.new_empty(0, dtype=acc) if by_class is None else tiles.all_classes(by_class.result(), -torch.inf),
            z.new_empty(0, dtype=acc) if by_instance is None else by_instance.result(),
            pos,
            tiles.z_rnorm,
            tiles.w_rnorm,
            kept,
        )

    def backward(self, inputs: Inputs, saved: Forward, grads: OutputGrads, spec: Spec, needs: Needs) -> Gradients:
        tiles = _Tiles(inputs, spec, saved.kept.numel(), saved)
        weights = _Weights(tiles, saved, grads, spec, needs)
        z, w, beta = inputs.features, inputs.prototypes, inputs.inv_temperature
        g_pos = tiles.only_valid(grads.pos)
        need_u = needs.features or (needs.inv_temperature and not needs.prototypes)
        grad_z = torch.zeros_like(z, dtype=tiles.acc, memory_format=torch.contiguous_format) if need_u else None
        grad_w = torch.zeros_like(w, memory_format=torch.contiguous_format) if needs.prototypes else None
        # sum of A * t = sum_j u_j . dL/du_j = sum_c v_c . dL/dv_c: the gradient of beta times beta
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
                g = None if g_pos is None else _where(inside, g_pos[rows])[:, None]
                if grad_z is not None:
                    part = torch.mm(a, scaled_v)
                    if row_scale is not None:
                        part.mul_(row_scale)
                    if g is not None:
                        part.addcmul_(v.index_select(0, local), g)
                    grad_z[rows].add_(part) if tiles.several_columns else grad_z[rows].copy_(part)
                if grad_v is not None:
                    u = tiles.u(rows)  # carries the factor beta
                    if positives is not None and g is not None:
                        positives.index_add_(0, local, u * g)
                    grad_v.addmm_(a.T, u if row_scale is None else u * row_scale)
            if grad_w is not None and grad_v is not None:
                if col_scale is not None:
                    grad_v.mul_(col_scale)
                if positives is not None:
                    grad_v.add_(positives)
                dot = _through_normalisation(grad_v, v, tiles.w_rnorm_of(cols), w)
                tiles.put_classes(grad_w, grad_v, cols)
                if grad_z is None:
                    energy += dot.sum()

        if grad_z is not None:
            for rows in tiles.row_tiles():
                dot = _through_normalisation(grad_z[rows], tiles.u(rows), tiles.z_rnorm[rows], z, beta)
                if needs.inv_temperature:
                    energy += dot.sum()
        return Gradients(
            grad_z.to(z.dtype) if grad_z is not None and needs.features else None,
            grad_w,
            energy / beta if needs.inv_temperature else None,
            weights.grad_sample_bias,
            weights.grad_class_bias,
        )


def _through_normalisation(grad: Tensor, unit: Tensor, rnorm: Tensor, x: Tensor, beta: Tensor | None = None) -> Tensor:
    """Turn dL/du into dL/dx for u = x / |x|, in place: (dL/du - (dL/du . u) u) / |x|. Returns dL/du . u.

    ``unit`` and ``grad`` are u and dL/du, or with ``beta`` both are beta u and dL/d(beta u). Where |x| was
    clamped to eps (rnorm at its largest), u is linear in x and nothing is projected out.
    """
    dot = torch.linalg.vecdot(grad, unit)
    radial, scale = dot.masked_fill(rnorm >= 1.0 / norm_eps(x.dtype), 0.0), rnorm
    if beta is not None:
        radial, scale = radial / (beta * beta), rnorm * beta
    grad.addcmul_(unit, radial[:, None], value=-1.0)
    grad.mul_(scale[:, None])
    return dot


def _where(condition: Tensor | None, value: Tensor) -> Tensor:
    """``value`` where the condition holds, else 0; None holds everywhere."""
    return value if condition is None else value.where(condition, 0.0)


class _Tiles:
    """The logits of one call, cut into tiles; masks, norms and the columns that take part."""

    def __init__(self, inputs: Inputs, spec: Spec, kept: int, saved: Forward | None = None) -> None:
        self.inputs, self.spec = inputs, spec
        z, w, target = inputs.features, inputs.prototypes, inputs.target
        self.acc = accumulation_dtype(z.dtype)
        self.on_cpu = z.device.type == "cpu"
        self.m, self.num_classes = z.shape[0], w.shape[0]
        self.w_rnorm = _rnorm(w, self.acc) if saved is None else saved.prototype_rnorm
        self.shift_free = self.on_cpu and self._small_logits()

        #: which samples take part; None for all (a CPU can tell)
        self.valid: Tensor | None = target != spec.ignore_index
        if self.on_cpu and bool(self.valid.all()):
            self.valid = None
        self.z_rnorm = saved.feature_rnorm if saved is not None else _rnorm(z, self.acc, self.valid)
        label = target if self.valid is None else target.where(self.valid, 0)
        self.classes, column = self._compact(label) if spec.present_only else (None, label)
        self.k = self.num_classes if self.classes is None else self.classes.shape[0]
        row = torch.arange(self.m, device=z.device)
        self.positive = row if spec.exclude == "same_label" else column
        self.excluded = {"target": column, "self": row}.get(spec.exclude)

        # What the kept matrix leaves of the workspace is for four buffers the size of a column tile of
        # prototypes (2 shares each), four the size of a row tile of features and three tiles of logits (1 share
        # each). Tiles of logits of a few MiB, which stay in cache between GEMM, exp and GEMM, are the fastest.
        scratch = spec.workspace // self.acc.itemsize - kept
        share = max(scratch // 16, 1)
        tile_k = max(2 * share // z.shape[1], 16)
        self.tile_k = -(-self.k // max(-(-self.k // tile_k), 1)) or 1  # equal parts
        self.tile_m = max(min(share // z.shape[1], share // self.tile_k, self.m), 16)
        self.several_columns = self.tile_k < self.k
        self._u: tuple[slice, Tensor] | None = None
        self._v: tuple[slice, Tensor] | None = None

    def _small_logits(self) -> bool:
        biases = [b for b in (self.inputs.sample_bias, self.inputs.class_bias) if b is not None and b.numel()]
        # a bias of -inf removes an entry, which is no reason for a shift
        finite = [b.masked_fill(b == -torch.inf, 0.0).abs().max() for b in biases]
        return bool(torch.stack([self.inputs.inv_temperature, *finite]).sum() <= _SHIFT_FREE_LIMIT)

    def _compact(self, label: Tensor) -> tuple[Tensor | None, Tensor]:
        """The classes that occur, and each sample's position among them.

        On a CPU exactly these; elsewhere their number is unknown to the host, so the list has its largest
        possible length min(M, K), filled up with K, and is left out where it would not be shorter than K.
        """
        k = self.num_classes
        if not self.on_cpu and k <= self.m:
            return None, label
        present = label.new_zeros(k + 1, dtype=torch.bool)
        present[label if self.valid is None else label.where(self.valid, k)] = True
        present = present[:k]
        position = (present.cumsum(0) - 1).clamp_min_(0)
        if self.on_cpu:
            classes = present.nonzero().squeeze(1)
            return (None, label) if classes.shape[0] == k else (classes, position[label])
        slots = label.new_full((self.m + 1,), k)
        slots[position.where(present, self.m)] = torch.arange(k, device=label.device)
        slots[self.m] = k
        return slots[: self.m], position[label]

    def row_tiles(self) -> Iterator[slice]:
        return (slice(i, min(i + self.tile_m, self.m)) for i in range(0, self.m, self.tile_m))

    def column_tiles(self) -> Iterator[slice]:
        return (slice(i, min(i + self.tile_k, self.k)) for i in range(0, self.k, self.tile_k))

    def storage(self, rows: slice, cols: slice, kept: Tensor) -> Tensor:
        """Memory for one tile: its place in the kept matrix, where each tile is contiguous, or fresh."""
        shape = (rows.stop - rows.start, cols.stop - cols.start)
        if not kept.numel():
            return kept.new_empty(shape)
        start = cols.start * self.m + rows.start * shape[1]
        return kept[start : start + shape[0] * shape[1]].view(shape)

    def only_valid(self, values: Tensor | None) -> Tensor | None:
        """(M,) values with 0 for ignored samples."""
        return None if values is None else _where(self.valid, values)

    def u(self, rows: slice) -> Tensor:
        """beta times the unit features of some rows; the last ones asked for are remembered."""
        if self._u is None or self._u[0] != rows:
            self._u = None  # free the old tile before the new one is made
            scale = self.z_rnorm[rows] * self.inputs.inv_temperature
            u = self.inputs.features[rows] * scale[:, None]
            if self.valid is not None:  # ignored features may hold anything, NaN too
                u.masked_fill_(~self.valid[rows, None], 0.0)
            self._u = (rows, u)
        return self._u[1]

    def _class_ids(self, cols: slice) -> Tensor | slice:
        return cols if self.classes is None else self.classes[cols].clamp_max(self.num_classes - 1)

    def w_rnorm_of(self, cols: slice) -> Tensor:
        return self.w_rnorm[self._class_ids(cols)]

    def v(self, cols: slice) -> Tensor:
        """The unit prototypes of some columns; the last ones asked for are remembered."""
        if self._v is None or self._v[0] != cols:
            self._v = None  # free the old tile before the new one is made
            self._v = (cols, self.inputs.prototypes[self._class_ids(cols)] * self.w_rnorm_of(cols)[:, None])
        return self._v[1]

    def within(self, index: Tensor, rows: slice, cols: slice) -> tuple[Tensor | None, Tensor]:
        """For one column index per row: whether it lies in the tile (and the row takes part; None for all
        rows), and where in the tile."""
        valid = None if self.valid is None else self.valid[rows]
        if not self.several_columns:
            return valid, index[rows]
        local = index[rows] - cols.start
        inside = (local >= 0) & (local < cols.stop - cols.start)
        return inside if valid is None else inside & valid, local.clamp_(0, cols.stop - cols.start - 1)

    def logits(self, rows: slice, cols: slice, out: Tensor, pos: Tensor | None = None) -> Tensor:
        """One tile of t, -inf where excluded; on the way the positive logits are picked up into ``pos``."""
        t = torch.mm(self.u(rows), self.v(cols).T, out=out)
        if pos is not None:
            inside, local = self.within(self.positive, rows, cols)
            picked = t.gather(1, local[:, None]).squeeze(1)
            pos[rows] = picked if inside is None else picked.where(inside, pos[rows])
        if self.excluded is not None:
            inside, local = self.within(self.excluded, rows, cols)
            if inside is None:
                t.scatter_(1, local[:, None], -torch.inf)
            else:
                picked = t.gather(1, local[:, None]).masked_fill_(inside[:, None], -torch.inf)
                t.scatter_(1, local[:, None], picked)
        elif self.spec.exclude == "same_label":
            target = self.inputs.target
            t.masked_fill_(target[rows, None] == target[cols], -torch.inf)
        if self.valid is not None:
            t.masked_fill_(~self.valid[rows, None], -torch.inf)
            if self.spec.square:
                t.masked_fill_(~self.valid[cols], -torch.inf)
        return t

    def all_classes(self, values: Tensor, absent: float) -> Tensor:
        """Spread one value per column over all K classes."""
        if self.classes is not None:
            full = values.new_full((self.num_classes + 1,), absent)
            full[self.classes] = values
            return full[: self.num_classes]
        if self.spec.present_only:
            present = torch.zeros(self.num_classes, dtype=torch.int64, device=values.device)
            present.index_add_(
                0,
                self.positive,
                torch.ones_like(present[:1]).expand(self.m) if self.valid is None else self.valid.long(),
            )
            return values.masked_fill(present == 0, absent)
        return values

    def columns_of(self, values: Tensor, absent: float) -> Tensor:
        """Pick one value per column out of one per class; ``absent`` in columns that only fill up."""
        if self.classes is None:
            return values
        return values[self.classes.clamp_max(self.num_classes - 1)].masked_fill(
            self.classes == self.num_classes, absent
        )

    def put_classes(self, full: Tensor, values: Tensor, cols: slice) -> None:
        """Write the rows of some columns into their places among all K classes."""
        if self.classes is None:
            full[cols] = values.to(full.dtype)
        elif self.on_cpu:
            full[self.classes[cols]] = values.to(full.dtype)
        else:  # columns that only fill up carry zeros and add them to the last class
            full.index_add_(0, self.classes[cols].clamp_max(self.num_classes - 1), values.to(full.dtype))


def _rnorm(x: Tensor, acc: torch.dtype, valid: Tensor | None = None) -> Tensor:
    """1 / max(|x|, eps) of each row; 1 where ``valid`` is False."""
    rnorm = torch.linalg.vector_norm(x, dim=1, dtype=acc).clamp_min_(norm_eps(x.dtype)).reciprocal_()
    return rnorm if valid is None else rnorm.masked_fill_(~valid, 1.0)


class _PlainLSE:
    """log sum exp(b) E over tiles of E = exp(t)."""

    def __init__(self, size: int, bias: Tensor | None, like: Tensor, acc: torch.dtype) -> None:
        self.total = like.new_zeros(size, dtype=acc)
        self.factor = None if bias is None else bias.exp()

    def update(self, e: Tensor, dim: int, kept: slice, reduced: slice) -> None:
        if self.factor is None:
            self.total[kept] += e.sum(dim)
        else:
            self.total[kept] += torch.mv(e.T if dim == 0 else e, self.factor[reduced])

    def result(self) -> Tensor:
        return self.total.log_()


class _StreamingLSE:
    """log sum exp(t + b) over tiles of t with a running maximum."""

    def __init__(self, size: int, bias: Tensor | None, like: Tensor, acc: torch.dtype) -> None:
        self.maximum = like.new_full((size,), -torch.inf, dtype=acc)
        self.total = like.new_zeros(size, dtype=acc)
        self.bias = bias

    def update(self, t: Tensor, dim: int, kept: slice, reduced: slice) -> None:
        if self.bias is not None:
            t = t + self.bias[reduced].unsqueeze(1 - dim)
        maximum = torch.maximum(self.maximum[kept], t.amax(dim))
        shift = maximum.masked_fill(maximum == -torch.inf, 0.0)
        total = self.total[kept] * (self.maximum[kept] - shift).exp_()
        self.total[kept] = total + (t - shift.unsqueeze(dim)).exp_().sum(dim)
        self.maximum[kept] = maximum

    def result(self) -> Tensor:
        return self.total.log_().add_(self.maximum)


class _Weights:
    """dL/dt without the positives, as row_scale * tile * col_scale; gradients of the biases on the way."""

    def __init__(self, tiles: _Tiles, saved: Forward, grads: OutputGrads, spec: Spec, needs: Needs) -> None:
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

    def _scale(self) -> None:
        """Shift-free: the weights of both directions as outer products that multiply E = exp(t)."""
        self.class_outer: tuple[Tensor | None, Tensor] | None = None
        self.instance_outer: tuple[Tensor, Tensor | None] | None = None
        if self.g_class is not None:
            rows = None if self.sample_bias is None else self.sample_bias.exp()
            self.class_outer = rows, _over_sum(self.g_class, self.class_lse)
        if self.g_instance is not None:
            cols = None if self.class_bias is None else self.class_bias.exp()
            self.instance_outer = _over_sum(self.g_instance, self.saved.instance_lse), cols
        if self.class_outer is None or self.instance_outer is None:
            self.row_scale, self.col_scale = self.class_outer or self.instance_outer or (None, None)

    def tile(self, rows: slice, cols: slice) -> tuple[Tensor, Tensor | None]:
        """The tile and the scale of its rows, (m, 1), None for ones; ``col_scale`` holds for all tiles."""
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
            a = t - _finite(self.class_lse[cols])
            if self.sample_bias is not None:
                a += self.sample_bias[rows, None]
            a.exp_().mul_(self.g_class[cols])
            if self.grad_sample_bias is not None:
                self.grad_sample_bias[rows] += a.sum(1)
        if self.g_instance is not None:
            b = t.sub_(_finite(self.saved.instance_lse[rows, None]))
            if self.class_bias is not None:
                b += self.class_bias[cols]
            b.exp_().mul_(self.g_instance[rows, None])
            if self.grad_class_bias is not None:
                self.grad_class_bias[cols] += b.sum(0)
            a = b if a is None else a.add_(b)
        assert a is not None
        return a


def _over_sum(grad: Tensor, lse: Tensor) -> Tensor:
    """grad / exp(lse), 0 for an empty sum."""
    return grad * _finite(lse).neg().exp_()


def _finite(lse: Tensor) -> Tensor:
    return lse.masked_fill(lse == -torch.inf, 0.0)


def _outer(factors: tuple[Tensor | None, Tensor | None], rows: slice, cols: slice) -> Tensor:
    """The outer product of two vectors, either of which may be None for ones."""
    x, y = factors
    if x is None:
        assert y is not None
        return y[cols].expand(rows.stop - rows.start, -1)
    return x[rows, None] if y is None else torch.outer(x[rows], y[cols])
