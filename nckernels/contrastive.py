"""Losses without prototypes: samples contrasted with samples, each a few lines on :func:`nckernels.cosine_lse`.

With unit rows :math:`a_i`, cosines :math:`s_{ij} = a_i \\cdot a_j`, labels :math:`y_i`, temperature :math:`\\tau` and
:math:`C(i) = \\{l \\neq i : y_l = y_i\\}` the samples that share i's label. Rows are normalised inside; rows that
are of unit length already give the same loss and, through their own normalisation, the same gradient.

All but the pairs' losses take one tensor, whose similarity matrix is symmetric: the kernels compute half of it on
a CPU, and its gradient in one product. Positives need no pairs at all, only the sum of each class ([NCD] Eq. 2).
"""

from __future__ import annotations

import math
from collections.abc import Hashable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _checks, _class_means
from ._class_sums import class_sums, groups, height, mean_positive, some, visible_rows
from ._common import REDUCTIONS, Reduction, as_rows, inverse, logaddexp, norms, or_zero, unit
from ._compact import LEFT_OUT
from .backends import registry
from .backends.base import Reduced, accumulation_dtype
from .distributed import collectives, samples
from .distributed.contrast import reduce
from .distributed.groups import GroupLike, Ranks, agree, resolve
from .primitive import autocast, cosine_lse, step


def supcon_loss(
    input: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.1,
    ignore_index: int = -100,
    sample_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    decoupled: bool = False,
    process_group: GroupLike = None,
) -> Tensor:
    r"""Supervised contrastive loss, SupCon or SCL ([NCD] Eq. 2; the "out" form of Khosla et al. 2020).

    .. math::
        \ell_i = \log \sum_{j \neq i} e^{s_{ij} / \tau} - \frac{1}{|C(i)|} \sum_{l \in C(i)} s_{il} / \tau

    Without labels every sample is a class of its own and its views are the positives: SimCLR's NT-Xent loss.

    Args:
        input: (N, d), or (B, V, d) with V views of every sample; any scale; float32, bfloat16, float16, float64. Or
            (..., d) with a label for each feature: leading dimensions are flattened.
        target: (N,), (B,) or (...) labels, any integers. None: needs (B, V, d) with at least two views.
        temperature: :math:`\tau > 0`, a number or a tensor of shape () or (1,), which may require grad.
        ignore_index: samples with this label are neither anchors nor positives nor negatives.
        sample_weight: weights >= 0 of the anchors, of the shape of ``target``, (B,) without it.
        reduction: ``"none"`` for one value per row of ``input``, ``"sum"``, or ``"mean"`` over the samples that
            have a positive, weighted by ``sample_weight``.
        decoupled: sum over the negatives only, :math:`y_j \neq y_i` (Yeh et al. 2022; what NONL is to NTCE).
        process_group: whose samples are positives and negatives: None for this process's, ``"world"`` for those of
            all processes, or a :class:`torch.distributed.ProcessGroup`. Every rank returns the number of ranks times
            its own samples' share of the whole, so that the average over ranks, of losses and of gradients, is the
            whole batch's whatever the sizes of the local batches. All ranks must call the loss, all with gradients
            or none; see docs/scaling.md.

    Returns:
        A scalar, or (N,), (B, V), (...) for ``reduction="none"``; float32 (float64 for float64 input). A sample
        without a positive has loss 0 and is left out of the mean; the mean of nothing is 0, without gradient.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.

    Example:
        >>> views = torch.randn(32, 2, 64, requires_grad=True)  # two augmentations of 32 images
        >>> nckernels.supcon_loss(views, torch.randint(10, (32,))).backward()
        >>> simclr = nckernels.supcon_loss(views)

        SimCLR's NT-Xent loss, written out:

        >>> rows = F.normalize(views.transpose(0, 1).reshape(64, 64))
        >>> logits = (rows @ rows.T / 0.1).fill_diagonal_(-torch.inf)
        >>> positive = torch.arange(64).roll(32)  # the other view
        >>> torch.testing.assert_close(simclr, F.cross_entropy(logits, positive))
    """
    rows, labels, weight = _samples(input, target, temperature, ignore_index, sample_weight, reduction)
    beta, shape, n = inverse(temperature), input.shape[:-1], len(rows)
    ranks = _ranks(
        process_group,
        "supcon_loss",
        input,
        {"temperature": temperature},
        reduction=reduction,
        decoupled=decoupled,
        labels=target is not None,
    )
    if n == 0 and ranks is None:
        return _nothing(shape, reduction, beta, input)
    if target is None:
        ignore_index = LEFT_OUT  # labels count the samples: nobody is ignored
    rows = autocast(rows)  # positives and negatives alike
    if ranks is not None:
        with _checks.no_autocast(rows):
            terms = samples.supcon_terms(
                rows, labels, ignore_index, beta, ranks, distinct=target is None, decoupled=decoupled
            )
        lse, cosine, has_positive = terms
        loss = (or_zero(lse) - beta * cosine).masked_fill(~has_positive, 0.0)
        return _reduced(loss, has_positive, weight, reduction, shape, ranks)
    whole = step(
        rows, rows, labels, beta, Reduced(weight, reduction == "mean", 0.0), direction="instance",
        exclude="same_label" if decoupled else "self", ignore_index=ignore_index, each=reduction == "none",
    )  # fmt: skip
    if whole is not None:
        return whole.view(shape) if reduction == "none" else whole
    ignored = labels == ignore_index
    group, classes = (labels, len(input)) if target is None else groups(labels, ignored)
    # Before the sums, so that its backward comes after theirs, which frees what they keep.
    with _checks.no_autocast(rows):
        cosine, has_positive = mean_positive(rows, group, ignored, classes)
    if decoupled:
        lse, _ = cosine_lse(
            rows, rows, labels, beta, direction="instance", exclude="same_label", ignore_index=ignore_index
        )
    else:
        index = torch.arange(n, device=rows.device).masked_fill(ignored, LEFT_OUT)
        lse, _ = cosine_lse(rows, rows, index, beta, direction="instance", exclude="self", ignore_index=LEFT_OUT)
    loss = (or_zero(lse) - beta * cosine).masked_fill(~has_positive, 0.0)
    return _reduced(loss, has_positive, weight, reduction, shape)


