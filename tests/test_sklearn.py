"""nckernels.sklearn: scikit-learn's own checks, the formulas, scikit-learn's tools, tensors."""

from __future__ import annotations

import doctest
import pickle
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sklearn", minversion="1.6")

import numpy as np
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import nckernels
import nckernels.sklearn
from nckernels.sklearn import FixedPrototypesClassifier, LinearProbeClassifier

K, D = 3, 5
NAMES = np.array(["ant", "bee", "cat"])
ESTIMATORS = [
    FixedPrototypesClassifier(),
    LinearProbeClassifier(epochs=8, random_state=0),
    LinearProbeClassifier(epochs=8, random_state=0, normalize=True),
]


def fresh(estimator: Any) -> Any:
    return clone(estimator)


def data(samples: int = 90, seed: int = 0, classes: int = K) -> tuple[Any, Any]:
    """Classes far apart in angle, float64, and their indices."""
    generator = np.random.default_rng(seed)
    y = np.arange(samples) % classes
    return 3 * np.eye(classes, D)[y] + 0.3 * generator.normal(size=(samples, D)), y


@parametrize_with_checks(ESTIMATORS)
def test_scikit_learn_s_checks(estimator: Any, check: Any) -> None:
    """All of them; none is expected to fail."""
    check(estimator)


def test_examples() -> None:
    result = doctest.testmod(nckernels.sklearn)
    assert result.attempted > 10
    assert result.failed == 0


def test_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    """docs/scikit-learn.md: its code runs and prints what the comments say, to 0.02."""
    page = (Path(__file__).parents[1] / "docs" / "scikit-learn.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    exec(compile(code, "docs/scikit-learn.md", "exec"), {})
    expected = re.findall(r"^print\(.*\)  # (.*)$", code, re.MULTILINE)
    assert len(expected) == 4
    printed = map(float, capsys.readouterr().out.split())
    assert list(printed) == pytest.approx(list(map(float, expected)), abs=0.02)


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_probabilities_by_the_formula(temperature: float) -> None:
    """In float64, with sample weights, against NumPy; decision_function has their logits."""
    X, y = data()
    weight = np.random.default_rng(1).uniform(size=len(y))
    classifier = FixedPrototypesClassifier(temperature=temperature).fit(X, NAMES[y], weight)
    u = X / np.linalg.norm(X, axis=1, keepdims=True)
    means = np.stack([np.average(u[y == c], axis=0, weights=weight[y == c]) for c in range(K)])
    logits = u @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T / temperature
    e = np.exp(logits)
    np.testing.assert_allclose(classifier.decision_function(X), logits, rtol=0, atol=1e-13 / temperature)
    np.testing.assert_allclose(classifier.predict_proba(X), e / e.sum(1, keepdims=True), rtol=1e-11)
    np.testing.assert_allclose(classifier.predict_log_proba(X), np.log(e / e.sum(1, keepdims=True)), rtol=1e-11)
    assert np.array_equal(classifier.predict(X), NAMES[logits.argmax(1)])


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_two_classes(estimator: Any) -> None:
    """One column, positive for the second class, whose sigmoid is its probability."""
    X, y = data(classes=2)
    classifier = fresh(estimator).fit(X, y)
    decision = classifier.decision_function(X)
    assert decision.shape == (len(X),)
    assert np.array_equal(classifier.predict(X), (decision > 0).astype(int))
    np.testing.assert_allclose(classifier.predict_proba(X)[:, 1], 1 / (1 + np.exp(-decision)), rtol=1e-5)


@pytest.mark.parametrize(
    "labels", [["ant", "bee", "cat"], [-7, 0, 1000], [0.0, 1.0, 2.0], np.array(["x", "y", "zz"], dtype=object)], ids=str
)
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_any_labels(estimator: Any, labels: Any) -> None:
    X, y = data()
    names = np.asarray(labels)[::-1]  # the first sample has the last label
    classifier = fresh(estimator).fit(X, names[y])
    assert classifier.classes_.tolist() == sorted(names.tolist())
    assert classifier.predict(X).dtype == names.dtype
    assert classifier.score(X, names[y]) == 1.0
    assert np.array_equal(classifier.classes_[classifier.predict_proba(X).argmax(1)], names[y])


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_tensors_lists_and_arrays_are_alike(estimator: Any) -> None:
    """Tensors with a graph and with tensors as labels too, and what comes back are arrays."""
    X, y = data()
    X = X.astype(np.float32)
    expected = fresh(estimator).fit(X, y)
    with torch.inference_mode():
        in_inference_mode = torch.from_numpy(X) * 1, torch.from_numpy(y) * 1
    sets = [
        (torch.from_numpy(X), torch.from_numpy(y)),
        (torch.from_numpy(X).requires_grad_(), y.tolist()),
        in_inference_mode,
        (X.tolist(), y.tolist()),
        (np.asfortranarray(X), y),
        (np.ascontiguousarray(X[::-1])[::-1], torch.from_numpy(y)),  # a negative stride
    ]
    for features, labels in sets:
        classifier = fresh(estimator).fit(features, labels)
        got = classifier.decision_function(features)
        assert isinstance(got, np.ndarray)
        np.testing.assert_allclose(got, expected.decision_function(X), rtol=1e-4, atol=1e-5)
        assert isinstance(classifier.predict(features), np.ndarray)
        assert classifier.n_features_in_ == D
        assert classifier.score(features, labels) == 1.0
    with torch.inference_mode():
        inside = fresh(estimator).fit(*sets[0])
    assert np.array_equal(inside.predict(X), expected.predict(X))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64], ids=str)
