"""The losses, each a few lines on :func:`nckernels.cosine_lse`.

Every function replaces ``F.cross_entropy(head(x), y)`` by ``loss(x, head.weight, y)``. With features
:math:`z_i`, prototypes :math:`w_c`, :math:`S_{ic} = \\cos(z_i, w_c)`, labels :math:`y_i` and temperature
:math:`\\tau`, sample i contributes a uniformity term minus the alignment :math:`S_{i,y_i} / \\tau`.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from . import _checks, operators
from ._class_sums import visible_rows
from ._common import REDUCTIONS, Reduction, inverse, leading_dimensions, logaddexp, of_samples
from ._compact import BATCH_SPARSE, LEFT_OUT, Part
from ._unit_rows import dots_with_unit_rows
from .backends import registry
from .backends.base import Direction, Reduced, accumulation_dtype, norm_eps
from .distributed import class_parallel, groups
from .distributed.contrast import contrast, lse_of_samples, part_of, reduce, reduce_weighted, sum_of_unit_rows
from .distributed.groups import GroupLike, Ranks
from .primitive import DIRECTIONS, autocast, step


@leading_dimensions
def nonl_loss(
    input: Tensor,
    prototypes: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    direction: Direction = "class",
    sparse: bool = False,
    process_group: GroupLike = None,
) -> Tensor:
    r"""Negatives-only normalised loss, NONL ([NCD] Eq. 5).

    .. math::
        \ell_i = \log \sum_{j : y_j \neq y_i} e^{S_{j,y_i} / \tau} - S_{i,y_i} / \tau

    Each class prototype is contrasted with the samples of the other classes in the batch. The gradient does
    not fade once the data is separated, which is why it collapses faster than NTCE and NormFace.

    Args:
        input: (M, d) features, any scale; float32, bfloat16, float16 or float64. Or (..., d), of which the leading
            dimensions are flattened: all of them are one batch.
        prototypes: (K, d) class prototypes, e.g. ``head.weight``; any scale, same dtype. With ``process_group`` also
            a DTensor with placement ``Shard(0)``, of which each rank has some rows; their gradient is the whole
            batch's, not to be averaged, see docs/scaling.md.
        target: (M,) or (...) class indices in [0, K), or ``ignore_index``.
        temperature: :math:`\tau > 0`, a number or a tensor of shape () or (1,), which may require grad.
        weight: (K,) rescaling of each class's samples, as in :func:`torch.nn.functional.cross_entropy`.
        sample_weight: weights >= 0 of the samples as anchors, of the shape of ``target``; of weight 0 a sample is a
            negative only.
        ignore_index: samples with this target contribute nothing, neither as anchor nor as negative.
        reduction: ``"none"`` for one value per sample, ``"sum"``, or ``"mean"``, weighted by both weights.
        direction: ``"class"`` is the paper's loss. The authors' code has two variants: ``"instance"``, whose
            sum runs over the other classes of the sample, :math:`\sum_{c \neq y_i} e^{S_{ic}/\tau}`, and
            ``"both"``, which adds the two sums inside the logarithm.
        sparse: give ``prototypes`` a sparse gradient, as ``nn.Embedding(sparse=True)`` does: a COO tensor of the
            rows of the classes in the batch, for :class:`torch.optim.SGD` or :class:`torch.optim.SparseAdam`. Time
            and memory of a step then do not depend on K. Needs ``direction="class"``, in which the other classes
            have no part.
        process_group: whose samples are contrasted: None for this process's, ``"world"`` for those of all
            processes, or a :class:`torch.distributed.ProcessGroup`. Every rank returns the number of ranks times
            its own samples' share of the whole, so that the average over ranks, of losses and of gradients, is
            the whole batch's whatever the sizes of the local batches. All ranks must have the same prototypes
            (or each a part), call the loss, with as many samples as they like, and multiply it by the same
            factors; see docs/scaling.md.

    Returns:
        A scalar, or the shape of ``target`` for ``reduction="none"`` (0 where ignored); float32 (float64 for float64
        input). A sample without negatives contributes its alignment term only. An empty batch, or one that is
        ignored whole, gives 0 for ``"sum"`` and NaN for ``"mean"``, as F.cross_entropy does.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.

    Example:
        >>> x, head = torch.randn(32, 64, requires_grad=True), torch.nn.Linear(64, 10, bias=False)
        >>> y = torch.randint(10, (32,))
        >>> nckernels.nonl_loss(x, head.weight, y).backward()
        >>> x.grad.shape, head.weight.grad.shape
        (torch.Size([32, 64]), torch.Size([10, 64]))

        At neural collapse, one sample for each of 10 classes, it is :math:`\log 9 - \frac{10}{9 \tau}`, its minimum:

        >>> simplex = nckernels.geometry.simplex_etf(10, 64)
        >>> print(f"{nckernels.nonl_loss(simplex, simplex, torch.arange(10)):.3f}")
        -8.914
    """
    target, beta = _checked(
        input, prototypes, target, weight, sample_weight, temperature, ignore_index, reduction, process_group
    )
    _checks.choice("direction", direction, DIRECTIONS)
    _checks.sparse(sparse, direction)
    ranks = _ranks(
        process_group, "nonl_loss", input, prototypes, temperature, reduction, direction=direction, sparse=sparse
    )
    prototypes = class_parallel.prepared(prototypes, ranks, sparse)
    per_sample = of_samples(weight, sample_weight, target)
    if direction != "both":
        return contrast(
            input, prototypes, target, beta, direction=direction, exclude="target", ignore_index=ignore_index,
            weight=per_sample, reduction=reduction, part=BATCH_SPARSE if sparse else None, ranks=ranks,
        )  # fmt: skip
    if ranks is None:
        whole = step(
            input, prototypes, target, beta, Reduced(per_sample, reduction == "mean", math.nan, joined=True),
            direction="both", exclude="target", ignore_index=ignore_index, each=reduction == "none",
        )  # fmt: skip
        if whole is not None:
            return whole
    lse, pos = lse_of_samples(
        input, prototypes, target, beta, direction="both", exclude="target", ignore_index=ignore_index,
        reduction=reduction, part=None, ranks=ranks,
    )  # fmt: skip
    ignored = target == ignore_index
    loss = lse.masked_fill(ignored | (lse == -torch.inf), 0.0) - pos  # no negatives: alignment only
    return reduce(loss, ~ignored, per_sample, reduction, ranks)


@leading_dimensions
def ntce_loss(
    input: Tensor,
    prototypes: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    sparse: bool = False,
    process_group: GroupLike = None,
) -> Tensor:
    r"""Normalised temperature-scaled cross-entropy over the batch, NTCE ([NCD] Eq. 4).

    .. math::
        \ell_i = \log \sum_{j=1}^{M} e^{S_{j,y_i} / \tau} - S_{i,y_i} / \tau

    Each class prototype is contrasted with all samples of the batch. Arguments, results and errors are those
    of :func:`nonl_loss`, without ``direction``.

    Example:
        >>> simplex = nckernels.geometry.simplex_etf(10, 64)  # features and prototypes at neural collapse
        >>> loss = nckernels.ntce_loss(simplex, simplex, torch.arange(10), temperature=0.5)
        >>> expected = torch.tensor(1 + 9 * math.exp(-10 / 9 / 0.5)).log()
        >>> torch.testing.assert_close(loss, expected)
    """
    target, beta = _checked(
        input, prototypes, target, weight, sample_weight, temperature, ignore_index, reduction, process_group
    )
    ranks = _ranks(process_group, "ntce_loss", input, prototypes, temperature, reduction, sparse=sparse)
    prototypes = class_parallel.prepared(prototypes, ranks, sparse)
    return contrast(
        input, prototypes, target, beta, direction="class", exclude="none", ignore_index=ignore_index,
        weight=of_samples(weight, sample_weight, target), reduction=reduction, part=BATCH_SPARSE if sparse else None,
        ranks=ranks,
    )  # fmt: skip


@leading_dimensions
def normface_loss(
    input: Tensor,
    prototypes: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    angular_margin: float = 0.0,
    cosine_margin: float = 0.0,
    class_fraction: float = 1.0,
    generator: torch.Generator | None = None,
    sparse: bool = False,
    process_group: GroupLike = None,
) -> Tensor:
    r"""NormFace, the softmax cross-entropy of cosine logits ([NCD] Eq. 3).

    .. math::
        \ell_i = \log \sum_{c=1}^{K} e^{S_{ic} / \tau} - S_{i,y_i} / \tau

    This is ``F.cross_entropy(logits, target, ...)`` of the logits :math:`S / \tau`, which are never stored.

    Args:
        input, prototypes, target, temperature, weight, sample_weight, ignore_index, reduction, process_group: as
            in :func:`nonl_loss`; a sample's loss does not depend on others, and only the mean spans the ranks.
        label_smoothing: in [0, 1], as in :func:`torch.nn.functional.cross_entropy`.
        angular_margin: ArcFace's additive margin in radians, in [0, pi]: the target's cosine becomes
            :math:`\cos(\theta + m)`, and :math:`\cos\theta - m \sin m` where :math:`\theta + m > \pi`, so
            that it stays decreasing in :math:`\theta`.
        cosine_margin: CosFace's additive margin, in [0, 2], subtracted from the target's cosine.
        class_fraction: r in (0, 1]. Below 1 the sum runs over a part of the classes, an approximation for millions
            of them (PartialFC, An et al. 2022): those that occur in the batch, and others drawn uniformly without
            replacement, anew in every call, :math:`\max(\lceil r K \rceil, \min(M, K))` in all. Only their rows of
            ``prototypes`` get a gradient. Nothing corrects for the missing ones: sums are too small, the loss of a
            sample is below the whole one by up to about :math:`\log(1/r)`, and the drawn classes get as much more
            than their share of the gradient. Without ``label_smoothing``.
        generator: of the random classes, on the device of ``input``; None is PyTorch's own, which
            :func:`torch.manual_seed` sets. Its state determines the classes.
        sparse: give ``prototypes`` a sparse gradient, as in :func:`nonl_loss`; needs ``class_fraction`` below 1.

    Returns, Raises: as in :func:`nonl_loss`.

    Example:
        >>> x, w, y = torch.randn(32, 64), torch.randn(10, 64), torch.randint(10, (32,))
        >>> loss = nckernels.normface_loss(x, w, y, temperature=0.1, label_smoothing=0.1)
        >>> logits = F.normalize(x) @ F.normalize(w).T / 0.1
        >>> torch.testing.assert_close(loss, F.cross_entropy(logits, y, label_smoothing=0.1))
    """
    target, beta = _checked(
        input, prototypes, target, weight, sample_weight, temperature, ignore_index, reduction, process_group
    )
    _checks.in_range("label_smoothing", label_smoothing, 0.0, 1.0)
    _checks.in_range("angular_margin", angular_margin, 0.0, math.pi)
    _checks.in_range("cosine_margin", cosine_margin, 0.0, 2.0)
    _checks.sampling(class_fraction, label_smoothing, sparse)
    ranks = _ranks(
        process_group, "normface_loss", input, prototypes, temperature, reduction, sparse=sparse,
        label_smoothing=label_smoothing, angular_margin=angular_margin, cosine_margin=cosine_margin,
        class_fraction=class_fraction,
    )  # fmt: skip
    prototypes = class_parallel.prepared(prototypes, ranks, sparse)
    per_sample = of_samples(weight, sample_weight, target)
    part = Part(class_fraction, generator, sparse) if class_fraction < 1.0 else None
    margin = bool(angular_margin or cosine_margin)
    if not (margin or label_smoothing):
        return contrast(
            input, prototypes, target, beta, direction="instance", exclude="none", ignore_index=ignore_index,
            weight=per_sample, reduction=reduction, part=part, ranks=ranks,
        )  # fmt: skip
    if part is not None and not _checks.is_dtensor(prototypes):
        prototypes, target = part_of(prototypes, target, ignore_index, part)
        ignore_index, part = LEFT_OUT, None
    exclude: Literal["none", "target"] = "target" if margin else "none"
    if ranks is None:
        anchors, classes = (sample_weight, weight) if label_smoothing else (per_sample, None)
        options = (classes, label_smoothing, angular_margin, cosine_margin)
        whole = step(
            input, prototypes, target, beta, Reduced(anchors, reduction == "mean", math.nan, *options),
            direction="instance", exclude=exclude, ignore_index=ignore_index, each=reduction == "none",
        )  # fmt: skip
        if whole is not None:
            return whole
    ignored = target == ignore_index
    if label_smoothing:
        input, prototypes, mean_cosine = _mean_cosine(input, prototypes, weight, ignored, reduction, ranks)
    lse, pos = lse_of_samples(
        input, prototypes, target, beta, direction="instance", exclude=exclude, ignore_index=ignore_index,
        reduction=reduction, part=part, ranks=ranks,
    )  # fmt: skip
    logit = pos
    if margin:
        pos = beta * _add_margins(pos / beta, angular_margin, cosine_margin)
        lse = logaddexp(lse, pos)
    lse = lse.masked_fill(ignored, 0.0)
    loss = (lse - pos).masked_fill(ignored, 0.0)
    if not label_smoothing:
        return reduce(loss, ~ignored, per_sample, reduction, ranks)

    # (1 - eps) w_y (lse - t_y) + eps/K sum_c w_c (lse - t_c); the last sum needs a weighted mean of the unit
    # prototypes, not the logits. A margin moves its target's term as well.
    dtype = loss.dtype
    share = (~ignored).to(dtype) if per_sample is None else per_sample.to(dtype).masked_fill(ignored, 0.0)
    spread = (lse if weight is None else weight.to(dtype).mean() * lse) - beta * mean_cosine
    if sample_weight is not None:
        spread = spread * sample_weight.to(dtype)
    if margin:
        spread = spread - share / prototypes.shape[0] * (pos - logit)
    smoothed = (1.0 - label_smoothing) * share * loss + label_smoothing * spread.masked_fill(ignored, 0.0)
    return reduce_weighted(smoothed, share, reduction, ranks)


@leading_dimensions
def dot_regression_loss(
    input: Tensor,
    prototypes: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    process_group: GroupLike = None,
) -> Tensor:
    r"""Dot regression: every feature is pulled to the prototype of its class ([DLP] Eq. 6; Yang et al. 2022).

    .. math::
        \ell_i = \tfrac{1}{2} (S_{i,y_i} - 1)^2

    Nothing pushes classes apart: that is for prototypes that are fixed far from one another, such as
    :func:`nckernels.geometry.simplex_etf`. With unit features u and prototypes w the gradient is

    .. math::
        \frac{\partial \ell_i}{\partial z_i} = -\frac{(1 - s)(w - s u)}{\lVert z_i \rVert}, \qquad s = u \cdot w,

    which fades at s = 1, the minimum, and at s = -1. (What [DLP] prints as Eq. 7, :math:`-(1 - s) s`, is a scalar and
    lacks the direction.)

    Time and memory are O(M d), without a matrix (M, K). Where a feature is near its prototype, :math:`1 - s` is
    computed as :math:`\lVert u - w \rVert^2 / 2`, which loses no digits there; 16-bit input in float32.

    Args:
        input, target, weight, sample_weight, ignore_index, reduction, process_group: as in :func:`nonl_loss`; a
            sample's loss does not depend on others, and only the mean spans the ranks.
        prototypes: (K, d), any scale, same dtype as ``input``; gets a gradient if it requires one. No DTensor.

    Returns, Raises: as in :func:`nonl_loss`. A zero row has cosine 0 with everything, loss 1/2, and a finite gradient.

    Example:
        >>> w = nckernels.geometry.simplex_etf(10, 64)
        >>> x, y = torch.randn(32, 64, requires_grad=True), torch.randint(10, (32,))
        >>> nckernels.dot_regression_loss(x, w, y).backward()
        >>> nckernels.dot_regression_loss(-w[y], w, y)  # each feature opposite to its prototype: (-1 - 1)^2 / 2
        tensor(2.)
    """
    _checks.features_and_prototypes(input, prototypes, "input")
    target = _check_samples(input, prototypes, target, weight, sample_weight, ignore_index, reduction)
    _checks.in_classes(target, len(prototypes), ignore_index)
    ranks = groups.resolve(process_group)
    if ranks is not None:
        classes, columns = prototypes.shape
        groups.agree(ranks, "dot_regression_loss", input, {}, num_classes=classes, d=columns, reduction=reduction)
    per_sample = of_samples(weight, sample_weight, target)
    return dot_regression(input, prototypes, target, per_sample, ignore_index, reduction, ranks)


# --- steps -------------------------------------------------------------------------------------------------


def dot_regression(
    input: Tensor,
    prototypes: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: Reduction,
    ranks: Ranks | None,
) -> Tensor:
    """:func:`dot_regression_loss` of checked arguments, with (M,) weights of samples and prototypes of any dtype."""
    dtypes = {input.dtype, prototypes.dtype}
    backend = registry.resolve(input.device, input.dtype)
    if (
        len(input)
        and (len(dtypes) == 1 or dtypes == {torch.float32, torch.bfloat16})  # which have the same least norm
        and registry.has_dot_regression(backend)
        and operators.plain(input, prototypes, refuse=False)
    ):
        if len(dtypes) == 2:
            input, prototypes = input.float(), prototypes.float()
        loss = operators.HalfSquares.apply(input, prototypes, target, ignore_index, backend, _half_squares)
    else:
        loss = _half_squares(input, prototypes, target, ignore_index)
    return reduce(loss, target != ignore_index, weight, reduction, ranks)


def _half_squares(input: Tensor, prototypes: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    ignored = target == ignore_index
    rows = visible_rows(input, ignored)
    # On a GPU a class's gradients add up in the dtype gathered from. Without one only what is gathered is widened.
    wide = prototypes.to(rows.dtype) if prototypes.requires_grad else prototypes
    own = wide.index_select(0, target.masked_fill(ignored, 0)).to(rows.dtype)
    gap = _gap(rows, own, norm_eps(input.dtype), norm_eps(prototypes.dtype)).masked_fill(ignored, 0.0)
    return 0.5 * gap * gap


def _gap(a: Tensor, b: Tensor, a_eps: float, b_eps: float) -> Tensor:
    """(M,) 1 - cos(a_i, b_i), each to its own rounding.

    Near cos = 1 it is half of the squared chord, in which nothing cancels. Further away the subtraction is the better
    one: the roundings of the two norms do not add up in it. Rows with a norm below eps have no chord of that kind.
    """
    a_norm, b_norm = torch.linalg.vector_norm(a, dim=1), torch.linalg.vector_norm(b, dim=1)
    a, b = a / a_norm.clamp_min(a_eps)[:, None], b / b_norm.clamp_min(b_eps)[:, None]
    cosine = (a * b).sum(1)
    near = (cosine > 0.5) & (a_norm >= a_eps) & (b_norm >= b_eps)
    return torch.where(near, 0.5 * (a - b).square().sum(1), 1.0 - cosine)


def _checked(
    input: Tensor,
    prototypes: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    temperature: float | Tensor,
    ignore_index: int,
    reduction: str,
    process_group: GroupLike,
) -> tuple[Tensor, float | Tensor]:
    """Check what all contrastive losses share; return the target as int64, and beta = 1 / temperature."""
    _checks.features_and_prototypes(input, prototypes, "input", sharded=process_group is not None)
    target = _check_samples(input, prototypes, target, weight, sample_weight, ignore_index, reduction)
    _checks.temperature(temperature, input)
    return target, inverse(temperature)


def _mean_cosine(
    input: Tensor,
    prototypes: Tensor,
    weight: Tensor | None,
    ignored: Tensor,
    reduction: Reduction,
    ranks: Ranks | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Features and prototypes, for what else is done with them, and (M,) the sum of each sample's cosines with all
    classes, times their weights, over K; 0 where ignored."""
    input, prototypes = autocast(input), autocast(prototypes)
    k, dtype = prototypes.shape[0], accumulation_dtype(input.dtype)
    class_weight = torch.ones(k, dtype=dtype, device=input.device) if weight is None else weight.to(dtype)
    with _checks.no_autocast(input):
        prototypes, total = sum_of_unit_rows(prototypes, class_weight, reduction, ranks)
        input, cosine = dots_with_unit_rows(input, total / k, ignored)
    return input, prototypes, cosine


