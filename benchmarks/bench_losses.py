"""``make bench``: the losses under pytest-benchmark, one entry per loss and backend; --benchmark-compare works.

``python -m benchmarks`` takes longer, and adds rivals, memory and shares of the device's ceilings.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nckernels.backends import registry

from .harness import runner
from .problems import LOSSES, Problem, samples
from .rivals import BASELINE, RIVALS
from .variants import OURS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
PROBLEMS = {
    loss: Problem(loss, 1024, 1000, 256) if loss in ("nonl", "ntce", "normface") else samples(loss, 1024, 128)
    for loss in LOSSES
}
READY = [v for v in OURS if registry.explain(DEVICE, DTYPE)[v.name.split()[1]] == "ready"]
VARIANTS = [*READY, *(v for v in RIVALS if v.name == BASELINE)]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name.replace(" ", "-"))
@pytest.mark.parametrize("loss", LOSSES)
def test_speed(benchmark: Any, loss: str, variant: Any) -> None:
    problem = PROBLEMS[loss]
    leaves, target = problem.tensors(DEVICE, DTYPE)
    run = runner(variant.make(problem), leaves, target, False)

    def step() -> None:
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = str(problem)
    benchmark.pedantic(step, rounds=15, warmup_rounds=2)
