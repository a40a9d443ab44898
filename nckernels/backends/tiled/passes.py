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
from torch import Tensor

from ..base import Needs, Reduced, Spec, Step
from .backward import long_rows, short_rows
from .forward import log_sum_exp
from .kernels import StepKernels
from .step import prepared, results


def fit(features: Tensor, spec: Spec) -> bool:
    """Whether two passes in one call take the problem."""
    return features.shape[0] > 0 and not spec.square


def passes(kernels: StepKernels, reduced: Reduced, needs: Needs) -> Step:
    """See :meth:`nckernels.backends.base.Backend.step`; the gradients are as in ``step.step``."""
    vectors, samples, classes = prepared(kernels, reduced, needs, looks=False)
    p, q = (classes, samples) if kernels.spec.by_class else (samples, classes)
    log_sum_exp(kernels, p, q, vectors.lse, vectors.instance_lse)
    scales: tuple[Tensor | None, ...] = None, None, None
    if samples.x.dtype == torch.float16:
        three = torch.empty(3, dtype=torch.float32, device=samples.x.device)
        kernels.half_scale(samples, classes, three)
        scales = three[0:], three[1:], three[2:]
    for_samples, for_classes = results(samples, classes, needs, vectors)
    blocks, divisor = kernels.short_blocks(samples, classes), vectors.divisor
    if blocks is not None:
        short_rows(kernels, for_samples, classes, scales[0], blocks, divisor)
        short_rows(kernels, for_classes, samples, scales[1], blocks, divisor)
    elif samples.slots >= classes.slots:
        long_rows(kernels, for_samples, for_classes, scales[2], divisor)
    else:
        long_rows(kernels, for_classes, for_samples, scales[2], divisor)
    kernels.write_loss(vectors)
    dot = vectors.dot
    return Step(vectors.loss, for_samples.out, for_classes.out, None if dot is None else dot.sum())
