"""Claims that consist of comparisons, and the verdicts on them."""

from __future__ import annotations

import math
from dataclasses import dataclass

HELD, REVERSED, UNDECIDED, NOT_RUN = "holds", "reversed", "undecided", "not run"
PARTLY, MIXED, FAILED = "holds in part", "mixed", "does not hold"
RULES = {
    HELD: "all comparisons count, as claimed",
    PARTLY: "some count as claimed, none against the claim",
    MIXED: "some count as claimed, some against the claim",
    FAILED: "some count against the claim, none as claimed",
    UNDECIDED: "none counts",
}


@dataclass(frozen=True)
class Part:
    """One comparison."""

    what: str
    outcome: str
    """HELD, REVERSED, UNDECIDED or NOT_RUN."""
    size: str = ""
    group: str = ""
    share: float = math.nan
    """The first value in per cent of the second; a group shows the range of these."""

    def __str__(self) -> str:
        return f"{self.what} {self.size}".strip()


@dataclass(frozen=True)
class Claim:
    """One row of the table of verdicts."""

    source: str
    statement: str
    parts: tuple[Part, ...]
    unit: str = "Points"
    """The unit of the sizes."""
    needed: int | None = None
    """How many parts must hold for the claim to hold; None: all."""
    counted: bool = False
    """Count the parts that hold, by group, instead of listing all parts."""

    def of(self, outcome: str) -> list[Part]:
        return [part for part in self.parts if part.outcome == outcome]

    @property
    def verdict(self) -> str:
        ran = len(self.parts) - len(self.of(NOT_RUN))
        held, against = len(self.of(HELD)), len(self.of(REVERSED))
        if not ran:
            return NOT_RUN
        if self.needed is not None:
            possible = len(self.parts) - against
            return HELD if held >= self.needed else FAILED if possible < self.needed else UNDECIDED
        if held and against:
            return MIXED
        if held:
            return HELD if held == len(self.parts) else PARTLY
        return FAILED if against else UNDECIDED

    def sentence(self) -> str:
        """The cell of the table that says what was found."""
        if self.verdict == NOT_RUN:
            return "Not run."
        groups: dict[str, list[Part]] = {}
        for part in self.parts:
            groups.setdefault(part.group, []).append(part)
        if not self.counted:
            return f"{self.unit}: " + "; ".join(_listed(name, parts) for name, parts in groups.items()) + "."
        found = "; ".join(_counted(name, parts) for name, parts in groups.items())
        return f"{len(self.of(HELD))} of {len(self.parts)} comparisons hold. {self.unit}: {found}."


def _listed(group: str, parts: list[Part]) -> str:
    notes = {HELD: "", REVERSED: " (reversed)", UNDECIDED: " (undecided)", NOT_RUN: " (not run)"}
    listed = ", ".join(f"{part}{notes[part.outcome]}" for part in parts)
    return f"{group}: {listed}" if group else listed


def _counted(group: str, parts: list[Part]) -> str:
    """How many parts of a group hold, and the outcome of the others."""
    by_outcome = {outcome: [p for p in parts if p.outcome == outcome] for outcome in (REVERSED, UNDECIDED, NOT_RUN)}
    held = [part for part in parts if part.outcome == HELD]
    shares = sorted(part.share for part in held if not math.isnan(part.share))
    notes = []
    if shares:
        low, high = f"{shares[0]:.0f}", f"{shares[-1]:.0f}"
        notes.append(f"{low} %" if low == high else f"{low} to {high} %")
    for outcome, those in by_outcome.items():
        sizes = {part.size for part in those}
        if len(those) == len(parts) and len(sizes) == 1:
            notes.append(f"all {outcome} {sizes.pop()}".strip())
        elif those:
            notes.append(f"{outcome}: " + ", ".join(map(str, those)))
    return f"{group}: {len(held)} of {len(parts)}" + (f" ({'; '.join(notes)})" if notes else "")
