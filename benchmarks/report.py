"""A run as JSON for programs and as a table for people."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import platform
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .harness import GEMM, YARDSTICKS, Measured, Result
from .measure import Ceilings, Summary
from .problems import Problem, Work

FORMAT = 2
_LIBRARIES = (
    "torch", "triton", "numpy", "nckernels", "liger-kernel", "cut-cross-entropy", "quack-kernels", "inf-cl",
    "pytorch-metric-learning", "torchvision", "timm",
)  # fmt: skip


@dataclass
class Report:
    """All results of a run, with machine, versions, commit and date."""

    suite: str
    dtype: str
    command: str
    machine: dict[str, Any]
    ceilings: Ceilings | None
    measured: list[Measured] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    commit: str = ""
    date: str = ""
    notes: list[str] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1) + "\n")


def load(path: Path) -> Report:
    """Read a file of :meth:`Report.save`."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path} is no report of python -m benchmarks: {error}") from error
    try:
        if data.pop("format", None) != FORMAT:
            raise KeyError("format")
        data["ceilings"] = data["ceilings"] and Ceilings(**data["ceilings"])
        data["measured"] = [_measured(m) for m in data["measured"]]
        return Report(**data)
    except (AttributeError, KeyError, TypeError) as error:
        advice = "take it again with python -m benchmarks --out DIR"
        raise SystemExit(f"{path} is no report in format {FORMAT}: {advice}") from error


def _measured(data: dict[str, Any]) -> Measured:
    results = []
    for r in data["results"]:
        summaries = {key: r[key] and Summary(**r[key]) for key in ("seconds", "to_gemm", "to_baseline")}
        results.append(Result(**{**r, **summaries}))
    work = data["work"] and Work(**data["work"])
    options = tuple((name, value) for name, value in data["problem"].pop("options", ()))
    return Measured(Problem(**data["problem"], options=options), work, results, data["baseline"], data["checked_on"])


def start(suite: str, device: torch.device, dtype: str, command: str, ceilings: Ceilings | None) -> Report:
    """An empty report about this machine, now."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in _LIBRARIES[1:]:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    machine: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "type": device.type,
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        machine["capability"] = f"{major}.{minor}"
        machine["memory"] = torch.cuda.get_device_properties(device).total_memory
        machine["float32 products"] = torch.backends.cuda.matmul.fp32_precision
    else:
        machine["instructions"] = torch.backends.cpu.get_cpu_capability()
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return Report(suite, dtype, command, machine, ceilings, versions=versions, commit=commit(), date=date)


def heading(report: Report) -> str:
    """Machine, versions and ceilings in two lines."""
    machine, versions = report.machine, report.versions
    text = f"{machine['device']}, {machine['threads']} threads, {report.dtype}, torch {versions.get('torch')}, "
    text += f"commit {report.commit}, {report.date}"
    if (c := report.ceilings) is not None:
        exp = "" if c.exp is None else f", {c.exp / 1e9:.1f} G exponentials/s"
        text += f"\nceilings: {c.gemm / 1e12:.3g} TFLOP/s in a product, {c.copy / 1e9:.3g} GB/s in a copy{exp}"
    return text


def table(report: Report, *, absent: bool = True) -> str:
    """One block per problem: median and quartiles, ratios, shares of the ceilings, memory, error, samples.

    "% floor" is the largest of the shares of product, copy and exponentials; "% twice" the same if the matrix is
    recomputed in the backward pass, as bounded memory requires.
    """
    lines: list[str] = []
    for measured in report.measured:
        lines += ["", f"{measured.problem}{_rate(measured)}"]
        lines.append(
            f"  {'variant':<34} {'median':>9} {'quartiles':>17} {'/ GEMMs':>8} {'/ base':>7} "
            f"{'% GEMM':>7} {'% copy':>7} {'% floor':>8} {'% twice':>8} "
            f"{'extra MiB':>10} {'error':>8} {'runs':>5}"
        )
        reasons: dict[str, list[str]] = {}
        for r in measured.results:
            if r.absent is None and r.seconds is not None:
                lines.append("  " + _row(r, measured, report.ceilings))
            else:
                reasons.setdefault(r.absent or "", []).append(r.variant)
        if absent:
            lines += [f"  absent: {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    return "\n".join(lines)


def _row(r: Result, measured: Measured, ceilings: Ceilings | None) -> str:
    assert r.seconds is not None
    shares: list[float | None] = [None] * 4
    if ceilings is not None and measured.work is not None and r.variant not in YARDSTICKS:
        gemm, copy = (measured.work.flops / ceilings.gemm, measured.work.bytes / ceilings.copy)
        floors = (measured.share(r, ceilings), measured.share(r, ceilings, again=True))
        shares = [gemm / r.seconds.median, copy / r.seconds.median, *floors]
    parts = ["" if s is None else f"{100 * s:.1f}" for s in shares]
    quartiles = f"{duration(r.seconds.low)}-{duration(r.seconds.high)}"
    cells = (
        f"{r.variant:<34} {duration(r.seconds.median):>9} {quartiles:>17}",
        f"{_ratio(r.to_gemm):>8} {_ratio(r.to_baseline):>7}",
        f"{parts[0]:>7} {parts[1]:>7} {parts[2]:>8} {parts[3]:>8} {mebibytes(r.extra_bytes):>10}",
        f"{'' if r.error is None else f'{r.error:.0e}':>8} {r.seconds.count:>5}",
    )
    return " ".join(cells)


def _rate(measured: Measured) -> str:
    gemm = next((r.seconds for r in measured.results if r.variant == GEMM), None)
    p = measured.problem
    if measured.work is None or gemm is None:
        return f"   ({measured.checked_on})"
    flops = (4 if p.with_itself else 6) * p.m * p.columns * p.d
    return f"   ({flops / gemm.median / 1e9:.0f} GFLOP/s in its bare GEMMs; checked on {measured.checked_on})"


def duration(seconds: float) -> str:
    """Seconds as text with a unit and three digits."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * scale >= 1 or unit == "us":
            return f"{seconds * scale:.3g}{unit}"
    raise AssertionError


def mebibytes(count: int | None) -> str:
    """Bytes as text in MiB."""
    return "" if count is None else f"{count / 2**20:.1f}"


def _ratio(value: Summary | None) -> str:
    return "" if value is None else f"{value.median:.2f}"


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def commit() -> str:
    try:
        command = ["git", "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
