"""Plots and self-contained HTML pages; knows no method.

``page`` holds the parts of a page and renders them, ``plots`` turns
matplotlib figures into inline SVG that follows the page's light or dark colours.
"""

from __future__ import annotations

from sapwood.report.page import Figure, Page, Section, Stat, Table, render

__all__ = [
    "Figure",
    "Page",
    "Section",
    "Stat",
    "Table",
    "render",
]
