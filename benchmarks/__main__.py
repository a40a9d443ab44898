"""Time forward + backward of every loss and backend against the alternatives.

python -m benchmarks                                     quick suite on this machine
python -m benchmarks --suite full --budget 900 --out DIR JSON report and pictures
python -m benchmarks --device cuda --dtype bfloat16 --budget 480
python -m benchmarks --suite sweep                       every loss and option at random sizes, against naive eager
python -m benchmarks compare OLD.json NEW.json           exits with 1 on a regression beyond noise
python -m benchmarks readme                              README's tables from the committed reports
python -m benchmarks tune --device cuda                  tile tables of the Triton kernels for this GPU
python -m benchmarks correctness                         every kernel on small ragged problems, against float64
python -m benchmarks host                                host time of the Triton backend's launches, without a GPU
python -m benchmarks predict                             counted times on a GPU, beside those of a report
python -m benchmarks stages                              where a step of the native backend spends its time
python -m benchmarks scaling                             bytes and memory of losses that span processes
python -m benchmarks queue                               small batches with queues and running denominators, on digits
python -m benchmarks experiments                         the papers' claims on glyphs: docs/results.md
python -m benchmarks assignment                          fixed prototypes with assigned labels, on glyphs
python -m benchmarks solvers                             assigning 10,000 classes to points: scipy and lapx
python -m benchmarks many-classes                        a million classes, dense and sparse gradients
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from . import (
    assignment,
    compare,
    correctness,
    e2e,
    harness,
    host,
    many_classes,
    measure,
    plots,
    predict,
    problems,
    readme,
    report,
    scaling,
    small_batches,
    solvers,
    stages,
    sweep,
    tune,
)
from .experiments import cli as experiments
from .rivals import BASELINE, RIVALS
from .variants import OURS, Variant, as_graph

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "compare": compare.main,
    "correctness": correctness.main,
    "readme": readme.main,
    "tune": tune.main,
    "host": host.main,
    "predict": predict.main,
    "scaling": scaling.main,
    "solvers": solvers.main,
    "stages": stages.main,
    "many-classes": many_classes.main,
    "queue": small_batches.main,
    "assignment": assignment.main,
    "experiments": experiments.main,
}


def main(argv: list[str] | None = None) -> int:
    """Run a suite or a command; return the exit status."""
    words = sys.argv[1:] if argv is None else argv
    if words and words[0] in COMMANDS:
        return COMMANDS[words[0]](words[1:])
    args = _parse(words)
    try:
        device = torch.device(args.device)
    except RuntimeError as error:
        raise SystemExit(f"--device {args.device}: {error}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch finds no CUDA device here; use --device cpu")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    if args.threads < 0:
        raise SystemExit(f"--threads {args.threads}: a number of threads, or 0 for torch's")
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("high" if args.tf32 else "highest")
    if args.suite == "sweep":
        return _sweep(args, device, words)
    dtype = DTYPES[args.dtype]
    harness.build(device, dtype)
    begin = time.perf_counter()
    chosen = _problems(args, device)
    variants = _variants(args)
    ceilings = measure.ceilings(device, dtype)
    result = report.start(args.suite, device, args.dtype, " ".join(["python -m benchmarks", *words]), ceilings)
    path = None if args.out is None else args.out / f"{args.suite}-{device.type}-{args.dtype}.json"
    if args.resume and path is not None and path.exists():
        before = report.load(path)
        result.measured, result.notes, result.command = before.measured, before.notes, before.command
        done = {str(m.problem) for m in before.measured}
        chosen = [p for p in chosen if str(p) not in done and not any(f" {p}: " in note for note in before.notes)]
    print(report.heading(result), flush=True)
    with tqdm(chosen, unit="problem", disable=None) as bar:
        session = harness.Session(device, dtype, variants, bar.set_description_str)
        for i, problem in enumerate(bar):
            left = args.budget - (time.perf_counter() - begin)
            if left <= 0:
                result.notes.append(f"not run, the budget of {args.budget:.0f} s is spent: {problem}")
                continue
            run = e2e.measure_step if problem.loss in e2e.KINDS else harness.measure
            try:
                share = left * problem.weight / sum(p.weight for p in chosen[i:])
                result.measured.append(run(problem, session, share))
            except Exception as error:  # for example out of memory for the inputs
                result.notes.append(f"not run: {problem}: {harness.failure(error, device)}")
            except KeyboardInterrupt:
                result.notes.append(f"interrupted at {problem}")
                break
            if path is not None:  # save after each problem, in case the run is cut off
                result.save(path)
                if lost(device):  # after an error in a kernel the device needs a new process
                    left = max(0.0, args.budget - (time.perf_counter() - begin))
                    again = [sys.executable, "-m", "benchmarks", *words, "--resume", "--budget", f"{left:.0f}"]
                    os.execv(sys.executable, again)
    print(report.table(result, absent=not args.brief))
    print(*result.notes, sep="\n")
    if path is not None and args.out is not None:
        result.save(path)
        print(f"written to {path}")
        if not args.brief:
            with contextlib.suppress(ImportError):
                print(*plots.draw(result, args.out, path.stem), sep="\n")
    if device.type == "cuda":
        print(predict.beside(result))
    broken = [f"{m.problem}: {r.variant} {r.absent}" for m in result.measured for r in m.results if r.ours and r.broken]
    print(*broken, sep="\n")
    return 1 if broken else 0


def _sweep(args: argparse.Namespace, device: torch.device, words: list[str]) -> int:
    """One report for each dtype."""
    if device.type != "cpu":
        raise SystemExit(f"--suite sweep measures CPUs, got --device {args.device}")
    command = " ".join(["python -m benchmarks", *words])
    broken = []
    for name in args.dtypes:
        harness.build(device, DTYPES[name])
        result = sweep.run(DTYPES[name], name, command, args.budget / len(args.dtypes), args.seed, tuple(args.loss))
        print(report.heading(result), sweep.table(result), *result.notes, sep="\n", flush=True)
        if args.out is not None:
            result.save(args.out / f"sweep-cpu-{name}.json")
        broken += [f"{name}: {m.problem}: {r.absent}" for m in result.measured for r in m.results if r.broken]
    print(*broken, sep="\n")
    return 1 if broken else 0


def lost(device: torch.device) -> bool:
    """Whether the device is unusable in this process."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        print(f"continuing in a new process, without the problem that failed: {error}", file=sys.stderr, flush=True)
        return True
    return False


