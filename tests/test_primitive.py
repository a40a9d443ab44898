"""The primitive against the dense float64 oracle; tolerances are eager PyTorch's errors in the same dtype."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import Backend
from oracle import (
    DIRECTIONS,
    EPS,
    EXCLUDES,
    INPUTS,
    Problem,
    check,
    check_spoilt,
    cosine,
    dense,
    make_problem,
    package,
    run,
    simplex,
)
from parts import check_in_parts
from torch import Tensor

import nckernels

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# (M, K, d); "self" and "same_label" take K = M. The last one needs many ragged tiles in a 64 KiB workspace.
SHAPES = {"small": (7, 5, 3), "tiles": (161, 123, 24)}
EDGES = {
    "one sample": (1, 4, 8),
    "one class": (6, 1, 5),
    "one dimension": (5, 4, 1),
    "one everything": (1, 1, 1),
    "empty": (0, 3, 4),
    "tall": (1500, 3, 2),
    "wide": (3, 1500, 2),
}
BETAS = (0.5, 10.0, 60.0, 61.0, 100.0, 1000.0)


def id_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=id_of)
full_dtypes = pytest.mark.parametrize("dtype", DTYPES[:2], ids=id_of)
directions = pytest.mark.parametrize("direction", DIRECTIONS)
excludes = pytest.mark.parametrize("exclude", EXCLUDES)


def collapsed(classes: int, per_class: int, beta: float, *, gap: float = 0.0, **options: object) -> Problem:
    """Planted collapse: every feature is its prototype, the prototypes a simplex; gap is a relative noise."""
    p = make_problem(classes * per_class, classes, classes, beta=beta, ignored=0.0, **options)  # type: ignore[arg-type]
    prototypes = simplex(classes, classes)
    target = p.target
    if p.exclude == "none" or p.exclude == "target":
        target = torch.arange(classes).repeat(per_class)
        features = prototypes[target]
    else:
        features = prototypes.repeat(per_class, 1)
        prototypes = features.clone()
        target = torch.arange(classes).repeat(per_class)
    noise = torch.randn(features.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return dataclasses.replace(p, features=features + gap * noise, prototypes=prototypes, target=target)


# --------------------------------------------------------------------------------------------------
# the oracle itself


@pytest.mark.parametrize("present_only", [False, True])
@excludes
def test_oracle_equals_python_loops(exclude: str, present_only: bool) -> None:
    """The dense oracle is the contract's sets written as loops over Python floats."""
    if present_only and exclude not in ("none", "target"):
        pytest.skip("present_only is defined for exclude none and target")
    direction = "class" if present_only else "both"
    p = make_problem(9, 6, 4, direction=direction, exclude=exclude, bias=True, present_only=present_only, ignored=0.3)
    outputs, _ = run(dense, p, ())
    s = cosine(p.features, p.prototypes).tolist()
    y, beta, ignore = p.target.tolist(), float(p.inv_temperature), p.ignore_index
    assert p.sample_bias is not None
    assert p.class_bias is not None
    samples, classes = range(len(s)), range(len(s[0]))

    def takes_part(j: int, c: int) -> bool:
        if y[j] == ignore or (exclude in ("self", "same_label") and y[c] == ignore):
            return False
        return {
            "none": True,
            "target": y[j] != c,
            "self": j != c,
            "same_label": exclude != "same_label" or y[j] != y[c],
        }[exclude]

    def lse(terms: list[float]) -> float:
        return math.log(sum(map(math.exp, terms))) if terms else -math.inf

    for c in classes:
        terms = [beta * s[j][c] + float(p.sample_bias[j]) for j in samples if takes_part(j, c)]
        expected = -math.inf if present_only and c not in y else lse(terms)
        assert outputs["class"][c].item() == pytest.approx(expected, rel=1e-12)
    for i in samples:
        positive = i if exclude == "same_label" else y[i]
        expected = 0.0 if y[i] == ignore else beta * s[i][positive]
        assert outputs["pos"][i].item() == pytest.approx(expected, rel=1e-12, abs=1e-12)
        if direction == "both":
            terms = [beta * s[i][c] + float(p.class_bias[c]) for c in classes if takes_part(i, c)]
            assert outputs["instance"][i].item() == pytest.approx(lse(terms), rel=1e-12)


