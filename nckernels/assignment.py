"""Fixed prototypes, and which of them belongs to which class ([DLP], Yang et al. 2022).

Points that are placed on the sphere beforehand need no term that pushes classes apart: every feature is attracted to
the point of its class (:func:`nckernels.dot_regression_loss`). In a simplex all points are equivalent, and any
assignment to classes will do. With more classes than dimensions they are not, and similar classes should have
neighbouring points. The assignment is then chosen during training, from the features of each class.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import Self

from . import _checks
from ._class_sums import class_sums, visible_rows
from ._common import REDUCTIONS, Reduction, as_rows, in_shape, norms, unit
from ._compact import LEFT_OUT
from .backends.base import accumulation_dtype
from .distributed import collectives, groups
from .distributed.groups import GroupLike, Ranks
from .functional import dot_regression
from .nn import _Loss, cosines

ASSIGNMENTS = ("dynamic", "static")


def assign(representatives: Tensor, points: Tensor) -> Tensor:
    r"""The one-to-one assignment of classes to points with the largest sum of inner products ([DLP] Eq. 9).

    .. math::
        A^* = \arg\min_A \sum_{j=1}^{K} -\bar z_j \cdot p_{A(j)}

    Args:
        representatives: (K, d), one row per class, not normalised: a row of twice the length has twice the weight. A
            class whose row is zero, because no sample of it has been seen, gets one of the remaining points.
        points: (K, d) points.

    Returns:
        (K,) int64, the row of ``points`` for each class; on the device of ``representatives``. The same input gives
        the same result, also if several assignments are equally good.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected, also for NaN and infinities.
        ImportError: without scipy.

    The (K, K) inner products are computed on the device in float32 (float64 for float64) and solved on the host, which
    waits for them, by :func:`scipy.optimize.linear_sum_assignment`, in float64 and O(K^3) at worst. With K = 10,000
    and d = 512 on one core that takes 7 times as long as the products where both sides are random, and less than the
    products where the representatives are near points. The solver of ``lapx`` takes 0.7 and 0.5 times as long as
    scipy's, for the same result: not enough to be worth a dependency (``python -m benchmarks solvers``).

    Example:
        >>> points = nckernels.geometry.simplex_etf(5, 8)
        >>> wanted = torch.tensor([3, 0, 4, 1, 2])
        >>> nckernels.assignment.assign(points[wanted], points)
        tensor([3, 0, 4, 1, 2])
    """
    solve = _solver()
    for name, value in (("representatives", representatives), ("points", points)):
        _checks.matrix(name, value, "K", "d")
        _checks.finite(name, value, wait=True)
    if representatives.shape != points.shape:
        raise ValueError(
            "representatives and points must have the same shape (K, d), "
            f"got {tuple(representatives.shape)} and {tuple(points.shape)}"
        )
    _checks.same_device("representatives", representatives, "points", points)
    dtype = torch.promote_types(torch.promote_types(representatives.dtype, points.dtype), torch.float32)
    with torch.no_grad(), _checks.no_autocast(points):
        products = _scaled(representatives.to(dtype)) @ _scaled(points.to(dtype)).T
    _, columns = solve(products.cpu().double().numpy(), maximize=True)
    return torch.from_numpy(columns).to(representatives.device, torch.int64)


class FixedPrototypeHead(_Loss):
    r"""A classifier whose prototypes are fixed points, assigned to the classes once or repeatedly during training.

    ``assignment="dynamic"`` is [DLP] Algorithm 1. For every class the head keeps a representative, a moving average of
    its unit features, and every ``refresh_every`` training calls it assigns the points to the classes by
    :func:`nckernels.assignment.assign`. The loss is :func:`nckernels.dot_regression_loss`, with the gradient to the
    features only. With
    ``assignment="static"`` class c has point c for good, and on a simplex that is ETF+DR (Yang et al. 2022)::

        nckernels.FixedPrototypeHead(nckernels.geometry.simplex_etf(K, d), assignment="static")

    PSC*, to which [DLP] compares, learns its prototypes instead: the rows of a linear layer, by cross-entropy and a
    uniformity term (Table 8)::

        loss = F.cross_entropy(linear(x), y) + 1e-2 * nckernels.uniformity_loss(linear.weight)

    **The moving average.** For a sample with unit feature u of class c the paper updates :math:`\bar z_c \leftarrow
    \alpha \bar z_c + (1 - \alpha) u`. Over a batch the result depends on the order of the samples. The head uses the
    mean over all orders: with the :math:`n_c` samples of a class and their mean :math:`m_c`,

    .. math::
        \bar z_c \leftarrow \alpha^{n_c} \bar z_c + (1 - \alpha^{n_c}) m_c .

    It starts at zero and is not normalised, as in [DLP] Eq. 9. Ignored samples do not change it, nor do samples whose
    features are zero, NaN or infinite.

    **The refresh.** At first class c has point c; [DLP] does not specify its first assignment. Every ``refresh_every``
    training calls the points are reassigned. As in [DLP], the call that triggers it still returns the loss of the old
    assignment. Only in a refresh does the host wait for the device.

    Args:
        prototypes: (K, d) points of any scale, for example of :func:`nckernels.geometry.uniform_prototypes`; they are
            kept in float32 or wider.
        assignment: ``"dynamic"`` or ``"static"``.
        momentum: :math:`\alpha` in [0, 1]; at 0 only the current batch counts, at 1 the averages never change.
        refresh_every: n >= 1, training calls between two assignments; one epoch in the paper.
        ignore_index, reduction: as in :func:`nckernels.dot_regression_loss`.
        process_group: the ranks whose samples are averaged, in the loss and in the representatives, as in
            :func:`nckernels.nonl_loss`. A training call of a dynamic head all-reduces the sums and counts of the
            classes, K d + K numbers. At a refresh rank 0 computes the assignment and broadcasts it. Without a group
            each process has its own representatives. DistributedDataParallel then makes every rank follow rank 0
            (with its default ``broadcast_buffers=True``; otherwise the ranks drift apart).

    Shape:
        input (M, d) or (..., d) -> cosines (M, K) or (..., K), in the order of the labels.
        input (M, d) or (..., d), target (M,) or (...) -> the loss, a scalar, or the shape of ``target`` for
        ``reduction="none"``. In training mode a dynamic head also learns from them; in eval mode nothing changes.

    Raises:
        ValueError: for points that are zero, NaN or infinite; for options out of range; for features of another d and
            labels out of range (on a GPU a device-side assertion).
        RuntimeError: by ``load_state_dict`` for another K or d, or an assignment that is no permutation.
        ImportError: for a dynamic head without scipy.

    ``state_dict`` has everything that training changes, including ``calls`` and ``reassigned``. Points and averages are
    buffers, and stay in float32 if the model is cast to 16 bits. Under ``torch.compile`` a training call of a dynamic
    head ends with a graph break, where the calls are counted; everything else compiles to one graph. Activation
    checkpointing must not include the head, which would then update its averages twice per batch.

    Example:
        >>> points = nckernels.geometry.simplex_etf(10, 64)
        >>> head = nckernels.FixedPrototypeHead(points, refresh_every=50)
        >>> x, y = torch.randn(32, 64, requires_grad=True), torch.randint(10, (32,))
        >>> head(x, y).backward()
        >>> head(x).argmax(1).shape
        torch.Size([32])
    """

    points: Tensor
    """(K, d) unit rows."""
    assignment: Tensor
    """(K,) int64, the row of ``points`` for each label."""
    representatives: Tensor
    """(K, d) moving averages of unit features; zero for classes without samples, and in a static head."""
    calls: int
    """Number of training calls of a dynamic head so far."""
    reassigned: int
    """Number of classes that the last refresh gave another point; divided by K it is the curve of [DLP] Fig. 4b."""

    @_checks.options_by_name
    def __init__(
        self,
        prototypes: Tensor,
        *,
        assignment: Literal["dynamic", "static"] = "dynamic",
        momentum: float = 0.9,
        refresh_every: int = 100,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        process_group: GroupLike = None,
    ) -> None:
        super().__init__(process_group)
        _checks.matrix("prototypes", prototypes, "K", "d")
        if 0 in prototypes.shape:
            raise ValueError(f"prototypes must have K >= 1 rows and d >= 1 columns, got {tuple(prototypes.shape)}")
        if not prototypes.is_meta:
            _check_points(prototypes.detach())
        # Scale the largest entries to 1 first, so that squares neither overflow nor underflow.
        wide = prototypes.detach().to(accumulation_dtype(prototypes.dtype))
        points = unit(wide / wide.abs().amax(1, keepdim=True))
        _checks.choice("assignment", assignment, ASSIGNMENTS)
        _checks.in_range("momentum", momentum, 0.0, 1.0)
        _checks.positive_integer("refresh_every", refresh_every)
        _checks.integer("ignore_index", ignore_index)
        _checks.choice("reduction", reduction, REDUCTIONS)
        self.dynamic, self.momentum, self.refresh_every = assignment == "dynamic", float(momentum), int(refresh_every)
        self.ignore_index, self.reduction, self.calls, self.reassigned = int(ignore_index), reduction, 0, 0
        if self.dynamic:
            _solver()
        self.register_buffer("points", points)
        self.register_buffer("assignment", torch.arange(len(points), device=points.device))
        self.register_buffer("representatives", torch.zeros_like(points))

    @property
    def prototypes(self) -> Tensor:
        """(K, d) unit rows; row c is the point of label c."""
        return self.points.index_select(0, self.assignment)

    def forward(self, input: Tensor, target: Tensor | None = None) -> Tensor:
        """The cosines of features (..., d), or their loss with labels (...)."""
        _checks.columns("input", input, self.points.shape[1], "the prototypes have")
        if target is None:
            return cosines(input, self.prototypes.to(input.dtype))
        like = target
        input, target, _ = as_rows(input, target, None)
        _checks.matrix("input", input, "M", "d")
        _checks.same_device("input", input, "the head's points", self.points)
        target = _checks.target(target, input, "input")
        _checks.in_classes(target, len(self.points), self.ignore_index)
        ranks = self._ranks(input)
        ignored = target == self.ignore_index
        label = target.masked_fill(ignored, 0)
        point = self.assignment.index_select(0, label).masked_fill(ignored, LEFT_OUT)
        loss = dot_regression(input, self.points, point, None, LEFT_OUT, self.reduction, ranks)
        if self.training and self.dynamic:
            self._learn(input.detach(), label, ignored, ranks)
            # Counted outside of the graph. A decorator would import torch._dynamo together with this module.
            (torch.compiler.disable(self._count) if torch.compiler.is_compiling() else self._count)()
        return in_shape(loss, like)

    def loss(self, input: Tensor, target: Tensor) -> Tensor:
        """``self(input, target)``: the training loss of features (..., d) with labels (...)."""
        _checks.is_tensor("target", target)
        result: Tensor = self(input, target)
        return result

    @torch.no_grad()
    def refresh(self) -> None:
        """Assign the points to the classes now; with a process group on all of its ranks."""
        if not self.dynamic:
            raise RuntimeError("a head with assignment='static' keeps its assignment")
        ranks = groups.resolve(self.process_group)
        if ranks is None:
            self._assigned(assign(self.representatives, self.points))
            return
        # The sums are the same on all ranks, but different machines may round differently. If rank 0 fails, the other
        # ranks must not wait for it.
        chosen = torch.full_like(self.assignment, LEFT_OUT)
        try:
            if ranks.rank == 0:
                chosen = assign(self.representatives, self.points)
        finally:
            dist.broadcast(chosen, group_src=0, group=ranks.group)
        if ranks.rank > 0 and int(chosen[0]) == LEFT_OUT:
            raise RuntimeError("rank 0 of process_group could not assign the points to the classes; see its error")
        self._assigned(chosen)

    def _assigned(self, chosen: Tensor) -> None:
        self.reassigned = int((chosen != self.assignment).sum())
        self.assignment.copy_(chosen)

    @torch.no_grad()
    def _learn(self, input: Tensor, label: Tensor, ignored: Tensor, ranks: Ranks | None) -> None:
        """Update the representatives by the mean of the paper's recursion over all orders of the batch."""
        rows = visible_rows(input, ignored)
        length = norms(rows, input.dtype)
        left_out = ignored | ~length.isfinite() | (rows == 0.0).all(1)
        rows = (rows / length[:, None]).masked_fill(left_out[:, None], 0.0).to(self.representatives.dtype)
        sums, counts = class_sums(rows, label, left_out, len(self.points))
        if ranks is not None:
            both = collectives.all_reduce(torch.cat([sums, counts[:, None]], 1), ranks)
            sums, counts = both[:, :-1], both[:, -1]
        kept = torch.pow(torch.full_like(counts, self.momentum), counts)[:, None]  # 0 ** 0 is 1
        means = sums / counts.clamp_min(1.0)[:, None]
        self.representatives.mul_(kept).add_((1.0 - kept) * means)

    def _count(self) -> None:
        self.calls += 1
        if self.calls % self.refresh_every == 0:
            self.refresh()

    def _ranks(self, input: Tensor) -> Ranks | None:
        ranks = groups.resolve(self.process_group)
        if ranks is not None:
            classes, columns = self.points.shape
            groups.agree(
                ranks, "FixedPrototypeHead", input, {}, num_classes=classes, d=columns, reduction=self.reduction,
                dynamic=self.dynamic, momentum=self.momentum, refresh_every=self.refresh_every, training=self.training,
            )  # fmt: skip
        return ranks

    def get_extra_state(self) -> Tensor:
        """``calls`` and ``reassigned``."""
        return torch.tensor([self.calls, self.reassigned])

    def set_extra_state(self, state: Tensor) -> None:
        """Restore ``calls`` and ``reassigned``; 0.2.0 had ``calls`` only."""
        self.calls, self.reassigned = (*map(int, state.flatten()), 0)[:2]

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        found = state_dict.get(f"{prefix}assignment")
        if isinstance(found, Tensor) and found.shape == self.assignment.shape and not found.is_meta:
            rows = torch.arange(len(found), device=found.device)
            if found.is_floating_point() or not torch.equal(found.long().sort().values, rows):
                errors = args[-1]
                errors.append(
                    f"{prefix}assignment must be a permutation of 0 to {len(found) - 1}, one point for each class, "
                    f"got {found[:8].tolist()}{'...' if len(found) > 8 else ''}"
                )
                return
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> Self:
        """Keep points and averages in float32 if the model is cast, as by ``model.half()``."""
        exact = {name: self._buffers[name] for name in ("points", "representatives")}
        super()._apply(fn, recurse)
        for name, before in exact.items():
            now = self._buffers[name]
            assert before is not None
            assert now is not None
            if now.dtype.itemsize < 4:
                self._buffers[name] = before.to(now.device)
        return self

    def extra_repr(self) -> str:
        k, d = self.points.shape
        shown = f"in_features={d}, num_classes={k}, assignment={'dynamic' if self.dynamic else 'static'!r}"
        if self.dynamic:
            shown += f", momentum={self.momentum:g}, refresh_every={self.refresh_every}"
        return ", ".join(filter(None, (shown, super().extra_repr())))


def _scaled(matrix: Tensor) -> Tensor:
    """The matrix divided by a power of two, which is exact, so that products of its entries do not overflow."""
    if matrix.numel() == 0:
        return matrix
    limit = 1 - math.frexp(torch.finfo(matrix.dtype).tiny)[1]  # a smaller power of two would not be normal
    exponent = torch.frexp(matrix.abs().amax()).exponent.clamp(0, limit)
    return matrix * torch.ldexp(matrix.new_ones(()), -exponent)


def _check_points(prototypes: Tensor) -> None:
    """Check that all rows are finite and not zero."""
    bad = ~prototypes.isfinite().all(1) | (prototypes == 0.0).all(1)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"prototypes must have finite rows that are not zero, got {prototypes[row, :4].tolist()}"
            f"{'...' if prototypes.shape[1] > 4 else ''} in row {row}"
        )


def _solver() -> Callable[..., Any]:
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError('the assignment needs scipy: pip install "nckernels[lab]"') from error
    return linear_sum_assignment
