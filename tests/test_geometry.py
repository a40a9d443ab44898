"""Simplex equiangular tight frames."""

from __future__ import annotations

import pytest
import torch

from nckernels.geometry import simplex_etf


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
