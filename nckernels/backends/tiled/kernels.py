"""What a backend of fused kernels implements: one method a kernel.

Every kernel writes to tensors that its caller has allocated. ``a_p`` below is the sum of the gradient's
entries times the normalised rows of Q, see ``triton/grad.py`` or ``csrc/cuda/gradient.h`` for the algebra.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from ..base import Inputs, Spec, norm_eps
from ..quack import Product
from .plan import Blocks
from .sides import Result, Side, plain

Partial = tuple[Tensor, Tensor] | tuple[None, None]
"""Largest logits and sums relative to them, (parts, slots) each; or nothing of the kind."""


def tf32() -> bool:
    """Whether torch is set to round float32 operands of matrix products to tf32, by any of its three ways."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


class Kernels(ABC):
    """The kernels of a backend, ready for one call."""

    index_dtype: ClassVar[torch.dtype]
    """Of the list of classes that occur."""

    def __init__(self, inputs: Inputs, spec: Spec) -> None:
        self.inputs = plain(inputs, spec)
        self.spec = spec
        self.beta = inputs.inv_temperature
        self.eps = norm_eps(inputs.features.dtype)
        half = inputs.features.dtype == torch.float16
        self.norm_limit = 0.999999 / self.eps if half else 0.0
        """Inverse norms from here on belong to rows shorter than eps; 0 where it does not matter."""

    def matmul(self, a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
        """``out = a @ b`` (+ out) with a float32 result, by the vendor's library."""
        if a.dtype != torch.float32 and a.device.type == "cpu":
            a, b = a.float(), b.float()  # in the interpreter and in the emulation
        if a.dtype == torch.float32:
            torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)
        elif torch.version.hip is not None:
            product = torch.mm(a, b)
            out.add_(product) if accumulate else out.copy_(product)
        # The library's own float32 output: nothing is rounded to half precision between panels.
        elif accumulate:
            torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
        else:
            torch.mm(a, b, out_dtype=torch.float32, out=out)

    # --- O(M d) and O(K)

    @abstractmethod
    def row_rnorm(self, x: Tensor, rnorm: Tensor, label: Tensor | None) -> None:
        """``rnorm[i] = 1 / max(|x[i]|, eps)``; where ``label[i]`` is ``ignore_index`` -1, or ``NOT_FINITE``."""

    @abstractmethod
    def prepare_samples(self, z_rnorm: Tensor, pos: Tensor, w_rnorm: Tensor | None, mark: Tensor | None) -> None:
        """Every sample's inverse norm and positive logit; where it is ignored -1, or ``NOT_FINITE``, and 0. With
        ``w_rnorm`` also the inverse norms of all that is someone's positive, and where features are compared with
        themselves those of all samples that are not ignored. With ``mark`` also ``mark[class] = class`` for the
        classes that occur."""

    @abstractmethod
    def compact(self, mark: Tensor, rank: Tensor, present: Tensor, k: int, slots: int) -> None:
        """``present``: the marked classes in ascending order, then -1 up to ``slots``, then their number.
        ``rank`` is the inclusive prefix sum of ``mark >= 0``."""

    @abstractmethod
    def half_scale(self, samples: Side, classes: Side, scale: Tensor) -> None:
        """Powers of two that bring float16 entries to the top of their range: for entries that carry the
        prototypes' norms, the samples' norms, and both."""

    # --- the forward pass

    @abstractmethod
    def lse_blocks(self, p: Side, q: Side, both: bool) -> Blocks:
        """For ``log_sum_exp``; ``both``: in the two directions at once."""

    @abstractmethod
    def log_sum_exp(
        self, p: Side, q: Side, out: Tensor | None, p_partial: Partial, q_partial: Partial,
        first: int, count: int, split: int, blocks: Blocks,
    ) -> None:  # fmt: skip
        """Log-sum-exp over q of the anchor blocks [first, first + count): into ``out``, or in ``split``
        partials. With ``q_partial`` the same tiles also give each anchor block's contribution to the
        log-sum-exp of q's rows, from part 1 on."""

    @abstractmethod
    def combine(self, partial: Partial, side: Side, out: Tensor, first: int, parts: int, keep: bool) -> None:
        """``out``: the log-sum-exp of the partials [first, parts); with ``keep`` they also become part 0."""

    # --- the backward pass

    @abstractmethod
    def short_blocks(self, samples: Side, classes: Side) -> Blocks | None:
        """For ``short_grad``; None where rows are too long for it: then panels of entries are used."""

    @abstractmethod
    def short_grad(
        self, result: Result, q: Side, part: Tensor | None, scale: Tensor | None, split: int, blocks: Blocks
    ) -> None:
        """One side's gradient, accumulated on the chip; or ``split`` partial sums ``part`` of a_p."""

    @abstractmethod
    def entries(
        self, p: Side, q: Side, h: Tensor, start: int, stop: int, begin: int, end: int, scale: Tensor | None
    ) -> None:
        """The gradient's entries times both inverse norms for p's slots [start, stop), q's [begin, end)."""

    @abstractmethod
    def gather(self, side: Side, out: Tensor, start: int, stop: int) -> None:
        """The rows of the slots [start, stop) as a matrix; zeros for rows that take no part."""

    @abstractmethod
    def mend(self, h: Tensor, side: Side, out: Tensor) -> None:
        """``out = h @ side.x`` over the rows that take part, if a row that takes none holds NaN or infinities: the
        library has multiplied these by the zeros in ``h``. Else ``out`` is right already and stays as it is."""

    @abstractmethod
    def finish(
        self, result: Result, sums: Tensor, start: int, stop: int, parts: int, scale: Tensor | None, norm_inside: bool
    ) -> None:
        """Gradients of the slots [start, stop) from ``parts`` float32 sums of a_p (r_p a_p if
        ``norm_inside``): add up, project, scale, cast. ``sums`` may be the gradient itself."""

    @abstractmethod
    def bias_blocks(self, p: Side, q: Side) -> Blocks:
        """For ``bias_grad``."""

    @abstractmethod
    def bias_grad(self, p: Side, q: Side, part: Tensor, split: int, blocks: Blocks) -> None:
        """``split`` partial sums of the gradient of p's bias, which sits in the log-sum-exps of q's rows."""


