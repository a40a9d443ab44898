"""What one step of the Triton backend does on a GPU, counted without one.

The package runs as it is, from the loss to the gradients, on tensors without memory (the meta device) at any size. Two
things are listened to: the kernels, whose methods :class:`Counted` overrides to note what they are about to do before
the real method goes as far as the launch; and PyTorch's own operators. So which kernels run, on which panels, how many
launches that takes, and which tensors exist is what the code says. What a kernel does for its arguments is
stated here, one method a kernel: operations, exponentials, and every byte that it reads or writes once.

Not counted: that a tile kernel reads its operands again from the L2 cache, and that a small result may still be in the L2
cache when the next kernel reads it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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
from nckernels.backends.base import Inputs, Spec
from nckernels.backends.tiled.kernels import Partial
from nckernels.backends.tiled.plan import Blocks
from nckernels.backends.tiled.sides import Result, Side
from nckernels.backends.triton import TritonBackend, config, launch
from nckernels.backends.triton import step as one_step

from .problems import Problem
from .variants import our_loss

# The kinds of bytes.
INPUTS = "inputs and gradients"
"""Features and prototypes read for products, and gradients written, zeros for absent classes included."""
NORMS = "norms"
"""The same inputs, read for their norms and the positive logits."""
COPIES = "copies"
"""Of operands, with zeros for rows that take no part: written, and read by products in place of the inputs."""
PANELS = "panels"
"""Products and entries of the gradient, on their way from kernel to kernel."""
SUMS = "float32 sums"
"""Gradients while they accumulate, as products read and write them; partial sums of thread blocks."""
FINISHING = "finishing"
"""Those sums and the inputs, read once more for the projection."""
FILLS = "fills"
"""Zeros and other constants, but for gradients."""
VECTORS = "vectors"
"""O(M + K): norms, logits, labels, log-sum-exps."""
TORCH = "PyTorch"
"""All else that PyTorch's operators read and write."""
KINDS = (INPUTS, NORMS, COPIES, PANELS, SUMS, FINISHING, FILLS, VECTORS, TORCH)


@dataclass
class Stage:
    """A call of one kernel, or of several that have the same name."""

    name: str
    library: int = 0
    """Operations of matrix products by the vendor's library."""
    own: int = 0
    """Operations of matrix products in kernels of our own."""
    exps: int = 0
    moved: Counter[str] = field(default_factory=Counter)
    """Bytes read and bytes written, by kind."""
    launches: int = 0

    @property
    def operations(self) -> int:
        return self.library + self.own

    @property
    def bytes(self) -> int:
        return sum(self.moved.values())


class Tally:
    """The stages of a step, in order."""

    def __init__(self, present: int) -> None:
        self.present = present
        """How many classes occur, which the device alone would know."""
        self.stages: list[Stage] = []
        self.kernels: list[str] = []
        """The names of our own kernels as they are launched."""
        self._within: Stage | None = None
        self._kinds: dict[int, str] = {}
        self._kept: list[Tensor] = []

    @contextmanager
    def stage(self, name: str, *, library: int = 0, own: int = 0, exps: int = 0, **moved: int) -> Iterator[Stage]:
        """Launches inside belong to this stage."""
        kinds = Counter({_KIND_OF[kind]: count for kind, count in moved.items() if count})
        self._within = Stage(name, library, own, exps, kinds)
        self.stages.append(self._within)
        yield self._within
        self._within = None

    def launch(self, kernel: Any, *_: Any, **__: Any) -> None:
        """In place of the real launch."""
        name = kernel.fn.__name__
        self.kernels.append(name)
        if self._within is not None:
            self._within.launches += 1
        else:  # what is no kernel of tiled.Kernels: the factor that backward() brings, which is 1 and moves nothing
            self.stages.append(Stage(name.removesuffix("_kernel"), launches=1))

    def know(self, x: Tensor, kind: str) -> None:
        """Tensors in this memory are of this kind."""
        self._kept.append(x)  # no other tensor gets its place
        self._kinds[_memory(x)] = kind

    def kind(self, x: Tensor) -> str | None:
        return self._kinds.get(_memory(x))


_KIND_OF = {
    "inputs": INPUTS, "norms": NORMS, "copies": COPIES, "panels": PANELS, "sums": SUMS, "finishing": FINISHING,
    "vectors": VECTORS,
}  # fmt: skip
_ARGUMENT_OF = {kind: argument for argument, kind in _KIND_OF.items()}


def _memory(x: Tensor) -> int:
    return int(x.untyped_storage()._cdata)


