"""Seconds and peak memory of every compiler call of a build.

    tools/build_report.py run LOG COMMAND ...    # runs a compiler and appends a line to LOG
    tools/build_report.py show LOG --limit-mb 1024

As CMake's compiler launcher ``run`` notes a build while it is made:

    export CMAKE_CXX_COMPILER_LAUNCHER="python3;$PWD/tools/build_report.py;run;$PWD/build/units.log"
    export CMAKE_CUDA_COMPILER_LAUNCHER="$CMAKE_CXX_COMPILER_LAUNCHER"

``show`` prints the largest call of every unit; exit code 1 when one needed more than the limit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SUFFIXES = (".cpp", ".cu", ".c", ".cc")


def run(log: Path, command: list[str]) -> int:
    """Runs one command; notes its last source, seconds and the MB of its largest process."""
    start = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)  # or Popen warns that it still runs
    sources = [word for word in command if word.endswith(SUFFIXES)]
    if sources:
        seconds = time.perf_counter() - start
        line = json.dumps([os.path.relpath(sources[-1], ROOT), seconds, usage.ru_maxrss / 1024])
        with log.open("a") as file:  # one short write: lines of parallel calls do not mix
            file.write(line + "\n")
    return process.returncode


def show(log: Path, limit: float) -> int:
    """Prints the table, largest first."""
    units: dict[str, tuple[float, float]] = {}
    for line in log.read_text().splitlines():
        name, seconds, peak = json.loads(line)
        before = units.get(name, (0.0, 0.0))
        units[name] = max(before[0], seconds), max(before[1], peak)
    print(f"{'unit':<48}{'seconds':>9}{'peak MB':>9}")
    for name, (seconds, peak) in sorted(units.items(), key=lambda unit: -unit[1][1]):
        print(f"{name:<48}{seconds:>9.1f}{peak:>9.0f}")
    largest = max((peak for _, peak in units.values()), default=0.0)
    print(f"{len(units)} units, at most {largest:.0f} MB of {limit:.0f} allowed")
    return int(not units or largest > limit)


def main() -> int:
    if sys.argv[1:2] == ["run"] and len(sys.argv) > 3:
        return run(Path(sys.argv[2]), sys.argv[3:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("run", help="run LOG COMMAND ...")
    parse = commands.add_parser("show", help="the table of a log")
    parse.add_argument("log", type=Path)
    parse.add_argument("--limit-mb", type=float, default=1024, help="default: 1024")
    arguments = parser.parse_args()
    if arguments.command == "run":
        parser.error("run needs LOG and COMMAND")
    return show(arguments.log, arguments.limit_mb)


if __name__ == "__main__":
    sys.exit(main())
