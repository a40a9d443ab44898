"""Whole batches, their split over ranks, and checks that the ranks' results add up to the loss of the whole batch.

The truth is the float64 oracle of the whole batch. What one process of the package returns for the whole batch is the
error that the ranks are allowed, plus roundings that are stated below.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import unittest.mock
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import oracle
import oracle_contrastive
import torch
import torch.distributed as dist
from oracle import EPS, HALF, LOSSES, worst
from ranks import Ranks
from torch import Tensor

import nckernels
from nckernels import _class_means

REDUCTIONS = ("none", "mean", "sum")
MOST = (("none", True), ("mean", False), ("mean", True), ("sum", False))  # reductions, and whether there are weights
SOME = (("none", False), ("mean", True), ("sum", False))
CLASSES, DIM, IGNORED = 11, 12, -100
WITH_PROTOTYPES, NO_TEMPERATURE = (*LOSSES, "dot_regression"), ("uniformity", "alignment", "dot_regression")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDINGS = {torch.float64: 1e-12, torch.float32: 1e-6, **{half: 2 * torch.finfo(half).eps for half in HALF}}

# (loss, options) by name
PROTOTYPE_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "nonl": ("nonl", {}),
    "nonl-instance": ("nonl", {"direction": "instance"}),
    "nonl-both": ("nonl", {"direction": "both"}),
    "ntce": ("ntce", {}),
    "normface": ("normface", {}),
    "normface-smoothing": ("normface", {"label_smoothing": 0.1}),
    "normface-cosface": ("normface", {"cosine_margin": 0.35}),
    "normface-arcface": ("normface", {"angular_margin": 0.5}),
    "normface-all": ("normface", {"angular_margin": 0.2, "cosine_margin": 0.1, "label_smoothing": 0.05}),
}
# (loss, options, what make() is to do differently) by name
CONTRASTIVE_VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "supcon": ("supcon", {}, {}),
    "supcon-views": ("supcon", {}, {"views": 2}),
    "supcon-simclr": ("supcon", {}, {"views": 3, "labelled": False}),
    "supcon-decoupled": ("supcon", {"decoupled": True}, {}),
    "supcon-simclr-decoupled": ("supcon", {"decoupled": True}, {"views": 2, "labelled": False}),
    "prototype": ("prototype", {}, {}),
    "prototype-views": ("prototype", {}, {"views": 2}),
    "prototype-classes": ("prototype", {"num_classes": CLASSES}, {}),
    "info_nce": ("info_nce", {}, {"labelled": False}),
    "info_nce-more-keys": ("info_nce", {}, {"labelled": False, "more_keys": True}),
    "info_nce-target": ("info_nce", {}, {}),
    "info_nce-decoupled": ("info_nce", {"decoupled": True}, {}),
    "clip": ("clip", {}, {}),
    "clip-decoupled": ("clip", {"decoupled": True}, {}),
    "alignment": ("alignment", {}, {}),
    "alignment-3": ("alignment", {"alpha": 3.0}, {}),
    "uniformity": ("uniformity", {}, {}),
    "uniformity-5": ("uniformity", {"t": 5.0}, {}),
}


@dataclasses.dataclass(frozen=True)
class Batch:
    """Class indices of a batch, -1 for rows to ignore, and how many samples each rank has."""

    sizes: tuple[int, ...]
    classes: Tensor


def batches(world_size: int) -> dict[str, Batch]:
    """Splits of a batch that are difficult for ranks, by name."""
    g = torch.Generator().manual_seed(world_size)

    def batch(*sizes: int, ignored: float = 0.0) -> Batch:
        classes = torch.randint(CLASSES, (sum(sizes),), generator=g)
        return Batch(sizes, classes.masked_fill(torch.rand(len(classes), generator=g) < ignored, -1))

    two = world_size == 2
    result = {
        "unequal": batch(*((13, 24) if two else (7, 12, 3, 15)), ignored=0.2),
        "empty-shard": batch(*((0, 21) if two else (9, 0, 17, 0))),
        "all-empty": batch(*[0] * world_size),
        "one-sample": batch(*((0, 1) if two else (0, 0, 1, 0))),
        "disjoint": batch(*[24 // world_size] * world_size),
        "one-class": batch(*((5, 4) if two else (3, 1, 4, 2))),
        "ignored-rank": batch(*((6, 9) if two else (6, 9, 4, 5))),
        "all-ignored": batch(*((2, 3) if two else (1, 0, 2, 3))),
    }
    # Each rank has classes of its own; class 9 is a single sample's, class 10 nobody's.
    rank = torch.arange(world_size).repeat_interleave(24 // world_size)
    result["disjoint"].classes.remainder_(8 // world_size).add_(rank * (8 // world_size))
    result["disjoint"].classes[-1] = 9
    result["one-class"].classes.fill_(2)
    result["ignored-rank"].classes.split(result["ignored-rank"].sizes)[1].fill_(-1)
    result["all-ignored"].classes.fill_(-1)
    return result


@dataclasses.dataclass(frozen=True)
class Problem:
    """A whole batch. Rows, targets, sample weights and upstream gradients are split, the rest is on every rank."""

    loss: str
    rows: tuple[Tensor, ...]  # features; queries and keys; both members of pairs
    sizes: tuple[tuple[int, ...], ...]  # of the ranks' parts of each of rows
    target: Tensor | None = None  # as the ranks hold it: info_nce's counts the keys of its rank
    prototypes: Tensor | None = None
    temperature: Tensor | None = None
    weight: Tensor | None = None  # of the classes
    sample_weight: Tensor | None = None
    upstream: Tensor = dataclasses.field(default_factory=lambda: torch.tensor(-1.7, dtype=torch.float64))
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> Problem:
        """Rows and prototypes in dtype; temperature, weights and upstream in the dtype of the loss."""
        out = torch.float64 if dtype == torch.float64 else torch.float32

        def cast(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(out)

        return dataclasses.replace(
            self,
            rows=tuple(x.to(dtype) for x in self.rows),
            prototypes=None if self.prototypes is None else self.prototypes.to(dtype),
            temperature=cast(self.temperature),
            weight=cast(self.weight),
            sample_weight=cast(self.sample_weight),
            upstream=self.upstream.to(out),
        )

    @property
    def reduction(self) -> str:
        return "mean" if self.loss == "uniformity" else self.options.get("reduction", "mean")

    @property
    def leaves(self) -> dict[str, Tensor]:
        """The tensors that have a gradient, by name."""
        named = {f"input {i}": x for i, x in enumerate(self.rows)}
        shared = {"prototypes": self.prototypes, "temperature": self.temperature}
        return {**named, **{name: x for name, x in shared.items() if x is not None}}

    def part(self, rank: int) -> Problem:
        """The part of a rank."""

        def mine(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.split(self.sizes[0])[rank]

        upstream = mine(self.upstream) if self.reduction == "none" else self.upstream
        assert upstream is not None
        return dataclasses.replace(
            self,
            rows=tuple(x.split(sizes)[rank] for x, sizes in zip(self.rows, self.sizes, strict=True)),
            target=mine(self.target),
            sample_weight=mine(self.sample_weight),
            upstream=upstream,
        )

    def whole(self) -> Problem:
        """The problem for one process: targets, by default a rank's first keys, count the keys of all ranks."""
        queries, keys = self.sizes[0], self.sizes[-1]
        if self.loss != "info_nce" or (self.target is None and queries == keys):
            return self
        target = torch.cat([torch.arange(m) for m in queries]) if self.target is None else self.target
        offsets = torch.tensor([0, *keys[:-1]]).cumsum(0).repeat_interleave(torch.tensor(queries))
        ignored = target == self.options.get("ignore_index", IGNORED)
        return dataclasses.replace(self, target=torch.where(ignored, target, target + offsets))

    def call(self, function: Callable[..., Tensor], leaves: dict[str, Tensor], **more: Any) -> Tensor:
        """The loss with these leaves in place of the problem's own."""
        positional = [leaves.get(name) for name in ("input 0", "input 1", "prototypes")]
        named = {"weight": self.weight, "sample_weight": self.sample_weight, "temperature": leaves.get("temperature")}
        named = {name: x for name, x in named.items() if x is not None}
        arguments = [x for x in (*positional, self.target) if x is not None]
        return function(*arguments, **{**self.options, **named, **more})


