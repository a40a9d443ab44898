"""The formulas of the papers, as literally as Python allows, and random problems."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

Rows = list[list[float]]


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(dim: int, seed: int) -> Tensor:
    return torch.linalg.qr(randn(dim, dim, seed=seed))[0]


def rows(x: Tensor) -> Rows:
    return x.detach().double().tolist()


def dot(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def unit(a: list[float]) -> list[float]:
    return [x / math.hypot(*a) for x in a]


def mean(vectors: Rows) -> list[float]:
    return [math.fsum(column) / len(vectors) for column in zip(*vectors, strict=True)]


def difference(a: list[float], b: list[float]) -> list[float]:
    return [x - y for x, y in zip(a, b, strict=True)]


def by_class(vectors: Rows, target: Tensor) -> dict[int, Rows]:
    """The vectors of each class that occurs, by label."""
    classes: dict[int, Rows] = {}
    for label in sorted(set(target.tolist())):
        classes[label] = [v for v, y in zip(vectors, target.tolist(), strict=True) if y == label]
    return classes


def pairs(n: int) -> Iterator[tuple[int, int]]:
    return ((i, j) for i in range(n) for j in range(i))


def log_sum_exp(terms: list[float]) -> float:
    top = max(terms)
    return top + math.log(math.fsum(math.exp(t - top) for t in terms))


def centring(k: int) -> Tensor:
    """I - 11^T / K."""
    return torch.eye(k, dtype=torch.float64) - 1 / k


def simplex_rows(k: int, dim: int, seed: int = 0) -> Tensor:
    """(K, d) unit rows with cosines -1/(K-1), any orientation; the eigenvectors of I - 11^T/K span its image."""
    values, vectors = torch.linalg.eigh(centring(k))
    image = vectors[:, values > 0.5] * math.sqrt(k / (k - 1))
    return image @ orthogonal(dim, seed)[: k - 1]


def same(got: Tensor, want: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=atol)
