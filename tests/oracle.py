"""The tests' own truth: dense, literal forms of the primitive and of the losses, and a measure of exactness.

Everything here materialises the similarity matrix and is written for any dtype. Run in float64 it is the
oracle; run in the dtype under test it is the eager code a user would write, whose error against the oracle is
what the package is allowed (plus a stated few roundings).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import nckernels

# The clamp of the norm, as F.normalize has it; float16 cannot represent 1e-12.
EPS = {torch.float64: 1e-12, torch.float32: 1e-12, torch.bfloat16: 1e-12, torch.float16: 2.0**-14}
HALF = (torch.bfloat16, torch.float16)
DIRECTIONS = ("class", "instance", "both")
EXCLUDES = ("none", "target", "self", "same_label")
INPUTS = ("features", "prototypes", "inv_temperature", "sample_bias", "class_bias")
LOSSES = ("nonl", "ntce", "normface")


# --------------------------------------------------------------------------------------------------
# the dense primitive


def cosine(features: Tensor, prototypes: Tensor, eps: float = 1e-12) -> Tensor:
    return F.normalize(features, dim=-1, eps=eps) @ F.normalize(prototypes, dim=-1, eps=eps).T


def masked_logsumexp(logits: Tensor, mask: Tensor, dim: int) -> Tensor:
    """Log-sum-exp over the entries in mask; -inf with zero gradient where there is none."""
    filled = logits.masked_fill(~mask, -math.inf)
    nonempty = mask.any(dim)
    safe = torch.where(nonempty.unsqueeze(dim), filled, torch.zeros_like(filled))
    return torch.where(nonempty, safe.logsumexp(dim), torch.full_like(nonempty, -math.inf, dtype=logits.dtype))


def mask_of(target: Tensor, classes: int, exclude: str, ignore_index: int) -> Tensor:
    """(M, K) mask of the entries that take part in the sums."""
    samples = target.shape[0]
    keep = target != ignore_index
    mask = keep[:, None].expand(samples, classes)
    column = torch.arange(classes, device=target.device)
    if exclude == "target":
        return mask & (target[:, None] != column)
    if exclude == "self":
        return mask & keep & (torch.arange(samples, device=target.device)[:, None] != column)
    if exclude == "same_label":
        return mask & keep & (target[:, None] != target)
    return mask


def positives_of(target: Tensor, exclude: str, ignore_index: int) -> Tensor:
    """Column of every sample's positive; 0 for ignored samples, whose pos is masked."""
    keep = target != ignore_index
    positive = torch.arange(target.shape[0], device=target.device) if exclude == "same_label" else target
    return torch.where(keep, positive, torch.zeros_like(positive))


def reduce_logits(
    logits: Tensor,
    target: Tensor,
    sample_bias: Tensor | None,
    class_bias: Tensor | None,
    *,
    direction: str,
    exclude: str,
    present_only: bool,
    ignore_index: int,
) -> dict[str, Tensor]:
    """The outputs of the primitive as functions of the (M, K) logits."""
    keep = target != ignore_index
    mask = mask_of(target, logits.shape[1], exclude, ignore_index)
    outputs = {}
    if direction in ("class", "both"):
        column_mask = mask
        if present_only:
            column_mask = mask & torch.isin(torch.arange(logits.shape[1], device=target.device), target[keep])
        biased = logits if sample_bias is None else logits + sample_bias[:, None]
        outputs["class"] = masked_logsumexp(biased, column_mask & (biased > -math.inf), 0)
    if direction in ("instance", "both"):
        biased = logits if class_bias is None else logits + class_bias
        outputs["instance"] = masked_logsumexp(biased, mask & (biased > -math.inf), 1)
    positive = logits.gather(1, positives_of(target, exclude, ignore_index)[:, None]).squeeze(1)
    outputs["pos"] = torch.where(keep, positive, torch.zeros_like(positive))
    return outputs


# --------------------------------------------------------------------------------------------------
# one problem, run by the package, by the oracle and by eager PyTorch


