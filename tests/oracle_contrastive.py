"""The truth of the losses without prototypes: dense N x N forms, the printed loops, and a measure of exactness.

The dense forms are written for any dtype: in float64 they are the oracle, in the dtype under test they are the
eager code that a user would write, whose error is what the package is allowed. The loops over Python floats
are the equations as the papers print them; they guard the dense forms.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from oracle import EPS, HALF, masked_logsumexp, worst
from torch import Tensor

import nckernels
from nckernels.backends import registry

REDUCTIONS = ("none", "mean", "sum")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TEMPERATURE = {"supcon": 0.1, "prototype": 0.1, "info_nce": 0.1, "clip": 0.07}  # the defaults of the contract


# --------------------------------------------------------------------------------------------------
# dense forms


def unit(x: Tensor, eps: float) -> Tensor:
    return F.normalize(x, dim=-1, eps=eps)


def reduce(samples: Tensor, weight: Tensor | None, counted: Tensor, reduction: str) -> Tensor:
    """Weighted reduction over the counted samples; the others are 0, and a mean over none of them is 0."""
    w = torch.ones_like(samples) if weight is None else weight.to(samples.dtype)
    samples = torch.where(counted, w * samples, torch.zeros_like(samples))
    if reduction == "none":
        return samples
    total = torch.where(counted, w, torch.zeros_like(w)).sum()
    if reduction == "sum" or not bool(total > 0):
        return samples.sum() if reduction == "sum" else 0 * samples.sum()
    return samples.sum() / total


def log_sum_exp_or_zero(logits: Tensor, mask: Tensor) -> Tensor:
    """Row log-sum-exp over the mask; 0 with zero gradient where the row has none."""
    if not mask.any():
        return 0 * logits.sum(1)
    return torch.where(mask.any(1), masked_logsumexp(logits, mask, 1), torch.zeros_like(mask[:, 0], dtype=logits.dtype))


@dataclasses.dataclass(frozen=True)
class Rows:
    """A batch of views laid out as rows: (B, V, d) becomes (B * V, d), labels and weights repeated V times."""

    input: Tensor
    label: Tensor
    keep: Tensor
    weight: Tensor | None
    shape: torch.Size

    @classmethod
    def of(cls, input: Tensor, target: Tensor | None, ignore_index: int, weight: Tensor | None) -> Rows:
        views = input.shape[1] if input.dim() == 3 else 1
        label = torch.arange(len(input), device=input.device) if target is None else target
        keep = torch.ones_like(label, dtype=torch.bool) if target is None else label != ignore_index
        return cls(
            input.reshape(-1, input.shape[-1]),
            label.repeat_interleave(views),
            keep.repeat_interleave(views),
            None if weight is None else weight.repeat_interleave(views),
            input.shape[:-1],
        )

    def reduce(self, kept: Tensor, counted: Tensor, reduction: str) -> Tensor:
        """From the values of the kept rows to the loss of the batch."""
        samples = torch.zeros(len(self.keep), dtype=kept.dtype, device=kept.device).masked_scatter(self.keep, kept)
        anchors = torch.zeros_like(self.keep).masked_scatter(self.keep, counted)
        result = reduce(samples, self.weight, anchors, reduction)
        return result.reshape(self.shape) if reduction == "none" else result


def supcon(
    input: Tensor,
    target: Tensor | None = None,
    *,
    temperature: Tensor | float = 0.1,
    ignore_index: int = -100,
    sample_weight: Tensor | None = None,
    reduction: str = "mean",
    decoupled: bool = False,
    eps: float = 1e-12,
) -> Tensor:
    """[NCD] Eq. 2: ignored rows are dropped first, rows without a positive give 0 and are not counted."""
    rows = Rows.of(input, target, ignore_index, sample_weight)
    a, y = unit(rows.input[rows.keep], eps), rows.label[rows.keep]
    t = (a @ a.T) / temperature
    same = y[:, None] == y[None, :]
    other = ~torch.eye(len(y), dtype=torch.bool, device=y.device)
    positives = same & other
    count = positives.sum(1)
    alignment = torch.where(positives, t, torch.zeros_like(t)).sum(1) / count.clamp_min(1)
    samples = log_sum_exp_or_zero(t, ~same if decoupled else other) - alignment
    return rows.reduce(samples, count > 0, reduction)


def prototype(
    input: Tensor,
    target: Tensor,
    *,
    temperature: Tensor | float = 0.1,
    ignore_index: int = -100,
    sample_weight: Tensor | None = None,
    reduction: str = "mean",
    eps: float = 1e-12,
) -> Tensor:
    """[NCD] Eq. 6 with the class means of the kept rows, as a log-sum-exp of logits + log(n_c - [c = y_i])."""
    rows = Rows.of(input, target, ignore_index, sample_weight)
    a, y = unit(rows.input[rows.keep], eps), rows.label[rows.keep]
    classes, index = y.unique(return_inverse=True)
    member = F.one_hot(index, max(len(classes), 1)).to(a.dtype)
    count = member.sum(0)
    means = (member.T @ a) / count.clamp_min(1)[:, None]
    t = (a @ means.T) / temperature
    number = count - member  # of the samples of class c other than i
    own = (t * member).sum(1)
    samples = log_sum_exp_or_zero(t + number.clamp_min(1).log(), number > 0) - own
    return rows.reduce(samples, torch.ones_like(index, dtype=torch.bool), reduction)


def info_nce(
    query: Tensor,
    key: Tensor,
    target: Tensor | None = None,
    *,
    temperature: Tensor | float = 0.1,
    ignore_index: int = -100,
    sample_weight: Tensor | None = None,
    reduction: str = "mean",
    decoupled: bool = False,
    eps: float = 1e-12,
) -> Tensor:
    label = torch.arange(len(query), device=query.device) if target is None else target
    keep = torch.ones_like(label, dtype=torch.bool) if target is None else label != ignore_index
    rows = Rows(query, label, keep, sample_weight, query.shape[:1])
    y = label[keep]
    t = (unit(query[keep], eps) @ unit(key, eps).T) / temperature
    positive = y[:, None] == torch.arange(len(key), device=key.device)
    samples = log_sum_exp_or_zero(t, ~positive if decoupled else torch.ones_like(positive))
    samples = samples - (t * positive).sum(1)
    return rows.reduce(samples, torch.ones_like(y, dtype=torch.bool), reduction)


def clip(
    a: Tensor,
    b: Tensor,
    *,
    temperature: Tensor | float = 0.07,
    sample_weight: Tensor | None = None,
    reduction: str = "mean",
    decoupled: bool = False,
    eps: float = 1e-12,
) -> Tensor:
    t = (unit(a, eps) @ unit(b, eps).T) / temperature
    diagonal = torch.eye(len(a), dtype=torch.bool, device=a.device)
    mask = ~diagonal if decoupled else torch.ones_like(diagonal)
    samples = (log_sum_exp_or_zero(t, mask) + log_sum_exp_or_zero(t.T, mask)) / 2 - t.diagonal()
    return reduce(samples, sample_weight, diagonal.any(1), reduction)


def uniformity(input: Tensor, *, t: float = 2.0, eps: float = 1e-12) -> Tensor:
    """Wang & Isola 2020, section 4.1, from the differences of the unit rows themselves."""
    a = unit(input, eps)
    first, second = torch.triu_indices(len(a), len(a), 1, device=a.device)  # unordered pairs: the mean is the same
    squares = (a[first] - a[second]).pow(2).sum(1)
    return torch.logsumexp(-t * squares, 0) - math.log(len(first))


def alignment(
    input: Tensor, other: Tensor, *, alpha: float = 2.0, reduction: str = "mean", eps: float = 1e-12
) -> Tensor:
    samples = (unit(input, eps) - unit(other, eps)).pow(2).sum(1).pow(alpha / 2)
    return reduce(samples, None, torch.ones_like(samples, dtype=torch.bool), reduction)


NAIVE: dict[str, Callable[..., Tensor]] = {
    "supcon": supcon,
    "prototype": prototype,
    "info_nce": info_nce,
    "clip": clip,
    "uniformity": uniformity,
    "alignment": alignment,
}


def package(name: str) -> Callable[..., Tensor]:
    return getattr(nckernels, f"{name}_loss")


# --------------------------------------------------------------------------------------------------
# the equations as loops over Python floats


def dots(x: Tensor, y: Tensor) -> list[list[float]]:
    """All inner products of the unit rows, without a matrix product."""
    first, second = [[[v / math.hypot(*row) for v in row] for row in t.tolist()] for t in (x, y)]
    return [[math.fsum(p * q for p, q in zip(u, v, strict=True)) for v in second] for u in first]


def supcon_loops(x: Tensor, y: list[int], beta: float, ignore_index: int, decoupled: bool) -> list[float]:
    """[NCD] Eq. 2 sample by sample: the mean over the positives of -log of a ratio."""
    s, kept = dots(x, x), [i for i, label in enumerate(y) if label != ignore_index]
    values = [0.0] * len(y)
    for i in kept:
        positives = [j for j in kept if j != i and y[j] == y[i]]
        others = [j for j in kept if (y[j] != y[i] if decoupled else j != i)]
        denominator = sum(math.exp(beta * s[i][j]) for j in others) if others else 1.0
        for j in positives:
            values[i] -= math.log(math.exp(beta * s[i][j]) / denominator) / len(positives)
    return values


def prototype_loops(x: Tensor, y: list[int], beta: float, ignore_index: int) -> list[float]:
    """[NCD] Eq. 6 with its subtraction; a_i . mu_c is the mean of the a_i . a_j over the class."""
    s, kept = dots(x, x), [i for i, label in enumerate(y) if label != ignore_index]
    members = {c: [j for j in kept if y[j] == c] for c in {y[i] for i in kept}}
    values = [0.0] * len(y)
    for i in kept:
        mean = {c: math.fsum(s[i][j] for j in js) / len(js) for c, js in members.items()}
        total = math.fsum(len(members[c]) * math.exp(beta * m) for c, m in mean.items())
        rest = total - math.exp(beta * mean[y[i]])
        values[i] = (math.log(rest) if len(kept) > 1 else 0.0) - beta * mean[y[i]]
    return values


def info_nce_loops(q: Tensor, k: Tensor, y: list[int], beta: float, ignore_index: int, decoupled: bool) -> list[float]:
    s, values = dots(q, k), [0.0] * len(y)
    for i, label in enumerate(y):
        if label != ignore_index:
            total = sum(math.exp(beta * v) for c, v in enumerate(s[i]) if not (decoupled and c == label))
            values[i] = math.log(total) - beta * s[i][label]
    return values


def clip_loops(a: Tensor, b: Tensor, beta: float, decoupled: bool) -> list[float]:
    s, n = dots(a, b), range(len(a))

    def lse(logits: list[float]) -> float:
        return math.log(sum(math.exp(beta * v) for v in logits))

    return [
        (
            lse([s[i][j] for j in n if not (decoupled and i == j)])
            + lse([s[j][i] for j in n if not (decoupled and i == j)])
        )
        / 2
        - beta * s[i][i]
        for i in n
    ]


def uniformity_loops(x: Tensor, t: float) -> float:
    """Over the ordered pairs, squared distances by coordinates."""
    rows = [[v / math.hypot(*row) for v in row] for row in x.tolist()]
    n = len(rows)
    terms = [math.exp(-t * math.dist(rows[i], rows[j]) ** 2) for i in range(n) for j in range(n) if i != j]
    return math.log(sum(terms) / len(terms))


def alignment_loops(a: Tensor, b: Tensor, alpha: float) -> list[float]:
    rows = [[[v / math.hypot(*row) for v in row] for row in t.tolist()] for t in (a, b)]
    return [math.dist(u, v) ** alpha for u, v in zip(*rows, strict=True)]


# --------------------------------------------------------------------------------------------------
# one case, run by the package, by the oracle and by eager PyTorch


@dataclasses.dataclass(frozen=True)
class Case:
    """A call: differentiable inputs, target, temperature (None where the loss has none), weight and options."""

    name: str
    inputs: tuple[Tensor, ...]
    target: Tensor | None = None
    temperature: Tensor | None = None
    weight: Tensor | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Case:
        """Inputs in dtype, temperature and weight in the dtype of the loss."""
        out = out_dtype(dtype)
        return dataclasses.replace(
            self,
            inputs=tuple(x.to(device, dtype) for x in self.inputs),
            target=None if self.target is None else self.target.to(device),
            temperature=None if self.temperature is None else self.temperature.to(device, out),
            weight=None if self.weight is None else self.weight.to(device, out),
        )

    def with_options(self, **options: Any) -> Case:
        return dataclasses.replace(self, options={**self.options, **options})

    def call(self, function: Callable[..., Tensor], *leaves: Tensor, **more: Any) -> Tensor:
        """The loss of these inputs (and temperature, last) in place of the case's own."""
        leaves = leaves or (*self.inputs, *(() if self.temperature is None else (self.temperature,)))
        inputs, options = leaves[: len(self.inputs)], {**self.options, **more}
        if self.temperature is not None:
            options["temperature"] = leaves[-1]
        if self.weight is not None:
            options["sample_weight"] = self.weight
        return function(*inputs, *(() if self.target is None else (self.target,)), **options)