def prototype_loss(
    input: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    num_classes: int | None = None,
    ignore_index: int = -100,
    sample_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    process_group: GroupLike = None,
) -> Tensor:
    r"""SupCon with class means in place of samples ([NCD] Eq. 6); it has the same minimisers ([NCD] Theorem 4.2).

    .. math::
        \ell_i = \log\Big( \sum_c n_c e^{a_i \cdot \mu_c / \tau} - e^{a_i \cdot \mu_{y_i} / \tau} \Big)
                 - a_i \cdot \mu_{y_i} / \tau

    with :math:`\mu_c` the mean of the :math:`n_c` unit rows of class c, through which gradients flow.

    Args:
        num_classes: K, with labels in [0, K): spares grouping the labels, and on a GPU, where the host does not
            know how many classes occur, the room for as many of them as there are samples.
        input, target, temperature, ignore_index, sample_weight, reduction, process_group: as in
            :func:`supcon_loss`; ``target`` cannot be None.

    Returns, Raises: as in :func:`supcon_loss`; the mean runs over all samples that are not ignored.

    Example:
        >>> y = torch.arange(4).repeat(3)
        >>> x = torch.eye(4, 8)[y]  # three samples of each class, all alike: both losses agree
        >>> torch.testing.assert_close(nckernels.prototype_loss(x, y), nckernels.supcon_loss(x, y))
    """
    _checks.is_tensor("target", target)
    rows, labels, weight = _samples(input, target, temperature, ignore_index, sample_weight, reduction)
    if num_classes is not None:
        _checks.positive_integer("num_classes", num_classes)
    beta, shape = inverse(temperature), input.shape[:-1]
    ranks = _ranks(
        process_group,
        "prototype_loss",
        input,
        {"temperature": temperature},
        reduction=reduction,
        num_classes=num_classes,
    )
    if len(rows) == 0 and ranks is None:
        return _nothing(shape, reduction, beta, input)
    ignored = labels == ignore_index
    if num_classes is None:
        group, classes = (
            groups(labels, ignored) if ranks is None else samples.groups_of_all(labels, ignore_index, ranks)
        )
    else:
        _checks.in_classes(labels, num_classes, ignore_index)
        group, classes = labels, num_classes
    left_out = some(ignored)
    if ranks is None and _class_means.takes(rows, left_out, classes, beta):
        loss = _class_means.losses(rows, group, left_out, classes, beta)
        return _reduced(loss, None if left_out is None else ~left_out, weight, reduction, shape)
    index = group.masked_fill(ignored, LEFT_OUT)
    visible = visible_rows(rows, ignored)
    sums, counts = class_sums(visible / norms(visible, rows.dtype)[:, None], group, ignored, classes)
    if ranks is not None:
        sums, counts = collectives.all_reduce(sums, ranks), collectives.all_reduce(counts, ranks)
    # Means lie inside the unit ball. One more coordinate, 0 for the samples, lifts them onto the sphere and leaves
    # the inner products as they are. (Several, so that rows stay aligned in memory.)
    means = sums / counts.clamp_min(1.0)[:, None]
    extra = 8 - rows.shape[1] % 8
    lifted = F.pad(torch.cat([means, height(means, rows.dtype)[:, None]], 1), (0, extra - 1)).to(rows.dtype)
    lse, pos = cosine_lse(
        F.pad(rows, (0, extra)), lifted, index, beta, direction="instance", exclude="target",
        logit_bias=counts.log(), ignore_index=LEFT_OUT,
    )  # fmt: skip
    own = counts[group.masked_fill(ignored, 0)] - 1.0  # samples of the same class beside this one
    lse = torch.where(own > 0, logaddexp(lse, own.clamp_min(1.0).log() + pos), lse)
    loss = (or_zero(lse) - pos).masked_fill(ignored, 0.0)
    return _reduced(loss, ~ignored, weight, reduction, shape, ranks)


