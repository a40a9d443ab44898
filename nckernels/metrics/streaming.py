"""Neural collapse of a set that does not fit in memory: batch by batch, on a GPU or a CPU, across processes.

* :class:`CollapseMetric` rides along with any evaluation loop as a ``torchmetrics.Metric``. One pass over the samples
  gives every field of :class:`~nckernels.metrics.NeuralCollapse` but ``intra_erank`` and ``nc4``, which compare samples
  with the final class means.
* :func:`measure` reads a loader as often as it must and gives all of them.

Both equal :func:`~nckernels.metrics.neural_collapse` up to float64's rounding, in any order and split of the samples.
Sums of squares are never subtracted: scatter is taken about running means, and two sets are merged by

    n = n_a + n_b,   m = m_a + (n_b / n) (m_b - m_a),   S = S_a + S_b + (n_a n_b / n) (m_b - m_a)(m_b - m_a)^T

for each class (Chan, Golub and LeVeque 1983), so that features far from the origin lose nothing.

Needs torchmetrics: ``pip install "nckernels[lab]"``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, fields, replace
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import _checks
from .measures import (
    NAN,
    ClassStatistics,
    _spectrum_rank,
    are_labels,
    between_class_axes,
    check_labels,
    check_positive,
    covariance_rank,
    described,
    directions,
    double,
    home,
    is_matrix,
    nearest_mean_agreement,
    rounding_noise,
    without_rounding,
)
from .report import NeuralCollapse, report_of

try:
    from torchmetrics import Metric
except ImportError as error:
    raise ImportError('nckernels.metrics.streaming needs torchmetrics: pip install "nckernels[lab]"') from error

_NEEDS_MEANS = ("intra_erank", "nc4")
_MATRIX_BYTES = 12  # times d^2 for a class: its scatter matrix, and half as much for rows that wait to be added to it
T = TypeVar("T")


class _Moments(NamedTuple):
    """Views of one (K + d, d + 2) tensor, because torchmetrics reduces one state at a time and these merge together."""

    counts: Tensor
    """(K,) n_c."""
    scatters: Tensor
    """(K,) sum over the class of |u_i - m_c|^2."""
    means: Tensor
    """(K, d) m_c, 0 where n_c is."""
    within: Tensor
    """(d, d) N S_W, the sum over all samples of (u_i - m_{y_i})(u_i - m_{y_i})^T."""

    @classmethod
    def of(cls, state: Tensor) -> _Moments:
        dim = state.shape[1] - 2
        classes, within = state.tensor_split([len(state) - dim])
        return cls(classes[:, 0], classes[:, 1], classes[:, 2:], within[:, 2:])

    def add(self, u: Tensor, target: Tensor) -> None:
        """Merge a batch, in one product of its rows whatever K is.

        A sample's row is u_i - m_b + sqrt(n_a / n) (m_b - m_a), m_b the batch's class mean. The first difference sums
        to zero in each class, so that the product of the rows has no mixed terms: it is what a merge adds to S_a.
        """
        batch = torch.zeros_like(self.counts).index_add_(0, target, torch.ones_like(u[:, 0]))
        rows = u - self.means[target]
        shift = torch.zeros_like(self.means).index_add_(0, target, rows / batch[target].unsqueeze(1))  # m_b - m_a
        share = batch / (self.counts + batch).clamp(min=1)
        rows -= shift[target] * (1 - (1 - share).sqrt())[target].unsqueeze(1)
        self.counts.add_(batch)
        self.scatters.index_add_(0, target, rows.square().sum(1))
        self.means.addcmul_(share.unsqueeze(1), shift)
        self.within.addmm_(rows.T, rows)

    def merge(self, other: _Moments) -> None:
        shift = other.means - self.means
        share = other.counts / (self.counts + other.counts).clamp(min=1)
        rows = shift * (self.counts * share).sqrt().unsqueeze(1)
        self.counts.add_(other.counts)
        self.scatters.add_(other.scatters).add_(rows.square().sum(1))
        self.means.addcmul_(share.unsqueeze(1), shift)
        self.within.add_(other.within).addmm_(rows.T, rows)


def _merged(states: Tensor) -> Tensor:
    """The reduction that torchmetrics calls with stacked states."""
    total = states[0].clone()
    for state in states[1:]:
        _Moments.of(total).merge(_Moments.of(state))
    return total


class CollapseMetric(Metric):
    """Neural collapse over any number of batches, as a ``torchmetrics.Metric``.

    ``compute()`` returns a dict with a 0-dimensional float64 tensor for each field of
    :class:`~nckernels.metrics.NeuralCollapse`, ``report()`` the same as floats. ``intra_erank`` and ``nc4`` are NaN:
    see :func:`measure`. Classes without samples and the like give what :func:`~nckernels.metrics.neural_collapse` says;
    no samples at all give NaN everywhere.

    The state is float64 on every device (on the CPU for Metal, which has no float64) whatever dtype the module is cast
    to, and takes 8 (K + d)(d + 2) bytes: 50 MB for 1000 classes and d = 2048. Synchronising gathers the states of all
    ranks and needs about twice that for each rank. Ranks may have different numbers of samples, or none.

    ``forward`` computes every metric of its batch alone, which takes far longer than ``update``.

    Args:
        num_classes: K.
        dim: number of features d.
        prototypes: (K, d), see :meth:`set_classifier`.
        bias: (K,), see :meth:`set_classifier`.
        kwargs: those of ``torchmetrics.Metric``, such as ``process_group``.

    Example:
        >>> from nckernels.metrics.streaming import CollapseMetric
        >>> loader = [(torch.randn(32, 8), torch.randint(10, (32,))) for _ in range(4)]
        >>> encoder, classifier = nn.Linear(8, 16), nn.Linear(16, 10)
        >>> metric = CollapseMetric(num_classes=10, dim=16)
        >>> for images, target in loader:
        ...     metric.update(encoder(images), target)
        >>> metric.set_classifier(classifier.weight, classifier.bias)
        >>> bool(metric.report().within_scatter > 0)
        True
    """

    is_differentiable = False
    full_state_update = False

    moments: Tensor
    noise: Tensor

    def __init__(
        self,
        num_classes: int,
        dim: int,
        *,
        prototypes: Tensor | None = None,
        bias: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        # torchmetrics would answer from its cache on a rank without new samples, and the others wait for it.
        super().__init__(**{"compute_with_cache": False, **kwargs})
        check_positive("num_classes", num_classes)
        check_positive("dim", dim)
        self.num_classes, self.dim = num_classes, dim
        place = home(self.device)
        state = torch.zeros(num_classes + dim, dim + 2, dtype=torch.float64, device=place)
        self.add_state("moments", state, dist_reduce_fx=_merged)
        self.add_state("noise", torch.zeros((), dtype=torch.float64, device=place), dist_reduce_fx="max")
        self.set_classifier(prototypes, bias)

    def set_classifier(self, prototypes: Tensor | None, bias: Tensor | None = None) -> None:
        """Compare with these prototypes (K, d) and this bias (K,) from now on; None leaves their metrics NaN.

        The metric keeps copies, which are not part of its state: call this again when the classifier has changed.

        Raises:
            ValueError: if a shape or dtype does not fit, or a value is not finite.
        """
        self._prototypes = _checked("prototypes", prototypes, (self.num_classes, self.dim))
        self._bias = _checked("bias", bias, (self.num_classes,))
        self._computed = None

    def update(self, features: Tensor, target: Tensor) -> None:
        """Add samples.

        Args:
            features: (B, d), any floating-point dtype, any positive scale per row. B may be 0.
            target: (B,) integer labels in [0, K).

        Raises:
            ValueError: if a shape, dtype or device does not fit, or, on the CPU, if a label is out of range or a value
                is not finite. The host does not wait for a GPU to look: there a label out of range is a device-side
                assertion, and a value that is not finite a ValueError of ``compute``.
        """
        _check_batch(features, target, self.num_classes, self.dim)
        u = directions(features)
        if u.device != self.moments.device:
            raise ValueError(
                f"features: expected them on {self.moments.device} as the metric is (see metric.to), got {u.device}"
            )
        if self.moments.is_inference() and not torch.is_inference_mode_enabled():
            self.moments = self.moments.clone()  # what inference mode made cannot be changed in place outside of it
        _Moments.of(self.moments).add(u, target.to(device=u.device, dtype=torch.int64))
        self.noise = self.noise.clamp(min=rounding_noise(features.dtype))

    def compute(self) -> dict[str, Tensor]:
        """Every metric by its name, as float64 on the device of the state.

        Raises:
            ValueError: if a feature was not finite.
        """
        values = asdict(_report(self.moments, self.noise, self._prototypes, self._bias))
        return {name: self.moments.new_tensor(value) for name, value in values.items()}

    def report(self) -> NeuralCollapse:
        """``compute()`` as floats."""
        return NeuralCollapse(**{name: value.item() for name, value in self.compute().items()})

    def _states(self) -> dict[str, Tensor]:
        """The defaults, none of which is a list."""
        return {name: default for name, default in self._defaults.items() if isinstance(default, Tensor)}

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        """Follow the module to another device, in float64."""
        self._computed = self._forward_cache = None
        super()._apply(fn, exclude_state=tuple(self._defaults))
        place = home(self.device)
        for name, default in self._states().items():
            self._defaults[name] = default.to(place)
            setattr(self, name, getattr(self, name).to(place))
        return self

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        """A state of another K or d is an error, as other shapes are in PyTorch; the checkpoint keeps its tensors."""
        errors: list[str] = args[-1]
        for name, default in self._states().items():
            saved = state_dict.get(prefix + name)
            if saved is None:
                continue
            if saved.shape == default.shape:
                state_dict[prefix + name] = saved.to(getattr(self, name), copy=True)
                self._computed, self._update_count = None, max(1, self._update_count)
            else:
                del state_dict[prefix + name]
                errors.append(f"{prefix}{name}: expected shape {tuple(default.shape)}, got {tuple(saved.shape)}")
        super()._load_from_state_dict(state_dict, prefix, *args)


def _statistics(state: Tensor, noise: Tensor) -> tuple[ClassStatistics, Tensor]:
    """Of the unit features of the classes that occur, and which classes those are, (K,) bool."""
    moments = _Moments.of(state)
    present = moments.counts > 0
    counts, means, scatters = moments.counts[present], moments.means[present], moments.scatters[present]
    squares = (scatters.sum() + (counts * means.square().sum(1)).sum()) / counts.sum()  # mean of |u_i|^2
    no_labels = torch.empty(0, dtype=torch.int64, device=state.device)
    rounding = (noise * squares.sqrt()).item()
    return ClassStatistics(without_rounding(means, rounding), scatters / counts, counts, no_labels, rounding), present


def _report(state: Tensor, noise: Tensor, prototypes: Tensor | None, bias: Tensor | None) -> NeuralCollapse:
    """All but ``intra_erank`` and ``nc4``, which are NaN."""
    if not state.isfinite().all():
        raise ValueError("features must be finite, got inf or NaN in a batch")
    statistics, present = _statistics(state, noise)
    means, counts = statistics.means, statistics.counts
    if len(means) == 0:
        return NeuralCollapse(**{field.name: NAN for field in fields(NeuralCollapse)})
    total = counts.sum()
    axes = between_class_axes(statistics)
    projected = (axes * (_Moments.of(state).within @ axes)).sum() / total  # tr(S_W X X^T)
    return report_of(
        statistics,
        axes,
        present,
        prototypes,
        bias,
        mean=(counts @ means) / total,
        noise=noise.item(),
        intra_erank=NAN,
        nc1=projected.item() if axes.shape[1] else NAN,
        nc4=NAN,
    )


@torch.no_grad()
def measure(
    batches: Iterable[tuple[Any, Tensor]],
    num_classes: int | None = None,
    *,
    encoder: Callable[[Any], Tensor] | None = None,
    prototypes: Tensor | None = None,
    bias: Tensor | None = None,
    memory: int = 2**30,
    progress: bool = False,
) -> NeuralCollapse:
    """:func:`~nckernels.metrics.neural_collapse` of a data loader, every field of it, in bounded memory.

    The first pass makes what :class:`CollapseMetric` has. ``intra_erank`` needs the samples of a class together: later
    passes take as many classes at a time as ``memory`` has room for. A class of n samples needs n d numbers of the
    features' dtype, its rows, or 12 d^2 bytes, its scatter matrix with rows that wait for it, whichever is less.

    At ImageNet's size (1.28 million samples, d = 2048, 1000 classes) the rows of all classes are 10.5 GB of float32.
    The default memory of 1 GiB asks for 1 + 10 passes, 4 GiB for 1 + 3, and 10 GiB for 1 + 1. With W ranks, each of
    which has its share of every class, W times as many classes fit into a pass. Where the encoder is slow, give more
    memory, or save its features once and pass batches of those.

    In a job of torch.distributed all ranks call this, each with its own samples (possibly none), and get the same
    result. The samples that ``DistributedSampler`` repeats to give all ranks as many count as often as they come.

    Args:
        batches: (input, target) pairs, as of a ``DataLoader``, that can be read again and give the same samples each
            time, in any order: no random augmentation, no dropped last batch of a shuffled set.
        num_classes: K, by default the number of prototypes or the length of the bias.
        encoder: makes features (B, d) of an input, in eval mode and on the device where the work is to be done; by
            default the input is the features. Targets follow the features.
        prototypes: (K, d) as of :func:`~nckernels.metrics.neural_collapse`.
        bias: (K,) as of :func:`~nckernels.metrics.neural_collapse`.
        memory: bytes on each rank for the rows and scatter matrices of a pass. Beside it there are two states of
            :class:`CollapseMetric`, and those that it gathers from other ranks, a few matrices (d, d) and (K, d), and a
            few copies of a batch in float64.
        progress: show a progress bar for each pass.

    Raises:
        TypeError: if ``batches`` can be read only once.
        ValueError: if an argument does not fit the above, if there are no samples, if a pass has other samples than the
            first, or if ``memory`` has no room for a single class; and as :meth:`CollapseMetric.update`.

    Example:
        >>> from nckernels.metrics.streaming import measure
        >>> x, y = torch.randn(128, 16), torch.randint(10, (128,))
        >>> in_parts = measure(list(zip(x.split(32), y.split(32))), num_classes=10)
        >>> math.isclose(in_parts.nc1, nckernels.metrics.neural_collapse(x, y).nc1)
        True
    """
    if isinstance(batches, Iterator):
        raise TypeError(
            f"batches: expected something that can be read several times, such as a DataLoader or a list, got a "
            f"{type(batches).__name__}, which is used up after one pass"
        )
    if getattr(encoder, "training", False):
        raise ValueError("encoder: expected it in eval mode (encoder.eval()), got training mode")
    check_positive("memory", memory)
    classifier = next((x for x in (prototypes, bias) if x is not None), None)
    if num_classes is None:
        if classifier is None:
            raise ValueError("num_classes: expected an integer where there are no prototypes and no bias, got None")
        num_classes = len(classifier)

    def read(number: int, of: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in _with_progress(batches, f"pass {number}" + (f" of {of}" if of else ""), progress):
            if not isinstance(batch, tuple | list) or len(batch) != 2:
                raise ValueError(f"batches: expected pairs of an input and a tensor of labels, got {described(batch)}")
            if not isinstance(batch[1], Tensor):
                raise ValueError(f"batches: expected tensors of labels, got {described(batch[1])}")
            features = batch[0] if encoder is None else encoder(batch[0])
            if not isinstance(features, Tensor) or features.ndim != 2:
                raise ValueError(f"features: expected a tensor (B, d), got {described(features)}")
            if len(features):
                yield features, batch[1].to(features.device)

    first = read(1)
    start = next(first, None)
    dim = _agreed_dim(None if start is None else start[0], num_classes, memory, prototypes, bias)
    place = _default_place(classifier) if start is None else home(start[0].device)
    metric = CollapseMetric(num_classes, dim, prototypes=prototypes, bias=bias, sync_on_compute=False).to(place)
    raw = None if prototypes is None or bias is None else _RawMeans(num_classes, dim, place)
    dtype = torch.bfloat16 if start is None else start[0].dtype  # of the rows that are kept
    for features, target in itertools.chain([] if start is None else [start], first):
        metric.update(features, target)
        dtype = torch.promote_types(dtype, features.dtype)
        if raw is not None:
            raw.add(features, target)
    own = _Moments.of(metric.moments).counts.long().tolist()
    metric.sync()
    if raw is not None:
        raw.sync()
    state, noise = metric.moments, metric.noise  # of all ranks until the metric computes or is reset
    report = _report(state, noise, prototypes, bias)
    moments = _Moments.of(state)
    statistics, present = _statistics(state, noise)
    agreement = None
    if prototypes is not None:
        agreement = _Agreement(prototypes, bias, statistics, present, raw, noise.item())
    most = [max(counts) for counts in zip(*_from_all_ranks(own), strict=True)]
    item = max(_from_all_ranks(dtype.itemsize))
    blocks = _plan((moments.counts > 1).tolist(), most, item, dim, memory)
    passes = max(len(blocks), int(agreement is not None))
    ranks = 0.0
    for number in range(passes):
        scatters = _Scatters(blocks[number], own, moments, dtype) if number < len(blocks) else None
        for features, target in read(number + 2, passes + 1):
            _check_batch(features, target, num_classes, dim)
            if scatters is not None:
                scatters.add(features, target)
            if agreement is not None and number == 0:
                agreement.add(features)
        if scatters is not None:
            ranks += scatters.ranks(noise.item())
        del scatters  # before the next are made
    measured = sum(len(block.classes) for block in blocks)
    return replace(
        report,
        intra_erank=sum(_from_all_ranks(ranks)) / measured if measured else NAN,
        nc4=NAN if agreement is None else agreement.share(),
    )


class _Block(NamedTuple):
    """Classes whose scatter is measured in one pass."""

    classes: list[int]
    matrices: bool
    """Whether rows are added to scatter matrices or all kept until the end of the pass."""


def _plan(wanted: list[bool], counts: list[int], item: int, dim: int, memory: int) -> list[_Block]:
    """Blocks of the classes that are wanted, each within the memory on a rank that has ``counts`` of them."""
    matrix = _MATRIX_BYTES * dim * dim
    blocks: list[_Block] = []
    for matrices in (False, True):
        free = 0
        for c, count in enumerate(counts):
            rows = count * dim * item
            if not wanted[c] or (matrix < rows) != matrices:
                continue
            need = min(matrix, rows)
            if need > memory:
                raise ValueError(f"memory: expected at least {need} bytes, for a single class, got {memory}")
            if need > free or not blocks or blocks[-1].matrices != matrices:
                blocks.append(_Block([], matrices))
                free = memory
            blocks[-1].classes.append(c)
            free -= need
    return blocks


class _Scatters:
    """The effective ranks of a block of classes: rows, or their scatter matrices about the final class means."""

    def __init__(self, block: _Block, counts: list[int], moments: _Moments, dtype: torch.dtype) -> None:
        """``counts``: the samples of each class on this rank."""
        self.classes, self.moments = block.classes, moments
        self.expected = [counts[c] for c in block.classes]
        means = moments.means
        dim, size = means.shape[1], len(block.classes)
        self.slots = torch.full((len(means),), -1, device=means.device)
        self.slots[torch.tensor(block.classes, device=means.device)] = torch.arange(size, device=means.device)
        self.matrices = means.new_zeros(size, dim, dim) if block.matrices else None
        room = sum(self.expected)
        if block.matrices:
            room = min(room, max(1, size * dim * 4 // dtype.itemsize))
        self.rows = torch.empty(room, dim, dtype=dtype, device=means.device)
        self.labels = torch.empty(room, dtype=torch.int64, device=means.device)
        self.waiting = 0
        self.seen = [0] * size

    def add(self, features: Tensor, target: Tensor) -> None:
        """Keep the rows of this block's classes; the host waits to learn how many there are."""
        slots = self.slots[target.to(device=self.slots.device, dtype=torch.int64)]
        chosen = (slots >= 0).nonzero().squeeze(1)
        rows, labels = features.detach().to(self.rows.device)[chosen], slots[chosen]
        while len(rows):
            if self.waiting == len(self.rows):
                self._fold()
            more = min(len(rows), len(self.rows) - self.waiting)
            place = slice(self.waiting, self.waiting + more)
            self.rows[place], self.labels[place] = rows[:more], labels[:more]
            self.waiting += more
            rows, labels = rows[more:], labels[more:]

    def ranks(self, noise: float) -> float:
        """The sum of the effective ranks of those classes that this rank takes on: all of them if it is alone."""
        parts = self._by_class()
        if self.seen != self.expected:
            raise self._other_samples()
        rank, size = (dist.get_rank(), dist.get_world_size()) if _distributed() else (0, 1)
        total = 0.0
        for start in range(0, len(parts), size):
            mine = None
            for taker, slot in enumerate(range(start, min(start + size, len(parts)))):
                if self.matrices is None and size == 1 and len(parts[slot]) < self.rows.shape[1]:
                    total += covariance_rank(directions(self.rows[parts[slot]]), noise=noise)
                    continue
                matrix = self._scatter(slot, parts[slot])
                if size > 1:
                    dist.reduce(matrix, dst=taker)
                if taker == rank:
                    mine = slot, matrix
            if mine is not None:
                total += self._rank(*mine, noise)
        return total

    def _rank(self, slot: int, scatter: Tensor, noise: float) -> float:
        """As :func:`covariance_rank` of the rows whose scatter matrix this is."""
        c = self.classes[slot]
        trace = scatter.trace()
        squares = trace + self.moments.counts[c] * self.moments.means[c].square().sum()
        if trace <= noise**2 * squares:
            return 0.0
        return _spectrum_rank(torch.linalg.eigvalsh(scatter).clamp(min=0))

    def _scatter(self, slot: int, index: Tensor) -> Tensor:
        """The scatter matrix of a class with the rows at ``index``: the one that is kept, if they are."""
        dim = self.rows.shape[1]
        matrix = self.moments.means.new_zeros(dim, dim) if self.matrices is None else self.matrices[slot]
        for part in index.split(dim):
            deviations = directions(self.rows[part]) - self.moments.means[self.classes[slot]]
            matrix.addmm_(deviations.T, deviations)
        return matrix

    def _fold(self) -> None:
        """Add the rows that wait to their scatter matrices: many at once, since a matrix is larger than a few rows."""
        if self.matrices is None or not len(self.rows):
            raise self._other_samples()
        for slot, index in enumerate(self._by_class()):
            if len(index):
                self._scatter(slot, index)
        self.waiting = 0

    def _by_class(self) -> list[Tensor]:
        """Where the rows that wait are, for each class."""
        labels = self.labels[: self.waiting]
        sizes = torch.bincount(labels, minlength=len(self.classes)).tolist()
        self.seen = [a + b for a, b in zip(self.seen, sizes, strict=True)]
        return list(labels.argsort().split(sizes))

    def _other_samples(self) -> ValueError:
        return ValueError("batches: expected the same samples in every pass, got other numbers of them in some classes")