def test_tensors_of_other_dtypes(dtype: torch.dtype) -> None:
    X, y = data()
    features = torch.from_numpy(4 * X).to(dtype)
    for estimator in ESTIMATORS:
        classifier = fresh(estimator).fit(features, y)
        assert classifier.decision_function(features).dtype == np.float32
        assert classifier.score(features, y) > 0.95


def test_dtypes_of_logits() -> None:
    """NumPy's are kept by fixed prototypes; a probe is float32."""
    X, y = data()
    for dtype in (np.float32, np.float64):
        fixed = FixedPrototypesClassifier().fit(X.astype(dtype), y)
        assert fixed.predict_proba(X.astype(dtype)).dtype == dtype
        assert fresh(ESTIMATORS[1]).fit(X.astype(dtype), y).predict_proba(X.astype(dtype)).dtype == np.float32


@pytest.mark.parametrize("normalize", [False, True], ids=["LP", "NLP"])
def test_a_probe_is_the_module_with_the_same_seed(normalize: bool) -> None:
    X, y = data()
    options: dict[str, Any] = {"normalize": normalize, "epochs": 3, "lr": 0.1, "batch_size": 32, "momentum": 0.5}
    options |= {"temperature": 0.3, "gamma": 0.5, "milestones": (0.5,), "weight_decay": 1e-3}
    probe = LinearProbeClassifier(random_state=7, **options).fit(X, NAMES[y])
    module = nckernels.LinearProbe(K, D, seed=7, **options).fit(torch.from_numpy(X), torch.from_numpy(y))
    assert torch.equal(probe.module_.weight, module.weight)
    assert np.array_equal(probe.predict(X), NAMES[module.predict(torch.from_numpy(X)).numpy()])


def test_random_state() -> None:
    """None: NumPy's global generator; a RandomState: its next number; torch's generator has no part in it."""
    X, y = data()
    probe = LinearProbeClassifier(epochs=2, normalize=True, batch_size=16)

    def weight(state: Any, seed: int = 0) -> Any:
        np.random.seed(seed)  # noqa: NPY002 - what scikit-learn's None means
        torch.manual_seed(np.random.randint(99))  # noqa: NPY002
        return clone(probe).set_params(random_state=state).fit(X, y).module_.weight.detach()

    assert torch.equal(weight(None), weight(None))
    assert not torch.equal(weight(None), weight(None, seed=1))
    assert torch.equal(weight(3), weight(3, seed=1))
    assert torch.equal(weight(np.int64(3)), weight(3))
    assert torch.equal(weight(np.random.RandomState(5)), weight(np.random.RandomState(5), seed=1))


