"""Classifiers of frozen features: fixed prototypes against a naive float64 mean, linear probes, their comparison."""

from __future__ import annotations

import copy
import io
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import nckernels
from nckernels import FixedPrototypes, LinearProbe, classifiers

ROOT = str(Path(nckernels.__file__).resolve().parents[1])
K, D = 5, 7
X_NAME, Y_NAME = "input", "target"  # what error messages call the two arguments of fit
ENCODED = ("train_encoded", "test_encoded")  # compare_classifiers' features for the probes


def data(
    samples: int = 200, classes: int = K, dim: int = D, noise: float = 1.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Gaussian blobs, row norms over two decades, float32."""
    g = torch.Generator().manual_seed(seed)
    means = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    y = torch.randint(classes, (samples,), generator=g)
    y[:classes] = torch.arange(classes)
    x = means[y] + noise * torch.randn(samples, dim, generator=g)
    return x * 10 ** torch.randn(samples, 1, generator=g).clamp(-1, 1), y


def naive(x: Tensor, y: Tensor, classes: int = K) -> tuple[Tensor, Tensor, Tensor]:
    """Sums, counts and normalised means of the unit features, row after row in float64."""
    sums, counts = torch.zeros(classes, x.shape[1], dtype=torch.float64), torch.zeros(classes, dtype=torch.float64)
    for row, label in zip(x.double(), y.tolist(), strict=True):
        sums[label] += row / row.norm()
        counts[label] += 1
    means = sums / counts.clamp_min(1)[:, None]
    return sums, counts, torch.stack([m / m.norm() if m.any() else m for m in means])


def assert_same(got: FixedPrototypes, expected: FixedPrototypes) -> None:
    """To float64 rounding."""
    assert torch.equal(got.counts, expected.counts)
    torch.testing.assert_close(got.sums, expected.sums, rtol=1e-12, atol=1e-12)


# --------------------------------------------------------------------------------------------------
# fixed prototypes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_fixed_prototypes_equal_the_naive_mean(dtype: torch.dtype) -> None:
    """[NCD] section 4.3: argmax of cosines with the normalised class means, whatever the features' dtype."""
    x, y = data()
    x = x.to(dtype)
    fp = FixedPrototypes(K, D).fit(x, y)
    sums, counts, means = naive(x, y)
    assert torch.equal(fp.counts, counts)
    assert (fp.sums.dtype, fp.sums.shape) == (torch.float64, (K, D))
    # Rows may be normalised in float32 at least.
    tol = 1e-12 if dtype == torch.float64 else 2**-22
    torch.testing.assert_close(fp.sums, sums, rtol=0, atol=tol * int(counts.max()))
    assert (fp.prototypes.dtype, fp.prototypes.shape) == (torch.float32, (K, D))
    torch.testing.assert_close(fp.prototypes.double(), means, rtol=0, atol=2**-21)
    logits = F.normalize(x.double()) @ means.T
    got = fp(x)
    assert got.shape == (len(x), K)
    half = dtype in (torch.bfloat16, torch.float16)
    torch.testing.assert_close(got.double(), 10 * logits, rtol=0, atol=10 * (2**-7 if half else 2**-20))
    predicted = fp.predict(x)
    assert (predicted.dtype, predicted.shape) == (torch.int64, (len(x),))
    top = logits.topk(2, dim=1).values
    clear = top[:, 0] - top[:, 1] > (2**-7 if half else 2**-19)
    assert clear.float().mean() > 0.9
    assert torch.equal(predicted[clear], logits.argmax(1)[clear])
    accuracy = fp.score(x, y)
    assert isinstance(accuracy, float)
    assert accuracy == pytest.approx(float((predicted == y).double().mean()), abs=1e-12)


def test_temperature_divides_the_logits() -> None:
    x, y = data()
    cold, warm = (FixedPrototypes(K, D, temperature=t).fit(x, y) for t in (0.05, 1.0))
    torch.testing.assert_close(cold(x), 20 * warm(x), rtol=1e-5, atol=1e-5)
    assert float(warm(x).abs().max()) <= 1 + 1e-6  # cosines
    assert torch.equal(cold.predict(x), warm.predict(x))


@pytest.mark.parametrize("sizes", [[200], [1] * 200, [3, 190, 7], [0, 100, 0, 100], [64, 64, 64, 8]], ids=str)
def test_any_partition_gives_the_same(sizes: list[int]) -> None:
    """partial_fit over any batches, in any order, is one fit."""
    x, y = data()
    whole = FixedPrototypes(K, D).fit(x, y)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    for index in (torch.arange(200), order):
        parts = FixedPrototypes(K, D)
        for part in index.split(sizes):
            assert parts.partial_fit(x[part], y[part]) is parts
        assert_same(parts, whole)
        torch.testing.assert_close(parts.prototypes, whole.prototypes, rtol=0, atol=2**-23)
        torch.testing.assert_close(parts(x), whole(x), rtol=0, atol=1e-5)


def test_fit_forgets_and_partial_fit_does_not() -> None:
    x, y = data()
    other_x, other_y = data(seed=5)
    fp = FixedPrototypes(K, D).fit(other_x, other_y)
    assert fp.fit(x, y) is fp
    assert_same(fp, FixedPrototypes(K, D).fit(x, y))
    fp.partial_fit(other_x, other_y)
    assert_same(fp, FixedPrototypes(K, D).fit(torch.cat([x, other_x]), torch.cat([y, other_y])))


def test_merge_adds() -> None:
    x, y = data()
    first, second = FixedPrototypes(K, D).fit(x[:50], y[:50]), FixedPrototypes(K, D).fit(x[50:], y[50:])
    before = copy.deepcopy(second)
    first.merge(second)
    assert_same(first, FixedPrototypes(K, D).fit(x, y))
    assert torch.equal(second.sums, before.sums)  # the other one is left alone
    empty = FixedPrototypes(K, D)
    empty.merge(first)
    assert torch.equal(empty.sums, first.sums)
    first.merge(FixedPrototypes(K, D))
    assert torch.equal(first.sums, empty.sums)


@pytest.mark.parametrize("other", [FixedPrototypes(K + 1, D), FixedPrototypes(K, D + 1)], ids=["classes", "features"])
def test_merge_refuses_another_shape(other: FixedPrototypes) -> None:
    with pytest.raises(ValueError, match=rf"{K}.*{D}|{D}.*{K}"):
        FixedPrototypes(K, D).merge(other)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_feature_scale_does_not_matter(scale: float) -> None:
    x, y = data()
    factors = scale * 2.0 ** torch.randint(-3, 4, (200, 1), generator=torch.Generator().manual_seed(1))
    fp, scaled = FixedPrototypes(K, D).fit(x, y), FixedPrototypes(K, D).fit(factors * x, y)
    torch.testing.assert_close(scaled.sums, fp.sums, rtol=0, atol=2**-22 * 200)
    torch.testing.assert_close(scaled(factors * x), fp(x), rtol=0, atol=1e-4)


@pytest.mark.parametrize("offset", [30.0, 1e4])
def test_a_large_common_offset(offset: float) -> None:
    """Nearly parallel features: the sums lose nothing, the directions keep their last bits.

    Cosines differ by noise^2 / offset^2 only; at 1e4 no float32 logit shows that, so that there the sums and
    prototypes are what is compared.
    """
    x, y = data(2000, noise=0.5)
    x = F.normalize(x).double() * 3 + offset
    sums, counts, means = naive(x, y)
    fp = FixedPrototypes(K, D)
    for part in torch.arange(2000).split(13):
        fp.partial_fit(x[part], y[part])
    assert torch.equal(fp.counts, counts)
    torch.testing.assert_close(fp.sums, sums, rtol=1e-12, atol=0)
    torch.testing.assert_close(fp.prototypes.double(), means, rtol=2**-23, atol=0)
    if offset < 100:
        s = F.normalize(x) @ means.T
        top = s.topk(2, dim=1).values
        clear = top[:, 0] - top[:, 1] > 2**-21
        assert clear.float().mean() > 0.9
        assert torch.equal(fp.predict(x)[clear], s.argmax(1)[clear])


def test_many_samples_lose_no_digits() -> None:
    """A float32 sum of 60,000 rows would be off in the sixth digit; that of float64 is not."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(60_000, 3, generator=g, dtype=torch.float64) + 2
    y = torch.zeros(60_000, dtype=torch.int64)
    fp = FixedPrototypes(1, 3)
    for part, labels in zip(x.split(1000), y.split(1000), strict=True):
        fp.partial_fit(part, labels)
    assert fp.sums[0].tolist() == pytest.approx([math.fsum(column) for column in F.normalize(x).T.tolist()], rel=1e-12)


def test_classes_not_seen() -> None:
    """Zero prototypes, logits of -inf, never predicted."""
    x, y = data(classes=3)
    fp = FixedPrototypes(K, D).fit(x, y)
    assert fp.counts[3:].tolist() == [0, 0]
    assert not fp.prototypes[3:].any()
    torch.testing.assert_close(fp.prototypes[:3].norm(dim=1), torch.ones(3), rtol=0, atol=1e-6)
    logits = fp(-x)
    assert bool((logits[:, 3:] == -math.inf).all())
    assert bool(logits[:, :3].isfinite().all())
    assert int(fp.predict(-x).max()) <= 2  # not even where all seen classes have negative cosines
    unseen = torch.full_like(y, 4)
    assert fp.score(x, unseen) == 0.0


def test_zero_rows_and_antipodal_classes_stay_finite() -> None:
    """A zero feature adds to the count only; a class whose mean is zero has no direction, but no NaN either."""
    x, y = data()
    x[:10] = 0
    fp = FixedPrototypes(K, D).fit(x, y)
    assert int(fp.counts.sum()) == 200
    assert bool(fp.sums.isfinite().all())
    assert bool(fp(x).isfinite().all())
    v = torch.eye(D)[:1]
    fp = FixedPrototypes(2, D).fit(torch.cat([v, -v, v]), torch.tensor([0, 0, 1]))
    assert bool(fp.prototypes.isfinite().all())
    assert not fp(x).isnan().any()


def test_before_any_data() -> None:
    fp = FixedPrototypes(K, D)
    for call in (lambda: fp(torch.ones(2, D)), lambda: fp.predict(torch.ones(2, D))):
        with pytest.raises(RuntimeError, match="fit"):
            call()
    with pytest.raises(RuntimeError, match="fit"):
        fp.score(torch.ones(2, D), torch.tensor([0, 1]))


def test_no_rows() -> None:
    """An empty batch changes nothing; predictions for nothing are nothing."""
    x, y = data()
    fp = FixedPrototypes(K, D).fit(x, y).partial_fit(x[:0], y[:0])
    assert_same(fp, FixedPrototypes(K, D).fit(x, y))
    assert fp.predict(x[:0]).shape == (0,)
    assert fp(x[:0]).shape == (0, K)


def test_state_dict_round_trip() -> None:
    """The sums and counts travel, so that predictions and later batches go on as before."""
    x, y = data()
    fp = FixedPrototypes(K, D).fit(x[:100], y[:100])
    assert {"sums", "counts"} <= set(fp.state_dict())
    buffer = io.BytesIO()
    torch.save(fp.state_dict(), buffer)
    buffer.seek(0)
    other = FixedPrototypes(K, D)
    other.load_state_dict(torch.load(buffer))
    assert torch.equal(other(x), fp(x))
    other.partial_fit(x[100:], y[100:])
    assert_same(other, FixedPrototypes(K, D).fit(x, y))
    fitted = FixedPrototypes(K, D).fit(*data(seed=9))
    fitted(x)  # whatever it may have cached
    fitted.load_state_dict(fp.state_dict())
    assert torch.equal(fitted(x), fp(x))
    assert torch.equal(copy.deepcopy(fp)(x), fp(x))


def test_predictions_follow_new_data() -> None:
    """Nothing stale after a prediction."""
    x, y = data()
    fp = FixedPrototypes(K, D).fit(x, y)
    fp.predict(x)
    fp.fit(x, (y + 1) % K)
    assert torch.equal(fp.predict(x), FixedPrototypes(K, D).fit(x, (y + 1) % K).predict(x))


def test_no_parameters_and_no_graph() -> None:
    x, y = data()
    x.requires_grad_()
    fp = FixedPrototypes(K, D).fit(x, y)
    assert list(fp.parameters()) == []
    assert not fp.sums.requires_grad
    assert torch.equal(fp.train().predict(x), fp.eval().predict(x))


class Recorder(nn.Module):
    """An encoder that notes whether gradients were on, and how often it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, 4)
        self.grad: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.grad.append(torch.is_grad_enabled())
        return self.layer(x)


