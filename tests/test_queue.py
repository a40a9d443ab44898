"""Queues and running denominators against literal forms in float64, and as modules with a state."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Backend
from oracle import cosine
from torch import Tensor, nn

import nckernels
from nckernels import FeatureQueue, QueueLoss, RunningDenominatorLoss

CLASSES, DIM, IGNORED, TEMPERATURE = 5, 6, -100, 0.3
Criterion = nckernels.NONLLoss | nckernels.NTCELoss
MODULES: dict[str, type[Criterion]] = {"nonl": nckernels.NONLLoss, "ntce": nckernels.NTCELoss}
EXACT = {"rtol": 1e-12, "atol": 1e-13}

by_class = pytest.mark.parametrize("name", MODULES)
reductions = pytest.mark.parametrize("reduction", ["none", "mean", "sum"])


def samples(count: int, seed: int, classes: int = CLASSES, ignored: float = 0.2) -> tuple[Tensor, Tensor]:
    """Features that require grad and labels, some of them to ignore."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, DIM, generator=g, dtype=torch.float64)
    y = torch.randint(classes, (count,), generator=g)
    return x.requires_grad_(), y.where(torch.rand(count, generator=g) >= ignored, IGNORED)


def make(name: str, **options: Any) -> Criterion:
    torch.manual_seed(0)
    temperature = nn.Parameter(torch.tensor(TEMPERATURE, dtype=torch.float64))
    return MODULES[name](DIM, CLASSES, temperature=temperature, dtype=torch.float64, **options)


def make_queue(size: int, **options: Any) -> FeatureQueue:
    return FeatureQueue(size, DIM, **{"dtype": torch.float64, **options})


def make_running(sample_weight: Tensor | None, labels: int = 6) -> Tensor:
    """A loss of six samples."""
    x, y = samples(6, 0)
    return RunningDenominatorLoss(make("ntce"))(x, y[:labels], sample_weight)


