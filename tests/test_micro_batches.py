"""MicroBatches on one process: the loss and gradients of the whole batch, or of one graph over all micro-batches."""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nckernels
from nckernels import MicroBatches

M, K, D = 17, 4, 5
SIZES = [1, 3, 7, M, 100]
TOL = {torch.float64: 1e-12, torch.float32: 1e-6}


class Towers(nn.Module):
    """Two encoders and a learnt temperature, with inputs and outputs of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = mlp(), mlp()
        self.logit_scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, images: Tensor, *, texts: dict[str, Any], shift: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        assert texts["language"] == "en"
        mask = texts["mask"].to(images.dtype)
        return self.image(images + shift), {"text": self.text(texts["ids"][0] * mask[:, None])}


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, D))


@dataclasses.dataclass
class Case:
    """An encoder, its inputs, and a loss of its outputs; all parameters are in ``module``."""

    encoder: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    loss: Callable[..., Tensor]
    module: nn.Module

    def gradients(self) -> dict[str, Tensor | None]:
        found = {name: p.grad for name, p in self.module.named_parameters()}
        self.module.zero_grad()
        return found


def case(name: str, dtype: torch.dtype = torch.float64, size: int = M) -> Case:
    torch.manual_seed(0)
    x, y = torch.randn(size, 6, dtype=dtype), torch.randint(K, (size,))
    if name == "clip":
        towers = Towers().to(dtype)
        mask, ids = torch.rand(size) < 0.8, [torch.randn(size, 6, dtype=dtype)]
        kwargs = {"texts": {"ids": ids, "mask": mask, "language": "en"}, "shift": torch.tensor(0.5, dtype=dtype)}

        def clip(output: tuple[Tensor, dict[str, Tensor]]) -> Tensor:
            images, texts = output
            return nckernels.clip_loss(images, texts["text"], temperature=torch.exp(-towers.logit_scale))

        return Case(towers, (x,), kwargs, clip, towers)
    encoder = mlp()
    if name in ("nonl", "ntce", "normface"):
        kind = {"nonl": nckernels.NONLLoss, "ntce": nckernels.NTCELoss, "normface": nckernels.NormFaceLoss}[name]
        criterion = kind(D, K, temperature=nn.Parameter(torch.tensor(0.2)))
        module = nn.ModuleList([encoder, criterion]).to(dtype)
        return Case(encoder, (x,), {}, lambda z: criterion(z, y), module)
    encoder.to(dtype)
    views = torch.randn(size, 2, 6, dtype=dtype)
    losses: dict[str, Callable[[Tensor], Tensor]] = {
        "supcon": lambda z: nckernels.supcon_loss(z, y),
        "simclr": nckernels.supcon_loss,
        "info_nce": lambda z: nckernels.info_nce_loss(z[:, 0], z[:, 1]),
    }
    return Case(encoder, (views,), {}, losses[name], encoder)


LOSSES = ["nonl", "ntce", "normface", "supcon", "simclr", "info_nce", "clip"]


def assert_equal(
    found: dict[str, Tensor | None], expected: dict[str, Tensor | None], dtype: torch.dtype = torch.float64
) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient is not None
        torch.testing.assert_close(found[name], gradient, rtol=TOL[dtype], atol=TOL[dtype])


# --- the whole batch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", LOSSES)
def test_gradient_of_the_whole_batch(name: str, size: int) -> None:
    c = case(name)
    whole = c.loss(c.encoder(*c.args, **c.kwargs))
    whole.backward()
    expected = c.gradients()
    micro = MicroBatches(c.encoder, size)
    loss = c.loss(micro(*c.args, **c.kwargs))
    loss.backward()
    micro.backward()
    torch.testing.assert_close(loss, whole, rtol=1e-12, atol=1e-12)
    assert_equal(c.gradients(), expected)


@pytest.mark.parametrize("name", LOSSES)
def test_float32(name: str) -> None:
    c = case(name, torch.float32)
    c.loss(c.encoder(*c.args, **c.kwargs)).backward()
    expected = c.gradients()
    micro = MicroBatches(c.encoder, 3)
    c.loss(micro(*c.args, **c.kwargs)).backward()
    micro.backward()
    assert_equal(c.gradients(), expected, torch.float32)


def test_several_calls_and_several_encoders() -> None:
    """Queries and keys of one encoder, and of two, in batches of different sizes; gradients of one step add up."""
    torch.manual_seed(0)
    encoder, other = mlp().double(), mlp().double()
    both = nn.ModuleList([encoder, other])
    x, keys = torch.randn(5, 6, dtype=torch.float64), torch.randn(9, 6, dtype=torch.float64)
    target = torch.tensor([3, 1, 4, 1, 5])

    def loss(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return nckernels.info_nce_loss(a, b, target) + nckernels.info_nce_loss(a, c, target)

    loss(encoder(x), encoder(keys), other(keys)).backward()
    expected = {name: p.grad for name, p in both.named_parameters()}
    both.zero_grad()
    micro, micro_other = MicroBatches(encoder, 2), MicroBatches(other, 4)
    loss(micro(x), micro(keys), micro_other(keys)).backward()
    micro.backward()
    micro_other.backward()
    assert_equal({name: p.grad for name, p in both.named_parameters()}, expected)


def test_empty_batch() -> None:
    c = case("nonl", size=0)
    micro = MicroBatches(c.encoder, 3)
    features = micro(*c.args)
    assert features.shape == (0, D)
    criterion = nckernels.NONLLoss(D, K, reduction="sum", dtype=torch.float64)
    criterion(features, torch.zeros(0, dtype=torch.int64)).backward()
    micro.backward()
    assert all(not p.grad.any() for p in c.encoder.parameters())
    assert micro.stream(criterion, torch.zeros(0, dtype=torch.int64), *c.args) == 0.0


# --- losses with prototypes, streamed ----------------------------------------------------------------------

CRITERIA: dict[str, Callable[..., nn.Module]] = {
    "nonl": nckernels.NONLLoss,
    "nonl_instance": lambda *args, **options: nckernels.NONLLoss(*args, direction="instance", **options),
    "ntce": nckernels.NTCELoss,
    "normface": nckernels.NormFaceLoss,
    "normface_options": lambda *args, **options: nckernels.NormFaceLoss(
        *args, label_smoothing=0.1, angular_margin=0.2, cosine_margin=0.1, **options
    ),
    "classifier": lambda *args, **options: nckernels.PrototypeClassifier(*args, loss="ntce", **options),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("classes", [K, 40])
@pytest.mark.parametrize("name", CRITERIA)
def test_stream(name: str, classes: int, size: int) -> None:
    """Class weights, ignored samples (a whole micro-batch, too), classes without samples, both reductions."""
    torch.manual_seed(0)
    encoder, x = mlp().double(), torch.randn(M, 6, dtype=torch.float64)
    y = torch.randint(classes, (M,))
    y[[0, 1, 2, 10]] = -7
    for reduction in ("mean", "sum"):
        criterion = CRITERIA[name](
            D, classes, temperature=nn.Parameter(torch.tensor(0.2)), weight=torch.rand(classes), ignore_index=-7,
            reduction=reduction,
        ).double()  # fmt: skip
        module = nn.ModuleList([encoder, criterion])
        whole = (criterion.loss if name == "classifier" else criterion)(encoder(x), y)
        whole.backward()
        expected = {n: p.grad for n, p in module.named_parameters()}
        module.zero_grad()
        loss = MicroBatches(encoder, size).stream(criterion, y, x)
        assert not loss.requires_grad
        torch.testing.assert_close(loss, whole.detach(), rtol=1e-12, atol=1e-12)
        assert_equal({n: p.grad for n, p in module.named_parameters()}, expected)
        module.zero_grad()


def test_stream_of_one_class() -> None:
    """Classes without negatives: what remains of NONL is the alignment."""
    torch.manual_seed(0)
    encoder, x, y = mlp().double(), torch.randn(6, 6, dtype=torch.float64), torch.ones(6, dtype=torch.int64)
    criterion = nckernels.NONLLoss(D, K, dtype=torch.float64)
    whole = criterion(encoder(x), y)
    whole.backward()
    expected = {n: p.grad for n, p in encoder.named_parameters()}
    encoder.zero_grad()
    parts: list[Tensor] = []

    def scale(part: Tensor) -> Tensor:
        parts.append(part.detach())
        return part

    loss = MicroBatches(encoder, 4).stream(criterion, y, x, scale=scale)
    torch.testing.assert_close(loss, whole.detach(), rtol=1e-12, atol=1e-12)
    assert all(part.isfinite() for part in parts)
    assert_equal({n: p.grad for n, p in encoder.named_parameters()}, expected)


def test_stream_of_nothing() -> None:
    """As the losses: NaN for the mean of nothing."""
    encoder, x, y = mlp(), torch.randn(4, 6), torch.full((4,), -100)
    assert MicroBatches(encoder, 3).stream(nckernels.NONLLoss(D, K), y, x).isnan()
    assert MicroBatches(encoder, 3).stream(nckernels.NormFaceLoss(D, K, reduction="sum"), y, x) == 0.0


# --- both runs are the same --------------------------------------------------------------------------------


class Follower(nn.Module):
    """State that its output depends on: a moving average in a buffer, which is a new tensor each time."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x - self.mean


