"""SupCon's statistics and entries, see pairs.py, of a panel whose products the vendor's library has computed.

A panel has some samples with all others. As in panel.py, ``Products[slot - p_start, q]`` are ``x_p . x_q`` without
norms. Rows start at multiples of 16 numbers, strides are in units of 16, and neither the tails of rows nor the products
of left-out rows are used. The order of launches is in pairs_step.py:

* the statistics of all panels, ``pairs_panel_lse_kernel``;
* ``pairs_reduce_kernel``, and ``pairs_scale_kernel`` for what is one number;
* the entries of all panels, ``pairs_panel_entries_kernel``. They contain both directions, so that one product of the
  library completes the gradient of a panel's samples.

In float32 an entry is as exact as eager PyTorch's, also where it is the difference of a probability and a positive of
nearly the same size: a logit is the same number in both kernels, and on both sides of the diagonal, and the rounding of
a log-sum-exp is in ``Ratio``.
"""

import triton
import triton.language as tl

from .finish import summand_rnorm
from .pairs import add_logits, relation, scale_and_total, store_logits, typical_cosine, without_rnorm
from .panel import stored_products
from .reduce import sum_of
from .tiles import INF, LOG2E


@triton.jit
def panel_rows(Rnorm, Bias, Tag, first, stop, B: tl.constexpr):
    """Slots, validity, inverse norms and tags of rows up to ``stop``; their vectors are padded."""
    slot = first + tl.arange(0, B)
    valid = (slot < stop) & (tl.load(Bias + slot) == 0)
    return slot, valid, tl.load(Rnorm + slot), tl.load(Tag + slot)


@triton.jit
def logits_of(products, p_rnorm, q_rnorm, beta):
    """Logits in base 2, like ``beta``. The norms are multiplied first, so that t_ij and t_ji are equal."""
    return products * ((p_rnorm[:, None] * q_rnorm[None, :]) * beta)


@triton.jit(do_not_specialize=["p_start", "p_stop", "n", "t_stride", "split"])
def pairs_panel_lse_kernel(
    Products, Rnorm, Bias, Tag, Beta, Partial, p_start, p_stop, n, width, t_stride, split,
    NEGATIVES: tl.constexpr, BP: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """``Partial[0..3, part, slot]``: the statistics of ``add_logits`` for the slots [p_start, p_stop); program ``part``
    of the ``split`` that share a block takes every ``split``-th block of columns."""
    part = tl.program_id(0) % split
    p_local = tl.program_id(0) // split * BP
    p_first = p_start + p_local
    slot, p_valid, p_rnorm, p_tag = panel_rows(Rnorm, Bias, Tag, p_first, p_stop, BP)
    beta = tl.load(Beta) * LOG2E
    largest = tl.full((BP, 1), -INF, tl.float32)
    total = tl.zeros((BP, 1), tl.float32)
    positives = tl.zeros((BP, 1), tl.float32)
    count = tl.zeros((BP, 1), tl.float32)
    one = tl.full((BP,), 1.0, tl.float32)  # the logits have the scale of their rows
    for q_block in range(part, tl.cdiv(n, BQ), split):
        q_first = q_block * BQ
        _, q_valid, q_rnorm, q_tag = panel_rows(Rnorm, Bias, Tag, q_first, n, BQ)
        products = stored_products(Products, p_local, q_first, p_valid, q_valid, t_stride, BP, BQ)
        s = tl.where(q_valid[None, :], logits_of(products, p_rnorm, q_rnorm, beta), -INF)
        largest, total, positives, count = add_logits(
            s, one, beta, p_tag, q_tag, p_first, q_first, largest, total, positives, count, NEGATIVES
        )  # fmt: skip
    store_logits(Partial, part, split, width, slot, slot < p_stop, largest, total, positives, count)


@triton.jit(do_not_specialize=["blocks"])
def pairs_scale_kernel(Totals, Beta, Scale, Loss, blocks, MEAN: tl.constexpr, NORM_LIMIT: tl.constexpr):
    """The ``Loss``; the divisor of the gradient, ``Scale[0]``; the scale of the entries, ``Scale[1]``; and the factor
    of a ``Rest``, ``Scale[2]``, see ``typical_cosine``."""
    scale, total = scale_and_total(Totals, blocks, MEAN, NORM_LIMIT)
    tl.store(Scale, scale * total)
    tl.store(Scale + 1, scale)
    tl.store(Scale + 2, -typical_cosine(Totals, blocks, tl.load(Beta)) / (scale * total))
    tl.store(Loss, sum_of(Totals, blocks, 256) / total)


@triton.jit(do_not_specialize=["p_start", "p_stop", "n", "t_stride", "h_stride"])
def pairs_panel_entries_kernel(
    Products, Rnorm, Bias, Tag, Shift, Ratio, Pos, Beta, Scale, H, Rest, p_start, p_stop, n, t_stride, h_stride,
    NEGATIVES: tl.constexpr, BP: tl.constexpr, BQ: tl.constexpr, NORM_LIMIT: tl.constexpr,
):  # fmt: skip
    """One tile of ``H[slot - p_start, j] = T_ij r_j``, scaled; 0 for left-out rows. ``H`` may be ``Products``.

    To ``Rest[program]``, if given, is added what is to be added to the gradient of beta, see ``typical_cosine``.
    """
    q_blocks = tl.cdiv(n, BQ)
    p_local = tl.program_id(0) // q_blocks * BP
    q_first = tl.program_id(0) % q_blocks * BQ
    p_first = p_start + p_local
    p_slot, p_valid, p_rnorm, p_tag = panel_rows(Rnorm, Bias, Tag, p_first, p_stop, BP)
    q_slot, q_valid, q_rnorm, q_tag = panel_rows(Rnorm, Bias, Tag, q_first, n, BQ)
    products = stored_products(Products, p_local, q_first, p_valid, q_valid, t_stride, BP, BQ)
    t = logits_of(products, p_rnorm, q_rnorm, tl.load(Beta) * LOG2E)
    a = tl.exp2(t - tl.load(Shift + p_slot)[:, None]) * tl.load(Ratio + p_slot)[:, None]
    a = tl.fma(tl.exp2(t - tl.load(Shift + q_slot)[None, :]), tl.load(Ratio + q_slot)[None, :], a)
    different, positive = relation(p_tag, q_tag, p_first, q_first)
    pair = tl.load(Pos + p_slot)[:, None] + tl.load(Pos + q_slot)[None, :]
    if NEGATIVES:
        a = tl.where(positive, pair, a)
    else:
        a += tl.where(positive, pair, 0.0)
    # The scale comes before the inverse norms, which can be 1e12.
    r = summand_rnorm(q_rnorm, NORM_LIMIT)
    h = a * tl.load(Scale + 1) * r[None, :]
    h = tl.where(different & p_valid[:, None] & q_valid[None, :], h, 0.0).to(H.dtype.element_ty)
    if Rest is not None:
        at = Rest + tl.program_id(0)
        tl.store(at, tl.load(at) + tl.load(Scale + 2) * tl.sum(without_rnorm(h, r), 0))
    rows = p_local + tl.arange(0, BP)
    width = h_stride * 16
    at = H + rows.to(tl.int64)[:, None] * width + q_slot[None, :]
    tl.store(at, h, mask=(p_slot < p_stop)[:, None] & (q_slot < width)[None, :])
