"""python -m benchmarks predict: predicted times of a step of the Triton backend on a GPU, from counted work.

The package's own code runs on tensors without memory, and its kernels, panels and launches are counted (counts.py). A
stage takes as long as its operations, its bytes or its exponentials, whichever is longest, at the rates of predict.py,
and stages follow each other. Launches cost nothing here; in real steps with many launches and short times they will.

--stages ROW lists one row stage by stage. With a report of a campaign on one of these GPUs the predictions are for its
problems, at the rates that it has measured, and are printed next to its times.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nckernels.backends.registry import DEFAULT_WORKSPACE, SHARE_OF_DEVICE
from nckernels.backends.tiled.plan import OWN_RATE

from .problems import LOSSES, Problem, Work, samples
from .report import Report, duration, load

if TYPE_CHECKING:
    from .counts import Stage, Tally

TRITON = "nckernels triton"
AGAIN = "inputs again"
PAGE = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
SHOWN = 0.005
"""The least share of the time for which a stage has its own line."""


@dataclass(frozen=True)
class Gpu:
    """The rates of a GPU."""

    name: str
    gemm: float
    """Operations a second of the vendor's bfloat16 products. The datasheet of the H100 SXM has 989e12; 798e12 has been
    measured with 8192 x 8192 matrices. Our own kernels: ``plan.OWN_RATE`` times this, an estimate."""
    copy: float
    """Bytes per second, read plus written, of a large copy: 3.0e12 of 3.35e12, 4.3e12 of 4.8e12."""
    memory: int
    """Bytes of memory, which determine the default workspace."""
    l2: float = 6e12
    """Bytes per second between the multiprocessors and the L2 cache; an estimate."""
    exp: float = 16 * 132 * 1.755e9
    """Exponentials per second: 16 per clock and multiprocessor, with 132 multiprocessors at 1.755 GHz."""

    def units(self, stage: Stage) -> dict[str, float]:
        """Seconds that each unit is busy."""
        return {
            "library": stage.library / self.gemm,
            "own kernels": stage.own / (OWN_RATE * self.gemm),
            "memory": stage.memory.total() / self.copy,
            "L2 cache": stage.moved.total() / self.l2,
            "exponentials": stage.exps / self.exp,
        }

    def seconds(self, stages: Iterable[Stage]) -> float:
        return sum(max(self.units(stage).values()) for stage in stages)

    @property
    def workspace(self) -> int:
        """The default of ``nckernels.set_workspace``."""
        return max(DEFAULT_WORKSPACE, self.memory // SHARE_OF_DEVICE)


GPUS = {
    "h100": Gpu("H100 SXM", 798e12, 3.0e12, 79 << 30),
    "h200": Gpu("H200", 798e12, 4.3e12, 139 << 30),
}

ROWS = {
    "imagenet": Problem("nonl", 2048, 1000, 2048),
    "imagenet-large": Problem("nonl", 8192, 1000, 2048),
    "imagenet-large-normface": Problem("normface", 8192, 1000, 2048),
    "imagenet-21k": Problem("nonl", 8192, 21841, 2048),
    "imagenet-21k-normface": Problem("normface", 8192, 21841, 2048),
    "faces": Problem("nonl", 8192, 1_000_000, 512),
    "faces-normface": Problem("normface", 8192, 1_000_000, 512),
    "supcon": samples("supcon", 16384, 128),
    "supcon-large": samples("supcon", 65536, 128),
    "vocabulary": Problem("normface", 8192, 131_072, 4096),
    "clip": samples("clip", 32768, 512),
    "few-classes": Problem("nonl", 65536, 10, 512),
    "small": Problem("nonl", 512, 10, 128),
}
"""The target sizes, in bfloat16."""


@dataclass
class Prediction:
    """One problem in two passes, as the backend chooses, and with an epilogue product if that makes a difference."""

    problem: Problem
    gpu: Gpu
    work: Work
    passes: Tally
    chosen: Tally
    hopper: Tally | None

    @property
    def floor(self) -> float:
        return self.work.floor(self.gpu.gemm, self.gpu.copy, self.gpu.exp)

    @property
    def before(self) -> float:
        """Seconds in two passes."""
        return self.gpu.seconds(self.passes.stages)

    @property
    def after(self) -> float:
        """Seconds as the backend chooses."""
        return self.gpu.seconds(self.chosen.stages)

    @property
    def with_epilogue(self) -> float | None:
        """Seconds with ``nckernels[hopper]``, where that makes a difference."""
        return None if self.hopper is None else self.gpu.seconds(self.hopper.stages)

    @property
    def way(self) -> str:
        """How the backend computes it: in one step, or by two passes, in one call or two."""
        names = {stage.name for stage in self.chosen.stages}
        if names & {"panel_entries", "grad_of_pairs", "panel_entries_of_pairs"}:
            return "one step"
        return "one call" if "prepare_step" in names else "two passes"

    def beyond(self) -> dict[str, int]:
        """Bytes to and from memory beyond the floor's, by kind."""
        from .counts import INPUTS

        memory: Counter[str] = Counter()
        for stage in self.chosen.stages:
            memory.update(stage.memory)
        memory[INPUTS] -= self.work.bytes
        return {AGAIN if kind == INPUTS else kind: count for kind, count in memory.most_common() if count > 0}

    def lost(self) -> dict[str, float]:
        """Seconds that would be saved by each of several changes, largest first; such savings overlap.

        The changes are: no pass over the rows (norms, copies, finishing, PyTorch's operators, except the writing of
        gradients); no bytes of panels, or of float32 sums outside of finishing; no operations beyond the floor's; and
        our own kernels at the library's rate.
        """
        from .counts import INPUTS, PANELS, SUMS

        stages = self.chosen.stages

        def passes(*names: str) -> float:
            same = [stage for stage in stages if stage.name.startswith(names)]
            gradients = sum(stage.moved[INPUTS] for stage in same if stage.name.startswith(("finish", "torch ")))
            return self.gpu.seconds(same) - gradients / self.gpu.copy

        def without(change: Callable[[Stage], Stage]) -> float:
            return self.after - self.gpu.seconds(map(change, stages))

        needed = min(1.0, self.work.flops / operations(self.chosen))
        saved = {
            "norms": passes("row_rnorm", "prepare_"),
            "copies": passes("gather"),
            "finishing": passes("finish"),
            "PyTorch": passes("torch "),
            "panels": without(partial(_without, kind=PANELS)),
            "float32 sums": without(lambda s: s if s.name == "finish" else _without(s, SUMS)),
            "operations again": without(lambda s: replace(s, library=int(s.library * needed), own=int(s.own * needed))),
            "our kernels' rate": without(lambda s: replace(s, library=s.operations, own=0)),
        }
        return dict(sorted(saved.items(), key=lambda item: -item[1]))


