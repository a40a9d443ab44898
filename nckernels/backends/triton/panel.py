"""Log-sum-exps and entries of a panel whose products the vendor's library has computed.

For rows too long for the on-chip kernels, products run at the library's rate. Our own kernels read the float32 products
twice, once for the sums and once for the gradient's entries. A panel has some anchors with all rows of the other
operand, so the sums are complete before the second reading, and forward and backward share the products
(``tiled/step.py``).

``T[slot - p_start, q]`` are the products ``p . q`` without norms. Rows start at multiples of 16 numbers, and
``t_stride`` is in units of 16. The tails of rows and the products of left-out rows are not used: the latter may be NaN.
"""

import triton
import triton.language as tl

from .finish import in_range, summand_rnorm
from .grad import entries
from .lse import shift_of, without_excluded
from .tiles import INF, LN2, LOG2E, logit_scale, positive_of, row_bias, slot_rows, summed_rows, used_slots


@triton.jit
def stored_products(T, p_local, q_first, p_valid, q_valid, t_stride, BP: tl.constexpr, BQ: tl.constexpr):
    """A tile of the panel's products, with zeros for left-out rows."""
    rows = p_local + tl.arange(0, BP)
    columns = q_first + tl.arange(0, BQ)
    width = t_stride * 16  # a known multiple of 16, so that the mask does not split 16-byte loads
    at = T + rows.to(tl.int64)[:, None] * width + columns[None, :]
    products = tl.load(at, mask=p_valid[:, None] & (columns < width)[None, :], other=0.0)
    # Selected after the load: a mask of single columns would split it.
    return tl.where(q_valid[None, :], products, 0.0)


