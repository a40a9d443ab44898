"""Counts the work of one step of the Triton backend on a GPU, without a GPU.

The package runs unchanged, from the loss to the gradients, on tensors without memory (the meta device) of any size. The
counts have two sources: :class:`Counted` overrides the methods of the kernels and counts their work before the real
method runs up to the launch, and PyTorch's own operators are intercepted. The kernels, panels, launches and tensors are
therefore those of the real code. The work of a kernel for its arguments is stated here, in one method per kernel:
operations, exponentials, and every byte that it reads or writes, once. Repeated reads of operands from the L2 cache
within a kernel are not counted.

:class:`Cache` estimates which of these bytes reach memory: data that one kernel has read or written may still be in the
L2 cache when another kernel reads them.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import nckernels
from nckernels import operators
from nckernels.backends import quack
from nckernels.backends.base import Inputs, Spec
from nckernels.backends.tiled.kernels import Finish, Partial, Vectors
from nckernels.backends.tiled.plan import IN_L2, Blocks
from nckernels.backends.tiled.sides import Result, Side
from nckernels.backends.triton import TritonBackend, config, launch, pairs_step
from nckernels.backends.triton import step as one_step

from .problems import Problem
from .variants import our_loss

# The kinds of bytes.
INPUTS = "inputs and gradients"
"""Features and prototypes read for norms, positives, products or copies; gradients written, zeros for absent classes
included."""
COPIES = "copies"
"""Copies of operands with zeros for left-out rows: written, and read by products instead of the inputs."""
PANELS = "panels"
"""Products and entries of the gradient between kernels."""
SUMS = "float32 sums"
"""Gradients that products accumulate in float32, and partial sums of thread blocks."""
FINISHING = "finishing"
"""The last reading of those sums and of the inputs, for the projection."""
FILLS = "fills"
"""Zeros and other constants, except those of gradients."""
VECTORS = "vectors"
"""O(M + K) vectors of our kernels: norms, logits, labels, log-sum-exps. Assumed to stay in the L2 cache."""
TORCH = "PyTorch"
"""Reads and writes of PyTorch's operators."""

Access = tuple[str, Tensor, int]
"""Bytes of a kind that are read from or written to a tensor."""


@dataclass
class Stage:
    """One call of a kernel, or several calls under one name."""

    name: str
    library: int = 0
    """Operations of matrix products by the vendor's library."""
    own: int = 0
    """Operations of matrix products in our own kernels."""
    exps: int = 0
    moved: Counter[str] = field(default_factory=Counter)
    """Bytes read and bytes written, by kind."""
    memory: Counter[str] = field(default_factory=Counter)
    """The bytes that reach memory, by kind."""
    launches: int = 0

    @property
    def operations(self) -> int:
        return self.library + self.own


@dataclass
class _Entry:
    kind: str
    size: int
    changed: bool


class Cache:
    """An L2 cache of ``plan.IN_L2`` bytes with least-recently-used eviction of whole regions of tensors.

    Written data reach memory when they are evicted, and are not counted if they are never evicted; gradients reach
    memory at once. Accesses with ``passes`` are not cached: kernels give them an eviction hint.
    """

    def __init__(self, capacity: int = IN_L2) -> None:
        self.capacity = capacity
        self._entries: OrderedDict[tuple[int, int, int], _Entry] = OrderedDict()

    def read(self, access: Access, memory: Counter[str], passes: bool = False) -> None:
        kind, x, size = access
        region, whole = _region(x)
        hit = region if region in self._entries else whole if whole in self._entries else None
        if hit is not None:
            self._entries.move_to_end(hit)
        else:
            memory[kind] += size
            if not passes:
                self._keep(region, _Entry(kind, size, False), memory)

    def write(self, access: Access, memory: Counter[str], passes: bool = False) -> None:
        kind, x, size = access
        if passes:
            memory[kind] += size
            self._entries.pop(_region(x)[0], None)
            return
        later = kind != INPUTS and size <= self.capacity
        if not later:
            memory[kind] += size
        self._keep(_region(x)[0], _Entry(kind, size, later), memory)

    def _keep(self, region: tuple[int, int, int], entry: _Entry, memory: Counter[str]) -> None:
        self._entries.pop(region, None)
        self._entries[region] = entry
        while sum(e.size for e in self._entries.values()) > self.capacity:
            _, gone = self._entries.popitem(last=False)
            if gone.changed:
                memory[gone.kind] += gone.size


