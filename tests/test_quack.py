"""The contract of the product with an epilogue, by its PyTorch form; and that quack is optional."""

from __future__ import annotations

import math
import subprocess
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nckernels.backends import quack
from nckernels.backends.quack import Operand, PlainProduct

LOG2E = math.log2(math.e)


def operands(
    n: int, k: int, beta: float, tagged: bool, seed: int, d: int = 40, columns: int = PlainProduct.columns
) -> tuple[Operand, Operand]:
    """Rows of any scale; the first row of each operand is left out and holds NaN."""
    torch.manual_seed(seed)
    width = -(-k // columns) * columns
    sides = []
    for rows, length, factor, left_out in ((n, n, beta * LOG2E, 0.0), (k, width, 1.0, -1.0)):
        x = (torch.randn(rows, d) * torch.rand(rows, 1).exp2()).bfloat16()
        scale = torch.full((length,), left_out)
        scale[:rows] = factor / x.float().norm(dim=1)
        scale[0], x[0] = left_out, torch.nan
        tag = torch.randint(4, (length,)).float() if tagged else None
        sides.append(Operand(x, scale, tag))
    return sides[0], sides[1]


def results(p: Operand, q: Operand, beta: float) -> tuple[Tensor, Tensor]:
    (n, k), columns = (p.x.shape[0], q.x.shape[0]), PlainProduct.columns
    e, sums = torch.empty(n, k, dtype=torch.bfloat16), torch.empty(n, -(-k // columns))
    PlainProduct()(p, q, beta * LOG2E, e, sums)
    return e, sums


@pytest.mark.parametrize("beta", [1.0, 10.0, 40.0])
@pytest.mark.parametrize("tagged", [False, True], ids=["all", "others"])
@pytest.mark.parametrize(("n", "k"), [(5, 3), (17, 32), (9, 77)])
def test_stand_in(n: int, k: int, tagged: bool, beta: float) -> None:
    p, q = operands(n, k, beta, tagged, seed=n)
    e, sums = results(p, q, beta)
    expected = (beta * (F.normalize(p.x.double()) @ F.normalize(q.x.double()).t() - 1)).exp()
    expected[0], expected[:, 0] = 0, 0
    if p.tag is not None and q.tag is not None:
        expected[p.tag[:, None] == q.tag[:k]] = 0
    torch.testing.assert_close(sums.sum(1).double(), expected.sum(1), rtol=2e-5, atol=0)
    torch.testing.assert_close(e.double(), expected * q.scale[:k].double(), rtol=2**-8, atol=0)
    assert (expected == 0).eq(e == 0).all()


def test_nan_in_a_used_row_propagates() -> None:
    p, q = operands(5, 7, 10.0, True, seed=0)
    for operand in (p, q):
        operand.x[2], operand.scale[2] = torch.nan, torch.nan
    e, sums = results(p, q, 10.0)
    assert sums[2].isnan().all()
    assert e[3:, 2].isnan().any()
    assert (e[0, 3:] == 0).all()


def test_reasons_why_it_cannot_be_used() -> None:
    assert quack.why_not(torch.device("cpu")) == "it does not support cpu devices"
    if quack.missing() is not None:
        assert "quack-kernels" in quack.missing()  # type: ignore[operator]


def test_a_product_that_does_not_compile_is_named_and_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(PlainProduct):
        def compile(self, *_: object) -> None:
            raise RuntimeError("no such tile")

    call = types.ModuleType("call")
    call.product_for = lambda _: Broken()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nckernels.backends.quack.call", call)
    quack.product.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"does not compile for cpu.*no such tile"):
        assert quack.product(torch.device("cpu"), True) is None
    quack.product.cache_clear()


def test_importing_this_package_does_not_import_quack() -> None:
    code = "import sys, nckernels.backends.quack; sys.exit(not {'quack', 'cutlass'}.isdisjoint(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tagged", [False, True], ids=["all", "others"])
@pytest.mark.parametrize(("n", "k", "d"), [(1, 1, 8), (200, 1000, 264), (1000, 2049, 2048)])
def test_device(n: int, k: int, d: int, tagged: bool) -> None:
    """quack's product against the contract, with tiles of the same width and ragged sizes."""
    device = torch.device("cuda", 0)
    if quack.why_not(device) is not None:
        pytest.skip(quack.why_not(device) or "")
    ours, contract = quack.product(device, tagged), PlainProduct()
    assert ours is not None
    contract.columns = ours.columns
    p, q = (
        Operand(o.x.to(device), o.scale.to(device), None if o.tag is None else o.tag.to(device))
        for o in operands(n, k, 10.0, tagged, n, d, ours.columns)
    )
    found, expected = [], []
    for product, results in ((ours, found), (contract, expected)):
        e = torch.full((n, -(-k // 16) * 16), torch.nan, dtype=torch.bfloat16, device=device)[:, :k]
        sums = torch.full((n, -(-k // ours.columns)), torch.nan, device=device)
        product(p, q, 10.0 * LOG2E, e, sums)
        results += [e.double(), sums.double()]
    torch.testing.assert_close(found[0], expected[0], rtol=2**-7, atol=0)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=0)
