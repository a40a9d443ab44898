"""The colours of the pictures and pages, the same for a loss wherever it is drawn."""

from __future__ import annotations

INK, MUTED, GRID = "#222222", "#8a8a8a", "#e6e6e6"
GREY, ORANGE, BLUE, PINK, GREEN = "#4d4d4d", "#e69f00", "#0072b2", "#d6336c", "#009e73"
LOSSES = {"ce": GREY, "normface": ORANGE, "ntce": BLUE, "nonl": PINK, "scl": GREEN}
