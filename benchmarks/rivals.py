"""The alternatives, each with the same mathematics as ours and a note on what it computes.

A library with a linear cross-entropy (the softmax of a linear layer) computes NormFace from normalised rows. The M x M
form of NTCE ([NCD] Eq. 4) is such a softmax too, with the prototypes of the samples as rows and the samples as
classes, and CLIP is two of them, one per direction. All three are therefore timed with every such library. NONL, which
excludes a sample's whole class, and SupCon cannot be computed that way.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .naive import FORMS
from .problems import TEMPERATURE, Problem
from .variants import LossFunction, Variant, matrix

BASELINE = "naive eager"

# --- what a user would write -------------------------------------------------------------------------------


def pairwise(loss: str, z: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """The M x M form of the paper's Eqs. 4-5: row i has the prototype of sample i's class against every sample."""
    logits = F.normalize(w)[y] @ F.normalize(z).T / TEMPERATURE
    pos = logits.diagonal()
    if loss == "nonl":
        logits = logits.masked_fill(y[:, None] == y, -torch.inf)
    return (torch.logsumexp(logits.float(), 1) - pos).mean()


def naive(problem: Problem) -> LossFunction:
    """The form of naive.py."""
    return problem.bound(FORMS[problem.loss])


def _pairwise(problem: Problem) -> LossFunction:
    return partial(pairwise, problem.loss)


def _compiled(problem: Problem) -> LossFunction:
    torch._dynamo.reset()
    return torch.compile(naive(problem), dynamic=False)


def _no_pairwise(problem: Problem, *_: Any) -> str | None:
    return None if problem.loss in ("nonl", "ntce") else "NONL and NTCE only"


def _pairs(problem: Problem) -> int:
    return problem.m**2


# --- libraries of linear cross-entropy ---------------------------------------------------------------------

LinearCrossEntropy = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(rows, classes, target) -> mean cross-entropy of rows @ classes.T."""


def _from_linear(load: Callable[[], LinearCrossEntropy]) -> Callable[[Problem], LossFunction]:
    """NormFace, NTCE and CLIP from a linear cross-entropy."""

    def make(problem: Problem) -> LossFunction:
        linear = load()

        def loss(z: Tensor, w: Tensor, y: Tensor) -> Tensor:
            unit_z, unit_w = F.normalize(z), F.normalize(w)
            if problem.loss == "normface":
                return linear(unit_z / TEMPERATURE, unit_w, y)
            each = torch.arange(len(y), device=y.device)
            if problem.loss == "ntce":
                return linear(unit_w[y] / TEMPERATURE, unit_z, each)
            return (linear(unit_z / TEMPERATURE, unit_w, each) + linear(unit_w / TEMPERATURE, unit_z, each)) / 2

        return loss

    return make


def _torch_linear(chunked: bool) -> LinearCrossEntropy:
    options = torch.nn.LinearCrossEntropyOptions() if chunked else None
    return partial(F.linear_cross_entropy, options=options)


def _liger() -> LinearCrossEntropy:
    loss = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss(
        accum_dtype=torch.float32
    )
    return lambda rows, classes, target: loss(classes, rows, target)


def _cce(filter_eps: str | None) -> LinearCrossEntropy:
    return partial(importlib.import_module("cut_cross_entropy").linear_cross_entropy, filter_eps=filter_eps)


def _quack() -> LinearCrossEntropy:
    return importlib.import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy


def _inf_cl() -> LinearCrossEntropy:
    function = importlib.import_module("inf_cl").cal_flash_loss

    def linear(rows: Tensor, classes: Tensor, target: Tensor) -> Tensor:
        head = max(size for size in (16, 32, 64, 128, 256) if rows.shape[1] % size == 0)
        return function(rows, classes, target, None, head).mean()

    return linear


def _linear_only(problem: Problem, device: torch.device, dtype: torch.dtype) -> str | None:
    return None if problem.loss in ("normface", "ntce", "clip") else "computes NormFace, NTCE and CLIP only"


def _needs(module: str, *, cuda: bool = True, of: int = 1) -> Callable[..., str | None]:
    """A check that the loss is a linear cross-entropy, sizes are multiples of ``of``, and the module imports."""

    def why_not(problem: Problem, device: torch.device, dtype: torch.dtype) -> str | None:
        if reason := _linear_only(problem, device, dtype):
            return reason
        if cuda and device.type != "cuda":
            return "needs CUDA"
        if any(size % of for size in (problem.m, problem.k, problem.d)):
            return f"needs sizes that are multiples of {of}"
        return _not_importable(module)

    return why_not


