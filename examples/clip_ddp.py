"""CLIP with the pairs of all processes and a learnt temperature: images of digits, and their names as text.

torchrun --nproc-per-node 2 examples/clip_ddp.py --epochs 10

On machines without a GPU the processes use gloo, with one GPU each NCCL. Any number of them prints the same losses.
There are only ten captions, so that each of them has about six images in a batch of 64. Nothing tells these apart, and
the loss stays above log(6), or so.
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

BATCH = 64  # of all processes
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class TwoTowers(nn.Module):
    """The loss of pairs. The temperature is a parameter in here, so that its gradient is averaged, too."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
        self.text = nn.Sequential(nn.EmbeddingBag(27, 64, padding_idx=0), nn.ReLU(), nn.Linear(64, 32))
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    def forward(self, images: Tensor, letters: Tensor) -> Tensor:
        tau = torch.exp(-self.logit_scale)
        return nckernels.clip_loss(self.image(images), self.text(letters), temperature=tau, process_group="world")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=10)
    epochs = parser.parse_args().epochs

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()  # gloo for tensors on CPUs, NCCL for those on GPUs
    rank, world_size = dist.get_rank(), dist.get_world_size()

    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    letters = torch.tensor([[ord(c) - ord("a") + 1 for c in name.ljust(5, "`")] for name in NAMES])  # 0 for none
    torch.manual_seed(0)
    net = DistributedDataParallel(TwoTowers().to(device))
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for epoch in range(epochs):
        batches = torch.randperm(1440, generator=torch.Generator().manual_seed(epoch)).split(BATCH)
        total = torch.zeros((), device=device)
        for batch in batches:
            own = batch[rank::world_size]  # need not be as many as the others have
            loss = net(x[own].to(device), letters[y[own]].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
        dist.all_reduce(total)
        if rank == 0:  # the average over the ranks is the loss of the whole batch
            print(f"epoch {epoch + 1}: loss {total.item() / world_size / len(batches):.3f}")
    if rank == 0:
        images, names = net.module.image(x[1440:].to(device)), net.module.text(letters.to(device))
        right = (images @ nn.functional.normalize(names).T).argmax(1).cpu() == y[1440:]
        print(f"processes: {world_size} ({device.type}), images that find their name: {right.float().mean():.3f}")
    time.sleep(0.1)  # gloo's threads let go of their last tensors; if the group goes first, torch 2.13 may hang
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