@triton.jit(do_not_specialize=["p_start", "p_stop", "n_q", "t_stride", "skip_p", "skip_q", "split"])
def panel_lse_kernel(
    T, P_rnorm, P_label, P_count, Q_rnorm, Q_label, Beta, Partial,
    p_start, p_stop, n_q, t_stride, skip_p, skip_q, split,
    EXCLUDE: tl.constexpr, P_SAMPLES: tl.constexpr, P_GATHER: tl.constexpr, BP: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """The anchors' largest logits, in base 2, and the sums relative to them, in ``Partial[0, s, slot - p_start]`` and
    ``Partial[1, ...]``.

    ``split`` programs share a block of anchors; program s takes every ``split``-th block of columns.
    """
    block = tl.program_id(0) // split
    part = tl.program_id(0) % split
    p_local = block * BP
    p_first = p_start + p_local
    used = used_slots(P_count, p_stop)
    _, p_valid, p_tag, p_rnorm = summed_rows(P_rnorm, P_label, p_first, used, skip_p, EXCLUDE, P_SAMPLES, P_GATHER, BP)
    p_scale = p_rnorm * (tl.load(Beta) * LOG2E)
    largest = tl.full((BP,), -INF, tl.float32)
    total = tl.zeros((BP,), tl.float32)
    for q_block in range(part, tl.cdiv(n_q, BQ), split):
        q_first = q_block * BQ
        row, valid, tag, rnorm = summed_rows(Q_rnorm, Q_label, q_first, n_q, skip_q, EXCLUDE, not P_SAMPLES, False, BQ)
        products = stored_products(T, p_local, q_first, p_valid, valid, t_stride, BP, BQ)
        t = tl.fma(products * p_scale[:, None], rnorm[None, :], row_bias(None, row, valid)[None, :])
        t = without_excluded(t, p_tag, tag, p_first, q_first, EXCLUDE)
        new = tl.maximum(largest, tl.max(t, 1))
        shift = shift_of(new)
        total = tl.fma(total, tl.exp2(largest - shift), tl.sum(tl.exp2(t - shift[:, None]), 1))
        largest = new
    slot = p_local + tl.arange(0, BP)
    n = p_stop - p_start
    at = part.to(tl.int64) * n + slot
    tl.store(Partial + at, tl.where(p_valid, largest, -INF), mask=slot < n)
    tl.store(Partial + split.to(tl.int64) * n + at, total, mask=slot < n)


@triton.jit
def combined(Partial, slot, n, parts, BP: tl.constexpr, BS: tl.constexpr):
    """Some anchors' largest logits, in base 2, and the sums relative to them, from the partials; -inf and 0 for an
    empty set."""
    part = tl.arange(0, BS)
    at = part.to(tl.int64)[:, None] * n + slot[None, :]
    mask = (part < parts)[:, None] & (slot < n)[None, :]
    largest = tl.load(Partial + at, mask=mask, other=-INF)
    total = tl.load(Partial + parts.to(tl.int64) * n + at, mask=mask, other=0.0)
    top = tl.max(largest, 0)
    return top, tl.sum(total * tl.exp2(largest - shift_of(top)[None, :]), 0)


@triton.jit(do_not_specialize=["p_start", "p_stop", "n_q", "t_stride", "h_stride", "skip_p", "skip_q", "parts"])
def panel_entries_kernel(
    T, Partial, P_rnorm, P_label, P_count, P_grad, P_pos, Q_rnorm, Q_label, Q_pos, Beta, Scale, Divisor, Lse, H,
    p_start, p_stop, n_q, t_stride, h_stride, skip_p, skip_q, parts,
    EXCLUDE: tl.constexpr, P_SAMPLES: tl.constexpr, P_GATHER: tl.constexpr,
    BP: tl.constexpr, BQ: tl.constexpr, BS: tl.constexpr, NORM_LIMIT: tl.constexpr,
):  # fmt: skip
    """One tile of the gradient's entries ``H = A r_p r_q`` with the factors of ``entries_kernel``, and the anchors'
    ``Lse``.

    Only the anchors have log-sum-exps here: ``P_grad`` is their upstream gradient, ``P_pos`` or ``Q_pos`` that of the
    samples' positive logits. ``H`` may be ``T`` itself.
    """
    q_blocks = tl.cdiv(n_q, BQ)
    p_local = tl.program_id(0) // q_blocks * BP
    q_first = tl.program_id(0) % q_blocks * BQ
    p_first = p_start + p_local
    used = used_slots(P_count, p_stop)
    p_row, p_label, p_valid = slot_rows(P_label, p_first, used, skip_p, P_GATHER, BP)
    p_row, p_valid, p_tag, p_rnorm = summed_rows(
        P_rnorm, P_label, p_first, used, skip_p, EXCLUDE, P_SAMPLES, P_GATHER, BP
    )
    q_row, q_label, q_valid = slot_rows(Q_label, q_first, n_q, skip_q, False, BQ)
    q_row, q_valid, q_tag, q_rnorm = summed_rows(
        Q_rnorm, Q_label, q_first, n_q, skip_q, EXCLUDE, not P_SAMPLES, False, BQ
    )

    slot = p_local + tl.arange(0, BP)
    n = p_stop - p_start
    largest, total = combined(Partial, slot, n, parts, BP, BS)
    if q_first == 0:
        lse = largest + tl.log2(total)
        if P_GATHER:
            tl.store(Lse + p_row, lse * LN2, mask=p_valid)
        else:
            tl.store(Lse + p_start + slot, lse * LN2, mask=slot < n)
    # An empty set has no gradient, see ``load_lse``. The exponentials are exp(t - largest) / total: the log-sum-exp has
    # a rounding, which would matter where a probability is near 1, and 1 is subtracted.
    empty = largest == -INF
    shift = tl.where(empty, INF, largest)
    factor = 1.0
    if Divisor is not None:
        factor = tl.load(Divisor + 2)
    grad = tl.where(empty, 0.0, tl.load(P_grad + p_row, mask=p_valid, other=0.0) * factor / total)
    nothing = tl.zeros((BP,), tl.float32)
    p_pos = nothing
    q_pos = tl.zeros((BQ,), tl.float32)
    if P_pos is not None:
        p_pos = tl.load(P_pos + p_row, mask=p_valid, other=0.0) * factor
    if Q_pos is not None:
        q_pos = tl.load(Q_pos + q_row, mask=q_valid, other=0.0) * factor

    products = stored_products(T, p_local, q_first, p_valid, q_valid, t_stride, BP, BQ)
    a = entries(
        products, logit_scale(p_rnorm, tl.load(Beta), True), q_rnorm, None,
        p_tag, p_row, positive_of(p_row, p_label, EXCLUDE), nothing, shift, grad, p_pos,
        q_tag, q_row, positive_of(q_row, q_label, EXCLUDE), row_bias(None, q_row, q_valid), q_pos, q_pos, q_pos,
        EXCLUDE, True, False, P_pos is not None, Q_pos is not None, False,
    )  # fmt: skip
    p_factor = summand_rnorm(p_rnorm, NORM_LIMIT)
    if Scale is not None:
        p_factor *= tl.load(Scale)
    h = in_range(a * p_factor[:, None] * summand_rnorm(q_rnorm, NORM_LIMIT)[None, :], NORM_LIMIT)
    columns = q_first + tl.arange(0, BQ)
    width = h_stride * 16
    at = H + slot.to(tl.int64)[:, None] * width + columns[None, :]
    tl.store(at, h.to(H.dtype.element_ty), mask=(slot < n)[:, None] & (columns < width)[None, :])