def _region(x: Tensor) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """The memory region of a tensor, and that of its whole storage."""
    storage, start = x.untyped_storage(), int(x.storage_offset()) * x.element_size()
    return (storage._cdata, start, _bytes(x)), (storage._cdata, 0, storage.nbytes())


class Tally:
    """The stages of a step, in order."""

    def __init__(self, present: int) -> None:
        self.present = present
        """The number of classes that occur, which in a real run only the device knows."""
        self.stages: list[Stage] = []
        self.kernels: list[str] = []
        """The names of our own kernels in the order of their launches."""
        self._cache = Cache()
        self._within: Stage | None = None
        self._kinds: dict[int, str] = {}
        self._kept: list[Tensor] = []

    @contextmanager
    def stage(
        self,
        name: str,
        *,
        library: int = 0,
        own: int = 0,
        exps: int = 0,
        read: Iterable[Access] = (),
        written: Iterable[Access] = (),
        passing_read: Iterable[Access] = (),
        passing_written: Iterable[Access] = (),
        vectors: int = 0,
    ) -> Iterator[Stage]:
        """Launches inside belong to this stage."""
        stage = Stage(name, library, own, exps)
        stage.moved[VECTORS] += vectors
        for accesses, go in (
            (read, self._cache.read),
            (passing_read, partial(self._cache.read, passes=True)),
            (written, self._cache.write),
            (passing_written, partial(self._cache.write, passes=True)),
        ):
            for access in accesses:
                kind, x, size = access
                if size:
                    self._kept.append(x)  # so that no other tensor reuses its memory
                    stage.moved[kind] += size
                    go(access, stage.memory)
        self.stages.append(stage)
        self._within = stage
        yield stage
        self._within = None

    def launch(self, kernel: Any, grid: Any, *args: Any, **_: Any) -> None:
        """Replaces the real launch."""
        name = kernel.fn.__name__
        self.kernels.append(name)
        if self._within is not None:
            self._within.launches += 1
            return
        # Not a method of tiled.Kernels: scales gradients by the upstream gradient; in place by 1 it moves nothing.
        assert name == "scale_kernel", name
        tensors, out = args[1:4], args[4:7]
        moved = [(x, y) for x, y in zip(tensors, out, strict=True) if y is not None]
        read, written = [(FINISHING, x, _bytes(x)) for x, _ in moved], [(INPUTS, y, _bytes(y)) for _, y in moved]
        with self.stage("scale", read=read, written=written) as stage:
            stage.launches += 1

    def know(self, x: Tensor, kind: str) -> None:
        """Set the kind of all tensors in this storage."""
        self._kept.append(x)
        self._kinds[x.untyped_storage()._cdata] = kind

    def kind(self, x: Tensor) -> str:
        return self._kinds[x.untyped_storage()._cdata]


