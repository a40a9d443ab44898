"""The host side that the GPU backends share: everything but the kernels and their launches.

The similarity matrix is cut into tiles, which kernels reduce and drop. The tensors, the order of the kernels, and the
division of work and workspace do not depend on the language of the kernels:

* ``sides``: an operand of the matrix with the vectors of its rows; the vocabulary;
* ``plan``: how many thread blocks share a task, and how large a panel may be;
* ``kernels``: the interface that a backend implements, one method per kernel;
* ``forward`` and ``backward``: the order of launches of the two passes;
* ``step``: loss and gradient in one step, for losses that are reduced to one number;
* ``passes``: both passes in one call, for problems that a step does not take;
* ``engines``: the first product of a step's panel.

Nothing here waits for the device: no value is read back, and no shape depends on data, so a training step can be
captured in a CUDA graph. Results that depend on data (which classes occur, and how many) stay in device tensors that
the kernels read.
"""

from .backward import backward
from .forward import forward
from .kernels import EpilogueKernels, Kernels, StepKernels
from .passes import passes
from .sides import Kept
from .step import fits, known, step

__all__ = [
    "EpilogueKernels", "Kept", "Kernels", "StepKernels", "backward", "fits", "forward", "known", "passes", "step",
]  # fmt: skip
