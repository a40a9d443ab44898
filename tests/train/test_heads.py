"""Heads by the name of their loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import nckernels
from nckernels.train import checkpoint
from nckernels.train.heads import OPTIONS, ContrastiveHead, Head, make_head
from nckernels.train.recipe import CONTRASTIVE, LOSSES, Loss

D, K = 6, 4


@pytest.fixture(autouse=True)
def _start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch.manual_seed(0)
    monkeypatch.setenv("NCKERNELS_CACHE", str(tmp_path))


def head(name: str, dim: int = D, classes: int = K, **changes: object) -> Head:
    return make_head(Loss(name=name, **changes), dim, classes, steps_per_epoch=3)


def batch(name: str = "nonl", rows: int = 9) -> tuple[Tensor, Tensor]:
    labels = torch.arange(rows) % K
    features = torch.randn(rows, 2, D) if name in CONTRASTIVE else torch.randn(rows, D)
    return features.requires_grad_(), F.one_hot(labels, K).float() if name == "bce" else labels


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_has_a_head(name: str) -> None:
    """A scalar loss with a gradient, logits, prototypes, and a state that another head takes."""
    one = head(name)
    x, y = batch(name)
    loss = one.loss(x, y)
    assert loss.shape == ()
    loss.backward()
    assert x.grad.abs().sum() > 0
    if isinstance(one, nckernels.FixedPrototypes):
        one.fit(torch.randn(40, D), torch.arange(40) % K)
    new = torch.randn(5, D)
    assert one(new).shape == (5, K)
    assert one.prototypes.shape == (K, D)
    assert torch.equal(head_like(one, name)(new), one(new))
    assert set(OPTIONS) == set(LOSSES)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_under_autocast(name: str) -> None:
    one, (x, y) = head(name), batch(name)
    with torch.autocast("cpu", torch.bfloat16):
        loss = one.loss(x, y)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, head_like(one, name).loss(x, y), atol=0.1, rtol=0.1)


def head_like(one: Head, name: str) -> Head:
    other = head(name)
    other.load_state_dict(one.state_dict())
    return other


def test_cross_entropy_head_equals_torch() -> None:
    plain, smooth = head("ce"), head("ce", options={"label_smoothing": 0.2})
    x, y = batch()
    assert torch.equal(plain.prototypes, plain.weight)
    torch.testing.assert_close(plain.loss(x, y), F.cross_entropy(x @ plain.weight.T + plain.bias, y))
    torch.testing.assert_close(smooth.loss(x, y), F.cross_entropy(smooth(x), y, label_smoothing=0.2))


def test_binary_cross_entropy_of_several_labels() -> None:
    one = head("bce")
    x, y = torch.randn(9, D), torch.rand(9, K).round()
    p = (x @ one.weight.T + one.bias).sigmoid()
    torch.testing.assert_close(one.loss(x, y), -(y * p.log() + (1 - y) * (1 - p).log()).mean())


@pytest.mark.parametrize(("options", "factor"), [({}, 0.01), ({"uniformity": 0.5, "label_smoothing": 0.1}, 0.5)])
def test_psc_star_is_cross_entropy_with_uniform_prototypes(options: dict[str, float], factor: float) -> None:
    one = head("psc-star", options=options)
    x, y = batch()
    pairs = torch.pdist(F.normalize(one.weight, dim=1)).square().mul(-2).exp().mean().log()
    ce = F.cross_entropy(x @ one.weight.T + one.bias, y, label_smoothing=options.get("label_smoothing", 0.0))
    torch.testing.assert_close(one.loss(x, y), ce + factor * pairs)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("nonl", {}),
        ("nonl", {"direction": "both"}),
        ("ntce", {}),
        ("normface", {}),
        ("normface", {"label_smoothing": 0.1, "cosine_margin": 0.2}),
    ],
)
def test_cosine_heads_equal_the_losses_of_the_package(name: str, options: dict[str, object]) -> None:
    one = head(name, temperature=0.3, options=options)
    x, y = batch()
    expected = getattr(nckernels, f"{name}_loss")(x, one.prototypes, y, temperature=0.3, **options)
    torch.testing.assert_close(one.loss(x, y), expected)
    torch.testing.assert_close(one(x), F.normalize(x, dim=1) @ F.normalize(one.prototypes, dim=1).T / 0.3)
    assert [p.shape for p in one.parameters()] == [(K, D)]


@pytest.mark.parametrize(("name", "options"), [("scl", {}), ("scl", {"decoupled": True}), ("prototype", {})])
def test_contrastive_heads(name: str, options: dict[str, object]) -> None:
    """They train by a loss of the views and classify by class means."""
    one = head(name, temperature=0.2, options=options)
    x, y = batch(name)
    function = nckernels.supcon_loss if name == "scl" else nckernels.prototype_loss
    torch.testing.assert_close(one.loss(x, y), function(x, y, temperature=0.2, **options))
    assert list(one.parameters()) == []
    one.fit(x[:, 0].detach(), y)
    means = torch.stack([F.normalize(x[y == c, 0], dim=1).mean(0) for c in range(K)])
    torch.testing.assert_close(one.prototypes, F.normalize(means, dim=1))


def test_etf_dr_pulls_to_a_simplex() -> None:
    one = head("etf-dr", 5, 6)
    cosines = one.prototypes @ one.prototypes.T
    torch.testing.assert_close(cosines, 1.2 * torch.eye(6) - 0.2, atol=1e-6, rtol=0)
    x, y = torch.randn(9, 5), torch.arange(9) % 6
    torch.testing.assert_close(one.loss(x, y), 0.5 * (F.cosine_similarity(x, one.prototypes[y]) - 1).square().mean())
    assert list(one.parameters()) == []
    with pytest.raises(ValueError, match=r"model.dim: a simplex of 7 classes needs .* at least 6 dimensions, got 5"):
        head("etf-dr", 5, 7)


def test_both_assignments_start_from_the_same_random_one() -> None:
    heads = []
    for assignment, seed in (("static", 0), ("dynamic", 0), ("static", 1)):
        torch.manual_seed(seed)
        heads.append(head("dlp", 4, 7, assignment=assignment))
    static, dynamic, other = (h.prototypes for h in heads)
    assert torch.equal(static, dynamic)
    assert not torch.equal(static, other)
    # The points themselves are those of the dimensions and the number of classes, whatever the seed.
    assert {tuple(row) for row in static.tolist()} == {tuple(row) for row in other.tolist()}
    assert heads[1].refresh_every == 3
    assert not heads[0].dynamic


def test_points_of_dlp_come_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = head("dlp", 4, 7, options={"t": 3.0, "momentum": 0.5})
    (kept,) = tmp_path.iterdir()
    content = torch.load(kept, weights_only=True)
    assert content["request"]["t"] == 3.0
    assert first.momentum == 0.5
    content["prototypes"] = -content["prototypes"]
    torch.save(content, kept)
    again = head("dlp", 4, 7, options={"t": 3.0}).points
    assert {tuple(row) for row in again.tolist()} == {tuple(row) for row in (-first.points).tolist()}
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("NCKERNELS_CACHE", str(blocked))
    assert head("dlp", 4, 7).prototypes.shape == (7, 4)


def assert_same_rows(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one[one[:, 0].argsort()], other[other[:, 0].argsort()])


def test_dlp_with_the_prototypes_of_another_run(tmp_path: Path) -> None:
    """[DLP] Table 8, "Ours*", and assignments per epoch, Fig. 3b. ``start=False`` reads no run."""
    run, learnt = tmp_path / "psc", head("nonl", 4, 7)
    run.mkdir()
    parts = {"step": 0, "recipe": {}, "network": {}, "optimizer": {}, "history": {}, "ranks": []}
    checkpoint.save(run / "checkpoint.pt", {**parts, "head": learnt.state_dict()})
    loss = Loss(name="dlp", options={"points": str(run), "refreshes": 0.25})
    one = make_head(loss, 4, 7, steps_per_epoch=3)
    assert_same_rows(one.prototypes, F.normalize(learnt.prototypes.detach()))
    assert one.refresh_every == 12
    assert make_head(Loss(name="dlp", options={"refreshes": 10}), 4, 7, steps_per_epoch=3).refresh_every == 1
    with pytest.raises(ValueError, match=r"loss.options.points: expected prototypes of shape \(6, 4\) in .*\(7, 4\)"):
        make_head(loss, 4, 6)
    (run / "checkpoint.pt").unlink()
    with pytest.raises(ValueError, match=r"loss.options.points: there is no checkpoint"):
        make_head(loss, 4, 7)
    other = make_head(loss, 4, 7, start=False)
    other.load_state_dict(one.state_dict())
    assert torch.equal(other.prototypes, one.prototypes)


# Losses with a past


@pytest.mark.parametrize("name", ["nonl", "ntce", "scl", "prototype"])
def test_a_queue_is_part_of_the_head(name: str) -> None:
    """The first loss is the plain one; the second uses the past features, which are in the state dict."""
    one, (x, y) = head(name, queue=64), batch(name)
    plain = head(name)
    plain.load_state_dict({k.replace("criterion.", ""): v for k, v in one.state_dict().items() if "queue" not in k})
    first = one.loss(x, y).item()
    assert first == pytest.approx(plain.loss(x, y).item(), rel=1e-5)
    assert first != one.loss(x, y).item()
    rows = [value for key, value in one.state_dict().items() if key.endswith("queue.features")]
    assert torch.equal(rows[0][: x[..., 0].numel()], x.detach().flatten(0, -2))
    other = head(name, queue=64)
    other.load_state_dict(one.state_dict())
    assert other.loss(x, y).item() == one.loss(x, y).item()
    if name in CONTRASTIVE:
        assert isinstance(one, ContrastiveHead)
    else:
        assert one.prototypes.shape == (K, D)
        assert len(list(one.parameters())) == 1


@pytest.mark.parametrize("name", ["nonl", "ntce"])
def test_running_denominators_are_part_of_the_head(name: str) -> None:
    one = head(name, decay=0.5)
    (x, y), (more, labels) = batch(), batch()
    one.loss(x, y)
    other = head(name, decay=0.5)
    assert other.loss(more, labels).item() != one.loss(more, labels).item()
    other.load_state_dict(one.state_dict())
    assert other.loss(x, y).item() == one.loss(x, y).item()
    one.eval()
    before = {key: value.clone() for key, value in one.state_dict().items()}
    one.loss(x, y)
    assert all(torch.equal(value, before[key]) for key, value in one.state_dict().items())


# Faults


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("ce", {"options": {"label_smothing": 0.1}}, r"loss.options.label_smothing: .* ce .* mean 'label_smoothing'"),
        ("scl", {"options": {"t": 2.0}}, "loss.options.t: the options of scl are decoupled"),
        ("ntce", {"options": {"t": 2.0}}, "loss.options.t: the options of ntce are none"),
        ("ce", {"options": {"label_smoothing": 2.0}}, "loss.options.label_smoothing: expected .* 0 to 1, got 2.0"),
        ("psc-star", {"options": {"uniformity": "a"}}, "loss.options.uniformity: expected a number"),
        ("normface", {"options": {"label_smoothing": "a"}}, "loss.options.*label_smoothing"),
        ("normface", {"options": {"label_smoothing": 2.0}}, "loss.options.*label_smoothing"),
        ("nonl", {"options": {"direction": "up"}}, "loss.options.*direction"),
        ("dlp", {"options": {"momentum": 2.0}}, "loss.options.*momentum"),
        ("dlp", {"options": {"refreshes": 0}}, "loss.options.refreshes: expected a positive number, got 0"),
        ("ce", {"queue": 8}, "loss.queue: ce contrasts no samples"),
        ("dlp", {"decay": 0.5}, "loss.decay: dlp contrasts no samples"),
        ("normface", {"queue": 8}, "loss.queue: criterion must be .* got NormFaceLoss"),
        ("scl", {"decay": 0.5}, "loss.decay: criterion must be .* got SupConLoss"),
    ],
)
def test_bad_losses_are_named(name: str, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        head(name, **changes)
