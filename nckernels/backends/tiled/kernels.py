"""The interface that a GPU backend implements: one method per kernel.

Every kernel writes to tensors that its caller has allocated. ``a_p`` below is the sum of the gradient's
entries times the normalised rows of Q; see ``triton/grad.py`` or ``csrc/cuda/gradient.h`` for the algebra.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..base import Inputs, Spec, norm_eps
from ..quack import Product
from .plan import Blocks
from .sides import Result, Side, plain

Partial = tuple[Tensor, Tensor] | tuple[None, None]
"""Partial log-sum-exps: largest logits and sums relative to them, (parts, slots) each; or none."""


def tf32() -> bool:
    """Whether torch is set, by any of its three switches, to round float32 operands of matrix products to tf32."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


class Kernels(ABC):
    """The kernels of a backend, ready for one call."""

    index_dtype: ClassVar[torch.dtype]
    """The dtype of the list of classes that occur."""

    def __init__(self, inputs: Inputs, spec: Spec) -> None:
        self.inputs = plain(inputs, spec)
        self.spec = spec
        self.beta = inputs.inv_temperature
        self.eps = norm_eps(inputs.features.dtype)
        half = inputs.features.dtype == torch.float16
        self.norm_limit = 1.000001 / self.eps if half else 0.0
        """Float16: zero rows have an inverse norm above it, 1.000002 / eps, and no other row has; 0 in other dtypes."""
        self.divisor: Tensor | None = None
        """That of a step's mean, see :class:`Vectors`."""

    def matmul(self, a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
        """``out = a @ b`` (+ out) with a float32 result, by the vendor's library."""
        if a.dtype != torch.float32 and a.device.type == "cpu":
            a, b = a.float(), b.float()  # in the interpreter and in the emulation
        if a.dtype == torch.float32:
            torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)
        elif torch.version.hip is not None:
            product = torch.mm(a, b)
            out.add_(product) if accumulate else out.copy_(product)
        # With float32 output nothing is rounded to half precision between panels.
        elif accumulate:
            torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
        else:
            torch.mm(a, b, out_dtype=torch.float32, out=out)

    # --- O(M d) and O(K)

    @abstractmethod
    def row_rnorm(self, x: Tensor, rnorm: Tensor, label: Tensor | None) -> None:
        """``rnorm[i] = 1 / max(|x[i]|, eps)``. Where ``label[i]`` is ``ignore_index``, -1, or ``NOT_FINITE`` if the row
        is not finite."""

    @abstractmethod
    def prepare_samples(self, z_rnorm: Tensor, pos: Tensor, w_rnorm: Tensor | None, mark: Tensor | None) -> None:
        """The inverse norm and positive logit of every sample; of an ignored one -1, or ``NOT_FINITE``, and 0.

        ``w_rnorm``, if given, gets the inverse norms of all positives and, where features are compared with themselves,
        of all samples that are not ignored. ``mark``, if given, gets ``mark[class] = class`` for classes that occur.
        """

    @abstractmethod
    def compact(self, rank: Tensor, present: Tensor, k: int, slots: int) -> None:
        """``present``: the marked classes in ascending order, then -1 up to ``slots``, then their number.
        ``rank`` is the number of marked classes up to each class."""

    @abstractmethod
    def half_scale(self, samples: Side, classes: Side, scale: Tensor) -> None:
        """Three powers of two that scale float16 entries to the top of the range: for entries times the prototypes'
        inverse norms, times the samples', and times both."""

    # --- the forward pass

    @abstractmethod
    def lse_blocks(self, p: Side, q: Side, both: bool) -> Blocks:
        """The blocks of ``log_sum_exp``; ``both``: for two directions at once."""

    @abstractmethod
    def log_sum_exp(
        self, p: Side, q: Side, out: Tensor | None, p_partial: Partial, q_partial: Partial,
        first: int, count: int, split: int, blocks: Blocks,
    ) -> None:  # fmt: skip
        """Log-sum-exps over q of the anchor blocks [first, first + count), into ``out`` or in ``split`` partials. With
        ``q_partial``, also the contribution of each anchor block to the log-sum-exps of q's rows, from part 1 on."""

    @abstractmethod
    def combine(self, partial: Partial, side: Side, out: Tensor, first: int, parts: int, keep: bool) -> None:
        """Combine the partials [first, parts) into the log-sum-exp ``out``; with ``keep`` also into part 0."""

    # --- the backward pass

    @abstractmethod
    def short_blocks(self, samples: Side, classes: Side) -> Blocks | None:
        """The blocks of ``short_grad``; None if rows are too long for it, so that panels of entries are used."""

    @abstractmethod
    def short_grad(
        self, result: Result, q: Side, part: Tensor | None, scale: Tensor | None, split: int, blocks: Blocks
    ) -> None:
        """One side's gradient, accumulated on the chip and divided by the divisor of a step, or ``split`` partial sums
        of a_p in ``part``, which are not."""

    @abstractmethod
    def entries(
        self, p: Side, q: Side, h: Tensor, start: int, stop: int, begin: int, end: int, scale: Tensor | None
    ) -> None:
        """The gradient's entries times both inverse norms, for p's slots [start, stop) and q's [begin, end)."""

    @abstractmethod
    def gather(self, side: Side, out: Tensor, start: int, stop: int) -> None:
        """Copy the rows of the slots [start, stop) to ``out``, with zeros in left-out rows."""

    @abstractmethod
    def mend(self, h: Tensor, side: Side, out: Tensor) -> None:
        """Recompute ``out = h @ side.x`` without the left-out rows, if one of these holds NaN or infinities, which the
        library has multiplied by the zeros in ``h``. Otherwise ``out`` is correct and is not changed."""

    @abstractmethod
    def finish(
        self, result: Result, sums: Tensor, start: int, stop: int, parts: int, scale: Tensor | None, norm_inside: bool
    ) -> None:
        """Gradients of the slots [start, stop) from ``parts`` float32 partial sums of a_p (of r_p a_p if
        ``norm_inside``): add, project, divide by ``scale`` and by the divisor, cast. ``sums`` may be the gradient
        itself."""

    @abstractmethod
    def bias_blocks(self, p: Side, q: Side) -> Blocks:
        """The blocks of ``bias_grad``."""

    @abstractmethod
    def bias_grad(self, p: Side, q: Side, part: Tensor, split: int, blocks: Blocks) -> None:
        """``split`` partial sums of the gradient of p's bias, which enters the log-sum-exps of q's rows."""


