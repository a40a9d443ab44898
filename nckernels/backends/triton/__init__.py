"""The Triton backend: tiles of the similarity matrix on a GPU, which are reduced and dropped.

Reading order: ``tiles`` (the vocabulary), ``lse`` (the forward pass), ``grad`` and ``finish`` (the
backward pass), ``norms``; ``prepare``, ``reduce``, ``panel`` and ``epilogue`` (both passes in one step); ``pairs``
(SupCon, the shortest complete loss) and ``pairs_step`` (its launches); then ``config`` (tile sizes), ``launch`` and
``step`` (arguments), ``dispatch`` (fast launches). The order of the other launches is in ``tiled``, which the CUDA
backend shares.

Importing this package does not import Triton, which may be missing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from .. import tiled
from ..base import (
    Backend,
    Forward,
    Gradients,
    Inputs,
    Needs,
    OutputGrads,
    Reduced,
    Spec,
    Step,
)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MISSING = None if find_spec("triton") else "the package triton is not installed"


def _interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter: on the CPU, slowly, for tests."""
    launch = sys.modules.get(f"{__name__}.launch")
    if launch is not None:
        return bool(launch.INTERPRETED)  # decided when the kernels were loaded
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


class TritonBackend(Backend):
    """float32, bfloat16 and float16 on CUDA (compute capability 8.0 and newer) and ROCm devices."""

    name = "triton"
    checks_values = True

    def missing(self) -> str | None:
        return _MISSING

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if _MISSING is not None:
            return _MISSING
        if dtype not in _DTYPES:
            return f"supports float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
        if device.type == "cpu":
            return None if _interpreted() else "runs on the CPU only in its interpreter (TRITON_INTERPRET=1)"
        if device.type != "cuda":
            return f"supports CUDA and ROCm devices, not {device.type}"
        if torch.version.hip is None and torch.cuda.get_device_properties(device).major < 8:
            return "needs compute capability 8.0 or newer"
        return None

    def kept_numel(self, device: torch.device, dtype: torch.dtype, m: int, k: int, spec: Spec) -> int:
        return sum(tiled.Kept.sizes(m, k, dtype, torch.int32, spec))

    def forward(self, inputs: Inputs, spec: Spec, keep: bool) -> Forward:
        from . import launch

        with launch.on_device(inputs.features):
            return tiled.forward(launch.TritonKernels(inputs, spec), keep)

    def backward(self, inputs: Inputs, saved: Forward, grads: OutputGrads, spec: Spec, needs: Needs) -> Gradients:
        from . import launch

        with launch.on_device(inputs.features):
            return tiled.backward(launch.TritonKernels(inputs, spec), saved, grads, needs)

    def can_step(self, features: Tensor, prototypes: Tensor, spec: Spec) -> bool:
        from . import pairs_step

        if spec.symmetric:
            return pairs_step.fits(features, spec)
        return features.shape[0] > 0 and not spec.square  # by panels, or by both passes in one call

    def step(self, inputs: Inputs, reduced: Reduced, spec: Spec, needs: Needs) -> Step:
        from . import launch, pairs_step, step

        inputs, reduced, host_beta = tiled.known(inputs, reduced)
        with launch.on_device(inputs.features):
            if not spec.symmetric:
                kernels = step.TritonStep(inputs, spec, host_beta)
                by_panels = not kernels.fits_on_chip and tiled.fits(inputs.features, inputs.prototypes, spec)
                return (tiled.step if by_panels else tiled.passes)(kernels, reduced, needs)
            return pairs_step.step(pairs_step.PairKernels(inputs, spec, host_beta), reduced, needs)

    def scaled(
        self, grads: Sequence[Tensor], factor: Tensor, dtypes: Sequence[torch.dtype], in_place: bool
    ) -> Sequence[Tensor]:
        from .step import scaled

        return scaled(grads, factor, dtypes, in_place)
