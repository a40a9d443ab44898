"""The trainer's own losses on several ranks: the average over the ranks is the loss of the whole batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from ranks import Ranks
from torch import Tensor

from nckernels.train.heads import make_head
from nckernels.train.recipe import CONTRASTIVE, Loss

K, D = 5, 6
SIZES = {2: (7, 2), 4: (3, 0, 4, 2)}


def batch(name: str) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    labels = torch.arange(9) % K
    return torch.randn(9, D, generator=g), F.one_hot(labels, K).float() if name == "bce" else labels


def step(name: str, options: dict[str, float], group: str | None, rows: slice) -> list[Tensor]:
    torch.manual_seed(0)
    head = make_head(Loss(name=name, options=options), D, K, process_group=group)
    x, y = batch(name)
    x.requires_grad_()
    loss = head.loss(x[rows], y[rows])
    return [loss.detach(), *torch.autograd.grad(loss, [x, *head.parameters()])]


def on_a_rank(rank: int, world_size: int, name: str, options: dict[str, float]) -> list[Tensor]:
    start = sum(SIZES[world_size][:rank])
    return step(name, options, "world", slice(start, start + SIZES[world_size][rank]))


@pytest.mark.parametrize(
    ("name", "options"), [("ce", {"label_smoothing": 0.1}), ("psc-star", {"uniformity": 0.5}), ("bce", {})]
)
def test_average_over_the_ranks_is_the_loss_of_the_whole_batch(
    ranks: Ranks, name: str, options: dict[str, float]
) -> None:
    """Loss and gradients, with batches of unequal sizes."""
    whole = step(name, options, None, slice(None))
    parts = ranks.run(on_a_rank, name, options)
    for expected, *found in zip(whole, *parts, strict=True):
        torch.testing.assert_close(torch.stack(found).mean(0), expected)


def points_of_a_rank(rank: int, world_size: int, name: str) -> Tensor:
    torch.manual_seed(rank)
    return make_head(Loss(name=name), 3, 4, process_group="world").prototypes


@pytest.mark.parametrize("name", ["etf-dr", "dlp"])
def test_fixed_points_are_those_of_rank_0(ranks2: Ranks, name: str) -> None:
    first, second = ranks2.run(points_of_a_rank, name)
    assert torch.equal(first, second)


def losses_with_a_queue(group: str | None, name: str, share: int, of: int) -> list[float]:
    """The losses of five steps of eight samples, each rank with its share."""
    torch.manual_seed(0)
    head = make_head(Loss(name=name, queue=16), D, K, process_group=group)
    losses = []
    for _ in range(5):
        x = torch.randn(8, 2, D) if name in CONTRASTIVE else torch.randn(8, D)
        y = torch.randint(K, (8,))
        losses.append(head.loss(x.chunk(of)[share], y.chunk(of)[share]).item())
    return losses


def losses_of_a_rank(rank: int, world_size: int, name: str) -> list[float]:
    return losses_with_a_queue("world", name, rank, world_size)


@pytest.mark.parametrize("name", ["nonl", "ntce", "scl"])
def test_ranks_share_a_queue(ranks2: Ranks, name: str) -> None:
    """It is as long as that of a single process, and holds the same samples."""
    whole = torch.tensor(losses_with_a_queue(None, name, 0, 1))
    parts = torch.tensor(ranks2.run(losses_of_a_rank, name))
    torch.testing.assert_close(parts.mean(0), whole, atol=1e-4, rtol=1e-4)
