"""Streaming metrics: equal to the one-pass form in any order of the samples, in bounded memory."""

from __future__ import annotations

import gc
import io
import math
import pickle
import re
import warnings
from collections.abc import Iterator
from dataclasses import asdict

import pytest
import torch
from torch import Tensor, nn

from nckernels.metrics import NeuralCollapse, neural_collapse

pytest.importorskip("torchmetrics")

from test_memory import replay
from torchmetrics import MetricCollection

from nckernels.metrics.measures import rounding_noise
from nckernels.metrics.streaming import CollapseMetric, measure

K, D = 7, 12
SECOND_PASS = {"intra_erank", "nc4"}
Batches = list[tuple[Tensor, Tensor]]


def problem(
    samples: int = 120, offset: float = 0.0, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features of K classes, of which the last has no sample and the second last has one; prototypes and bias."""
    g = torch.Generator().manual_seed(seed)
    prototypes = torch.randn(K, D, generator=g, dtype=torch.float64)
    target = torch.cat([torch.tensor([K - 2]), torch.randint(K - 2, (samples - 1,), generator=g)])
    features = prototypes[target] + 0.7 * torch.randn(samples, D, generator=g, dtype=torch.float64) + offset
    return features.to(dtype), target, prototypes.to(dtype), torch.randn(K, generator=g)


def split(features: Tensor, target: Tensor, sizes: int | list[int]) -> Batches:
    return list(zip(features.split(sizes), target.split(sizes), strict=True))


def streamed(batches: Batches, prototypes: Tensor | None = None, bias: Tensor | None = None) -> CollapseMetric:
    metric = CollapseMetric(K, D, prototypes=prototypes, bias=bias)
    for features, target in batches:
        metric.update(features, target)
    return metric


def close(got: NeuralCollapse, want: NeuralCollapse, one_pass: bool = False) -> None:
    for name, value in asdict(want).items():
        if one_pass and name in SECOND_PASS:
            assert math.isnan(getattr(got, name))
        else:
            assert getattr(got, name) == pytest.approx(value, abs=1e-14, rel=1e-10, nan_ok=True), name


MEMORY = {"one pass": 2**30, "rows": 30 * D * 8, "matrices": 12 * D * D}


@pytest.mark.parametrize("memory", MEMORY.values(), ids=MEMORY)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_equals_the_one_pass_form(offset: float, dtype: torch.dtype, memory: int) -> None:
    """Without prototypes, with them and with a bias; with an absent class and a singleton; far from the origin."""
    if dtype == torch.bfloat16:
        offset /= 1e4  # bfloat16 cannot hold 1e4 + 1
    for samples in (120, 400):  # rows of the classes are smaller than matrices; larger
        features, target, prototypes, bias = problem(samples, offset, dtype)
        batches = split(features, target, 33)
        for options in ({}, {"prototypes": prototypes}, {"prototypes": prototypes, "bias": bias}, {"bias": bias}):
            want = neural_collapse(features, target, num_classes=K, **options)
            close(measure(batches, K, memory=memory, **options), want)
            close(streamed(batches, **options).report(), want, one_pass=True)


def test_scatter_far_from_the_origin_is_the_literal_one() -> None:
    """Against the definitions, by deviations: sums of squares would lose all of it (scatter 1e-9 of the squares)."""
    features, target, _, _ = problem(400, offset=1e4)
    u = features / features.norm(dim=1, keepdim=True)
    deviations = torch.cat([u[target == c] - u[target == c].mean(0) for c in range(K - 1)])
    metric = streamed(split(features, target, 1))
    within = metric.moments[K:, 2:]
    torch.testing.assert_close(within, deviations.T @ deviations, rtol=1e-10, atol=1e-10 * within.abs().max().item())
    assert metric.report().within_scatter == pytest.approx(deviations.square().sum().item() / 400, rel=1e-10, abs=0)
    naive = (
        u.square().sum() - sum((u[target == c].sum(0) ** 2).sum() / (target == c).sum() for c in range(K - 1))
    ) / 400
    assert naive.item() != pytest.approx(metric.report().within_scatter, rel=1e-10, abs=0)


@pytest.mark.parametrize("sizes", [1, 7, [0, 100, 0, 20], [1, 119], 120])
def test_order_and_split_do_not_matter(sizes: int | list[int]) -> None:
    """Sorted, shuffled, one by one, with empty batches."""
    features, target, prototypes, bias = problem()
    want = neural_collapse(features, target, prototypes, bias=bias)
    for order in (target.argsort(), torch.randperm(120, generator=torch.Generator().manual_seed(1))):
        batches = split(features[order], target[order].to(torch.uint8), sizes)
        close(measure(batches, prototypes=prototypes, bias=bias, memory=2000), want)
        close(streamed(batches, prototypes, bias).report(), want, one_pass=True)


def test_degenerate_sets() -> None:
    """One class, one sample, zero rows, means that coincide, singletons only: as the one-shot form defines it."""
    eye, g = torch.eye(D, dtype=torch.float64), torch.Generator().manual_seed(0)
    prototypes = problem()[2]
    cases = {
        "one class": (torch.randn(9, D, generator=g), torch.zeros(9, dtype=torch.int64)),
        "one sample": (eye[:1], torch.tensor([3])),
        "zero rows": (torch.cat([eye[:3], torch.zeros(3, D)]), torch.tensor([0, 1, 2, 0, 1, 2])),
        "only zeros": (torch.zeros(4, D), torch.tensor([0, 1, 0, 1])),
        "coinciding means": (eye[[0, 1, 0, 1]], torch.tensor([0, 0, 1, 1])),
        "collapsed": (eye[[0, 0, 1, 1, 2, 2]], torch.tensor([0, 0, 1, 1, 2, 2])),
        "collapsed up to rounding": (
            torch.rand(60, 1, generator=g, dtype=torch.float64) * torch.randn(3, D, generator=g).double().repeat(20, 1),
            torch.arange(3).repeat(20),
        ),
        "singletons": (eye[:K], torch.arange(K)),
    }
    for features, target in cases.values():
        for bias in (None, torch.zeros(K)):
            want = neural_collapse(features, target, prototypes.to(features.dtype), bias=bias)
            got = measure(split(features, target, 1), prototypes=prototypes.to(features.dtype), bias=bias)
            close(got, want)


OF_DIFFERENCES = ("nc1", "scatter_ratio", "cdnv", "mir", "hdr", "mir_centred", "hdr_centred", "nc3_rotated", "nc4")
OF_DIFFERENCES += ("nc2_norms", "nc2_cosines", "nc2_cosines_max")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("means", ["one row", "one set", "small", "zero"])
def test_means_that_coincide(means: str, dtype: torch.dtype) -> None:
    """Each class the same samples in another order: no value is made of rounding errors, whichever way it is computed.

    Small means, of lengths that the dtype rounds, differ by less than the rounding of the features but by more than
    that of means of their size. Zero means, each sample with its opposite, have no direction and no offset.
    """
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(60, D, generator=g, dtype=torch.float64).to(dtype)
    sets = {
        "one row": rows[:1].expand(60, D),
        "one set": rows,
        "small": torch.cat([rows, -3 * rows, rows[:1]]),
        "zero": torch.cat([rows, -rows]),
    }
    rows = sets[means]
    lengths = 1 + 0.1 * torch.arange(K) * (means == "small")
    features = torch.cat([(c * rows[torch.randperm(len(rows), generator=g)]).to(dtype) for c in lengths])
    target = torch.arange(K).repeat_interleave(len(rows))
    prototypes = torch.randn(K, D, generator=g, dtype=torch.float64)
    for order in (torch.arange(len(target)), torch.randperm(len(target), generator=g)):
        x, y = features[order], target[order]
        want = neural_collapse(x, y, prototypes)
        assert all(math.isnan(getattr(want, name)) for name in OF_DIFFERENCES)
        assert (want.inter_erank, want.nc1_rank) == (0, 0)
        if means == "zero":
            assert math.isnan(want.offset)
            assert want.weight_alignment == pytest.approx(1, rel=1e-12)
        elif means != "small":
            assert want.offset == pytest.approx(1, rel=1e-6)
        close(measure(split(x, y, 7), prototypes=prototypes), want)
        close(streamed(split(x, y, 50), prototypes).report(), want, one_pass=True)


def test_merging_forward_and_reset() -> None:
    features, target, prototypes, bias = problem()
    want = neural_collapse(features, target, prototypes, bias=bias)
    a = streamed(split(features[:50], target[:50], 9), prototypes, bias)
    b = streamed(split(features[50:], target[50:], 20))
    empty = CollapseMetric(K, D, prototypes=prototypes, bias=bias)
    for one, other, both in ((a.clone(), b, want), (a.clone(), empty, a.report()), (empty.clone(), a, a.report())):
        one.merge_state(other)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchmetrics does not count a merge as an update
            close(one.report(), both, one_pass=True)
    close(b.report(), neural_collapse(features[50:], target[50:], num_classes=K), one_pass=True)  # b is as it was

    metric = CollapseMetric(K, D, prototypes=prototypes, bias=bias)
    for x, y in split(features, target, 40):
        of_batch = metric(x, y)
        close(
            NeuralCollapse(**{name: value.item() for name, value in of_batch.items()}),
            neural_collapse(x, y, prototypes, bias=bias),
            one_pass=True,
        )
    close(metric.report(), want, one_pass=True)
    metric.reset()
    assert metric.noise == 0
    metric.update(features[:1].bfloat16(), target[:1])
    metric.update(features[:50], target[:50])
    assert metric.noise == rounding_noise(torch.bfloat16)  # that of the least exact batch
    metric.reset()
    metric.update(features[:50], target[:50])
    close(metric.report(), a.report(), one_pass=True)


def test_values_are_scalars_in_a_metric_collection() -> None:
    features, target, prototypes, _ = problem()
    collection = MetricCollection({"nc": CollapseMetric(K, D, prototypes=prototypes)}, prefix="val_")
    collection.update(features, target)
    values = collection.compute()
    assert all(value.shape == () and value.dtype == torch.float64 for value in values.values())
    assert {name.removeprefix("val_").removeprefix("nc_") for name in values} == set(
        asdict(measure([(features, target)], K))
    )


def test_nothing_is_nan_and_the_classifier_may_change() -> None:
    features, target, prototypes, bias = problem()
    metric = CollapseMetric(K, D)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchmetrics says that there was no update
        assert all(math.isnan(value) for value in asdict(metric.report()).values())
    metric.update(features, target)
    close(metric.report(), neural_collapse(features, target, num_classes=K), one_pass=True)
    weight = nn.Parameter(prototypes.clone())
    metric.set_classifier(weight, bias)
    weight.data.zero_()
    close(metric.report(), neural_collapse(features, target, prototypes, bias=bias), one_pass=True)
    assert not list(metric.parameters())


def test_pickling_and_checkpoints() -> None:
    """A restored state can be updated; a checkpoint does not change; another K or d is an error."""
    features, target, prototypes, _ = problem()
    want = neural_collapse(features, target, prototypes)
    half = streamed(split(features[:60], target[:60], 20), prototypes)
    half.persistent(True)
    file = io.BytesIO()
    torch.save(nn.ModuleDict({"metric": half}).state_dict(), file)
    file.seek(0)
    saved = torch.load(file)
    before = {name: value.clone() for name, value in saved.items()}
    loaded = nn.ModuleDict({"metric": CollapseMetric(K, D, prototypes=prototypes)})
    loaded.load_state_dict(saved)
    for metric in (loaded["metric"], pickle.loads(pickle.dumps(half))):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            close(metric.report(), half.report(), one_pass=True)
        metric.update(features[60:], target[60:])
        close(metric.report(), want, one_pass=True)
    assert all(torch.equal(saved[name], value) for name, value in before.items())
    for other in (CollapseMetric(K + 1, D), CollapseMetric(K, D + 1)):
        with pytest.raises(RuntimeError, match=r"metric.moments: expected shape .*, got \(19, 14\)"):
            nn.ModuleDict({"metric": other}).load_state_dict(before)


def test_stays_float64_and_goes_through_inference_mode() -> None:
    features, target, _, _ = problem()
    metric = streamed([(features[:60], target[:60])])
    state = metric.moments.clone()
    for cast in (nn.Module.half, nn.Module.bfloat16, lambda m: m.to(torch.bfloat16), lambda m: m.to("cpu", torch.half)):
        cast(nn.ModuleDict({"metric": metric}))
        assert torch.equal(metric.moments, state)
    metric.set_dtype(torch.float32)
    assert metric.moments.dtype == torch.float64
    with torch.inference_mode():
        metric.reset()
        metric.update(features[:60], target[:60])
    metric.update(features[60:], target[60:])
    close(metric.report(), neural_collapse(features, target, num_classes=K), one_pass=True)


@pytest.mark.parametrize("matrices", [False, True])
def test_memory(matrices: bool) -> None:
    """Memory is that of a pass's classes, twice the state, and a few matrices; it does not grow with the samples."""
    classes, dim, batch, samples = 40, 64, 100, 40 * (600 if matrices else 150)
    g = torch.Generator().manual_seed(0)
    features, target = torch.randn(samples, dim, generator=g), torch.arange(samples) % classes
    prototypes = torch.randn(classes, dim, generator=g)
    batches = list(zip(features.split(batch), target.split(batch), strict=True))
    a_class = 12 * dim * dim if matrices else samples // classes * dim * 4
    memory = (8 if matrices else 4) * a_class
    measure(batches[:2], prototypes=prototypes)  # lazy initialisation
    peak, left = replay(
        lambda: (measure(batches, prototypes=prototypes, memory=memory), gc.collect())
    )  # a Metric is a cycle
    state = 8 * (classes + dim) * (dim + 2)
    work = max(5 * 8 * dim * dim, 6 * 8 * batch * dim)  # a class at the end of a pass, or a batch
    bound = memory + 2 * state + 5 * 8 * classes * dim + work
    assert memory < peak <= bound < classes * a_class / 2, (peak, bound)
    assert left == 0


class Counted:
    """A loader that counts its passes; each gives what ``change`` makes of the batches."""

    def __init__(self, batches: Batches, change: bool = False) -> None:
        self.batches, self.passes, self.change = batches, 0, change

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes += 1
        return iter(self.batches[1:] if self.change and self.passes > 1 else self.batches)


def test_number_of_passes_over_the_loader() -> None:
    """As in the docstring: one, and one for each group of classes that fits into memory; nc4 needs no further one."""
    features, target, prototypes, _ = problem(400)
    batches = split(features, target, 50)
    matrix = 12 * D * D  # K - 2 = 5 classes have a covariance, and more than d samples each
    for memory, passes in ((5 * matrix, 2), (5 * matrix - 1, 3), (2 * matrix, 4), (matrix, 6)):
        loader = Counted(batches)
        measure(loader, prototypes=prototypes, memory=memory)
        assert loader.passes == passes
    singletons = Counted([(torch.eye(K, D), torch.arange(K))])
    measure(singletons, K)
    assert singletons.passes == 1
    measure(singletons, prototypes=prototypes.float())
    assert singletons.passes == 3


def test_encoder_and_progress(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    inputs, target, prototypes, _ = problem()
    encoder = nn.Linear(D, D, dtype=torch.float64).eval()
    got = measure(split(inputs, target, 50), encoder=encoder, prototypes=prototypes, progress=True)
    close(got, neural_collapse(encoder(inputs), target, prototypes))
    assert re.search(r"pass 2 of 2: 100%", capsys.readouterr().err)


def test_errors_of_the_metric() -> None:
    features, target, prototypes, bias = problem()
    bad_values = features.clone()
    bad_values[3, 4] = math.nan
    metric = CollapseMetric(K, D)
    for match, x, y in (
        ("features: expected .* got torch.float64 of shape", features[:, 1:], target),
        ("features: expected .* got torch.int64", target[:, None].expand(-1, D), target),
        ("features must be finite", bad_values, target),
        ("target: expected 120 integer labels", features, target[1:]),
        ("target: expected 120 integer labels", features, target.double()),
        (r"target: expected labels in \[0, 7\), got 1 to 11", features[:2], torch.tensor([1, 11])),
        (r"target: expected labels in \[0, 7\), got -1", features[:1], torch.tensor([-1])),
    ):
        with pytest.raises(ValueError, match=match):
            metric.update(x, y)
        assert not metric.moments.any()
    metric.moments[0, 0] = math.inf  # as it comes to be on a GPU, where nobody looks
    with pytest.raises(ValueError, match="features must be finite"):
        metric.compute()
    for match, options in (
        ("num_classes: expected an integer >= 1, got 0", {"num_classes": 0}),
        ("dim: expected an integer >= 1, got 1.5", {"dim": 1.5}),
        (r"prototypes: expected .* \(7, 12\), got .* \(6, 12\)", {"prototypes": prototypes[1:]}),
        ("prototypes must be finite", {"prototypes": prototypes / 0}),
        (r"bias: expected .* \(7,\), got .* \(7, 1\)", {"bias": bias[:, None]}),
        ("bias: expected .* got torch.int64", {"bias": torch.arange(K)}),
    ):
        with pytest.raises(ValueError, match=match):
            CollapseMetric(**{"num_classes": K, "dim": D, **options})


def test_errors_of_measure() -> None:
    features, target, prototypes, _ = problem()
    batches = split(features, target, 50)
    with pytest.raises(TypeError, match=r"batches: expected .* several times.* got a list_iterator"):
        measure(iter(batches), K)
    for match, call in (
        ("num_classes: expected an integer where", lambda: measure(batches)),
        ("prototypes: expected", lambda: measure(batches, K + 1, prototypes=prototypes)),
        ("batches: expected at least one sample", lambda: measure([], K)),
        ("batches: expected at least one sample", lambda: measure([(features[:0], target[:0])], K)),
        ("batches: expected pairs .* got a tuple of 3", lambda: measure([(features, target, target)], K)),
        (r"features: expected a tensor \(B, d\), got a tuple of 2", lambda: measure([((1, 2), target)], K)),
        ("features: expected a floating-point tensor", lambda: measure([*batches, (features[:, 1:], target)], K)),
        ("memory: expected at least 1728 bytes, for a single class, got 1", lambda: measure(batches, K, memory=1)),
        ("memory: expected an integer", lambda: measure(batches, K, memory=0)),
        ("encoder: expected it in eval mode", lambda: measure(batches, K, encoder=nn.Linear(D, D))),
        ("same samples in every pass", lambda: measure(Counted(batches, change=True), K)),
        ("same samples in every pass", lambda: measure(Counted(batches[::-1], change=True), K, memory=12 * D * D)),
    ):
        with pytest.raises(ValueError, match=match):
            call()
