"""The epilogue of a panel's product: exponentials and their sums, computed while products are in registers.

quack's product is a persistent kernel: one warp loads tiles of both operands, other warps multiply them, and a plain
Python function, the *epilogue*, is applied to the accumulators before they are stored. Ours is the whole forward
pass. For anchors P and others Q, with ``s_p = r_p beta log2 e`` and ``c = beta log2 e``:

    e     = 2^(acc s_p r_q - c)     acc is the product p . q; cosines are at most 1, and therefore e too
    sums += e                       float32, one number for each anchor and each tile of columns
    E     = e r_q                   stored, in 16 bits

``contract.py`` defines the same in PyTorch, with left-out rows and excluded entries. A value here is one entry or, on
data-centre Blackwell, a pair of neighbours, which its units add and multiply together.
"""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Boolean, Float32, const_expr
from quack.compile_utils import make_fake_tensor
from quack.epilogue import gemm_epilogue, pexp2
from quack.epilogue.ops import ColVecLoad, ColVecReduce, RowVecLoad


class PaddedRow(RowVecLoad):
    """A vector over the columns that is padded to whole tiles.

    Past the last column products are 0, but their exponentials are not, so the padding marks these columns as left out.
    quack expects a vector of the matrix's width; the length of this one is independent of it.
    """

    def host_fake_arg(self, key, fctx):
        return make_fake_tensor(key[0], (cute.sym_int(divisibility=4),), leading_dim=0, divisibility=4)


@cute.jit
def product(a, b, c):
    """``a b + c``."""
    if const_expr(isinstance(a, tuple)):
        return a.fma(b, c)
    else:
        return a * b + c


@cute.jit
def unless_left_out(e, scale):
    """``e``, or 0 where a row is left out. Selected, not multiplied: ``e`` may be NaN there.

    A scale of NaN belongs to a row with NaN that is not left out, whose NaN must reach the result.
    """
    if const_expr(isinstance(e, tuple)):
        return type(e)(*(unless_left_out(*entry) for entry in zip(e, scale, strict=True)))
    else:
        return Float32(0.0) if Boolean(scale <= 0.0) else e


@cute.jit
def unless_excluded(e, scale, p_tag, q_tag):
    """The same, and 0 where the tags are equal, in one selection."""
    if const_expr(isinstance(e, tuple)):
        return type(e)(*(unless_excluded(*entry) for entry in zip(e, scale, p_tag, q_tag, strict=True)))
    else:
        return Float32(0.0) if Boolean(scale <= 0.0) | Boolean(p_tag == q_tag) else e


SCALES = {"p_scale": ColVecLoad("p_scale"), "q_scale": PaddedRow("q_scale")}
TAGS = {"p_tag": ColVecLoad("p_tag"), "q_tag": PaddedRow("q_tag")}


@gemm_epilogue(ops=SCALES, reduces={"sums": ColVecReduce("sums")})
def exponentials(acc, p_scale, q_scale, shift):
    """Without excluded entries: NTCE, NormFace, InfoNCE."""
    scale = p_scale * q_scale
    e = unless_left_out(pexp2(product(acc, scale, -shift)), scale)
    return {"D": e * q_scale, "sums": e}


@gemm_epilogue(ops=SCALES | TAGS, reduces={"sums": ColVecReduce("sums")})
def exponentials_of_others(acc, p_scale, q_scale, p_tag, q_tag, shift):
    """Without the entries of a class and its own samples, which have equal tags: NONL."""
    scale = p_scale * q_scale
    e = unless_excluded(pexp2(product(acc, scale, -shift)), scale, p_tag, q_tag)
    return {"D": e * q_scale, "sums": e}
