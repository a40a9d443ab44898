"""The primitive in C++ (csrc/cpu): float32 and float64 on the CPU.

The library has a plain C interface and is loaded with ctypes: it depends on no version of Python or torch. It
shares the OpenMP threads that torch has started.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from . import native_build
from .base import Backend, Forward, Gradients, Inputs, Needs, OutputGrads, Spec

_EXCLUDE = {"none": 0, "target": 1, "self": 2, "same_label": 3}
_KEPT_PADDING = (191, 31)  # rows and columns by which tiles can exceed the matrix, see tiles.hpp
_BAD_TARGET, _BAD_BETA, _NO_MEMORY = 1, 2, 3

_P, _I64, _I32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class _Problem(ctypes.Structure):
    """``nckernels::Problem`` in problem.hpp."""

    _fields_ = [
        *((name, _I64) for name in ("m", "k", "d", "z_stride", "w_stride")),
        *((name, _P) for name in ("z", "w", "target", "sample_bias", "class_bias")),
        ("ignore_index", _I64),
        ("workspace", _I64),
        ("beta", ctypes.c_double),
        *((name, _I32) for name in ("by_class", "by_instance", "exclude", "present_only", "threads", "is_double")),
        *((name, _P) for name in ("class_lse", "instance_lse", "pos", "z_rnorm", "w_rnorm", "kept")),
        ("kept_size", _I64),
    ]


class _Gradients(ctypes.Structure):
    """``nckernels::Gradients`` in problem.hpp."""

    _fields_ = [
        (name, _P) for name in ("class_lse", "instance_lse", "pos", "z", "w", "sample_bias", "class_bias", "beta")
    ]


ABI = (ctypes.sizeof(_Problem) << 16) | ctypes.sizeof(_Gradients)


class NativeBackend(Backend):
    """C++ kernels for the CPU, see the module's text."""

    name = "native"

    def missing(self) -> str | None:
        return native_build.missing()

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cpu":
            return f"runs on the CPU, not on {device.type}"
        return None if dtype in (torch.float32, torch.float64) else f"takes float32 and float64, not {dtype}"

    def kept_numel(self, device: torch.device, dtype: torch.dtype, m: int, k: int, spec: Spec) -> int:
        """As much of exp(t) as half of the workspace holds."""
        columns = min(m, k) if spec.present_only else k
        padded = (m + _KEPT_PADDING[0]) * (columns + _KEPT_PADDING[1])
        return min(padded, spec.workspace // 2 // dtype.itemsize)

    def forward(self, inputs: Inputs, spec: Spec, keep: bool) -> Forward:
        z, w = _rows(inputs.features), _rows(inputs.prototypes)
        m, k = z.shape[0], w.shape[0]
        numel = self.kept_numel(z.device, z.dtype, m, k, spec) if keep else 0
        result = Forward(
            z.new_empty(k if spec.by_class else 0),
            z.new_empty(m if spec.by_instance else 0),
            z.new_empty(m),
            z.new_empty(m),
            z.new_empty(k),
            z.new_empty(numel),
        )
        problem, _alive = _problem(z, w, inputs, result, spec)
        bad = _I64(-1)
        status = native_build.library().nckernels_forward(ctypes.byref(problem), ctypes.byref(bad))
        _check(status, inputs, spec, bad.value)
        return result

    def backward(self, inputs: Inputs, saved: Forward, grads: OutputGrads, spec: Spec, needs: Needs) -> Gradients:
        z, w = _rows(inputs.features), _rows(inputs.prototypes)
        problem, _alive = _problem(z, w, inputs, saved, spec)
        upstream = [None if g is None else g.contiguous() for g in grads]
        beta = ctypes.c_double(0.0)
        out = Gradients(
            torch.empty_like(z, memory_format=torch.contiguous_format) if needs.features else None,
            _prototype_grad(w, spec) if needs.prototypes else None,
            None,
            torch.zeros_like(inputs.sample_bias) if needs.sample_bias and inputs.sample_bias is not None else None,
            torch.zeros_like(inputs.class_bias) if needs.class_bias and inputs.class_bias is not None else None,
        )
        wanted = ctypes.addressof(beta) if needs.inv_temperature else None
        tensors = [*upstream, out.features, out.prototypes, out.sample_bias, out.class_bias]
        pointers = _Gradients(*(None if t is None else t.data_ptr() for t in tensors), wanted)
        status = native_build.library().nckernels_backward(ctypes.byref(problem), ctypes.byref(pointers))
        _check(status, inputs, spec, -1)
        return out._replace(
            inv_temperature=inputs.inv_temperature.new_tensor(beta.value) if needs.inv_temperature else None
        )


def _rows(x: Tensor) -> Tensor:
    """A matrix with contiguous rows."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _prototype_grad(w: Tensor, spec: Spec) -> Tensor:
    """Classes that do not occur are not written."""
    make = torch.zeros_like if spec.present_only else torch.empty_like
    return make(w, memory_format=torch.contiguous_format)


def _problem(z: Tensor, w: Tensor, inputs: Inputs, forward: Forward, spec: Spec) -> tuple[_Problem, list[Any]]:
    """The C structure, and the tensors that it points into."""
    biases = [None if b is None else b.contiguous() for b in (inputs.sample_bias, inputs.class_bias)]
    target = inputs.target.contiguous()
    problem = _Problem(
        z.shape[0],
        w.shape[0],
        z.shape[1],
        z.stride(0),
        w.stride(0),
        z.data_ptr(),
        w.data_ptr(),
        target.data_ptr(),
        *(None if b is None else b.data_ptr() for b in biases),
        spec.ignore_index,
        spec.workspace,
        float(inputs.inv_temperature),
        spec.by_class,
        spec.by_instance,
        _EXCLUDE[spec.exclude],
        spec.present_only,
        torch.get_num_threads(),
        z.dtype == torch.float64,
        *(t.data_ptr() if t.numel() else None for t in forward),
        forward.kept.numel(),
    )
    return problem, [*biases, target]


def _check(status: int, inputs: Inputs, spec: Spec, sample: int) -> None:
    if status == _BAD_TARGET:
        raise ValueError(
            f"target must lie in [0, {inputs.prototypes.shape[0]}) or equal ignore_index={spec.ignore_index}, "
            f"got {int(inputs.target[sample])}"
        )
    if status == _BAD_BETA:
        value = float(inputs.inv_temperature)
        raise ValueError(f"the inverse temperature must be positive and finite, got {value}")
    if status == _NO_MEMORY:
        raise MemoryError("nckernels: no memory for the scratch buffers of the native backend")
