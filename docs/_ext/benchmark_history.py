"""The directive ``benchmark-history``: the newest measurements of bench/history.csv as tables."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx

HISTORY = Path(__file__).resolve().parents[2] / "bench" / "history.csv"

Row = dict[str, str]
Key = tuple[str, str, str]  # op, machine, dtype


def newest(rows: Sequence[Row]) -> Iterator[tuple[Key, list[Row]]]:
    """Rows of the last commit measured for each op, machine and dtype; the file is append-only."""
    groups: dict[Key, list[Row]] = {}
    for row in rows:
        groups.setdefault((row["op"], row["machine"], row["dtype"]), []).append(row)
    for key, group in groups.items():
        yield key, [row for row in group if row["commit"] == group[-1]["commit"]]


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> nodes.table:
    """A plain table; every cell is text."""
    group = nodes.tgroup("", *(nodes.colspec(colwidth=1) for _ in head), cols=len(head))
    for kind, lines in ((nodes.thead(), [head]), (nodes.tbody(), body)):
        for line in lines:
            cells = (nodes.entry("", nodes.paragraph(text=cell)) for cell in line)
            kind += nodes.row("", *cells)
        group += kind
    return nodes.table("", group)


def duration(microseconds: float) -> str:
    """Three digits and the unit that suits them."""
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if microseconds >= size:
            return f"{microseconds / size:#.3g} {unit}".replace(". ", " ")
    return f"{microseconds:#.3g} us".replace(". ", " ")


def pivot(rows: Sequence[Row]) -> nodes.table:
    """One line a case, one column a provider; cells hold the time and the ratio."""
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    cases: dict[str, dict[str, str]] = {}
    for row in rows:
        cell = f"{duration(float(row['median_us']))} ({float(row['ratio']):.2f})"
        cases.setdefault(row["case"], {})[row["provider"]] = cell
    body = [[case, *(cells.get(p, "") for p in providers)] for case, cells in cases.items()]
    return table(["case", *providers], body)


class BenchmarkHistory(Directive):
    """Takes no argument; shows every op that was measured."""

    def run(self) -> list[nodes.Node]:
        """Builds one section per op, machine and dtype."""
        self.state.document.settings.record_dependencies.add(str(HISTORY))
        with HISTORY.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
        if not rows:
            return [nodes.paragraph(text="No measurement is on record yet.")]
        found: list[nodes.Node] = []
        for (op, machine, dtype), group in newest(rows):
            last = group[-1]
            title = f"{op}, {dtype}"
            section = nodes.section(ids=[nodes.make_id(f"{title} {machine}")])
            section += nodes.title(text=title)
            section += nodes.paragraph(
                text=f"{machine}, torch {last['torch']}, commit {last['commit']}, {last['date']}."
            )
            section += pivot(group)
            found.append(section)
        return found


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the directive."""
    app.add_directive("benchmark-history", BenchmarkHistory)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