@pytest.mark.parametrize("sizes", [[90], [1] * 90, [7, 80, 3]], ids=len)
def test_partial_fit_is_fit(sizes: list[int]) -> None:
    X, y = data()
    weight = np.random.default_rng(0).uniform(size=len(y))
    whole = FixedPrototypesClassifier().fit(X, NAMES[y], weight)
    parts = FixedPrototypesClassifier()
    for part in np.split(np.random.default_rng(1).permutation(len(y)), np.cumsum(sizes)[:-1]):
        assert parts.partial_fit(X[part], NAMES[y][part], classes=NAMES[::-1], sample_weight=weight[part]) is parts
    assert parts.classes_.tolist() == NAMES.tolist()
    np.testing.assert_allclose(parts.decision_function(X), whole.decision_function(X), rtol=0, atol=1e-12)
    whole.partial_fit(X, NAMES[y], sample_weight=weight)  # the same again changes no direction
    np.testing.assert_allclose(parts.decision_function(X), whole.decision_function(X), rtol=0, atol=1e-12)


def test_classes_without_a_sample_so_far() -> None:
    X, y = data()
    first = FixedPrototypesClassifier().partial_fit(X[y == 1], NAMES[y[y == 1]], classes=NAMES)
    probability = first.predict_proba(X)
    assert not probability[:, [0, 2]].any()
    np.testing.assert_allclose(probability[:, 1], 1)
    assert set(first.predict(X)) == {"bee"}


def test_weights_of_zero() -> None:
    """A class of weight 0 is known, and never predicted; no weight at all is an error."""
    X, y = data()
    classifier = FixedPrototypesClassifier().fit(X, NAMES[y], sample_weight=(y != 2).astype(float))
    assert classifier.classes_.tolist() == NAMES.tolist()
    assert set(classifier.predict(X)) == {"ant", "bee"}
    with pytest.raises(ValueError, match="sample_weight"):
        FixedPrototypesClassifier().fit(X, y, np.zeros(len(y)))


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_scikit_learn_s_tools(estimator: Any) -> None:
    """A pipeline, cross-validation of arrays and of tensors, a search over NumPy's numbers, copies."""
    X, y = data()
    pipeline = make_pipeline(StandardScaler(with_mean=False), fresh(estimator))
    assert cross_val_score(pipeline, X, NAMES[y], cv=3).min() == 1.0
    assert cross_val_score(fresh(estimator), torch.from_numpy(X), torch.from_numpy(y), cv=3).min() == 1.0
    grid = {"temperature": np.array([0.1, 1.0])}
    if isinstance(estimator, LinearProbeClassifier):
        grid["epochs"] = np.array([2, 8])
    search = GridSearchCV(fresh(estimator), grid, cv=3, scoring="neg_log_loss", error_score="raise").fit(X, NAMES[y])
    assert search.best_params_["temperature"] == 0.1
    assert search.best_estimator_.score(X, NAMES[y]) == 1.0
    fitted = search.best_estimator_
    assert np.array_equal(pickle.loads(pickle.dumps(fitted)).decision_function(X), fitted.decision_function(X))
    copy = clone(fitted)
    assert copy.get_params() == fitted.get_params()
    with pytest.raises(NotFittedError):
        copy.predict(X)


def test_read_only_arrays_are_no_warning() -> None:
    """joblib gives those to worker processes."""
    X, y = data()
    X.flags.writeable = y.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for estimator in ESTIMATORS:
            assert fresh(estimator).fit(X, y).score(X, y) == 1.0


def test_data_frames() -> None:
    pandas = pytest.importorskip("pandas")
    X, y = data()
    frame = pandas.DataFrame(X, columns=list("abcde"))
    for estimator in ESTIMATORS:
        classifier = fresh(estimator).fit(frame, pandas.Series(NAMES[y], dtype="category"))
        assert classifier.feature_names_in_.tolist() == list("abcde")
        assert classifier.score(frame, pandas.Series(NAMES[y])) == 1.0
        with pytest.raises(ValueError, match="feature names"):
            classifier.predict(frame[list("edcba")])


