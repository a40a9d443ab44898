"""CLIP as open_clip trains it: two towers, a learnt and clamped logit_scale, the pairs of all processes.

torchrun --nproc-per-node 2 examples/clip_ddp.py --epochs 10

Images are of digits, texts their names. In a batch of 64 about six images share a name, which keeps the loss above
log(6), or so. Any number of processes prints the same losses, and how many held-out images find their name.
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

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class TwoTowers(nn.Module):
    """Features of both sides, which the loss normalises, and the scale of the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
        self.text = nn.Sequential(nn.EmbeddingBag(27, 64, padding_idx=0), nn.ReLU(), nn.Linear(64, 32))
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    def forward(self, images: Tensor, letters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.visual(images), self.text(letters), self.logit_scale.exp()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=10)
    epochs = parser.parse_args().epochs
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()  # gloo for tensors on CPUs, NCCL for those on GPUs
    rank, world_size = dist.get_rank(), dist.get_world_size()
    x, y = (torch.tensor(array, device=device) for array in load_digits(return_X_y=True))
    x = x.float() / 16
    letters = torch.tensor([[ord(c) - 96 for c in name.ljust(5, "`")] for name in NAMES], device=device)  # 0 for none
    torch.manual_seed(0)
    towers = TwoTowers().to(device)
    model = DistributedDataParallel(towers)
    vectors = [p for p in towers.parameters() if p.ndim < 2]  # biases and logit_scale have no weight decay
    groups = [{"params": vectors, "weight_decay": 0.0}, {"params": [p for p in towers.parameters() if p.ndim >= 2]}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, weight_decay=0.2)
    for epoch in range(epochs):
        batches = torch.randperm(1440, generator=torch.Generator().manual_seed(epoch)).split(64)  # of all processes
        total = torch.zeros((), device=device)
        for batch in batches:
            own = batch[rank::world_size]  # need not be as many as the others have
            images, texts, scale = model(x[own], letters[y[own]])
            loss = nckernels.clip_loss(images, texts, temperature=1 / scale, process_group="world")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            towers.logit_scale.detach().clamp_(0, 4.6052)  # log(100)
            total += loss.detach()
        dist.all_reduce(total)
        if rank == 0:  # the average over the ranks is the loss of the whole batch
            print(f"epoch {epoch + 1}: loss {total.item() / world_size / len(batches):.3f}")
    if rank == 0:
        images, names = towers.visual(x[1440:]), towers.text(letters)
        share = ((images @ nn.functional.normalize(names).T).argmax(1) == y[1440:]).float().mean()
        print(f"processes: {world_size} ({device.type}), images that find their name: {share:.3f}")
    time.sleep(0.1)  # gloo's threads let go of their last tensors; if the group goes first, torch 2.13 may hang
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
