"""SupCon of two views with the samples of all processes, then class means as the classifier: handwritten digits.

torchrun --nproc-per-node 2 examples/supcon_ddp.py --epochs 10

On machines without a GPU the processes use gloo, with one GPU each NCCL.
"""

import argparse
import os
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import nckernels

BATCH = 64  # of each process


def view(images: Tensor) -> Tensor:
    """The images with noise, moved by at most one pixel."""
    top, left = torch.randint(3, (2,)).tolist()
    padded = F.pad(images.view(-1, 8, 8), (1, 1, 1, 1))
    return padded[:, top : top + 8, left : left + 8].flatten(1) + 0.1 * torch.randn_like(images)


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
    data = TensorDataset(x[:1440], y[:1440])
    sampler = DistributedSampler(data)  # gives every process as many batches: all of them must call the loss
    loader = DataLoader(data, BATCH, sampler=sampler)

    torch.manual_seed(0)  # the same network everywhere
    encoder, head = nn.Linear(64, 128), nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 32))
    net = DistributedDataParallel(nn.Sequential(encoder, nn.ReLU(), head).to(device))
    torch.manual_seed(1 + rank)  # other views
    criterion = nckernels.SupConLoss(temperature=0.1, process_group="world")
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        total = torch.zeros((), device=device)
        for images, labels in loader:
            views = torch.stack([view(images), view(images)], 1).to(device)  # (B, 2, 64)
            loss = criterion(net(views), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
        dist.all_reduce(total)
        if rank == 0:  # the average over the ranks is the loss of the whole batch
            print(f"epoch {epoch + 1}: loss {total.item() / world_size / len(loader):.3f}")
    own = slice(rank, 1440, world_size)  # every image once
    means = nckernels.FixedPrototypes(10, 32, device=device)
    means.fit([(x[own], y[own])], encoder=lambda images: net.module(images.to(device))).all_reduce()
    if rank == 0:
        accuracy = means.score(net.module(x[1440:].to(device)), y[1440:])
        print(f"processes: {world_size} ({device.type}), accuracy of the class means: {accuracy:.3f}")
    time.sleep(0.1)  # gloo's threads let go of their last tensors; if the group goes first, torch 2.13 may hang
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