class Vectors(NamedTuple):
    """The vectors of one step. All are float32 unless stated, zeros at first, and some are longer than needed.

    Rows are *broken* if they hold NaN or infinities. The library's products multiply such rows by zeros where they are
    left out.
    """

    z_rnorm: Tensor
    """(M,): the inverse norm of every sample; if ignored -1, or ``NOT_FINITE`` if broken."""
    pos: Tensor
    """(M,): the positive logit, 0 if ignored."""
    share: Tensor
    """(M,): the weight, 0 if ignored."""
    pos_grad: Tensor
    """(M,): its negative, the upstream gradient of ``pos``."""
    lse: Tensor
    """(K,) or (M,): the log-sum-exps of the anchors, in both directions those of the classes. Like ``instance_lse`` it
    is written after the products."""
    instance_lse: Tensor | None
    """(M,): in both directions the log-sum-exps of the samples; else None."""
    instance_grad: Tensor | None
    """(M,): in both directions half of the shares, the upstream gradient of ``instance_lse``; else None."""
    w_rnorm: Tensor
    """(K,): the inverse norm of every prototype; with ``mark`` 0 for classes that do not occur."""
    beta: Tensor
    """(1,): the inverse temperature."""
    divisor: Tensor | None
    """(3,): the divisors of a mean's gradients and of its sum, and a factor of its entries; None for a sum."""
    z_broken: Tensor
    """(1,): 1 if an ignored sample is broken. ``Finish`` looks here, ``mend`` at the inverse norms."""
    w_broken: Tensor | None
    """(1,): 1 if a prototype is broken, of a class that occurs or not; None if not wanted."""
    mark: Tensor | None
    """(K,) of the kernels' ``index_dtype``: 1 for classes that occur; None if all classes take part."""
    of_class: Tensor | None
    """(K,): the sums of the weights by class, in both directions half of them; None if not wanted."""
    dot: Tensor | None
    """(slots,): the shares of one side's slots in the gradient of beta; None if not wanted."""
    loss: Tensor
    """0-dimensional: the sum of the samples' shares of ``lse - pos`` over the divisor. Not zero at first."""


