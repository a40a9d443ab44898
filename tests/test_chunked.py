"""The chunked backend: products in 16 bits, steps in one or several parts, and which problems take which."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import oracle
import oracle_contrastive
import pytest
import torch
from oracle import make_problem
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import nckernels
from nckernels.backends import registry
from nckernels.backends.base import Inputs, Needs, OutputGrads, Reduced, Spec
from nckernels.backends.chunked import products
from nckernels.backends.chunked.matrix import rows_of_a_part

KIB = 1024
Loss = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def _chunked() -> Iterator[None]:
    with nckernels.use_backend("chunked"):
        yield


@pytest.fixture
def half(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU that multiplies bfloat16 fast, in problems of any size."""
    monkeypatch.setattr(products, "fast", lambda _, dtype: dtype == torch.bfloat16)
    monkeypatch.setattr(products, "_FEWEST", 0)
    monkeypatch.setattr(products, "_LEAST", 0)


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU whose 16-bit products come in float32."""
    monkeypatch.setattr(products, "fast", lambda _, dtype: dtype in products.HALF)
    monkeypatch.setattr(products, "has_wide_product", lambda _: True)
    monkeypatch.setattr(products, "product", lambda a, b: a.float() @ b.float())


# --- errors -----------------------------------------------------------------------------------------------


def _forms(name: str, **options: Any) -> tuple[Loss, Loss]:
    """The package's loss and the papers' formula."""
    naive = (
        functools.partial(oracle.loss, name) if name in ("nonl", "ntce", "normface") else oracle_contrastive.NAIVE[name]
    )
    ours = getattr(nckernels, f"{name}_loss")
    if name == "uniformity":  # of features only
        return tuple(lambda x, _w, _y, *, temperature, f=f: f(x) + 0.0 * temperature for f in (ours, naive))  # type: ignore[return-value, misc]
    take = {
        "supcon": lambda x, w, y: (x, torch.arange(len(x)) % (len(x) // 3)),
        "prototype": lambda x, w, y: (x, y),
        "clip": lambda x, w, y: (x[: len(w)], w),
    }.get(name, lambda *tensors: tensors)
    return tuple(lambda *tensors, f=f, **more: f(*take(*tensors), **options, **more) for f in (ours, naive))  # type: ignore[return-value, misc]


FORMS: dict[str, tuple[Loss, Loss]] = {
    "nonl": _forms("nonl"),
    "nonl-instance": _forms("nonl", direction="instance"),
    "nonl-both": _forms("nonl", direction="both"),
    "ntce": _forms("ntce"),
    "normface": _forms("normface"),
    "smoothing": _forms("normface", label_smoothing=0.1),
    "arcface": _forms("normface", angular_margin=0.1),
    "info_nce": _forms("info_nce"),
    "supcon": _forms("supcon"),
    "supcon-decoupled": _forms("supcon", decoupled=True),
    "clip": _forms("clip"),
    "clip-decoupled": _forms("clip", decoupled=True),
    "prototype": _forms("prototype"),
    "uniformity": _forms("uniformity"),
}
IN_ONE_STEP = ("nonl", "nonl-instance", "ntce", "normface", "info_nce", "supcon", "supcon-decoupled", "clip")


def batch(m: int, k: int, d: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Features around their prototypes, of various lengths."""
    g = torch.Generator().manual_seed(seed)
    w, y = torch.randn(k, d, generator=g), torch.randint(k, (m,), generator=g)
    x = (w[y] + 1.5 * torch.randn(m, d, generator=g)) * torch.rand(m, 1, generator=g).add_(0.1)
    return x.to(dtype), w.to(dtype), y


