"""The host side of the GPU backends, with kernels that do nothing: memory, launches, and the division of work."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_memory import BYTES_PER_ROW, MIB, replay

from nckernels.backends import tiled
from nckernels.backends.base import Inputs, Needs, OutputGrads, Reduced, Spec
from nckernels.backends.quack import Product
from nckernels.backends.tiled import EpilogueKernels, plan
from nckernels.backends.tiled.kernels import Finish
from nckernels.backends.tiled.plan import Blocks


class NoProduct(Product):
    columns = plan.EPILOGUE_COLUMNS

    def __init__(self, launched: list[str]) -> None:
        self.launched = launched

    def __call__(self, *_: Any) -> None:
        self.launched.append("product")


class NoKernels(EpilogueKernels):
    """Records the launches."""

    index_dtype = torch.int64
    short = False
    """Whether rows are short enough for the kernel that accumulates on the chip."""
    epilogue = False
    """Whether there is a product with an epilogue."""

    def __init__(self, inputs: Inputs, spec: Spec) -> None:
        super().__init__(inputs, spec)
        self.launched: list[str] = []

    def epilogue_product(self) -> tuple[EpilogueKernels, Product, float] | None:
        return (self, NoProduct(self.launched), 10.0) if self.epilogue else None

    def lse_blocks(self, *_: Any) -> Blocks:
        return Blocks(128, 128, 264, plan.FULL_WAVE)

    bias_blocks = lse_blocks

    def short_blocks(self, *_: Any) -> Blocks | None:
        return Blocks(128, 64, 132) if self.short else None

    def panel_split(self, *_: Any) -> int:
        return 4

    def finisher(self, *args: Any) -> Finish:
        other = args[2]

        def finish(*more: Any) -> None:
            devices = {x.device for x in _tensors((*args, *more))}
            assert devices <= {self.inputs.features.device}
            self.launched.append("finish" if other is None else "mend and finish")

        return finish


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _tensors(item)
    elif dataclasses.is_dataclass(value):
        yield from _tensors(tuple(getattr(value, field.name) for field in dataclasses.fields(value)))


def _nothing(name: str) -> Any:
    def launch(self: NoKernels, *args: Any, **named: Any) -> None:
        devices = {x.device for x in _tensors((*args, *named.values()))}
        assert devices <= {self.inputs.features.device}, name
        self.launched.append(name)

    return launch


# The methods of an abstract class must exist when the class is created.
NAMES = [name for name in EpilogueKernels.__abstractmethods__ if name not in NoKernels.__dict__] + ["matmul"]
Stub = type("Stub", (NoKernels,), {name: _nothing(name) for name in NAMES})


def step(
    m: int, k: int, d: int, dtype: torch.dtype, spec: Spec, needs: Needs, short: bool, device: str = "cpu"
) -> list[str]:
    """A forward and a backward pass; the launches in order."""
    zeros = functools.partial(torch.zeros, device=device)
    features = torch.empty(m, d, dtype=dtype, device=device)
    inputs = Inputs(
        features,
        features if spec.symmetric else torch.empty(k, d, dtype=dtype, device=device),
        zeros(m, dtype=torch.int64),
        torch.tensor(10.0, device=device),
        zeros(m) if needs.sample_bias else None,
        zeros(k) if needs.class_bias else None,
    )
    forward = Stub(inputs, spec)
    saved = tiled.forward(forward, True)
    grads = OutputGrads(zeros(k) if spec.by_class else None, zeros(m) if spec.by_instance else None, zeros(m))
    backward = Stub(inputs, spec)
    backward.short = short
    tiled.backward(backward, saved, grads, needs)
    return forward.launched + backward.launched


def one_step(
    m: int, k: int, d: int, dtype: torch.dtype, spec: Spec, needs: Needs, device: str = "cpu", epilogue: bool = False
) -> list[str]:
    """Loss and gradient in one step; the launches in order."""
    features, prototypes = (torch.empty(n, d, dtype=dtype, device=device) for n in (m, k))
    target = torch.zeros(m, dtype=torch.int64, device=device)
    inputs = Inputs(features, prototypes, target, torch.tensor(10.0, device=device), None, None)
    kernels = Stub(inputs, spec)
    kernels.epilogue = epilogue
    assert tiled.fits(*inputs[:2], spec)
    tiled.step(kernels, Reduced(None, True, torch.nan), needs)
    return kernels.launched


EVERYTHING = Needs(True, True, True, True, True)


@pytest.mark.parametrize("short", [True, False], ids=["short", "long"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("m", "k", "d"), [(4096, 2000, 128), (1024, 768, 512), (512, 50_000, 64), (20_000, 7, 64)])
def test_memory(m: int, k: int, d: int, dtype: torch.dtype, short: bool) -> None:
    """The workspace and O(M + K) vectors beyond inputs and gradients, these in float32 while they accumulate."""
    for direction, present_only in (("class", False), ("class", True), ("instance", False), ("both", False)):
        spec = Spec(direction, "target", present_only, -100, MIB)  # type: ignore[arg-type]
        needs = EVERYTHING._replace(sample_bias=spec.by_class, class_bias=spec.by_instance)
        peak, _ = replay(lambda spec=spec, needs=needs: step(m, k, d, dtype, spec, needs, short))  # type: ignore[misc]
        rows, itemsize = m + k, dtype.itemsize
        tensors = 2 * rows * d * itemsize + (4 * min(m, k) * d if itemsize < 4 and not short else 0)
        if itemsize == 4 and k > m and present_only and not short:
            tensors += 4 * m * d  # compacted prototypes: their gradient cannot hold its own sums
        assert peak <= tensors + MIB + BYTES_PER_ROW * rows, (direction, present_only)
        assert peak > tensors / 2  # guards against a measurement of nothing


@pytest.mark.parametrize("wanted", range(3))
def test_unwanted_gradients_are_not_computed(wanted: int) -> None:
    """For one gradient at a time: one matrix product per panel, or only the bias kernel."""
    needs = (
        Needs(True, False, False, False, False),
        Needs(False, True, False, False, False),
        Needs(False, False, False, True, False),
    )[wanted]
    spec = Spec("class", "target", False, -100, 32 * MIB)
    launched = step(256, 128, 512, torch.float32, spec, needs, short=False)
    expected = ["entries", "matmul", "finish"] if wanted < 2 else ["bias_grad"]
    assert [name for name in launched if name in ("entries", "matmul", "finish", "bias_grad")] == expected


@pytest.mark.parametrize("short", [True, False], ids=["short", "long"])
@pytest.mark.parametrize("direction", ["class", "instance"])
def test_features_against_themselves(direction: str, short: bool) -> None:
    """One operand: norms once, one pass each way, and no sums for a second side."""
    spec = Spec(direction, "self", False, -100, 32 * MIB, symmetric=True)  # type: ignore[arg-type]
    needs = Needs(True, False, True, False, False)
    launched = step(20_000, 20_000, 128, torch.bfloat16, spec, needs, short)
    count = {name: launched.count(name) for name in NAMES}
    assert (count["row_rnorm"], count["prepare_samples"], count["log_sum_exp"]) == (0, 1, 1)
    assert count["bias_grad"] == 0
    if short:
        assert (count["short_grad"], count["entries"], count["matmul"]) == (1, 0, 0)
    else:
        assert count["short_grad"] == 0
        assert count["matmul"] == count["entries"] > 1


@pytest.mark.parametrize("short", [True, False], ids=["short", "long"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_memory_of_features_against_themselves(dtype: torch.dtype, short: bool) -> None:
    """No float32 copy of the gradient, because a panel's rows are finished before the next panel."""
    m, d = 4096, 128
    spec = Spec("class", "self", False, -100, MIB, symmetric=True)
    needs = Needs(True, False, True, True, False)
    peak, _ = replay(lambda: step(m, m, d, dtype, spec, needs, short))
    tensors = 2 * m * d * dtype.itemsize
    assert tensors / 2 < peak <= tensors + MIB + BYTES_PER_ROW * 2 * m


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_host_neither_reads_nor_mixes_devices(dtype: torch.dtype) -> None:
    """Tensors on the meta device have no values to read, and cannot be mixed with those of another device."""
    device = "meta"
    for (m, k), direction, short in itertools.product(
        ((512, 2000), (2000, 512)), ("class", "instance", "both"), (True, False)
    ):
        for present_only in {False, direction == "class"}:
            spec = Spec(direction, "target", present_only, -100, MIB)  # type: ignore[arg-type]
            needs = EVERYTHING._replace(sample_bias=spec.by_class, class_bias=spec.by_instance)
            assert step(m, k, 512, dtype, spec, needs, short, device)
            if direction != "both":
                needs, spec = needs._replace(sample_bias=False, class_bias=False), spec._replace(workspace=64 * MIB)
                assert one_step(m, k, 2048, dtype, spec, needs, device)
                assert one_step(m, k, 2048, dtype, spec, needs, device, epilogue=dtype == torch.bfloat16)
    for exclude, short in itertools.product(("self", "same_label"), (True, False)):
        spec = Spec("class", exclude, False, -100, MIB, symmetric=True)  # type: ignore[arg-type]
        assert step(512, 512, 512, dtype, spec, Needs(True, False, True, True, False), short, device)


