"""How far a classifier is from neural collapse.

Neural collapse (Papyan et al. 2020) is the limit in which the features of a class shrink to their mean
(NC1), the class means form a simplex equiangular tight frame centred at the origin (NC2) and each prototype
points along the mean of its class (NC3). :func:`neural_collapse` measures all of it in two ways: the metrics
of [NCD] Table 3 with the definitions that reproduce its numbers, and direct measurements of NC1 and NC2,
because several of the former say less than their names suggest:

* The **intra-class effective rank** counts the directions of the within-class scatter and ignores its size.
  It is at least 1 as long as there is any scatter, so its printed optimum 0 is approached by no sequence of
  models; it jumps there at exact collapse. :attr:`~NeuralCollapse.nc1` and
  :attr:`~NeuralCollapse.within_scatter` measure the size.
* The **inter-class effective rank** is K - 1 exactly when the *centred* class means form a simplex. Where
  that simplex sits is invisible to it: an orthogonal frame of means, the best that non-negative (ReLU)
  features can do, also scores K - 1. :attr:`~NeuralCollapse.offset` tells them apart. Near the optimum the
  rank is flat: a relative spread e of the eigenvalues lowers it by about (K - 1) e^2 / 2, so that 99.5 % of
  the optimum can hide cosines that are off by 0.08 (K = 10). The ``nc2_*`` deviations grow linearly in e.
* **MIR** at an exact simplex is 1/(K-1) + ((K-2)/(K-1)) ln(K-2)/ln(K-1), not 1: 0.952 for K = 10.
* The **published MIR and HDR** subtract the *direction* of the global mean, which is rounding noise once the
  means are centred. ``mir_centred`` and ``hdr_centred`` subtract the mean first and normalise after.

Features and prototypes are scaled to unit length, as the losses do. All arithmetic is float64.
"""

from .convergence import convergence_iteration, first_reach
from .measures import (
    SimplexDeviation,
    class_means,
    covariance_rank,
    effective_rank,
    entropy_difference_ratio,
    instance_alignment,
    intra_class_rank,
    matrix_entropy,
    mutual_information_ratio,
    simplex_deviation,
    variability_collapse,
    weight_alignment,
    within_class_scatter,
)
from .report import NeuralCollapse, neural_collapse, optimum, ranges

__all__ = [
    "NeuralCollapse",
    "SimplexDeviation",
    "class_means",
    "convergence_iteration",
    "covariance_rank",
    "effective_rank",
    "entropy_difference_ratio",
    "first_reach",
    "instance_alignment",
    "intra_class_rank",
    "matrix_entropy",
    "mutual_information_ratio",
    "neural_collapse",
    "optimum",
    "ranges",
    "simplex_deviation",
    "variability_collapse",
    "weight_alignment",
    "within_class_scatter",
]