class _RawMeans:
    """Class means of the features as given."""

    def __init__(self, num_classes: int, dim: int, place: torch.device) -> None:
        self.sums = torch.zeros(num_classes, dim, dtype=torch.float64, device=place)
        self.squares = torch.zeros((), dtype=torch.float64, device=place)

    def add(self, features: Tensor, target: Tensor) -> None:
        z = double(features)
        self.sums.index_add_(0, target.to(device=z.device, dtype=torch.int64), z)
        self.squares += z.square().sum()

    def sync(self) -> None:
        if _distributed():
            dist.all_reduce(self.sums)
            dist.all_reduce(self.squares)

    def statistics(self, unit: ClassStatistics, present: Tensor, noise: float) -> ClassStatistics:
        """Like those of the unit features but for the variances, which nobody asks for."""
        rms = (self.squares / unit.counts.sum()).sqrt().item()
        return unit._replace(means=self.sums[present] / unit.counts.unsqueeze(1), rounding=noise * rms)


class _Agreement:
    """NC4, against the final means."""

    def __init__(
        self,
        prototypes: Tensor,
        bias: Tensor | None,
        statistics: ClassStatistics,
        present: Tensor,
        raw: _RawMeans | None,
        noise: float,
    ) -> None:
        place = present.device
        self.raw = raw is not None
        self.prototypes = double(prototypes) if self.raw else directions(prototypes)
        self.prototypes = self.prototypes.to(place)[present]
        self.bias = None if bias is None else double(bias).to(place)[present]
        compared = statistics if raw is None else raw.statistics(statistics, present, noise)
        self.means = compared.means
        self.defined = not math.isnan(compared.between)
        self.samples = int(statistics.counts.sum())
        self.agree = 0

    def add(self, features: Tensor) -> None:
        x = double(features) if self.raw else directions(features)
        self.agree += round(nearest_mean_agreement(x, self.prototypes, self.means, self.bias) * len(x))

    def share(self) -> float:
        return sum(_from_all_ranks(self.agree)) / self.samples if self.defined else NAN


