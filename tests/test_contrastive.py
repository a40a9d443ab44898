"""The losses without prototypes against float64 N x N forms: values, gradients, degenerate batches, bad input."""

from __future__ import annotations

import dataclasses
import math
import pickle
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import ALL_PAIRS, SINGLE_BACKWARD, Backend
from oracle import worst
from oracle_contrastive import (
    DTYPES,
    NAIVE,
    REDUCTIONS,
    TEMPERATURE,
    Case,
    alignment_loops,
    check,
    clip_loops,
    info_nce_loops,
    make_case,
    package,
    prototype_loops,
    supcon_loops,
    uniformity_loops,
    upstream_of,
    value_and_grads,
)
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import nckernels

# What make_case builds: (name, its arguments).
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "supcon": ("supcon", {}),
    "supcon-views": ("supcon", {"views": 2}),
    "supcon-3-views": ("supcon", {"views": 3}),
    "supcon-no-target": ("supcon", {"views": 2, "target": False}),
    "supcon-decoupled": ("supcon", {"decoupled": True}),
    "supcon-decoupled-views": ("supcon", {"views": 2, "decoupled": True}),
    "supcon-decoupled-no-target": ("supcon", {"views": 2, "target": False, "decoupled": True}),
    "prototype": ("prototype", {}),
    "prototype-views": ("prototype", {"views": 2}),
    "info_nce": ("info_nce", {}),
    "info_nce-no-target": ("info_nce", {"target": False}),
    "info_nce-decoupled": ("info_nce", {"decoupled": True}),
    "clip": ("clip", {}),
    "clip-decoupled": ("clip", {"decoupled": True}),
    "uniformity": ("uniformity", {}),
    "uniformity-5": ("uniformity", {"t": 5.0}),
    "alignment": ("alignment", {}),
    "alignment-3": ("alignment", {"alpha": 3.0}),
    "alignment-1": ("alignment", {"alpha": 1.0}),
}
LABELLED = [c for c in CASES if c.startswith(("supcon", "prototype", "info_nce")) and "no-target" not in c]
TEMPERED = [c for c in CASES if not c.startswith(("uniformity", "alignment"))]
REDUCED = [c for c in CASES if not c.startswith("uniformity")]
SHORT = ["supcon", "supcon-decoupled-views", "prototype", "info_nce", "clip", "uniformity", "alignment"]

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t).removeprefix("torch."))
reductions = pytest.mark.parametrize("reduction", REDUCTIONS)
# The backends behind the registered operator; the reference is plain PyTorch.
OPERATORS = [p for p in ALL_PAIRS if p.values[0].name != "reference"]
operators = pytest.mark.parametrize("backend", OPERATORS, indirect=True)
# One operator on each device stands for all where what is tested is the graph around it.
one_operator = pytest.mark.parametrize(
    "backend",
    [p for p in OPERATORS if p.values[0] in (Backend("chunked", "cpu"), Backend("triton", "cuda"))],
    indirect=True,
)


def build(case: str, *args: Any, **arguments: Any) -> Case:
    name, options = CASES[case]
    return make_case(name, *args, **{**options, **arguments})


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor], roundings: float = 0.0) -> None:
    """Loss and gradients equal up to `roundings` of the largest entry."""
    for key, value in expected.items():
        atol = roundings * float(value.abs().max() + 1) if value.numel() else 0.0
        torch.testing.assert_close(got[key], value, rtol=0, atol=atol, msg=lambda m, key=key: f"{key}: {m}")


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


# Each reduction with sample_weight or without: both with both at float32 below.
SOME = [("none", True), ("mean", False)]


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


@pytest.mark.parametrize("case", SHORT)
def test_per_sample_upstream_gradients_are_used_one_by_one(backend: Backend, case: str) -> None:
    """The gradient of sample i's loss is what upstream e_i gives: nothing is averaged."""
    if case == "uniformity":
        pytest.skip("a scalar")
    c = build(case, 9, 4, keys=6, reduction="none").to(torch.float32, backend.device)
    c64 = c.to(torch.float64)
    for i in range(9):
        grads = []
        for one, function in ((c, package(c.name)), (c64, NAIVE[c.name])):
            x = one.inputs[0].clone().requires_grad_()
            leaves = (x, *one.inputs[1:], *(() if one.temperature is None else (one.temperature,)))
            sample = one.call(function, *leaves)[i].sum()
            grads.append(torch.autograd.grad(sample, x)[0].cpu().double() * c64.inputs[0].norm(dim=-1)[..., None].cpu())
        # Float32 weights of logits of size 5.
        torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=1e-5)


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


@reductions
def test_no_target_equals_one_label_each(backend: Backend, reduction: str) -> None:
    c = build("supcon-no-target", weight=True, reduction=reduction).to(torch.float32, backend.device)
    labels = 50 - 3 * torch.arange(len(c.inputs[0]), device=backend.device)
    labelled = dataclasses.replace(c, target=labels)
    assert_equal(value_and_grads(labelled, package("supcon")), value_and_grads(c, package("supcon")), 4e-6)


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


@pytest.mark.parametrize("case", SHORT)
def test_inputs_are_not_written_to(backend: Backend, case: str) -> None:
    c = build(case, weight=case in TEMPERED).to(torch.float32, backend.device)
    tensors = [t for t in (*c.inputs, c.target, c.weight, c.temperature) if t is not None]
    before = [(t.clone(), t._version) for t in tensors]
    value_and_grads(c, package(c.name))
    for t, (value, version) in zip(tensors, before, strict=True):
        assert torch.equal(t, value)
        assert t._version == version


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("case", ["info_nce", "clip", "alignment"])
def test_one_frozen_operand(backend: Backend, small_workspace: None, case: str, which: int) -> None:
    """The gradient of one input does not depend on whether the other asks for its own."""
    c = build(case, 150).to(torch.float32, backend.device)
    expected = value_and_grads(c, package(c.name))[f"input {which}"]
    inputs = [x.clone().requires_grad_(i == which) for i, x in enumerate(c.inputs)]
    out = c.call(package(c.name), *inputs, *(() if c.temperature is None else (c.temperature,)))
    (got,) = torch.autograd.grad(out, inputs[which], upstream_of(out))
    torch.testing.assert_close(got, expected, rtol=0, atol=4e-6 * float(expected.abs().max()))
    assert not c.call(package(c.name)).requires_grad  # and with all frozen there is no graph


