"""The tour: what it writes, what it prints, and that it says only what it measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sapwood.cli import chapters, console, tasks
from sapwood.cli.chapters import (
    ChapterResult,
    Context,
    compare_ways,
    hidden_states,
    image_of_gaussians,
    nearest_rows,
    prune_pack_run,
    skipped_regions,
)
from sapwood.cli.packing import Timing
from sapwood.report.page import Chapter, Section, Stat, Table
from tests.cli.conftest import Invoke

Narrow = Callable[[str], bool]
HOSTILE = "<b>bold & [red]"


@pytest.fixture(name="chapter")
def instant_chapter(monkeypatch: pytest.MonkeyPatch) -> list[Context]:
    """Puts a chapter without work in place of the real ones; returns what it was asked."""
    asked: list[Context] = []

    def run(context: Context) -> ChapterResult:
        asked.append(context)
        return ChapterResult(
            page=Chapter(HOSTILE, HOSTILE, [Section(HOSTILE, [HOSTILE])]),
            headline=HOSTILE,
            stats=[Stat(HOSTILE, HOSTILE)],
            summary=Table(["network", "accuracy"], [[HOSTILE, "1"]]),
            remarks=[HOSTILE],
            facts=[(HOSTILE, HOSTILE)],
            data={"value": 1},
        )

    module = SimpleNamespace(TITLE="Instant", run=run)
    monkeypatch.setattr(chapters, "load", lambda: [("instant", module)])
    return asked


def test_page_and_results_are_written(
    invoke: Invoke, narrow: Narrow, tmp_path: Path, chapter: list[Context], threads: None
) -> None:
    out = tmp_path / "deep" / "out"
    result = invoke("tour", "--quick", "--seed", "7", "--threads", "1", "--out", out)
    assert result.exit_code == 0, result.output
    assert (chapter[0].quick, chapter[0].seed) == (True, 7)
    assert sorted(file.name for file in out.iterdir()) == ["index.html", "results.json"]
    page = (out / "index.html").read_text()
    assert "<b>" not in page
    assert "&lt;b&gt;bold &amp; [red]" in page
    assert "://" not in page
    assert "1 thread" in page
    results = json.loads((out / "results.json").read_text())
    assert results["schema"] == "sapwood.tour/1"
    assert results["environment"]["torch"] == torch.__version__
    assert results["environment"]["cpu"]["threads"] == 1
    assert results["chapters"] == {"instant": {"value": 1}}
    head, _, wrote = result.stdout.rpartition("wrote ")
    assert wrote.startswith(str(out / "index.html"))
    assert HOSTILE in head
    assert narrow(head)


def test_interrupt_leaves_nothing(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: Context) -> ChapterResult:
        raise KeyboardInterrupt

    module = SimpleNamespace(TITLE="Instant", run=interrupted)
    monkeypatch.setattr(chapters, "load", lambda: [("instant", module)])
    result = invoke("tour", "--out", tmp_path / "out")
    assert result.exit_code == 130
    assert "interrupted; nothing was written" in result.stderr
    assert not (tmp_path / "out").exists()


def test_unwritable_folder_is_one_line(
    invoke: Invoke, tmp_path: Path, chapter: list[Context]
) -> None:
    (tmp_path / "file").write_text("")
    result = invoke("tour", "--out", tmp_path / "file")
    assert result.exit_code == 2
    assert "cannot write to" in result.stderr


def test_every_listed_chapter_loads() -> None:
    loaded = chapters.load()
    assert [name for name, _ in loaded] == list(chapters.CHAPTERS)
    assert all(module.TITLE and callable(module.run) for _, module in loaded)


@pytest.mark.parametrize(
    ("packed", "undisturbed", "expected"),
    [
        (0.125, 1.0, "and runs 8.0x as fast at batch 64."),
        (0.95, 1.0, "and runs 1.05x as fast at batch 64."),
        (0.99, 1.0, "but packed it is no faster than dense on this processor."),
        (2.0, 1.0, "but packed it is no faster than dense on this processor."),
        (0.125, 0.5, "The processor was too busy to say how much faster it runs."),
    ],
)
def test_headline_claims_no_more_than_was_measured(
    packed: float, undisturbed: float, expected: str
) -> None:
    seconds = {"dense": 1.0, "95 %": packed}
    measured = SimpleNamespace(
        runs={
            "dense": SimpleNamespace(accuracy=0.98),
            "95 %": SimpleNamespace(accuracy=0.97),
        },
        sparsest="95 %",
        best=Timing(64, seconds, seconds, undisturbed),
    )
    headline = prune_pack_run._headline(measured)  # type: ignore[arg-type]
    assert headline.startswith("Without 95 % of its weights the network reads 97.0 %")
    assert "(dense: 98.0 %)" in headline
    assert headline.endswith(expected)


@pytest.mark.parametrize("quick", [True, False])
def test_second_chapter_says_what_it_compared(
    small_digits: None, monkeypatch: pytest.MonkeyPatch, quick: bool
) -> None:
    monkeypatch.setitem(tasks.WIDTHS, "lenet300", (16, 16))
    with console.bars() as bars:
        result = compare_ways.run(Context(quick=quick, seed=5, bars=bars))
    methods = compare_ways.QUICK if quick else compare_ways.FULL
    assert [row[0] for row in result.summary.rows] == list(methods)
    assert result.summary.columns[2:] == ["90 %", "95 %"] + ["98 %"] * (not quick)
    assert result.data["seeds"] == [5]
    seeds = {run["seed"] for run in result.data["runs"]}
    assert seeds == {5}
    assert any("There was one seed" in remark for remark in result.remarks)
    dense = result.data["rows"][0]
    assert f"({100 * dense['mean']:.2f})" in result.remarks[0]


def test_the_photo_of_gaussians_is_what_it_says(threads: None) -> None:
    torch.set_num_threads(1)
    with console.bars() as bars:
        result = image_of_gaussians.run(Context(quick=True, seed=3, bars=bars))
    fits = result.data["fits"]
    assert [fit["psnr"] for fit in fits] == sorted(fit["psnr"] for fit in fits)
    assert fits[-1]["psnr"] > 28
    assert f"{fits[-1]['psnr']:.1f} dB" in result.headline
    for fit, row in zip(fits, result.summary.rows, strict=True):
        assert row[0] == str(fit["gaussians"])
        assert row[1] == f"{fit['psnr']:.2f} dB"
    figures = [block for section in result.page.sections for block in section.blocks]
    assert sum("data:image/png;base64" in getattr(figure, "svg", "") for figure in figures) == 2
    assert not any("://" in getattr(figure, "svg", "") for figure in figures)


def test_nearest_rows_finds_what_it_planted() -> None:
    result = nearest_rows.run(Context(quick=True, seed=3, bars=None))  # type: ignore[arg-type]
    assert result.data["missing"] == 0
    assert result.data["pairs"] >= 300
    assert result.data["digits_right"] > 0.95
    assert result.data["speedup"] > 0
    assert "All 300 planted copies were found." in result.remarks


def test_hidden_states_names_most_dice() -> None:
    result = hidden_states.run(Context(quick=True, seed=3, bars=None))  # type: ignore[arg-type]
    assert result.data["rolls"] == 1000
    assert -2000 < result.data["log_likelihood"] < -1500
    assert result.data["float32_product"] == 0.0
    assert result.data["decoded"] > 0.7
    assert result.data["speedup"] > 1
    assert "is 0." in result.remarks[0]


def test_skipped_regions_are_exact_and_timed() -> None:
    result = skipped_regions.run(Context(quick=True, seed=3, bars=None))  # type: ignore[arg-type]
    assert result.data["error"] <= 1e-5
    assert list(result.data["seconds"]) == ["0", "0.5", "0.7", "0.85"]
    assert all(min(times.values()) > 0 for times in result.data["seconds"].values())
    assert [row[0] for row in result.summary.rows] == ["0%", "50%", "70%", "85%"]


@pytest.mark.slow
def test_quick_tour_measures_what_it_shows(
    invoke: Invoke, narrow: Narrow, tmp_path: Path, threads: None
) -> None:
    result = invoke("tour", "--quick", "--threads", "1", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert narrow(result.stdout.rpartition("wrote ")[0])
    page = (tmp_path / "index.html").read_text()
    assert "://" not in page
    assert page.count("<svg role=") == 8
    chapters = json.loads((tmp_path / "results.json").read_text())["chapters"]
    dense, *pruned = chapters["prune_pack_run"]["networks"].values()
    assert dense["accuracy"] > 0.94
    for network, sparsity in zip(pruned, (0.9, 0.95), strict=True):
        assert network["accuracy"] >= dense["accuracy"] - 0.03
        assert network["sparsity"] == pytest.approx(sparsity, abs=1e-6)
        assert network["sparsity_report"]["consistent"]
        packed = network["packed"]
        assert packed["same_predictions"] == packed["predictions"] == 360
        assert packed["max_difference"] <= 1e-4
        for timing in packed["timings"]:
            assert timing["speedup"] == timing["dense_seconds"] / timing["packed_seconds"]
        shown = [timing["speedup"] for timing in packed["timings"]]
        assert any(speedup >= 1.03 for speedup in shown) or "Not faster than dense" in result.stdout
    comparison = chapters["compare_ways"]
    assert comparison["faults"] == []
    assert len(comparison["runs"]) == 11
    accuracies = {(row["method"], row["sparsity"]): row["mean"] for row in comparison["rows"]}
    assert accuracies["progressive", 0.95] > accuracies["random", 0.95] + 0.08
    for (method, _), accuracy in accuracies.items():
        assert method in result.stdout or method == "dense"
        assert f"{100 * accuracy:.2f}" in result.stdout
    assert "There was one seed" in result.stdout
