"""What the backends of fused GPU kernels share: everything on the host that is not a launch.

The similarity matrix is cut into tiles, which kernels reduce and drop. Which tensors exist, in what order
the kernels run and how work and workspace are divided is the same whoever wrote the kernels:

* ``sides``: an operand of the matrix and all that belongs to its rows; the vocabulary;
* ``plan``: how many thread blocks share a task, how large a panel may be;
* ``kernels``: the interface that a backend implements, one method a kernel;
* ``forward`` and ``backward``: the order of launches;
* ``step``: loss and gradient in one go, where the samples' losses are reduced to one number.

Nothing here waits for the device: no value is read back and no shape depends on one, so that a whole step
can be captured in a CUDA graph. What depends on the data (which classes occur, how many) stays in device
tensors that the kernels read.
"""

from .backward import backward
from .forward import forward
from .kernels import Kernels, StepKernels
from .step import fits, step

__all__ = ["Kernels", "StepKernels", "backward", "fits", "forward", "step"]
