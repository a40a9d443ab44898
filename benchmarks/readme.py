"""python -m benchmarks readme: write the tables of README.md and docs/performance.md from the reports that they name.

    <!-- speed table: begin benchmarks/results/a.json benchmarks/results/b.json -->
    (generated)
    <!-- speed table: end -->

Edit the marker to name other reports. --check writes nothing and exits with 1 if a table is not what its reports say.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from .harness import GEMM, Measured
from .measure import Summary
from .report import load, mebibytes

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "performance.md")
_BLOCK = re.compile(r"(<!-- speed table: begin ([^>]+?) -->\n).*?(<!-- speed table: end -->)", re.DOTALL)


def main(argv: list[str]) -> int:
    """Rewrite or check; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks readme", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path, default=list(PAGES))
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(argv)
    stale = 0
    for path in args.files:
        text = path.read_text()
        new = regenerated(text, path)
        if new == text:
            continue
        stale += 1
        print(f"{path}: {'not what its reports say: run python -m benchmarks readme' if args.check else 'written'}")
        if not args.check:
            path.write_text(new)
    return int(args.check and stale > 0)


def regenerated(text: str, path: Path) -> str:
    """``text`` with the tables between its markers made anew."""
    if not _BLOCK.search(text):
        raise SystemExit(f"{path} has no '<!-- speed table: begin REPORT.json ... -->' with an end")
    return _BLOCK.sub(lambda m: m[1] + table([ROOT / name for name in m[2].split()]) + m[3], text)


def table(reports: list[Path]) -> str:
    """A row per problem and variant; a problem that several reports have in one dtype is taken from the first."""
    loaded = [load(path) for path in reports]
    several = len({report.dtype for report in loaded}) > 1
    lines = [
        "| problem | variant | time / bare GEMMs | time / naive (quartiles) | extra memory, MiB |",
        "|---|---|---|---|---|",
    ]
    seen: set[str] = set()
    for report in loaded:
        for measured in report.measured:
            label = f"{measured.problem} {report.dtype}" if several else str(measured.problem)
            if label not in seen:
                seen.add(label)
                lines += _rows(measured, label)
    return "\n".join(lines) + "\n"


def _rows(measured: Measured, label: str) -> list[str]:
    rows = []
    for r in measured.results:
        if r.seconds is None or r.variant == GEMM:
            continue
        name = f"**{r.variant}**" if r.ours else r.variant
        to_gemm = "" if r.to_gemm is None else f"{r.to_gemm.median:.2f}"
        rows.append(f"| {label} | {name} | {to_gemm} | {_spread(r.to_baseline)} | {mebibytes(r.extra_bytes)} |")
        label = ""
    return rows


def _spread(ratio: Summary | None) -> str:
    return "" if ratio is None else f"{ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f})"