def loader(x: Tensor, y: Tensor, size: int = 33) -> DataLoader:
    return DataLoader(TensorDataset(x, y), batch_size=size)


def test_fit_from_a_loader() -> None:
    """One pass over (features, labels), forgetting what was there."""
    x, y = data()
    expected = FixedPrototypes(K, D).fit(x, y)
    fp = FixedPrototypes(K, D).fit(*data(seed=5))
    assert fp.fit(loader(x, y)) is fp
    assert_same(fp, expected)
    assert_same(FixedPrototypes(K, D).fit([(x[:70], y[:70]), (x[70:], y[70:])]), expected)  # any iterable of pairs
    assert_same(FixedPrototypes(K, D).fit(iter([(x[:70], y[:70]), (x[70:], y[70:])])), expected)


def test_fit_from_a_loader_with_an_encoder() -> None:
    """The encoder sees each batch once, under no_grad."""
    x, y = data()
    encoder = Recorder()
    fp = FixedPrototypes(K, 4)
    assert fp.fit(loader(x, y), encoder=encoder) is fp
    assert encoder.grad == [False] * 7  # 200 samples in batches of 33
    assert torch.is_grad_enabled()
    with torch.no_grad():
        features = encoder.layer(x)
    torch.testing.assert_close(fp.sums, FixedPrototypes(K, 4).fit(features, y).sums, rtol=0, atol=1e-5)


