"""Device functions shared by the kernels of this backend, and the vocabulary of all kernel files.

A kernel has two operands, matrices with one vector per row:

* ``P``, the *anchors*: a program owns a block of ``BP`` of them and computes a result for each;
* ``Q``, the *reduced* operand: the program loops over blocks of ``BQ`` of its rows and sums over them.

In the class direction the prototypes are the anchors and the samples are reduced; the instance direction is the
same kernel with the operands swapped. ``SAMPLES`` says which of the two an operand is. Where features are
compared with themselves, one tensor is both operands, and each side acts as samples and as prototypes.

An operand consists of *slots*. Slot ``s`` is row ``s``, except for compacted prototypes (``GATHER``), where slot ``s``
is row ``label[s]``.

An operand may have integer labels, and a row whose label is ``skip`` is *left out*:

* samples: the targets, ``skip`` is ``ignore_index``;
* prototypes: none; or with ``present_only`` their own class numbers, -1 for absent classes; or with the masks
  "self" and "same_label", where row i and column i are one sample, the targets.

Row lengths and strides are in units of ``UNIT`` numbers, their largest common divisor up to 8. Kernels multiply by
``UNIT``, from which the compiler infers that rows start at aligned addresses. Its own specialisation recognises
multiples of 16 only, but 1000 columns of bfloat16, for example, are aligned as well.

Left-out rows (and the tail past the last row) load as zeros and get a bias of -inf, so that they
drop out of a log-sum-exp without a comparison for every entry.
"""

import triton
import triton.language as tl

from ..tiled import sides

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))
NOT_FINITE = tl.constexpr(sides.NOT_FINITE)


@triton.jit
def used_slots(Count, stop):
    """The end of the slots in use, at most ``stop``. Only the device knows their number."""
    used = stop
    if Count is not None:
        used = tl.minimum(tl.load(Count), stop)
    return used


@triton.jit
def slot_rows(Label, first, n, skip, GATHER: tl.constexpr, B: tl.constexpr):
    """Row, label and validity (not left out, not past the end) of the slots ``first .. first + B``."""
    slot = first + tl.arange(0, B)
    inside = slot < n
    if Label is None:
        row = slot
        label = slot
        valid = inside
    else:
        # The tail reads as `skip`, so one comparison covers the tail and left-out rows.
        label = tl.load(Label + slot, mask=inside, other=skip)
        valid = label != skip
        if GATHER:
            row = tl.where(valid, label, 0)
        else:
            row = slot
    return row, label, valid


@triton.jit
def paired_rows(Rnorm, valid, first, n, UNSUMMED: tl.constexpr, B: tl.constexpr):
    """Rows that may have gradient entries: rows in the sums, and positives.

    They differ from ``valid`` in one case (``UNSUMMED``): with the mask "self" a prototype whose own sample is ignored
    is in no sum, but can be another sample's positive. If it is not, its inverse norm is negative.
    """
    if UNSUMMED:
        slot = first + tl.arange(0, B)
        # Not ">= 0": a row with NaN has an inverse norm of NaN, and is not left out.
        valid = (tl.load(Rnorm + slot, mask=slot < n, other=-1.0) < 0) == 0
    return valid


@triton.jit
def mask_tag(row, label, EXCLUDE: tl.constexpr, SAMPLES: tl.constexpr):
    """An integer per row; entries whose two sides have equal tags are excluded from the sums."""
    if EXCLUDE == "same_label":
        tag = label  # any 64-bit integers: narrowing could make different labels equal
    elif EXCLUDE == "target" and SAMPLES:
        tag = label.to(tl.int32)
    else:
        tag = row
    return tag


