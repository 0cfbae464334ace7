"""Sphinx configuration. The site builds and reads without network."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

import sapwood

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "sapwood"
author = "The sapwood developers"
project_copyright = "The sapwood developers"
version = release = sapwood.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "benchmark_history",
    "mathml",
]
myst_enable_extensions = ["dollarmath", "deflist", "fieldlist"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "_ext"]

html_theme = "furo"
html_title = "sapwood"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_math_renderer = "mathml"
html_show_sourcelink = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": False}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
nitpicky = False

MARKUP = re.compile(r"\(\*[,)]|, \*\w*\)|\|\w[\w */]*\|")


def escape_maths(
    app: object, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """The star of a shape (*, K) starts no emphasis, the bars of |w| no substitution."""
    lines[:] = [MARKUP.sub(lambda m: re.sub(r"[|*]", r"\\\g<0>", m[0]), line) for line in lines]


def setup(app: Sphinx) -> None:
    """Connects the hook."""
    app.connect("autodoc-process-docstring", escape_maths)
