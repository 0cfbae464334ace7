"""Runs one wheel in several environments, each with a torch of its own.

    python tools/smoke_wheel.py dist/*.whl --python ENV1/bin/python --python ENV2/bin/python

The wheel is unpacked into a temporary folder and the environments stay as they are. Each must have
torch, numpy, safetensors, rich and typer, and no editable sapwood. Among several wheels the one for
this machine is taken. With --tests the smoke tests run too, and need pytest and pytest-timeout.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

TOOLS = Path(__file__).resolve().parent


def wheel_for(machine: str, wheels: list[Path]) -> Path:
    """The only wheel whose platform is this machine's."""
    fitting = [wheel for wheel in wheels if wheel.stem.endswith(f"_{machine}")]
    if len(fitting) != 1:
        names = ", ".join(wheel.name for wheel in fitting) or "none"
        raise SystemExit(f"smoke_wheel: one wheel must be for {machine}, got {names}")
    return fitting[0]


def main() -> int:
    """Prints a line per family for each environment."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheels", type=Path, nargs="+")
    parser.add_argument("--python", type=Path, action="append", required=True)
    parser.add_argument("--tests", action="store_true", help="run the smoke tests as well")
    arguments = parser.parse_args()
    wheel = wheel_for(platform.machine(), arguments.wheels)
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(wheel).extractall(folder)
        environment = {**os.environ, "PYTHONPATH": folder, "SAPWOOD_DISPATCH": "builtin"}
        checks = [[str(TOOLS / "smoke_checks.py"), "--installed-in", folder]]
        if arguments.tests:
            checks.append([str(TOOLS / "check_installed.py"), "-q"])
        for python in arguments.python:
            for check in checks:
                command = [str(python), *check]
                failed |= subprocess.run(command, env=environment, check=False).returncode != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
