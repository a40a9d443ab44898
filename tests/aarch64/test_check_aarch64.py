"""What tools/check_aarch64.py says where aarch64 cannot be run."""

from __future__ import annotations

import importlib.util
import platform
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[2] / "tools" / "check_aarch64.py"


@pytest.mark.skipif(platform.machine() == "aarch64", reason="is aarch64")
def test_without_a_compiler_it_says_how_to_get_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("check_aarch64", PATH)
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.setattr(tool.native, "SUPPORTED", False)
    monkeypatch.setattr(tool, "first_of", lambda _: None)
    for words, status in ([], 0), (["--require"], 1):
        monkeypatch.setattr(sys, "argv", ["check_aarch64.py", *words])
        assert tool.main() == status
        assert "skipped, there is no cross compiler: apt-get install" in capsys.readouterr().out