class Counted(one_step.TritonStep):
    """The Triton backend's kernels; each counts its work and stops at the launch."""

    def __init__(self, tally: Tally, inputs: Inputs, spec: Spec, host_beta: float | None = None) -> None:
        super().__init__(inputs, spec, host_beta)
        self.tally = tally
        self.columns, self.itemsize = inputs.features.shape[1], inputs.features.element_size()
        self.row = self.columns * self.itemsize
        """Bytes per row."""
        for x in self.inputs[:2]:
            tally.know(x, INPUTS)

    def _used(self, side: Side, start: int = 0, stop: int | None = None) -> int:
        """Number of slots in use among [start, stop)."""
        used = side.slots if side.used is None else min(self.tally.present, side.slots)
        return max(0, min(used, side.slots if stop is None else stop) - start)

    def _rows(self, side: Side, start: int = 0, stop: int | None = None) -> Access:
        """The access that reads the rows of the slots [start, stop)."""
        x = side.x if side.gather else side.x[start : side.slots if stop is None else stop]
        return INPUTS, x, self._used(side, start, stop) * self.row

    # --- the vendor's library

    def matmul(self, a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
        read = [(self.tally.kind(x), x, _bytes(x)) for x in (a, b)]
        of_entries = PANELS in (read[0][0], read[1][0])
        result = SUMS if of_entries else PANELS
        self.tally.know(out, result)
        if accumulate:
            read.append((result, out, _bytes(out)))
        with self.tally.stage(
            "products with entries" if of_entries else "products",
            library=2 * a.shape[0] * a.shape[1] * b.shape[1], read=read, written=[(result, out, _bytes(out))],
        ) as stage:  # fmt: skip
            stage.launches += 1

    # --- O(M d) and O(K)

    def row_rnorm(self, x: Tensor, rnorm: Tensor, label: Tensor | None) -> None:
        with self.tally.stage("row_rnorm", read=[(INPUTS, x, _bytes(x))], vectors=_bytes(rnorm, label)):
            super().row_rnorm(x, rnorm, label)

    def prepare_samples(self, z_rnorm: Tensor, pos: Tensor, w_rnorm: Tensor | None, mark: Tensor | None) -> None:
        z, w, target = self.inputs[:3]
        partners = 0 if self.spec.symmetric else len(z) if self.spec.square else self.tally.present
        vectors = _bytes(target, z_rnorm, pos) + 4 * partners * ((w_rnorm is not None) + (mark is not None))
        read = [(INPUTS, z, len(z) * self.row), (INPUTS, w, partners * self.row)]
        with self.tally.stage("prepare_samples", read=read, vectors=vectors):
            super().prepare_samples(z_rnorm, pos, w_rnorm, mark)

    def compact(self, rank: Tensor, present: Tensor, k: int, slots: int) -> None:
        with self.tally.stage("compact", vectors=_bytes(rank, present)):
            super().compact(rank, present, k, slots)

    def half_scale(self, samples: Side, classes: Side, scale: Tensor) -> None:
        read = (classes.grad, classes.lse, samples.grad, samples.lse, samples.pos, samples.rnorm, classes.rnorm)
        with self.tally.stage("half_scale", vectors=_bytes(*read)):
            super().half_scale(samples, classes, scale)

    # --- tiles of products

    def log_sum_exp(
        self, p: Side, q: Side, out: Tensor | None, p_partial: Partial, q_partial: Partial,
        first: int, count: int, split: int, blocks: Blocks,
    ) -> None:  # fmt: skip
        start, stop = first * blocks.p, min(p.slots, (first + count) * blocks.p)
        n, both = self._used(p, start, stop), q_partial[0] is not None
        vectors = (4 * n if p_partial[0] is None else 8 * split * n) + (8 * count * q.slots if both else 0)
        with self.tally.stage(
            "log_sum_exp", own=2 * n * q.slots * self.columns, exps=(2 if both else 1) * n * q.slots,
            read=[self._rows(p, start, stop), self._rows(q)], vectors=vectors,
        ):  # fmt: skip
            super().log_sum_exp(p, q, out, p_partial, q_partial, first, count, split, blocks)

    def combine(self, partial: Partial, side: Side, out: Tensor, first: int, parts: int, keep: bool) -> None:
        n = self._used(side)
        with self.tally.stage("combine", vectors=8 * n * (parts - first) + 4 * n):
            super().combine(partial, side, out, first, parts, keep)

    def short_grad(
        self, result: Result, q: Side, part: Tensor | None, scale: Tensor | None, split: int, blocks: Blocks
    ) -> None:
        p = result.side
        n, others = self._used(p), self._used(q)
        terms = (p.grad is not None) + (q.grad is not None)
        if self.spec.symmetric and p.bias is None and config.may_share(blocks.tile, self.arch):
            terms = 1  # at the temperatures of the benchmarks
        written: list[Access] = []
        if part is not None:
            written = [(SUMS, part, 4 * split * n * self.columns)]
        elif result.out is not None:
            written = [(INPUTS, result.out, n * self.row)]
        with self.tally.stage(
            "short_grad", own=4 * n * others * self.columns, exps=terms * n * others,
            read=[self._rows(p), self._rows(q)], written=written,
        ):  # fmt: skip
            super().short_grad(result, q, part, scale, split, blocks)

    def entries(
        self, p: Side, q: Side, h: Tensor, start: int, stop: int, begin: int, end: int, scale: Tensor | None
    ) -> None:
        n, others = self._used(p, start, stop), self._used(q, begin, end)
        terms, entries = (p.grad is not None) + (q.grad is not None), (stop - start) * (end - begin)
        self.tally.know(h, PANELS)
        with self.tally.stage(
            "entries", own=2 * n * others * self.columns, exps=terms * entries,
            read=[self._rows(p, start, stop), self._rows(q, begin, end)],
            written=[(PANELS, h, entries * self.itemsize)],
        ):  # fmt: skip
            super().entries(p, q, h, start, stop, begin, end, scale)

    def bias_grad(self, p: Side, q: Side, part: Tensor, split: int, blocks: Blocks) -> None:
        n, others = p.x.shape[0], self._used(q)
        with self.tally.stage(
            "bias_grad", own=2 * n * others * self.columns, exps=n * others,
            read=[self._rows(p), self._rows(q)], vectors=_bytes(part),
        ):  # fmt: skip
            super().bias_grad(p, q, part, split, blocks)

    # --- kernels over rows

    def gather(self, side: Side, out: Tensor, start: int, stop: int) -> None:
        self.tally.know(out, COPIES)
        written = [(COPIES, out, (stop - start) * self.row)]
        with self.tally.stage("gather", read=[self._rows(side, start, stop)], written=written):
            super().gather(side, out, start, stop)

    def mend(self, h: Tensor, side: Side, out: Tensor) -> None:
        with self.tally.stage("mend", vectors=_bytes(side.rnorm)):  # assumes finite rows
            super().mend(h, side, out)

    def finish(
        self, result: Result, sums: Tensor, start: int, stop: int, parts: int, scale: Tensor | None, norm_inside: bool
    ) -> None:
        with self._finishing(result, sums, start, stop, parts, 0):
            super().finish(result, sums, start, stop, parts, scale, norm_inside)

    def _finishing(
        self, result: Result, sums: Tensor, start: int, stop: int, parts: int, vectors: int
    ) -> AbstractContextManager[Stage]:
        side, out, n = result.side, result.out, self._used(result.side, start, stop)
        _, x, size = self._rows(side, start, stop)
        read = [(FINISHING, sums, 4 * parts * n * self.columns)]
        written = [] if out is None else [(INPUTS, out, n * self.columns * out.element_size())]
        return self.tally.stage(
            "finish", read=read, passing_read=[(FINISHING, x, size)], passing_written=written, vectors=vectors
        )

    # --- one step

    def prepare_step(self, weight: Tensor | None, vectors: Vectors, nothing_is_zero: bool) -> None:
        (z, w, target, *_), v = self.inputs, vectors
        rows = self.tally.present if v.mark is not None and v.w_broken is None else len(w)
        read = [(INPUTS, z, len(z) * self.row), (INPUTS, w, rows * self.row)]
        written = _bytes(v.z_rnorm, v.pos, v.share, v.pos_grad, v.instance_grad, v.w_rnorm, v.mark, v.of_class)
        with self.tally.stage("prepare_step", read=read, vectors=_bytes(target, weight) + written):
            super().prepare_step(weight, vectors, nothing_is_zero)

    def write_loss(self, vectors: Vectors) -> None:
        v = vectors
        with self.tally.stage("loss", vectors=_bytes(self.inputs.target, v.share, v.lse, v.instance_lse, v.pos)):
            super().write_loss(vectors)

    def finisher(self, result: Result, scale: Tensor | None, other: Side | None, vectors: Vectors) -> Finish:
        finish, v = super().finisher(result, scale, other, vectors), vectors
        of_loss = _bytes(self.inputs.target, v.share, v.lse, v.pos)

        def finished(sums: Tensor, h: Tensor, start: int, stop: int, is_last: bool) -> None:
            with self._finishing(result, sums, start, stop, 1, of_loss if is_last else 0):  # assumes finite rows
                finish(sums, h, start, stop, is_last)

        return finished

    def panel_log_sum_exp(self, p: Side, q: Side, products: Tensor, partial: Tensor, start: int, stop: int) -> None:
        n = self._used(p, start, stop)
        with self.tally.stage(
            "panel_log_sum_exp", exps=(stop - start) * q.slots,
            read=[(PANELS, products, 4 * n * q.slots)], vectors=_bytes(partial),
        ):  # fmt: skip
            super().panel_log_sum_exp(p, q, products, partial, start, stop)

    def panel_entries(
        self, p: Side, q: Side, products: Tensor, partial: Tensor, h: Tensor, start: int, stop: int,
        scale: Tensor | None,
    ) -> None:  # fmt: skip
        n, entries = self._used(p, start, stop), (stop - start) * q.slots
        self.tally.know(h, PANELS)
        with self.tally.stage(
            "panel_entries", exps=entries, read=[(PANELS, products, 4 * n * q.slots)],
            written=[(PANELS, h, entries * self.itemsize)], vectors=_bytes(partial) + 4 * n,
        ):  # fmt: skip
            super().panel_entries(p, q, products, partial, h, start, stop, scale)

    # --- for the product with an epilogue

    def epilogue_operands(
        self, p: Side, p_scale: Tensor, p_tag: Tensor | None, slot: Tensor | None,
        q: Side, q_scale: Tensor, q_tag: Tensor | None,
    ) -> None:  # fmt: skip
        vectors = _bytes(p.rnorm, p.label, p_scale, p_tag, q.rnorm, q.label, q_scale, q_tag)
        with self.tally.stage("epilogue_operands", vectors=vectors):
            super().epilogue_operands(p, p_scale, p_tag, slot, q, q_scale, q_tag)

    def weighted_entries(self, p: Side, sums: Tensor, weight: Tensor, h: Tensor, start: int, stop: int) -> None:
        access = (PANELS, h, (stop - start) * h.shape[1] * self.itemsize)
        vectors = _bytes(sums, weight) + 8 * self._used(p, start, stop)
        with self.tally.stage("weighted_entries", read=[access], written=[access], vectors=vectors):
            super().weighted_entries(p, sums, weight, h, start, stop)

    def positives(
        self, p: Side, q: Side, pos: Tensor, weight: Tensor, slot: Tensor | None, h: Tensor, start: int, stop: int
    ) -> None:
        with self.tally.stage("positives", vectors=_bytes(self.inputs.target, pos, weight)):
            super().positives(p, q, pos, weight, slot, h, start, stop)


class CountedPairs(Counted, pairs_step.PairKernels):
    """The kernels of SupCon in one step."""

    def prepare_rows(self, rows: pairs_step.Rows, looks: bool) -> None:
        vectors = _bytes(self.inputs.target, rows.rnorm, rows.bias, rows.tag)
        with self.tally.stage("prepare_rows", read=[self._all_rows()], vectors=vectors):
            super().prepare_rows(rows, looks)

    def log_sum_exp_of_pairs(self, rows: pairs_step.Rows, partial: Tensor, blocks: Blocks) -> None:
        entries = len(self.inputs.features) ** 2
        with self.tally.stage(
            "log_sum_exp_of_pairs", own=2 * entries * self.columns, exps=entries, read=[self._all_rows()],
            vectors=_bytes(partial, rows.rnorm, rows.bias, rows.tag),
        ):  # fmt: skip
            super().log_sum_exp_of_pairs(rows, partial, blocks)

    def reduce_pairs(self, rows: pairs_step.Rows, partial: Tensor, weight: Tensor | None, exact: bool) -> None:
        with self.tally.stage("reduce_pairs", vectors=_bytes(partial, weight, *rows)):
            super().reduce_pairs(rows, partial, weight, exact)

    def grad_of_pairs(
        self, rows: pairs_step.Rows, grad: pairs_step.Gradient, part: Tensor | None, loss: Tensor,
        mean: bool, split: int, blocks: Blocks,
    ) -> None:  # fmt: skip
        entries = len(self.inputs.features) ** 2
        terms = 1 if config.may_share(blocks.tile, self.arch) else 2  # at the temperatures of the benchmarks
        out = grad.result.out
        assert out is not None
        written = (INPUTS, out, _bytes(out)) if part is None else (SUMS, part, _bytes(part))
        with self.tally.stage(
            "grad_of_pairs", own=4 * entries * self.columns, exps=terms * entries, read=[self._all_rows()],
            written=[written], vectors=_bytes(*rows),
        ):  # fmt: skip
            super().grad_of_pairs(rows, grad, part, loss, mean, split, blocks)

    def panel_log_sum_exp_of_pairs(
        self, rows: pairs_step.Rows, products: Tensor, partial: Tensor, start: int, stop: int
    ) -> None:
        entries = products.numel()
        with self.tally.stage(
            "panel_log_sum_exp_of_pairs", exps=entries, read=[(PANELS, products, 4 * entries)],
            vectors=16 * partial.shape[1] * (stop - start),
        ):  # fmt: skip
            super().panel_log_sum_exp_of_pairs(rows, products, partial, start, stop)

    def scale_pairs(self, rows: pairs_step.Rows, loss: Tensor, mean: bool) -> None:
        with self.tally.stage("scale_pairs", vectors=_bytes(rows.totals)):
            super().scale_pairs(rows, loss, mean)

    def panel_entries_of_pairs(
        self, rows: pairs_step.Rows, products: Tensor, h: Tensor, rest: Tensor | None, start: int, stop: int
    ) -> None:
        entries = products.numel()
        self.tally.know(h, PANELS)
        with self.tally.stage(
            "panel_entries_of_pairs", exps=2 * entries, read=[(PANELS, products, 4 * entries)],
            written=[(PANELS, h, entries * self.itemsize)], vectors=_bytes(rest),
        ):  # fmt: skip
            super().panel_entries_of_pairs(rows, products, h, rest, start, stop)

    def _all_rows(self) -> Access:
        z = self.inputs.features
        return INPUTS, z, len(z) * self.row


class CountedProduct(quack.Product):
    """A product with an epilogue, at the library's rate."""

    columns = 160
    """Columns of its tile on an H100."""

    def __init__(self, tally: Tally) -> None:
        self.tally = tally

    def __call__(self, p: quack.Operand, q: quack.Operand, shift: float, e: Tensor, sums: Tensor) -> None:
        (n, k), d = e.shape, p.x.shape[1]
        self.tally.know(e, PANELS)
        with self.tally.stage(
            "product with epilogue", library=2 * n * k * d, exps=n * k,
            read=[(self.tally.kind(x), x, _bytes(x)) for x in (p.x, q.x)], written=[(PANELS, e, _bytes(e))],
            vectors=_bytes(p.scale, p.tag, q.scale, q.tag, sums),
        ) as stage:  # fmt: skip
            stage.launches += 1


def _bytes(*tensors: Tensor | None) -> int:
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)


