"""A thin trainer that shows the losses at work: ``python -m nckernels train`` and ``... demo``.

Needs tqdm, scikit-learn (for the digits) and matplotlib (for the glyphs and the plots) besides torch.
"""

from . import glyphs
from .trainer import History, Run, TrainConfig, fit

__all__ = ["History", "Run", "TrainConfig", "fit", "glyphs"]
