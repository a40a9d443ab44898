"""The logits of one call in tiles: norms, masks and tile sizes."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..base import Forward, Inputs, Spec, accumulation_dtype
from . import products
from .norms import rnorm_of
from .sides import Side

SHIFT_FREE_LIMIT = 30.0  # exp(30) sums over 1e12 entries and exp(-30) / 1e12 are normal float32 numbers


class Tiles:
    """The logits of one call in tiles, with masks, norms and the columns that occur."""

    def __init__(self, inputs: Inputs, spec: Spec, kept: int, saved: Forward | None = None) -> None:
        self.inputs, self.spec = inputs, spec
        z, w, target = inputs.features, inputs.prototypes, inputs.target
        self.acc = accumulation_dtype(z.dtype)
        self.on_cpu = z.device.type == "cpu"
        self.m, self.num_classes = z.shape[0], w.shape[0]
        self.shift_free = self.on_cpu and self._small_logits()

        #: which samples are not ignored; None for all, which is detected on a CPU only
        self.valid: Tensor | None = target != spec.ignore_index
        if self.on_cpu and bool(self.valid.all()):
            self.valid = None
        self.z_rnorm = saved.feature_rnorm if saved is not None else rnorm_of(z, self.acc, self.valid)
        label = target if self.valid is None else target.where(self.valid, 0)
        self.classes, column = self._compact(label) if spec.present_only else (None, label)
        self.k = self.num_classes if self.classes is None else self.classes.shape[0]
        row = torch.arange(self.m, device=z.device)
        self.positive = row if spec.exclude == "same_label" else column
        self.excluded = {"target": column, "self": row}.get(spec.exclude)
        #: columns that may be read: samples that are not ignored, and their positives; None for all
        self.readable: Tensor | None = None
        if spec.square and self.valid is not None:
            counts = self.valid.long()  # index_add: indexing with a mask would make the host wait for a GPU
            self.readable = counts.index_add(0, self.positive, counts) > 0
        self.w_rnorm = saved.prototype_rnorm if saved is not None else rnorm_of(w, self.acc, self.readable)

        #: features and prototypes as operands in 16 bits; None where unit vectors in ``acc`` are multiplied
        self.halves: tuple[Side, Side] | None = None
        if products.use_half(z, w, self.shift_free):
            classes = Side(w, self.w_rnorm, False, self.readable, None, half=True)
            self.halves = (
                classes if spec.symmetric else Side(z, self.z_rnorm, False, self.valid, None, half=True),
                classes,
            )

        # The workspace beyond the kept matrix is divided into 16 shares: four buffers of the size of a column tile of
        # prototypes (2 shares each), four of the size of a row tile of features and three tiles of logits (1 share
        # each). Tiles of logits of a few MiB are the fastest: they stay in cache between GEMM, exp and GEMM.
        scratch = spec.workspace // self.acc.itemsize - kept
        share = max(scratch // 16, 1)
        tile_k = max(2 * share // z.shape[1], 16)
        self.tile_k = -(-self.k // max(-(-self.k // tile_k), 1)) or 1  # equal parts
        self.tile_m = max(min(share // z.shape[1], share // self.tile_k, self.m), 16)
        if spec.symmetric:  # square tiles: two of unit features, two products and three of logits
            self.tile_m = self.tile_k = max(min(share // z.shape[1], math.isqrt(share), self.m), 16)
        self.several_columns = self.tile_k < self.k
        self._u: tuple[slice, Tensor] | None = None
        self._v: tuple[slice, Tensor] | None = None
        #: the exact positive logits, which replace those in the tiles where products are rounded
        self.exact: Tensor | None = None
        if self.halves is not None and not spec.symmetric and not products.has_wide_product(z.device.type):
            self.exact = self.positive_logits() if saved is None else saved.pos

    def _small_logits(self) -> bool:
        biases = [b for b in (self.inputs.sample_bias, self.inputs.class_bias) if b is not None and b.numel()]
        # a bias of -inf removes an entry and needs no shift
        finite = [b.masked_fill(b == -torch.inf, 0.0).abs().max() for b in biases]
        return bool(torch.stack([self.inputs.inv_temperature, *finite]).sum() <= SHIFT_FREE_LIMIT)

    def _compact(self, label: Tensor) -> tuple[Tensor | None, Tensor]:
        """The classes that occur (None for all), and the position of each sample's class among them.

        On other devices than the CPU the host does not know their number. The list then has its largest possible
        length min(M, K) and is padded with K; it is None where that is not shorter than K.
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
        """Memory for one tile: a contiguous part of the kept matrix, or new memory if nothing is kept."""
        shape = (rows.stop - rows.start, cols.stop - cols.start)
        if not kept.numel():
            return kept.new_empty(shape)
        start = cols.start * self.m + rows.start * shape[1]
        return kept[start : start + shape[0] * shape[1]].view(shape)

    def only_valid(self, values: Tensor) -> Tensor:
        """(M,) values with 0 for ignored samples."""
        return where(self.valid, values)

    def u(self, rows: slice) -> Tensor:
        """beta times the unit features of some rows, or their 16-bit operands. The last result is cached."""
        if self.halves is not None:
            return self.halves[0].operands(rows)
        if self._u is None or self._u[0] != rows:
            self._u = None  # free the old tile before the new one is made
            scale = self.z_rnorm[rows] * self.inputs.inv_temperature
            u = self.inputs.features[rows] * scale[:, None]
            if self.valid is not None:  # ignored features may hold anything, NaN too
                u.masked_fill_(~self.valid[rows, None], 0.0)
            self._u = (rows, u)
        return self._u[1]

    def class_ids(self, cols: slice) -> Tensor | slice:
        """The class numbers of the columns."""
        return cols if self.classes is None else self.classes[cols].clamp_max(self.num_classes - 1)

    def w_rnorm_of(self, cols: slice) -> Tensor:
        return self.w_rnorm[self.class_ids(cols)]

    def v(self, cols: slice) -> Tensor:
        """The unit prototypes of some columns, or their 16-bit operands. The last result is cached."""
        if self._v is None or self._v[0] != cols:
            self._v = None  # free the old tile before the new one is made
            ids = self.class_ids(cols)
            self._v = (cols, self.unit(ids) if self.halves is None else self.halves[1].operands(ids))
        return self._v[1]

    def unit(self, ids: Tensor | slice) -> Tensor:
        """Unit prototypes; zeros in rows that must not be read."""
        v = self.inputs.prototypes[ids] * self.w_rnorm[ids, None]
        return v if self.readable is None else v.masked_fill_(~self.readable[ids, None], 0.0)

    def within(self, index: Tensor, rows: slice, cols: slice) -> tuple[Tensor | None, Tensor]:
        """For one column index per row: whether it lies in the tile and the row is not ignored (None for yes), and its
        position in the tile."""
        valid = None if self.valid is None else self.valid[rows]
        if not self.several_columns:
            return valid, index[rows]
        local = index[rows] - cols.start
        inside = (local >= 0) & (local < cols.stop - cols.start)
        return inside if valid is None else inside & valid, local.clamp_(0, cols.stop - cols.start - 1)

    def logits(self, rows: slice, cols: slice, out: Tensor, pos: Tensor | None = None) -> Tensor:
        """One tile of t, -inf where excluded. The positive logits in it are copied to ``pos``."""
        t = self._products(rows, cols, out)
        if pos is not None or self.exact is not None:
            inside, local = self.within(self.positive, rows, cols)
            picked = t.gather(1, local[:, None]).squeeze(1)
            if self.exact is not None:
                picked = self.exact[rows] if inside is None else self.exact[rows].where(inside, picked)
                t.scatter_(1, local[:, None], picked[:, None])
            if pos is not None:
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

    def _products(self, rows: slice, cols: slice, out: Tensor) -> Tensor:
        """One tile of beta times the cosines."""
        if self.halves is None:
            return torch.mm(self.u(rows), self.v(cols).T, out=out)
        by_row, by_col = self.scales(rows, cols)
        out.copy_(products.product(self.u(rows), self.v(cols).T))
        return out.mul_((by_row * self.inputs.inv_temperature)[:, None]).mul_(by_col)

    def scales(self, rows: slice, cols: slice) -> tuple[Tensor, Tensor]:
        """The factors of rows and columns that turn products of 16-bit operands into cosines."""
        assert self.halves is not None
        z, w = self.halves
        assert z.scale is not None
        assert w.scale is not None
        return z.scale[rows], w.scale[self.class_ids(cols)]

    def operand_weights(self, weights: Tensor, rows: slice, cols: slice) -> Tensor:
        """Weights times the scales of both sides, in 16 bits; times operands, they give gradients times one scale."""
        by_row, by_col = self.scales(rows, cols)
        return (weights * by_row[:, None]).mul_(by_col).to(self.inputs.features.dtype)

    def positive_logits(self) -> Tensor:
        """(M,), not rounded to 16 bits; 0 for ignored samples."""
        pos, beta = self.z_rnorm.new_zeros(self.m), self.inputs.inv_temperature
        if self.k == 0:  # all samples are ignored
            return pos
        own = self.positive if self.classes is None else self.classes[self.positive]
        for rows in self.row_tiles():
            if self.halves is None:
                torch.linalg.vecdot(self.u(rows), self.unit(own[rows]), out=pos[rows])
                continue
            z, w = self.halves
            torch.linalg.vecdot(z.unit(rows), w.unit(own[rows]), out=pos[rows]).mul_(beta)
        return self.only_valid(pos)

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
        """The value of each column's class; ``absent`` in columns of padding."""
        if self.classes is None:
            return values
        return values[self.classes.clamp_max(self.num_classes - 1)].masked_fill(
            self.classes == self.num_classes, absent
        )

    def put_classes(self, full: Tensor, values: Tensor, cols: slice) -> None:
        """Write one row per column into the rows of their classes."""
        if self.classes is None:
            full[cols] = values.to(full.dtype)
        elif self.on_cpu:
            full[self.classes[cols]] = values.to(full.dtype)
        else:  # columns of padding hold zeros, which are added to the last class
            full.index_add_(0, self.classes[cols].clamp_max(self.num_classes - 1), values.to(full.dtype))


def where(condition: Tensor | None, value: Tensor) -> Tensor:
    """``value`` where the condition holds, else 0; None holds everywhere."""
    return value if condition is None else value.where(condition, 0.0)
