"""What the tests of the losses without prototypes call them with: random batches, and the options by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle_contrastive import REDUCTIONS, Case
from torch import Tensor, nn

import nckernels

LABELS = torch.tensor([-7, 0, 3, 10**9, -(2**40)])  # any integers are labels of supcon_loss and prototype_loss


def make_case(
    name: str,
    samples: int = 41,
    dim: int = 12,
    *,
    views: int = 0,
    keys: int = 29,
    labels: Tensor = LABELS,
    target: bool = True,
    weight: bool = False,
    ignored: float = 0.2,
    ignore_index: int = -100,
    temperature: float = 0.2,
    seed: int = 0,
    **options: Any,
) -> Case:
    """A random float64 case; row norms over two decades, one label in use by a single sample if there are many."""
    g = torch.Generator().manual_seed(seed)

    def rows(*shape: int) -> Tensor:
        x = torch.randn(*shape, dim, generator=g, dtype=torch.float64)
        return x * 10 ** torch.randn(*shape, 1, generator=g, dtype=torch.float64).clamp(-1, 1)

    tau = torch.tensor(temperature, dtype=torch.float64)
    weights = torch.rand(samples, generator=g, dtype=torch.float64) if weight else None
    if weights is not None and samples > 3:
        weights[3] = 0.0
    if name == "uniformity":
        return Case(name, (rows(samples),), options=options)
    if name == "alignment":
        return Case(name, (rows(samples), rows(samples)), options=options)
    if name == "clip":
        return Case(name, (rows(samples), rows(samples)), None, tau, weights, options)
    if name == "info_nce":
        inputs = (rows(samples), rows(keys if target else samples))
        y = torch.randint(keys, (samples,), generator=g)
    else:
        inputs = (rows(samples, views) if views else rows(samples),)
        y = labels[torch.randint(len(labels), (samples,), generator=g)]
        if samples > 8:
            y[5] = 12345  # a singleton where there is one view
    ignore = torch.rand(samples, generator=g) < ignored
    if samples > 8:
        ignore[5] = False
    y = y.masked_fill(ignore, ignore_index)
    if ignore_index != -100:
        options["ignore_index"] = ignore_index
    return Case(name, inputs, y if target else None, tau, weights, options)


# What make_case builds: (name, its arguments).
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "supcon": ("supcon", {}),
    "supcon-views": ("supcon", {"views": 2}),
    "supcon-3-views": ("supcon", {"views": 3}),
    "supcon-no-target": ("supcon", {"views": 2, "target": False}),
    "supcon-decoupled": ("supcon", {"decoupled": True}),
    "supcon-decoupled-views": ("supcon", {"views": 2, "decoupled": True}),
    "supcon-decoupled-no-target": ("supcon", {"views": 2, "target": False, "decoupled": True}),
    "prototype": ("prototype", {}),
    "prototype-views": ("prototype", {"views": 2}),
    "info_nce": ("info_nce", {}),
    "info_nce-no-target": ("info_nce", {"target": False}),
    "info_nce-decoupled": ("info_nce", {"decoupled": True}),
    "clip": ("clip", {}),
    "clip-decoupled": ("clip", {"decoupled": True}),
    "uniformity": ("uniformity", {}),
    "uniformity-5": ("uniformity", {"t": 5.0}),
    "alignment": ("alignment", {}),
    "alignment-3": ("alignment", {"alpha": 3.0}),
    "alignment-1": ("alignment", {"alpha": 1.0}),
}
LABELLED = [c for c in CASES if c.startswith(("supcon", "prototype", "info_nce")) and "no-target" not in c]
TEMPERED = [c for c in CASES if not c.startswith(("uniformity", "alignment"))]
REDUCED = [c for c in CASES if not c.startswith("uniformity")]
SHORT = ["supcon", "supcon-decoupled-views", "prototype", "info_nce", "clip", "uniformity", "alignment"]
# Reductions, and whether there are sample weights: enough where a test has many other parameters.
SOME = [("none", True), ("mean", False)]

reductions = pytest.mark.parametrize("reduction", REDUCTIONS)

MODULES: dict[str, Callable[..., nn.Module]] = {
    name: lambda module=module, **kw: getattr(nckernels, module)(**kw)
    for name, module in {
        "supcon": "SupConLoss",
        "prototype": "PrototypeLoss",
        "info_nce": "InfoNCELoss",
        "clip": "CLIPLoss",
        "uniformity": "UniformityLoss",
        "alignment": "AlignmentLoss",
    }.items()
}


def build(case: str, *args: Any, **arguments: Any) -> Case:
    name, options = CASES[case]
    return make_case(name, *args, **{**options, **arguments})


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor], roundings: float = 0.0) -> None:
    """Loss and gradients equal up to `roundings` of the largest entry."""
    for key, value in expected.items():
        atol = roundings * float(value.abs().max() + 1) if value.numel() else 0.0
        torch.testing.assert_close(got[key], value, rtol=0, atol=atol, msg=lambda m, key=key: f"{key}: {m}")
