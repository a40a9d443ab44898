"""Every loss as a user would write it in eager PyTorch: matrices of logits, masks, autograd.

Each function takes features, prototypes or keys if there are any, targets, and options with the names of our losses.
Products are in the inputs' dtype, sums and exponentials in float32 for smaller ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Temperature = float | Tensor


def nonl(
    z: Tensor, w: Tensor, y: Tensor, *, temperature: Temperature, direction: str = "class", reduction: str = "mean"
) -> Tensor:
    logits = F.normalize(z) @ F.normalize(w).T / temperature
    pos = logits.gather(1, y[:, None]).squeeze(1)
    negatives = _wide(logits.scatter(1, y[:, None], -torch.inf))
    if direction == "instance":
        lse = torch.logsumexp(negatives, 1)
    else:
        lse = torch.logsumexp(negatives, 0)[y]
        if direction == "both":
            lse = torch.logaddexp(lse, torch.logsumexp(negatives, 1))
    return _reduced(lse - pos, reduction)


def ntce(z: Tensor, w: Tensor, y: Tensor, *, temperature: Temperature, reduction: str = "mean") -> Tensor:
    logits = F.normalize(z) @ F.normalize(w).T / temperature
    pos = logits.gather(1, y[:, None]).squeeze(1)
    return _reduced(torch.logsumexp(_wide(logits), 0)[y] - pos, reduction)


def normface(
    z: Tensor,
    w: Tensor,
    y: Tensor,
    *,
    temperature: Temperature,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    angular_margin: float = 0.0,
    cosine_margin: float = 0.0,
    weight: Tensor | None = None,
) -> Tensor:
    cosine = F.normalize(z) @ F.normalize(w).T
    if angular_margin or cosine_margin:
        index = y.clamp_min(0)[:, None]  # any index for ignored samples
        own = cosine.gather(1, index)
        if angular_margin:
            sine = (1.0 - own.square()).clamp_min(1e-6).sqrt()
            turned = own * math.cos(angular_margin) - sine * math.sin(angular_margin)
            straight = own - angular_margin * math.sin(angular_margin)
            own = torch.where(own > -math.cos(angular_margin), turned, straight)
        cosine = cosine.scatter(1, index, own - cosine_margin)
    logits = _wide(cosine / temperature)
    weight = None if weight is None else weight.to(logits.dtype)
    return F.cross_entropy(logits, y, weight, reduction=reduction, label_smoothing=label_smoothing)


def info_nce(q: Tensor, k: Tensor, y: Tensor, *, temperature: Temperature, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(_wide(F.normalize(q) @ F.normalize(k).T / temperature), y, reduction=reduction)


def clip(a: Tensor, b: Tensor, y: Tensor, *, temperature: Temperature, reduction: str = "mean") -> Tensor:
    logits = _wide(F.normalize(a) @ F.normalize(b).T / temperature)
    return (F.cross_entropy(logits, y, reduction=reduction) + F.cross_entropy(logits.T, y, reduction=reduction)) / 2


def supcon(
    z: Tensor, y: Tensor, *, temperature: Temperature, reduction: str = "mean", decoupled: bool = False
) -> Tensor:
    unit = F.normalize(z)
    logits = _wide(unit @ unit.T / temperature)
    itself = torch.eye(len(y), dtype=torch.bool, device=y.device)
    same = y[:, None] == y
    positive = same & ~itself
    lse = torch.logsumexp(logits.masked_fill(same if decoupled else itself, -torch.inf), 1)
    count = positive.sum(1)
    mean = (logits * positive).sum(1) / count.clamp_min(1)
    loss = (lse - mean) * (count > 0)
    return loss.sum() / (count > 0).sum() if reduction == "mean" else loss


def uniformity(z: Tensor, y: Tensor, *, t: float = 2.0) -> Tensor:
    unit = F.normalize(z)
    if z.dtype not in (torch.bfloat16, torch.float16):
        return torch.pdist(unit).square().mul(-t).exp().mean().log()  # Wang & Isola's own lines
    squares = 2.0 - 2.0 * _wide(unit @ unit.T)  # pdist does not support 16 bits
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    return (squares.mul(-t).exp().masked_fill(itself, 0.0).sum() / (len(z) * (len(z) - 1))).log()


def prototype(z: Tensor, y: Tensor, *, temperature: Temperature, num_classes: int, reduction: str = "mean") -> Tensor:
    unit = F.normalize(z)
    one_hot = F.one_hot(y, num_classes).to(z.dtype)
    count = one_hot.sum(0, dtype=torch.float64 if z.dtype == torch.float64 else torch.float32)
    means = one_hot.T @ unit / count.clamp_min(1).to(z.dtype)[:, None]
    logits = _wide(unit @ means.T / temperature)
    pos = logits.gather(1, y[:, None]).squeeze(1)
    others = torch.log(count - one_hot)  # the other samples of each class
    return _reduced(torch.logsumexp(logits + others, 1) - pos, reduction)


def dot_regression(z: Tensor, w: Tensor, y: Tensor, *, reduction: str = "mean") -> Tensor:
    cosine = _wide((F.normalize(z) * F.normalize(w)[y]).sum(1))
    return _reduced(0.5 * (cosine - 1.0).square(), reduction)


FORMS: dict[str, Callable[..., Tensor]] = {
    "nonl": nonl,
    "ntce": ntce,
    "normface": normface,
    "info_nce": info_nce,
    "clip": clip,
    "supcon": supcon,
    "simclr": supcon,  # two views of every image, given as labels
    "uniformity": uniformity,
    "prototype": prototype,
    "dot_regression": dot_regression,
}


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _reduced(loss: Tensor, reduction: str) -> Tensor:
    return loss.mean() if reduction == "mean" else loss
