"""Every example runs, and says what it claims."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
CASES = {
    "nesy_traffic_light": ([], "a six, then an even number: 1/12"),
    "nesy_circle": (["--epochs", "300"], "mean confidence in the truth 0."),
    "nesy_digit_products": (["--epochs", "1", "--train", "300"], "largest difference"),
    "nesy_smokers": ([], "Lukasiewicz: {'ann': 0.9"),
    "nesy_dependent": ([], "path 2 of 2"),
}


def test_all_examples_are_tested() -> None:
    found = {path.stem for path in EXAMPLES.glob("nesy_*.py")}
    assert found == set(CASES) | {"nesy_laziness"}  # its parts are tested with the command


@pytest.mark.parametrize("name", CASES)
def test_example(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], threads: None
) -> None:
    torch.set_num_threads(1)
    arguments, expected = CASES[name]
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert expected in capsys.readouterr().out
