"""``python -m nckernels info``: prints what a bug report needs."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform

import torch

from . import __version__
from .backends import build, native, quack, registry

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def main(argv: list[str]) -> int:
    """Print the report; return the exit status."""
    argparse.ArgumentParser(
        prog="python -m nckernels info",
        description="Print versions, devices, settings and backends of this machine, for bug reports.",
    ).parse_args(argv)
    print(report())
    return 0


def report() -> str:
    """The text of the report. Backends that are compiled on first use are compiled for it."""
    devices = _devices()
    rows = [line for device in devices for dtype in DTYPES for line in _row(device, dtype)]
    sections = {
        "versions": [f"{name:<13} {version}" for name, version in _versions().items()],
        "devices": [f"{device!s:<10} {description}" for device, description in devices.items()],
        "settings": [
            f"backend    {registry.chosen() or 'automatic'}",
            *(f"workspace  {registry.get_workspace(device) / 2**20:.0f} MiB on {device}" for device in devices),
        ],
        "matrix product of a step (bfloat16; temperature a number of at least 0.025)": [
            f"{device!s:<6} {_product(device)}" for device in devices
        ],
        "native libraries (* marks the one in use)": _libraries(),
        "backends (* marks the one that runs)": rows,
    }
    return "\n".join(line for title, lines in sections.items() for line in (title, *(f"  {x}" for x in lines)))


def _product(device: torch.device) -> str:
    reason = quack.why_not(device)
    if reason is None:
        return "by quack-kernels, with the exponentials in its epilogue"
    return f"without quack-kernels: {reason}"


def _libraries() -> list[str]:
    mine, libraries = native.library(), (*build.cpu_libraries(), build.CUDA)
    rows = [f"{'*' if x == mine else ' '}{x.name:<15} {build.describe(x)}" for x in libraries]
    products = [] if mine is None else [f" bfloat16 features are multiplied {native.bfloat16_products(mine)}"]
    return rows + products


def _row(device: torch.device, dtype: torch.dtype) -> list[str]:
    try:
        chosen, note = registry.resolve(device, dtype), ""
    except ValueError as error:
        chosen, note = "", f"  {error}"
    states = registry.explain(device, dtype)
    names = "  ".join(f"{'*' if name == chosen else ''}{name}" for name, why in states.items() if why == "ready")
    lines = [f"{device!s:<6} {str(dtype).removeprefix('torch.'):<9} {names}"]
    lines += [f"  not {name}: {why}" for name, why in states.items() if why != "ready"]
    return lines + ([note] if note else [])


def _versions() -> dict[str, str]:
    versions = {"nckernels": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "quack-kernels", "numpy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    versions["CUDA"] = torch.version.cuda or "none, torch was built without it"
    return versions


def _devices() -> dict[torch.device, str]:
    devices = {torch.device("cpu"): f"{platform.machine()}, {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices[torch.device("cuda", index)] = (
            f"{properties.name}, sm_{properties.major}{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count} SMs"
        )
    return devices