@pytest.mark.parametrize("case", ["info_nce-no-target", "clip", "clip-decoupled", "alignment-3"])
def test_the_same_tensor_as_both_operands(backend: Backend, case: str) -> None:
    """Its gradient is the sum of those in the two places."""
    c = build(case, reduction="none").to(torch.float32, backend.device)
    x = c.inputs[0]
    pair = dataclasses.replace(c, inputs=(x, x.clone()))
    both = value_and_grads(pair, package(c.name))
    leaf = x.clone().requires_grad_()
    out = c.call(package(c.name), leaf, leaf, *(() if c.temperature is None else (c.temperature,)))
    (grad,) = torch.autograd.grad(out, leaf, upstream_of(out))
    torch.testing.assert_close(out.detach(), both["loss"], rtol=1e-5, atol=1e-5)
    total = both["input 0"] + both["input 1"]
    torch.testing.assert_close(grad, total, rtol=0, atol=1e-5 * float(total.abs().max() + 1))


# --------------------------------------------------------------------------------------------------
# autograd


@pytest.mark.parametrize("case", [c for c in CASES if c != "alignment-1"])
def test_gradcheck(cpu_backend: Backend, case: str) -> None:
    """Finite differences, the temperature included."""
    c = build(case, 6, 3, keys=4, weight=case in TEMPERED, temperature=0.5)
    if case in REDUCED:
        c = c.with_options(reduction="none")
    # Rows of norm one: finite differences of rows of norm 0.1 are too coarse.
    leaves = [F.normalize(x, dim=-1).requires_grad_() for x in c.inputs]
    if c.temperature is not None:
        leaves.append(c.temperature.clone().requires_grad_())

    def function(*leaves: Tensor) -> Tensor:
        return c.call(package(c.name), *leaves)

    with nckernels.use_workspace(4096):
        assert gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("case", [c for c in CASES if c != "alignment-1"])