def make(
    loss: str,
    batch: Batch,
    options: dict[str, Any],
    *,
    reduction: str = "mean",
    weight: bool = False,
    views: int = 1,
    labelled: bool = True,
    more_keys: bool = False,
    classes: int = CLASSES,
    dim: int = DIM,
    temperature: float = 0.2,
    seed: int = 0,
) -> Problem:
    """A random float64 problem; row norms over two decades, NaN in rows that are ignored."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def rows(*shape: int) -> Tensor:
        return randn(*shape, dim) * 10 ** randn(*shape, 1).clamp(-1, 1)

    n, sizes = len(batch.classes), batch.sizes
    ignored = batch.classes < 0
    options = dict(options) if loss == "uniformity" else {**options, "reduction": reduction}
    inputs, dealt, target = [rows(n, views) if views > 1 else rows(n)], [sizes], None
    if loss in ("clip", "alignment"):
        inputs, dealt = [rows(n), rows(n)], [sizes, sizes]
    elif loss == "info_nce":
        keys = sizes
        if labelled or more_keys:  # all ranks that have queries have keys, and the first has keys in any case
            keys = tuple((rank == 0) + size + size % 3 for rank, size in enumerate(sizes))
        if labelled:
            own = torch.tensor(keys).repeat_interleave(torch.tensor(sizes))
            target = (torch.rand(n, generator=g) * own).long()
        inputs, dealt = [rows(n), rows(sum(keys))], [sizes, keys]
    elif loss in WITH_PROTOTYPES or options.get("num_classes") is not None:
        target = batch.classes
    elif loss != "uniformity" and labelled:
        target = torch.tensor([-7, 0, 3, 10**9, -(2**40), 5, 6, 7, -8, 9, 10])[batch.classes]
    if target is not None:
        target = target.masked_fill(ignored, IGNORED)
        shape = (n,) + (1,) * (inputs[0].dim() - 1)
        inputs[0] = inputs[0].masked_fill(ignored.reshape(shape), math.nan)
    class_weight = sample_weight = None
    if weight and loss in WITH_PROTOTYPES:
        class_weight = torch.rand(classes, generator=g, dtype=torch.float64)
        class_weight[1] = 0.0
    elif weight:
        sample_weight = torch.rand(n, generator=g, dtype=torch.float64)
        sample_weight[:3] = 0.0
    problem = Problem(
        loss,
        tuple(inputs),
        tuple(dealt),
        target,
        rows(classes) if loss in WITH_PROTOTYPES else None,
        None if loss in NO_TEMPERATURE else torch.tensor(temperature, dtype=torch.float64),
        class_weight,
        sample_weight,
        options=options,
    )
    if problem.reduction == "none":
        problem = dataclasses.replace(problem, upstream=randn(*inputs[0].shape[:-1]))
    return problem


# --------------------------------------------------------------------------------------------------
# what is compared


def package(loss: str) -> Callable[..., Tensor]:
    return getattr(nckernels, f"{loss}_loss")


def dense(loss: str, eps: float) -> Callable[..., Tensor]:
    """The oracle with the signature of the package."""

    def form(*args: Any, num_classes: int | None = None, **options: Any) -> Tensor:
        function = partial(oracle.loss, loss) if loss in WITH_PROTOTYPES else oracle_contrastive.NAIVE[loss]
        return function(*args, eps=eps, **options)

    return form


def value_and_grads(p: Problem, function: Callable[..., Tensor], strict: bool = True, **more: Any) -> dict[str, Tensor]:
    """The loss and its gradients in the leaves; strict: a leaf without a gradient is an error."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in p.leaves.items()}
    out = p.call(function, leaves, **more)
    if not strict and not out.requires_grad:
        return {"loss": out, **{name: torch.zeros_like(x) for name, x in leaves.items()}}
    grads = torch.autograd.grad(
        out, list(leaves.values()), p.upstream.to(out.dtype), allow_unused=not strict, materialize_grads=not strict
    )
    return {"loss": out.detach(), **dict(zip(leaves, grads, strict=True))}


