"""MicroBatches in DistributedDataParallel and under fully_shard: plain training's gradients, reduced once a step."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Literal

import pytest
import torch
from ranks import Ranks
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import nckernels
from nckernels import MicroBatches

K, D, SIZE = 4, 5, 3
Batches = list[tuple[Tensor, Tensor]]  # of all ranks


class Net(nn.Module):
    """An encoder with the criterion of its features. Zeros go through its frozen part only."""

    def __init__(self, group: Literal["world"] | None = None, unused: bool = False, rows: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, D)
        self.frozen = nn.Linear(6, D).requires_grad_(False)
        self.register_buffer("calls", torch.zeros(()))
        temperature = nn.Parameter(torch.tensor(0.3))
        kind = nckernels.NormFaceLoss if rows else nckernels.NONLLoss
        self.criterion = kind(D, K, temperature=temperature, process_group=group)
        if unused:
            self.unused = nn.Parameter(torch.ones(3))
        self.double()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        if bool((x == 0).all()):
            return {"z": self.frozen(x)}
        return {"z": self.second(torch.tanh(self.first(x)))}

    def whole(self, x: Tensor) -> Tensor:
        """Features of a batch whose last two rows may be zeros."""
        return torch.cat([self(x[:-2])["z"], self(x[-2:])["z"]])


class Features(nn.Module):
    """A module around the wrapped one that takes the tensor from its outputs, and works in place on it."""

    def __init__(self, ddp: nn.Module) -> None:
        super().__init__()
        self.ddp = ddp

    def forward(self, x: Tensor) -> Tensor:
        return self.ddp(x)["z"].mul_(1.0)


def batches(world_size: int, step: int = 0, unequal: int = 3) -> Batches:
    generator = torch.Generator().manual_seed(step)
    sizes = [8 + unequal * rank for rank in range(world_size)]
    x = [torch.randn(size, 6, dtype=torch.float64, generator=generator) for size in sizes]
    return [(x, torch.randint(K, (len(x),), generator=generator)) for x in x]


def gradients(net: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in net.named_parameters() if p.requires_grad}


def expected(steps: list[Batches], spans: bool, **options: Any) -> dict[str, Tensor | None]:
    """The whole batch's gradient, or the mean over ranks of that of each batch, summed over steps."""
    net = Net(None, **options)
    for step in steps:
        if spans:
            x, y = (torch.cat(parts) for parts in zip(*((net.whole(x), y) for x, y in step), strict=True))
            net.criterion(x, y).backward()
        else:
            for x, y in step:
                (net.criterion(net.whole(x), y) / len(step)).backward()
    return gradients(net)


def assert_equal(found: dict[str, Tensor | None], wanted: dict[str, Tensor | None]) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (found[name] is None) == (gradient is None), name
        if gradient is not None:
            torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def wrap(net: nn.Module, reduced: list[int], **options: Any) -> DistributedDataParallel:
    """With several buckets, whose indices go to ``reduced`` when they are reduced."""
    ddp = DistributedDataParallel(net, bucket_cap_mb=3e-4, **options)

    def hook(state, bucket):  # no annotations: PyTorch compares them with types, and finds strings
        reduced.append(bucket.index())
        return allreduce_hook(None, bucket)

    ddp.register_comm_hook(None, hook)
    return ddp


def assert_reduced_once(reduced: list[int]) -> None:
    assert reduced
    assert sorted(reduced) == list(range(len(reduced)))
    reduced.clear()


def step(way: str, micro: MicroBatches, net: Net, x: Tensor, y: Tensor, **options: Any) -> None:
    if way == "streamed":
        micro.stream(net.criterion, y, x, **options)
    else:
        net.criterion(micro(x), y).backward()
        micro.backward(**options)


# --- DistributedDataParallel -------------------------------------------------------------------------------


def train(rank: int, world_size: int, way: str, group: Any, options: dict[str, Any], kind: dict[str, bool]) -> None:
    net, reduced = Net(group, **kind), []
    ddp = wrap(net, reduced, **options)
    micro = MicroBatches(Features(ddp), SIZE)
    for i in range(3):
        data = batches(world_size, i)
        step(way, micro, net, *data[rank])
        if i > 0:
            assert len(reduced) > 1  # in the first step there may be one bucket
        assert_reduced_once(reduced)
        assert_equal(gradients(net), expected([data], group is not None, **kind))
        assert net.calls == 3 * i + (3, 4)[rank]  # buffers move once a micro-batch and begin a step as on rank 0
        net.zero_grad(set_to_none=i % 2 == 0)
    assert ddp.require_backward_grad_sync
    assert not net._forward_hooks


@pytest.mark.parametrize("way", ["cached", "streamed"])
@pytest.mark.parametrize(
    ("group", "options", "kind"),
    [
        (None, {}, {}),
        ("world", {}, {}),
        ("world", {"gradient_as_bucket_view": True}, {"rows": True}),
        (None, {"find_unused_parameters": True}, {"unused": True}),
    ],
    ids=["plain", "group", "bucket_view", "find_unused"],
)
def test_gradients_are_reduced_once_per_step(
    ranks2: Ranks, way: str, group: Any, options: dict[str, Any], kind: dict[str, bool]
) -> None:
    """Three micro-batches on one rank and four on the other; parameters of the loss are in the wrapper too."""
    ranks2.run(train, way, group, options, kind)


