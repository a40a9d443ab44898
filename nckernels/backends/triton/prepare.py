"""The preparation of loss and gradient in one call: one launch for everything that is O(M d) or O(K d).

The upstream gradients of a reduced loss are its weights, which are known before the log-sum-exps. So one kernel writes,
besides the norms and positives of norms.py, each sample's share in the loss, the sums of the shares by class, and the
divisors of a mean.
"""

import triton
import triton.language as tl

from .norms import inverse_norm, left_out, positives_of, square_sums, with_partners
from .reduce import write_divisors
from .tiles import INF


@triton.jit
def known_number(X, bits):
    """A float32 number from memory, or from the bits of one that the host knows: a launch passes integers only."""
    if X is not None:
        number = tl.load(X)
    else:
        number = bits.to(tl.float32, bitcast=True)
    return number


@triton.jit(do_not_specialize=["m", "k", "d", "z_stride", "w_stride", "skip", "beta_bits", "sample_programs"])
def prepare_step_kernel(
    Z, W, Target, Weight, Beta_in,
    Z_rnorm, Pos, Share, Pos_grad, Half_share, Z_broken, W_rnorm, W_broken, Mark, Of_class, Divisor, Beta,
    m, k, d, z_stride, w_stride, skip, beta_bits, sample_programs,
    NOTHING_IS_ZERO: tl.constexpr, UNIT: tl.constexpr, EPS: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
    B: tl.constexpr,
):  # fmt: skip
    """Everything that is O(M d) or O(K d) before the products of one step, see ``tiled.kernels.Vectors``.

    Program 0 writes what is one number: ``Beta``, see ``known_number``, and the divisors of a mean. The next
    ``sample_programs`` programs are as in ``prepare_samples_kernel``; they also write the shares of the samples and add
    them up by class. Further programs, if any, read the prototypes: for ``W_broken``, or without ``Mark`` for the norms
    of all classes. The programs of the classes that occur and those of their samples do not wait for each other.

    The kernel is launched with Triton's debug option, which compiles the assertions.
    """
    d *= UNIT
    z_stride *= UNIT
    w_stride *= UNIT
    program = tl.program_id(0)
    beta = known_number(Beta_in, beta_bits)
    if program == 0:
        tl.device_assert((beta > 0) & (beta < INF), "the inverse temperature must be positive and finite")
        tl.store(Beta, beta)
        if Divisor is not None:
            write_divisors(Target, Weight, Divisor, m, k, skip, NOTHING_IS_ZERO, B)
    elif program <= sample_programs:
        row = (program - 1) * BR + tl.arange(0, BR)
        inside = row < m
        target = tl.load(Target + row, mask=inside, other=skip)
        valid, partner = positives_of(target, k, skip)
        z_square, r_z, r_w, logit = with_partners(
            Z, W, row, inside, partner, valid, beta, d, z_stride, w_stride, EPS, BR, BD
        )  # fmt: skip
        share = tl.where(valid, 1.0, 0.0)
        if Weight is not None:
            share = tl.load(Weight + row, mask=valid, other=0.0)
        tl.store(Z_rnorm + row, tl.where(valid, r_z, left_out(z_square)), mask=inside)
        tl.store(Pos + row, tl.where(valid, logit, 0.0), mask=inside)
        tl.store(Share + row, share, mask=inside)
        tl.store(Pos_grad + row, -share, mask=inside)
        if Z_broken is not None:
            # All programs that write to one place write the same value.
            tl.store(Z_broken + row * 0, 1, mask=inside & (valid == 0) & ((z_square < INF) == 0))
        if Mark is not None:
            tl.store(Mark + partner, 1, mask=valid)
            tl.store(W_rnorm + partner, r_w, mask=valid)
        if Half_share is not None:  # both directions: the loss is the mean of two
            share *= 0.5
            tl.store(Half_share + row, share, mask=inside)
        if Of_class is not None:
            tl.atomic_add(Of_class + partner, share, mask=valid, sem="relaxed")
    else:
        row = (program - 1 - sample_programs) * BR + tl.arange(0, BR)
        inside = row < k
        square_sum = square_sums(W, row, inside, d, w_stride, BR, BD)
        if Mark is None:
            tl.store(W_rnorm + row, inverse_norm(square_sum, EPS), mask=inside)
        if W_broken is not None:
            tl.store(W_broken + row * 0, 1, mask=inside & ((square_sum < INF) == 0))
