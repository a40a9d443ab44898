"""Device functions that every kernel of this backend shares.

Vocabulary, used in all kernel files. A kernel sees two operands, matrices with one vector a row:

* ``P``, the *anchors*: a program owns a block of ``BP`` of them and produces something for each;
* ``Q``, the *reduced* operand: the program walks over blocks of ``BQ`` of its rows and sums them up.

The class direction has the prototypes as anchors and the samples reduced; the instance direction is the
same kernel with the operands swapped. ``SAMPLES`` says which of the two an operand is. Where features are
compared with themselves, one tensor is both operands, and either stands for samples and prototypes.

An operand's blocks are made of *slots*. Slot and row are the same number, except for compacted
prototypes (``GATHER``), where slot ``s`` stands for row ``label[s]``.

Every operand may come with integer labels, and a row whose label is ``skip`` is left out:

* samples: the targets, ``skip`` is ``ignore_index``;
* prototypes: nothing; or with ``present_only`` their own number, -1 for the absent; or with the masks
  "self" and "same_label", where row i and column i are one sample, the targets again.

Row lengths and strides are counted in units of ``UNIT`` numbers, their largest common divisor up to 8.
Multiplying by it again inside a kernel is how the compiler learns that rows start at aligned addresses:
its own specialisation looks for multiples of 16, and 1000 columns of bfloat16 are aligned without being one.

Rows that are left out (and the tail past the last row) load as zeros and get a bias of -inf, so that they
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
    """The end of the slots before ``stop`` that are in use; how many are is known on the device only."""
    used = stop
    if Count is not None:
        used = tl.minimum(tl.load(Count), stop)
    return used


@triton.jit
def slot_rows(Label, first, n, skip, GATHER: tl.constexpr, B: tl.constexpr):
    """Slots ``first .. first + B``: their row, their label, and whether they take part."""
    slot = first + tl.arange(0, B)
    inside = slot < n
    if Label is None:
        row = slot
        label = slot
        valid = inside
    else:
        # The tail reads as `skip`, so one comparison answers for tail and left-out rows alike.
        label = tl.load(Label + slot, mask=inside, other=skip)
        valid = label != skip
        if GATHER:
            row = tl.where(valid, label, 0)
        else:
            row = slot
    return row, label, valid


@triton.jit
def paired_rows(Rnorm, valid, first, n, UNSUMMED: tl.constexpr, B: tl.constexpr):
    """Rows that gradient entries may involve: those in the sums and those that are someone's positive.

    They differ in one case (``UNSUMMED``): with the mask "self" a prototype whose own sample is ignored is in
    no sum, but can be another sample's positive. If it is not, its inverse norm is -1.
    """
    if UNSUMMED:
        slot = first + tl.arange(0, B)
        # Not ">= 0": the inverse norm of a row with NaN is NaN, and such a row is there.
        valid = (tl.load(Rnorm + slot, mask=slot < n, other=-1.0) < 0) == 0
    return valid


@triton.jit
def mask_tag(row, label, EXCLUDE: tl.constexpr, SAMPLES: tl.constexpr):
    """The integer that an entry's two sides must not share: equal tags are left out of the sums."""
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
    """What a log-sum-exp knows of some slots: row, whether it takes part, mask tag, inverse norm."""
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
    """What is added to the logits of these rows where they are reduced, in base-2 units; -inf: left out."""
    if Bias is None:
        bias = tl.where(valid, 0.0, -INF)
    else:
        bias = tl.load(Bias + row, mask=valid, other=-INF) * LOG2E
    return bias


@triton.jit
def load_lse(Lse, Grad, row, valid):
    """(lse in base 2, upstream gradient) of some rows, made harmless where there is nothing.

    An empty set has lse = -inf: +inf in its place makes every exp(t - lse) zero, where -inf would give
    inf or NaN, and its upstream gradient, whatever it is, becomes 0. So do rows that are left out.
    """
    lse = tl.load(Lse + row, mask=valid, other=-INF)
    grad = tl.load(Grad + row, mask=valid, other=0.0)
    empty = lse == -INF
    return tl.where(empty, INF, lse * LOG2E), tl.where(empty, 0.0, grad)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b`` in float32. "upcast" is for the interpreter, which multiplies raw bfloat16 bits."""
    if PRECISION == "upcast":
        out = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        out = tl.dot(a, b, acc, input_precision=PRECISION)
    return out


@triton.jit
def load_rows(X, row, valid, stride, d, BD: tl.constexpr, EVEN_D: tl.constexpr):
    """Whole rows, ``BD >= d`` columns; rows that are left out read as zeros and are never touched."""
    col = tl.arange(0, BD)
    # 64-bit: row * stride passes 2^31 at a million rows of 2048.
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

    An epilogue that handles a part of the columns at a time needs registers for that part's temporaries
    only. This is what brings a 128 x 128 tile to 128 registers, two programs a multiprocessor.
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

    With ``WHOLE_D`` the anchors' vectors are on the chip already, as ``p``.
    """
    q_row, _, q_valid = slot_rows(Q_label, q_first, n_q, q_skip, Q_GATHER, BQ)
    if WHOLE_D:
        q = load_rows(Q, q_row, q_valid, q_stride, d, BD, EVEN_D)
        acc = dot(p, tl.trans(q), tl.zeros((p_row.shape[0], BQ), tl.float32), PRECISION)
    else:
        acc = dot_rows(P, p_row, p_valid, p_stride, Q, q_row, q_valid, q_stride, d, d, BD, EVEN_D, PRECISION)
    return column_parts(acc, PARTS)