def info_nce_loss(
    query: Tensor,
    key: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.1,
    ignore_index: int = -100,
    sample_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    decoupled: bool = False,
    process_group: GroupLike = None,
) -> Tensor:
    r"""InfoNCE: each query against all keys, one of which is its positive (van den Oord et al. 2018).

    .. math::
        \ell_i = \log \sum_{c} e^{\cos(q_i, k_c) / \tau} - \cos(q_i, k_{t_i}) / \tau

    Args:
        query: (M, d), any scale.
        key: (K, d), same dtype; for example the batch's keys followed by hard negatives or a queue of older keys.
        target: (M,) index of every query's positive in ``key``. None: the first M keys are the positives, in the order
            of the queries, and all further ones are negatives only.
        temperature: :math:`\tau > 0`, a number or a tensor of shape () or (1,), which may require grad.
        ignore_index: queries with this value in ``target`` are left out.
        sample_weight: (M,) weights >= 0 of the queries.
        reduction: ``"none"``, ``"sum"`` or ``"mean"``, weighted by ``sample_weight``.
        decoupled: leave the positive out of the sum.
        process_group: whose keys a query is contrasted with, and the rest as in :func:`supcon_loss`. ``target``
            counts this rank's own keys; where it is None, the first M of those are the positives. Further keys, of a
            queue on each rank for example, are negatives of all ranks' queries.

    Returns:
        A scalar, or (M,); float32 (float64 for float64 input). The mean of nothing is 0.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.

    Example:
        >>> query, key, older = torch.randn(32, 64), torch.randn(32, 64), torch.randn(480, 64)
        >>> in_batch = nckernels.info_nce_loss(query, key)
        >>> with_queue = nckernels.info_nce_loss(query, torch.cat([key, older]), torch.arange(32))
        >>> bool(with_queue > in_batch)  # more negatives
        True
    """
    _check_options(query, temperature, reduction, "query", ignore_index)
    _checks.matrix("query", query, "M", "d")
    _checks.matrix("key", key, "K", "d")
    if target is None:
        if len(key) < len(query):
            raise ValueError(
                "without target the i-th key is the positive of the i-th query: key must have at least as many rows as "
                f"query, got {tuple(key.shape)} and {tuple(query.shape)}"
            )
        target, ignore_index = torch.arange(len(query), device=query.device), LEFT_OUT
    else:
        target = _checks.target(target, query, "query")
    _check_weights(sample_weight, len(query), query)
    ranks = _ranks(
        process_group, "info_nce_loss", query, {"temperature": temperature}, reduction=reduction, decoupled=decoupled
    )
    if len(query) == len(key) == 0 and ranks is None:
        return _nothing(query.shape[:1], reduction, inverse(temperature), query, key)
    if ranks is None or len(key):
        _checks.features_and_prototypes(query, key, "query", "key")
    return samples.contrast_keys(
        query, key, target, inverse(temperature), direction="instance", exclude="target" if decoupled else "none",
        ignore_index=ignore_index, weight=sample_weight, reduction=reduction, ranks=ranks,
    )  # fmt: skip