@dataclasses.dataclass(frozen=True)
class Problem:
    features: Tensor
    prototypes: Tensor
    target: Tensor
    inv_temperature: Tensor
    sample_bias: Tensor | None
    class_bias: Tensor | None
    upstream: dict[str, Tensor]
    direction: str = "class"
    exclude: str = "none"
    present_only: bool = False
    ignore_index: int = -100
    itself: bool = False  # features against themselves: one leaf stands for both operands

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Problem:
        """Inputs in dtype; temperature, biases and upstream gradients in the dtype of the outputs."""
        out = torch.float64 if dtype == torch.float64 else torch.float32

        def cast(t: Tensor | None, to: torch.dtype) -> Tensor | None:
            return None if t is None else t.to(device, to)

        return dataclasses.replace(
            self,
            features=cast(self.features, dtype),
            prototypes=cast(self.prototypes, dtype),
            target=self.target.to(device),
            inv_temperature=cast(self.inv_temperature, out),
            sample_bias=cast(self.sample_bias, out),
            class_bias=cast(self.class_bias, out),
            upstream={name: g.to(device, out) for name, g in self.upstream.items()},
        )

    @property
    def options(self) -> dict[str, Any]:
        return {
            "direction": self.direction,
            "exclude": self.exclude,
            "present_only": self.present_only,
            "ignore_index": self.ignore_index,
        }

    def inputs(self) -> dict[str, Tensor]:
        named = {name: getattr(self, name) for name in INPUTS}
        used = {"class": ("sample_bias",), "instance": ("class_bias",), "both": ("sample_bias", "class_bias")}
        return {
            name: t
            for name, t in named.items()
            if t is not None
            and ("bias" not in name or name in used[self.direction])
            and not (self.itself and name == "prototypes")
        }


def make_problem(
    samples: int,
    classes: int,
    dim: int,
    *,
    direction: str = "class",
    exclude: str = "none",
    bias: bool = False,
    present_only: bool = False,
    beta: float = 10.0,
    ignored: float = 0.2,
    ignore_index: int = -100,
    itself: bool = False,
    seed: int = 0,
) -> Problem:
    """Random float64 problem: row norms over two decades, a share of ignored samples, random upstream."""
    if exclude in ("self", "same_label"):
        classes = samples
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    target = torch.randint(max(classes, 1), (samples,), generator=g)
    if exclude == "same_label":
        labels = torch.tensor([-7, 0, 3, 10**9, -(2**40)])  # any integers are labels here
        target = labels[torch.randint(len(labels), (samples,), generator=g)]
    target[torch.rand(samples, generator=g) < ignored] = ignore_index
    features = randn(samples, dim) * 10 ** (randn(samples, 1).clamp(-1, 1))
    prototypes = randn(classes, dim) * 10 ** (randn(classes, 1).clamp(-1, 1))
    return Problem(
        features=features,
        prototypes=features if itself else prototypes,
        target=target,
        inv_temperature=torch.tensor(beta, dtype=torch.float64),
        sample_bias=randn(samples) if bias else None,
        class_bias=randn(classes) if bias else None,
        upstream={"class": randn(classes), "instance": randn(samples), "pos": randn(samples)},
        direction=direction,
        exclude=exclude,
        present_only=present_only,
        ignore_index=ignore_index,
        itself=itself,
    )


def dense(p: Problem, leaves: dict[str, Tensor], eps: float) -> dict[str, Tensor]:
    dtype = leaves["features"].dtype
    prototypes = leaves["features" if p.itself else "prototypes"]
    logits = leaves["inv_temperature"] * cosine(leaves["features"], prototypes, eps)
    biases = [None if leaves.get(n) is None else leaves[n].to(dtype) for n in ("sample_bias", "class_bias")]
    return reduce_logits(logits, p.target, *biases, **p.options)


def package(p: Problem, leaves: dict[str, Tensor], eps: float = 0.0) -> dict[str, Tensor]:
    bias: Any = {
        "class": leaves.get("sample_bias"),
        "instance": leaves.get("class_bias"),
        "both": (leaves.get("sample_bias"), leaves.get("class_bias")),
    }[p.direction]
    if bias == (None, None):
        bias = None
    lse, pos = nckernels.cosine_lse(
        leaves["features"],
        leaves["features" if p.itself else "prototypes"],
        p.target,
        leaves["inv_temperature"],
        logit_bias=bias,
        **p.options,
    )
    if p.direction == "both":
        return {"class": lse[0], "instance": lse[1], "pos": pos}
    return {p.direction: lse, "pos": pos}