def grads(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Of the loss, or of the losses of samples with random upstream gradients."""
    g = torch.Generator().manual_seed(7)
    upstream = torch.randn(loss.shape, generator=g, dtype=torch.float64).to(loss)
    return torch.autograd.grad(loss, inputs, upstream)


def close(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, **EXACT)


def reduced(loss: Tensor, y: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """The mean is over the weights of the samples that are not ignored."""
    share = (y != IGNORED).double()
    if weight is not None:
        share = share * weight[y.clamp_min(0)]
    loss = torch.stack([loss[i] * share[i] if y[i] != IGNORED else loss.new_zeros(()) for i in range(len(y))])
    return {"none": loss, "sum": loss.sum(), "mean": loss.sum() / share.sum()}[reduction]


def exponentials(name: str, x: Tensor, y: Tensor, w: Tensor, temperature: Tensor) -> Tensor:
    """(M, K) what each sample adds to the sum of each class."""
    takes_part = (y != IGNORED)[:, None].expand(-1, len(w))
    if name == "nonl":
        takes_part = takes_part & (y[:, None] != torch.arange(len(w)))
    return (cosine(x, w) / temperature).exp() * takes_part


def literal(
    name: str,
    x: Tensor,
    y: Tensor,
    w: Tensor,
    temperature: Tensor,
    q: Tensor,
    yq: Tensor,
    weight: Tensor | None,
    red: str,
) -> Tensor:
    """[NCD] Eqs. 4-5 whose sum runs over the batch and the queue, sample by sample."""
    total = exponentials(name, torch.cat([x, q]), torch.cat([y, yq]), w, temperature).sum(0)
    pos = cosine(x, w) / temperature
    return reduced(torch.stack([total[c].log() - pos[i, c] for i, c in enumerate(y.clamp_min(0))]), y, weight, red)


# The queue itself


def test_ring() -> None:
    """Against a list: the newest stay, each in the place of the oldest, whatever the batches' sizes."""
    queue, expected = make_queue(7), [(torch.zeros(DIM, dtype=torch.float64), IGNORED)] * 7
    place = 0
    for seed, count in enumerate([3, 3, 3, 0, 7, 1, 20, 2, 7, 14]):
        x, y = samples(count, seed)
        queue.enqueue(x, y)
        for row in list(zip(x.detach(), y.tolist(), strict=True))[-7:]:
            expected[place] = row
            place = (place + 1) % 7
        assert torch.equal(queue.features, torch.stack([row for row, _ in expected]))
        assert queue.labels.tolist() == [label for _, label in expected]
    assert not queue.features.requires_grad
    assert queue.features.shape == (7, DIM)


def test_the_queue_is_a_copy() -> None:
    queue = make_queue(4)
    x, y = samples(2, 0)
    queue.enqueue(x, y)
    before = queue.features.clone()
    with torch.no_grad():
        x.zero_()
    assert torch.equal(queue.features, before)


def test_dtypes_and_devices() -> None:
    queue = FeatureQueue(3, 2, dtype=torch.bfloat16)
    queue.enqueue(torch.ones(2, 2), torch.ones(2, dtype=torch.int32))
    assert (queue.features.dtype, queue.labels.dtype) == (torch.bfloat16, torch.int64)
    assert queue.labels.tolist() == [1, 1, IGNORED]
    assert FeatureQueue(3, 2, ignore_index=-1).labels.tolist() == [-1] * 3
    assert FeatureQueue(3, 2, device="meta").labels.is_meta
    assert queue.double().features.dtype == torch.float64


def test_moco(cpu_backend: Backend) -> None:
    """A full queue adds its rows to the keys; an empty slot counts as an orthogonal key."""
    queue = make_queue(8)
    q, k = samples(4, 0)[0], samples(4, 1)[0]
    queue.enqueue(samples(5, 2)[0])
    got = nckernels.info_nce_loss(q, torch.cat([k, queue.features]), torch.arange(4), temperature=TEMPERATURE)
    logits = cosine(q, torch.cat([k, queue.features[:5]])) / TEMPERATURE
    total = logits.exp().sum(1) + 3
    expected = (total.log() - logits.diagonal()).mean()
    queue.enqueue(k)  # what the loss has seen is not what the queue holds from here on
    close(grads(got, q, k), grads(expected, q, k))
    close(got, expected)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: FeatureQueue(0, 2), ValueError, "size must be at least 1, got 0"),
        (lambda: FeatureQueue(2, 2.0), TypeError, "dim must be an int, got 2.0"),
        (lambda: FeatureQueue(2, 2, ignore_index=None), TypeError, "ignore_index must be an int"),
        (lambda: make_queue(2).enqueue(torch.zeros(3, 5)), ValueError, r"features must have d=6 .* \(3, 5\)"),
        (lambda: make_queue(2).enqueue(torch.zeros(3)), ValueError, r"features must have shape \(n, d\), got \(3,\)"),
        (lambda: make_queue(2).enqueue(torch.zeros(3, 6).long()), TypeError, "features must be of a floating dtype"),
        (lambda: make_queue(2).enqueue(torch.zeros(3, 6), torch.zeros(2).long()), ValueError, r"labels .* \(3,\)"),
        (lambda: make_queue(2).enqueue(torch.zeros(3, 6), torch.zeros(3)), TypeError, "integer dtype"),
        (lambda: make_queue(2).enqueue(torch.zeros(3, 6, device="meta")), ValueError, "must be on the same device"),
        (lambda: QueueLoss(nckernels.NormFaceLoss(6, 5), make_queue(2)), TypeError, "SupConLoss.* got NormFaceLoss"),
        (lambda: QueueLoss(make("nonl", direction="instance"), make_queue(2)), ValueError, "or 'both', got 'inst"),
        (lambda: QueueLoss(make("ntce"), make_queue(2, ignore_index=-1)), ValueError, "ignore_index, got -100 and -1"),
        (lambda: QueueLoss(make("ntce"), make_queue(2))(torch.zeros(6), torch.zeros(6)), ValueError, r"got \(6,\)"),
        (lambda: QueueLoss(make("ntce"), make_queue(2))(torch.zeros(6, 5), torch.zeros(6).long()), ValueError, "d=6"),
        (lambda: QueueLoss(make("ntce"), 480), TypeError, "queue must be a FeatureQueue, got int"),
        (lambda: RunningDenominatorLoss(nckernels.SupConLoss()), TypeError, "NONLLoss or NTCELoss, got SupConLoss"),
        (lambda: make_running(torch.ones(4)), ValueError, r"sample_weight must have shape \(6,\), got \(4,\)"),
        (lambda: make_running(-torch.ones(6)), ValueError, "sample_weight must not be negative, got -1"),
        (lambda: make_running(None, labels=4), ValueError, r"target .*\(6,\), .* row of input, got \(4,\)"),
        (lambda: RunningDenominatorLoss(make("nonl", direction="both")), ValueError, "direction 'class', got 'both'"),
        (lambda: RunningDenominatorLoss(make("ntce", sparse=True)), ValueError, "criterion must have sparse=False"),
        (lambda: RunningDenominatorLoss(make("ntce", reduction="sum")), ValueError, "reduction 'mean', got 'sum'"),
        (lambda: RunningDenominatorLoss(make("ntce"), 1.0), ValueError, "decay must be .* less than 1, got 1.0"),
        (lambda: RunningDenominatorLoss(make("ntce"), "0.9"), TypeError, "decay must be a number"),
    ],
)  # fmt: skip
def test_errors(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# Losses with a queue


@by_class
@reductions
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weight"])
def test_literal(cpu_backend: Backend, name: str, reduction: str, weighted: bool) -> None:
    """Value and gradients with a queue half full, then full, then of batches larger than it."""
    weight = torch.rand(CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) if weighted else None
    criterion = QueueLoss(make(name, reduction=reduction, weight=weight), make_queue(11))
    w, temperature = criterion.criterion.prototypes, criterion.criterion.temperature
    for seed, count in enumerate([6, 9, 4, 13, 3]):
        x, y = samples(count, seed)
        q, yq = criterion.queue.features.clone(), criterion.queue.labels.clone()
        got = criterion(x, y)  # the queue changes here, before the gradients are asked for
        expected = literal(name, x, y, w, temperature, q, yq, weight, reduction)
        close(got, expected)
        close(grads(got, x, w, temperature), grads(expected, x, w, temperature))
    assert criterion.queue.features.grad is None


@by_class
def test_classes_that_only_the_queue_has(cpu_backend: Backend, name: str) -> None:
    """They are negatives as they are, and their prototypes have no gradient; also where ignore_index is a class."""
    for ignored in (IGNORED, 0):
        criterion = QueueLoss(
            MODULES[name](DIM, 8, dtype=torch.float64, temperature=TEMPERATURE, ignore_index=ignored),
            make_queue(12, ignore_index=ignored),
        )
        w = criterion.criterion.prototypes
        q, x = samples(12, 0)[0].detach(), samples(4, 1)[0]
        yq, y = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 3, 4, 1, 5]), torch.tensor([3, 4, 3, 6])
        criterion.queue.enqueue(q, yq)
        seen = yq != ignored
        expected = literal(
            name, x, y, w, torch.tensor(TEMPERATURE, dtype=torch.float64), q[seen], yq[seen], None, "mean"
        )
        got = criterion(x, y)
        close(got, expected)
        gradient, truth = grads(got, w)[0], grads(expected, w)[0]
        close(gradient, truth)
        assert not bool(gradient[[0, 1, 2, 5, 7]].any())
        # Relabelled by hand: that is what spares the columns of the other classes.
        assert len(set(criterion.queue.labels.tolist()) - {ignored}) > 3


