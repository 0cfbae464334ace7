"""``sapwood compare`` on MNIST, with gates for what is claimed; needs the data and some minutes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from sapwood.cli import build_app

TEN_ROUNDS = "0.8926258176"  # 1 - 0.8^10: ten rounds of a fifth


def compare(folder: Path, out: Path, *options: str) -> Result:
    arguments = ["compare", "--task", "mnist", "--data", str(folder), "--out", str(out), *options]
    return CliRunner().invoke(build_app(), arguments)


def results(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "report.json").read_text())
    return content


def test_missing_data_is_named(tmp_path: Path) -> None:
    result = compare(tmp_path, tmp_path / "out")
    assert result.exit_code == 3
    assert "train-images-idx3-ubyte" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_zeros_are_exact_and_stay(shared_data: Path, tmp_path: Path) -> None:
    """One epoch on the real data: the bookkeeping, whatever the accuracy."""
    methods = "one-shot,finetune,progressive,cubic,snip,grasp,rigl,random:rigl"
    options = ["--methods", methods, "--sparsity", "0.95", "--epochs", "1"]
    result = compare(shared_data / "mnist", tmp_path, *options)
    assert result.exit_code == 0, result.output
    report = results(tmp_path)
    assert report["faults"] == []
    assert len(report["runs"]) == 9
    for run in report["runs"]:
        if run["method"] == "dense":
            continue
        assert run["zeros"] == run["zeros_expected"] == round(0.95 * 266_200)
        assert run["masks_and_weights_agree"]
        assert run["left_zero_after_last_update"] == (None if run["method"] == "one-shot" else 0)


#: method, sparsity, other method, how many points the mean of three seeds is above the other's.
#: Measured on one x86 machine, in the same order: -0.27, -0.62, -0.15, -0.32, +0.21, +1.49, +38.6,
#: +1.16, +0.76; and -0.28 to the lottery ticket after ten rounds.
GATES = [
    ("progressive", 0.9, "dense", -0.3),
    ("progressive", 0.95, "dense", -0.7),
    ("cubic", 0.9, "dense", -0.3),
    ("cubic", 0.95, "dense", -0.5),
    ("progressive", 0.98, "snip", 0.0),
    ("cubic", 0.98, "snip", 1.0),
    ("progressive", 0.98, "random", 8.0),
    ("progressive", 0.98, "progressive:layer", 0.5),
    ("rigl", 0.95, "random:erk", 0.3),
]


@pytest.mark.experiment
@pytest.mark.timeout(7200)
def test_accuracies_are_those_that_are_claimed(shared_data: Path, tmp_path: Path) -> None:
    rows: dict[tuple[str, float], float] = {}
    for methods, sparsities in (
        ("one-shot,progressive,cubic", "0.9,0.95,0.98"),
        ("progressive,progressive:layer,snip,random", "0.98"),
        ("rigl,random:erk", "0.95"),
        ("progressive,lth", TEN_ROUNDS),
    ):
        options = ["--methods", methods, "--sparsity", sparsities, "--seeds", "0,1,2"]
        result = compare(shared_data / "mnist", tmp_path, *options, "--jobs", "2", "--resume")
        assert result.exit_code == 0, result.output
        report = results(tmp_path)
        assert report["faults"] == []
        rows |= {(row["method"], row["sparsity"]): row["mean"] for row in report["rows"]}

    dense = rows["dense", 0.0]
    assert dense > 0.98
    for method, sparsity, other, points in GATES:
        baseline = dense if other == "dense" else rows[other, sparsity]
        assert rows[method, sparsity] >= baseline + points / 100, (method, sparsity, other)
    for sparsity in (0.9, 0.95, 0.98):
        assert rows["one-shot", sparsity] < rows["progressive", sparsity]
    ten_rounds = float(TEN_ROUNDS)
    assert rows["progressive", ten_rounds] >= rows["lth", ten_rounds] - 0.003