def _problems(args: argparse.Namespace, device: torch.device) -> list[problems.Problem]:
    losses = tuple(args.loss)
    if args.size:
        sizes = [problems.Problem(loss, *size) for loss in losses for size in args.size]
        return [problems.samples(p.loss, p.m, p.d) if p.loss in ("clip", "simclr") else p for p in sizes]
    if args.suite == "e2e":
        return e2e.steps(device.type)
    return problems.suite(args.suite, device.type, losses)


def _variants(args: argparse.Namespace) -> tuple[Variant, ...]:
    variants = (*OURS, *RIVALS)
    if args.suite == "launch":
        graphs = ("nckernels triton", "nckernels cuda", "nckernels chunked", BASELINE)
        variants += tuple(as_graph(v) for v in variants if v.name in graphs)
    chosen = tuple(v for v in variants if not any(word in v.name for word in args.skip))
    return tuple(v for v in chosen if not args.only or any(word in v.name for word in args.only))


def _size(text: str) -> tuple[int, int, int]:
    m, k, d = (int(part) for part in text.split(","))
    return m, k, d


_NOT_IN_A_SWEEP = ("size", "skip", "only", "brief", "resume")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--suite",
        choices=("quick", "full", "memory", "launch", "campaign", "e2e", "sweep"),
        default="quick",
        help="which problems: quick",
    )
    add("--size", type=_size, nargs="+", metavar="M,K,d", help="these problems instead")
    add("--loss", nargs="+", choices=sweep.LOSSES, help="all of the suite")
    add("--device", default="cpu", help="cpu, cuda or cuda:N: cpu")
    add("--dtype", choices=tuple(DTYPES), help="float32; of the sweep float32 and bfloat16")
    add(
        "--budget",
        type=float,
        help="seconds in all, checks and torch.compile included: 120; of the sweep 300",
    )
    add("--threads", type=int, default=0, help="CPU threads: torch's default")
    add("--skip", nargs="+", default=[], metavar="WORD", help="leave out variants whose name contains one of the words")
    add("--only", nargs="+", default=[], metavar="WORD", help="only variants whose name contains one of the words")
    add("--tf32", action="store_true", help="on CUDA, multiply float32 in tf32 everywhere")
    add("--brief", action="store_true", help="no pictures, and no list of absent variants; the report has it")
    add("--resume", action="store_true", help="continue the report in --out")
    add("--out", type=Path, help="folder for the JSON report and the pictures")
    add("--seed", type=int, default=0, help="of the sweep's problems: 0")
    args = parser.parse_args(argv)
    in_sweep = args.suite == "sweep"
    args.dtypes = [args.dtype] if args.dtype else ["float32", "bfloat16"] if in_sweep else ["float32"]
    args.dtype = args.dtypes[0]
    args.loss = args.loss or list(sweep.LOSSES if in_sweep else problems.LOSSES)
    if args.budget is None:
        args.budget = 300.0 if in_sweep else 120.0
    unused = [f"--{name}" for name in _NOT_IN_A_SWEEP if in_sweep and getattr(args, name)]
    if unused:
        parser.error(f"{' '.join(unused)}: not in --suite sweep, which draws its problems and has two variants")
    if not in_sweep and (others := set(args.loss) - set(problems.LOSSES)):
        parser.error(f"--loss {' '.join(sorted(others))}: in --suite sweep only")
    return args


if __name__ == "__main__":
    sys.exit(main())
