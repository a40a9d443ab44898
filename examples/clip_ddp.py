"""CLIP with the pairs of all processes and a learnt temperature: images of digits, and their names as text.

torchrun --nproc-per-node 2 examples/clip_ddp.py --epochs 10

There are ten captions only: most of the negatives of a pair have its own caption, which keeps the loss above log of how
often a caption occurs. What counts is that images find their names, as in CLIP's zero-shot classification. On machines
without a GPU the processes use gloo, with one GPU each NCCL.
"""

import argparse
import math
import os

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import nckernels

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class TwoTowers(nn.Module):
    """The loss of pairs. The temperature is a parameter of the wrapped network: its gradient is averaged too."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
        self.letters = nn.EmbeddingBag(27, 64, padding_idx=0)
        self.text = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, images: Tensor, letters: Tensor) -> Tensor:
        a, b = self.image(images), self.text(self.letters(letters))
        return nckernels.clip_loss(a, b, temperature=torch.exp(-self.logit_scale), process_group="world")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=32, help="of each process")
    args = parser.parse_args()

    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group()  # gloo for tensors on CPUs, NCCL for those on GPUs
    rank, world_size = dist.get_rank(), dist.get_world_size()

    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    letters = torch.tensor([[ord(c) - ord("a") + 1 for c in name] + [0] * (5 - len(name)) for name in NAMES])
    train = TensorDataset(x[:1440], letters[y[:1440]])
    sampler = DistributedSampler(train, seed=0)  # as many batches for every process: all of them call the loss
    loader = DataLoader(train, args.batch, sampler=sampler)

    torch.manual_seed(0)
    net = DistributedDataParallel(TwoTowers().to(device))
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        total = torch.zeros((), device=device)
        for images, words in loader:
            loss = net(images.to(device), words.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
        dist.all_reduce(total)  # the average over the ranks is the loss of the whole batch
        if rank == 0:
            print(f"epoch {epoch + 1}: loss {total.item() / world_size / len(loader):.3f}")
    if rank == 0:
        towers = net.module
        with torch.no_grad():
            a, b = towers.image(x[1440:].to(device)), towers.text(towers.letters(letters.to(device)))
            right = (nn.functional.cosine_similarity(a[:, None], b, dim=2).argmax(1).cpu() == y[1440:]).float().mean()
        tau = torch.exp(-towers.logit_scale).item()
        print(
            f"{world_size} processes ({device.type}), temperature {tau:.3f}, images that find their name: {right:.3f}"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
