"""A thin trainer around the losses: ``python -m nckernels train``, ``evaluate``, ``recipes``, ``sweep``, ``report``.

A :class:`Recipe` has all settings of a run, :func:`fit` is the only training loop. Needs ``pip install
"nckernels[train]"`` besides torch.
"""

from .engine import Run, fit
from .history import History
from .recipe import Recipe
from .recipes import load as load_recipe

__all__ = ["History", "Recipe", "Run", "fit", "load_recipe"]
