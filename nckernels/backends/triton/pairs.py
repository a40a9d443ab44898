"""Samples contrasted with the other samples of their batch, SupCon and SimCLR: loss and gradient in one step.

With unit rows ``u``, labels ``y``, the shares ``g`` of the samples in the loss, and the number ``n_i`` of the others
that have the label of i,

    t_ij  = beta u_i . u_j
    lse_i = log sum_j exp(t_ij)              over j != i, or over y_j != y_i (``NEGATIVES``)
    loss  = sum_i g_i (lse_i - sum_j t_ij / n_i)      the inner sum over j != i with y_j = y_i
    T_ij  = g_i exp(t_ij - lse_i) + g_j exp(t_ij - lse_j) - [y_i = y_j, i != j] (g_i / n_i + g_j / n_j)

and ``sum_j T_ij u_j`` is the gradient by beta u_i, see grad.py. Tiles of t are computed twice and never stored:

* ``pairs_prepare_kernel``: inverse norms;
* ``pairs_lse_kernel``: for every row the sum of its exponentials, and the sum and the number of its positives;
* ``pairs_reduce_kernel``: from these the loss of every row, and its factors in T;
* ``pairs_grad_kernel``: the gradient, accumulated on the chip.

For rows that are too long for that, or float32, the library multiplies, and pairs_panel.py takes the other steps.

Positives are found by comparing labels, any 64-bit integers, in the tiles. No list of the classes is needed. Logits and
log-sum-exps are in base 2.

The vectors that the kernels pass to each other end at a multiple of ``PADDING``, so that they are read without masks. A
row that is left out is an ignored one, or lies past the end. It has an inverse norm of 0 (if ignored, that of
``left_out`` for the library's products), a bias of -inf, which keeps it out of sums, and the tag ``skip``.
"""

import triton
import triton.language as tl

from .finish import project, summand_rnorm
from .lse import shift_of
from .norms import inverse_norm, left_out, square_sums
from .prepare import known_number
from .reduce import power_of, sum_of
from .tiles import INF, LN2, LOG2E, column_parts, dot, dot_rows, load_rows

PADDING = 256
"""A multiple of every tile's sides."""


