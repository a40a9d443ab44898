"""The result of an experiment, and its table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class Check:
    """A measured number and its expected value."""

    what: str
    measured: float
    expected: float
    tolerance: float = 0.0
    """Largest absolute difference at which the two agree."""
    relation: Literal["=", "<", ">"] = "="
    """``"<"``: ``expected`` is an upper bound; ``">"``: a lower bound."""
    printed: str = ""
    """The value that the paper prints, if it differs."""

    @property
    def agrees(self) -> bool:
        """Whether the relation holds up to the tolerance; NaN agrees with nothing."""
        if self.relation == "<":
            return self.measured <= self.expected + self.tolerance
        if self.relation == ">":
            return self.measured >= self.expected - self.tolerance
        return abs(self.measured - self.expected) <= self.tolerance


@dataclass(frozen=True)
class Result:
    """An experiment's numbers and its picture."""

    claim: str
    checks: Sequence[Check]
    draw: Callable[[Path], None]
    """Writes the picture to a PNG file."""

    @property
    def agrees(self) -> bool:
        """Whether every check agrees."""
        return all(check.agrees for check in self.checks)


def table(result: Result) -> str:
    """The checks as a text table, followed by the verdict."""
    printed = any(check.printed for check in result.checks)
    head = ["", *(["printed"] if printed else []), "measured", "closed form", "difference", "allowed", ""]
    rows = [head]
    for check in result.checks:
        equal = check.relation == "="
        bound = {"=": "", "<": "at most ", ">": "at least "}[check.relation]
        rows.append(
            [
                check.what,
                *([check.printed] if printed else []),
                f"{check.measured:.6g}",
                f"{bound}{check.expected:.6g}",
                f"{abs(check.measured - check.expected):.1e}" if equal else "",
                f"{check.tolerance:.0e}" if equal else "",
                "" if check.agrees else "DIFFERS",
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    texts = 2 if printed else 1  # number of text columns, aligned left
    lines = [
        "  ".join(c.ljust(w) if i < texts else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    wrong = sum(not check.agrees for check in result.checks)
    verdict = "agrees" if not wrong else f"differs: {wrong} of {len(result.checks)} beyond what is allowed"
    return "\n".join(line.rstrip() for line in [result.claim, "", *lines, "", verdict])


def bar(items: Sequence[Item], what: str, progress: bool) -> Iterable[Item]:
    """The items, with a progress bar if asked for."""
    if not progress:
        return items
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError('progress bars need tqdm: pip install "nckernels[lab]"') from error
    shown: Iterable[Item] = tqdm(items, desc=what, leave=False)
    return shown
