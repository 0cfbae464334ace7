"""The chapter on minimization says what was measured."""

from __future__ import annotations

import pytest

from sapwood.cli import console, packing, tasks
from sapwood.cli.chapters import Context, shrink_and_run
from sapwood.report.page import Figure, Table


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks of 40 and 20 units, and one batch size."""
    make = tasks.perceptron
    monkeypatch.setattr(
        shrink_and_run.tasks, "perceptron", lambda widths, dataset, seed: make((40, 20), dataset, 1)
    )
    monkeypatch.setattr(packing, "BATCHES", (8,))


def test_the_figures_of_the_chapter_agree(threads: None) -> None:
    with console.bars() as bars:
        chapter = shrink_and_run.run(Context(quick=True, seed=0, bars=bars))
    data = chapter.data
    dense, last = data["dense"], data["cycles"][-1]
    assert len(data["cycles"]) == 3
    assert data["times_smaller"] == dense["parameters"] / last["parameters"] > 1.5
    assert data["max_error"] <= 1e-9
    assert [timing["batch"] for timing in data["timings"]] == [8]
    assert f"{data['times_smaller']:.0f}-fold" in chapter.headline
    table = chapter.summary
    assert len(table.rows) == 4
    assert table.rows[-1][1] == f"{last['parameters']:,}"
    figure, same = chapter.page.sections[0].blocks
    assert isinstance(figure, Figure)
    assert isinstance(same, Table)
    assert figure.svg.startswith("<svg")
    assert (
        f"{last['parameters']:,} of {dense['parameters']:,}"
        in chapter.page.sections[0].paragraphs[0]
    )
