"""``sapwood minimize``: after a pruning run, and in cycles, from data to files."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sapwood.cli import shrinking, tasks
from sapwood.data import load_digits
from sapwood.minimize import SqueezeRelease, load
from sapwood.pruning import Progress
from tests.cli.conftest import Invoke

Narrow = Callable[[str], bool]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, small_digits: None) -> None:
    """Narrow networks and hardly any timing."""
    monkeypatch.setattr(shrinking, "TIMING_SECONDS", 0.02)
    monkeypatch.setitem(tasks.WIDTHS, "lenet300", (40, 20))


def network(widths: tuple[int, ...] = (40, 20)) -> nn.Module:
    return tasks.perceptron(widths, load_digits(), seed=0)


def accuracy(model: nn.Module) -> float:
    digits = load_digits()
    with torch.no_grad():
        right = model.eval()(digits.test_inputs).argmax(1) == digits.test_labels
    return float(right.double().mean())


def test_cycles_write_what_they_print(invoke: Invoke, narrow: Narrow, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = invoke("minimize", "--cycles", "2", "--sparsity", "0.8", "--out", out)
    assert result.exit_code == 0, result.output
    assert narrow(result.stdout.rpartition("wrote")[0])  # the last line holds a path
    report = json.loads((out / "report.json").read_text())
    assert report["schema"] == shrinking.SCHEMA
    names = [row["name"] for row in report["networks"]]
    assert names == ["dense", "cycle 1", "cycle 2"]
    sizes = [row["parameters"] for row in report["networks"]]
    assert sizes[0] == 64 * 40 + 40 + 40 * 20 + 20 + 20 * 10 + 10
    assert sizes == sorted(sizes, reverse=True)
    small = load(out / "model.safetensors", network)
    assert accuracy(small) == pytest.approx(report["networks"][-1]["accuracy"], abs=1e-6)
    for row in report["networks"]:
        assert row["name"] in result.stdout
        assert f"{row['parameters']:,}" in result.stdout
    assert [timing["batch"] for timing in report["timings"]] == [1, 64, 256]
    assert report["setup"]["sparsity"] == 0.8
    assert sorted(file.name for file in (out / "cycles").iterdir()) == [
        "cycle-1.safetensors",
        "cycle-2.safetensors",
        "dense.safetensors",
        "squeeze_release.json",
    ]


def test_json_and_nothing_else(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("minimize", "--cycles", "1", "--out", tmp_path / "out", "--json")
    assert json.loads(result.stdout)["cycles"][0]["number"] == 1


def test_a_pruned_network_is_minimized_as_it_is(
    invoke: Invoke, narrow: Narrow, tmp_path: Path
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    assert invoke("prune", "--sparsity", "0.95", "--arch", "lenet300", "--out", run).exit_code == 0
    result = invoke("minimize", "--run", run, "--out", out)
    assert result.exit_code == 0, result.output
    assert narrow(result.stdout.rpartition("wrote")[0])  # the last line holds a path
    report = json.loads((out / "report.json").read_text())
    before, after = report["networks"]
    assert (before["name"], after["name"]) == ("masked", "minimized")
    assert after["parameters"] < before["parameters"]
    assert after["max_error"] <= 1e-9
    assert report["same_predictions"] == report["predictions"] == 360
    assert report["max_difference"] < 1e-4
    small = load(out / "model.safetensors", network)
    pruned = json.loads((run / "report.json").read_text())
    assert accuracy(small) == pytest.approx(pruned["accuracy"])
    merged = invoke("minimize", "--run", run, "--rules", "exact+merge", "--out", out, "--json")
    assert json.loads(merged.stdout)["rules"] == "exact+merge"
    assert json.loads(merged.stdout)["parameters_after"] <= after["parameters"]
    assert report["rules"] == "exact"


def test_an_interrupted_run_goes_on(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    arguments = ["minimize", "--cycles", "2", "--seed", "3"]
    assert invoke(*arguments, "--out", whole).exit_code == 0

    class Stopped(SqueezeRelease):
        def __init__(self, *, progress: Callable[[Progress], None], **kwargs: Any) -> None:
            def watched(now: Progress) -> None:
                if now.stage == "cycle 2 prune":
                    signal.raise_signal(signal.SIGINT)
                progress(now)

            super().__init__(progress=watched, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(shrinking, "SqueezeRelease", Stopped)
        stopped = invoke(*arguments, "--out", out)
    assert stopped.exit_code == 130
    command = stopped.output.split("to go on:")[1].split()
    assert command[:2] == ["sapwood", "minimize"]
    assert "--resume" in command
    assert not (out / "report.json").exists()
    assert invoke(*command[1:]).exit_code == 0
    first, second = (json.loads((place / "report.json").read_text()) for place in (whole, out))
    assert first["cycles"] == second["cycles"]
    again = invoke(*arguments, "--out", out)
    assert again.exit_code == 2
    assert "without resume" in again.output


def test_other_networks_and_options(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke(
        *("minimize", "--arch", "smallcnn", "--cycles", "1", "--epochs", "1", "--limit", "200"),
        *("--score", "magnitude", "--no-release", "--factor", "0.4", "--out", tmp_path / "a"),
    )
    assert result.exit_code == 0, result.output
    setup = json.loads((tmp_path / "a" / "report.json").read_text())["setup"]
    assert (setup["score"], setup["release"], setup["factor"]) == ("magnitude", False, 0.4)
    stopped = invoke("minimize", "--sparsity", "0.99", "--max-drop", "0.0", "--out", tmp_path / "b")
    report = json.loads((tmp_path / "b" / "report.json").read_text())
    assert stopped.exit_code == 0
    assert len(report["cycles"]) < 4
    assert report["best"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sparsity", "1.5"], "first_sparsity must"),
        (["--factor", "0"], r"nnz_factor must lie in (0, 1), got 0.0"),
        (["--max-drop", "-1"], "max_drop must be at least 0"),
        (["--task", "mnist"], "needs --data DIR"),
        (["--limit", "15"], "--limit must be a multiple of the 10 classes"),
        (["--rules", "exact+merge"], "--rules exact+merge needs --run DIR"),
        (["--run", "nowhere"], "--run must be a folder of 'sapwood prune', got no"),
    ],
)
def test_bad_arguments(invoke: Invoke, tmp_path: Path, arguments: list[str], message: str) -> None:
    result = invoke("minimize", *arguments, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


def test_a_folder_with_another_report_is_refused(invoke: Invoke, tmp_path: Path) -> None:
    for content, message in (
        ("{", "must be a JSON object"),
        ("[]", "got another report"),
        ('{"schema": "sapwood.minimize/1"}', "got another report"),
    ):
        (tmp_path / "report.json").write_text(content)
        result = invoke("minimize", "--run", tmp_path, "--out", tmp_path / "out")
        assert result.exit_code == 2
        assert message in " ".join(result.output.split())


def test_networks_with_patches_train_with_adamw() -> None:
    plan = tasks.PLANS["cifar10"]
    assert shrinking.Request("cifar10", "vit_micro").config.optimizer == "adamw"
    config = shrinking.Request("cifar10", "resnet20", epochs=3).config
    assert (config.optimizer, config.epochs, config.batch_size) == ("sgd", 3, plan.batch_size)
    assert replace(config, epochs=3) == config