STATEFUL: dict[str, Callable[[], nn.Module]] = {
    "dropout": lambda: nn.Dropout(0.5),
    "batch_norm": lambda: nn.BatchNorm1d(8),
    "cumulative_batch_norm": lambda: nn.BatchNorm1d(8, momentum=None),
    "spectral_norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)),
    "new_buffer": Follower,
}


def stateful(name: str) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), STATEFUL[name](), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, D)).double()


def run(way: str, encoder: nn.Module, criterion: nckernels.NONLLoss, x: Tensor, y: Tensor, size: int) -> Tensor:
    """A step; "one graph" runs the micro-batches once and keeps the graphs of all of them."""
    if way == "streamed":
        return MicroBatches(encoder, size).stream(criterion, y, x)
    micro = MicroBatches(encoder, size)
    features = micro(x) if way == "cached" else torch.cat([encoder(part) for part in x.split(size)])
    loss = criterion(features, y)
    loss.backward()
    if way == "cached":
        micro.backward()
    return loss.detach()


@pytest.mark.parametrize("way", ["cached", "streamed"])
@pytest.mark.parametrize("name", STATEFUL)
def test_same_state_in_both_runs(name: str, way: str) -> None:
    """Random numbers, running statistics and other buffers: gradients and what they are afterwards."""
    results = []
    for how in ("one graph", way):
        encoder = stateful(name)
        criterion = nckernels.NONLLoss(D, K, dtype=torch.float64)
        x, y = torch.randn(14, 6, dtype=torch.float64), torch.randint(K, (14,))
        losses = [run(how, encoder, criterion, x, y, 4) for _ in range(2)]
        module = nn.ModuleList([encoder, criterion])
        gradients = {n: p.grad for n, p in module.named_parameters()}
        results.append((torch.stack(losses), gradients, dict(module.named_buffers()), torch.get_rng_state()))
    (loss, gradients, buffers, random), (found, found_gradients, found_buffers, found_random) = results
    torch.testing.assert_close(found, loss, rtol=1e-12, atol=1e-12)
    assert_equal(found_gradients, gradients)
    assert buffers.keys() == found_buffers.keys()
    for name, buffer in buffers.items():
        torch.testing.assert_close(found_buffers[name], buffer, rtol=0, atol=0)
    assert torch.equal(random, found_random)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("way", ["cached", "streamed"])
