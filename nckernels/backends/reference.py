"""The primitive as the papers write it: plain differentiable PyTorch with every matrix in memory.

The tests compare the other backends with it, and it serves double backward, forward-mode AD and ``torch.func``. Unlike
the other backends it is not a custom operator: PyTorch differentiates it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Inputs, Spec, norm_eps


def cosine_lse(inputs: Inputs, spec: Spec) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Log-sum-exps in the class and the instance direction (None where not wanted), and positive logits."""
    z, w, target, beta, sample_bias, class_bias = inputs
    acc, eps = beta.dtype, norm_eps(z.dtype)
    valid = target != spec.ignore_index
    # Left-out rows may hold anything, NaN too.
    z = z.masked_fill(~valid[:, None], 0.0)
    if spec.present_only:
        w = w.masked_fill(~present_classes(target, valid, w.shape[0])[:, None], 0.0)
    rows = torch.arange(z.shape[0], device=z.device)
    positive = rows if spec.exclude == "same_label" else target.where(valid, 0)
    if spec.square:  # with "self" an ignored row can still be another sample's positive
        read = valid | present_classes(positive, valid, w.shape[0])
        w = w.masked_fill(~read[:, None], 0.0)
    u = F.normalize(z.to(acc), dim=1, eps=eps)
    v = F.normalize(w.to(acc), dim=1, eps=eps)
    logits = beta * (u @ v.T)

    allowed = allowed_entries(target, valid, w.shape[0], spec)

    class_lse = instance_lse = None
    if spec.by_class:
        biased = logits if sample_bias is None else logits + sample_bias[:, None]
        class_lse = masked_logsumexp(biased, allowed, dim=0)
        if spec.present_only:
            class_lse = class_lse.where(present_classes(target, valid, w.shape[0]), -torch.inf)
    if spec.by_instance:
        biased = logits if class_bias is None else logits + class_bias
        instance_lse = masked_logsumexp(biased, allowed, dim=1)

    pos = logits[rows, positive].where(valid, 0.0)
    return class_lse, instance_lse, pos


def allowed_entries(target: Tensor, valid: Tensor, num_classes: int, spec: Spec) -> Tensor:
    """(M, K) bool: the entries of the similarity matrix that are summed."""
    columns = torch.arange(num_classes, device=target.device)
    allowed = valid[:, None].expand(-1, num_classes)
    if spec.exclude == "target":
        allowed = allowed & (target[:, None] != columns)
    elif spec.exclude == "self":
        allowed = allowed & ~torch.eye(num_classes, dtype=torch.bool, device=target.device)
    elif spec.exclude == "same_label":
        allowed = allowed & (target[:, None] != target)
    return allowed & valid if spec.square else allowed


def present_classes(target: Tensor, valid: Tensor, num_classes: int) -> Tensor:
    """(K,) bool: the classes that occur in the batch."""
    counts = torch.zeros(num_classes, dtype=torch.int64, device=target.device)
    return counts.index_add(0, target.where(valid, 0), valid.long()) > 0


def masked_logsumexp(logits: Tensor, allowed: Tensor, dim: int) -> Tensor:
    """Log-sum-exp over the allowed entries; -inf with zero gradient where there are none. Logits of -inf (from a bias)
    are not allowed."""
    allowed = allowed & (logits != -torch.inf)
    empty = ~allowed.any(dim)
    filled = logits.masked_fill(~allowed, -torch.inf).masked_fill(empty.unsqueeze(dim), 0.0)
    return torch.logsumexp(filled, dim).masked_fill(empty, -torch.inf)
