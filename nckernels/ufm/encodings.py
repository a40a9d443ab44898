"""Label encodings of [ENC]: K x K matrices in float64 whose column k is the label vector of class k."""

from __future__ import annotations

import torch
from torch import Tensor

from nckernels import _checks


def one_hot(num_classes: int) -> Tensor:
    """The identity, (K, K); K at least 1.

    Example:
        >>> from nckernels import ufm
        >>> ufm.one_hot(2)
        tensor([[1., 0.],
                [0., 1.]], dtype=torch.float64)
    """
    _checks.positive_integer("num_classes", num_classes)
    return torch.eye(num_classes, dtype=torch.float64)


def label_smoothing(num_classes: int, delta: float) -> Tensor:
    r""":math:`(1 - \delta) I + \frac{\delta}{K} 1 1^\top`, (K, K), with :math:`\delta` in [0, 1].

    A shifted simplex :math:`\alpha (I - \beta \frac{1 1^\top}{K})` with :math:`\alpha = 1 - \delta` and
    :math:`\beta = -\frac{\delta}{1 - \delta}`; [ENC] §IV-B prints the opposite sign.

    Example:
        >>> from nckernels import ufm
        >>> ufm.label_smoothing(2, 0.2)
        tensor([[0.9000, 0.1000],
                [0.1000, 0.9000]], dtype=torch.float64)
    """
    _checks.in_range("delta", delta, 0.0, 1.0)
    return (1.0 - delta) * one_hot(num_classes) + delta / num_classes


def centred(encoding: Tensor) -> Tensor:
    r""":math:`\bar Y (I - \frac{1 1^\top}{K})`: the labels minus their mean over the classes, (K, K) in float64.

    Example:
        >>> from nckernels import ufm
        >>> ufm.centred(ufm.one_hot(2))
        tensor([[ 0.5000, -0.5000],
                [-0.5000,  0.5000]], dtype=torch.float64)
    """
    labels = check(encoding)
    return labels - labels.mean(1, keepdim=True)


def check(encoding: Tensor) -> Tensor:
    """A finite square float matrix, in float64."""
    _checks.matrix("encoding", encoding, "K", "K")
    if encoding.shape[0] != encoding.shape[1] or encoding.numel() == 0:
        raise ValueError(f"encoding must have shape (K, K) with K >= 1, got {tuple(encoding.shape)}")
    if not encoding.isfinite().all():
        raise ValueError("encoding must be finite, got inf or NaN")
    return encoding.detach().double()
