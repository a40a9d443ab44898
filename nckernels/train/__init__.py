"""A thin trainer around the losses: ``python -m nckernels train``, ``evaluate``, ``recipes``, ``sweep``, ``report``.

A :class:`Recipe` has all settings of a run, and :func:`fit` is the only training loop. ``pip install
"nckernels[train]"`` installs what is needed besides torch.
"""

from .engine import Run, fit
from .history import History
from .recipe import Recipe
from .recipes import load as load_recipe

__all__ = ["History", "Recipe", "Run", "fit", "load_recipe"]