@by_class
def test_sparse_gradients(name: str) -> None:
    """Of the classes in the batch and at most one more, whose row is 0."""
    dense, sparse = (QueueLoss(make(name, sparse=sparse), make_queue(40)) for sparse in (False, True))
    x, y = samples(2, 0, ignored=0.0)
    got = []
    for criterion in (dense, sparse):
        criterion.queue.enqueue(*samples(40, 1))
        got += grads(criterion(x, y), criterion.criterion.prototypes)
    assert got[1].is_sparse
    assert len(got[1].coalesce().indices()[0]) <= 3
    close(got[1].to_dense(), got[0])


def test_both_directions(cpu_backend: Backend) -> None:
    """The sum over the samples has the queue, the sum over the classes is the sample's own."""
    criterion = QueueLoss(make("nonl", direction="both", reduction="none"), make_queue(7))
    w, temperature = criterion.criterion.prototypes, criterion.criterion.temperature
    criterion.queue.enqueue(*samples(9, 0))
    q, yq = criterion.queue.features.clone(), criterion.queue.labels.clone()
    x, y = samples(6, 1, ignored=0.0)
    columns = exponentials("nonl", torch.cat([x, q]), torch.cat([y, yq]), w, temperature).sum(0)
    rows = exponentials("nonl", x, y, w, temperature).sum(1)
    pos = (cosine(x, w) / temperature)[torch.arange(6), y]
    expected, got = (columns[y] + rows).log() - pos, criterion(x, y)
    close(got, expected)
    close(grads(got, x, w, temperature), grads(expected, x, w, temperature))


