"""Small batches on the digits: with a queue, with running denominators, and a large batch for comparison.

All variants train for the same number of epochs, in batches of 32 or 512. Queue and batch have 512 samples together.
The longer running average spans M / (1 - decay) = 512 samples, the shorter one twice the batch. "repelled" is a control
with the bias of the queue but without its samples. All learning rates of the grid are tried with all seeds. A row has
the rate with the lowest mean loss on the whole training set, without test images.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

import nckernels
from nckernels.train.data import open_data
from nckernels.train.engine import Run, fit
from nckernels.train.evaluate import features as extract
from nckernels.train.recipe import Data, Recipe

LOSSES: dict[str, Callable[..., Tensor]] = {"nonl": nckernels.nonl_loss, "ntce": nckernels.ntce_loss}
RATES = (0.05, 0.1, 0.2, 0.4, 0.8)
METRICS = (("NC1", "nc1"), ("NC2cos", "nc2_cosines"), ("w-align", "weight_alignment"))


@dataclass(frozen=True)
class Outcome:
    """The result of one run."""

    loss: str
    variant: str
    lr: float
    seed: int
    accuracy: float
    whole: float
    """The loss of the training set as one batch, in eval mode."""
    metrics: dict[str, float]


def variants(small: int, large: int) -> dict[str, dict[str, Any]]:
    """The changes to the default recipe, by name; ``repelled`` is a control, see :func:`repelled`."""
    longer = 1 - small / large
    return {
        f"batch {small}": {"run.batch_size": small},
        f"batch {small}, queue {large - small}": {"run.batch_size": small, "loss.queue": large - small},
        f"batch {small}, repelled {small / large:.4g}": {"run.batch_size": small, "repelled_by": small / large},
        f"batch {small}, decay 0.5": {"run.batch_size": small, "loss.decay": 0.5},
        f"batch {small}, decay {longer:.4g}": {"run.batch_size": small, "loss.decay": longer},
        f"batch {large}": {"run.batch_size": large},
    }


def repelled(head: Any, share: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The head's loss with the bias of a queue but without its samples.

    Features are repelled by prototypes with a share of the weight, and prototypes by features with all of it.
    """
    criterion = head.criterion
    exclude: Literal["target", "none"] = "target" if isinstance(criterion, nckernels.NONLLoss) else "none"

    def loss(features: Tensor, target: Tensor) -> Tensor:
        weakly = share * features + (1 - share) * features.detach()
        terms = (weakly, criterion.prototypes, target), (features, criterion.prototypes, target)
        (lse, _), (_, pos) = (nckernels.cosine_lse(*t, 1 / criterion.temperature, exclude=exclude) for t in terms)
        return (lse[target] - pos).mean()

    return loss


def main(argv: list[str] | None = None) -> int:
    """Train everything, or read what was trained, and print the table; returns the exit status."""
    args = _parse(argv)
    if args.report is not None:
        print(table([Outcome(**values) for values in json.loads(args.report.read_text())]), collapse(), sep="\n")
        return 0
    base = Recipe().replace(schedule__epochs=args.epochs, run__eval_every=10**9)
    grid = [
        (base.replace(loss__name=loss, optimizer__lr=lr, run__seed=seed), changes, name)
        for loss in LOSSES
        for name, changes in variants(args.small, args.large).items()
        for lr in args.lr
        for seed in range(args.seeds)
    ]
    outcomes = []
    for recipe, changes, name in tqdm(grid, unit="run", disable=None):
        try:
            outcomes.append(_train(recipe, name, **changes))
        except FloatingPointError as error:
            run = f"{recipe.loss.name}, lr {recipe.optimizer.lr:g}, seed {recipe.run.seed}"
            tqdm.write(f"{name}, {run}: {error}")
    print(table(outcomes), collapse(), sep="\n")
    if args.out is not None:
        args.out.write_text("[\n" + ",\n".join(json.dumps(asdict(outcome)) for outcome in outcomes) + "\n]\n")
    return 0


