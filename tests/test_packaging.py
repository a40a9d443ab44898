"""What is distributed: one version everywhere, a description that an index can show, and the checks of `make dist`."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import nckernels
from nckernels.backends import build
from tools import dist

ROOT = Path(__file__).resolve().parents[1]
SDIST = f"nckernels-{nckernels.__version__}.tar.gz"
WHEEL = f"nckernels-{nckernels.__version__}-py3-none-manylinux_2_27_x86_64.whl"


@pytest.mark.parametrize(
    ("file", "pattern"),
    [
        ("CITATION.cff", r"^version: (\S+)$"),
        ("CHANGELOG.md", r"^## \[(\d\S+)\]"),
        ("docs/installing.md", r"nckernels-(\d+\.\d+\.\d+)"),
    ],
)
def test_the_version_is_the_same_everywhere(file: str, pattern: str) -> None:
    found = re.findall(pattern, (ROOT / file).read_text(), flags=re.MULTILINE)
    assert found
    assert found[0] == nckernels.__version__


def test_the_release_has_one_date() -> None:
    (date,) = re.findall(r"^date-released: (\S+)$", (ROOT / "CITATION.cff").read_text(), flags=re.MULTILINE)
    assert f"## [{nckernels.__version__}] - {date}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_description_has_no_relative_links() -> None:
    command = [sys.executable, "setup.py", "--quiet", "--long-description"]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    readme = (ROOT / "README.md").read_text()
    links = re.compile(r"\]\((?!https?:)[^)]*\)")
    assert links.search(readme), "nothing is left to remove: drop description() in setup.py"
    assert not links.search(text)
    assert "<!--" not in text
    code = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
    assert code.findall(text) == code.findall(readme) != []
    assert set(re.findall(r"https?://[^)\s]+", readme)) == set(re.findall(r"https?://[^)\s]+", text))


def test_hooks_run_what_lint_runs() -> None:
    """The versions of pyproject.toml are the only ones: no hook brings an environment of its own."""
    recipe = (ROOT / "Makefile").read_text().split("\nlint:", 1)[1].split("\n\n", 1)[0]
    commands = [line.strip().split("$(PY) ", 1)[1] for line in recipe.splitlines()[1:]]
    config = (ROOT / ".pre-commit-config.yaml").read_text()
    entries = re.findall(r"entry: \.venv/bin/python (.*)", config)
    assert config.count("- repo:") == config.count("- repo: local") == 1
    assert [c.replace(" $(CXX_FILES)", "").removesuffix(" .") for c in commands] == entries


@pytest.mark.parametrize("missing", [None, ".clang-format", ".pre-commit-config.yaml", "csrc/cpu/portable.cpp"])
def test_an_sdist_has_every_tracked_file(tmp_path: Path, missing: str | None) -> None:
    """Those that a test reads too, so that the tests pass in what was unpacked."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no checkout of git")
    path = tmp_path / "nckernels-1.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name in ["PKG-INFO", *listed.stdout.splitlines()]:
            if not name.startswith((".git", ".ci/")) and name != missing:
                archive.addfile(tarfile.TarInfo(f"nckernels-1/{name}"))
    assert dist.inspect_sdist(path) == ([f"{path.name}: lacks {missing}"] if missing else [])


@pytest.fixture
def make_wheel(tmp_path: Path) -> Callable[..., Path]:
    """Writes a wheel with every CPU library, as `make dist` wants it but for what its caller changes."""

    def make(name: str = WHEEL, **changes: bytes | None) -> Path:
        content: dict[str, bytes | None] = {"nckernels/__init__.py": b""}
        for library in build.cpu_libraries():
            code = library.name.encode()
            stamp = {"key": library.key(), "sha256": hashlib.sha256(code).hexdigest()}
            content[f"nckernels/lib/{library.file}"] = code
            content[f"nckernels/lib/nckernels_{library.name}.json"] = json.dumps(stamp).encode()
        path = tmp_path / name
        with zipfile.ZipFile(path, "w") as archive:
            for file, data in (content | changes).items():
                if data is not None:
                    archive.writestr(file, data)
        return path

    return make


def test_a_good_wheel_passes(make_wheel: Callable[..., Path]) -> None:
    assert dist.inspect_wheel(make_wheel(), cuda=False) == []


DEFAULT = "nckernels/lib/nckernels_cpu_default"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{DEFAULT}.so": None}, "is missing or stale"),
        ({f"{DEFAULT}.json": b'{"key": "0123"}'}, "is missing or stale"),
        ({f"{DEFAULT}.so": b"patched"}, "has been changed since it was built"),
        ({"nckernels/__pycache__/a.pyc": b""}, "holds nckernels/__pycache__/a.pyc"),
        ({"tests/test_losses.py": b""}, "holds tests/test_losses.py"),
        ({"nckernels.libs/libgomp-a34b3233.so.1": b""}, "holds nckernels.libs/libgomp"),
    ],
    ids=["library missing", "stale", "patched", "bytecode", "foreign folder", "a second OpenMP"],
)
def test_a_bad_wheel_is_found(make_wheel: Callable[..., Path], changes: dict[str, bytes | None], message: str) -> None:
    failures = dist.inspect_wheel(make_wheel(**changes), cuda=False)
    assert len(failures) == 1
    assert message in failures[0]


@pytest.mark.parametrize("platform", ["linux_x86_64", "manylinux_2_34_x86_64"])
def test_a_tag_that_few_machines_take_is_found(make_wheel: Callable[..., Path], platform: str) -> None:
    failures = dist.inspect_wheel(make_wheel(WHEEL.replace("manylinux_2_27_x86_64", platform)), cuda=False)
    assert len(failures) == 1
    assert "the tag is not" in failures[0]


def test_a_wheel_without_the_cuda_library_is_found(make_wheel: Callable[..., Path]) -> None:
    failures = dist.inspect_wheel(make_wheel(), cuda=True)
    assert len(failures) == 1
    assert "nckernels_cuda.so is missing" in failures[0]


def test_a_wheel_with_the_cuda_library_may_ask_for_a_newer_glibc(make_wheel: Callable[..., Path]) -> None:
    failures = dist.inspect_wheel(make_wheel(WHEEL.replace("2_27", "2_34")), cuda=True)
    assert not any("the tag" in failure for failure in failures)


@pytest.mark.parametrize("other", ["notes.txt", "nckernels-folder.whl/notes.txt", ".git/config"])
def test_make_dist_removes_only_what_it_made(
    tmp_path: Path, other: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder with anything else in it is refused, and stays as it is."""
    monkeypatch.setattr(dist, "build", lambda *_: pytest.fail("nothing may be built"))
    monkeypatch.setattr(sys, "argv", ["dist.py", "--out", str(tmp_path)])
    for name in (SDIST, WHEEL):
        (tmp_path / name).touch()
    (tmp_path / other).parent.mkdir(exist_ok=True)
    (tmp_path / other).touch()
    with pytest.raises(SystemExit) as stop:
        dist.main()
    assert stop.value.code == 2
    assert f"it holds {other.split('/')[0]}" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {SDIST, WHEEL, other.split("/")[0]}
    assert (tmp_path / other).exists()


def test_make_dist_makes_room(tmp_path: Path) -> None:
    dist.clear(tmp_path / "new")
    for name in (SDIST, WHEEL):
        (tmp_path / name).touch()
    dist.clear(tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is no folder"):
        dist.clear(tmp_path / "file")
