"""[DLP] Table 7: how far apart 100 prototypes are, at random, by the paper's recipe, and by ours."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .quality import PrototypeQuality, prototype_quality
from .uniform import uniform_prototypes

#: Largest and smallest pairwise cosine that [DLP] Table 7 prints for its own prototypes, by dimension; none for d = 10.
PRINTED = {100: (0.0, -0.01), 50: (0.01, -1.0)}


@dataclass(frozen=True, eq=False)
class Table7Row:
    """Prototypes for one dimension, (K, d) each in float64, and what the paper prints (NaN: nothing)."""

    dim: int
    printed_max: float
    printed_min: float
    random: Tensor
    recipe: Tensor
    ours: Tensor

    def qualities(self) -> dict[str, PrototypeQuality]:
        """By method: random, recipe, ours."""
        return {name: prototype_quality(getattr(self, name)) for name in ("random", "recipe", "ours")}


def dlp_recipe(start: Tensor, t: float = 2.0, *, learning_rate: float = 0.1, iterations: int = 1000) -> Tensor:
    """Prototypes by the recipe of [DLP]: gradient descent on Eq. 5, with rows normalised after each step.

    Eq. 5 also pairs each prototype with itself, which changes the length of the gradient but not its direction. All
    prototypes take part in each step. This needs a K x K matrix.

    Args:
        start: (K, d) unit rows.
    """
    w = start.clone()
    for _ in range(iterations):
        w.requires_grad_()
        kernel = (-t * torch.cdist(w, w, compute_mode="donot_use_mm_for_euclid_dist").square()).exp()
        (gradient,) = torch.autograd.grad(kernel.mean().log(), w)
        w = F.normalize(w.detach() - learning_rate * gradient)
    return w


def dlp_table7(
    dims: Sequence[int] = (100, 50, 10), *, num_classes: int = 100, seed: int = 0, iterations: int = 1000
) -> list[Table7Row]:
    """The rows of [DLP] Table 7, computed: random directions, the paper's recipe from there, and ours.

    Args:
        dims: dimensions d, one row each.
        num_classes: K. The paper has 100; its printed values are NaN for any other.
        seed: of the random directions and of :func:`uniform_prototypes`.
        iterations: of the recipe; 1000 in the paper.
    """
    rows = []
    for dim in dims:
        generator = torch.Generator("cpu").manual_seed(seed)
        start = torch.randn(num_classes, dim, generator=generator, dtype=torch.float64, device="cpu")
        start = F.normalize(start)
        printed = PRINTED.get(dim, (math.nan, math.nan)) if num_classes == 100 else (math.nan, math.nan)
        ours = uniform_prototypes(num_classes, dim, seed=seed, dtype=torch.float64)
        rows.append(Table7Row(dim, *printed, start, dlp_recipe(start, iterations=iterations), ours))
    return rows


def format_table7(rows: Sequence[Table7Row]) -> str:
    """The rows as a Markdown table. The lower the largest cosine, the better."""
    lines = [
        "| d | prototypes | max cosine | min cosine | closest pair, degrees | uniformity, t = 2 |",
        "|---|---|---|---|---|---|",
    ]
    names = {"random": "random", "recipe": "paper's recipe, run", "ours": "uniform_prototypes"}
    for row in rows:
        if not math.isnan(row.printed_max):
            lines.append(f"| {row.dim} | paper, printed | {row.printed_max:.4g} | {row.printed_min:.4g} | | |")
        for method, q in row.qualities().items():
            lines.append(
                f"| {row.dim} | {names[method]} | {q.max_cosine:.4f} | {q.min_cosine:.4f} | {q.separation:.1f} "
                f"| {q.uniformity:.4f} |"
            )
    return "\n".join(lines)


def plot(rows: Sequence[Table7Row], path: str | os.PathLike[str]) -> None:
    """Histograms of the angles between pairs: one column per dimension, one row per method. Needs matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plot needs matplotlib: pip install "nckernels[lab]"') from error
    methods = (
        ("random", "Random directions", "#8a8a8a"),
        ("recipe", "Published recipe\n(gradient descent, rate 0.1)", "#e69f00"),
        ("ours", "uniform_prototypes", "#0072b2"),
    )
    figure = Figure(figsize=(4.2 * len(rows) + 1.4, 7.4), facecolor="white")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(len(methods), len(rows), sharex=True, sharey=True, squeeze=False)
    count = len(rows[0].ours)
    bins = [3 * i - 1.5 for i in range(62)]  # right angles and antipodes fall into the middle of a bin
    for column, row in enumerate(rows):
        qualities = row.qualities()
        for line, (method, label, colour) in enumerate(methods):
            axis = axes[line][column]
            closest = qualities[method].separation
            axis.hist(_angles(getattr(row, method)), bins=bins, color=colour, log=True)
            axis.axvline(closest, color="#222222", linewidth=1.2)
            right = closest < 45  # no room for the words on the left
            axis.text(
                closest + (3 if right else -3), 0.93, f"closest pair\n{closest:.0f}°", va="top", fontsize=9,
                ha="left" if right else "right", transform=axis.get_xaxis_transform(),
            )  # fmt: skip
            axis.set_xlim(0, bins[-1])
            axis.set_xticks(range(0, 181, 30))
            for side in ("top", "right"):
                axis.spines[side].set_visible(False)
            if line == 0:
                axis.set_title(f"{count} vectors in {row.dim} dimensions", fontsize=11)
            if line == len(methods) - 1:
                axis.set_xlabel("angle between two vectors, degrees")
            if column == 0:
                axis.set_ylabel(f"{label}\n\npairs", fontsize=10)
    figure.suptitle(
        f"How far apart are {count} directions? One count per pair; the further right the closest pair, the better",
        fontsize=13,
    )
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    figure.savefig(path, dpi=110)


def _angles(rows: Tensor) -> Any:
    """Degrees between all pairs, as a NumPy array."""
    first, second = torch.triu_indices(len(rows), len(rows), offset=1)
    cosines = (rows @ rows.T)[first, second]
    return torch.rad2deg(cosines.clamp(-1.0, 1.0).acos()).numpy()