def frozen_last(rank: int, world_size: int, way: str, options: dict[str, Any]) -> None:
    net, reduced = Net(), []
    micro = MicroBatches(Features(wrap(net, reduced, **options)), SIZE)
    for i in range(2):
        data = batches(world_size, i)
        data[1][0][-2:] = 0.0
        step(way, micro, net, *data[rank])
        assert_reduced_once(reduced)
        assert_equal(gradients(net), expected([data], False))
        net.zero_grad()


@pytest.mark.parametrize("way", ["cached", "streamed"])
@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}], ids=["plain", "find_unused"])
def test_a_last_micro_batch_without_trained_parameters_still_reduces(
    ranks2: Ranks, way: str, options: dict[str, Any]
) -> None:
    """On one rank no trained parameter takes part in the last micro-batch."""
    ranks2.run(frozen_last, way, options)


def accumulate(rank: int, world_size: int, way: str, by: str) -> None:
    net, reduced = Net("world"), []
    ddp = wrap(net, reduced)
    micro = MicroBatches(Features(ddp), SIZE)
    for i in range(2):
        data = [batches(world_size, 2 * i), batches(world_size, 2 * i + 1)]
        with ddp.no_sync() if by == "no_sync" else nullcontext():
            step(way, micro, net, *data[0][rank], **({} if by == "no_sync" else {"sync": False}))
        assert not reduced
        step(way, micro, net, *data[1][rank])
        assert_reduced_once(reduced)
        assert_equal(gradients(net), expected(data, True))
        net.zero_grad()


@pytest.mark.parametrize("by", ["no_sync", "sync"])
@pytest.mark.parametrize("way", ["cached", "streamed"])
def test_accumulation(ranks2: Ranks, way: str, by: str) -> None:
    ranks2.run(accumulate, way, by)


def samples(rank: int, world_size: int, loss: str) -> None:
    encoder, whole, reduced = Net(), Net(), []
    ddp = wrap(encoder, reduced)
    micro = MicroBatches(ddp, SIZE)
    data = batches(world_size)

    def of(a: Tensor, b: Tensor, y: Tensor, group: Any) -> Tensor:
        if loss == "supcon":
            return nckernels.supcon_loss(torch.stack([a, b], 1), y, process_group=group)
        return nckernels.clip_loss(a, b, process_group=group)

    x, y = data[rank]
    of(micro(x)["z"], micro(x.flip(1))["z"], y, "world").backward()
    micro.backward()
    assert_reduced_once(reduced)
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    of(whole(x)["z"], whole(x.flip(1))["z"], y, None).backward()
    for name in ("first.weight", "first.bias", "second.weight", "second.bias"):
        found, wanted = encoder.get_parameter(name).grad, whole.get_parameter(name).grad
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert torch.equal(encoder.criterion.prototypes.grad, torch.zeros(K, D, dtype=torch.float64))


@pytest.mark.parametrize("loss", ["supcon", "clip"])
def test_negatives_of_all_ranks(ranks2: Ranks, loss: str) -> None:
    """Losses of samples against samples; a step has two calls, and parameters without a loss get zeros."""
    ranks2.run(samples, loss)


class Fails(nn.Module):
    """Raises when there are no calls left."""

    left = 1000

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise ZeroDivisionError
        return x


def fail(rank: int, world_size: int, way: str, calls: int) -> None:
    net, reduced = Net(), []
    net.second = nn.Sequential(net.second, Fails())
    ddp = wrap(net, reduced)
    micro = MicroBatches(Features(ddp), SIZE)
    data = batches(world_size)
    net.second[1].left = calls
    with pytest.raises(ZeroDivisionError):
        step(way, micro, net, *data[rank])
    assert ddp.require_backward_grad_sync
    assert not net._forward_hooks
    net.second[1].left = 1000
    net.zero_grad()
    step(way, micro, net, *data[rank])
    assert_reduced_once(reduced)
    wanted = {name.replace("second.", "second.0."): g for name, g in expected([data], False).items()}
    assert_equal(gradients(net), wanted)


@pytest.mark.parametrize("calls", [1, 5], ids=["first_run", "second_run"])
@pytest.mark.parametrize("way", ["cached", "streamed"])
def test_failures_leave_no_state_behind(ranks2: Ranks, way: str, calls: int) -> None:
    """After an error on all ranks the next step works."""
    ranks2.run(fail, way, calls)


