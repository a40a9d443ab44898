"""What `tools/check_installs.py` runs in each environment, in an empty folder; prints a line of JSON per check.

    python install_smoke.py losses | compile | train

It imports the installed package and nothing of the checkout.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

import nckernels
from nckernels.backends import build, native


def losses() -> dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]]:
    """Each loss as a function of features, prototypes (or other features) and labels."""
    return {
        "nonl": lambda x, w, y: nckernels.nonl_loss(x, w, y),
        "ntce": lambda x, w, y: nckernels.ntce_loss(x, w, y),
        "normface": lambda x, w, y: nckernels.normface_loss(x, w, y, label_smoothing=0.1),
        "dot regression": lambda x, w, y: nckernels.dot_regression_loss(x, w, y),
        "supcon": lambda x, w, y: nckernels.supcon_loss(x, y),
        "simclr": lambda x, w, y: nckernels.supcon_loss(torch.stack((x, x + w[y]), 1)),
        "prototype": lambda x, w, y: nckernels.prototype_loss(x, y),
        "info_nce": lambda x, w, y: nckernels.info_nce_loss(x, x + w[y], torch.arange(len(x))),
        "clip": lambda x, w, y: nckernels.clip_loss(x, x + w[y]),
        "uniformity": lambda x, w, y: nckernels.uniformity_loss(x),
        "alignment": lambda x, w, y: nckernels.alignment_loss(x, w[y]),
        "cosine_lse": lambda x, w, y: nckernels.cosine_lse(x, w, y, 10.0)[0].sum(),
    }


def value_and_gradients(loss: Callable[..., torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(70, 24, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    w = torch.randn(11, 24, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    y = torch.arange(70) % 11
    value = loss(x, w, y)
    value.backward()
    return [value.detach(), *(torch.zeros_like(t) if t.grad is None else t.grad for t in (x, w))]


def check_losses() -> None:
    """Forward and backward in three dtypes against the reference backend in float64, and what native code ran."""
    worst: dict[str, float] = {}
    for name, loss in losses().items():
        with nckernels.use_backend("reference"):
            expected = value_and_gradients(loss, torch.float64)
        for dtype, bound in ((torch.float64, 1e-10), (torch.float32, 2e-4), (torch.bfloat16, 0.15)):
            for got, true in zip(value_and_gradients(loss, dtype), expected, strict=True):
                error = float((got.double() - true).norm() / true.norm().clamp_min(1e-3))
                worst[str(dtype)] = max(worst.get(str(dtype), 0.0), error)
                if not error < bound:
                    raise SystemExit(f"{name} in {dtype}: relative error {error:.2g}, allowed are {bound}")
    library = native.library()
    path = None if library is None else build.find(library)
    maps = Path("/proc/self/maps").read_text().split()
    openmp = {x for x in maps if Path(x).name.startswith(("libgomp", "libiomp", "libomp"))}
    print(
        json.dumps(
            {
                "version": nckernels.__version__,
                "package": str(Path(nckernels.__file__).parent),
                "torch": torch.__version__,
                "losses": len(losses()),
                "errors": worst,
                "library": None if library is None else library.name.removeprefix("cpu_"),
                "from the package": path is not None and path.is_relative_to(build.INSTALLED),
                "openmp": sorted(openmp),
            }
        )
    )


def check_compile() -> None:
    """One loss, forward and backward, through torch.compile's default backend."""
    loss = losses()["nonl"]
    plain, compiled = (value_and_gradients(f, torch.float32) for f in (loss, torch.compile(loss, fullgraph=True)))
    for a, b in zip(plain, compiled, strict=True):
        torch.testing.assert_close(a, b)
    print(json.dumps({"compiled": True}))


def check_train() -> None:
    """One epoch of the digits, by the command."""
    with tempfile.TemporaryDirectory() as out:
        words = ["train", "digits/nonl", "--set", "schedule.epochs=1", "--out", out]
        subprocess.run([sys.executable, "-m", "nckernels", *words], check=True, stdout=sys.stderr)
    print(json.dumps({"trained": True}))


if __name__ == "__main__":
    {"losses": check_losses, "compile": check_compile, "train": check_train}[sys.argv[1]]()
