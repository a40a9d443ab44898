"""The backward pass: gradient tiles that are recomputed, used on the chip or in a small panel, and dropped.

With ``A = dL/dt`` for the logits ``t = beta S`` and ``u = r p`` a normalised row,

    A_pq  = g_p exp(t_pq + bias_q - lse_p)      the anchors' own log-sum-exp runs over q
          + g_q exp(t_pq + bias_p - lse_q)      the other direction: q's log-sum-exp runs over p
          + g_pos where (p, q) is a positive pair, which is never masked
    a_p   = sum_q A_pq r_q q                    a matrix product on the raw rows
    dL/dp = beta r_p (a_p - (u_p . a_p) u_p)    the second term is the derivative of the norm
    dL/dbeta = sum_p u_p . a_p                  the same dot products

The projection uses ``a_p`` as accumulated, after the rounding of A. Summing A * S over a tile's entries would give
the same number in exact arithmetic, but the rounding errors in the direction of u_p, which are large where features
have collapsed, would remain in the gradient.

Where features are compared with themselves, S is symmetric. Their gradient, as rows and as columns, comes
from ``A + A^T``, whose entries have the wanted log-sum-exp on either side:

    T_ij  = g_i exp(t_ij + bias_j - lse_i) + g_j exp(t_ij + bias_i - lse_j)  + both sides' g_pos

One pass over these entries replaces two. It counts every pair twice, so it gives twice dL/dbeta.

There are two methods:

* ``grad_kernel`` for short rows: recompute a tile, multiply it with the Q rows that are on the chip anyway.
* ``entries_kernel`` for long rows, whose gradient does not fit on the chip: write ``H = A r_p r_q`` for a
  panel, let the vendor's matrix product do ``H Q`` and ``H^T P``, then ``finish_kernel`` (finish.py).
"""

import triton
import triton.language as tl

from .finish import in_range, project, summand_rnorm
from .tiles import (
    LOG2E,
    column_parts,
    dot,
    dot_rows,
    load_lse,
    load_rows,
    logit_factors,
    logit_scale,
    mask_tag,
    paired_rows,
    positive_of,
    row_bias,
    slot_rows,
)


@triton.jit
def load_terms(Bias, Lse, Ratio, Grad, Pos, Other_grad, Divisor, row, valid):
    """The vectors of one side's rows in A: bias, lse, upstream gradient, gradient of the positive logit.

    Each is loaded only if it is used; otherwise it is a placeholder that the compiler removes. The bias enters the
    log-sum-exps of the other side, so it is used if those have an upstream gradient. Gradients are multiplied by
    ``Divisor[2]``, see ``write_divisors``, before anything else: an inverse norm can be 1e12.
    """
    bias = tl.zeros(row.shape, tl.float32)
    lse = bias
    grad = bias
    pos = bias
    if Other_grad is not None:
        bias = row_bias(Bias, row, valid)
    if Grad is not None:
        lse, grad = load_lse(Lse, Ratio, Grad, row, valid)
        if Divisor is not None:
            grad *= tl.load(Divisor + 2)
    if Pos is not None:
        pos = tl.load(Pos + row, mask=valid, other=0.0)
        if Divisor is not None:
            pos *= tl.load(Divisor + 2)
    return bias, lse, grad, pos


@triton.jit
def factors(bias, lse, grad, once):
    """A row's bias and gradient; with ``once`` exp(bias) and grad exp(-lse) instead."""
    if once is not None:
        bias = tl.where(once, tl.exp2(bias), bias)
        grad = tl.where(once, grad * tl.exp2(-lse), grad)
    return bias, grad


@triton.jit
def two_terms(
    x, y, p_bias, p_lse, p_grad, q_bias, q_lse, q_grad, USE_P: tl.constexpr, USE_Q: tl.constexpr
):  # fmt: skip
    """The terms of A from the log-sum-exps, with one exponential per term; x and y: see ``logit_factors``."""
    a = tl.zeros(x.shape, tl.float32)
    if USE_P:
        t = tl.fma(x, y, q_bias[None, :])
        a = p_grad[:, None] * tl.exp2(t - p_lse[:, None])
    if USE_Q:
        t = tl.fma(x, y, p_bias[:, None])
        a = tl.fma(q_grad[None, :], tl.exp2(t - q_lse[None, :]), a)
    return a