@pytest.mark.parametrize("decoupled", [False, True], ids=["supcon", "decoupled"])
@pytest.mark.parametrize("views", [1, 2])
def test_supcon(cpu_backend: Backend, decoupled: bool, views: int) -> None:
    """Rows of the queue are positives of their label and negatives of the others, and no anchors."""
    criterion = QueueLoss(
        nckernels.SupConLoss(temperature=TEMPERATURE, reduction="none", decoupled=decoupled), make_queue(20)
    )
    criterion.queue.enqueue(*samples(7, 0))
    q, yq = criterion.queue.features[:7].clone(), criterion.queue.labels[:7].clone()
    x, labels = samples(5 * views, 1)[0], torch.tensor([0, 1, IGNORED, 3, 77])
    y = labels.repeat_interleave(views)
    got = criterion(x if views == 1 else x.view(5, views, DIM), labels)
    assert got.shape == ((5,) if views == 1 else (5, views))

    keys, key_labels = torch.cat([x, q]), torch.cat([y, yq])
    logits = cosine(x, keys) / TEMPERATURE
    losses = []
    for i, label in enumerate(y.tolist()):
        others = [j for j in range(len(keys)) if j != i and key_labels[j] != IGNORED]
        positives = [j for j in others if key_labels[j] == label]
        summed = [j for j in others if key_labels[j] != label] if decoupled else others
        if label == IGNORED or not positives:
            losses.append(logits.new_zeros(()))
        else:
            losses.append(logits[i, summed].logsumexp(0) - logits[i, positives].mean())
    expected = torch.stack(losses)
    assert int((expected != 0).sum()) >= 2 * views
    close(got.flatten(), expected)
    close(grads(got.flatten(), x), grads(expected, x))
    assert criterion.queue.labels.tolist()[7 : 7 + len(y)] == y.tolist()


def test_prototype_loss(cpu_backend: Backend) -> None:
    """The class means are those of the batch and the queue."""
    criterion = QueueLoss(nckernels.PrototypeLoss(temperature=TEMPERATURE), make_queue(8))
    q, yq = samples(8, 0, classes=3)
    criterion.queue.enqueue(q, yq)
    x, y = samples(6, 1, classes=3, ignored=0.0)
    keys, labels = F.normalize(torch.cat([x, q.detach()])), torch.cat([y, yq])
    counts = torch.stack([(labels == c).sum() for c in range(3)])
    means = torch.stack([keys[labels == c].mean(0) for c in range(3)])
    terms = (keys[:6] @ means.T / TEMPERATURE).exp()
    own = terms[torch.arange(6), y]
    expected = -(own / ((counts * terms).sum(1) - own)).log().mean()
    got = criterion(x, y)
    close(got, expected)
    close(grads(got, x), grads(expected, x))


@pytest.mark.parametrize("name", ["nonl", "ntce", "supcon", "prototype"])
def test_an_empty_queue_is_none(backend: Backend, name: str) -> None:
    backend.require(torch.float32)
    torch.manual_seed(0)
    plain: Any = {
        "nonl": lambda: nckernels.NONLLoss(DIM, CLASSES),
        "ntce": lambda: nckernels.NTCELoss(DIM, CLASSES),
        "supcon": nckernels.SupConLoss,
        "prototype": nckernels.PrototypeLoss,
    }[name]().to(backend.device)
    criterion = QueueLoss(plain, FeatureQueue(9, DIM, device=backend.device))
    x, y = (t.detach().to(backend.device) for t in samples(12, 0))
    x = x.float().requires_grad_()
    got, expected = criterion(x, y), plain(x, y)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grads(got, x), grads(expected, x), rtol=1e-5, atol=1e-6)


