"""A stand-in for a GPU: Triton compiles for it and launches nothing.

:func:`install` replaces Triton's driver in the whole process. Kernels then take tensors on the CPU, whose memory
is not read.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher
from triton.runtime.driver import driver

STREAM = 7


class Launcher(CudaLauncher):
    """Triton's launcher in Python, whose calls of the driver do nothing."""

    def __init__(self, src: Any, metadata: Any) -> None:
        self.launch = _nothing
        self.gsan_enabled = False
        self.num_ctas = getattr(metadata, "num_ctas", 1)
        self.arg_annotations = self.kernel_signature = None  # missing in Triton 3.6
        for name in ("global_scratch_size", "global_scratch_align", "profile_scratch_size", "profile_scratch_align"):
            setattr(self, name, getattr(metadata, name))
        self.launch_cooperative_grid, self.launch_pdl = metadata.launch_cooperative_grid, metadata.launch_pdl


class Recorder(Launcher):
    """A launcher that records the arguments of the driver in ``calls``."""

    calls: ClassVar[list[tuple[Any, ...]]] = []

    def __init__(self, src: Any, metadata: Any) -> None:
        super().__init__(src, metadata)
        self.launch = lambda *args: self.calls.append(args)


def _nothing(*_: Any) -> None:
    pass


class Driver:
    """The interface of Triton's driver before and during a launch."""

    def __init__(self, arch: int, launcher_cls: type) -> None:
        self.target = GPUTarget("cuda", arch, 32)
        self.launcher_cls = launcher_cls
        self.device = 0
        self.loaded = 0
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 232448},
            load_binary=self.load_binary,
            unload_module=_nothing,
        )

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        """Module, function, registers, spills and the largest number of threads."""
        self.loaded += 1
        return self.loaded, 1000 + self.loaded, 32, 0, 1024

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return STREAM + device

    def get_current_target(self) -> GPUTarget:
        return self.target


def install(arch: int = 90, launcher_cls: type = Launcher) -> Driver:
    """Make Triton compile for a device of this compute capability."""
    assert not triton.knobs.runtime.interpret
    stand_in = Driver(arch, launcher_cls)
    driver.set_active(stand_in)
    return stand_in
