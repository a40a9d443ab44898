"""Whole training steps on synthetic images: the share of a loss in a network's time and memory as the batch grows.

A step is forward, loss, backward and SGD. The network is ResNet-50 from torchvision or timm if one of them imports,
else this package's small ConvNet; the report names it. On CUDA images are 224 x 224 and the network runs under
autocast; on a CPU they are 32 x 32.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nckernels
from nckernels.train.models import make_network
from nckernels.train.recipe import Model

from .harness import Measured, Result, Session, exact, failure, fill, relative_error, runner
from .measure import Step
from .naive import FORMS
from .problems import TEMPERATURE, Problem
from .rivals import pairwise
from .variants import memory_room

KINDS = CLASSIFIER, SUPCON = "classifier step", "SupCon step"
CROSS_ENTROPY = "cross-entropy"
NAIVE_SUPCON = "naive SupCon"

_Loss = Callable[..., Tensor]
_LOSSES: dict[str, dict[str, tuple[str, str, _Loss | None]]] = {
    CLASSIFIER: {
        CROSS_ENTROPY: ("linear head and F.cross_entropy", "", None),
        "naive NONL": ("M x K logits", "nonl", lambda z, w, y: FORMS["nonl"](z, w, y, temperature=TEMPERATURE)),
        "M x M NTCE": ("[NCD] Eq. 4 as printed", "ntce", lambda z, w, y: pairwise("ntce", z, w, y)),
        "nckernels NTCE": (
            "this package", "ntce", lambda z, w, y: nckernels.ntce_loss(z, w, y, temperature=TEMPERATURE)
        ),
        "nckernels NONL": (
            "this package", "nonl", lambda z, w, y: nckernels.nonl_loss(z, w, y, temperature=TEMPERATURE)
        ),
    },
    SUPCON: {
        NAIVE_SUPCON: ("N x N logits", "supcon", lambda z, y: FORMS["supcon"](z, y, temperature=TEMPERATURE)),
        "nckernels SupCon": (
            "this package", "supcon", lambda z, y: nckernels.supcon_loss(z, y, temperature=TEMPERATURE)
        ),
    },
}  # fmt: skip


def steps(device: str) -> list[Problem]:
    """Growing batches, from small to large. SupCon's M counts both views."""
    sizes: tuple[int, ...]
    if device == "cpu":
        sizes, classes, d = (32, 64, 256, 1024), 100, 512
    else:
        sizes, classes, d = (64, 256, 512), 1000, 2048
    return [Problem(kind, m, classes, d if kind == CLASSIFIER else 128) for m in sizes for kind in _LOSSES]


def backbone(device: torch.device) -> tuple[nn.Module, str]:
    """A network that returns features, and its name."""
    if device.type == "cuda":
        for module, name in (("torchvision.models", "torchvision"), ("timm", "timm")):
            try:
                library = importlib.import_module(module)
            except Exception:  # with another build of torch they fail in many ways
                continue
            if name == "timm":
                return library.create_model("resnet50", num_classes=0), "ResNet-50 of timm"
            network = library.resnet50(weights=None)
            network.fc = nn.Identity()
            return network, "ResNet-50 of torchvision"
    return make_network(
        Model("convnet", width=32, dim=512), 3, 32
    ), "ConvNet of nckernels.train, 3 blocks, not ResNet-50"


def measure_step(problem: Problem, session: Session, seconds: float) -> Measured:
    """All losses of one kind at one batch size."""
    begin, device = time.perf_counter(), session.device
    network, name = backbone(device)
    network.to(device)
    side = 224 if device.type == "cuda" else 32
    images = torch.randn(problem.m, 3, side, side, device=device)
    if device.type == "cuda":
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = images.to(memory_format=torch.channels_last)
    with torch.no_grad():
        width = network.eval()(images[:1]).shape[1]
    network.train()
    target = torch.randint(problem.k, (problem.m,), device=device)
    results: dict[str, Result] = {}
    ready: dict[str, Step] = {}
    for variant, (note, loss, function) in _LOSSES[problem.loss].items():
        session.progress(f"{problem}: checking {variant}")
        result = results[variant] = Result(variant, f"{note}; {name}")
        matrix = problem.m**2 if problem.loss == SUPCON or variant.startswith("M x M") else 0
        if not result.ours and 24 * matrix > memory_room(device):
            result.absent = f"would take about {24 * matrix / 1e9:.0f} GB"
            continue
        try:
            if function is not None:
                result.error = _error(Problem(loss, min(problem.m, 256), problem.k, problem.d), function, session)
                if not result.error < 1e-1:
                    result.absent = f"wrong: relative error {result.error:.1e}"
                    continue
            ready[variant] = _step(network, width, images, target, problem, function, session)
            ready[variant]()
        except Exception as error:  # out of memory at this batch
            result.absent = failure(error, device)
            ready.pop(variant, None)
    baseline = CROSS_ENTROPY if problem.loss == CLASSIFIER else NAIVE_SUPCON
    left = max(0.2 * seconds, seconds - (time.perf_counter() - begin))
    fill(results, ready, session, left, baseline, str(problem))
    return Measured(problem, None, list(results.values()), baseline, f"{name}, images of {side} x {side}")


def _error(problem: Problem, function: _Loss, session: Session) -> float:
    leaves, target = problem.tensors(session.device, session.dtype)
    return relative_error(runner(function, leaves, target, False)(), exact(problem, leaves, target))


def _step(
    network: nn.Module,
    width: int,
    images: Tensor,
    target: Tensor,
    problem: Problem,
    function: _Loss | None,
    session: Session,
) -> Step:
    supervised = problem.loss == SUPCON
    head = nn.Linear(width, problem.d if supervised else problem.k, bias=False).to(images.device)
    optimizer = torch.optim.SGD([*network.parameters(), *head.parameters()], lr=1e-3)
    half = session.dtype != torch.float32

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(images.device.type, session.dtype if half else torch.bfloat16, enabled=half):
            features = network(images)
            if function is None:
                loss = F.cross_entropy(head(features), target)
            elif supervised:
                loss = function(head(features), target)
            else:
                loss = function(features, head.weight, target)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
