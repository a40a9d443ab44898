"""Against pytorch-metric-learning, the most used library of these losses, where the definitions coincide."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import Backend
from torch import Tensor

import nckernels

pml = pytest.importorskip("pytorch_metric_learning")
from pytorch_metric_learning import losses, reducers  # noqa: E402

precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
temperatures = pytest.mark.parametrize("temperature", [0.07, 0.5])


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def agree(ours: Tensor, theirs: Tensor, leaves: tuple[Tensor, ...], temperature: float) -> None:
    """Value and gradients to float precision: a few roundings of logits of size 1 / temperature."""
    eps = torch.finfo(leaves[0].dtype).eps
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=16 * eps, atol=16 * eps / temperature)
    grads = [torch.autograd.grad(value, leaves) for value in (ours, theirs)]
    for a, b in zip(*grads, strict=True):
        assert bool(b.any())
        torch.testing.assert_close(a, b, rtol=0, atol=32 * eps * (1 + 1 / temperature) * float(b.abs().max()))


@temperatures
@precisions
def test_supcon(cpu_backend: Backend, dtype: torch.dtype, temperature: float) -> None:
    """Random labels, one of them single: its loss of 0 is left out of both means (their AvgNonZeroReducer)."""
    x = randn(40, 16).to(dtype).requires_grad_()
    y = torch.randint(6, (40,), generator=torch.Generator().manual_seed(1))
    y[7] = 99
    theirs = losses.SupConLoss(temperature=temperature)(x, y)
    agree(nckernels.supcon_loss(x, y, temperature=temperature), theirs, (x,), temperature)


@precisions
def test_supcon_per_sample(cpu_backend: Backend, dtype: torch.dtype) -> None:
    """Sample by sample, with their reducer that does nothing."""
    x = randn(30, 8).to(dtype).requires_grad_()
    y = torch.randint(6, (30,), generator=torch.Generator().manual_seed(1))
    y[7] = 99
    theirs = losses.SupConLoss(temperature=0.2, reducer=reducers.DoNothingReducer())(x, y)["loss"]["losses"]
    ours = nckernels.supcon_loss(x, y, temperature=0.2, reduction="none")
    assert ours[7] == 0.0
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(ours, theirs, rtol=16 * eps, atol=16 * eps / 0.2)


def test_supcon_where_the_libraries_differ(cpu_backend: Backend) -> None:
    """One label in all: theirs is 0 where there is no negative, ours is [NCD] Eq. 2, log(n - 1) when collapsed."""
    x, y = randn(1, 5).expand(6, 5).clone().requires_grad_(), torch.zeros(6, dtype=torch.int64)
    assert losses.SupConLoss()(x, y).item() == 0.0
    assert nckernels.supcon_loss(x, y).item() == pytest.approx(math.log(5), abs=1e-12)


@temperatures
@precisions
def test_nt_xent_of_two_views(cpu_backend: Backend, dtype: torch.dtype, temperature: float) -> None:
    """One positive each: supcon_loss without labels."""
    views = randn(20, 2, 16).to(dtype).requires_grad_()
    labels = torch.arange(20).repeat_interleave(2)
    theirs = losses.NTXentLoss(temperature=temperature)(views.flatten(0, 1), labels)
    agree(nckernels.supcon_loss(views, temperature=temperature), theirs, (views,), temperature)


@temperatures
@precisions
def test_nt_xent_of_queries_and_keys(cpu_backend: Backend, dtype: torch.dtype, temperature: float) -> None:
    """Their reference embeddings are our keys: info_nce_loss, with and without a queue of further keys."""
    q, k = randn(15, 8).to(dtype).requires_grad_(), randn(24, 8, seed=1).to(dtype).requires_grad_()
    loss = losses.NTXentLoss(temperature=temperature)
    theirs = loss(q, torch.arange(15), ref_emb=k, ref_labels=torch.arange(24))
    agree(nckernels.info_nce_loss(q, k, torch.arange(15), temperature=temperature), theirs, (q, k), temperature)
    pairs = k[:15]
    theirs = loss(q, torch.arange(15), ref_emb=pairs, ref_labels=torch.arange(15))
    agree(nckernels.info_nce_loss(q, pairs, temperature=temperature), theirs, (q, k), temperature)


def test_clip_is_two_nt_xents(cpu_backend: Backend) -> None:
    a, b = randn(15, 8).requires_grad_(), randn(15, 8, seed=1).requires_grad_()
    loss, y, same = losses.NTXentLoss(temperature=0.07), torch.arange(15), torch.arange(15)
    # (Labels that are one object would mean to them that the embeddings are, too.)
    theirs = (loss(a, y, ref_emb=b, ref_labels=same) + loss(b, y, ref_emb=a, ref_labels=same)) / 2
    agree(nckernels.clip_loss(a, b), theirs, (a, b), 0.07)


def test_nt_xent_with_several_positives_is_another_loss(cpu_backend: Backend) -> None:
    """Theirs is a mean over pairs, each against its own positive and the negatives; SupCon's sum has them all.

    For every anchor and positive p it is log(D + e^{s_p}) - s_p with D the sum over the negatives, which is
    that of decoupled SupCon, instead of log(D + sum over the positives) - mean s_p.
    """
    x = randn(12, 6).requires_grad_()
    y, tau = torch.arange(4).repeat(3), 0.5
    theirs = losses.NTXentLoss(temperature=tau)(x, y)
    s = F.normalize(x) @ F.normalize(x).T / tau
    same = y[:, None] == y
    negatives = s.masked_fill(same, -math.inf).logsumexp(1)
    pairs = torch.logaddexp(negatives[:, None], s) - s
    expected = pairs[same & ~torch.eye(12, dtype=torch.bool)].mean()
    torch.testing.assert_close(theirs, expected, rtol=1e-12, atol=0)
    ours = nckernels.supcon_loss(x, y, temperature=tau)
    assert float(ours - theirs) > 0.05  # the other positives in the sum make SupCon's the larger
    alignment = torch.where(same, s, 0).sum(1).sub(1 / tau).div(2)
    decoupled = nckernels.supcon_loss(x, y, temperature=tau, decoupled=True, reduction="none")
    torch.testing.assert_close(decoupled, negatives - alignment, rtol=1e-11, atol=1e-11)


@temperatures
@precisions
def test_normalized_softmax(cpu_backend: Backend, dtype: torch.dtype, temperature: float) -> None:
    """NormFace, prototypes in the columns of their W."""
    x = randn(40, 16).to(dtype).requires_grad_()
    y = torch.randint(6, (40,), generator=torch.Generator().manual_seed(1))
    loss = losses.NormalizedSoftmaxLoss(num_classes=6, embedding_size=16, temperature=temperature)
    with torch.no_grad():
        loss.W.copy_(randn(16, 6, seed=2))
        loss.W.data = loss.W.data.to(dtype)
    ours = nckernels.normface_loss(x, loss.W.t(), y, temperature=temperature)
    agree(ours, loss(x, y), (x, loss.W), temperature)
