"""Row norms, positives, and the list of classes that occur: what is O(M d) or O(K) in two passes.

The similarity of two rows is ``S = (z . w) r_z r_w`` with ``r = 1 / max(|row|, eps)``. Storing the two
vectors ``r`` instead of normalised copies of the matrices saves a write and a read of both, and the
tensor cores multiply the caller's numbers without rounding. For both passes in one call see prepare.py.
"""

import triton
import triton.language as tl

from .tiles import INF, LN2, NOT_FINITE, logit_scale


@triton.jit
def inverse_norm(square_sum, EPS: tl.constexpr):
    # The maximum must propagate NaN (by default it returns the other operand): NaN rows give NaN results.
    rnorm = 1.0 / tl.maximum(tl.sqrt(square_sum), EPS, propagate_nan=tl.PropagateNan.ALL)
    if EPS > 1e-6:  # float16, where ``summand_rnorm`` tells zero rows by a norm that is larger than any other's
        rnorm = tl.where(square_sum == 0.0, 1.000002 / EPS, rnorm)
    return rnorm


@triton.jit
def left_out(square_sum):
    """Stored instead of the inverse norm of a left-out row; see ``mend_kernel``."""
    return tl.where(square_sum < INF, -1.0, NOT_FINITE)


@triton.jit
def square_sums(X, row, inside, d, stride, BR: tl.constexpr, BD: tl.constexpr):
    """The square sums of some rows."""
    col = tl.arange(0, BD)
    ptr = X + row.to(tl.int64)[:, None] * stride + col[None, :]
    # One running sum per column, reduced across threads once at the end.
    total = tl.zeros((BR, BD), tl.float32)
    for k in range(0, d, BD):
        x = tl.load(ptr + k, mask=inside[:, None] & (col < d - k)[None, :], other=0.0).to(tl.float32)
        total = tl.fma(x, x, total)
    return tl.sum(total, 1)