@pytest.mark.parametrize("labels", [torch.int32, torch.uint8], ids=str)
def test_integer_labels(labels: torch.dtype) -> None:
    x, y = data()
    assert_same(FixedPrototypes(K, D).fit(x, y.to(labels)), FixedPrototypes(K, D).fit(x, y))


@pytest.mark.parametrize(
    ("arguments", "name", "came"),
    [
        ({"X": torch.ones(4, D + 1)}, X_NAME, rf"\(4, {D + 1}\)"),
        ({"X": torch.ones(D)}, X_NAME, rf"\({D},\)"),
        ({"X": torch.ones(4, D, dtype=torch.int64)}, X_NAME, "int64"),
        ({"y": torch.tensor([0, 1, 2])}, Y_NAME, r"\(3,\)|\b3\b"),
        ({"y": torch.tensor([0, 1, 2, K])}, Y_NAME, rf"\b{K}\b"),
        ({"y": torch.tensor([0, 1, 2, -1])}, Y_NAME, r"-1\b"),
        ({"y": torch.ones(4)}, Y_NAME, "float32"),
        ({"y": torch.ones(4, 1, dtype=torch.int64)}, Y_NAME, r"\(4, 1\)"),
    ],
    ids=["width", "1d", "integer", "short", "too-large", "negative", "float", "2d"],
)
@pytest.mark.parametrize("method", ["fit", "partial_fit"])
def test_bad_data_is_refused_and_leaves_nothing_behind(
    method: str, arguments: dict[str, Any], name: str, came: str
) -> None:
    """A ValueError or TypeError that names the argument and what came."""
    given = {"X": torch.ones(4, D), "y": torch.tensor([0, 1, 2, 3]), **arguments}
    fp = FixedPrototypes(K, D)
    with pytest.raises((ValueError, TypeError), match=came) as info:
        getattr(fp, method)(given["X"], given["y"])
    assert re.search(name, str(info.value)), str(info.value)
    assert "ignore_index" not in str(info.value)  # which there is none of here
    assert not fp.counts.any()
    assert not fp.sums.any()


