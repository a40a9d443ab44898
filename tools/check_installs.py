"""Install the files of `make dist` into fresh environments and use them; `make check-installs` prints the table.

    python tools/check_installs.py [--dist dist] [--only NAME ...] [--list] [--find-links DIR ...]

Every row has an environment of its own outside the checkout. The matrix has one row per Python and torch: the wheel
with its extra "train", no compiler on the PATH, every loss against the reference backend in float64, `python -m
nckernels info`, training on the digits and, with the compiler back, torch.compile. The other rows use one Python and
torch: sdist with and without a compiler, --no-binary, a site-packages that cannot be written, an upgrade, older CPUs,
uninstall.

Results are kept in out/installs, a file per row, and used again while wheel, sdist and the smoke program stay as they
are: a run that was interrupted goes on. A torch of PyPI takes 5 GB of disk while its row runs. --torch takes one from
a folder instead, the site-packages of an environment that has one. Exits with 1 if a row failed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SMOKE = ROOT / "tools" / "install_smoke.py"
MATRIX = (
    ("3.10", "2.10.0"),
    ("3.10", "2.14.1"),
    ("3.11", "2.13.0"),
    ("3.11", "2.14.1"),
    ("3.12", "2.11.0"),
    ("3.12", "2.14.1"),
    ("3.13", "2.14.1"),
)
"""The oldest torch that is allowed, with the oldest Python; the newest torch with every Python; what lies between."""
BASE = ("3.11", "2.13.0")
"""Python and torch of the other rows."""
COMPILERS = ("g++", "c++", "gcc", "cc", "clang", "clang++", "ninja", "nvcc")


class Failure(Exception):
    """A check that failed; the message is for the table."""


@dataclass
class Setup:
    """What is the same for every row."""

    wheel: Path
    sdist: Path
    before: Path | None
    """A wheel of the release before."""
    find_links: list[str]
    torches: dict[str, str]
    """Folders with a torch, by "PYTHON/TORCH"."""
    work: Path


@dataclass
class Environment:
    """A virtual environment, and the PATH with which its programs run."""

    folder: Path
    setup: Setup
    path: str = field(default_factory=lambda: os.environ["PATH"])
    prefix: tuple[str, ...] = ()
    """Words before every command, for example an emulator."""

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def run(self, *words: str, **environment: str) -> str:
        """Output of a command, run in an empty folder.

        Raises:
            Failure: with the end of what it said.
        """
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("NCKERNELS_", "PYTHON", "CXX"))}
        kept |= {"PATH": f"{self.folder / 'bin'}:{self.path}", "OMP_NUM_THREADS": "2"}
        kept |= {
            "TORCH_EXTENSIONS_DIR": str(self.folder / "cache"),
            "TORCHINDUCTOR_CACHE_DIR": str(self.folder / "ind"),
        }
        with tempfile.TemporaryDirectory(dir=self.setup.work) as empty:
            result = subprocess.run(
                [*self.prefix, *words],
                cwd=empty,
                env=kept | environment,
                capture_output=True,
                text=True,
                timeout=3000,
            )
        if result.returncode:
            said = (result.stdout + result.stderr).strip()
            print(textwrap.indent(said[-6000:], "    | "), flush=True)
            raise Failure(f"{' '.join(words[:5])}: {said.splitlines()[-1] if said else result.returncode}"[:300])
        return result.stdout

    def pip(self, *words: str, **environment: str) -> None:
        if "CXX" in os.environ and self.path == os.environ["PATH"]:
            environment["CXX"] = os.environ["CXX"]
        links = [word for link in self.setup.find_links for word in ("--find-links", link)]
        command = [str(self.python), "-m", "pip", "--disable-pip-version-check", *words]
        self.run(*command, *(links if words[0] == "install" else []), **environment)

    def smoke(self, what: str, **environment: str) -> dict[str, Any]:
        script = self.folder / SMOKE.name
        shutil.copy(SMOKE, script)
        said: dict[str, Any] = json.loads(self.run(str(self.python), str(script), what, **environment).splitlines()[-1])
        return said

    def without_compiler(self) -> Environment:
        """The same with a PATH that has no compiler."""
        tools = self.folder / "tools"
        if not tools.exists():
            tools.mkdir()
            for folder in reversed(os.environ["PATH"].split(":")):
                for program in Path(folder).glob("*") if folder else ():
                    if not any(program.name.startswith(name) or f"-{name}" in program.name for name in COMPILERS):
                        link = tools / program.name
                        link.unlink(missing_ok=True)
                        link.symlink_to(program)
        return Environment(self.folder, self.setup, str(tools), self.prefix)

    def site_packages(self) -> Path:
        (path,) = (self.folder / "lib").glob("python*/site-packages")
        return path

    def cached(self) -> set[Path]:
        """The code that was compiled on first use."""
        return set((self.folder / "cache").rglob("*"))

    def leftovers(self) -> list[str]:
        return sorted(p.name for p in self.site_packages().iterdir() if p.name.lower().startswith("nckernels"))


def interpreter(version: str) -> str:
    """Of that version: on the PATH, else of pyenv."""
    found = shutil.which(f"python{version}")
    if found and subprocess.run([found, "-c", "import venv, ssl"], capture_output=True).returncode == 0:
        return found
    for path in sorted(Path("~/.pyenv/versions").expanduser().glob(f"{version}.*/bin/python"), reverse=True):
        return str(path)
    raise Failure(f"there is no Python {version} here")


def fresh(setup: Setup, name: str, python: str, torch: str) -> Environment:
    """An environment with a torch."""
    folder = setup.work / name
    subprocess.run([interpreter(python), "-m", "venv", str(folder)], check=True)
    environment = Environment(folder, setup)
    borrowed = setup.torches.get(f"{python}/{torch}")
    if borrowed:
        environment.site_packages().joinpath("torch.pth").write_text(f"{Path(borrowed).resolve()}\n")
    else:
        environment.pip("install", "-q", f"torch=={torch}", "numpy")
    return environment


# --- rows ------------------------------------------------------------------------------------------------


def used(said: dict[str, Any]) -> str:
    """What a smoke run used, in words."""
    origin = "of the wheel" if said["from the package"] else "compiled on first use"
    return f"{said['library']} {origin}" if said["library"] else "no native code"


def need(condition: bool, message: str) -> None:
    if not condition:
        raise Failure(message)


def check_wheel(environment: Environment) -> str:
    """The smoke run of an environment with the wheel: nothing is compiled, and OpenMP is torch's."""
    plain = environment.without_compiler()
    cached = environment.cached()
    said = plain.smoke("losses")
    need(str(environment.folder) in said["package"], f"imported {said['package']}")
    need(bool(said["from the package"]), f"uses {used(said)}")
    need(environment.cached() == cached, "wrote a cache of compiled code")
    need(len(said["openmp"]) == 1, f"OpenMP runtimes in the process: {said['openmp']}")
    need("/torch/lib/" in said["openmp"][0], f"OpenMP is {said['openmp'][0]}")
    return f"{said['losses']} losses; {used(said)}"


