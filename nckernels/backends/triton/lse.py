"""The forward pass: log-sum-exps of similarity tiles that are never stored.

``lse_kernel`` is a matrix product whose epilogue maintains, for each anchor, the largest logit so far and
the sum of exponentials relative to it, as flash attention does. Only these two numbers per anchor leave
the chip. The pair works for any temperature; in a sum relative to the constant beta >= t every term could underflow,
for example with beta = 1000.

Logits are in base 2 inside the kernels (t * log2 e), because the hardware computes exp2.
"""

import triton
import triton.language as tl

from .tiles import (
    INF,
    LN2,
    in_base_2,
    load_rows,
    logit_factors,
    logit_scale,
    row_bias,
    slot_rows,
    summed_rows,
    tile_products,
)


@triton.jit
def shift_of(largest):
    """The maximum to subtract: 0 for an empty set, where -inf - -inf would be NaN."""
    return tl.where(largest == -INF, 0.0, largest)


@triton.jit
def log_sum(Out, Ratio, at, mask, largest, total):
    """The natural log-sum-exp ``Out[at]``, and ``Ratio[at] = exp(Out[at]) / sum of the exponentials``, if wanted.

    The ratio is 1 but for the rounding of ``Out``, which is an error of every probability ``exp(t - lse)``. It would
    matter where a probability is near 1, and 1 is subtracted. The backward pass multiplies by the ratio.
    """
    lse = (largest + tl.log2(total)) * LN2  # empty: -inf + log2(0) = -inf
    tl.store(Out + at, lse, mask=mask)
    if Ratio is not None:
        tl.store(Ratio + at, 1.0 / (total * tl.exp2(largest - in_base_2(lse))), mask=mask)


@triton.jit
def without_excluded(t, p_tag, q_tag, p_first, q_first, EXCLUDE: tl.constexpr):
    """Logits with -inf in excluded entries.

    "self" compares offsets from the diagonal: comparing row numbers would take registers that two programs on a
    multiprocessor do not have.
    """
    if EXCLUDE == "self":
        p_slot = tl.arange(0, t.shape[0]) + (p_first - q_first)
        t = tl.where(p_slot[:, None] == tl.arange(0, t.shape[1])[None, :], -INF, t)
    elif EXCLUDE != "none":
        t = tl.where(p_tag[:, None] == q_tag[None, :], -INF, t)
    return t