def test_same_random_numbers_on_a_gpu(way: str) -> None:
    results = []
    for how in ("one graph", way):
        encoder = stateful("dropout").float().cuda()
        criterion = nckernels.NONLLoss(D, K, device="cuda")
        x, y = torch.randn(14, 6).cuda(), torch.randint(K, (14,)).cuda()
        loss = run(how, encoder, criterion, x, y, 4)
        results.append((loss, [p.grad for p in encoder.parameters()], torch.cuda.get_rng_state()))
    torch.testing.assert_close(results[1][:2], results[0][:2], rtol=1e-5, atol=1e-5)
    assert torch.equal(results[1][2], results[0][2])


def test_what_happens_between_the_runs_stays() -> None:
    """A queue in the encoder's module that the loss fills, and random numbers that the loss takes."""
    c = case("nonl")
    encoder = nn.Sequential(c.encoder, nn.Dropout())
    encoder.register_buffer("queue", torch.zeros(3))
    micro = MicroBatches(encoder, 3)
    features = micro(*c.args)
    encoder.queue += torch.rand(3)
    queue, random = encoder.queue.clone(), torch.get_rng_state()
    c.loss(features).backward()
    micro.backward()
    assert torch.equal(encoder.queue, queue)
    assert torch.equal(torch.get_rng_state(), random)
    assert features.grad is None  # nothing of that size is left behind


