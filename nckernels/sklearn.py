"""scikit-learn estimators of :mod:`nckernels.classifiers`: arrays and labels of any kind, pipelines, grid search.

:class:`FixedPrototypesClassifier` has the class means of unit features as prototypes, :class:`LinearProbeClassifier`
is a linear layer trained by SGD. Features come as NumPy arrays, lists, data frames or tensors, labels as numbers or
strings. Predictions are NumPy arrays.

Tensors stay on their device: with ``device=None`` the classifier is made where the features are that it is fitted to,
and on the CPU for all but tensors. Only labels, predictions and scores of samples go through the host.

Importing this module needs scikit-learn 1.6 or newer: ``pip install "nckernels[sklearn]"``.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from . import _checks
from .classifiers import FixedPrototypes, LinearProbe

try:
    import numpy as np
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.utils import check_consistent_length, check_random_state, column_or_1d
    from sklearn.utils.multiclass import check_classification_targets, unique_labels
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise ImportError('nckernels.sklearn needs scikit-learn 1.6 or newer: pip install "nckernels[sklearn]"') from error

__all__ = ["FixedPrototypesClassifier", "LinearProbeClassifier"]


class _ModuleClassifier(ClassifierMixin, BaseEstimator):
    """What is alike for all modules that turn (N, d) features into (N, K) logits."""

    classes_: np.ndarray
    module_: FixedPrototypes | LinearProbe

    def predict(self, X: Any) -> np.ndarray:
        """(N, d) features -> (N,) labels, those with the largest logit."""
        index = self._logits(X).argmax(1).cpu().numpy()
        return self.classes_[index]

    def decision_function(self, X: Any) -> np.ndarray:
        """(N, d) features -> (N, K) logits; for two classes their difference (N,), positive for ``classes_[1]``."""
        logits = self._logits(X)
        return (logits[:, 1] - logits[:, 0] if len(self.classes_) == 2 else logits).cpu().numpy()

    def predict_proba(self, X: Any) -> np.ndarray:
        """(N, d) features -> (N, K) probabilities, the softmax of the logits."""
        return self._logits(X).softmax(1).cpu().numpy()

    def predict_log_proba(self, X: Any) -> np.ndarray:
        """(N, d) features -> (N, K) logarithms of the probabilities."""
        return self._logits(X).log_softmax(1).cpu().numpy()

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Accuracy on (N, d) features and (N,) labels, weighted by ``sample_weight`` if it is given."""
        return float(super().score(X, _on_host(y), _on_host(sample_weight)))

    @torch.no_grad()
    def _logits(self, X: Any) -> Tensor:
        check_is_fitted(self, "module_")
        if isinstance(X, Tensor):
            features = self._from_tensor(X, reset=False)
        else:
            features = _to_tensor(validate_data(self, X, reset=False, dtype=_FLOATS, order="C"))
        return self.module_(features)

    def _training_data(self, X: Any, y: Any, *, reset: bool = True) -> tuple[Tensor, np.ndarray]:
        """Checked (N, d) features and (N,) labels; with ``reset`` they set ``n_features_in_`` and the like."""
        y = _on_host(y)
        if isinstance(X, Tensor):
            features = self._from_tensor(X, y, reset=reset)
            y = column_or_1d(y, warn=True)
            check_consistent_length(X, y)
        else:
            X, y = validate_data(self, X, y, reset=reset, dtype=_FLOATS, order="C")
            features = _to_tensor(X)
        check_classification_targets(y)
        return features, y

    def _from_tensor(self, X: Tensor, y: Any = "no_validation", *, reset: bool) -> Tensor:
        """What validate_data checks of arrays, without a copy on the host."""
        if X.dim() != 2 or 0 in X.shape:
            raise ValueError(f"X must have shape (N, d) with N >= 1 and d >= 1, got {tuple(X.shape)}")
        if X.is_complex():
            raise ValueError(f"X must be real, got {X.dtype}")
        X = X.detach() if X.is_floating_point() else X.float()
        _checks.finite("X", X, wait=True)
        validate_data(self, X, y, reset=reset, skip_check_array=True)
        return X

    def _device(self, features: Tensor) -> torch.device | str:
        device: torch.device | str | None = self.device
        return features.device if device is None else device