def evaluate(
    loss: Loss, x: Tensor, w: Tensor, y: Tensor, dtype: torch.dtype, tau: float = 0.1, **options: Any
) -> list[Tensor]:
    """Loss and gradients with respect to features, prototypes (zeros if there are none) and temperature."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in (x, w)]
    temperature = torch.tensor(tau, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
    value = loss(*leaves, y, temperature=temperature, **options)
    grads = torch.autograd.grad(value, [*leaves, temperature], allow_unused=True, materialize_grads=True)
    return [value.detach().double(), *(g.double() for g in grads)]


@pytest.mark.usefixtures("half")
@pytest.mark.parametrize("workspace", [128 * KIB, 8192 * KIB])
@pytest.mark.parametrize("name", FORMS)
def test_errors_are_at_most_those_of_eager_pytorch(name: str, workspace: int) -> None:
    """The distance of the loss and of each gradient from float64, over all entries and several seeds."""
    ours, eagers = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    package, naive = FORMS[name]
    for seed in range(4):
        case = batch(180, 66, 48, torch.bfloat16, seed)
        with nckernels.use_workspace(workspace):
            got = evaluate(package, *case, torch.bfloat16)
        exact, eager = (evaluate(naive, *case, dtype) for dtype in (torch.float64, torch.bfloat16))
        ours += torch.stack([(a - b).square().sum() for a, b in zip(got, exact, strict=True)])
        eagers += torch.stack([(a - b).square().sum() for a, b in zip(eager, exact, strict=True)])
    assert (ours <= eagers).all(), (ours / eagers).sqrt().tolist()


def _relative(got: list[Tensor], exact: list[Tensor]) -> float:
    errors = [(a - b).norm() / b.norm().clamp_min(1e-30) for a, b in zip(got, exact, strict=True)]
    return float(torch.stack(errors).max())  # Python's max may ignore NaN


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("dtype", products.HALF, ids=str)
@pytest.mark.parametrize("exclude", ["target", "self"])
def test_float32_products_of_16_bit_rows(dtype: torch.dtype, exclude: str) -> None:
    """Logits are exact for every temperature, and no gradient leaves the range of float16."""
    m, k = (70, 70) if exclude == "self" else (70, 43)
    with nckernels.use_workspace(64 * KIB):
        for direction in ("class", "both"):
            for beta in (10.0, 100.0):
                p = make_problem(m, k, 17, direction=direction, exclude=exclude, beta=beta, bias=True)
                oracle.check(p, dtype)


@pytest.mark.usefixtures("wide")
def test_small_upstream_gradients_in_float16() -> None:
    """Weights of 1e-7 give gradients of 1e-4 here, and would not be exact in float16."""
    p = make_problem(70, 43, 17, direction="class", exclude="target")
    upstream = {n: 1e-5 * g for n, g in p.upstream.items()}
    p = dataclasses.replace(p, features=0.005 * p.features, prototypes=0.005 * p.prototypes, upstream=upstream)
    half = p.to(torch.float16)
    got, exact = oracle.run(oracle.package, half)[1], oracle.run(oracle.package, half.to(torch.float64))[1]
    for name in ("features", "prototypes"):
        a, b = got[name], exact[name]
        assert a is not None
        assert b is not None
        assert (a.double() - b).norm() <= 1e-3 * b.norm(), name


@pytest.mark.usefixtures("half")
@pytest.mark.parametrize("workspace", [24 * KIB, 8192 * KIB])
@pytest.mark.parametrize("name", ["ntce", "normface", "clip"])
def test_gradients_of_learnt_samples(name: str, workspace: int) -> None:
    """With probabilities within 1e-3 of 1 the gradient has an error of at most 2 %, which requires positives that are
    not rounded."""
    g = torch.Generator().manual_seed(0)
    w = torch.linalg.qr(torch.randn(48, 48, generator=g))[0].bfloat16()
    x, y = (w + 0.01 * torch.randn(48, 48, generator=g)).bfloat16(), torch.arange(48)
    exact = evaluate(FORMS[name][0], x, w, y, torch.float64, 0.09)
    with nckernels.use_workspace(workspace):
        got = evaluate(FORMS[name][0], x, w, y, torch.bfloat16, 0.09)
    assert float(exact[0]) < 1e-3
    assert _relative(got[:3], exact[:3]) <= 2e-2


@pytest.mark.usefixtures("half")
@pytest.mark.parametrize("name", ["nonl", "normface", "clip", "supcon", "uniformity", "smoothing"])
def test_rows_of_any_length(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compared with float32 products of the same rows: rows whose products overflow, tiny, subnormal and zero rows, and
    rows with a norm beyond float32 (which count as zeros)."""
    x, w, y = batch(180, 66, 48, torch.float32)
    for i, factor in enumerate((1e15, 1e-10, 1e-30, 1e-40, 0.0, 1e30)):
        x[i::9] *= factor
        w[i + 1 :: 9] *= factor
    options = {"ignore_index": -1} if name in ("nonl", "normface", "smoothing") else {}
    if options:
        x[::11], y[::11] = torch.nan, -1
    x, w = x.bfloat16(), w.bfloat16()
    got = evaluate(FORMS[name][0], x, w, y, torch.bfloat16, **options)
    monkeypatch.undo()
    monkeypatch.setattr(products, "fast", lambda *_: False)
    expected = evaluate(FORMS[name][0], x, w, y, torch.bfloat16, **options)
    assert abs(got[0] - expected[0]) <= 2e-3 * abs(expected[0])
    for a, b in zip(got[1:3], expected[1:3], strict=True):
        assert a.isfinite().all()
        assert ((a - b).norm(dim=1) <= 3e-2 * b.norm(dim=1) + 1e-20).all()