# --------------------------------------------------------------------------------------------------
# values and gradients


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@excludes
@directions
@dtypes
def test_equals_the_oracle(
    backend: Backend,
    small_workspace: None,
    dtype: torch.dtype,
    direction: str,
    exclude: str,
    bias: bool,
    shape: str,
) -> None:
    backend.require(dtype)
    check(make_problem(*SHAPES[shape], direction=direction, exclude=exclude, bias=bias), dtype, backend.device)


@pytest.mark.covers(
    4
)  # the gradient of a bias in one of a backend's two ways to sum has a path of its own for many tiles
@pytest.mark.parametrize("samples", [1, 7, 161])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("beta", [10.0, 61.0])
@pytest.mark.parametrize("exclude", ["self", "same_label"])
@directions
@dtypes
def test_features_against_themselves(
    backend: Backend,
    small_workspace: None,
    dtype: torch.dtype,
    direction: str,
    exclude: str,
    beta: float,
    bias: bool,
    samples: int,
) -> None:
    """One tensor as both operands: its gradient is the sum of those as rows and as columns."""
    backend.require(dtype)
    problem = make_problem(
        samples, samples, 24, direction=direction, exclude=exclude, bias=bias, beta=beta, itself=True
    )
    check(problem, dtype, backend.device)


@directions
@dtypes
def test_samples_that_are_positives_of_each_other(
    backend: Backend, small_workspace: None, dtype: torch.dtype, direction: str
) -> None:
    """Features against themselves: both upstream gradients meet in one entry of the symmetric matrix."""
    backend.require(dtype)
    problem = make_problem(90, 90, 24, direction=direction, exclude="self", itself=True, ignored=0.0)
    mutual = dataclasses.replace(problem, target=torch.arange(90) ^ 1)
    for wrt in (INPUTS, ("inv_temperature",)):
        check(mutual, dtype, backend.device, wrt=wrt)


@pytest.mark.parametrize("wrt", INPUTS[:1] + INPUTS[2:])
def test_single_gradients_of_features_against_themselves(backend: Backend, small_workspace: None, wrt: str) -> None:
    for direction in ("class", "instance"):
        problem = make_problem(90, 90, 24, direction=direction, exclude="self", bias=True, itself=True)
        if wrt in problem.inputs():
            check(problem, torch.float32, backend.device, wrt=(wrt,))


@pytest.mark.parametrize(
    ("exclude", "shape"),
    [
        (exclude, shape)
        for exclude, shape in itertools.product(EXCLUDES, EDGES)
        # K = M in the last two: 1500 is the tiles test again, 0 is an error.
        if shape not in ("tall", "empty") or exclude in ("none", "target")
    ],
)
@directions
@full_dtypes
def test_edge_shapes(backend: Backend, dtype: torch.dtype, direction: str, exclude: str, shape: str) -> None:
    backend.require(dtype)
    check(make_problem(*EDGES[shape], direction=direction, exclude=exclude, bias=True), dtype, backend.device)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("exclude", ["none", "target"])
@pytest.mark.parametrize("shape", [(37, 900, 16), (161, 123, 24), (1, 5, 3), (4, 1, 3), (0, 5, 3)], ids=str)
@dtypes
def test_present_only(
    backend: Backend,
    small_workspace: None,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    exclude: str,
    bias: bool,
) -> None:
    backend.require(dtype)
    check(make_problem(*shape, exclude=exclude, bias=bias, present_only=True), dtype, backend.device)


