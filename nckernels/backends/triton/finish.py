"""Kernels that turn accumulated sums into gradients, the loss of one step, and the gradient of the biases."""

import triton
import triton.language as tl

from .reduce import write_loss
from .tiles import (
    LOG2E,
    NOT_FINITE,
    dot,
    load_lse,
    load_rows,
    paired_rows,
    row_bias,
    slot_rows,
    summed_rows,
    tile_products,
    used_slots,
)


@triton.jit
def summand_rnorm(rnorm, NORM_LIMIT: tl.constexpr):
    """The factor of a row that is summed up: its inverse norm, except 1 for float16 rows of zeros.

    Their 1 / eps = 16384 would push the other entries of a tile out of float16's range, and adds nothing to a sum.
    ``finish_kernel`` applies the true factor to the row's own gradient.
    """
    if NORM_LIMIT > 0:
        rnorm = tl.where(rnorm >= NORM_LIMIT, 1.0, rnorm)
    return rnorm


@triton.jit
def in_range(h, NORM_LIMIT: tl.constexpr):
    """Float16: entries of two rows shorter than eps can exceed the range. Room for them would leave none for others."""
    if NORM_LIMIT > 0:
        h = tl.clamp(h, -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)
    return h


@triton.jit
def radial(rnorm, along, EPS: tl.constexpr):
    """The multiple of a row x to subtract from its sum: ``(u . acc) r``, given ``along = x . acc``.

    It is 0 for rows shorter than eps, which F.normalize divides by a constant. The inverse norms are compared, with a
    tolerance for the rounding of two reciprocals. Rows with NaN norms are treated as longer than eps; their results are
    NaN anyway.
    """
    return tl.where(rnorm >= 0.999999 / EPS, 0.0, rnorm * rnorm * along)


@triton.jit
def project(acc, x, rnorm, weight, EPS: tl.constexpr):
    """``weight (acc - (u . acc) u)`` for whole rows, and ``x . acc``."""
    along = tl.sum(acc * x, 1)
    return weight[:, None] * tl.fma(-radial(rnorm, along, EPS)[:, None], x, acc), along


@triton.jit
def divisor_of(Scale, Divisor):
    """What finished gradients are divided by: the scale of the entries, of float16, times the divisor of a mean; None
    for 1."""
    divisor = None
    if Divisor is not None:
        divisor = tl.load(Divisor)
    if Scale is not None:
        scale = tl.load(Scale)
        divisor = scale if divisor is None else scale * divisor
    return divisor