class Moving(nn.Module):
    """Its output depends on a buffer that every forward pass changes, differently on each rank."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, D)
        self.register_buffer("mean", torch.zeros(D))

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer(x)
        self.mean.mul_(0.5).add_(z.detach().mean(0))
        return z + self.mean * z.square()


def broadcast(rank: int, world_size: int, way: str) -> None:
    torch.manual_seed(0)
    ddp = DistributedDataParallel(Moving())
    micro, criterion = MicroBatches(ddp, SIZE), nckernels.NTCELoss(D, K, process_group="world")
    outputs: list[Tensor] = []
    ddp.register_forward_hook(lambda module, inputs, output: outputs.append(output.detach().clone()))
    torch.manual_seed(1 + rank)
    for _ in range(3):
        x, y = torch.randn(8, 6), torch.randint(K, (8,))
        outputs.clear()
        if way == "stream":
            micro.stream(criterion, y, x)
        else:
            criterion(micro(x), y).backward()
            micro.backward()
        first, second = outputs[: len(outputs) // 2], outputs[len(outputs) // 2 :]
        torch.testing.assert_close(torch.cat(second), torch.cat(first), rtol=0, atol=0)
    means = [torch.empty(D) for _ in range(world_size)]
    torch.distributed.all_gather(means, ddp.module.mean)
    assert not torch.equal(*means)  # or else there was nothing to broadcast


@pytest.mark.parametrize("way", ["backward", "stream"])
def test_both_runs_start_with_the_buffers_of_rank_0(ranks2: Ranks, way: str) -> None:
    """DistributedDataParallel makes buffers rank 0's at the beginning of a step, so for both runs."""
    ranks2.run(broadcast, way)


def refuse(rank: int, world_size: int) -> None:
    with pytest.raises(ValueError, match="DistributedDataParallel with static_graph=True"):
        MicroBatches(Features(DistributedDataParallel(Net(), static_graph=True)), SIZE)
    mesh = init_device_mesh("cpu", (world_size,))
    prototypes = nn.Parameter(distribute_tensor(torch.ones(K, D), mesh, [Shard(0)]))
    criterion = nckernels.NTCELoss(prototypes=prototypes, process_group="world")
    with pytest.raises(ValueError, match="prototypes spread over ranks need the features of the whole batch"):
        MicroBatches(nn.Linear(6, D), SIZE).stream(criterion, torch.zeros(4, dtype=torch.int64), torch.ones(4, 6))
    encoder = Features(DistributedDataParallel(Net()))
    encoder.register_forward_hook(lambda module, args, z: z.detach())
    micro = MicroBatches(encoder, SIZE)
    micro(torch.ones(5, 6, dtype=torch.float64)).sum().backward()
    with pytest.raises(RuntimeError, match="gradients have not been reduced"):
        micro.backward()


def test_errors(ranks2: Ranks) -> None:
    ranks2.run(refuse)


# --- fully_shard -------------------------------------------------------------------------------------------


def plain_backward(rank: int, world_size: int) -> None:
    """``sync`` applies to one call only."""
    net = Net()
    del net.criterion
    fully_shard(net)
    micro, x = MicroBatches(Features(net), SIZE), batches(world_size, unequal=0)[rank][0]
    micro(x).sum().backward()
    micro.backward(sync=False)
    with Reductions() as reductions:
        net(x)["z"].sum().backward()
    assert reductions.count == 1
    net.set_requires_gradient_sync(False)
    with Reductions() as reductions:
        micro(x[:1]).sum().backward()
        micro.backward()
    assert reductions.count == 1


def test_fully_shard_outside(ranks2: Ranks) -> None:
    ranks2.run(plain_backward)


class Reductions(TorchDispatchMode):
    """Counts them."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "reduce_scatter" in str(func)
        return func(*args, **(kwargs or {}))


def shards(rank: int, world_size: int, way: str, accumulated: bool, frozen: bool) -> None:
    net = Net()
    criterion = net.criterion  # stays whole: fully_shard takes no 0-dimensional temperature
    del net.criterion
    fully_shard(net.first)
    fully_shard(net)
    micro = MicroBatches(Features(net), SIZE)
    for i in range(2):
        data = [batches(world_size, 2 * i + j, unequal=0) for j in range(1 + accumulated)]
        for j, local in enumerate(data):
            if frozen:
                for x, _ in local:
                    x[-2:] = 0.0
            x, y = local[rank]
            with Reductions() as reductions:
                if way == "streamed":
                    micro.stream(criterion, y, x, sync=j == accumulated)
                else:
                    criterion(micro(x), y).backward()
                    micro.backward(sync=j == accumulated)
            assert reductions.count == (2 if j == accumulated else 0)  # one for each group of parameters
        wanted = expected(data, False)
        for name, p in net.named_parameters():
            if p.requires_grad:
                torch.testing.assert_close(p.grad.full_tensor(), wanted[name], rtol=1e-12, atol=1e-12)
        net.zero_grad()


@pytest.mark.parametrize(("accumulated", "frozen"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("way", ["cached", "streamed"])
def test_fully_shard(ranks2: Ranks, way: str, accumulated: bool, frozen: bool) -> None:
    """One reduction per step, also after accumulation and if the last micro-batch trains nothing."""
    ranks2.run(shards, way, accumulated, frozen)