Form = Callable[[Problem, dict[str, Tensor], float], dict[str, Tensor]]


def run(
    form: Form, p: Problem, wrt: Iterable[str] = INPUTS, eps: float = 1e-12
) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    """Outputs of a form and, with the problem's upstream gradients, the gradients it gives to `wrt`."""
    leaves = {name: t.detach().clone().requires_grad_(name in set(wrt)) for name, t in p.inputs().items()}
    outputs = form(p, leaves, eps)
    differentiable = {name: out for name, out in outputs.items() if out.requires_grad}
    inputs = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    grads: dict[str, Tensor | None] = {}
    if differentiable and inputs:
        found = torch.autograd.grad(
            list(differentiable.values()),
            list(inputs.values()),
            [p.upstream[name].to(out.dtype) for name, out in differentiable.items()],
            allow_unused=True,
        )
        grads = dict(zip(inputs, found, strict=True))
    return {name: out.detach() for name, out in outputs.items()}, grads


# --------------------------------------------------------------------------------------------------
# exactness


def spoilt(p: Problem, fill: float = math.nan) -> Problem:
    """The problem with ``fill`` in every row that takes no part: ignored, and nobody's positive."""
    ignored = p.target == p.ignore_index
    z, w = ignored.clone(), torch.zeros(p.prototypes.shape[0], dtype=torch.bool, device=ignored.device)
    if p.exclude in ("self", "same_label"):
        w = ignored.clone()
        if p.exclude == "self":
            w[p.target[~ignored]] = False
        if p.itself:
            z = w
    elif p.present_only:
        w = ~torch.isin(torch.arange(w.shape[0], device=w.device), p.target[~ignored])
    assert z.any()
    features, prototypes = p.features.masked_fill(z[:, None], fill), p.prototypes.masked_fill(w[:, None], fill)
    return dataclasses.replace(p, features=features, prototypes=prototypes)


def check_spoilt(p: Problem, note: object, fill: float = math.nan) -> None:
    """Nothing is reached by what rows hold that take no part: log-sum-exps to the bit, gradients to their errors.

    A GPU backend that has met 0 * NaN in a product takes its float32 sums again in an order of its own: not worse, but
    not the same.
    """
    clean, got = run(package, p), run(package, spoilt(p, fill))
    with nckernels.use_backend("reference"):
        _, exact = run(package, p.to(torch.float64))
    terms = masses(p.to(torch.float64))["inv_temperature"]
    for name, value in clean[0].items():
        assert torch.equal(value, got[0][name]), (note, name)
    for name, value in exact.items():
        assert value is not None
        ours, theirs = ((grads[name].double() - value).norm() for grads in (got[1], clean[1]))  # type: ignore[union-attr]
        # The temperature's is a sum of cosines, which cancel.
        size = terms if name == "inv_temperature" else value.norm()
        assert ours <= 1.5 * theirs + 2**-22 * size, (note, name)


def masses(p: Problem) -> dict[str, Tensor]:
    """Condition of every gradient row of a float64 problem: the sum of the absolute values of its terms.

    The gradient in the logits is a sum of non-negative weights (softmax weights and the positives' one-hots),
    so with |upstream| in place of upstream the same derivative gives the size that cancellation cannot hide.
    """
    with torch.no_grad():
        beta = p.inv_temperature
        logits = beta * cosine(p.features, p.prototypes)
    logits.requires_grad_()
    biases = [p.inputs().get(n) for n in ("sample_bias", "class_bias")]
    outputs = reduce_logits(logits, p.target, *biases, **p.options)
    mass = torch.autograd.grad(list(outputs.values()), logits, [p.upstream[name].abs() for name in outputs])[0]
    return {
        "features": mass.sum(1) + mass.sum(0) if p.itself else mass.sum(1),
        "prototypes": mass.sum(0),
        "inv_temperature": mass.sum(),
        "sample_bias": mass.sum(1),
        "class_bias": mass.sum(0),
    }


def worst(x: Tensor) -> float:
    """Largest value; anything not finite counts as infinitely wrong."""
    if x.numel() == 0:
        return 0.0
    return float(torch.nan_to_num(x, nan=math.inf, posinf=math.inf).max())