class StepKernels(Kernels):
    """What loss and gradient in one step take besides: see ``step.py``."""

    @abstractmethod
    def shares(
        self, weight: Tensor | None, share: Tensor, pos_grad: Tensor, of_class: Tensor | None, part: Tensor
    ) -> None:
        """Every sample's weight, 0 where ignored, its negative, the weights' sums by class, added to zeros, and
        ``part`` (2, blocks): the blocks' sums and their numbers of samples that count."""

    @abstractmethod
    def divisor(self, part: Tensor, out: Tensor, nothing_is_zero: bool) -> None:
        """What a mean divides its gradients by, and its sum."""

    @abstractmethod
    def panel_split(self, anchors: int, others: int) -> int:
        """Thread blocks that share their anchors in ``panel_log_sum_exp``."""

    @abstractmethod
    def panel_log_sum_exp(
        self, p: Side, q: Side, products: Tensor, partial: tuple[Tensor, Tensor], start: int, stop: int
    ) -> None:
        """(split, stop - start) largest logits and sums relative to them of p's slots [start, stop), from their
        products with all of q."""

    @abstractmethod
    def panel_entries(
        self, p: Side, q: Side, products: Tensor, partial: tuple[Tensor, Tensor], h: Tensor,
        start: int, stop: int, scale: Tensor | None,
    ) -> None:  # fmt: skip
        """As ``entries`` for all of q, from the products; also the log-sum-exps ``p.lse`` of p's slots. ``h`` may be
        ``products``."""

    # --- around a product with an epilogue, see ``engines.py``

    def epilogue_product(self) -> tuple[Product, float] | None:
        """The product and beta, where the device and the problem are such that there is one."""
        return None

    @abstractmethod
    def epilogue_operand(
        self, side: Side, scale: Tensor, tag: Tensor | None, slot: Tensor | None, anchors: bool
    ) -> None:
        """What the epilogue knows of a side's slots, see :class:`quack.Operand`. ``slot[row]``: the slot of a row."""

    @abstractmethod
    def epilogue_weights(self, p: Side, sums: Tensor, weight: Tensor, start: int, stop: int) -> None:
        """From the sums (stop - start, parts) of p's slots [start, stop): log-sum-exps ``p.lse``, and what turns
        exponentials into entries."""

    @abstractmethod
    def weighted_entries(self, p: Side, weight: Tensor, h: Tensor, start: int, stop: int) -> None:
        """Exponentials become entries, but for positives, in place."""

    @abstractmethod
    def positives(
        self, p: Side, q: Side, pos: Tensor, weight: Tensor, slot: Tensor | None, h: Tensor, start: int, stop: int
    ) -> None:
        """Entries of the samples' positives, ``pos`` their logits, for p's slots [start, stop)."""

    @abstractmethod
    def loss(self, share: Tensor, lse: Tensor, pos: Tensor, part: Tensor, divisor: Tensor | None, out: Tensor) -> None:
        """The samples' shares of ``lse - pos``, added up and divided. ``part`` (blocks,) is scratch."""