def test_small_problems_take_few_launches() -> None:
    """A small problem takes at most ten launches, forward and backward; eleven with a matrix product."""
    for direction, short in itertools.product(("class", "instance", "both"), (True, False)):
        spec = Spec(direction, "target", False, -100, 32 * MIB)  # type: ignore[arg-type]
        needs = EVERYTHING._replace(sample_bias=False, class_bias=False)
        assert len(step(512, 100, 128, torch.bfloat16, spec, needs, short)) <= (10 if short else 11)


@pytest.mark.parametrize(("size", "short", "most"), [((512, 10, 128), True, 6), ((8192, 1000, 2048), False, 17)])
def test_number_of_launches_does_not_grow(size: tuple[int, int, int], short: bool, most: int) -> None:
    """NONL with two gradients: no more launches than when this was written, library products not counted."""
    spec = Spec("class", "target", True, -100, 32 * MIB)
    needs = Needs(True, True, False, False, False)
    launched = step(*size, torch.bfloat16, spec, needs, short)
    assert len(launched) - launched.count("matmul") <= most


def test_library_products_exclude_left_out_rows() -> None:
    """A sum in one product is mended. Operands of sums over several products, and those with unread rows, are
    copied."""
    needs = EVERYTHING._replace(sample_bias=False, class_bias=False)
    cases = (
        ("none", False, 100, 0, 1),
        ("none", True, 100, 1, 1),  # the classes are copied
        ("none", True, 900, 1, 1),
        ("self", False, 300, 0, 2),
        ("same_label", False, 300, 0, 2),
    )
    for exclude, present_only, classes, copies, mended in cases:
        spec = Spec("class", exclude, present_only, -100, 32 * MIB)  # type: ignore[arg-type]
        launched = step(300, classes, 512, torch.bfloat16, spec, needs, short=False)
        assert (launched.count("gather"), launched.count("mend")) == (copies, mended), exclude
        only = step(300, classes, 512, torch.bfloat16, spec, needs._replace(features=False), short=False)
        assert (only.count("gather"), only.count("mend")) == (0, 1), exclude
    spec = Spec("class", "none", True, -100, 8 * MIB)
    launched = step(4096, 200, 512, torch.bfloat16, spec, needs, short=False)
    assert launched.count("gather") == launched.count("entries") + 1 > 2
    assert "mend" not in launched
    spec = Spec("class", "target", True, -100, 320 * MIB)
    launched = one_step(2048, 1000, 2048, torch.bfloat16, spec, needs)
    assert [launched.count(name) for name in ("gather", "mend and finish", "finish")] == [0, 2, 0]
    launched = one_step(1000, 2048, 2048, torch.bfloat16, spec, needs)  # the classes are a list, and copied
    assert [launched.count(name) for name in ("gather", "mend and finish", "finish")] == [1, 1, 1]
    spec = Spec("instance", "none", False, -100, 320 * MIB)
    launched = one_step(2048, 1000, 2048, torch.bfloat16, spec, needs)
    assert [launched.count(name) for name in ("gather", "mend and finish", "finish")] == [0, 1, 1]
    launched = one_step(2048, 1000, 2048, torch.bfloat16, spec._replace(workspace=16 * MIB), needs)
    assert launched.count("gather") == launched.count("panel_entries") > 1
    assert "mend and finish" not in launched


