"""Uniform prototypes: closed forms, the optimiser against known optima, cache, memory, quality, Table 7."""

from __future__ import annotations

import math
import multiprocessing
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

import nckernels
from nckernels.geometry import prototype_quality, uniform, uniform_prototypes
from nckernels.geometry.dlp import dlp_recipe, dlp_table7, format_table7, plot

DOUBLE = torch.float64


def cosines(w: Tensor) -> Tensor:
    """The literal form over all pairs i < j."""
    u = w.double() / w.double().norm(dim=1, keepdim=True)
    first, second = torch.triu_indices(len(w), len(w), offset=1)
    return (u @ u.T)[first, second]


def optimised(num_classes: int, dim: int, seed: int = 0, steps: int = 500) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return uniform.minimise_uniformity(num_classes, dim, generator=generator, steps=steps)


# --- closed forms -----------------------------------------------------------------------------------------


def test_simplex_where_it_fits() -> None:
    for num_classes, dim in ((2, 1), (3, 2), (100, 99), (100, 100), (5, 40)):
        c = cosines(uniform_prototypes(num_classes, dim, dtype=DOUBLE))
        torch.testing.assert_close(c, torch.full_like(c, -1 / (num_classes - 1)), atol=1e-12, rtol=0)
    assert cosines(uniform_prototypes(100, 100)).max() <= -0.0100
    assert uniform_prototypes(1, 3, dtype=DOUBLE).norm().item() == pytest.approx(1.0, abs=1e-12)


def test_cross_polytope_where_k_is_2d() -> None:
    c = cosines(uniform_prototypes(100, 50))
    assert c.max() <= 0.005
    assert c.min() <= -0.99
    assert (c < -0.99).sum() == 50


def test_heptagon() -> None:
    w = uniform_prototypes(7, 2, dtype=DOUBLE)
    expected = torch.tensor([math.cos(2 * math.pi * k / 7) for k in range(1, 7)], dtype=DOUBLE)
    torch.testing.assert_close(w[1:] @ w[0], expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(w.sum(0), torch.zeros(2, dtype=DOUBLE), atol=1e-12, rtol=0)


def test_in_one_dimension_both_directions_in_turn() -> None:
    w = uniform_prototypes(5, 1)
    assert torch.equal(w, w[0] * torch.tensor([[1.0], [-1.0], [1.0], [-1.0], [1.0]]))


@pytest.mark.parametrize(("num_classes", "dim"), [(2, 5), (6, 3), (7, 2), (5, 1), (9, 3)])
def test_the_seed_fixes_every_bit(num_classes: int, dim: int) -> None:
    def draw(seed: int) -> Tensor:
        return uniform_prototypes(num_classes, dim, seed=seed, steps=20)

    assert torch.equal(draw(3), draw(3))
    assert any(not torch.allclose(draw(3), draw(seed), atol=0.01) for seed in range(5))


# --- the optimiser where the truth is known ---------------------------------------------------------------


@pytest.mark.parametrize(("num_classes", "dim"), [(4, 3), (8, 7), (8, 10), (40, 40)])
def test_optimiser_reaches_the_simplex(num_classes: int, dim: int) -> None:
    c = cosines(optimised(num_classes, dim))
    torch.testing.assert_close(c, torch.full_like(c, -1 / (num_classes - 1)), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("num_classes", "dim"), [(6, 3), (20, 10), (60, 30)])
def test_optimiser_reaches_the_cross_polytope(num_classes: int, dim: int) -> None:
    c = cosines(optimised(num_classes, dim)).sort().values
    expected = torch.cat([torch.full((dim,), -1.0, dtype=DOUBLE), torch.zeros(len(c) - dim, dtype=DOUBLE)])
    torch.testing.assert_close(c, expected, atol=1e-5, rtol=0)


def test_optimiser_reaches_the_icosahedron_and_the_polygon() -> None:
    """The package has no closed form for either; cosines of +-1/sqrt(5) and -1."""
    c = cosines(uniform_prototypes(12, 3, dtype=DOUBLE))
    assert c.max().item() == pytest.approx(1 / math.sqrt(5), abs=1e-5)
    assert c.min().item() == pytest.approx(-1.0, abs=1e-5)
    assert cosines(optimised(7, 2)).max().item() == pytest.approx(math.cos(2 * math.pi / 7), abs=1e-5)


def test_a_hundred_prototypes_in_ten_dimensions() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    with torch.inference_mode():  # which would forbid gradients
        w = uniform_prototypes(100, 10)
    assert w.dtype == torch.float32
    torch.testing.assert_close(w.norm(dim=1), torch.ones(100))
    assert cosines(w).max() <= 0.45
    assert torch.equal(before, torch.get_rng_state())  # the global generator is nobody's business


def test_a_larger_t_separates_more() -> None:
    two, twenty = (cosines(uniform_prototypes(30, 6, t, steps=100, dtype=DOUBLE)).max() for t in (2.0, 20.0))
    assert twenty < two - 0.02


def test_large_problems_run_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """And an autocast region around changes nothing."""
    assert optimised(30, 4, steps=5).dtype == DOUBLE
    monkeypatch.setattr(uniform, "DOUBLE_UP_TO", 0)
    w = optimised(60, 30)
    assert w.dtype == torch.float32
    assert cosines(w).max() < 0.01
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(optimised(60, 30), w)


# --- memory -----------------------------------------------------------------------------------------------

MIB = 2**20
MEASURE = """
import torch, nckernels
from nckernels.backends import native
from nckernels.geometry import prototype_quality, uniform_prototypes
def peak(call):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    now = most = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most
def naive():
    w = torch.randn(2000, 16, requires_grad=True)
    (w @ w.T).exp().sum().backward()
uniform_prototypes(20, 4, steps=2)
with nckernels.use_workspace(2**20):
    native.peak_scratch()
    print(peak(lambda: uniform_prototypes(2000, 16, steps=30)) + native.peak_scratch())
w = torch.randn(4000, 16)
print(peak(lambda: prototype_quality(w)))
print(peak(naive))
"""


def test_no_matrix_of_all_pairs_is_made() -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("NCKERNELS_")}
    environment["PYTHONPATH"] = str(Path(nckernels.__file__).resolve().parents[1])
    result = subprocess.run(
        [sys.executable, "-c", MEASURE], capture_output=True, text=True, env=environment, timeout=300, check=True
    )
    optimisation, quality, naive = (int(line) for line in result.stdout.split())
    rows = 2000 * 16 * 8
    assert optimisation <= MIB + 40 * rows, f"{optimisation / MIB:.1f} MiB"
    assert quality <= 6 * 8 * MIB, f"{quality / MIB:.1f} MiB"  # a few tiles; the matrix would be 122 MiB
    assert naive > 2000**2 * 4 > MIB + 40 * rows  # the method sees the matrix, and the bound is below it