@pytest.mark.parametrize(
    ("args", "options", "name", "came"),
    [
        ((0, D), {}, "num_classes", r"\b0\b"),
        ((K, 0), {}, "in_features", r"\b0\b"),
        ((K, 2.5), {}, "in_features", r"2\.5"),
        ((K, D), {"temperature": 0.0}, "temperature", r"\b0(\.0)?\b"),
        ((K, D), {"temperature": -1.0}, "temperature", r"-1\.0"),
    ],
    ids=str,
)
@pytest.mark.parametrize("module", [FixedPrototypes, LinearProbe], ids=lambda m: m.__name__)
def test_bad_construction(module: Any, args: Any, options: dict[str, Any], name: str, came: str) -> None:
    with pytest.raises((ValueError, TypeError), match=name) as info:
        module(*args, **options)
    assert re.search(came, str(info.value)), str(info.value)


def test_sample_weights() -> None:
    """Whole numbers repeat the sample, 0 leaves it out, a common factor changes nothing."""
    x, y = data()
    x = x.double()
    weight = torch.randint(4, (200,), generator=torch.Generator().manual_seed(2))
    weight[y == 2] = 0
    fp = FixedPrototypes(K, D).fit(x, y, sample_weight=weight.float())
    repeated = FixedPrototypes(K, D).fit(x.repeat_interleave(weight, 0), y.repeat_interleave(weight))
    torch.testing.assert_close(fp.sums, repeated.sums, rtol=1e-12, atol=1e-12)
    assert torch.equal(fp.counts, repeated.counts)
    assert int(fp.counts[2]) == 0
    assert bool((fp(x)[:, 2] == -math.inf).all())
    torch.testing.assert_close(fp(x), repeated(x), rtol=0, atol=1e-12)
    for factor in (0.25, 1e-300, 1e-13, 1e154, 1e300):
        scaled, rest = FixedPrototypes(K, D), FixedPrototypes(K, D)
        for part in torch.arange(150).split(33):
            scaled.partial_fit(x[part], y[part], sample_weight=factor * weight[part].double())
        rest.fit(x[150:], y[150:], sample_weight=factor * weight[150:].double())
        torch.testing.assert_close(scaled.merge(rest)(x), fp(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [1, 33, 199, 200])
def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    x, y = data()
    weight = torch.linspace(0, 2, 200).double()
    whole, weighted = FixedPrototypes(K, D).fit(x, y), FixedPrototypes(K, D).fit(x, y, sample_weight=weight)
    monkeypatch.setattr(classifiers, "_CHUNK", size)
    for expected, given in ((whole, None), (weighted, weight)):
        found = FixedPrototypes(K, D).fit(x, y, sample_weight=given)
        torch.testing.assert_close(found.sums, expected.sums, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.counts, expected.counts, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(3), r"sample_weight must have shape \(4,\), got \(3,\)"),
        (torch.ones(4, dtype=torch.int64), "sample_weight must be of a floating dtype"),
        (torch.tensor([1.0, 1, 1, -2]), "sample_weight must not be negative, got -2"),
        (torch.tensor([1.0, 1, 1, math.nan]), "sample_weight must be finite"),
        ([1.0, 1, 1, 1], "sample_weight must be a torch.Tensor, got list"),
    ],
)
def test_bad_sample_weights(weight: Any, message: str) -> None:
    fp = FixedPrototypes(K, D)
    with pytest.raises((ValueError, TypeError), match=message):
        fp.partial_fit(torch.ones(4, D), torch.arange(4), sample_weight=weight)
    assert not fp.sums.any()
    with pytest.raises(TypeError, match="sample_weight must be None with an iterable"):
        fp.fit([data()], sample_weight=weight)


