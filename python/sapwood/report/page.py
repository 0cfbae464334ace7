"""A page as plain data, rendered to one HTML file that loads nothing from anywhere."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources

_UNIT = re.compile(r"(?<=\d) (?=(?:%|x|s|ms|us|MB)(?:\W|$))")


@dataclass(frozen=True)
class Stat:
    """One large number with its unit and what it means."""

    value: str
    label: str


@dataclass(frozen=True)
class Table:
    """Rows of text under column heads; the first column names the row.

    Figures stand at the right of their cells, prose at the left. A line feed breaks the line.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    prose: bool = False


@dataclass(frozen=True)
class Figure:
    """An inline SVG, as ``plots.svg`` returns it, and the sentence under it."""

    svg: str
    caption: str


@dataclass(frozen=True)
class Section:
    """A heading, paragraphs, then figures and tables in the order given."""

    heading: str
    paragraphs: Sequence[str] = ()
    blocks: Sequence[Figure | Table] = ()


@dataclass(frozen=True)
class Chapter:
    """Sections under one title."""

    title: str
    lead: str
    sections: Sequence[Section]


@dataclass(frozen=True)
class Page:
    """Everything a page shows."""

    title: str
    headline: str
    subtitle: str
    stats: Sequence[Stat] = ()
    chapters: Sequence[Chapter] = ()
    facts: Sequence[tuple[str, str]] = field(default=())  # how it was measured: name, value


def render(page: Page) -> str:
    """Renders a page to one self-contained HTML document.

    Every text is escaped; the SVG of a ``Figure`` is inserted as it is. The document asks the
    network for nothing, and its content security policy forbids it.

    >>> "<h1>2 &lt; 3</h1>" in render(Page("Numbers", "2 < 3", "An inequality"))
    True

    Args:
        page: the parts of the page.

    Returns:
        The HTML text.

    Raises:
        ModuleNotFoundError: when jinja2 is not installed.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_template),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=_glued,
    )
    environment.tests["table"] = lambda block: isinstance(block, Table)
    return environment.get_template("page.html").render(page=page, style=_template("page.css"))


def _glued(value: object) -> object:
    """Keeps a figure and its unit on one line; leaves markup alone."""
    return _UNIT.sub("\N{NO-BREAK SPACE}", value) if type(value) is str else value


def _template(name: str) -> str:
    folder = resources.files("sapwood.report") / "templates"
    return (folder / name).read_text(encoding="utf-8")