@contextlib.contextmanager
def setting(backend: str | None = None, workspace: int | None = None, autocast: bool = False) -> Iterator[None]:
    """Backend, dtype and workspace of the computation, in the ranks and in one process."""
    with contextlib.ExitStack() as stack:
        if backend is not None:
            stack.enter_context(nckernels.use_backend(backend))
        if workspace is not None:
            stack.enter_context(nckernels.use_workspace(workspace))
        if autocast:
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        yield


def on_ranks(rank: int, world_size: int, problems: dict[str, Problem], how: dict[str, Any]) -> dict[str, Any]:
    """In a rank: loss and gradients of its part of every problem."""
    results = {}
    for name, p in problems.items():
        try:
            with setting(**how):
                results[name] = value_and_grads(p.part(rank), package(p.loss), process_group="world")
        except Exception as error:
            raise RuntimeError(f"{name}: {type(error).__name__}: {error}") from error
    return results


def on_two_pairs(
    rank: int, world_size: int, problems: dict[str, tuple[Problem, Problem]], how: dict[str, Any]
) -> dict[str, Any]:
    """In one of four ranks: the first problems are those of ranks 0 and 3, the second ones those of 1 and 2."""
    members = [0, 3] if rank in (0, 3) else [1, 2]
    groups = [dist.new_group(ranks) for ranks in ([0, 3], [1, 2])]
    mine = int(rank in (1, 2))
    results = {}
    for name, pair in problems.items():
        part = pair[mine].part(members.index(rank))
        with setting(**how):
            results[name] = value_and_grads(part, package(part.loss), process_group=groups[mine])
    return results


