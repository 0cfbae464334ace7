"""The record of measurements, its comparison and its pictures."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import compare
import history
import plot
import pytest

from sapwood.cli.benchmarks.masked_matmul import MaskedMatmulCase
from sapwood.cli.benchmarks.runner import Timing


def row(**changes: str) -> history.Row:
    values = {
        "date": "2026-01-02",
        "commit": "aaaaaaa",
        "machine": "CPU, 1 thread",
        "torch": "2.13.0",
        "op": "packed_linear",
        "case": "2048x2048 s=0.9 B=64",
        "provider": "sapwood",
        "dtype": "float32",
        "median_us": "1000.00",
        "ratio": "0.2000",
        "peak_mb": "",
    }
    return {**values, **changes}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "history.csv"
    path.write_text(",".join(history.COLUMNS) + "\n")
    return path


def test_the_file_of_the_repository_is_valid() -> None:
    for recorded in history.read():
        assert float(recorded["ratio"]) > 0
        assert float(recorded["median_us"]) > 0


def test_a_key_is_recorded_once(file: Path) -> None:
    assert history.append([row(), row(ratio="0.3"), row(provider="csr")], file) == 2
    assert history.append([row(ratio="0.1"), row(commit="bbbbbbb")], file) == 1
    assert [r["commit"] for r in history.read(file)] == ["aaaaaaa", "aaaaaaa", "bbbbbbb"]


def test_recorded_rows_come_back_unchanged(file: Path) -> None:
    history.append([row(machine='CPU "x", 2 threads')], file)
    assert history.read(file) == [row(machine='CPU "x", 2 threads')]


def test_duplicates_and_foreign_columns_are_errors(file: Path) -> None:
    line = ",".join(f'"{value}"' for value in row().values())
    file.write_text(",".join(history.COLUMNS) + f"\n{line}\n{line}\n")
    with pytest.raises(ValueError, match="occurs more than once"):
        history.read(file)
    file.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="columns must be"):
        history.read(file)


def test_a_row_names_the_measurement() -> None:
    case = MaskedMatmulCase("packed_linear", 64, 32, 8, 0.5)
    made = history.row(case, "csr", Timing(12.345, 11.0, 0.51234, 0.5, 0.6), 1.25)
    assert tuple(made) == history.COLUMNS
    assert made["case"] == "64x32 s=0.5 B=8"
    assert (made["median_us"], made["ratio"], made["peak_mb"]) == ("12.35", "0.5123", "1.2")
    assert re.fullmatch(r"[0-9a-f]{12}(-dirty)?", made["commit"])


@pytest.mark.parametrize(("after", "status"), [("0.2290", 0), ("0.2310", 1), ("0.1000", 0)])
def test_compare_fails_beyond_fifteen_percent(
    after: str, status: int, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    history.append([row(), row(commit="bbbbbbb", ratio=after)], file)
    assert compare.main(["aaa", "bbb", "--history", str(file)]) == status
    assert f"1 compared, {status} worse" in capsys.readouterr().out


def test_compare_ignores_other_machines(file: Path) -> None:
    history.append([row(), row(commit="bbbbbbb", machine="other", ratio="0.9")], file)
    assert compare.main(["aaa", "bbb", "--history", str(file)]) == 2


def test_compare_refuses_an_ambiguous_commit(file: Path) -> None:
    history.append([row(commit="abc1"), row(commit="abc2")], file)
    with pytest.raises(SystemExit, match="stands for several commits"):
        compare.main(["abc", "abc2", "--history", str(file)])


def measured(commit: str = "aaaaaaa") -> list[history.Row]:
    return [
        row(commit=commit, case=f"2048x2048 s={s:g} B={b}", ratio=f"{(1 - s) * 2:.4f}")
        for b in plot.BATCHES
        for s in (0.5, 0.7, 0.9, 0.95)
    ]


def test_curves_hold_the_speed_up_of_the_automatic_choice() -> None:
    rows = [*measured(), row(provider="csr", case="2048x2048 s=0.8 B=64")]
    curves = plot.speedup_curves(rows, "2048x2048")
    assert list(curves) == ["batch 1", "batch 16", "batch 64", "batch 256"]
    assert curves["batch 64"] == [
        (0.5, 1.0),
        (0.7, pytest.approx(1 / 0.6)),
        (0.9, 5.0),
        (0.95, 10.0),
    ]


@pytest.mark.parametrize("what", ["speedup", "history"])
def test_the_picture_is_a_self_contained_svg(what: str, file: Path, tmp_path: Path) -> None:
    history.append([*measured(), *measured("bbbbbbb")], file)
    out = tmp_path / "static" / "plot.svg"
    plot.main(["--what", what, "--history", str(file), "--out", str(out)])
    svg = out.read_text()
    root = ElementTree.fromstring(svg)
    assert len(root.findall("{http://www.w3.org/2000/svg}polyline")) == 4
    for text in ("CPU, 1 thread", "2026-01-02", "batch 256", "prefers-color-scheme: dark"):
        assert text in svg
    assert "http" not in svg.replace("http://www.w3.org/2000/svg", "")


def test_labels_keep_their_distance() -> None:
    placed = plot._spread({"a": 10.0, "b": 11.0, "c": 12.0, "d": 90.0})
    assert placed == {"a": 10.0, "b": 26.0, "c": 42.0, "d": 90.0}


def test_nothing_to_draw_is_said(file: Path) -> None:
    with pytest.raises(SystemExit, match="holds no measurement"):
        plot.main(["--history", str(file)])
