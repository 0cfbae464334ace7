"""Draws bench/history.csv as SVG: ``python bench/plot.py [--commit C] [--machine M]``.

``--what speedup`` (default): speed-up of packed_linear over dense torch against sparsity, one curve
per batch, into docs/_static/masked_matmul.svg. ``--what history``: ratio over commits, into
docs/_static/masked_matmul_history.svg. The text follows the reader's light or dark theme.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import history

STATIC = history.ROOT / "docs" / "_static"
WIDTH, HEIGHT = 720, 420
LEFT, RIGHT, TOP, BOTTOM = 64, 96, 70, 64
BATCHES = (1, 16, 64, 256)
COLOURS = ("#2f81f7", "#1a9850", "#d9730d", "#b254d6")  # legible on white and on near-black

_STYLE = """
text { font: 13px -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #424a53 }
.title { font-size: 16px; font-weight: 600; fill: #1f2328 }
.grid { stroke: #8c959f; stroke-opacity: .25 }
.one { stroke: #6e7781; stroke-dasharray: 4 3 }
@media (prefers-color-scheme: dark) {
  text { fill: #9ea7b3 }
  .title { fill: #e6edf3 }
}
"""

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Axes:
    """Linear x, logarithmic y, in data units."""

    x: tuple[float, float]
    y: tuple[float, float]

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Position in the picture."""
        across = (x - self.x[0]) / (self.x[1] - self.x[0] or 1.0)
        up = math.log(y / self.y[0]) / math.log(self.y[1] / self.y[0])
        return (
            LEFT + across * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM),
        )


def speedup_curves(rows: Iterable[history.Row], shape: str) -> dict[str, Points]:
    """Batch label -> (sparsity, speed-up over dense) of the automatic choice, ascending."""
    curves: dict[str, Points] = {f"batch {batch}": [] for batch in BATCHES}
    for row in rows:
        match = re.fullmatch(rf"{shape} s=([\d.]+) B=(\d+)", row["case"])
        if row["op"] != "packed_linear" or row["provider"] != "sapwood" or match is None:
            continue
        label = f"batch {match[2]}"
        if label in curves:
            curves[label].append((float(match[1]), 1.0 / float(row["ratio"])))
    return {label: sorted(points) for label, points in curves.items() if points}


def history_curves(rows: Iterable[history.Row], shape: str) -> tuple[dict[str, Points], list[str]]:
    """Curves of the speed-up at sparsity 0.9 over commits, and the commits in recorded order."""
    rows = list(rows)
    commits = list(dict.fromkeys(row["commit"] for row in rows))
    curves: dict[str, Points] = {}
    for position, commit in enumerate(commits):
        of_commit = [row for row in rows if row["commit"] == commit]
        for label, points in speedup_curves(of_commit, shape).items():
            for sparsity, speedup in points:
                if sparsity == 0.9:
                    curves.setdefault(label, []).append((float(position), speedup))
    return curves, commits


def chart(
    curves: dict[str, Points],
    *,
    title: str,
    subtitle: str,
    x_label: str,
    x_ticks: Sequence[tuple[float, str]],
) -> str:
    """An SVG picture: logarithmic speed-up against x, every curve labelled at its end."""
    values = [y for points in curves.values() for _, y in points]
    low = 2.0 ** math.floor(math.log2(min(*values, 1.0)))
    high = 2.0 ** math.ceil(math.log2(max(*values, 2.0)))
    axes = Axes((x_ticks[0][0], x_ticks[-1][0]), (low, high))
    parts = [
        f'<text class="title" x="{LEFT}" y="28">{escape(title)}</text>',
        f'<text x="{LEFT}" y="48">{escape(subtitle)}</text>',
        *_grid(axes, x_ticks, x_label),
        *_lines(axes, curves),
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}"><style>{_STYLE}</style>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _grid(axes: Axes, x_ticks: Sequence[tuple[float, str]], x_label: str) -> list[str]:
    parts = []
    level = axes.y[0]
    while level <= axes.y[1]:
        x, y = axes.at(axes.x[0], level)
        kind = "one" if level == 1.0 else "grid"
        parts.append(
            f'<line class="{kind}" x1="{x}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>'
        )
        name = "dense" if level == 1.0 else f"{level:g}x"
        parts.append(f'<text x="{x - 8}" y="{y + 4:.1f}" text-anchor="end">{name}</text>')
        level *= 2
    for value, name in x_ticks:
        x, y = axes.at(value, axes.y[0])
        parts.append(
            f'<text x="{x:.1f}" y="{y + 20:.1f}" text-anchor="middle">{escape(name)}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 18}" text-anchor="middle">{x_label}</text>')
    return parts


def _lines(axes: Axes, curves: dict[str, Points]) -> list[str]:
    parts = []
    ends = {label: axes.at(*points[-1])[1] for label, points in curves.items()}
    places = _spread(ends)
    for colour, (label, points) in zip(COLOURS, curves.items(), strict=False):
        places_of = [axes.at(x, y) for x, y in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places_of)
        parts.append(
            f'<polyline fill="none" stroke="{colour}" stroke-width="2.5" points="{path}"/>'
        )
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in places_of
        ]
        x = places_of[-1][0] + 10
        style = f"fill: {colour}; font-weight: 600"
        parts.append(
            f'<text x="{x:.1f}" y="{places[label] + 4:.1f}" style="{style}">{label}</text>'
        )
    return parts


def _spread(heights: dict[str, float], gap: float = 16.0) -> dict[str, float]:
    """Moves labels apart so that none covers another."""
    placed: dict[str, float] = {}
    last = -math.inf
    for label, height in sorted(heights.items(), key=lambda item: item[1]):
        last = max(height, last + gap)
        placed[label] = last
    return placed


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--what", choices=("speedup", "history"), default="speedup")
    parser.add_argument("--shape", default="2048x2048")
    parser.add_argument("--commit", help="default: the latest with such a measurement")
    parser.add_argument("--machine", help="default: that of the latest measurement")
    parser.add_argument("--history", type=Path, default=history.FILE)
    parser.add_argument("--out", type=Path)
    return parser.parse_args(arguments)


def picture(rows: Sequence[history.Row], shape: str, what: str) -> str:
    """The SVG of the rows of one machine; for ``speedup``, of one commit.

    Raises:
        SystemExit: when there is nothing to draw.
    """
    if what == "history":
        curves, commits = history_curves(rows, shape)
        ticks = [(float(i), commit[:7]) for i, commit in enumerate(commits)]
        about, x_label = "90 % sparsity", "commit"
    else:
        curves = speedup_curves(rows, shape)
        sparsities = sorted({s for points in curves.values() for s, _ in points})
        ticks = [(s, f"{s:.0%}") for s in sparsities]
        about, x_label = "float32", "sparsity"
    if not curves:
        raise SystemExit(f"the history holds no measurement of packed_linear at {shape} there")
    machine, torch, date = (rows[-1][column] for column in ("machine", "torch", "date"))
    return chart(
        curves,
        title=f"packed_linear against dense torch, {shape.replace('x', ' x ')}, {about}",
        subtitle=f"speed-up; {machine}; torch {torch}; {date}",
        x_label=x_label,
        x_ticks=ticks,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    rows = [
        row
        for row in history.read(options.history)
        if (row["op"], row["dtype"]) == ("packed_linear", "float32")
    ]
    if not rows:
        raise SystemExit("the history holds no measurement of packed_linear in float32")
    machine = options.machine or rows[-1]["machine"]
    rows = [row for row in rows if row["machine"] == machine]
    if options.what == "speedup":
        commit = options.commit or rows[-1]["commit"]
        rows = [row for row in rows if row["commit"].startswith(commit)]
    svg = picture(rows, options.shape, options.what)
    name = "masked_matmul.svg" if options.what == "speedup" else "masked_matmul_history.svg"
    out = options.out or STATIC / name
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(svg, encoding="utf-8")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
