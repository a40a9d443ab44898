"""Claims made of comparisons, and the words for what came of them."""

from __future__ import annotations

from dataclasses import dataclass

HELD, REVERSED, UNDECIDED, NOT_RUN = "holds", "reversed", "undecided", "not run"
PARTLY, MIXED, FAILED = "holds in part", "mixed", "does not hold"
RULES = {
    HELD: "all comparisons count, as claimed",
    PARTLY: "some count as claimed, none the other way round",
    MIXED: "some count as claimed, some the other way round",
    FAILED: "some count the other way round, none as claimed",
    UNDECIDED: "none counts",
}
LISTED = 6
"""So many comparisons are listed; of more only those that do not hold."""


@dataclass(frozen=True)
class Part:
    """One comparison."""

    what: str
    outcome: str
    """HELD, REVERSED, UNDECIDED or NOT_RUN."""
    size: str = ""

    def __str__(self) -> str:
        return f"{self.what} {self.size}".strip()


@dataclass(frozen=True)
class Claim:
    """One row of the table of verdicts."""

    source: str
    statement: str
    parts: tuple[Part, ...]
    unit: str = ""
    """Of the sizes."""
    needed: int | None = None
    """The claim is that at least so many of the parts hold. None: all of them."""

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
        """What was found."""
        if self.verdict == NOT_RUN:
            return "Not run."
        unit = f"; {self.unit}" if self.unit else ""
        if len(self.parts) <= LISTED:
            notes = {HELD: "", REVERSED: " (reversed)", UNDECIDED: " (undecided)", NOT_RUN: " (not run)"}
            return ", ".join(f"{part}{notes[part.outcome]}" for part in self.parts) + f"{unit}."
        found = [f"{len(self.of(HELD))} of {len(self.parts)} comparisons hold"]
        for outcome in (REVERSED, UNDECIDED, NOT_RUN):
            if parts := self.of(outcome):
                found.append(f"{outcome}: " + ", ".join(map(str, parts)))
        return "; ".join(found) + f"{unit}."
