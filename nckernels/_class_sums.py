"""Sums over the classes of a batch, with which the positives of all pairs cost O(N d).

The positives of sample i are the other samples of its class, C(i). Their pairs grow as N^2, but inner products are
linear, and no pair has to be visited: with unit rows :math:`a_i` and :math:`S_c` the sum of those of class c,

.. math::
    \\sum_{l \\in C(i)} a_i \\cdot a_l = a_i \\cdot (S_{y_i} - a_i)

One pass adds every row to the sum of its class, one takes an inner product for every row, and the backward pass hands
each row the sum of its class. Divided by the numbers of their rows the sums are class means, which stand in for the
samples in the prototype loss. (Where the native backend takes SupCon's loss and gradient in one step it does the
same in C++, ``csrc/cpu/same_label.hpp``.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _checks
from ._common import norms
from .backends.base import accumulation_dtype
from .backends.chunked.norms import rnorm_of, through_normalisation


def groups(labels: Tensor, ignored: Tensor) -> tuple[Tensor, int]:
    """Labels, any integers, as indices of classes in the order of the labels, and at least the number of classes.

    A GPU's host does not know how many there are; there it is the number of samples.
    """
    ordered, order = labels.masked_fill(ignored, torch.iinfo(torch.int64).max).sort()
    starts = F.pad(ordered[1:] != ordered[:-1], (1, 0)).cumsum(0)
    group = torch.empty_like(starts).scatter_(0, order, starts)
    return group, int(starts[-1]) + 1 if _checks.host_knows(labels) else len(labels)


def some(ignored: Tensor) -> Tensor | None:
    """None where the host knows that nobody is ignored."""
    return None if _checks.host_knows(ignored) and not bool(ignored.any()) else ignored


def visible_rows(rows: Tensor, ignored: Tensor) -> Tensor:
    """Rows in the accumulation dtype, 0 where ignored."""
    return without_ignored(rows.to(accumulation_dtype(rows.dtype)), ignored)


def without_ignored(rows: Tensor, ignored: Tensor) -> Tensor:
    """The rows, 0 where ignored: those may hold anything. No copy where the host knows that there are none."""
    return rows if some(ignored) is None else rows.masked_fill(ignored[:, None], 0.0)


def class_sums(rows: Tensor, group: Tensor, ignored: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """(C, d) sums of the rows of every class, and (C,) their numbers; ignored rows are zeros."""
    group = group.masked_fill(ignored, 0)
    sums = rows.new_zeros(classes, rows.shape[1]).index_add(0, group, rows)
    return sums, rows.new_zeros(classes).index_add(0, group, (~ignored).to(rows.dtype))


def add_unit_rows(sums: Tensor, rows: Tensor, group: Tensor) -> None:
    """Add each row, at unit length, to the sum of its group; rows with a negative group to none."""
    unit_rows = rows * rnorm_of(rows, sums.dtype)[:, None]
    sums.index_add_(0, group.clamp_min(0), unit_rows.masked_fill_((group < 0)[:, None], 0.0))


def grad_of_unit_rows(of_sums: Tensor, rows: Tensor, group: Tensor) -> Tensor:
    """The gradient of ``rows``, given that of the sums to which :func:`add_unit_rows` has added them."""
    rnorm = rnorm_of(rows, of_sums.dtype)
    grad = of_sums[group.clamp_min(0)].masked_fill_((group < 0)[:, None], 0.0)
    through_normalisation(grad, rows * rnorm[:, None], rnorm, rows)
    return grad


def mean_positive(
    rows: Tensor, group: Tensor, ignored: Tensor, classes: int, among: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Mean cosine of every sample with the others of its group, and whether there are any.

    The sum of the cosines is one inner product with the sum of the class: O(N d) for all pairs. For the backward
    one matrix of the rows' size is kept.

    Args:
        among: the :func:`class_sums` of the unit rows of more samples, these ones among them; None: of these.
    """
    visible = visible_rows(rows, ignored)
    rnorm = norms(visible, rows.dtype).reciprocal()
    unit_rows = visible * rnorm[:, None]
    sums, counts = class_sums(unit_rows, group, ignored, classes) if among is None else among
    others = counts[group] - 1.0
    has_positive = (others > 0) & ~ignored
    total = torch.linalg.vecdot(visible, sums[group] - unit_rows) * rnorm
    return total.masked_fill(~has_positive, 0.0) / others.clamp_min(1.0), has_positive


def height(means: Tensor, dtype: torch.dtype) -> Tensor:
    """sqrt(1 - |mean|^2), the coordinate that lifts a mean onto the sphere.

    Rounding must not make it zero, or the derivative could not undo that of the lifted mean's normalisation; at
    the least value the lifted mean is still of unit length to the precision of ``dtype``.
    """
    square = 1.0 - means.square().sum(1)
    least = torch.finfo(dtype).eps / 16
    return (square + (square.clamp_min(least) - square).detach()).sqrt()
