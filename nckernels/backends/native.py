"""The CPU backend in C++ (csrc/cpu): float64, float32, and bfloat16 where the CPU multiplies it.

The library has a plain C interface and is loaded with ctypes, so it does not depend on a version of Python or torch. It
shares the OpenMP threads that torch has started.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import struct
import sys
from typing import cast

import torch
from torch import Tensor

from . import build
from .base import (
    Backend,
    Forward,
    Gradients,
    Inputs,
    Needs,
    OutputGrads,
    Reduced,
    Spec,
    Step,
    accumulation_dtype,
    bad_target,
    bad_temperature,
    constant,
    norm_eps,
    number,
)

_HALF = {torch.bfloat16: 1, torch.float16: 2}
_EXCLUDE = {"none": 0, "target": 1, "self": 2, "same_label": 3}
_KEPT_PADDING = (191, 31)  # most rows and columns by which tiles exceed the matrix, see tiles.hpp
_BAD_TARGET, _NO_MEMORY = 1, 2
_OWNER = os.getpid()

SUPPORTED = sys.platform == "linux"
"""Whether compiler flags and OpenMP are as the build expects; on other systems other backends are preferred."""

# The structures of problem.hpp, packed as bytes: filling ctypes structures of so many fields takes several times
# longer, which matters in small problems.
_PROBLEM = struct.Struct("@5q 5P 2q d 8i d 6P 3q 2P")
_GRADIENTS = struct.Struct("@8P")
_STEP = struct.Struct("@6P 4d 3q")
_SIZES = (_PROBLEM.size << 32) | (_GRADIENTS.size << 16) | _STEP.size


_CHOICE = "NCKERNELS_CPU_INSTRUCTIONS"
_SLOW_WITH_TILES = "avx512_bf16"
"""The library that a CPU with AMX does not use unless told to."""


def libraries() -> list[build.Library]:
    """The libraries that this CPU can run, the fastest first.

    They follow torch's choice of instruction set, which $ATEN_CPU_CAPABILITY can lower, and the CPU's bfloat16 units.
    CPUs with AMX take longer for vdpbf16ps than for the same product in float32, so that without permission for AMX
    they do not use the former. $NCKERNELS_CPU_INSTRUCTIONS names the first library of the list, for example ``avx512``
    to exclude bfloat16 units.

    Raises:
        ValueError: if $NCKERNELS_CPU_INSTRUCTIONS does not name a library for this CPU.
    """
    best, tiles = torch.backends.cpu.get_cpu_capability().lower(), torch.cpu._is_amx_tile_supported()
    if best == "avx512" and torch.cpu._is_avx512_bf16_supported():
        best = "amx" if tiles and torch.cpu._init_amx() else "avx512_bf16"
    names = list(build.CPU)
    names = names[names.index(best) :] if best in names else ["default"]
    wanted = os.environ.get(_CHOICE)
    if wanted and wanted not in names:
        raise ValueError(f"{_CHOICE} must be one of {', '.join(names)} on this CPU, got {wanted!r}")
    chosen = names[names.index(wanted) :] if wanted else names
    return [build.CPU[name] for name in chosen if not tiles or name == wanted or name != _SLOW_WITH_TILES]


def library() -> build.Library | None:
    """The library in use, compiled first if necessary; None if there is none."""
    loaded = _load()
    return None if isinstance(loaded, str) else loaded[1]


@functools.cache
def _load() -> tuple[ctypes.CDLL, build.Library] | str:
    """The first library that can be found or built; or the reason why there is none."""
    if not SUPPORTED:
        return f"is supported on Linux only, not on {sys.platform}"
    reason = ""
    try:
        for library in libraries():
            try:
                path = build.find_or_build(library)
                loaded = ctypes.CDLL(str(path))
            except (build.BuildError, OSError) as error:
                reason = reason or str(error)
                continue
            loaded.nckernels_sizes.restype = loaded.nckernels_peak_scratch.restype = ctypes.c_int64
            if loaded.nckernels_sizes() != _SIZES:
                return f"{path} was built by another version of the package"
            return loaded, library
    except ValueError as error:
        return str(error)
    return reason


def _library() -> ctypes.CDLL:
    loaded = _load()
    assert not isinstance(loaded, str), loaded
    return loaded[0]


@constant
def _missing() -> str | None:
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


def peak_scratch() -> int:
    """Peak of the scratch memory in bytes since the last call of this function; 0 without the library."""
    return 0 if _missing() else int(_library().nckernels_peak_scratch())


def bfloat16_products(library: build.Library) -> str:
    """How a library multiplies bfloat16 features."""
    names = {"amx": "in AMX tiles", "avx512_bf16": "by vdpbf16ps (AVX512-BF16)"}
    return names.get(library.name.removeprefix("cpu_"), "in float32")


class NativeBackend(Backend):
    """C++ kernels for the CPU; 16-bit features are converted to float32 unless the CPU multiplies bfloat16."""

    name = "native"
    checks_values = True
    step_options = True
    dot_regression = True

    def missing(self) -> str | None:
        return _missing()

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return None if device.type == "cpu" else f"runs on the CPU, not on {device.type}"

    def kept_numel(self, device: torch.device, dtype: torch.dtype, m: int, k: int, spec: Spec) -> int:
        """The tiles of the matrix that fit half of the workspace, and one number for their height."""
        columns = min(m, k) if spec.present_only else k
        padded = (m + _KEPT_PADDING[0]) * (columns + _KEPT_PADDING[1])
        if spec.symmetric:  # the upper triangle: each tile of up to 192 rows begins at its first diagonal entry
            padded = min(padded, (m + _KEPT_PADDING[0]) * (m // 2 + sum(_KEPT_PADDING)))
        return min(padded + 1, spec.workspace // 2 // accumulation_dtype(dtype).itemsize)

    def forward(self, inputs: Inputs, spec: Spec, keep: bool) -> Forward:
        result = self._results(inputs, spec, keep)
        problem, _alive = _problem(inputs, spec, result)
        _check(_library().nckernels_forward(problem), inputs, spec)
        return result

    def _results(self, inputs: Inputs, spec: Spec, keep: bool) -> Forward:
        """Uninitialised results of the forward pass."""
        z = inputs.features
        m, k, dtype = z.shape[0], inputs.prototypes.shape[0], accumulation_dtype(z.dtype)
        numel = self.kept_numel(z.device, z.dtype, m, k, spec) if keep else 0
        sizes = (k if spec.by_class else 0, m if spec.by_instance else 0, m, m, k, numel)
        return Forward(*(z.new_empty(size, dtype=dtype) for size in sizes))

    def backward(self, inputs: Inputs, saved: Forward, grads: OutputGrads, spec: Spec, needs: Needs) -> Gradients:
        problem, _alive = _problem(inputs, spec, saved)
        z, w, beta = _allocate_grads(inputs, spec, needs)
        biases = (
            torch.zeros_like(bias) if need and bias is not None else None
            for bias, need in zip(inputs[4:], needs[3:], strict=True)
        )
        out = Gradients(z, w, beta, *biases)
        upstream = [None if g is None else g.contiguous() for g in grads]
        pointers = _GRADIENTS.pack(*map(_pointer, (*upstream, z, w, *out[3:], beta)))
        _check(_library().nckernels_backward(problem, pointers), inputs, spec)
        of_inputs = (*inputs[:2], *inputs[3:])
        return Gradients(
            *(None if g is None or x is None else g.to(x.dtype) for g, x in zip(out, of_inputs, strict=True))
        )

    def can_step(self, features: Tensor, prototypes: Tensor, spec: Spec) -> bool:
        return True

    def step(self, inputs: Inputs, reduced: Reduced, spec: Spec, needs: Needs) -> Step:
        loss = inputs.features.new_empty((), dtype=accumulation_dtype(inputs.features.dtype))
        return Step(loss, *self._step(inputs, None, loss, reduced, spec, needs))

    def losses(self, inputs: Inputs, reduced: Reduced, spec: Spec, keep: bool) -> tuple[Tensor, Forward]:
        saved = self._results(inputs, spec, keep)
        loss = torch.empty_like(saved.pos)
        problem, _alive = _problem(inputs, spec, saved)
        step, _alive_too = _step(inputs, reduced, loss, (None, None, None))
        _check(_library().nckernels_losses(problem, step), inputs, spec)
        return loss, saved

    def losses_backward(
        self, inputs: Inputs, saved: Forward, upstream: Tensor, reduced: Reduced, spec: Spec, needs: Needs
    ) -> tuple[Tensor | None, ...]:
        weight = upstream if reduced.weight is None else upstream * reduced.weight
        return self._step(inputs, saved, None, reduced._replace(weight=weight), spec, needs)

    def half_squares(self, rows: Tensor, prototypes: Tensor, target: Tensor, ignore_index: int) -> Tensor:
        loss = rows.new_empty(len(rows), dtype=accumulation_dtype(rows.dtype))
        self._gaps(rows, prototypes, target, ignore_index, None, loss, (False, False))
        return loss

    def half_squares_backward(
        self,
        rows: Tensor,
        prototypes: Tensor,
        target: Tensor,
        ignore_index: int,
        upstream: Tensor,
        needs: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        z, w = self._gaps(rows, prototypes, target, ignore_index, upstream, None, needs)
        return None if z is None else z.to(rows.dtype), None if w is None else w.to(prototypes.dtype)

    def _gaps(
        self,
        rows: Tensor,
        prototypes: Tensor,
        target: Tensor,
        ignore_index: int,
        upstream: Tensor | None,
        loss: Tensor | None,
        needs: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        spec = Spec("instance", "none", False, ignore_index, 0)
        inputs = Inputs(rows, prototypes, target, cast(Tensor, 1.0), None, None)
        problem, _alive = _problem(inputs, spec)
        z, w, _ = _allocate_grads(inputs, spec, Needs(*needs, False, False, False))
        step, _alive_too = _step(inputs, Reduced(upstream, False, math.nan), loss, (z, w, None))
        _check(_library().nckernels_gaps(problem, step), inputs, spec)
        return z, w

    def _step(
        self, inputs: Inputs, saved: Forward | None, loss: Tensor | None, reduced: Reduced, spec: Spec, needs: Needs
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients: of a step, which also writes ``loss``, or from the state that ``losses`` has ``saved``."""
        problem, _alive = _problem(inputs, spec, saved)
        rounded = _rounds_grads(inputs, spec)
        z, w, beta = _allocate_grads(inputs, spec, needs, rounded)
        step, _alive_too = _step(inputs, reduced, loss, (z, w, beta), rounded)
        _check(_library().nckernels_step(problem, step), inputs, spec)
        return z, w, None if beta is None else beta.to(accumulation_dtype(inputs.features.dtype))


