"""Matplotlib figures as inline SVG in the colours of the page around them.

A figure is drawn in placeholder colours, one per role (``INK``, ``SERIES`` ...); ``svg`` replaces
them by the page's CSS variables, so that one drawing serves the light and the dark page.
No pyplot, hence no global figure and no display.
"""

from __future__ import annotations

import hashlib
import html
import io
import re
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#010101"
MUTED = "#020202"
LINE = "#030303"
CARD = "#040404"
SERIES = ("#050505", "#060606", "#070707", "#080808")

_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    LINE: "--line",
    CARD: "--card",
    **{colour: f"--series-{index}" for index, colour in enumerate(SERIES)},
}
_STYLE: Any = {  # matplotlib types the keys as one literal union per release
    "svg.fonttype": "none",  # text stays text: selectable, and in the page's own font
    "svg.hashsalt": "sapwood",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlepad": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "text.color": INK,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
}


def style() -> AbstractContextManager[None]:
    """Returns the context in which figures are made, drawn and turned into SVG.

    >>> with style():
    ...     figure, (axes,) = panels(1)
    ...     _ = axes.plot([0, 1], [2, 3], color=SERIES[0])
    ...     text = svg(figure, "a rising line")

    Returns:
        A context manager that sets matplotlib's defaults and restores them at its end.

    Raises:
        ModuleNotFoundError: when matplotlib is not installed.
    """
    import matplotlib

    context: AbstractContextManager[None] = matplotlib.rc_context(_STYLE)
    return context


def panels(
    columns: int,
    *,
    rows: int = 1,
    width: float = 10.0,
    height: float = 3.0,
    share_y: bool = False,
) -> tuple[Figure, list[Axes]]:
    """Makes a figure of small multiples; call it inside ``style()``.

    >>> with style():
    ...     figure, axes = panels(2)
    >>> len(axes)
    2

    Args:
        columns: panels side by side.
        rows: rows of panels.
        width: of the whole figure, in inches.
        height: of the whole figure, in inches.
        share_y: whether all panels show the same range of values.

    Returns:
        The figure and its axes, row by row.

    Raises:
        ModuleNotFoundError: when matplotlib is not installed.
    """
    from matplotlib.figure import Figure as MatplotlibFigure

    figure = MatplotlibFigure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(rows, columns, sharey=share_y, squeeze=False)
    return figure, list(grid.flat)


def svg(figure: Figure, description: str) -> str:
    """Turns a figure into SVG text to put into a page; call it inside ``style()``.

    >>> with style():
    ...     figure, _ = panels(1)
    ...     svg(figure, "an empty plot").startswith('<svg role="img"')
    True

    Args:
        figure: a figure made by ``panels``.
        description: what the figure shows, for those who cannot see it.

    Returns:
        The ``<svg>`` element: no fixed size, no declaration, no external reference.
    """
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing, transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<(metadata|style)\b.*?</\1>", "", text, flags=re.DOTALL)
    text = re.sub(r'\s(?:xmlns(?::\w+)?|version)="[^"]*"', "", text)
    text = text.replace("xlink:href", "href")
    text = re.sub(r'(<svg[^>]*?)\s+width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?)\s+height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"font-family: [^;\"]*;?\s*", "", text)
    text = re.sub(r"font: (?:(\d+|bold) )?([\d.]+)px [^;\"]*", _font, text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    text = _unique_names(text)
    label = html.escape(description, quote=True)
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1).strip()


def _font(match: re.Match[str]) -> str:
    """Older matplotlib writes the shorthand: size and weight stay, the family is the page's."""
    weight = f"font-weight: {match[1]}; " if match[1] else ""
    return f"{weight}font-size: {match[2]}px"


def _unique_names(text: str) -> str:
    """Prefixes every id: two drawings in one page must not share clip paths."""
    prefix = hashlib.sha256(text.encode()).hexdigest()[:8]
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'\bhref="#', f'href="#{prefix}-', text)
    return re.sub(r"url\(#", f"url(#{prefix}-", text)