def whole_of(parts: list[dict[str, Tensor]], p: Problem) -> dict[str, Tensor]:
    """The whole batch's loss and gradients, from the ranks' results by the contract at the top of the tests."""
    world_size = len(parts)
    scale = 1 if p.reduction == "none" else world_size
    whole = {}
    for name in parts[0]:
        values = [part[name].double() for part in parts]
        if name.startswith("input"):
            whole[name] = torch.cat(values) / scale
        elif name == "loss" and p.reduction == "none":
            whole[name] = torch.cat(values)
        else:
            whole[name] = torch.stack(values).sum(0) / scale
    return whole


def losses_of_ranks(p: Problem, function: Callable[..., Tensor], whole: Tensor) -> list[Tensor]:
    """The expected result of every rank, from the samples' losses and the loss of the whole batch."""
    world_size = len(p.sizes[0])
    if p.loss == "uniformity":
        return [whole] * world_size
    samples = p.whole().call(function, p.leaves, reduction="none").split(p.sizes[0])
    if p.reduction == "none":
        return list(samples)
    own = torch.stack([part.sum() for part in samples])
    total = own.sum() / whole if p.reduction == "mean" else torch.ones(())
    # Where all is 0 the mean is 0; where it is NaN, so is each share.
    return list((world_size * own / total).masked_fill((own.sum() == 0) & ~whole.isnan(), 0.0))


def faults(p: Problem, parts: list[dict[str, Tensor]], **how: Any) -> list[str]:
    """Messages about the ranks' results that are wrong."""
    dtype = p.rows[0].dtype
    exact, out = p.to(torch.float64), torch.float64 if dtype == torch.float64 else torch.float32
    form = dense(p.loss, EPS[dtype])
    truth = value_and_grads(exact.whole(), form, strict=False)
    # Ranks take the prototype loss on the primitive, with products in 16 bits, whatever one process would do.
    with setting(**how), unittest.mock.patch.object(_class_means, "takes", return_value=False):
        alone = value_and_grads(p.whole(), package(p.loss))
        rivals = losses_of_ranks(p, package(p.loss), alone["loss"])
    compute = torch.bfloat16 if how.get("autocast") else dtype
    got, found = whole_of(parts, p), []

    def compare(name: str, got: Tensor, alone: Tensor, truth: Tensor, scale: Tensor | float, tol: float) -> None:
        if not torch.equal(got.isnan(), truth.isnan()):
            found.append(f"{name}: {got.flatten()[:4].tolist()}..., not {truth.flatten()[:4].tolist()}...")
            return
        error, allowed = (worst((x.double() - truth).nan_to_num(0.0).abs() / scale) for x in (got, alone))
        if not error <= min(allowed, 0.1) + tol:
            found.append(f"{name}: error {error:.3g}, of one process {allowed:.3g}, allowed +{tol:.3g}")

    for rank, part in enumerate(parts):
        for name, leaf in {**p.part(rank).leaves, "loss": None}.items():
            kind, shape = (out, None) if leaf is None else (leaf.dtype, leaf.shape)
            if part[name].dtype != kind or shape not in (None, part[name].shape):
                found.append(f"rank {rank}: {name} is {part[name].dtype} {tuple(part[name].shape)}")
    if found:
        return found

    roundings = ROUNDINGS[out]
    beta = 1.0 if p.temperature is None else 1.0 / float(p.temperature)
    number = max(len(exact.rows[0].flatten(0, -2)), 1)
    scale = truth["loss"].nan_to_num(0.0).abs().amax() if truth["loss"].numel() else 0.0
    compare("loss", got["loss"], alone["loss"], truth["loss"], scale + beta, roundings)
    expected = losses_of_ranks(exact, form, truth["loss"])
    scale = max(worst(value.nan_to_num(0.0).abs()) for value in expected) + beta
    for rank, (part, rival, value) in enumerate(zip(parts, rivals, expected, strict=True)):
        compare(f"loss of rank {rank}", part["loss"].double(), rival, value, scale, roundings)
    upstream = max(worst(exact.upstream.abs()), torch.finfo(torch.float64).tiny)  # 0 of nothing: 0 is expected
    for name, leaf in exact.leaves.items():
        if name == "temperature":
            size = beta**2 * upstream * (1 if p.reduction == "mean" else number)
            compare(name, got[name], alone[name], truth[name], size, roundings)
            continue
        # In units of the largest gradient of a unit row; where all cancel, of one of the terms that do.
        norms = leaf.nan_to_num(1.0).norm(dim=-1, keepdim=True).clamp_min(EPS[dtype])
        term = beta * upstream / (number if p.reduction == "mean" else 1)
        largest = max(worst((truth[name] * norms).abs()), term)
        size = largest / norms
        if compute in HALF:
            size = size + torch.finfo(compute).smallest_normal / torch.finfo(compute).eps
        compare(name, got[name], alone[name], truth[name], size, ROUNDINGS[compute])
    return found