def matrix_row(setup: Setup, python: str, torch: str) -> str:
    environment = fresh(setup, f"matrix-{python}-{torch}", python, torch)
    plain = environment.without_compiler()
    plain.pip("install", "-q", f"{setup.wheel}[train]")
    plain.pip("check")
    result = check_wheel(environment)
    info = plain.run(str(environment.python), "-m", "nckernels", "info")
    need("*native" in info, "info does not choose the native backend")
    plain.smoke("train")
    environment.smoke("compile")
    version = environment.run(str(environment.python), "-c", "import torch; print(torch.__version__)").strip()
    return f"{result}; info; train; compile; torch {version}"


def base(setup: Setup, name: str) -> Environment:
    return fresh(setup, name, *BASE)


def from_sdist(setup: Setup) -> str:
    environment = base(setup, "sdist")
    environment.pip("install", "-q", str(setup.sdist))
    return check_wheel(environment)


def without_compiler(setup: Setup) -> str:
    """Falls back on plain PyTorch, with one warning; compiles on first use once there are compiler and ninja."""
    environment = base(setup, "no-compiler")
    plain = environment.without_compiler()
    plain.pip("install", "-q", str(setup.sdist))
    said = plain.smoke("losses")
    need(said["library"] is None, f"uses {used(said)}")
    environment.pip("install", "-q", "ninja")
    later = environment.smoke("losses")
    need(later["library"] is not None and not later["from the package"], f"later uses {used(later)}")
    return f"{said['losses']} losses; {used(said)}; later, with compiler and ninja, {used(later)}"