@triton.jit
def finish_rows(
    Acc, X, Rnorm, Label, Count, Beta, Out, Dot, divisor,
    start, stop, local_start, parts, part_stride, d, x_stride, skip,
    GATHER: tl.constexpr, UNSUMMED: tl.constexpr, NORM_INSIDE: tl.constexpr, WHOLE_D: tl.constexpr,
    EPS: tl.constexpr, NORM_LIMIT: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Finish BR rows from slot ``start + local_start`` on, see ``finish_kernel``; ``divisor`` is a number or None."""
    first = start + local_start
    local = local_start + tl.arange(0, BR)  # relative to `start`, so that alignment is known
    used = used_slots(Count, stop)
    row, _, valid = slot_rows(Label, first, used, skip, GATHER, BR)
    valid = paired_rows(Rnorm, valid, first, used, UNSUMMED, BR)
    slot = first + tl.arange(0, BR)
    written = valid
    if not GATHER:
        written = slot < stop
    rnorm = tl.load(Rnorm + row, mask=valid, other=0.0)
    weight = rnorm
    if NORM_INSIDE:
        # Already in the sums, except for the rows whose factor was 1.
        weight = tl.where(rnorm == summand_rnorm(rnorm, NORM_LIMIT), 1.0, rnorm)
    if divisor is not None:
        weight = weight / divisor

    col = tl.arange(0, BD)
    acc_ptr = Acc + local.to(tl.int64)[:, None] * d + col[None, :]
    x_ptr = X + row.to(tl.int64)[:, None] * x_stride + col[None, :]
    if WHOLE_D:
        mask = valid[:, None] & (col < d)[None, :]
        acc = tl.zeros((BR, BD), tl.float32)
        for _ in range(parts):
            acc += tl.load(acc_ptr, mask=mask, other=0.0)
            acc_ptr += part_stride
        x = tl.load(x_ptr, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        # Beta and the addresses of Out come late: while rows are loaded, they would occupy registers.
        grad, along = project(acc, x, rnorm, weight * tl.load(Beta), EPS)
        if Out is not None:
            grad = tl.where(valid[:, None], grad, 0.0).to(Out.dtype.element_ty)
            out_ptr = Out + row.to(tl.int64)[:, None] * d + col[None, :]
            tl.store(out_ptr, grad, mask=written[:, None] & (col < d)[None, :], eviction_policy="evict_first")
    else:
        # Rows too long for registers are read twice, for the dot product and for the result.
        sums = tl.zeros((BR, BD), tl.float32)
        for k in range(0, d, BD):
            mask = valid[:, None] & (col < d - k)[None, :]
            x = tl.load(x_ptr + k, mask=mask, other=0.0).to(tl.float32)
            sums = tl.fma(tl.load(acc_ptr + k, mask=mask, other=0.0), x, sums)
        along = tl.sum(sums, 1)
        if Out is not None:
            scale = weight * tl.load(Beta)
            factor = radial(rnorm, along, EPS)
            out_ptr = Out + row.to(tl.int64)[:, None] * d + col[None, :]
            for k in range(0, d, BD):
                mask = valid[:, None] & (col < d - k)[None, :]
                x = tl.load(x_ptr + k, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
                acc = tl.load(acc_ptr + k, mask=mask, other=0.0)
                grad = scale[:, None] * tl.fma(-factor[:, None], x, acc)
                grad = tl.where(valid[:, None], grad, 0.0).to(Out.dtype.element_ty)
                tl.store(
                    out_ptr + k, grad, mask=written[:, None] & (col < d - k)[None, :], eviction_policy="evict_first"
                )
    if Dot is not None:
        tl.store(Dot + slot, tl.where(valid, weight * along, 0.0), mask=slot < stop)


@triton.jit(do_not_specialize=["start", "stop", "parts", "part_stride", "d", "x_stride", "skip"])
def finish_kernel(
    Acc, X, Rnorm, Label, Count, Beta, Scale, Divisor, Out, Dot,
    start, stop, parts, part_stride, d, x_stride, skip,
    GATHER: tl.constexpr, UNSUMMED: tl.constexpr, NORM_INSIDE: tl.constexpr, WHOLE_D: tl.constexpr,
    UNIT: tl.constexpr, EPS: tl.constexpr, NORM_LIMIT: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Gradients of the slots [start, stop) from float32 sums: add the partials, project, scale, cast.

    If a block of few rows has just been multiplied, its sums are still in the L2 cache. Rows and gradients are accessed
    here for the last time, with an eviction hint, so that they do not displace the sums.

    ``Acc[part, slot - start]`` holds a_p, or r_p a_p with ``NORM_INSIDE``. ``Dot[slot]`` becomes the
    slot's share of the gradient of beta. ``Out`` may be ``Acc`` itself (float32, one part).
    """
    d *= UNIT
    x_stride *= UNIT
    part_stride = part_stride.to(tl.int64) * UNIT
    finish_rows(
        Acc, X, Rnorm, Label, Count, Beta, Out, Dot, divisor_of(Scale, Divisor),
        start, stop, tl.program_id(0) * BR, parts, part_stride, d, x_stride, skip,
        GATHER, UNSUMMED, NORM_INSIDE, WHOLE_D, EPS, NORM_LIMIT, BR, BD,
    )  # fmt: skip


@triton.jit
def mended_tile(
    H, X, Label, p, n_p, n_q, col, d, h_p, h_q, x_stride, skip, Rnorm,
    UNSUMMED: tl.constexpr, PRECISION: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """A tile of ``H X`` without the left-out rows of X."""
    acc = tl.zeros((p.shape[0], col.shape[0]), tl.float32)
    for first in range(0, n_q, BQ):
        q, _, valid = slot_rows(Label, first, n_q, skip, False, BQ)
        valid = paired_rows(Rnorm, valid, first, n_q, UNSUMMED, BQ)
        at = H + p.to(tl.int64)[:, None] * h_p + q.to(tl.int64)[None, :] * h_q
        h = tl.load(at, mask=(p < n_p)[:, None] & valid[None, :], other=0.0)
        at = X + q.to(tl.int64)[:, None] * x_stride + col[None, :]
        x = tl.load(at, mask=valid[:, None] & (col < d)[None, :], other=0.0)
        acc = dot(h, x, acc, PRECISION)
    return acc


@triton.jit(
    do_not_specialize=[
        "start", "stop", "h_p", "h_q", "d", "x_stride", "skip", "m", "k", "target_skip", "n_q", "y_stride", "y_skip"
    ]
)  # fmt: skip
def finish_step_kernel(
    Acc, H, X, Rnorm, Label, Count, Beta, Scale, Divisor, Out, Dot, Broken, Y, Y_label, Target, Share, Lse, Pos, Loss,
    start, stop, h_p, h_q, d, x_stride, skip, m, k, target_skip, n_q, y_stride, y_skip,
    GATHER: tl.constexpr, BY_CLASS: tl.constexpr, WHOLE_D: tl.constexpr, UNIT: tl.constexpr, EPS: tl.constexpr,
    NORM_LIMIT: tl.constexpr, PRECISION: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
    BP: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """As ``finish_kernel`` with ``NORM_INSIDE``, for one step, with a loss and mended sums where these are due.

    With ``Loss``, program 0 writes it, for which all log-sum-exps must be known. The sums are ``Acc = H Y``, in which
    the library has multiplied left-out rows of Y by zeros. If these rows may hold NaN or infinities (``Broken[0]`` is
    not 0, which is rare), every BP-th row's program recomputes BP rows of the sums and finishes them, and the others
    have nothing to do.
    """
    d *= UNIT
    x_stride *= UNIT
    y_stride *= UNIT
    program = tl.program_id(0)
    if Loss is not None:
        if program == 0:
            write_loss(Target, Share, Lse, None, Pos, Divisor, Loss, m, k, target_skip, BY_CLASS, B)
        program -= 1
    if program >= 0:
        divisor = divisor_of(Scale, Divisor)
        if Broken is None:
            finish_rows(
                Acc, X, Rnorm, Label, Count, Beta, Out, Dot, divisor,
                start, stop, program * BR, 1, 0, d, x_stride, skip,
                GATHER, False, True, WHOLE_D, EPS, NORM_LIMIT, BR, BD,
            )  # fmt: skip
        else:
            tl.static_assert(BP % BR == 0, "rows are mended in whole blocks")
            BLOCKS: tl.constexpr = BP // BR
            broken = tl.load(Broken) != 0
            mends = broken & (program % BLOCKS == 0)
            if mends:
                p = program * BR + tl.arange(0, BP)
                for n in range(0, d, BN):
                    col = n + tl.arange(0, BN)
                    acc = mended_tile(
                        H, Y, Y_label, p, stop - start, n_q, col, d, h_p, h_q, y_stride, y_skip, None,
                        False, PRECISION, BQ,
                    )  # fmt: skip
                    at = Acc + p.to(tl.int64)[:, None] * d + col[None, :]
                    tl.store(at, acc, mask=(p < stop - start)[:, None] & (col < d)[None, :])
                tl.debug_barrier()  # the program's own threads read the sums
            blocks = tl.where(broken, tl.where(mends, BLOCKS, 0), 1)
            for i in range(blocks):
                finish_rows(
                    Acc, X, Rnorm, Label, Count, Beta, Out, Dot, divisor,
                    start, stop, (program + i) * BR, 1, 0, d, x_stride, skip,
                    GATHER, False, True, WHOLE_D, EPS, NORM_LIMIT, BR, BD,
                )  # fmt: skip


@triton.jit(do_not_specialize=["start", "stop", "d", "x_stride", "skip"])
def gather_kernel(
    X, Rnorm, Label, Count, Out, start, stop, d, x_stride, skip,
    GATHER: tl.constexpr, UNSUMMED: tl.constexpr, UNIT: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """``Out[slot - start] = X[row of slot]``, with zeros for left-out rows: a dense operand for a matrix product."""
    d *= UNIT
    x_stride *= UNIT
    first = start + tl.program_id(0) * BR
    used = used_slots(Count, stop)
    row, _, valid = slot_rows(Label, first, used, skip, GATHER, BR)
    valid = paired_rows(Rnorm, valid, first, used, UNSUMMED, BR)
    local = tl.program_id(0) * BR + tl.arange(0, BR)
    col = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = (col < d)[None, :]
    x = tl.load(X + row.to(tl.int64)[:, None] * x_stride + col[None, :], mask=valid[:, None] & inside, other=0.0)
    at = Out + local.to(tl.int64)[:, None] * d + col[None, :]
    tl.store(at, x, mask=(local < stop - start)[:, None] & inside)


@triton.jit(do_not_specialize=["n_p", "n_q", "d", "h_p", "h_q", "x_stride", "skip"])
def mend_kernel(
    H, X, Rnorm, Label, Out, n_p, n_q, d, h_p, h_q, x_stride, skip,
    UNSUMMED: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    BP: tl.constexpr, BQ: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Recompute ``Out = H X`` without the left-out rows of X, if one of these holds NaN or infinities.

    The library has multiplied such rows by zeros in H. They are rare, and only the device knows them: every program
    searches the inverse norms for them, and ends if there are none.
    """
    found = tl.zeros((BN,), tl.int32)
    for i in range(0, n_q, BN):
        index = i + tl.arange(0, BN)
        found |= (tl.load(Rnorm + index, mask=index < n_q, other=0.0) == NOT_FINITE).to(tl.int32)
    if tl.max(found, 0) == 0:
        return
    d *= UNIT
    x_stride *= UNIT
    d_blocks = tl.cdiv(d, BD)
    for block in range(tl.program_id(0), tl.cdiv(n_p, BP) * d_blocks, tl.num_programs(0)):
        p = block // d_blocks * BP + tl.arange(0, BP)
        col = block % d_blocks * BD + tl.arange(0, BD)
        acc = mended_tile(
            H, X, Label, p, n_p, n_q, col, d, h_p, h_q, x_stride, skip, Rnorm, UNSUMMED, PRECISION, BQ
        )  # fmt: skip
        at = Out + p.to(tl.int64)[:, None] * d + col[None, :]
        tl.store(at, acc, mask=(p < n_p)[:, None] & (col < d)[None, :])


@triton.jit(do_not_specialize=["n_p", "n_q", "d", "p_stride", "q_stride", "skip_p", "skip_q", "split"])
def bias_grad_kernel(
    P, P_rnorm, P_label, P_bias,
    Q, Q_rnorm, Q_label, Q_count, Q_lse, Q_ratio, Q_grad,
    Beta, Part,
    n_p, n_q, d, p_stride, q_stride, skip_p, skip_q, split,
    EXCLUDE: tl.constexpr, P_SAMPLES: tl.constexpr, Q_GATHER: tl.constexpr,
    BP: tl.constexpr, BQ: tl.constexpr, BD: tl.constexpr, UNIT: tl.constexpr,
    WHOLE_D: tl.constexpr, EVEN_D: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``Part[s, p] = sum over q of g_q exp(t_pq + bias_p - lse_q)``: the gradient of p's bias.

    This is a separate kernel, with the loop of ``lse_kernel``, because few callers learn a bias and the gradient
    kernels have no registers left.
    """
    d *= UNIT
    p_stride *= UNIT
    q_stride *= UNIT
    B: tl.constexpr = BQ // PARTS
    block = tl.program_id(0) // split
    part = tl.program_id(0) % split
    p_first = block * BP
    if Q_count is not None:
        n_q = tl.load(Q_count)
    p_row, p_valid, p_tag, p_rnorm = summed_rows(P_rnorm, P_label, p_first, n_p, skip_p, EXCLUDE, P_SAMPLES, False, BP)
    p_scale = p_rnorm * (tl.load(Beta) * LOG2E)
    p_bias = row_bias(P_bias, p_row, p_valid)
    p = None
    if WHOLE_D:
        p = load_rows(P, p_row, p_valid, p_stride, d, BD, EVEN_D)
    total = tl.zeros((BP,), tl.float32)
    for q_block in range(part, tl.cdiv(n_q, BQ), split):
        q_first = q_block * BQ
        products = tile_products(
            p, P, p_row, p_valid, p_stride, Q, Q_label, q_first, n_q, q_stride, skip_q, d,
            Q_GATHER, BQ, BD, WHOLE_D, EVEN_D, PARTS, PRECISION,
        )  # fmt: skip
        for i in tl.static_range(PARTS):
            row, valid, tag, rnorm = summed_rows(
                Q_rnorm, Q_label, q_first + i * B, n_q, skip_q, EXCLUDE, not P_SAMPLES, Q_GATHER, B
            )
            lse, grad = load_lse(Q_lse, Q_ratio, Q_grad, row, valid)
            t = tl.fma(products[i] * p_scale[:, None], rnorm[None, :], p_bias[:, None])
            e = grad[None, :] * tl.exp2(t - lse[None, :])
            if EXCLUDE != "none":
                e = tl.where(p_tag[:, None] == tag[None, :], 0.0, e)
            total += tl.sum(e, 1)
    slot = p_first + tl.arange(0, BP)
    # Selected by p_valid, not multiplied by 0: NaN in Q reaches the sums of left-out rows.
    tl.store(Part + part.to(tl.int64) * n_p + slot, tl.where(p_valid, total, 0.0), mask=slot < n_p)
