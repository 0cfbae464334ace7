"""The example and the latency benchmark, on digits: what they print is what they write."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
WORDS = ["--task", "digits", "--cycles", "2", "--epochs", "4", "--seed", "1"]


@pytest.fixture(name="scripts")
def import_scripts(monkeypatch: pytest.MonkeyPatch, threads: None) -> tuple[ModuleType, ModuleType]:
    for folder in ("examples", "bench"):
        monkeypatch.syspath_prepend(ROOT / folder)
    return importlib.import_module("squeeze_release"), importlib.import_module("minimize_latency")


def test_a_run_and_its_latency(
    scripts: tuple[ModuleType, ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example, latency = scripts
    run, out = tmp_path / "run", tmp_path / "run.json"
    assert example.main([*WORDS, "--checkpoint", str(run), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    report = json.loads(out.read_text())
    assert [cycle["number"] for cycle in report["cycles"]] == [1, 2]
    for cycle in report["cycles"]:
        assert f"cycle {cycle['number']}: {cycle['parameters']:,} parameters" in printed
    assert report["setup"]["seed"] == 1
    last = report["seen"][-1]["widths"]
    assert sum(rows * columns for rows, columns in last.values()) < report["prunable"] / 4
    arguments = ["--run", str(run), "--arch", "lenet300", "--image", "1", "8", "8"]
    timed = tmp_path / "latency.json"
    assert (
        latency.main([*arguments, "--batches", "8", "--seconds", "0.05", "--out", str(timed)]) == 0
    )
    rows = json.loads(timed.read_text())["rows"]
    assert [row["network"] for row in rows] == ["masked", "masked, packed", "cycle 1", "cycle 2"]
    assert rows[0]["speedup"] == 1.0
    buffers = report["cycles"][-1]["parameters"] - rows[-1]["parameters"]
    assert 0 <= buffers <= 64  # the index of the inputs that are read
    assert torch.get_num_threads() == 1


def test_data_must_be_named(
    scripts: tuple[ModuleType, ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        scripts[0].main(["--task", "mnist", "--out", "r.json"])
    assert "--task mnist needs --data" in capsys.readouterr().err