def test_small_workspace_combines_partials_in_groups() -> None:
    """Both directions at once need partial results of every block of anchors, in groups if they are many."""
    few = Spec("both", "target", False, -100, 64 << 10)
    launched = step(3000, 2000, 64, torch.float32, few, EVERYTHING, short=False)
    assert launched.count("combine") >= launched.count("log_sum_exp") > 1
    assert launched.count("entries") > 4
    many = Spec("both", "target", False, -100, 256 * MIB)
    assert step(3000, 2000, 64, torch.float32, many, EVERYTHING, short=False).count("log_sum_exp") == 1


ENGINES = {
    "float32": (torch.float32, False),
    "bfloat16": (torch.bfloat16, False),
    "bfloat16 with an epilogue": (torch.bfloat16, True),
    "float16": (torch.float16, False),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("m", "k", "d"), [(4096, 2000, 512), (1024, 3000, 512), (3000, 700, 300)])
def test_memory_of_one_step(m: int, k: int, d: int, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The workspace and O(M + K) vectors beyond inputs and gradients, these in float32 while they accumulate.

    With one panel nothing accumulates beyond it; float16 gradients wait in float32.
    """
    monkeypatch.setattr(plan, "two_passes_cost", lambda *_: float("inf"))
    plan.step_panels.cache_clear()
    needs = Needs(True, True, True, False, False)
    dtype, epilogue = ENGINES[engine]
    gradient = torch.float32 if dtype == torch.float16 else dtype
    counts = []
    for direction, workspace in itertools.product(("class", "instance"), (4 * MIB, 128 * MIB)):
        spec = Spec(direction, "target", direction == "class", -100, workspace)  # type: ignore[arg-type]
        launched: list[str] = []
        call = functools.partial(one_step, m, k, d, dtype, spec, needs, epilogue=epilogue)
        peak, _ = replay(lambda call=call, launched=launched: launched.extend(call()))  # type: ignore[misc]
        counts.append(launched.count("product" if epilogue else "panel_entries"))
        tensors = (m + k) * d * (dtype.itemsize + gradient.itemsize)
        if counts[-1] > 1 and gradient != torch.float32:
            tensors += 4 * (m if direction == "class" else k) * d
        assert tensors / 2 < peak <= tensors + workspace + BYTES_PER_ROW * (m + k), (direction, workspace, counts)
    assert counts[1] == counts[3] == 1 < min(counts[0], counts[2])
    plan.step_panels.cache_clear()


def test_launches_of_one_step() -> None:
    """If one panel holds the matrix: five launches of ours besides the library's three products, the zeros and the
    scaling."""
    needs = Needs(True, True, False, False, False)
    spec = Spec("class", "target", True, -100, 320 * MIB)
    launched = one_step(2048, 1000, 2048, torch.bfloat16, spec, needs)
    assert launched.count("matmul") == 3
    assert len(launched) == 3 + 5
    spec = Spec("instance", "none", False, -100, 320 * MIB)
    launched = one_step(2048, 1000, 2048, torch.bfloat16, spec, needs)
    assert launched.count("matmul") == 3
    assert len(launched) == 3 + 5
    only = one_step(2048, 1000, 2048, torch.bfloat16, spec, needs._replace(prototypes=False))
    assert only.count("matmul") == 2
    with_epilogue = one_step(2048, 1000, 2048, torch.bfloat16, spec, needs, epilogue=True)
    assert with_epilogue.count("matmul") == 2
    assert with_epilogue.count("product") == 1
    assert len(with_epilogue) == 3 + 6


def test_which_problems_take_one_step() -> None:
    """Wide panels of long rows; not thin panels, nor rows so short that the panel's traffic takes longer than
    products."""
    default = (80 << 30) // 256
    for n_p, n_q, d in ((1000, 2048, 2048), (1000, 8192, 2048), (8192, 8192, 2048), (8192, 1000, 2048)):
        panels = plan.step_panels(n_p, n_q, d, 2, default)
        assert panels is not None
        cost = plan.step_cost(n_p, n_q, d, 2, panels.rows)
        assert cost < 0.75 * plan.two_passes_cost(n_p, n_q, d, 2)
        with_epilogue = plan.step_panels(n_p, n_q, d, 2, default, epilogue=True)
        assert with_epilogue is not None
        assert with_epilogue.rows >= panels.rows
        assert plan.step_cost(n_p, n_q, d, 2, with_epilogue.rows, epilogue=True) < 0.9 * cost
    assert plan.step_panels(8192, 131_072, 4096, 2, 32 * MIB) is None  # 64 rows and less
    assert plan.step_panels(8192, 8192, 300, 2, default) is None
    floor = 6 * 1000 * 8192 * 2048
    assert plan.step_cost(1000, 8192, 2048, 2, 1000) > floor
    assert plan.two_passes_cost(1000, 8192, 2048, 2) > 8 / 6 * floor


@given(
    st.integers(1, 200_000),
    st.integers(1, 200_000),
    st.integers(257, 5000),
    st.sampled_from([2, 4]),
    st.integers(1 << 20, 1 << 30),
    st.booleans(),
)
def test_panels_of_one_step_fit(n_p: int, n_q: int, d: int, itemsize: int, workspace: int, epilogue: bool) -> None:
    panels = plan.step_panels(n_p, n_q, d, itemsize, workspace, epilogue)
    if panels is None:
        return
    rows, block = panels.rows, panels.block
    assert 1 <= rows <= n_p
    assert 1 <= block <= max(rows, n_q)
    entries = rows * plan.pad16(n_q) * (itemsize if epilogue else 4 + (2 if itemsize == 2 else 0))
    buffers = rows * d * itemsize + block * d * 4
    assert entries + buffers <= workspace + plan.MIN_PANEL * d * (4 + itemsize)


sizes = st.integers(1, 5000)


@given(sizes, sizes, st.integers(1, 1000), st.integers(1, 32), st.integers(0, 10_000))
def test_split(p_blocks: int, q_blocks: int, places: int, least: int, most: int) -> None:
    split = plan.split_count(p_blocks, q_blocks, places, least, most)
    assert 1 <= split <= max(1, min(q_blocks, most))
    assert split >= min(least, q_blocks, max(1, most))


def test_split_fills_the_device() -> None:
    assert plan.split_count(1, 1000, 132, 1, 10_000) > 120  # one block of anchors would use one thread block
    assert plan.split_count(1320, 1000, 132, 1, 10_000) == 1  # ten full rounds as it is
    assert plan.split_count(2, 1, 132, 1, 10_000) == 1  # nothing to share


@given(
    st.integers(1, 200_000),
    st.integers(1, 200_000),
    st.sampled_from([0, 256, 8192]),
    st.sampled_from([0, 1024]),
    st.sampled_from([2, 4]),
    st.integers(1, 1 << 26),
)
def test_panels_fit(n_p: int, n_q: int, p_row: int, q_row: int, itemsize: int, budget: int) -> None:
    p, q = plan.panel_shape(n_p, n_q, p_row, q_row, itemsize, budget)
    assert 1 <= p <= n_p
    assert 1 <= q <= n_q
    smallest = p <= plan.MIN_PANEL and q <= plan.MIN_PANEL
    assert smallest or p * plan.pad16(q) * itemsize + p * p_row + q * q_row <= budget
    if not smallest and n_p * plan.pad16(n_q) * itemsize + n_p * p_row + n_q * q_row <= budget:
        assert (p, q) == (n_p, n_q)  # one panel where one is enough