_NO_LAUNCH = (
    "empty", "empty_like", "empty_strided", "new_empty", "detach", "unsafe_split", "unsafe_split_with_sizes"
)  # fmt: skip
"""PyTorch's operators that return memory or views of it."""


class _Operators(TorchDispatchMode):
    """Counts PyTorch's operators that launch kernels, as one launch each."""

    def __init__(self, tally: Tally, like: Tensor) -> None:
        super().__init__()
        self.tally, self.like = tally, like

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        results = [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.numel()]
        name = func.overloadpacket.__name__
        if not results or func.is_view or name in _NO_LAUNCH:
            return out
        assert name not in ("mm", "addmm", "bmm", "baddbmm"), "only Kernels.matmul is counted as a product"
        operands = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        kind = TORCH
        if not operands or name.endswith("_like") or name.startswith(("new_", "fill")):
            operands, kind = [], FILLS
            if all(x.dim() == 2 and x.dtype == self.like.dtype for x in results):
                kind = INPUTS  # zeros for the gradients of absent classes
        # An operand may be an expanded single number.
        read = [(kind, x, min(_bytes(x), x.untyped_storage().nbytes())) for x in operands]
        with self.tally.stage(f"torch {name}", read=read, written=[(kind, x, _bytes(x)) for x in results]) as stage:
            stage.launches += 1
        return out