def test_double_backward_under_the_reference(case: str) -> None:
    """Second derivatives equal those of the dense form, and finite differences."""
    c = build(case, 6, 3, keys=4, weight=case in TEMPERED, temperature=0.5)
    penalties = []
    with nckernels.use_backend("reference"):
        for function in (package(c.name), NAIVE[c.name]):
            leaves = [x.clone().requires_grad_() for x in c.inputs]
            if c.temperature is not None:
                leaves.append(c.temperature.clone().requires_grad_())
            first = torch.autograd.grad(c.call(function, *leaves), leaves, create_graph=True)
            penalties.append(torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves))
        for got, expected in zip(*penalties, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
        unit_rows = [F.normalize(x, dim=-1).requires_grad_() for x in c.inputs]
        rest = () if c.temperature is None else (c.temperature,)
        assert gradgradcheck(lambda *x: c.call(package(c.name), *x, *rest), unit_rows, fast_mode=True)


@pytest.mark.parametrize("case", ["supcon", "prototype", "info_nce", "clip", "uniformity"])
def test_double_backward_elsewhere_is_right_or_a_clear_error(backend: Backend, case: str) -> None:
    """A gradient penalty must not silently get zeros."""
    if backend.name not in SINGLE_BACKWARD:
        pytest.skip("this backend supports double backward")
    c = build(case, 6, 3, keys=4).to(torch.float32, backend.device)
    x = c.inputs[0].clone().requires_grad_()
    leaves = (x, *c.inputs[1:], *(() if c.temperature is None else (c.temperature,)))
    (grad,) = torch.autograd.grad(c.call(package(c.name), *leaves), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="reference"):
        grad.pow(2).sum().backward()


# --------------------------------------------------------------------------------------------------
# degenerate batches


@dataclasses.dataclass(frozen=True)
class Degenerate:
    """Labels of a degenerate batch and, by supcon's rule, which of its samples have a positive."""

    labels: list[int]
    counted: list[bool]


NOTHING = -100
DEGENERATE = {
    "all singletons": Degenerate([3, 1, 4, 15], [False] * 4),
    "one pair among singletons": Degenerate([3, 1, 3, 15], [True, False, True, False]),
    "all equal": Degenerate([8] * 4, [True] * 4),
    "all ignored": Degenerate([NOTHING] * 3, [False] * 3),
    "one sample": Degenerate([2], [False]),
    "one left, a singleton": Degenerate([NOTHING, 5, NOTHING], [False] * 3),
    "a positive that is ignored": Degenerate([NOTHING, NOTHING, 5, 6], [False] * 4),
    "a pair and nothing else": Degenerate([5, 5], [True] * 2),
    "a pair, the rest ignored": Degenerate([5, NOTHING, 5, NOTHING], [True, False, True, False]),
    "empty": Degenerate([], []),
}
degenerate = pytest.mark.parametrize("batch", DEGENERATE)


def degenerate_case(case: str, batch: str, **options: Any) -> Case:
    labels = torch.tensor(DEGENERATE[batch].labels, dtype=torch.int64)
    return dataclasses.replace(build(case, len(labels), 5, **options), target=labels)


@pytest.mark.parametrize(("reduction", "weight"), [*SOME, ("mean", True)], ids=["none", "mean", "weighted-mean"])
@degenerate
@pytest.mark.parametrize("case", ["supcon", "supcon-decoupled", "prototype"])
def test_degenerate_batches(backend: Backend, case: str, batch: str, reduction: str, weight: bool) -> None:
    """By the contract and finite throughout: no NaN from an empty set, ever."""
    c = degenerate_case(case, batch, reduction=reduction, weight=weight)
    check(c, torch.float32, backend.device, cancelled=5.0)  # gradients of a pair alone cancel; beta = 5


@degenerate
@pytest.mark.parametrize("case", ["supcon", "supcon-decoupled"])
def test_singletons_are_left_out_of_the_mean(backend: Backend, case: str, batch: str) -> None:
    c = degenerate_case(case, batch).to(torch.float32, backend.device)
    counted = torch.tensor(DEGENERATE[batch].counted, dtype=torch.bool)
    none = c.call(package(c.name), reduction="none").cpu()
    assert not none[~counted].any()
    if batch == "a pair and nothing else" or batch == "a pair, the rest ignored":
        # log e^{beta s} - beta s; decoupled there is no negative and -beta s is left.
        s = F.cosine_similarity(c.inputs[0][0].double(), c.inputs[0][-1 if len(counted) == 2 else 2].double(), dim=0)
        expected = -5 * float(s) if c.options.get("decoupled") else 0.0
        torch.testing.assert_close(none[counted].double(), torch.full((2,), expected).double(), rtol=0, atol=4e-6)
    elif counted.any():
        assert bool(none[counted].all())
    for reduction in ("sum", "mean"):
        value = c.call(package(c.name), reduction=reduction).cpu()
        total = none.sum() / (max(int(counted.sum()), 1) if reduction == "mean" else 1)
        torch.testing.assert_close(value, total, rtol=1e-6, atol=1e-6)


def test_a_singleton_is_a_negative_of_the_others(backend: Backend) -> None:
    """So the pair's loss is not that of the pair alone, and the singleton gets a gradient."""
    c = degenerate_case("supcon", "one pair among singletons").to(torch.float32, backend.device)
    assert c.target is not None
    got = value_and_grads(c, package("supcon"))
    pair = dataclasses.replace(c, inputs=(c.inputs[0][::2],), target=c.target[::2])
    assert got["loss"] > value_and_grads(pair, package("supcon"))["loss"] + 0.01
    assert got["input 0"].any(1).all()


@pytest.mark.parametrize(("reduction", "weight"), [("mean", False), ("mean", True), ("sum", True)])
@pytest.mark.parametrize(
    ("case", "batch"),
    [
        ("supcon", "all singletons"),
        ("supcon-decoupled", "all singletons"),
        *((c, b) for c in ("supcon", "supcon-decoupled", "prototype") for b in ("all ignored", "empty")),
        ("supcon", "one sample"),
    ],
)
def test_nothing_to_learn_from(backend: Backend, case: str, batch: str, reduction: str, weight: bool) -> None:
    """0 with zero gradients, not the NaN of a mean over nothing; the graph is there all the same."""
    c = degenerate_case(case, batch, reduction=reduction, weight=weight).to(torch.float32, backend.device)
    got = value_and_grads(c, package(c.name))
    for key, value in got.items():
        assert torch.equal(value, torch.zeros_like(value)), key


@pytest.mark.parametrize("case", TEMPERED)
def test_all_weights_zero(backend: Backend, case: str) -> None:
    """A weighted mean over a total weight of zero is 0 with zero gradients."""
    c = build(case, weight=True).to(torch.float32, backend.device)
    assert c.weight is not None
    got = value_and_grads(dataclasses.replace(c, weight=torch.zeros_like(c.weight)), package(c.name))
    for key, value in got.items():
        assert torch.equal(value, torch.zeros_like(value)), key


@reductions
@pytest.mark.parametrize("case", ["info_nce-no-target", "info_nce", "clip", "clip-decoupled", "alignment"])
def test_no_rows_at_all(backend: Backend, case: str, reduction: str) -> None:
    c = build(case, 0, 5, reduction=reduction)
    got = value_and_grads(c.to(torch.float32, backend.device), package(c.name))
    assert got["loss"].shape == ((0,) if reduction == "none" else ())
    for key, value in got.items():
        assert torch.equal(value, torch.zeros_like(value)), key


@reductions
def test_all_queries_ignored(backend: Backend, reduction: str) -> None:
    c = build("info_nce", ignored=1.1, reduction=reduction).to(torch.float32, backend.device)
    assert c.target is not None
    c.target[:] = -100
    for key, value in value_and_grads(c, package("info_nce")).items():
        assert torch.equal(value, torch.zeros_like(value)), key


def test_views_without_a_sample(backend: Backend) -> None:
    """(0, V, d), with and without labels."""
    x = torch.randn(0, 2, 5, device=backend.device, requires_grad=True)
    empty = torch.empty(0, dtype=torch.int64, device=backend.device)
    for target in (None, empty):
        assert nckernels.supcon_loss(x, target, reduction="none").shape == (0, 2)
        value = nckernels.supcon_loss(x, target)
        value.backward()
        assert value.item() == 0.0
    assert nckernels.prototype_loss(x, empty, reduction="none").shape == (0, 2)
    assert nckernels.prototype_loss(x, empty).item() == 0.0


def test_alone_without_negatives_the_alignment_is_left(backend: Backend) -> None:
    """One key, one pair, one class: what the contract keeps of each loss when its sum is empty."""
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).to(backend.device)
    s = F.normalize(x.double()) @ F.normalize(x.double()).T
    close: dict[str, Any] = {"rtol": 0, "atol": 4e-6}  # float32 roundings of logits of size 10

    one = torch.zeros(1, dtype=torch.int64, device=backend.device)
    got = nckernels.prototype_loss(x[:1], one)
    torch.testing.assert_close(got.double(), torch.full_like(got, -10).double(), **close)

    zeros = torch.zeros(4, dtype=torch.int64, device=backend.device)
    got = nckernels.info_nce_loss(x, x[:1], zeros, decoupled=True, reduction="none")
    torch.testing.assert_close(got.double(), -10 * s[:, 0], **close)
    got = nckernels.info_nce_loss(x, x[:1], zeros, reduction="none")
    torch.testing.assert_close(got, torch.zeros_like(got), **close)

    got = nckernels.clip_loss(x[:1], x[1:2], temperature=0.1, decoupled=True)
    torch.testing.assert_close(got.double(), -10 * s[0, 1], **close)
    got = nckernels.clip_loss(x[:1], x[1:2])
    torch.testing.assert_close(got, torch.zeros_like(got), **close)

    got = nckernels.supcon_loss(x, zeros, decoupled=True, reduction="none")
    torch.testing.assert_close(got.double(), -10 * (s.sum(1) - 1) / 3, **close)