def _check_batch(features: Tensor, target: Tensor, num_classes: int, dim: int) -> None:
    """Shapes and dtypes, and values where looking at them makes nobody wait."""
    if not is_matrix(features) or features.shape[1] != dim:
        raise ValueError(f"features: expected a floating-point tensor (B, {dim}), got {described(features)}")
    if not are_labels(target, len(features)):
        raise ValueError(f"target: expected {len(features)} integer labels, got {described(target)}")
    if len(features) and _checks.host_knows(features):
        _checks.finite("features", features)
        check_labels(target, num_classes)


def _checked(name: str, value: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """A copy of a finite floating-point tensor of this shape."""
    if value is None:
        return None
    if not isinstance(value, Tensor) or tuple(value.shape) != shape or not value.is_floating_point():
        raise ValueError(f"{name}: expected a floating-point tensor of shape {shape}, got {described(value)}")
    _checks.finite(name, value, wait=True)
    return value.detach().clone()


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _from_all_ranks(value: T) -> list[T]:
    """The values of all ranks in order."""
    if not _distributed():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _agreed_dim(
    features: Tensor | None, num_classes: int, memory: int, prototypes: Tensor | None, bias: Tensor | None
) -> int:
    """The number of features on all ranks; some have no samples. Ranks that disagree would wait for one another."""
    options = num_classes, memory, prototypes is not None, bias is not None
    if any(other != options for other in _from_all_ranks(options)):
        raise ValueError(
            "num_classes, memory, prototypes, bias: expected all ranks to give the same number of classes, the same "
            "memory, and prototypes and bias or neither of them"
        )
    dims = {d for d in _from_all_ranks(None if features is None else features.shape[1]) if d is not None}
    if not dims:
        raise ValueError("batches: expected at least one sample, got none")
    if len(dims) > 1:
        raise ValueError(f"features: expected the same number of columns d on all ranks, got {sorted(dims)}")
    return dims.pop()


def _default_place(classifier: Tensor | None) -> torch.device:
    """Where a rank without samples takes part."""
    if classifier is not None:
        return home(classifier.device)
    nccl = _distributed() and "nccl" in dist.get_backend()
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


def _with_progress(batches: Iterable[T], name: str, progress: bool) -> Iterable[T]:
    if not progress:
        return batches
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError('progress=True needs tqdm: pip install "nckernels[lab]"') from error
    return tqdm(batches, desc=name, unit="batch")
