"""How far a classifier is from neural collapse.

Neural collapse (Papyan et al. 2020) is the limit in which the features of a class shrink to their mean
(NC1), the class means form a simplex equiangular tight frame centred at the origin (NC2) and each prototype
points along the mean of its class (NC3), so that the classifier picks the nearest class mean (NC4).
:func:`neural_collapse` measures all of it in two ways: the metrics of [NCD] Table 3 with the definitions that
reproduce its numbers, and direct measurements, because several of the former say less than their names suggest:

* The **intra-class effective rank** counts the directions of the within-class scatter and ignores its size.
  It is at least 1 as long as there is any scatter, so its printed optimum 0 is approached by no sequence of
  models; it jumps there at exact collapse. :attr:`~NeuralCollapse.scatter_ratio`,
  :attr:`~NeuralCollapse.cdnv` and :attr:`~NeuralCollapse.within_scatter` measure the size.
* The **inter-class effective rank** is K - 1 exactly when the *centred* class means form a simplex. Where
  that simplex sits is invisible to it: an orthogonal frame of means, the best that non-negative (ReLU)
  features can do, also scores K - 1. :attr:`~NeuralCollapse.offset` tells them apart. Near the optimum the
  rank is flat: a relative spread e of the eigenvalues lowers it by about (K - 1) e^2 / 2, so that 99.5 % of
  the optimum can hide cosines that are off by 0.08 (K = 10). The ``nc2_*`` deviations grow linearly in e.
* **MIR** at an exact simplex is 1/(K-1) + ((K-2)/(K-1)) ln(K-2)/ln(K-1), not 1: 0.952 for K = 10.
* The **published MIR and HDR** subtract the *direction* of the global mean, which is rounding noise once the
  means are centred. ``mir_centred`` and ``hdr_centred`` subtract the mean first and normalise after.

**When the pseudo-inverse form misleads.** :attr:`~NeuralCollapse.nc1` is tr(S_W S_B^+) / K of Papyan et al.: the
scatter along each direction of the means is divided by the spread of the means along that direction. One direction
in which the means hardly differ is enough to make it large, although no two classes need that direction to be told
apart. Until the means span K - 1 directions evenly it can be in the hundreds while accuracy is perfect. The sample
size then matters as well: along a direction in which the true means agree, the sample means of n samples differ by
chance, and the direction adds about n / K or more. Read :attr:`~NeuralCollapse.scatter_ratio` and
:attr:`~NeuralCollapse.cdnv` first. They divide by the whole scatter of the means and by the distances between the
means, to which a weak direction adds little. Once the means form a simplex the three agree up to a factor: with equal
scatter in all d directions, d >= K - 1, ``nc1`` is ``scatter_ratio`` (K - 1)^2 / (K d), and ``cdnv`` is
``scatter_ratio`` (K - 1) / (2 K).
:attr:`~NeuralCollapse.nc1_rank` states how many directions ``nc1`` used: those along which the means differ by more
than the rounding error of the features. An ``nc1_rank`` below K - 1 says that the means do not span a simplex. What
has no value is NaN: ``nc1`` and ``scatter_ratio`` if all means coincide, ``cdnv`` if two of them do.

Features and prototypes are scaled to unit length, as the losses do, but for the linear classifier of
:attr:`~NeuralCollapse.nc4` with a bias. All arithmetic is float64.

:func:`optimum` has the value of every metric at collapse, and at the best that ReLU features can do.
:func:`shares` says how much of the way to it a result has gone, and :func:`convergence_table` compares the speed of
training runs.
"""

from .convergence import ConvergenceTable, RunHistory, convergence_iteration, convergence_table, first_reach
from .measures import (
    SimplexDeviation,
    between_class_rank,
    class_distance_variance,
    class_means,
    covariance_rank,
    effective_rank,
    entropy_difference_ratio,
    instance_alignment,
    intra_class_rank,
    matrix_entropy,
    mutual_information_ratio,
    nearest_mean_agreement,
    rotated_self_duality,
    scatter_ratio,
    simplex_deviation,
    variability_collapse,
    weight_alignment,
    within_class_scatter,
)
from .report import NeuralCollapse, neural_collapse, optimum, ranges, shares

__all__ = [
    "ConvergenceTable",
    "NeuralCollapse",
    "RunHistory",
    "SimplexDeviation",
    "between_class_rank",
    "class_distance_variance",
    "class_means",
    "convergence_iteration",
    "convergence_table",
    "covariance_rank",
    "effective_rank",
    "entropy_difference_ratio",
    "first_reach",
    "instance_alignment",
    "intra_class_rank",
    "matrix_entropy",
    "mutual_information_ratio",
    "nearest_mean_agreement",
    "neural_collapse",
    "optimum",
    "ranges",
    "rotated_self_duality",
    "scatter_ratio",
    "shares",
    "simplex_deviation",
    "variability_collapse",
    "weight_alignment",
    "within_class_scatter",
]
