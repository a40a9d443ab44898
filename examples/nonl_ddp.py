"""NONL with the negatives of all processes: handwritten digits, DistributedDataParallel.

torchrun --nproc-per-node 2 examples/nonl_ddp.py --epochs 5

On machines without a GPU the processes use gloo, with one GPU each NCCL.
"""

import argparse
import os

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import nckernels


class Net(nn.Module):
    """Logits; with labels their loss, so that the call of the wrapped network is the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
        self.head = nckernels.PrototypeClassifier(32, 10, loss="nonl", process_group="world")

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.head(self.body(x), y)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
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

    torch.manual_seed(0)
    net = DistributedDataParallel(Net().to(device))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        total = torch.zeros((), device=device)
        for images, labels in loader:
            loss = net(images.to(device), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
        dist.all_reduce(total)  # the average over the ranks is the loss of the whole batch
        if rank == 0:
            print(f"epoch {epoch + 1}: loss {total.item() / world_size / len(loader):.3f}")
    if rank == 0:
        net.eval()
        with torch.no_grad():
            right = (net.module(test[0]).argmax(1) == test[1]).float().mean()
        print(f"{world_size} processes ({device.type}), {world_size * args.batch} samples a step, accuracy {right:.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
