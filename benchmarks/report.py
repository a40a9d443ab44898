"""Results as a table for people and as JSON for programs."""

from __future__ import annotations

import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from .harness import GEMM, Result, median


def machine(device: torch.device) -> dict[str, Any]:
    """Where and with what the figures were taken."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
    }


def table(results: list[Result]) -> str:
    """One block per problem: median, its ratio to the GEMMs and to the naive form, extra memory, samples."""
    lines: list[str] = []
    for problem in dict.fromkeys(r.problem for r in results):
        rows = [r for r in results if r.problem == problem]
        gemm = median(next(r for r in rows if r.variant == GEMM).seconds)
        lines += [
            "",
            f"{problem}   ({problem.gemm_flops / gemm / 1e9:.0f} GFLOP/s in the bare GEMMs)",
            f"  {'variant':<32} {'median':>10} {'/ GEMMs':>8} {'/ naive':>8} {'extra MiB':>10} {'runs':>5}",
        ]
        for r in rows:
            if r.absent is not None:
                lines.append(f"  {r.variant:<32} absent: {r.absent}")
                continue
            extra = "" if r.extra_bytes is None else f"{r.extra_bytes / 2**20:.1f}"
            lines.append(
                f"  {r.variant:<32} {_duration(median(r.seconds)):>10} {median(r.to_gemm):>8.2f} "
                f"{median(r.to_naive):>8.2f} {extra:>10} {len(r.seconds):>5}"
            )
    return "\n".join(lines)


def write_json(path: Path, results: list[Result], about: dict[str, Any]) -> None:
    """Everything that was measured."""
    rows = [{**vars(r), "problem": vars(r.problem)} for r in results]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**about, "results": rows}, indent=1) + "\n")


def _duration(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> str:
    try:
        command = ["git", "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