@cache
def _not_importable(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except Exception as error:  # libraries fail to import in many ways
        if isinstance(error, ModuleNotFoundError) and error.name == module.split(".")[0]:
            return "not installed"
        return f"does not import: {type(error).__name__}: {str(error)[:80]}"
    return None


def _no_torch_linear(problem: Problem, device: torch.device, dtype: torch.dtype) -> str | None:
    if reason := _linear_only(problem, device, dtype):
        return reason
    return None if hasattr(F, "linear_cross_entropy") else f"torch {torch.__version__} does not have it"


def _linear_matrix(problem: Problem) -> int:
    return _pairs(problem) if problem.loss == "ntce" else matrix(problem)


# --- pytorch-metric-learning -------------------------------------------------------------------------------

_METRIC = {"supcon": "SupConLoss", "normface": "NormalizedSoftmaxLoss", "simclr": "NTXentLoss"}


def _metric_learning(problem: Problem) -> LossFunction:
    losses = importlib.import_module("pytorch_metric_learning.losses")
    if problem.loss == "normface":
        module = losses.NormalizedSoftmaxLoss(problem.k, problem.d, temperature=TEMPERATURE)

        def normface(z: Tensor, w: Tensor, y: Tensor) -> Tensor:
            # its parameter is (d, K); the gradient goes to our w through the transpose
            return torch.func.functional_call(module, {"W": w.T}, (z, y))

        return normface
    return getattr(losses, _METRIC[problem.loss])(temperature=TEMPERATURE)


def _no_metric_learning(problem: Problem, device: torch.device, dtype: torch.dtype) -> str | None:
    if problem.loss not in _METRIC:
        return "computes NormFace, SupCon and SimCLR only"
    return _not_importable("pytorch_metric_learning.losses")


def _metric_matrix(problem: Problem) -> int:
    if problem.loss == "simclr":
        return problem.m**2 * problem.m // 2  # every positive pair against every negative pair
    return 3 * matrix(problem) if problem.loss == "supcon" else matrix(problem)


# --- the list ---------------------------------------------------------------------------------------------


RIVALS = (
    Variant(BASELINE, "the whole matrix of logits, masked, logsumexp, autograd", naive, stored=matrix),
    Variant("naive torch.compile", "the same through inductor", _compiled, stored=matrix, compiles=True),
    Variant("M x M eager", "[NCD] Eqs. 4-5 as printed, every sample's prototype", _pairwise, _no_pairwise, _pairs),
    Variant(
        "F.linear_cross_entropy", "PyTorch's reference path, of normalised rows",
        _from_linear(partial(_torch_linear, False)), _no_torch_linear, _linear_matrix,
    ),
    Variant(
        "F.linear_cross_entropy chunked", "PyTorch's chunked path, of normalised rows",
        _from_linear(partial(_torch_linear, True)), _no_torch_linear,
    ),
    Variant(
        "liger-kernel", "fused linear cross-entropy of normalised rows, sums in float32",
        _from_linear(_liger), _needs("liger_kernel.transformers"), compiles=True,
    ),
    Variant(
        "cut-cross-entropy", "of normalised rows, every entry of the gradient (filter_eps=None)",
        _from_linear(partial(_cce, None)), _needs("cut_cross_entropy"), compiles=True,
    ),
    Variant(
        "cut-cross-entropy filtered", "its default, which leaves out small entries of the gradient",
        _from_linear(partial(_cce, "high")), _needs("cut_cross_entropy"), compiles=True,
    ),
    Variant(
        "quack", "chunked linear cross-entropy of normalised rows, CuTe kernels",
        _from_linear(_quack), _needs("quack.linear_cross_entropy", of=8), compiles=True,
    ),
    Variant(
        "inf-cl", "its single-device kernel, of normalised rows, in tf32 whatever the dtype",
        _from_linear(_inf_cl), _needs("inf_cl", of=16), compiles=True, tf32=True,
    ),
    Variant(
        "pytorch-metric-learning", "NormalizedSoftmaxLoss, SupConLoss, NTXentLoss",
        _metric_learning, _no_metric_learning, _metric_matrix,
    ),
)  # fmt: skip
