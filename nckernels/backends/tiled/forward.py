"""The forward pass: norms, positives, the list of classes that occur, and log-sum-exps."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import Forward
from .kernels import Kernels, Partial
from .plan import ceil_div
from .sides import Kept, Side, two_sides


def forward(kernels: Kernels, keep: bool) -> Forward:
    """The forward pass; ``keep`` is False if no backward pass will follow."""
    spec, device = kernels.spec, kernels.inputs.features.device
    m, k = kernels.inputs.features.shape[0], kernels.inputs.prototypes.shape[0]

    def new(n: int) -> Tensor:
        return torch.empty(n, dtype=torch.float32, device=device)

    memory = new(sum(Kept.sizes(m, k, kernels.inputs.features.dtype, kernels.index_dtype, spec, keep)))
    kept = Kept.of(memory, kernels.inputs, kernels.index_dtype, spec)
    z_rnorm, pos, w_rnorm = prepare(kernels, kept.present)
    samples, classes = two_sides(kernels.inputs, spec, z_rnorm, w_rnorm, kept)
    class_lse, instance_lse = new(0), new(0)
    if spec.by_class:
        # Compacted prototypes: the kernels write only the classes that occur.
        class_lse = new(k) if m and not classes.gather else new(k).fill_(-torch.inf)
    if spec.by_instance:
        instance_lse = new(m)
    if m and spec.by_class:
        log_sum_exp(kernels, classes, samples, class_lse, instance_lse if spec.by_instance else None)
    elif m:
        log_sum_exp(kernels, samples, classes, instance_lse, None)
    return Forward(class_lse, instance_lse, pos, z_rnorm, w_rnorm, memory if keep else new(0))


def prepare(kernels: Kernels, present: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The samples' inverse norms, positives and the prototypes' inverse norms. Writes ``present``, see ``Kept``."""
    z, w, spec, index = kernels.inputs.features, kernels.inputs.prototypes, kernels.spec, kernels.index_dtype
    m, k, device = z.shape[0], w.shape[0], z.device
    z_rnorm, pos = (torch.empty(m, dtype=torch.float32, device=device) for _ in range(2))
    if not spec.present_only:
        # Under "self" an ignored row can still be a positive: only rows that are neither summed nor positives have -1.
        positives = spec.exclude == "self"
        w_rnorm = torch.empty(k, dtype=torch.float32, device=device)
        if not spec.symmetric:
            kernels.row_rnorm(w, w_rnorm, kernels.inputs.target if spec.square else None)
        elif positives:
            w_rnorm.fill_(-1.0)
        if m:
            kernels.prepare_samples(z_rnorm, pos, w_rnorm if positives else None, None)
        if spec.symmetric and not positives:
            w_rnorm.copy_(z_rnorm)  # results of an operator must not share memory
        return z_rnorm, pos, w_rnorm
    w_rnorm = torch.zeros(k, dtype=torch.float32, device=device)
    if m == 0:
        return z_rnorm, pos, w_rnorm
    # If a list would not be shorter, the marks are the labels.
    mark = (present if k <= m else torch.empty(k, dtype=index, device=device)).fill_(-1)
    kernels.prepare_samples(z_rnorm, pos, w_rnorm, mark)
    if k > m:
        kernels.compact(torch.cumsum(mark >= 0, 0, dtype=index), present, k, m)
    return z_rnorm, pos, w_rnorm


def log_sum_exp(kernels: Kernels, p: Side, q: Side, p_out: Tensor, q_out: Tensor | None) -> None:
    """``p_out``: the log-sum-exp of p's rows over q; ``q_out``: that of q's rows over p, or None.

    The latter needs two numbers for every row of q and block of anchors. If these exceed the workspace, the blocks are
    processed in groups, and each group is combined with the state of the earlier groups, which is in part 0.
    """
    workspace, both = kernels.spec.workspace, q_out is not None
    blocks = kernels.lse_blocks(p, q, both)
    split = blocks.split(p.slots, q.slots, workspace, 8 * p.slots * (2 if both else 1))
    group = total = ceil_div(p.slots, blocks.p)
    p_partial: Partial = _pairs(split, p) if split > 1 else (None, None)
    q_partial: Partial = (None, None)
    if both:
        left = workspace - (8 * split * p.slots if split > 1 else 0)
        group = max(1, min(total, left // (8 * q.slots) - 1))
        q_partial = _pairs(1 + group, q)
    for first in range(0, total, group):
        count = min(group, total - first)
        out = p_out if split == 1 else None
        kernels.log_sum_exp(p, q, out, p_partial, q_partial, first, count, split, blocks)
        if q_out is not None:
            # There is no state in part 0 before the first group, and none is needed after the last one.
            kernels.combine(q_partial, q, q_out, 0 if first else 1, 1 + count, keep=first + count < total)
    if split > 1:
        kernels.combine(p_partial, p, p_out, 0, split, keep=False)


def _pairs(parts: int, side: Side) -> tuple[Tensor, Tensor]:
    both = torch.empty(2, parts, side.slots, dtype=torch.float32, device=side.x.device)
    return both[0], both[1]