# --- training loops ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["cached", "streamed"])
def test_training_loop(way: str) -> None:
    """Accumulation over two batches, GradScaler, clipping, AdamW: the same parameters after three steps."""
    results = []
    for micro_batches in (False, True):
        torch.manual_seed(0)
        encoder, criterion = mlp().double(), nckernels.NTCELoss(D, K, dtype=torch.float64)
        module = nn.ModuleList([encoder, criterion])
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        micro, norms = MicroBatches(encoder, 3), []
        for _ in range(3):
            for _ in range(2):
                x, y = torch.randn(8, 6, dtype=torch.float64), torch.randint(K, (8,))
                if micro_batches and way == "streamed":
                    micro.stream(criterion, y, x, scale=lambda loss, s=scaler: s.scale(loss / 2))
                    continue
                loss = criterion(micro(x) if micro_batches else encoder(x), y)
                scaler.scale(loss / 2).backward()
                if micro_batches:
                    micro.backward()
            scaler.unscale_(optimizer)
            norms.append(nn.utils.clip_grad_norm_(module.parameters(), 0.05))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert min(norms) > 0.05
        results.append([*norms, *(p.detach() for p in module.parameters())])
    for plain, found in zip(*results, strict=True):
        torch.testing.assert_close(found, plain, rtol=1e-9, atol=1e-9)  # AdamW divides by small numbers


@pytest.mark.parametrize("inside", [False, True], ids=["backward_outside", "backward_inside"])
@pytest.mark.parametrize("way", ["cached", "streamed"])
def test_autocast(way: str, inside: bool) -> None:
    """Both runs are in bfloat16, and weights that the first run has cast are not those of the second."""
    torch.manual_seed(0)
    encoder, criterion = mlp(), nckernels.NTCELoss(D, K, temperature=0.5)
    x, y = torch.randn(64, 6), torch.randint(K, (64,))
    dtypes = []
    encoder[-1].register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    losses, gradients = {}, {}
    for how in ("exact", "whole", way):
        encoder.zero_grad()
        micro = MicroBatches(encoder, 16)
        with torch.autocast("cpu", torch.bfloat16, enabled=how != "exact"):
            if how == "streamed":
                loss = micro.stream(criterion, y, x)
            else:
                loss = criterion(micro(x) if how == "cached" else encoder(x), y)
            if how == "cached" and inside:
                loss.backward()
                micro.backward()
        if how in ("exact", "whole") or (how == "cached" and not inside):
            loss.backward()
            if how == "cached":
                micro.backward()
        losses[how] = float(loss.detach())
        gradients[how] = torch.cat([p.grad.flatten() for p in encoder.parameters()])
    assert dtypes == [torch.float32] + [torch.bfloat16] * 9  # the whole batch, and two runs of four micro-batches
    assert losses[way] == pytest.approx(losses["whole"], rel=1e-6)
    error = {how: float((g - gradients["exact"]).norm() / g.norm()) for how, g in gradients.items()}
    assert 1e-4 < error["whole"] < 0.02
    assert error[way] < 1.5 * error["whole"]


