"""Point sets on the unit sphere that the losses are designed to reach."""

from .frames import cross_polytope, orthogonal_frame, shifted_simplex_etf, simplex_etf

__all__ = ["cross_polytope", "orthogonal_frame", "shifted_simplex_etf", "simplex_etf"]