def out_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def upstream_of(out: Tensor) -> Tensor:
    g = torch.Generator().manual_seed(7)
    return torch.randn(out.shape, generator=g, dtype=torch.float64).to(out.device, out.dtype)


def value_and_grads(case: Case, function: Callable[..., Tensor], **more: Any) -> dict[str, Tensor]:
    """The loss and its gradients in every input and the temperature, under random upstream gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in case.inputs]
    if case.temperature is not None:
        leaves.append(case.temperature.detach().clone().requires_grad_())
    out = case.call(function, *leaves, **more)
    # Of the package a gradient is asked even where it is zero, of the oracle not.
    strict = function is package(case.name)
    grads = torch.autograd.grad(out, leaves, upstream_of(out), allow_unused=not strict, materialize_grads=not strict)
    named = [f"input {i}" for i in range(len(case.inputs))] + ["temperature"]
    return {"loss": out.detach(), **dict(zip(named, grads, strict=False))}


def check(case: Case, dtype: torch.dtype, device: str = "cpu", *, cancelled: float = 0.0) -> None:
    """Package vs the float64 oracle: error <= that of the dense form in dtype + a few roundings.

    The gradient of a row is measured in units of the largest gradient of a unit row. cancelled is the size of
    the terms of that gradient, for batches where they cancel to (nearly) nothing.
    """
    c, naive = case.to(dtype, device), NAIVE[case.name]
    c64 = c.to(torch.float64)
    truth = value_and_grads(c64, naive, eps=EPS[dtype])
    eager = value_and_grads(c, naive, eps=EPS[dtype])
    got = value_and_grads(c, package(case.name))
    out, half = out_dtype(dtype), dtype in HALF
    # The largest exponent: a weight's relative error is that of its logit.
    beta = 4 * float(case.options.get("t", 2.0)) if case.temperature is None else float(1 / c64.temperature)
    roundings = torch.finfo(out).eps
    for key, reference in truth.items():
        value, rival = got[key].cpu().double(), eager[key].cpu().double()
        reference = reference.cpu()
        assert value.shape == reference.shape, key
        assert got[key].dtype == (dtype if key.startswith("input") else out), key
        if key == "loss":
            scale, tol = reference.abs().amax() + beta if reference.numel() else torch.ones(()), 8 * roundings
        elif key == "temperature":
            # A sum over the anchors of differences of similarities, times beta^2, that may cancel.
            scale = torch.tensor(anchors(c64, naive) * beta**2, dtype=torch.float64)
            tol = 8 * roundings * (1 + beta)
            if half and registry.chosen() == "chunked":
                # It may round logits and weights to the input dtype, as eager does: errors that mostly cancel.
                tol += torch.finfo(dtype).eps / 16
        else:
            norms = c64.inputs[int(key[-1])].norm(dim=-1, keepdim=True).clamp_min(EPS[dtype]).cpu()
            largest = worst((reference * norms).abs()) + cancelled
            scale, tol = (largest / norms).expand_as(reference), 8 * roundings * (1 + beta)
            if half:  # the gradient and the tiles of weights behind it are rounded to the input dtype
                tol += 2 * torch.finfo(dtype).eps
                scale = scale + torch.finfo(dtype).smallest_normal / torch.finfo(dtype).eps
        scale = scale + torch.finfo(torch.float64).tiny
        error = worst((value - reference).abs() / scale)
        eager_error = worst((rival - reference).abs() / scale)
        if key == "loss" and not reference.dim() and case.name != "uniformity":
            # In a mean or a sum eager's roundings may cancel by luck: what counts is their size per sample.
            samples = [one.call(naive, reduction="none", eps=EPS[dtype]).cpu().double() for one in (c, c64)]
            typical = (samples[0] - samples[1]).abs().sum()
            typical = typical / max(len(samples[0].flatten()), 1) if c.options.get("reduction") != "sum" else typical
            eager_error = max(eager_error, float(typical / scale))
        eager_error = min(eager_error, 0.1)
        assert error <= eager_error + tol, f"{key}: error {error:.3g}, eager {eager_error:.3g}, allowed +{tol:.3g}"


def anchors(case: Case, naive: Callable[..., Tensor]) -> float:
    """Sum over the anchors of the absolute values of their factors in the loss, times upstream."""
    samples = case.call(naive, reduction="none")
    factor = torch.ones_like(samples)
    if case.weight is not None:
        factor = factor * case.weight.reshape(case.weight.shape + (1,) * (samples.dim() - 1))
    if case.target is not None:
        kept = case.target != case.options.get("ignore_index", -100)
        factor = factor * kept.reshape(kept.shape + (1,) * (samples.dim() - 1))
    reduction = case.options.get("reduction", "mean")
    if reduction == "none":
        return float((factor * upstream_of(samples).abs()).sum())
    total = float(factor.sum())
    return float(upstream_of(samples.sum()).abs()) * (total if reduction == "sum" else 1.0)
