"""Fused losses on the unit hypersphere, in bounded memory.

    loss = nckernels.nonl_loss(x, head.weight, y)      # instead of F.cross_entropy(head(x), y)

:mod:`nckernels.functional` holds the losses with prototypes, :mod:`nckernels.contrastive` those without,
:mod:`nckernels.nn` their modules; :func:`cosine_lse` is the primitive they stand on. :mod:`nckernels.geometry`
and :mod:`nckernels.metrics` have the simplex and the measures of neural collapse.
"""

__version__ = "0.2.0"  # before the imports: operators.py reads it

from . import geometry, metrics
from .assignment import FixedPrototypeHead
from .backends.registry import set_backend, set_workspace, use_backend, use_workspace
from .classifiers import ClassifierResult, FixedPrototypes, LinearProbe, compare_classifiers
from .contrastive import (
    alignment_loss,
    clip_loss,
    info_nce_loss,
    prototype_loss,
    supcon_loss,
    uniformity_loss,
)
from .distributed.micro_batches import MicroBatches
from .functional import dot_regression_loss, nonl_loss, normface_loss, ntce_loss
from .nn import (
    AlignmentLoss,
    CLIPLoss,
    DotRegressionLoss,
    InfoNCELoss,
    NONLLoss,
    NormFaceLoss,
    NTCELoss,
    PrototypeClassifier,
    PrototypeLoss,
    SupConLoss,
    UniformityLoss,
)
from .primitive import cosine_lse
from .queue import FeatureQueue, QueueLoss, RunningDenominatorLoss

__all__ = [
    "AlignmentLoss",
    "CLIPLoss",
    "ClassifierResult",
    "DotRegressionLoss",
    "FeatureQueue",
    "FixedPrototypeHead",
    "FixedPrototypes",
    "InfoNCELoss",
    "LinearProbe",
    "MicroBatches",
    "NONLLoss",
    "NTCELoss",
    "NormFaceLoss",
    "PrototypeClassifier",
    "PrototypeLoss",
    "QueueLoss",
    "RunningDenominatorLoss",
    "SupConLoss",
    "UniformityLoss",
    "__version__",
    "alignment_loss",
    "clip_loss",
    "compare_classifiers",
    "cosine_lse",
    "dot_regression_loss",
    "geometry",
    "info_nce_loss",
    "metrics",
    "nonl_loss",
    "normface_loss",
    "ntce_loss",
    "prototype_loss",
    "set_backend",
    "set_workspace",
    "supcon_loss",
    "uniformity_loss",
    "use_backend",
    "use_workspace",
]
