"""Sparse gradients of the prototypes, and NormFace over a random part of the classes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Backend
from torch import Tensor

import nckernels
from nckernels import _compact

SAMPLES, CLASSES, DIM = 24, 60, 7
LOSSES: dict[str, Callable[..., Tensor]] = {"nonl": nckernels.nonl_loss, "ntce": nckernels.ntce_loss}
names = pytest.mark.parametrize("name", LOSSES)
reductions = pytest.mark.parametrize("reduction", ["none", "mean", "sum"])


def batch(dtype: torch.dtype = torch.float64, device: str = "cpu", seed: int = 0) -> dict[str, Tensor]:
    """Few of the classes, some of them often; a sample that is ignored and holds NaN."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(SAMPLES, DIM, generator=g, dtype=torch.float64)
    w = torch.randn(CLASSES, DIM, generator=g, dtype=torch.float64)
    y = torch.randint(CLASSES // 3, (SAMPLES,), generator=g) * 3
    y[4] = -100
    x[4] = math.nan
    temperature = torch.tensor(0.2, dtype=torch.float64)
    of_loss = torch.promote_types(dtype, torch.float32)
    leaves = {"input": x.to(dtype), "prototypes": w.to(dtype), "temperature": temperature.to(of_loss)}
    weight = torch.rand(CLASSES, generator=g, dtype=torch.float64).to(of_loss)
    return {
        **{name: value.to(device).requires_grad_() for name, value in leaves.items()},
        "target": y.to(device),
        "weight": weight.to(device),
    }


def gradients(loss: Callable[..., Tensor], b: dict[str, Tensor], **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and the gradients of what makes one number of it."""
    value = loss(**b, **options)
    leaves = {name: x for name, x in b.items() if x.requires_grad}
    weights = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype, device=value.device).view(value.shape)
    grads = torch.autograd.grad((value * weights).sum(), list(leaves.values()))
    return value.detach(), dict(zip(leaves, grads, strict=True))


def assert_same(a: Tensor, b: Tensor) -> None:
    """To float precision, relative to the largest entry."""
    tolerance = 1e-12 if a.dtype == torch.float64 else 1e-6
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * max(1.0, float(b.nan_to_num().abs().max())))


# --- sparse gradients ----------------------------------------------------------------------------


@names
@reductions
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=lambda t: str(t)[6:])
def test_the_sparse_gradient_is_the_dense_one(backend: Backend, name: str, reduction: str, dtype: torch.dtype) -> None:
    backend.require(dtype)
    b = batch(dtype, backend.device)
    value, dense = gradients(LOSSES[name], b, reduction=reduction)
    same, sparse = gradients(LOSSES[name], b, reduction=reduction, sparse=True)
    found = sparse.pop("prototypes")
    assert found.layout == torch.sparse_coo
    assert found.dtype == dtype
    expected = dense.pop("prototypes")
    if dtype == torch.bfloat16:  # rounded once, from sums in another order
        torch.testing.assert_close(found.to_dense(), expected, rtol=2**-7, atol=1e-6)
        return
    assert_same(found.to_dense(), expected)
    assert_same(same, value)
    for leaf in dense:
        assert_same(sparse[leaf], dense[leaf])


@names
def test_rows_are_those_of_the_classes_in_the_batch(backend: Backend, name: str) -> None:
    b = batch(torch.float32, backend.device)
    grad = gradients(LOSSES[name], b, sparse=True)[1]["prototypes"]
    own = b["target"][b["target"] >= 0].unique()
    assert torch.equal(grad.coalesce().indices()[0], own)
    assert grad._nnz() <= (len(own) + 1 if backend.device == "cpu" else SAMPLES)


@names
def test_compiled(name: str) -> None:
    """As on a GPU nobody knows how many classes there are; no row of an absent class is touched all the same."""
    b = batch(torch.float32)
    compiled = torch.compile(LOSSES[name], fullgraph=True, backend="aot_eager")
    value, found = gradients(compiled, b, sparse=True)
    assert found["prototypes"]._nnz() == SAMPLES
    expected_value, expected = gradients(LOSSES[name], b, sparse=True)
    assert_same(value, expected_value)
    a, e = found.pop("prototypes").coalesce(), expected.pop("prototypes").coalesce()
    assert torch.equal(a.indices(), e.indices())
    assert_same(a.values(), e.values())
    for leaf in expected:
        assert_same(found[leaf], expected[leaf])


@names
def test_optimisers(name: str) -> None:
    """SGD does what it does with dense gradients; SparseAdam leaves the other rows and their moments alone."""
    b = batch()
    x, y = b["input"].detach(), b["target"]
    dense, sparse, adam = (nckernels.PrototypeClassifier(DIM, CLASSES, loss=name).double() for _ in range(3))
    for module in (sparse, adam):
        module.load_state_dict(dense.state_dict())
        module.criterion.sparse = True
    start = dense.prototypes.detach().clone()
    optimisers = [torch.optim.SGD(m.parameters(), lr=0.3) for m in (dense, sparse)]
    optimisers.append(torch.optim.SparseAdam(adam.parameters(), lr=0.3))
    for step in range(3):
        target = torch.where(y >= 0, (y + 3 * step) % 30, y)
        for module, optimiser in zip((dense, sparse, adam), optimisers, strict=True):
            optimiser.zero_grad()
            module.loss(x, target).backward()
            module.loss(x[:9], target[:9]).backward()  # gradients add up
            optimiser.step()
    assert_same(sparse.prototypes.detach(), dense.prototypes.detach())
    seen = (adam.prototypes != start).any(1).nonzero()[:, 0]
    assert 10 <= len(seen) <= 12
    assert torch.equal(seen, (dense.prototypes != start).any(1).nonzero()[:, 0])
    assert torch.equal(adam.prototypes[1::3], start[1::3])


@names
@reductions
@pytest.mark.parametrize("target", [[], [-100, -100], [5]], ids=["empty", "ignored", "one"])
def test_degenerate_batches(backend: Backend, name: str, reduction: str, target: list[int]) -> None:
    """The same results and gradients, NaN too, as with dense ones."""
    y = torch.tensor(target, dtype=torch.int32, device=backend.device)
    x = torch.ones(len(y), DIM, device=backend.device, requires_grad=True)
    w = torch.eye(CLASSES, DIM, device=backend.device, requires_grad=True)
    results = []
    for sparse in (False, True):
        value = LOSSES[name](x, w, y, reduction=reduction, sparse=sparse)
        dx, dw = torch.autograd.grad(value.sum(), [x, w])
        assert dw.is_sparse == sparse
        results.append((value.detach(), dx, dw.to_dense()))
    for dense, found in zip(*results, strict=True):
        torch.testing.assert_close(found, dense, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_autocast() -> None:
    b = batch(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        _, dense = gradients(nckernels.nonl_loss, b)
        _, sparse = gradients(nckernels.nonl_loss, b, sparse=True)
    assert sparse["prototypes"].dtype == torch.float32
    torch.testing.assert_close(sparse["prototypes"].to_dense(), dense["prototypes"], rtol=2**-7, atol=1e-6)


def test_modules_hand_it_on() -> None:
    b = batch(torch.float32)
    for module in (nckernels.NONLLoss, nckernels.NTCELoss):
        criterion = copy.deepcopy(module(DIM, CLASSES, sparse=True))
        criterion(b["input"], b["target"]).backward()
        assert criterion.prototypes.grad.is_sparse
    criterion = nckernels.NormFaceLoss(DIM, CLASSES, sparse=True, class_fraction=0.5)
    criterion(b["input"], b["target"]).backward()
    assert criterion.prototypes.grad.is_sparse


def test_errors() -> None:
    b = batch(torch.float32)
    for direction in ("instance", "both"):
        with pytest.raises(ValueError, match="sparse=True needs direction='class'"):
            nckernels.nonl_loss(**b, sparse=True, direction=direction)
        with pytest.raises(ValueError, match="sparse=True needs direction='class'"):
            nckernels.NONLLoss(DIM, CLASSES, sparse=True, direction=direction)
    for loss in (*LOSSES.values(), lambda **k: nckernels.normface_loss(**k, class_fraction=0.5)):
        for bad in (-1, CLASSES):
            with pytest.raises(ValueError, match=f"target must lie in .*got {bad}"):
                loss(**{**b, "target": b["target"].clamp_min(bad).clamp_max(max(bad, 0))}, sparse=True)
    with pytest.raises(ValueError, match="sparse=True needs class_fraction below 1"):
        nckernels.normface_loss(**b, sparse=True)
    with pytest.raises(ValueError, match="sparse=True needs class_fraction below 1"):
        nckernels.NormFaceLoss(DIM, CLASSES, sparse=True)
    for fraction in (0.0, -0.5, 1.5, math.nan):
        with pytest.raises(ValueError, match="class_fraction must be above 0 and at most 1"):
            nckernels.normface_loss(**b, class_fraction=fraction)
    with pytest.raises(ValueError, match=r"label_smoothing=0.1 needs all classes"):
        nckernels.normface_loss(**b, class_fraction=0.5, label_smoothing=0.1)
    with pytest.raises(TypeError, match="class_fraction must be a number"):
        nckernels.NormFaceLoss(DIM, CLASSES, class_fraction="half")


# --- a part of the classes -----------------------------------------------------------------------


def part_of_classes(b: dict[str, Tensor], fraction: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return _compact.sampled(b["target"], b["target"] == -100, CLASSES, fraction, generator)


@reductions
@pytest.mark.parametrize("margins", [{}, {"cosine_margin": 0.2}, {"angular_margin": 0.3}], ids=["", "cos", "arc"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_sampled_softmax(backend: Backend, reduction: str, margins: dict[str, float], sparse: bool) -> None:
    """NormFace of the classes that were drawn."""
    b = batch(torch.float32, backend.device)
    g = torch.Generator(backend.device)
    classes, slot = part_of_classes(b, 0.6, g.manual_seed(3))
    assert len(classes) == 36
    index = slot.masked_fill(b["target"] == -100, -100)
    w = b["prototypes"]
    some = {**b, "prototypes": w[classes], "target": index, "weight": b["weight"][classes]}
    expected = nckernels.normface_loss(**some, **margins, reduction=reduction)
    found = nckernels.normface_loss(
        **b, **margins, reduction=reduction, class_fraction=0.6, generator=g.manual_seed(3), sparse=sparse
    )
    assert_same(found.detach(), expected.detach())
    leaves = [b["input"], w, b["temperature"]]
    for got, want in zip(*(torch.autograd.grad(v.sum(), leaves) for v in (found, expected)), strict=True):
        assert_same(got.to_dense() if got.is_sparse else got, want)
    if not margins and reduction == "mean":
        rows = F.normalize(b["input"]).nan_to_num() @ F.normalize(w[classes]).T / b["temperature"]
        assert_same(found.detach(), F.cross_entropy(rows, index, weight=b["weight"][classes]).detach())


def test_what_is_drawn() -> None:
    """The batch's classes always, without those of ignored samples; every other one as often as the rest."""
    b = batch()
    b["target"][5] = -100
    own = b["target"][b["target"] >= 0].unique()
    g = torch.Generator().manual_seed(0)
    times, draws, fraction = torch.zeros(CLASSES), 4000, 0.55
    for _ in range(draws):
        classes, slot = part_of_classes(b, fraction, g)
        assert len(classes) == 33
        assert torch.equal(classes, classes.unique())
        assert torch.equal(classes[slot][b["target"] >= 0], b["target"][b["target"] >= 0])
        times[classes] += 1
    assert (times[own] == draws).all()
    others = torch.ones(CLASSES, dtype=torch.bool)
    others[own] = False
    chance = (33 - len(own)) / int(others.sum())
    assert 0.2 < chance < 0.6
    deviation = (times[others] / draws - chance) / math.sqrt(chance * (1 - chance) / draws)
    assert deviation.abs().max() < 4.0
    assert 0.7 < deviation.square().mean() < 1.3


def test_how_many_are_drawn() -> None:
    """A fraction, rounded up, and at least as many as there are samples."""
    for samples, fraction, expected in ((3, 0.5, 30), (3, 0.01, 3), (0, 0.01, 1), (24, 0.01, 24), (100, 0.1, 60)):
        target = torch.arange(samples) % 2
        for left_out in (target < 0, target >= 0, target == 0):
            classes, _ = _compact.sampled(target, left_out, CLASSES, fraction, None)
            assert len(classes) == expected


def test_the_seed_determines_it() -> None:
    b = batch(torch.float32)
    loss = {"class_fraction": 0.5}

    def seeded(seed: int) -> Tensor:
        return nckernels.normface_loss(**b, **loss, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(seeded(1), seeded(1))
    assert not torch.equal(seeded(1), seeded(2))
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        results.append([nckernels.normface_loss(**b, **loss) for _ in range(2)])
    assert torch.equal(*(torch.stack(r) for r in results))
    assert not torch.equal(*results[0])
    criterion = nckernels.NormFaceLoss(DIM, CLASSES, class_fraction=0.5, generator=torch.Generator().manual_seed(1))
    again = copy.deepcopy(criterion)
    x = b["input"].nan_to_num()
    assert torch.equal(criterion(x, b["target"]), again(x, b["target"]))


def test_bias() -> None:
    """Below the whole loss, by little more than log 1/r at most for random features; exact once all are drawn."""
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(32, 16, generator=g), torch.randn(2000, 16, generator=g)
    y = torch.randint(2000, (32,), generator=g)
    whole = nckernels.normface_loss(x, w, y, reduction="none")
    missing = [
        whole - nckernels.normface_loss(x, w, y, reduction="none", class_fraction=0.25, generator=g) for _ in range(50)
    ]
    assert all((m >= 0).all() for m in missing)
    mean = torch.stack(missing).mean(0)
    assert (mean > 0.5 * math.log(4)).all()
    assert (mean < 1.25 * math.log(4)).all()
    few = w[:32]
    assert_same(nckernels.normface_loss(x, few, y % 32, class_fraction=0.1), nckernels.normface_loss(x, few, y % 32))
