"""The losses without prototypes against float64 N x N forms: values and gradients, options, labels, views."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from conftest import Backend
from contrastive_cases import (
    CASES,
    LABELLED,
    REDUCED,
    SHORT,
    SOME,
    TEMPERED,
    assert_equal,
    build,
    make_case,
    reductions,
)
from oracle_contrastive import (
    DTYPES,
    NAIVE,
    REDUCTIONS,
    TEMPERATURE,
    alignment_loops,
    check,
    clip_loops,
    info_nce_loops,
    package,
    prototype_loops,
    supcon_loops,
    uniformity_loops,
    upstream_of,
    value_and_grads,
)
from torch import Tensor

import nckernels
from nckernels import _class_means

# --------------------------------------------------------------------------------------------------
# the oracle itself


@pytest.mark.parametrize("decoupled", [False, True])
def test_dense_forms_equal_the_equations_as_loops(decoupled: bool) -> None:
    """Python loops over floats guard the dense forms that every other test trusts."""
    labels = torch.tensor([4, -9, 4, 10**9, -100, -9, 4, -100, 5])
    c = make_case("supcon", 9, 3, ignored=0.0)
    x, beta, y = c.inputs[0], 5.0, labels.tolist()
    kw: dict[str, Any] = {"temperature": 1 / beta, "reduction": "none"}
    expected = supcon_loops(x, y, beta, -100, decoupled)
    assert expected[3] == expected[4] == expected[8] == 0.0
    got = NAIVE["supcon"](x, labels, decoupled=decoupled, **kw)
    assert got.tolist() == pytest.approx(expected, rel=1e-12)

    assert NAIVE["prototype"](x, labels, **kw).tolist() == pytest.approx(prototype_loops(x, y, beta, -100), rel=1e-12)
    keys, positive = x.flip(0)[:5].exp(), torch.tensor([4, 0, -100, 1, 2, 3, 3, 3, 0])
    got = NAIVE["info_nce"](x, keys, positive, decoupled=decoupled, **kw)
    assert got.tolist() == pytest.approx(info_nce_loops(x, keys, positive.tolist(), beta, -100, decoupled), rel=1e-12)
    got = NAIVE["clip"](x, x.flip(1).exp(), decoupled=decoupled, **kw)
    assert got.tolist() == pytest.approx(clip_loops(x, x.flip(1).exp(), beta, decoupled), rel=1e-12)
    assert NAIVE["uniformity"](x, t=3.0).item() == pytest.approx(uniformity_loops(x, 3.0), rel=1e-12)
    got = NAIVE["alignment"](x, x.flip(1), alpha=2.5, reduction="none")
    assert got.tolist() == pytest.approx(alignment_loops(x, x.flip(1), 2.5), rel=1e-12)


def test_dense_reductions_equal_loops() -> None:
    """Views, weights and the mean over the samples that have a positive, by hand."""
    c = make_case("supcon", 6, 3, views=2, ignored=0.0)
    y, w = torch.tensor([1, 1, -100, 2, 3, 2]), torch.tensor([1.0, 0.5, 9.0, 2.0, 0.0, 1.0], dtype=torch.float64)
    rows, labels = c.inputs[0].reshape(12, 3), [v for v in y.tolist() for _ in range(2)]
    values = supcon_loops(rows, labels, 5.0, -100, False)
    weights = [v for v in w.tolist() for _ in range(2)]
    total = math.fsum(v * f for v, f in zip(values, weights, strict=True))
    kw: dict[str, Any] = {"temperature": 0.2, "sample_weight": w}
    samples = NAIVE["supcon"](c.inputs[0], y, reduction="none", **kw)
    assert samples.shape == (6, 2)
    expected = [v * f for v, f in zip(values, weights, strict=True)]
    assert samples.flatten().tolist() == pytest.approx(expected, rel=1e-12)
    assert NAIVE["supcon"](c.inputs[0], y, reduction="sum", **kw).item() == pytest.approx(total, rel=1e-12)
    assert NAIVE["supcon"](c.inputs[0], y, **kw).item() == pytest.approx(total / 9.0, rel=1e-12)  # 2 * 4.5


# --------------------------------------------------------------------------------------------------
# values and gradients


dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t).removeprefix("torch."))


@pytest.mark.parametrize(("reduction", "weight"), SOME, ids=["none-weight", "mean-plain"])
@pytest.mark.parametrize("case", REDUCED)
@dtypes
def test_equals_the_dense_form(backend: Backend, dtype: torch.dtype, case: str, reduction: str, weight: bool) -> None:
    """Values and all gradients in every dtype, one by one (random upstream) and as a mean."""
    backend.require(dtype)
    check(build(case, weight=weight and case in TEMPERED, reduction=reduction), dtype, backend.device)


@pytest.mark.parametrize(
    ("reduction", "weight"),
    [("none", False), ("mean", True), ("sum", False), ("sum", True)],
    ids=["none-plain", "mean-weight", "sum-plain", "sum-weight"],
)
@pytest.mark.parametrize("case", TEMPERED)
def test_other_reductions(backend: Backend, case: str, reduction: str, weight: bool) -> None:
    check(build(case, weight=weight, reduction=reduction), torch.float32, backend.device)


@pytest.mark.parametrize("case", ["uniformity", "uniformity-5"])
@dtypes
def test_uniformity_equals_the_dense_form(backend: Backend, dtype: torch.dtype, case: str) -> None:
    backend.require(dtype)
    check(build(case), dtype, backend.device)
    check(build(case, 2, 3), dtype, backend.device)


@pytest.mark.parametrize("temperature", [0.001, 0.01, 2.0])
@pytest.mark.parametrize("case", TEMPERED)
def test_every_temperature(backend: Backend, case: str, temperature: float) -> None:
    check(build(case, temperature=temperature), torch.float32, backend.device)


@pytest.mark.parametrize("case", TEMPERED)
def test_default_temperature(backend: Backend, case: str) -> None:
    """0.1, for CLIP 0.07; a number and a tensor are the same temperature."""
    c = build(case).to(torch.float32, backend.device)
    default = TEMPERATURE[c.name]
    bare = dataclasses.replace(c, temperature=None)
    assert torch.equal(bare.call(package(c.name)), bare.call(package(c.name), temperature=default))
    tensor = c.call(package(c.name), *c.inputs, torch.tensor(default, device=backend.device))
    torch.testing.assert_close(tensor, bare.call(package(c.name)), rtol=2**-20, atol=0)  # default's own rounding


@pytest.mark.parametrize("case", TEMPERED)
def test_reductions_agree(backend: Backend, case: str) -> None:
    """sum = none.sum(), mean = that over the weight of the samples that have a positive."""
    c = build(case, weight=True).to(torch.float32, backend.device)
    none, mean, total = (c.call(package(c.name), reduction=r) for r in REDUCTIONS)
    assert c.weight is not None
    shape = c.inputs[0].shape[:-1]
    assert none.shape == shape
    assert mean.shape == total.shape == ()
    weight = c.weight.reshape(-1, *[1] * (len(shape) - 1)).expand(shape)
    counted = torch.ones(shape, dtype=torch.bool, device=none.device)
    if c.target is not None:
        counted = (c.target != -100).reshape(-1, *[1] * (len(shape) - 1)).expand(shape)
    if case in ("supcon", "supcon-decoupled"):
        counted = counted & (torch.arange(shape[0], device=none.device) != 5)  # make_case's singleton
    torch.testing.assert_close(total, none.sum(), rtol=1e-5, atol=0)
    torch.testing.assert_close(mean, none.sum() / weight[counted].sum(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("case", TEMPERED)
def test_a_weight_of_zero_drops_the_anchor_only(backend: Backend, case: str) -> None:
    """It still is a negative (or a positive) of the others, so its row keeps a gradient."""
    c = build(case, weight=True, ignored=0.0, reduction="none").to(torch.float32, backend.device)
    assert c.weight is not None
    assert not c.weight[3]
    samples = c.call(package(c.name))
    plain = dataclasses.replace(c, weight=None).call(package(c.name))
    weight = c.weight.reshape(-1, *[1] * (plain.dim() - 1))
    torch.testing.assert_close(samples, plain * weight, rtol=1e-6, atol=0)
    grad = value_and_grads(c, package(c.name))["input 0"][3]
    assert bool(grad.any()) == (c.name != "info_nce")  # a query is nobody's negative


# --------------------------------------------------------------------------------------------------
# many tiles


@pytest.mark.parametrize("samples", [301, 128])
@pytest.mark.parametrize("case", CASES)
def test_many_tiles(backend: Backend, small_workspace: None, case: str, samples: int) -> None:
    """Several ragged (and several full) tiles under a small workspace."""
    more: dict[str, Any] = {} if case.startswith("uniformity") else {"reduction": "none"}
    if CASES[case][1].get("views"):
        samples //= CASES[case][1]["views"]
    check(build(case, samples, keys=203, weight=case in TEMPERED, **more), torch.float32, backend.device)


@pytest.mark.parametrize("dim", [31, 33, 40])
@pytest.mark.parametrize("samples", [64, 150])
@pytest.mark.parametrize("case", ["supcon", "prototype", "info_nce", "clip"])
def test_a_ragged_last_tile_of_several_blocks_of_columns(
    backend: Backend, small_workspace: None, case: str, samples: int, dim: int
) -> None:
    """Little more than the workspace: what is kept for the backward pass is laid out in blocks and short tiles."""
    check(build(case, samples, dim), torch.float32, backend.device)


@pytest.mark.parametrize("case", ["supcon", "supcon-decoupled", "prototype"])
def test_many_labels_in_many_tiles(backend: Backend, small_workspace: None, case: str) -> None:
    """More labels than fit a tile: most rows have one or two positives, some none."""
    labels = torch.randint(-(2**62), 2**62, (170,), generator=torch.Generator().manual_seed(5))
    check(build(case, 301, labels=labels), torch.float32, backend.device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", SHORT)
def test_many_tiles_in_half_precision(backend: Backend, small_workspace: None, case: str, dtype: torch.dtype) -> None:
    check(build(case, 150, 33), dtype, backend.device)


# --------------------------------------------------------------------------------------------------
# labels


@pytest.mark.parametrize(("reduction", "ignore_index"), [("none", 0), ("mean", 3), ("sum", 10**9)])
@pytest.mark.parametrize("case", LABELLED)
def test_ignore_index_anywhere(backend: Backend, case: str, reduction: str, ignore_index: int) -> None:
    ignore_index = ignore_index if not case.startswith("info_nce") else ignore_index % 29
    c = build(case, weight=True, ignore_index=ignore_index, reduction=reduction)
    assert c.target is not None
    assert (c.target == ignore_index).any()
    check(c, torch.float32, backend.device)


@pytest.mark.parametrize("case", LABELLED)
def test_ignored_samples_are_as_if_dropped(backend: Backend, case: str) -> None:
    """Neither anchors nor positives nor negatives, whatever their rows hold."""
    c = build(case, weight=True, reduction="sum").to(torch.float32, backend.device)
    assert c.target is not None
    assert c.weight is not None
    keep = c.target != -100
    assert not keep.all()
    far = torch.where(keep.reshape(-1, *[1] * (c.inputs[0].dim() - 1)), c.inputs[0], 1e6)
    rest = dataclasses.replace(
        c, inputs=(c.inputs[0][keep], *c.inputs[1:]), target=c.target[keep], weight=c.weight[keep]
    )
    whole = value_and_grads(dataclasses.replace(c, inputs=(far, *c.inputs[1:])), package(c.name))
    assert not whole["input 0"][~keep].any()
    whole["input 0"] = whole["input 0"][keep]
    assert_equal(whole, value_and_grads(rest, package(c.name)), 4e-6)  # the same float32 sums in other tiles
    samples = c.call(package(c.name), reduction="none")
    assert not samples[~keep].any()


@pytest.mark.parametrize("ignore_index", [0, 1, 3])
@pytest.mark.parametrize("case", ["supcon-no-target", "supcon-decoupled-no-target", "info_nce-no-target"])
def test_without_target_nothing_is_ignored(cpu_backend: Backend, case: str, ignore_index: int) -> None:
    """There are no labels then that an ignore_index could meet: sample 1 is not label 1."""
    c = build(case, 7)
    expected = value_and_grads(c, package(c.name))
    assert_equal(value_and_grads(c.with_options(ignore_index=ignore_index), package(c.name)), expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
@pytest.mark.parametrize("case", LABELLED)
def test_integer_targets(backend: Backend, case: str, dtype: torch.dtype) -> None:
    c = build(case, ignored=0.0, labels=torch.tensor([0, 5, 7, 100])).to(torch.float32, backend.device)
    assert c.target is not None
    if not case.startswith("info_nce"):
        c.target[5] = 99
    narrow = dataclasses.replace(c, target=c.target.to(dtype))
    assert_equal(value_and_grads(narrow, package(c.name)), value_and_grads(c, package(c.name)))


@pytest.mark.parametrize("case", ["supcon", "supcon-decoupled", "prototype"])
def test_extreme_labels(cpu_backend: Backend, case: str) -> None:
    """The ends of int64, and labels that float32 or 32 bits cannot tell apart."""
    ends = torch.tensor([-(2**63), 2**63 - 1, 2**63 - 2, 2**32, 0, 2**31, -(2**31), 2**53, 2**53 + 1])
    index = torch.randint(9, (50,), generator=torch.Generator().manual_seed(2))
    c = build(case, 50, ignored=0.0, reduction="none")
    small = dataclasses.replace(c, target=index)
    large = dataclasses.replace(c, target=ends[index])
    assert_equal(value_and_grads(large, package(c.name)), value_and_grads(small, package(c.name)), 1e-12)


@reductions
def test_no_target_equals_one_label_each(backend: Backend, reduction: str) -> None:
    c = build("supcon-no-target", weight=True, reduction=reduction).to(torch.float32, backend.device)
    labels = 50 - 3 * torch.arange(len(c.inputs[0]), device=backend.device)
    labelled = dataclasses.replace(c, target=labels)
    assert_equal(value_and_grads(labelled, package("supcon")), value_and_grads(c, package("supcon")), 4e-6)


# --------------------------------------------------------------------------------------------------
# views and strides


@pytest.mark.parametrize("case", ["supcon-views", "supcon-decoupled-views", "prototype-views", "supcon-3-views"])
@reductions
def test_views_equal_the_flattened_form(backend: Backend, case: str, reduction: str) -> None:
    c = build(case, weight=True, reduction=reduction).to(torch.float32, backend.device)
    views = c.inputs[0].shape[1]
    assert c.target is not None
    assert c.weight is not None
    flat = dataclasses.replace(
        c,
        inputs=(c.inputs[0].flatten(0, 1),),
        target=c.target.repeat_interleave(views),
        weight=c.weight.repeat_interleave(views),
    )
    leaves = [one.inputs[0].clone().requires_grad_() for one in (c, flat)]
    values = [one.call(package(c.name), x, one.temperature) for one, x in zip((c, flat), leaves, strict=True)]
    up = upstream_of(values[0])
    grads = [torch.autograd.grad(v, x, up.reshape(v.shape))[0] for v, x in zip(values, leaves, strict=True)]
    if reduction == "none":
        assert values[0].shape == c.inputs[0].shape[:2]
    assert torch.equal(values[0].flatten(), values[1].flatten())
    assert torch.equal(grads[0].flatten(0, 1), grads[1])


def test_one_view_with_a_target_is_a_plain_batch(cpu_backend: Backend) -> None:
    """(B, 1, d) with labels."""
    for name in ("supcon", "prototype"):
        c = make_case(name, views=1)
        flat = dataclasses.replace(c, inputs=(c.inputs[0][:, 0],))
        torch.testing.assert_close(c.call(package(name)), flat.call(package(name)), rtol=1e-14, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_non_contiguous_inputs(backend: Backend, case: str) -> None:
    """Transposed and strided views of a larger tensor, expanded weights, strided targets: the same numbers."""
    c = build(case, weight=case in TEMPERED).to(torch.float32, backend.device)
    expected = value_and_grads(c, package(c.name))

    def scatter(x: Tensor) -> Tensor:
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), 7, dtype=x.dtype, device=x.device)
        wide[..., ::2] = x
        return wide[..., ::2]

    leaves = [x.mT.contiguous().requires_grad_() for x in c.inputs]
    strided = dataclasses.replace(
        c,
        target=None if c.target is None else scatter(c.target),
        weight=None if c.weight is None else scatter(c.weight),
    )
    views = [x.mT for x in leaves]
    assert not any(x.is_contiguous() for x in views)
    out = strided.call(package(c.name), *views, *(() if c.temperature is None else (c.temperature,)))
    grads = torch.autograd.grad(out, leaves, upstream_of(out))
    got = {"loss": out.detach(), **{f"input {i}": g.mT for i, g in enumerate(grads)}}
    expected.pop("temperature", None)
    assert_equal(got, expected, 4e-6)


@pytest.mark.parametrize(("reduction", "views", "ignored"), [("none", 0, 0.2), ("mean", 2, 0.0), ("sum", 2, 0.2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_prototype_loss_of_large_matrices_is_the_same(
    cpu_backend: Backend,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    reduction: str,
    views: int,
    ignored: float,
) -> None:
    """In closed form where the matrix is small, else as a loss on the primitive; no worse than the dense form."""
    closed, losses = [], _class_means.losses
    monkeypatch.setattr(_class_means, "losses", lambda *args: closed.append(1) or losses(*args))
    c = build("prototype", views=views, weight=True, ignored=ignored, reduction=reduction)
    c.inputs[0][0] = 0.0
    for workspace, temperature in ((1 << 20, 0.2), (4096, 0.2), (1 << 20, 0.01)):
        closed.clear()
        with nckernels.use_workspace(workspace):
            check(dataclasses.replace(c, temperature=torch.tensor(temperature, dtype=torch.float64)), dtype)
        assert bool(closed) == (cpu_backend.name != "reference" and workspace > 4096 and temperature == 0.2)