@pytest.mark.parametrize("beta", BETAS)
@excludes
@directions
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=id_of)
def test_every_temperature(
    backend: Backend, small_workspace: None, dtype: torch.dtype, direction: str, exclude: str, beta: float
) -> None:
    backend.require(dtype)
    check(
        make_problem(150, 90, 17, direction=direction, exclude=exclude, bias=True, beta=beta),
        dtype,
        backend.device,
    )


@pytest.mark.parametrize("gap", [0.0, 1e-3], ids=["exact", "near"])
@pytest.mark.parametrize("beta", [100.0, 1000.0])
@excludes
@directions
@full_dtypes
def test_collapsed_features_at_small_temperature(
    backend: Backend, dtype: torch.dtype, direction: str, exclude: str, beta: float, gap: float
) -> None:
    """exp(beta S) ranges from e^-1000 to e^1000 here, without overflow or underflow of the log-sum-exp."""
    backend.require(dtype)
    check(collapsed(5, 8, beta, gap=gap, direction=direction, exclude=exclude), dtype, backend.device)


@pytest.mark.parametrize("beta", [100.0, 1000.0])
@directions
def test_half_precision_logits_are_not_rounded_to_half(backend: Backend, direction: str, beta: float) -> None:
    """At beta = 1000 one bfloat16 rounding of S moves the logits by 4: "exact" needs float32 similarities."""
    p = make_problem(150, 90, 17, direction=direction, exclude="target", beta=beta)
    for dtype in (torch.bfloat16, torch.float16):
        half = p.to(dtype, backend.device)
        truth, _ = run(dense, half.to(torch.float64), ())
        got, _ = run(package, half, ())
        for name in truth:
            # 8 float32 roundings of a logit of size beta.
            torch.testing.assert_close(got[name].cpu().double(), truth[name], rtol=0, atol=8 * 2.0**-23 * beta)


@pytest.mark.parametrize("ignore_index", [0, 2, -1])
@excludes
@directions
def test_ignore_index_anywhere(backend: Backend, direction: str, exclude: str, ignore_index: int) -> None:
    p = make_problem(40, 7, 5, direction=direction, exclude=exclude, bias=True, ignore_index=ignore_index)
    assert (p.target == ignore_index).any()
    check(p, torch.float32, backend.device)


@excludes
@directions
def test_all_ignored(backend: Backend, direction: str, exclude: str) -> None:
    check(
        make_problem(6, 4, 3, direction=direction, exclude=exclude, bias=True, ignored=1.1),
        torch.float32,
        backend.device,
    )


