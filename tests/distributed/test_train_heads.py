"""The trainer's own losses on several ranks: the average over the ranks is the loss of the whole batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from ranks import Ranks
from torch import Tensor

from nckernels.train.heads import make_head
from nckernels.train.recipe import Loss

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
def test_ranks_average_to_the_whole_batch(ranks: Ranks, name: str, options: dict[str, float]) -> None:
    """Loss and gradients, with batches of unequal sizes."""
    whole = step(name, options, None, slice(None))
    parts = ranks.run(on_a_rank, name, options)
    for expected, *found in zip(whole, *parts, strict=True):
        torch.testing.assert_close(torch.stack(found).mean(0), expected)