@pytest.mark.usefixtures("half")
@pytest.mark.parametrize("workspace", [KIB, 8192 * KIB])  # two passes, one step
def test_a_batch_of_ignored_samples(workspace: int) -> None:
    x, w, _ = batch(20, 60, 24, torch.bfloat16)
    with nckernels.use_workspace(workspace):
        got = evaluate(FORMS["ntce"][0], x, w, torch.full((20,), -100), torch.bfloat16, reduction="sum")
    assert not any(value.any() for value in got)


# --- steps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [0.1, 0.01])
@pytest.mark.parametrize("name", IN_ONE_STEP)
def test_steps_in_parts_of_any_size(name: str, tau: float) -> None:
    """In float64 compared with autograd; in float32 and bfloat16 with the step in one part."""
    package, naive = FORMS[name]
    x, w, y = batch(240, 130, 24, torch.float64)
    exact = evaluate(naive, x, w, y, torch.float64, tau)
    for workspace in (256 * KIB, 512 * KIB, 8192 * KIB):
        with nckernels.use_workspace(workspace):
            assert _relative(evaluate(package, x, w, y, torch.float64, tau), exact) <= 1e-12


def test_shares_of_many_samples_are_summed_accurately() -> None:
    """A float32 sum of 5000 shares of 1/5000 would have a relative error of 1e-5, with a log-sum-exp of 58."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(1, 16, generator=g)
    x, y = w + 0.01 * torch.randn(5000, 16, generator=g), torch.zeros(5000, dtype=torch.int64)
    loss, exact = (evaluate(FORMS["ntce"][0], x, w, y, dtype, 0.02)[0] for dtype in (torch.float32, torch.float64))
    assert abs(loss - exact) <= 1e-6 * exact


@pytest.mark.usefixtures("wide")
def test_a_float16_step_multiplies_in_float32() -> None:
    """Sums of exponentials, and weights in them, may leave the range of float16."""
    x, w, y = batch(240, 240, 24, torch.float16)
    x[1] = x[0]
    for name in ("supcon", "clip", "normface"):
        half, exact = (evaluate(FORMS[name][0], x.to(t), w.to(t), y, t, 0.05) for t in (torch.float16, torch.float64))
        assert _relative(half, exact) <= 1e-3, name


@pytest.mark.usefixtures("half")
@pytest.mark.parametrize("name", IN_ONE_STEP)
def test_bfloat16_steps_in_parts(name: str) -> None:
    x, w, y = batch(240, 130, 24, torch.bfloat16)
    whole = evaluate(FORMS[name][0], x, w, y, torch.bfloat16)
    for workspace in (96 * KIB, 160 * KIB):
        with nckernels.use_workspace(workspace):
            assert _relative(evaluate(FORMS[name][0], x, w, y, torch.bfloat16), whole) <= 1e-2


@pytest.mark.usefixtures("half")
@pytest.mark.parametrize("workspace", [160 * KIB, 8192 * KIB])
def test_bfloat16_steps_with_positives_of_various_weights(workspace: int) -> None:
    """In one part an entry gets a share of its row and one of its column, which differ, times the scale of its row."""
    x, w, y = batch(240, 6, 24, torch.bfloat16)

    def loss(x: Tensor, _w: Tensor, y: Tensor, **options: Any) -> Tensor:
        return nckernels.supcon_loss(x, y, **options)

    options = {"sample_weight": torch.rand(240, generator=torch.Generator().manual_seed(1))}
    exact = evaluate(loss, x, w, y, torch.float64, **options)
    with nckernels.use_workspace(workspace):
        assert _relative(evaluate(loss, x, w, y, torch.bfloat16, **options), exact) <= 1e-2


@pytest.mark.parametrize(
    ("form", "m", "k", "workspace", "parts"),
    [
        ("class", 240, 130, 256 * KIB, 2),
        ("instance", 240, 130, 256 * KIB, 2),
        ("both", 240, 130, 512 * KIB, 1),
        ("both", 240, 130, 256 * KIB, 0),
        ("symmetric", 240, 240, 256 * KIB, 4),
        ("symmetric", 240, 240, 1024 * KIB, 1),
        ("symmetric", 4000, 4000, 1024 * KIB, 0),
    ],
)
def test_which_problems_take_a_step(form: str, m: int, k: int, workspace: int, parts: int) -> None:
    """Also the number of parts, so that the tests above cover several."""
    symmetric = form == "symmetric"
    spec = Spec("instance" if symmetric else form, "self" if symmetric else "none", False, -100, workspace, symmetric)  # type: ignore[arg-type]
    z, w = torch.empty(m, 24, dtype=torch.float64), torch.empty(k, 24, dtype=torch.float64)
    assert registry.can_step("chunked", z, z if symmetric else w, spec) == (parts > 0)
    assert not registry.can_step("chunked", z.to("meta"), w.to("meta"), spec)
    if parts:
        rows, cols = (k, m) if form == "class" else (m, k)
        assert -(-rows // rows_of_a_part(rows, cols, 24, 8, spec)) == parts


# --- when products are in 16 bits -------------------------------------------------------------------------


class Operands(TorchDispatchMode):
    """Records the dtypes of the operands of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.dtypes |= {x.dtype for x in args if isinstance(x, Tensor) and x.dim() == 2}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("dtype", "beta", "wanted"),
    [
        (torch.bfloat16, 10.0, torch.bfloat16),
        (torch.bfloat16, 100.0, torch.float32),
        (torch.float16, 10.0, torch.float32),
        (torch.float32, 10.0, torch.float32),
    ],
)
@pytest.mark.parametrize("direction", ["class", "instance", "both", "symmetric"])
@pytest.mark.usefixtures("half")
def test_dtype_of_products(direction: str, dtype: torch.dtype, beta: float, wanted: torch.dtype) -> None:
    z, w, y = batch(60, 60, 16, dtype)
    symmetric = direction == "symmetric"
    spec = Spec(
        "instance" if symmetric else direction,
        "self" if symmetric else "target",
        False,
        -100,
        2**20,
        symmetric,  # type: ignore[arg-type]
    )
    inputs = Inputs(z, z if symmetric else w, y, torch.tensor(beta), None, None)
    needs, backend = Needs(True, not symmetric, True, False, False), registry.BACKENDS["chunked"]
    with Operands() as in_step:
        backend.step(inputs, Reduced(None, True, torch.nan), spec, needs)
    with Operands() as in_two:
        saved = backend.forward(inputs, spec, keep=True)
        grads = OutputGrads(*(torch.ones_like(x) if x.numel() else None for x in saved[:3]))
        backend.backward(inputs, saved, grads, spec, needs)
    assert in_step.dtypes == in_two.dtypes == {wanted}


