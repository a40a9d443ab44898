"""The kernels around a product whose epilogue takes the exponentials, see ``tiled/engines.py``.

``E[p, q] = r_q exp(beta S_pq - beta)`` and ``Sums`` come from the product; ``D_p`` is the sum of an anchor's ``Sums``.
With ``c_p = g_p / D_p`` the gradient's entries are ``H[p, q] = c_p r_p E[p, q]``, and those of positives, which have an
upstream gradient of their own, ``(c_p exp(beta S_pq - beta) + g_pos) r_p r_q``.
"""

import triton
import triton.language as tl

from .tiles import LN2, LOG2E, slot_rows, summed_rows, used_slots


@triton.jit
def scale_and_tag(
    Rnorm, Label, Scale, Tag, Slot, factor, left_out, first, n, padded, skip,
    EXCLUDE: tl.constexpr, SAMPLES: tl.constexpr, GATHER: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """``Scale`` and ``Tag`` of some slots; ``Slot[row]``, if given, becomes the slot of a row."""
    row, valid, tag, rnorm = summed_rows(Rnorm, Label, first, n, skip, EXCLUDE, SAMPLES, GATHER, B)
    slot = first + tl.arange(0, B)
    # A row with infinities has an inverse norm of 0, which the product would take for a row that is left out.
    scale = tl.where(rnorm == 0.0, float("nan"), rnorm * factor)
    tl.store(Scale + slot, tl.where(valid, scale, left_out), mask=slot < padded)
    if Tag is not None:
        tl.store(Tag + slot, tag.to(tl.float32), mask=slot < padded)
    if Slot is not None:
        tl.store(Slot + row, slot, mask=valid)


@triton.jit(do_not_specialize=["n_p", "n_q", "padded_q", "skip_p", "skip_q"])
def operands_kernel(
    P_rnorm, P_label, P_count, P_scale, P_tag, P_slot, Q_rnorm, Q_label, Q_scale, Q_tag, Beta,
    n_p, n_q, padded_q, skip_p, skip_q,
    EXCLUDE: tl.constexpr, P_SAMPLES: tl.constexpr, P_GATHER: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """The vectors of both sides for the epilogue, see ``quack.Operand``: first the anchors, then the others."""
    of_p = tl.cdiv(n_p, B)
    program = tl.program_id(0)
    if program < of_p:
        scale_and_tag(
            P_rnorm, P_label, P_scale, P_tag, P_slot, tl.load(Beta) * LOG2E, 0.0,
            program * B, used_slots(P_count, n_p), n_p, skip_p, EXCLUDE, P_SAMPLES, P_GATHER, B,
        )  # fmt: skip
    else:
        scale_and_tag(
            Q_rnorm, Q_label, Q_scale, Q_tag, None, 1.0, -1.0,
            (program - of_p) * B, n_q, padded_q, skip_q, EXCLUDE, not P_SAMPLES, False, B,
        )  # fmt: skip


@triton.jit(do_not_specialize=["p_start", "p_stop", "parts", "h_stride", "skip"])
def weighted_entries_kernel(
    Sums, Rnorm, Label, Count, Grad, Beta, Divisor, Lse, Weight, H, p_start, p_stop, parts, h_stride, skip,
    GATHER: tl.constexpr, BP: tl.constexpr, BQ: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Turn ``E`` into ``H`` in place, except for the positives, by the weights ``c_p`` from
    ``Sums[slot - p_start, part]``.

    The first block of columns also writes ``Lse`` of the slot's row, and ``Weight[slot - p_start] = c_p``.
    """
    p_local = tl.program_id(0) * BP
    used = used_slots(Count, p_stop)
    row, _, valid = slot_rows(Label, p_start + p_local, used, skip, GATHER, BP)
    local = p_local + tl.arange(0, BP)
    n = p_stop - p_start
    total = tl.zeros((BP, BS), tl.float32)
    for i in range(0, parts, BS):
        part = i + tl.arange(0, BS)
        at = Sums + local.to(tl.int64)[:, None] * parts + part[None, :]
        total += tl.load(at, mask=valid[:, None] & (part < parts)[None, :], other=0.0)
    total = tl.sum(total, 1)
    empty = total == 0.0  # has no gradient
    weight = tl.load(Grad + row, mask=valid, other=0.0) / tl.where(empty, 1.0, total)
    if Divisor is not None:
        weight *= tl.load(Divisor + 2)
    weight = tl.where(empty, 0.0, weight)
    if tl.program_id(1) == 0:
        lse = tl.log2(total) * LN2 + tl.load(Beta)
        if GATHER:
            tl.store(Lse + row, lse, mask=valid)
        else:
            tl.store(Lse + p_start + local, lse, mask=local < n)
        tl.store(Weight + local, weight, mask=local < n)
    weight *= tl.load(Rnorm + row, mask=valid, other=0.0)
    column = tl.program_id(1) * BQ + tl.arange(0, BQ)
    width = h_stride * 16  # a known multiple of 16, so that the mask does not split 16-byte accesses
    at = H + local.to(tl.int64)[:, None] * width + column[None, :]
    inside = (local < n)[:, None] & (column < width)[None, :]
    h = tl.load(at, mask=inside, other=0.0).to(tl.float32) * weight[:, None]
    tl.store(at, h.to(H.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["m", "k", "p_start", "p_stop", "h_stride", "skip"])
def positives_kernel(
    Target, Pos, Pos_grad, P_rnorm, Q_rnorm, Weight, Slot, Beta, Divisor, H, m, k, p_start, p_stop, h_stride, skip,
    BY_CLASS: tl.constexpr, EXCLUDE: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Write the positives' entries of a panel, one for each sample whose anchor is in [p_start, p_stop).

    They are computed from the positive logits in float32: in E, which has 16 bits, a probability near 1 minus 1 would
    have no correct digits.
    """
    sample = tl.program_id(0) * B + tl.arange(0, B)
    target = tl.load(Target + sample, mask=sample < m, other=skip)
    valid = (target != skip) & (target >= 0) & (target < k)
    label = tl.where(valid, target, 0).to(tl.int32)
    p_row = sample
    q_row = label
    if BY_CLASS:
        p_row = label
        q_row = sample
    anchor = p_row
    if Slot is not None:
        anchor = tl.load(Slot + label, mask=valid, other=-1)
    valid = valid & (anchor >= p_start) & (anchor < p_stop)
    a = tl.load(Pos_grad + sample, mask=valid, other=0.0)
    if Divisor is not None:
        a *= tl.load(Divisor + 2)
    if EXCLUDE == "none":
        e = tl.exp2((tl.load(Pos + sample, mask=valid, other=0.0) - tl.load(Beta)) * LOG2E)
        a = tl.fma(tl.load(Weight + anchor - p_start, mask=valid, other=0.0), e, a)
    h = a * tl.load(P_rnorm + p_row, mask=valid, other=0.0) * tl.load(Q_rnorm + q_row, mask=valid, other=0.0)
    at = H + (anchor - p_start).to(tl.int64) * (h_stride * 16) + q_row
    tl.store(at, h.to(H.dtype.element_ty), mask=valid)
