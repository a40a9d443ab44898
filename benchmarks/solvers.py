"""Times of assigning classes to points: the products, scipy's solver, and lapx's if it is installed.

python -m benchmarks solvers --classes 10000 --dim 512
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def main(argv: list[str]) -> int:
    """Print seconds of one run each, and whether the solvers agree; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks solvers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--classes", type=int, default=10_000, help="10000")
    parser.add_argument("--dim", type=int, default=512, help="512")
    args = parser.parse_args(argv)
    generator = torch.Generator().manual_seed(0)
    points = F.normalize(torch.randn(args.classes, args.dim, generator=generator))
    order = torch.randperm(args.classes, generator=generator)
    noise = torch.randn(args.classes, args.dim, generator=generator)
    problems = {"random": noise, "near the points": points[order] + 0.5 * F.normalize(noise)}
    print("| representatives | products, s | scipy, s | lapx, s | same total |", "|---|---|---|---|---|", sep="\n")
    for name, representatives in problems.items():
        print(row(name, F.normalize(representatives), points))
    return 0


def row(name: str, representatives: Tensor, points: Tensor) -> str:
    """One line of the table."""
    begin = time.perf_counter()
    products = (representatives @ points.T).double().numpy()
    seconds = [f"{time.perf_counter() - begin:.2f}"]
    totals = []
    for solve in (scipy_solver, lapx_solver()):
        if solve is None:
            seconds.append("not installed")
            continue
        begin = time.perf_counter()
        columns = solve(products)
        seconds.append(f"{time.perf_counter() - begin:.2f}")
        totals.append(products[np.arange(len(products)), columns].sum())
    same = "" if len(totals) < 2 else "yes" if np.isclose(totals[0], totals[1], rtol=1e-12) else "no"
    return "| " + " | ".join([name, *seconds, same]) + " |"


def scipy_solver(products: np.ndarray) -> np.ndarray:
    from scipy.optimize import linear_sum_assignment  # optional for the other benchmarks

    return np.asarray(linear_sum_assignment(products, maximize=True)[1])


def lapx_solver() -> Callable[[np.ndarray], np.ndarray] | None:
    if importlib.util.find_spec("lap") is None:
        return None
    import lap

    return lambda products: np.asarray(lap.lapjv(-products)[1])