def test_small_problems_stay_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "fast", lambda *_: True)
    sizes = {(4096, 1000, 512): True, (512, 10, 2048): False, (256, 256, 128): False}
    for (m, k, d), expected in sizes.items():
        z, w = torch.empty(m, d, dtype=torch.bfloat16), torch.empty(k, d, dtype=torch.bfloat16)
        assert products.use_half(z, w, small_logits=True) == expected
        assert not products.use_half(z, w, small_logits=False)


def test_devices_with_fast_16_bit_products(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    units = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    assert products.fast(cpu, torch.bfloat16) == units
    with torch.backends.mkldnn.flags(enabled=False):
        assert not products.fast(cpu, torch.bfloat16)
    for dtype in (torch.float16, torch.float32, torch.float64):
        assert not products.fast(cpu, dtype)
    assert not products.has_wide_product("cpu")
    assert products.has_wide_product("meta")
    monkeypatch.setattr(products, "has_wide_product", lambda device: device == "cuda")
    for capability, expected in {(6, 1): (False, False), (7, 5): (False, True), (8, 0): (True, True)}.items():
        products._has_tensor_cores.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert tuple(products.fast(gpu, dtype) for dtype in products.HALF) == expected
    products._has_tensor_cores.cache_clear()
    for name in ("xpu", "mps"):
        assert products.fast(torch.device(name), torch.bfloat16)
        assert not products.fast(torch.device(name), torch.float16)


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("symmetric", [False, True])
def test_nothing_waits_for_the_host(symmetric: bool) -> None:
    """Tensors on the meta device have no values to wait for."""
    z, w, y = (t.to("meta") for t in batch(60, 40, 16, torch.bfloat16))
    z.requires_grad_()
    options = {"exclude": "self"} if symmetric else {}
    lse, pos = nckernels.cosine_lse(z, z if symmetric else w, y, 10.0, direction="instance", **options)
    assert torch.autograd.grad((lse - pos).sum(), z)[0].is_meta