def test_a_zero_row_is_orthogonal_to_all(backend: Backend) -> None:
    """For the uniformity, which knows cosines only: its squared distance to the others is 2."""
    x = F.normalize(torch.tensor([[0.0, 0.0], [3.0, 4.0], [4.0, -3.0]], device=backend.device))
    got = nckernels.uniformity_loss(x.requires_grad_(), t=0.5)
    got.backward()
    assert got.item() == pytest.approx(-1.0, abs=1e-6)  # all three pairs are at distance sqrt(2)
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("case", [c for c in CASES if c != "alignment-1" and "uniformity" not in c])
def test_zero_rows(backend: Backend, case: str) -> None:
    """A zero row is the zero vector, as in F.normalize, not a unit vector: values and gradients stay finite."""
    c = build(case)
    for x in c.inputs:
        x[::4] = 0
    c = c.to(torch.float32, backend.device)
    got, truth = value_and_grads(c, package(c.name)), value_and_grads(c.to(torch.float64), NAIVE[c.name])
    for key, reference in truth.items():
        value, expected = got[key].cpu().double(), reference.cpu()
        assert value.isfinite().all(), key
        # In units of unit rows, as zero rows have gradients 1e12 times the others': float32 weights of logits of 5.
        if key.startswith("input"):
            norms = c.inputs[int(key[-1])].cpu().double().norm(dim=-1, keepdim=True).clamp_min(1e-12)
            value, expected = value * norms, expected * norms
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-5 * float(expected.abs().max() + 1))


@pytest.mark.parametrize("case", CASES)
def test_half_inputs_of_extreme_size(backend: Backend, case: str) -> None:
    """float16 rows near its largest and near its smallest numbers: squares must not overflow or vanish."""
    c = build(case, 20, 8, keys=10)
    scale = torch.tensor([2.0**-10, 2.0**12], dtype=torch.float64).repeat(10)
    inputs = []
    for x in c.inputs:
        rows = F.normalize(x, dim=-1) * 4
        inputs.append((rows * scale[: len(rows)].reshape(-1, *[1] * (rows.dim() - 1))).half())
    half = dataclasses.replace(c.to(torch.float16, backend.device), inputs=tuple(x.to(backend.device) for x in inputs))
    truth = value_and_grads(half.to(torch.float64), NAIVE[c.name])
    got = value_and_grads(half, package(c.name))
    beta = 5.0 if case in TEMPERED else 8.0
    size = float(truth["loss"].abs().max()) + beta
    assert abs(float(got["loss"].double() - truth["loss"])) <= 16 * 2**-11 * size
    for i, x in enumerate(half.inputs):
        value = got[f"input {i}"].double()
        norms = x.double().norm(dim=-1, keepdim=True)
        assert value.isfinite().all()
        error = (value - truth[f"input {i}"]) * norms
        # Half-precision weights; below 2^-24 a float16 gradient is rounded to a multiple of it.
        assert bool((error.abs() <= 16 * 2**-11 * beta + 2**-24 * norms).all())


COLLAPSED = ["supcon", "supcon-decoupled", "prototype", "info_nce-no-target", "clip"]


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "nearly"])
@pytest.mark.parametrize("case", COLLAPSED)
def test_collapsed_features_at_small_temperature(backend: Backend, case: str, exact: bool) -> None:
    """Temperature 0.01: e^100 overflows float32 and e^-100 vanishes, the losses do neither."""
    g, beta = torch.Generator().manual_seed(3), 100.0
    means = torch.linalg.qr(torch.randn(6, 6, generator=g, dtype=torch.float64))[0]
    target = torch.arange(6).repeat(4)
    noise = 0.0 if exact else 1e-3
    x, z = (means[target] + noise * torch.randn(24, 6, generator=g, dtype=torch.float64) for _ in range(2))
    name, options = CASES[case]
    c = Case(
        name,
        (x,) if name in ("supcon", "prototype") else (x, z),
        target if name in ("supcon", "prototype") else None,
        torch.tensor(1 / beta, dtype=torch.float64),
        options={k: v for k, v in options.items() if k == "decoupled"},
    ).to(torch.float32, backend.device)
    got, truth = value_and_grads(c, package(name)), value_and_grads(c.to(torch.float64), NAIVE[name])
    # Float32 logits of size beta carry errors of a few 2^-24 beta; a weight's error is its logit's, times beta.
    torch.testing.assert_close(got["loss"].double(), truth["loss"], rtol=0, atol=16 * 2**-24 * beta)
    for key in ("input 0", "input 1"):
        if key in truth:
            torch.testing.assert_close(got[key].double(), truth[key], rtol=0, atol=16 * 2**-24 * beta**2)


@pytest.mark.parametrize("case", ["supcon", "prototype", "info_nce-no-target", "clip", "uniformity"])
def test_all_rows_equal(backend: Backend, case: str) -> None:
    """Everything collapsed to one point, at temperature 0.01: the logarithm of a count, and no gradient."""
    n = 40
    c = build(case, n, 6, ignored=0.0).to(torch.float32, backend.device)
    row = torch.tensor([3.0, -1.0, 2.0, 0.5, 0.0, 1.0], device=backend.device)
    target = None if c.target is None else torch.arange(n, device=backend.device) % 5
    temperature = None if c.temperature is None else torch.full_like(c.temperature, 0.01)
    c = dataclasses.replace(
        c, inputs=tuple(row.expand(n, 6).clone() for _ in c.inputs), target=target, temperature=temperature
    )
    got = value_and_grads(c, package(c.name))
    expected = {"supcon": math.log(n - 1), "prototype": math.log(n - 1), "uniformity": 0.0}.get(c.name, math.log(n))
    # Float32 roundings of logits of size 100.
    assert float(got["loss"]) == pytest.approx(expected, abs=2e-5)
    for key in ("input 0", "input 1"):
        if key in got:
            assert worst(got[key].abs()) <= 16 * 2**-24 * 100**2 / n


