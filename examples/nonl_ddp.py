"""NONL with the negatives of all processes: handwritten digits, DistributedDataParallel.

torchrun --nproc-per-node 2 examples/nonl_ddp.py --epochs 5

On machines without a GPU the processes use gloo, with one GPU each NCCL. Any number of them prints the same losses.
"""

import argparse
import os
import time

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import nckernels

BATCH = 128  # of all processes


class Net(nn.Module):
    """Logits; with labels their loss, so that the call of the wrapped network is the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
        self.head = nckernels.PrototypeClassifier(32, 10, loss="nonl", process_group="world")

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.head(self.body(x), y)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=5)
    epochs = parser.parse_args().epochs

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()  # gloo for tensors on CPUs, NCCL for those on GPUs
    rank, world_size = dist.get_rank(), dist.get_world_size()

    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    torch.manual_seed(0)
    net = DistributedDataParallel(Net().to(device))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(epochs):
        batches = torch.randperm(1440, generator=torch.Generator().manual_seed(epoch)).split(BATCH)
        total = torch.zeros((), device=device)
        for batch in batches:
            own = batch[rank::world_size]  # need not be as many as the others have
            loss = net(x[own].to(device), y[own].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
        dist.all_reduce(total)
        if rank == 0:  # the average over the ranks is the loss of the whole batch
            print(f"epoch {epoch + 1}: loss {total.item() / world_size / len(batches):.3f}")
    if rank == 0:
        right = (net.module(x[1440:].to(device)).argmax(1).cpu() == y[1440:]).float().mean()
        print(f"processes: {world_size} ({device.type}), accuracy on other images: {right:.3f}")
    time.sleep(0.1)  # gloo's threads let go of their last tensors; if the group goes first, torch 2.13 may hang
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
