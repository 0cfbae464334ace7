"""Charts: what they show is what they were given, and as files they stand for themselves."""

from __future__ import annotations

import builtins
import re
import sys
import xml.etree.ElementTree as ET
from typing import Any

import pytest
import torch
from torch import nn

from sapwood.pruning import SparsityReport, prune
from sapwood.report import charts, plots
from sapwood.report.charts import Curve, Frame, ShareRow
from sapwood.report.page import _template

SVG = "{http://www.w3.org/2000/svg}"


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ET.fromstring(svg).iter(f"{SVG}text")]


def bars(rows: list[ShareRow], series: list[str]) -> str:
    with plots.style():
        return plots.standalone(charts.share_bars(rows, series, "A title"), "a <drawing>")


def test_bars_have_the_lengths_of_their_shares() -> None:
    rows = [ShareRow("a", (0.25, 0.5), "1 of 4"), ShareRow("b", (1.0, 0.0), "all")]
    with plots.style():
        figure = charts.share_bars(rows, ["one", "two"], "A title")
        widths = [[patch.get_width() for patch in bar] for bar in figure.axes[0].containers]
        assert widths == [[25.0, 100.0], [50.0, 0.0]]
    shown = texts(bars(rows, ["one", "two"]))
    assert {"a", "b", "one", "two", "1 of 4", "all", "A title"} <= set(shown)


@pytest.mark.parametrize("count", [0, 1, 60])
def test_bars_of_any_number_of_rows(count: int) -> None:
    rows = [ShareRow(f"layer {index}", (0.5,)) for index in range(count)]
    shown = texts(bars(rows, ["kept"]))
    assert [text for text in shown if text.startswith("layer")] == [row.label for row in rows]


def lines(count: int, spread: float = 1.0) -> list[Curve]:
    return [
        Curve(f"way {index}", [0, 1], [index, 2], [index - spread, 2], [index + spread, 2])
        for index in range(count)
    ]


def test_curves_are_told_apart_without_colours() -> None:
    frame = Frame("Accuracy", "sparsity", [(0, "90 %"), (1, "99 %")], (3.0, "dense"))
    with plots.style():
        figure = charts.curves(lines(20), frame)
        looks = {(line.get_marker(), line.get_linestyle()) for line in figure.axes[0].lines[1:]}
        text = plots.standalone(figure, "curves")
    assert len(looks) == 20
    assert {"dense", "90 %", "99 %", "sparsity", *(f"way {i}" for i in range(20))} <= set(
        texts(text)
    )


def test_close_up_shows_from_its_bottom_to_the_top() -> None:
    frame = Frame("Accuracy", "sparsity", [(0, "0"), (1, "1")], (5.0, "dense"), close_up=1.5)
    with plots.style():
        figure = charts.curves(lines(3), frame)
    whole, close = figure.axes
    assert close.get_ylim()[0] == 1.5
    assert close.get_ylim()[1] > 5.0
    assert whole.get_ylim()[0] < -0.9


def test_ranges_are_drawn_only_where_there_are_some() -> None:
    frame = Frame("Accuracy", "sparsity", [(0, "0"), (1, "1")], (5.0, "dense"))
    with plots.style():
        without = charts.curves(lines(3, spread=0.0), frame)
        with_ranges = charts.curves(lines(3), frame)
    assert len(without.axes[0].collections) == 0
    assert len(with_ranges.axes[0].collections) == 3


def test_a_file_stands_for_itself() -> None:
    svg = bars([ShareRow("a & b <c>", (0.5,), "half")], ["kept"])
    assert svg.startswith('<?xml version="1.0" encoding="UTF-8"?>\n<svg ')
    assert "var(" not in svg
    assert not re.search(r"#(0[1-9a-c])\1\1", svg)
    assert plots.LIGHT["--series-1"] in svg
    assert 'aria-label="a &lt;drawing&gt;"' in svg
    assert "a & b <c>" in texts(svg)
    outside = re.findall(r'(?:href|src)="([^#"][^"]*)"|url\((?!#)', svg)
    assert outside == []
    assert bars([ShareRow("a & b <c>", (0.5,), "half")], ["kept"]) == svg


def test_the_light_colours_are_those_of_the_page() -> None:
    first = _template("page.css").split("@media")[0]
    page = dict(re.findall(r"(--[\w-]+): (#\w+);", first))
    assert {name: page[name] for name in plots.LIGHT} == plots.LIGHT
    assert set(plots.LIGHT) == set(plots._VARIABLES.values())
    dark = dict(re.findall(r"(--[\w-]+): (#\w+);", _template("page.css").split("@media")[1]))
    assert set(plots.LIGHT) <= set(dark)


def test_missing_matplotlib_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError("No module named 'matplotlib'")
        return found(name, *arguments, **options)

    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    model = nn.Linear(4, 4)
    report = SparsityReport.of(model, prune(model, 0.5))
    with pytest.raises(ModuleNotFoundError, match="matplotlib must be installed") as raised:
        report.to_svg()
    assert "pip install 'sapwood[tour]'" in str(raised.value)


def test_sparsity_report_draws_both_counts() -> None:
    model = nn.Sequential(nn.Linear(10, 20), nn.Linear(20, 5))
    masks = prune(model, 0.8)
    svg = SparsityReport.of(model, masks).to_svg()
    shown = texts(svg)
    for name, (kept, total) in masks.counts().items():
        assert name in shown
        assert f"{kept:,} of {total:,}" in shown
    assert "Weights kept: 60 of 300, 20.00%" in shown
    assert {"by mask", "by weight"} <= set(shown)
    assert "masks and weights agree" in svg
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    mismatch = SparsityReport.of(model, masks).to_svg()
    assert any(text.startswith("MISMATCH. Weights kept") for text in texts(mismatch))
