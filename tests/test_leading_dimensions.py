"""Features (..., d) with targets (...): the loss of their rows, in the shape of the targets."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nckernels
from nckernels._common import as_rows

D, K = 6, 5
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "nonl": ("nonl", {}),
    "nonl-instance": ("nonl", {"direction": "instance"}),
    "nonl-both": ("nonl", {"direction": "both"}),
    "nonl-sparse": ("nonl", {"sparse": True}),
    "ntce": ("ntce", {}),
    "normface": ("normface", {}),
    "normface-margin": ("normface", {"angular_margin": 0.2}),
    "normface-smoothing": ("normface", {"label_smoothing": 0.1}),
    "dot_regression": ("dot_regression", {}),
}
MODULES = {
    "nonl": nckernels.NONLLoss,
    "ntce": nckernels.NTCELoss,
    "normface": nckernels.NormFaceLoss,
    "dot_regression": nckernels.DotRegressionLoss,
}
SHAPES = [(2, 3), (2, 1, 4), (), (0, 3), (3, 0)]
cases = pytest.mark.parametrize("case", CASES)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def function(name: str) -> Callable[..., Tensor]:
    return getattr(nckernels, f"{name}_loss")


def features(*shape: int) -> Tensor:
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(1)).requires_grad_()


def labels(*shape: int) -> Tensor:
    """Some of them to ignore."""
    y = torch.randint(-1, K, shape, generator=torch.Generator().manual_seed(2))
    return y.masked_fill(y < 0, -100)


def prototypes() -> Tensor:
    return torch.randn(K, D, generator=torch.Generator().manual_seed(3)).requires_grad_()


def grads(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    upstream = torch.arange(1.0, loss.numel() + 1).reshape(loss.shape)
    return [g.to_dense() for g in torch.autograd.grad(loss, inputs, upstream)]


def same(got: Tensor, expected: Tensor, x: Tensor, rows: Tensor, *others: Tensor) -> None:
    """Bit for bit, gradients too."""
    torch.testing.assert_close(got.reshape(-1), expected.reshape(-1), rtol=0, atol=0, equal_nan=True)
    found, truth = grads(got, x, *others), grads(expected, rows, *others)
    truth[0] = truth[0].reshape(x.shape)
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@shapes
@cases
def test_losses_with_prototypes(case: str, shape: tuple[int, ...], reduction: str) -> None:
    name, options = CASES[case]
    x, y, w = features(*shape), labels(*shape), prototypes()
    weights = {"weight": torch.linspace(0.5, 2.0, K), "sample_weight": torch.rand(shape)}
    rows = x.detach().reshape(-1, D).requires_grad_()
    got = function(name)(x, w, y, reduction=reduction, **weights, **options)
    assert got.shape == (shape if reduction == "none" else ())
    weights["sample_weight"] = weights["sample_weight"].reshape(-1)
    expected = function(name)(rows, w, y.reshape(-1), reduction=reduction, **weights, **options)
    same(got, expected, x, rows, w)


@cases
def test_modules(case: str) -> None:
    name, options = CASES[case]
    x, y, weight, w = features(2, 3), labels(2, 3), torch.rand(2, 3), nn.Parameter(prototypes())
    module = MODULES[name](prototypes=w, reduction="none", **options)
    expected = function(name)(x, w, y, sample_weight=weight, reduction="none", **options)
    assert torch.equal(module(x, y, weight), expected)
    assert module(x).shape == (2, 3, K)
    if case in ("nonl", "ntce", "normface"):
        head = nckernels.PrototypeClassifier(prototypes=w, loss=name, reduction="none")  # type: ignore[arg-type]
        assert torch.equal(head(x, y, weight), expected)
        assert torch.equal(head.loss(x, y, sample_weight=weight), expected)


@pytest.mark.parametrize("assignment", ["static", "dynamic"])
def test_fixed_prototype_head(assignment: Any) -> None:
    x, y, points = features(2, 3), labels(2, 3), prototypes().detach()
    heads = [nckernels.FixedPrototypeHead(points, assignment=assignment, reduction="none") for _ in range(2)]
    rows = x.detach().reshape(-1, D).requires_grad_()
    got, expected = heads[0](x, y), heads[1](rows, y.reshape(-1))
    assert got.shape == (2, 3)
    same(got, expected, x, rows)
    assert torch.equal(heads[0].representatives, heads[1].representatives)


def test_queue_and_running_denominators() -> None:
    x, y, weight = features(2, 3), labels(2, 3), torch.rand(2, 3)
    rows = x.detach().reshape(-1, D).requires_grad_()
    for reduction in ("none", "mean"):
        queues = []
        for _ in range(2):
            criterion = nckernels.NONLLoss(prototypes=prototypes().detach(), reduction=reduction)  # type: ignore[arg-type]
            queues.append(nckernels.QueueLoss(criterion, nckernels.FeatureQueue(8, D)))
        for _ in range(2):  # the second call meets the batch of the first one
            got, expected = queues[0](x, y, weight), queues[1](rows, y.reshape(-1), weight.reshape(-1))
            assert got.shape == ((2, 3) if reduction == "none" else ())
            same(got, expected, x, rows)
    runs = [nckernels.RunningDenominatorLoss(nckernels.NTCELoss(prototypes=prototypes().detach())) for _ in range(2)]
    same(runs[0](x, y, weight), runs[1](rows, y.reshape(-1), weight.reshape(-1)), x, rows)


@pytest.mark.parametrize("shape", [(2, 3), (2, 1, 4), (), (0, 3)], ids=str)
@pytest.mark.parametrize("name", ["supcon", "prototype"])
def test_samples_with_a_label_each(name: str, shape: tuple[int, ...]) -> None:
    x, y, weight = features(*shape), labels(*shape), torch.rand(shape)
    rows = x.detach().reshape(-1, D).requires_grad_()
    for reduction in ("none", "mean"):
        got = function(name)(x, y, sample_weight=weight, reduction=reduction)
        assert got.shape == (shape if reduction == "none" else ())
        same(got, function(name)(rows, y.reshape(-1), sample_weight=weight.reshape(-1), reduction=reduction), x, rows)


@pytest.mark.parametrize("name", ["supcon", "prototype"])
def test_a_label_for_all_views_of_a_sample_remains_one(name: str) -> None:
    x, y = features(4, 2), labels(4)
    assert torch.equal(function(name)(x, y), function(name)(x, y[:, None].expand(4, 2)))


def test_alignment() -> None:
    x, other = features(2, 3), torch.randn(2, 3, D)
    rows = x.detach().reshape(-1, D).requires_grad_()
    for reduction in ("none", "mean"):
        got = nckernels.alignment_loss(x, other, reduction=reduction)  # type: ignore[arg-type]
        assert got.shape == ((2, 3) if reduction == "none" else ())
        same(got, nckernels.alignment_loss(rows, other.reshape(-1, D), reduction=reduction), x, rows)  # type: ignore[arg-type]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "flat target": ({"target": labels(6)}, r"target must have shape \(2, 3\).* input .*\(2, 3, 6\), got \(6,\)"),
    "other target": ({"target": labels(3, 2)}, r"target must have shape \(2, 3\).*, got \(3, 2\)"),
    "target of classes": ({"target": torch.rand(2, 3, K)}, r"target must have shape \(2, 3\).*, got \(2, 3, 5\)"),
    "target list": ({"target": [[0] * 3] * 2}, r"target must be a torch\.Tensor, got list"),
    "float target": ({"target": torch.rand(2, 3)}, r"target must hold class indices"),
    "flat weight": ({"sample_weight": torch.rand(6)}, r"sample_weight must have shape \(2, 3\).*, got \(6,\)"),
    "weight list": ({"sample_weight": [[0.0] * 3] * 2}, r"sample_weight must be a torch\.Tensor, got list"),
    "one feature, many targets": ({"input": features(), "target": labels(6)}, r"target must have shape \(\), .*\(6,\)"),
    "number": ({"input": torch.tensor(1.0)}, r"input must have shape \(M, d\) or \(\.\.\., d\), got \(\)"),
    "columns": (
        {"input": torch.randn(2, 3, 4)},
        r"input and prototypes must have the same number of columns d, got \(2, 3, 4\) and \(5, 6\)",
    ),
    "no columns": (
        {"input": torch.randn(2, 3, 0), "prototypes": torch.randn(K, 0)},
        r"input must have d >= 1 columns, got \(2, 3, 0\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("name", MODULES)
def test_the_offender_is_named(name: str, case: str) -> None:
    arguments, message = REFUSED[case]
    valid = {"input": features(2, 3), "prototypes": prototypes(), "target": labels(2, 3)}
    with pytest.raises((TypeError, ValueError), match=message):
        function(name)(**{**valid, **arguments})


@pytest.mark.parametrize(
    "module",
    [
        nckernels.FixedPrototypeHead(torch.eye(K, D)),
        nckernels.QueueLoss(nckernels.SupConLoss(), nckernels.FeatureQueue(8, D)),
        nckernels.RunningDenominatorLoss(nckernels.NTCELoss(D, K)),
    ],
    ids=["fixed", "queue", "running"],
)
def test_modules_report_the_shape_that_was_given(module: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"columns.*, got \(2, 3, 4\)"):
        module(torch.randn(2, 3, 4), labels(2, 3))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: nckernels.uniformity_loss(x),
        lambda x: nckernels.clip_loss(x, x),
        lambda x: nckernels.info_nce_loss(x, x),
    ],
    ids=["uniformity", "clip", "info_nce"],
)
def test_where_it_would_be_ambiguous_it_is_refused(call: Callable[[Tensor], Tensor]) -> None:
    """All rows with all others, or each leading index for itself."""
    with pytest.raises(ValueError, match=re.escape("flatten(0, -2)")):
        call(features(2, 3))


def test_rows_are_views() -> None:
    x, y, weight = features(2, 3), labels(2, 3), torch.rand(2, 3)
    for given, rows in zip((x, y, weight), as_rows(x, y, weight), strict=True):
        assert rows is not None
        assert rows.data_ptr() == given.data_ptr()


def test_strides_of_any_kind() -> None:
    x, y, w = torch.randn(D, 3, 2).permute(2, 1, 0), torch.tensor([1]).expand(2, 3), prototypes()
    got = nckernels.nonl_loss(x, w, y, direction="instance", reduction="none")
    assert torch.equal(got, nckernels.nonl_loss(x.contiguous(), w, y.clone(), direction="instance", reduction="none"))


@pytest.mark.parametrize("name", ["nonl", "normface"])
def test_compiled(name: str) -> None:
    """As one graph, for any sizes."""
    compiled = torch.compile(
        lambda x, w, y: function(name)(x, w, y, reduction="none"), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for shape in ((2, 3), (4, 5)):
        x, y, w = features(*shape), labels(*shape), prototypes()
        got, expected = compiled(x, w, y), function(name)(x, w, y, reduction="none")
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
        for a, b in zip(grads(got, x, w), grads(expected, x, w), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["nonl", "normface", "supcon"])
def test_micro_batches(name: str) -> None:
    """An encoder of sequences, with a label for each of their steps."""
    torch.manual_seed(0)
    encoder, x, y = nn.Linear(4, D).double(), torch.randn(5, 3, 4).double(), labels(5, 3)
    criterion: Any = nckernels.SupConLoss() if name == "supcon" else MODULES[name](D, K, dtype=torch.float64)
    expected = criterion(encoder(x), y)
    truth = torch.autograd.grad(expected, list(encoder.parameters()))
    micro = nckernels.MicroBatches(encoder, 2)

    def check(loss: Tensor) -> None:
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-12)
        for p, grad in zip(encoder.parameters(), truth, strict=True):
            torch.testing.assert_close(p.grad, grad, rtol=1e-10, atol=1e-12)
        encoder.zero_grad()

    loss = criterion(micro(x), y)
    loss.backward()
    micro.backward()
    check(loss.detach())
    if name != "supcon":
        check(micro.stream(criterion, y, x))