@triton.jit
def entries(
    products, p_scale, q_scale, once,
    p_tag, p_row, p_positive, p_bias, p_lse, p_grad, p_pos,
    q_tag, q_row, q_positive, q_bias, q_lse, q_grad, q_pos,
    EXCLUDE: tl.constexpr, USE_P: tl.constexpr, USE_Q: tl.constexpr,
    USE_P_POS: tl.constexpr, USE_Q_POS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """A tile of A, from the products of the rows; ``once``: see ``grad_kernel``, and None for never."""
    x, y = logit_factors(products, p_scale, q_scale, EXACT)
    if once is not None:
        if once:
            weight = tl.fma(p_grad[:, None], q_bias[None, :], p_bias[:, None] * q_grad[None, :])
            a = tl.exp2(x * y) * weight
        else:
            a = two_terms(x, y, p_bias, p_lse, p_grad, q_bias, q_lse, q_grad, USE_P, USE_Q)
    else:
        a = two_terms(x, y, p_bias, p_lse, p_grad, q_bias, q_lse, q_grad, USE_P, USE_Q)
    # Selected, not multiplied by 0: a masked entry can have any value, inf included.
    if EXCLUDE != "none":
        a = tl.where(p_tag[:, None] == q_tag[None, :], 0.0, a)
    if USE_P_POS:
        a = tl.where(p_positive[:, None] == q_row[None, :], a + p_pos[:, None], a)
    if USE_Q_POS:
        a = tl.where(p_row[:, None] == q_positive[None, :], a + q_pos[None, :], a)
    return a


@triton.jit(do_not_specialize=["n_p", "n_q", "slots_p", "d", "p_stride", "q_stride", "skip_p", "skip_q", "split"])
def grad_kernel(
    P, P_rnorm, P_label, P_count, P_bias, P_lse, P_ratio, P_grad, P_pos,
    Q, Q_rnorm, Q_label, Q_count, Q_bias, Q_lse, Q_ratio, Q_grad, Q_pos,
    Beta, Scale, Divisor,
    Out, Dot, Part,
    n_p, n_q, slots_p, d, p_stride, q_stride, skip_p, skip_q, split,
    EXCLUDE: tl.constexpr, P_SAMPLES: tl.constexpr, P_UNSUMMED: tl.constexpr, Q_UNSUMMED: tl.constexpr,
    P_GATHER: tl.constexpr, Q_GATHER: tl.constexpr, MAY_SHARE: tl.constexpr,
    BP: tl.constexpr, BQ: tl.constexpr, BD: tl.constexpr, UNIT: tl.constexpr, EVEN_D: tl.constexpr,
    EPS: tl.constexpr, NORM_LIMIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of one block of anchors, rows of at most BD columns; one side of flash attention's backward pass.

    ``split`` programs share a block when there are too few blocks to fill the device. Each then writes
    its float32 sum to ``Part[s, slot]`` for ``finish_kernel``. A single program finishes the rows itself, and divides
    them by the ``Divisor`` of a step; for this see ``write_divisors``.

    Exponentials take as long as the products. For features against themselves (``MAY_SHARE``) the two terms of an entry
    are ``exp(t) (g_i exp(-lse_i) + g_j exp(-lse_j))``, with one exponential, if the factors stay in range: with |t| and
    |lse| - log M up to 64 in base 2 they lie between 2^-64 and 2^64, apart from the contributions of log M and g. This
    holds for temperatures of at least 0.0226.
    """
    d *= UNIT
    p_stride *= UNIT
    q_stride *= UNIT
    block = tl.program_id(0) // split
    part = tl.program_id(0) % split
    p_first = block * BP
    if P_count is not None:
        n_p = tl.load(P_count)
        if p_first >= n_p:
            return
    if Q_count is not None:
        n_q = tl.load(Q_count)
    p_row, p_label, p_valid = slot_rows(P_label, p_first, n_p, skip_p, P_GATHER, BP)
    p_here = paired_rows(P_rnorm, p_valid, p_first, n_p, P_UNSUMMED, BP)
    p_tag = mask_tag(p_row, p_label, EXCLUDE, P_SAMPLES)
    p_positive = positive_of(p_row, p_label, EXCLUDE)
    p_rnorm = tl.load(P_rnorm + p_row, mask=p_here, other=0.0)
    beta = tl.load(Beta)
    once = None
    if MAY_SHARE:
        once = beta * LOG2E < 64.0
    p_bias, p_lse, p_grad, p_pos = load_terms(P_bias, P_lse, P_ratio, P_grad, P_pos, Q_grad, None, p_row, p_valid)
    p_bias, p_grad = factors(p_bias, p_lse, p_grad, once)
    EXACT: tl.constexpr = P.dtype.element_ty == tl.float32 and PRECISION != "tf32"
    p_scale = logit_scale(p_rnorm, beta, P_SAMPLES or not EXACT)
    scale = 1.0
    if Scale is not None:
        scale = tl.load(Scale)
    # One factor for all terms, and not in load_terms, whose loads in the loop below would make registers spill.
    factor = scale
    if Divisor is not None:
        factor *= tl.load(Divisor + 2)
    p = load_rows(P, p_row, p_here, p_stride, d, BD, EVEN_D)
    acc = tl.zeros((BP, BD), tl.float32)

    for q_block in range(part, tl.cdiv(n_q, BQ), split):
        q_row, q_label, q_valid = slot_rows(Q_label, q_block * BQ, n_q, skip_q, Q_GATHER, BQ)
        q_here = paired_rows(Q_rnorm, q_valid, q_block * BQ, n_q, Q_UNSUMMED, BQ)
        q = load_rows(Q, q_row, q_here, q_stride, d, BD, EVEN_D)
        products = dot(p, tl.trans(q), tl.zeros((BP, BQ), tl.float32), PRECISION)
        q_tag = mask_tag(q_row, q_label, EXCLUDE, not P_SAMPLES)
        q_positive = positive_of(q_row, q_label, EXCLUDE)
        q_rnorm = tl.load(Q_rnorm + q_row, mask=q_here, other=0.0)
        q_bias, q_lse, q_grad, q_pos = load_terms(Q_bias, Q_lse, Q_ratio, Q_grad, Q_pos, P_grad, None, q_row, q_valid)
        q_bias, q_grad = factors(q_bias, q_lse, q_grad, once)
        a = entries(
            products, p_scale, logit_scale(q_rnorm, beta, EXACT and not P_SAMPLES), once,
            p_tag, p_row, p_positive, p_bias, p_lse, p_grad, p_pos,
            q_tag, q_row, q_positive, q_bias, q_lse, q_grad, q_pos,
            EXCLUDE, P_grad is not None, Q_grad is not None, P_pos is not None, Q_pos is not None, EXACT,
        )  # fmt: skip
        r = summand_rnorm(q_rnorm, NORM_LIMIT) * factor
        if Divisor is not None:
            # Infinite for rows of zeros, which add nothing.
            r = tl.minimum(r, 1e38, propagate_nan=tl.PropagateNan.ALL)
        a *= r[None, :]
        acc = dot(a.to(q.dtype), q, acc, PRECISION)

    slot = p_first + tl.arange(0, BP)
    col = tl.arange(0, BD)
    if Part is not None:
        at = Part + (part.to(tl.int64) * slots_p + slot)[:, None] * d + col[None, :]
        tl.store(at, acc, mask=(slot < n_p)[:, None] & (col < d)[None, :])
    else:
        # Loaded again: kept through the loop, the rows would occupy registers or shared memory twice.
        x = load_rows(P, p_row, p_here, p_stride, d, BD, EVEN_D).to(tl.float32)
        weight = p_rnorm / scale
        if Divisor is not None:
            weight /= tl.load(Divisor)
        grad, along = project(acc, x, p_rnorm, weight * beta, EPS)
        if Out is not None:
            written = p_here
            if not P_GATHER:
                written = slot < n_p
            # Left-out rows are selected to be zero, because NaN in Q reaches their sums.
            grad = tl.where(p_here[:, None], grad, 0.0)
            at = Out + p_row.to(tl.int64)[:, None] * d + col[None, :]
            tl.store(at, grad.to(Out.dtype.element_ty), mask=written[:, None] & (col < d)[None, :])
        if Dot is not None:
            tl.store(Dot + slot, tl.where(p_here, weight * along, 0.0), mask=slot < n_p)


@triton.jit(
    do_not_specialize=[
        "p_start", "p_stop", "q_start", "q_stop", "d", "p_stride", "q_stride", "h_stride", "skip_p", "skip_q",
    ]
)  # fmt: skip
def entries_kernel(
    P, P_rnorm, P_label, P_count, P_bias, P_lse, P_ratio, P_grad, P_pos,
    Q, Q_rnorm, Q_label, Q_count, Q_bias, Q_lse, Q_ratio, Q_grad, Q_pos,
    Beta, Scale, Divisor,
    H,
    p_start, p_stop, q_start, q_stop, d, p_stride, q_stride, h_stride, skip_p, skip_q,
    EXCLUDE: tl.constexpr, P_SAMPLES: tl.constexpr, P_UNSUMMED: tl.constexpr, Q_UNSUMMED: tl.constexpr,
    P_GATHER: tl.constexpr, Q_GATHER: tl.constexpr,
    BP: tl.constexpr, BQ: tl.constexpr, BD: tl.constexpr, UNIT: tl.constexpr, EVEN_D: tl.constexpr,
    PARTS: tl.constexpr, GROUP: tl.constexpr, NORM_LIMIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of ``H = A r_p r_q`` for the panel [p_start, p_stop) x [q_start, q_stop), times ``Scale`` and, see
    ``write_divisors``, ``Divisor[2]``.

    ``h_stride`` is in units of 16 numbers. The tail of a row is also written, with finite values. Because H contains
    both norms, it serves both products: ``H Q`` is r_p a_p and ``H^T P`` is r_q a_q.
    """
    d *= UNIT
    p_stride *= UNIT
    q_stride *= UNIT
    # Tiles are ordered in groups of GROUP block rows, column by column: neighbours share operands in the L2 cache.
    p_blocks = tl.cdiv(p_stop - p_start, BP)
    q_blocks = tl.cdiv(q_stop - q_start, BQ)
    group = tl.program_id(0) // (GROUP * q_blocks)
    inner = tl.program_id(0) % (GROUP * q_blocks)
    height = tl.minimum(p_blocks - group * GROUP, GROUP)
    # Relative to the panel's corner: the compiler must know that the offsets into H are aligned.
    p_local = (group * GROUP + inner % height) * BP
    q_local = inner // height * BQ
    p_first = p_start + p_local
    q_first = q_start + q_local
    # Slots beyond the count have no rows, but the matrix product reads their entries. These become zeros; a tile
    # without rows skips the loop over d.
    p_used = p_stop
    q_used = q_stop
    stop = d
    if P_count is not None:
        p_used = tl.minimum(tl.load(P_count), p_stop)
        stop = tl.where(p_first < p_used, stop, 0)
    if Q_count is not None:
        q_used = tl.minimum(tl.load(Q_count), q_stop)
        stop = tl.where(q_first < q_used, stop, 0)

    p_row, p_label, p_valid = slot_rows(P_label, p_first, p_used, skip_p, P_GATHER, BP)
    p_here = paired_rows(P_rnorm, p_valid, p_first, p_used, P_UNSUMMED, BP)
    q_row, _, q_valid = slot_rows(Q_label, q_first, q_used, skip_q, Q_GATHER, BQ)
    q_here = paired_rows(Q_rnorm, q_valid, q_first, q_used, Q_UNSUMMED, BQ)
    acc = dot_rows(P, p_row, p_here, p_stride, Q, q_row, q_here, q_stride, d, stop, BD, EVEN_D, PRECISION)

    p_tag = mask_tag(p_row, p_label, EXCLUDE, P_SAMPLES)
    p_positive = positive_of(p_row, p_label, EXCLUDE)
    p_rnorm = tl.load(P_rnorm + p_row, mask=p_here, other=0.0)
    p_bias, p_lse, p_grad, p_pos = load_terms(P_bias, P_lse, P_ratio, P_grad, P_pos, Q_grad, Divisor, p_row, p_valid)
    beta = tl.load(Beta)
    EXACT: tl.constexpr = P.dtype.element_ty == tl.float32 and PRECISION != "tf32"
    p_scale = logit_scale(p_rnorm, beta, P_SAMPLES or not EXACT)
    p_factor = summand_rnorm(p_rnorm, NORM_LIMIT)
    if Scale is not None:
        p_factor *= tl.load(Scale)

    B: tl.constexpr = BQ // PARTS
    rows = p_local + tl.arange(0, BP)
    width = h_stride * 16  # a known multiple of 16, so that the mask does not split the stores
    h_ptr = H + rows.to(tl.int64)[:, None] * width
    products = column_parts(acc, PARTS)
    for i in tl.static_range(PARTS):
        row, label, valid = slot_rows(Q_label, q_first + i * B, q_used, skip_q, Q_GATHER, B)
        here = paired_rows(Q_rnorm, valid, q_first + i * B, q_used, Q_UNSUMMED, B)
        q_tag = mask_tag(row, label, EXCLUDE, not P_SAMPLES)
        q_positive = positive_of(row, label, EXCLUDE)
        q_rnorm = tl.load(Q_rnorm + row, mask=here, other=0.0)
        q_bias, q_lse, q_grad, q_pos = load_terms(Q_bias, Q_lse, Q_ratio, Q_grad, Q_pos, P_grad, Divisor, row, valid)
        a = entries(
            products[i], p_scale, logit_scale(q_rnorm, beta, EXACT and not P_SAMPLES), None,
            p_tag, p_row, p_positive, p_bias, p_lse, p_grad, p_pos,
            q_tag, row, q_positive, q_bias, q_lse, q_grad, q_pos,
            EXCLUDE, P_grad is not None, Q_grad is not None, P_pos is not None, Q_pos is not None, EXACT,
        )  # fmt: skip
        h = in_range(a * p_factor[:, None] * summand_rnorm(q_rnorm, NORM_LIMIT)[None, :], NORM_LIMIT)
        columns = q_local + i * B + tl.arange(0, B)
        inside = (rows < p_stop - p_start)[:, None] & (columns < width)[None, :]
        tl.store(h_ptr + columns[None, :], h.to(H.dtype.element_ty), mask=inside)
