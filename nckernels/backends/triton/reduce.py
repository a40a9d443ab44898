"""The reduction of the samples' losses to one number: shares, their sum, and the factor of the backward pass.

All kernels are O(M), except ``scale_kernel``. Sums are taken in a fixed order, except that the shares of a class are
added by atomics. Without weights of single samples these shares are equal numbers, whose order does not matter; with
such weights the sum of a class can differ in its last bits from run to run.
"""

import triton
import triton.language as tl

from .tiles import INF


@triton.jit(do_not_specialize=["m", "k", "skip"])
def share_kernel(Target, Weight, Share, Pos_grad, Of_class, Part, m, k, skip, B: tl.constexpr):
    """``Share[j]``: the weight of sample j, 0 if it is ignored. ``Pos_grad``: its negative.

    ``Of_class[c]``, initially zero, becomes the sum over the samples of class c. ``Part[0, block]`` and
    ``Part[1, block]`` are a block's sum and its number of samples that are not ignored.
    """
    block = tl.program_id(0)
    sample = block * B + tl.arange(0, B)
    inside = sample < m
    target = tl.load(Target + sample, mask=inside, other=skip)
    valid = (target != skip) & (target >= 0) & (target < k)
    share = tl.where(valid, 1.0, 0.0)
    if Weight is not None:
        share = tl.load(Weight + sample, mask=valid, other=0.0)
    tl.store(Share + sample, share, mask=inside)
    tl.store(Pos_grad + sample, -share, mask=inside)
    if Of_class is not None:
        tl.atomic_add(Of_class + target, share, mask=valid, sem="relaxed")
    tl.store(Part + block, tl.sum(share, 0))
    tl.store(Part + tl.num_programs(0) + block, tl.sum(tl.where(valid, 1.0, 0.0), 0))


@triton.jit
def sum_of(X, n, B: tl.constexpr):
    """The sum of n numbers, by one program."""
    total = tl.zeros((B,), tl.float32)
    for i in range(0, n, B):
        index = i + tl.arange(0, B)
        total += tl.load(X + index, mask=index < n, other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["n"])
def divisor_kernel(Part, Divisor, n, NOTHING_IS_ZERO: tl.constexpr, B: tl.constexpr):
    """The divisors of a mean: ``Divisor[0]`` of the gradients, ``Divisor[1]`` of the sum.

    If all samples are ignored, the gradients are 0, and the mean is NaN, or 0 with ``NOTHING_IS_ZERO``.
    """
    total = sum_of(Part, n, B)
    none = sum_of(Part + n, n, B) == 0.0
    if NOTHING_IS_ZERO:
        total = tl.where(total == 0.0, 1.0, total)
    tl.store(Divisor, tl.where(none, 1.0, total))
    tl.store(Divisor + 1, total)


@triton.jit(do_not_specialize=["m", "k", "skip"])
def loss_kernel(Target, Share, Lse, Pos, Part, m, k, skip, BY_CLASS: tl.constexpr, B: tl.constexpr):
    """``Part[block]``: a block's sum of share times ``lse - pos``, where the lse of an empty set counts as 0."""
    sample = tl.program_id(0) * B + tl.arange(0, B)
    target = tl.load(Target + sample, mask=sample < m, other=skip)
    valid = (target != skip) & (target >= 0) & (target < k)
    anchor = sample
    if BY_CLASS:
        anchor = target.to(tl.int32)
    lse = tl.load(Lse + anchor, mask=valid, other=0.0)
    loss = tl.where(lse == -INF, 0.0, lse) - tl.load(Pos + sample, mask=valid, other=0.0)
    share = tl.load(Share + sample, mask=valid, other=0.0)
    tl.store(Part + tl.program_id(0), tl.sum(share * loss, 0))


@triton.jit(do_not_specialize=["n"])
def loss_sum_kernel(Part, Divisor, Loss, n, B: tl.constexpr):
    """The loss from the partial sums."""
    loss = sum_of(Part, n, B)
    if Divisor is not None:
        loss /= tl.load(Divisor + 1)
    tl.store(Loss, loss)


@triton.jit
def scale_kernel(X, Factor, Out, n, IN_PLACE: tl.constexpr, B: tl.constexpr):
    """``Out = X * Factor``. In place with a factor of 1, as in ``loss.backward()``, it does nothing."""
    factor = tl.load(Factor).to(tl.float32)
    if IN_PLACE:
        if factor == 1.0:
            return
    index = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    x = tl.load(X + index, mask=index < n, other=0.0).to(tl.float32)
    tl.store(Out + index, (x * factor).to(Out.dtype.element_ty), mask=index < n)
