"""The MNIST experiment of the examples, with its gates; needs the data and some minutes."""

from __future__ import annotations

import importlib.util
import json
import statistics
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "mnist_lenet300.py"


def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mnist_lenet300", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_missing_data_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert example().main(["--data", str(tmp_path)]) == 3
    assert "train-images-idx3-ubyte" in capsys.readouterr().err


@pytest.mark.slow
def test_zeros_are_exact_and_stay(shared_data: Path, tmp_path: Path) -> None:
    """One epoch on the real data: the bookkeeping, whatever the accuracy."""
    out = tmp_path / "results.json"
    few = ["--seeds", "0", "--epochs", "1", "--sparsity", "0.95", "--out", str(out)]
    assert example().main(["--data", str(shared_data / "mnist"), *few]) == 0
    rows = [r for r in json.loads(out.read_text()) if r["method"] in ("linear", "cubic")]
    assert len(rows) == 2
    for row in rows:
        assert row["zeros"] == row["zeros_expected"]
        assert row["masks_and_weights_agree"]
        assert row["zeros_broken_after_t1"] == 0


@pytest.mark.experiment
@pytest.mark.timeout(3600)
def test_progressive_pruning_keeps_the_accuracy(shared_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    folder = shared_data / "mnist"
    assert example().main(["--data", str(folder), "--out", str(out)]) == 0
    rows = json.loads(out.read_text())

    def mean(method: str, sparsity: float) -> float:
        return statistics.fmean(
            r["accuracy"] for r in rows if (r["method"], r["sparsity"]) == (method, sparsity)
        )

    dense = mean("dense", 0.0)
    assert dense > 98.0
    assert mean("linear", 0.9) >= dense - 0.3
    assert mean("linear", 0.95) >= dense - 0.7
    assert mean("cubic", 0.9) >= dense - 0.3
    assert mean("cubic", 0.95) >= dense - 0.5
    for row in rows:
        if row["method"] in ("linear", "cubic"):
            assert row["zeros"] == row["zeros_expected"]
            assert row["masks_and_weights_agree"]
            assert row["zeros_broken_after_t1"] == 0
            assert mean("one-shot", row["sparsity"]) < mean(row["method"], row["sparsity"])