def no_binary(setup: Setup) -> str:
    environment = base(setup, "no-binary")
    environment.pip("install", "-q", "setuptools>=77", "ninja")
    words = ("--no-binary", "nckernels", "--no-build-isolation", "--no-deps", "--no-index")
    environment.pip("install", "-q", *words, "--find-links", str(setup.sdist.parent), "nckernels")
    return check_wheel(environment)


def read_only(setup: Setup) -> str:
    """Without the right to write anywhere below the environment, nor to the home folder."""
    environment = base(setup, "read-only")
    environment.pip("install", "-q", "--no-compile", str(setup.wheel))
    plain = environment.without_compiler()
    shutil.copy(SMOKE, environment.folder / SMOKE.name)
    script = environment.folder / SMOKE.name
    capless = ("--bounding-set=-dac_override", "--inh-caps=-dac_override")
    plain.prefix = ("setpriv", *capless) if os.geteuid() == 0 else ()
    writable = sorted({p.parent for p in environment.folder.rglob("*")} | {environment.folder})
    try:
        for folder in writable:
            if not folder.is_symlink():
                folder.chmod(0o555)
        try:
            plain.run("touch", str(environment.site_packages() / "probe"))
        except Failure:
            pass
        else:
            raise Failure("the folder can be written: the row shows nothing")
        said = json.loads(
            plain.run(str(environment.python), str(script), "losses", HOME="/nonexistent").splitlines()[-1]
        )
    finally:
        for folder in writable:
            folder.chmod(0o755)
    need(bool(said["from the package"]), f"uses {used(said)}")
    return f"{said['losses']} losses; {used(said)}"


def upgrade(setup: Setup) -> str:
    assert setup.before is not None
    environment = base(setup, "upgrade")
    plain = environment.without_compiler()
    plain.pip("install", "-q", str(setup.before))
    old = plain.run(str(environment.python), "-c", "import nckernels; print(nckernels.__version__)").strip()
    # torch.compile keeps graphs on disk with the sizes of the operators' results.
    environment.smoke("compile")
    plain.pip("install", "-q", "--upgrade", str(setup.wheel))
    result = check_wheel(environment)
    environment.smoke("compile")
    return f"from {old}: {result}; compile, with the caches of {old}"


def older_cpus(setup: Setup) -> str:
    """Under qemu, which stops a program at an instruction that the CPU lacks."""
    if shutil.which("qemu-x86_64") is None:
        raise Failure("qemu-x86_64 is not installed (Debian: qemu-user)")
    environment = base(setup, "older-cpus")
    environment.pip("install", "-q", str(setup.wheel))
    results = []
    for cpu, expected in (("Nehalem", "default"), ("Haswell", "avx2")):
        old = environment.without_compiler()
        old.prefix = ("qemu-x86_64", "-cpu", cpu)
        said = old.smoke("losses", OPENBLAS_CORETYPE="Nehalem", OMP_NUM_THREADS="1")
        need(said["library"] == expected and bool(said["from the package"]), f"on {cpu}: {used(said)}")
        results.append(f"{cpu}: {used(said)}")
    return "; ".join(results)


