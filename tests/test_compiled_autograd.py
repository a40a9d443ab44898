"""Backward passes that torch.compile sees as one graph: torch._dynamo.config.compiled_autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import Backend
from torch import Tensor
from torch._dynamo import compiled_autograd

import nckernels

N, K, D = 12, 4, 8


def problem() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    sizes = {"x": (N, D), "k": (N, D), "w": (K, D), "views": (N // 2, 2, D)}
    return {name: torch.randn(size, generator=g).requires_grad_() for name, size in sizes.items()}


LOSSES: dict[str, Callable[..., Tensor]] = {
    "nonl": lambda x, w, y, **_: nckernels.nonl_loss(x, w, y),
    "nonl-none": lambda x, w, y, **_: nckernels.nonl_loss(x, w, y, reduction="none").sum(),
    "nonl-both": lambda x, w, y, **_: nckernels.nonl_loss(x, w, y, direction="both"),
    "ntce": lambda x, w, y, **_: nckernels.ntce_loss(x, w, y),
    "normface": lambda x, w, y, **_: nckernels.normface_loss(x, w, y),
    "normface-smoothing": lambda x, w, y, **_: nckernels.normface_loss(x, w, y, label_smoothing=0.1),
    "dot_regression": lambda x, w, y, **_: nckernels.dot_regression_loss(x, w, y),
    "supcon": lambda x, y, **_: nckernels.supcon_loss(x, y),
    "supcon-none": lambda x, y, **_: nckernels.supcon_loss(x, y, reduction="none").sum(),
    "supcon-views": lambda views, **_: nckernels.supcon_loss(views),
    "supcon-decoupled": lambda x, y, **_: nckernels.supcon_loss(x, y, decoupled=True),
    "prototype": lambda x, y, **_: nckernels.prototype_loss(x, y),
    "info_nce": lambda x, k, **_: nckernels.info_nce_loss(x, k),
    "clip": lambda x, k, **_: nckernels.clip_loss(x, k),
    "uniformity": lambda x, **_: nckernels.uniformity_loss(x),
    "alignment": lambda x, k, **_: nckernels.alignment_loss(x, k),
    "cosine_lse-self": lambda x, y, **_: nckernels.cosine_lse(x, x, y, 10.0, exclude="self")[0].sum(),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_those_of_eager_mode(backend: Backend, loss: str) -> None:
    results = []
    for compiled in (False, True):
        leaves = {name: x.detach().to(backend.device).requires_grad_() for name, x in problem().items()}
        value = LOSSES[loss](**leaves, y=torch.arange(N, device=backend.device) % K)
        if compiled:
            with compiled_autograd._enable(lambda graph: graph):  # traced, and run as it is
                value.backward()
        else:
            value.backward()
        results.append({name: x.grad for name, x in leaves.items() if x.grad is not None})
    eager, traced = results
    assert traced.keys() == eager.keys()
    for name, expected in eager.items():
        torch.testing.assert_close(traced[name], expected, rtol=1e-6, atol=1e-6)
