"""python -m benchmarks many-classes: a step with a million classes, dense and sparse gradients of the prototypes.

A step is forward, backward and SGD. The times are the median and the minimum of interleaved rounds. Memory is the peak
of live allocations during a step, gradients included, beyond the prototypes and the features.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import nckernels

from . import measure

Loss = Callable[..., Tensor]


def main(argv: list[str]) -> int:
    """Measure and print; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks many-classes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--samples", type=int, default=1024, help="1024")
    parser.add_argument("--classes", type=int, default=1_000_000, help="1000000")
    parser.add_argument("--dim", type=int, default=64, help="64")
    parser.add_argument("--fraction", type=float, default=0.01, help="of the classes in NormFace's sum: 0.01")
    parser.add_argument("--seconds", type=float, default=15.0, help="for all times together: 15")
    parser.add_argument("--device", default="cpu", help="cpu or cuda: cpu")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(args.samples, args.dim, generator=generator, device=device).requires_grad_()
    w = torch.randn(args.classes, args.dim, generator=generator, device=device).requires_grad_()
    y = torch.randint(args.classes, (args.samples,), generator=generator, device=device)
    optimizer = torch.optim.SGD([w], lr=0.1)

    def step(loss: Loss, update: bool, **options: Any) -> None:
        loss(x, w, y, **options).backward()
        if update:
            optimizer.step()
        x.grad = w.grad = None  # so that every step frees its gradients

    sampled = functools.partial(nckernels.normface_loss, class_fraction=args.fraction)
    steps: dict[str, measure.Step] = {
        "nonl, without SGD": functools.partial(step, nckernels.nonl_loss, False),
        "nonl": functools.partial(step, nckernels.nonl_loss, True),
        "nonl, sparse": functools.partial(step, nckernels.nonl_loss, True, sparse=True),
        "ntce, sparse": functools.partial(step, nckernels.ntce_loss, True, sparse=True),
        f"normface, {args.fraction:g} of the classes": functools.partial(step, sampled, True),
        f"normface, {args.fraction:g} of the classes, sparse": functools.partial(step, sampled, True, sparse=True),
    }
    memory: dict[str, int] = {}
    for name, run in steps.items():
        run()
        memory[name] = measure.peak_memory(run, device).extra
    rounds = measure.interleave(steps, device, args.seconds, lambda _: None, always=tuple(steps))
    print(f"M={args.samples} K={args.classes} d={args.dim}, {device}, torch {torch.__version__}, ", end="")
    print(f"{torch.get_num_threads()} threads, {len(rounds)} rounds")
    print(f"{'':40}{'ms a step':>10}{'least':>8}{'extra MiB':>11}")
    for name in steps:
        times = [1e3 * r[name] for r in rounds]
        print(f"{name:40}{statistics.median(times):10.1f}{min(times):8.1f}{memory[name] / 2**20:11.1f}")
    return 0
