"""python -m benchmarks compare OLD.json NEW.json: find variants that became slower or take more memory.

A variant became slower if its median grew by more than --tolerance and the quartiles of the two runs do not
overlap. Times are compared relative to the bare GEMMs of the same rounds, which corrects for the load of the machine;
--absolute compares seconds. Exits with 1 if a variant of this package is slower, takes more memory, or
fails where it ran before; with 2 if the reports cannot be compared. Rivals are printed with --all, and never fail.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from .harness import Result
from .measure import Summary
from .report import Report, load, mebibytes

_SLACK = 1 << 20
"""Differences of memory below this number of bytes are ignored."""


@dataclass(frozen=True)
class Finding:
    """One variant on one problem, in both reports."""

    label: str
    text: str
    regression: bool


def main(argv: list[str]) -> int:
    """Print findings; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.05, help="accepted growth of the median: 0.05")
    parser.add_argument("--absolute", action="store_true", help="compare seconds, not ratios to the bare GEMMs")
    parser.add_argument("--all", action="store_true", help="print rivals too")
    args = parser.parse_args(argv)
    old, new = load(args.old), load(args.new)
    if (reason := incomparable(old, new)) is not None:
        print(f"cannot compare: {reason}")
        return 2
    findings = compare(old, new, args.tolerance, absolute=args.absolute, everything=args.all)
    for finding in findings:
        print(f"{'REGRESSION' if finding.regression else 'ok':<10}  {finding.label:<60} {finding.text}")
    if not findings:
        print("cannot compare: the reports have no variant of this package on the same problem")
        return 2
    bad = sum(f.regression for f in findings)
    print(f"{bad} regressions among {len(findings)}")
    return 1 if bad else 0


def incomparable(old: Report, new: Report) -> str | None:
    """Why the two reports do not measure the same thing, or None."""
    for key in ("device", "threads"):
        if old.machine.get(key) != new.machine.get(key):
            return f"{key} {old.machine.get(key)!r} and {new.machine.get(key)!r}"
    return None if old.dtype == new.dtype else f"dtype {old.dtype} and {new.dtype}"


def compare(
    old: Report, new: Report, tolerance: float, *, absolute: bool = False, everything: bool = False
) -> list[Finding]:
    """Variants that both reports have, and those of the old report that fail in the new one."""
    before = {(m.problem, r.variant): r for m in old.measured for r in m.results}
    findings = []
    for measured in new.measured:
        for r in measured.results:
            was = before.get((measured.problem, r.variant))
            if was is None or was.seconds is None or not (r.ours or everything):
                continue
            finding = _judge(f"{measured.problem}, {r.variant}", was, r, tolerance, absolute)
            findings.append(finding if r.ours else Finding(finding.label, finding.text, False))
    for measured in old.measured:  # a problem that fails as a whole has only a note
        notes = [note for note in new.notes if note.startswith(f"not run: {measured.problem}:")]
        if any(r.ours and r.seconds is not None for r in measured.results):
            findings += [Finding(str(measured.problem), f"ran before, now {note}", True) for note in notes]
    return findings


def _judge(label: str, was: Result, now: Result, tolerance: float, absolute: bool) -> Finding:
    if now.seconds is None:
        return Finding(label, f"ran before, now absent: {now.absent}", True)
    a, b, unit = was.seconds, now.seconds, "s"
    if not absolute and was.to_gemm is not None and now.to_gemm is not None:
        a, b, unit = was.to_gemm, now.to_gemm, "x GEMMs"
    assert a is not None
    slow = slower(a, b, tolerance)
    text = f"{a.median:.4g} -> {b.median:.4g} {unit} ({b.median / a.median - 1:+.1%})"
    if was.extra_bytes is not None and now.extra_bytes is not None:
        large = now.extra_bytes > was.extra_bytes * (1 + tolerance) + _SLACK
        text += f", {mebibytes(was.extra_bytes)} -> {mebibytes(now.extra_bytes)} MiB"
        return Finding(label, text, slow or large)
    return Finding(label, text, slow)


def slower(a: Summary, b: Summary, tolerance: float) -> bool:
    """Whether the median grew by more than ``tolerance`` and the quartile ranges do not overlap."""
    return b.median > a.median * (1 + tolerance) and b.low > a.high