def test_autocast_cache() -> None:
    """The first run leaves no weights without gradient to other users of the encoder."""
    c = case("nonl", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        MicroBatches(c.encoder, 3)(*c.args)
        c.encoder(*c.args).sum().backward()
    assert all(p.grad is not None for p in c.encoder.parameters())


def test_frozen_parts() -> None:
    """Micro-batches and encoders that have nothing to learn."""
    c = case("nonl")
    frozen = copy.deepcopy(c.encoder).requires_grad_(False)

    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.learnt, self.frozen = c.encoder, frozen

        def forward(self, x: Tensor) -> Tensor:
            return self.learnt(x) if x[0, 0] < 10.0 else self.frozen(x)

    x = c.args[0].clone()
    x[-2:] = 20.0
    c.loss(torch.cat([c.encoder(x[:-2]), frozen(x[-2:])])).backward()
    expected = c.gradients()
    micro = MicroBatches(Either(), 3)
    c.loss(micro(x)).backward()
    micro.backward()
    assert_equal(c.gradients(), expected)

    micro = MicroBatches(frozen, 3)
    features = micro(x)
    assert not features.requires_grad
    c.loss(features).backward()
    micro.backward()
    assert all((p.grad is None) == n.startswith("0.") for n, p in c.module.named_parameters())


def test_no_grad() -> None:
    c = case("clip")
    micro = MicroBatches(c.encoder, 3)
    with torch.no_grad():
        images, texts = micro(*c.args, **c.kwargs)
        expected = c.encoder(*c.args, **c.kwargs)
    assert not images.requires_grad
    torch.testing.assert_close((images, texts), expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(RuntimeError, match="no gradient has reached the features"):
        micro.backward()


# --- memory ------------------------------------------------------------------------------------------------


class Saved:
    """Bytes of the tensors that graphs keep at the same time, at most."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        saved = self

        class Kept:
            def __init__(self, x: Tensor) -> None:
                self.x, self.size = x, x.numel() * x.element_size()
                saved.now += self.size
                saved.peak = max(saved.peak, saved.now)

            def __del__(self) -> None:
                saved.now -= self.size

        return torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.x)


def peak(function: Callable[[], Any]) -> int:
    saved = Saved()
    with saved.hooks():
        function()
    return saved.peak


def test_memory() -> None:
    """The graph of one micro-batch at a time; none in the first run."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, D))
    criterion = nckernels.NTCELoss(D, K)
    x, y = torch.randn(64, 6), torch.randint(K, (64,))
    one = peak(lambda: encoder(x[:8]).sum())
    micro = MicroBatches(encoder, 8)
    assert peak(lambda: micro(x)) == 0
    micro.discard()
    criterion(micro(x), y).backward()
    assert peak(micro.backward) == one
    assert peak(lambda: micro.stream(criterion, y, x)) == peak(lambda: micro.stream(criterion, y[:8], x[:8])) > one


# --- errors ------------------------------------------------------------------------------------------------


class Returns(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.weight, self.function = nn.Parameter(torch.ones(6)), function

    def forward(self, x: Tensor, *others: Any) -> Any:
        return self.function(x * self.weight)


@pytest.mark.parametrize(
    ("size", "error", "message"),
    [
        (0, ValueError, "micro_batch_size must be at least 1, got 0"),
        (-3, ValueError, "micro_batch_size must be at least 1, got -3"),
        (2.0, TypeError, "micro_batch_size must be an int"),
        (True, TypeError, "micro_batch_size must be an int"),
    ],
)
def test_bad_sizes(size: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MicroBatches(mlp(), size)


def test_bad_encoder() -> None:
    with pytest.raises(TypeError, match=r"encoder must be a torch.nn.Module, got function"):
        MicroBatches(lambda x: x, 3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "at least one tensor|must hold a tensor"),
        ((torch.tensor(1.0), 3), "must hold a tensor"),
        ((torch.ones(4, 6), torch.ones(3)), r"one row per sample, got shapes \[\(4, 6\), \(3,\)\]"),
        ((torch.ones(4, 6, requires_grad=True),), "inputs must not require grad"),
    ],
)
def test_bad_inputs(args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MicroBatches(Returns(lambda x: x), 3)(*args)


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda x: x.sum(), ValueError, r"one row per sample, got shape \(\) for 3 samples"),
        (lambda x: (x, x.mean(0)), ValueError, r"one row per sample, got shape \(6,\) for 3 samples"),
        (lambda x: (x, "features"), TypeError, "must return tensors, got str"),
    ],
)
def test_bad_outputs(function: Callable[[Tensor], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MicroBatches(Returns(function), 3)(torch.ones(5, 6))


def test_features_that_nobody_keeps() -> None:
    """Without a gradient nothing waits for the second run: neither the features nor the inputs."""
    c = case("clip")
    micro, x = MicroBatches(c.encoder, 3), c.args[0].clone()
    images, texts = micro(x, **c.kwargs)
    alive = [weakref.ref(tensor) for tensor in (x, images, texts["text"])]
    del x, images, texts
    assert [ref() for ref in alive] == [None, None, None]


def test_two_losses_of_the_same_features() -> None:
    """Backward passes of the same features before one second run, and before two."""
    c = case("clip")

    def second(output: tuple[Tensor, dict[str, Tensor]]) -> Tensor:
        return output[0].square().mean()

    output = c.encoder(*c.args, **c.kwargs)
    (c.loss(output) + second(output)).backward()
    expected = c.gradients()
    for at_once in (True, False):
        micro = MicroBatches(c.encoder, 3)
        output = micro(*c.args, **c.kwargs)
        c.loss(output).backward()
        if not at_once:
            micro.backward()
        second(output).backward()
        micro.backward()
        assert_equal(c.gradients(), expected)


def test_order_of_calls() -> None:
    c = case("nonl")
    micro = MicroBatches(c.encoder, 3)
    with pytest.raises(RuntimeError, match="no gradient has reached the features"):
        micro.backward()
    micro(*c.args)  # a step that is left out before the loss's backward
    loss = c.loss(micro(*c.args))
    loss.backward()
    with pytest.raises(RuntimeError, match="a gradient that has not reached the encoder"):
        micro(*c.args)
    micro.backward()
    expected = c.gradients()
    c.loss(micro(*c.args)).backward()  # and one that is left out after it
    micro.discard()
    c.gradients()
    c.loss(micro(*c.args)).backward()
    micro.backward()
    assert_equal(c.gradients(), expected)


@pytest.mark.parametrize("by", ["encoder", "user"])
def test_inputs_changed_in_place(by: str) -> None:
    encoder = nn.Sequential(nn.ReLU(inplace=by == "encoder"), *mlp())
    micro, x = MicroBatches(encoder, 3), torch.randn(8, 6)
    micro(x).sum().backward()
    if by == "user":
        x += 1.0
    with pytest.raises(RuntimeError, match="an input of the encoder was changed in place"):
        micro.backward()


@pytest.mark.parametrize(
    ("criterion", "labels", "error", "message"),
    [
        (nckernels.SupConLoss(), 8, TypeError, "criterion must be an NONLLoss, .* got SupConLoss"),
        (nckernels.NONLLoss(D, K, reduction="none"), 8, ValueError, "reduction 'mean' or 'sum', got 'none'"),
        (nckernels.NONLLoss(D, K, direction="both"), 8, ValueError, "direction='both' couples"),
        (nckernels.NTCELoss(D, K, sparse=True), 8, ValueError, "need the features of the whole batch"),
        (nckernels.NormFaceLoss(D, K, class_fraction=0.5), 8, ValueError, "need the features of the whole batch"),
        (nckernels.NTCELoss(D, K), 7, ValueError, r"target must have one label for each of 8 samples, got \(7,\)"),
    ],
)
def test_bad_streams(criterion: nn.Module, labels: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MicroBatches(mlp(), 3).stream(criterion, torch.zeros(labels, dtype=torch.int64), torch.randn(8, 6))


def test_stream_of_several_outputs() -> None:
    micro = MicroBatches(Returns(lambda x: (x, x)), 3)
    with pytest.raises(ValueError, match="must return one tensor of features, got 2"):
        micro.stream(nckernels.NTCELoss(6, K), torch.zeros(8, dtype=torch.int64), torch.randn(8, 6))


class FailsOnce(nn.Module):
    """Raises at its n-th call."""

    def __init__(self, call: int) -> None:
        super().__init__()
        self.left = call

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if self.left == 0:
            raise ZeroDivisionError
        return x


@pytest.mark.parametrize("call", [2, 5], ids=["first_run", "second_run"])
@pytest.mark.parametrize("way", ["cached", "streamed"])
def test_failures_leave_no_state(way: str, call: int) -> None:
    """Of a run that fails: buffers are those of no run or of the first one; the next step is as if without it."""
    encoder, criterion = stateful("batch_norm"), nckernels.NTCELoss(D, K, dtype=torch.float64)
    encoder.insert(2, FailsOnce(call))
    before = {name: b.clone() for name, b in encoder.named_buffers()}
    x, y = torch.randn(12, 6, dtype=torch.float64), torch.randint(K, (12,))
    micro = MicroBatches(encoder, 4)

    def step() -> None:
        if way == "streamed":
            micro.stream(criterion, y, x)
        else:
            criterion(micro(x), y).backward()
            micro.backward()

    with pytest.raises(ZeroDivisionError):
        step()
    tracked = dict(encoder.named_buffers())["1.num_batches_tracked"]
    assert tracked == (0 if call == 2 else 3)
    if call == 2:
        assert all(torch.equal(b, before[name]) for name, b in encoder.named_buffers())
    encoder.zero_grad()
    random = torch.get_rng_state()
    step()
    found = {n: p.grad for n, p in encoder.named_parameters()}
    encoder.zero_grad()
    torch.set_rng_state(random)
    run("one graph", encoder, criterion, x, y, 4)
    assert_equal(found, {n: p.grad for n, p in encoder.named_parameters()})
