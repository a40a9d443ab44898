"""Colours, for light and dark pages, and the style sheet."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources

from nckernels import _palette

from .rows import Row

COLOURS = {
    "paper": ("#ffffff", "#15171b"),
    "ink": (_palette.INK, "#e4e5e7"),
    "muted": ("#666666", "#a0a4ab"),
    "line": (_palette.GRID, "#34383f"),
    "ce": (_palette.GREY, "#c8c8c8"),
    "normface": (_palette.ORANGE, "#f2b73c"),
    "ntce": (_palette.BLUE, "#57b1ec"),
    "nonl": (_palette.PINK, "#f2709f"),
    "scl": (_palette.GREEN, "#38c99d"),
    "etf-dr": ("#7c4dbd", "#b494ee"),
    "prototype": ("#8a5a2b", "#cc9d68"),
    "dlp": ("#5c8a00", "#a6cc4e"),
    "psc-star": ("#0097a7", "#56d3e0"),
    "bce": ("#a8323e", "#e8808a"),
}
"""CSS variables with light and dark colours. Drawings use the light ones; :func:`themed` inserts the variables."""
LOSSES = tuple(COLOURS)[4:]
COLD, WARM = "#2b7bba", "#e0662b"
"""The ends of the diverging colours, blue and orange, which colour-blind readers can distinguish."""


def colour_names(rows: Sequence[Row]) -> list[str]:
    """A colour for each row: that of its loss, or any other if several rows have the same loss."""
    losses = [row.loss if row.loss in LOSSES else "" for row in rows]
    if len(set(losses)) == len(rows) and "" not in losses:
        return losses
    free = ("ntce", "normface", "nonl", "scl", "ce", "etf-dr", "dlp", "psc-star", "prototype", "bce")
    return [free[i % len(free)] for i in range(len(rows))]


def themed(text: str) -> str:
    """A drawing with its light colours replaced by the page's variables."""
    for name, (light, _) in COLOURS.items():
        text = text.replace(light, f"var(--{name})")
    return text


def style_sheet() -> str:
    light, dark = (" ".join(f"--{name}: {pair[i]};" for name, pair in COLOURS.items()) for i in (0, 1))
    rules = resources.files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    return (
        f":root {{ {light} --cold: {COLD}; --warm: {WARM}; }}\n"
        f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n{rules}"
    )
