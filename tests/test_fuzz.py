"""Random problems in float64 against the reference: sizes, workspaces, masks and options that nobody thought of.

Where tiles are ragged, kept or made again, and columns come in blocks, depends on sizes and workspace in ways that a
list of shapes cannot cover; a fixed seed per case keeps failures reproducible.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import CPU_BACKENDS
from oracle import Problem, make_problem, package, run
from torch import Tensor

import nckernels

CASES = 60
SLOW_CASES = 1000


def random_sizes(r: random.Random) -> tuple[int, int, int]:
    """M, K, d of bounded work."""
    if r.random() < 0.3:  # anything, extremes included; with d = 1 every exact gradient is 0
        m, k, d = (max(2, round(2 ** r.uniform(0, power))) for power in (11, 11, 9))
    else:  # several tiles and blocks, the last of which are ragged
        m, k, d = r.randint(30, 700), r.randint(30, 700), r.randint(8, 200)
    while m * k * d > 30e6:
        m, k, d = (max(2, 3 * x // 4) for x in (m, k, d))
    return m, k, d


@contextmanager
def num_threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def random_problem(seed: int) -> tuple[Problem, int, int]:
    """A problem of bounded work, a workspace in bytes and a number of threads."""
    r = random.Random(seed)
    m, k, d = random_sizes(r)
    exclude = r.choice(["none", "target", "self", "same_label"])
    square = exclude in ("self", "same_label")
    direction = r.choice(["class", "instance", "both"])
    itself = square and r.random() < 0.6
    problem = make_problem(
        m, k, d, direction=direction, exclude=exclude, bias=r.random() < 0.3, itself=itself,
        present_only=direction == "class" and not square and r.random() < 0.5,
        beta=r.choice([1.0, 10.0, 29.0, 100.0]), ignored=r.choice([0.0, 0.0, 0.1, 0.9]), seed=seed,
    )  # fmt: skip
    return problem, round(2 ** r.uniform(14, 23)), r.choice([1, 1, 2, 3])


def compare(backend: str, seed: int) -> None:
    problem, workspace, threads = random_problem(seed)
    with nckernels.use_backend("reference"):
        expected = run(package, problem)
    with num_threads(threads), nckernels.use_backend(backend), nckernels.use_workspace(workspace):
        found = run(package, problem)
    m, d = problem.features.shape
    case = f"M={m} K={len(problem.prototypes)} d={d} {problem.options} itself={problem.itself} workspace={workspace}"
    for results, references in zip(found, expected, strict=True):
        for name, reference in references.items():
            value = results[name]
            assert value is not None
            assert reference is not None
            finite = reference.isfinite()
            assert torch.equal(value[~finite], reference[~finite]), f"{name}: {case}"
            error = (value[finite] - reference[finite]).norm()
            assert error <= 1e-10 * (1 + reference[finite].norm()), f"{name}: error {error:.2g}: {case}"


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("backend", [name for name in CPU_BACKENDS if name != "reference"])
def test_random_problems(backend: str, part: int) -> None:
    for seed in range(part, CASES, 4):
        compare(backend, seed)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
@pytest.mark.parametrize("backend", [name for name in CPU_BACKENDS if name != "reference"])
def test_many_random_problems(backend: str, part: int) -> None:
    for seed in range(CASES + part, CASES + SLOW_CASES, 10):
        compare(backend, seed)


def compare_loss(backend: str, seed: int) -> None:
    """A loss and its gradients, which a backend may compute in one step."""
    r = random.Random(seed)
    torch.manual_seed(seed)
    m, k, d = random_sizes(r)
    if r.random() < 0.5:
        k = r.randint(1, 40)
    loss = r.choice([nckernels.nonl_loss, nckernels.ntce_loss, nckernels.normface_loss])
    options: dict[str, Any] = {"reduction": r.choice(["mean", "sum", "none"])}
    if loss is nckernels.nonl_loss:
        options["direction"] = r.choice(["class", "instance", "both"])
    if loss is nckernels.normface_loss:
        options["label_smoothing"] = r.choice([0.0, 0.1, 1.0])
        margins = [(0.0, 0.0), (0.0, 0.35)]
        if d >= 8:  # in few dimensions some cosines are near 1, where the angle loses half of the digits
            margins += [(0.5, 0.0), (0.3, 0.2)]
        options["angular_margin"], options["cosine_margin"] = r.choice(margins)
    target = torch.randint(r.choice([1, k]), (m,))
    target[torch.rand(m) < r.choice([0.0, 0.0, 0.2, 1.0])] = -100
    options["weight"] = torch.rand(k).double() if r.random() < 0.5 else None
    options["sample_weight"] = torch.rand(m).double().round(decimals=1) if r.random() < 0.5 else None
    upstream = torch.randn(m).double() if options["reduction"] == "none" else torch.tensor(1.5, dtype=torch.float64)
    features, prototypes = torch.randn(m, d).double(), torch.randn(k, d).double()
    temperature = torch.tensor(r.choice([0.01, 0.05, 0.1, 1.0]), dtype=torch.float64)
    wanted = r.choice([(True, True, True), (True, True, False), (True, False, True), (False, True, True)])

    def result(features: Tensor) -> tuple[Tensor, ...]:
        leaves = [
            x.clone().requires_grad_(wants)
            for x, wants in zip((features, prototypes, temperature), wanted, strict=True)
        ]
        value = loss(*leaves[:2], target, temperature=leaves[2], **options)
        return value.detach(), *torch.autograd.grad(value, [x for x in leaves if x.requires_grad], upstream)

    with nckernels.use_backend("reference"):
        expected = result(features)
    features[target == -100] = torch.nan  # nobody reads them
    workspace = round(2 ** r.uniform(14, 24))
    with num_threads(r.choice([1, 1, 2, 3])), nckernels.use_backend(backend), nckernels.use_workspace(workspace):
        found = result(features)
    named = {name: "given" if isinstance(value, Tensor) else value for name, value in options.items()}
    case = f"{loss.__name__} M={m} K={k} d={d} {named} wanted={wanted} workspace={workspace} {temperature=}"
    for value, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(
            value, reference, rtol=1e-10, atol=1e-10, equal_nan=True, msg=lambda m, c=case: f"{c}: {m}"
        )


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("backend", [name for name in CPU_BACKENDS if name != "reference"])
def test_random_losses(backend: str, part: int) -> None:
    for seed in range(part, CASES, 4):
        compare_loss(backend, seed)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
@pytest.mark.parametrize("backend", [name for name in CPU_BACKENDS if name != "reference"])
def test_many_random_losses(backend: str, part: int) -> None:
    for seed in range(CASES + part, CASES + SLOW_CASES, 10):
        compare_loss(backend, seed)
