"""The report of what the compilers need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import build_report
import pytest

SCRIPT = build_report.__file__


def run(log: Path, code: str, *sources: str) -> int:
    command = (sys.executable, SCRIPT, "run", str(log), sys.executable, "-c", code, *sources)
    return subprocess.run(command, check=False, timeout=60, cwd=build_report.ROOT).returncode


def test_a_unit_has_the_most_that_any_call_needed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "units"
    assert run(log, "pass", "csrc/one.cpp") == 0
    assert run(log, "x = b'x' * (200 << 20)", "csrc/one.cpp") == 0
    assert run(log, "pass", "csrc/two.cu") == 0
    assert run(log, "pass", "linked.so") == 0  # no source: not a compiler's call
    assert build_report.show(log, 1024) == 0
    _, first, second, total = capsys.readouterr().out.splitlines()
    assert first.split()[0] == "csrc/one.cpp"
    assert 200 < float(first.split()[2]) < 400
    assert second.split()[0] == "csrc/two.cu"
    assert total.startswith("2 units")
    assert build_report.show(log, 150) == 1


def test_the_exit_code_is_the_compilers(tmp_path: Path) -> None:
    assert run(tmp_path / "units", "raise SystemExit(3)", "a.cpp") == 3


def test_an_empty_log_is_no_pass(tmp_path: Path) -> None:
    (tmp_path / "units").touch()
    assert build_report.show(tmp_path / "units", 1024) == 1
