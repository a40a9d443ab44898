"""Data-parallel training with global negatives is training in one process with the whole batch.

Every rank's "mean" is world_size x its samples' share of the whole batch's mean. DistributedDataParallel averages the
gradients over the ranks, so that the factor cancels, whatever the sizes of the local batches. Any other factor fails
here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import Ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import nckernels

SIZES = {2: (5, 3), 4: (1, 4, 0, 3)}

Head = Callable[..., nn.Module]
HEADS: dict[str, Head] = {
    "nonl": lambda **kw: nckernels.NONLLoss(6, 4, temperature=nn.Parameter(torch.tensor(0.3)), **kw),
    "nonl-both": lambda **kw: nckernels.NONLLoss(6, 4, direction="both", **kw),
    "ntce": lambda **kw: nckernels.NTCELoss(6, 4, weight=torch.tensor([1.0, 0.5, 2.0, 0.1]), **kw),
    "normface": lambda **kw: nckernels.NormFaceLoss(6, 4, label_smoothing=0.1, cosine_margin=0.2, **kw),
    "classifier": lambda **kw: nckernels.PrototypeClassifier(6, 4, loss="ntce", **kw),
    "supcon": lambda **kw: nckernels.SupConLoss(temperature=nn.Parameter(torch.tensor(0.3)), **kw),
    "prototype": lambda **kw: nckernels.PrototypeLoss(num_classes=4, **kw),
    "info_nce": lambda **kw: nckernels.InfoNCELoss(**kw),
    "clip": lambda **kw: nckernels.CLIPLoss(temperature=nn.Parameter(torch.tensor(0.1)), **kw),
    "uniformity": lambda **kw: nckernels.UniformityLoss(**kw),
    "alignment": lambda **kw: nckernels.AlignmentLoss(**kw),
}
PAIRS = ("info_nce", "clip", "alignment")


class Net(nn.Module):
    """A tiny network with the loss inside, so that prototypes and temperature are parameters like any other."""

    def __init__(self, name: str, process_group: str | None) -> None:
        super().__init__()
        self.name = name
        self.body = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6))
        self.head = HEADS[name](process_group=process_group)
        self.double()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = self.body(x)
        if self.name in PAIRS:
            return self.head(z, self.body(x.flip(1)))
        if self.name == "uniformity":
            return self.head(z)
        return self.head.loss(z, y) if self.name == "classifier" else self.head(z, y)


def batch() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(8, 5, generator=g, dtype=torch.float64), torch.tensor([0, 1, 1, 3, 0, 0, 1, 2])


def a_step(net: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Loss, gradients and, after a step of SGD, parameters."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    loss = net(x, y)
    loss.backward()
    grads = {f"gradient of {n.removeprefix('module.')}": p.grad.clone() for n, p in net.named_parameters()}
    optimizer.step()
    after = {n.removeprefix("module."): p.detach().clone() for n, p in net.named_parameters()}
    return {"loss": loss.detach(), **grads, **after}


def steps(rank: int, world_size: int, process_group: str | None) -> dict[str, Any]:
    x, y = (t.split(SIZES[world_size])[rank] for t in batch())
    found = {}
    for name in HEADS:
        torch.manual_seed(1)
        found[name] = a_step(DistributedDataParallel(Net(name, process_group)), x, y)
    return found


def test_a_step_of_ddp_is_a_step_with_the_whole_batch(ranks: Ranks) -> None:
    results = ranks.run(steps, "world")
    for name in HEADS:
        torch.manual_seed(1)
        expected = a_step(Net(name, None), *batch())
        losses = torch.stack([r[name]["loss"] for r in results])
        torch.testing.assert_close(losses.mean(), expected["loss"], rtol=1e-12, atol=1e-13)
        for rank, r in enumerate(results):
            assert r[name].keys() == expected.keys()
            for what in expected.keys() - {"loss"}:
                size = 1e-12 * (1 + expected[what].abs().max())
                assert (r[name][what] - expected[what]).abs().max() <= size, (name, what, rank)


def local_steps(rank: int, world_size: int) -> dict[str, Tensor]:
    x, y = (t.split(SIZES[world_size])[rank] for t in batch())
    torch.manual_seed(1)
    return a_step(DistributedDataParallel(Net("nonl", None)), x, y)


def test_local_negatives_give_another_gradient(ranks2: Ranks) -> None:
    """Without a group the same step differs clearly, so the test above can fail."""
    torch.manual_seed(1)
    expected = a_step(Net("nonl", None), *batch())
    for got in ranks2.run(local_steps):
        for what in ("gradient of body.0.weight", "gradient of head.prototypes", "gradient of head.temperature"):
            difference = (got[what] - expected[what]).abs().max() / expected[what].abs().max()
            assert difference > 1e-2, what


@pytest.mark.parametrize("name", ["nonl", "supcon"])
def test_ten_steps_equal_one_process(ranks2: Ranks, name: str) -> None:
    """Errors do not accumulate, and the parameters of the ranks stay equal."""
    results = ranks2.run(ten_steps, name)
    torch.manual_seed(1)
    expected = train(Net(name, None), *batch())
    for result in results:
        for what, value in expected.items():
            assert (result[what] - value).abs().max() <= 1e-11 * (1 + value.abs().max()), what


def ten_steps(rank: int, world_size: int, name: str) -> dict[str, Tensor]:
    x, y = (t.split(SIZES[world_size])[rank] for t in batch())
    torch.manual_seed(1)
    return train(DistributedDataParallel(Net(name, "world")), x, y)


def train(net: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for _ in range(10):
        optimizer.zero_grad()
        net(x, y).backward()
        optimizer.step()
    return {n.removeprefix("module."): p.detach() for n, p in net.named_parameters()}
