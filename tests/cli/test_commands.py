"""The command line as a whole: help, start-up, missing parts, bad arguments."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sapwood import _load
from sapwood.cli import COMMANDS
from tests.cli.conftest import Invoke

Narrow = Callable[[str], bool]


def test_help_lists_every_command(invoke: Invoke, narrow: Narrow) -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    assert all(command in result.stdout for command in COMMANDS)
    assert narrow(result.stdout)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(invoke: Invoke, narrow: Narrow, command: str) -> None:
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert narrow(result.stdout)


def test_installed_command_runs() -> None:
    script = Path(sys.executable).with_name("sapwood")
    done = subprocess.run([script, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "tour" in done.stdout


def test_help_does_not_load_the_heavy_parts() -> None:
    code = (
        "import sys; from sapwood.cli import build_app; build_app(); "
        "print([m for m in ('sapwood.ops', 'sapwood.pruning', 'sklearn', 'matplotlib', 'jinja2')"
        " if m in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["prune", "--sparsity", "1"], "--sparsity must lie between 0 and 1, got 1.0"),
        (["prune", "--sparsity", "nan"], "--sparsity must lie between 0 and 1, got nan"),
        (["prune", "--sparsity", "much"], "Invalid value for '--sparsity'"),
        (["prune", "--method", "magic"], "'magic' is not one of"),
        (["prune", "--t1", "0"], "--t1 must lie in (0, 1], got 0.0"),
        (["prune", "--t1", "nan"], "--t1 must lie in (0, 1], got nan"),
        (["prune", "--epochs", "0"], "Invalid value for '--epochs'"),
        (["prune", "--task", "mnist"], "--task mnist needs --data DIR"),
        (["prune", "--task", "digits", "--data", "."], "--task digits takes no --data"),
        (["prune", "--task", "cifar10"], "--task cifar10 needs --data DIR"),
        (["prune", "--limit", "5"], "Invalid value for '--limit'"),
        (
            ["prune", "--method", "lth", "--scope", "erk"],
            "--scope must be layer or global with --method lth, got erk",
        ),
        (["compare", "--sparsity", "0.9,1"], "--sparsity must lie between 0 and 1, got 1"),
        (["compare", "--sparsity", "nan"], "--sparsity must lie between 0 and 1, got nan"),
        (["compare", "--sparsity", "much"], "--sparsity must lie between 0 and 1, got much"),
        (["compare", "--sparsity", ","], "--sparsity must name at least one, got ','"),
        (["compare", "--seeds", "0,-1"], "--seeds must be whole numbers from 0 on, got -1"),
        (["compare", "--seeds", ""], "--seeds must name at least one, got ''"),
        (["compare", "--methods", "magic"], "--methods: 'magic' is not one of progressive, cubic"),
        (
            ["compare", "--methods", "lth:erk"],
            "--methods: lth:X knows X = layer, global, got 'lth:erk'",
        ),
        (["compare", "--methods", "dense:layer"], "--methods: dense has no scope"),
        (
            ["compare", "--methods", "random:dense"],
            "--methods: random:X knows X = global, layer, erk, progressive, cubic",
        ),
        (
            ["compare", "--methods", "random:snip"],
            "--methods: random:snip needs snip in the list too",
        ),
        (["compare", "--jobs", "0"], "Invalid value for '--jobs'"),
        (["compare", "--t1", "2"], "--t1 must lie in (0, 1], got 2.0"),
        (["compare", "--task", "mnist"], "--task mnist needs --data DIR"),
        (["tour", "--threads", "0"], "Invalid value for '--threads'"),
        (["tour", "--seed", "-1"], "Invalid value for '--seed'"),
        (["unknown"], "No such command 'unknown'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_end_with_2(
    invoke: Invoke, narrow: Narrow, arguments: list[str], text: str
) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    message = " ".join(result.stderr.replace("|", " ").replace("\u2502", " ").split())
    assert text in message
    assert narrow(result.stderr)


@pytest.mark.parametrize("command", ["tour", "prune", "compare"])
def test_missing_package_is_named(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    found = importlib.util.find_spec

    def without_sklearn(name: str, package: str | None = None) -> Any:
        return None if name == "sklearn" else found(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", without_sklearn)
    result = invoke(command)
    assert result.exit_code == 1
    assert f"sapwood {command}" in result.stderr
    assert "needs scikit-learn: pip install 'sapwood[tour]'" in result.stderr


@pytest.mark.parametrize("command", ["tour", "prune", "compare"])
def test_broken_library_is_explained(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr(_load, "ops_error", "sapwood: the compiled library _ops is missing")
    result = invoke(command)
    assert result.exit_code == 1
    assert "the compiled library _ops is missing" in result.stderr
    assert "python -m sapwood" in result.stderr


def test_progress_moves_only_on_a_terminal() -> None:
    from sapwood.cli import console

    with console.bars() as bars:
        bars.start("a run")
        bars.step(1, 2, "half")
        assert bars._progress.disable