Finish = Callable[[Tensor, Tensor, int, int, bool], None]
"""``finish(sums, h, start, stop, is_last)``: the gradients of the slots [start, stop) from their ``sums``, the product
of the entries h with the other side. ``is_last``: all log-sum-exps are known, and the loss is written too."""


class StepKernels(Kernels):
    """The additional kernels of loss and gradient in one step, see ``step.py``."""

    @abstractmethod
    def prepare_step(self, weight: Tensor | None, vectors: Vectors, nothing_is_zero: bool) -> None:
        """Write the vectors down to ``of_class``, but for the log-sum-exps, in one launch. From now on ``self.beta`` is
        theirs.

        ``weight``: of the samples, None for ones. ``nothing_is_zero``: a mean over no samples is 0 and not NaN.
        """

    @abstractmethod
    def finisher(self, result: Result, scale: Tensor | None, other: Side | None, vectors: Vectors) -> Finish:
        """As ``finish`` for sums of r_p a_p, in one launch a call, for all blocks of a side's rows.

        The sums are divided by ``scale`` and by the divisor. If the ``other`` side is given, its left-out rows have
        been multiplied by zeros, and if some of them are broken the sums are mended before, see ``Kernels.mend``.
        """

    @abstractmethod
    def write_loss(self, vectors: Vectors) -> None:
        """The loss alone, where no ``Finish`` writes it."""

    @abstractmethod
    def panel_split(self, anchors: int, others: int) -> int:
        """Number of thread blocks that share their anchors in ``panel_log_sum_exp``."""

    @abstractmethod
    def panel_log_sum_exp(self, p: Side, q: Side, products: Tensor, partial: Tensor, start: int, stop: int) -> None:
        """``partial``: partial log-sum-exps of p's slots [start, stop), from their products with all of q. Of its shape
        (2, split, n), n can be larger than the number of slots: a matrix of that many columns is written, row after
        row."""

    @abstractmethod
    def panel_entries(
        self, p: Side, q: Side, products: Tensor, partial: Tensor, h: Tensor, start: int, stop: int,
        scale: Tensor | None,
    ) -> None:  # fmt: skip
        """As ``entries``, for all of q, from the products. Also writes the slots' log-sum-exps to ``p.lse``. ``h`` may
        be ``products``."""

    def epilogue_product(self) -> tuple[EpilogueKernels, Product, float] | None:
        """The kernels, the product and beta of a step's :class:`EpilogueEngine`, if there is one for the device and
        the problem."""
        return None


class EpilogueKernels(StepKernels):
    """The additional kernels of a product with an epilogue, see ``engines.py``."""

    @abstractmethod
    def epilogue_operands(
        self, p: Side, p_scale: Tensor, p_tag: Tensor | None, slot: Tensor | None,
        q: Side, q_scale: Tensor, q_tag: Tensor | None,
    ) -> None:  # fmt: skip
        """The vectors of both sides' slots for the epilogue, see :class:`quack.Operand`. ``slot[row]``: the slot of a
        row of p."""

    @abstractmethod
    def weighted_entries(self, p: Side, sums: Tensor, weight: Tensor, h: Tensor, start: int, stop: int) -> None:
        """Turn exponentials into entries in place, except those of positives. The weights of p's slots [start, stop)
        come from the sums, (stop - start, parts). Also writes them, and the slots' log-sum-exps to ``p.lse``."""

    @abstractmethod
    def positives(
        self, p: Side, q: Side, pos: Tensor, weight: Tensor, slot: Tensor | None, h: Tensor, start: int, stop: int
    ) -> None:
        """Write the entries of the samples' positives, with the logits ``pos``, for p's slots [start, stop)."""