def uninstall(setup: Setup) -> str:
    environment = base(setup, "uninstall")
    environment.pip("install", "-q", str(setup.wheel))
    environment.without_compiler().smoke("losses")
    environment.pip("uninstall", "-q", "-y", "nckernels")
    left = environment.leftovers()
    need(not left, f"left behind: {', '.join(left)}")
    return "nothing left in site-packages"


OTHERS: dict[str, Callable[[Setup], str]] = {
    "sdist": from_sdist,
    "sdist, no compiler": without_compiler,
    "pip --no-binary": no_binary,
    "read-only site-packages": read_only,
    "upgrade": upgrade,
    "older CPUs (qemu)": older_cpus,
    "uninstall": uninstall,
}


def rows() -> Iterator[tuple[str, str, str, Callable[[Setup], str]]]:
    """Name, Python, torch and check of each row."""
    for python, torch in MATRIX:
        yield f"wheel {python}/{torch}", python, torch, lambda setup, p=python, t=torch: matrix_row(setup, p, t)  # type: ignore[misc]
    for name, check in OTHERS.items():
        yield name, *BASE, check


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="folder with one wheel and one sdist")
    parser.add_argument("--before", type=Path, help="the wheel of the release before; without it no upgrade is tried")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="rows whose name contains one of these")
    parser.add_argument("--list", action="store_true", help="the names of the rows")
    parser.add_argument("--find-links", nargs="+", default=[], help="for pip: folders with wheels of torch")
    parser.add_argument("--torch", nargs="+", default=[], metavar="PYTHON/TORCH=DIR", help="folders that have a torch")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "installs", help="where results are kept")
    options = parser.parse_args()
    if options.list:
        print("\n".join(name for name, *_ in rows()))
        return 0
    (wheel,), (sdist,) = options.dist.resolve().glob("*.whl"), options.dist.resolve().glob("*.tar.gz")
    before = options.before.resolve() if options.before else None
    key = digest(wheel, sdist, SMOKE)
    options.out.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, python, torch, check in rows():
        kept = options.out / f"{name.replace('/', '-').replace(' ', '-')}.json"
        wanted = not options.only or any(word in name for word in options.only)
        wanted = wanted and (name != "upgrade" or before is not None)
        result = json.loads(kept.read_text()) if kept.exists() else {}
        if result.get("key") != key or (wanted and not result["passed"]):
            result = {}
        if wanted and not result:
            print(f"{name} ...", flush=True)
            with tempfile.TemporaryDirectory(prefix="installs-") as work:
                links = [str(Path(x).resolve()) for x in options.find_links]
                torches = dict(x.split("=", 1) for x in options.torch)
                result = outcome(check, Setup(wheel, sdist, before, links, torches, Path(work))) | {"key": key}
            kept.write_text(json.dumps(result, indent=1) + "\n")
            print(f"{name}: {result['text']} ({result['seconds']:.0f} s)", flush=True)
        verdict = "not run" if not result else "passed" if result["passed"] else "**failed**"
        lines.append((verdict, f"| {name} | {python} | {torch} | {verdict} | {result.get('text', '')} |"))
    print(f"\n{wheel.name}, {sdist.name}\n\n| install | Python | torch | | what ran |\n|---|---|---|---|---|")
    print("\n".join(line for _, line in lines))
    return int(any(verdict == "**failed**" for verdict, _ in lines))


def outcome(check: Callable[[Setup], str], setup: Setup) -> dict[str, Any]:
    started = time.monotonic()
    try:
        text, passed = check(setup), True
    except (Failure, subprocess.SubprocessError, OSError, ValueError) as error:
        text, passed = f"{error}".replace("|", "/").replace("\n", " ")[:300], False
    return {"passed": passed, "text": text, "seconds": time.monotonic() - started}


def digest(*paths: Path) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:16]


if __name__ == "__main__":
    sys.exit(main())