def _check_samples(
    input: Tensor,
    prototypes: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    """Check labels, weights and options of features and prototypes that fit one another; return the labels as int64."""
    target = _checks.target(target, input, "input")
    _checks.choice("reduction", reduction, REDUCTIONS)
    _checks.integer("ignore_index", ignore_index)
    if weight is not None:
        _checks.vector("weight", weight, prototypes.shape[0], input)
    if sample_weight is not None:
        _checks.vector("sample_weight", sample_weight, input.shape[0], input)
        _checks.not_negative("sample_weight", sample_weight)
    return target


def _ranks(
    process_group: GroupLike,
    loss: str,
    input: Tensor,
    prototypes: Tensor,
    temperature: float | Tensor,
    reduction: str,
    *,
    sparse: bool,
    direction: Direction | None = None,
    **values: float,
) -> Ranks | None:
    """The ranks that the loss spans, which agree on it; ``values`` may change from call to call."""
    ranks = groups.resolve(process_group)
    if ranks is not None:
        classes, columns = prototypes.shape
        where = "of the whole group" if _checks.is_dtensor(prototypes) else "on every rank"
        groups.agree(
            ranks, loss, input, {"temperature": temperature, **values}, num_classes=classes, d=columns,
            reduction=reduction, direction=direction, prototypes=where, sparse=sparse,
        )  # fmt: skip
    return ranks


def _add_margins(cosine: Tensor, angular: float, additive: float) -> Tensor:
    """cos(theta + angular) - additive, continued linearly beyond theta + angular = pi."""
    if angular:
        # the sine's gradient is infinite at +-1, where rounding can push the cosine
        sine = (1.0 - cosine * cosine).clamp_min(torch.finfo(cosine.dtype).eps).sqrt()
        turned = cosine * math.cos(angular) - sine * math.sin(angular)
        cosine = torch.where(cosine > -math.cos(angular), turned, cosine - angular * math.sin(angular))
    return cosine - additive
