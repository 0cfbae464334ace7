"""Plots and self-contained HTML pages; knows no method.

``files`` writes atomically, ``page`` holds the parts of a page and renders them, ``plots`` turns
matplotlib figures into inline SVG that follows the page's light or dark colours.
"""

from __future__ import annotations

from sapwood.report.files import atomic_write_bytes, atomic_write_text, staged
from sapwood.report.page import Figure, Page, Section, Stat, Table, render

__all__ = [
    "Figure",
    "Page",
    "Section",
    "Stat",
    "Table",
    "atomic_write_bytes",
    "atomic_write_text",
    "render",
    "staged",
]
