"""python -m benchmarks scaling: traffic and memory of a step across processes, compared with gathering all features.

Every collective of a loss is stated as a formula: its contents, how many numbers of which dtype, forward or
backward. tests/distributed/test_scaling.py records the collectives of real steps and compares each of them. Bytes on
the wire are those that a rank sends in the usual ring algorithms. The exchange of options in the first call of a
configuration is not included.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from nckernels.backends.base import accumulation_dtype
from nckernels.distributed.contrast import COMPACT_ABOVE

from .predict import GPUS
from .two_ranks import example

Kind = Literal["all-reduce", "all-gather", "reduce-scatter", "send"]
PAGE = Path(__file__).resolve().parents[1] / "docs" / "scaling.md"


@dataclass(frozen=True)
class Exchange:
    """One collective, or one message to a neighbour."""

    kind: Kind
    what: str
    dtype: torch.dtype
    numbers: int
    """Size of the rank's input tensor: its own rows for an all-gather, the rows of all ranks for a reduce-scatter."""
    backward: bool = False

    @property
    def payload(self) -> int:
        """Bytes of that tensor."""
        return self.numbers * self.dtype.itemsize

    def wire(self, ranks: int) -> float:
        """Bytes that a rank sends in a ring of ``ranks``."""
        factor = {
            "all-reduce": 2 * (ranks - 1) / ranks,
            "all-gather": ranks - 1,
            "reduce-scatter": (ranks - 1) / ranks,
            "send": 1,
        }
        return factor[self.kind] * self.payload


@dataclass(frozen=True)
class Step:
    """Forward and backward of one loss on one rank."""

    counts: tuple[int, ...]
    """Number of rows on each rank: samples, their views, or keys."""
    d: int
    dtype: torch.dtype = torch.float32
    classes: int = 0
    """K of the losses with prototypes, ``num_classes`` of the prototype loss (0: not given)."""
    reduction: Literal["none", "mean", "sum"] = "mean"
    ring: bool = False
    """Whether keys are sent round a ring, because gathered keys would exceed the workspace."""
    present: int | None = None
    """Number of classes that occur on any rank. None if the host does not know it, as with a GPU; it then reserves a
    slot for every row."""
    rank: int = 0

    @property
    def total(self) -> int:
        return sum(self.counts)

    @property
    def acc(self) -> torch.dtype:
        return accumulation_dtype(self.dtype)

    @property
    def compact(self) -> bool:
        """Whether only the sums of classes that occur are exchanged."""
        return self.classes > max(COMPACT_ABOVE, self.total)

    @property
    def slots(self) -> int:
        return self.total if self.present is None else self.present

    def reduce(self, what: str, numbers: int, *, backward: bool = False) -> Exchange:
        return Exchange("all-reduce", what, self.acc, numbers, backward)

    def gather(self, what: str, dtype: torch.dtype, width: int = 1) -> Exchange:
        """The all-gather of ``width`` numbers per sample, padded to the longest batch."""
        return Exchange("all-gather", what, dtype, max(self.counts) * width)

    @property
    def sizes(self) -> list[Exchange]:
        return [Exchange("all-gather", "batch size and workspace", torch.int64, 2)]

    @property
    def weight(self) -> list[Exchange]:
        return [self.reduce("sum of weights", 1)] if self.reduction == "mean" else []

    def sums_of(self, what: str, columns: int) -> list[Exchange]:
        """The exchanges for ``columns`` log-sum-exps over the rows of all ranks."""
        largest = self.reduce(f"largest logit of each {what}", columns)
        if self.reduction == "none":
            return [
                largest,
                self.reduce(f"sum of each {what}", columns),
                self.reduce(f"upstream gradient of each {what}", columns, backward=True),
            ]
        return [largest, self.reduce(f"sum and weight of each {what}", 2 * columns)]

    def keys(self) -> list[Exchange]:
        if self.ring:
            return self._round()
        gradient = Exchange(
            "reduce-scatter", "gradients of keys", self.acc, len(self.counts) * max(self.counts) * self.d, True
        )
        return [self.gather("keys", self.dtype, self.d), gradient]

    def _round(self) -> list[Exchange]:
        """The ring: every block of keys but the last is forwarded, in both passes; in the second also all gradients."""
        ranks = len(self.counts)
        blocks = [self.counts[(self.rank + step) % ranks] * self.d for step in range(ranks)]
        keys = [Exchange("send", "keys", self.dtype, n) for n in blocks[:-1]]
        gradients = [Exchange("send", "gradients of keys", self.acc, n, True) for n in blocks]
        return [e for e in (*keys, *(replace(key, backward=True) for key in keys), *gradients) if e.numbers]


def _class_direction(step: Step) -> list[Exchange]:
    """NTCE and NONL."""
    if step.compact:
        return [*step.sizes, step.gather("labels", torch.int64), *step.sums_of("class", step.slots)]
    return [*(step.sizes if step.classes > COMPACT_ABOVE else ()), *step.sums_of("class", step.classes)]