def test_float64_features_have_float64_logits() -> None:
    """Through and through, although the prototypes are shown in float32."""
    x, y = data()
    x = x.double()
    _, _, means = naive(x, y)
    expected = 10 * F.normalize(x) @ means.T
    torch.testing.assert_close(FixedPrototypes(K, D).fit(x, y)(x), expected, rtol=0, atol=1e-13)


class Elsewhere(nn.Module):
    """A network on a device of its own, which notes where its input is."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), device="meta"))
        self.devices: set[str] = set()

    def forward(self, parts: dict[str, Tensor | list[Tensor]]) -> Tensor:
        inside, (first, _) = parts["inside"], parts["list"]
        self.devices |= {inside.device.type, first.device.type}
        return torch.ones(len(first), D)


def test_an_encoder_gets_its_input_on_its_own_device() -> None:
    """Dicts and lists of tensors too, as Hugging Face's loaders have them; the features go to the classifier."""
    x, y = data()
    encoder = Elsewhere()
    fp = FixedPrototypes(K, D).fit([({"inside": x, "list": [x, None]}, y)], encoder=encoder)
    assert encoder.devices == {"meta"}
    assert int(fp.counts.sum()) == 200
    batch = {"pixels": x, "labels": y}
    pairs = ((batch, batch.pop("labels")) for batch in [batch])
    assert_same(FixedPrototypes(K, D).fit(pairs, encoder=lambda b: b["pixels"]), FixedPrototypes(K, D).fit(x, y))


X4, Y4 = torch.ones(4, D), torch.arange(4)
ODD: dict[str, tuple[tuple[Any, ...], str]] = {
    "array": ((X4.numpy(), Y4.numpy()), "input must be a torch.Tensor, or an iterable .* got ndarray and a target"),
    "loader and labels": (([(X4, Y4)], Y4), "input must be a torch.Tensor, or an iterable .* got list and a target"),
    "tensor alone": ((X4,), "target must be given with a tensor of features"),
    "list of labels": ((X4, [0, 1, 2, 3]), "target must be a torch.Tensor, got list"),
    "dicts": (
        ([{"pixels": X4, "labels": Y4}],),
        r"pairs .*got a batch of type dict with the keys 'pixels', 'labels'",
    ),
    "triples": (([(X4, Y4, Y4)],), "got a batch of type tuple and length 3"),
    "features alone": (([X4],), "got a batch of type Tensor"),
    "NaN": ((X4 * math.nan, Y4), "input must be finite"),
}


