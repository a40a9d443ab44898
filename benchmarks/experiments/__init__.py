"""The papers' claims on the glyphs: what is trained, how it is collected, and the page about it.

``stages``: the sweeps. ``afterwards``: corrupted images and transfer, on trained networks. ``collect``: all numbers in
one file. ``cli``: runs what is missing of it.
"""