def _both_directions(step: Step) -> list[Exchange]:
    return [*replace(step, reduction="none").sums_of("class", step.classes), *step.weight]


def _local(step: Step) -> list[Exchange]:
    """NormFace, NONL over the classes, dot regression, alignment: only the mean spans the ranks."""
    return step.weight


def _supcon(step: Step) -> list[Exchange]:
    return [*step.sizes, step.gather("labels", torch.int64), *step.keys(), *step.weight]


def _prototype(step: Step) -> list[Exchange]:
    labels, classes = [], step.classes
    if not classes:
        labels = [*step.sizes, step.gather("labels", torch.int64)]
        classes = step.slots
    sums = step.reduce("sum of each class", classes * step.d)
    counts = step.reduce("size of each class", classes)
    return [*labels, sums, counts, *step.weight, replace(sums, what="gradient of each sum", backward=True)]


def _info_nce(step: Step) -> list[Exchange]:
    return [*step.sizes, *step.keys(), *step.weight]


def _clip(step: Step) -> list[Exchange]:
    return [*step.sizes, *step.sums_of("key", step.total), *step.keys()]


def _uniformity(step: Step) -> list[Exchange]:
    return [*step.sizes, *replace(step, reduction="none").sums_of("batch", 1), *step.keys()]


def _spread(step: Step, largest: list[Exchange], sums: int) -> list[Exchange]:
    """Prototypes sharded over the ranks: features are exchanged like keys, then numbers per sample."""
    back = step.reduce("gradients of these", sums * step.total, backward=True)
    found = [step.reduce("sums, positive logits", sums * step.total), back, *step.weight]
    return [*step.sizes, step.gather("labels", torch.int64), *step.keys(), *largest, *found]


def _nonl_spread(step: Step) -> list[Exchange]:
    return _spread(step, [], 2)


def _normface_spread(step: Step) -> list[Exchange]:
    return _spread(step, replace(step, reduction="none").sums_of("sample", step.total), 1)


LOSSES: dict[str, Callable[[Step], list[Exchange]]] = {
    "ntce": _class_direction,
    "nonl": _class_direction,
    "nonl instance": _local,
    "nonl both": _both_directions,
    "normface": _local,
    "dot_regression": _local,
    "supcon": _supcon,
    "simclr": _supcon,
    "prototype": _prototype,
    "info_nce": _info_nce,
    "clip": _clip,
    "uniformity": _uniformity,
    "alignment": _local,
    "nonl spread": _nonl_spread,
    "normface spread": _normface_spread,
}


def exchanges(loss: str, step: Step) -> list[Exchange]:
    """The exchanges of one rank in one step, if not all batches are empty."""
    return LOSSES[loss](step)


# --- memory ------------------------------------------------------------------------------------------------


def held(loss: str, step: Step) -> int:
    """Bytes of matrices at the peak beyond features, prototypes, their gradients, the workspace and vectors.

    Gathered keys and their gradient take 8 bytes per number in float32, and also in 16 bits, with a gradient in float32
    and one in 16 bits. The ring holds blocks: two of keys, and the gradients of the block in use, of the outgoing and
    of the incoming block. SupCon adds a second gradient, through the class sums, and for the positives some copies of
    the rank's own samples.
    """
    longest = max(step.counts) * step.d
    if loss in ("ntce", "nonl"):
        return 8 * step.slots * step.d if step.compact else 0  # prototypes of classes that occur, and their gradient
    if loss in ("info_nce", "clip", "uniformity"):
        return 24 * longest if step.ring else 8 * step.total * step.d
    if loss in ("supcon", "simclr"):
        return 34 * longest if step.ring else 10 * step.total * step.d + 9 * longest
    return 0


# --- gathering all features --------------------------------------------------------------------------------


def gathering(step: Step, towers: int = 1) -> list[Exchange]:
    """The exchanges of gathering with gradients: features forward, gradients backward; labels, with one tower."""
    features = step.gather("features", step.dtype, towers * step.d)
    back = Exchange("reduce-scatter", "gradients of features", step.dtype, len(step.counts) * features.numbers, True)
    return [features, back, *([step.gather("labels", torch.int64)] if towers == 1 else [])]


def held_gathering(step: Step, towers: int = 1) -> int:
    """Bytes of all features and their gradients, and of one copy of the logits: autograd keeps two or three.

    For losses with prototypes all ranks compute the logits of all samples; otherwise each rank those of its samples.
    """
    logits = step.total * step.classes if step.classes else towers * step.counts[step.rank] * step.total
    return step.dtype.itemsize * (2 * towers * step.total * step.d + logits)


# --- tables ------------------------------------------------------------------------------------------------