@triton.jit(do_not_specialize=["n", "d", "stride", "skip", "beta_bits"])
def pairs_prepare_kernel(
    X, Label, Beta_in, Rnorm, Bias, Tag, Beta, n, d, stride, skip, beta_bits,
    UNIT: tl.constexpr, EPS: tl.constexpr, LOOKS: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """``Rnorm[i] = 1 / max(|X[i]|, EPS)``, the bias and the label of BR rows; and ``Beta``, see ``known_number``.

    With ``LOOKS`` ignored rows are read too, and ``left_out`` takes the place of their inverse norms, for
    ``mend_kernel``. The kernel is launched with Triton's debug option, which compiles the assertion.
    """
    d *= UNIT
    stride *= UNIT
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    label = tl.load(Label + row, mask=row < n, other=skip)
    valid = label != skip
    if LOOKS:
        square_sum = square_sums(X, row, row < n, d, stride, BR, BD)
        otherwise = left_out(square_sum)
    else:
        square_sum = square_sums(X, row, valid, d, stride, BR, BD)
        otherwise = tl.zeros((BR,), tl.float32)
    tl.store(Rnorm + row, tl.where(valid, inverse_norm(square_sum, EPS), otherwise))
    tl.store(Bias + row, tl.where(valid, 0.0, -INF))
    tl.store(Tag + row, label)
    if tl.program_id(0) == 0:  # at the end, where the assertion's call has no registers to save
        beta = known_number(Beta_in, beta_bits)
        tl.device_assert((beta > 0) & (beta < INF), "the inverse temperature must be positive and finite")
        tl.store(Beta, beta)


@triton.jit
def relation(p_tag, q_tag, p_first, q_first):
    """For a tile whether its two rows are different ones, and whether these have one label."""
    p_slot = tl.arange(0, p_tag.shape[0]) + (p_first - q_first)
    different = p_slot[:, None] != tl.arange(0, q_tag.shape[0])[None, :]
    return different, different & (p_tag[:, None] == q_tag[None, :])


LANES = tl.constexpr(8)
"""Statistics of a row are kept for column j of a tile in j mod 8, so that no sum in the loop crosses threads."""


@triton.jit
def add_three(a, b, c, x, y, z):
    return a + x, b + y, c + z


@triton.jit
def add_logits(
    s, scale, beta, p_tag, q_tag, p_first, q_first, largest, total, positives, count, NEGATIVES: tl.constexpr
):  # fmt: skip
    """Add a tile of logits ``s`` times the ``scale`` of their row, -inf for left-out columns, to the statistics of the
    rows: the largest logit, without the scale, the sum of exponentials relative to it, and the sum of the positives'
    logits relative to ``beta``, that of equal rows, and their number.

    Where samples have been learnt, the positives and the largest logit are near beta: their differences have no
    rounding error, and the loss is a sum of small numbers. The statistics are (BP, L), for the columns of each residue
    modulo L.
    """
    BP: tl.constexpr = s.shape[0]
    L: tl.constexpr = largest.shape[1]
    C: tl.constexpr = s.shape[1] // L
    different, positive = relation(p_tag, q_tag, p_first, q_first)
    if NEGATIVES:
        summed = different & (positive == 0)
    else:
        summed = different
    t = tl.reshape(tl.where(summed, s, -INF), (BP, C, L))
    new = tl.maximum(largest, tl.max(t, 1))
    shift = shift_of(new) * scale[:, None]
    t = tl.fma(t, scale[:, None, None], -shift[:, None, :])
    if NEGATIVES:  # which t has without the positives
        relative = tl.fma(tl.reshape(s, (BP, C, L)), scale[:, None, None], -shift[:, None, :])
    else:
        relative = t
    positive = tl.reshape(positive, (BP, C, L))
    # One reduction of three tiles: reduced alone, the tile of ones would be laid out anew for every thread.
    e_sum, logits, ones = tl.reduce(
        (tl.exp2(t), tl.where(positive, relative, 0.0), tl.where(positive, 1.0, 0.0)), 1, add_three
    )
    total = tl.fma(total, tl.exp2(tl.fma(largest, scale[:, None], -shift)), e_sum)
    positives += tl.fma(ones, shift - beta, logits)
    return new, total, positives, count + ones


@triton.jit
def store_logits(Partial, part, split, width, slot, mask, largest, total, positives, count):
    """``Partial[0..3, part, slot]``: the statistics of ``add_logits``, (BP, L), with the scale in ``largest``."""
    top = tl.max(largest, 1)
    plane = split.to(tl.int64) * width
    at = Partial + part.to(tl.int64) * width + slot
    tl.store(at, top, mask=mask)
    tl.store(at + plane, tl.sum(total * tl.exp2(largest - shift_of(top)[:, None]), 1), mask=mask)
    tl.store(at + 2 * plane, tl.sum(positives, 1), mask=mask)
    tl.store(at + 3 * plane, tl.sum(count, 1), mask=mask)


@triton.jit(do_not_specialize=["n", "d", "stride", "split"])
def pairs_lse_kernel(
    X, Rnorm, Bias, Tag, Beta, Partial,
    n, width, d, stride, split,
    NEGATIVES: tl.constexpr, BP: tl.constexpr, BQ: tl.constexpr, BD: tl.constexpr, UNIT: tl.constexpr,
    WHOLE_D: tl.constexpr, EVEN_D: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``Partial[0..3, part, i]``, the statistics of ``add_logits`` over the columns of one part."""
    d *= UNIT
    stride *= UNIT
    B: tl.constexpr = BQ // PARTS
    part = tl.program_id(0) % split
    p_first = tl.program_id(0) // split * BP
    p_slot = p_first + tl.arange(0, BP)
    p_tag = tl.load(Tag + p_slot)
    p_valid = tl.load(Bias + p_slot) == 0
    beta = tl.load(Beta) * LOG2E
    p_scale = tl.load(Rnorm + p_slot) * beta
    p = None
    if WHOLE_D:
        p = load_rows(X, p_slot, p_valid, stride, d, BD, EVEN_D)
    largest = tl.full((BP, LANES), -INF, tl.float32)
    total = tl.zeros((BP, LANES), tl.float32)
    positives = tl.zeros((BP, LANES), tl.float32)
    count = tl.zeros((BP, LANES), tl.float32)

    for q_block in range(part, tl.cdiv(n, BQ), split):
        q_slot = q_block * BQ + tl.arange(0, BQ)
        q_valid = tl.load(Bias + q_slot) == 0
        if WHOLE_D:
            q = load_rows(X, q_slot, q_valid, stride, d, BD, EVEN_D)
            acc = dot(p, tl.trans(q), tl.zeros((BP, BQ), tl.float32), PRECISION)
        else:
            acc = dot_rows(X, p_slot, p_valid, stride, X, q_slot, q_valid, stride, d, d, BD, EVEN_D, PRECISION)
        products = column_parts(acc, PARTS)
        for i in tl.static_range(PARTS):
            q_first = q_block * BQ + i * B
            slot = q_first + tl.arange(0, B)
            # Logits without the factor of their row, which the exponential's argument gets.
            s = tl.fma(products[i], tl.load(Rnorm + slot)[None, :], tl.load(Bias + slot)[None, :])
            q_tag = tl.load(Tag + slot)
            largest, total, positives, count = add_logits(
                s, p_scale, beta, p_tag, q_tag, p_first, q_first, largest, total, positives, count, NEGATIVES
            )
    store_logits(Partial, part, split, width, p_slot, None, largest * p_scale[:, None], total, positives, count)


@triton.jit(do_not_specialize=["parts"])
def pairs_reduce_kernel(
    Partial, Rnorm, Bias, Weight, Beta, Shift, Factor, Ratio, Pos, Totals, width, parts,
    NORM_LIMIT: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Combine the parts of every row, in order, to its numbers in T.

    ``Shift[i] = lse_i - log2 g_i``, so that a term is ``exp2(t_ij - Shift[i])``; +inf where there is none: without
    positives, which means g = 0, and for an empty sum. ``Factor[i] = exp2(-Shift[i])``, or instead of it ``Ratio[i]``,
    by which a term must be multiplied because ``Shift[i]`` has been rounded, see ``log_sum``. ``Pos[i] = -g_i / n_i``.
    Of each block ``Totals[0..4, block]`` are the sum of the weighted losses, the sum of the weights, the largest
    weight, the largest factor of a row that is summed up, and the sum of the weighted mean logits of the positives.
    """
    slot = tl.program_id(0) * B + tl.arange(0, B)
    plane = parts.to(tl.int64) * width
    largest = tl.full((B,), -INF, tl.float32)
    total = tl.zeros((B,), tl.float32)
    positives = tl.zeros((B,), tl.float32)
    count = tl.zeros((B,), tl.float32)
    at = Partial + slot
    for _ in range(parts):
        top = tl.load(at)
        new = tl.maximum(largest, top)
        shift = shift_of(new)
        total = tl.fma(tl.load(at + plane), tl.exp2(top - shift), total * tl.exp2(largest - shift))
        positives += tl.load(at + 2 * plane)
        count += tl.load(at + 3 * plane)
        largest = new
        at += width
    counted = (tl.load(Bias + slot) == 0) & (count > 0)
    weight = tl.where(counted, 1.0, 0.0)
    if Weight is not None:
        weight = tl.load(Weight + slot, mask=counted, other=0.0)
    others = tl.maximum(count, 1.0)
    log_total = tl.log2(total)
    empty = (largest == -INF) | (counted == 0)
    # Of logits relative to beta. The log-sum-exp of an empty set counts as 0.
    beta = tl.load(Beta) * LOG2E
    loss = LN2 * (tl.where(empty, -beta, largest - beta) - positives / others + tl.where(empty, 0.0, log_total))
    shift = tl.where(empty, INF, largest + log_total - tl.log2(weight))
    r = summand_rnorm(tl.load(Rnorm + slot), NORM_LIMIT)
    tl.store(Shift + slot, shift)
    if Ratio is not None:
        known = shift < INF  # it is infinite for a weight of 0 too
        exact = tl.where(known, weight, 0.0) * tl.exp2(tl.where(known, shift, largest) - largest) / total
        tl.store(Ratio + slot, tl.where(known, exact, 0.0))
    else:
        tl.store(Factor + slot, tl.exp2(-shift))
    tl.store(Pos + slot, -weight / others)
    out = Totals + tl.program_id(0)
    blocks = tl.num_programs(0)
    tl.store(out, tl.sum(tl.where(counted, weight * loss, 0.0), 0))
    tl.store(out + blocks, tl.sum(weight, 0))
    tl.store(out + 2 * blocks, tl.max(weight, 0))
    tl.store(out + 3 * blocks, tl.max(r, 0))
    tl.store(out + 4 * blocks, tl.sum(tl.where(empty, 0.0, weight * (beta + positives / others)), 0))


@triton.jit
def largest_of(X, n, B: tl.constexpr):
    """The largest of n numbers, at least 0, by one program."""
    best = tl.zeros((B,), tl.float32)
    for i in range(0, n, B):
        index = i + tl.arange(0, B)
        best = tl.maximum(best, tl.load(X + index, mask=index < n, other=0.0))
    return tl.max(best, 0)


@triton.jit
def half_scale(Totals, blocks):
    """The power of two that scales float16 entries ``T r`` to at most 2^15, half of the range; see norms.py."""
    weight = largest_of(Totals + 2 * blocks, blocks, 256)
    rnorm = largest_of(Totals + 3 * blocks, blocks, 256)
    bound = tl.where((weight > 0) & (rnorm > 0), 4.0 * weight * rnorm, 1.0)
    return tl.exp2(tl.clamp(tl.floor(15.0 - tl.log2(bound)), -100.0, 100.0))


@triton.jit
def scale_and_total(Totals, blocks, MEAN: tl.constexpr, NORM_LIMIT: tl.constexpr):
    """The scale of the entries, a power of two, see ``half_scale`` and ``write_divisors``, and a mean's divisor."""
    scale = 1.0
    total = 1.0
    if MEAN:
        total = sum_of(Totals + blocks, blocks, 256)
        total = tl.where(total == 0.0, 1.0, total)  # the mean of nothing is 0
        scale = power_of(total)
    if NORM_LIMIT > 0:
        scale = half_scale(Totals, blocks)
    return scale, total


@triton.jit
def typical_cosine(Totals, blocks, beta):
    """The mean cosine of positives, or 0 if all log-sum-exps are of empty sets.

    The entries T of all pairs add up to 0, but for their rounding errors. The gradient of beta is half of the sum of
    ``T_ij cos_ij``; where features have collapsed most cosines are about the same, and the errors would dominate it.
    Relative to a typical cosine they do not: that cosine times the sum of the entries is subtracted.
    """
    weights = sum_of(Totals + blocks, blocks, 256)
    return sum_of(Totals + 4 * blocks, blocks, 256) / (tl.where(weights == 0.0, 1.0, weights) * (beta * LOG2E))


@triton.jit
def without_rnorm(h, r):
    """The sums over the columns j of ``T_ij``, from ``h = T_ij r_j`` as it has been rounded."""
    return tl.sum(h.to(tl.float32) * tl.where(r > 0, 1.0 / r, 0.0)[None, :], 1)


@triton.jit
def sum_of_entries(
    X, Rnorm, Bias, Tag, Shift, Factor, Pos, p, p_tag, p_scale, p_shift, p_weight, p_first, scale,
    part, n, d, stride, split,
    NEGATIVES: tl.constexpr, ONCE: tl.constexpr, ADDED: tl.constexpr,
    BP: tl.constexpr, BQ: tl.constexpr, BD: tl.constexpr,
    EVEN_D: tl.constexpr, NORM_LIMIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``scale * sum_j T_ij r_j x_j`` over the blocks of one part, ``p_weight`` being ``-g_i / n_i``. With ``ONCE`` the
    two exponentials of an entry are one, ``exp2(t) (exp2(-Shift[i]) + exp2(-Shift[j]))``. With ``ADDED`` also
    ``scale * sum_j T_ij``, of the rounded entries, else zeros."""
    acc = tl.zeros((BP, BD), tl.float32)
    added = tl.zeros((BP,), tl.float32)
    # The scale is applied before the inverse norms, which can be 1e12.
    exponent = tl.log2(scale)
    p_shift -= exponent
    p_factor = tl.exp2(-p_shift)
    p_weight *= scale
    for q_block in range(part, tl.cdiv(n, BQ), split):
        q_first = q_block * BQ
        q_slot = q_first + tl.arange(0, BQ)
        q_bias = tl.load(Bias + q_slot)
        q = load_rows(X, q_slot, q_bias == 0, stride, d, BD, EVEN_D)
        s = dot(p, tl.trans(q), tl.zeros((BP, BQ), tl.float32), PRECISION)
        q_rnorm = tl.load(Rnorm + q_slot)
        r = summand_rnorm(q_rnorm, NORM_LIMIT)
        # Without the bias the term of a left-out row would be 0 times exp2(-Shift[i]), which can be infinite.
        t = tl.fma(s * p_scale[:, None], q_rnorm[None, :], q_bias[None, :])
        if ONCE:
            a = tl.exp2(t) * tl.fma(p_factor[:, None], r[None, :], (tl.load(Factor + q_slot) * scale * r)[None, :])
        else:
            q_shift = tl.load(Shift + q_slot) - exponent
            a = (tl.exp2(t - p_shift[:, None]) + tl.exp2(t - q_shift[None, :])) * r[None, :]
        different, positive = relation(p_tag, tl.load(Tag + q_slot), p_first, q_first)
        pair = tl.fma(p_weight[:, None], r[None, :], (tl.load(Pos + q_slot) * scale * r)[None, :])
        if NEGATIVES:
            a = tl.where(positive, pair, a)
        else:
            a += tl.where(positive, pair, 0.0)
        a = tl.where(different, a, 0.0).to(q.dtype)
        if ADDED:
            added += without_rnorm(a, r)
        acc = dot(a, q, acc, PRECISION)
    return acc, added


@triton.jit(do_not_specialize=["n", "d", "stride", "split", "blocks"])
def pairs_grad_kernel(
    X, Rnorm, Bias, Tag, Shift, Factor, Pos, Totals, Beta,
    Out, Dot, Rest, Part, Divisor, Loss,
    n, d, stride, split, blocks,
    NEGATIVES: tl.constexpr, MEAN: tl.constexpr, MAY_SHARE: tl.constexpr,
    BP: tl.constexpr, BQ: tl.constexpr, BD: tl.constexpr, UNIT: tl.constexpr, EVEN_D: tl.constexpr,
    EPS: tl.constexpr, NORM_LIMIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of a block of rows of at most BD columns, as ``grad_kernel``; and the ``Loss``.

    The entries are scaled, see ``scale_and_total``, and the finished gradient is divided by the rest of the divisor.
    ``split`` programs that share a block leave their sums in ``Part``, and in ``Divisor`` the divisor for
    ``finish_kernel``. ``Rest[program]``, if given, is what is to be added to the sum of ``Dot``, see
    ``typical_cosine``. For ``MAY_SHARE`` see ``grad_kernel``.
    """
    d *= UNIT
    stride *= UNIT
    part = tl.program_id(0) % split
    p_first = tl.program_id(0) // split * BP
    scale, total = scale_and_total(Totals, blocks, MEAN, NORM_LIMIT)
    divisor = scale * total
    if tl.program_id(0) == 0:
        tl.store(Loss, sum_of(Totals, blocks, 256) / total)
        tl.store(Divisor, divisor)

    beta = tl.load(Beta)
    once = False
    if MAY_SHARE:  # and if the factors, which contain the weights, stay in range
        weight = largest_of(Totals + 2 * blocks, blocks, 256)
        once = (beta * LOG2E < 64.0) & (weight > 2.0**-32) & (weight < 2.0**32)
    p_slot = p_first + tl.arange(0, BP)
    p_tag = tl.load(Tag + p_slot)
    p_valid = tl.load(Bias + p_slot) == 0
    p_rnorm = tl.load(Rnorm + p_slot)
    p_shift = tl.load(Shift + p_slot)
    p_weight = tl.load(Pos + p_slot)
    p_scale = p_rnorm * (beta * LOG2E)
    p = load_rows(X, p_slot, p_valid, stride, d, BD, EVEN_D)
    if once:
        acc, added = sum_of_entries(
            X, Rnorm, Bias, Tag, Shift, Factor, Pos, p, p_tag, p_scale, p_shift, p_weight, p_first, scale,
            part, n, d, stride, split, NEGATIVES, True, Rest is not None, BP, BQ, BD, EVEN_D, NORM_LIMIT, PRECISION,
        )  # fmt: skip
    else:
        acc, added = sum_of_entries(
            X, Rnorm, Bias, Tag, Shift, Factor, Pos, p, p_tag, p_scale, p_shift, p_weight, p_first, scale,
            part, n, d, stride, split, NEGATIVES, False, Rest is not None, BP, BQ, BD, EVEN_D, NORM_LIMIT, PRECISION,
        )  # fmt: skip

    if Rest is not None:
        rest = tl.sum(tl.where(p_valid, added, 0.0), 0) / divisor
        tl.store(Rest + tl.program_id(0), -typical_cosine(Totals, blocks, beta) * rest)
    col = tl.arange(0, BD)
    inside = (p_slot < n)[:, None] & (col < d)[None, :]
    if Part is not None:
        at = Part + (part.to(tl.int64) * n + p_slot)[:, None] * d + col[None, :]
        tl.store(at, acc, mask=inside)
    else:
        # Loaded again: kept through the loop, the rows would occupy registers or shared memory twice.
        x = load_rows(X, p_slot, p_valid, stride, d, BD, EVEN_D).to(tl.float32)
        weight = p_rnorm / divisor
        grad, along = project(acc, x, p_rnorm, weight * beta, EPS)
        at = Out + p_slot.to(tl.int64)[:, None] * d + col[None, :]
        tl.store(at, tl.where(p_valid[:, None], grad, 0.0).to(Out.dtype.element_ty), mask=inside)
        if Dot is not None:
            tl.store(Dot + p_slot, tl.where(p_valid, weight * along, 0.0), mask=p_slot < n)
