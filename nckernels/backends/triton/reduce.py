"""The reduction of the samples' losses to one number, by one program each, and the factor of the backward pass.

Sums are taken in a fixed order. The sums of the weights by class are added by atomics in ``prepare_step_kernel``.
Without weights of single samples these are equal numbers, whose order does not matter. With such weights the sum of a
class can differ in its last bits from run to run, and ``tiled.step.prepared`` adds them in order where deterministic
algorithms are asked for.
"""

import triton
import triton.language as tl

from .tiles import INF


@triton.jit
def sum_of(X, n, B: tl.constexpr):
    """The sum of n numbers, by one program."""
    total = tl.zeros((B,), tl.float32)
    for i in range(0, n, B):
        index = i + tl.arange(0, B)
        total += tl.load(X + index, mask=index < n, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def power_of(size):
    """A power of two that brings a positive number to between 1 and 2; 1 for others."""
    size = tl.where((size > 0) & (size < INF), size, 1.0)
    return tl.exp2(-tl.floor(tl.clamp(tl.log2(size), -126.0, 126.0)))


@triton.jit
def write_divisors(Target, Weight, Divisor, m, k, skip, NOTHING_IS_ZERO: tl.constexpr, B: tl.constexpr):
    """The divisors of a mean: ``Divisor[0]`` of the gradients, ``Divisor[1]`` of the sum.

    The gradients' entries are multiplied by ``Divisor[2]``, a power of two, and ``Divisor[0]`` is what remains: between
    1 and 2. Without it the entries of tiny weights would underflow, multiplied by the inverse norms of long rows.

    If all samples are ignored, the gradients are 0, and the mean is NaN, or 0 with ``NOTHING_IS_ZERO``.
    """
    sums = tl.zeros((B,), tl.float32)
    found = tl.zeros((B,), tl.int32)
    for first in range(0, m, B):
        sample = first + tl.arange(0, B)
        target = tl.load(Target + sample, mask=sample < m, other=skip)
        valid = (target != skip) & (target >= 0) & (target < k)
        found |= valid.to(tl.int32)
        if Weight is not None:
            sums += tl.load(Weight + sample, mask=valid, other=0.0)
        else:
            sums += tl.where(valid, 1.0, 0.0)
    total = tl.sum(sums, 0)
    if NOTHING_IS_ZERO:
        total = tl.where(total == 0.0, 1.0, total)
    of_gradients = tl.where(tl.max(found, 0) == 0, 1.0, total)
    factor = power_of(of_gradients)
    tl.store(Divisor, of_gradients * factor)
    tl.store(Divisor + 1, total)
    tl.store(Divisor + 2, factor)


@triton.jit
def write_loss(Target, Share, Lse, Other_lse, Pos, Divisor, Loss, m, k, skip, BY_CLASS: tl.constexpr, B: tl.constexpr):
    """The sum of share times ``lse - pos``, where the lse of an empty set counts as 0, or the mean.

    ``Other_lse``, if given, are the log-sum-exps of the samples beside those of their classes; the lse is their mean.
    """
    sums = tl.zeros((B,), tl.float32)
    for first in range(0, m, B):
        sample = first + tl.arange(0, B)
        target = tl.load(Target + sample, mask=sample < m, other=skip)
        valid = (target != skip) & (target >= 0) & (target < k)
        anchor = sample
        if BY_CLASS:
            anchor = target.to(tl.int32)
        lse = tl.load(Lse + anchor, mask=valid, other=0.0)
        lse = tl.where(lse == -INF, 0.0, lse)
        if Other_lse is not None:
            other = tl.load(Other_lse + sample, mask=valid, other=0.0)
            lse = 0.5 * (lse + tl.where(other == -INF, 0.0, other))
        loss = lse - tl.load(Pos + sample, mask=valid, other=0.0)
        sums += tl.load(Share + sample, mask=valid, other=0.0) * loss
    total = tl.sum(sums, 0)
    if Divisor is not None:
        total /= tl.load(Divisor + 1)
    tl.store(Loss, total)


@triton.jit(do_not_specialize=["m", "k", "skip"])
def loss_kernel(
    Target, Share, Lse, Other_lse, Pos, Divisor, Loss, m, k, skip, BY_CLASS: tl.constexpr, B: tl.constexpr
):  # fmt: skip
    """The loss, by one program."""
    write_loss(Target, Share, Lse, Other_lse, Pos, Divisor, Loss, m, k, skip, BY_CLASS, B)


@triton.jit
def scale_block(X, Out, factor, block, n, B: tl.constexpr):
    """A block of ``Out = X * factor``; without ``Out`` in place, where a factor of 1 changes nothing."""
    index = block.to(tl.int64) * B + tl.arange(0, B)
    if Out is None:
        if factor != 1.0:
            x = tl.load(X + index, mask=index < n, other=0.0).to(tl.float32)
            tl.store(X + index, (x * factor).to(X.dtype.element_ty), mask=index < n)
    else:
        x = tl.load(X + index, mask=index < n, other=0.0).to(tl.float32)
        tl.store(Out + index, (x * factor).to(Out.dtype.element_ty), mask=index < n)


@triton.jit(do_not_specialize=["x_blocks", "y_blocks"])
def scale_kernel(Factor, X, Y, Z, X_out, Y_out, Z_out, n_x, n_y, n_z, x_blocks, y_blocks, B: tl.constexpr):
    """``X_out = X * Factor``, and the same for ``Y`` and ``Z``, which may be missing; without an output in place."""
    factor = tl.load(Factor).to(tl.float32)
    block = tl.program_id(0)
    if block < x_blocks:
        scale_block(X, X_out, factor, block, n_x, B)
    elif block < x_blocks + y_blocks:
        if Y is not None:
            scale_block(Y, Y_out, factor, block - x_blocks, n_y, B)
    elif Z is not None:
        scale_block(Z, Z_out, factor, block - x_blocks - y_blocks, n_z, B)