@pytest.mark.parametrize("fill", [math.nan, math.inf])
@pytest.mark.parametrize("exclude", ["none", "target"])
def test_ignored_rows_may_hold_anything(backend: Backend, exclude: str, fill: float) -> None:
    """A padded row of NaN must not reach the others, not even as 0 * NaN."""
    p = make_problem(30, 6, 5, direction="both", exclude=exclude, bias=True).to(torch.float32, backend.device)
    keep = p.target != p.ignore_index
    clean = dataclasses.replace(p, features=torch.where(keep[:, None], p.features, 1.0))
    filled = dataclasses.replace(p, features=torch.where(keep[:, None], p.features, fill))
    assert not keep.all()
    for expected, got in zip(run(package, clean), run(package, filled), strict=True):
        for name, value in expected.items():
            assert value is not None
            torch.testing.assert_close(got[name], value, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("itself", [False, True], ids=["apart", "itself"])
@pytest.mark.parametrize("exclude", ["self", "same_label"])
def test_ignored_samples_may_hold_anything(backend: Backend, small_workspace: None, exclude: str, itself: bool) -> None:
    """The same where samples are columns too; only a sample that is another's positive is read."""
    p = make_problem(90, 90, 24, exclude=exclude, ignored=0.3, itself=itself).to(torch.float32, backend.device)
    hidden = p.target == p.ignore_index
    if exclude == "self":
        hidden[p.target[~hidden]] = False
    assert hidden.any()
    if backend.device == "cuda":
        check_spoilt(p, None)
        return
    spoilt = {name: getattr(p, name).masked_fill(hidden[:, None], math.nan) for name in ("features", "prototypes")}
    for expected, got in zip(run(package, p), run(package, dataclasses.replace(p, **spoilt)), strict=True):
        for name, value in expected.items():
            assert value is not None
            assert got[name] is not None
            assert torch.equal(got[name], value), name


@directions
def test_minus_infinity_bias_excludes_the_entry(backend: Backend, direction: str) -> None:
    """The bias of the prototype loss is log n_c, with n_c = 0 for absent classes."""
    p = make_problem(20, 8, 5, direction=direction, bias=True)
    assert p.sample_bias is not None
    assert p.class_bias is not None
    p.sample_bias[::3] = -math.inf
    p.class_bias[1::2] = -math.inf
    check(p, torch.float32, backend.device)


def test_temperature_as_a_number(backend: Backend) -> None:
    p = make_problem(12, 5, 4, direction="both", exclude="target").to(torch.float32, backend.device)
    tensor, _ = run(package, p, ())
    for number in (10.0, 10):
        (per_class, per_sample), pos = nckernels.cosine_lse(
            p.features, p.prototypes, p.target, number, direction="both", exclude="target"
        )
        for name, value in {"class": per_class, "instance": per_sample, "pos": pos}.items():
            # The same computation: at most a rounding of beta apart.
            torch.testing.assert_close(value, tensor[name], rtol=2**-22, atol=2**-20)


@pytest.mark.parametrize("given", [(True, False), (False, True)], ids=["sample", "class"])
def test_both_directions_with_one_bias(backend: Backend, given: tuple[bool, bool]) -> None:
    p = make_problem(25, 9, 5, direction="both", bias=True)
    p = dataclasses.replace(
        p, sample_bias=p.sample_bias if given[0] else None, class_bias=p.class_bias if given[1] else None
    )
    check(p, torch.float32, backend.device)


@excludes
def test_both_equals_the_two_directions(backend: Backend, small_workspace: None, exclude: str) -> None:
    both = make_problem(120, 75, 9, direction="both", exclude=exclude, bias=True).to(torch.float32, backend.device)
    outputs, _ = run(package, both, ())
    for direction in ("class", "instance"):
        one, _ = run(package, dataclasses.replace(both, direction=direction), ())
        for name, value in one.items():
            # Tiles may be cut differently: a few roundings of logits of size 10.
            torch.testing.assert_close(outputs[name], value, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=id_of)
def test_integer_targets_of_every_width(backend: Backend, dtype: torch.dtype) -> None:
    """156 is what -100 wraps to in uint8: it must stay a class."""
    classes = 120 if dtype == torch.int8 else 200
    p = make_problem(50, classes, 6, exclude="target", direction="both", ignored=0.0)
    p.target[0] = classes - 44
    narrow = dataclasses.replace(p, target=p.target.to(dtype)).to(torch.float32, backend.device)
    wide = p.to(torch.float32, backend.device)
    for expected, got in zip(run(package, wide), run(package, narrow), strict=True):
        for name, value in expected.items():
            assert value is not None
            assert torch.equal(got[name], value), name


# --------------------------------------------------------------------------------------------------
# wanted gradients


@pytest.mark.parametrize("shape", SHAPES)
@directions
@pytest.mark.parametrize("exclude", ["none", "target", "same_label"])
def test_every_requires_grad_combination(
    backend: Backend, small_workspace: None, exclude: str, direction: str, shape: str
) -> None:
    """Each gradient is right for every combination of wanted gradients."""
    p = make_problem(*SHAPES[shape], direction=direction, exclude=exclude, bias=True)
    names = list(p.inputs())
    for count in range(1, len(names)):
        for wrt in itertools.combinations(names, count):
            check(p, torch.float32, backend.device, wrt)


@directions
def test_no_graph_when_nothing_requires_grad(backend: Backend, direction: str) -> None:
    p = make_problem(6, 4, 3, direction=direction, bias=True).to(torch.float32, backend.device)
    for out in package(p, p.inputs()).values():
        assert not out.requires_grad
        assert out.grad_fn is None
    leaves = {name: t.requires_grad_() for name, t in p.inputs().items()}
    with torch.no_grad():
        for out in package(p, leaves).values():
            assert not out.requires_grad
            assert out.grad_fn is None


@pytest.mark.parametrize("used", ["class", "instance", "pos"])
def test_gradient_through_one_output_only(backend: Backend, small_workspace: None, used: str) -> None:
    """The gradients of unused outputs are undefined, not zeros."""
    p = make_problem(150, 90, 7, direction="both", exclude="target", bias=True)
    only = dataclasses.replace(p, upstream={n: g * (n == used) for n, g in p.upstream.items()}).to(
        torch.float32, backend.device
    )
    leaves = {name: t.clone().requires_grad_() for name, t in only.inputs().items()}
    out = package(only, leaves)[used]
    got = torch.autograd.grad(out, list(leaves.values()), only.upstream[used], allow_unused=True)
    _, expected = run(dense, only.to(torch.float64))
    for name, grad in zip(leaves, got, strict=True):
        truth = expected[name]
        assert truth is not None
        value = torch.zeros_like(truth) if grad is None else grad.cpu().double()
        # 1e-5: float32 weights of logits of size 10, relative to the largest entry.
        torch.testing.assert_close(value, truth, rtol=1e-5, atol=1e-5 * float(truth.abs().max()))


def test_expanded_and_strided_upstream(backend: Backend) -> None:
    """sum().backward() passes a gradient of stride 0, a slice of a larger tensor one of stride 2."""
    p = make_problem(40, 11, 5, direction="both", exclude="target").to(torch.float32, backend.device)
    wrt = ("features", "prototypes")

    def grads(stride: bool) -> tuple[Tensor, ...]:
        leaves = {name: t.clone().requires_grad_(name in wrt) for name, t in p.inputs().items()}
        outputs = package(p, leaves)
        upstream = []
        for out in outputs.values():
            ones = torch.ones_like(out)
            upstream.append(torch.ones(2 * len(out), device=out.device)[::2] if stride else ones[:1].expand_as(out))
        return torch.autograd.grad(list(outputs.values()), [leaves[n] for n in wrt], upstream)

    plain = dataclasses.replace(p, upstream={n: torch.ones_like(g) for n, g in p.upstream.items()})
    _, expected = run(package, plain, wrt)
    for stride in (True, False):
        for name, grad in zip(wrt, grads(stride), strict=True):
            assert torch.equal(grad, expected[name]), name  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------
# layouts


def layouts(x: Tensor) -> dict[str, tuple[Tensor, str]]:
    """Leaves that hold x under a view: (leaf, how to view it)."""
    rows, dim = x.shape
    wide = torch.zeros(2 * rows, 2 * dim, dtype=x.dtype, device=x.device)
    wide[::2, ::2] = x
    return {
        "transposed": (x.T.contiguous(), "t"),
        "strided": (wide, "s"),
        "offset": (F.pad(x, (1, 0, 1, 0)), "o"),
    }


def view(leaf: Tensor, how: str) -> Tensor:
    return {"t": lambda: leaf.T, "s": lambda: leaf[::2, ::2], "o": lambda: leaf[1:, 1:]}[how]()


@pytest.mark.parametrize("layout", ["transposed", "strided", "offset"])
@directions
@dtypes
def test_non_contiguous_inputs(
    backend: Backend, small_workspace: None, dtype: torch.dtype, direction: str, layout: str
) -> None:
    backend.require(dtype)
    p = make_problem(131, 77, 24, direction=direction, exclude="target", bias=True).to(dtype, backend.device)
    _, expected = run(package, p)
    leaves = {name: t.clone() for name, t in p.inputs().items()}
    for name in ("features", "prototypes"):
        leaves[name] = layouts(leaves[name])[layout][0]
    for name in ("sample_bias", "class_bias"):
        if name in leaves:
            leaves[name] = torch.stack([leaves[name], leaves[name]], 1)
    for leaf in leaves.values():
        leaf.requires_grad_()
    how = layouts(p.features)[layout][1]
    seen = {n: view(t, how) if n in ("features", "prototypes") else t for n, t in leaves.items()}
    seen = {n: t[:, 0] if "bias" in n else t for n, t in seen.items()}
    target = torch.stack([p.target, p.target], 1)[:, 1]
    assert not (seen["features"].is_contiguous())
    assert not (target.is_contiguous())
    outputs = package(dataclasses.replace(p, target=target), seen)
    grads = torch.autograd.grad(list(outputs.values()), list(seen.values()), [p.upstream[n] for n in outputs])
    unit = torch.finfo(dtype).eps
    for name, grad in zip(seen, grads, strict=True):
        wanted = expected[name]
        assert wanted is not None
        # Same numbers in another memory order: a product may sum in another order, so a few roundings.
        scale = wanted.abs().amax() if wanted.dim() < 2 else wanted.abs().amax(1, keepdim=True)
        assert bool(((grad - wanted).abs() <= 4 * unit * 11 * scale + 1e-30).all()), name


def test_expanded_inputs(backend: Backend) -> None:
    """Stride 0: one feature for the whole batch, one prototype for every class."""
    p = make_problem(24, 9, 5, direction="both", exclude="target").to(torch.float32, backend.device)
    p = dataclasses.replace(p, features=p.features[:1].expand(24, 5), prototypes=p.prototypes[:1].expand(9, 5))
    leaves = {"features": p.features[:1].clone(), "prototypes": p.prototypes[:1].clone()}
    for leaf in leaves.values():
        leaf.requires_grad_()
    spread = {"features": leaves["features"].expand(24, 5), "prototypes": leaves["prototypes"].expand(9, 5)}
    outputs = package(p, {**p.inputs(), **spread})
    grads = torch.autograd.grad(list(outputs.values()), list(leaves.values()), [p.upstream[n] for n in outputs])
    truth, expected = run(dense, p.to(torch.float64))
    for name, value in truth.items():
        torch.testing.assert_close(outputs[name].detach().cpu().double(), value, rtol=1e-6, atol=1e-5)
    for name, grad in zip(leaves, grads, strict=True):
        full = expected[name]
        assert full is not None
        # The rows cancel in the sum: 1e-5 of the sum of their sizes.
        atol = 1e-5 * float(full.abs().sum())
        torch.testing.assert_close(grad.cpu().double(), full.sum(0, keepdim=True), rtol=0, atol=atol)


# --------------------------------------------------------------------------------------------------
# norms


@pytest.mark.parametrize("exclude", ["none", "target"])
@directions
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=id_of)
def test_huge_tiny_and_zero_rows(backend: Backend, dtype: torch.dtype, direction: str, exclude: str) -> None:
    """Norms of 1e15, 1e-6, below the clamp of F.normalize, and zero, as in F.normalize."""
    backend.require(dtype)
    p = make_problem(40, 22, 6, direction=direction, exclude=exclude, bias=True)
    unit = dataclasses.replace(p, features=F.normalize(p.features), prototypes=F.normalize(p.prototypes))
    factors = torch.tensor([1.0, 1e15, 1e-6, 1e-13, 0.0], dtype=torch.float64)
    scaled = dataclasses.replace(
        unit,
        features=unit.features * factors.repeat(8)[:, None],
        prototypes=unit.prototypes * factors.repeat(5)[:22, None],
    )
    check(scaled, dtype, backend.device)