def clip_loss(
    a: Tensor,
    b: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    sample_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    decoupled: bool = False,
    process_group: GroupLike = None,
) -> Tensor:
    r"""InfoNCE in both directions in one pass over the matrix, as CLIP trains (Radford et al. 2021).

    .. math::
        \ell_i = \tfrac12 \Big( \log \sum_j e^{\cos(a_i, b_j) / \tau} + \log \sum_j e^{\cos(a_j, b_i) / \tau} \Big)
                 - \cos(a_i, b_i) / \tau

    Args:
        a, b: (N, d) each; row i of one and row i of the other are a pair.
        temperature: :math:`\tau > 0`, a number or a tensor of shape () or (1,), which may require grad. CLIP learns
            the logarithm of its inverse: pass ``torch.exp(-logit_scale)``.
        sample_weight, reduction, decoupled, process_group: as in :func:`info_nce_loss`. Of the two only ``b``
            travels between ranks: the sums over its columns are exchanged as those of classes are.

    Returns, Raises: as in :func:`info_nce_loss`.

    Example:
        >>> images, texts = torch.randn(32, 64, requires_grad=True), torch.randn(32, 64, requires_grad=True)
        >>> logit_scale = torch.nn.Parameter(torch.tensor(2.6592))  # log(1 / 0.07), CLIP's start
        >>> nckernels.clip_loss(images, texts, temperature=torch.exp(-logit_scale)).backward()
        >>> logit_scale.grad.shape
        torch.Size([])
    """
    _check_options(a, temperature, reduction, "a")
    _checks.matrix("a", a, "N", "d")
    _checks.matrix("b", b, "N", "d")
    _same_pairs("a", a, "b", b)
    _check_weights(sample_weight, len(a), a)
    ranks = _ranks(
        process_group, "clip_loss", a, {"temperature": temperature}, reduction=reduction, decoupled=decoupled
    )
    if len(a) == 0 and ranks is None:
        return _nothing(a.shape[:1], reduction, inverse(temperature), a, b)
    if len(a):
        _checks.features_and_prototypes(a, b, "a", "b")
    return samples.contrast_keys(
        a, b, torch.arange(len(a), device=a.device), inverse(temperature), direction="both",
        exclude="target" if decoupled else "none", ignore_index=LEFT_OUT, weight=sample_weight,
        reduction=reduction, ranks=ranks,
    )  # fmt: skip


def uniformity_loss(input: Tensor, *, t: float = 2.0, process_group: GroupLike = None) -> Tensor:
    r"""How far unit rows are from a uniform distribution on the sphere (Wang & Isola 2020).

    .. math::
        \log \frac{1}{N (N - 1)} \sum_{i \neq j} e^{-t \lVert a_i - a_j \rVert^2}

    Args:
        input: (N, d) with N >= 2, any scale. A zero row counts as orthogonal to all others. Flatten further dimensions
            before, if the pairs are to be those of all of them: ``input.flatten(0, -2)``.
        t: > 0, of the Gaussian potential.
        process_group: None for the pairs of this process's rows, ``"world"`` for those of all processes' rows, or a
            :class:`torch.distributed.ProcessGroup`. Every rank returns the whole value, and the average over ranks of
            the gradients is the whole batch's.

    Returns:
        A scalar, float32 (float64 for float64 input).

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])  # opposite points: |a - b|^2 = 4
        >>> nckernels.uniformity_loss(x, t=2.0)
        tensor(-8.)
    """
    _checks.matrix("input", input, "N", "d")
    _checks.positive_scalar("t", t, input)
    _checks.some_columns("input", input)
    ranks = _ranks(process_group, "uniformity_loss", input, {"t": t})
    whole, n = samples.lse_of_pairs(input, 2.0 * t, ranks)  # |a - b|^2 = 2 - 2 s
    if n < 2:
        raise ValueError(f"input must have at least two rows to have pairs, got {tuple(input.shape)}")
    return whole - (math.log(n) + math.log(n - 1) + 2.0 * t)


def alignment_loss(
    input: Tensor,
    other: Tensor,
    *,
    alpha: float = 2.0,
    reduction: Reduction = "mean",
    process_group: GroupLike = None,
) -> Tensor:
    r"""How far the two members of positive pairs are apart (Wang & Isola 2020).

    .. math::
        \ell_i = \lVert a_i - b_i \rVert^\alpha

    Args:
        input, other: (N, d) or (..., d) each, any scale; feature i of one and feature i of the other are a pair.
        alpha: > 0.
        reduction: ``"none"``, ``"sum"`` or ``"mean"``; the mean of nothing is 0.
        process_group: whose pairs the mean runs over, as in :func:`supcon_loss`.

    Returns:
        A scalar, or (N,), (...); float32 (float64 for float64 input).

    Example:
        >>> a, b = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 0.0], [3.0, 0.0]])
        >>> nckernels.alignment_loss(a, b, reduction="none")  # the same direction, and orthogonal: |a - b|^2
        tensor([0., 2.])
    """
    _checks.features("input", input)
    _checks.features("other", other)
    _same_pairs("input", input, "other", other)
    _checks.same_device("input", input, "other", other)
    _checks.positive_scalar("alpha", alpha, input)
    _checks.choice("reduction", reduction, REDUCTIONS)
    ranks = _ranks(process_group, "alignment_loss", input, {"alpha": alpha}, reduction=reduction)
    squares = (unit(input) - unit(other)).square().sum(-1)
    # A power below 1 has an infinite slope at 0, where the distance itself is flat: no gradient there.
    same = squares == 0.0
    loss = (squares.masked_fill(same, 1.0) ** (alpha / 2)).masked_fill(same, 0.0)
    return reduce(loss, torch.ones_like(loss, dtype=torch.bool), None, reduction, ranks, of_nothing=0.0)


