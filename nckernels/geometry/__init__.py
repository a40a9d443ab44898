"""Point sets on the unit sphere: those that the losses are designed to reach, and uniform ones for any K and d."""

from .frames import cross_polytope, orthogonal_frame, shifted_simplex_etf, simplex_etf
from .quality import PrototypeQuality, prototype_quality
from .uniform import uniform_prototypes

__all__ = [
    "PrototypeQuality",
    "cross_polytope",
    "orthogonal_frame",
    "prototype_quality",
    "shifted_simplex_etf",
    "simplex_etf",
    "uniform_prototypes",
]