def _train(recipe: Recipe, name: str, repelled_by: float = 0.0, **changes: Any) -> Outcome:
    loss_of = functools.partial(repelled, share=repelled_by) if repelled_by else None
    return _outcome(fit(recipe.replace(**changes), progress=False, loss_of=loss_of), name)


@torch.no_grad()
def _outcome(run: Run, name: str) -> Outcome:
    recipe, prototypes = run.history.recipe, run.head.prototypes
    features, labels = extract(run.network, run.data, run.data.train, recipe, prototypes.device)
    whole = LOSSES[recipe.loss.name](features, prototypes, labels, temperature=recipe.loss.temperature)
    return Outcome(
        recipe.loss.name,
        name,
        recipe.optimizer.lr,
        recipe.run.seed,
        run.history.test_accuracy[-1],
        whole.item(),
        {key: run.history.metrics[key][-1] for _, key in METRICS},
    )


def table(outcomes: list[Outcome]) -> str:
    """Means over the seeds, with standard deviations in brackets, of every variant at its best rate."""
    rates = sorted({o.lr for o in outcomes})
    head = f"{'loss':<5} {'variant':<26} {'lr':>5} {'whole loss':>15} {'test %':>10}"
    head += "".join(f" {title:>17}" for title, _ in METRICS) + " | test % at lr " + " ".join(f"{r:>5g}" for r in rates)
    lines = [head, "-" * len(head)]
    for loss, variant in dict.fromkeys((o.loss, o.variant) for o in outcomes):
        mine = [o for o in outcomes if (o.loss, o.variant) == (loss, variant)]
        by_rate = {rate: [o for o in mine if o.lr == rate] for rate in rates}
        complete = max(map(len, by_rate.values()))  # rates at which a run diverged are not chosen
        rate = min((r for r in rates if len(by_rate[r]) == complete), key=lambda r: _mean(o.whole for o in by_rate[r]))
        best = by_rate[rate]
        cells = [f"{loss:<5} {variant:<26} {rate:>5g} {_spread([o.whole for o in best], '.4f'):>15}"]
        cells.append(f"{_spread([100 * o.accuracy for o in best], '.1f'):>10}")
        cells += [f"{_spread([o.metrics[key] for o in best], '.1e'):>17}" for _, key in METRICS]
        shown = [f"{100 * _mean(o.accuracy for o in runs):5.1f}" if runs else "    -" for runs in by_rate.values()]
        lines.append(" ".join([*cells, "|", " " * len("test % at lr"), *shown]))
    return "\n".join(lines)


def collapse() -> str:
    """The minima of the whole losses for classes of equal size ([NCD] Theorem A.1)."""
    data, temperature = open_data(Data("digits")), Recipe().loss.temperature
    k, n = data.num_classes, len(data.train) / data.num_classes
    apart = k / ((k - 1) * temperature)
    nonl, ntce = math.log(n * (k - 1)) - apart, math.log(n) + math.log1p((k - 1) * math.exp(-apart))
    return f"whole loss at neural collapse, were the {k} classes of equal size: nonl {nonl:.4f}, ntce {ntce:.4f}"


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def _spread(values: list[float], style: str) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{_mean(values):{style}} ({deviation:{style}})"


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks queue",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--small", type=int, default=32, help="the small batch: 32")
    add("--large", type=int, default=512, help="the large batch: 512")
    add("--epochs", type=int, default=30, help="passes over the training set: 30")
    add("--seeds", type=int, default=3, help="runs of each variant and rate: 3")
    add("--lr", type=float, nargs="+", default=list(RATES), help="learning rates: 0.05 0.1 0.2 0.4 0.8")
    add("--out", type=Path, help="JSON file for the outcome of every run")
    add("--report", type=Path, help="print the table of such a file")
    return parser.parse_args(argv)
