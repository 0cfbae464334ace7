"""Matplotlib figures as SVG: inline in the colours of the page around them, or as files.

A figure is drawn in placeholder colours, one per role (``INK``, ``SERIES`` ...). ``svg`` replaces
them by the page's CSS variables, so that one drawing serves the light and the dark page;
``standalone`` by the colours of the light page, for a file that stands for itself.
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
SERIES = tuple(f"#{digit:02x}{digit:02x}{digit:02x}" for digit in range(5, 13))

_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    LINE: "--line",
    CARD: "--card",
    **{colour: f"--series-{index}" for index, colour in enumerate(SERIES)},
}
#: The variables' values on the light page; ``page.css`` has the same.
LIGHT = {
    "--ink": "#22261f",
    "--muted": "#656b60",
    "--line": "#dedbd0",
    "--card": "#ffffff",
    "--series-0": "#7d8479",
    "--series-1": "#2f7d5b",
    "--series-2": "#b8651b",
    "--series-3": "#5a5fb0",
    "--series-4": "#b0395a",
    "--series-5": "#1b7f95",
    "--series-6": "#8f7310",
    "--series-7": "#8a4fa3",
}
_FONT = "system-ui, 'Segoe UI', Roboto, 'Noto Sans', 'DejaVu Sans', sans-serif"
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
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "sapwood.report.plots: matplotlib must be installed, got none: "
            "pip install 'sapwood[tour]'"
        ) from None

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
    text = _drawn(figure, transparent=True)
    text = re.sub(r"<style\b.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'\s(?:xmlns(?::\w+)?|version)="[^"]*"', "", text)
    text = text.replace("xlink:href", "href")
    text = re.sub(r'(<svg[^>]*?)\s+width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?)\s+height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"font-family: [^;\"]*;?\s*", "", text)
    text = re.sub(r"font: (?:(\d+|bold) )?([\d.]+)px [^;\"]*", _font, text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    text = _unique_names(text)
    return _described(text, description)


def standalone(figure: Figure, description: str) -> str:
    """Turns a figure into the text of an SVG file; call it inside ``style()``.

    >>> with style():
    ...     figure, _ = panels(1)
    ...     "var(" in standalone(figure, "an empty plot")
    False

    Args:
        figure: a figure made by ``panels``.
        description: what the figure shows, for those who cannot see it.

    Returns:
        The document, with fixed colours on white and without any reference to outside.
    """
    text = _drawn(figure, facecolor=CARD)
    text = re.sub(r"font-family: [^;\"]*", f"font-family: {_FONT}", text)
    text = re.sub(r"font: ((?:(?:\d+|bold) )?[\d.]+px) [^;\"]*", rf"font: \1 {_FONT}", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, LIGHT[variable])
    head = '<?xml version="1.0" encoding="UTF-8"?>\n'
    return head + _described(text, description) + "\n"


def _drawn(figure: Figure, **options: Any) -> str:
    """The ``<svg>`` element as matplotlib writes it, without metadata."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing, **options)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    return re.sub(r"<metadata\b.*?</metadata>", "", text, flags=re.DOTALL)


def _described(text: str, description: str) -> str:
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
