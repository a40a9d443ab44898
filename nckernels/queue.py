"""Losses over more samples than a small batch holds: a queue of past features, and running denominators.

In the class direction ([NCD] Eqs. 4-5) each prototype is contrasted with the samples of the batch, which are few where
the batch is small. Both modules here wrap such a loss and let it see more, for the price of an approximation: past
features come from past weights of the network. Neither has an effect on losses whose sums run over the classes.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from . import _checks
from ._common import as_rows, inverse, logaddexp, of_samples, or_zero
from .backends.base import accumulation_dtype
from .distributed import collectives, groups
from .distributed.groups import Ranks
from .nn import NONLLoss, NTCELoss, PrototypeLoss, SupConLoss
from .primitive import cosine_lse


class FeatureQueue(nn.Module):
    r"""A ring buffer of past features and their labels (the queue of He et al. 2020, the memory of Wang et al. 2020).

    All of it is in the state dict. Shapes never change and nothing waits for the host, so it works under
    ``torch.compile`` and in CUDA graphs: slots that were never written have the label ``ignore_index``, with which
    losses leave them out, and features of 0.

    Args:
        size: number N of slots.
        dim: size d of the features.
        ignore_index: label of empty slots.
        device, dtype: of ``features``.

    Attributes:
        features: (N, d), as they were enqueued, in no particular order; never requires grad.
        labels: (N,) int64.

    Example:
        >>> queue = nckernels.FeatureQueue(4096, 64)  # MoCo: one positive each, the batch's keys and past ones
        >>> q, k = torch.randn(32, 64, requires_grad=True), torch.randn(32, 64)
        >>> loss = nckernels.info_nce_loss(q, torch.cat([k, queue.features]))
        >>> queue.enqueue(k)

    There labels play no part, and an empty slot counts as a key that is orthogonal to all queries.

    Each process has a queue of its own. DistributedDataParallel copies the buffers of the module it wraps from rank 0
    to all ranks, queues included, unless it is given ``broadcast_buffers=False``: keep the queue outside of that
    module, next to the loss.
    """

    features: Tensor
    labels: Tensor
    position: Tensor

    @_checks.options_by_name
    def __init__(
        self,
        size: int,
        dim: int,
        *,
        ignore_index: int = -100,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _checks.positive_integer("size", size)
        _checks.positive_integer("dim", dim)
        _checks.integer("ignore_index", ignore_index)
        self.ignore_index = int(ignore_index)
        self.register_buffer("features", torch.zeros(size, dim, device=device, dtype=dtype))
        self.register_buffer("labels", torch.full((size,), ignore_index, device=device))
        self.register_buffer("position", torch.zeros((), device=device, dtype=torch.int64))

    @torch.no_grad()
    def enqueue(self, features: Tensor, labels: Tensor | None = None) -> None:
        """Overwrite the oldest entries; of more rows than there are slots the last ones stay.

        Args:
            features: (n, d) of any floating dtype, without gradient from here on.
            labels: (n,) integers; None for losses that have no use for them. A row with ``ignore_index`` takes a
                slot that stays without effect. So does one with inf or NaN, and its slot is as an empty one.
        """
        size, dim = self.features.shape
        _checks.matrix("features", features, "n", "d")
        _checks.columns("features", features, dim, "the queue has")
        _checks.same_device("features", features, "the queue", self.features)
        if labels is None:
            labels = torch.zeros(len(features), device=features.device, dtype=torch.int64)
        labels = _checks.target(labels, features, name="labels")
        features = features[-size:].to(self.features.dtype)
        spoilt = ~features.isfinite().all(1)  # would make NaN of all losses until its slot is used again
        slots = (self.position + torch.arange(len(features), device=features.device)) % size
        self.features.index_copy_(0, slots, features.masked_fill(spoilt[:, None], 0.0))
        self.labels.index_copy_(0, slots, labels[-size:].masked_fill(spoilt, self.ignore_index))
        self.position.add_(len(features)).remainder_(size)

    def extra_repr(self) -> str:
        size, dim = self.features.shape
        return f"size={size}, dim={dim}"


class QueueLoss(nn.Module):
    r"""A loss whose samples are also contrasted with those of a :class:`FeatureQueue`.

    With the rows of the queue, :math:`q` with labels :math:`y^q`, NONL of sample i of the batch becomes

    .. math::
        \ell_i = \log \Big( \sum_{j : y_j \neq y_i} e^{S_{j,y_i} / \tau}
                 + \sum_{j : y^q_j \neq y_i} e^{\cos(q_j, w_{y_i}) / \tau} \Big) - S_{i,y_i} / \tau

    and NTCE the same over all of both. The queue's rows are no anchors: they have no loss of their own, and the mean
    runs over the batch. Their similarities are computed anew from today's prototypes, which get their gradient; the
    rows themselves are constants. In SupCon and the prototype loss they are negatives of the other labels and
    positives of their own, and count in class means.

    In training mode every call ends by enqueueing its batch; in eval mode the queue is only read.

    Args:
        criterion: an :class:`NONLLoss` (``direction`` "class" or "both"), :class:`NTCELoss`, :class:`SupConLoss` or
            :class:`PrototypeLoss`, for instance the ``criterion`` of a :class:`PrototypeClassifier`.
        queue: of the criterion's ``ignore_index``.

    Shape, Raises:
        those of the criterion; SupCon needs labels.

    Example:
        >>> head = nckernels.PrototypeClassifier(64, 10, loss="nonl")
        >>> criterion = nckernels.QueueLoss(head.criterion, nckernels.FeatureQueue(480, 64))
        >>> x, y = torch.randn(32, 64, requires_grad=True), torch.randint(10, (32,))
        >>> criterion(x, y).backward()  # where head.loss(x, y) was

    With a ``process_group`` in the criterion the rows are those of all ranks' batches and queues, each rank's queue
    with its own past: R queues of N rows are one of R N, and in the losses with prototypes none of them travel.

    Two biases come with it. Past features are those of past weights. And the sum contains rows that are constants, so
    that of the repulsion only the batch's share reaches the network: features are repelled by prototypes with
    M / (M + N) of the weight that they have in a batch of M + N samples, prototypes by features with all of it. It is
    this bias that made classes collapse further in the measurements of docs/scaling.md.

    SupCon and the prototype loss cost what a batch of M + N samples costs, the losses with prototypes
    as much as one of M + N samples of the classes in the batch.
    """

    def __init__(self, criterion: NONLLoss | NTCELoss | SupConLoss | PrototypeLoss, queue: FeatureQueue) -> None:
        super().__init__()
        if not isinstance(criterion, NONLLoss | NTCELoss | SupConLoss | PrototypeLoss):
            raise TypeError(
                f"criterion must be an NONLLoss, NTCELoss, SupConLoss or PrototypeLoss, got {type(criterion).__name__}"
            )
        if not isinstance(queue, FeatureQueue):
            raise TypeError(f"queue must be a FeatureQueue, got {type(queue).__name__}")
        _by_class(criterion, ("class", "both"))
        if criterion.ignore_index != queue.ignore_index:
            raise ValueError(
                "criterion and queue must have the same ignore_index, "
                f"got {criterion.ignore_index} and {queue.ignore_index}"
            )
        self.criterion, self.queue = criterion, queue

    def forward(self, input: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """The loss of features (M, d) or (..., d) with labels (M,) or (...), in SupCon also of (B, V, d) with (B,)."""
        _checks.columns("input", input, self.queue.features.shape[1], "the queue has")
        rows, labels, weight = _rows(input, target, sample_weight)
        past, past_labels = self.queue.features.to(rows.dtype), self.queue.labels
        if isinstance(self.criterion, NONLLoss | NTCELoss) and self.criterion.process_group is None:
            past_labels = _as_one(past_labels, labels, len(self.criterion.prototypes), self.queue.ignore_index)
        loss: Tensor = self.criterion(
            torch.cat([rows, past]),
            torch.cat([labels, past_labels]),
            torch.cat([weight, weight.new_zeros(len(past))]),
        )
        if self.criterion.reduction == "none":
            loss = loss[: len(rows)].view(input.shape[:-1])
        if self.training:
            self.queue.enqueue(rows, labels)
        return loss


class RunningDenominatorLoss(nn.Module):
    r"""NONL or NTCE whose denominators are averages over this batch and, fading, those before it.

    With :math:`\gamma` the decay, :math:`e_{jc} = e^{S_{jc} / \tau}` where the loss sums it and 0 where not,
    :math:`w_i` the weights of the samples, :math:`M_s` the number of samples of batch s and t the present one,

    .. math::
        D_c = M_t \, \frac{\sum_{s \le t} \gamma^{t-s} \sum_j e_{jc}}{\sum_{s \le t} \gamma^{t-s} M_s} \qquad
        a_c = \frac{\sum_{s \le t} \gamma^{t-s} \sum_{i : y_i = c} w_i}{\sum_{s \le t} \gamma^{t-s} \sum_i w_i} \qquad
        L = \sum_c a_c \log D_c - \frac{\sum_i w_i S_{i,y_i} / \tau}{\sum_i w_i}

    where sums over j and i run over batch s, the last two over batch t. D is a mean exponential times the size of the
    batch, so that the sizes of the others drop out. Numerators and denominators start at zero together, so that the
    first steps need no other correction: the first loss and its gradient are the criterion's own.

    In the gradient the past is a constant and the batch counts in full:

    .. math::
        \partial L = \sum_c a_c \sum_j \frac{\partial e_{jc}}{D_c} - \ldots

    These are the weights of a softmax whose denominator has a longer memory. They add up to one over many batches, not
    within each. (Derivatives of :math:`\log D` as it is written would have about :math:`1 - \gamma` of it, too little
    beside the alignment.) Whatever else is in its batch, a sample has the gradient that it has in a batch of all the
    data. SogCLR (Yuan et al. 2022) estimates contrastive losses in this way, with a running sum for each anchor.

    What it estimates: loss and gradient of the whole data as one batch. The gradient is unbiased where D and a are
    exact, while the logarithm of a small batch's sum is too small on average, by half its squared relative deviation.
    What remains is the age of the average, of about 1 / (1 - decay) steps: past exponentials are those of past features
    and past prototypes. Where they change faster, the weights of a step do not add up to one on average either, and the
    repulsion is too strong or too weak.

    Args:
        criterion: an :class:`NONLLoss` of direction "class" or an :class:`NTCELoss`, of reduction "mean", for instance
            the ``criterion`` of a :class:`PrototypeClassifier`.
        decay: :math:`\gamma` in [0, 1); 0 is the criterion itself.

    Shape, Raises:
        those of the criterion. In training mode every call updates the state, two numbers per class and one, all in the
        state dict; in eval mode it is only read. A batch with inf or NaN, whose loss is NaN, leaves it as it is.

    The exponentials of all K classes are computed for every batch, and all prototypes have a gradient, also those of
    classes that the batch lacks. With a ``process_group`` in the criterion a batch is that of all ranks, and all have
    the same state; without, each averages over its own batches, unless it is overwritten by rank 0's
    (``broadcast_buffers`` of DistributedDataParallel), which does no harm.

    Where FSDP2 shards prototypes give this module to ``fully_shard``, not the criterion, whose forward is not called.

    Example:
        >>> head = nckernels.PrototypeClassifier(64, 10, loss="nonl")
        >>> criterion = nckernels.RunningDenominatorLoss(head.criterion, decay=0.5)
        >>> x, y = torch.randn(32, 64, requires_grad=True), torch.randint(10, (32,))
        >>> loss = criterion(x, y)
        >>> torch.testing.assert_close(loss, head(x, y))  # the first one is the criterion's own
        >>> loss.backward()
    """

    lse: Tensor
    anchors: Tensor
    count: Tensor

    def __init__(self, criterion: NONLLoss | NTCELoss, decay: float = 0.9) -> None:
        super().__init__()
        if not isinstance(criterion, NONLLoss | NTCELoss):
            raise TypeError(f"criterion must be an NONLLoss or NTCELoss, got {type(criterion).__name__}")
        _by_class(criterion, ("class",))
        if criterion.reduction != "mean":
            raise ValueError(f"criterion must have reduction 'mean', got {criterion.reduction!r}")
        if criterion.sparse:
            raise ValueError("criterion must have sparse=False: every batch gives all prototypes a gradient")
        _checks.number("decay", decay)
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay must be at least 0 and less than 1, got {decay}")
        self.criterion, self.decay = criterion, float(decay)
        zeros = torch.zeros(len(criterion.prototypes), device=criterion.prototypes.device)
        zeros = zeros.to(accumulation_dtype(criterion.prototypes.dtype))
        self.register_buffer("lse", zeros - torch.inf)
        self.register_buffer("anchors", zeros)
        # One element rather than a 0-dimensional tensor, whose changes torch.compile loses (float64, CPU, torch 2.13).
        self.register_buffer("count", zeros[:1].clone())

    def forward(self, input: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """The loss of features (M, d) or (..., d) with class indices (M,) or (...)."""
        criterion = self.criterion
        input, target, sample_weight = as_rows(input, target, sample_weight, criterion.prototypes)
        prototypes = criterion.prototypes_like(input)
        _checks.features_and_prototypes(input, prototypes, "input")
        target = _checks.target(target, input, "input")
        if sample_weight is not None:
            _checks.vector("sample_weight", sample_weight, len(input), input)
            _checks.not_negative("sample_weight", sample_weight)
        exclude: Literal["target", "none"] = "target" if isinstance(criterion, NONLLoss) else "none"
        ranks = groups.resolve(criterion.process_group)
        if ranks is not None:
            classes, columns = criterion.prototypes.shape
            groups.agree(
                ranks, type(self).__name__, input, {"temperature": criterion.temperature}, num_classes=classes,
                d=columns, exclude=exclude, decay=self.decay,
            )  # fmt: skip
        lse, pos = cosine_lse(
            input, prototypes, target, inverse(criterion.temperature), direction="class",
            exclude=exclude, ignore_index=criterion.ignore_index,
        )  # fmt: skip
        counted = target != criterion.ignore_index
        weight = of_samples(criterion.weight, sample_weight, target)
        weight = counted.to(pos.dtype) if weight is None else weight.detach().to(pos.dtype).where(counted, 0.0)
        anchors = torch.zeros_like(lse).index_add(0, target.where(counted, 0), weight)
        value, slope = self._uniformity(lse.detach(), anchors, counted.sum().to(lse.dtype), ranks)
        lse = or_zero(lse)
        own = (slope * (lse - lse.detach())).sum() - (weight * pos).sum() / _summed(weight.sum(), ranks)
        return value + (own if ranks is None else ranks.size * own)

    @torch.no_grad()
    def _uniformity(self, lse: Tensor, anchors: Tensor, samples: Tensor, ranks: Ranks | None) -> tuple[Tensor, Tensor]:
        """The value of the first term, and its derivative in each class's log-sum-exp of this rank's samples."""
        decay = self.decay
        kept = self.lse.to(lse.dtype) + math.log(decay) if decay else torch.full_like(lse, -torch.inf)
        samples = _summed(samples, ranks)
        total = logaddexp(kept, lse if ranks is None else collectives.logsumexp(lse, ranks))
        anchors = decay * self.anchors.to(lse.dtype) + _summed(anchors, ranks)
        count = decay * self.count.to(lse.dtype) + samples
        if self.training:
            spoilt = total.isnan().any()  # by NaN in the batch, which would stay for good
            self.lse.copy_(total.where(~spoilt, self.lse))
            self.anchors.copy_(anchors.where(~spoilt, self.anchors))
            self.count.copy_(count.where(~spoilt, self.count))
        log_d = or_zero(total + (samples / count).log())  # a class without negatives, ever, has its alignment only
        share = anchors / anchors.sum()
        slope = share * (lse - log_d).exp()
        # torch.compile keeps what was concatenated for the backward pass. The cheap rest it computes again, here that
        # would be from buffers that have moved on.
        terms = torch.cat([slope, (share * log_d).sum()[None]])
        return terms[-1], terms[:-1]

    def extra_repr(self) -> str:
        return f"decay={self.decay:g}"


# --- steps ------------------------------------------------------------------------------------------------


def _by_class(criterion: nn.Module, directions: tuple[str, ...]) -> None:
    """NONL has a direction whose sum does not run over the samples."""
    if isinstance(criterion, NONLLoss) and criterion.direction not in directions:
        raise ValueError(
            f"criterion must have a sum over the samples, direction {' or '.join(map(repr, directions))}, "
            f"got {criterion.direction!r}"
        )


def _rows(input: Tensor, target: Tensor, sample_weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Samples and their views as rows (M, d), labels (M,) and weights (M,)."""
    _checks.is_tensor("input", input)
    _checks.is_tensor("target", target)
    if input.dim() != 3 or target.dim() != 1:
        input, target, sample_weight = as_rows(input, target, sample_weight)
    target = _checks.target(target, input, "input")
    if sample_weight is None:
        weight = torch.ones(len(target), dtype=accumulation_dtype(input.dtype), device=input.device)
    else:
        _checks.vector("sample_weight", sample_weight, len(target), input)
        weight = sample_weight
    views = 1 if input.dim() == 2 else input.shape[1]
    return input.flatten(0, -2), target.repeat_interleave(views), weight.repeat_interleave(views)


def _as_one(past: Tensor, target: Tensor, classes: int, ignore_index: int) -> Tensor:
    """Labels of the queue in which all classes that the batch lacks are one of those.

    To the batch they are all the same, negatives, and the sums of few classes have to be computed.
    """
    index = target.where(target != ignore_index, classes).clamp(0, classes)
    present = torch.zeros(classes + 1, dtype=torch.uint8, device=target.device).index_fill(0, index, 1)[:classes]
    if 0 <= ignore_index < classes:
        present[ignore_index] = 1  # it is no class
    known = (past == ignore_index) | (present[past.clamp(0, classes - 1)] == 1)
    return past.where(known, present.argmin())


def _summed(x: Tensor, ranks: Ranks | None) -> Tensor:
    """Over all ranks."""
    return x if ranks is None else collectives.all_reduce(x, ranks)
