"""Classifiers for features that were trained without one.

[NCD] section 4.3: after supervised contrastive training the class means already are a classifier, fixed prototypes
(FP), at the price of one pass over the training set. The baselines train a linear layer on frozen features: linear
probing (LP) and its normalised form (NLP), [NCD] Table 2. :func:`nckernels.compare_classifiers` runs all three.

Both are modules whose forward gives logits, with scikit-learn's method names (``fit``, ``predict``, ``score``) on
tensors. :mod:`nckernels.sklearn` has scikit-learn estimators for arrays and labels of any kind.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from . import _checks, functional
from ._common import unit

Batches = Iterable[tuple[Any, Tensor]]
Encoder = Callable[[Any], Tensor]

_CHUNK = 16384  # rows in float64 at a time


class _Classifier(nn.Module):
    """Data in either form, predictions and accuracy."""

    num_classes: int
    in_features: int

    @property
    def device(self) -> torch.device:
        """Where the classifier lives; data is taken there."""
        return next(iter(self.state_dict().values())).device

    @torch.no_grad()
    def predict(self, input: Tensor) -> Tensor:
        """(N, d) features -> (N,) class indices."""
        prediction: Tensor = self(input).argmax(-1)
        return prediction

    def score(self, input: Tensor, target: Tensor) -> float:
        """Accuracy, the share of the samples whose predicted class is ``target``; the host waits for the device."""
        input, target = self._checked(input, target)
        if len(input) == 0:
            raise ValueError("input must have at least one row to have an accuracy, got none")
        return float((self.predict(input) == target).double().mean())

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, in_features={self.in_features}"

    def _rows(self, input: Tensor, name: str = "input") -> Tensor:
        """(..., d) features on the classifier's device."""
        _checks.is_tensor(name, input)
        if not input.is_floating_point():
            raise TypeError(f"{name} must be of a floating dtype, got {input.dtype}")
        if input.dim() == 0 or input.shape[-1] != self.in_features:
            raise ValueError(f"{name} must have in_features={self.in_features} columns, got {tuple(input.shape)}")
        return input.to(self.device)

    def _checked(self, input: Tensor, target: Tensor, name: str = "input") -> tuple[Tensor, Tensor]:
        """(N, d) features and (N,) labels on the classifier's device."""
        _checks.matrix(name, input, "N", "d")
        input = self._rows(input, name)
        _checks.is_tensor("target", target)
        target = target.to(input.device)
        _checks.target(target, input, name)
        _checks.in_classes(target, self.num_classes)
        _checks.finite(name, input)
        return input, target

    def _batches(
        self, input: Tensor | Batches, target: Tensor | None, encoder: Encoder | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Checked batches of features and labels on the classifier's device."""
        if isinstance(input, Tensor):
            if target is None:
                raise TypeError("target must be given with a tensor of features, got None")
            batches: Batches = ((input, target),)
        elif target is not None:
            raise TypeError(
                "input must be a torch.Tensor, or an iterable of pairs (features, labels) without target, "
                f"got {type(input).__name__} and a target"
            )
        else:
            batches = input
        name = "input" if encoder is None else "the output of encoder"
        place = _device_of(encoder) or self.device
        for batch in batches:
            features, labels = _pair(batch)
            if encoder is not None:
                features = encoder(_moved(features, place))
            yield self._checked(features, labels, name)


class FixedPrototypes(_Classifier):
    r"""The class means of unit features as a classifier, FP ([NCD] section 4.3).

    .. math::
        \hat{y} = \arg\max_c \; u \cdot \hat\mu_c, \qquad
        \hat\mu_c = \mu_c / \lVert \mu_c \rVert, \quad \mu_c = \frac{1}{n_c} \sum_{y_i = c} u_i

    with u the unit features. The state is ``sums``, the sum of the unit features of each class, and ``counts``, the
    number of its samples or their total weight. Both are float64, so that the order of the samples, the batches and the
    number of processes do not matter, nor does the scale of the weights.

    Args:
        num_classes: K.
        in_features: d.
        temperature: :math:`\tau` of the logits :math:`u \cdot \hat\mu_c / \tau`; predictions do not depend on it.
        device: where the sums are kept; data is moved there.

    Shape:
        input (N, d) or (..., d) -> logits (N, K) or (..., K), -inf for classes without a sample.

    Example:
        >>> y = torch.arange(3).repeat(30)
        >>> x = torch.eye(3, 16)[y] + 0.1 * torch.randn(90, 16)  # three well separated classes
        >>> fp = nckernels.FixedPrototypes(3, 16).fit(x, y)  # or .fit(loader, encoder=model)
        >>> fp.score(x, y)
        1.0
        >>> torch.equal(fp.predict(x), fp(x).argmax(1))
        True
    """

    sums: Tensor
    counts: Tensor

    @_checks.options_by_name
    def __init__(
        self,
        num_classes: int,
        in_features: int,
        *,
        temperature: float = 0.1,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        _checks.positive_integer("num_classes", num_classes)
        _checks.positive_integer("in_features", in_features)
        sums = torch.zeros(num_classes, in_features, device=device, dtype=torch.float32)
        _checks.positive_scalar("temperature", temperature, sums)
        sums = sums if sums.device.type == "mps" else sums.double()  # MPS has no float64
        self.register_buffer("sums", sums)
        self.register_buffer("counts", sums.new_zeros(num_classes))
        self.num_classes, self.in_features = int(num_classes), int(in_features)
        self.temperature = temperature if isinstance(temperature, Tensor) else float(temperature)

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> Self:
        """Sums stay as precise as they are in a model that is cast, ``model.half()``: they are no parameters."""
        sums, counts = self.sums, self.counts
        super()._apply(fn, recurse)
        if self.sums.dtype != sums.dtype and self.sums.device.type != "mps":
            self.sums, self.counts = sums.to(self.sums.device), counts.to(self.sums.device)
        return self

    def fit(
        self,
        input: Tensor | Batches,
        target: Tensor | None = None,
        *,
        sample_weight: Tensor | None = None,
        encoder: Encoder | None = None,
    ) -> Self:
        """Forget the samples seen so far, then take one pass over the data.

        Without a sample (an empty loader) the classifier is as new: it can be merged, but not predict.

        Args:
            input: (N, d) features, or an iterable such as a DataLoader of pairs of features and labels. With an
                encoder the first of each pair is the encoder's input: a tensor, or a dict, list or tuple of tensors.
            target: (N,) class indices; None with an iterable.
            sample_weight: (N,) weights >= 0 of the samples in their class's mean; a sample of weight 0 does not count.
                None with an iterable.
            encoder: what turns the first of each pair into (N, d) features, for example a network. A module gets its
                input on its own device and is in eval mode for the pass. No gradients are computed.

        A loader of dicts, such as those of Hugging Face's Trainer, needs pairs made of it::

            pairs = ((batch, batch.pop("labels")) for batch in loader)
            fp.fit(pairs, encoder=lambda batch: model(**batch).pooler_output)

        Raises:
            TypeError, ValueError: naming the argument that does not fit. Values (labels out of range, features that
                are not finite) are checked on the CPU only, as the host would have to wait for another device.
        """
        if sample_weight is not None and not isinstance(input, Tensor):
            raise TypeError("sample_weight must be None with an iterable of pairs (features, labels)")
        self._own()
        self.sums.zero_()
        self.counts.zero_()
        with _evaluating(encoder):
            for features, labels in self._batches(input, target, encoder):
                self._add(features, labels, sample_weight)
        return self

    def partial_fit(self, input: Tensor, target: Tensor, *, sample_weight: Tensor | None = None) -> Self:
        """Add the samples of one batch: (N, d) features, (N,) class indices, (N,) weights as of :meth:`fit`."""
        self._own()
        for features, labels in self._batches(input, target, None):
            self._add(features, labels, sample_weight)
        return self

    @torch.no_grad()
    def _add(self, features: Tensor, labels: Tensor, weight: Tensor | None) -> None:
        if weight is not None:
            _checks.is_tensor("sample_weight", weight)
            weight = weight.to(features.device)
            _checks.vector("sample_weight", weight, len(features), features)
            _checks.not_negative("sample_weight", weight)
            _checks.finite("sample_weight", weight)
        for start in range(0, len(features), _CHUNK):
            part = slice(start, start + _CHUNK)
            rows, classes = unit(features[part]).to(self.sums.dtype), labels[part].long()
            counted = torch.ones_like(rows[:, 0]) if weight is None else weight[part].to(rows.dtype)
            if weight is not None:
                rows *= counted.unsqueeze(1)
            self.sums.index_add_(0, classes, rows)
            self.counts.index_add_(0, classes, counted)

    def _own(self) -> None:
        """Replace buffers that were made in inference mode by copies: outside of it they cannot be changed."""
        if self.sums.is_inference() and not torch.is_inference_mode_enabled():
            self.sums, self.counts = self.sums.clone(), self.counts.clone()

    def merge(self, other: FixedPrototypes) -> Self:
        """Add what another one has seen."""
        if not isinstance(other, FixedPrototypes):
            raise TypeError(f"other must be FixedPrototypes, got {type(other).__name__}")
        mine, theirs = tuple(self.sums.shape), tuple(other.sums.shape)
        if mine != theirs:
            raise ValueError(f"other must have the same classes and features, (K, d) = {mine}, got {theirs}")
        self._own()
        self.sums += other.sums.to(self.sums)
        self.counts += other.counts.to(self.counts)
        return self

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> Self:
        """Merge what all processes of a group have seen, in all of them."""
        self._own()
        dist.all_reduce(self.sums, group=group)
        dist.all_reduce(self.counts, group=group)
        return self

    @property
    def prototypes(self) -> Tensor:
        """(K, d) unit rows in float32; zeros for classes without a sample."""
        return self._unit_means().float()

    def _unit_means(self) -> Tensor:
        """The prototypes as precise as the sums. Means do not depend on the scale of the weights, so that the eps of
        the norm takes no small weights for zeros, and no square overflows."""
        means = self.sums / self.counts.masked_fill(self.counts == 0, 1).unsqueeze(1)
        return F.normalize(means, dim=1)

    def forward(self, input: Tensor) -> Tensor:
        """Cosine logits, in float64 for float64 features and in float32 for others."""
        rows = unit(self._rows(input))
        if self.counts.device.type == "cpu" and not bool(self.counts.any()):
            raise RuntimeError("FixedPrototypes has seen no samples yet; call fit or partial_fit first")
        logits = F.linear(rows, self._unit_means().to(rows.dtype)) / self.temperature
        return logits.masked_fill(self.counts == 0, -torch.inf)


class LinearProbe(_Classifier):
    """A linear layer trained on frozen features: LP, or with ``normalize`` NLP ([NCD] section 5 and App. E).

    LP is a layer with bias, trained by cross-entropy on the features as they are. NLP has unit features, unit weight
    rows and no bias (NormFace, [NCD] Eq. 3).

    Args:
        num_classes: K.
        in_features: d.
        normalize: NLP instead of LP.
        temperature: of NLP's logits.
        epochs, lr, gamma, milestones, momentum, weight_decay: of SGD; the learning rate is multiplied by ``gamma``
            after each of these shares of the epochs. The defaults are those of [NCD] for CIFAR but for lr, there 5.0.
        batch_size: samples per iteration.
        seed: of the order of the samples; the layer starts at zero (LP) or from this seed (NLP).
        device: where the layer is trained; data is moved there.

    Shape:
        input (N, d) or (..., d) -> logits (N, K) or (..., K).

    Example:
        >>> y = torch.arange(3).repeat(30)
        >>> x = torch.eye(3, 16)[y] + 0.1 * torch.randn(90, 16)
        >>> nckernels.LinearProbe(3, 16, epochs=5).fit(x, y).score(x, y)
        1.0
    """

    @_checks.options_by_name
    def __init__(
        self,
        num_classes: int,
        in_features: int,
        *,
        normalize: bool = False,
        temperature: float = 0.1,
        epochs: int = 100,
        lr: float = 0.5,
        gamma: float = 0.2,
        milestones: tuple[float, ...] = (0.6, 0.75, 0.9),
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        batch_size: int = 512,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        for name, value in (
            ("num_classes", num_classes), ("in_features", in_features), ("epochs", epochs), ("batch_size", batch_size),
        ):  # fmt: skip
            _checks.positive_integer(name, value)
        _checks.integer("seed", seed)
        self.weight = nn.Parameter(torch.zeros(num_classes, in_features, device=device))
        self.bias = None if normalize else nn.Parameter(torch.zeros(num_classes, device=device))
        for name, number in (("temperature", temperature), ("lr", lr), ("gamma", gamma)):
            _checks.positive_scalar(name, number, self.weight)
        if not isinstance(milestones, tuple | list):
            raise TypeError(f"milestones must be a tuple of numbers, got {milestones!r}")
        for share in milestones:
            _checks.in_range("milestones", share, 0.0, 1.0)
        _checks.in_range("momentum", momentum, 0.0, 1.0)
        _checks.in_range("weight_decay", weight_decay, 0.0, math.inf)
        self.num_classes, self.in_features = int(num_classes), int(in_features)
        self.temperature, self.lr, self.gamma = (
            x if isinstance(x, Tensor) else float(x) for x in (temperature, lr, gamma)
        )
        self.epochs, self.milestones = int(epochs), tuple(map(float, milestones))
        self.momentum, self.weight_decay = float(momentum), float(weight_decay)
        self.batch_size, self.seed = int(batch_size), int(seed)
        self._start()

    @torch.no_grad()
    def _start(self) -> torch.Generator:
        generator = torch.Generator().manual_seed(self.seed)
        if self.bias is not None:
            self.weight.zero_()
            self.bias.zero_()
        else:  # directions must not be zero
            rows = torch.randn(self.weight.shape, generator=generator, device=generator.device) / self.in_features**0.5
            self.weight.copy_(rows)
        return generator

    def fit(self, input: Tensor | Batches, target: Tensor | None = None, *, encoder: Encoder | None = None) -> Self:
        """Train anew on (N, d) features with (N,) class indices, or on all batches of an iterable, which are encoded
        once and held in memory. Arguments as of :meth:`FixedPrototypes.fit`. Works in any grad mode, in inference mode
        too, and under autocast, which training ignores.

        Raises:
            TypeError, ValueError: as :meth:`FixedPrototypes.fit`, and for no samples.
            FloatingPointError: if the weights have diverged.
        """
        with _evaluating(encoder):
            pairs = [(f.detach(), y.long()) for f, y in self._batches(input, target, encoder)]
        if sum(len(y) for _, y in pairs) == 0:
            raise ValueError("input must have at least one row to fit to, got none")
        with torch.inference_mode(False), torch.enable_grad(), _checks.no_autocast(self.weight):
            self._own()
            with torch.no_grad():  # copies, as inference tensors cannot be part of a graph
                features, labels = (torch.cat(parts) for parts in zip(*pairs, strict=True))
            self._train(features.to(self.weight.dtype), labels)
        if not all(bool(parameter.isfinite().all()) for parameter in self.parameters()):
            raise FloatingPointError(f"training diverged with lr={self.lr}: the weights are not finite")
        return self

    def _own(self) -> None:
        """Replace parameters that were made in inference mode by copies: they cannot be trained."""
        for name, parameter in self.named_parameters():
            if parameter.is_inference():
                setattr(self, name, nn.Parameter(parameter.detach().clone()))

    def _train(self, features: Tensor, labels: Tensor) -> None:
        generator = self._start()
        optimiser = torch.optim.SGD(
            self.parameters(), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay
        )
        drops = [round(share * self.epochs) for share in self.milestones]
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, drops, self.gamma)
        for _ in range(self.epochs):
            order = torch.randperm(len(labels), generator=generator, device=generator.device)
            for rows in order.to(self.device).split(self.batch_size):
                optimiser.zero_grad()
                self._loss(features[rows], labels[rows]).backward()  # type: ignore[no-untyped-call]
                optimiser.step()
            schedule.step()

    def _loss(self, features: Tensor, labels: Tensor) -> Tensor:
        if self.bias is None:
            return functional.normface_loss(features, self.weight, labels, temperature=self.temperature)
        return F.cross_entropy(F.linear(features, self.weight, self.bias), labels)

    def forward(self, input: Tensor) -> Tensor:
        """Logits."""
        rows = self._rows(input).to(self.weight.dtype)
        if self.bias is not None:
            return F.linear(rows, self.weight, self.bias)
        return F.linear(F.normalize(rows, dim=-1), F.normalize(self.weight, dim=1)) / self.temperature


@dataclass(frozen=True)
class ClassifierResult:
    """One classifier on one set of features."""

    name: str
    """``"FP"``, ``"LP"`` or ``"NLP"``."""
    accuracy: float
    """On the test features, between 0 and 1."""
    seconds: float
    """Time of ``fit``, without the extraction of the features."""


def compare_classifiers(
    train_input: Tensor,
    train_target: Tensor,
    test_input: Tensor,
    test_target: Tensor,
    *,
    train_encoded: Tensor | None = None,
    test_encoded: Tensor | None = None,
    num_classes: int | None = None,
    epochs: int = 100,
    lr: float = 0.5,
    batch_size: int = 512,
    temperature: float = 0.1,
    seed: int = 0,
) -> list[ClassifierResult]:
    """[NCD] Table 2: fixed prototypes, linear probe and normalised probe on the same network.

    Args:
        train_input, test_input: (N, d) features for the fixed prototypes; of a network that was trained with
            SupCon the output of its projection head.
        train_target, test_target: (N,) class indices.
        train_encoded, test_encoded: (N, D) features for the two probes: the encoder's output below the head.
            None: the same as the others.
        num_classes: K; None: one more than the largest label.
        epochs, lr, batch_size, seed: of the probes, as in :class:`LinearProbe`.
        temperature: of the normalised probe.

    Returns:
        FP, LP and NLP, in this order.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example:
        >>> y = torch.arange(3).repeat(30)
        >>> x = torch.eye(3, 16)[y] + 0.1 * torch.randn(90, 16)
        >>> for r in nckernels.compare_classifiers(x[:60], y[:60], x[60:], y[60:], epochs=5):
        ...     print(r.name, r.accuracy)
        FP 1.0
        LP 1.0
        NLP 1.0
    """
    if (train_encoded is None) != (test_encoded is None):
        raise ValueError("train_encoded and test_encoded must be given together")
    _check_set("train", train_input, train_target, train_encoded)
    _check_set("test", test_input, test_target, test_encoded)
    for what, train, test in (("input", train_input, test_input), ("encoded", train_encoded, test_encoded)):
        if train is not None and test is not None and train.shape[1] != test.shape[1]:
            raise ValueError(
                f"train_{what} and test_{what} must have the same number of columns, "
                f"got {tuple(train.shape)} and {tuple(test.shape)}"
            )
    if num_classes is None:
        num_classes = int(torch.cat([train_target.cpu(), test_target.cpu()]).max()) + 1
    low = train_input if train_encoded is None else train_encoded
    low_test = test_input if test_encoded is None else test_encoded
    device, d, low_d = train_input.device, train_input.shape[1], low.shape[1]

    def probe(normalize: bool) -> LinearProbe:
        return LinearProbe(
            num_classes, low_d, normalize=normalize, temperature=temperature, epochs=epochs, lr=lr,
            batch_size=batch_size, seed=seed, device=device,
        )  # fmt: skip

    fixed = FixedPrototypes(num_classes, d, device=device)
    return [
        _compared("FP", fixed, train_input, train_target, test_input, test_target),
        _compared("LP", probe(normalize=False), low, train_target, low_test, test_target),
        _compared("NLP", probe(normalize=True), low, train_target, low_test, test_target),
    ]


def _check_set(name: str, input: Tensor, target: Tensor, encoded: Tensor | None) -> None:
    """Features of one set for the fixed prototypes, and for the probes if they are others, with their labels."""
    for what, features in (("input", input), ("encoded", encoded)):
        if features is not None:
            _checks.matrix(f"{name}_{what}", features, "N", "d")
            if len(features) != len(input) or len(features) == 0:
                raise ValueError(f"{name}_{what} must have one row per sample and at least one, got {len(features)}")
    _checks.is_tensor(f"{name}_target", target)
    if target.shape != input.shape[:1]:
        raise ValueError(f"{name}_target must have shape ({len(input)},), got {tuple(target.shape)}")


def _compared(
    name: str,
    classifier: FixedPrototypes | LinearProbe,
    train: Tensor,
    train_target: Tensor,
    test: Tensor,
    test_target: Tensor,
) -> ClassifierResult:
    """A classifier fitted and scored, with the time of ``fit``."""
    seconds = _seconds(train.device, partial(classifier.fit, train, train_target))
    return ClassifierResult(name, classifier.score(test, test_target), seconds)


def _seconds(device: torch.device, function: Callable[[], object]) -> float:
    """How long a function takes on the device."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - start


def _pair(batch: Any) -> tuple[Any, Tensor]:
    """The two parts of a loader's batch."""
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    came = f"a batch of type {type(batch).__name__}"
    if isinstance(batch, Mapping):
        came += f" with the keys {', '.join(map(repr, batch))}; see fit for how to make pairs of it"
    elif isinstance(batch, tuple | list):
        came += f" and length {len(batch)}"
    raise TypeError(f"input must give pairs (features, labels) where it is no tensor, got {came}")


def _device_of(encoder: Encoder | None) -> torch.device | None:
    """Where a network is; None for other functions and for networks without a state."""
    if not isinstance(encoder, nn.Module):
        return None
    state = next(chain(encoder.parameters(), encoder.buffers()), None)
    return None if state is None else state.device


def _moved(value: Any, device: torch.device) -> Any:
    """Tensors, and those in dicts, lists and tuples, on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _moved(part, device) for key, part in value.items()}
    if isinstance(value, tuple | list):
        parts = [_moved(part, device) for part in value]
        return tuple(parts) if isinstance(value, tuple) else parts
    return value


@contextmanager
def _evaluating(encoder: Encoder | None) -> Iterator[None]:
    """No gradients, and a network in eval mode for the time being."""
    modules = list(encoder.modules()) if isinstance(encoder, nn.Module) else []
    modes = [module.training for module in modules]  # parts may be frozen
    for module in modules:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