def as_exact_as_eager(
    name: str, got: Tensor, eager: Tensor, truth: Tensor, scale: Tensor, tol: float, cap: float
) -> None:
    """Error of `got` in units of `scale` <= that of eager PyTorch (never more than cap) + tol."""
    got_error = worst((got.cpu().double() - truth).abs() / scale)
    eager_error = min(worst((eager.cpu().double() - truth).abs() / scale), cap)
    assert got_error <= eager_error + tol, f"{name}: error {got_error:.3g}, eager {eager_error:.3g}, allowed +{tol:.3g}"


def check(problem: Problem, dtype: torch.dtype, device: str = "cpu", wrt: Iterable[str] = INPUTS) -> None:
    """The package against the oracle for one problem: outputs, gradients, exact zeros, dtypes and shapes."""
    wrt = tuple(wrt)
    out_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    p = problem.to(dtype, device)
    p64 = p.to(torch.float64)
    eps = EPS[dtype]
    truth, truth_grads = run(dense, p64, INPUTS, eps)
    eager, eager_grads = run(dense, p, INPUTS, eps)
    got, got_grads = run(package, p, wrt)

    beta = float(p64.inv_temperature)
    bias = max(
        [0.0]
        + [
            float(b[b > -math.inf].abs().max())
            for b in (p64.sample_bias, p64.class_bias)
            if b is not None and b.numel()
        ]
    )
    unit = torch.finfo(dtype).eps
    unit_out = torch.finfo(out_dtype).eps
    # Outputs: a few roundings of the logits in the dtype of the outputs.
    tol = 4 * unit_out
    for name, reference in truth.items():
        value = got[name]
        assert (value.dtype, value.shape) == (out_dtype, reference.shape), name
        finite = reference > -math.inf
        assert torch.equal(value.cpu() == -math.inf, ~finite), f"{name}: -inf in the wrong places"
        scale = beta + bias + reference[finite].abs()
        as_exact_as_eager(
            name, value.cpu()[finite], eager[name].cpu()[finite], reference[finite], scale, tol, cap=4 * unit
        )

    # Gradients: the error of a weight exp(t - lse) is that of its logit; in half precision the weights and
    # the gradient itself are rounded to the input dtype.
    tol = 4 * unit_out * (1 + beta + bias) + (2 * unit if dtype in HALF else 0.0)
    mass = masses(p64)
    # Below this share of the largest mass a weight may underflow in the dtype.
    floor = 2.0**-14 if dtype == torch.float16 else 1e-30
    smallest = 2.0**-24 if dtype == torch.float16 else torch.finfo(dtype).tiny
    for name, grad in got_grads.items():
        truth_grad = truth_grads[name]
        leaf = p.inputs()[name]
        assert grad is not None, f"{name}: no gradient"
        assert truth_grad is not None
        assert (grad.dtype, grad.shape) == (leaf.dtype, leaf.shape), name
        untouched = (mass[name] == 0).expand(truth_grad.shape[:1]) if truth_grad.dim() else mass[name] == 0
        assert not grad.cpu()[untouched].any(), f"{name}: gradient where there must be none"
        scale = mass[name].clamp_min(floor * worst(mass[name]))
        if name in ("features", "prototypes"):
            norm = getattr(p64, name).norm(dim=1).clamp_min(eps)
            scale = (beta * scale / norm)[:, None]
        scale = scale + smallest / unit
        as_exact_as_eager(f"grad {name}", grad, eager_grads[name], truth_grad, scale, tol, cap=0.1)


# --------------------------------------------------------------------------------------------------
# the losses as printed


def normface_logits(s: Tensor, target: Tensor, beta: Tensor | float, angular: float, cosine_margin: float) -> Tensor:
    """beta * S with the target entry replaced by beta * (cos(theta + angular) - cosine_margin)."""
    if angular or cosine_margin:
        entry = s.gather(1, target[:, None])
        moved = (torch.acos(entry) + angular).cos() if angular else entry
        s = s.scatter(1, target[:, None], moved - cosine_margin)
    return beta * s


