"""Handwritten digits of scikit-learn: 1,797 images of 8 x 8 in ten classes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..recipe import Data
from .sets import Dataset, Memory, check_options, in_memory


def load(data: Data) -> Dataset:
    """The digits. A stratified fifth, always the same, is the test set. Pixels are float32 in [0, 1]."""
    check_options("digits", data.options, ())
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError('the digits are scikit-learn\'s: pip install "nckernels[train]"') from error
    images, labels = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        images / 16, labels, test_size=0.2, random_state=0, stratify=labels
    )

    def as_images(x: object) -> Tensor:
        return torch.as_tensor(x, dtype=torch.float32).view(-1, 1, 8, 8)

    def as_labels(y: object) -> Tensor:
        return torch.as_tensor(y, dtype=torch.int64)

    train, test = Memory(as_images(train_x), as_labels(train_y)), Memory(as_images(test_x), as_labels(test_y))
    return in_memory(train, test, "0123456789")
