"""Builds the native code into the package where there is a compiler; everything else is in pyproject.toml.

Without a compiler the package installs all the same: it compiles on first use, or runs without native code.
"""

import importlib.util
import os
import re
import shutil
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def load_build():
    """nckernels/backends/build.py on its own: the package itself needs torch, which may not be there."""
    spec = importlib.util.spec_from_file_location("nckernels_build", ROOT / "nckernels" / "backends" / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def wants_cuda():
    """Where torch has CUDA, which takes `pip install --no-build-isolation`, or where NCKERNELS_CUDA=1 says so."""
    try:
        import torch
    except ImportError:
        return False
    return torch.version.cuda is not None or os.environ.get("NCKERNELS_CUDA") == "1"


def description():
    """README.md as an index can show it: relative links become their text and pictures of the tree are left out.

    An index shows the text alone, so a relative link leads nowhere there.
    """
    text = re.sub(r"<!--.*?-->\n?", "", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    text = re.sub(r"^!\[[^\]]*\]\((?!https?:)[^)]*\)\n+", "", text, flags=re.MULTILINE)
    return re.sub(r"(?<!!)\[([^\]]+)\]\((?!https?:)[^)]*\)", r"\1", text)


class BuildWithNative(build_py):
    """Python files, the C++ sources, and what the compiler here can make of them."""

    def run(self):
        super().run()
        if self.editable_mode:
            return  # a checkout compiles on first use, and again whenever csrc changes
        package = Path(self.build_lib) / "nckernels"
        shutil.copytree(ROOT / "csrc", package / "csrc", dirs_exist_ok=True)
        build = load_build()
        for library in build.cpu_libraries() + ([build.CUDA] if wants_cuda() else []):
            print(f"nckernels: compiling {library.file}", flush=True)
            try:
                build.build(library, package / "lib")
            except (build.BuildError, OSError) as error:
                print(f"nckernels: {library.file} is not built, but may be on first use: {error}", flush=True)


class Binary(Distribution):
    """Libraries are not setuptools' extensions: tell it that there may be some."""

    def has_ext_modules(self):
        return True


class PlatformWheel(bdist_wheel):
    """The libraries have a plain C interface: a wheel is for one platform, and for any Python on it."""

    def get_tag(self):
        built = any(Path(self.bdist_dir).rglob("*.so"))
        return "py3", "none", super().get_tag()[2] if built else "any"


setup(
    distclass=Binary,
    cmdclass={"build_py": BuildWithNative, "bdist_wheel": PlatformWheel},
    long_description=description(),
    long_description_content_type="text/markdown",
)
