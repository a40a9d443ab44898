"""Streaming metrics equal the one-pass ones, for any batches and at any distance from the origin."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nckernels.metrics import NeuralCollapse, neural_collapse

from .formulas import randn

seeds = st.integers(0, 2**31)


def draw(seed: int, k: int, dim: int, n: int, offset: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    w = randn(k, dim, seed=seed)
    y = torch.randint(k, (n,), generator=g)
    return w[y] + 0.5 * randn(n, dim, seed=seed + 1) + offset, y, w, randn(k, seed=seed + 2)


def close(got: NeuralCollapse, want: NeuralCollapse, tolerance: float) -> None:
    for name, value in dataclasses.asdict(want).items():
        assert getattr(got, name) == pytest.approx(value, rel=tolerance, abs=tolerance, nan_ok=True), name


def split(x: Tensor, y: Tensor, cuts: list[int]) -> list[tuple[Tensor, Tensor]]:
    edges = sorted({0, len(x), *(c % (len(x) + 1) for c in cuts)})
    return [(x[a:b], y[a:b]) for a, b in itertools.pairwise(edges)]


@pytest.mark.parametrize("with_bias", [False, True])
@given(
    seed=seeds,
    k=st.integers(2, 6),
    dim=st.integers(2, 9),
    n=st.integers(12, 60),
    cuts=st.lists(st.integers(0, 10**6), max_size=6),
)
@settings(max_examples=12, deadline=None)
def test_measure_equals_the_one_pass_form(
    with_bias: bool, seed: int, k: int, dim: int, n: int, cuts: list[int]
) -> None:
    from nckernels.metrics.streaming import measure

    x, y, w, b = draw(seed, k, dim, n, 0.0)
    bias = b if with_bias else None
    want = neural_collapse(x, y, w, bias=bias)
    for memory in (2**30, 1500):  # all classes in one pass, and one or two in each
        close(measure(split(x, y, cuts), prototypes=w, bias=bias, num_classes=k, memory=memory), want, 1e-10)


@given(
    seed=seeds,
    k=st.integers(2, 6),
    dim=st.integers(2, 9),
    n=st.integers(12, 60),
    cuts=st.lists(st.integers(0, 10**6), max_size=6),
)
@settings(max_examples=12, deadline=None)
def test_metric_equals_the_one_pass_form(seed: int, k: int, dim: int, n: int, cuts: list[int]) -> None:
    from nckernels.metrics.streaming import CollapseMetric

    x, y, w, b = draw(seed, k, dim, n, 0.0)
    metric = CollapseMetric(k, dim, prototypes=w, bias=b)
    for features, target in split(x, y, cuts):
        metric.update(features, target)
    one_shot = neural_collapse(x, y, w, bias=b)
    assert math.isnan(metric.report().intra_erank + metric.report().nc4)  # need samples again: documented
    close(metric.report(), dataclasses.replace(one_shot, intra_erank=math.nan, nc4=math.nan), 1e-10)


@pytest.mark.parametrize("order", ["shuffled", "by class"])
def test_accuracy_at_an_offset_of_ten_thousand_scatters(order: str) -> None:
    """Class by class is the hardest order: the running mean of the first class is far from that of the last."""
    from nckernels.metrics.streaming import measure

    x, y, w, _ = draw(3, 5, 8, 400, 1e4)
    if order == "by class":
        by = y.argsort(stable=True)
        x, y = x[by], y[by]
    got = measure(split(x, y, list(range(0, 400, 37))), prototypes=w, num_classes=5)
    want = neural_collapse(x, y, w)
    assert want.within_scatter < 1e-6
    for name, value in dataclasses.asdict(want).items():
        assert getattr(got, name) == pytest.approx(value, rel=1e-10, abs=0, nan_ok=True), name