@triton.jit(
    do_not_specialize=[
        "first_block", "n_p", "n_q", "slots_p", "d", "p_stride", "q_stride", "skip_p", "skip_q", "split",
    ]
)  # fmt: skip
def lse_kernel(
    P, P_rnorm, P_label, P_bias, P_count,
    Q, Q_rnorm, Q_label, Q_bias,
    Beta,
    Out, Ratio, P_max, P_sum, Q_max, Q_sum,
    first_block, n_p, n_q, slots_p, d, p_stride, q_stride, skip_p, skip_q, split,
    EXCLUDE: tl.constexpr, P_SAMPLES: tl.constexpr, P_GATHER: tl.constexpr,
    BP: tl.constexpr, BQ: tl.constexpr, BD: tl.constexpr, UNIT: tl.constexpr,
    WHOLE_D: tl.constexpr, EVEN_D: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Block ``pid // split`` of the anchors against the Q blocks ``pid % split``, + split, + 2 split, ...

    Programs that run at the same time read neighbouring blocks of both operands, which stay in the L2 cache. The number
    of partial results is ``split`` per anchor for any size of Q.

    Results for the anchors: ``Out`` and ``Ratio`` (see ``log_sum``; split = 1) or the partials ``P_max[s, slot]`` and
    ``P_sum[s, slot]``. With ``Q_max`` the same tiles also serve the other direction: each program
    writes what its anchors contribute to every row of Q, ``Q_max[1 + block, slot]`` (row 0 belongs to
    ``combine_kernel``).
    """
    d *= UNIT
    p_stride *= UNIT
    q_stride *= UNIT
    B: tl.constexpr = BQ // PARTS
    block = tl.program_id(0) // split
    part = tl.program_id(0) % split
    p_first = (first_block + block) * BP
    if P_count is not None:
        n_p = tl.load(P_count)  # how many slots are in use is known on the device only
        if p_first >= n_p:
            return
    p_row, p_valid, p_tag, p_rnorm = summed_rows(
        P_rnorm, P_label, p_first, n_p, skip_p, EXCLUDE, P_SAMPLES, P_GATHER, BP
    )
    beta = tl.load(Beta)
    EXACT: tl.constexpr = P.dtype.element_ty == tl.float32 and PRECISION != "tf32"
    p_scale = logit_scale(p_rnorm, beta, P_SAMPLES or not EXACT)
    p = None
    if WHOLE_D:
        p = load_rows(P, p_row, p_valid, p_stride, d, BD, EVEN_D)
    largest = tl.full((BP,), -INF, tl.float32)
    total = tl.zeros((BP,), tl.float32)

    for q_block in range(part, tl.cdiv(n_q, BQ), split):
        q_first = q_block * BQ
        products = tile_products(
            p, P, p_row, p_valid, p_stride, Q, Q_label, q_first, n_q, q_stride, skip_q, d,
            False, BQ, BD, WHOLE_D, EVEN_D, PARTS, PRECISION,
        )  # fmt: skip
        for i in tl.static_range(PARTS):
            row, valid, tag, rnorm = summed_rows(
                Q_rnorm, Q_label, q_first + i * B, n_q, skip_q, EXCLUDE, not P_SAMPLES, False, B
            )
            x, y = logit_factors(products[i], p_scale, logit_scale(rnorm, beta, EXACT and not P_SAMPLES), EXACT)
            # One fused multiply-add for scale, bias and mask: the bias of left-out rows is -inf.
            t = tl.fma(x, y, row_bias(Q_bias, row, valid)[None, :])
            t = without_excluded(t, p_tag, tag, p_first, q_first + i * B, EXCLUDE)
            new = tl.maximum(largest, tl.max(t, 1))
            shift = shift_of(new)
            total = tl.fma(total, tl.exp2(largest - shift), tl.sum(tl.exp2(t - shift[:, None]), 1))
            largest = new
            if Q_max is not None:
                t = tl.fma(x, y, row_bias(P_bias, p_row, p_valid)[:, None])
                t = without_excluded(t, p_tag, tag, p_first, q_first + i * B, EXCLUDE)
                q_largest = tl.max(t, 0)
                q_total = tl.sum(tl.exp2(t - shift_of(q_largest)[None, :]), 0)
                slot = q_first + i * B + tl.arange(0, B)
                at = (1 + block).to(tl.int64) * n_q + slot
                tl.store(Q_max + at, tl.where(valid, q_largest, -INF), mask=slot < n_q)
                tl.store(Q_sum + at, tl.where(valid, q_total, 0.0), mask=slot < n_q)

    # Left-out anchors have products of zero with the rows of Q, and their sums are discarded.
    largest = tl.where(p_valid, largest, -INF)
    total = tl.where(p_valid, total, 0.0)
    slot = p_first + tl.arange(0, BP)
    if Out is not None:
        if P_GATHER:
            log_sum(Out, Ratio, p_row, p_valid, largest, total)
        else:
            log_sum(Out, Ratio, slot, slot < n_p, largest, total)
    else:
        at = part.to(tl.int64) * slots_p + slot
        tl.store(P_max + at, largest, mask=slot < n_p)
        tl.store(P_sum + at, total, mask=slot < n_p)


@triton.jit(do_not_specialize=["first", "parts", "n", "skip"])
def combine_kernel(
    Max, Sum, Label, Count, Out, Ratio, first, parts, n, skip,
    GATHER: tl.constexpr, KEEP: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """``Out[row of slot]`` and ``Ratio``: ``log_sum`` of the partials ``first <= part < parts``, in a fixed order.

    With ``KEEP`` the combined pair replaces part 0, where the next panel of anchors finds it.
    """
    used = n
    if Count is not None:
        used = tl.load(Count)
    slot = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = slot < used
    largest = tl.full((BN,), -INF, tl.float32)
    total = tl.zeros((BN,), tl.float32)
    for part in range(first, parts, BR):
        index = part + tl.arange(0, BR)
        at = index.to(tl.int64)[:, None] * n + slot[None, :]
        mask = (index < parts)[:, None] & inside[None, :]
        new_max = tl.load(Max + at, mask=mask, other=-INF)
        new_sum = tl.load(Sum + at, mask=mask, other=0.0)
        new = tl.maximum(largest, tl.max(new_max, 0))
        shift = shift_of(new)
        total = tl.fma(total, tl.exp2(largest - shift), tl.sum(new_sum * tl.exp2(new_max - shift[None, :]), 0))
        largest = new
    if KEEP:
        tl.store(Max + slot, largest, mask=inside)
        tl.store(Sum + slot, total, mask=inside)
    row, _, valid = slot_rows(Label, tl.program_id(0) * BN, used, skip, GATHER, BN)
    if GATHER:
        log_sum(Out, Ratio, row, valid, largest, total)
    else:
        log_sum(Out, Ratio, slot, inside, largest, total)