def check(ranks: Ranks, problems: dict[str, Problem], dtype: torch.dtype = torch.float64, **how: Any) -> None:
    """Run all problems on the ranks; fail with the names of those that do not add up."""
    problems = {name: p.to(dtype) for name, p in problems.items()}
    results = ranks.run(on_ranks, problems, how)
    assert_none(
        f"{name}: {fault}" for name, p in problems.items() for fault in faults(p, [r[name] for r in results], **how)
    )


def otherwise(p: Problem) -> Problem:
    """The same batch with narrow integers, non-contiguous rows and an ignore_index beyond the classes."""
    if p.target is not None:
        wide = p.loss == "supcon" or (p.loss == "prototype" and "num_classes" not in p.options)  # any labels
        target = p.target.masked_fill(p.target == IGNORED, 120)
        p = dataclasses.replace(
            p, target=target if wide else target.to(torch.int8), options={**p.options, "ignore_index": 120}
        )
    return dataclasses.replace(p, rows=tuple(x.mT.contiguous().mT for x in p.rows))


def some_gradients(rank: int, world_size: int, problems: dict[str, Problem], how: dict[str, Any]) -> dict[str, Any]:
    """In a rank: no gradient, that of one leaf at a time, and the same from a second backward twice as large."""
    found: dict[str, Any] = {}
    for name, p in problems.items():
        p = p.part(rank)
        for wanted in p.leaves:
            leaves = {n: x.detach().clone().requires_grad_(n == wanted) for n, x in p.leaves.items()}
            with setting(**how):
                out = p.call(package(p.loss), leaves, process_group="world")
                once = torch.autograd.grad(out, leaves[wanted], p.upstream, retain_graph=True)[0]
                found[name, wanted] = once, torch.autograd.grad(out, leaves[wanted], 2 * p.upstream)[0]
        with torch.no_grad(), setting(**how):
            found[name, "loss"] = p.call(package(p.loss), p.leaves, process_group="world")
    return found


def check_some_gradients(ranks: Ranks, problems: dict[str, Problem], **how: Any) -> None:
    """Single gradients add up as well, and a graph can be used twice."""
    results, lines = ranks.run(some_gradients, problems, how), []
    for name, p in problems.items():
        names = [*p.leaves, "loss"]
        once = [{n: r[name, n] if n == "loss" else r[name, n][0] for n in names} for r in results]
        lines += [f"{name}: {fault}" for fault in faults(p, once, **how)]
        for n, r in itertools.product(p.leaves, results):
            first, second = r[name, n]
            if not torch.allclose(2 * first, second, rtol=1e-13, atol=1e-13):
                lines.append(f"{name}: {n} of the second backward")
        if any(part["loss"].requires_grad for part in once):
            lines.append(f"{name}: a gradient under no_grad")
    assert_none(lines)


def check_two_pairs(ranks4: Ranks, problems: dict[str, tuple[Problem, Problem]], **how: Any) -> None:
    """The same for two groups of two ranks at the same time, each with its own problems."""
    results = ranks4.run(on_two_pairs, problems, how)
    assert_none(
        f"{name} of ranks {members}: {fault}"
        for name, pair in problems.items()
        for p, members in zip(pair, ((0, 3), (1, 2)), strict=True)
        for fault in faults(p, [results[member][name] for member in members], **how)
    )


def assert_none(faults: Iterable[str]) -> None:
    lines = list(faults)
    assert not lines, "\n".join(lines)