def test_sample_weights() -> None:
    """Of the batch; on top of those of the classes."""
    weight, sample_weight = torch.rand(CLASSES).double(), torch.rand(8).double()
    criterion = QueueLoss(make("nonl", weight=weight), make_queue(5))
    criterion.queue.enqueue(*samples(5, 0))
    losses = copy.deepcopy(criterion)
    losses.criterion.reduction, losses.criterion.weight = "none", None
    x, y = samples(8, 1)
    share = torch.where(y == IGNORED, 0.0, weight[y.clamp_min(0)] * sample_weight)
    close(criterion(x, y, sample_weight), (losses(x, y) * share).sum() / share.sum())


def test_training_and_evaluation() -> None:
    """In eval mode the states are read and left as they were."""
    for criterion in (QueueLoss(make("ntce"), make_queue(5)), RunningDenominatorLoss(make("ntce"), 0.5)):
        criterion(*samples(4, 0))
        before = copy.deepcopy(dict(criterion.named_buffers()))
        criterion.eval()
        first, again = criterion(*samples(4, 1)), criterion(*samples(4, 1))
        assert torch.equal(first, again)
        assert all(torch.equal(value, before[name]) for name, value in criterion.named_buffers())
        assert not torch.equal(first, criterion.criterion(*samples(4, 1)))


def test_autocast() -> None:
    """Features that come in bfloat16 from the network, prototypes, queue and state in float32."""
    for wrap in (lambda c: QueueLoss(c, FeatureQueue(5, DIM)), RunningDenominatorLoss):
        criterion = wrap(nckernels.NONLLoss(DIM, CLASSES))
        for seed in (0, 1):
            x, y = samples(8, seed)
            with torch.autocast("cpu", torch.bfloat16):
                loss = criterion(x.detach().bfloat16(), y)
            assert loss.dtype == torch.float32
            assert loss.isfinite()
        assert {b.dtype for b in criterion.buffers() if b.is_floating_point()} == {torch.float32}


# Running denominators


def faded(values: list[Tensor], decay: float) -> Tensor:
    """Their sum, in which each step back counts a factor of decay less."""
    return torch.stack([decay ** (len(values) - 1 - s) * value for s, value in enumerate(values)]).sum(0)


@by_class
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weight"])
def test_running(cpu_backend: Backend, name: str, weighted: bool) -> None:
    """Batches of several sizes: the value as it is written, and the gradient whose denominators are numbers."""
    g = torch.Generator().manual_seed(1)
    weight = torch.rand(CLASSES, dtype=torch.float64, generator=g) if weighted else None
    criterion = RunningDenominatorLoss(make(name, weight=weight), decay=0.7)
    w, temperature = criterion.criterion.prototypes, criterion.criterion.temperature
    sums, anchors, counts = [], [], []
    for seed, count in enumerate([6, 20, 1, 12]):
        x, y = samples(count, seed, ignored=0.0 if count == 1 else 0.2)
        sample_weight = torch.rand(count, dtype=torch.float64, generator=g) if weighted else None
        share = (y != IGNORED).double()
        if weighted:
            share = share * weight[y.clamp_min(0)] * sample_weight
        now = exponentials(name, x, y, w, temperature).sum(0)
        sums.append(now.detach())
        anchors.append(torch.stack([share[y == c].sum() for c in range(CLASSES)]))
        counts.append((y != IGNORED).sum().double())
        d = counts[-1] * faded(sums, 0.7) / faded(counts, 0.7)
        a = faded(anchors, 0.7) / faded(anchors, 0.7).sum()
        alignment = (share * (cosine(x, w) / temperature)[torch.arange(count), y.clamp_min(0)]).sum() / share.sum()
        got = criterion(x, y, sample_weight)
        close(got, (a * d.log()).sum() - alignment)
        close(grads(got, x, w, temperature), grads((a * now / d).sum() - alignment, x, w, temperature))


