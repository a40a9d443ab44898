"""Steps on a CPU where the positives have probabilities near 1, from which eager PyTorch subtracts 1."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from learnt import TEMPERATURES, eager, evaluate, ours, problem, relative

import nckernels
from nckernels.backends import native

NATIVE = pytest.mark.skipif(native.BACKEND.missing() is not None, reason=str(native.BACKEND.missing()))
CASES = [
    *(pytest.param("native", loss, marks=NATIVE) for loss in TEMPERATURES),
    *(("chunked", loss) for loss in TEMPERATURES),
]


@pytest.mark.parametrize(("backend", "loss"), CASES)
@pytest.mark.parametrize(("k", "spread"), [(20, 0.02), (60, 0.02), (20, 0.001)])
def test_errors_of_learnt_samples(k: int, spread: float, backend: str, loss: str) -> None:
    """An error is a few roundings of the logits: a few times the effect of rounding each of them once. Eager PyTorch's
    is up to 1000 times that. 20 classes fit the kernels for few classes."""
    tau = TEMPERATURES[loss]
    errors, rounded = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for seed in range(4):
        z, w, y = problem(loss, k, 96, spread, seed)
        exact = evaluate(eager, loss, z, w, y, tau, torch.float64)
        once = evaluate(partial(eager, rounding=2.0**-24), loss, z, w, y, tau, torch.float64)
        with nckernels.use_backend(backend):
            got = evaluate(ours, loss, z, w, y, tau, torch.float32)
        for total, found in ((errors, got), (rounded, once)):
            total += relative(found, exact)
    # The effect on a number varies more than that on the norm of a gradient.
    allowed = 4 * 16 * 2.0**-24 / tau + torch.tensor([8.0, 3.0, 3.0, 8.0]) * rounded
    assert (errors <= allowed).all(), (errors.tolist(), allowed.tolist())
