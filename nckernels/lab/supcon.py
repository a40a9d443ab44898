"""SupCon and the prototype loss have the same minimisers on balanced unit vectors ([NCD] Theorem 4.2)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import nckernels
from nckernels.ufm import Solution, minimum, solve

from . import style
from .report import Check, Result, bar

LOSSES = ("supcon", "prototype")
NAMES = {"supcon": "SupCon", "prototype": "the prototype loss"}
OTHER = {"supcon": "prototype", "prototype": "supcon"}


def run(
    *,
    seed: int = 0,
    progress: bool = False,
    sizes: Sequence[tuple[int, int]] = ((3, 2), (4, 5), (10, 9)),
    samples_per_class: int = 4,
    temperature: float = 0.3,
) -> Result:
    """Minimise each of the two losses and evaluate the other one at the minimiser."""
    found = {
        (loss, k, d): solve(loss, k, d, samples_per_class, temperature, seed=seed)
        for loss, k, d in bar([(loss, *size) for size in sizes for loss in LOSSES], "supcon", progress)
    }
    checks = []
    for (loss, k, d), s in found.items():
        other = OTHER[loss]
        label = f"{k} classes in {d} dimensions, minimiser of {NAMES[loss]}"
        least = minimum(other, k, samples_per_class, temperature)
        checks += [
            Check(f"{label}: its value", s.value, s.minimum, 1e-9),
            Check(f"{label}: the other's", evaluate(other, s.features, s.target, temperature), least, 1e-9),
        ]
    for k, d in sizes:
        a, b = (found[loss, k, d].features for loss in LOSSES)
        checks.append(
            Check(f"{k} classes in {d} dimensions: Gram matrices of both, largest difference",
                  float((a @ a.T - b @ b.T).abs().max()), 0.0, 1e-6)
        )  # fmt: skip
    first = {loss: found[(loss, *sizes[-1])] for loss in LOSSES}
    return Result(
        "SupCon and the prototype loss have the same minimisers: class means can replace the samples.",
        checks,
        lambda path: draw(first, temperature, path),
    )


def evaluate(loss: str, features: Tensor, target: Tensor, temperature: float) -> float:
    """SupCon or the prototype loss of features."""
    function = nckernels.supcon_loss if loss == "supcon" else nckernels.prototype_loss
    return float(function(features, target, temperature=temperature))


def draw(found: dict[str, Solution], temperature: float, path: Path) -> None:
    """Both losses, minus their minimum, on the path from random features to the minimiser of each."""
    figure = style.canvas(
        13, 6.2, "What minimises SupCon minimises the prototype loss, and the other way round",
        "Left: features go straight (on the sphere) from random ones to a minimiser of SupCon, right: to one of the "
        "prototype loss. Both losses fall to their closed-form\nminimum at the same point, so one may train with pairs "
        "of samples and classify with class means, or train on class means at once.",
    )  # fmt: skip
    grid = figure.add_gridspec(1, 2, left=0.07, right=0.98, top=0.72, bottom=0.12, wspace=0.12)
    share = 1 - torch.logspace(0, -6, 61, dtype=torch.float64)
    for column, goal in enumerate(LOSSES):
        s, ax = found[goal], figure.add_subplot(grid[0, column])
        k, n = len(s.prototypes), len(s.target) // len(s.prototypes)
        for loss, marker in zip(LOSSES, ("o", "s"), strict=True):
            least = minimum(loss, k, n, temperature)
            above = [
                evaluate(loss, F.normalize(torch.lerp(s.start, s.features, float(x))), s.target, temperature) - least
                for x in share
            ]
            ax.plot(1 - share, above, color=style.LOSS_COLOURS[loss], lw=2, marker=marker, ms=4, markevery=5,
                    label=style.LOSS_NAMES[loss])  # fmt: skip
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.invert_xaxis()
        ax.set_xlabel("share of the way that is left")
        style.tidy(ax, f"Towards a minimiser of {NAMES[goal]}: {k} classes, {s.features.shape[1]} dimensions")
        if column == 0:
            ax.set_ylabel("loss \N{MINUS SIGN} its closed-form minimum")
            ax.legend(frameon=False, fontsize=11, labelcolor=style.INK, loc="lower left")
    style.save(figure, path)
