"""The Triton kernels in the interpreter, on the CPU, against the float64 oracle.

``oracle.check`` compares values and all gradients: error at most that of eager PyTorch in the same dtype and a
few roundings. Blocks are 16 x 16 here, so 37 samples and 21 classes are several ragged tiles.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from oracle import check, check_float16_zero_row, check_spoilt, dense, make_problem, package, run, simplex
from parts import check_in_parts

import nckernels
from nckernels.backends.base import Inputs, Spec, norm_eps
from nckernels.backends.triton import config, launch

DIRECTIONS = ("class", "instance", "both")
EXCLUDES = ("none", "target", "self", "same_label")
SHORT, LONG = (
    20,
    300,
)  # row lengths of the two gradient kernels: whole rows on the chip, and panels of entries


def classes_of(exclude: str, classes: int = 21) -> int:
    return 37 if exclude in ("self", "same_label") else classes


@pytest.mark.parametrize("d", [SHORT, pytest.param(LONG, marks=pytest.mark.slow)])
@pytest.mark.parametrize("exclude", EXCLUDES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_masks_and_directions(direction: str, exclude: str, d: int) -> None:
    check(
        make_problem(37, classes_of(exclude), d, direction=direction, exclude=exclude, bias=True),
        torch.float32,
    )


@pytest.mark.parametrize("exclude", ["target", "self"])
def test_long_rows(exclude: str) -> None:
    direction = "class" if exclude == "target" else "both"
    check(
        make_problem(37, classes_of(exclude), LONG, direction=direction, exclude=exclude, bias=True),
        torch.float32,
    )


@pytest.mark.parametrize("d", [SHORT, LONG])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types(dtype: torch.dtype, d: int) -> None:
    check(make_problem(37, 21, d, direction="both", exclude="target", bias=False), dtype)


@pytest.mark.covers(2)
@pytest.mark.parametrize("d", [SHORT, LONG])
@pytest.mark.parametrize("exclude", ["self", "same_label"])
@pytest.mark.parametrize("direction", ["class", "instance"])
@pytest.mark.parametrize(
    ("beta", "bias", "dtype"),
    [(10.0, False, torch.float32), (200.0, False, torch.bfloat16), (10.0, True, torch.float16)],
    ids=["cool", "hot", "bias"],
)
def test_features_against_themselves(
    beta: float, bias: bool, dtype: torch.dtype, direction: str, exclude: str, d: int
) -> None:
    """One pass for the gradient as rows and as columns, with one or two exponentials per entry.

    A positive may be an ignored row, and two rows may be each other's positives.
    """
    problem = make_problem(
        37, 37, d, direction=direction, exclude=exclude, bias=bias, beta=beta, ignored=0.3, itself=True
    )
    check(problem, dtype)


@pytest.mark.parametrize("d", [SHORT, LONG])
@pytest.mark.parametrize("wrt", ["features", "inv_temperature", "sample_bias"])
def test_single_gradients_of_features_against_themselves(wrt: str, d: int) -> None:
    with nckernels.use_workspace(4096):  # few splits, several panels
        problem = make_problem(50, 50, d, exclude="self", bias=wrt == "sample_bias", itself=True)
        check(problem, torch.float32, wrt=(wrt,))


@pytest.mark.parametrize("d", [SHORT, LONG])
def test_backward_with_the_lse_of_more_columns(d: int) -> None:
    check_in_parts("both", torch.bfloat16, d)
    check_in_parts("instance", torch.float32, d, beta=61.0)


@pytest.mark.parametrize("beta", [1.0, 100.0, 1000.0])
@pytest.mark.parametrize("direction", ["class", "instance"])
def test_temperatures(direction: str, beta: float) -> None:
    problem = make_problem(37, 21, SHORT, direction=direction, exclude="target", bias=False, beta=beta)
    check(problem, torch.float32)


@pytest.mark.parametrize("d", [SHORT, LONG])
@pytest.mark.parametrize(("samples", "classes"), [(37, 21), (20, 90)], ids=["masked", "compacted"])
def test_present_classes(samples: int, classes: int, d: int) -> None:
    """With more classes than samples the prototypes are gathered through the list of present classes."""
    problem = make_problem(samples, classes, d, direction="class", exclude="target", bias=True, present_only=True)
    check(problem, torch.float32)


@pytest.mark.parametrize(("samples", "classes", "d"), [(1, 5, 7), (5, 1, 7), (1, 1, 1), (0, 4, 3), (33, 17, 16)])
@pytest.mark.parametrize("direction", ["class", "both"])
def test_edge_shapes(direction: str, samples: int, classes: int, d: int) -> None:
    problem = make_problem(samples, classes, d, direction=direction, exclude="target", bias=False)
    check(problem, torch.float32)


@pytest.mark.parametrize("d", [SHORT, LONG])
def test_small_workspace(d: int) -> None:
    """Column panels in the forward pass and panels of entries in the backward pass."""
    with nckernels.use_workspace(4096):
        check(make_problem(70, 90, d, direction="both", exclude="target", bias=False), torch.float32)


@pytest.mark.parametrize("loss", ["nonl_loss", "ntce_loss", "normface_loss"])
def test_collapsed_features(loss: str) -> None:
    """The simplex at temperature 0.01, where all sums relative to beta would underflow."""
    w = simplex(6, 12)
    y = torch.arange(6).repeat(5)
    value = getattr(nckernels, loss)(w[y].float(), w.float(), y, temperature=0.01)
    exact = getattr(nckernels, loss)
    with nckernels.use_backend("reference"):
        expected = exact(w[y].float().double(), w.float().double(), y, temperature=0.01)
    assert abs(float(value) - float(expected)) < 1e-4  # logits of 120 have float32 roundings of 4e-6 each


@pytest.mark.parametrize(("dtype", "d"), [(torch.float32, LONG), (torch.float16, SHORT), (torch.float16, LONG)])
def test_zero_and_short_rows(dtype: torch.dtype, d: int) -> None:
    """Rows shorter than the least norm are divided by it, and take part like others; their gradient is not projected.

    With such rows on both sides, float16's range has room for all entries but those of two of them.
    """
    p = make_problem(37, 21, d, direction="both", exclude="target")
    for rows in (p.features, p.prototypes):
        rows /= rows.norm(dim=1, keepdim=True)
        rows[3] = 0
    p.features[4] *= 0.5 * norm_eps(dtype)
    small = {name: 0.05 * upstream for name, upstream in p.upstream.items()}  # the short row's gradient fits float16
    p = dataclasses.replace(p, upstream=small)
    check(p, dtype)
    p.prototypes[4] *= 0.5 * norm_eps(dtype)
    exact, (_, grads) = run(dense, p.to(dtype).to(torch.float64), eps=norm_eps(dtype))[1], run(package, p.to(dtype))
    for name in ("features", "prototypes"):
        found, expected = grads[name][5:].double(), exact[name][5:]
        assert (found - expected).norm() <= 2 * torch.finfo(dtype).eps * expected.norm()


def test_a_nan_row_gives_nan() -> None:
    """Except to an ignored sample, whose sum is empty."""
    z, w, y = torch.randn(20, SHORT), torch.randn(5, SHORT), torch.randint(5, (20,))
    z[3], y[4] = torch.nan, -100
    assert nckernels.nonl_loss(z, w, y).isnan()
    w[2] = torch.nan
    for direction in ("instance", "both"):
        lse, _ = nckernels.cosine_lse(z[4:], w, y[4:], 10.0, direction=direction)
        instance = lse[1] if direction == "both" else lse
        assert instance[0] == -torch.inf
        assert instance[1:].isnan().all()


@pytest.mark.parametrize("d", [SHORT, LONG])
@pytest.mark.parametrize("length", [0.01, 100.0])
def test_float16_zero_row_among_others(length: float, d: int) -> None:
    check_float16_zero_row(length, d)


@pytest.mark.parametrize("setting", ["high", "medium", "highest", "tf32", "ieee"])
def test_old_and_new_tf32_settings(setting: str) -> None:
    """torch has an old and a new setting, and the old getter fails after the new one has been used."""
    x = torch.randn(20, SHORT)
    before = torch.get_float32_matmul_precision()
    try:
        if setting in ("tf32", "ieee"):
            torch.backends.cuda.matmul.fp32_precision = setting
        else:
            torch.set_float32_matmul_precision(setting)
        expected = "ieee" if setting in ("highest", "ieee") else "tf32"
        assert config.kind_of(x) == expected
        nckernels.nonl_loss(x, torch.randn(5, SHORT), torch.randint(5, (20,)))
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"
        torch.set_float32_matmul_precision(before)


def test_unaligned_rows_get_smaller_tiles() -> None:
    wide = torch.randn(20, 72).bfloat16()
    spec = Spec("class", "target", False, -100, 2**20)
    for first, aligned in ((0, True), (4, False), (8, True)):
        z = wide[:, first : first + 64]
        inputs = Inputs(z, torch.randn(5, 64).bfloat16(), torch.randint(5, (20,)), torch.tensor(10.0), None, None)
        assert launch.TritonKernels(inputs, spec)._shape(False, 100).aligned == aligned


@pytest.mark.covers(2)
@pytest.mark.parametrize("d", [SHORT, LONG])
@pytest.mark.parametrize(
    ("exclude", "itself"), [*((exclude, False) for exclude in EXCLUDES), ("self", True), ("same_label", True)]
)
@pytest.mark.parametrize(
    ("direction", "dtype", "fill"),
    [("class", torch.float32, torch.nan), ("instance", torch.bfloat16, torch.inf)],
    ids=["class", "instance"],
)
@pytest.mark.parametrize("workspace", [16384, 1 << 20])
def test_left_out_rows_may_hold_anything(
    direction: str, dtype: torch.dtype, fill: float, exclude: str, itself: bool, d: int, workspace: int
) -> None:
    """NaN does not reach other rows, not even as 0 * NaN, in our kernels and in library products."""
    problem = make_problem(37, classes_of(exclude), d, direction=direction, exclude=exclude, itself=itself)
    with nckernels.use_workspace(workspace):
        check_spoilt(problem.to(dtype), None, fill)


@pytest.mark.parametrize("d", [SHORT, LONG])
@pytest.mark.parametrize(("samples", "classes"), [(37, 21), (20, 90)], ids=["masked", "compacted"])
def test_absent_classes_may_hold_anything(samples: int, classes: int, d: int) -> None:
    problem = make_problem(samples, classes, d, exclude="target", present_only=True).to(torch.float32)
    check_spoilt(problem, None)


def test_a_nan_positive_propagates() -> None:
    """An ignored row that is a positive is read, and its NaN propagates."""
    for d in (SHORT, LONG):
        problem = make_problem(37, 37, d, exclude="self", ignored=0.3).to(torch.float32)
        ignored = problem.target == problem.ignore_index
        problem.target[0], row = ignored.nonzero()[0, 0], ignored.nonzero()[0, 0]
        problem.prototypes[row] = torch.nan
        outputs, grads = run(package, problem)
        assert outputs["pos"][0].isnan()
        assert grads["features"][0].isnan().any()
        assert grads["prototypes"][row].isnan().any()


def test_target_out_of_range_is_caught() -> None:
    """On a device this is an assertion of the kernel; the interpreter raises it."""
    z, w = torch.randn(20, SHORT), torch.randn(5, SHORT)
    with pytest.raises(Exception, match="out of range"):
        nckernels.nonl_loss(z, w, torch.full((20,), 5))


def test_inputs_are_unchanged_and_backward_repeats() -> None:
    z = torch.randn(37, SHORT, requires_grad=True)
    w = torch.randn(21, SHORT, requires_grad=True)
    y = torch.randint(21, (37,))
    before = z.detach().clone(), w.detach().clone()
    loss = nckernels.nonl_loss(z, w, y)
    first = torch.autograd.grad(loss, (z, w), retain_graph=True)
    second = torch.autograd.grad(loss, (z, w))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(before, (z, w), strict=True):
        assert torch.equal(a, b)
