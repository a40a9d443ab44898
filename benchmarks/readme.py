"""python -m benchmarks readme: write the tables of README.md and docs/performance.md from the reports that they name.

    <!-- speed table: begin benchmarks/results/a.json benchmarks/results/b.json -->
    (generated)
    <!-- speed table: end -->

A "speed summary" instead of a "speed table" has one row for each problem: the native backend beside the naive form,
eager and compiled. Edit the marker to name other reports. --check writes nothing and exits with 1 if a table does not
match its reports.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from .harness import GEMM, Measured, Result
from .measure import Summary
from .report import Report, load, mebibytes

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "performance.md")
_BLOCK = re.compile(r"(<!-- speed (table|summary): begin ([^>]+?) -->\n).*?(<!-- speed \2: end -->)", re.DOTALL)
OURS, EAGER, COMPILED = "nckernels native", "naive eager", "naive torch.compile"


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
        print(f"{path}: {'does not match its reports: run python -m benchmarks readme' if args.check else 'written'}")
        if not args.check:
            path.write_text(new)
    return int(args.check and stale > 0)


def regenerated(text: str, path: Path) -> str:
    """``text`` with regenerated tables between its markers."""
    if not _BLOCK.search(text):
        raise SystemExit(f"{path} has no '<!-- speed table: begin REPORT.json ... -->' with an end")
    makers = {"table": table, "summary": summary}
    return _BLOCK.sub(lambda m: m[1] + makers[m[2]]([ROOT / name for name in m[3].split()]) + m[4], text)


def table(reports: list[Path]) -> str:
    """A row per problem and variant. If several reports have a problem in one dtype, the first one is used."""
    lines = [
        "| problem | variant | time / bare GEMMs | time / naive (quartiles) | extra memory, MiB |",
        "|---|---|---|---|---|",
    ]
    loaded = [load(path) for path in reports]
    several = len({report.dtype for report in loaded}) > 1
    for dtype, measured in _problems(loaded):
        lines += _rows(measured, f"{measured.problem} {dtype}" if several else str(measured.problem))
    return "\n".join(lines) + "\n"


def summary(reports: list[Path]) -> str:
    """A row per problem that torch.compile was timed on, with the dtypes side by side."""
    rows: dict[str, dict[str, dict[str, Result]]] = {}
    for dtype, measured in _problems([load(path) for path in reports]):
        results = {r.variant: r for r in measured.results if r.seconds is not None}
        if {OURS, EAGER, COMPILED} <= set(results):
            rows.setdefault(str(measured.problem), {})[dtype] = results
    dtypes = list(dict.fromkeys(dtype for row in rows.values() for dtype in row))
    titles = ["problem"]
    for dtype in dtypes:
        titles += [f"{dtype}: time / naive", "torch.compile / naive", "extra MiB", "naive's MiB"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for problem, row in rows.items():
        cells = [problem]
        for dtype in dtypes:
            cells += _compared(row[dtype]) if dtype in row else [""] * 4
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _compared(results: dict[str, Result]) -> list[str]:
    """Times as parts of the naive form's, ours and torch.compile's; extra memory, ours and the naive form's."""
    ours, eager, compiled = (results[name] for name in (OURS, EAGER, COMPILED))
    times = ["" if r.to_baseline is None else f"{r.to_baseline.median:.2f}" for r in (ours, compiled)]
    return [*times, mebibytes(ours.extra_bytes), mebibytes(eager.extra_bytes)]


def _problems(reports: list[Report]) -> list[tuple[str, Measured]]:
    """Results with their dtypes. If several reports have a problem in one dtype, the first one is used."""
    found: dict[tuple[str, str], tuple[str, Measured]] = {}
    for report in reports:
        for measured in report.measured:
            found.setdefault((report.dtype, str(measured.problem)), (report.dtype, measured))
    return list(found.values())


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