# --- cache ------------------------------------------------------------------------------------------------


def kept(folder: Path) -> Path:
    (path,) = folder.iterdir()  # and nothing half-written beside it
    return path


def test_the_cache_serves_every_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "not" / "there"
    first = uniform_prototypes(20, 4, steps=20, cache=folder, dtype=DOUBLE)
    assert kept(folder).name == f"uniform-K20-d4-t2.0-seed0-steps20-v{uniform.RECIPE}.pt"
    with monkeypatch.context() as patch:
        patch.setattr(uniform, "minimise_uniformity", None)
        assert torch.equal(uniform_prototypes(20, 4, steps=20, cache=folder, dtype=DOUBLE), first)
        assert torch.equal(uniform_prototypes(20, 4, steps=20, cache=folder), first.float())
        for other in ({"seed": 1}, {"t": 3.0}, {"steps": 21}):
            with pytest.raises(TypeError):  # no other request is answered from it
                uniform_prototypes(20, 4, **{"steps": 20, **other}, cache=folder)  # type: ignore[arg-type]
    uniform_prototypes(3, 4, cache=folder)
    kept(folder)  # closed forms leave nothing


@pytest.mark.parametrize("damage", ["half", "empty", "text", "request", "rows", "shape"])
def test_a_damaged_cache_file_is_replaced(tmp_path: Path, damage: str) -> None:
    first = uniform_prototypes(20, 4, steps=20, cache=tmp_path)
    path = kept(tmp_path)
    whole = path.read_bytes()
    found = torch.load(path, weights_only=True)
    if damage in ("half", "empty", "text"):
        path.write_bytes({"half": whole[: len(whole) // 2], "empty": b"", "text": b"no prototypes"}[damage])
    elif damage == "request":
        torch.save({**found, "request": {**found["request"], "seed": 5}}, path)
    elif damage == "rows":
        torch.save({**found, "prototypes": found["prototypes"] * math.nan}, path)
    else:
        torch.save({**found, "prototypes": found["prototypes"][:-1]}, path)
    with pytest.warns(UserWarning, match="is recomputed"):
        again = uniform_prototypes(20, 4, steps=20, cache=tmp_path)
    assert torch.equal(again, first)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(uniform_prototypes(20, 4, steps=20, cache=kept(tmp_path).parent), first)


def die_while_writing(folder: Path) -> None:
    def half(content: object, file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        file.flush()  # type: ignore[attr-defined]
        os._exit(1)

    torch.save = half  # type: ignore[assignment]
    uniform_prototypes(20, 4, steps=5, cache=folder)


def test_a_process_that_dies_leaves_no_half_file(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=die_while_writing, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        uniform_prototypes(20, 4, steps=5, cache=tmp_path)
    assert len(list(tmp_path.glob("uniform-*.pt"))) == 1


def test_a_full_disk_loses_only_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.warns(UserWarning, match="could not be cached.*No space left"):
        w = uniform_prototypes(20, 4, steps=5, cache=tmp_path)
    assert w.shape == (20, 4)
    assert list(tmp_path.iterdir()) == []


# --- arguments --------------------------------------------------------------------------------------------


def test_errors_name_the_argument() -> None:
    for t in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="t must be positive and finite"):
            uniform_prototypes(5, 9, t)
    for options in ({"steps": 0}, {"seed": -1}, {"seed": 2**63}):
        with pytest.raises(ValueError, match=next(iter(options))):
            uniform_prototypes(9, 3, **options)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="seed must be an int"):
        uniform_prototypes(9, 3, seed=1.0)  # type: ignore[arg-type]
    for dtype in (torch.int32, "float32"):
        with pytest.raises(TypeError, match="dtype: expected a floating-point dtype, got"):
            uniform_prototypes(9, 3, dtype=dtype)  # type: ignore[arg-type]
    for sizes in ((0, 3), (3, 0)):
        with pytest.raises(ValueError, match=r"(num_classes|dim): expected"):
            uniform_prototypes(*sizes)


def test_progress_shows_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    uniform_prototypes(20, 4, steps=5)
    assert capsys.readouterr().err == ""
    uniform_prototypes(20, 4, steps=5, progress=True)
    assert "loss" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match=r"nckernels\[lab\]"):
        uniform_prototypes(20, 4, steps=5, progress=True)


# --- quality ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_classes", [2, 5, 33, 32, 97])
def test_quality_equals_the_literal_form(num_classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 32: a single one, full ones, ragged ones, and one with a single row, which has no pairs."""
    from nckernels.geometry import quality

    monkeypatch.setattr(quality, "_TILE", 32)
    w = torch.randn(num_classes, 5, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    w *= torch.logspace(-200, 200, num_classes, dtype=DOUBLE)[:, None]
    c = cosines(w / w.abs().amax(1, keepdim=True))
    q = prototype_quality(w, t=3.0)
    assert q.max_cosine == pytest.approx(c.max().item(), abs=1e-14)
    assert q.min_cosine == pytest.approx(c.min().item(), abs=1e-14)
    assert q.mean_cosine == pytest.approx(c.mean().item(), abs=1e-13)
    assert q.uniformity == pytest.approx((-3.0 * (2.0 - 2.0 * c)).exp().mean().log().item(), abs=1e-12)
    assert q.separation == pytest.approx(math.degrees(math.acos(c.max().item())), abs=1e-9)


def test_quality_of_the_loss_and_of_coinciding_rows() -> None:
    w = torch.randn(50, 8, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
    assert prototype_quality(w).uniformity == pytest.approx(nckernels.uniformity_loss(w).item(), abs=1e-12)
    w[7] = 3.0 * w[31]
    assert prototype_quality(w).separation < 1e-12
    assert prototype_quality(torch.tensor([[1.0, 0.0], [1.0, 1e-7]])).separation == pytest.approx(
        math.degrees(1e-7), rel=1e-6
    )
    assert prototype_quality(torch.tensor([[1.0], [-2.0]])).separation == 180.0
    assert prototype_quality(w, t=1e4).uniformity == pytest.approx(-math.log(50 * 49 / 2), abs=1e-6)


def test_quality_of_one_and_of_bad_rows() -> None:
    q = prototype_quality(torch.ones(1, 3))
    assert all(math.isnan(v) for v in (q.max_cosine, q.min_cosine, q.mean_cosine, q.uniformity, q.separation))
    w = torch.ones(4, 3)
    w[2] = 0.0
    with pytest.raises(ValueError, match="prototypes: every row must not be zero, row 2"):
        prototype_quality(w)
    w[2, 1] = math.nan
    with pytest.raises(ValueError, match="prototypes: every row must be finite, row 2"):
        prototype_quality(w)
    with pytest.raises(ValueError, match="prototypes must have K >= 1 rows"):
        prototype_quality(torch.ones(0, 3))
    with pytest.raises(ValueError, match="t must be positive"):
        prototype_quality(torch.ones(2, 3), t=0.0)


# --- [DLP] Table 7 ----------------------------------------------------------------------------------------


def test_table7_and_its_picture(tmp_path: Path) -> None:
    rows = dlp_table7((100, 50), iterations=300)
    for row, ours in zip(rows, (-0.0100, 0.005), strict=True):
        q = row.qualities()
        assert q["ours"].max_cosine <= ours < 0.15 < q["recipe"].max_cosine < q["random"].max_cosine
    text = format_table7(rows)
    assert "| 50 | paper, printed | 0.01 | -1 |" in text
    assert len(text.splitlines()) == 2 + 2 * 4
    plot(rows, tmp_path / "table7.png")
    assert (tmp_path / "table7.png").stat().st_size > 20_000


def test_the_recipe_is_one_step_of_eq_5() -> None:
    w = torch.nn.functional.normalize(torch.randn(6, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(2)))
    kernel = (-2.0 * (2.0 - 2.0 * w @ w.T)).exp()  # pairs of one included
    gradient = 8.0 * kernel / kernel.sum() @ w  # in w_i, of both places, as inner products
    step = w - 0.1 * (gradient - 8.0 * (kernel / kernel.sum()).sum(1, keepdim=True) * w)
    expected = step / step.norm(dim=1, keepdim=True)
    torch.testing.assert_close(dlp_recipe(w, iterations=1), expected, atol=1e-12, rtol=0)
