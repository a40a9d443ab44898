"""A thin trainer that shows the losses at work: ``python -m nckernels train`` and ``... demo``.

Needs tqdm, scikit-learn (for the digits) and matplotlib (for the glyphs and the plots) besides torch.
"""