@pytest.mark.parametrize("alpha", [1.0, 1.5, 2.0, 3.0])
def test_alignment_gradient_where_the_pairs_meet(backend: Backend, alpha: float) -> None:
    """Finite at a distance of zero, and zero for alpha > 1; the other pairs are not disturbed."""
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).to(backend.device)
    z = x.flip(1)
    z[::2] = 3 * x[::2]
    x, z = x.requires_grad_(), z.requires_grad_()
    samples = nckernels.alignment_loss(x, z, alpha=alpha, reduction="none")
    assert worst(samples[::2].detach()) <= (4 * 2**-23) ** min(alpha / 2, 1.0) * 2
    grads = torch.autograd.grad(samples.sum(), (x, z))
    assert all(bool(g.isfinite().all()) for g in grads)
    if alpha > 1:
        # The distance of unit rows that should be equal is a few roundings r: alpha r^(alpha - 1) / |row|.
        norm = float(min(x.detach()[::2].norm(dim=1).min(), z.detach()[::2].norm(dim=1).min()))
        assert worst(torch.stack([g[::2] for g in grads]).abs()) <= alpha * (4 * 2**-23) ** (alpha - 1) / norm
    x64, z64 = (t.detach()[1::2].double().requires_grad_() for t in (x, z))
    expected = torch.autograd.grad(NAIVE["alignment"](x64, z64, alpha=alpha, reduction="sum"), (x64, z64))
    for got, truth in zip(grads, expected, strict=True):
        torch.testing.assert_close(got[1::2].double(), truth, rtol=0, atol=2e-6 * float(truth.abs().max()))


@pytest.mark.parametrize("alpha", [1.0, 1.5, 2.0, 3.0])
def test_alignment_gradient_of_identical_inputs(backend: Backend, alpha: float) -> None:
    """Bit for bit the same rows: exactly zero distance, finite gradients (zero for alpha > 1)."""
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).to(backend.device).requires_grad_()
    z = x.detach().clone().requires_grad_()
    value = nckernels.alignment_loss(x, z, alpha=alpha)
    assert value.item() == 0.0
    for grad in torch.autograd.grad(value, (x, z)):
        assert bool(grad.isfinite().all())
        assert alpha == 1.0 or not grad.any()


# --------------------------------------------------------------------------------------------------
# autocast and torch.compile


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", SHORT)
def test_autocast(backend: Backend, case: str, dtype: torch.dtype) -> None:
    """Half features from a layer under autocast: a float32 loss and float32 parameter gradients.

    The error against float64 is at most that of the dense form under the same autocast, plus 2 roundings.
    """
    c = build(case, 40, 12).to(torch.float32, backend.device)
    layer = nn.Linear(12, 8)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(8, 12, generator=torch.Generator().manual_seed(1)))
    layer.to(backend.device)
    rest = () if c.temperature is None else (c.temperature,)

    def run(function: Callable[..., Tensor], enabled: bool, c: Case = c) -> tuple[Tensor, Tensor]:
        with torch.autocast(backend.device, dtype, enabled=enabled):
            z = [layer(F.normalize(x, dim=-1)) for x in c.inputs]
            assert not enabled or z[0].dtype == dtype
            value = c.call(function, *z, *rest)
        return value.detach(), *torch.autograd.grad(value, layer.weight)

    got, eager = run(package(c.name), True), run(NAIVE[c.name], True)
    layer.double()
    rest = tuple(t.double() for t in rest)
    truth = run(NAIVE[c.name], False, c.to(torch.float64))
    for what, value, rival, reference in zip(("loss", "weight"), got, eager, truth, strict=True):
        assert value.dtype == torch.float32, what
        scale = reference.abs().max()
        error = worst((value.double() - reference).abs() / scale)
        eager_error = worst((rival.double() - reference).abs() / scale)
        assert error <= eager_error + 2 * torch.finfo(dtype).eps, f"{what}: {error:.3g}, eager {eager_error:.3g}"


@pytest.mark.parametrize("name", ["info_nce", "clip"])
def test_autocast_takes_mixed_dtypes(backend: Backend, name: str) -> None:
    """Half queries against float32 keys, as nonl_loss takes half features and float32 prototypes."""
    c = make_case(name, 20, 6, target=False)
    a, b = (x.to(backend.device, torch.float32) for x in c.inputs)
    with pytest.raises((TypeError, ValueError), match=r"bfloat16.*float32|float32.*bfloat16"):
        package(name)(a.bfloat16(), b)
    leaf = b.requires_grad_()
    with torch.autocast(backend.device, torch.bfloat16):
        value = package(name)(a.bfloat16(), leaf, temperature=0.2)
    assert value.dtype == torch.float32
    (grad,) = torch.autograd.grad(value, leaf)
    assert grad.dtype == torch.float32
    truth = NAIVE[name](a.bfloat16().double(), b.detach().double(), temperature=0.2)
    assert abs(float(value.double() - truth)) <= 8 * 2**-8 * 5  # bfloat16 logits of size 5


@pytest.mark.parametrize("case", SHORT)
def test_autocast_leaves_float64_alone(cpu_backend: Backend, case: str) -> None:
    c = build(case)
    expected = c.call(package(c.name))
    with torch.autocast("cpu", torch.bfloat16):
        got = c.call(package(c.name))
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


COMPILED = ["supcon", "supcon-no-target", "supcon-decoupled-views", "prototype", "info_nce", "clip", "uniformity"]


