"""Arguments in the types that people have at hand: NumPy's numbers, small integers, views, half precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Backend
from torch import Tensor, nn

import nckernels

M, K, D = 6, 200, 4
LABELS = torch.tensor([156, 3, 156, 7, 100, 3])  # in uint8, 156 == -100
LOSSES: dict[str, Callable[..., Tensor]] = {
    "nonl": nckernels.nonl_loss,
    "nonl-instance": lambda *a, **kw: nckernels.nonl_loss(*a, direction="instance", **kw),
    "nonl-both": lambda *a, **kw: nckernels.nonl_loss(*a, direction="both", **kw),
    "nonl-sparse": lambda *a, **kw: nckernels.nonl_loss(*a, sparse=True, **kw),
    "ntce": nckernels.ntce_loss,
    "normface": nckernels.normface_loss,
    "normface-margin": lambda *a, **kw: nckernels.normface_loss(*a, angular_margin=0.1, **kw),
    "normface-smoothing": lambda *a, **kw: nckernels.normface_loss(*a, label_smoothing=0.1, **kw),
    "normface-part": lambda *a, **kw: nckernels.normface_loss(*a, class_fraction=0.9999, **kw),
    "dot_regression": nckernels.dot_regression_loss,
    "supcon": lambda x, w, y, **kw: nckernels.supcon_loss(x, y, **kw),
    "prototype": lambda x, w, y, **kw: nckernels.prototype_loss(x, y, **kw),
    "info_nce": lambda x, w, y, **kw: nckernels.info_nce_loss(x, w, y, **kw),
    "cosine_lse": lambda x, w, y, reduction="", **kw: nckernels.cosine_lse(x, w, y, 10.0, **kw)[0],
}
losses = pytest.mark.parametrize("loss", LOSSES)


def problem(device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, D, generator=g).to(device) for n in (M, K))
    return x, w.requires_grad_(), LABELS.to(device)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@losses
def test_small_integers_do_not_wrap_around(backend: Backend, loss: str, reduction: str) -> None:
    """An ignore_index that uint8 or int8 cannot hold is the index of no class."""
    x, w, y = problem(backend.device)
    expected = LOSSES[loss](x, w, y, reduction=reduction)
    assert torch.equal(LOSSES[loss](x, w, y.to(torch.uint8), reduction=reduction), expected)
    y = y.masked_fill(y == 156, 5)
    y[0] = -1  # 255 in uint8
    small = y.where(y >= 0, 5).to(torch.int8)
    expected = LOSSES[loss](x, w, small.long(), reduction=reduction)
    assert torch.equal(LOSSES[loss](x, w, small, ignore_index=251, reduction=reduction), expected)


def test_small_integers_in_modules() -> None:
    x, w, y = problem()
    small, fixed = y.to(torch.uint8), w.detach()
    makers: list[Callable[[], nn.Module]] = [
        lambda: nckernels.FixedPrototypeHead(fixed),
        lambda: nckernels.QueueLoss(nckernels.NONLLoss(prototypes=fixed), nckernels.FeatureQueue(8, D)),
        lambda: nckernels.RunningDenominatorLoss(nckernels.NTCELoss(prototypes=fixed)),
    ]
    for make in makers:
        modules = make(), make()
        for _ in range(2):
            assert torch.equal(modules[0](x, small), modules[1](x, y))
        for a, b in zip(modules[0].buffers(), modules[1].buffers(), strict=True):
            assert torch.equal(a, b)
    criterion = nckernels.NONLLoss(prototypes=nn.Parameter(fixed))
    micro = nckernels.MicroBatches(nn.Linear(D, D), 4)
    assert torch.equal(micro.stream(criterion, small, x), micro.stream(criterion, y, x))
    with pytest.raises(TypeError, match="target must hold class indices"):
        micro.stream(criterion, y.float(), x)


@losses
def test_numbers_of_numpy(loss: str) -> None:
    x, w, y = problem()
    with_temperature: dict[str, Any] = {} if loss in ("dot_regression", "cosine_lse") else {"temperature": 0.25}
    expected = LOSSES[loss](x, w, y, ignore_index=3, **with_temperature)
    numbers = {name: np.float32(value) for name, value in with_temperature.items()}
    assert torch.equal(LOSSES[loss](x, w, y, ignore_index=np.int64(3), **numbers), expected)


def test_numbers_of_numpy_in_modules() -> None:
    """They become Python's, which torch.compile and checkpoints take."""
    module = nckernels.NormFaceLoss(
        np.int64(D), np.int32(5), temperature=np.float32(0.25), ignore_index=np.int64(-1),
        label_smoothing=np.float32(0.25), angular_margin=np.float16(0.5), cosine_margin=np.float64(0.5),
    )  # fmt: skip
    assert module.prototypes.shape == (5, D)
    found = [
        module.temperature,
        module.ignore_index,
        module.label_smoothing,
        module.angular_margin,
        module.cosine_margin,
    ]
    assert found == [0.25, -1, 0.25, 0.5, 0.5]
    assert {type(x) for x in found} == {float, int}
    assert type(nckernels.PrototypeLoss(num_classes=np.int64(5)).num_classes) is int
    assert type(nckernels.UniformityLoss(t=np.float32(2)).t) is float
    assert type(nckernels.AlignmentLoss(alpha=np.int64(2)).alpha) is float
    points = torch.eye(4)
    head = nckernels.FixedPrototypeHead(points, momentum=np.float32(0.5), refresh_every=np.int64(7))
    assert type(head.momentum) is float
    assert type(head.refresh_every) is int
    x, y = torch.randn(20, D), torch.arange(20) % 5
    options = {"epochs": 2, "lr": 0.5, "batch_size": 8, "seed": 3, "momentum": 0.5}
    numpy = {name: (np.int32 if isinstance(value, int) else np.float32)(value) for name, value in options.items()}
    probe = nckernels.LinearProbe(np.int64(5), np.int32(D), **numpy).fit(x, y)  # type: ignore[arg-type]
    assert torch.equal(probe(x), nckernels.LinearProbe(5, D, **options).fit(x, y)(x))  # type: ignore[arg-type]
    assert type(nckernels.FixedPrototypes(np.int64(5), D, temperature=np.float32(0.5)).temperature) is float
    for wrong in (np.array(0.1), np.bool_(True), torch.tensor(3)):
        with pytest.raises(TypeError, match="ignore_index must be an int"):
            nckernels.NONLLoss(D, 5, ignore_index=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("loss", [name for name in LOSSES if name not in ("supcon", "prototype", "nonl-sparse")])
def test_views_that_are_not_contiguous(loss: str) -> None:
    """With their gradients."""
    y = LABELS
    wide = torch.randn(M, 2 * D).requires_grad_()
    columns = torch.randn(D, K).requires_grad_()
    got = LOSSES[loss](wide[:, ::2], columns.T, y.expand(M))
    found = torch.autograd.grad(got.sum(), (wide, columns))
    a, b = wide.detach()[:, ::2].contiguous().requires_grad_(), columns.detach().T.contiguous().requires_grad_()
    expected = LOSSES[loss](a, b, y)
    grads = torch.autograd.grad(expected.sum(), (a, b))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[0][:, ::2], grads[0], rtol=1e-5, atol=1e-6)
    assert not bool(found[0][:, 1::2].any())
    torch.testing.assert_close(found[1].T.to_dense(), grads[1].to_dense(), rtol=1e-5, atol=1e-6)