# --- arguments --------------------------------------------------------------------------------------------


def _check_options(
    input: Tensor, temperature: float | Tensor, reduction: str, name: str, ignore_index: int = 0
) -> None:
    _checks.is_tensor(name, input)
    _checks.temperature(temperature, input)
    _checks.choice("reduction", reduction, REDUCTIONS)
    _checks.integer("ignore_index", ignore_index)


def _check_weights(weight: Tensor | None, size: int, like: Tensor) -> None:
    if weight is not None:
        _checks.vector("sample_weight", weight, size, like)
        _checks.not_negative("sample_weight", weight)


def _same_pairs(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.shape != other.shape:
        raise ValueError(
            f"{name} and {other_name} must hold pairs and have the same shape, "
            f"got {tuple(value.shape)} and {tuple(other.shape)}"
        )


def _ranks(
    process_group: GroupLike, loss: str, input: Tensor, values: dict[str, float | Tensor], **options: Hashable
) -> Ranks | None:
    """The ranks that the loss spans, which agree on it, and on what decides how keys travel."""
    ranks = resolve(process_group)
    if ranks is not None:
        backend = registry.REFERENCE if registry.chosen() == registry.REFERENCE else f"other than {registry.REFERENCE}"
        agree(ranks, loss, input, values, d=input.shape[-1], set_backend=backend, **options)
    return ranks


def _samples(
    input: Tensor,
    target: Tensor | None,
    temperature: float | Tensor,
    ignore_index: int,
    sample_weight: Tensor | None,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Checked arguments as rows (N, d), labels (N,) and weights (N,)."""
    _check_options(input, temperature, reduction, "input", ignore_index)
    if input.dim() != 2 and isinstance(target, Tensor) and target.dim() == input.dim() - 1:
        input, target, sample_weight = as_rows(input, target, sample_weight)
    if input.dim() not in (2, 3):
        raise ValueError(
            "input must have shape (N, d), (B, V, d) or, with target of shape (...), (..., d), "
            f"got {tuple(input.shape)}"
        )
    if input.dim() == 3 and input.shape[1] == 0:
        raise ValueError(f"input must have at least one view of every sample, got {tuple(input.shape)}")
    rows = input.flatten(0, -2)
    _checks.matrix("input", rows, "N", "d")
    _checks.some_columns("input", rows)
    count, views = input.shape[0], 1 if input.dim() == 2 else input.shape[1]
    if target is None:
        if views < 2:
            raise ValueError(
                f"without target the positives are other views: input must be (B, V, d) with V >= 2, "
                f"got {tuple(input.shape)}"
            )
        labels = torch.arange(count, device=input.device)
    else:
        labels = _checks.target(target, input, "input")
    _check_weights(sample_weight, count, input)
    weight = None if sample_weight is None else sample_weight.repeat_interleave(views)
    return rows, labels if views == 1 else labels.repeat_interleave(views), weight


# --- steps ------------------------------------------------------------------------------------------------


def _nothing(shape: torch.Size, reduction: Reduction, beta: float | Tensor, *inputs: Tensor) -> Tensor:
    """The loss of no samples, differentiable all the same."""
    zero = torch.zeros((), dtype=accumulation_dtype(inputs[0].dtype), device=inputs[0].device)
    for x in inputs:
        zero = zero + x.to(zero.dtype).sum()
    if isinstance(beta, Tensor):
        zero = (zero + 0.0 * beta).to(zero.dtype)
    return zero.expand(shape) if reduction == "none" else zero


def _reduced(
    loss: Tensor,
    counted: Tensor | None,
    weight: Tensor | None,
    reduction: Reduction,
    shape: torch.Size,
    ranks: Ranks | None = None,
) -> Tensor:
    """The reduction of rows that were samples and their views; the mean of nothing is 0."""
    result = reduce(loss, counted, weight, reduction, ranks, of_nothing=0.0)
    return result.view(shape) if reduction == "none" and len(shape) != 1 else result