BACKEND = NativeBackend()


def _rows(x: Tensor) -> Tensor:
    """The same matrix with contiguous rows."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _rounds_grads(inputs: Inputs, spec: Spec) -> bool:
    """Whether a step writes bfloat16 gradients.

    float16 gradients stay float32 until backward has scaled them: without GradScaler's factor they could underflow.
    """
    return inputs.features.dtype == torch.bfloat16 and not spec.symmetric


def _allocate_grads(
    inputs: Inputs, spec: Spec, needs: Needs, rounded: bool = False
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Memory for the wanted gradients: of both matrices and, in float64, of the inverse temperature."""
    z, w = inputs.features, inputs.prototypes
    dtype = torch.bfloat16 if rounded else accumulation_dtype(z.dtype)
    make = torch.zeros_like if spec.present_only else torch.empty_like  # the library skips classes that do not occur
    rows = torch.contiguous_format
    return (
        torch.empty_like(z, dtype=dtype, memory_format=rows) if needs.features else None,
        make(w, dtype=dtype, memory_format=rows) if needs.prototypes else None,
        z.new_zeros((), dtype=torch.float64) if needs.inv_temperature else None,
    )


_NOTHING = (0,) * 7
_OF_STEPS = (0,) * 4  # fields for the library's own use


def _problem(inputs: Inputs, spec: Spec, forward: Forward | None = None) -> tuple[bytes, list[Tensor | None]]:
    """The C structure of a problem, and the tensors that it points into, which the caller must keep alive.

    Without ``forward`` the library uses buffers of its own for the results of the forward pass.
    """
    z, w, target, scalar, *biases = inputs
    dtype, beta = z.dtype, number(scalar, z.dtype)
    if not 0.0 < beta < math.inf:
        raise bad_temperature(beta)
    z, target = _rows(z), target.contiguous()
    w = z if spec.symmetric else _rows(w)
    biases = [None if b is None else b.contiguous() for b in biases]
    problem = _PROBLEM.pack(
        *z.shape[:1],
        *w.shape,
        z.stride(0),
        w.stride(0),
        z.data_ptr(),
        w.data_ptr(),
        target.data_ptr(),
        *map(_pointer, biases),
        spec.ignore_index,
        spec.workspace,
        beta,
        spec.direction != "instance",
        spec.direction != "class",
        _EXCLUDE[spec.exclude],
        spec.present_only,
        spec.symmetric,
        # OpenMP's threads do not survive fork(), so a child process uses only the calling thread.
        torch.get_num_threads() if os.getpid() == _OWNER else 1,
        dtype == torch.float64,
        _HALF.get(dtype, 0),
        norm_eps(dtype),
        *((*map(_pointer, forward), forward.kept.numel()) if forward else _NOTHING),
        *_OF_STEPS,
    )
    return problem, [z, w, target, *biases]


def _step(
    inputs: Inputs, reduced: Reduced, loss: Tensor | None, grads: tuple[Tensor | None, ...], rounded: bool = False
) -> tuple[bytes, list[Tensor | None]]:
    """The C structure of a step, and the weights that it points to, which the caller must keep alive."""
    dtype = accumulation_dtype(inputs.features.dtype)
    weights = [None if x is None else x.to(dtype).contiguous() for x in (reduced.weight, reduced.class_weight)]
    step = _STEP.pack(
        *map(_pointer, (*weights, loss, *grads)),
        reduced.of_nothing,
        reduced.label_smoothing,
        reduced.angular_margin,
        reduced.cosine_margin,
        reduced.mean,
        reduced.joined,
        rounded,
    )
    return step, weights


def _check(status: int, inputs: Inputs, spec: Spec) -> None:
    if status == _BAD_TARGET:
        raise bad_target(inputs.target, inputs.prototypes.shape[0], spec.ignore_index)
    if status == _NO_MEMORY:
        raise MemoryError("nckernels: no memory for the scratch buffers of the native backend")
    if status:
        raise RuntimeError(f"nckernels: the native backend failed with status {status}")
