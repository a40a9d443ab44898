"""Configuration of the documentation site; `make docs` builds it into out/docs and fails on any warning."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sphinx.ext import autosummary

import nckernels

if TYPE_CHECKING:
    from sphinx.application import Sphinx

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

project = "nckernels"
copyright = "the nckernels authors"
release = version = nckernels.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx-mathjax-offline",  # formulas need no other server
    "sphinx_copybutton",
]
exclude_patterns = ["README.md"]  # included in index.rst; GitHub shows it with the folder

# --- pages in Markdown -----------------------------------------------------------------------------------------

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4  # those of GitHub

# --- docstrings ------------------------------------------------------------------------------------------------

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings give types and shapes
autosummary_generate = False
autosummary.WELL_KNOWN_ABBREVIATIONS = (*autosummary.WELL_KNOWN_ABBREVIATIONS, "Eq.", "Eqs.", "App.")
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Shape", "Shape, Raises"]
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
add_module_names = False

nitpicky = True
nitpick_ignore_regex: list[tuple[str, str]] = []

# --- links to other projects -----------------------------------------------------------------------------------

# The inventories are files of ours with what we refer to, so that a build needs no network. To link to one name more,
# add a line: name, type, page.
intersphinx_mapping = {
    "python": ("https://docs.python.org/3/", "inventories/python.txt"),
    "numpy": ("https://numpy.org/doc/stable/", "inventories/numpy.txt"),
    "torch": ("https://docs.pytorch.org/docs/stable/", "inventories/torch.txt"),
    "scipy": ("https://docs.scipy.org/doc/scipy/", "inventories/scipy.txt"),
    "torchmetrics": ("https://lightning.ai/docs/torchmetrics/stable/", "inventories/torchmetrics.txt"),
}

# --- appearance ------------------------------------------------------------------------------------------------

html_theme = "furo"
html_title = f"nckernels {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = html_copy_source = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# --- links that leave docs/ ------------------------------------------------------------------------------------

REPOSITORY = PYPROJECT.get("urls", {}).get("Repository", "")
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "examples": "examples.md"}
"""What is a page of the site although its source lies elsewhere."""
LEAVING = re.compile(r"(?<!!)\[([^\]]*)\]\(\.\./([^)#]*)(#[^)]*)?\)")


def relink(text: str) -> str:
    """Links of a page to files outside of docs/, which lead to the repository, or are plain text without one."""

    def target(link: re.Match[str]) -> str:
        shown, path, anchor = link[1], link[2].rstrip("/"), link[3] or ""
        page = PAGES.get(path, path.removeprefix("docs/") if path.startswith("docs/") else "")
        if page:
            return f"[{shown}]({page}{anchor})"
        return f"[{shown}]({REPOSITORY}/blob/main/{path}{anchor})" if REPOSITORY else shown

    return LEAVING.sub(target, text)


def programs() -> str:
    """The text of the programs in examples/."""
    lines = []
    for path in sorted((ROOT / "examples").glob("*.py")):
        lines += [f"## {path.name}", f"```{{literalinclude}} ../examples/{path.name}", ":language: python", "```"]
    return "\n" + "\n".join(lines) + "\n"


def on_source_read(app: Sphinx, page: str, content: list[str]) -> None:
    """Change what is read, not what is written: the sources stay as GitHub shows them."""
    content[0] = relink(content[0])
    if page == "examples":
        content[0] += programs()


def on_include_read(app: Sphinx, path: Path, page: str, content: list[str]) -> None:
    """The same for files that a page includes."""
    content[0] = relink(content[0])


def on_outdated(app: Sphinx, env: object, added: set[str], changed: set[str], removed: set[str]) -> list[str]:
    """Read the page of examples in every build: the folder may have a new one."""
    return ["examples"]


def on_docstring(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Link the pages that a docstring names; keep napoleon from taking an attribute's text for its type."""
    lines[:] = [re.sub(r"\bdocs/([\w-]+)\.md\b", r":doc:`docs/\1.md </\1>`", line) for line in lines]
    if what in ("attribute", "property"):
        lines[:0] = ["..", ""]  # napoleon looks for a type and a colon in the first line: a comment


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("source-read", on_source_read)
    app.connect("include-read", on_include_read)
    app.connect("env-get-outdated", on_outdated)
    app.connect("autodoc-process-docstring", on_docstring, priority=400)  # napoleon has 500
    return {"parallel_read_safe": True}
