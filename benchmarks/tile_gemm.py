"""Single-threaded rates of several engines for the products of csrc/cpu, at the shapes of its tiles.

    python -m benchmarks.tile_gemm

Needs a C++ compiler; takes about a minute, most of it for compiling against torch's headers. The rates are
those of a tile that stays in the caches; ``python -m benchmarks`` times whole passes.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from nckernels.backends import build, native

HERE = Path(__file__).resolve().parent
ENGINES = ("csrc/cpu, tile packed", "csrc/cpu, with packing", "oneDNN brgemm (ATen)", "torch.mm")
SHAPES = ((192, 1000, 128), (192, 1000, 512), (192, 1000, 2048), (96, 1000, 512), (192, 64, 512))
TORCH = Path(torch.__file__).parent


def main() -> int:
    """Print the table."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        library = native.library()
        if library is None:
            raise SystemExit("the native backend does not run here: python -m nckernels info says why")
        compiled = compile_into(Path(folder), library)
        for dtype, rate in (("float32", compiled.tile_gemm_rate), ("bfloat16", compiled.tile_gemm_rate_bfloat16)):
            rate.restype = ctypes.c_double
            rate.argtypes = [ctypes.c_int, *[ctypes.c_int64] * 3]
            print(f"GFLOP/s of one thread, {dtype}, {library.name}, torch {torch.__version__}")
            print(f"{'rows, columns, d':>18}  " + "  ".join(ENGINES))
            for shape in SHAPES:
                rates = [rate(engine, *shape) for engine in range(len(ENGINES))]
                cells = (f"{x:{len(title)}.1f}" for x, title in zip(rates, ENGINES, strict=True))
                print(f"{', '.join(map(str, shape)):>18}  " + "  ".join(cells), flush=True)
    return 0


def compile_into(folder: Path, library: build.Library) -> ctypes.CDLL:
    """The benchmark's library, with the flags of the package's own."""
    target = folder / "tile_gemm.so"
    flags = [flag.replace("c++17", "c++20") for flag in library.flags if flag not in ("-Wall", "-Wextra")]
    includes = [f"-I{build.CSRC / 'cpu'}", f"-I{TORCH / 'include'}"]
    link = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{TORCH / 'lib'}"]
    command = ["g++", *flags, *includes, "-shared", str(HERE / "tile_gemm.cpp"), *link, "-o", str(target)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(target))


if __name__ == "__main__":
    sys.exit(main())