def present_classes(m: int, k: int) -> int:
    """The expected number of k classes that occur among m random labels."""
    return round(-k * math.expm1(m * math.log1p(-1.0 / k))) if k > 1 else k


def count(
    problem: Problem,
    workspace: int,
    arch: config.Arch,
    dtype: torch.dtype,
    *,
    in_one_step: bool,
    epilogue: bool = False,
) -> Tally:
    """Count a step of the Triton backend on a GPU: loss and gradients, in two passes or as the backend chooses.

    Args:
        problem: loss and sizes; labels at random, as :meth:`Problem.tensors` has them.
        workspace: bytes.
        arch: the GPU.
        dtype: of features and prototypes.
        in_one_step: whether the backend may compute loss and gradient in one step.
        epilogue: whether there is a product with an epilogue, ``nckernels[hopper]``.
    """
    present = problem.k if problem.loss == "clip" else present_classes(problem.m, problem.k)
    tally = Tally(present)
    rows = [problem.m] if problem.with_itself else [problem.m, problem.k]
    leaves = [torch.empty(n, problem.d, dtype=dtype, device="meta", requires_grad=True) for n in rows]
    target = torch.empty(problem.m, dtype=torch.int64, device="meta")
    kernels = partial(Counted, tally)
    with pretending(arch), ExitStack() as stack:
        enter, replaced = stack.enter_context, mock.patch.object
        enter(replaced(launch, "launch", tally.launch))
        enter(replaced(launch, "TritonKernels", kernels))
        enter(replaced(one_step, "TritonStep", kernels))
        enter(replaced(pairs_step, "PairKernels", partial(CountedPairs, tally)))
        if epilogue:
            enter(replaced(quack, "why_not", lambda _: None))
            enter(replaced(quack, "product", lambda *_: CountedProduct(tally)))
        if not in_one_step:
            enter(replaced(TritonBackend, "can_step", lambda *_: False))
        enter(nckernels.use_workspace(workspace))
        enter(_Operators(tally, leaves[0]))
        loss = our_loss(problem)(*leaves, target)
        torch.autograd.grad(loss, leaves)
    return tally


@contextmanager
def pretending(arch: config.Arch) -> Iterator[None]:
    """Make the Triton backend treat tensors on any device as plain tensors on this GPU."""
    with ExitStack() as stack:
        enter, replaced = stack.enter_context, mock.patch.object
        enter(replaced(config, "arch_of", lambda device: arch))
        enter(replaced(operators, "plain", lambda *values: True))
        enter(replaced(TritonBackend, "why_not", lambda *_: None))
        enter(nckernels.use_backend("triton"))
        yield