def test_the_device_can_be_chosen() -> None:
    """Whatever the features are: here meta, whose tensors have no values to be asked for."""
    X, y = data()
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        FixedPrototypesClassifier(device="meta").fit(X, y)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_features_on_a_gpu_stay_there(estimator: Any) -> None:
    X, y = data()
    features, labels = torch.from_numpy(X).cuda(), torch.from_numpy(y).cuda()
    classifier = fresh(estimator).fit(features, labels)
    assert classifier.module_.device.type == "cuda"
    assert isinstance(classifier.predict(features), np.ndarray)
    assert classifier.score(features, labels) == 1.0
    assert classifier.score(X, y) == 1.0
    assert cross_val_score(fresh(estimator), features, y, cv=3).min() == 1.0
    on_the_host = fresh(estimator).set_params(device="cpu").fit(features, labels)
    assert on_the_host.module_.device.type == "cpu"
    np.testing.assert_allclose(
        on_the_host.decision_function(features), classifier.decision_function(X), rtol=1e-3, atol=1e-3
    )


GOOD = torch.ones(4, D), torch.tensor([0, 1, 0, 1])
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "one dimension": ({"X": torch.ones(D)}, rf"X must have shape \(N, d\).*\({D},\)"),
    "no rows": ({"X": torch.ones(0, D)}, r"X must have shape"),
    "NaN": ({"X": torch.full((4, D), torch.nan)}, "X must be finite"),
    "complex": ({"X": torch.ones(4, D, dtype=torch.complex64)}, "X must be real"),
    "fewer labels": ({"y": torch.tensor([0, 1])}, r"inconsistent numbers of samples.*\[4, 2\]"),
    "no labels": ({"y": None}, "requires y"),
    "continuous labels": ({"y": torch.tensor([0.5, 1.5, 0.1, 0.2])}, "Unknown label type"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_bad_tensors(estimator: Any, changes: dict[str, Any], message: str) -> None:
    X, y = ({"X": GOOD[0], "y": GOOD[1]} | changes).values()
    with pytest.raises(ValueError, match=message):
        fresh(estimator).fit(X, y)


def test_another_number_of_features() -> None:
    for estimator in ESTIMATORS:
        with pytest.raises(ValueError, match=f"X has 2 features, but .* is expecting {D} features"):
            fresh(estimator).fit(*GOOD).predict(torch.ones(3, 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "classes must be given in the first call"),
        ({"classes": [0, 5]}, r"y must have labels of classes only, \[0 5\], got \[1\]"),
        ({"classes": [0, 1], "sample_weight": [1.0]}, r"sample_weight must have shape \(4,\), got \(1,\)"),
        ({"classes": [0, 1], "sample_weight": [1, 1, -1, 1]}, "sample_weight must not be negative"),
        ({"classes": [0, 1], "sample_weight": [1, 1, np.inf, 1]}, "sample_weight must be finite"),
    ],
)
def test_bad_batches(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FixedPrototypesClassifier().partial_fit(*GOOD, **arguments)


def test_classes_are_given_once() -> None:
    classifier = FixedPrototypesClassifier().partial_fit(*GOOD, classes=[0, 1])
    with pytest.raises(ValueError, match=r"classes must be those of the first call, \[0 1\], got \[0 1 2\]"):
        classifier.partial_fit(*GOOD, classes=[0, 1, 2])


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        (FixedPrototypesClassifier(temperature=0.0), "temperature must be positive"),
        (LinearProbeClassifier(epochs=2.5), "epochs must be an int"),  # type: ignore[arg-type]
        (LinearProbeClassifier(milestones=0.5), "milestones must be a tuple"),  # type: ignore[arg-type]
        (LinearProbeClassifier(random_state="x"), "'x' cannot be used to seed"),  # type: ignore[arg-type]
        (LinearProbeClassifier(lr=1e30), "diverged with lr=1e"),
    ],
)
def test_bad_settings(estimator: Any, message: str) -> None:
    """They are errors of fit, as scikit-learn has it."""
    with pytest.raises((ValueError, TypeError, FloatingPointError), match=message):
        estimator.fit(1e8 * torch.randn(40, D, generator=torch.Generator().manual_seed(0)), torch.arange(40) % K)


def test_scikit_learn_is_not_needed_until_it_is() -> None:
    """Nor imported; without it the error says what to install."""
    code = """
import sys, nckernels
assert "sklearn" not in sys.modules
sys.modules["sklearn"] = None
import nckernels.sklearn
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert result.stderr.splitlines()[-1] == (
        'ImportError: nckernels.sklearn needs scikit-learn 1.6 or newer: pip install "nckernels[sklearn]"'
    )