MESSAGES: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], object], str]] = {
    "probabilities": (
        lambda x, w, y: nckernels.nonl_loss(x, w, torch.rand(M, K)),
        r"target .*float32.* argmax\(-1\).* mixup",
    ),
    "one-hot": (
        lambda x, w, y: nckernels.normface_loss(x, w, nn.functional.one_hot(y, K)),
        r"target must have shape \(6,\).* got \(6, 200\); .*argmax\(-1\)",
    ),
    "booleans": (lambda x, w, y: nckernels.ntce_loss(x, w, y > 9), r"target .*bool; target\.long\(\)"),
    "mask": (lambda x, w, y: nckernels.ntce_loss(x, w, y, sample_weight=y > 9), r"sample_weight\.float\(\).*bool"),
    "logits of other columns": (
        lambda x, w, y: nckernels.NONLLoss(prototypes=w)(torch.rand(2, 7)),
        r"input must have d=4 columns, as the prototypes have, got \(2, 7\)",
    ),
    "logits of a list": (
        lambda x, w, y: nckernels.PrototypeClassifier(4, 5)([0.0] * 4),
        r"input must be a torch\.Tensor, got list",
    ),
    "feature maps": (
        lambda x, w, y: nckernels.normface_loss(torch.rand(2, D, 3, 3), w, torch.zeros(2, 3, 3, dtype=torch.int64)),
        rf"columns d, got \(2, {D}, 3, 3\) and .*; the d columns come last, input\.movedim\(1, -1\)",
    ),
    "sparse features": (
        lambda x, w, y: nckernels.supcon_loss(x.to_sparse(), y),
        r"input must be a dense tensor, got layout torch\.sparse_coo; input\.to_dense\(\)",
    ),
    "prototypes that were computed": (
        lambda x, w, y: nckernels.NONLLoss(prototypes=2 * nn.Parameter(w)),
        r"prototypes must be a Parameter or .*Mul.*prototypes\.detach\(\).* the function",
    ),
    "temperature that was computed": (
        lambda x, w, y: nckernels.CLIPLoss(temperature=nn.Parameter(torch.tensor(-2.0)).exp()),
        r"temperature must be a Parameter or .*Exp.*temperature\.detach\(\).* the function",
    ),
    "few keys": (
        lambda x, w, y: nckernels.info_nce_loss(x, x[:3]),
        r"without target .* key must have at least as many rows as query, got \(3, 4\) and \(6, 4\)",
    ),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_messages_say_what_to_do(case: str) -> None:
    call, message = MESSAGES[case]
    with pytest.raises((TypeError, ValueError), match=message):
        call(*problem())


def test_first_keys_are_the_positives(backend: Backend) -> None:
    """The batch's keys, then hard negatives or a queue."""
    q, k = torch.randn(5, D, device=backend.device), torch.randn(12, D, device=backend.device)
    explicit = torch.arange(5, device=backend.device)
    for decoupled in (False, True):
        got = nckernels.info_nce_loss(q, k, decoupled=decoupled, reduction="none")
        assert torch.equal(got, nckernels.info_nce_loss(q, k, explicit, decoupled=decoupled, reduction="none"))
        module = nckernels.InfoNCELoss(decoupled=decoupled, reduction="none")
        assert torch.equal(module(q, k), got)
    assert nckernels.info_nce_loss(q[:0], k) == 0.0
