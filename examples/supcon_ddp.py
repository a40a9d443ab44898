"""SupCon of two views with the samples of all processes, then class means as the classifier: handwritten digits.

torchrun --nproc-per-node 2 examples/supcon_ddp.py --epochs 10

On machines without a GPU the processes use gloo, with one GPU each NCCL.
"""

import argparse
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import nckernels


def view(images: Tensor) -> Tensor:
    """Each image with noise, moved by at most one pixel."""
    top, left = torch.randint(3, (2,)).tolist()
    padded = F.pad(images.view(-1, 8, 8), (1, 1, 1, 1))
    return padded[:, top : top + 8, left : left + 8].flatten(1) + 0.1 * torch.randn_like(images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=64, help="of each process")
    args = parser.parse_args()

    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group()  # gloo for tensors on CPUs, NCCL for those on GPUs
    rank, world_size = dist.get_rank(), dist.get_world_size()

    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    train, test = TensorDataset(x[:1440], y[:1440]), (x[1440:].to(device), y[1440:].to(device))
    sampler = DistributedSampler(train, seed=0)  # as many batches for every process: all of them call the loss
    loader = DataLoader(train, args.batch, sampler=sampler)

    torch.manual_seed(0)  # the same network everywhere
    encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU())
    projection = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 32))
    net = DistributedDataParallel(nn.Sequential(encoder, projection).to(device))
    torch.manual_seed(1 + rank)  # other views
    criterion = nckernels.SupConLoss(temperature=0.1, process_group="world")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        total = torch.zeros((), device=device)
        for images, labels in loader:
            both = torch.cat([view(images), view(images)]).to(device)
            loss = criterion(net(both).unflatten(0, (2, -1)).transpose(0, 1), labels.to(device))  # (B, 2, d)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
        dist.all_reduce(total)  # the average over the ranks is the loss of the whole batch
        if rank == 0:
            print(f"epoch {epoch + 1}: loss {total.item() / world_size / len(loader):.3f}")

    own = slice(rank, 1440, world_size)  # every image once
    means = nckernels.FixedPrototypes(10, 32, device=device)
    means.fit(((x[own], y[own]),), encoder=lambda images: net.module(images.to(device))).all_reduce()
    if rank == 0:
        accuracy = means.score(net.module(test[0]), test[1])
        print(
            f"{world_size} processes ({device.type}), class means of {int(means.counts.sum())}, accuracy {accuracy:.3f}"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