@directions
def test_float16_norms(backend: Backend, direction: str) -> None:
    """Raw dot products of 2.5e5 overflow float16; norms below 2**-14 are clamped; zero rows stay finite."""
    p = make_problem(40, 22, 6, direction=direction, exclude="target", beta=1.0)
    factors = torch.tensor([500.0, 1.0, 0.02], dtype=torch.float64)
    scaled = dataclasses.replace(
        p,
        features=F.normalize(p.features) * factors.repeat(14)[:40, None],
        prototypes=F.normalize(p.prototypes) * factors.repeat(8)[:22, None],
    )
    check(scaled, torch.float16, backend.device)
    scaled.features[::5] = 0
    scaled.features[1::5] *= 2.0**-16 / 500
    small = {n: g * 0.05 for n, g in p.upstream.items()}  # the clamp multiplies gradients by 2**14
    check(dataclasses.replace(scaled, upstream=small), torch.float16, backend.device)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@full_dtypes
def test_nan_features_give_nan(backend: Backend, dtype: torch.dtype, bad: float) -> None:
    backend.require(dtype)
    p = make_problem(20, 6, 5, direction="both", ignored=0.0).to(dtype, backend.device)
    p.features[3, 2] = bad
    outputs, grads = run(package, p)
    assert outputs["class"].isnan().all()
    for name in ("instance", "pos"):
        assert outputs[name].isnan().nonzero().flatten().tolist() == [3], name
    for name in ("features", "prototypes", "inv_temperature"):
        grad = grads[name]
        assert grad is not None
        assert grad.isnan().any(), name


