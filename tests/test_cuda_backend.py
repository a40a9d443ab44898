"""The CUDA backend's messages where it cannot run. Its kernels are tested in tests/cuda_host."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import nckernels
from nckernels.backends import build, cuda


@pytest.fixture(autouse=True)
def unloaded() -> Iterator[None]:
    """The cached search for the library is cleared before and after."""
    cuda._load.cache_clear()
    yield
    cuda._load.cache_clear()


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_without_cuda() -> None:
    backend = cuda.CudaBackend()
    assert backend.missing() == "this build of torch has no CUDA"
    assert "not cpu" in str(backend.why_not(torch.device("cpu"), torch.float32))
    assert "not float64" in str(backend.why_not(torch.device("cuda"), torch.float64))


def test_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(build, "find", lambda library: None)
    assert "has not been built" in str(cuda.CudaBackend().missing())


def test_built_when_chosen_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes minutes: only an explicit choice starts it, and reports a failure."""
    asked: list[str] = []

    def find_or_build(library: build.Library) -> Path:
        asked.append(library.name)
        raise build.BuildError("no CUDA compiler, and this is the whole reason")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(build, "find", lambda library: None)
    monkeypatch.setattr(build, "find_or_build", find_or_build)
    assert "has not been built" in str(cuda.CudaBackend().missing())
    assert asked == []
    with pytest.raises(ValueError, match=r"'cuda' cannot run here: no CUDA compiler, and this is the whole reason"):
        nckernels.set_backend("cuda")
    assert asked == ["cuda"]


def test_a_library_that_does_not_load_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "_cuda.so"
    broken.write_text("not a library")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(build, "find", lambda library: broken)
    reason = str(cuda.CudaBackend().missing())
    assert "does not load" in reason
    assert str(broken) in reason


def test_every_source_is_listed() -> None:
    """The build compiles all sources in csrc/cuda."""
    folder = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
    assert sorted(build.CUDA.sources) == sorted(
        path.name for path in folder.iterdir() if path.suffix in (".cu", ".cpp")
    )
