"""Loss and gradient by a forward and a backward pass, in one call.

Rows that fit the chip accumulate their gradients there, and of two directions each needs the sums of the whole matrix:
such problems compute the tiles twice, see forward.py and backward.py. But the gradient of a sum or mean is known, up to
a factor, when the sums are (step.py). In one call no operator is needed between the two passes, and few before and
after them:

    norms, positives, shares of the samples
    log-sum-exps
    dP, dQ
    loss
"""

from __future__ import annotations

import torch

from ..base import Needs, Reduced, Step
from .backward import both_sides
from .forward import log_sum_exp
from .kernels import StepKernels
from .sides import Side
from .step import prepared, results


def passes(kernels: StepKernels, reduced: Reduced, needs: Needs) -> Step:
    """See :meth:`nckernels.backends.base.Backend.step`; the gradients are as in ``step.step``."""
    vectors, samples, classes = prepared(kernels, reduced, needs, looks=False)
    samples, classes = with_ratio(samples), with_ratio(classes)
    p, q = (classes, samples) if kernels.spec.by_class else (samples, classes)
    log_sum_exp(kernels, p, q, vectors.lse, vectors.instance_lse)
    for_samples, for_classes = results(samples, classes, needs, vectors)
    both_sides(kernels, for_samples, for_classes)
    kernels.write_loss(vectors)
    dot = vectors.dot
    return Step(vectors.loss, for_samples.out, for_classes.out, None if dot is None else dot.sum())


def with_ratio(side: Side) -> Side:
    """A side with room for the ratios of its log-sum-exps, if it has these and they matter."""
    if side.lse is None or side.x.dtype != torch.float32:
        return side
    return side._replace(ratio=torch.empty_like(side.lse))
