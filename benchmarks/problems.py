"""The timed problems: a loss, its sizes, the tensors of one step, and the least work of a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nckernels.backends.base import accumulation_dtype

PROTOTYPE_LOSSES = ("nonl", "ntce", "normface")
SAMPLE_LOSSES = ("supcon", "simclr", "clip")
LOSSES = (*PROTOTYPE_LOSSES, *SAMPLE_LOSSES)
TEMPERATURE = 0.1
Options = tuple[tuple[str, float | str | bool], ...]


@dataclass(frozen=True)
class Work:
    """The least work of forward + backward in any program: the floor that times are compared with."""

    flops: int
    """Operations if each product is computed once: 6 M K d with prototypes, where K counts the classes that the loss
    uses. A matrix of features with themselves is symmetric: half a product forward, one product backward."""
    flops_again: int
    """The same if the matrix is recomputed in the backward pass: 8 M K d."""
    bytes: int
    """Inputs read once, gradients written once."""
    exps: int
    """Exponentials, one per computed entry."""

    def floor(self, gemm: float, copy: float, exp: float | None, *, again: bool = False) -> float:
        """Seconds at the given ceilings: the time of the unit that takes longest, which hides the others."""
        flops = self.flops_again if again else self.flops
        return max(flops / gemm, self.bytes / copy, 0.0 if exp is None else self.exps / exp)


@dataclass(frozen=True)
class Problem:
    """One loss on M samples with d features; labels uniform at random among K classes.

    ``nonl``, ``ntce``, ``normface``: K prototypes. ``supcon``: no prototypes, K labels. ``simclr``: K = M / 2
    images, two views each. ``clip``: M pairs, K = M. ``info_nce``: M queries, K keys, the first M of them positives.
    """

    loss: str
    m: int
    k: int
    d: int
    options: Options = ()
    """Options of the loss by name. Additional ones: ``weight``: classes have weights; ``ignored``: the share of ignored
    samples; ``learnable``: the temperature requires grad; ``frozen``: the keys do not, like those in a queue."""

    @property
    def with_itself(self) -> bool:
        """Whether features are compared with themselves, or with their own means."""
        return self.loss in ("supcon", "simclr", "uniformity", "prototype")

    @property
    def columns(self) -> int:
        """The number of vectors that the samples are compared with."""
        return self.m if self.with_itself else self.k

    @property
    def weight(self) -> float:
        """This problem's weight in a time budget, which grows slowly with its size."""
        return float(self.m * self.columns * self.d) ** 0.25

    def tensors(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> tuple[list[Tensor], Tensor]:
        """The leaves (features; prototypes or keys, if any; a learnable temperature), which require grad except for
        frozen keys, and the targets."""
        generator = torch.Generator(device).manual_seed(seed)
        target = torch.randint(self.k, (self.m,), generator=generator, device=device)
        options = dict(self.options)
        if self.loss in ("clip", "info_nce"):
            target = torch.arange(self.m, device=device)
        elif self.loss == "simclr":
            target = torch.arange(self.m // 2, device=device).repeat(2)
        rows = [self.m] if self.with_itself else [self.m, self.k]
        leaves = [torch.randn(n, self.d, generator=generator, device=device, dtype=dtype) for n in rows]
        if "ignored" in options:
            left_out = torch.rand(self.m, generator=generator, device=device) < float(options["ignored"])
            target = target.masked_fill(left_out, -100)
        if "learnable" in options:
            leaves.append(torch.tensor(TEMPERATURE, device=device, dtype=accumulation_dtype(dtype)))
        return [x.requires_grad_(i != 1 or "frozen" not in options) for i, x in enumerate(leaves)], target

    def bound(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """A loss function with this package's arguments, as a function of this problem's tensors."""
        options: dict[str, Any] = {
            name: value for name, value in self.options if name not in ("ignored", "learnable", "frozen", "weight")
        }
        if "weight" in dict(self.options):
            options["weight"] = torch.linspace(0.5, 1.5, self.k)
        if self.loss == "prototype":
            options["num_classes"] = self.k
        if "learnable" in dict(self.options):
            return lambda *args: function(*args[:-2], args[-1], temperature=args[-2], **options)
        if self.loss not in ("uniformity", "dot_regression"):
            options["temperature"] = TEMPERATURE
        return partial(function, **options)

    def work(self, itemsize: int, present: int) -> Work:
        """The least work; ``present``: the number of classes that occur, which are all that NONL and NTCE use."""
        m, d = self.m, self.d
        if self.with_itself:
            entries = m * m // 2
            return Work(3 * m * m * d, 4 * m * m * d, 2 * m * d * itemsize, entries)
        k = present if self.loss in ("nonl", "ntce") else self.k
        moved = (2 * m + k + self.k) * d * itemsize  # includes the zeros in the gradient of absent classes
        return Work(6 * m * k * d, 8 * m * k * d, moved, m * k)

    def shrunk(self) -> Problem:
        """The same with few samples and classes, for the correctness check of problems that are too large for it."""
        small = replace(self, m=min(self.m, 256), k=min(self.k, 96))
        if self.loss == "info_nce":
            return replace(small, k=small.m + min(self.k - self.m, 96))
        return replace(small, k=small.m) if self.loss == "clip" else paired(small)

    def __str__(self) -> str:
        classes = "" if self.loss in ("clip", "simclr") else f" K={self.k}"
        options = "".join(f" {name}={value}" for name, value in self.options)
        return f"{self.loss} M={self.m}{classes} d={self.d}{options}"


def paired(problem: Problem) -> Problem:
    """The problem with SimCLR's number of images, which follows from the number of rows."""
    return replace(problem, k=problem.m // 2) if problem.loss == "simclr" else problem


def samples(loss: str, m: int, d: int) -> Problem:
    """A problem without prototypes. SupCon's labels: a thousand classes, or few samples each."""
    return paired(Problem(loss, m, m if loss == "clip" else max(2, min(1000, m // 4)), d))


def suite(name: str, device: str, losses: tuple[str, ...] = LOSSES) -> list[Problem]:
    """The problems of a suite, sized for the device, in the order in which a budget should be spent."""
    gpu = device != "cpu"
    makers = {"quick": _quick, "full": _full, "memory": _memory, "launch": _launch, "campaign": _campaign}
    problems = makers[name](gpu)
    return [p for p in dict.fromkeys(problems) if p.loss in losses]


def _quick(gpu: bool) -> list[Problem]:
    if gpu:
        return [*_rows(), samples("clip", 8192, 512), samples("simclr", 512, 128)]
    first = [Problem(loss, 4096, 1000, 512) for loss in PROTOTYPE_LOSSES]
    first += [samples("supcon", 4096, 128), samples("clip", 2048, 512), Problem("nonl", 2048, 10000, 512)]
    return [*first, samples("simclr", 512, 128), *(Problem(loss, 512, 10, 128) for loss in PROTOTYPE_LOSSES)]


def _rows() -> list[Problem]:
    """ImageNet-1K, the same in a large batch, ImageNet-21k, faces, and SupCon, at the sizes of a GPU."""
    return [
        Problem("nonl", 8192, 1000, 2048),
        Problem("normface", 8192, 1000, 2048),
        Problem("ntce", 8192, 1000, 2048),
        samples("supcon", 16384, 128),
        Problem("nonl", 2048, 1000, 2048),
        Problem("nonl", 8192, 21841, 2048),
        Problem("normface", 8192, 21841, 2048),
        Problem("nonl", 8192, 1_000_000, 512),
        samples("supcon", 65536, 128),
    ]


def _campaign(gpu: bool) -> list[Problem]:
    """The problems for the first minutes on a GPU, most important first; on a CPU shrunk ones with the same rows."""
    rows = [
        Problem("nonl", 8192, 1000, 2048),
        Problem("normface", 8192, 1000, 2048),
        samples("supcon", 16384, 128),
        Problem("nonl", 2048, 1000, 2048),
        Problem("nonl", 65536, 10, 512),
        samples("clip", 32768, 512),
        Problem("normface", 8192, 131_072, 4096),
        Problem("nonl", 8192, 21841, 2048),
        Problem("nonl", 8192, 1_000_000, 512),
        samples("supcon", 65536, 128),
    ]
    return rows if gpu else [row.shrunk() for row in rows]


def _full(gpu: bool) -> list[Problem]:
    """The quick suite, then sweeps of one size at a time."""
    d = 2048 if gpu else 512
    sweep = [Problem("nonl", m, k, d) for k in (1000, 100, 10) for m in (8192, 2048, 512, 128, 32)]
    sweep += [samples("supcon", n, 128) for n in (4096, 8192, 16384)]
    sweep += [samples("clip", n, 512) for n in ((2048, 4096, 8192, 16384) if gpu else (1024, 4096, 8192))]
    others = [Problem("nonl", 8192, 1000, 128), Problem("nonl", 16384, 4000, 64)]
    return [*_quick(gpu), *sweep, *others, Problem("nonl", 8192, 1000, 2048)]


def _memory(gpu: bool) -> list[Problem]:
    """Growing batches and growing numbers of classes."""
    d, batches = (2048, (1024, 4096, 16384, 65536)) if gpu else (128, (1024, 4096, 16384))
    classes = (1000, 10_000, 100_000, 1_000_000) if gpu else (1000, 10_000, 100_000)
    grown = [Problem("nonl", m, 1000, d) for m in batches] + [Problem("normface", 1024, k, 128) for k in classes]
    return [*grown, *(samples("supcon", m, 128) for m in batches), *(samples("clip", m, 128) for m in batches)]


def _launch(gpu: bool) -> list[Problem]:
    """Problems so small that Python and kernel launches take most of the time, on any device."""
    tiny = [Problem(loss, 512, 10, 128) for loss in PROTOTYPE_LOSSES]
    tiny += [Problem("nonl", 32, 10, 64), Problem("nonl", 128, 100, 128), Problem("nonl", 256, 1000, 256)]
    return [*tiny, samples("supcon", 256, 128), samples("simclr", 256, 128), samples("clip", 256, 128)]
