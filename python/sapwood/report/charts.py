"""The two charts that many reports need: shares as bars, and curves with the range around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sapwood.report import plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = "os^DvPX"
_DASHES = ("-", "--", ":")


@dataclass(frozen=True)
class ShareRow:
    """One row of bars: a name, a share for every series, and a remark behind the bars."""

    label: str
    shares: Sequence[float]  # in [0, 1]
    note: str = ""


def share_bars(rows: Sequence[ShareRow], series: Sequence[str], title: str) -> Figure:
    """Draws shares as horizontal bars, one row per name; call it inside ``plots.style()``.

    >>> with plots.style():
    ...     figure = share_bars([ShareRow("a", [0.5], "5 of 10")], ["kept"], "What is kept")

    Args:
        rows: from top to bottom, at least one.
        series: what each share of a row is, two at most.
        title: above the bars.

    Returns:
        The figure; it grows with the number of rows.

    Raises:
        ModuleNotFoundError: when matplotlib is not installed.
    """
    height = 0.8 / len(series)
    figure, (axes,) = plots.panels(1, width=7.2, height=1.15 + 0.36 * len(rows))
    colours = plots.SERIES[1 : len(series) + 1]
    for index, (name, colour) in enumerate(zip(series, colours, strict=True)):
        places = [row + (index + 0.5) * height - 0.4 for row in range(len(rows))]
        widths = [100 * row.shares[index] for row in rows]
        axes.barh(places, widths, height=0.86 * height, color=colour, label=name)
    for place, row in enumerate(rows):
        end = 100 * max(row.shares)
        axes.text(end + 1, place, row.note, va="center", color=plots.MUTED)
    axes.set(title=title, xlim=(0, 100), ylim=(len(rows) - 0.4, -0.6), xlabel="%")
    axes.set_yticks(range(len(rows)), [row.label for row in rows])
    axes.grid(visible=True, axis="x")
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    if len(series) > 1:
        figure.legend(loc="outside lower right", ncols=len(series))
    return figure


@dataclass(frozen=True)
class Curve:
    """One line: y over x, and the lowest and highest y at each x."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    lowest: Sequence[float]
    highest: Sequence[float]


@dataclass(frozen=True)
class Frame:
    """What stands around curves."""

    title: str
    x_label: str
    ticks: Sequence[tuple[float, str]]  # x, its label
    reference: tuple[float, str]  # a y to compare with, its name
    close_up: float | None = None  # a second panel begins at this y


def curves(lines: Sequence[Curve], frame: Frame) -> Figure:
    """Draws curves with their ranges; call it inside ``plots.style()``.

    Lines are told apart by colour, marker and dash, so that grey print shows them too.

    >>> line = Curve("a", [0, 1], [2, 3], [1, 2], [3, 4])
    >>> with plots.style():
    ...     figure = curves([line], Frame("A rise", "x", [(0, "0"), (1, "1")], (3.5, "goal")))

    Args:
        lines: any number.
        frame: title, axes and the reference line.

    Returns:
        The figure.

    Raises:
        ModuleNotFoundError: when matplotlib is not installed.
    """
    count = 1 if frame.close_up is None else 2
    height = max(3.4, 0.75 + 0.21 * (len(lines) + 1))
    figure, panels = plots.panels(count, width=10.0, height=height)
    for panel in panels:
        _curve_panel(panel, lines, frame)
    panels[0].set_title(frame.title)
    if frame.close_up is not None:
        top = max(frame.reference[0], *(max(line.highest) for line in lines))
        margin = 0.04 * (top - frame.close_up)
        panels[1].set(title="Close up", ylim=(frame.close_up, top + margin))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", handlelength=3.2)
    return figure


def _curve_panel(panel: Axes, lines: Sequence[Curve], frame: Frame) -> None:
    value, name = frame.reference
    panel.axhline(value, color=plots.SERIES[0], linewidth=1.4, label=name)
    colours = plots.SERIES[1:]
    for index, line in enumerate(lines):
        colour = colours[index % len(colours)]
        if list(line.lowest) != list(line.highest):
            panel.vlines(line.x, line.lowest, line.highest, color=colour, linewidth=1.1, alpha=0.6)
        panel.plot(
            line.x,
            line.y,
            color=colour,
            linestyle=_DASHES[index // len(colours) % len(_DASHES)],
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=4.5,
            label=line.label,
        )
    panel.set_xticks([x for x, _ in frame.ticks], [label for _, label in frame.ticks])
    panel.set(xlabel=frame.x_label)