@pytest.mark.parametrize(("arguments", "message"), ODD.values(), ids=ODD)
@pytest.mark.parametrize("module", [FixedPrototypes, LinearProbe], ids=lambda m: m.__name__)
def test_data_of_the_wrong_kind(module: Any, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        module(K, D).fit(*arguments)


@pytest.mark.parametrize("module", [FixedPrototypes, LinearProbe], ids=lambda m: m.__name__)
def test_what_cannot_be_classified(module: Any) -> None:
    """Errors that name the argument, also of what an encoder makes."""
    classifier = module(K, D).fit(*data())
    for call in (classifier, classifier.predict):
        with pytest.raises(ValueError, match=rf"input must have in_features={D} columns, got \(2, 3\)"):
            call(torch.ones(2, 3))
        with pytest.raises(TypeError, match=r"input must be a torch\.Tensor, got ndarray"):
            call(torch.ones(2, D).numpy())
        with pytest.raises(TypeError, match=r"input must be of a floating dtype, got torch\.int64"):
            call(torch.ones(2, D, dtype=torch.int64))
    assert classifier(torch.ones(2, 3, D)).shape == (2, 3, K)
    with pytest.raises(TypeError, match=r"the output of encoder must be a torch\.Tensor, got tuple"):
        classifier.fit([data()], encoder=lambda x: (x, x))
    with pytest.raises(ValueError, match=rf"the output of encoder must have in_features={D} columns, got \(200, 2\)"):
        classifier.fit([data()], encoder=lambda x: x[:, :2])


MODULES = {
    "FP": lambda: FixedPrototypes(K, D),
    "LP": lambda: LinearProbe(K, D, epochs=3),
    "NLP": lambda: LinearProbe(K, D, epochs=3, normalize=True),
}


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
@pytest.mark.parametrize("made", [False, True], ids=["", "module made within"])
@pytest.mark.parametrize("given", [False, True], ids=["", "data made within"])
@pytest.mark.parametrize("fitted", [False, True], ids=["", "fitted within"])
def test_inference_mode(make: Any, made: bool, given: bool, fitted: bool) -> None:
    """Wherever the module and the data come from, a fit gives the bits that it gives elsewhere, then and later."""
    x, y = data()
    expected = make().fit(x, y)(x)
    with torch.inference_mode(made):
        classifier = make()
    with torch.inference_mode(given):
        x, y = x * 1, y * 1
    with torch.inference_mode(fitted):
        classifier.fit(x, y)
        assert torch.equal(classifier.predict(x), expected.argmax(1))
    assert torch.equal(classifier(x.clone()), expected)
    assert torch.equal(classifier.fit(x, y)(x.clone()), expected)
    if isinstance(classifier, FixedPrototypes):
        classifier.partial_fit(x, y).merge(classifier)
        assert int(classifier.counts.sum()) == 800


@pytest.mark.parametrize("normalize", [False, True], ids=["LP", "NLP"])
def test_a_probe_trains_alike_in_any_mode(normalize: bool) -> None:
    """Under no_grad and under autocast."""
    x, y = separable()
    expected = LinearProbe(K, D, epochs=3, normalize=normalize).fit(x, y)
    for mode in (torch.no_grad(), torch.autocast("cpu")):
        with mode:
            probe = LinearProbe(K, D, epochs=3, normalize=normalize).fit(x, y)
        assert torch.equal(probe.weight, expected.weight)
    assert probe.weight.requires_grad


def test_a_probe_that_diverges() -> None:
    x, y = data()
    with pytest.raises(FloatingPointError, match=r"training diverged with lr=1e\+30"):
        LinearProbe(K, D, lr=1e30).fit(1e8 * x, y)


# --------------------------------------------------------------------------------------------------
# several processes

WORKER = """
import sys, torch, torch.distributed as dist, nckernels
rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
x, y = torch.load(out + "/data.pt")
fp = nckernels.FixedPrototypes({K}, {D})
part = slice(0, 70) if rank == 0 else slice(70, 200)
fp.fit(x[part], y[part])
fp.all_reduce()
alone = nckernels.FixedPrototypes({K}, {D})
if rank == 0:
    alone.fit(x, y)
alone.all_reduce(group=dist.group.WORLD)  # a rank without data takes part
torch.save((fp.state_dict(), alone.state_dict()), out + f"/rank{{rank}}.pt")
dist.destroy_process_group()
"""


def test_all_reduce_over_two_processes(tmp_path: Path) -> None:
    """Each rank its part of the data: both end with the sums of all of it, as does a rank that had none."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("needs gloo")
    x, y = data()
    torch.save((x, y), tmp_path / "data.pt")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([ROOT, os.environ.get("PYTHONPATH", "")])}
    code = WORKER.format(K=K, D=D)
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(tmp_path / "store"), str(tmp_path)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [worker.communicate(timeout=240)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], errors
    expected = FixedPrototypes(K, D).fit(x, y)
    for rank in range(2):
        for state in torch.load(tmp_path / f"rank{rank}.pt"):
            fp = FixedPrototypes(K, D)
            fp.load_state_dict(state)
            assert_same(fp, expected)


# --------------------------------------------------------------------------------------------------
# linear probes


def separable(samples: int = 300, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Classes far apart in angle: both probes can get every sample."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(samples) % K
    return torch.eye(K, D)[y] * 3 + 0.2 * torch.randn(samples, D, generator=g), y


def rays(samples: int = 300) -> tuple[Tensor, Tensor]:
    """Two classes in one direction that differ in length only: nothing for a cosine to see."""
    y = torch.arange(samples) % 2
    length = torch.where(y == 0, 0.5, 2.0)[:, None]
    return torch.ones(1, 2) * length + 0.01 * torch.randn(samples, 2, generator=torch.Generator().manual_seed(0)), y


@pytest.mark.parametrize("normalize", [False, True], ids=["LP", "NLP"])
def test_probes_learn_separable_data(normalize: bool) -> None:
    """On held-out samples as well; predictions are the argmax of the logits."""
    probe = LinearProbe(K, D, normalize=normalize, epochs=20)
    assert probe.fit(*separable()) is probe
    x, y = separable(seed=1)
    assert probe.score(x, y) >= 0.99
    logits = probe(x)
    assert logits.shape == (len(x), K)
    predicted = probe.predict(x)
    assert predicted.dtype == torch.int64
    assert torch.equal(predicted, logits.argmax(1))
    score = probe.score(x, y)
    assert isinstance(score, float)
    assert score == pytest.approx(float((predicted == y).double().mean()), abs=1e-12)


def test_only_the_plain_probe_sees_lengths() -> None:
    """LP uses the features as they are, with a bias; NLP sees their directions only."""
    x, y = rays()
    assert LinearProbe(2, 2, epochs=60).fit(x, y).score(x, y) >= 0.99
    assert LinearProbe(2, 2, normalize=True, epochs=60).fit(x, y).score(x, y) <= 0.8


def test_the_normalised_probe_does_not_see_scale() -> None:
    """Any positive factor for each sample, in training and after: the same probe, by float32 roundings."""
    x, y = separable()
    factors = 2.0 ** torch.randint(-5, 6, (len(x), 1), generator=torch.Generator().manual_seed(1))
    plain = LinearProbe(K, D, normalize=True, epochs=5).fit(x, y)
    scaled = LinearProbe(K, D, normalize=True, epochs=5).fit(factors * x, y)
    torch.testing.assert_close(scaled(factors * x), plain(x), rtol=0, atol=1e-3)
    torch.testing.assert_close(plain(factors * x), plain(x), rtol=0, atol=1e-4)
    assert float(plain(x).detach().abs().max()) <= 10 * (1 + 1e-5)  # cosines over a temperature of 0.1
    lengths = LinearProbe(K, D, epochs=5).fit(x, y)
    assert float((lengths(factors * x) - lengths(x)).detach().abs().max()) > 1.0


@pytest.mark.parametrize("normalize", [False, True], ids=["LP", "NLP"])
def test_a_seed_decides_everything(normalize: bool) -> None:
    """The global generator has no part in it, and another seed gives another probe."""
    x, y = separable()
    probes = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(noise)
        probes.append(LinearProbe(K, D, normalize=normalize, epochs=2, batch_size=32, seed=seed).fit(x, y)(x))
    assert torch.equal(probes[0], probes[1])
    assert not torch.equal(probes[0], probes[2])


def test_the_bias_is_the_plain_probe_s_alone() -> None:
    """At the origin a linear layer with bias has its bias, a cosine has nothing."""
    x, y = separable()
    zero = torch.zeros(1, D)
    assert LinearProbe(K, D, epochs=5).fit(x, y)(zero).any()
    assert not LinearProbe(K, D, normalize=True, epochs=5).fit(x, y)(zero).any()


def test_weight_decay_shrinks_the_probe() -> None:
    x, y = separable()
    free, decayed = (LinearProbe(K, D, epochs=10, weight_decay=w).fit(x, y) for w in (0.0, 0.5))
    assert float(decayed(x).detach().abs().mean()) < 0.7 * float(free(x).detach().abs().mean())


@pytest.mark.parametrize("normalize", [False, True], ids=["LP", "NLP"])
def test_probe_from_a_loader_with_an_encoder(normalize: bool) -> None:
    """(features, labels), the encoder under no_grad; it is not trained."""
    x, y = separable()
    encoder = Recorder()
    before = copy.deepcopy(encoder.state_dict())
    with torch.no_grad():
        features = encoder.layer(x)
    probe = LinearProbe(K, 4, normalize=normalize, epochs=30)
    assert probe.fit(loader(x, y), encoder=encoder) is probe
    assert encoder.grad
    assert not any(encoder.grad)
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
    reference = LinearProbe(K, 4, normalize=normalize, epochs=30).fit(features, y)
    assert abs(probe.score(features, y) - reference.score(features, y)) <= 0.05


def test_probe_state_dict_round_trip() -> None:
    x, y = separable()
    for normalize in (False, True):
        probe = LinearProbe(K, D, normalize=normalize, epochs=2).fit(x, y)
        other = LinearProbe(K, D, normalize=normalize, epochs=2)
        other.load_state_dict(probe.state_dict())
        assert torch.equal(other(x), probe(x))


# --------------------------------------------------------------------------------------------------
# the comparison


def test_compare_classifiers() -> None:
    """[NCD] Table 2: the three of them, FP as fitted by hand, all right on separable data."""
    (x, y), (test_x, test_y) = separable(), separable(100, seed=1)
    results = nckernels.compare_classifiers(x, y, test_x, test_y)
    assert sorted(r.name for r in results) == ["FP", "LP", "NLP"]
    for result in results:
        assert isinstance(result, nckernels.ClassifierResult)
        assert 0.0 <= result.accuracy <= 1.0
        assert result.accuracy >= 0.99
        assert result.seconds > 0.0
    accuracy = {r.name: r.accuracy for r in results}
    assert accuracy["FP"] == FixedPrototypes(K, D).fit(x, y).score(test_x, test_y)


def test_compare_classifiers_is_of_the_test_set() -> None:
    """Labels of the test set that are all wrong: an accuracy of 0, not of 1."""
    (x, y), (test_x, test_y) = separable(), separable(100, seed=1)
    results = nckernels.compare_classifiers(x, y, test_x, (test_y + 1) % K)
    assert [r.accuracy <= 0.01 for r in results] == [True] * 3


@pytest.mark.parametrize("good", ["projection", "encoder"])
def test_encoder_features_are_for_the_probes(good: str) -> None:
    """FP uses the projection's output, LP and NLP the encoder's, of another width, where it is given."""
    (x, y), (test_x, test_y) = separable(), separable(100, seed=1)
    g = torch.Generator().manual_seed(0)
    noise, test_noise = torch.randn(300, 9, generator=g), torch.randn(100, 9, generator=g)
    pairs = [(x, test_x), (noise, test_noise)]
    (train, test), (encoder, encoder_test) = pairs if good == "projection" else pairs[::-1]
    results = nckernels.compare_classifiers(
        train, y, test, test_y, **dict(zip(ENCODED, (encoder, encoder_test), strict=True))
    )
    accuracy = {r.name: r.accuracy for r in results}
    assert (accuracy["FP"] >= 0.99) == (good == "projection")
    assert (accuracy["LP"] >= 0.99) == (good == "encoder")
    assert (accuracy["NLP"] >= 0.99) == (good == "encoder")
    assert min(accuracy.values()) <= 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_input": X4.numpy()}, "train_input must be a torch.Tensor, got ndarray"),
        ({"test_target": [0, 1, 2, 3]}, "test_target must be a torch.Tensor, got list"),
        ({"train_target": Y4[:2]}, r"train_target must have shape \(4,\), got \(2,\)"),
        ({"test_input": X4[:0], "test_target": Y4[:0]}, "test_input must have one row per sample and at least one"),
        ({"test_input": X4[:, :2]}, r"train_input and test_input must have the same number of columns.*\(4, 2\)"),
        ({"train_encoded": X4[:3], "test_encoded": X4}, "train_encoded must have one row per sample.* got 3"),
        ({"train_encoded": X4}, "train_encoded and test_encoded must be given together"),
    ],
)
def test_compare_classifiers_names_what_does_not_fit(changes: dict[str, Any], message: str) -> None:
    sets = {"train_input": X4, "train_target": Y4, "test_input": X4, "test_target": Y4, **changes}
    with pytest.raises((ValueError, TypeError), match=message):
        nckernels.compare_classifiers(**sets)


@pytest.mark.parametrize("training", [True, False])
def test_frozen_parts_of_an_encoder_stay_frozen(training: bool) -> None:
    """Each part is back in its own mode after a pass, and batch statistics have not moved during it."""
    net = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D), nn.Dropout())
    net.train(training)
    net[1].train(not training)
    modes = [module.training for module in net.modules()]
    statistics = net[1].running_mean.clone()
    FixedPrototypes(K, D).fit([data()], encoder=net)
    assert [module.training for module in net.modules()] == modes
    assert torch.equal(net[1].running_mean, statistics)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sums_stay_float64_in_a_model_that_is_cast(dtype: torch.dtype) -> None:
    x, y = data()
    y = y.where(y != 3, 2)  # a class without samples
    expected = FixedPrototypes(K, D).fit(x, y)
    model = nn.Sequential(nn.Linear(D, D), FixedPrototypes(K, D).fit(x, y)).to(dtype)
    assert model[0].weight.dtype == dtype
    assert torch.equal(model[1].sums, expected.sums)
    assert {model[1].sums.dtype, model[1].counts.dtype} == {torch.float64}
    assert torch.equal(model[1].prototypes, expected.prototypes)


def test_a_probe_under_another_default_device() -> None:
    x, y = data()
    with torch.device("meta"):
        probe = LinearProbe(K, D, device="cpu", epochs=1).fit(x, y)
    assert torch.equal(probe.weight, LinearProbe(K, D, epochs=1).fit(x, y).weight)