class Counted(one_step.TritonStep):
    """The Triton backend's kernels; each notes what it would do and stops at the launch."""

    def __init__(self, tally: Tally, inputs: Inputs, spec: Spec) -> None:
        super().__init__(inputs, spec)
        self.tally = tally
        self.columns, self.itemsize = inputs.features.shape[1], inputs.features.element_size()
        self.row = self.columns * self.itemsize
        """Bytes of a row."""
        for x in self.inputs[:2]:
            tally.know(x, INPUTS)

    def _used(self, side: Side, start: int = 0, stop: int | None = None) -> int:
        """Slots in use among [start, stop)."""
        used = side.slots if side.count is None else min(self.tally.present, side.slots)
        return max(0, min(used, side.slots if stop is None else stop) - start)

    def _here(self, side: Side) -> int:
        """Rows that take part: nobody is ignored, so only absent classes do not."""
        absent = self.spec.present_only and not side.samples
        return min(self.tally.present, side.slots) if absent else side.slots

    # --- the vendor's library

    def matmul(self, a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
        kinds = [self.tally.kind(a), self.tally.kind(b)]
        assert None not in kinds, "a product of a matrix that no kernel has written"
        result = SUMS if PANELS in kinds else PANELS
        self.tally.know(out, result)
        moved = Counter({result: (2 if accumulate else 1) * _bytes(out)})
        for x, kind in zip((a, b), kinds, strict=True):
            moved[str(kind)] += _bytes(x)
        name = "product of gradients" if result == SUMS else "products"
        arguments = {_ARGUMENT_OF[kind]: count for kind, count in moved.items()}
        operations = 2 * a.shape[0] * a.shape[1] * b.shape[1]
        with self.tally.stage(name, library=operations, **arguments) as stage:
            stage.launches += 1

    # --- O(M d) and O(K)

    def row_rnorm(self, x: Tensor, rnorm: Tensor, label: Tensor | None) -> None:
        n = x.shape[0]
        with self.tally.stage("row_rnorm", norms=n * self.row, vectors=4 * n + _bytes(label)):
            super().row_rnorm(x, rnorm, label)

    def prepare_samples(self, z_rnorm: Tensor, pos: Tensor, w_rnorm: Tensor | None, mark: Tensor | None) -> None:
        m = z_rnorm.shape[0]
        partners = 0 if self.spec.symmetric else m if self.spec.square else self.tally.present
        moved = _bytes(self.inputs.target, z_rnorm, pos) + 4 * partners * ((w_rnorm is not None) + (mark is not None))
        with self.tally.stage("prepare_samples", norms=(m + partners) * self.row, vectors=moved):
            super().prepare_samples(z_rnorm, pos, w_rnorm, mark)

    def compact(self, mark: Tensor, rank: Tensor, present: Tensor, k: int, slots: int) -> None:
        with self.tally.stage("compact", vectors=_bytes(mark, rank, present)):
            super().compact(mark, rank, present, k, slots)

    def half_scale(self, samples: Side, classes: Side, scale: Tensor) -> None:
        read = (classes.grad, classes.lse, samples.grad, samples.lse, samples.pos, samples.rnorm, classes.rnorm)
        with self.tally.stage("half_scale", vectors=_bytes(*read)):
            super().half_scale(samples, classes, scale)

    # --- tiles of products

    def log_sum_exp(
        self, p: Side, q: Side, out: Tensor | None, p_partial: Partial, q_partial: Partial,
        first: int, count: int, split: int, blocks: Blocks,
    ) -> None:  # fmt: skip
        n = self._used(p, first * blocks.p, min(p.slots, (first + count) * blocks.p))
        both = q_partial[0] is not None
        written = 4 * n if p_partial[0] is None else 8 * split * n
        written += 8 * count * q.slots if both else 0
        with self.tally.stage(
            "log_sum_exp", own=2 * n * q.slots * self.columns, exps=(2 if both else 1) * n * q.slots,
            inputs=(n + self._here(q)) * self.row, vectors=written,
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
        moved = (n + self._here(q)) * self.row
        if part is None and result.out is not None:
            moved += n * self.row
        with self.tally.stage(
            "short_grad", own=4 * n * others * self.columns, exps=terms * n * others,
            inputs=moved, sums=0 if part is None else 4 * split * n * self.columns,
        ):  # fmt: skip
            super().short_grad(result, q, part, scale, split, blocks)

    def entries(
        self, p: Side, q: Side, h: Tensor, start: int, stop: int, begin: int, end: int, scale: Tensor | None
    ) -> None:
        n, others = self._used(p, start, stop), self._used(q, begin, end)
        terms = (p.grad is not None) + (q.grad is not None)
        self.tally.know(h, PANELS)
        with self.tally.stage(
            "entries", own=2 * n * others * self.columns, exps=terms * (stop - start) * (end - begin),
            inputs=(n + others) * self.row, panels=(stop - start) * (end - begin) * self.itemsize,
        ):  # fmt: skip
            super().entries(p, q, h, start, stop, begin, end, scale)

    def bias_grad(self, p: Side, q: Side, part: Tensor, split: int, blocks: Blocks) -> None:
        n, others = p.x.shape[0], self._used(q)
        with self.tally.stage(
            "bias_grad", own=2 * n * others * self.columns, exps=n * others,
            inputs=(n + others) * self.row, vectors=_bytes(part),
        ):  # fmt: skip
            super().bias_grad(p, q, part, split, blocks)

    # --- rows again

    def gather(self, side: Side, out: Tensor, start: int, stop: int) -> None:
        read = self._used(side, start, stop)
        self.tally.know(out, COPIES)
        with self.tally.stage("gather", inputs=read * self.row, copies=(stop - start) * self.row):
            super().gather(side, out, start, stop)

    def finish(
        self, result: Result, sums: Tensor, start: int, stop: int, parts: int, scale: Tensor | None, norm_inside: bool
    ) -> None:
        n = self._used(result.side, start, stop)
        written = 0 if result.out is None else n * self.columns * result.out.element_size()
        with self.tally.stage("finish", finishing=n * (4 * parts * self.columns + self.row), inputs=written):
            super().finish(result, sums, start, stop, parts, scale, norm_inside)

    # --- one step

    def shares(
        self, weight: Tensor | None, share: Tensor, pos_grad: Tensor, of_class: Tensor | None, part: Tensor
    ) -> None:
        moved = _bytes(self.inputs.target, weight, share, pos_grad, of_class)
        with self.tally.stage("shares", vectors=moved):
            super().shares(weight, share, pos_grad, of_class, part)

    def divisor(self, part: Tensor, out: Tensor, nothing_is_zero: bool) -> None:
        with self.tally.stage("divisor", vectors=_bytes(part)):
            super().divisor(part, out, nothing_is_zero)

    def panel_log_sum_exp(
        self, p: Side, q: Side, products: Tensor, partial: tuple[Tensor, Tensor], start: int, stop: int
    ) -> None:
        n = self._used(p, start, stop)
        with self.tally.stage(
            "panel_log_sum_exp", exps=(stop - start) * q.slots, panels=4 * n * q.slots, vectors=_bytes(*partial)
        ):
            super().panel_log_sum_exp(p, q, products, partial, start, stop)

    def panel_entries(
        self, p: Side, q: Side, products: Tensor, partial: tuple[Tensor, Tensor], h: Tensor,
        start: int, stop: int, scale: Tensor | None,
    ) -> None:  # fmt: skip
        n = self._used(p, start, stop)
        moved = 4 * n * q.slots + (stop - start) * q.slots * self.itemsize
        self.tally.know(h, PANELS)
        with self.tally.stage(
            "panel_entries", exps=(stop - start) * q.slots, panels=moved, vectors=_bytes(*partial) + 4 * n
        ):
            super().panel_entries(p, q, products, partial, h, start, stop, scale)

    def loss(self, share: Tensor, lse: Tensor, pos: Tensor, part: Tensor, divisor: Tensor | None, out: Tensor) -> None:
        with self.tally.stage("loss", vectors=_bytes(self.inputs.target, share, lse, pos)):
            super().loss(share, lse, pos, part, divisor, out)


def _bytes(*tensors: Tensor | None) -> int:
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)


class _Operators(TorchDispatchMode):
    """PyTorch's operators that launch something: each counts as one launch."""

    def __init__(self, tally: Tally, like: Tensor) -> None:
        super().__init__()
        self.tally, self.like = tally, like

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        written = [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.numel()]
        name = func.overloadpacket.__name__
        if not written or func.is_view or name in ("empty", "empty_like", "empty_strided", "new_empty", "detach"):
            return out
        read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        constant = not read or name.endswith("_like") or name.startswith(("new_", "fill"))
        kind = FILLS if constant else TORCH
        if kind == FILLS and all(x.dim() == 2 and x.dtype == self.like.dtype for x in written):
            kind = INPUTS  # zeros for the gradients of absent classes
        moved = _bytes(*written) + (0 if constant else sum(map(_stored, read)))
        self.tally.stages.append(Stage(f"torch {name}", moved=Counter({kind: moved}), launches=1))
        return out


def _stored(x: Tensor) -> int:
    """Bytes of what may be an expanded number."""
    return min(_bytes(x), x.untyped_storage().nbytes())


def present_classes(m: int, k: int) -> int:
    """How many of k classes occur among m random labels, on average."""
    return round(-k * math.expm1(m * math.log1p(-1.0 / k))) if k > 1 else k


def count(problem: Problem, workspace: int, arch: config.Arch, dtype: torch.dtype, *, in_one_step: bool) -> Tally:
    """A step of the Triton backend on such a GPU: loss and gradients, in two passes or as the backend chooses.

    Args:
        problem: loss and sizes; labels at random, as :meth:`Problem.tensors` has them.
        workspace: bytes.
        arch: the GPU.
        dtype: of features and prototypes.
        in_one_step: whether the backend may compute loss and gradient together, where it prefers to.
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
        if not in_one_step:
            enter(replaced(TritonBackend, "can_step", lambda *_: False))
        enter(nckernels.use_workspace(workspace))
        enter(_Operators(tally, leaves[0]))
        loss = our_loss(problem.loss)(*leaves, target)
        torch.autograd.grad(loss, leaves)
    return tally


@contextmanager
def pretending(arch: config.Arch) -> Iterator[None]:
    """Within, the Triton backend takes tensors wherever they are for plain ones on this GPU."""
    with ExitStack() as stack:
        enter, replaced = stack.enter_context, mock.patch.object
        enter(replaced(config, "arch_of", lambda device: arch))
        enter(replaced(operators, "plain", lambda *values: True))
        enter(replaced(TritonBackend, "why_not", lambda *_: None))
        enter(nckernels.use_backend("triton"))
        yield