def _without(stage: Stage, kind: str) -> Stage:
    moved, memory = (Counter({k: n for k, n in c.items() if k != kind}) for c in (stage.moved, stage.memory))
    return replace(stage, moved=moved, memory=memory)


def predict(problem: Problem, gpu: Gpu, dtype: torch.dtype = torch.bfloat16) -> Prediction:
    """Count a step of this problem."""
    from nckernels.backends.triton.config import Arch

    from . import counts

    arch = Arch(90, 132, 227 << 10)
    count = partial(counts.count, problem, gpu.workspace, arch, dtype)
    passes, chosen, hopper = count(in_one_step=False), count(in_one_step=True), count(in_one_step=True, epilogue=True)
    different = any(stage.name == "product with epilogue" for stage in hopper.stages)
    work = problem.work(dtype.itemsize, chosen.present)
    return Prediction(problem, gpu, work, passes, chosen, hopper if different else None)


def main(argv: list[str]) -> int:
    """Count and print; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("report", nargs="?", type=Path, help="of python -m benchmarks on one of these GPUs")
    parser.add_argument("--gpu", choices=tuple(GPUS), default="h100", help="h100")
    parser.add_argument("--stages", choices=tuple(ROWS), metavar="ROW", help=f"one of {', '.join(ROWS)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts, stage by stage")
    parser.add_argument("--write", action="store_true", help="write the tables of both GPUs into docs/performance.md")
    args = parser.parse_args(argv)
    try:
        from . import counts as counts
    except ImportError as error:
        raise SystemExit(f"predict needs Triton: {error}") from error
    if args.report is not None:
        print(beside(load(args.report)))
        return 0
    if args.write:
        PAGE.write_text(written(PAGE.read_text()))
        return 0
    gpu = GPUS[args.gpu]
    rows = {name: predict(ROWS[name], gpu) for name in ([args.stages] if args.stages else ROWS)}
    if args.json is not None:
        args.json.write_text(json.dumps({name: _plain(p) for name, p in rows.items()}, indent=1) + "\n")
    if args.stages:
        print(stages(rows[args.stages]))
    else:
        print(table(rows))
    return 0


def written(page: str) -> str:
    """A page with the tables of both GPUs between its markers."""
    tables = [
        f"{gpu.name}:\n\n{table({name: predict(problem, gpu) for name, problem in ROWS.items()})}"
        for gpu in GPUS.values()
    ]
    begin, end = (f"<!-- predictions: {word} -->" for word in ("begin", "end"))
    before, after = page.index(begin) + len(begin), page.index(end)
    return page[:before] + "\n" + "\n\n".join(tables) + "\n" + page[after:]


def table(rows: dict[str, Prediction]) -> str:
    """A Markdown table with one line per row."""
    lines = [
        "| row | problem | floor | two passes | as chosen | floor / as chosen | with quack | operations / floor's "
        "| launches | MB beyond the floor's | would save |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, p in rows.items():
        chosen = f"{duration(p.after)}, {p.way}"
        ratio, launches = (_change(p, of) for of in (lambda t, f=p.work.flops: f"{operations(t) / f:.2f}", _launches))
        beyond = ", ".join(f"{kind} {count / 1e6:.0f}" for kind, count in p.beyond().items() if count >= 0.5e6)
        lost = ", ".join(f"{name} {t / p.after:.0%}" for name, t in p.lost().items() if t >= 0.045 * p.after)
        times = f"{duration(p.floor)} | {duration(p.before)} | {chosen} | {p.floor / p.after:.2f}"
        times += " | " + ("" if p.with_epilogue is None else duration(p.with_epilogue))
        lines.append(f"| {name} | {p.problem} | {times} | {ratio} | {launches} | {beyond} | {lost} |")
    return "\n".join(lines)


def _change(p: Prediction, of: Callable[[Tally], str]) -> str:
    """The values of two passes and of the chosen way, if these differ."""
    before, after = of(p.passes), of(p.chosen)
    return before if before == after else f"{before}, {after}"


def _launches(tally: Tally) -> str:
    return str(sum(stage.launches for stage in tally.stages))


def operations(tally: Tally) -> int:
    return sum(stage.operations for stage in tally.stages)


def _ways(p: Prediction) -> dict[str, Tally]:
    ways = {"two passes": p.passes, p.way: p.chosen}
    return ways | ({"one step with quack": p.hopper} if p.hopper is not None else {})


def stages(p: Prediction) -> str:
    """The times of the stages for each way; calls of one name are added up."""
    text = f"{p.problem} on an {p.gpu.name}: at least {duration(p.floor)}"
    ways = _ways(p)
    for way, tally in ways.items():
        text += f"\n\n{way}\n" + _by_name(tally.stages, p.gpu)
    return text


def _by_name(all_stages: Sequence[Stage], gpu: Gpu) -> str:
    numbers = f"{'launches':>9}{'GFLOP':>10}{'M exp':>10}{'MB':>10}{'in memory':>10}{'us':>10}{'share':>7}"
    lines = [f"{'stage':<24}{numbers}  bound by; MB of each kind"]
    whole, rest = gpu.seconds(all_stages), []
    for name in dict.fromkeys(stage.name for stage in all_stages):
        same = [stage for stage in all_stages if stage.name == name]
        if gpu.seconds(same) < SHOWN * whole:
            rest += same
        else:
            lines.append(_line(name, same, gpu, whole))
    lines += [_line("less than 0.5 % each", rest, gpu, whole), _line("all", all_stages, gpu, whole)]
    return "\n".join(lines)


def _line(name: str, same: Sequence[Stage], gpu: Gpu, whole: float) -> str:
    busy: dict[str, float] = {}
    moved: Counter[str] = Counter()
    for stage in same:
        units = gpu.units(stage)
        unit = max(units, key=units.__getitem__)
        busy[unit] = busy.get(unit, 0.0) + units[unit]
        moved.update(stage.moved)
    seconds = sum(busy.values())
    memory = sum(stage.memory.total() for stage in same)
    counts = (sum(s.operations for s in same) / 1e9, sum(s.exps for s in same) / 1e6, moved.total() / 1e6, memory / 1e6)
    numbers = "".join(f"{x:>10.1f}" for x in counts) + f"{1e6 * seconds:>10.1f}{seconds / whole:>7.1%}"
    kinds = ", ".join(f"{kind} {count / 1e6:.1f}" for kind, count in moved.most_common() if count >= 0.05e6)
    bound = max(busy, key=busy.__getitem__) if seconds else "nothing"
    return f"{name:<24}{sum(s.launches for s in same):>9}{numbers}  {bound}; {kinds}"


def _plain(p: Prediction) -> dict[str, Any]:
    ways = _ways(p)
    return {
        "problem": asdict(p.problem),
        "gpu": asdict(p.gpu),
        "work": asdict(p.work),
        "floor": p.floor,
        "ways": {
            way: {"seconds": p.gpu.seconds(tally.stages), "stages": [vars(stage) for stage in tally.stages]}
            for way, tally in ways.items()
        },
    }


def beside(report: Report) -> str:
    """Measured next to predicted, at the rates that the report has measured itself."""
    gpu = next((g for key, g in GPUS.items() if key.upper() in report.machine["device"]), None)
    if gpu is None or report.dtype not in ("bfloat16", "float16"):
        known = " and ".join(g.name for g in GPUS.values())
        return f"no predictions for {report.dtype} on {report.machine['device']}: only for 16 bits on {known}"
    if (c := report.ceilings) is not None:
        gpu = replace(gpu, gemm=c.gemm, copy=c.copy, exp=gpu.exp if c.exp is None else c.exp)
    gpu = replace(gpu, memory=report.machine.get("memory", gpu.memory))
    lines = [
        "| problem | way | floor | predicted | measured | measured / predicted | floor / measured | launches |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for measured in report.measured:
        found = next((r.seconds for r in measured.results if r.variant == TRITON and r.seconds), None)
        if found is None or measured.problem.loss not in LOSSES:
            continue
        p = predict(measured.problem, gpu, getattr(torch, report.dtype))
        times = f"{duration(p.floor)} | {duration(p.after)} | {duration(found.median)} | {found.median / p.after:.2f}"
        lines.append(f"| {p.problem} | {p.way} | {times} | {p.floor / found.median:.2f} | {_launches(p.chosen)} |")
    return "\n".join(lines)
