"""Measures the dispatch tables that ship with the package, and writes them.

``python bench/builtin.py [--seconds 10]`` on a quiet machine. The instruction set is read once per
process, so each combination is measured in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import sapwood
from sapwood.ops import _dispatch

FILE = Path(sapwood.__file__).parent / "ops" / "dispatch_builtin.json"
ISAS = ("avx512", "avx2", "default")
THREADS = (1, 2)
DTYPES = ("float32", "float64", "bfloat16", "float16")

_CHILD = """
import sys, torch, sapwood.ops
threads, dtype, seconds = int(sys.argv[1]), getattr(torch, sys.argv[2]), float(sys.argv[3])
print(sapwood.ops.calibrate(seconds=seconds, force=True, threads=threads, dtype=dtype).to_json())
"""


def measured(isa: str, threads: int, dtype: str, seconds: float) -> dict[str, object]:
    """One table, measured in a child process with an empty cache."""
    environment = {
        **os.environ,
        "SAPWOOD_CPU_CAPABILITY": isa,
        "SAPWOOD_DISPATCH": "auto",
    }
    with tempfile.TemporaryDirectory() as empty:
        environment["SAPWOOD_CACHE_DIR"] = empty
        command = (sys.executable, "-c", _CHILD, str(threads), dtype, str(seconds))
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    if done.stderr:
        raise SystemExit(done.stderr)
    table = _dispatch.DispatchTable.from_json(done.stdout)
    if table.key.isa != isa:
        raise SystemExit(f"this CPU cannot run {isa}: it measured {table.key.isa}")
    return {name: _rounded(value) for name, value in table.to_dict().items()}


def _rounded(value: object) -> object:
    """Four digits: more would be noise."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(inner) for inner in value]
    return value


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="per table")
    parser.add_argument("--isa", nargs="*", choices=ISAS, default=list(ISAS))
    options = parser.parse_args(arguments)
    kept = [
        table.to_dict() for table in _dispatch.builtin_tables() if table.key.isa not in options.isa
    ]
    fresh = []
    for isa in options.isa:
        for dtype in DTYPES:
            for threads in THREADS:
                print(f"{isa}, {dtype}, {threads} threads", flush=True)
                fresh.append(measured(isa, threads, dtype, options.seconds))
    lines = ",\n".join(json.dumps(table) for table in [*kept, *fresh])
    FILE.write_text(f'{{"tables": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