@by_class
def test_the_first_step_is_the_loss_itself(backend: Backend, name: str) -> None:
    """And every step without memory."""
    torch.manual_seed(0)
    plain = MODULES[name](DIM, CLASSES).to(backend.device)
    x, y = (t.detach().to(backend.device) for t in samples(12, 0))
    x = x.float().requires_grad_()
    forgetful = RunningDenominatorLoss(plain, decay=0.0)
    forgetful(x.detach() + 1, y)
    for criterion in (RunningDenominatorLoss(plain, decay=0.99), forgetful):
        got, expected = criterion(x, y), plain(x, y)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
        for a, b in zip(grads(got, x, plain.prototypes), grads(expected, x, plain.prototypes), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@by_class
@pytest.mark.parametrize("part", [1, 3])
def test_the_running_gradient_is_that_of_the_whole_set(name: str, part: int) -> None:
    """On average over all batches, if the memory holds all samples and nothing moves; that of single batches is not."""
    whole = 9
    x, y = samples(whole, 0, classes=3, ignored=0.0)
    criterion = RunningDenominatorLoss(make(name), decay=1 - 1e-15).eval()
    plain, w = criterion.criterion, criterion.criterion.prototypes
    many = 1e15
    criterion.lse.copy_(exponentials(name, x, y, w, plain.temperature).sum(0).log() + math.log(many))
    criterion.anchors.copy_(torch.bincount(y, minlength=CLASSES).double() * many)
    criterion.count.fill_(whole * many)

    def mean(loss: nn.Module) -> Tensor:
        batches = torch.combinations(torch.arange(whole), part)
        return torch.stack([torch.autograd.grad(loss(x[i], y[i]), w)[0] for i in batches]).mean(0)

    expected = torch.autograd.grad(plain(x, y), w)[0]
    close(mean(criterion), expected)
    assert (mean(plain) - expected).norm() > 0.1 * expected.norm()


@by_class
def test_degenerate_batches(cpu_backend: Backend, name: str) -> None:
    """Nothing to sum, now or ever: finite values and gradients, and a state that goes on."""
    plain = MODULES[name](DIM, CLASSES, dtype=torch.float64, temperature=TEMPERATURE)
    w = plain.prototypes
    x, y = samples(4, 0, ignored=0.0)
    nobody, one_class = torch.full((4,), IGNORED), torch.full((4,), 2)
    for labels in (nobody, nobody[:0], one_class):
        criterion = RunningDenominatorLoss(plain, 0.5)
        rows = x[: len(labels)]
        first = criterion(rows, labels)
        assert bool(first.isnan()) == (labels is not one_class)
        if labels is one_class:
            close(first, plain(rows, labels))
            close(grads(first, x, w), grads(plain(rows, labels), x, w))
        after = criterion(x, y)  # other classes come
        assert bool(after.isfinite())
        assert all(bool(g.isfinite().all()) for g in grads(after, x, w))
        assert bool(criterion(rows, labels).isnan()) == (labels is not one_class)

    # A class that has negatives in the past only.
    criterion = RunningDenominatorLoss(plain, 0.5)
    criterion(x, y)
    sums, anchors = criterion.lse.exp(), criterion.anchors.clone()
    now = exponentials(name, x, one_class, w, plain.temperature).sum(0)
    a = (0.5 * anchors + 4 * F.one_hot(torch.tensor(2), CLASSES)) / 6
    d = 4 * (0.5 * sums + now.detach()) / 6
    alignment = (cosine(x, w) / TEMPERATURE)[:, 2].mean()
    got = criterion(x, one_class)
    close(got, (a * d.log()).sum() - alignment)
    close(grads(got, x, w), grads((a * now / d).sum() - alignment, x, w))


def test_an_empty_batch_leaves_the_average() -> None:
    with_it, without = (RunningDenominatorLoss(make("ntce"), 0.5) for _ in range(2))
    for criterion in (with_it, without):
        criterion(*samples(4, 0))
    with_it(samples(3, 1)[0], torch.full((3,), IGNORED))
    close(with_it.lse - with_it.count.log(), without.lse - without.count.log())
    close(with_it.anchors / with_it.count, without.anchors / without.count)


# Modules


def queued(name: str) -> nn.Module:
    return QueueLoss(make(name), make_queue(11))


def running(name: str) -> nn.Module:
    return RunningDenominatorLoss(make(name), 0.8)


wrappers = pytest.mark.parametrize("wrap", [queued, running])


@wrappers
@by_class
def test_nan_does_not_stay(wrap: Callable[[str], nn.Module], name: str) -> None:
    """A batch whose loss is NaN, as of a step that a gradient scaler skips, has no part in later losses."""
    criterion, clean = wrap(name), wrap(name)
    for bad in (math.nan, math.inf, -math.inf):
        x, y = (tensor.detach() for tensor in samples(6, 1, ignored=0.0))
        x[2, 1] = bad
        assert bool(criterion(x, y).isnan())
        if wrap is queued:
            x[2], y[2] = 0.0, IGNORED
            clean.queue.enqueue(x, y)
        batch = samples(6, 2)
        assert torch.equal(criterion(*batch), clean(*batch))
    assert all(torch.equal(a, b) for a, b in zip(criterion.buffers(), clean.buffers(), strict=True))


def train(criterion: nn.Module, seeds: range) -> list[Tensor]:
    optimiser = torch.optim.SGD(criterion.parameters(), lr=0.1)
    losses = []
    for seed in seeds:
        optimiser.zero_grad()
        losses.append(criterion(*samples(6, seed)))
        losses[-1].backward()
        optimiser.step()
    return losses


@wrappers
@by_class
def test_resuming_is_exact(wrap: Callable[[str], nn.Module], name: str) -> None:
    """From a state dict that went through a file, and as a deep copy."""
    whole = wrap(name)
    expected = train(whole, range(6))
    first = wrap(name)
    train(first, range(3))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = wrap(name)
    second.load_state_dict(torch.load(file))
    for criterion in (second, copy.deepcopy(first)):
        assert all(torch.equal(a, b) for a, b in zip(train(criterion, range(3, 6)), expected[3:], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(second.buffers(), whole.buffers(), strict=True))
    kept = {"queue.features", "queue.labels", "queue.position"} if wrap is queued else {"lse", "anchors", "count"}
    assert set(first.state_dict()) == kept | {"criterion.prototypes", "criterion.temperature"}


@wrappers
@by_class
def test_compiles_without_breaks(wrap: Callable[[str], nn.Module], name: str) -> None:
    """One graph for all steps: no shape depends on how full the queue is."""
    torch._dynamo.reset()
    eager, traced = wrap(name), wrap(name)
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(4):
            x, y = samples(6, seed)
            got, expected = compiled(x, y), eager(x, y)
            close(got, expected)
            close(grads(got, x), grads(expected, x))
    assert all(
        torch.equal(a, b) or torch.allclose(a, b, rtol=1e-12)
        for a, b in zip(traced.buffers(), eager.buffers(), strict=True)
    )


@wrappers
def test_a_shared_head(wrap: Callable[[str], nn.Module]) -> None:
    """The criterion of a classifier, wrapped: one parameter, trained through both."""
    head = nckernels.PrototypeClassifier(DIM, CLASSES, loss="nonl", dtype=torch.float64)
    criterion = QueueLoss(head.criterion, make_queue(4)) if wrap is queued else RunningDenominatorLoss(head.criterion)
    x, y = samples(6, 0)
    criterion(x, y).backward()
    assert head.prototypes.grad is not None
    assert bool(head.prototypes.grad.any())
    assert {id(p) for p in criterion.parameters()} == {id(p) for p in head.parameters()}


def test_shown() -> None:
    shown = repr(QueueLoss(nckernels.NTCELoss(2, 3), FeatureQueue(7, 2)))
    assert "(queue): FeatureQueue(size=7, dim=2)" in shown
    assert "decay=0.9" in repr(RunningDenominatorLoss(nckernels.NTCELoss(2, 3)))