@triton.jit
def with_partners(
    Z, W, row, inside, partner, valid, beta, d, z_stride, w_stride,
    EPS: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The square sums of some samples, their inverse norms and those of their partners, and the logits of the two, in
    one pass over both."""
    col = tl.arange(0, BD)
    z_ptr = Z + row.to(tl.int64)[:, None] * z_stride + col[None, :]
    w_ptr = W + partner.to(tl.int64)[:, None] * w_stride + col[None, :]
    zz = tl.zeros((BR, BD), tl.float32)
    ww = tl.zeros((BR, BD), tl.float32)
    zw = tl.zeros((BR, BD), tl.float32)
    for step in range(0, d, BD):
        columns = (col < d - step)[None, :]
        z = tl.load(z_ptr + step, mask=inside[:, None] & columns, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + step, mask=valid[:, None] & columns, other=0.0).to(tl.float32)
        zz = tl.fma(z, z, zz)
        ww = tl.fma(w, w, ww)
        zw = tl.fma(z, w, zw)
    z_square = tl.sum(zz, 1)
    r_z = inverse_norm(z_square, EPS)
    r_w = inverse_norm(tl.sum(ww, 1), EPS)
    logit = tl.sum(zw, 1) * (logit_scale(r_z, beta, True) * r_w) * LN2
    return z_square, r_z, r_w, logit


@triton.jit(do_not_specialize=["n", "d", "stride", "skip"])
def row_rnorm_kernel(
    X, Label, Rnorm, n, d, stride, skip, UNIT: tl.constexpr, EPS: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """``Rnorm[i] = 1 / max(|X[i]|, EPS)``, ``left_out`` for rows that ``Label`` leaves out; a program takes BR rows."""
    d *= UNIT
    stride *= UNIT
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    inside = row < n
    if Label is not None:
        valid = tl.load(Label + row, mask=inside, other=skip) != skip
    square_sum = square_sums(X, row, inside, d, stride, BR, BD)
    rnorm = inverse_norm(square_sum, EPS)
    if Label is not None:
        rnorm = tl.where(valid, rnorm, left_out(square_sum))
    tl.store(Rnorm + row, rnorm, mask=inside)


@triton.jit
def positives_of(target, k, skip):
    """Whether samples are not ignored, and the rows of their positive prototypes; asserts that these exist."""
    in_range = (target >= 0) & (target < k)
    tl.device_assert(in_range | (target == skip), "target is out of range [0, number of prototypes)")
    # A failing assertion does not stop the program immediately: the mask keeps the loads in bounds.
    valid = (target != skip) & in_range
    return valid, tl.where(valid, target, 0).to(tl.int32)


@triton.jit(do_not_specialize=["m", "k", "d", "z_stride", "w_stride", "skip"])
def prepare_samples_kernel(
    Z, W, Target, Beta,
    Z_rnorm, Pos, W_rnorm, Mark,
    m, k, d, z_stride, w_stride, skip,
    SAME_LABEL: tl.constexpr, ITSELF: tl.constexpr,
    UNIT: tl.constexpr, EPS: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One pass over the samples and their positive prototypes, their *partners*.

    For each sample it writes the inverse norm and the positive logit ``beta cos(z, w_partner)``; for an ignored sample
    ``left_out`` and 0, so that it does not affect the scale of float16 gradients. The partner's norm comes from the
    same loads, so no pass over the prototypes is needed first. ``W_rnorm``, if given, gets the norms of the partners;
    with ``ITSELF``, where prototypes are the samples, also those of all samples that are not ignored. ``Mark``, if
    given (only the classes that occur are wanted), gets ``Mark[class] = class``. All programs that write to one place
    write the same value, so their order does not matter.

    The kernel is launched with Triton's debug option, which compiles the assertions.
    """
    beta = tl.load(Beta)
    tl.device_assert((beta > 0) & (beta < INF), "the inverse temperature must be positive and finite")
    d *= UNIT
    z_stride *= UNIT
    w_stride *= UNIT
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    inside = row < m
    target = tl.load(Target + row, mask=inside, other=skip)
    if SAME_LABEL:
        valid = target != skip
        partner = row
    else:
        valid, partner = positives_of(target, k, skip)

    z_square, r_z, r_w, logit = with_partners(
        Z, W, row, inside, partner, valid, beta, d, z_stride, w_stride, EPS, BR, BD
    )  # fmt: skip
    tl.store(Z_rnorm + row, tl.where(valid, r_z, left_out(z_square)), mask=inside)
    tl.store(Pos + row, tl.where(valid, logit, 0.0), mask=inside)
    if Mark is not None:
        tl.store(Mark + partner, partner, mask=valid)
    if W_rnorm is not None:
        tl.store(W_rnorm + partner, r_w, mask=valid)
        if ITSELF:
            tl.store(W_rnorm + row, r_z, mask=valid)


@triton.jit(do_not_specialize=["k", "slots"])
def compact_kernel(Rank, Slot, k, slots, B: tl.constexpr):
    """Write the marked classes in ascending order, then -1 up to ``slots``, then their number.

    ``Rank`` is the number of marked classes up to each class. Requires ``slots <= k`` and at most ``slots`` marks.
    """
    c = tl.program_id(0) * B + tl.arange(0, B)
    rank = tl.load(Rank + c, mask=c < k, other=0)
    marked = rank > tl.load(Rank + c - 1, mask=(c > 0) & (c < k), other=0)
    count = tl.load(Rank + k - 1)
    # The two stores do not overlap: marked classes go to slots before `count`, the padding to those after.
    tl.store(Slot + rank - 1, c, mask=marked)
    tl.store(Slot + c, -1, mask=(c >= count) & (c < slots))
    if tl.program_id(0) == 0:
        tl.store(Slot + slots, count)


@triton.jit
def largest(X, Lse, n, B: tl.constexpr):
    """max |X|, without empty sets (lse = -inf), infinities and NaN."""
    best = tl.zeros((B,), tl.float32)
    for i in range(0, n, B):
        index = i + tl.arange(0, B)
        x = tl.abs(tl.load(X + index, mask=index < n, other=0.0))
        keep = x < INF
        if Lse is not None:
            keep = keep & (tl.load(Lse + index, mask=index < n, other=-INF) > -INF)
        best = tl.maximum(best, tl.where(keep, x, 0.0))
    return tl.max(best, 0)


@triton.jit
def largest_rnorm(Rnorm, n, limit, B: tl.constexpr):
    """The largest factor of a row's entries, see ``summand_rnorm``, without left-out rows (negative norms)."""
    best = tl.zeros((B,), tl.float32)
    for i in range(0, n, B):
        index = i + tl.arange(0, B)
        r = tl.load(Rnorm + index, mask=index < n, other=0.0)
        best = tl.maximum(best, tl.where(r < limit, r, tl.where(r >= limit, 1.0, 0.0)))
    best = tl.max(best, 0)
    return tl.where(best > 0, best, 1.0)


@triton.jit(do_not_specialize=["m", "k"])
def half_scale_kernel(
    Class_grad, Class_lse, Instance_grad, Instance_lse, Pos_grad, Z_rnorm, W_rnorm, Divisor, Scale,
    m, k, LIMIT: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """``Scale[0..2]``: powers of two that scale float16 tiles of the gradient to the top of their range.

    The entries ``A r`` are of the size of the upstream gradients, usually 1 / M, times a softmax probability, and would
    underflow in float16. No entry of A exceeds the sum of the largest upstream gradients. With the largest inverse
    norms, the scale therefore brings every ``A r`` to at most 2^14, a quarter of float16's range (2^15 where two
    samples are each other's positives). [0] is for tiles multiplied by r_w, [1] by r_z, [2] by both. Zero rows
    (r >= LIMIT) count as 1, see ``summand_rnorm`` in finish.py. [2] does not make room for the entries of two rows
    shorter than eps, see ``in_range``. Runs as one program.
    """
    bound = 0.0
    if Class_grad is not None:
        bound += largest(Class_grad, Class_lse, k, B)
    if Instance_grad is not None:
        bound += largest(Instance_grad, Instance_lse, m, B)
    if Pos_grad is not None:
        bound += largest(Pos_grad, None, m, B)
    if Divisor is not None:
        bound *= tl.load(Divisor + 2)
    r_z = largest_rnorm(Z_rnorm, m, LIMIT, B)
    r_w = largest_rnorm(W_rnorm, k, LIMIT, B)
    short = 0.999998 * LIMIT
    rest_z = largest_rnorm(Z_rnorm, m, short, B)
    rest_w = largest_rnorm(W_rnorm, k, short, B)
    # For upstream gradients of zero any finite scale is correct. The clamp keeps the scale finite.
    bound = tl.where(bound > 0, bound, 1.0)
    top = 14.0 - tl.log2(bound)
    tl.store(Scale, tl.exp2(tl.clamp(tl.floor(top - tl.log2(r_w)), -100.0, 100.0)))
    tl.store(Scale + 1, tl.exp2(tl.clamp(tl.floor(top - tl.log2(r_z)), -100.0, 100.0)))
    both = tl.maximum(tl.log2(r_z) + tl.log2(rest_w), tl.log2(rest_z) + tl.log2(r_w))
    tl.store(Scale + 2, tl.exp2(tl.clamp(tl.floor(top - both), -100.0, 100.0)))
