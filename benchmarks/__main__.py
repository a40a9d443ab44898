"""Time forward + backward of every loss and backend against the alternatives.

python -m benchmarks                       quick suite on this machine
python -m benchmarks --suite full --out DIR
python -m benchmarks --device cuda --dtype bfloat16 --budget 480
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from . import harness, problems, report
from .variants import VARIANTS

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(argv: list[str] | None = None) -> int:
    """Run a suite; return the exit status."""
    args = _parse(argv)
    device, dtype = torch.device(args.device), _DTYPES[args.dtype]
    if args.threads:
        torch.set_num_threads(args.threads)
    chosen = problems.suite(args.suite, tuple(args.loss)) if not args.size else _custom(args)
    variants = tuple(v for v in VARIANTS if not any(word in v.name for word in args.skip))
    about = {**report.machine(device), "command": " ".join(["python -m benchmarks", *(argv or sys.argv[1:])])}
    print(", ".join(f"{key} {value}" for key, value in about.items()), f"{args.dtype}", sep=", ")
    results: list[harness.Result] = []
    with tqdm(chosen, unit="problem", disable=None) as bar:
        for problem in bar:
            results += harness.measure(
                problem, device, dtype, args.budget / len(chosen), variants, bar.set_description_str
            )
    print(report.table(results))
    if args.out is not None:
        path = args.out / f"{args.suite}-{device.type}-{args.dtype}.json"
        report.write_json(path, results, about)
        print(f"\nwritten to {path}")
    wrong = [r for r in results if r.absent is not None and r.absent.startswith(("wrong", "fails"))]
    return 1 if any(r.variant.startswith("nckernels") for r in wrong) else 0


def _custom(args: argparse.Namespace) -> list[problems.Problem]:
    return [problems.Problem(loss, *size) for loss in args.loss for size in args.size]


def _size(text: str) -> tuple[int, int, int]:
    m, k, d = (int(part) for part in text.split(","))
    return m, k, d


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Forward + backward of the losses against the alternatives, in turns, checked first.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--suite", choices=("quick", "full"), default="quick", help="which problems")
    parser.add_argument("--size", type=_size, nargs="+", metavar="M,K,d", help="these problems instead")
    parser.add_argument("--loss", nargs="+", choices=problems.LOSSES, default=list(problems.LOSSES))
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=tuple(_DTYPES), default="float32")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of timing in all")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 for torch's default")
    parser.add_argument("--skip", nargs="+", default=[], metavar="WORD", help="leave out variants by name")
    parser.add_argument("--out", type=Path, help="folder for the JSON report")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
