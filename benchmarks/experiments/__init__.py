"""Tests the papers' claims on glyphs and writes docs/results.md.

``stages`` has the sweeps, ``afterwards`` the measurements on trained networks, ``collect`` puts all numbers into one
file, ``cli`` runs what is missing, and ``page`` writes the page.
"""