class FixedPrototypesClassifier(_ModuleClassifier):
    r"""The class means of unit features as a classifier: :class:`nckernels.FixedPrototypes` for scikit-learn.

    .. math::
        \hat{y} = \arg\max_c \; u \cdot \hat\mu_c, \qquad
        P(c \mid x) = \frac{e^{u \cdot \hat\mu_c / \tau}}{\sum_{c'} e^{u \cdot \hat\mu_{c'} / \tau}}, \qquad
        \hat\mu_c = \frac{\mu_c}{\lVert \mu_c \rVert}, \quad \mu_c = \frac{\sum_{y_i = c} w_i u_i}{\sum_{y_i = c} w_i}

    with :math:`u = x / \lVert x \rVert` and sample weights :math:`w_i`, 1 by default ([NCD] section 4.3). It is meant
    for features that were trained with a cosine loss, such as SupCon. The temperature :math:`\tau` decides how sharp
    the probabilities are, and nothing else. The probabilities are not calibrated.

    Nothing is random, and a fit takes one pass. ``partial_fit`` takes the samples in batches and ends with the same
    prototypes as ``fit`` on all of them. Classes without a sample so far have a logit of -inf and probability 0.

    Args:
        temperature: :math:`\tau`, positive.
        device: where the prototypes are kept; data is moved there. None: the device of the features of the first fit.

    Attributes:
        classes_: (K,) labels, sorted.
        module_: the :class:`nckernels.FixedPrototypes`, whose classes are indices into ``classes_``.
        n_features_in_: d.
        feature_names_in_: (d,) names of the columns, where X is a data frame with strings as names.

    Logits are float64 for float64 features and float32 for others.

    Example:
        >>> from sklearn.datasets import load_digits
        >>> from sklearn.model_selection import train_test_split
        >>> from nckernels.sklearn import FixedPrototypesClassifier
        >>> X, y = load_digits(return_X_y=True)
        >>> X_train, X_test, y_train, y_test = train_test_split(X, y, random_state=0)
        >>> classifier = FixedPrototypesClassifier().fit(X_train, y_train)
        >>> classifier.module_.prototypes.shape
        torch.Size([10, 64])
        >>> classifier.score(X_test, y_test) > 0.85
        True
    """

    module_: FixedPrototypes

    def __init__(self, *, temperature: float = 0.1, device: torch.device | str | None = None) -> None:
        self.temperature = temperature
        self.device = device

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Take the class means of (N, d) features with (N,) labels.

        Args:
            X: (N, d) features.
            y: (N,) labels.
            sample_weight: (N,) weights >= 0, not all 0. A sample of weight 0 counts as left out, but its label is in
                ``classes_`` all the same.
        """
        features, y = self._training_data(X, y)
        self.classes_, index = np.unique(y, return_inverse=True)
        self.module_ = self._make(features)
        self._add(features, index, sample_weight)
        if not bool(self.module_.counts.any()):
            raise ValueError("sample_weight must not be zero for all samples")
        return self

    def partial_fit(self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None) -> Self:
        """Add the samples of one batch.

        Args:
            X: (N, d) features.
            y: (N,) labels.
            classes: every label that any batch has. Required in the first call; the same or None later.
            sample_weight: (N,) weights >= 0.
        """
        first = not hasattr(self, "module_")
        features, y = self._training_data(X, y, reset=first)
        if first and classes is None:
            raise ValueError(
                "classes must be given in the first call to partial_fit: every label that a batch may have"
            )
        given = self.classes_ if classes is None else unique_labels(_on_host(classes))
        if not first and not np.array_equal(given, self.classes_):
            raise ValueError(f"classes must be those of the first call, {self.classes_}, got {given}")
        unknown = np.setdiff1d(y, given)
        if len(unknown):
            raise ValueError(f"y must have labels of classes only, {given}, got {unknown}")
        if first:
            self.classes_ = given
            self.module_ = self._make(features)
        return self._add(features, np.searchsorted(given, y), sample_weight)

    def _make(self, features: Tensor) -> FixedPrototypes:
        return FixedPrototypes(
            len(self.classes_), features.shape[1], temperature=self.temperature, device=self._device(features)
        )

    def _add(self, features: Tensor, index: np.ndarray, sample_weight: Any) -> Self:
        if sample_weight is not None and not isinstance(sample_weight, Tensor):
            sample_weight = torch.tensor(np.asarray(sample_weight, dtype=np.float64))
        self.module_.partial_fit(features, torch.from_numpy(index), sample_weight=sample_weight)
        return self


class LinearProbeClassifier(_ModuleClassifier):
    r"""A linear layer trained on frozen features by SGD: :class:`nckernels.LinearProbe` for scikit-learn.

    .. math::
        P(c \mid x) \propto \exp(x \cdot w_c + b_c) \quad \text{(LP)}, \qquad
        P(c \mid x) \propto \exp\left(\frac{x \cdot w_c}{\lVert x \rVert \, \lVert w_c \rVert \, \tau}\right)
        \quad \text{(NLP)}

    trained by cross-entropy, the baselines LP and NLP of [NCD] section 5 and App. E. The default learning rate suits
    features of about unit variance; put a ``StandardScaler`` before LP where they have another. NLP does not depend on
    the length of the features.

    For logistic regression use ``sklearn.linear_model.LogisticRegression``, which converges to an optimum. This class
    is for the papers' protocol, for normalised logits and for features on a GPU.

    Args:
        normalize: NLP instead of LP.
        temperature: :math:`\tau` of NLP.
        epochs, lr, gamma, milestones, momentum, weight_decay: of SGD, as in :class:`nckernels.LinearProbe`.
        batch_size: samples per step.
        random_state: of the order of the samples and, for NLP, of the first weights. An int gives the same result
            every time, that of ``nckernels.LinearProbe(..., seed=random_state)``; None takes a seed from NumPy's global
            generator, a ``RandomState`` from that.
        device: where the layer is trained; data is moved there. None: the device of the features.

    Attributes:
        classes_: (K,) labels, sorted.
        module_: the :class:`nckernels.LinearProbe`, whose classes are indices into ``classes_``.
        n_features_in_: d.
        feature_names_in_: (d,) names of the columns, where X is a data frame with strings as names.

    Training and logits are float32.

    Example:
        >>> from sklearn.datasets import load_digits
        >>> from sklearn.model_selection import train_test_split
        >>> from sklearn.pipeline import make_pipeline
        >>> from sklearn.preprocessing import StandardScaler
        >>> from nckernels.sklearn import LinearProbeClassifier
        >>> X, y = load_digits(return_X_y=True)
        >>> X_train, X_test, y_train, y_test = train_test_split(X, y, random_state=0)
        >>> probe = make_pipeline(StandardScaler(), LinearProbeClassifier(epochs=20, random_state=0))
        >>> probe.fit(X_train, y_train).score(X_test, y_test) > 0.9
        True
    """

    module_: LinearProbe

    def __init__(
        self,
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
        random_state: int | np.random.RandomState | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.normalize = normalize
        self.temperature = temperature
        self.epochs = epochs
        self.lr = lr
        self.gamma = gamma
        self.milestones = milestones
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.random_state = random_state
        self.device = device

    def fit(self, X: Any, y: Any) -> Self:
        """Train anew on (N, d) features with (N,) labels.

        Raises:
            FloatingPointError: if the weights have diverged, for instance on features that were not scaled.
        """
        features, y = self._training_data(X, y)
        self.classes_, index = np.unique(y, return_inverse=True)
        generator = check_random_state(self.random_state)
        seed = self.random_state if isinstance(self.random_state, Integral) else generator.randint(2**31 - 1)
        options = {name: getattr(self, name) for name in _OPTIONS}
        module = LinearProbe(
            len(self.classes_), features.shape[1], seed=int(seed), device=self._device(features), **options
        )
        self.module_ = module.fit(features, torch.from_numpy(index))
        return self


_FLOATS = (np.float64, np.float32)
_OPTIONS = (
    "normalize", "temperature", "epochs", "lr", "gamma", "milestones", "momentum", "weight_decay", "batch_size",
)  # fmt: skip


def _to_tensor(array: np.ndarray) -> Tensor:
    """Shares the memory, unless it is read-only, as joblib's memory maps are, which PyTorch would warn of."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _on_host(value: Any) -> Any:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else value
