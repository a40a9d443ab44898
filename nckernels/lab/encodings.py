"""Labels other than one-hot: which parts of neural collapse hold ([ENC] Theorems III.4, IV.1, IV.4, Prop. IV.3)."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from nckernels.metrics import rotated_self_duality, within_class_scatter
from nckernels.ufm import MSESolution, centred, label_smoothing, one_hot, solve_mse

from . import style
from .report import Check, Result, bar


def encodings(num_classes: int, seed: int) -> dict[str, Tensor]:
    """Five K x K label matrices; column k is the label of class k."""
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(num_classes, num_classes, generator=generator, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(num_classes, num_classes, generator=generator, dtype=torch.float64)).Q
    return {
        "one-hot": one_hot(num_classes),
        "smoothed": label_smoothing(num_classes, 0.3),
        "centred": centred(one_hot(num_classes)),
        "rotated": rotation @ one_hot(num_classes),
        "random": gaussian / gaussian.norm(dim=0),
    }


def run(
    *,
    seed: int = 0,
    progress: bool = False,
    num_classes: int = 4,
    samples_per_class: int = 5,
    lambda_w: float = 2e-3,
    lambda_h: float = 2e-3,
    lambda_b: float = 0.05,
) -> Result:
    """Minimise squared error with each encoding; also with classes of different sizes, and with a free bias."""
    k, n, labels = num_classes, samples_per_class, encodings(num_classes, seed)

    def solved(encoding: Tensor, sizes: int | list[int], penalty: float = lambda_b) -> MSESolution:
        return solve_mse(encoding, sizes, k, lambda_w=lambda_w, lambda_h=lambda_h, lambda_b=penalty, seed=seed)

    found = {name: solved(encoding, n) for name, encoding in bar(list(labels.items()), "encodings", progress)}
    checks = []
    for name, s in found.items():
        best, means = s.optimum, s.means
        checks += [
            Check(f"{name}: loss", s.loss, best.loss, 1e-10),
            Check(f"{name}: bias, largest error", float((s.bias - best.bias).abs().max()), 0.0, 1e-7),
            Check(f"{name}: class means' Gram matrix, largest error",
                  float((means @ means.T - best.gram).abs().max()), 0.0, 1e-7),
            Check(f"{name}: NC1, within-class scatter", within_class_scatter(s.features, s.target), 0.0, 1e-12),
            Check(f"{name}: NC3, |W/|W| - H/|H||^2", self_duality(s.weight, means),
                  2 - 2 * float(best.logits.trace() / (best.weight_gram.trace() * best.gram.trace()).sqrt()), 1e-7),
            Check(f"{name}: NC3', the same up to a rotation", rotated_self_duality(s.weight, means), 0.0, 1e-9),
            Check(f"{name}: kappa = |W| / |H|", float(s.weight.norm() / means.norm()),
                  math.sqrt(n * lambda_h / lambda_w), 1e-7),
        ]  # fmt: skip
    uneven = solved(labels["random"], [n + 3 * c for c in range(k)])
    balance = lambda_w * uneven.weight.T @ uneven.weight - lambda_h * uneven.features.T @ uneven.features
    free = solved(labels["random"], [n + 3 * c for c in range(k)], penalty=0.0)
    mean_label = labels["random"].T[free.target].mean(0)
    checks += [
        Check("random, unequal classes: loss", uneven.loss, uneven.optimum.loss, 1e-10),
        Check("random, unequal classes: NC1", within_class_scatter(uneven.features, uneven.target), 0.0, 1e-12),
        Check("random, unequal classes: lambda_W W^T W - lambda_H H H^T", float(balance.abs().max()), 0.0, 1e-9),
        Check("random, unequal classes, lambda_b = 0: bias - mean label",
              float((free.bias - mean_label).abs().max()), 0.0, 1e-7),
    ]  # fmt: skip
    return Result(
        "For any labels the samples of a class coincide, and the weights equal the class means up to a rotation; "
        "without the rotation only for labels like one-hot.",
        checks,
        lambda path: draw(labels, found, path),
    )


def self_duality(weight: Tensor, means: Tensor) -> float:
    """NC3 of [ENC]: |W/|W| - H/|H||^2 with the uncentred class means as rows; 0 if W = kappa H."""
    return float((weight / weight.norm() - means / means.norm()).square().sum())


def draw(labels: dict[str, Tensor], found: dict[str, MSESolution], path: Path) -> None:
    """One column per encoding: labels, cosines of the means, of weights and means before and after a rotation."""
    figure = style.canvas(
        14, 12.2, "Whatever the labels, the weights are the class means up to a rotation",
        "Columns: label encodings; squared error, free features. Where the third row has 1 on its diagonal, "
        "a weight points along its class's mean (NC3).\nRotated and random labels break that. One rotation of the "
        "weights restores it (NC3\N{PRIME}): the fourth row is the second, always.",
    )  # fmt: skip
    rows = (
        "labels\n(column = class)",
        "cosines of\nthe class means",
        "cosines of weight c\nand mean c\N{PRIME}",
        "the same after\nthe best rotation",
    )
    grid = figure.add_gridspec(4, len(found), left=0.13, right=0.98, top=0.87, bottom=0.03, hspace=0.2, wspace=0.1)
    for column, (name, s) in enumerate(found.items()):
        means, weight = s.means, s.weight
        left, _, right = torch.linalg.svd(means @ weight.T)
        rotated = (left @ right) @ weight  # rotates the rows of W: Q in [ENC] Eq. 12 mixes classes
        nc3, nc3_rotated = self_duality(weight, means), rotated_self_duality(weight, means)
        duality = f"{nc3:.2f}" if nc3 > 1e-9 else "0"
        turned = f"{nc3_rotated:.2f}" if nc3_rotated > 1e-9 else "0"
        panels = (
            (labels[name], name),
            (_cosines(means, means), ""),
            (_cosines(weight, means), f"NC3 deviation: {duality}"),
            (_cosines(rotated, means), f"NC3\N{PRIME} deviation: {turned}"),
        )
        for row, (matrix, title) in enumerate(panels):
            ax = figure.add_subplot(grid[row, column])
            style.heat(ax, matrix.numpy(), title)
            if row == 0:
                ax.set_title(name, fontsize=13, color=style.INK, weight="bold", pad=8)
            if column == 0:
                ax.set_ylabel(rows[row], rotation=0, ha="right", va="center", fontsize=11.5, color=style.INK)
    style.save(figure, path)


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    return F.normalize(a) @ F.normalize(b).T