@pytest.mark.parametrize("case", [*COMPILED, "alignment"])
@one_operator
def test_compiled(backend: Backend, fresh_dynamo: None, case: str) -> None:
    """One graph, forward and backward, equal to eager, at two sizes."""
    options = build(case).options
    name = CASES[case][0]

    def call(inputs: tuple[Tensor, ...], target: Tensor | None, temperature: Tensor | None) -> Tensor:
        more: dict[str, Any] = {} if temperature is None else {"temperature": temperature}
        return package(name)(*inputs, *(() if target is None else (target,)), **more, **options)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for samples in (20, 33):
        c = build(case, samples, 6, seed=samples).to(torch.float32, backend.device)
        results = []
        for function in (call, compiled):
            leaves = tuple(x.clone().requires_grad_() for x in c.inputs)
            tau = None if c.temperature is None else c.temperature.clone().requires_grad_()
            value = function(leaves, c.target, tau)
            grads = torch.autograd.grad(value, [*leaves, *(() if tau is None else (tau,))])
            results.append((value.detach(), *grads))
        for expected, got in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@operators
def test_compiled_with_weights_and_reduction_none(backend: Backend, fresh_dynamo: None) -> None:
    c = build("supcon-views", 12, 6, weight=True).to(torch.float32, backend.device)

    def call(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        return nckernels.supcon_loss(x, target, sample_weight=weight, reduction="none")

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert c.target is not None
    assert c.weight is not None
    got, expected = (f(c.inputs[0], c.target, c.weight) for f in (compiled, call))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


# --------------------------------------------------------------------------------------------------
# modules


MODULES: dict[str, Callable[..., nn.Module]] = {
    name: lambda module=module, **kw: getattr(nckernels, module)(**kw)
    for name, module in {
        "supcon": "SupConLoss",
        "prototype": "PrototypeLoss",
        "info_nce": "InfoNCELoss",
        "clip": "CLIPLoss",
        "uniformity": "UniformityLoss",
        "alignment": "AlignmentLoss",
    }.items()
}


@pytest.mark.parametrize("case", CASES)
def test_modules_equal_the_functions(backend: Backend, case: str) -> None:
    """The same options, the same numbers and gradients, bit for bit."""
    c = build(case, ignore_index=3 if case in LABELLED else -100).to(torch.float32, backend.device)
    if case in REDUCED:
        c = c.with_options(reduction="sum")
    options = {**c.options, **({} if c.temperature is None else {"temperature": float(c.temperature)})}
    module = MODULES[c.name](**options)
    results = []
    for function in (module, lambda *args: package(c.name)(*args, **options)):
        leaves = [x.clone().requires_grad_() for x in c.inputs]
        value = function(*leaves, *(() if c.target is None else (c.target,)))
        results.append((value.detach(), *torch.autograd.grad(value, leaves)))
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("name", MODULES)
def test_module_defaults_are_the_functions(name: str) -> None:
    c = make_case(name, 12, 5, keys=12).to(torch.float32)
    args = (*c.inputs, *(() if c.target is None else (c.target,)))
    assert torch.equal(MODULES[name]()(*args), package(name)(*args))


@pytest.mark.parametrize("name", TEMPERATURE)
def test_module_temperature(name: str) -> None:
    """A Parameter is trained, a tensor is a buffer, a number is neither; all three pickle and give one value."""
    c = make_case(name, 12, 5, keys=12).to(torch.float32)
    args = (*c.inputs, *(() if c.target is None else (c.target,)))
    tau = nn.Parameter(torch.tensor(0.3))
    modules = [MODULES[name](temperature=t) for t in (tau, torch.tensor(0.3), 0.3)]
    assert [p is tau for p in modules[0].parameters()] == [True]
    assert [list(m.parameters()) for m in modules[1:]] == [[], []]
    assert [b.item() for b in modules[1].buffers()] == [pytest.approx(0.3)]
    values = [m(*args) for m in modules]
    for value in values:
        torch.testing.assert_close(value, values[0], rtol=1e-6, atol=0)
    values[0].backward()
    assert tau.grad is not None
    assert bool(tau.grad)
    for module in modules:
        assert torch.equal(pickle.loads(pickle.dumps(module))(*args), module(*args))
    state = {k: torch.full_like(v, 0.7) for k, v in modules[1].state_dict().items()}
    assert len(state) == 1
    modules[1].load_state_dict(state)
    torch.testing.assert_close(modules[1](*args), package(name)(*args, temperature=0.7), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", MODULES)
def test_modules_say_their_options(name: str) -> None:
    """repr() shows what differs from a bare call."""
    option = {"uniformity": ("t", 5.5), "alignment": ("alpha", 3.5)}.get(name, ("temperature", 0.25))
    assert f"{option[0]}={option[1]}" in repr(MODULES[name](**dict([option])))


# --------------------------------------------------------------------------------------------------
# bad input


def randn(*shape: int, **kw: Any) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(**kw)


def shape_of(*sizes: int) -> str:
    inner = ", ".join(map(str, sizes)) + (",?" if len(sizes) == 1 else "")
    return rf"[(\[]{inner}[)\]]"


N, D = 6, 4
TARGET = torch.tensor([0, 1, 2, 1, 0, 0])
VALID: dict[str, dict[str, Any]] = {
    "supcon": {"input": randn(N, D), "target": TARGET},
    "prototype": {"input": randn(N, D), "target": TARGET},
    "info_nce": {"query": randn(N, D), "key": randn(3, D), "target": TARGET},
    "clip": {"a": randn(N, D), "b": randn(N, D) + 1},
    "uniformity": {"input": randn(N, D)},
    "alignment": {"input": randn(N, D), "other": randn(N, D) + 1},
}
FIRST = {name: next(iter(arguments)) for name, arguments in VALID.items()}
NAN, INF = float("nan"), float("inf")


@dataclasses.dataclass(frozen=True)
class Refused:
    """Losses, arguments to replace in a valid call, and patterns: the argument, what came, what was expected."""

    id: str
    losses: tuple[str, ...]
    arguments: dict[str, Any]
    name: str
    came: str
    expected: str


ALL = tuple(VALID)
TEMPERATURES = tuple(TEMPERATURE)
LABELS_OF = ("supcon", "prototype", "info_nce")
ROWS = ("supcon", "prototype")
REDUCE = tuple(n for n in ALL if n != "uniformity")
SHAPE_1D = r"1-?d|" + shape_of(N) + r"|\b6\b"

REFUSED = [
    Refused("1d", ALL, {"FIRST": randn(N)}, "FIRST", shape_of(N), r"\bd\b|2"),
    Refused("4d", ROWS, {"input": randn(2, 3, 2, D)}, "input", shape_of(2, 3, 2, D), r"\bd\b|2|3"),
    Refused("3d", ("info_nce", "clip"), {"FIRST": randn(2, 3, D)}, "FIRST", shape_of(2, 3, D), r"\bd\b|2"),
    Refused("no-columns", ("supcon", "prototype", "uniformity"), {"FIRST": randn(N, 0)}, "FIRST", shape_of(N, 0), "1"),
    Refused("integer", ALL, {"FIRST": torch.ones(N, D, dtype=torch.int64)}, "FIRST", "int64", "float"),
    Refused("bool", ALL, {"FIRST": torch.ones(N, D, dtype=torch.bool)}, "FIRST", "bool", "float"),
    Refused("complex", ALL, {"FIRST": randn(N, D, dtype=torch.complex64)}, "FIRST", "complex64", "float"),
    Refused("list", ALL, {"FIRST": [[1.0] * D] * N}, "FIRST", "list", "[Tt]ensor"),
    Refused("numpy", ALL, {"FIRST": randn(N, D).numpy()}, "FIRST", "ndarray", "[Tt]ensor"),
    Refused("none", ALL, {"FIRST": None}, "FIRST", "None", "[Tt]ensor"),
    # operands that do not go together
    Refused("key-width", ("info_nce",), {"key": randn(3, D + 1)}, "key", shape_of(3, D + 1), shape_of(N, D) + "|4"),
    Refused("key-1d", ("info_nce",), {"key": randn(D)}, "key", shape_of(D), r"\bd\b|2"),
    Refused("key-list", ("info_nce",), {"key": [[1.0] * D]}, "key", "list", "[Tt]ensor"),
    Refused("key-none", ("info_nce",), {"key": randn(0, D)}, "key", shape_of(0, D), r"1|empty|least"),
    Refused("key-dtype", ("info_nce",), {"key": randn(3, D, dtype=torch.float64)}, "key", "float64", "float32"),
    Refused("key-meta", ("info_nce",), {"key": torch.empty(3, D, device="meta")}, "key", "meta", "cpu"),
    Refused("b-width", ("clip",), {"b": randn(N, D + 1)}, r"\bb", shape_of(N, D + 1), shape_of(N, D)),
    Refused("b-rows", ("clip",), {"b": randn(N + 1, D)}, r"\bb", shape_of(N + 1, D), shape_of(N, D)),
    Refused("b-dtype", ("clip",), {"b": randn(N, D, dtype=torch.float64)}, r"\bb", "float64", "float32"),
    Refused("b-list", ("clip",), {"b": [[1.0] * D] * N}, r"\bb", "list", "[Tt]ensor"),
    Refused("other-rows", ("alignment",), {"other": randn(5, D)}, "other", shape_of(5, D), shape_of(N, D)),
    Refused("other-width", ("alignment",), {"other": randn(N, 3)}, "other", shape_of(N, 3), shape_of(N, D)),
    Refused("other-list", ("alignment",), {"other": [[1.0] * D] * N}, "other", "list", "[Tt]ensor"),
    # targets
    Refused("target-list", LABELS_OF, {"target": TARGET.tolist()}, "target", "list", "[Tt]ensor"),
    Refused("target-2d", LABELS_OF, {"target": TARGET[:, None]}, "target", shape_of(N, 1), SHAPE_1D),
    Refused("target-0d", LABELS_OF, {"target": torch.tensor(1)}, "target", r"\(\)|\[\]", SHAPE_1D),
    Refused("target-short", LABELS_OF, {"target": TARGET[:4]}, "target", shape_of(4) + r"|\b4\b", r"\b6\b"),
    Refused("target-float", LABELS_OF, {"target": TARGET.float()}, "target", "float32", "integer|int64"),
    Refused("target-bool", LABELS_OF, {"target": TARGET.bool()}, "target", "bool", "integer|int64"),
    Refused("target-meta", LABELS_OF, {"target": TARGET.to("meta")}, "target", "meta", "cpu"),
    Refused("key-too-large", ("info_nce",), {"target": TARGET + 1}, "target", r"\b3\b", r"\[0, 3\)|\[0, 2\]|< 3"),
    Refused("key-negative", ("info_nce",), {"target": TARGET - 1}, "target", r"-1\b", r"\[0, 3\)|\[0, 2\]|>= 0"),
    Refused("prototype-none", ("prototype",), {"target": None}, "target", "None", "[Tt]ensor"),
    Refused("views-target", ROWS, {"input": randn(3, 2, D)}, "target", shape_of(N), r"\b3\b"),
    Refused("flat-none", ("supcon",), {"target": None}, "target", shape_of(N, D), r"B, V, d|views"),
    Refused(
        "one-view-none",
        ("supcon",),
        {"input": randn(N, 1, D), "target": None},
        "target|input",
        shape_of(N, 1, D),
        r"2|two",
    ),
    Refused("unequal-none", ("info_nce",), {"target": None}, "target", shape_of(3, D), shape_of(N, D)),
    Refused("ignore-float", LABELS_OF, {"ignore_index": 1.5}, "ignore_index", r"float|1\.5", "int"),
    Refused("ignore-none", LABELS_OF, {"ignore_index": None}, "ignore_index", "None", "int"),
    # temperature, weights, reduction
    Refused("tau-bool", TEMPERATURES, {"temperature": True}, "temperature", "bool|True", "number|float|Tensor"),
    Refused("tau-str", TEMPERATURES, {"temperature": "hot"}, "temperature", "str|hot", "number|float|Tensor"),
    Refused("tau-none", TEMPERATURES, {"temperature": None}, "temperature", "None", "number|float|Tensor"),
    Refused("tau-zero", TEMPERATURES, {"temperature": 0.0}, "temperature", r"\b0(\.0)?\b", "positive|> ?0|greater"),
    Refused("tau-negative", TEMPERATURES, {"temperature": -1.5}, "temperature", r"-1\.5", "positive|> ?0"),
    Refused("tau-nan", TEMPERATURES, {"temperature": NAN}, "temperature", "nan", "positive|> ?0|finite"),
    Refused("tau-inf", TEMPERATURES, {"temperature": INF}, "temperature", "inf", "finite"),
    Refused("tau-1d", TEMPERATURES, {"temperature": torch.ones(1)}, "temperature", shape_of(1), r"0-?d|scalar|\(\)"),
    Refused("tau-integer", TEMPERATURES, {"temperature": torch.tensor(3)}, "temperature", "int64", "float"),
    Refused("weight-short", TEMPERATURES, {"sample_weight": torch.ones(5)}, "sample_weight", shape_of(5), r"\b6\b"),
    Refused("weight-2d", TEMPERATURES, {"sample_weight": torch.ones(N, 1)}, "sample_weight", shape_of(N, 1), SHAPE_1D),
    Refused("weight-list", TEMPERATURES, {"sample_weight": [1.0] * N}, "sample_weight", "list", "[Tt]ensor"),
    Refused(
        "weight-integer",
        TEMPERATURES,
        {"sample_weight": torch.ones(N, dtype=torch.int64)},
        "sample_weight",
        "int64",
        "float",
    ),
    Refused(
        "weight-negative",
        TEMPERATURES,
        {"sample_weight": torch.linspace(-0.5, 1, N)},
        "sample_weight",
        r"-0\.5",
        r"non-?negative|>= ?0|negative",
    ),
    Refused(
        "weight-views",
        ROWS,
        {"input": randn(N, 2, D), "sample_weight": torch.ones(N, 2)},
        "sample_weight",
        shape_of(N, 2),
        SHAPE_1D,
    ),
    Refused("reduction", REDUCE, {"reduction": "avg"}, "reduction", "avg", "none.*mean.*sum"),
    Refused("reduction-none", REDUCE, {"reduction": None}, "reduction", "None", "none.*mean.*sum"),
    # uniformity and alignment
    Refused("one-row", ("uniformity",), {"input": randn(1, D)}, "input", shape_of(1, D), r"2|two"),
    Refused("no-row", ("uniformity",), {"input": randn(0, D)}, "input", shape_of(0, D), r"2|two"),
    *(
        Refused(f"{name}-{value}", (loss,), {name: value}, rf"\b{name}", came, expected)
        for loss, name in (("uniformity", "t"), ("alignment", "alpha"))
        for value, came, expected in (
            (0.0, r"\b0(\.0)?\b", "positive|> ?0|greater"),
            (-2.5, r"-2\.5", "positive|> ?0|greater"),
            (NAN, "nan", "positive|> ?0|finite"),
            ("two", "str|two", "number|float"),
            (None, "None", "number|float"),
        )
    ),
]


def call_with(name: str, arguments: dict[str, Any]) -> Tensor:
    given = {**VALID[name], **{FIRST[name] if k == "FIRST" else k: v for k, v in arguments.items()}}
    return package(name)(**given)


@pytest.mark.parametrize("name", ALL)
def test_the_unspoilt_calls_are_accepted(name: str) -> None:
    """Otherwise every test below could pass for a reason of its own; arguments have the contract's names."""
    assert call_with(name, {}).isfinite()
    if name in TEMPERATURES:
        assert call_with(name, {"temperature": 1, "sample_weight": torch.ones(N)}).isfinite()


@pytest.mark.parametrize(("name", "case"), [pytest.param(n, c, id=f"{n}-{c.id}") for c in REFUSED for n in c.losses])
def test_refuses(name: str, case: Refused) -> None:
    """A ValueError or TypeError that names the argument, what came and what was expected."""
    with pytest.raises((ValueError, TypeError)) as info:
        call_with(name, case.arguments)
    message, argument = str(info.value), FIRST[name] if case.name == "FIRST" else case.name
    for what, pattern in (
        ("argument", rf"(?:{argument})\b"),
        ("what came", case.came),
        ("what was expected", case.expected),
    ):
        assert re.search(pattern, message), f"{what} ({pattern}) is missing from {message!r}"


@pytest.mark.parametrize("backend_name", ["reference", "chunked"])
def test_a_key_out_of_range_is_refused_by_every_backend(backend_name: str) -> None:
    with nckernels.use_backend(backend_name):
        with pytest.raises(ValueError, match=r"target.*\b3\b"):
            call_with("info_nce", {"target": TARGET + 1})
        assert call_with("info_nce", {"target": torch.where(TARGET == 0, 77, TARGET), "ignore_index": 77}).isfinite()


@pytest.mark.parametrize(
    ("module", "arguments", "name", "came"),
    [
        *((m, {"temperature": 0.0}, "temperature", r"\b0(\.0)?\b") for m in TEMPERATURE),
        *((m, {"reduction": "avg"}, "reduction", "avg") for m in REDUCE),
        ("uniformity", {"t": -1.5}, r"\bt\b", r"-1\.5"),
        ("alignment", {"alpha": 0.0}, "alpha", r"\b0(\.0)?\b"),
    ],
    ids=str,
)
def test_modules_refuse_bad_construction(module: str, arguments: dict[str, Any], name: str, came: str) -> None:
    """At construction, where the mistake is, not at the first batch."""
    with pytest.raises((ValueError, TypeError)) as info:
        MODULES[module](**arguments)
    for pattern in (name, came):
        assert re.search(pattern, str(info.value)), str(info.value)
