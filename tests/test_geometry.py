"""Simplices, orthogonal frames, shifted simplices and cross-polytopes against their definitions."""

from __future__ import annotations

import math

import pytest
import torch

from nckernels.geometry import cross_polytope, orthogonal_frame, shifted_simplex_etf, simplex_etf


@pytest.mark.parametrize(
    ("num_classes", "dim"), [(2, 1), (2, 5), (3, 2), (10, 9), (10, 10), (10, 64), (100, 99), (257, 300)]
)
def test_unit_rows_equal_angles_zero_sum(num_classes: int, dim: int) -> None:
    w = simplex_etf(num_classes, dim, dtype=torch.float64)
    gram = torch.full((num_classes, num_classes), -1 / (num_classes - 1), dtype=torch.float64)
    gram.fill_diagonal_(1.0)
    assert w.shape == (num_classes, dim)
    torch.testing.assert_close(w @ w.T, gram, atol=1e-12, rtol=0)
    torch.testing.assert_close(w.sum(0), torch.zeros(dim, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("dim", [1, 7])
def test_one_class_is_a_direction(dim: int) -> None:
    w = simplex_etf(1, dim, dtype=torch.float64)
    assert w.shape == (1, dim)
    assert w.norm().item() == pytest.approx(1.0, abs=1e-12)


def test_seed_fixes_the_orientation() -> None:
    def draw(seed: int) -> torch.Tensor:
        return simplex_etf(5, 8, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(0), draw(0))
    assert not torch.allclose(draw(0), draw(1))
    assert draw(0).dtype == torch.get_default_dtype()


def test_orientation_is_uniform() -> None:
    # The mean of a uniform direction is zero; a QR without the sign fix is biased along the first axis.
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([simplex_etf(2, 3, generator=generator, dtype=torch.float64)[0] for _ in range(4000)])
    assert draws.mean(0).abs().max().item() < 0.05
    torch.testing.assert_close(draws.T @ draws / 4000, torch.eye(3, dtype=torch.float64) / 3, atol=0.03, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_the_rounded_frame(dtype: torch.dtype) -> None:
    def draw(dtype: torch.dtype) -> torch.Tensor:
        return simplex_etf(4, 6, generator=torch.Generator().manual_seed(3), dtype=dtype)

    assert torch.equal(draw(dtype), draw(torch.float64).to(dtype))


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match=r"dim: .*at least 9 dimensions, got 8"):
        simplex_etf(10, 8)
    with pytest.raises(ValueError, match="num_classes: expected at least 1, got 0"):
        simplex_etf(0, 8)
    with pytest.raises(ValueError, match="dim"):
        simplex_etf(1, 0)
    with pytest.raises(TypeError, match="dtype"):
        simplex_etf(3, 8, dtype=torch.int64)


# --- orthogonal frames, shifted simplices, cross-polytopes ------------------------------------------------


@pytest.mark.parametrize(("num_classes", "dim"), [(1, 1), (2, 2), (5, 9), (64, 64)])
def test_orthogonal_frame_has_orthonormal_rows(num_classes: int, dim: int) -> None:
    w = orthogonal_frame(num_classes, dim, dtype=torch.float64)
    assert w.shape == (num_classes, dim)
    torch.testing.assert_close(w @ w.T, torch.eye(num_classes, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("beta", [-0.7, 0.0, 0.3, 1.0, 1.7, 2.0])
@pytest.mark.parametrize(("num_classes", "dim"), [(1, 1), (2, 2), (4, 4), (7, 12)])
def test_shifted_simplex_is_the_definition(num_classes: int, dim: int, beta: float) -> None:
    """M'M of alpha P (I - beta 11'/K), multiplied out literally; centred, it is the simplex of the same alpha."""
    w = shifted_simplex_etf(num_classes, dim, 1.5, beta, dtype=torch.float64)
    ones = torch.full((num_classes, num_classes), 1 / num_classes, dtype=torch.float64)
    eye = torch.eye(num_classes, dtype=torch.float64)
    shift = 1.5 * (eye - beta * ones)
    assert w.shape == (num_classes, dim)
    torch.testing.assert_close(w @ w.T, shift.T @ shift, atol=1e-12, rtol=0)
    centred = w - w.mean(0)
    torch.testing.assert_close(centred @ centred.T, 2.25 * (eye - ones), atol=1e-12, rtol=0)


def test_a_seed_gives_one_p_whatever_alpha_and_beta() -> None:
    def draw(alpha: float, beta: float) -> torch.Tensor:
        return shifted_simplex_etf(5, 6, alpha, beta, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    p = draw(1.0, 0.0)
    torch.testing.assert_close(p @ p.T, torch.eye(5, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(draw(2.0, 1.0), 2.0 * (p - p.mean(0)), atol=1e-12, rtol=0)
    torch.testing.assert_close(draw(0.5, 3.0), 0.5 * (p - 3.0 * p.mean(0)), atol=1e-12, rtol=0)


@pytest.mark.parametrize("num_classes", [2, 3, 10, 100])
def test_shifted_simplex_without_shift_fits_into_one_dimension_less(num_classes: int) -> None:
    w = shifted_simplex_etf(num_classes, num_classes - 1, math.sqrt(num_classes / (num_classes - 1)), 1.0)
    quality = torch.full((num_classes, num_classes), -1 / (num_classes - 1)).fill_diagonal_(1.0)
    torch.testing.assert_close(w @ w.T, quality, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dim", [1, 2, 3, 50])
def test_cross_polytope(dim: int) -> None:
    w = cross_polytope(2 * dim, dim, dtype=torch.float64)
    eye = torch.eye(dim, dtype=torch.float64)
    gram = torch.cat([torch.cat([eye, -eye], 1), torch.cat([-eye, eye], 1)])
    torch.testing.assert_close(w @ w.T, gram, atol=1e-12, rtol=0)


def test_frames_are_rotated_by_the_seed() -> None:
    def draw(seed: int) -> list[torch.Tensor]:
        g = torch.Generator().manual_seed(seed)
        return [
            orthogonal_frame(3, 4, generator=g),
            shifted_simplex_etf(3, 4, generator=g),
            cross_polytope(8, 4, generator=g),
        ]

    for same, again, other in zip(draw(0), draw(0), draw(1), strict=True):
        assert torch.equal(same, again)
        assert (same - other).abs().max() > 0.1


def test_errors_of_frames_name_the_argument() -> None:
    with pytest.raises(ValueError, match="dim: 5 orthogonal vectors need at least 5 dimensions, got 4"):
        orthogonal_frame(5, 4)
    with pytest.raises(ValueError, match=r"dim: 5 vectors with beta=0.5 need at least 5 dimensions \(beta=1 .*got 4"):
        shifted_simplex_etf(5, 4, 1.0, 0.5)
    with pytest.raises(ValueError, match=r"dim: 5 vectors with beta=1 need at least 4 dimensions, got 3"):
        shifted_simplex_etf(5, 3)
    for num_classes in (7, 9):
        with pytest.raises(ValueError, match="dim: a cross-polytope has 2d vectors"):
            cross_polytope(num_classes, 4)
    with pytest.raises(ValueError, match=r"dim = num_classes / 2 = 3, got 4"):
        cross_polytope(6, 4)
    for alpha in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="alpha must be positive and finite"):
            shifted_simplex_etf(3, 4, alpha)
    with pytest.raises(ValueError, match="beta must be finite"):
        shifted_simplex_etf(3, 4, 1.0, math.nan)
    for frame in (orthogonal_frame, shifted_simplex_etf, cross_polytope):
        with pytest.raises(ValueError, match="num_classes: expected at least 1, got 0"):
            frame(0, 4)
        with pytest.raises(ValueError, match="dim: expected at least 1, got 0"):
            frame(1, 0)
        with pytest.raises(TypeError, match="num_classes must be an int"):
            frame(2.0, 4)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="dtype"):
            frame(2, 1 if frame is cross_polytope else 2, dtype=torch.int64)