def ntce_samples(s: Tensor, target: Tensor, beta: Tensor | float) -> Tensor:
    """[NCD] Eq. 4, one value per sample: row i of the M x M matrix holds beta * S[j, y_i] over j."""
    t = beta * s[:, target].T
    return t.logsumexp(1) - t.diagonal()


def nonl_samples(s: Tensor, target: Tensor, beta: Tensor | float, direction: str) -> Tensor:
    """[NCD] Eq. 5 and its two variants, one value per sample; an anchor without negatives keeps -pos only."""
    t = beta * s[:, target].T
    column = target[None, :] != target[:, None]
    row = target[:, None] != torch.arange(s.shape[1], device=s.device)
    logits, mask = {
        "class": (t, column),
        "instance": (beta * s, row),
        "both": (torch.cat([t, beta * s], 1), torch.cat([column, row], 1)),
    }[direction]
    lse = masked_logsumexp(logits, mask, 1)
    return torch.where(mask.any(1), lse, torch.zeros_like(lse)) - t.diagonal()


def loss(
    name: str,
    input: Tensor,
    prototypes: Tensor,
    target: Tensor,
    *,
    temperature: Tensor | float = 0.1,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    direction: str = "class",
    label_smoothing: float = 0.0,
    angular_margin: float = 0.0,
    cosine_margin: float = 0.0,
    eps: float = 1e-12,
) -> Tensor:
    """A loss with prototypes from its printed per-sample form; ignored samples are dropped first."""
    keep = target != ignore_index
    y = target[keep].long()
    s = cosine(input[keep], prototypes, eps)
    beta = 1 / temperature
    w = torch.ones(s.shape[1], dtype=s.dtype, device=s.device) if weight is None else weight.to(s.dtype)
    if name == "normface":
        logits = normface_logits(s, y, beta, angular_margin, cosine_margin)
        samples = F.cross_entropy(logits, y, w, label_smoothing=label_smoothing, reduction="none")
    elif name == "ntce":
        samples = w[y] * ntce_samples(s, y, beta)
    elif name == "dot_regression":  # [DLP] Eq. 6
        samples = w[y] * 0.5 * (s.gather(1, y[:, None]).squeeze(1) - 1.0) ** 2
    else:
        samples = w[y] * nonl_samples(s, y, beta, direction)
    if reduction == "none":
        return torch.zeros(len(target), dtype=s.dtype, device=s.device).masked_scatter(keep, samples)
    return samples.sum() if reduction == "sum" else samples.sum() / w[y].sum()


def package_loss(name: str) -> Callable[..., Tensor]:
    return getattr(nckernels, f"{name}_loss")


# --------------------------------------------------------------------------------------------------
# configurations


def simplex(classes: int, dim: int) -> Tensor:
    """(K, d) float64 unit rows with pairwise cosine -1/(K-1), in a random orientation; needs d >= K - 1."""
    centred = torch.eye(classes, dtype=torch.float64) - 1 / classes
    u, _, _ = torch.linalg.svd(centred)
    rows = torch.zeros(classes, dim, dtype=torch.float64)
    rows[:, : classes - 1] = F.normalize(u[:, : classes - 1], dim=1)
    return rows @ rotation(dim, seed=classes)


def rotation(dim: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(dim, dim, generator=g, dtype=torch.float64))[0]


def balanced(classes: int, per_class: int) -> Tensor:
    return torch.arange(classes).repeat(per_class)


def check_float16_zero_row(length: float, d: int) -> None:
    """The gradients of other rows than a zero row, whose entries no norm makes smaller, beside features of ``length``.

    The loss is scaled as in float16 training; the zero row's own gradient is 0 or large, and not looked at.
    """
    z, w, y = torch.randn(40, d) * length, torch.randn(10, d), torch.randint(10, (40,))
    z[0] = 0
    z, w = z.half().requires_grad_(), w.half().requires_grad_()
    grads = torch.autograd.grad(1024 * nckernels.normface_loss(z, w, y), (z, w))
    wide = [x.detach().double().requires_grad_() for x in (z, w)]
    with nckernels.use_backend("reference"):
        expected = torch.autograd.grad(1024 * nckernels.normface_loss(*wide, y), wide)
    for got, exact in ((grads[0][1:], expected[0][1:]), (grads[1], expected[1])):
        assert (got.double() - exact).norm() <= 5e-4 * exact.norm()
