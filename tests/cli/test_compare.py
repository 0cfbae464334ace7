"""``sapwood compare`` from arguments to table, and that its runs are those of ``sapwood prune``."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sapwood.cli import comparison_page, runs, tasks, training
from sapwood.cli.choices import METHODS, Variant
from sapwood.pruning import MaskSet
from tests.cli.conftest import Invoke

Narrow = Callable[[str], bool]
PRUNABLE = 64 * 32 + 32 * 32 + 32 * 10
DRAWING = comparison_page.drawing
ALL = "one-shot,finetune,progressive,cubic,snip,grasp,rigl,random,random:snip,lth"


@pytest.fixture(autouse=True)
def _moments(small_digits: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run takes twelve steps, and most tests do not draw."""
    plan = replace(tasks.PLANS["digits"], epochs=2, batch_size=256, every=2)
    monkeypatch.setitem(tasks.PLANS, "digits", plan)
    monkeypatch.setitem(tasks.WIDTHS, "lenet300", (32, 32))
    monkeypatch.setattr(comparison_page, "drawing", lambda result, inline: "<svg></svg>")


@pytest.fixture(name="trained")
def trained_recipes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The trainings that took place, as method, sparsity, seed."""
    found: list[str] = []
    train = training.train

    def noted(recipe: Any, *arguments: Any, **options: Any) -> Any:
        found.append(f"{recipe.method} {recipe.sparsity:g} {recipe.seed}")
        return train(recipe, *arguments, **options)

    monkeypatch.setattr(training, "train", noted)
    return found


def report(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "report.json").read_text())
    return content


def by_name(out: Path) -> dict[str, dict[str, Any]]:
    return {run["name"]: run for run in report(out)["runs"]}


def test_every_method_ends_in_one_table(invoke: Invoke, narrow: Narrow, tmp_path: Path) -> None:
    options = ["--methods", ALL, "--sparsity", "0.8,0.5", "--seeds", "0,1", "--out", tmp_path]
    result = invoke("compare", *options)
    assert result.exit_code == 0, result.output
    table, _, wrote = result.stdout.rpartition("wrote ")
    assert narrow(table)
    assert wrote.startswith("index.html, plot.svg, report.json, table.csv to ")
    assert "MISMATCH" not in table
    assert "One of the 360 test images is 0.28 points." in table
    runs_found = by_name(tmp_path)
    assert len(runs_found) == 2 + 10 * 2 * 2
    for run in runs_found.values():
        assert run["accuracy"] == 1 - run["wrong"] / 360
        if run["method"] == "dense":
            continue
        assert run["zeros"] == run["zeros_expected"] == round(run["sparsity"] * PRUNABLE)
        assert run["masks_and_weights_agree"]
        assert run["left_zero_after_last_update"] == (None if run["method"] == "one-shot" else 0)
        masks = MaskSet.load(tmp_path / "runs" / f"{run['name']}.masks.safetensors")
        assert masks.digest() == run["masks_digest"]


def test_table_holds_mean_range_and_gap_of_the_runs(invoke: Invoke, tmp_path: Path) -> None:
    options = ["--methods", "progressive,lth", "--sparsity", "0.5,0.8", "--seeds", "0,1,2"]
    assert invoke("compare", *options, "--out", tmp_path).exit_code == 0
    found = by_name(tmp_path)
    lines = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    assert [(line["method"], line["sparsity"]) for line in lines] == [
        ("dense", "0.0"),
        ("progressive", "0.5"),
        ("progressive", "0.8"),
        ("lth", "0.5"),
        ("lth", "0.8"),
    ]
    dense = [found[f"dense_seed{seed}"]["accuracy"] for seed in range(3)]
    for line in lines[1:]:
        names = [f"{line['method']}_{line['sparsity']}_seed{seed}" for seed in range(3)]
        values = [found[name]["accuracy"] for name in names]
        assert float(line["mean"]) == pytest.approx(100 * sum(values) / 3, abs=1e-4)
        assert float(line["lowest"]) == pytest.approx(100 * min(values), abs=1e-4)
        assert float(line["highest"]) == pytest.approx(100 * max(values), abs=1e-4)
        gap = 100 * (sum(values) - sum(dense)) / 3
        assert float(line["gap"]) == pytest.approx(gap, abs=1e-4)
    # rounds of a fifth: 1 - 0.8^4 = 0.59 is the first beyond 0.5, 0.8^5 of that the rest
    assert [int(line["epochs"]) for line in lines] == [2, 2, 2, 2 * (1 + 4), 2 * (1 + 4 + 5)]


@pytest.mark.parametrize("method", [m for m in METHODS if m != "dense"])
def test_a_run_is_that_of_sapwood_prune(invoke: Invoke, tmp_path: Path, method: str) -> None:
    options = ["--sparsity", "0.7", "--arch", "lenet300", "--out"]
    compared = invoke(
        "compare", "--methods", method, "--seeds", "3", *options, tmp_path / "compare"
    )
    alone = invoke(
        "prune", "--method", method, "--seed", "3", *options, tmp_path / "prune", "--json"
    )
    assert compared.exit_code == alone.exit_code == 0
    one, other = by_name(tmp_path / "compare")[f"{method}_0.7_seed3"], json.loads(alone.stdout)
    for key in ("accuracy", "masks_digest", "zeros", "sparsity_report"):
        assert one[key] == other[key]


def test_what_is_shared_is_trained_once(invoke: Invoke, tmp_path: Path, trained: list[str]) -> None:
    options = ["--methods", "finetune,one-shot,lth", "--sparsity", "0.5,0.8", "--seeds", "0,1"]
    assert invoke("compare", *options, "--out", tmp_path).exit_code == 0
    assert sorted(trained) == [
        "dense 0 0",
        "dense 0 1",
        "finetune 0.5 0",
        "finetune 0.5 1",
        "finetune 0.8 0",
        "finetune 0.8 1",
        "lth 0.8 0",
        "lth 0.8 1",
    ]


@pytest.mark.parametrize("method", ["progressive", "snip", "lth", "rigl"])
def test_control_has_the_layer_sizes_of_its_method(
    invoke: Invoke, tmp_path: Path, method: str
) -> None:
    options = ["--methods", f"random:{method},{method}", "--sparsity", "0.5,0.9"]
    assert invoke("compare", *options, "--out", tmp_path).exit_code == 0
    for sparsity in ("0.5", "0.9"):
        files = [f"random-{method}_{sparsity}_seed0", f"{method}_{sparsity}_seed0"]
        control, masks = (
            MaskSet.load(tmp_path / "runs" / f"{file}.masks.safetensors") for file in files
        )
        assert control.counts() == masks.counts()
        assert control.digest() != masks.digest()


def test_resume_does_only_what_is_missing(
    invoke: Invoke, tmp_path: Path, trained: list[str]
) -> None:
    options = ["--sparsity", "0.8", "--epochs", "1", "--out", tmp_path, "--resume"]
    assert invoke("compare", "--methods", "snip,progressive", *options).exit_code == 0
    first = by_name(tmp_path)
    trained.clear()
    assert invoke("compare", "--methods", "snip,progressive", *options).exit_code == 0
    assert trained == []
    assert by_name(tmp_path) == first
    (tmp_path / "runs" / "snip_0.8_seed0.json").unlink()
    assert invoke("compare", "--methods", "snip,progressive", *options).exit_code == 0
    assert trained == ["snip 0.8 0"]
    again = by_name(tmp_path)["snip_0.8_seed0"]
    assert again["masks_digest"] == first["snip_0.8_seed0"]["masks_digest"]
    trained.clear()
    assert invoke("compare", "--methods", "snip,cubic", "--seeds", "0,1", *options).exit_code == 0
    assert trained == ["dense 0 1", "snip 0.8 1", "cubic 0.8 0", "cubic 0.8 1"]
    rows = [(row["method"], row["seeds"]) for row in report(tmp_path)["rows"]]
    assert rows == [("dense", 2), ("snip", 2), ("cubic", 2)]


def test_another_sparsity_changes_the_way_of_the_lottery_ticket(
    invoke: Invoke, tmp_path: Path, trained: list[str]
) -> None:
    options = ["--methods", "lth", "--epochs", "1", "--out", tmp_path, "--resume"]
    assert invoke("compare", "--sparsity", "0.5", *options).exit_code == 0
    assert invoke("compare", "--sparsity", "0.3,0.5", *options).exit_code == 0
    assert trained == ["dense 0 0", "lth 0.5 0", "lth 0.5 0"]
    assert [row["epochs"] for row in report(tmp_path)["rows"]] == [1, 3, 5]


def test_another_setup_is_refused(invoke: Invoke, tmp_path: Path) -> None:
    options = ["--methods", "snip", "--sparsity", "0.8", "--out", tmp_path]
    assert invoke("compare", *options, "--epochs", "1").exit_code == 0
    again = invoke("compare", *options, "--epochs", "1")
    assert again.exit_code == 2
    assert "holds the runs of a comparison: --resume goes on with them" in again.stderr
    other = invoke("compare", *options, "--epochs", "2", "--resume")
    assert other.exit_code == 2
    assert "holds runs with --epochs 1, got 2; take another --out" in other.stderr
    fewer = invoke("compare", *options, "--epochs", "1", "--limit", "500", "--resume")
    assert fewer.exit_code == 2
    assert "holds runs with --limit None, got 500" in fewer.stderr


@pytest.mark.parametrize("content", ["", "[]", '{"schema": "other"}', '{"schema": "sapwood'])
def test_a_damaged_result_is_named(invoke: Invoke, tmp_path: Path, content: str) -> None:
    options = ["--methods", "snip", "--sparsity", "0.8", "--epochs", "1", "--out", tmp_path]
    assert invoke("compare", *options).exit_code == 0
    (tmp_path / "runs" / "snip_0.8_seed0.json").write_text(content)
    result = invoke("compare", *options, "--resume")
    assert result.exit_code == 2
    assert "snip_0.8_seed0.json must be " in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("zeros", 3, "snip_0.8_seed0: 3 zeros instead of 2714"),
        ("masks_and_weights_agree", False, "snip_0.8_seed0: masks and weights disagree"),
        ("left_zero_after_last_update", 7, "snip_0.8_seed0: 7 masked weights left zero"),
    ],
)
def test_a_wrong_mask_is_not_passed_over(
    invoke: Invoke, tmp_path: Path, key: str, value: object, message: str
) -> None:
    options = ["--methods", "snip", "--sparsity", "0.8", "--epochs", "1", "--out", tmp_path]
    assert invoke("compare", *options).exit_code == 0
    file = tmp_path / "runs" / "snip_0.8_seed0.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps({**record, key: value}))
    result = invoke("compare", *options, "--resume")
    assert f"MISMATCH in {message}" in result.stdout
    assert report(tmp_path)["faults"] == [message]


def test_a_run_that_fails_is_named(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wild = replace(tasks.PLANS["digits"], lr=1e30)
    monkeypatch.setitem(tasks.PLANS, "digits", wild)
    result = invoke("compare", "--methods", "progressive", "--out", tmp_path)
    assert result.exit_code == 1
    assert "error: progressive, 90 %, seed 0: " in result.stderr
    assert "NaN" in result.stderr
    assert result.stderr.splitlines()[-1].endswith("--resume")
    assert (tmp_path / "runs" / "dense_seed0.json").exists()


def test_one_seed_is_said_to_be_one(invoke: Invoke, tmp_path: Path) -> None:
    options = ["--methods", "snip", "--sparsity", "0.8", "--epochs", "1", "--out", tmp_path]
    result = invoke("compare", *options)
    assert "There was one seed" in result.stdout
    page = (tmp_path / "index.html").read_text()
    assert "There was one seed" in page
    assert "At 80\N{NO-BREAK SPACE}% sparsity snip is most accurate" in page


def test_json_is_the_report_and_nothing_else(invoke: Invoke, tmp_path: Path) -> None:
    options = ["--methods", "snip", "--sparsity", "0.8", "--epochs", "1", "--out", tmp_path]
    assert json.loads(invoke("compare", *options, "--json").stdout) == report(tmp_path)


def test_dense_alone_is_a_comparison(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("compare", "--methods", "dense", "--epochs", "1", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert [row["method"] for row in report(tmp_path)["rows"]] == ["dense"]


def test_plot_and_page_ask_for_nothing(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison_page, "drawing", DRAWING)
    options = ["--methods", "snip,cubic", "--epochs", "1", "--seeds", "0,1", "--out", tmp_path]
    assert invoke("compare", *options).exit_code == 0
    page = (tmp_path / "index.html").read_text()
    assert "://" not in page
    assert page.count("<svg role=") == 1
    plot = (tmp_path / "plot.svg").read_text()
    assert plot.startswith('<?xml version="1.0" encoding="UTF-8"?>\n<svg ')
    assert "var(" not in plot
    for label in ("dense", "snip", "cubic", "90 %", "98 %"):
        assert f">{label}</text>" in plot


@pytest.mark.parametrize(
    ("text", "method", "scope", "like"),
    [
        ("progressive", "progressive", "global", None),
        ("progressive:global", "progressive", "global", None),
        ("progressive:layer", "progressive", "layer", None),
        ("lth", "lth", "layer", None),
        ("lth:global", "lth", "global", None),
        ("rigl", "rigl", "erk", None),
        ("random:erk", "random", "erk", None),
        ("random:one-shot", "random", "global", "one-shot"),
    ],
)
def test_variants_are_read_and_written(
    text: str, method: str, scope: str, like: str | None
) -> None:
    variant = Variant.parse(text)
    assert (variant.method, variant.scope, variant.like) == (method, scope, like)
    assert Variant.parse(str(variant)) == variant


def test_names_of_results_differ() -> None:
    words = ["random", "random:erk", "random:snip", "snip", "snip:layer"]
    names = {
        runs.name_of(Variant.parse(word), sparsity, seed)
        for word in words
        for sparsity in (0.9, 0.8926258176, 0.89262581)
        for seed in (0, 1)
    }
    assert len(names) == len(words) * 6
