"""Unconstrained features models: a loss minimised over free features and prototypes, with no network in between.

They show the geometry that a loss favours if the network can realise any features. :func:`minimum` and :func:`solve`
are for the losses on unit vectors ([NCD] Theorem A.1, Theorem 4.2), :func:`mse_optimum` and :func:`solve_mse` for
squared error with a bias and any label encoding ([ENC]). Each solver starts from random numbers, does not use the
closed form, and returns it for comparison with the minimum that it found.
"""

from .cosine import LOSSES, Solution, minimum, solve
from .encodings import centred, label_smoothing, one_hot
from .mse import MSEOptimum, MSESolution, mse_optimum, solve_mse

__all__ = [
    "LOSSES",
    "MSEOptimum",
    "MSESolution",
    "Solution",
    "centred",
    "label_smoothing",
    "minimum",
    "mse_optimum",
    "one_hot",
    "solve",
    "solve_mse",
]
