"""The command mnist-add: results, the check, the ablation, files, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from sapwood.cli import additions, chapters, console
from sapwood.cli.chapters import Context, learn_from_sums
from sapwood.nesy import mnist_add
from tests.cli.conftest import Invoke

Narrow = Callable[[str], bool]
FAST = ("--train", "64", "--epochs", "1")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, threads: None) -> None:
    monkeypatch.setattr(additions, "symbolic_share", lambda *_: 0.25)


def test_results_and_check(invoke: Invoke, narrow: Narrow) -> None:
    result = invoke("mnist-add", *FAST, "--check", "--seeds", "0,1")
    assert result.exit_code == 0, result.output
    assert "check: compiled truth agrees with enumeration on 16 rows" in result.stdout
    assert "no digit was ever labelled" in result.stdout
    assert "25.0 % of a step" in result.stdout
    table = [line for line in result.stdout.splitlines() if line.startswith((" 0", " 1", " mean"))]
    assert len(table) == 3
    assert all(narrow(line) for line in table)


def test_json_weights_and_page(invoke: Invoke, tmp_path: Path) -> None:
    weights, page = tmp_path / "digit.safetensors", tmp_path / "page.html"
    result = invoke(
        "mnist-add", *FAST, "--digits", "2", "--json", "--save", weights, "--report", page
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["schema"] == "sapwood.mnist-add/1"
    assert found["request"]["digits"] == 2
    assert [run["seed"] for run in found["runs"]] == [0]
    assert 0 <= found["runs"][0]["sum_accuracy"] <= 1
    net = mnist_add.network("small")
    net.load_state_dict(load_file(weights))
    assert "sums right, learned from sums alone" in page.read_text().replace(
        "\N{NO-BREAK SPACE}", " "
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["digit.safetensors", "page.html"]


def test_a_check_that_fails_stops(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(additions, "check", lambda *_: additions.Check(16, 0.5))
    result = invoke("mnist-add", *FAST, "--check")
    assert result.exit_code == 1
    assert "DIFFERS FROM enumeration" in result.stdout
    assert "no digit was ever labelled" not in result.stdout


def test_ablation(invoke: Invoke, narrow: Narrow, monkeypatch: pytest.MonkeyPatch) -> None:
    def once(calls: dict[str, Callable[[], object]], **_: object) -> dict[str, list[float]]:
        return {name: [1.0] for name in calls}

    monkeypatch.setattr(additions, "interleave", once)
    result = invoke("mnist-add", "--digits", "2", "--ablate", "--json")
    lazy, strict = json.loads(result.stdout)["rows"]
    assert strict["combinations"] == lazy["combinations"] == 10_000
    assert strict["peak_bytes"] >= 50 * lazy["peak_bytes"] > 0
    assert strict["peak_bytes"] >= 32 * 10_000 * 4  # at least the joint itself
    result = invoke("mnist-add", "--digits", "4", "--ablate")
    assert "refused" in result.stdout
    assert narrow(result.stdout)


def test_peak_counts_what_is_alive_at_once() -> None:
    import torch

    def call() -> None:
        for _ in range(3):
            x = torch.zeros(1000)
            y = x + 1
            del x, y

    assert additions.peak_bytes(call) == 8000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--digits", "0"), "--digits must be at least 1, got 0"),
        (("--digits", "3", "--check"), "--check enumerates at most 2 digits, got --digits 3"),
        (("--seeds", "0,x"), "--seeds must be distinct numbers by commas, got '0,x'"),
        (("--seeds", "1,1"), "--seeds must be distinct numbers by commas, got '1,1'"),
        (("--lr", "0"), "--lr must be positive, got 0.0"),
        (("--train", "0"), "num_train must be at least 1, got 0"),
    ],
)
def test_wrong_arguments(invoke: Invoke, arguments: tuple[str, ...], message: str) -> None:
    result = invoke("mnist-add", *arguments)
    assert result.exit_code == console.BAD_ARGUMENTS
    assert message in " ".join(result.stderr.replace("│", " ").split())


def test_missing_files(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("mnist-add", "--data", tmp_path / "nowhere")
    assert result.exit_code == console.MISSING_DATA
    assert "does not exist" in result.stderr


def test_chapter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learn_from_sums, "PAIRS", 200)
    assert "learn_from_sums" in chapters.CHAPTERS
    with console.bars() as bars:
        result = learn_from_sums.run(Context(quick=True, seed=0, bars=bars))
    assert result.data["largest_error"] < 1e-4
    assert 0 <= result.data["digit_accuracy"] <= 1
    assert "200 sums" in result.headline