@triton.jit
def summed_rows(
    Rnorm, Label, first, n, skip,
    EXCLUDE: tl.constexpr, SAMPLES: tl.constexpr, GATHER: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """The data of some slots for a log-sum-exp: row, validity, mask tag, inverse norm."""
    row, label, valid = slot_rows(Label, first, n, skip, GATHER, B)
    return row, valid, mask_tag(row, label, EXCLUDE, SAMPLES), tl.load(Rnorm + row, mask=valid, other=0.0)


@triton.jit
def positive_of(row, label, EXCLUDE: tl.constexpr):
    """The row of a sample's positive prototype."""
    if EXCLUDE == "same_label":
        positive = row
    else:
        positive = label.to(tl.int32)
    return positive


@triton.jit
def row_bias(Bias, row, valid):
    """The bias of the logits of reduced rows, in base 2; -inf for left-out rows."""
    if Bias is None:
        bias = tl.where(valid, 0.0, -INF)
    else:
        bias = tl.load(Bias + row, mask=valid, other=-INF) * LOG2E
    return bias


@triton.jit
def logit_scale(rnorm, beta, WITH_BETA: tl.constexpr):
    """The factor of a row in its logits in base 2, see ``logit_factors``. One of the two sides has beta."""
    if WITH_BETA:
        rnorm *= beta * LOG2E
    return rnorm


@triton.jit
def logit_factors(products, p_scale, q_scale, EXACT: tl.constexpr):
    """Two tiles whose product is that of the three arguments: logits in base 2, to which ``tl.fma`` adds a bias.

    With ``EXACT``, in float32, the scales are multiplied first, and the samples have beta, whether they are P or Q. So
    a logit is the same number in both passes. Where a probability is near 1, and 1 is subtracted, one rounding would be
    an error. (Of features against themselves, P are the samples.) Otherwise, with beta in P's scale, fewer registers
    are needed.
    """
    if EXACT:
        return products, p_scale[:, None] * q_scale[None, :]
    else:
        return products * p_scale[:, None], q_scale[None, :]


@triton.jit
def in_base_2(lse):
    """Natural log-sum-exps in base 2. An empty set has lse = -inf. It is replaced by +inf, so that every exp(t - lse)
    is zero; -inf would give inf or NaN."""
    return tl.where(lse == -INF, INF, lse * LOG2E)


@triton.jit
def load_lse(Lse, Ratio, Grad, row, valid):
    """(lse in base 2, upstream gradient times the ratio of ``log_sum``) of some rows, without a contribution from empty
    sets and left-out rows: their gradients are 0."""
    lse = tl.load(Lse + row, mask=valid, other=-INF)
    grad = tl.load(Grad + row, mask=valid, other=0.0)
    if Ratio is not None:
        grad *= tl.load(Ratio + row, mask=valid, other=0.0)
    return in_base_2(lse), tl.where(lse == -INF, 0.0, grad)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b`` in float32. "upcast" is for the interpreter, which would multiply the bits of bfloat16."""
    if PRECISION == "upcast":
        out = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        out = tl.dot(a, b, acc, input_precision=PRECISION)
    return out


@triton.jit
def load_rows(X, row, valid, stride, d, BD: tl.constexpr, EVEN_D: tl.constexpr):
    """Whole rows, ``BD >= d`` columns; left-out rows are zeros and are not read."""
    col = tl.arange(0, BD)
    # 64 bits: row * stride exceeds 2^31 at a million rows of 2048.
    ptr = X + row.to(tl.int64)[:, None] * stride + col[None, :]
    if EVEN_D:
        x = tl.load(ptr, mask=valid[:, None], other=0.0)
    else:
        x = tl.load(ptr, mask=valid[:, None] & (col < d)[None, :], other=0.0)
    return x


@triton.jit
def dot_rows(
    P, p_row, p_valid, p_stride,
    Q, q_row, q_valid, q_stride,
    d, stop,
    BD: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The (BP, BQ) products of two blocks of rows, in steps of BD columns up to ``stop`` (d, or 0: none)."""
    col = tl.arange(0, BD)
    p_ptr = P + p_row.to(tl.int64)[:, None] * p_stride + col[None, :]
    q_ptr = Q + q_row.to(tl.int64)[:, None] * q_stride + col[None, :]
    acc = tl.zeros((p_row.shape[0], q_row.shape[0]), tl.float32)
    for k in range(0, stop, BD):
        if EVEN_D:
            p = tl.load(p_ptr, mask=p_valid[:, None], other=0.0)
            q = tl.load(q_ptr, mask=q_valid[:, None], other=0.0)
        else:
            inside = (col < d - k)[None, :]
            p = tl.load(p_ptr, mask=p_valid[:, None] & inside, other=0.0)
            q = tl.load(q_ptr, mask=q_valid[:, None] & inside, other=0.0)
        acc = dot(p, tl.trans(q), acc, PRECISION)
        p_ptr += BD
        q_ptr += BD
    return acc


@triton.jit
def halves(x):
    """The left and the right half of a tile's columns.

    An epilogue that processes a part of the columns at a time needs registers only for the temporaries of that part.
    This brings a 128 x 128 tile down to 128 registers, so that two programs fit a multiprocessor.
    """
    x = tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2))
    left, right = tl.split(tl.permute(x, (0, 2, 1)))
    return left, right


@triton.jit
def column_parts(x, PARTS: tl.constexpr):
    """A tile's columns in 1, 2, 4 or 8 equal parts, left to right."""
    if PARTS == 1:
        parts = (x, x)[:1]
    elif PARTS == 2:
        parts = halves(x)
    else:
        left, right = halves(x)
        parts = column_parts(left, PARTS // 2) + column_parts(right, PARTS // 2)
    return parts


@triton.jit
def tile_products(
    p, P, p_row, p_valid, p_stride,
    Q, Q_label, q_first, n_q, q_stride, q_skip, d,
    Q_GATHER: tl.constexpr, BQ: tl.constexpr, BD: tl.constexpr,
    WHOLE_D: tl.constexpr, EVEN_D: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The products of the anchors with a block of Q, its columns in ``PARTS``.

    With ``WHOLE_D`` the anchors' rows are already on the chip, in ``p``.
    """
    q_row, _, q_valid = slot_rows(Q_label, q_first, n_q, q_skip, Q_GATHER, BQ)
    if WHOLE_D:
        q = load_rows(Q, q_row, q_valid, q_stride, d, BD, EVEN_D)
        acc = dot(p, tl.trans(q), tl.zeros((p_row.shape[0], BQ), tl.float32), PRECISION)
    else:
        acc = dot_rows(P, p_row, p_valid, p_stride, Q, q_row, q_valid, q_stride, d, d, BD, EVEN_D, PRECISION)
    return column_parts(acc, PARTS)