def test_nan_prototype_reaches_its_own_class_only(backend: Backend) -> None:
    p = make_problem(20, 6, 5, direction="both", ignored=0.0).to(torch.float32, backend.device)
    p.prototypes[4, 0] = math.nan
    outputs, _ = run(package, p, ())
    assert outputs["class"].isnan().nonzero().flatten().tolist() == [4]
    assert outputs["instance"].isnan().all()
    assert torch.equal(outputs["pos"].isnan(), p.target == 4)


# --------------------------------------------------------------------------------------------------
# tiles


@pytest.mark.parametrize("exclude", EXCLUDES)
@directions
def test_the_workspace_does_not_change_the_result(backend: Backend, direction: str, exclude: str) -> None:
    p = make_problem(257, 190, 12, direction=direction, exclude=exclude, bias=True).to(torch.float32, backend.device)
    with nckernels.use_workspace(2**26):
        whole = run(package, p)
    for workspace in (2**14, 2**16, 2**18):
        with nckernels.use_workspace(workspace):
            tiled = run(package, p)
        for expected, got in zip(whole, tiled, strict=True):
            for name, value in expected.items():
                other = got[name]
                assert value is not None
                assert other is not None
                finite = value > -math.inf
                assert torch.equal(finite, other > -math.inf)
                scale = 20 + float(value[finite].abs().max())
                # 11 roundings of size beta in the exponent, in units of the largest entry.
                error = (value - other)[finite].abs().max() / scale
                assert float(error) < 11 * 2**-23, (name, workspace)


def test_oracle_eps_matches_normalize() -> None:
    """Guards the oracle: its clamp is F.normalize's default wherever the dtype can represent it."""
    x = torch.tensor([[3e-13, 0.0], [0.0, 0.0], [3e-5, 4e-5]], dtype=torch.float64)
    assert torch.equal(F.normalize(x), F.normalize(x, eps=EPS[torch.float64]))
    assert all(EPS[t] == 1e-12 for t in DTYPES[:3])
    assert EPS[torch.float16] >= torch.finfo(torch.float16).smallest_normal
    assert set(INPUTS) == set(make_problem(3, 3, 3, direction="both", bias=True).inputs())


@dtypes
@pytest.mark.parametrize("direction", ["instance", "both"])
def test_backward_with_the_lse_of_more_columns(
    backend: Backend, small_workspace: None, direction: str, dtype: torch.dtype
) -> None:
    """As for the ring of keys: the backward pass uses the log-sum-exp over more columns than its own."""
    if backend.name == "reference":
        pytest.skip("is differentiated by PyTorch")
    backend.require(dtype)
    for beta, d in ((10.0, 8), (61.0, 300)):
        check_in_parts(direction, dtype, d, backend.device, beta)
