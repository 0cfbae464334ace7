"""Compiles every unit of a build again, one at a time, and reports seconds and peak memory.

    python tools/build_report.py build/dev --limit-mb 1024

Reads compile_commands.json; exit code 1 when a compiler needs more memory than the limit.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path


def measure(command: list[str], directory: str) -> tuple[float, float, int]:
    """Seconds, peak MB of the largest process, and exit code of one command."""
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=directory)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)  # or Popen warns that it still runs
    return time.perf_counter() - start, usage.ru_maxrss / 1024, process.returncode


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("build", type=Path, help="build directory")
    parser.add_argument("--limit-mb", type=float, default=1024, help="default: 1024")
    arguments = parser.parse_args()
    units = json.loads((arguments.build / "compile_commands.json").read_text())
    failed = False
    print(f"{'unit':<48}{'seconds':>9}{'peak MB':>9}")
    for unit in units:
        seconds, peak, code = measure(shlex.split(unit["command"]), unit["directory"])
        failed |= code != 0 or peak > arguments.limit_mb
        name = os.path.relpath(unit["file"])
        verdict = "" if code == 0 else f"  exit code {code}"
        print(f"{name:<48}{seconds:>9.1f}{peak:>9.0f}{verdict}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
