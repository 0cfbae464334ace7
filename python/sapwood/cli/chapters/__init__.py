"""The chapters of ``sapwood tour``.

A chapter is a module with ``TITLE`` and ``run(context) -> ChapterResult``; it stands in
``CHAPTERS`` below, in the order of the tour. It measures what it says, on the user's machine.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

from sapwood.cli.console import Bars
from sapwood.report.page import Chapter as PageChapter
from sapwood.report.page import Stat, Table

CHAPTERS = (
    "prune_pack_run",
    "compare_ways",
    "nearest_rows",
    "hidden_states",
    "shrink_and_run",
    "learn_from_sums",
)


@dataclass(frozen=True)
class Context:
    """What the command line asked for."""

    quick: bool
    seed: int
    bars: Bars


@dataclass(frozen=True)
class ChapterResult:
    """What a chapter measured, in the forms the tour shows."""

    page: PageChapter
    headline: str  # one sentence with the measured figures
    stats: Sequence[Stat]
    summary: Table  # printed in the terminal, at most 80 columns wide
    remarks: Sequence[str]  # printed below it
    facts: Sequence[tuple[str, str]]  # how it was measured: name, value
    data: dict[str, Any]  # for results.json


class Chapter(Protocol):
    """The interface of a chapter module."""

    TITLE: str

    def run(self, context: Context) -> ChapterResult: ...


def load() -> list[tuple[str, Chapter]]:
    """The chapters by name, in order."""
    return [
        (name, cast(Chapter, importlib.import_module(f"sapwood.cli.chapters.{name}")))
        for name in CHAPTERS
    ]
