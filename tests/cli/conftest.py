"""Runs commands inside the test process, as a terminal of 80 columns would."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from sapwood.cli import build_app, experiment, tasks

Invoke = Callable[..., Result]


@pytest.fixture(autouse=True)
def _plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("SAPWOOD_DISPATCH", "builtin")  # a measured table costs seconds and varies
    for name in ("FORCE_COLOR", "SAPWOOD_CPU_CAPABILITY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def _ctrl_c_works() -> Iterator[None]:
    """A shell starts background jobs with SIGINT ignored, and their children inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(name="invoke")
def command_line() -> Invoke:
    """``invoke("mask", "inspect", path)`` -> the result, whose lines fit into 80 columns."""
    app = build_app()

    def invoke(*arguments: str | Path) -> Result:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return invoke


@pytest.fixture(name="narrow")
def narrow_lines() -> Callable[[str], bool]:
    """Whether every line fits into 80 columns."""
    return lambda text: all(len(line) <= 80 for line in text.splitlines())


@pytest.fixture(name="small_digits")
def quick_training(monkeypatch: pytest.MonkeyPatch, threads: None) -> None:
    """Networks of 32 units, two epochs of 23 steps, and hardly any timing."""
    torch.set_num_threads(1)
    small = replace(tasks.PLANS["digits"], epochs=2)
    monkeypatch.setitem(tasks.PLANS, "digits", small)
    monkeypatch.setitem(tasks.WIDTHS, "mlp", (32, 32))
    monkeypatch.setattr(experiment, "TIMING_SECONDS", 0.02)
