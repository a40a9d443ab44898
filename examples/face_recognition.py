"""Face recognition with class-parallel prototypes: ArcFace, each process has the prototypes of some identities.

torchrun --nproc-per-node 2 examples/face_recognition.py

A photo is made from a person and a pose. The encoder trains on some people and is tested on others: of each one photo
is known, and another has to find it. Prints how many do. With --class-fraction 0.1 it is PartialFC.
"""

import argparse
import os
import time

import torch
import torch.distributed as dist
import torch.distributed.tensor as dtensor
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

import nckernels

FACTORS, PIXELS, DIM, BATCH = 16, 128, 64, 128  # BATCH: of each process


def photos(people: Tensor, mixing: Tensor) -> Tensor:
    """One photo of each person (N, FACTORS), in a random pose."""
    pose = 2 * torch.randn_like(people)
    return torch.tanh(0.5 * torch.cat([people, pose], 1) @ mixing)


@torch.no_grad()
def identified(encoder: nn.Module, known: Tensor, probes: Tensor) -> float:
    """Share of the probes whose nearest known photo is that of the same person."""
    nearest = (normalize(encoder(probes)) @ normalize(encoder(known)).T).argmax(1)
    return (nearest.cpu() == torch.arange(len(probes))).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--identities", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--class-fraction", type=float, default=1.0)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()
    rank, mesh = dist.get_rank(), init_device_mesh(device.type, (dist.get_world_size(),))
    torch.manual_seed(0)
    people = torch.randn(args.identities + 200, FACTORS, device=device)  # the last 200 are not trained on
    mixing = torch.randn(2 * FACTORS, PIXELS, device=device) / FACTORS**0.5
    encoder = nn.Sequential(nn.Linear(PIXELS, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, DIM))
    encoder = DistributedDataParallel(encoder.to(device))
    torch.manual_seed(1 + rank)  # other photos and other prototypes on each process
    prototypes = nn.Parameter(dtensor.empty(args.identities, DIM, device_mesh=mesh, placements=[dtensor.Shard(0)]))
    nn.init.normal_(prototypes.to_local(), std=DIM**-0.5)
    options = {"angular_margin": 0.3, "temperature": 1 / 16, "class_fraction": args.class_fraction}
    criterion = nckernels.NormFaceLoss(prototypes=prototypes, process_group=mesh.get_group(), **options)
    groups = [{"params": encoder.parameters()}, {"params": criterion.parameters()}]  # plain tensors, DTensors
    optimizer = torch.optim.AdamW(groups, lr=2e-3)
    known, probes = photos(people[-200:], mixing), photos(people[-200:], mixing)
    before = identified(encoder.module, known, probes)
    for _ in range(args.steps):
        labels = torch.randint(args.identities, (BATCH,), device=device)
        loss = criterion(encoder(photos(people[labels], mixing)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if rank == 0:
        after = identified(encoder.module, known, probes)
        print(f"processes: {mesh.size()}, prototypes here: {len(prototypes.to_local())} of {args.identities}")
        print(f"new people found: {before:.3f} before, {after:.3f} after")
    time.sleep(0.1)  # gloo's threads let go of their last tensors; if the group goes first, torch 2.13 may hang
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