RANKS, SAMPLES = 256, 65_536
CLASSES, DIMS, DTYPES = (1000, 21_841, 10_000_000), (512, 2048), (torch.float32, torch.bfloat16)
GPU = GPUS["h100"]
LATENCY, BANDWIDTH = 30e-6, 50e9
"""Seconds per collective, and bytes per second from a GPU to other nodes. Assumptions, with 400 Gb/s per GPU."""


def batch(d: int, dtype: torch.dtype, classes: int = 0) -> Step:
    """A step of the tables, with equal batches on GPUs."""
    step = Step((SAMPLES // RANKS,) * RANKS, d, dtype, classes)
    return replace(step, ring=not classes and step.total * d * dtype.itemsize > GPU.workspace)


def prototypes_table() -> str:
    """NTCE and NONL."""
    lines = [
        "| K | d | features | NONL sends | gathering sends | times less | NONL holds | gathering holds "
        "| DDP sends for the prototypes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for classes in CLASSES:
        for d in DIMS:
            for dtype in DTYPES:
                step = batch(d, dtype, classes)
                ours, theirs = sent(exchanges("nonl", step)), sent(gathering(step))
                averaging = Exchange("all-reduce", "gradients of prototypes", dtype, classes * d).wire(RANKS)
                cells = [size(ours), size(theirs), f"{theirs / ours:.0f}", size(held("nonl", step))]
                cells += [size(held_gathering(step)), size(averaging)]
                lines.append(f"| {classes:,} | {d} | {_name(dtype)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def samples_table() -> str:
    """CLIP and SupCon."""
    lines = [
        "| loss | d | features | keys | nckernels sends | gathering sends | nckernels holds | gathering holds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for loss, towers in (("clip", 2), ("supcon", 1)):
        for d in DIMS:
            for dtype in DTYPES:
                step = batch(d, dtype)
                cells = [sent(exchanges(loss, step)), sent(gathering(step, towers)), held(loss, step)]
                cells.append(held_gathering(step, towers))
                keys = "ring" if step.ring else "gathered"
                lines.append(f"| {loss} | {d} | {_name(dtype)} | {keys} | " + " | ".join(map(size, cells)) + " |")
    return "\n".join(lines)


def collectives_table() -> str:
    """The number of collectives of a step, and the parts of their time."""
    rows = {
        "NONL, K = 1000": ("nonl", batch(512, torch.bfloat16, 1000)),
        "NONL, K = 21,841": ("nonl", batch(512, torch.bfloat16, 21_841)),
        'NONL, K = 1000, `reduction="none"`': ("nonl", replace(batch(512, torch.bfloat16, 1000), reduction="none")),
        "NONL, prototypes sharded over the ranks": ("nonl spread", batch(512, torch.bfloat16, 10_000_000)),
        "NormFace": ("normface", batch(512, torch.bfloat16, 1000)),
        "prototype loss, K = 1000": ("prototype", batch(512, torch.bfloat16, 1000)),
        "CLIP, bfloat16, d = 512": ("clip", batch(512, torch.bfloat16)),
        "SupCon, bfloat16, d = 512": ("supcon", batch(512, torch.bfloat16)),
        "CLIP, float32, d = 2048, ring": ("clip", batch(2048, torch.float32)),
    }
    lines = [
        "| loss | forward | backward | largest payload | a rank sends | at the link's rate | at least, for latency |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, (loss, step) in rows.items():
        found = exchanges(loss, step)
        backward = sum(e.backward for e in found)
        numbers = [str(len(found) - backward), str(backward), size(max(e.payload for e in found)), size(sent(found))]
        times = [f"{1e3 * t:.2g} ms" for t in (sent(found) / BANDWIDTH, len(found) * LATENCY)]
        lines.append(f"| {name} | " + " | ".join(numbers + times) + " |")
    return "\n".join(lines)


def sent(found: Sequence[Exchange], ranks: int = RANKS) -> float:
    """Bytes on the wire."""
    return sum(e.wire(ranks) for e in found)


def size(count: float) -> str:
    """Bytes as text, three digits."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 0.9995 * scale:
            return f"{count / scale:#.3g}".rstrip(".") + f" {unit}"
    return f"{count:.0f} B" if count else "-"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


TABLES = {"prototypes": prototypes_table, "samples": samples_table, "collectives": collectives_table}


def written(page: str, worked: str) -> str:
    """A page with the tables, and the worked example, between their markers."""
    texts = {"two ranks": worked} | {name: table() for name, table in TABLES.items()}
    for name, text in texts.items():
        begin, end = (f"<!-- {name}: {word} -->" for word in ("begin", "end"))
        before, after = page.index(begin) + len(begin), page.index(end)
        page = page[:before] + "\n" + text + "\n" + page[after:]
    return page


def main(argv: list[str]) -> int:
    """Print or write; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="write the tables into docs/scaling.md")
    args = parser.parse_args(argv)
    worked = example()
    if args.write:
        PAGE.write_text(written(PAGE.read_text(), worked))
    else:
        print(*(table() for table in TABLES.values()), worked, sep="\n\n")
    return 0
