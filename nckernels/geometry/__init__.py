"""Point sets on the unit sphere that the losses are designed to reach."""

from .frames import simplex_etf

__all__ = ["simplex_etf"]
