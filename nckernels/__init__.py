"""Fused losses on the unit hypersphere: NONL, NTCE and NormFace in bounded memory.

    loss = nckernels.nonl_loss(x, head.weight, y)      # instead of F.cross_entropy(head(x), y)

:mod:`nckernels.functional` holds the losses, :mod:`nckernels.nn` their modules, :func:`cosine_lse` is the
primitive they stand on. :mod:`nckernels.geometry` and :mod:`nckernels.metrics` have the simplex and the
measures of neural collapse.
"""

from . import geometry, metrics
from .backends.registry import set_backend, set_workspace, use_backend, use_workspace
from .functional import nonl_loss, normface_loss, ntce_loss
from .nn import NONLLoss, NormFaceLoss, NTCELoss, PrototypeClassifier
from .primitive import cosine_lse

__version__ = "0.1.0"

__all__ = [
    "NONLLoss",
    "NTCELoss",
    "NormFaceLoss",
    "PrototypeClassifier",
    "__version__",
    "cosine_lse",
    "geometry",
    "metrics",
    "nonl_loss",
    "normface_loss",
    "ntce_loss",
    "set_backend",
    "set_workspace",
    "use_backend",
    "use_workspace",
]
